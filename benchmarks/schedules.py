"""Does the learning-rate schedule matter? Five shapes, each at its own best rate.

    python benchmarks/schedules.py [constant] [linear] [late_linear] [late_root] [cosine]

Without a name all parts run, about ten minutes on one CPU core. One member of the `improved`
recipe, three epochs on training images 0 to 49,999. Seed 0 chooses the rate, by the MSE on
training images 50,000 to 59,999; the best one then runs with seeds 1 and 2 too, and its quality
is that on the test images. Runs with the same seed have the same start and the same batches.
Each part prints a line for each run and replaces its part of benchmarks/results/schedules.json;
appendix A3 shows that file.
"""

import math
import sys
from dataclasses import replace
from functools import partial

from common import CHOOSE_ON, main

import sae_helpers as sae

SEEDS = (0, 1, 2)
IMPROVED = replace(sae.RECIPES["improved"], n_members=1, epochs=3)
RATES = tuple(factor * IMPROVED.learning_rate for factor in (0.5, 1, 2))  # where an end is best, the grid goes on


def constant(t):
    """Every shape gives the share of the highest rate at t, the share of the steps taken, 0 ≤ t < 1."""
    return 1.0


def linear(t):
    return 1 - t


def late_linear(t):
    """The recipe's."""
    return min(1.0, (1 - t) / IMPROVED.decay)


def late_root(t):
    """Fast at first, then slowly to 0: 1 - √ of the share of the decay that is over (Hägele et al. 2024)."""
    return 1 - math.sqrt(1 - late_linear(t))


def cosine(t):
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2016, without restarts)."""
    return (1 + math.cos(math.pi * t)) / 2


class Scheduled(sae.Trainer):
    shape = staticmethod(late_linear)

    def learning_rates(self):
        return [self.recipe.learning_rate * self.shape(self.step / self.total_steps)]


def train(data, shape, **settings):
    """Quality on the test images, and the MSE on the images that choose."""
    kind, x = type("Shaped", (Scheduled,), {"shape": staticmethod(shape)}), data.train[:CHOOSE_ON]
    model = kind(replace(IMPROVED, **settings), x).run(progress=False).model
    on_test, chosen_by = (sae.evaluate(model, images, x.mean(0)) for images in (data.test, data.train[CHOOSE_ON:]))
    names = ("mse", "pearson", "dead_fraction", "rare_fraction")
    row = {**settings, **{name: on_test[name].item() for name in names}, "mse_chosen_by": chosen_by["mse"].item()}
    print(f"{shape.__name__:12} " + "  ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
    return row


def tuned(shape, data):
    """What seed 0 gave at every rate, the best rate, and all seeds with it."""
    grid, todo = {}, [float(f"{rate:.2g}") for rate in RATES]
    while todo:
        for rate in todo:
            grid[rate] = train(data, shape, learning_rate=rate, seed=SEEDS[0])
        tried, best = sorted(grid), min(grid, key=lambda rate: grid[rate]["mse_chosen_by"])
        beyond = {tried[0]: best / 2, tried[-1]: best * 2}
        todo = [float(f"{beyond[best]:.2g}")] if best in beyond else []
    others = [train(data, shape, learning_rate=best, seed=seed) for seed in SEEDS[1:]]
    seeds, rates = [grid[best], *others], [grid[rate] for rate in tried]
    return {"epochs": IMPROVED.epochs, "learning_rate": best, "seeds": seeds, "rates": rates}


SHAPES = (constant, linear, late_linear, late_root, cosine)
PARTS = {shape.__name__: partial(tuned, shape) for shape in SHAPES}

if __name__ == "__main__":
    main("schedules", PARTS, sys.argv[1:])
