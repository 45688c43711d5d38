"""Dead features: what makes them die, and every remedy at equal steps.

    python benchmarks/dead_features.py [remedies] [resampling] [causes] [widths] [ensemble] [times]

Without a name all six parts run, one after the other (about 50 minutes on two CPU
cores). One member, five epochs of MNIST, batches of 128; the remedies with three seeds.
Each part prints a line for each run and replaces its part of
benchmarks/results/dead_features.json; notebook 04 shows that file.
"""

import sys
import time
from dataclasses import replace
from statistics import mean

import torch
import torch.nn.functional as F
from common import FORMER, main

import sae_helpers as sae

SEEDS = (0, 1, 2)
NOTHING = replace(sae.RECIPES["reference"], n_members=1, reinit="none")
IMPROVED = replace(FORMER, n_members=1)


class LowThreshold(sae.Trainer):
    """The reference monitor with a threshold that it crosses."""

    monitor_threshold = 35.0


class OneResidual(sae.Trainer):
    """Ours, but a new feature points at the residual of one image."""

    def missed_directions(self, m, n):
        generator = torch.Generator().manual_seed(self.step)
        x = self.x[torch.randperm(len(self.x), generator=generator)[: max(256, 2 * n)]]
        with torch.no_grad():
            residuals = x - self.model(x)[m]
        return residuals[residuals.norm(dim=1).argsort(descending=True)[:n]]


class Published(OneResidual):
    """Resampling after Bricken et al. 2023: features that never fired, short rows, bias and moments at 0."""

    rare = 1e-9

    def reinit_features(self, m, features, directions=None):
        super().reinit_features(m, features, directions)
        with torch.no_grad():
            self.parts[m]["W"][features] *= 0.2
            self.parts[m]["b_enc"][features] = 0
            for name in ("W", "b_enc"):
                self.optimizer.state[self.parts[m][name]]["exp_avg_sq"][features] = 0


class OnlyNeverFired(sae.Trainer):
    """Ours, but blind to features that fire now and then."""

    rare = 1e-9


class MomentsAtZero(sae.Trainer):
    """Ours, but Adam's second moment starts at 0."""

    def reinit_features(self, m, features, directions=None):
        super().reinit_features(m, features, directions)
        for name in ("W", "b_enc"):
            self.optimizer.state[self.parts[m][name]]["exp_avg_sq"][features] = 0


class OwnDirections(sae.Trainer):
    """Ours, but deaf to the partners in the other members."""

    def reinit_features(self, m, features, directions=None):
        super().reinit_features(m, features)


class ShortRows(sae.Trainer):
    """Ours, but new rows have a fifth of the others' length."""

    def reinit_features(self, m, features, directions=None):
        super().reinit_features(m, features, directions)
        with torch.no_grad():
            self.parts[m]["W"][features] *= 0.2


class WarmUp(sae.Trainer):
    """The learning rate rises over the first 300 steps."""

    def learning_rates(self):
        return [rate * min(1.0, (self.step + 1) / 300) for rate in super().learning_rates()]


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
        pre = (x - self.model.b_dec[m].detach()) @ W.T + self.model.b_enc[m, dead]  # [B, n_dead]
        values, indices = pre.topk(min(self.k_aux, len(dead)))
        explained = torch.zeros_like(pre).scatter(1, indices, values) @ F.normalize(W, dim=1)
        return (residual - explained).square().mean()


def run(data, recipe, trainer=sae.Trainer, centre=0.0):
    """Train on images less `centre` times the mean image; return quality and dead shares, means over members."""
    shift = centre * data.train.mean(0)
    train, test = data.train - shift, data.test - shift
    trainer = trainer(recipe, train)
    trainer.run(progress=False)
    on_test, on_train = (sae.evaluate(trainer.model, x, train.mean(0)) for x in (test, train))
    features = trainer.model.features()
    return {
        **{name: on_test[name].mean().item() for name in ("mse", "pearson", "explained_variance")},
        "dead_test": on_test["dead_fraction"].mean().item(),
        "dead_train": on_train["dead_fraction"].mean().item(),
        **({"matched_cosine": sae.matched_cosine(features)} if len(features) > 1 else {}),
        "reinitialised": sum(sum(counts) for _, counts in trainer.reinits),
    }


