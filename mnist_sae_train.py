"""Train an ensemble of top-k sparse autoencoders on MNIST, or explain its initial loss (--analyze_loss)."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import uuid
import warnings
import zlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import sae_helpers as sae

STATE, STATE_SECONDS, LOCK = "training_state.safetensors", 30, ".lock"
BLOCK = 1024  # rows of a file that are read together
RESULTS = ("sae.safetensors", "metrics.json", "reconstructions.png", "training_metrics.png", "sae_features.png")
QUALITY = ("mse", "pearson", "explained_variance", "dead_fraction", "rare_fraction")
# Command line names are the reference system's; the recipe's are the field's.
RECIPE_OPTIONS = {
    "epochs": "epochs", "k": "k", "hidden_size": "d_sae", "num_saes": "n_members", "batch_size": "batch_size",
    "learning_rate": "learning_rate", "consistency_weight": "consistency_weight", "precision": "precision",
    "seed": "seed",
}  # fmt: skip


# ---- The command line ----------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    defaults = sae.RECIPES["improved"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: %(default)s")
    parser.add_argument("--analyze_loss", action="store_true", help="explain the initial loss, and end")
    parser.add_argument("--recipe", choices=sorted(sae.RECIPES), help="default: improved")
    for option, field in RECIPE_OPTIONS.items():
        kind = type(getattr(defaults, field))
        parser.add_argument(f"--{option}", type=kind, metavar=kind.__name__.upper(), help="default: the recipe's")
    parser.add_argument(
        "--data", metavar="PATH",
        help="a folder of four idx files in MNIST's format, or a .npy or .safetensors of rows; default: MNIST itself",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where to write; default: runs/<time>")
    parser.add_argument("--wandb", choices=["disabled", "offline", "online"], default="disabled")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    return parser


class Stopped(Exception):
    """A signal stopped the run: its number, and what is left of the run."""


def main(argv: list[str] | None = None) -> int:
    parser, out = build_parser(), Output(sys.stdout if leads() else None)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(Output(sys.stderr)):
        args = parser.parse_args(argv)
        try:
            (analyze_loss if args.analyze_loss else train)(args)
            return 0
        except sae.SAEError as error:
            status, message = 2, f"error: {error}"
        except Stopped as stop:
            status, message = 128 + stop.args[0], f"stopped: {stop.args[1]}"  # as a shell counts it
        except KeyboardInterrupt:
            status, message = 130, "stopped before the training: the same command starts it again"
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            smaller = "choose a smaller --hidden_size, --num_saes or --batch_size"
            status, message = 2, f"error: the memory is too small ({first_line(error)}): {smaller}"
        if not processes()[1]:
            print(f"{parser.prog}: {printable(message)}", file=sys.stderr)
        return status


class Output:
    """Standard output or error whose reader may go away (`| head`), and whose encoding may lack letters."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # what is left in the buffer would raise again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def printable(text: object) -> str:
    """On one line, and valid Unicode, whatever bytes a path is made of."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def user_path(option: str, given: str) -> Path:
    if not given:
        raise sae.SAEError(f"{option} is empty: give a folder, or leave it out")
    return Path(os.path.expanduser(given))


@contextlib.contextmanager
def options_as_typed():
    """Messages about a recipe name its fields; the user typed the options."""
    try:
        yield
    except sae.SAEError as error:
        message = str(error)
        for option, field in RECIPE_OPTIONS.items():
            message = re.sub(rf"(^|choose a ){field}\b", rf"\1--{option}", message)
        raise sae.SAEError(message) from error


@options_as_typed()
def chosen_recipe(args) -> sae.Recipe:
    given = {field: getattr(args, option) for option, field in RECIPE_OPTIONS.items()}
    given = {field: value for field, value in given.items() if value is not None}
    return replace(sae.RECIPES[args.recipe or "improved"], **given)


def resumed_recipe(args, recipe: sae.Recipe) -> sae.Recipe:
    """The interrupted run's recipe; an option that contradicts it is an error, not ignored."""
    for option, field in {"recipe": "name", **RECIPE_OPTIONS}.items():
        given, had = getattr(args, option), getattr(recipe, field)
        # The device may be another one now, and not know the precision.
        if given not in (None, had) and option != "precision":
            raise sae.SAEError(f"--{option} {given} differs from the interrupted run's {had}: leave it out")
    return replace(recipe, precision=args.precision or recipe.precision)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises SAEError where `name` is not to be had."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in has.items() if there)
    if not has.get(name, False):
        raise sae.SAEError(
            f"device {name!r} is not available here: choose auto, or one of {[d for d in has if has[d]]}"
        )
    return torch.device(name)


def require_memory(recipe: sae.Recipe, data: sae.Images, device: torch.device) -> None:
    """Raise SAEError where a training cannot fit, before anything is allocated."""
    features, rows = recipe.n_members * recipe.d_sae, max(1000, min(recipe.batch_size, len(data.train)))
    resident = 0 if isinstance(data, Rows) else data.train.numel()
    # Weights, gradient, two moments and two copies; pre-activations and two more of their size.
    needed = 4 * (features * data.train.shape[1] * 6 + rows * features * 3 + resident)
    there = math.inf
    if device.type == "cuda":
        there = torch.cuda.mem_get_info()[0]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise sae.SAEError(
            f"--num_saes {recipe.n_members} with --hidden_size {recipe.d_sae} needs about {needed / 1e9:,.0f} GB of "
            f"memory, and {there / 1e9:,.0f} GB are there: choose smaller ones"
        )


# ---- Data ----------------------------------------------------------------------------

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load_data(args) -> sae.Images:
    if args.data is None:
        data = sae.load_mnist()
    else:
        path = user_path("--data", args.data)
        data = load_rows(path) if path.suffix in (".npy", ".safetensors") and not path.is_dir() else load_idx(path)
    what = "rows" if isinstance(data, Rows) else "images"
    print(f"data: {data.name}, {len(data.train):,} training and {len(data.test):,} test {what}")
    return data


