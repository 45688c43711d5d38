"""Finding, checking, downloading and replacing the images."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import socket
import threading
import time

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
from torchvision.datasets import MNIST

import sae_helpers as sae


def pack(raw, *names):
    for name in names:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()


def assert_holds_small_images(data):
    arrays = small_arrays()
    for part, images, labels in (("train", TRAIN_IMAGES, TRAIN_LABELS), ("test", TEST_IMAGES, TEST_LABELS)):
        pixels = torch.from_numpy(arrays[images].reshape(len(arrays[images]), -1)).float() / 255
        assert torch.equal(getattr(data, part), pixels)
        assert torch.equal(getattr(data, f"{part}_labels"), torch.from_numpy(arrays[labels]))
    assert data.shape == (6, 7)


# Files that are there


def test_real_mnist_is_known(mnist):
    assert mnist.is_mnist and mnist.shape == (28, 28)
    assert mnist.train.shape == (60_000, 784) and mnist.test.shape == (10_000, 784)
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.train.min() == 0 and mnist.train.max() == 1
    assert mnist.train.mean().item() == pytest.approx(0.1307, abs=5e-5)  # as every tutorial normalises


@pytest.mark.parametrize("packed", [(), FILES, (TRAIN_IMAGES, TEST_LABELS)], ids=["plain", "gzipped", "mixed"])
def test_mnist_is_read(small_mnist, packed):
    pack(small_mnist / "MNIST" / "raw", *packed)
    data = sae.load_mnist(small_mnist)
    assert data.is_mnist
    assert_holds_small_images(data)


def test_environment_names_the_root(small_mnist, monkeypatch):
    monkeypatch.setenv("MNIST_ROOT", str(small_mnist))
    assert sae.load_mnist().is_mnist


def test_relative_root_is_found_from_here(small_mnist, monkeypatch):
    monkeypatch.chdir(small_mnist.parent)
    monkeypatch.setenv("MNIST_ROOT", small_mnist.name)
    assert sae.load_mnist().is_mnist


def test_relative_root_is_found_from_a_notebooks_folder(small_mnist, monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(sae, "_PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path / "notebooks")
    assert sae.load_mnist(small_mnist.name).is_mnist


# Files that are damaged


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


def empty(path):
    path.write_bytes(b"")


def write_text(path):
    path.write_bytes(b"<html>not found</html>")


def cut_in_header(path):
    path.write_bytes(path.read_bytes()[:6])


def make_sizes_negative(path):
    content = path.read_bytes()  # -6 x -7 pixels are as many as 6 x 7
    path.write_bytes(content[:8] + np.array([-6, -7], ">i4").tobytes() + content[16:])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate_gzip(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()


def write_text_as_gzip(path):
    path.with_name(f"{path.name}.gz").write_bytes(b"<html>not found</html>")
    path.unlink()


def change_a_byte_of_gzip(path):
    content = bytearray(gzip.compress(path.read_bytes()))
    content[len(content) // 2] ^= 255
    path.with_name(f"{path.name}.gz").write_bytes(content)
    path.unlink()


STRUCTURAL = [
    (truncate, "bytes where its header promises"),
    (lengthen, "bytes where its header promises"),
    (empty, "starts with nothing"),
    (write_text, "is not an idx file"),
    (cut_in_header, "is not an idx file"),
    (make_sizes_negative, ""),
    (truncate_gzip, "is damaged"),
    (write_text_as_gzip, "is damaged"),
    (change_a_byte_of_gzip, "is damaged"),
]


@pytest.mark.parametrize("damage, what", [*STRUCTURAL, (change_a_byte, "SHA-256 differs")])
def test_damaged_mnist_file_is_named(small_mnist, damage, what):
    path = small_mnist / "MNIST" / "raw" / TEST_IMAGES
    damage(path)
    with one_line_error(path, what, "delete it, and it will be downloaded again"):
        sae.load_mnist(small_mnist)


@pytest.mark.parametrize("damage, what", STRUCTURAL)
def test_damaged_file_of_another_data_set_is_named(tmp_path, damage, what):
    path = write_small(tmp_path / "letters") / TEST_IMAGES
    damage(path)
    with one_line_error(path, what, "replace it with a good copy"):
        sae.load_idx(tmp_path / "letters")


# Roots and folders that cannot be used


def test_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with one_line_error(tmp_path / "file", "is not a folder", "set MNIST_ROOT"):
        sae.load_mnist(tmp_path / "file")


@pytest.mark.parametrize("locked", [f"MNIST/raw/{TRAIN_IMAGES}", "MNIST/raw", "."], ids=["file", "raw", "root"])
def test_mnist_without_permission_is_named(reachable, locked):
    root = reachable / "root"
    raw = write_small(root / "MNIST" / "raw")
    with one_line_error(raw, "Permission denied", "give yourself access"), without_permission(root / locked):
        sae.load_mnist(root)


def test_root_in_a_locked_folder_is_named(reachable):
    root = reachable / "locked" / "root"
    write_small(root / "MNIST" / "raw")
    with one_line_error(root, "Permission denied", "give yourself access"), without_permission(root.parent):
        sae.load_mnist(root)


@pytest.mark.parametrize("locked", [TRAIN_IMAGES, "."], ids=["file", "folder"])
def test_data_set_without_permission_is_named(reachable, locked):
    folder = write_small(reachable / "letters")
    with one_line_error(folder, "Permission denied", "give yourself access"), without_permission(folder / locked):
        sae.load_idx(folder)


def test_folder_in_place_of_a_file_is_named(small_mnist):
    path = small_mnist / "MNIST" / "raw" / TEST_LABELS
    path.unlink()
    path.mkdir()
    with one_line_error(path, "s a directory"):
        sae.load_mnist(small_mnist)


# Data sets that are not MNIST


@pytest.mark.parametrize("packed", [(), FILES], ids=["plain", "gzipped"])
@pytest.mark.parametrize("below", [".", "raw"])
def test_another_data_set_is_read(tmp_path, below, packed):
    pack(write_small(tmp_path / "letters" / below), *packed)
    data = sae.load_idx(tmp_path / "letters")
    assert data.name == "letters" and not data.is_mnist
    assert_holds_small_images(data)


def test_folder_named_mnist_does_not_make_it_mnist(tmp_path):
    # Its checksums were not compared, so claims about MNIST must not be checked on it.
    assert not sae.load_idx(write_small(tmp_path / "MNIST")).is_mnist


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(tmp_path, name):
    (write_small(tmp_path / "letters") / name).unlink()
    with one_line_error(tmp_path / "letters" / name, "is missing", "copy the file there"):
        sae.load_idx(tmp_path / "letters")


@pytest.mark.parametrize("images, labels", [(TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)])
@pytest.mark.parametrize("wrong", [np.zeros(7), np.zeros((40, 2)), np.zeros(0)], ids=["fewer", "two columns", "none"])
def test_labels_that_do_not_belong_to_the_images_are_named(tmp_path, images, labels, wrong):
    folder = write_small(tmp_path / "letters")
    (folder / labels).write_bytes(idx(wrong))
    with one_line_error(folder / images, str(wrong.shape), "replace the pair"):
        sae.load_idx(folder)


def test_no_images_at_all_is_an_error(tmp_path):
    folder = write_small(tmp_path / "letters", n_test=0)
    with one_line_error(folder / TEST_IMAGES, "n > 0", "replace the pair"):
        sae.load_idx(folder)


def test_training_and_test_images_of_different_size_are_an_error(tmp_path):
    folder = write_small(tmp_path / "letters")
    (folder / TEST_IMAGES).write_bytes(idx(np.zeros((40, 7, 6))))
    with one_line_error(folder, "differ in size", "replace one of them"):
        sae.load_idx(folder)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch()], ids=["nothing there", "a file"])
def test_data_set_that_is_no_folder_is_named(tmp_path, make):
    make(tmp_path / "letters")
    with one_line_error(tmp_path / "letters", "is not a folder", "four idx files"):
        sae.load_idx(tmp_path / "letters")


# Without a network


def assert_fell_back(data, root, printed):
    assert not data.is_mnist and "not MNIST" in data.name
    assert "NOT MNIST" in printed and str(root) in printed
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_scikit_learn_digits_stand_in(tmp_path, capsys):
    data = sae.load_mnist(tmp_path / "root")
    assert_fell_back(data, tmp_path / "root", capsys.readouterr().err)
    assert data.shape == (28, 28) and len(data.train) + len(data.test) == 1_797
    assert data.train.shape[1] == data.test.shape[1] == 784
    assert len(data.train_labels) == len(data.train) and len(data.test_labels) == len(data.test)
    assert data.train.min() == 0 and 0.9 < data.train.max() <= 1
    assert set(data.test_labels.tolist()) == set(range(10))


def test_a_refusal_is_not_waited_for(tmp_path):
    began = time.perf_counter()
    assert not sae.load_mnist(tmp_path).is_mnist
    assert time.perf_counter() - began < 4


def test_a_mirror_that_never_answers_costs_seconds(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [mirror, mirror])  # torchvision has two
        began = time.perf_counter()
        data = sae.load_mnist(tmp_path)
        assert time.perf_counter() - began < 12
    assert_fell_back(data, tmp_path, capsys.readouterr().err)


def test_an_answer_that_is_not_http_is_no_network(tmp_path, monkeypatch, capsys):
    def talk():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"220 mail.example.org\r\n")

    uncaught = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        thread = threading.Thread(target=talk)
        thread.start()
        data = sae.load_mnist(tmp_path)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert_fell_back(data, tmp_path, capsys.readouterr().err)
    assert not uncaught  # a thread's traceback would stand between the user and the message


# Downloads


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class BreaksOff(Quiet):
    """Promises the whole file, sends half of it and hangs up."""

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2])


class Stalls(Quiet):
    """Promises the whole file, sends half of it and then nothing more."""

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2])
        self.server.test_is_over.wait(60)


@pytest.fixture
def mirror(reachable, monkeypatch):
    """Serve the small data set, gzipped, in place of MNIST; the argument is the request handler."""
    served = write_small(reachable / "served")
    pack(served, *FILES)
    packed = [(f"{name}.gz", (served / f"{name}.gz").read_bytes()) for name in FILES]
    monkeypatch.setattr(MNIST, "resources", [(name, hashlib.md5(content).hexdigest()) for name, content in packed])
    with contextlib.ExitStack() as running:

        def serve(handler=Quiet):
            server = http.server.ThreadingHTTPServer(
                ("127.0.0.1", 0), functools.partial(handler, directory=str(served))
            )
            running.callback(server.server_close)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            running.callback(thread.join)
            running.callback(server.shutdown)
            server.test_is_over = threading.Event()
            running.callback(server.test_is_over.set)
            monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
            return served

        yield serve


@pytest.fixture
def empty_root(small_mnist):
    for name in FILES:
        (small_mnist / "MNIST" / "raw" / name).unlink()
    return small_mnist


def test_download_leaves_the_four_files_and_nothing_else(mirror, empty_root, capsys):
    mirror()
    data = sae.load_mnist(empty_root)
    assert data.is_mnist
    assert_holds_small_images(data)
    raw = empty_root / "MNIST" / "raw"
    assert {path.name for path in raw.iterdir()} == set(FILES)
    assert capsys.readouterr().err == f"Downloading MNIST to {raw} …\n"


def test_download_makes_the_folders(mirror, empty_root):
    mirror()
    assert sae.load_mnist(empty_root / "new" / "folder").is_mnist


def test_download_leaves_files_that_are_there_alone(mirror, empty_root):
    served = mirror()
    raw = empty_root / "MNIST" / "raw"
    (served / f"{TRAIN_LABELS}.gz").rename(raw / f"{TRAIN_LABELS}.gz")
    (served / f"{TRAIN_LABELS}.gz").write_bytes((raw / f"{TRAIN_LABELS}.gz").read_bytes())
    before = (raw / f"{TRAIN_LABELS}.gz").stat()
    assert_holds_small_images(sae.load_mnist(empty_root))
    after = (raw / f"{TRAIN_LABELS}.gz").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (raw / TRAIN_LABELS).exists()


def test_download_that_breaks_off_leaves_nothing(mirror, empty_root, capsys):
    mirror(BreaksOff)
    data = sae.load_mnist(empty_root)
    printed = capsys.readouterr().err
    assert_fell_back(data, empty_root, printed)
    assert "broke off" in printed


def test_download_that_stalls_costs_seconds_and_leaves_nothing(mirror, empty_root, capsys):
    mirror(Stalls)
    began = time.perf_counter()
    data = sae.load_mnist(empty_root)
    assert time.perf_counter() - began < 20
    assert_fell_back(data, empty_root, capsys.readouterr().err)


def test_download_with_a_wrong_checksum_leaves_nothing(mirror, empty_root, capsys):
    served = mirror()
    # The third of four, so that two good files have come before it.
    (served / f"{TEST_IMAGES}.gz").write_bytes(gzip.compress(idx(np.ones((40, 6, 7)))))
    assert_fell_back(sae.load_mnist(empty_root), empty_root, capsys.readouterr().err)


def test_download_where_one_file_is_missing_leaves_nothing(mirror, empty_root, capsys):
    served = mirror()
    (served / f"{TEST_LABELS}.gz").unlink()
    assert_fell_back(sae.load_mnist(empty_root), empty_root, capsys.readouterr().err)


def test_download_to_a_folder_without_permission_is_named(mirror, reachable):
    mirror()
    (reachable / "closed").mkdir()
    with one_line_error(reachable / "closed", "Permission denied", "choose another folder"):  # noqa: SIM117
        with without_permission(reachable / "closed", 0o555):
            sae.load_mnist(reachable / "closed" / "root")
