"""Does the consistency loss make features reproducible, and what does?

    python benchmarks/consistency.py [weights] [reproducibility]

Without a name both parts run, about a quarter of an hour on one CPU core. The `improved`
recipe, five epochs of MNIST; quality on the test images, by which nothing is chosen. Whatever
is compared is trained twice, with the seeds 0 and 1, which share neither start nor batches:
`within` is the matched cosine of the members of one ensemble, `between` that of members of one
with members of the other. Each part prints a line for each run and replaces its part of
benchmarks/results/consistency.json; notebook 03 shows that file.
"""

import sys
from dataclasses import replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from common import main

import sae_helpers as sae

IMPROVED = sae.RECIPES["improved"]
ONE = replace(IMPROVED, n_members=1)


def between(a, b):
    """Cosines of the matched features of two ensembles' members, all pairs of members together."""
    return torch.cat([sae.match_features(f, g)[1] for f, g in product(a, b)])


def twice(data, recipe, trainer=sae.Trainer):
    """Train with two seeds; agreement before and after, and what it cost."""
    pair = [trainer(replace(recipe, seed=seed), data.train) for seed in (0, 1)]
    start = [one.model.features() for one in pair]
    for one in pair:
        one.run(progress=False)
    end = [one.model.features() for one in pair]
    with torch.no_grad():
        x_hats = [one.model(data.test) for one in pair]
    quality = [sae.evaluate(one.model, data.test, data.train.mean(0)) for one in pair]
    cosines = between(*end)
    return {
        **{
            name: float(np.mean([q[name].tolist() for q in quality]))
            for name in ("mse", "pearson", "dead_fraction", "rare_fraction")
        },
        "mse_best_member": float(np.mean([q["mse"].min().item() for q in quality])),
        "mse_of_mean": float(np.mean([sae.mse(data.test, x_hat.mean(0)).item() for x_hat in x_hats])),
        "within_at_start": sae.matched_cosine(start[0]) if recipe.n_members > 1 else None,
        "within": float(np.mean([sae.matched_cosine(f) for f in end])) if recipe.n_members > 1 else None,
        "between_at_start": between(*(f[:2] for f in start)).mean().item(),
        "between": cosines.mean().item(),
        "pairs_above_0.7": (cosines > 0.7).double().mean().item(),
    }


class StartFromImages(sae.Trainer):
    """Rows start as centred training images, other ones for each seed, as long as orthogonal rows are."""

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        length = self.model.W.detach().norm(dim=-1).mean()
        generator = torch.Generator().manual_seed(recipe.seed + 1000)
        with torch.no_grad():
            for W in self.model.W:
                chosen = torch.randperm(len(x), generator=generator)[: len(W)]
                W.copy_(length * F.normalize(self.x[chosen] - self.x.mean(0), dim=-1))


class SameStart(sae.Trainer):
    """A control: both seeds start from the weights of seed 0, only their batches differ."""

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        with torch.no_grad():
            self.model.W.copy_(sae.Trainer(replace(recipe, seed=0), x, device).model.W)


def reproducibility():
    yield "improved", ONE, sae.Trainer
    yield "without the selection floor", replace(ONE, selection_floor=0), sae.Trainer
    yield "without the encoder map", replace(ONE, encoder_map=False), sae.Trainer
    yield "start from training images", ONE, StartFromImages
    yield "k = 25", replace(ONE, k=25), sae.Trainer
    yield "control: the same start, other batches", ONE, SameStart


def weights():
    """Three members, to save time."""
    for weight in (0.0, 0.01):
        yield str(weight), replace(IMPROVED, n_members=3, consistency_weight=weight), sae.Trainer


def table(name, cases):
    def run(data):
        rows = {}
        for label, recipe, trainer in cases():
            row = rows[label] = twice(data, recipe, trainer)
            within = "" if row["within"] is None else f"within {row['within']:.3f} "
            print(
                f"{name:16} {label:44} {within}between {row['between']:.3f} (start {row['between_at_start']:.3f})  "
                f"Pearson {row['pearson']:.4f}  dead {row['dead_fraction']:.1%}  MSE {row['mse']:.5f}, "
                f"of the mean {row['mse_of_mean']:.5f}",
                flush=True,
            )
        return rows

    return run


PARTS = {case.__name__: table(case.__name__, case) for case in (weights, reproducibility)}

if __name__ == "__main__":
    main("consistency", PARTS, sys.argv[1:])
