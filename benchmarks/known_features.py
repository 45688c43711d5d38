"""Does an SAE find the features that the data are made of? Worlds whose features are known.

    python benchmarks/known_features.py [k] [pursuit] [agreement] [consistency] [absorption]

Without a name all parts run, about five minutes on one CPU core. Each row holds a value for
each of three worlds, seeds 0 to 2, which share nothing; whatever is trained in a world has
its seed. `k` and `agreement` also ask of worlds whose features are correlated. Errors
are those on 5,000 new samples. Each part prints its rows and replaces its part of
benchmarks/results/known_features.json; notebook 10 shows that file.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import main

import sae_helpers as sae

SEEDS = (0, 1, 2)
KS = (2, 4, 8, 12, 16, 24)
FOUND = 0.9  # cosine from which on a feature counts as found


def world(seed, correlation=0.0, family=False, n=192, d_in=64, active=8):
    """n true features [n, d_in], and a function that draws codes [samples, n]: mostly 0, `active` are not."""
    generator = torch.Generator().manual_seed(seed)
    truth = F.normalize(torch.randn(n, d_in, generator=generator), dim=1)
    share = torch.arange(1, n + 1) ** -0.7  # of the samples for which a feature fires (Zipf)
    share = (share * active / share.sum()).clamp_max(0.5)
    threshold = torch.distributions.Normal(0, 1).icdf(1 - share)
    group = torch.randint(8, (n,), generator=generator)

    def draw(samples, seed):
        generator = torch.Generator().manual_seed(seed)
        own, common, chance = (torch.randn(samples, m, generator=generator) for m in (n, 8, n))
        fires = (1 - correlation) ** 0.5 * own + correlation**0.5 * common[:, group] > threshold
        if family:  # 16 parents; three children of each fire with it, a quarter of the time, or not at all
            parents = fires[:, :16].repeat_interleave(3, 1)
            fires[:, 16:64] = parents & (chance[:, 16:64] > 0.67)
        size = (1 + 0.25 * torch.randn(samples, n, generator=generator)).clamp_min(0.1)
        return fires * size

    return truth, draw


def samples(seed, **kind):
    """A world's true features, its training samples, new samples, and their true codes."""
    truth, draw = world(seed, **kind)
    codes = draw(5_000, 2_000 + seed)
    return truth, draw(20_000, 1_000 + seed) @ truth, codes @ truth, codes


def train(x, recipe="improved", **settings):
    settings = dict(d_sae=192, k=8, n_members=1, epochs=10) | settings
    return sae.Trainer(replace(sae.RECIPES[recipe], **settings), x).run(progress=False).model


def recovery(truth, features):
    """Mean cosine after one-to-one matching (MCC), and the share of true features that a learnt one comes near."""
    found = (features @ truth.T).amax(0) > FOUND
    return {"mcc": sae.match_features(truth, features)[1].mean().item(), "found": found.double().mean().item()}


def quality(model, truth, x, x_new):
    return {"mse": sae.evaluate(model, x_new, x.mean(0))["mse"].mean().item()} | recovery(truth, model.features()[0])


def by_row(results):
    """Lists of one value for each seed, from (row, figures) pairs that are printed as they come."""
    rows = {}
    for label, figures in results:
        print(
            f"{label:32}",
            ", ".join(f"{name} {np.round(value, 4)}" for name, value in figures.items() if value is not None),
            flush=True,
        )
        for name, value in figures.items():
            rows.setdefault(label, {}).setdefault(name, []).append(value)
    return rows


def k():
    for seed in SEEDS:
        for label, correlation, ks in (("independent", 0.0, KS), ("correlated", 0.5, (2, 4, 8, 16))):
            truth, x, x_new, _ = samples(seed, correlation=correlation)
            for k in ks:
                yield f"{label}, k = {k}", quality(train(x, k=k, seed=seed), truth, x, x_new)
            centred = x - x.mean(0)
            components = torch.linalg.eigh(centred.T @ centred).eigenvectors.T  # 64 of them: each its nearest
            nearest = (components @ truth.T).abs().amax(0)
            chance = F.normalize(torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed + 50)), dim=1)
            yield (
                f"{label}, components",
                {"mcc": nearest.mean().item(), "found": (nearest > FOUND).float().mean().item()},
            )
            yield f"{label}, random", recovery(truth, chance)


