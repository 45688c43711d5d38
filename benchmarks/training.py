"""Speed of training: the reference loop and five separate modules against ours.

    python benchmarks/training.py [ensemble] [growth] [memory] [precision] [agreement]

Without a name all parts run, about 12 minutes on two CPU cores (`make bench`). What is
compared takes turns in one process, on the same batches of MNIST; a turn's time is a mean
over its steps. Each part replaces its own in benchmarks/results/training_<device>.json,
which notebooks/appendix/A2_speed_and_precision.ipynb shows.
"""

import multiprocessing
import re
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from common import main
from scipy.optimize import linear_sum_assignment
from torch import nn

import sae_helpers as sae
from mnist_sae_train import CapturedTrainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = replace(sae.RECIPES["reference"], monitor=False)
OURS = CapturedTrainer if DEVICE.type == "cuda" else sae.Trainer


class Separate:
    """What one would write first: a module and a default Adam for each member, a top-k mask, a dense decode."""

    def __init__(self, recipe, x, starts=None):
        self.recipe, self.x, self.step = recipe, x.to(DEVICE), 0
        self.starts = sae.Trainer(recipe, x).model.W.detach() if starts is None else starts  # [M, d_sae, d_in]
        self.members = []
        for W in self.starts:
            encoder = nn.Linear(x.shape[1], recipe.d_sae).to(DEVICE)
            with torch.no_grad():
                encoder.weight.copy_(W)
                encoder.bias.zero_()
            self.members.append(encoder)
        self.optimizers = [torch.optim.Adam(e.parameters(), lr=recipe.learning_rate) for e in self.members]
        self.generator = torch.Generator().manual_seed(recipe.seed)  # the same batches as ours

    def batch(self):
        size, per_epoch = self.recipe.batch_size, -(-len(self.x) // self.recipe.batch_size)
        if self.step % per_epoch == 0:
            self.order = torch.randperm(len(self.x), generator=self.generator).to(DEVICE)
        position = self.step % per_epoch
        self.step += 1
        return self.x[self.order[position * size : (position + 1) * size]]

    def loss(self, encoder, x):
        pre = encoder(x)
        mask = torch.zeros_like(pre).scatter(1, pre.topk(self.recipe.k).indices, 1.0)
        return F.mse_loss((pre * mask) @ F.normalize(encoder.weight, dim=1), x)

    def train_step(self):
        x = self.batch()
        for encoder, optimizer in zip(self.members, self.optimizers):
            optimizer.zero_grad()
            self.loss(encoder, x).backward()
            optimizer.step()


class Reference(Separate):
    """The reference loop: ten pairs matched in every step, and a backward pass through all of them for each member.

    Every pass adds to every member's gradient; so that the sum is that of one consistency
    loss, as ours has it, each takes an M-th of the weight.
    """

    def train_step(self):
        x, recipe = self.batch(), self.recipe
        features = [F.normalize(encoder.weight, dim=1) for encoder in self.members]
        distances = []
        for a, b in combinations(features, 2):
            similarity = a @ b.T
            pairs = linear_sum_assignment(similarity.detach().cpu().numpy(), maximize=True)
            distances.append(1 - similarity[pairs].mean())
        warm = min(1.0, (self.step - 1) / recipe.consistency_warmup)
        weight = recipe.consistency_weight * 0.5 * (1 - np.cos(np.pi * warm))
        consensus = weight * torch.stack(distances).mean() / len(self.members)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for encoder in self.members:
            (self.loss(encoder, x) + consensus).backward(retain_graph=True)
        for optimizer in self.optimizers:
            optimizer.step()


def seconds(trainer, steps):
    """Seconds for each of `steps` steps."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def take_turns(trainers, turns, steps, warm_up=10):
    """Milliseconds of a step in each turn, by name. `steps` may differ by name."""
    for name, trainer in trainers.items():
        seconds(trainer, min(warm_up, steps[name]))
    times = {name: [] for name in trainers}
    for _ in range(turns):
        for name, trainer in trainers.items():
            times[name].append(1e3 * seconds(trainer, steps[name]))
    for name, values in times.items():
        print(f"{name:44} {median(values):9.2f} ms a step (fastest turn {min(values):.2f})", flush=True)
    return times


def ensemble(data):
    without = replace(REFERENCE, consistency_weight=0)
    trainers = {
        "reference loop": Reference(REFERENCE, data.train),
        "ours, with the consistency loss": OURS(REFERENCE, data.train, DEVICE),
        "five separate modules": Separate(without, data.train),
        "ours, without": OURS(without, data.train, DEVICE),
        "improved recipe": OURS(sae.RECIPES["improved"], data.train, DEVICE),
    }
    # A turn of ours holds exactly one matching, as 100 steps of training do.
    return take_turns(trainers, turns=5, steps=dict(zip(trainers, (3, 100, 25, 100, 100))))


def growth(data):
    """Milliseconds of a step (fastest of three turns) as one size grows, the others as in the reference."""
    result = {}
    for size, values in {
        "n_members": (1, 2, 4, 5, 8, 16), "d_sae": (512, 1024, 2048, 4096, 8192),
        "batch_size": (64, 128, 256, 512, 2048),
    }.items():  # fmt: skip
        result[size] = {}
        for value in values:
            recipe = replace(REFERENCE, **{size: value}, match_every=10**9)  # the step alone
            trainer = sae.Trainer(recipe, data.train, DEVICE)
            trainer.step = 1  # no matching at the start either
            trainer.order = torch.randperm(len(data.train)).to(DEVICE)
            seconds(trainer, 3)
            result[size][value] = [1e3 * seconds(trainer, 10) for _ in range(3)]
            print(f"{size} = {value}: {min(result[size][value]):.2f} ms a step", flush=True)
    return result


def peak_memory(name):
    """MiB at the peak: of the process on a CPU (Linux), of torch's tensors on a GPU."""
    x = torch.rand(60_000, 784)  # of MNIST's size; reading the files would have a peak of its own
    without = replace(REFERENCE, consistency_weight=0)
    small = replace(REFERENCE, n_members=2, d_sae=64)
    trainer = {
        "libraries and images": lambda: sae.Trainer(small, x, DEVICE),  # loads what all of them load
        "reference loop": lambda: Reference(REFERENCE, x),
        "five separate modules": lambda: Separate(without, x),
        "ours, with the consistency loss": lambda: sae.Trainer(REFERENCE, x, DEVICE),
        "ours, without": lambda: sae.Trainer(without, x, DEVICE),
    }[name]()
    for _ in range(5):
        trainer.train_step()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # ru_maxrss would not do: on Linux a process inherits it from the one that started it.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def memory(data):
    names = (
        "libraries and images",
        "reference loop",
        "five separate modules",
        "ours, with the consistency loss",
        "ours, without",
    )
    result = {}
    for name in names:  # a process each: a peak never goes down
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result[name] = pool.apply(peak_memory, (name,))
        print(f"{name:44} {result[name]:9.0f} MiB", flush=True)
    return result


class NotFused(sae.Trainer):
    """Ours with torch's default Adam."""

    def __init__(self, *args):
        super().__init__(*args)
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer = torch.optim.Adam(groups)


def precision(data):
    """What fusing, capturing and mixed precision each buy; then five epochs of each precision."""
    on_cuda = DEVICE.type == "cuda"
    improved = sae.RECIPES["improved"]
    float32, bfloat16, float16 = (replace(improved, precision=name) for name in ("float32", "bfloat16", "float16"))
    cases = {"float32, default Adam": (NotFused, float32), "float32, fused Adam": (sae.Trainer, float32)}
    cases["bfloat16, fused Adam"] = (sae.Trainer, bfloat16)
    if on_cuda:
        cases["float16, fused Adam"] = (sae.Trainer, float16)
        for name, recipe in {"float32": float32, "bfloat16": bfloat16, "float16": float16}.items():
            cases[f"{name}, fused Adam, captured"] = (CapturedTrainer, recipe)
    trainers = {name: trainer(recipe, data.train, DEVICE) for name, (trainer, recipe) in cases.items()}
    result = {"milliseconds": take_turns(trainers, turns=5, steps=dict.fromkeys(trainers, 100)), "five_epochs": {}}
    for recipe in (float32, bfloat16, *((float16,) if on_cuda else ())):
        trainer = OURS(recipe, data.train, DEVICE)
        time_of_all = seconds(trainer, trainer.total_steps) * trainer.total_steps
        found = sae.evaluate(trainer.model, data.test.to(DEVICE), trainer.x.mean(0))
        row = {name: values.tolist() for name, values in found.items() if name != "activity"}
        result["five_epochs"][recipe.precision] = {"seconds": time_of_all, **row}
        print(f"{recipe.precision}: {time_of_all:.1f} s, Pearson {found['pearson'].mean():.4f}", flush=True)
    return result


def agreement(data, steps=(0, 50, 100, 150, 200)):
    """Matched cosine after the same number of steps: exact matching in every step, and ours."""
    result = {"steps": steps, "exact": [], "ours": []}
    exact, ours = Reference(REFERENCE, data.train), sae.Trainer(REFERENCE, data.train, DEVICE)
    for step in steps:
        for name, trainer in (("exact", exact), ("ours", ours)):
            while trainer.step < step:
                trainer.train_step()
            W = torch.stack([e.weight.detach() for e in exact.members]) if name == "exact" else ours.model.W.detach()
            result[name].append(sae.matched_cosine(F.normalize(W, dim=-1)))
        print(f"step {step}: exact {result['exact'][-1]:.4f}, ours {result['ours'][-1]:.4f}", flush=True)
    return result


PARTS = {
    "ensemble": ensemble, "growth": growth, "memory": memory, "precision": precision,
    "agreement": agreement,
}  # fmt: skip


if __name__ == "__main__":
    file = (
        "training_cpu" if DEVICE.type == "cpu" else f"training_{torch.cuda.get_device_name().lower().replace(' ', '_')}"
    )
    main("training", PARTS, sys.argv[1:], DEVICE, file)