def load_idx(folder: str | Path) -> sae.Images:
    """A data set in MNIST's file format (Fashion-MNIST, KMNIST, …), named by its folder; MNIST is known by content.

    The four idx files lie, plain or gzipped, in `folder` or in a folder `raw` below it.
    Raises SAEError where one is missing, damaged or not of the right structure.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise sae.SAEError(f"{folder} is not a folder: give that of four idx files, or a .npy or .safetensors file")
        below = folder / "raw"
        raw = below if below.is_dir() and not any(find(folder, stem) for stem in IDX_FILES) else folder
        arrays = [read_idx(raw, stem) for stem in IDX_FILES]
        name = printable(folder.resolve().name or folder)
    except OSError as error:
        where, remedy = error.filename or folder, "give yourself access to it, or choose another folder"
        raise sae.SAEError(f"{where}: {first_line(error)}; {remedy}") from error
    for i in (0, 2):
        images, labels = arrays[i], arrays[i + 1]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or images.size == 0:
            raise sae.SAEError(
                f"{raw / IDX_FILES[i]}: images of shape {images.shape} with labels of shape {labels.shape}; "
                "expected [n, height, width] and [n], none of them 0: replace the pair"
            )
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise sae.SAEError(f"{raw}: training and test images differ in size: replace one of them")
    is_mnist = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest() == sae._SHA256
    if is_mnist or name.strip().casefold() == "mnist":
        name = "MNIST" if is_mnist else "MNIST (not the original)"
    x, x_test = (torch.tensor(a.reshape(len(a), -1), dtype=torch.float32) / 255 for a in arrays[::2])
    y, y_test = (torch.from_numpy(a.astype(np.int64)) for a in arrays[1::2])
    return sae.Images(name, arrays[0].shape[1:], x, y, x_test, y_test, is_mnist)


def find(raw: Path, stem: str) -> Path | None:
    """The file itself, else its gzipped form, else None."""
    return next((raw / name for name in (stem, f"{stem}.gz") if name in os.listdir(raw)), None)


def read_idx(raw: Path, stem: str) -> np.ndarray:
    """One idx file: two zero bytes, type 8 (unsigned byte), the number of dimensions, their sizes, the data."""
    path, remedy = find(raw, stem), "replace it with a good copy"
    if path is None:
        raise sae.SAEError(f"{raw / stem} is missing (as is {stem}.gz): copy the file there")
    if path.exists() and not path.is_file():
        raise sae.SAEError(f"{path} is not a file: {remedy}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            start = file.read(4)
            sizes = file.read(4 * start[3]) if start[:3] == b"\0\0\x08" and len(start) == 4 else b""
            if not sizes or len(sizes) < 4 * start[3]:
                start = start.hex() or "nothing"
                raise sae.SAEError(f"{path} is not an idx file of bytes (it starts with {start}): {remedy}")
            shape, content = np.frombuffer(sizes, ">u4").tolist(), bytearray()
            promised = math.prod(shape)
            # In pieces: neither a header that promises much nor gzip that swells gets memory for nothing.
            while len(content) <= promised and (piece := file.read(2**20)):
                content += piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise sae.SAEError(f"{path} is damaged ({first_line(error)}): {remedy}") from error
    if len(content) != promised:
        more = "more" if len(content) > promised else f"{len(content):,}"
        raise sae.SAEError(f"{path} holds {more} bytes where its header promises {promised:,}: {remedy}")
    return np.frombuffer(content, np.uint8).reshape(shape)


@dataclass(frozen=True)
class Rows(sae.Images):
    """Rows of numbers in place of images: `train` lies in a file, and is read from there when it is needed."""

    mean: Tensor | None = None  # of the training rows, [d_in]


def load_rows(path: Path) -> Rows:
    """Float16 or float32 [n, d_in]: a .npy file, or a .safetensors file of one tensor. The last tenth, at most 10,000
    rows, is held out. Raises SAEError where the file is damaged, of another kind or shape, or holds no finite numbers.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        rows = np.load(path, mmap_mode="r") if path.suffix == ".npy" else map_safetensors(path)
        good = rows.dtype in (np.float16, np.float32) and rows.ndim == 2 and rows.flags.c_contiguous
        if not good or len(rows) < 10 or not rows.shape[1]:
            raise ValueError(f"it holds {rows.dtype} {list(rows.shape)}{', in Fortran order' * rows.flags.fnc}")
    except Exception as error:  # whatever a damaged file makes of the readers
        what = "give 10 rows or more, a float16 or float32 array [n, d_in] in C order"
        raise sae.SAEError(f"{path} cannot be used ({printable(first_line(error))}): {what}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes
        rows = torch.from_numpy(rows)
    total, held_out = torch.zeros(rows.shape[1], dtype=torch.float64), min(10_000, len(rows) // 10)
    train, test = rows[:-held_out], rows[-held_out:].float()
    for i, part in enumerate((*train.split(BLOCK), test)):
        bad = ~part.float().square().sum(1).isfinite()
        if bad.any():
            at = min(i * BLOCK, len(train)) + int(bad.nonzero()[0])
            raise sae.SAEError(f"{path}: row {at:,} holds NaN, or numbers that are too large: leave it out")
        total += 0 if part is test else part.sum(0, dtype=torch.float64)
    none = torch.empty(0, dtype=torch.int64)
    return Rows(printable(path.name), (), train, none, test, none, mean=(total / len(train)).float())


def map_safetensors(path: Path) -> np.memmap:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:  # it checks all that the header says
        (name,) = file.keys()
        part = file.get_slice(name)
        kind, shape = {"F16": "<f2", "F32": "<f4"}[part.get_dtype()], tuple(part.get_shape())
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    return np.memmap(path, kind, "r", start, shape)


# ---- A training run ------------------------------------------------------------------


def train(args) -> None:
    if args.resume and args.out is None:
        raise sae.SAEError("--resume needs --out DIR: the folder of the run to go on with")
    # For whatever loads matplotlib first: no window, and no backend of the user's.
    os.environ["MPLBACKEND"] = "Agg"
    recipe = chosen_recipe(args)
    with process_group(args) as device:
        if not leads():
            from_the_first(None)
        data = load_data(args)  # which may be downloaded, and by one process
        if leads():
            from_the_first(None)
        with run_folder(args) if leads() else contextlib.nullcontext() as out, options_as_typed():
            state = from_the_first(read_state(out) if leads() and args.resume else None)
            if state and args.again and state["parent"] != os.getppid():
                raise sae.SAEError(f"{out} already holds another run: go on with --resume, or choose another --out")
            recipe = resumed_recipe(args, state["recipe"]) if state else recipe
            require_memory(recipe, data, device)
            kind = ParallelTrainer if processes()[2] > 1 else FileTrainer
            run = (Run if leads() else Follower)(kind(recipe, data, device), data, out)
            if state:
                run.restore(state)
            print(f"device: {device}; recipe: {recipe.name}; {recipe.n_members} members; writing to {printable(out)}")
            try:
                run.require_room()
                with wandb_run(args.wandb if leads() else "disabled", run):
                    run.train()
                run.print_summary()
            except KeyboardInterrupt as error:
                raise Stopped(signal.SIGINT, run.what_is_left()) from error


def processes() -> tuple[int, int, int]:
    """This process's number, its number on this machine, and how many torchrun has started."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    return (int(os.environ.get("RANK") or 0), int(os.environ.get("LOCAL_RANK") or 0), size) if size > 1 else (0, 0, 1)


def leads() -> bool:
    """Whether it is this process that writes, logs and draws."""
    return processes()[0] == 0


class Run:
    """A training that can be stopped at any moment and gone on with: what it did so far, and where it writes."""

    def __init__(self, trainer: CapturedTrainer, data: sae.Images, out: Path):
        self.trainer, self.data, self.out = trainer, data, out
        content = hashlib.sha256()
        for part in (data.train, data.train_labels, data.test, data.test_labels):
            content.update(part.numpy())
        self.fingerprint = [data.name, content.hexdigest()]
        self.epochs: list[dict] = []  # the entries of `report`
        self.seconds, self.began = 0.0, time.perf_counter()  # of training alone
        self.wandb, self.wandb_id = None, uuid.uuid4().hex[:8]
        self.saved_step: int | None = None  # of the state on the disk
        self.next_state, self.signal, self.stop, self.finished = 0.0, 0, 0, False
        trainer.after_step = self.after_step

    def train(self) -> None:
        trainer, done = self.trainer, self.trainer.step // self.trainer.steps_per_epoch
        with self.noted_signals():
            if self.saved_step is None:
                self.write_state()
            self.began, self.next_state = time.perf_counter(), time.monotonic() + STATE_SECONDS
            # The run may have ended after an epoch's last step, or while its results were written.
            if len(self.epochs) < done or trainer.step == trainer.total_steps:
                del self.epochs[done - 1 :]
                self.after_epoch(trainer)
            trainer.run(progress=leads(), after_epoch=self.after_epoch)

    def after_step(self) -> None:
        within = self.trainer.step % self.trainer.steps_per_epoch  # at its end `after_epoch` writes
        self.stop = self.trainer.agreed(self.signal)
        if self.stop or (within and time.monotonic() >= self.next_state):
            with self.stopped_clock():
                self.save_state()

    def after_epoch(self, trainer) -> None:
        with self.stopped_clock():
            entry, activity = report(trainer, self.data)
            self.epochs.append(entry)
            last = trainer.step == trainer.total_steps
            self.save_state()
            figures = plot_run(trainer, self.data, self.epochs, activity) if self.wandb or last else {}
            if last:
                self.save_results(figures)
            self.ask_wandb(lambda run: log_epoch(run, trainer, entry, figures))
            if figures:
                import matplotlib.pyplot as plt

                plt.close("all")

    @contextlib.contextmanager
    def stopped_clock(self):
        if self.trainer.x.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.began
        yield
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def noted_signals(self):
        """^C and SIGTERM are noted, and obeyed at the end of the step: Python drops some exceptions of handlers."""

        def note(number, frame):
            self.signal = number

        # What is ignored (nohup, a shell's &) stays ignored; None is no handler of Python's.
        caught = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
        if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
            caught = []
        before = {number: signal.signal(number, note) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def save_state(self) -> None:
        """Write the state, then stop if a signal asked for it. A full disk does not end a training that can go on."""
        failure = ""
        try:
            self.write_state()
        except OSError as error:
            failure = f"the state cannot be written ({first_line(error)}): "
        if self.stop:
            raise Stopped(self.stop, failure + self.what_is_left())
        if failure:
            print(f"\n{failure}training goes on; free room", file=sys.stderr)
        self.next_state = time.monotonic() + STATE_SECONDS

    def what_is_left(self) -> str:
        if self.finished:
            return f"the results in {self.out} are complete"
        if self.saved_step is None:
            return "no state was written yet; start again, from the beginning"
        return f"--resume --out {self.out} goes on from step {self.saved_step:,} of {self.trainer.total_steps:,}"

    def write_state(self) -> None:
        from safetensors.torch import save

        trainer = self.trainer
        described = {
            "recipe": asdict(trainer.recipe), "data": self.fingerprint, "step": trainer.step,
            "restarts": trainer.restarts, "scaler": trainer.scaler.state_dict(), "epochs": self.epochs,
            "seconds": self.seconds, "wandb_id": self.wandb_id, "parent": os.getppid(),  # torchrun, perhaps
        }  # fmt: skip
        tensors, text = trainer.tensors(), json.dumps(described, allow_nan=False)
        write_durably(self.out / STATE, save(tensors, {"state": text, "sha256": sae.checksum(text, tensors)}))
        self.saved_step = trainer.step

    def restore(self, state: dict) -> None:
        """Continue from what `read_state` read. Raises SAEError where it does not fit the recipe and the images."""
        if state["data"] != self.fingerprint:
            name = state["data"][0]
            raise sae.SAEError(f"{self.out} was trained on {name} with other images: give the same data again")
        try:
            self.trainer.restore(state)
            done, within = divmod(state["step"], self.trainer.steps_per_epoch)
            require(len(state["epochs"]) in (done, done if within else done - 1))
        except Exception as error:
            raise unreadable(self.out / STATE, error) from error
        self.epochs, self.seconds, self.wandb_id = state["epochs"], state["seconds"], state["wandb_id"]
        self.saved_step = self.trainer.step

    def require_room(self) -> None:
        """Write, and delete, as many bytes as the run will need: a full disk is found out now."""
        model = sum(tensor.nbytes for tensor in self.trainer.model.state_dict().values())
        # A state holds the model and two moments, and is whole before the last one goes; 4 MiB are for the rest.
        needed = 7 * model + 16 * len(self.trainer.x) + 2**22
        if self.saved_step is not None:
            needed = max(0, needed - (self.out / STATE).stat().st_size)
        try:
            write_durably(self.out / "room.bin", bytes(needed))
            (self.out / "room.bin").unlink()
        except OSError as error:
            remedy = "free room, then --resume" if self.saved_step is not None else "free room, or choose another --out"
            raise sae.SAEError(
                f"--out {self.out} cannot take the {needed / 1e6:,.0f} MB to be written ({first_line(error)}): {remedy}"
            ) from error

    def save_results(self, figures: dict) -> None:
        """Write the five files; only when they are safe on the disk does the state go."""
        try:
            save_run(self.trainer, self.data, self.epochs, self.seconds, self.out, figures)
            for name in ("sae.safetensors", "metrics.json", *(f"{name}.png" for name in figures), ""):
                flush_to_disk(self.out / name)
        except OSError as error:
            raise sae.SAEError(
                f"the results cannot be written ({first_line(error)}): free room, then {self.what_is_left()}"
            ) from error
        self.finished = True
        (self.out / STATE).unlink(missing_ok=True)

    def ask_wandb(self, action) -> None:
        """W&B is a guest: where it fails, training goes on."""
        try:
            if self.wandb:
                action(self.wandb)
        except Exception as error:
            print(f"\nW&B failed ({first_line(error)}): going on without it", file=sys.stderr)
            self.wandb = None

    def print_summary(self) -> None:
        last, what = self.epochs[-1], "rows" if isinstance(self.data, Rows) else "images"
        names = [name for name in last["test"] if name != "matched_cosine" or self.trainer.recipe.n_members > 1]
        means = {
            name: "undefined" if last["test"][name] is None else f"{np.mean(last['test'][name]):.4f}" for name in names
        }
        print(
            f"{self.data.name}, test {what}, mean of members: {', '.join(map(' '.join, means.items()))}; "
            f"{self.seconds:.0f} s of training; results in {printable(self.out)}"
        )
        for part in ("train", "test"):
            for name, why in (("pearson", "none of them varies"), ("explained_variance", "all are the mean image")):
                if last[part][name] is None:
                    print(f"{name} is undefined on the {part} {what}: {why}")


class Follower(Run):
    """What a process does that does not lead: it trains."""

    def nothing(self, *_) -> None:
        pass

    after_epoch = write_state = require_room = print_summary = nothing


# ---- More than one process -----------------------------------------------------------


@contextlib.contextmanager
def process_group(args):
    """The processes that torchrun has started join; yields this one's device. When one dies torchrun begins again."""
    device, (rank, local, size) = pick_device(args.device), processes()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
    if size > 1 and args.out is None:
        raise sae.SAEError("several processes need --out DIR: where a group that torchrun starts again finds its state")
    args.again = bool(args.out) and attempt != "0" and not args.resume
    if args.again:
        out = user_path("--out", args.out)
        args.resume = os.path.lexists(out / STATE) or os.path.lexists(out / LOCK)
    if size > 1:
        if device.type == "mps" or (device.type == "cuda" and local >= torch.cuda.device_count()):
            raise sae.SAEError(f"process {local} finds no {device.type} device of its own: start fewer, or choose cpu")
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        try:
            # Some versions of torchrun keep what the last group has told each other, such as the addresses of its dead.
            store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
            kind = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(kind, store=store, rank=rank, world_size=size)
        except (ValueError, RuntimeError) as error:
            raise sae.SAEError(f"{size} processes cannot join ({first_line(error)}): start them by torchrun") from error
    yield device
    if size > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def together():
    """Around what all processes do: where one has died the others end."""
    try:
        yield
    except RuntimeError as error:
        remedy = "--resume, or torchrun --max-restarts, goes on from the last state"
        raise sae.SAEError(f"another process has ended ({first_line(error)}): {remedy}") from error


def from_the_first(value):
    """What the leading process has, in all of them."""
    values = [value]
    if processes()[2] > 1:
        with together():
            dist.broadcast_object_list(values)
    return values[0]


def add_up(tensor: Tensor, how="SUM") -> None:
    with together():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how))


