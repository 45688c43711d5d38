"""What becomes of a run whatever happens to it: two at once, a full disk, ^C, kills, a damaged state."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import without_permission, write_small
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_command_line import RESULTS, SECONDS, TINY, Process, assert_one_line, assert_refused, run, strict_json

import mnist_sae_train as cli
import sae_helpers as sae

pytestmark = pytest.mark.usefixtures("elsewhere")

STATE = cli.STATE
EPOCHS, STEPS = 5, 20
MANY = [*TINY, "--epochs", EPOCHS, "--consistency_weight", 0.1]
ENDLESS = [*TINY, "--epochs", 100_000]
RESUME = ["--resume", "--device", "cpu"]  # `auto` could be another one, and gives other roundings


@pytest.fixture
def endless(letters):
    """A process that trains into `out` until it is killed, and writes a state after each step."""
    process = Process(["--data", letters, *ENDLESS, "--out", "out"], state_seconds=0)
    wait_for(Path("out", STATE), process)
    yield process
    process.kill()


def wait_for(path, process):
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert process.alive() and time.monotonic() < end, process.printed()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(letters, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run("--data", letters, *MANY, "--out", out)
    return out


def content(path):
    """safetensors may write its header's entries in any order; all else is compared byte for byte."""
    if path.suffix != ".safetensors":
        return re.sub(rb'"seconds": [\d.e-]+', b"", path.read_bytes())
    with safe_open(path, framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def assert_as_if_never_stopped(out, whole, files=RESULTS):
    assert {path.name for path in out.iterdir()} == files
    for name in files:
        assert content(out / name) == content(whole / name), name


def stopped(monkeypatch, letters, out, step, number=signal.SIGINT):
    """The exit status of a run that gets a signal within a step; it leaves a state."""
    original = sae.Trainer.train_step

    def train_step(trainer):
        original(trainer)
        if trainer.step == step:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(sae.Trainer, "train_step", train_step)
        return cli.main([str(argument) for argument in ["--data", letters, *MANY, "--out", out]])


@pytest.fixture
def interrupted(monkeypatch, letters, capsys):
    """The folder of a run stopped in its third epoch."""
    assert stopped(monkeypatch, letters, "interrupted", 11) == 130
    capsys.readouterr()
    return Path("interrupted")


# Two runs, one folder


def test_two_runs_of_the_same_second_have_two_folders(letters, monkeypatch):
    class Frozen(datetime):
        @classmethod
        def now(cls):
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(cli, "datetime", Frozen)
    for _ in range(3):
        run("--data", letters, *TINY, "--epochs", 1)
    name = "2026-01-02_03-04-05"
    assert {path.name for path in Path("runs").iterdir()} == {name, f"{name}-2", f"{name}-3"}
    assert all({path.name for path in out.iterdir()} == RESULTS for out in Path("runs").iterdir())


def test_folder_of_a_living_run_is_refused_until_it_dies(capsys, letters, endless):
    for more in ([], ["--resume"]):
        assert_refused(capsys, ["--data", letters, *ENDLESS, "--out", "out", *more], "out is in use", "another --out")
        assert endless.alive()
    endless.kill()
    assert_refused(capsys, ["--data", letters, *ENDLESS, "--out", "out"], "already holds a run, interrupted")
    resumed = Process(["--data", letters, "--resume", "--out", "out"])
    time.sleep(1)
    assert resumed.alive()
    resumed.kill()


def test_of_two_that_start_at_once_one_is_refused(letters):
    pair = [Process(["--data", letters, *MANY, "--out", "out"]) for _ in range(2)]
    statuses = sorted(process.wait() for process in pair)
    # The later one finds the first at work, or its results.
    assert statuses == [0, 2]
    assert {path.name for path in Path("out").iterdir()} == RESULTS


def test_file_system_without_locks_is_used_without(letters, monkeypatch):
    def refuse(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run("--data", letters, *TINY, "--epochs", 1, "--out", "out")


@pytest.mark.parametrize("name", [*sorted(RESULTS), STATE])
def test_another_run_is_not_overwritten(capsys, letters, name):
    Path("out").mkdir()
    Path("out", name).write_text("precious")
    assert_refused(capsys, ["--data", letters, *TINY, "--out", "out"], "out already holds a run", "choose another")
    assert [(path.name, path.read_text()) for path in Path("out").iterdir()] == [(name, "precious")]


@pytest.mark.parametrize("out", ["nowhere", "empty", "finished"])
def test_resuming_nothing_is_refused(capsys, letters, whole, out):
    Path("empty").mkdir()
    shutil.copytree(whole, "finished")
    what = "a finished run" if out == "finished" else "no interrupted run"
    assert_refused(capsys, ["--data", letters, "--resume", "--out", out], out, what)
    assert not Path("nowhere").exists() and not list(Path("empty").iterdir())


def test_resume_without_out_is_refused(capsys, letters):
    assert_refused(capsys, ["--data", letters, "--resume"], "--resume needs --out")


def test_start_that_fails_leaves_no_folder(capsys, letters):
    assert_refused(capsys, ["--data", letters, *TINY, "--hidden_size", 10**9], "memory")
    assert_refused(capsys, ["--data", letters, *TINY, "--hidden_size", 10**9, "--out", "new"], "memory")
    assert not list(Path("runs").iterdir()) and not Path("new").exists()


def test_half_written_files_of_a_kill_are_taken_away(letters):
    Path("out").mkdir()
    for name in (STATE, "metrics.json", "sae_features.png"):
        Path("out", f".{Path(name).stem}.123{Path(name).suffix}").touch()
    Path("out", ".mine.txt").touch()
    run("--data", letters, *TINY, "--epochs", 1, "--out", "out")
    assert {path.name for path in Path("out").iterdir()} == RESULTS | {".mine.txt"}


# Where it cannot write


@pytest.mark.parametrize("out", ["file", "file/out", "x" * 300])
def test_out_that_cannot_be_made_is_named(capsys, letters, out):
    Path("file").touch()
    assert_refused(capsys, ["--data", letters, *TINY, "--out", out], f"--out {out}", "choose another folder")


@pytest.mark.parametrize("out", ["closed", "closed/out"])
@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "locked"])
def test_out_without_permission_is_named(capsys, reachable, out, mode):
    letters = write_small(reachable / "letters")
    (reachable / "closed").mkdir()
    with without_permission(reachable / "closed", mode):
        arguments = ["--data", letters, *TINY, "--out", reachable / out]
        assert_refused(capsys, arguments, reachable / out, "choose another folder")


