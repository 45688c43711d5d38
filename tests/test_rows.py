"""Rows of numbers in a file in place of images: what is read, what is refused, and a file larger than the memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line_error
from safetensors.numpy import save_file
from safetensors.torch import load_file
from test_command_line import QUALITY, TINY, Process, assert_refused, run, strict_json
from test_processes import group, statuses
from test_runs import assert_as_if_never_stopped, stopped

import mnist_sae_train as cli
import sae_helpers as sae

pytestmark = pytest.mark.usefixtures("elsewhere")

FILES = {"sae.safetensors", "metrics.json", "training_metrics.png"}
N, D = 5000, 12


def numbers(n=N, d=D, kind=np.float32):
    """Rows with something to learn, and a mean that is not zero."""
    draw = np.random.default_rng(0)
    return (1 + draw.exponential(size=(n, 6)) @ draw.normal(size=(6, d))).astype(kind)


def write(array, name="rows.npy"):
    np.save(name, array) if name.endswith(".npy") else save_file({"activations": array}, name)
    return Path(name)


# Reading


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("name", ["rows.npy", "rows.safetensors"])
def test_rows_are_mapped_and_the_last_tenth_is_held_out(name, kind):
    array = numbers(kind=kind)
    data = cli.load_rows(write(array, name))
    assert data.name == name and not data.is_mnist
    assert np.array_equal(data.train, array[:4500]) and np.array_equal(data.test, array[4500:].astype(np.float32))
    assert np.allclose(data.mean, array[:4500].astype(np.float64).mean(0), rtol=1e-6, atol=0)
    with open("/proc/self/maps") as maps:
        assert str(Path(name).absolute()) in maps.read()


def test_at_most_ten_thousand_rows_are_held_out():
    data = cli.load_rows(write(numbers(n=200_000, d=2)))
    assert len(data.train) == 190_000 and len(data.test) == 10_000


def changed(row, value):
    array = numbers()
    array[row, 3] = value
    return array


REFUSED = {
    "whole numbers": (lambda: write(np.ones((N, D), np.int64)), "int64 [5000, 12]"),
    "doubles": (lambda: write(np.ones((N, D))), "float64 [5000, 12]"),
    "doubles in safetensors": (lambda: write(np.ones((N, D)), "rows.safetensors"), "cannot be used"),
    "big-endian": (lambda: write(numbers().astype(">f4")), ">f4 [5000, 12]"),
    "a vector": (lambda: write(numbers()[:, 0].copy()), "float32 [5000]"),
    "three dimensions": (lambda: write(numbers().reshape(N, 3, 4)), "float32 [5000, 3, 4]"),
    "nine rows": (lambda: write(numbers(n=9)), "float32 [9, 12]"),
    "no columns": (lambda: write(numbers()[:, :0].copy()), "cannot be used"),
    "Fortran order": (lambda: write(np.asfortranarray(numbers())), "in Fortran order"),
    "objects": (lambda: write(np.array([["a", {}]] * 20, object)), "cannot be used"),
    "an archive": (lambda: (np.savez("rows", numbers()), Path("rows.npz").rename("rows.npy"))[1], "cannot be used"),
    "two tensors": (
        lambda: (save_file({"a": numbers(), "b": numbers()}, "rows.safetensors"), Path("rows.safetensors"))[1],
        "cannot be used",
    ),
    "cut": (lambda: (write(numbers()), os.truncate("rows.npy", 90_000), Path("rows.npy"))[2], "cannot be used"),
    "text": (lambda: (Path("rows.npy").write_text("0.5"), Path("rows.npy"))[1], "cannot be used"),
    "nothing": (lambda: (Path("rows.npy").touch(), Path("rows.npy"))[1], "cannot be used"),
    "no file": (lambda: Path("rows.npy"), "there is no such file"),
    "a pipe": (lambda: (os.mkfifo("rows.npy"), Path("rows.npy"))[1], "there is no such file"),
    "NaN": (lambda: write(changed(4321, np.nan)), "row 4,321 holds NaN"),
    "infinity that is held out": (lambda: write(changed(4567, np.inf)), "row 4,567 holds NaN"),
    "a square beyond float32": (lambda: write(changed(0, 1e30)), "numbers that are too large"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_file_that_cannot_be_used_is_named(kind):
    make, what = REFUSED[kind]
    path = make()
    with one_line_error(path, what):
        cli.load_rows(path)


def test_refusal_ends_the_command_in_one_line(capsys):
    assert_refused(capsys, ["--data", write(numbers(n=9)), *TINY, "--out", "out"], "rows.npy", "give 10 rows or more")
    assert_refused(capsys, ["--data", write(numbers()), *TINY, "--analyze_loss"], "--analyze_loss", "leave --data out")
    assert not Path("out").exists()


# Training


def test_order_mixes_within_blocks_and_blocks_within_the_file():
    n, generator = 300 * cli.BLOCK + 5, torch.Generator().manual_seed(0)
    orders = [cli.order_by_blocks(n, generator) for _ in range(2)]
    for order in orders:
        assert order.sort()[0].equal(torch.arange(n))
        for part in order.split(64 * cli.BLOCK):
            assert len((part // cli.BLOCK).unique()) <= 64 + 1  # the last block of the file is a short one
        neighbours = (order[1:] - order[:-1]).abs() <= 1
        assert neighbours.float().mean() < 1e-3
    assert (orders[0] == orders[1]).float().mean() < 0.01


def test_rows_from_a_file_train_what_rows_in_memory_do(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n - 1, -1, -1))
    recipe = sae.Recipe("improved", d_sae=24, k=3, n_members=2, epochs=2)
    data = cli.load_rows(write(numbers(kind=np.float16)))
    monkeypatch.setattr(cli, "BLOCK", 1)
    monkeypatch.setattr(cli, "order_by_blocks", lambda n, generator: torch.arange(n - 1, -1, -1))
    mapped = cli.FileTrainer(recipe, data).run(progress=False)
    images = sae.Images("rows", (), data.train.float(), data.train_labels, data.test, data.test_labels)
    whole = cli.FileTrainer(recipe, images).run(progress=False)
    torch.testing.assert_close(mapped.model.W, whole.model.W, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mapped.history["mse"], whole.history["mse"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["rows.npy", "rows.safetensors"])
def test_run_writes_metrics_of_both_parts_and_only_the_picture_that_makes_sense(name):
    output = run("--data", write(numbers(), name), *TINY, "--out", "out")
    assert "4,500 training and 500 test rows" in output and f"{name}, test rows, mean of members" in output
    assert {path.name for path in Path("out").iterdir()} == FILES
    data, model = cli.load_rows(Path(name)), sae.TopKSAE.load("out/sae.safetensors")
    final = strict_json(Path("out/metrics.json"))["final"]
    for part, x in (("train", data.train[:500]), ("test", data.test)):
        quality = sae.evaluate(model, x, data.train.mean(0))
        for figure in QUALITY:
            assert final[part][figure] == pytest.approx(quality[figure].tolist(), rel=1e-4)
        assert min(final[part]["explained_variance"]) > 0.5


def test_stopped_run_goes_on_bit_for_bit(monkeypatch, capsys):
    path = write(numbers(n=150))
    run("--data", path, *TINY, "--epochs", 5, "--consistency_weight", 0.1, "--out", "whole")
    assert stopped(monkeypatch, path, "out", 11) == 130
    run("--data", path, "--resume", "--out", "out")
    assert_as_if_never_stopped(Path("out"), Path("whole"), FILES)


def test_other_rows_are_refused_at_the_resume(monkeypatch, capsys):
    path = write(numbers(n=150))
    assert stopped(monkeypatch, path, "out", 11) == 130
    capsys.readouterr()
    write(numbers(n=150) * 2)
    assert_refused(capsys, ["--data", path, "--resume", "--out", "out"], "rows.npy", "same data")


def test_two_processes_share_the_rows():
    path = write(numbers(n=500))
    run("--data", path, *TINY, "--out", "one")
    processes = group("--data", path, *TINY, "--out", "two")
    assert statuses(processes) == [0, 0], processes[0].printed()
    one, two = (load_file(f"{out}/sae.safetensors") for out in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-3)


# More than memory


def in_little_memory(arguments, room):
    """Runs in a process of its own, which may take `room` bytes more than it has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            limit = int(line.split()[1]) * 1024 + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.ones(2 * room, np.uint8)
    except MemoryError:
        os._exit(cli.main(arguments))
    os._exit(99)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited and measured as Linux does it")
def test_file_larger_than_the_memory_trains():
    n = 300_000
    rows = np.lib.format.open_memmap("rows.npy", "w+", np.float16, (n, 512))
    rows[:] = np.tile(numbers(n=1000, d=512, kind=np.float16), (n // 1000, 1))
    rows.flush()
    room = rows.nbytes * 2 // 3
    del rows
    arguments = ["--data", "rows.npy", *TINY, "--epochs", "1", "--batch_size", "1024", "--out", "out"]
    process = Process.server.Process(target=in_little_memory, args=(arguments, room))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert {path.name for path in Path("out").iterdir()} == FILES