# ---- Its folder ----------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(args):
    """The run's folder, made and locked."""
    out = user_path("--out", args.out) if args.out is not None else Path("runs")
    new = None
    try:
        if args.out is None:
            out = new = new_folder(out)
        elif not args.resume:
            new = None if out.exists() else out
            out.mkdir(parents=True, exist_ok=True)
        with locked(out) if out.exists() else contextlib.nullcontext(False) as died:
            require_free(out, args.resume, died)
            yield out
    except OSError as error:
        raise sae.SAEError(f"--out {out} cannot be used ({first_line(error)}): choose another folder") from error
    finally:
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                new.rmdir()


def new_folder(runs: Path) -> Path:
    runs.mkdir(exist_ok=True)
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
        with contextlib.suppress(FileExistsError):  # of a run that began in the same second
            (runs / f"{name}{suffix}").mkdir()
            return runs / f"{name}{suffix}"


@contextlib.contextmanager
def locked(out: Path):
    """Keep other runs out; the system drops the lock when the process dies, however it dies. Says whether one died."""
    path = out / LOCK
    died = path.exists()  # a run that ends, even by an error, takes it away
    with path.open("ab") as file:
        try:
            with contextlib.suppress(ImportError):  # Windows
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError as error:  # others than these: a file system without locks
            alone = error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
        if not alone:
            raise sae.SAEError(f"{out} is in use by another run: wait for its end, or choose another --out")
        try:
            yield died
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def require_free(out: Path, resume: bool, died: bool) -> None:
    """Refuse to write over another run, or to resume none; take away what a killed process left half written."""
    interrupted, finished = os.path.lexists(out / STATE), any((out / name).exists() for name in RESULTS)
    if not resume and interrupted:
        raise sae.SAEError(f"{out} already holds a run, interrupted: go on with --resume, or choose another --out")
    if not resume and finished:
        raise sae.SAEError(f"{out} already holds a run: choose another --out")
    if resume and not interrupted:
        if finished:
            raise sae.SAEError(f"{out} holds a finished run: there is nothing left to resume")
        if not died:
            raise sae.SAEError(f"{out} holds no interrupted run: choose another --out, or leave --resume out")
        print("the run ended before its first state was written: starting from the beginning")
    for name in map(Path, (STATE, *RESULTS, "room.bin")):
        for half in out.glob(f".{name.stem}.*{name.suffix}"):
            half.unlink()
    (out / "room.bin").unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """After any death the file is the old one or the new one, whole."""

    def write(temporary):
        temporary.write_bytes(content)
        flush_to_disk(temporary)

    sae.write_atomically(path, write)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- Its state -----------------------------------------------------------------------


