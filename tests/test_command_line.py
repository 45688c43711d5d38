"""The command line: what it writes, what it refuses, what it prints, and what it tells Weights & Biases."""

from __future__ import annotations

import contextlib
import gc
import http.server
import io
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEST_IMAGES, TRAIN_IMAGES, idx, write_small
from safetensors import safe_open
from safetensors.torch import load_file

import mnist_sae_train as cli
import sae_helpers as sae

pytestmark = pytest.mark.usefixtures("elsewhere")

SCRIPT = Path(cli.__file__).resolve()
TINY = ["--hidden_size", "24", "--k", "3", "--num_saes", "2", "--epochs", "2", "--batch_size", "32", "--device", "cpu"]
RESULTS = {"sae.safetensors", "metrics.json", "reconstructions.png", "training_metrics.png", "sae_features.png"}
QUALITY = ("mse", "pearson", "explained_variance", "dead_fraction", "rare_fraction")
SECONDS = 120  # far above what any process here takes
LOADED = ["mnist_sae_train", "matplotlib.pyplot", "scipy.optimize", "torchvision.datasets", "pytest", "tqdm.auto"]


def run(*arguments):
    """Standard output of a run that is expected to work."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = cli.main([str(argument) for argument in arguments])
    assert status == 0, errors.getvalue()
    return output.getvalue()


def assert_refused(capsys, arguments, *parts):
    """Exit status 2, and one line that holds all of `parts`."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert_one_line(capsys.readouterr().err, *parts)


def assert_one_line(printed, *parts):
    assert printed.count("\n") == 1 and printed.endswith("\n"), printed
    assert "error: " in printed
    for part in parts:
        assert str(part) in printed


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_bytes().decode(), parse_constant=refuse)


