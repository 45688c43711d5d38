"""MNIST: finding, checking and downloading it, and what stands in for it."""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import os
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
    """Gzip files; return what torchvision knows of them, names and checksums."""
    for name in names:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    return [(f"{name}.gz", hashlib.md5((raw / f"{name}.gz").read_bytes()).hexdigest()) for name in names]


def assert_holds_small_images(data):
    arrays = small_arrays()
    for part, images, labels in (("train", TRAIN_IMAGES, TRAIN_LABELS), ("test", TEST_IMAGES, TEST_LABELS)):
        pixels = torch.from_numpy(arrays[images].reshape(len(arrays[images]), -1)).float() / 255
        assert torch.equal(getattr(data, part), pixels)
        found = getattr(data, f"{part}_labels")
        assert torch.equal(found, torch.from_numpy(arrays[labels])) and found.dtype == torch.int64
    assert data.name == "MNIST" and data.is_mnist


# Files that are there


def test_real_mnist_is_known(mnist):
    assert mnist.is_mnist and mnist.shape == (28, 28)
    assert mnist.train.shape == (60_000, 784) and mnist.test.shape == (10_000, 784)
    assert mnist.train.dtype == torch.float32 and mnist.train_labels.dtype == torch.int64
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert mnist.train.min() == 0 and mnist.train.max() == 1
    assert mnist.train.mean().item() == pytest.approx(0.1307, abs=5e-5)  # as every tutorial normalises


@pytest.mark.parametrize("packed", [(), FILES], ids=["plain", "gzipped"])
def test_mnist_is_read_in_silence(small_mnist, packed, monkeypatch, capfd):
    monkeypatch.setattr(MNIST, "resources", pack(small_mnist / "MNIST" / "raw", *packed) or MNIST.resources)
    assert_holds_small_images(sae.load_mnist(small_mnist))
    assert capfd.readouterr() == ("", "")


def test_environment_names_the_root(small_mnist, monkeypatch):
    monkeypatch.setenv("MNIST_ROOT", str(small_mnist))
    assert sae.load_mnist().is_mnist


def test_root_may_begin_with_the_home_folder(small_mnist, monkeypatch):
    monkeypatch.setenv("HOME", str(small_mnist.parent))
    assert sae.load_mnist(f"~/{small_mnist.name}").is_mnist


def test_relative_root_is_found_from_here(small_mnist, monkeypatch):
    monkeypatch.chdir(small_mnist.parent)
    monkeypatch.setenv("MNIST_ROOT", small_mnist.name)
    assert sae.load_mnist().is_mnist