class CapturedTrainer(sae.Trainer):
    """A Trainer that can be stored, and on CUDA launches a step, bound by the launches of its kernels, as one graph.

    It is recorded after three plain steps, when optimizer and scaler hold their state. A graph holds Python's numbers
    as they were: a subclass whose `losses` or `boost` reads any that change (the step, say) sets `capture = False`.
    """

    capture = True

    def __init__(self, recipe: sae.Recipe, x: Tensor, device: torch.device | str = "cpu"):
        super().__init__(recipe, x, device)
        self.capture, self.graph, self.plain_steps = self.capture and self.x.device.type == "cuda", None, 0
        self.after_step = lambda: None

    def train_step(self) -> None:
        super().train_step()
        self.after_step()

    def update(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.capture and len(x) == self.recipe.batch_size:
            self.plain_steps += 1
            if self.plain_steps > 3 and (self.graph or self.record(x)):
                self.captured_x.copy_(x)
                self.graph.replay()
                return self.captured
        return super().update(x)

    def record(self, x: Tensor) -> bool:
        graph, self.captured_x = torch.cuda.CUDAGraph(), x.clone()
        stream = torch.cuda.Stream(x.device)  # torch's own for captures stays on the first device that had one
        try:
            # A capture that fails does not leave its stream; `torch.cuda.stream` does.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                self.captured = super().update(self.captured_x)
            self.graph = graph
        except RuntimeError as error:
            cause = first_line(error.__context__ or error)  # the end of the capture fails because the step did
            print(f"The step cannot be captured ({cause}): training goes on, more slowly.", file=sys.stderr)
            self.capture = False
            scaler = torch.amp.GradScaler(x.device.type, enabled=self.scaler.is_enabled())
            scaler.load_state_dict(self.scaler.state_dict())  # without the half step that was recorded
            self.scaler = scaler
        return self.capture

    def tensors(self) -> dict[str, Tensor]:
        """All that training remembers; the history in float64, which holds each of its numbers exactly."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in entries.items()}
        tensors |= {f"history.{name}": torch.tensor(rows, dtype=torch.float64) for name, rows in self.history.items()}
        tensors |= {name: getattr(self, name) for name in ("order", "fires", "use", "scale")}
        tensors["generator"] = self.generator.get_state()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def described(self, step: int) -> dict[str, tuple]:
        """Type and shape of what `tensors` returns after this step."""
        shapes = {name: (t.dtype, *t.shape) for name, t in self.tensors().items() if not name.startswith("optimizer.")}
        logged, members = math.ceil(step / self.log_every), [self.recipe.n_members] if step else []
        for name in self.history:
            shapes[f"history.{name}"] = (torch.float64, logged, *([] if name in ("step", "consistency") else members))
        shapes["order"] = torch.int64, len(self.x) if step else 0
        parameters = [(p.dtype, *p.shape) for group in self.optimizer.param_groups for p in group["params"]]
        for i, shape in enumerate(parameters if step else []):
            shapes |= {f"optimizer.{i}.exp_avg": shape, f"optimizer.{i}.exp_avg_sq": shape}
            shapes[f"optimizer.{i}.step"] = (torch.float32,)
        return shapes

    def restore(self, state: dict) -> None:
        """Continue from tensors and numbers of another of the same recipe and images. Raises where they do not fit."""
        self.graph, self.plain_steps = None, 0  # it would go on with the tensors that were
        tensors, step = state["tensors"], state["step"]
        found = {name: (t.dtype, *t.shape) for name, t in tensors.items()}
        require(step <= self.total_steps, found == self.described(step))
        require(not step or tensors["order"].sort()[0].equal(torch.arange(len(self.x))))
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        # Only moments come from the file: flags, and the kind of lr, are those of this device.
        optimizer, moments = self.optimizer.state_dict(), ("step", "exp_avg", "exp_avg_sq")
        parameters = range(sum(len(group["params"]) for group in optimizer["param_groups"])) if step else ()
        optimizer["state"] = {i: {name: tensors[f"optimizer.{i}.{name}"] for name in moments} for i in parameters}
        self.optimizer.load_state_dict(optimizer)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for name in ("order", "fires", "use", "scale"):
            setattr(self, name, tensors[name].to(self.x.device))
        self.generator.set_state(tensors["generator"])
        self.history = {name: tensors[f"history.{name}"].tolist() for name in self.history}
        self.history["step"] = list(map(int, self.history["step"]))
        self.step, self.restarts = step, [tuple(pair) for pair in state["restarts"]]


class FileTrainer(CapturedTrainer):
    """A CapturedTrainer of a data set that may lie in a file: rows are read from there batch by batch.

    `x` is then their mean, n times over, which costs nothing; the batch that is made of it gets its rows here.
    """

    def __init__(self, recipe: sae.Recipe, data: sae.Images, device: torch.device | str = "cpu"):
        self.rows = data.train if isinstance(data, Rows) else None
        x = data.train if self.rows is None else data.mean.to(device).expand(len(data.train), -1)
        super().__init__(recipe, x, device)

    def update(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.rows is not None:
            begin = self.step % self.steps_per_epoch * self.recipe.batch_size
            if begin == 0:
                self.order = order_by_blocks(len(self.rows), self.generator)
            x.copy_(self.rows[self.order[begin : begin + len(x)].cpu()])
        return super().update(x)

    def agreed(self, number: int) -> int:
        return number


def order_by_blocks(n: int, generator: torch.Generator) -> Tensor:
    """A random order of n rows in which only 64 blocks of a file, themselves random ones, are mixed at a time."""
    blocks = torch.arange(n).split(BLOCK)
    order = torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator)])
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in order.split(64 * BLOCK)])


class ParallelTrainer(FileTrainer):
    """A FileTrainer in each of several processes, which hold the same numbers and divide each batch among them.

    Codes, reconstructions and gradients are added up; what follows from them, Adam's step for one, is done by each.
    """

    capture = False

    def __init__(self, recipe: sae.Recipe, data: sae.Images, device: torch.device | str = "cpu"):
        super().__init__(recipe, data, device)
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: add_up(parameter.grad))
        self.copy_from_the_first()

    def update(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.model.autoencode = self.autoencode  # for this step alone: one process evaluates and draws
        try:
            return super().update(x)
        finally:
            del self.model.autoencode

    def autoencode(self, x: Tensor, boost: Tensor | None) -> list[Tensor]:
        rank, _, size = processes()
        begin, end = len(x) * rank // size, len(x) * (rank + 1) // size
        own = x[begin : max(end, begin + 1)]  # a process without an image takes one, and leaves it out
        wholes = []
        for part in sae.TopKSAE.autoencode(self.model, own, boost):  # [M, own images, n]
            part = part[:, : end - begin]
            others = part.new_zeros(len(part), len(x), part.shape[2])
            others[:, begin:end] = part.detach()
            add_up(others)
            wholes.append(torch.cat([others[:, :begin], part, others[:, end:]], 1))
        return wholes

    def align_members(self) -> None:
        if leads():
            super().align_members()
        self.copy_from_the_first()

    def copy_from_the_first(self) -> None:
        moments = [s[name] for s in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        with together():
            for tensor in (*self.model.state_dict().values(), self.fires, self.use, self.scale, *moments):
                dist.broadcast(tensor, 0)

    def agreed(self, number: int) -> int:
        """The greatest of all processes', every few steps, so that all stop in the same one."""
        if self.step % self.log_every and self.step % self.steps_per_epoch:
            return 0
        add_up(greatest := torch.tensor(number, device=self.x.device), "MAX")
        return int(greatest)


def read_state(out: Path) -> dict | None:
    """What `Run.write_state` wrote, or None where nothing is. Nothing of it is run, or taken on trust."""
    from safetensors import safe_open

    path = out / STATE
    if not os.path.lexists(path):
        return None
    try:
        require(path.is_file())
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            text, sha256 = (file.metadata()[name] for name in ("state", "sha256"))
        if sha256 != sae.checksum(text, tensors):
            raise ValueError("it is damaged: its checksum is wrong")
        state = json.loads(text)
        require(state["recipe"].keys() == {field.name for field in fields(sae.Recipe)})
        recipe = state["recipe"] = sae.Recipe(**state["recipe"])
        # Before anything of the size that it promises is made.
        M, same = recipe.n_members, list(tensors["model.W"].shape[:2]) == [recipe.n_members, recipe.d_sae]
        flags = [getattr(recipe, field.name) for field in fields(recipe) if field.type == "bool"]
        require(same, all(type(flag) is bool for flag in flags), recipe.name in sae.RECIPES)
        require(
            type(state["step"]) is int,
            state["step"] >= 0,
            finite(state["seconds"], *state["scaler"].values()),
            type(state["parent"]) is int,
        )
        require(all(type(step) is type(m) is int for step, m in state["restarts"]))
        require(re.fullmatch("[0-9a-z]{1,64}", state["wandb_id"]), list(map(type, state["data"])) == [str, str])
        for entry in state["epochs"]:
            require(finite(entry["epoch"], entry["step"]), entry.keys() == {"epoch", "step", "train", "test"})
            for part in (entry["train"], entry["test"]):
                cosine, rest = part["matched_cosine"], [part[name] for name in QUALITY if part[name] is not None]
                require(cosine is None or finite(cosine), all(len(values) == M and finite(*values) for values in rest))
    except Exception as error:
        raise unreadable(path, error) from error
    return state | {"tensors": tensors}


def require(*conditions: object) -> None:
    if not all(conditions):
        raise ValueError("it contradicts itself")


def finite(*values: object) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def unreadable(path: Path, error: Exception) -> sae.SAEError:
    return sae.SAEError(f"{path} cannot be used ({first_line(error)}): start a new run with another --out")


# ---- What it leaves: figures and pictures --------------------------------------------


def report(trainer: sae.Trainer, data: sae.Images) -> tuple[dict, Tensor]:
    """Quality of what has been trained so far, for a file: epoch, step, and under `train` and `test` the metrics.

    Each has a number for each member, or is None where it is undefined; `matched_cosine` is one
    number. As many training images are evaluated as there are test images, so that dead
    fractions compare. Returns the entry, and the activity [M, d_sae] on test images.
    Raises SAEError where training has diverged.
    """
    features = trainer.model.features()
    mean = data.mean.to(trainer.x) if isinstance(data, Rows) else trainer.x.mean(0)
    entry = {"epoch": trainer.step // trainer.steps_per_epoch, "step": trainer.step}
    for part, x in (("train", data.train[: len(data.test)].to(mean)), ("test", data.test.to(mean))):
        quality = sae.evaluate(trainer.model, x, mean)
        trainer.require_finite(quality["mse"])
        entry[part] = {name: quality[name].tolist() for name in QUALITY}
        if not (x.amax(1) > x.amin(1)).any():
            entry[part]["pearson"] = None
        # The mean of equal images differs from them by float32's rounding.
        if sae.mse(x, mean.expand_as(x)) <= 1e-12 * x.square().mean():
            entry[part]["explained_variance"] = None
    cosine = sae.matched_cosine(features) if len(features) > 1 else None
    for part in ("train", "test"):
        entry[part]["matched_cosine"] = cosine
    return entry, quality["activity"]


def save_run(trainer, data: sae.Images, epochs: list[dict], seconds: float, folder: Path, figures: dict) -> None:
    """Write what a finished run leaves: the model, the pictures and, last, `metrics.json`.

    `epochs` are the entries of `report`; `seconds` is the time of training alone.
    """
    recipe, device = trainer.recipe, trainer.x.device.type
    metrics = {
        "data": data.name, "is_mnist": data.is_mnist, "recipe": asdict(recipe), "epochs": epochs,
        "final": {part: epochs[-1][part] for part in ("train", "test")}, "restarts": trainer.restarts,
        "train_images_evaluated": min(len(data.train), len(data.test)), "seconds": seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else device, "torch": torch.__version__,
        "seed": recipe.seed,
    }  # fmt: skip
    trainer.model.save(folder / "sae.safetensors", data=data.name, recipe=recipe.name)
    save_pictures(figures, folder)
    text = json.dumps(metrics, indent=1, allow_nan=False)
    sae.write_atomically(folder / "metrics.json", lambda path: path.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def plain_style():
    """Matplotlib as it comes: no setting of the user's changes a picture, and no `$` in a name is markup."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # letters of a name
        yield


@plain_style()
def plot_reconstructions(model: sae.TopKSAE, data: sae.Images):
    """Test images above member 0's reconstructions: the best, median and worst four by Pearson of the first 2,000."""
    x, columns = data.test[:2000], 12  # so few, because the picture is logged after each epoch
    with torch.no_grad():
        x_hat = torch.cat([model(part.to(model.W.device))[0].cpu() for part in x.split(1000)])
    scores = sae.pearson(x[:, None], x_hat[:, None])
    chosen, middle, what = scores.argsort(descending=True), len(x) // 2, f"all {len(x)} test images, best first"
    if len(x) > columns:
        chosen = torch.cat([chosen[:4], chosen[middle - 2 : middle + 2], chosen[-4:]])
        what = f"best, median, worst four of {len(x):,} test images"
    kind, empty = "digit" if data.is_mnist else "label", columns - len(chosen)
    titles = [f"{kind} {label}" for label in data.test_labels[chosen].tolist()] + [""] * empty
    titles += [f"{score:.3f}" for score in scores[chosen].tolist()]
    rows = [x[chosen], torch.full((empty, x.shape[1]), math.nan), x_hat[chosen]]
    return sae.show_images(
        torch.cat(rows), data, f"{what}; below, reconstructions with their Pearson", titles, columns=columns
    )


@plain_style()
def plot_training(history: dict[str, list], data: sae.Images, epochs: list[dict] | tuple = ()):
    """Loss and Pearson on training batches over steps, a line per member; dots: test images after each epoch.

    `epochs` has for each epoch its last `step` and, under `test`, `mse` and `pearson` per member.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), facecolor="white")
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.15, top=0.91, wspace=0.2)  # a layout engine takes longer
    for axis, name, label in zip(
        axes,
        ("mse", "pearson"),
        (f"MSE (per {'number' if isinstance(data, Rows) else 'pixel'})", "Pearson correlation"),
    ):
        axis.plot(history["step"], history[name], color="tab:blue", alpha=0.5, linewidth=0.8)
        axis.plot([], [], color="tab:blue", label="training batches, a line per member")
        dots = [(entry["step"], np.mean(entry["test"][name])) for entry in epochs if entry["test"][name]]
        if dots:
            axis.plot(*zip(*dots), "ko", markersize=5, label="test images, mean of members")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.set_title(f"{data.name}: {label.split()[0]}, last batch {np.mean(history[name][-1]):.4f}", fontsize=10)
    if np.min(history["mse"]) > 0:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter("{x:g}")  # powers of ten would need more room than there is
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(fontsize=8)
    return figure


@plain_style()
def plot_features(model: sae.TopKSAE, activity: Tensor, data: sae.Images, n: int = 80):
    """Member 0's features at n evenly spaced ranks of use, most used first."""
    ranked = activity[0].argsort(descending=True).cpu()
    chosen = ranked[torch.linspace(0, len(ranked) - 1, min(n, len(ranked))).long()]
    dead, rare = ((activity[0] < share).float().mean().item() for share in (1e-12, 1e-3))
    title = f"{len(chosen)} of {model.d_sae:,} features by use; light adds ink, dark removes it"
    images = model.features()[0].cpu()[chosen]
    return sae.show_images(images, data, f"{title}; {dead:.1%} dead, {rare:.1%} rare", signed=True)


def plot_run(trainer: sae.Trainer, data: sae.Images, epochs: list[dict], activity: Tensor) -> dict:
    """A run's pictures by name, of rows only the curves; `epochs` and `activity` come from `report`. The caller closes
    them.
    """
    curves = {"training_metrics": plot_training(trainer.history, data, epochs)}
    return curves if isinstance(data, Rows) else curves | {
        "reconstructions": plot_reconstructions(trainer.model, data),
        "sae_features": plot_features(trainer.model, activity, data),
    }  # fmt: skip


@plain_style()
def save_pictures(figures: dict, folder: str | Path) -> None:
    """Write each figure to `folder` under its name, as PNG."""
    for name, figure in figures.items():
        path = Path(folder) / f"{name}.png"
        sae.write_atomically(path, lambda temporary, figure=figure: figure.savefig(temporary, dpi=90))


# ---- Weights & Biases ----------------------------------------------------------------


@contextlib.contextmanager
def wandb_run(mode: str, run: Run):
    """A W&B run beside the training, and the model sent after it; its exit code is the process's."""
    if mode == "disabled":
        yield
        return
    folder, code = str(run.out.resolve() / "wandb"), 2
    os.environ["WANDB_MODE"] = mode
    for name, value in (("WANDB_SILENT", "true"), ("WANDB_DATA_DIR", folder), ("WANDB_CACHE_DIR", folder)):
        os.environ.setdefault(name, value)
    run.wandb = start_wandb(mode, run)
    try:
        yield
        run.ask_wandb(lambda started: log_model(started, run.out / "sae.safetensors"))
        code = 0
    except Stopped as stop:
        code = 128 + stop.args[0]
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        run.ask_wandb(lambda started: started.finish(exit_code=code))


def start_wandb(mode: str, run: Run):
    """Raises SAEError where W&B cannot be reached."""
    before, sys.stdin = sys.stdin, io.StringIO()  # no terminal, so that W&B never asks for a login
    try:
        import wandb

        if mode == "online":
            wandb.login(verify=True)
        return wandb.init(
            project="mnist-sae", mode=mode, dir=str(run.out), id=run.wandb_id,
            resume="allow" if mode == "online" else None,
            config=asdict(run.trainer.recipe) | {"data": run.data.name, "is_mnist": run.data.is_mnist},
            settings=wandb.Settings(init_timeout=20),
        )  # fmt: skip
    except Exception as error:
        remedy = "run `wandb login` once, check key and network, or use --wandb offline"
        raise sae.SAEError(f"--wandb {mode} cannot begin ({first_line(error)}): {remedy}") from error
    finally:
        sys.stdin = before


@plain_style()
def log_epoch(run, trainer: sae.Trainer, entry: dict, figures: dict) -> None:
    """Log an epoch to a Weights & Biases run: training every `log_every` steps, the entry of `report`, pictures.

    Numbers are means over the members. Training has a matched cosine where a consistency loss
    keeps the members aligned; the test images have it always.
    """
    from wandb import Image

    history = trainer.history
    for i, step in enumerate(history["step"]):
        if step >= entry["step"] - trainer.steps_per_epoch:
            values = {f"train/{name}": float(np.mean(values[i])) for name, values in history.items()}
            if trainer.consistent:
                values["train/matched_cosine"] = 1 - history["consistency"][i]
            run.log(values, step=step)
    evaluated = {f"test/{name}": float(np.mean(value)) for name, value in entry["test"].items() if value is not None}
    run.log(evaluated | {name: Image(figure) for name, figure in figures.items()}, step=entry["step"])


def log_model(run, path: Path) -> None:
    from wandb import Artifact

    artifact = Artifact("sae", type="model")
    artifact.add_file(str(path), policy="immutable")  # the other policy copies it
    run.log_artifact(artifact)


# ---- The initial loss ----------------------------------------------------------------


@options_as_typed()
def analyze_loss(args) -> None:
    """Baselines, the initial loss of each member, the prediction, the verdict."""
    recipe, device = chosen_recipe(args), pick_device(args.device)
    data = load_data(args)
    if isinstance(data, Rows):
        raise sae.SAEError("--analyze_loss explains the loss of images: give a folder of them, or leave --data out")
    require_memory(recipe, data, device)
    mean = data.train.mean(0)
    model = sae.Trainer(replace(recipe, decoder_bias=False), data.train, device).model
    energy, baseline = data.train.square().mean().item(), sae.mse(data.train, mean.expand_as(data.train)).item()
    print(f"zero image, training images:          MSE {energy:.4f}")
    print(f"mean image, training images:          MSE {baseline:.4f}")
    print(f"mean image, test images:              MSE {sae.mse(data.test, mean.expand_as(data.test)):.4f}")
    quality = sae.evaluate(model, data.train.to(device), mean.to(device))
    initial = quality["mse"].tolist()
    for m, (loss, correlation) in enumerate(zip(initial, quality["pearson"].tolist())):
        print(f"member {m}, untrained, training images: MSE {loss:.4f}, Pearson {correlation:.2f}")
    predicted, loss = predict_initial_mse(energy, model.d_in, model.d_sae, model.k), np.mean(initial)
    print(f"predicted from order statistics:      MSE {predicted:.4f}")
    apart = f"{abs(loss / predicted - 1):.1%} {'below' if loss < predicted else 'above'}" if predicted else "as in"
    print(
        f"verdict: the mean initial loss {loss:.4f} is {apart} the prediction, and "
        f"{'worse' if loss > baseline else 'better'} than the mean image ({baseline:.4f}), which looks at no pixel"
    )


def predict_initial_mse(energy: float, d_in: int, d_sae: int, k: int) -> float:
    """MSE of an untrained, orthogonally initialised top-k SAE, from order statistics alone.

    `energy` is the mean squared pixel, E‖x‖² / d_in (the MSE of the zero image). The
    d_sae pre-activations of an image are close to Gaussian, of variance ‖x‖² / max(d_in, d_sae).
    The k largest of them carry the share  q = t + τ φ(τ)  of their energy, with t = k / d_sae
    and τ the value that a standard Gaussian exceeds with probability t. The image comes back
    too faint, as q / c of itself (c: length of a row), with noise of energy q (1 - q) ‖x‖²;
    appendix A1 derives this. With d_sae ≤ d_in rows are orthonormal and there is no noise.
    """
    from scipy.stats import norm

    t = k / d_sae
    threshold = norm.isf(t)
    q = t + (threshold * norm.pdf(threshold) if t < 1 else 0)
    if d_sae <= d_in:
        return energy * (1 - q * d_sae / d_in)
    c = math.sqrt(d_in / d_sae)
    return energy * ((1 - q / c) ** 2 + q * (1 - q))


if __name__ == "__main__":
    sys.exit(main())
