"""Train an ensemble of top-k sparse autoencoders on MNIST, or explain its initial loss (--analyze_loss)."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
import urllib.parse
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

import sae_helpers as sae

STATE = "training_state.pt"
# Command line names are the reference system's; the recipe's are the field's.
RECIPE_OPTIONS = {
    "epochs": "epochs",
    "k": "k",
    "hidden_size": "d_sae",
    "num_saes": "n_members",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "consistency_weight": "consistency_weight",
    "precision": "precision",
    "seed": "seed",
}


def build_parser() -> argparse.ArgumentParser:
    defaults = sae.RECIPES["improved"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: %(default)s")
    parser.add_argument("--analyze_loss", action="store_true", help="explain the initial loss, and end")
    parser.add_argument("--recipe", choices=sorted(sae.RECIPES), help="default: improved")
    for option, field in RECIPE_OPTIONS.items():
        kind = type(getattr(defaults, field))
        parser.add_argument(f"--{option}", type=kind, metavar=kind.__name__.upper(), help="default: the recipe's")
    parser.add_argument("--data", metavar="DIR", help="four idx files in MNIST's format; default: MNIST itself")
    parser.add_argument("--out", metavar="DIR", help="where to write; default: runs/<time>")
    parser.add_argument("--wandb", choices=["disabled", "offline", "online"], default="disabled")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.analyze_loss:
            analyze_loss(args)
        else:
            train(args)
    except sae.SAEError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; --resume --out DIR goes on from the last whole epoch", file=sys.stderr)
        return 130
    return 0


def chosen_recipe(args) -> sae.Recipe:
    given = {field: getattr(args, option) for option, field in RECIPE_OPTIONS.items()}
    try:
        return replace(
            sae.RECIPES[args.recipe or "improved"],
            **{field: value for field, value in given.items() if value is not None},
        )
    except sae.SAEError as error:
        message = str(error)
        for option, field in RECIPE_OPTIONS.items():  # the user's words for it
            message = re.sub(rf"\b{field}\b", f"--{option}", message)
        raise sae.SAEError(message) from error


def load_data(args) -> sae.Images:
    data = sae.load_idx(args.data) if args.data else sae.load_mnist()
    print(f"data: {data.name}, {len(data.train):,} training and {len(data.test):,} test images")
    return data


def analyze_loss(args) -> None:
    """Baselines, the initial loss of each member, the prediction, the verdict."""
    recipe, device = chosen_recipe(args), sae.pick_device(args.device)
    data = load_data(args)
    mean = data.train.mean(0)
    model = sae.Trainer(replace(recipe, decoder_bias=False), data.train, device).model
    energy = data.train.square().mean().item()
    print(f"zero image, training images:          MSE {energy:.4f}")
    for part, x in (("training", data.train), ("test", data.test)):
        print(f"mean image, {part + ' images:':<25} MSE {sae.mse(x, mean.expand_as(x)):.4f}")
    quality = sae.evaluate(model, data.train.to(device), mean.to(device))
    initial = quality["mse"].tolist()
    for m, (loss, correlation) in enumerate(zip(initial, quality["pearson"].tolist())):
        print(f"member {m}, untrained, training images: MSE {loss:.4f}, Pearson {correlation:.2f}")
    predicted = sae.predict_initial_mse(energy, model.d_in, model.d_sae, model.k)
    print(f"predicted from order statistics:      MSE {predicted:.4f}")
    loss, baseline = np.mean(initial), sae.mse(data.train, mean.expand_as(data.train)).item()
    print(
        f"verdict: the mean initial loss {loss:.4f} is {abs(loss / predicted - 1):.1%} "
        f"{'below' if loss < predicted else 'above'} the prediction, and {'worse' if loss > baseline else 'better'} "
        f"than the mean image ({baseline:.4f}), which looks at no pixel"
    )


def train(args) -> None:
    device = sae.pick_device(args.device)
    check_wandb(args.wandb)
    if args.resume and not args.out:
        raise sae.SAEError("--resume needs --out DIR: the folder of the run to go on with")
    out = Path(args.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    state = read_state(out) if args.resume else None
    recipe = resumed_recipe(args, state) if state else chosen_recipe(args)
    if not state:
        prepare(out)
    data = load_data(args)
    fingerprint = [data.name, len(data.train), data.train.double().sum().item()]
    if state and state["data"] != fingerprint:
        raise sae.SAEError(f"{out} was trained on {state['data'][0]} with other images: give the same data again")
    print(f"device: {device}; recipe: {recipe.name}; {recipe.n_members} members; writing to {out}")

    matplotlib.use("Agg")
    trainer = sae.Trainer(recipe, data.train, device)
    epochs, seconds = [], 0.0
    if state:
        trainer.load_state_dict(state["trainer"])
        epochs, seconds = state["epochs"], state["seconds"]
    run = start_wandb(args.wandb, recipe, data, out)
    began = time.perf_counter()

    def after_epoch(trainer):
        nonlocal seconds, began
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        entry, activity = sae.report(trainer, data)
        epochs.append(entry)
        last = trainer.step == trainer.total_steps
        if last:
            sae.save_run(trainer, data, epochs, seconds, out)
        if run or last:
            figures = sae.plot_run(trainer, data, epochs, activity)
            if run:
                sae.log_epoch(run, trainer, entry, figures)
            if last:
                sae.save_pictures(figures, out)
            plt.close("all")
        if not last:
            saved = {"trainer": trainer.state_dict(), "epochs": epochs, "seconds": seconds, "data": fingerprint}
            sae.write_atomically(out / STATE, lambda path: torch.save(saved, path))
            if interrupted.is_set():
                raise KeyboardInterrupt
        began = time.perf_counter()

    with remembered_interrupt() as interrupted:
        trainer.run(progress=True, after_epoch=after_epoch)
    if run:
        finish_wandb(run, out)
    (out / STATE).unlink(missing_ok=True)
    test = epochs[-1]["test"]
    print(
        f"{data.name}, test images, mean of members: "
        + ", ".join(
            f"{name} {np.mean(test[name]):.4f}" for name in ("mse", "pearson", "explained_variance", "dead_fraction")
        )
        + (f", matched cosine {test['matched_cosine']:.3f}" if recipe.n_members > 1 else "")
        + f"; {seconds:.0f} s of training; results in {out}"
    )


@contextlib.contextmanager
def remembered_interrupt():
    """Note that ^C was pressed: Python drops a KeyboardInterrupt that is raised within a destructor or callback."""
    pressed = threading.Event()

    def handle(number, frame):
        pressed.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield pressed
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def prepare(out: Path) -> None:
    """Make `out`; refuse to write over another run, and find out now whether writing works."""
    try:
        if (out / STATE).exists():
            raise sae.SAEError(f"{out} already holds a run, interrupted: go on with --resume, or choose another --out")
        if (out / "sae.safetensors").exists():
            raise sae.SAEError(f"{out} already holds a run: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        sae.write_atomically(out / STATE, lambda path: path.touch())
        (out / STATE).unlink()
    except OSError as error:
        raise sae.SAEError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error


def read_state(out: Path) -> dict:
    path = out / STATE
    try:
        if not path.exists():
            raise sae.SAEError(f"{path} does not exist: there is no interrupted run to resume in {out}")
        state = torch.load(path, weights_only=True)
        # A state of another version may hold other settings, or miss some.
        sae.Recipe(**state["trainer"]["recipe"])
        _ = state["trainer"]["scaler"], state["trainer"]["fires_at_look_before"]
        return {name: state[name] for name in ("trainer", "epochs", "seconds", "data")}
    except sae.SAEError:
        raise
    except Exception as error:  # torch.load fails in many ways on a file that is not its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise sae.SAEError(f"{path} cannot be read ({reason}): start a new run with another --out") from error


def resumed_recipe(args, state: dict) -> sae.Recipe:
    """The interrupted run's recipe; an option that contradicts it is an error, not ignored."""
    recipe = sae.Recipe(**state["trainer"]["recipe"])
    for option, field in {"recipe": "name", **RECIPE_OPTIONS}.items():
        given, had = getattr(args, option), getattr(recipe, field)
        if given not in (None, had):
            raise sae.SAEError(f"--{option} {given} differs from the interrupted run's {had}: leave it out")
    return recipe


def check_wandb(mode: str) -> None:
    """An online run without a login would stop and ask for one."""
    if mode != "online":
        return
    from requests.utils import get_netrc_auth  # comes with wandb

    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    # The two places where wandb looks for its key.
    if not os.environ.get("WANDB_API_KEY") and not get_netrc_auth(f"https://{host}"):
        raise sae.SAEError("--wandb online needs a login: run `wandb login` once, or use --wandb offline")


def start_wandb(mode: str, recipe, data, out):
    """A Weights & Biases run, or None."""
    if mode == "disabled":
        return None
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    config = {field.name: getattr(recipe, field.name) for field in fields(recipe)} | {"data": data.name}
    return wandb.init(project="mnist-sae", mode=mode, dir=str(out), config=config)


def finish_wandb(run, out) -> None:
    import wandb

    artifact = wandb.Artifact("sae", type="model")
    artifact.add_file(str(out / "sae.safetensors"))
    run.log_artifact(artifact)
    run.finish()


if __name__ == "__main__":
    sys.exit(main())