@pytest.mark.parametrize("name", ["root", "data"])
def test_relative_root_is_found_from_a_notebooks_folder(small_mnist, monkeypatch, tmp_path, name):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    small_mnist.rename(tmp_path / name)
    monkeypatch.setattr(sae, "_PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    assert sae.load_mnist(None if name == "data" else name).is_mnist
    assert list((tmp_path / "notebooks").iterdir()) == []


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


def claim_another_type(path):
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\x0d" + content[3:])  # float32


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


def put_a_folder_in_its_place(path):
    path.unlink()
    path.mkdir()


DAMAGES = [
    truncate, lengthen, empty, write_text, cut_in_header, make_sizes_negative, claim_another_type, truncate_gzip,
    write_text_as_gzip, change_a_byte_of_gzip, put_a_folder_in_its_place,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_file_ends_in_one_line_and_nothing_stands_in(small_mnist, damage, capfd):
    raw = small_mnist / "MNIST" / "raw"
    damage(raw / TEST_IMAGES)
    with one_line_error(raw, "does not give MNIST (", "delete damaged files, or connect"):
        sae.load_mnist(small_mnist)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [-1, 20], ids=["last", "21st"])
def test_changed_byte_is_found(small_mnist, name, place):
    path = small_mnist / "MNIST" / "raw" / name
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with one_line_error(path.parent, "other data than MNIST", "SHA-256 differs", "downloaded again"):
        sae.load_mnist(small_mnist)


def test_exchanged_files_are_found(small_mnist):
    raw = small_mnist / "MNIST" / "raw"
    for train, test in ((TRAIN_IMAGES, TEST_IMAGES), (TRAIN_LABELS, TEST_LABELS)):
        (raw / train).rename(raw / "other")
        (raw / test).rename(raw / train)
        (raw / "other").rename(raw / test)
    with one_line_error(raw, "SHA-256 differs"):
        sae.load_mnist(small_mnist)


def test_other_data_in_its_format_is_not_mnist(tmp_path):
    write_small(tmp_path / "MNIST" / "raw")
    with one_line_error(tmp_path / "MNIST" / "raw", "SHA-256 differs"):
        sae.load_mnist(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_ends_in_one_line_where_there_is_no_network(small_mnist, name):
    raw = small_mnist / "MNIST" / "raw"
    (raw / name).unlink()
    with one_line_error(raw, f"does not give MNIST (Error downloading {name}.gz", "or connect"):
        sae.load_mnist(small_mnist)
    assert len(list(raw.iterdir())) == 3


@pytest.mark.parametrize("packed", [FILES[:1], FILES[1:3], FILES[2:]], ids=["1", "2-3", "3-4"])
def test_mixture_of_plain_and_gzipped_files_needs_no_network(small_mnist, monkeypatch, packed):
    known = dict(MNIST.resources) | dict(pack(small_mnist / "MNIST" / "raw", *packed))
    monkeypatch.setattr(MNIST, "resources", list(known.items()))
    assert_holds_small_images(sae.load_mnist(small_mnist))


# Roots and folders that cannot be used


@pytest.mark.parametrize("file", [".", "MNIST", "MNIST/raw"])
def test_file_in_place_of_a_folder_is_named(tmp_path, file):
    (tmp_path / "root" / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "root" / file).touch()
    with one_line_error(tmp_path / "root", "does not give MNIST"):
        sae.load_mnist(tmp_path / "root")


LOCKED = {"file": f"root/MNIST/raw/{TRAIN_IMAGES}", "raw": "root/MNIST/raw", "root": "root", "above": "."}


@pytest.mark.parametrize("locked", ["file", "raw", "root", "above"])
def test_mnist_without_permission_is_named(reachable, locked):
    raw = write_small(reachable / "open" / "root" / "MNIST" / "raw")
    with one_line_error(raw), without_permission(reachable / "open" / LOCKED[locked]):
        sae.load_mnist(reachable / "open" / "root")


def test_folder_that_cannot_be_made_is_named(reachable):
    (reachable / "closed").mkdir()
    with one_line_error(reachable / "closed", "ermission denied"):  # noqa: SIM117
        with without_permission(reachable / "closed", 0o555):
            sae.load_mnist(reachable / "closed" / "root")


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_file_system_that_takes_nothing_is_named(tmp_path, monkeypatch, number):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "makedirs", refuse)
    with one_line_error(tmp_path, os.strerror(number)):
        sae.load_mnist(tmp_path)


# Without a network


def assert_fell_back(data, root, printed):
    assert not data.is_mnist and "not MNIST" in data.name
    assert printed.count("\n") == 1 and "NOT MNIST" in printed and str(root) in printed
    assert [path for path in root.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("there", [True, False], ids=["empty folder", "no folder"])
def test_scikit_learn_digits_stand_in(tmp_path, capfd, there):
    if there:
        (tmp_path / "root" / "MNIST" / "raw").mkdir(parents=True)
    data = sae.load_mnist(tmp_path / "root")
    out, err = capfd.readouterr()
    assert_fell_back(data, tmp_path / "root", err)
    assert out == ""
    assert data.shape == (28, 28) and len(data.train) + len(data.test) == 1_797
    assert data.train.shape[1] == data.test.shape[1] == 784
    assert len(data.train_labels) == len(data.train) and len(data.test_labels) == len(data.test)
    assert data.train.min() == 0 and 0.9 < data.train.max() <= 1 and data.train.dtype == torch.float32
    assert set(data.test_labels.tolist()) == set(range(10)) and data.train_labels.dtype == torch.int64


def test_other_files_in_the_folder_are_not_taken_for_mnist(tmp_path, capfd):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / ".gitkeep").touch()
    assert not sae.load_mnist(tmp_path).is_mnist
    assert "NOT MNIST" in capfd.readouterr().err


def test_a_refusal_is_not_waited_for(tmp_path):
    began = time.perf_counter()
    assert not sae.load_mnist(tmp_path).is_mnist
    assert time.perf_counter() - began < 4


@pytest.mark.parametrize("before", [None, 77.0])
def test_time_limit_of_other_connections_is_left_as_it_was(small_mnist, tmp_path, before):
    socket.setdefaulttimeout(before)
    try:
        assert sae.load_mnist(small_mnist).is_mnist and not sae.load_mnist(tmp_path / "none").is_mnist
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(None)


def test_a_mirror_that_never_answers_costs_seconds(tmp_path, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [mirror, mirror])  # torchvision has two
        began = time.perf_counter()
        data = sae.load_mnist(tmp_path)
        assert time.perf_counter() - began < 12
    assert_fell_back(data, tmp_path, capfd.readouterr().err)


def test_an_answer_that_is_not_http_is_no_network(tmp_path, monkeypatch, capfd):
    def talk():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"220 mail.example.org\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        thread = threading.Thread(target=talk)
        thread.start()
        data = sae.load_mnist(tmp_path)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert_fell_back(data, tmp_path, capfd.readouterr().err)


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
    monkeypatch.setattr(MNIST, "resources", pack(served, *FILES))
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


def files_in(root):
    return {path.name for path in (root / "MNIST" / "raw").iterdir()}


@pytest.mark.parametrize("below", [".", "new/folder"], ids=["empty folder", "no folder"])
def test_missing_files_are_downloaded_in_silence(mirror, empty_root, capfd, monkeypatch, refusing_address, below):
    mirror()
    assert_holds_small_images(sae.load_mnist(empty_root / below))
    assert capfd.readouterr() == ("", "")
    assert files_in(empty_root / below) == {*FILES, *(f"{name}.gz" for name in FILES)}
    monkeypatch.setattr(MNIST, "mirrors", [refusing_address])
    assert_holds_small_images(sae.load_mnist(empty_root / below))  # and need no network from then on


@pytest.mark.parametrize("name", FILES)
def test_one_missing_file_is_downloaded(mirror, small_mnist, name):
    mirror()
    (small_mnist / "MNIST" / "raw" / name).unlink()
    assert_holds_small_images(sae.load_mnist(small_mnist))


def test_packed_file_that_is_damaged_is_downloaded_again(mirror, small_mnist):
    mirror()
    change_a_byte_of_gzip(small_mnist / "MNIST" / "raw" / TRAIN_IMAGES)
    assert_holds_small_images(sae.load_mnist(small_mnist))


def test_second_mirror_is_asked_where_the_first_refuses(mirror, empty_root, monkeypatch, refusing_address):
    mirror()
    monkeypatch.setattr(MNIST, "mirrors", [refusing_address, *MNIST.mirrors])
    assert_holds_small_images(sae.load_mnist(empty_root))


def assert_next_time_is_whole(mirror, root):
    """What a download left behind is no reason for another result when there is a network again."""
    mirror()
    assert_holds_small_images(sae.load_mnist(root))


@pytest.mark.parametrize("handler, seconds", [(BreaksOff, 4), (Stalls, 12)])
def test_download_that_breaks_off_ends_in_seconds_and_can_be_tried_again(mirror, empty_root, handler, seconds, capfd):
    mirror(handler)
    began = time.perf_counter()
    with one_line_error(empty_root / "MNIST" / "raw", "does not give MNIST", "or connect"):
        sae.load_mnist(empty_root)
    assert time.perf_counter() - began < seconds
    assert capfd.readouterr() == ("", "")
    assert_next_time_is_whole(mirror, empty_root)


def test_download_with_a_wrong_checksum_is_not_used(mirror, empty_root):
    served = mirror()
    # The third of four, so that two good files have come before it.
    good = (served / f"{TEST_IMAGES}.gz").read_bytes()
    (served / f"{TEST_IMAGES}.gz").write_bytes(gzip.compress(idx(np.ones((40, 6, 7)))))
    with one_line_error(empty_root, TEST_IMAGES):
        sae.load_mnist(empty_root)
    (served / f"{TEST_IMAGES}.gz").write_bytes(good)
    assert_next_time_is_whole(mirror, empty_root)


def test_download_of_three_files_names_the_fourth(mirror, empty_root):
    served = mirror()
    (served / f"{TEST_LABELS}.gz").unlink()
    with one_line_error(empty_root, TEST_LABELS):
        sae.load_mnist(empty_root)


def test_download_to_a_folder_without_permission_is_named(mirror, reachable):
    mirror()
    (reachable / "closed" / "MNIST" / "raw").mkdir(parents=True)
    with one_line_error(reachable / "closed", "ermission denied"):  # noqa: SIM117
        with without_permission(reachable / "closed" / "MNIST" / "raw", 0o555):
            sae.load_mnist(reachable / "closed")