def child(arguments, folder, output, environment, state_seconds, kill_at):
    """Runs in a process of its own."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    cli.STATE_SECONDS = state_seconds
    original, calls = sae.write_atomically, []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def write_atomically(path, write):
        def half(temporary):
            write(temporary)
            os.truncate(temporary, temporary.stat().st_size // 2)
            die()

        calls.append(path)
        now = kill_at[0] if len(calls) == kill_at[1] else None
        if now == "replace":
            os.replace = lambda *_: die()
        original(path, half if now == "write" else write)

    sae.write_atomically = write_atomically
    sys.exit(cli.main(arguments))


class Process:
    """A command in a process of its own, forked from one that has loaded all modules: that takes seconds."""

    server = multiprocessing.get_context("forkserver")

    def __init__(self, arguments, state_seconds=30, kill_at=(None, 0), environment=None):
        self.server.set_forkserver_preload(LOADED)
        descriptor, name = tempfile.mkstemp(dir=Path.cwd().parent)  # beside the test's own folder
        os.close(descriptor)
        self.output = Path(name)
        arguments, environment = [str(argument) for argument in arguments], dict(environment or os.environ)
        self.process = self.server.Process(
            target=child, args=(arguments, Path.cwd(), self.output, environment, state_seconds, kill_at), daemon=True
        )
        self.process.start()

    def alive(self):
        return self.process.is_alive()

    def wait(self, seconds=SECONDS):
        """The exit status, or None where it is still at work then."""
        self.process.join(seconds)
        return self.process.exitcode

    def send(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        self.process.join()

    def printed(self):
        return self.output.read_text(errors="replace")


# What a run writes


@pytest.fixture(scope="module")
def finished(letters, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "new" / "folder"
    return out, run("--data", letters, *TINY, "--out", out)


def test_run_writes_the_five_files(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} == RESULTS
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in RESULTS if name.endswith(".png"))


def test_run_says_what_it_works_on_and_what_came_out(finished):
    out, output = finished
    test = strict_json(out / "metrics.json")["final"]["test"]
    for part in ("letters", "100 training", "40 test", "cpu", "improved", str(out), f"mse {np.mean(test['mse']):.4f}"):
        assert part in output


def test_metrics_hold_what_is_promised(finished):
    metrics = strict_json(finished[0] / "metrics.json")
    assert metrics["data"] == "letters" and metrics["device"] == "cpu" and metrics["seed"] == 0
    assert metrics["torch"] == torch.__version__
    assert 0 < metrics["seconds"] < SECONDS
    assert metrics["restarts"] == [] and metrics["is_mnist"] is False
    assert [entry["epoch"] for entry in metrics["epochs"]] == [1, 2]
    assert [entry["step"] for entry in metrics["epochs"]] == [4, 8]
    for entry in (*metrics["epochs"], metrics["final"]):
        for part in ("train", "test"):
            assert set(entry[part]) == {*QUALITY, "matched_cosine"}
            assert all(len(entry[part][name]) == 2 for name in QUALITY)
            assert 0 < entry[part]["matched_cosine"] <= 1
    assert metrics["final"] == {part: metrics["epochs"][-1][part] for part in ("train", "test")}


def test_recipe_is_recorded(finished):
    recipe = strict_json(finished[0] / "metrics.json")["recipe"]
    rate = sae.RECIPES["improved"].learning_rate
    expected = dict(name="improved", d_sae=24, k=3, n_members=2, epochs=2, batch_size=32, learning_rate=rate, seed=0)
    assert expected.items() <= recipe.items()


@pytest.mark.parametrize("part", ["train", "test"])
def test_metrics_are_those_of_the_checkpoint(finished, letters, part):
    out, _ = finished
    data = cli.load_idx(letters)
    x = data.test if part == "test" else data.train[:40]  # as many as test images
    model = sae.TopKSAE.load(out / "sae.safetensors")
    quality = sae.evaluate(model, x, data.train.mean(0))
    final = strict_json(out / "metrics.json")["final"][part]
    for name in QUALITY:
        assert final[name] == pytest.approx(quality[name].tolist(), rel=1e-6)
    assert final["matched_cosine"] == pytest.approx(sae.matched_cosine(model.features()), rel=1e-6)


def test_checkpoint_can_be_used_from_its_description_alone(finished, letters):
    tensors, x = load_file(finished[0] / "sae.safetensors"), cli.load_idx(letters).test
    with safe_open(finished[0] / "sae.safetensors", framework="pt") as file:
        metadata = file.metadata()
    described = dict(k="3", relu="0", d_in="42", d_sae="24", n_members="2", data="letters", recipe="improved")
    assert described.items() <= metadata.items()
    losses = []
    for m, (W, b_enc, b_dec) in enumerate(zip(tensors["W"], tensors["b_enc"], tensors["b_dec"])):
        A = tensors.get("A", torch.eye(42)[None])  # one for all members, or one for each
        pre = (x - b_dec) @ A[m % len(A)] @ W.T + b_enc
        code = torch.zeros_like(pre).scatter(1, *pre.topk(3)[::-1])
        losses.append(((code / W.norm(dim=1)) @ W + b_dec - x).square().mean().item())
    assert strict_json(finished[0] / "metrics.json")["final"]["test"]["mse"] == pytest.approx(losses, rel=1e-5)


def test_one_member_gives_valid_json(letters):
    run("--data", letters, *TINY, "--num_saes", 1, "--epochs", 1, "--out", "one")
    metrics = strict_json(Path("one/metrics.json"))
    assert metrics["final"]["test"]["matched_cosine"] is None
    assert len(metrics["final"]["test"]["mse"]) == 1


def test_options_reach_the_recipe(letters):
    run(
        "--data", letters, *TINY, "--recipe", "reference", "--epochs", 1, "--learning_rate", 0.01,
        "--consistency_weight", 0.5, "--seed", 9, "--out", "out",
    )  # fmt: skip
    metrics = strict_json(Path("out/metrics.json"))
    assert metrics["seed"] == 9
    expected = dict(
        name="reference", d_sae=24, k=3, n_members=2, epochs=1, batch_size=32, learning_rate=0.01,
        consistency_weight=0.5, seed=9, decoder_bias=False,
    )  # fmt: skip
    assert expected.items() <= metrics["recipe"].items()
    assert not load_file("out/sae.safetensors")["b_dec"].any()  # the reference recipe has none


def test_default_out_is_a_new_folder_under_runs(letters):
    output = run("--data", letters, *TINY, "--num_saes", 1, "--epochs", 1)
    (out,) = Path("runs").iterdir()
    assert {path.name for path in out.iterdir()} == RESULTS
    assert str(out) in output


def test_without_data_it_is_mnist(letters, monkeypatch):
    data = replace(cli.load_idx(letters), name="MNIST", is_mnist=True)
    monkeypatch.setattr(sae, "load_mnist", lambda: data)
    assert "MNIST, test images" in run(*TINY, "--num_saes", 1, "--epochs", 1, "--out", "out")
    metrics = strict_json(Path("out/metrics.json"))
    assert metrics["data"] == "MNIST" and metrics["is_mnist"]


def test_folder_named_mnist_is_not_called_mnist():
    write_small(Path("MNIST"))
    assert "MNIST (not the original), test images" in run("--data", "MNIST", *TINY, "--out", "out")
    metrics = strict_json(Path("out/metrics.json"))
    assert metrics["data"] != "MNIST" and not metrics["is_mnist"]


def test_equal_runs_write_equal_bytes(letters):
    for out in "abc":
        run("--data", letters, *TINY, "--out", out)
    for name in RESULTS - {"metrics.json"}:
        assert len({Path(out, name).read_bytes() for out in "abc"}) == 1, name


# Data that vary little


def degenerate(kind, folder):
    """Images without any variation, or with little."""
    shape = (1, 1) if kind == "a pixel" else (6, 7)
    write_small(folder, shape=shape, n_test={"one image": 1, "two images": 2}.get(kind, 40))
    one = np.random.default_rng(0).integers(0, 256, (1, *shape))
    images = {"black": 0 * one, "grey": 0 * one + 77, "repeated": one}.get(kind)
    if images is not None:
        for name, n in ((TRAIN_IMAGES, 100), (TEST_IMAGES, 40)):
            (folder / name).write_bytes(idx(images.repeat(n, 0)))
    return folder


@pytest.mark.parametrize("kind", ["black", "grey", "repeated", "a pixel", "one image", "two images"])
def test_figure_that_is_undefined_is_null_and_said(kind):
    output = run("--data", degenerate(kind, Path("images")), *TINY, "--out", "out")
    final = strict_json(Path("out/metrics.json"))["final"]
    undefined = {
        "black": {"pearson", "explained_variance"}, "grey": {"pearson", "explained_variance"},
        "repeated": {"explained_variance"}, "a pixel": {"pearson"},
    }.get(kind, set())  # fmt: skip
    for part in ("train", "test"):
        assert {name for name, value in final[part].items() if value is None} == undefined
        for name in undefined:
            assert f"{name} is undefined on the {part} images" in output
    assert output.count("undefined on") == 2 * len(undefined)
    assert all(Path("out", name).exists() for name in RESULTS)


@pytest.mark.parametrize("kind", ["black", "repeated"])
def test_initial_loss_of_images_without_variation_is_explained(kind):
    output = run("--data", degenerate(kind, Path("images")), *TINY, "--analyze_loss")
    assert "verdict" in output and "nan" not in output


# Names, and where it prints


def test_folders_may_have_any_name(letters, monkeypatch):
    for name in (b"caf\xe9", "手書き $$ %s \n".encode()):
        folder = Path(os.fsdecode(name))
        data = write_small(folder / "data" / folder)
        output = run("--data", data, *TINY, "--out", folder / "out")
        assert {path.name for path in (folder / "out").iterdir()} == RESULTS
        assert strict_json(folder / "out" / "metrics.json")["data"] in output
        assert output.encode() and output.count("\n") == 3


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", ["手書き", "caf\udce9"])
def test_output_of_any_encoding_takes_any_name(letters, monkeypatch, encoding, name):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        assert cli.main(["--data", str(letters), *TINY, "--epochs", "1", "--out", name]) == 0
        assert cli.main(["--data", str(letters), *TINY, "--out", name]) == 2
    printed = [stream.buffer.getvalue().decode(encoding) for stream in streams]
    shown = name if name.encode(encoding, "ignore").decode(encoding) == name else "\\"
    assert "results in" in printed[0] and shown in printed[0] and shown in printed[1].splitlines()[-1]


def test_tilde_is_the_home_folder_everywhere(letters, monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    write_small(Path("home/images"))
    run("--data=~/images", *TINY, "--out=~/out")
    assert {path.name for path in Path("home/out").iterdir()} == RESULTS and not Path("~").exists()


@pytest.mark.parametrize("option", ["--data", "--out"])
def test_empty_folder_name_is_refused(capsys, letters, option):
    arguments = {"--data": letters, "--out": "out"} | {option: ""}
    assert_refused(capsys, [*TINY, *(part for pair in arguments.items() for part in pair)], f"{option} is empty")


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_reader_of_the_output_may_go_away(letters, lines):
    reading, writing = os.pipe()
    with open(writing, "w") as output:
        kept = Path("kept")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if lines:
                thread = threading.Thread(target=lambda: kept.write_bytes(os.read(reading, 10 * lines)))
                thread.start()
                thread.join(0)
            else:
                os.close(reading)
            assert cli.main(["--data", str(letters), *TINY, "--out", "out"]) == 0
        if lines:
            os.close(reading)
    assert {path.name for path in Path("out").iterdir()} == RESULTS


def test_process_behind_head_ends_in_peace(letters):
    command = [sys.executable, SCRIPT, "--data", letters, *TINY, "--out", "out"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"data: letters")
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(SECONDS) == 0 and "Error" not in errors and "Traceback" not in errors
    assert {path.name for path in Path("out").iterdir()} == RESULTS


def test_closed_or_full_output_ends_nothing(letters, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["--data", str(letters), *TINY, "--out", "a"]) == 0
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full, contextlib.redirect_stdout(full), contextlib.redirect_stderr(full):
            assert cli.main(["--data", str(letters), *TINY, "--out", "b"]) == 0


# What it refuses


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ("--k 25", ["--k is 25", "from 1 to 24"]),
        ("--epochs 0", ["--epochs is 0", "from 1"]),
        ("--batch_size 0", ["--batch_size is 0", "from 1"]),
        ("--num_saes -1", ["--num_saes is -1", "from 1"]),
        ("--num_saes 2000000000", ["--num_saes 2000000000", "GB of memory", "choose smaller"]),
        ("--hidden_size 0", ["--hidden_size is 0", "from 1"]),
        ("--hidden_size 1000000000", ["--hidden_size 1000000000", "GB of memory", "choose smaller"]),
        ("--hidden_size 1000000000000", ["--hidden_size is 1000000000000", "from 1 to"]),
        ("--learning_rate -0.1", ["--learning_rate is -0.1", "from"]),
        ("--learning_rate nan", ["--learning_rate is nan", "from"]),
        ("--learning_rate 1e19", ["--learning_rate is 1e+19", "to 1,000,000,000,000"]),
        ("--consistency_weight inf", ["--consistency_weight is inf", "from 0"]),
        ("--precision half", ["--precision is 'half'", "choose auto"]),
        ("--precision float16", ["--precision float16 is not for device cpu", "choose auto"]),
        ("--seed -1", ["--seed is -1", "from 0"]),
        ("--data nowhere", ["nowhere", "is not a folder", "four idx files"]),
        ("--resume", ["out", "no interrupted run"]),
    ],
)
def test_fault_is_named_in_one_line(capsys, letters, arguments, parts):
    assert_refused(capsys, ["--data", letters, *TINY, "--out", "out", *arguments.split()], *parts)
    assert not Path("out/sae.safetensors").exists()


@pytest.mark.parametrize(
    "arguments", ["--device tpu", "--k many", "--recipe best", "--wandb maybe", "--unknown", "--epochs"]
)
def test_fault_that_argparse_finds_ends_with_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.split())
    assert ended.value.code == 2
    usage, *message = re.split(r"\n(?=\S+: error: )", capsys.readouterr().err)
    assert usage.startswith("usage: ")
    assert_one_line(*message, arguments.split()[-1])


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 GB")]
)
def test_memory_that_does_not_suffice_is_named_in_one_line(capsys, letters, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(sae.Trainer, "__init__", fail)
    assert_refused(capsys, ["--data", letters, *TINY], "memory", "choose a smaller --hidden_size")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_named_in_one_line(capsys, letters):
    assert_refused(capsys, ["--data", letters, *TINY, "--device", "cuda"], "'cuda' is not available", "choose auto")


def test_help_describes_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in (
        *cli.RECIPE_OPTIONS,
        "device",
        "analyze_loss",
        "recipe",
        "data",
        "out",
        "wandb",
        "resume",
    ):
        assert f"--{option} " in printed


def test_damaged_data_is_named_in_one_line(capsys, tmp_path):
    path = write_small(tmp_path / "letters") / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(capsys, ["--data", tmp_path / "letters", *TINY, "--out", "out"], path, "replace it")


@pytest.mark.parametrize("num_saes", [1, 2])
def test_run_that_diverges_is_named_in_one_line(capsys, letters, num_saes):
    arguments = ["--data", letters, *TINY, "--num_saes", num_saes, "--learning_rate", "1e12", "--out", "out"]
    assert cli.main([str(argument) for argument in arguments]) == 2
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]  # after the progress bar
    assert "error: " in last and "learning_rate" in last


# The initial loss


def numbers(pattern, printed):
    return [float(number) for number in re.findall(pattern, printed)]


def test_initial_loss_of_mnist_is_explained_in_seconds(mnist_root, monkeypatch, capsys):
    monkeypatch.setenv("MNIST_ROOT", str(mnist_root))
    began = time.monotonic()
    assert cli.main(["--analyze_loss", "--device", "cpu"]) == 0
    assert time.monotonic() - began < 30
    printed = capsys.readouterr().out
    assert numbers(r"zero image.* MSE (\S+)", printed) == [0.1120]
    assert numbers(r"mean image, training.* MSE (\S+)", printed) == [0.0673]
    assert numbers(r"mean image, test.* MSE (\S+)", printed) == [0.0675]
    initial = numbers(r"member \d, untrained.* MSE ([\d.]+)", printed)
    assert len(initial) == 5 and all(0.080 <= loss <= 0.085 for loss in initial)
    (predicted,) = numbers(r"predicted.* MSE (\S+)", printed)
    assert predicted == pytest.approx(np.mean(initial), rel=0.05)
    assert re.search(r"verdict: .* worse than the mean image \(0\.0673\)", printed)
    assert not list(Path().iterdir())


def test_initial_loss_is_that_of_the_run_asked_for(letters, capsys):
    assert cli.main(["--data", str(letters), *TINY, "--analyze_loss"]) == 0
    printed = capsys.readouterr().out
    data = cli.load_idx(letters)
    recipe = replace(sae.RECIPES["improved"], decoder_bias=False, d_sae=24, k=3, n_members=2)
    expected = sae.mse(data.train, sae.Trainer(recipe, data.train).model(data.train)).tolist()
    assert numbers(r"member \d, untrained.* MSE ([\d.]+)", printed) == pytest.approx(expected, abs=5.1e-5)
    assert "letters" in printed and not list(Path().iterdir())


def test_fault_in_the_analysis_is_named_in_one_line(capsys, letters):
    assert_refused(capsys, ["--data", letters, *TINY, "--analyze_loss", "--k", 25], "--k is 25", "from 1 to 24")


# Weights & Biases


def without_login(home, **more):
    """An environment in which nobody has logged in."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return clean | {"HOME": str(home), "NETRC": f"{home}/netrc"} | more


