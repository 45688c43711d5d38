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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN_IMAGES, TRAIN_LABELS, idx, write_small
from safetensors import safe_open
from safetensors.torch import load_file

import mnist_sae_train as cli
import sae_helpers as sae

SCRIPT = Path(cli.__file__).resolve()
TINY = ["--hidden_size", "24", "--k", "3", "--num_saes", "2", "--epochs", "2", "--batch_size", "32", "--device", "cpu"]
RESULTS = {"sae.safetensors", "metrics.json", "reconstructions.png", "training_metrics.png", "sae_features.png"}
QUALITY = ("mse", "pearson", "explained_variance", "dead_fraction", "rare_fraction")
SECONDS = 120  # far above what any process here takes
LOADED = ["mnist_sae_train", "matplotlib.pyplot", "scipy.optimize", "torchvision.datasets", "pytest", "tqdm.auto"]


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("data") / "letters")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test writes into the project."""
    monkeypatch.chdir(tmp_path)


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
        descriptor, name = tempfile.mkstemp()
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
    assert metrics["reinitialised_features"] == [0, 0]  # 8 steps are too few for a look
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
    expected = dict(name="improved", d_sae=24, k=3, n_members=2, epochs=2, batch_size=32, learning_rate=2e-3, seed=0)
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
    assert metadata == dict(
        k="3", relu="0", d_in="42", d_sae="24", n_members="2", data="letters", recipe="improved"
    )  # fmt: skip
    losses = []
    for W, b_enc, b_dec in zip(tensors["W"], tensors["b_enc"], tensors["b_dec"]):
        pre = (x - b_dec) @ W.T + b_enc
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


def test_without_data_it_is_mnist(small_mnist, monkeypatch):
    monkeypatch.setenv("MNIST_ROOT", str(small_mnist))
    assert "MNIST, test images" in run(*TINY, "--num_saes", 1, "--epochs", 1, "--out", "out")
    assert strict_json(Path("out/metrics.json"))["data"] == "MNIST"


# What it refuses


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ("--k 25", ["25", "24", "choose a smaller"]),
        ("--epochs 0", ["epochs", "0", "at least 1"]),
        ("--batch_size 0", ["batch_size", "0", "at least 1"]),
        ("--num_saes -1", ["-1", "at least 1"]),
        ("--hidden_size 0", ["0", "at least 1"]),
        ("--learning_rate -0.1", ["learning_rate", "-0.1", "above 0"]),
        ("--learning_rate nan", ["learning_rate", "nan", "above 0"]),
        ("--consistency_weight inf", ["consistency_weight", "inf", "0 or above"]),
        ("--seed -1", ["seed", "-1", "from 0"]),
        ("--data nowhere", ["nowhere", "is not a folder", "give the one"]),
        ("--resume", ["out", "no interrupted run"]),
    ],
)
def test_fault_is_named_in_one_line(capsys, letters, arguments, parts):
    assert_refused(capsys, ["--data", letters, *TINY, "--out", "out", *arguments.split()], *parts)
    assert not Path("out/sae.safetensors").exists()


def test_resume_without_out_is_named_in_one_line(capsys, letters):
    assert_refused(capsys, ["--data", letters, "--resume"], "--resume needs --out")


@pytest.mark.parametrize("option", ["num_saes", "hidden_size"])
def test_fault_is_named_as_the_user_typed_it(capsys, letters, option):
    # Not by the name that the recipe has for it.
    assert_refused(capsys, ["--data", letters, *TINY, f"--{option}", 0], option)


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
    arguments = ["--data", letters, *TINY, "--num_saes", num_saes, "--learning_rate", "1e30", "--out", "out"]
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
    recipe = sae.Recipe("", decoder_bias=False, learning_rate=1, decay=0, reinit="none", d_sae=24, k=3, n_members=2)
    expected = sae.mse(data.train, sae.Trainer(recipe, data.train).model(data.train)).tolist()
    assert numbers(r"member \d, untrained.* MSE ([\d.]+)", printed) == pytest.approx(expected, abs=5.1e-5)
    assert "letters" in printed and not list(Path().iterdir())


def test_fault_in_the_analysis_is_named_in_one_line(capsys, letters):
    assert_refused(capsys, ["--data", letters, *TINY, "--analyze_loss", "--k", 25], "25", "choose a smaller")


# Weights & Biases


def without_login(home):
    """An environment in which nobody has logged in."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return clean | {"HOME": str(home), "NETRC": str(home / "netrc")}


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
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("HOME", str(folder))
        patch.setenv("NETRC", str(folder / "netrc"))
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


@pytest.mark.parametrize("name", ["mse", "pearson", "learning_rate", "consistency", "matched_cosine", "dead_fraction"])
def test_wandb_holds_the_training(logged, name):
    # 17 steps an epoch, every tenth of them.
    logged_values = history(logged, f"train/{name}")
    assert list(logged_values) == [0, 10, 20, 30]
    if name == "mse":
        assert 0 < logged_values[20] < logged_values[0] < 1
    if name in ("matched_cosine", "dead_fraction"):
        assert all(0 <= value <= 1 for value in logged_values.values())
    if name == "matched_cosine":
        assert logged_values == {s: pytest.approx(1 - c) for s, c in history(logged, "train/consistency").items()}
    if name == "learning_rate":
        assert logged_values[0] == 2e-3 and 0 < logged_values[30] < 2e-3


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


def test_wandb_online_without_a_login_is_refused_and_asks_nothing(letters, tmp_path):
    (tmp_path / "home").mkdir()
    arguments = ["--data", letters, *TINY, "--wandb", "online", "--out", tmp_path / "out"]
    status, errors = finish(arguments, env=without_login(tmp_path / "home"), cwd=tmp_path)
    assert status == 2
    assert_one_line(errors, "--wandb online", "wandb login", "--wandb offline")


def test_refused_login_leaves_the_folder_free(letters, tmp_path):
    # The same command works once the login is there.
    (tmp_path / "home").mkdir()
    arguments = ["--data", letters, *TINY, "--num_saes", 1, "--epochs", 1, "--out", tmp_path / "out"]
    finish([*arguments, "--wandb", "online"], env=without_login(tmp_path / "home"), cwd=tmp_path)
    run(*arguments)
    assert {path.name for path in (tmp_path / "out").iterdir()} == RESULTS
