"""More than one process: together they train what one would, stop in the same step, and begin again when one dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import PROJECT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_command_line import RESULTS, SECONDS, TINY, Process, assert_one_line, assert_refused, run, strict_json
from test_runs import ENDLESS, assert_as_if_never_stopped, stopped, wait_for

import mnist_sae_train as cli
import sae_helpers as sae

pytestmark = pytest.mark.usefixtures("elsewhere")

MANY = [*TINY, "--epochs", 5, "--consistency_weight", 0.1]


# What they train

SMALL = dict(d_sae=24, k=3, n_members=3, epochs=4, batch_size=32, match_every=3, consistency_warmup=5)
CASES = {
    "improved": dict(consistency_weight=0.1),
    "one member": dict(n_members=1),
    "one image left over": dict(batch_size=33),  # of 100: fewer than there are processes
    "a k for each, no negative values": dict(k=(2, 3, 5), relu=True),
    "reference, with a monitor that restarts": dict(name="reference", batch_size=16),
}


def trainer_of(case, data, kind):
    recipe = replace(sae.RECIPES[CASES[case].get("name", "improved")], **SMALL | CASES[case])
    trainer = kind(recipe, replace(data, train=data.train.double()))  # so that sums hardly depend on their order
    trainer.monitor_threshold, trainer.log_every = 4.0, 5
    return trainer


def train_together(rank, size, letters):
    """Runs in a process of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{Path('meeting').absolute()}", rank=rank, world_size=size)
    data = cli.load_idx(letters)
    for case in CASES:
        trainer = trainer_of(case, data, cli.ParallelTrainer).run(progress=False)
        tensors = trainer.tensors() | {"restarts": torch.tensor(trainer.restarts)}
        save_file(tensors, f"{case} {rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_train_what_one_does(letters, size):
    children = [Process.server.Process(target=train_together, args=(rank, size, letters)) for rank in range(size)]
    for process in children:
        process.start()
    for process in children:
        process.join(SECONDS)
        assert process.exitcode == 0
    for case in CASES:
        one = trainer_of(case, cli.load_idx(letters), cli.FileTrainer).run(progress=False)
        expected = one.tensors() | {"restarts": torch.tensor(one.restarts)}
        assert bool(one.restarts) == ("monitor" in case)
        found = [load_file(f"{case} {rank}.safetensors") for rank in range(size)]
        for name, tensor in expected.items():
            torch.testing.assert_close(found[0][name], tensor, rtol=1e-7, atol=1e-10, msg=f"{case}: {name}")
            assert all(torch.equal(other[name], found[0][name]) for other in found), f"{case}: {name}"


def test_group_of_one_trains_bit_for_bit_what_a_process_alone_does(letters):
    data = cli.load_idx(letters)
    dist.init_process_group("gloo", f"file://{Path('meeting').absolute()}", rank=0, world_size=1)
    try:
        trainers = [trainer_of("improved", data, kind) for kind in (cli.ParallelTrainer, cli.FileTrainer)]
        for trainer in trainers:
            trainer.run(progress=False)
        assert [trainer.agreed(15) for trainer in trainers] == [15, 15]  # after an epoch
    finally:
        dist.destroy_process_group()
    tensors = [trainer.tensors() for trainer in trainers]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])


