"""Data sets in MNIST's file format: what is read, what is refused, and what may call itself MNIST."""

from __future__ import annotations

import gzip
import os
import zlib

import numpy as np
import pytest
import torch
from conftest import (
    FILES,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    idx,
    one_line_error,
    small_arrays,
    without_permission,
    write_small,
)

from mnist_sae_train import load_idx


def pack(folder, *names):
    for name in names:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("packed", [(), FILES, (TRAIN_IMAGES,)], ids=["plain", "gzipped", "mixed"])
@pytest.mark.parametrize("below", [".", "raw"])
def test_pixels_and_labels_are_read(tmp_path, below, packed):
    pack(write_small(tmp_path / "letters" / below), *packed)
    data, arrays = load_idx(tmp_path / "letters"), small_arrays()
    assert data.name == "letters" and not data.is_mnist and data.shape == (6, 7)
    for x, labels, part in ((data.train, data.train_labels, FILES[:2]), (data.test, data.test_labels, FILES[2:])):
        assert x.dtype == torch.float32 and labels.dtype == torch.int64
        assert np.allclose(x, arrays[part[0]].reshape(len(x), 42) / 255)
        assert labels.tolist() == arrays[part[1]].tolist()


def test_files_of_the_folder_itself_win(tmp_path):
    write_small(tmp_path / "letters")
    write_small(tmp_path / "letters" / "raw", n_train=7)
    assert len(load_idx(tmp_path / "letters").train) == 100


@pytest.mark.parametrize("name", ["MNIST", "mnist", " MNIST"])
def test_folder_named_mnist_does_not_make_it_mnist(tmp_path, name):
    data = load_idx(write_small(tmp_path / name))
    assert data.name == "MNIST (not the original)" and not data.is_mnist


def test_mnist_is_known_by_its_content(small_mnist):
    data = load_idx((small_mnist / "MNIST").rename(small_mnist / "elsewhere"))
    assert data.name == "MNIST" and data.is_mnist


def test_real_mnist_is_known_by_its_content(mnist_root):
    assert load_idx(mnist_root / "MNIST").is_mnist


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
def test_name_is_one_line_of_valid_unicode(tmp_path, name):
    folder = write_small(tmp_path / os.fsdecode(name))
    shown = load_idx(folder).name
    assert shown.encode() and shown.isprintable() and shown.startswith(("caf", "two"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def pack_and(change):
    def damage(path):
        packed = gzip.compress(path.read_bytes())
        path.unlink()
        path.with_name(f"{path.name}.gz").write_bytes(change(packed))

    return damage


DAMAGES = {
    "cut": (cut, "bytes where its header promises"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes where its header promises"),
    "empty": (lambda path: path.write_bytes(b""), "starts with nothing"),
    "text": (lambda path: path.write_text("<html>"), "not an idx file"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:9]), "not an idx file"),
    "of floats": (lambda path: path.write_bytes(b"\0\0\x0d" + path.read_bytes()[3:]), "not an idx file"),
    "promises much": (lambda path: path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12), "bytes where its header promises"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
    "gzip, cut": (pack_and(lambda packed: packed[:-9]), "is damaged"),
    "gzip, text": (pack_and(lambda packed: b"<html>"), "is damaged"),
    "gzip, a byte": (pack_and(lambda packed: packed[:40] + bytes([packed[40] ^ 255]) + packed[41:]), "is damaged"),
    "gzip, no deflate": (pack_and(lambda packed: packed[:10] + b"\xff" * 50), "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_file_is_named(tmp_path, kind):
    damage, what = DAMAGES[kind]
    path = write_small(tmp_path / "letters") / TEST_IMAGES
    damage(path)
    with one_line_error(path, what, "replace it with a good copy"):
        load_idx(tmp_path / "letters")


def test_error_of_zlib_is_an_error_of_the_file(tmp_path, monkeypatch):
    pack(write_small(tmp_path / "letters"), TRAIN_IMAGES)

    def fail(*_):
        raise zlib.error("invalid distance")

    monkeypatch.setattr(gzip.GzipFile, "read", fail)
    with one_line_error(TRAIN_IMAGES, "is damaged (invalid distance)"):
        load_idx(tmp_path / "letters")


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(tmp_path, name):
    (write_small(tmp_path / "letters") / name).unlink()
    with one_line_error(tmp_path / "letters" / name, "is missing", "copy the file there"):
        load_idx(tmp_path / "letters")


def test_empty_folder_is_named(tmp_path):
    with one_line_error(tmp_path, TRAIN_IMAGES, "is missing"):
        load_idx(tmp_path)


@pytest.mark.parametrize("locked", [TRAIN_IMAGES, "."], ids=["file", "folder"])
def test_data_set_without_permission_is_named(reachable, locked):
    folder = write_small(reachable / "letters")
    with one_line_error(folder, "Permission denied", "give yourself access"), without_permission(folder / locked):
        load_idx(folder)


@pytest.mark.parametrize("images, labels", [(TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)])
@pytest.mark.parametrize("wrong", [np.zeros(7), np.zeros((40, 2)), np.zeros(0)], ids=["fewer", "two columns", "none"])
def test_labels_that_do_not_belong_to_the_images_are_named(tmp_path, images, labels, wrong):
    folder = write_small(tmp_path / "letters")
    (folder / labels).write_bytes(idx(wrong))
    with one_line_error(folder / images, str(wrong.shape), "replace the pair"):
        load_idx(folder)


@pytest.mark.parametrize("changes", [{"n_test": 0}, {"n_train": 0}, {"shape": (8, 0)}, {"shape": (0, 8)}])
def test_data_without_a_pixel_is_named(tmp_path, changes):
    folder = write_small(tmp_path / "letters", **changes)
    with one_line_error(folder, "none of them 0", "replace the pair"):
        load_idx(folder)


def test_training_and_test_images_of_different_size_are_named(tmp_path):
    folder = write_small(tmp_path / "letters")
    (folder / TEST_IMAGES).write_bytes(idx(np.zeros((40, 7, 6))))
    with one_line_error(folder, "differ in size", "replace one of them"):
        load_idx(folder)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch(), lambda path: path.symlink_to(path)])
def test_data_set_that_is_no_folder_is_named(tmp_path, make):
    make(tmp_path / "letters")
    with one_line_error(tmp_path / "letters", "is not a folder", "four idx files"):
        load_idx(tmp_path / "letters")