def pursue(x, features, k):
    """Matching pursuit: k times the feature that fits best what is left; returns the reconstruction."""
    left = x
    for _ in range(k):
        value, chosen = (left @ features.T).max(1)
        left = left - value[:, None] * features[chosen]
    return x - left


def train_pursuit(x, k, seed, epochs=10, rate=3e-3):
    """A dictionary whose encoder is matching pursuit; schedule and batches as in the recipe."""
    generator = torch.Generator().manual_seed(seed + 3_000)  # with the world's own seed it would start from the truth
    W = F.normalize(torch.randn(192, x.shape[1], generator=generator), dim=1).requires_grad_()
    optimizer, steps = torch.optim.Adam([W]), epochs * (len(x) // 128)
    for step in range(steps):
        if step % (len(x) // 128) == 0:
            order = torch.randperm(len(x), generator=generator)[: len(x) // 128 * 128].view(-1, 128)
        optimizer.param_groups[0]["lr"] = rate * min(1, (1 - step / steps) / 0.3)
        batch = x[order[step % len(order)]]
        optimizer.zero_grad()
        sae.mse(batch, pursue(batch, F.normalize(W, dim=1), k)).backward()
        optimizer.step()
    return F.normalize(W.detach(), dim=1)


def pursuit():
    for seed in SEEDS:
        truth, x, x_new, _ = samples(seed)
        mean = x.mean(0)
        for k in (4, 8, 12):
            features = train_pursuit(x - mean, k, seed)
            error = sae.mse(x_new - mean, pursue(x_new - mean, features, k)).item()
            yield f"pursuit, k = {k}", {"mse": error} | recovery(truth, features)
        yield "true features, k = 8", {"mse": sae.mse(x_new, pursue(x_new, truth, 8)).item()}


def shared(truth, a, b):
    """How many of a's features are true, and how many of those that b has too and of those that it has not."""
    true, agree = (a @ truth.T).amax(1) > FOUND, (a @ b.T).amax(1) > FOUND
    shares = {"true": true, "agree": agree, "true_of_agreeing": true[agree], "true_of_others": true[~agree]}
    shares["wrong_and_agreeing"] = ~true & agree
    return {name: one.double().mean().item() if len(one) else None for name, one in shares.items()}


def agreement():
    for seed in SEEDS:
        for label, correlation in (("independent", 0.0), ("correlated", 0.5)):
            truth, x, _, _ = samples(seed, correlation=correlation)
            for recipe in ("reference", "improved") if correlation == 0 else ("improved",):
                a, b = (train(x, recipe, seed=one).features()[0] for one in (seed, seed + 100))
                yield f"{recipe}, {label}", shared(truth, a, b)


def consistency():
    for seed in SEEDS:
        truth, x, x_new, _ = samples(seed)
        for recipe, weights in (("reference", (0.0, 0.01, 0.1, 1.0)), ("improved", (0.0, 0.1))):
            for weight in weights:
                model = train(x, recipe, seed=seed, n_members=2, consistency_weight=weight)
                yield f"{recipe}, {weight:g}", quality(model, truth, x, x_new) | shared(truth, *model.features())


def absorption():
    for seed in SEEDS:
        for label, family in (("with their parent", True), ("on their own", False)):
            truth, x, x_new, codes = samples(seed, family=family)
            model = train(x, seed=seed)
            cosines = model.features()[0] @ truth.T
            values, indices = model.encode(x_new)
            fires = torch.zeros(len(x_new), 192).scatter(1, indices[0], values[0])[:, cosines[:, :16].argmax(0)] > 0.3
            child = (codes[:, 16:64].view(-1, 16, 3) > 0).any(2)
            recall = [(fires & at).sum(0) / at.sum(0) for at in ((codes[:, :16] > 0) & c for c in (~child, child))]
            like_parent = cosines[cosines[:, 16:64].argmax(0), torch.arange(16).repeat_interleave(3)]
            yield (
                label,
                {
                    "like_parent": like_parent.mean().item(),
                    "recall_without_child": recall[0].mean().item(),
                    "recall_with_child": recall[1].mean().item(),
                },
            )


QUESTIONS = (k, pursuit, agreement, consistency, absorption)
PARTS = {part.__name__: lambda data, part=part: by_row(part()) for part in QUESTIONS}

if __name__ == "__main__":
    main("known_features", PARTS, sys.argv[1:], data=SimpleNamespace(name="synthetic worlds, seeds 0 to 2"))
