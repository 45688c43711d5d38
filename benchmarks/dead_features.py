"""Dead and rare features: what brings them, what each remedy does, and how far the selection floor holds.

    python benchmarks/dead_features.py [log] [remedies] [resampling] [law] [ensemble] [final] [wide]

Without a name all parts run, about an hour on one CPU core. Everything is chosen on training
images 50,000 to 59,999, with the 50,000 before them for training; five epochs, batches of 128,
one member, unless the label says otherwise; three seeds in log, remedies and final, else one. Each
part prints a line for each run and replaces its part of benchmarks/results/dead_features.json;
notebooks 04 and A4 show that file.
"""

import sys
from dataclasses import replace
from statistics import mean

import torch
import torch.nn.functional as F
from common import CHOOSE_ON, Restarts, effective_features, main

import sae_helpers as sae

SEEDS = (0, 1, 2)
NOTHING = replace(sae.RECIPES["reference"], n_members=1, monitor=False)
IMPROVED = replace(sae.RECIPES["improved"], n_members=1)
NO_FLOOR = replace(IMPROVED, selection_floor=0)
TIED = replace(NO_FLOOR, encoder_map=False, learning_rate=2e-3)  # rare features, hardly any dead


class LowThreshold(sae.Trainer):
    """The reference monitor with a threshold that it crosses."""

    monitor_threshold = 35.0


class Resampling(Restarts):
    """Dead features start anew, each at what the member misses of one of the images that it rebuilds worst."""

    look_every, rare = 250, 1e-9  # those that never fired since the last look

    def missed_directions(self, m, n):
        residuals = self.some_residuals(m, n)[1]
        return residuals[residuals.norm(dim=1).argsort(descending=True)[:n]]

    @torch.no_grad()
    def some_residuals(self, m, n):
        """Images, and what the member misses of them."""
        x = self.x[torch.randperm(len(self.x), generator=self.dice())[: max(2000, 2 * n)]]
        return x, x - self.reconstruct(x, m)

    def dice(self):
        return torch.Generator().manual_seed(self.step)


class MomentsAtZero(Resampling):
    """Both of Adam's moments start at 0: a new feature's first hundred steps are up to 6 times too long."""

    def restart_features(self, m, features):
        super().restart_features(m, features)
        for name in ("W", "b_enc"):
            self.optimizer.state[self.parts[m][name]]["exp_avg_sq"][features] = 0


class WarmAgain(MomentsAtZero):
    """The learning rate rises again, over 100 steps, after each look: so does the library dictionary_learning."""

    def learning_rates(self):
        since = self.step % self.look_every if self.step >= self.look_every else self.look_every
        return [rate * min(1.0, (since + 1) / 100) for rate in super().learning_rates()]


class AtImages(MomentsAtZero):
    """Dead features start anew at images, drawn with odds that grow with the square of their loss.

    So Bricken et al. (2023) choose directions. The schedule is ours, and so is the length, which
    they make a fifth of the others': with tied weights under top-k such a row would never be kept.
    """

    def missed_directions(self, m, n):
        x, residuals = self.some_residuals(m, n)
        odds = residuals.square().mean(1).square()
        return x[torch.multinomial(odds, n, generator=self.dice())] - self.model.b_dec[m]


class AuxK(sae.Trainer):
    """Auxiliary loss after Gao et al. 2024: dead features try to explain what the others leave over."""

    weight, k_aux, window = 1 / 32, 256, 100

    def losses(self, x, x_hat):
        if self.step % self.window == 0:
            before = getattr(self, "fires_before", torch.zeros_like(self.fires))
            self.dead, self.fires_before = self.fires == before, self.fires.clone()
        losses = sae.mse(x, x_hat)
        if self.step < self.window:
            return losses
        return losses + self.weight * torch.stack([self.auxiliary(x, x_hat, m) for m in range(len(losses))])

    def auxiliary(self, x, x_hat, m):
        """Mean squared error left over when the k_aux largest dead features of member m explain its residual."""
        dead = self.dead[m].nonzero()[:, 0]
        residual = (x - x_hat[m]).detach()
        W = self.model.W[m, dead]
        pre = (x - self.model.b_dec[m]) @ W.T + self.model.b_enc[m, dead]  # [B, n_dead]
        values, indices = pre.topk(min(self.k_aux, len(dead)))
        explained = torch.zeros_like(pre).scatter(1, indices, values) @ F.normalize(W, dim=1)
        return (residual - explained).square().mean()


class FallingConsistency(sae.Trainer):
    """The consistency weight falls to 0 over the last 30 % of the steps."""

    def update(self, x):
        self.weight.mul_(min(1.0, (1 - self.step / self.total_steps) / 0.3))
        return super().update(x)


def run(data, recipe, trainer=sae.Trainer, held_out=True):
    """Train, and return quality and use, means over members."""
    train, test = (data.train[:CHOOSE_ON], data.train[CHOOSE_ON:]) if held_out else (data.train, data.test)
    trainer = trainer(recipe, train).run(progress=False)
    found = sae.evaluate(trainer.model, test, train.mean(0))
    names = ("mse", "pearson", "explained_variance", "dead_fraction", "rare_fraction")
    features = trainer.model.features()
    return {
        **{name: found[name].mean().item() for name in names},
        "effective": effective_features(found["activity"]).mean().item(),
        **({"matched_cosine": sae.matched_cosine(features)} if len(features) > 1 else {}),
        "started_anew": getattr(trainer, "started_anew", recipe.d_sae * len(trainer.restarts)),
    }