def remedies():
    """One change each, from the reference recipe; then all that helped, one upon the other."""
    bias = replace(NOTHING, decoder_bias=True)
    rate = replace(bias, learning_rate=2e-3)
    decay = replace(rate, decay=0.2)
    yield "nothing", NOTHING, sae.Trainer
    yield "reference monitor, threshold 100", replace(NOTHING, reinit="members"), sae.Trainer
    yield "reference monitor, threshold 35", replace(NOTHING, reinit="members"), LowThreshold
    yield "decoder bias at the mean image", bias, sae.Trainer
    yield "resampling as published", replace(NOTHING, reinit="features"), Published
    yield "our re-initialisation", replace(NOTHING, reinit="features"), sae.Trainer
    yield "AuxK", NOTHING, AuxK
    yield "learning rate 2e-3, warm-up, decay", replace(NOTHING, learning_rate=2e-3, decay=0.2), WarmUp
    yield "decoder bias, 2e-3", rate, sae.Trainer
    yield "decoder bias, 2e-3, decay", decay, sae.Trainer
    yield "decoder bias, 2e-3, decay, AuxK", decay, AuxK
    yield "improved: decoder bias, 2e-3, decay, our re-initialisation", IMPROVED, sae.Trainer


def resampling():
    """Why did resampling not help at higher rates? At 3e-3, with one thing changed at a time."""
    fast = replace(IMPROVED, learning_rate=3e-3)
    yield "no resampling", replace(fast, reinit="none"), sae.Trainer
    yield "as published", fast, Published
    yield "only features that never fired", fast, OnlyNeverFired
    yield "rare ones too, second moment at 0", fast, MomentsAtZero
    yield "rare ones too, short rows", fast, ShortRows
    yield "rare ones too, the residual of one image", fast, OneResidual
    yield "rare ones too (ours)", fast, sae.Trainer


def ensemble():
    """Five members with the consistency loss."""
    improved = FORMER
    yield "no re-initialisation", replace(improved, reinit="none"), sae.Trainer
    yield "each member goes its own way", improved, OwnDirections
    yield "they join their partners (ours)", improved, sae.Trainer


def causes():
    """One seed each. The keys are `name = value`."""
    for centre in (-1.0, 0.0, 0.5, 1.0):
        yield f"centre = {centre}", NOTHING, sae.Trainer, centre
    for bias in (False, True):
        for rate in (5e-4, 1e-3, 2e-3, 4e-3):
            yield (
                f"bias = {bias}, learning_rate = {rate}",
                replace(NOTHING, decoder_bias=bias, learning_rate=rate),
                sae.Trainer,
                0.0,
            )
        for k in (10, 25, 100, 200):
            yield f"bias = {bias}, k = {k}", replace(NOTHING, decoder_bias=bias, k=k), sae.Trainer, 0.0


def widths():
    """How does each remedy scale? One seed each."""
    for d_sae in (1024, 2048, 8192):
        base, improved = replace(NOTHING, d_sae=d_sae), replace(IMPROVED, d_sae=d_sae)
        yield f"{d_sae}: nothing", base, sae.Trainer
        yield f"{d_sae}: decoder bias", replace(base, decoder_bias=True), sae.Trainer
        yield f"{d_sae}: improved without re-initialisation", replace(improved, reinit="none"), sae.Trainer
        yield f"{d_sae}: the same with AuxK", replace(improved, reinit="none"), AuxK
        yield f"{d_sae}: improved", improved, sae.Trainer


def times(data, chunks=6, chunk=200):
    """Milliseconds of a step, each turn: the remedies alternate every 200 steps, so that each turn holds two looks."""
    five = FORMER
    trainers = {label: trainer(recipe, data.train) for label, recipe, trainer in remedies()}
    trainers["five members, no re-initialisation"] = sae.Trainer(replace(five, reinit="none"), data.train)
    trainers["five members, our re-initialisation"] = sae.Trainer(five, data.train)
    milliseconds = {name: [] for name in trainers}
    for _ in range(chunks):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            for _ in range(chunk):
                trainer.train_step()
            milliseconds[name].append(1e3 * (time.perf_counter() - start) / chunk)
    for name, values in milliseconds.items():
        print(f"{name:60} {min(values):6.2f} ms a step", flush=True)
    return milliseconds


def runs(data, name, cases, seeds):
    """Run every case with every seed; returns the rows of the part `name`."""
    rows = {}
    for label, recipe, trainer, *centre in cases:
        rows[label] = [run(data, replace(recipe, seed=seed), trainer, *centre) for seed in seeds]
        means = {key: mean(row[key] for row in rows[label]) for key in rows[label][0]}
        print(
            f"{name:10} {label:60} dead {means['dead_train']:6.1%} (train) {means['dead_test']:6.1%} (test)  "
            f"MSE {means['mse']:.5f}  Pearson {means['pearson']:.4f}",
            flush=True,
        )
    return rows


PARTS = {
    "remedies": lambda data: runs(data, "remedies", remedies(), SEEDS),
    "resampling": lambda data: runs(data, "resampling", resampling(), SEEDS),
    "causes": lambda data: runs(data, "causes", causes(), SEEDS[:1]),
    "widths": lambda data: runs(data, "widths", widths(), SEEDS[:1]),
    "ensemble": lambda data: runs(data, "ensemble", ensemble(), SEEDS[:1]),
    "times": times,
}


if __name__ == "__main__":
    main("dead_features", PARTS, sys.argv[1:])