@pytest.fixture
def offline(monkeypatch):
    """Runs with --wandb offline, in a home that cannot be written; returns exit status and records by kind."""
    import wandb

    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ |= without_login("/dev/null/home")

    def start(*arguments, out="out"):
        before = set(Path(out).glob("wandb/offline-run-*/*.wandb"))
        status = cli.main([str(argument) for argument in [*arguments, "--wandb", "offline", "--out", out]])
        wandb.teardown()
        (path,) = set(Path(out).glob("wandb/offline-run-*/*.wandb")) - before
        records = {}
        for record in wandb_records(path):
            records.setdefault(record.WhichOneof("record_type"), []).append(
                getattr(record, record.WhichOneof("record_type"))
            )
        return status, records

    return start


def wandb_records(path):
    """The records of a run's file: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, position, record, block = path.read_bytes(), 7, b"", 32_768
    assert content.startswith(b":W&B")
    while position + 7 <= len(content):
        if block - position % block < 7:  # the rest of a block, too short for a header
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.fixture(scope="module")
def logged(letters, tmp_path_factory):
    """A run with --wandb offline: its folder, and what is read back from the disk."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        os.environ |= without_login(folder)
        run("--data", letters, *TINY, "--batch_size", 6, "--wandb", "offline", "--out", folder / "out")
        import wandb

        wandb.teardown()
    gc.collect()
    (path,) = (folder / "out").glob("wandb/offline-run-*/*.wandb")
    return folder / "out", list(wandb_records(path))


