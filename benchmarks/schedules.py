"""Does the learning-rate schedule matter? Schedules, warm-up and batch sizes, each at its own best rate.

    python benchmarks/schedules.py [schedules] [warmup] [epochs] [steps]

Without a name all four parts run, about 40 minutes on two CPU cores. One member of the
`improved` recipe on MNIST, 2,345 steps (five epochs of batches of 128). `schedules`: six
shapes. `warmup`: how many steps the rate takes to rise. `epochs`: batches of 64 to 512
images, five epochs each. `steps`: batches of 64, 256 and 512 images, 2,345 steps each (128 images
are both). The rate is chosen with seed 0, by the MSE on training images; the best one then
runs with seeds 1 and 2 too. All runs of a seed and a batch size train side by side, from the
same start and on the same batches; features start anew until 85 % of the steps, whatever the
schedule. Each part prints a line for each run and replaces its part of
benchmarks/results/schedules.json; notebook 06 shows that file.
"""

import math
import sys
from dataclasses import replace

import torch
from common import main

import sae_helpers as sae

SEEDS = (0, 1, 2)
RATES = (1.4e-3, 2e-3, 2.8e-3)  # where an end is best, the grid goes on
STEPS = 2345
WARMUPS = ((2e-3, 0), (2e-3, 100), (2e-3, 300), (2e-3, 1000))  # rate, steps
IMPROVED = replace(sae.RECIPES["improved"], n_members=1)


def constant(t):
    """Every schedule gives the share of the highest rate at t, the share of the steps taken, 0 ≤ t < 1."""
    return 1.0


def linear(t):
    return 1 - t


def late_linear(t):
    return min(1.0, (1 - t) / IMPROVED.decay)


def late_root(t):
    """Fast at first, then slowly to 0: 1 - √ of the share of the decay that is over (Hägele et al. 2024)."""
    return 1 - math.sqrt(1 - late_linear(t))


def cosine(t):
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2016, without restarts)."""
    return (1 + math.cos(math.pi * t)) / 2


def one_cycle(t, rise=0.3, start=1 / 25):
    """Up along a cosine, down along another (Smith & Topin 2017); torch's defaults, Adam's β1 left alone."""
    if t < rise:
        return start + (1 - start) * (1 - math.cos(math.pi * t / rise)) / 2
    return (1 + math.cos(math.pi * (t - rise) / (1 - rise))) / 2


SCHEDULES = {
    "constant": constant,
    "linear decay": linear,
    "late linear decay": late_linear,
    "late 1 - √ decay (ours)": late_root,
    "cosine": cosine,
    "one-cycle": one_cycle,
}


class Scheduled(sae.Trainer):
    """Each member has a schedule and a warm-up of its own; all have the same start and batches."""

    def __init__(self, recipe, x, schedules, warmups=None, steps=None):
        self.steps = steps
        super().__init__(recipe, x)
        self.schedules, self.warmups = schedules, warmups or [0] * len(schedules)
        with torch.no_grad():
            self.model.W.copy_(self.model.W[:1].clone().expand_as(self.model.W))

    @property
    def total_steps(self):
        return self.steps or super().total_steps

    def learning_rates(self):
        t = self.step / self.total_steps
        return [
            rate * schedule(t) * min(1.0, (self.step + 1) / max(1, warmup))
            for rate, schedule, warmup in zip(self.recipe.learning_rate, self.schedules, self.warmups)
        ]


def train(data, runs, seed, batch_size=128, steps=STEPS):
    """Quality of each of the runs (schedule, rate, steps of warm-up), trained side by side."""
    schedules, rates, warmups = zip(*runs)
    recipe = replace(
        IMPROVED, n_members=len(runs), learning_rate=rates, consistency_weight=0, seed=seed, batch_size=batch_size
    )
    trainer = Scheduled(recipe, data.train, schedules, warmups, steps).run(progress=False)
    on_test, on_train = (
        sae.evaluate(trainer.model, x, data.train.mean(0)) for x in (data.test, data.train[: len(data.test)])
    )
    return [
        {
            "rate": rate,
            "seed": seed,
            "steps": trainer.step,
            "images_seen": trainer.images_seen,
            **{name: on_test[name][m].item() for name in ("mse", "pearson", "dead_fraction")},
            "mse_train": on_train["mse"][m].item(),
        }
        for m, rate in enumerate(rates)
    ]


def tuned(data, part, runs, **how):
    """Each label's run (schedule, rates, warm-up) with its best rate and all seeds, and what seed 0 gave at every rate.

    Where the best rate is the lowest or highest tried, the grid goes on in that direction.
    """
    grids = {label: {} for label in runs}
    todo = [(label, rate) for label, (_, rates, _) in runs.items() for rate in rates]
    while todo:
        results = train(data, [(runs[label][0], rate, runs[label][2]) for label, rate in todo], SEEDS[0], **how)
        for (label, rate), row in zip(todo, results):
            grids[label][rate] = row
            line(part, label, row)
        todo = []
        for label, grid in grids.items():
            rates = sorted(grid)
            best = min(grid, key=lambda rate: grid[rate]["mse_train"])
            if len(rates) > 1 and best == rates[0]:
                todo.append((label, float(f"{best / math.sqrt(2):.2g}")))
            elif len(rates) > 1 and best == rates[-1]:
                todo.append((label, float(f"{best * math.sqrt(2):.2g}")))
    chosen = {label: min(grid, key=lambda rate: grid[rate]["mse_train"]) for label, grid in grids.items()}
    rows = {
        label: {"rate": rate, "seeds": [grids[label][rate]], "rates": [grids[label][r] for r in sorted(grids[label])]}
        for label, rate in chosen.items()
    }
    for seed in SEEDS[1:]:
        results = train(data, [(runs[label][0], rate, runs[label][2]) for label, rate in chosen.items()], seed, **how)
        for label, row in zip(chosen, results):
            rows[label]["seeds"].append(row)
            line(part, label, row)
    return rows


def line(part, label, row):
    print(
        f"{part:10} {label:28} rate {row['rate']:.2g}  seed {row['seed']}  steps {row['steps']}  "
        f"Pearson {row['pearson']:.5f}  MSE {row['mse']:.6f}  dead {row['dead_fraction']:.2%}",
        flush=True,
    )


def schedules(data):
    return tuned(data, "schedules", {label: (shape, RATES, 0) for label, shape in SCHEDULES.items()})


def warmup(data):
    """At the recipe's rate."""
    runs = {f"{n} steps, {rate:.2g}": (late_root, (rate,), n) for rate, n in WARMUPS}
    return tuned(data, "warmup", runs)


def batches(data, part, sizes, steps):
    """The rate, around the one that grows with the square root of the batch."""
    rows = {}
    for size in sizes:
        centre = IMPROVED.learning_rate * math.sqrt(size / 128)
        rates = tuple(float(f"{centre * factor:.2g}") for factor in (1 / math.sqrt(2), 1, math.sqrt(2)))
        how = dict(batch_size=size, steps=steps(size))
        rows |= tuned(data, part, {f"{size} images": (late_root, rates, 0)}, **how)
    return rows


def per_epochs(size, epochs=IMPROVED.epochs):
    return epochs * math.ceil(60_000 / size)


PARTS = {
    "schedules": schedules,
    "warmup": warmup,
    "epochs": lambda data: batches(data, "epochs", (64, 128, 256, 512), per_epochs),
    "steps": lambda data: batches(data, "steps", (64, 256, 512), lambda size: STEPS),
}

if __name__ == "__main__":
    main("schedules", PARTS, sys.argv[1:])