@pytest.fixture
def disk(tmp_path):
    """Makes a small disk of a number of MiB, and mounts it on `disk`."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", path], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        return path

    yield mount
    subprocess.run(["umount", path], capture_output=True)


def test_full_disk_is_found_before_the_training(capsys, letters, disk):
    path = disk(2)
    assert_refused(capsys, ["--data", letters, *TINY, "--out", path / "out"], "No space left", "MB", "free room")
    assert not list(path.iterdir())


def fill(path):
    with contextlib.suppress(OSError), path.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


def test_disk_that_fills_up_loses_nothing(capsys, letters, disk, monkeypatch, whole):
    path, original = disk(8), sae.Trainer.train_step
    out = path / "out"

    def train_step(trainer):
        original(trainer)
        if trainer.step == 11:
            fill(path / "ballast")

    with monkeypatch.context() as patch:
        patch.setattr(sae.Trainer, "train_step", train_step)
        assert cli.main([str(argument) for argument in ["--data", letters, *MANY, "--out", out]]) == 2
    printed = capsys.readouterr().err
    assert printed.count("the state cannot be written (No space left on device): training goes on") == EPOCHS - 2
    assert "error: the results cannot be written (No space left on device): free room, then --resume" in printed
    assert "Traceback" not in printed and "from step 8 of 20" in printed
    assert_refused(capsys, ["--data", letters, "--resume", "--out", out], "No space left", "free room, then --resume")
    (path / "ballast").unlink()
    run("--data", letters, *RESUME, "--out", out)
    assert_as_if_never_stopped(out, whole)


def test_state_that_cannot_be_written_does_not_end_the_training(capsys, letters, monkeypatch, whole):
    original, calls = cli.write_durably, []

    def full(path, content):
        calls.append(path.name)
        if len(calls) > 2:  # the trial of room, and the first state
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, content)

    monkeypatch.setattr(cli, "write_durably", full)
    assert cli.main([str(argument) for argument in ["--data", letters, *MANY, "--out", "out"]]) == 0
    assert "training goes on" in capsys.readouterr().err
    assert_as_if_never_stopped(Path("out"), whole)


def test_model_of_the_last_epoch_is_not_lost_with_the_results(capsys, letters, monkeypatch, whole):
    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(cli, "save_run", full)
        assert cli.main([str(argument) for argument in ["--data", letters, *MANY, "--out", "out"]]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "quota" in last and "free room, then --resume --out out goes on from step 20 of 20" in last
    run("--data", letters, *RESUME, "--out", "out")
    assert_as_if_never_stopped(Path("out"), whole)


# ^C and SIGTERM


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [1, 10, 12, STEPS], ids=["first", "within", "end of an epoch", "last"])
def test_signal_ends_at_once_and_the_run_goes_on(capsys, letters, monkeypatch, whole, number, status, step):
    handler = signal.getsignal(number)
    assert stopped(monkeypatch, letters, "out", step, number) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"stopped: --resume --out out goes on from step {step} of {STEPS}")
    assert signal.getsignal(number) == handler
    run("--data", letters, *RESUME, "--out", "out")
    assert_as_if_never_stopped(Path("out"), whole)


def test_signal_that_python_would_drop_is_obeyed(capsys, letters, monkeypatch):
    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    original = sae.Trainer.train_step

    def train_step(trainer):
        if trainer.step == 1:
            Dropped()
        original(trainer)

    monkeypatch.setattr(sae.Trainer, "train_step", train_step)
    assert cli.main([str(argument) for argument in ["--data", letters, *MANY, "--out", "out"]]) == 130
    assert "from step 2 of" in capsys.readouterr().err


def test_ignored_signal_stays_ignored(letters, monkeypatch, whole):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert stopped(monkeypatch, letters, "out", 3) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert_as_if_never_stopped(Path("out"), whole)


@pytest.mark.parametrize(
    "where, what",
    [("load_data", "the same command starts it again"), ("Run.require_room", "no state was written yet; start again")],
)
def test_interrupt_before_the_first_state_says_so(capsys, letters, monkeypatch, where, what):
    def interrupt(*_):
        raise KeyboardInterrupt

    target = cli.Run if "." in where else cli
    with monkeypatch.context() as patch:
        patch.setattr(target, where.split(".")[-1], interrupt)
        assert cli.main([str(argument) for argument in ["--data", letters, *MANY, "--out", "out"]]) == 130
    assert what in capsys.readouterr().err
    run("--data", letters, *MANY, "--out", "out")  # and the same command works


def test_interrupt_that_cannot_write_its_state_names_the_one_before(capsys, letters, monkeypatch):
    original, calls = cli.write_durably, []

    def full(path, content):
        calls.append(path.name)
        if len(calls) > 4:  # the trial of room, the first state, two epochs
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, content)

    monkeypatch.setattr(cli, "write_durably", full)
    assert stopped(monkeypatch, letters, "out", 11) == 130
    assert "goes on from step 8 of 20" in capsys.readouterr().err


def test_state_is_written_within_an_epoch(letters, monkeypatch):
    monkeypatch.setattr(cli, "STATE_SECONDS", 0)
    original, steps = cli.Run.write_state, []
    monkeypatch.setattr(cli.Run, "write_state", lambda run: (steps.append(run.trainer.step), original(run)))
    run("--data", letters, *MANY, "--out", "out")
    assert steps == list(range(STEPS + 1))


# Kills


def finish(letters, out, process):
    """Goes on with a killed run until it is complete, as its user would."""
    process.kill()
    if (out / STATE).exists() or (out / cli.LOCK).exists():
        return run("--data", letters, *MANY, "--resume", "--out", out)
    return run("--data", letters, *MANY, "--out", out)


@pytest.mark.parametrize("call", ["write", "replace"])
@pytest.mark.parametrize("n", [1, 2, 3, 9, 22, 23, 25, 27])
def test_kill_within_a_write_loses_nothing(letters, whole, call, n):
    # 1 is the trial of room, 2 the first state, then one a step and an epoch; the last are of the results.
    process = Process(["--data", letters, *MANY, "--out", "out"], state_seconds=0, kill_at=(call, n))
    status = process.wait()
    assert status == -signal.SIGKILL
    printed = finish(letters, Path("out"), process)
    assert ("starting from the beginning" in printed) == (n <= 2)
    assert_as_if_never_stopped(Path("out"), whole)


def kill_often(letters, out, kills, seed):
    """Kills a run again and again at random moments, and goes on each time; the number of kills that struck."""
    draw, struck = random.Random(seed), 0
    while struck < kills and (not (out / "metrics.json").exists() or (out / STATE).exists()):
        resume = ["--resume"] if (out / STATE).exists() or (out / cli.LOCK).exists() else []
        process = Process(["--data", letters, *MANY, *resume, "--out", out], state_seconds=0)
        if process.wait(draw.uniform(0.05, 0.5)) is None:
            struck += 1
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL), process.printed()
    if not (out / "metrics.json").exists() or (out / STATE).exists():
        finish(letters, out, process)
    (out / cli.LOCK).unlink(missing_ok=True)  # the last kill may have come after all else was done
    return struck


def test_killed_run_is_resumed_bit_for_bit(letters, whole):
    struck = seed = 0
    while struck < 2:
        seed += 1
        struck += kill_often(letters, Path(f"out{seed}"), 2 - struck, seed)
        assert_as_if_never_stopped(Path(f"out{seed}"), whole)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(letters, whole):
    struck = seed = 0
    while struck < 20:
        seed += 1
        out = Path(f"out{seed}")
        struck += kill_often(letters, out, 20 - struck, seed)
        assert_as_if_never_stopped(out, whole)


def test_resume_before_the_first_state_starts_from_the_beginning(letters, whole):
    Path("out").mkdir()
    Path("out", cli.LOCK).touch()  # as a kill leaves it
    assert "starting from the beginning" in run("--data", letters, *MANY, "--resume", "--out", "out")
    assert_as_if_never_stopped(Path("out"), whole)


# Options and data of a resumed run


def test_options_that_agree_may_be_given_again(letters, interrupted, whole):
    run("--data", letters, *MANY, "--recipe", "improved", "--resume", "--out", interrupted)
    assert_as_if_never_stopped(interrupted, whole)


@pytest.mark.parametrize(
    "option, given, had",
    [
        ("k", 4, 3),
        ("epochs", 3, EPOCHS),
        ("seed", 1, 0),
        ("learning_rate", 0.5, ""),
        ("recipe", "reference", "improved"),
    ],
)
def test_resuming_with_another_option_is_refused(capsys, letters, interrupted, option, given, had):
    arguments = ["--data", letters, "--resume", "--out", interrupted, f"--{option}", given]
    assert_refused(capsys, arguments, f"--{option} {given}", had, "leave it out")
    assert (interrupted / STATE).exists()


@pytest.mark.parametrize("name, changes", [("numbers", {}), ("letters", {"n_train": 90}), ("letters", {"n_test": 39})])
def test_resuming_on_other_data_is_refused(capsys, tmp_path, interrupted, name, changes):
    other = write_small(tmp_path / name, **changes)
    assert_refused(capsys, ["--data", other, "--resume", "--out", interrupted], "letters", "same data")


# A state of another device, of another version, or of an enemy


def test_state_holds_nothing_of_a_device(interrupted):
    with safe_open(interrupted / STATE, framework="pt") as file:
        names = set(file.keys())
    assert not [name for name in names if re.search("lr|fused|capturable", name)]


def changed(out, change):
    """Changes the state's tensors and its description, as one would who knows of the checksum."""
    with safe_open(out / STATE, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    tensors = load_file(out / STATE)
    change(tensors, state)
    text = json.dumps(state)
    save_file(tensors, out / STATE, {"state": text, "sha256": sae.checksum(text, tensors)})


def test_state_from_cuda_goes_on_on_a_cpu(letters, interrupted, whole):
    # There the loss is scaled, which a CPU does without.
    scaler = dict(scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, _growth_tracker=7)
    changed(interrupted, lambda tensors, state: state.update(scaler=scaler))
    run("--data", letters, *RESUME, "--out", interrupted)
    assert_as_if_never_stopped(interrupted, whole)


def test_precision_may_be_changed_for_another_device(capsys, letters, interrupted):
    changed(interrupted, lambda tensors, state: state["recipe"].update(precision="float16"))
    assert_refused(
        capsys, ["--data", letters, "--resume", "--out", interrupted, "--device", "cpu"], "--precision float16"
    )
    run("--data", letters, *RESUME, "--out", interrupted, "--precision", "float32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("there, back", [("cuda", "cpu"), ("cpu", "cuda")])
def test_state_goes_to_another_device_and_trains_as_well(letters, monkeypatch, there, back, whole):
    monkeypatch.setitem(globals(), "MANY", [there if argument == "cpu" else argument for argument in MANY])
    assert stopped(monkeypatch, letters, "out", 11) == 130
    run("--data", letters, "--resume", "--out", "out", "--device", back)
    losses = [np.mean(strict_json(out / "metrics.json")["final"]["test"]["mse"]) for out in (Path("out"), whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def pickled(path):
    torch.save({"something": "else"}, path)


def promise(path):
    """A header that promises a terabyte."""
    header = json.dumps({"W": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


FILES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "text": lambda path: path.write_text("not a state"),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": pickled,
    "other tensors": lambda path: save_file({"a": torch.zeros(2)}, path),
    "promise": promise,
    "long header": lambda path: path.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("kind", FILES)
def test_file_that_is_no_state_is_named(capsys, letters, interrupted, kind):
    FILES[kind](interrupted / STATE)
    assert_refused(
        capsys, ["--data", letters, "--resume", "--out", interrupted], interrupted / STATE, "start a new run"
    )


def put(*keys, value):
    def change(tensors, state):
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


STATES = {
    "of tomorrow": put("recipe", "a_setting_of_tomorrow", value=1),
    "of yesterday": lambda tensors, state: state["recipe"].pop("selection_floor"),
    "no scaler": lambda tensors, state: state.pop("scaler"),
    "huge": put("recipe", "d_sae", value=10**9),
    "many members": put("recipe", "n_members", value=10**9),
    "name": put("recipe", "name", value=5),
    "flag": put("recipe", "relu", value="x"),
    "other map": put("recipe", "encoder_map", value=False),
    "long training": put("step", value=10**15),
    "step backwards": put("step", value=-1),
    "another step": put("step", value=10),
    "no step": put("step", value="11"),
    "nan": put("seconds", value=float("nan")),
    "infinity": put("epochs", 0, "test", "mse", value=[1.0, float("inf")]),
    "epoch of text": put("epochs", 0, "epoch", value="one"),
    "epoch without its parts": lambda tensors, state: state["epochs"][0].pop("train"),
    "too few members": put("epochs", 1, "train", "pearson", value=[0.5]),
    "too few epochs": lambda tensors, state: state["epochs"].pop(),
    "too many epochs": lambda tensors, state: state["epochs"].append(state["epochs"][0]),
    "epochs of text": put("epochs", value="many"),
    "restarts": put("restarts", value=[["a", "b"]]),
    "id": put("wandb_id", value="../../x"),
    "data": put("data", value=[1, 2]),
    "list": lambda tensors, state: state.update(recipe=[]),
    "nested": put("seconds", value=json.loads("[" * 500 + "]" * 500)),
    "tensor missing": lambda tensors, state: tensors.pop("use"),
    "tensor too much": lambda tensors, state: tensors.update(more=torch.zeros(1)),
    "tensor of another shape": lambda tensors, state: tensors.update(scale=torch.zeros(1)),
    "tensor of another type": lambda tensors, state: tensors.update(scale=torch.zeros(2, dtype=torch.int32)),
    "moments missing": lambda tensors, state: tensors.pop("optimizer.0.exp_avg"),
    "history": lambda tensors, state: tensors.update({"history.mse": torch.zeros(0, dtype=torch.float64)}),
    "order": lambda tensors, state: tensors["order"].fill_(10**12),
    "order twice": lambda tensors, state: tensors["order"].fill_(3),
    "generator": lambda tensors, state: tensors["generator"].fill_(255),
}


@pytest.mark.parametrize("kind", STATES)
def test_state_that_contradicts_itself_is_named(capsys, letters, interrupted, kind):
    changed(interrupted, STATES[kind])
    before = (interrupted / STATE).read_bytes()
    assert_refused(capsys, ["--data", letters, "--resume", "--out", interrupted], interrupted)
    assert (interrupted / STATE).read_bytes() == before


def test_state_that_holds_no_numbers_ends_in_one_line(capsys, letters, interrupted):
    changed(interrupted, lambda tensors, state: tensors["model.W"].fill_(float("nan")))
    assert cli.main(["--data", str(letters), "--resume", "--out", str(interrupted)]) == 2
    assert_one_line(capsys.readouterr().err.replace("\r", "\n").splitlines()[-1] + "\n", "no longer a number")


def test_state_without_permission_is_named(capsys, reachable, interrupted):
    letters = write_small(reachable / "letters")
    out = Path(shutil.copytree(interrupted, reachable / "out"))
    with without_permission(out):
        assert_refused(capsys, ["--data", letters, "--resume", "--out", out], out)