def items(record):
    """{name: value} of a history record; the parts of a picture are named picture/part."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def history(logged, name):
    rows = [items(record) for record in logged[1] if record.WhichOneof("record_type") == "history"]
    return {row["_step"]: row[name] for row in rows if name in row}


def test_wandb_holds_the_settings(logged):
    (run_record,) = [record.run for record in logged[1] if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run_record.config.update}
    expected = dict(data="letters", name="improved", d_sae=24, k=3, n_members=2, epochs=2, batch_size=6, seed=0)
    assert expected.items() <= config.items()


@pytest.mark.parametrize("name", ["mse", "pearson", "learning_rate", "consistency", "matched_cosine", "rare_fraction"])
def test_wandb_holds_the_training(logged, name):
    # 17 steps an epoch, every tenth of them.
    logged_values = history(logged, f"train/{name}")
    assert list(logged_values) == [0, 10, 20, 30]
    if name == "mse":
        assert 0 < logged_values[20] < logged_values[0] < 1
    if name in ("matched_cosine", "rare_fraction"):
        assert all(0 <= value <= 1 for value in logged_values.values())
    if name == "matched_cosine":
        assert logged_values == {s: pytest.approx(1 - c) for s, c in history(logged, "train/consistency").items()}
    if name == "learning_rate":
        rate = sae.RECIPES["improved"].learning_rate
        assert logged_values[0] == rate and 0 < logged_values[30] < rate


@pytest.mark.parametrize("name", QUALITY)
def test_wandb_holds_the_evaluation_of_each_epoch(logged, name):
    entries = strict_json(logged[0] / "metrics.json")["epochs"]
    expected = {entry["step"]: pytest.approx(np.mean(entry["test"][name]), rel=1e-6) for entry in entries}
    assert history(logged, f"test/{name}") == expected


@pytest.mark.parametrize("name", ["reconstructions", "training_metrics", "sae_features"])
def test_wandb_holds_the_pictures(logged, name):
    paths = history(logged, f"{name}/path")
    assert list(paths) == [17, 34]  # the end of each epoch
    contents = []
    for path in paths.values():
        (copy,) = (logged[0] / "wandb").glob(f"offline-run-*/files/{path}")
        contents.append(copy.read_bytes())
    assert all(content.startswith(b"\x89PNG") for content in contents) and contents[0] != contents[1]


def test_wandb_holds_the_checkpoint(logged):
    (artifact,) = [record.artifact for record in logged[1] if record.WhichOneof("record_type") == "artifact"]
    assert (artifact.name, artifact.type) == ("sae", "model")
    (content,) = artifact.manifest.contents
    assert content.path == "sae.safetensors" and content.size == (logged[0] / "sae.safetensors").stat().st_size


def test_wandb_run_is_finished(logged):
    (ended,) = [record.exit for record in logged[1] if record.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0
    assert {path.name for path in logged[0].iterdir()} == RESULTS | {"wandb"}


def test_wandb_writes_nothing_outside_the_folder(logged):
    assert {path.name for path in logged[0].parent.iterdir()} == {"out"}  # beside it lies the home of this test
    copies = [path for path in logged[0].rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    assert not [path for path in copies if path.suffix not in (".png", ".wandb", ".safetensors", ".log")]
    assert [path.name for path in copies].count("sae.safetensors") == 1


def raise_in_step(monkeypatch, step, action):
    original = sae.Trainer.train_step

    def train_step(trainer):
        original(trainer)
        if trainer.step == step:
            action()

    monkeypatch.setattr(sae.Trainer, "train_step", train_step)


def test_wandb_learns_of_the_interrupt_and_the_run_goes_on_there(capsys, letters, monkeypatch, offline):
    with monkeypatch.context() as patch:
        raise_in_step(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        status, records = offline("--data", letters, *TINY)
    assert status == 130 and records["exit"][0].exit_code == 130
    status, resumed = offline("--data", letters, "--resume")
    assert status == 0 and resumed["exit"][0].exit_code == 0
    assert resumed["run"][0].run_id == records["run"][0].run_id


def test_wandb_learns_of_a_divergence(letters, offline):
    status, records = offline("--data", letters, *TINY, "--learning_rate", "1e12")
    assert status == records["exit"][0].exit_code == 2


def test_results_are_complete_before_wandb_is_asked(capsys, letters, monkeypatch, offline):
    there = []

    def fail(run, trainer, entry, figures):
        there.append(sorted(path.name for path in Path("out").iterdir() if path.name in RESULTS))
        raise RuntimeError("the server is on fire")

    monkeypatch.setattr(cli, "log_epoch", fail)
    status, _ = offline("--data", letters, *TINY, "--epochs", 1)
    assert status == 0 and there == [sorted(RESULTS)]
    assert "W&B failed (the server is on fire): going on without it" in capsys.readouterr().err


def refused_online(letters, out, **environment):
    """Standard error of a run that W&B refuses, in a process of its own, and how long it took."""
    Path("home").mkdir(exist_ok=True)
    began = time.monotonic()
    process = Process(
        ["--data", letters, *TINY, "--wandb", "online", "--out", out],
        environment=without_login(Path("home").absolute(), **environment),
    )
    assert process.wait() == 2, process.printed()
    line = process.printed().splitlines()[-1] + "\n"
    assert_one_line(line, "--wandb online cannot begin", "`wandb login`", "--wandb offline")
    assert "Traceback" not in process.printed() and not Path(out, cli.STATE).exists()
    return line, time.monotonic() - began


def test_wandb_online_without_a_login_is_refused_and_leaves_the_folder_free(letters):
    refused_online(letters, "out")
    assert not Path("out").exists()
    run("--data", letters, *TINY, "--num_saes", 1, "--epochs", 1, "--out", "out")


@pytest.fixture
def wandb_server():
    """A server that knows no key; yields its address and the requests that it got."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(self.headers.get("Authorization", ""))
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"errors": [{"message": "this key is not known"}]}')

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


@pytest.mark.parametrize("place", ["variable", "netrc", "settings"])
def test_wrong_key_is_named_whichever_place_it_comes_from(letters, wandb_server, place):
    address, requests = wandb_server
    key, environment = "a" * 40, {"WANDB_BASE_URL": address}
    Path("home/.config/wandb").mkdir(parents=True)
    if place == "variable":
        environment["WANDB_API_KEY"] = key
    else:
        host = address.removeprefix("http://")
        Path("home/netrc").write_text(f"machine {host}\n  login user\n  password {key}\n")
        Path("home/netrc").chmod(0o600)
    if place == "settings":  # as `wandb login --host` leaves it
        del environment["WANDB_BASE_URL"]
        Path("home/.config/wandb/settings").write_text(f"[default]\nbase_url = {address}\n")
    line, seconds = refused_online(letters, "out", **environment)
    assert "this key is not known" in line and requests and seconds < 30


@pytest.mark.slow
def test_network_that_is_not_there_is_named_within_seconds(letters, refusing_address):
    line, seconds = refused_online(letters, "out", WANDB_BASE_URL=refusing_address.rstrip("/"), WANDB_API_KEY="a" * 40)
    assert refusing_address.rstrip("/") in line and seconds < 40
