"""What several test files share: small data sets, a network that is not there, and checks of messages."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from torchvision.datasets import MNIST

import mnist_sae_train
import sae_helpers as sae

# No test opens a window, nor does a process that a test starts.
os.environ["MPLBACKEND"] = "Agg"
matplotlib.use("Agg")

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
PROJECT = Path(sae.__file__).resolve().parent
# Tests change the folder; a relative path means the one that pytest was started in.
REAL_MNIST = Path(os.environ.get("MNIST_ROOT") or PROJECT / "data").expanduser().resolve()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a full training on the real MNIST, or a notebook in a browser: minutes")
    # Begun in the background (a shell's &), Python ignores ^C, which some tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("data") / "letters")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """No test writes into the project."""
    monkeypatch.chdir(tmp_path)


def idx(array: np.ndarray) -> bytes:
    """MNIST's file format, written independently of the reader that it tests."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def small_arrays(n_train: int = 100, n_test: int = 40, shape: tuple[int, int] = (6, 7)) -> dict[str, np.ndarray]:
    """Random images: not square, so that no height passes for a width."""
    draw = np.random.default_rng(0)
    return {
        TRAIN_IMAGES: draw.integers(0, 256, (n_train, *shape)),
        TRAIN_LABELS: draw.integers(0, 10, n_train),
        TEST_IMAGES: draw.integers(0, 256, (n_test, *shape)),
        TEST_LABELS: draw.integers(0, 10, n_test),
    }


def write_small(folder: Path, **changes) -> Path:
    """Write the four small files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in small_arrays(**changes).items():
        (folder / name).write_bytes(idx(array))
    return folder


@contextlib.contextmanager
def one_line_error(*parts: object):
    """SAEError whose message is one line and holds all of `parts`."""
    with pytest.raises(sae.SAEError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@contextlib.contextmanager
def without_permission(path: Path, mode: int = 0):
    """Take permissions from `path`. They do not bind root, who steps down to another user."""
    before = path.stat().st_mode
    path.chmod(mode)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(before)


@pytest.fixture
def reachable():
    """A folder that another user can reach; pytest's own is closed to all others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def refusing_address():
    """An address where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, refusing_address):
    """No test downloads by accident; those about downloads set a mirror of their own."""
    monkeypatch.setattr(MNIST, "mirrors", [refusing_address])
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A root in torchvision's layout whose small files pass for the original ones."""
    content = b"".join(array.astype(np.uint8).tobytes() for array in small_arrays().values())
    monkeypatch.setattr(sae, "_SHA256", hashlib.sha256(content).hexdigest())
    write_small(tmp_path / "root" / "MNIST" / "raw")
    return tmp_path / "root"


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    raw = REAL_MNIST / "MNIST" / "raw"
    if not all((raw / name).exists() or (raw / f"{name}.gz").exists() for name in FILES):
        pytest.skip(f"the real MNIST is not in {raw}: set MNIST_ROOT to the folder that holds MNIST/raw")
    return REAL_MNIST


@pytest.fixture(scope="session")
def mnist(mnist_root) -> sae.Images:
    return sae.load_mnist(mnist_root)


@pytest.fixture
def small(tmp_path) -> sae.Images:
    return mnist_sae_train.load_idx(write_small(tmp_path / "small"))