def log():
    """One change upon the other, from the reference recipe to the improved one."""
    bias = replace(NOTHING, decoder_bias=True)
    rate = replace(bias, learning_rate=2e-3)
    decay = replace(rate, decay=0.3)
    rows = replace(decay, row_moments=True)
    with_map = replace(rows, encoder_map=True)
    with_floor = replace(with_map, selection_floor=0.2)
    yield "reference recipe", NOTHING, sae.Trainer
    yield "+ mean image as decoder bias", bias, sae.Trainer
    yield "+ learning rate 0.002", rate, sae.Trainer
    yield "+ linear decay over the last 30 %", decay, sae.Trainer
    yield "+ one second moment a row", rows, sae.Trainer
    yield "+ encoder map", with_map, sae.Trainer
    yield "+ selection floor", with_floor, sae.Trainer
    yield "+ learning rate 0.003 = improved", replace(with_floor, learning_rate=3e-3), sae.Trainer


def remedies():
    """What each remedy does to rare features, upon the same recipe without one."""
    yield "none", TIED, sae.Trainer
    yield "re-initialisation, rare features, moments of the others", TIED, Restarts
    yield "AuxK", TIED, AuxK
    for share in (0.1, 0.2, 0.3):
        yield f"selection floor {share}", replace(TIED, selection_floor=share), sae.Trainer


def resampling():
    """The same where many features die: upon the reference recipe."""
    yield "none", NOTHING, sae.Trainer
    yield "rare features, moments of the others", NOTHING, Restarts
    yield "dead features, moments of the others", NOTHING, Resampling
    yield "dead features, moments at 0", NOTHING, MomentsAtZero
    yield "dead features, moments at 0, rate warmed up again", NOTHING, WarmAgain
    yield "dead features, moments at 0, at images as Bricken et al. choose them", NOTHING, AtImages
    yield "AuxK", NOTHING, AuxK
    yield "selection floor 0.2", replace(NOTHING, selection_floor=0.2), sae.Trainer
    yield "whole members: its monitor, threshold 35", replace(NOTHING, monitor=True), LowThreshold


def law():
    """How far does the floor hold? One seed each; `log` has the recipe itself."""
    for d_sae in (256, 8192):
        yield f"{d_sae:,} features", replace(IMPROVED, d_sae=d_sae), sae.Trainer
    yield "batches of 32", replace(IMPROVED, batch_size=32), sae.Trainer
    yield "batches of 512", replace(IMPROVED, batch_size=512), sae.Trainer
    yield "learning rate 0.006", replace(IMPROVED, learning_rate=6e-3), sae.Trainer
    for k in (10, 200):
        yield f"k = {k}", replace(IMPROVED, k=k), sae.Trainer
        yield f"k = {k}, without the floor", replace(NO_FLOOR, k=k), sae.Trainer
    yield "lift 1 in place of 4", IMPROVED, type("Lift", (sae.Trainer,), {"lift": 1.0})


def ensemble():
    """Three members, to save time, with the consistency loss: one more change that was tried."""
    improved = replace(sae.RECIPES["improved"], n_members=3)
    yield "improved", improved, sae.Trainer
    yield "consistency weight falls at the end", improved, FallingConsistency


def final():
    """On the test images, once, trained on all 60,000."""
    yield "improved, five members, consistency loss", sae.RECIPES["improved"], sae.Trainer, False
    yield "improved, one member", IMPROVED, sae.Trainer, False
    yield "reference, one member", NOTHING, sae.Trainer, False


def wide():
    """The same, one seed."""
    yield "improved, one member, 8,192 features", replace(IMPROVED, d_sae=8192), sae.Trainer, False


def runs(data, name, cases, seeds):
    """Run every case with every seed; returns the rows of the part `name`."""
    rows = {}
    for label, recipe, trainer, *how in cases:
        rows[label] = [run(data, replace(recipe, seed=seed), trainer, *how) for seed in seeds]
        means = {key: mean(row[key] for row in rows[label]) for key in rows[label][0]}
        print(
            f"{name:9} {label:56} Pearson {means['pearson']:.4f}  MSE {means['mse']:.5f}  "
            f"dead {means['dead_fraction']:.1%}  rare {means['rare_fraction']:.1%}  effective {means['effective']:.0f}"
            + (f"  matched cosine {means['matched_cosine']:.3f}" if "matched_cosine" in means else ""),
            flush=True,
        )
    return rows


PARTS = {
    "log": lambda data: runs(data, "log", log(), SEEDS),
    "remedies": lambda data: runs(data, "remedies", remedies(), SEEDS),
    "resampling": lambda data: runs(data, "resampling", resampling(), SEEDS[:1]),
    "law": lambda data: runs(data, "law", law(), SEEDS[:1]),
    "ensemble": lambda data: runs(data, "ensemble", ensemble(), SEEDS[:1]),
    "final": lambda data: runs(data, "final", final(), SEEDS),
    "wide": lambda data: runs(data, "wide", wide(), SEEDS[:1]),
}


if __name__ == "__main__":
    main("dead_features", PARTS, sys.argv[1:])
