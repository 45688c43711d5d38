"""Does the consistency loss make features reproducible, and what does?

    python benchmarks/consistency.py [weights] [reproducibility] [widths] [kinds]

Without a name all parts run, about twenty-five minutes on one CPU core. The `improved`
recipe, five epochs of MNIST; quality on the test images, by which nothing is chosen. Whatever
is compared is trained twice, with the seeds 0 and 1 (`kinds`: three times, 0 to 2), which
share neither start nor batches: `within` is the matched cosine of the members of one ensemble,
`between` that of members of one with members of the other. Each part prints a line for each
run and replaces its part of benchmarks/results/consistency.json; notebook 03 shows that file.
"""

import sys
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import torch
import torch.nn.functional as F
from common import main
from scipy.optimize import linear_sum_assignment

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


class ReLUWithL1(sae.Trainer):
    """All features above zero are kept, and an L1 loss makes them few; dense, and by autograd.

    Its weight is steered in every step so that `l0` features fire for an image: so it needs no search.
    """

    l0, penalty = 50, 0.1

    def update(self, x):
        model = self.model
        values = model.pre_activations(x).relu()  # [M, B, d_sae]
        x_hat = values @ F.normalize(model.W, dim=-1) + model.b_dec[:, None]
        fires = (values > 0).sum(1)
        self.fires += fires
        model.zero_grad()
        # Decoder rows have length 1, so small codes cannot hide behind long rows.
        (sae.mse(x, x_hat) + self.penalty * values.mean(1).sum(-1) / x.shape[1]).sum().backward()
        for m, part in enumerate(self.parts):
            for name, view in part.items():
                view.grad = getattr(model, name).grad[m]
        self.optimizer.step()
        self.penalty *= (fires.sum().item() / (len(x) * self.l0)) ** 0.01
        return x_hat.detach(), fires, torch.zeros(())


class ReLUWithWeakL1(ReLUWithL1):
    """With three times as many features for an image."""

    l0 = 160


class WeightDecay(sae.Trainer):
    """Every row is shortened a little in each step (after Jedryszek & Crook 2026, arXiv 2603.04198)."""

    weight_decay = 1.0

    def update(self, x):
        result = super().update(x)
        with torch.no_grad():
            for W, rate in zip(self.model.W, self.learning_rates()):
                W.mul_(1 - rate * self.weight_decay)
        return result


def kinds(data):
    """Top-k, ReLU with L1, weight decay; three seeds, without encoder map and floor, Adam and schedule the same."""
    plain = replace(ONE, encoder_map=False, selection_floor=0)
    all_kept = replace(plain, k=plain.d_sae, relu=True)
    rows = {}
    for label, recipe, trainer in (
        ("top-k", plain, sae.Trainer),
        ("top-k without negative codes", replace(plain, relu=True), sae.Trainer),
        ("ReLU and L1", all_kept, ReLUWithL1),
        ("ReLU and weak L1", all_kept, ReLUWithWeakL1),
        ("top-k with weight decay", plain, WeightDecay),
    ):
        runs = [trainer(replace(recipe, seed=seed), data.train).run(progress=False) for seed in range(3)]
        found = [sae.evaluate(run.model, data.test, data.train.mean(0)) for run in runs]
        features = [run.model.features()[0] for run in runs]
        often = [f[q["activity"][0] >= 1e-3] for f, q in zip(features, found)]  # those that are not rare
        pairs = [sae.match_features(a, b)[1] for a, b in combinations(features, 2)]
        of_often = [best_cosines(a, b) for a, b in combinations(often, 2)]
        turned = [sae.match_features(a, b.flip(-1))[1].mean().item() for a, b in combinations(features, 2)]
        row = rows[label] = {
            **{
                name: float(np.mean([q[name].item() for q in found]))
                for name in ("mse", "pearson", "dead_fraction", "rare_fraction")
            },
            "l0": float(np.mean([q["activity"].sum().item() for q in found])),
            "between": [c.mean().item() for c in pairs],
            "pairs_above_0.7": torch.cat(pairs).gt(0.7).double().mean().item(),
            "between_not_rare": [float(c.mean()) for c in of_often],
            "between_turned": turned,
            "l1_weight": [getattr(run, "penalty", None) for run in runs],
        }
        print(f"{'kinds':16} {label:44} between {row['between']}, l0 {row['l0']:.1f}, MSE {row['mse']:.5f}", flush=True)
    return rows


def best_cosines(a, b):
    """Of the best one-to-one matching of dictionaries that may differ in size."""
    similarity = (a @ b.T).numpy()
    return similarity[linear_sum_assignment(similarity, maximize=True)]


def widths():
    for d_sae in (256, 2048):
        yield f"{d_sae:,} features", replace(ONE, d_sae=d_sae), sae.Trainer


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


PARTS = {case.__name__: table(case.__name__, case) for case in (weights, reproducibility, widths)}
PARTS["kinds"] = kinds

if __name__ == "__main__":
    main("consistency", PARTS, sys.argv[1:])