# What they write and print


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def group(*arguments, size=2, state_seconds=30):
    """The command in several processes, with what torchrun tells each of them."""
    shared = dict(os.environ, WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return [
        Process(arguments, state_seconds, environment=shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank in range(size)
    ]


def statuses(processes):
    return [process.wait() for process in processes]


@pytest.fixture(scope="module")
def whole(letters, tmp_path_factory):
    """The folder of two processes that were never stopped, and what each of them printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        processes = group("--data", letters, *MANY, "--out", out)
        assert statuses(processes) == [0, 0], [process.printed() for process in processes]
    return out, [process.printed() for process in processes]


def test_one_process_writes_and_prints(whole):
    out, printed = whole
    assert {path.name for path in out.iterdir()} == RESULTS
    assert "results in" in printed[0] and printed[1] == ""


def test_metrics_are_those_of_one_process(letters, whole):
    run("--data", letters, *MANY, "--out", "one")
    one, two = (strict_json(out / "metrics.json") for out in (Path("one"), whole[0]))
    assert two["recipe"] == one["recipe"]
    for part in ("train", "test"):
        assert two["final"][part]["mse"] == pytest.approx(one["final"][part]["mse"], rel=1e-3)


def test_fault_is_named_once(letters, whole):
    processes = group("--data", letters, *MANY, "--out", whole[0])
    assert statuses(processes) == [2, 2]
    assert_one_line(processes[0].printed().splitlines(True)[-1], "already holds a run")
    assert processes[1].printed() == ""


def test_where_to_write_must_be_said(letters, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(capsys, ["--data", letters, *TINY], "several processes need --out")


def test_processes_that_cannot_join_are_told_of_torchrun(letters, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(capsys, ["--data", letters, *TINY, "--out", "out"], "2 processes cannot join", "by torchrun")


# Signals and deaths


def step_of(out):
    with safe_open(out / cli.STATE, framework="np") as file:
        return int(re.search(r'"step": (\d+), "restarts', file.metadata()["state"])[1])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_stops_all_in_the_same_step(letters, rank, number, status):
    processes = group("--data", letters, *ENDLESS, "--out", "out", state_seconds=0)
    wait_for(Path("out", cli.STATE), processes[rank])
    while step_of(Path("out")) == 0:  # both have begun
        assert processes[rank].alive()
    processes[rank].send(number)
    assert statuses(processes) == [status, status], [process.printed() for process in processes]
    last = processes[0].printed().splitlines()[-1]
    assert f"--resume --out out goes on from step {step_of(Path('out')):,} of" in last


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_dies_the_other_ends(letters, rank):
    processes = group("--data", letters, *ENDLESS, "--out", "out", state_seconds=0)
    wait_for(Path("out", cli.STATE), processes[rank])
    processes[rank].kill()
    assert processes[1 - rank].wait() == 2, processes[1 - rank].printed()
    if rank:  # the one that leads is left, and says so
        assert_one_line(processes[0].printed().splitlines()[-1] + "\n", "another process has ended", "--resume")
    assert "Traceback" not in processes[1 - rank].printed() and Path("out", cli.STATE).exists()


def test_group_goes_on_as_one_process_and_the_other_way_round(letters, whole):
    one = Process(["--data", letters, *MANY, "--epochs", 5, "--out", "out"], state_seconds=0, kill_at=("replace", 12))
    assert one.wait() == -signal.SIGKILL and step_of(Path("out")) == 9
    processes = group("--data", letters, "--resume", "--out", "out")
    assert statuses(processes) == [0, 0], processes[0].printed()
    found, expected = (load_file(out / "sae.safetensors") for out in (Path("out"), whole[0]))
    assert {path.name for path in Path("out").iterdir()} == RESULTS
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_restart_goes_on_with_its_own_run_and_no_other(letters, monkeypatch, capsys):
    one = Process(["--data", letters, *MANY, "--out", "other"], state_seconds=0, kill_at=("replace", 12))
    assert one.wait() == -signal.SIGKILL
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # and no --resume
        assert_refused(capsys, ["--data", letters, *MANY, "--out", "other"], "other already holds another run")
        assert stopped(monkeypatch, letters, "own", 11) == 130
        run("--data", letters, *MANY, "--out", "own")
    assert {path.name for path in Path("own").iterdir()} == RESULTS
    run("--data", letters, "--resume", "--out", "other")


def worker(torchrun, rank, attempt):
    """The process id of a rank, when torchrun has started the group for the nth time."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):  # it has ended
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if {b"RANK=%d" % rank, b"TORCHELASTIC_RESTART_COUNT=%d" % attempt} <= set(environment):
                    return child
        time.sleep(0.05)
    raise AssertionError(f"there is no process {rank}")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found by Linux's /proc")
def test_torchrun_starts_a_group_again_and_it_goes_on(letters):
    """Each process is killed once; what is left at the end is, bit for bit, what a group leaves that nobody killed."""
    many = [str(argument) for argument in ["--data", letters, *MANY, "--epochs", 100]]
    environment = dict(os.environ, PYTHONPATH=str(PROJECT), OMP_NUM_THREADS="1")

    def start(out):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*torchrun, "--max-restarts=2", str(cli.__file__), *many, "--out", out]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)

    whole = start("whole")
    errors = whole.communicate(timeout=SECONDS)[1].decode()
    assert whole.returncode == 0, errors
    torchrun, step = start("out"), 0
    for attempt, rank in enumerate((1, 0)):
        doomed = worker(torchrun, rank, attempt)
        while not Path("out", cli.STATE).exists() or step_of(Path("out")) <= step + 4:
            assert torchrun.poll() is None, torchrun.stderr.read().decode()
            time.sleep(0.01)
        step = step_of(Path("out"))
        os.kill(doomed, signal.SIGKILL)
    errors = torchrun.communicate(timeout=SECONDS)[1].decode()
    assert torchrun.returncode == 0, errors
    assert_as_if_never_stopped(Path("out"), Path("whole"))
