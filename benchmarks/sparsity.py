"""How many features does an image need, and who chooses them?

    python benchmarks/sparsity.py [part ...]

Without a name all parts run, one after the other, more than an hour on one CPU core.
`width_256` … `width_8192` are the frontier: for each number of features, a model for each k
of KS, trained together. Their bounds are `pca` and, in the same parts, orthogonal matching
pursuit (OMP) on a sample; `wide` trains the widest in other ways. `several_k` trains one
model for all k. `at_50` has other encoders for the `improved` recipe. The others are the
setting of Costa et al. (2025): 1,000 features, k = 10, trained on images 0 to 49,999,
validated on 50,000 to 59,999. Each part prints a line for each run and replaces its part of
benchmarks/results/sparsity.json; notebook 06 shows that file.
"""

import sys
import time
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from common import main
from sklearn.linear_model import orthogonal_mp_gram

import sae_helpers as sae

KS = (5, 10, 25, 50, 100, 200)
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
# Settings of its own, lest a better recipe made the stored results those of another one.
ONE = sae.Recipe(
    "sparsity", decoder_bias=True, learning_rate=2e-3, decay=0.2, reinit="features", reinit_until=0.8,
    n_members=1, consistency_weight=0.0,
)  # fmt: skip
SWEEP = replace(ONE, epochs=3)
# `improved`, as of when this was written.
LIKE_IMPROVED = replace(ONE, epochs=5, decay=0.3, decay_power=0.5, reinit_until=0.85, row_moments=True)
RIDGE = 1e-5  # in least squares, for a feature that was chosen twice
SAMPLE = 500  # test images on which OMP runs
QUALITY = ("mse", "pearson", "explained_variance", "dead_fraction")
# The setting of Costa et al. 2025. Larger batches make a pursuit cheaper, for the products of all
# features with each other are due once for each; a longer decay did the same good to every encoder.
SMALL = replace(ONE, d_sae=1000, k=10, batch_size=512, learning_rate=4e-3, decay=0.5, reinit_until=0.5)


# ---- encoders -----------------------------------------------------------------------------


@torch.no_grad()
def pursue(x, D, k, signed=True):
    """Matching pursuit (Mallat & Zhang 1993): k times, take the feature with the largest response to what is left.

    x [B, d_in], unit-length rows D [d_sae, d_in] → values and feature indices, each [B, k], in order
    of choice; a feature may be chosen again. `signed`: the largest by absolute value.
    The residual itself is never formed: taking z · D_i off it takes z · D D_iᵀ off the responses.
    """
    responses, gram = x @ D.T, D @ D.T  # [B, d_sae], [d_sae, d_sae]
    values, indices = [], []
    for _ in range(k):
        chosen = (responses.abs() if signed else responses).argmax(1)
        value = responses.gather(1, chosen[:, None])
        responses.addcmul_(gram[chosen], value, value=-1)
        values.append(value)
        indices.append(chosen[:, None])
    return torch.cat(values, 1), torch.cat(indices, 1)


@torch.no_grad()
def fit_values(x, D, indices):
    """The best values [B, k] for features chosen already, by least squares."""
    rows = D[indices]  # [B, k, d_in]
    gram = rows @ rows.mT + RIDGE * torch.eye(indices.shape[1])
    return torch.linalg.solve(gram, rows @ x[..., None])[..., 0]


def omp(x, D, k):
    """Orthogonal matching pursuit (Pati et al. 1993), scikit-learn's: residuals of x [B, d_in]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it may end before k where an image is explained in full
        codes = orthogonal_mp_gram((D @ D.T).numpy(), (D @ x.T).numpy(), n_nonzero_coefs=k)
    return x - torch.from_numpy(codes.T).float() @ D


class OtherEncoder(sae.Trainer):
    """One member whose encoder is a subclass's `encode`. Choosing features has no gradient, their values have."""

    def encode(self, x):
        """Images less b_dec [B, d_in] → values and feature indices, each [B, k]."""
        raise NotImplementedError

    def dictionary(self):
        return F.normalize(self.model.W[0], dim=-1)

    def autoencode(self, x):
        b_dec = self.model.b_dec[0]
        values, indices = self.encode(x - b_dec)
        x_hat = F.embedding_bag(indices, self.dictionary(), per_sample_weights=values, mode="sum") + b_dec
        return x_hat, values, indices

    def update(self, x):
        x_hat, values, indices = self.autoencode(x)
        fires = sae.count_fires(values[None], indices[None], self.recipe.d_sae)
        self.fires += fires
        self.optimizer.zero_grad()
        self.model.zero_grad()
        sae.mse(x, x_hat).backward()
        for name, view in self.parts[0].items():
            gradient = getattr(self.model, name).grad
            view.grad = None if gradient is None else gradient[0]  # no use for b_enc: none
        self.optimizer.step()
        return x_hat.detach()[None], fires, torch.zeros(())

    @torch.no_grad()
    def missed_directions(self, m, n):
        """As in the helpers, with this encoder's residuals."""
        generator = torch.Generator().manual_seed(self._new_seed(m))
        x = self.x[torch.randperm(len(self.x), generator=generator)[: max(256, 2 * n)]]
        residuals = x - self.autoencode(x)[0]
        worst = residuals.norm(dim=1).argsort(descending=True)[torch.arange(n) % len(x)]
        directions = F.normalize(residuals, dim=1)
        return (directions[worst] @ directions.T).relu().pow(8) @ residuals


def respond(x, rows, indices):
    """Products of x [B, d_in] with chosen rows of [d_sae, d_in] → [B, k]; with a gradient to both."""
    return (F.embedding(indices, rows) * x[:, None]).sum(-1)


def one_shot(x, W_enc, b_enc, k, signed=False):
    """The k largest responses, or, `signed`, the k largest by absolute value."""
    with torch.no_grad():
        pre = torch.addmm(b_enc, x, W_enc.T)
        indices = (pre.abs() if signed else pre).topk(k, sorted=False).indices
    return respond(x, W_enc, indices) + b_enc[indices], indices


class Refinement(OtherEncoder):
    """The helpers' encoder, then `steps` times: add step size · response to the residual, keep the k largest again.

    A learned step of iterative hard thresholding (Blumensath & Davies 2008; learned steps:
    Gregor & LeCun 2010). The responses are those of unit-length features.
    """

    steps = 1

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        self.step_sizes = torch.full((self.steps,), 0.5, requires_grad=True)
        self.optimizer.add_param_group({"params": [self.step_sizes], "lr": 0.0})

    def learning_rates(self):
        return super().learning_rates() * 2  # the second is that of the step sizes

    def rows(self, D):
        """Whose products with the residual are the responses."""
        return D

    def encode(self, x):
        D, k = self.dictionary(), self.recipe.k
        rows = self.rows(D)
        values, indices = one_shot(x, self.model.W[0], self.model.b_enc[0], k)
        for size in self.step_sizes:
            residual = x - F.embedding_bag(indices, D, per_sample_weights=values, mode="sum")
            with torch.no_grad():
                moved = (residual @ rows.T).mul_(size).scatter_add_(1, indices, values)
                kept = moved.topk(k, sorted=False).indices
            before = torch.zeros_like(moved).scatter(1, indices, values).gather(1, kept)
            values, indices = before + size * respond(residual, rows, kept), kept
        return values, indices


class ByEncoderRows(Refinement):
    """The responses of the encoder's rows instead, whose lengths training sets."""

    def rows(self, D):
        return self.model.W[0]


class MatchingPursuit(OtherEncoder):
    """The features are pursued; then the loop is run again along them, with a gradient (after Costa et al. 2025)."""

    signed = True

    def encode(self, x):
        D = self.dictionary()
        _, indices = pursue(x.detach(), D.detach(), self.recipe.k, self.signed)
        values, residual = [], x
        for row in F.embedding(indices, D).unbind(1):
            values.append((residual * row).sum(1, keepdim=True))
            residual = residual - values[-1] * row
        return torch.cat(values, 1), indices


class ByValue(MatchingPursuit):
    signed = False


class Fitted(MatchingPursuit):
    """The features are pursued, their values fitted: at their best the error's gradient to them is 0."""

    def encode(self, x):
        D = self.dictionary().detach()
        _, indices = pursue(x.detach(), D, self.recipe.k, self.signed)
        return fit_values(x.detach(), D, indices), indices


# ---- the frontier -------------------------------------------------------------------------


def pca(data):
    """Quality of the first k principal components, on all test images and on the sample."""
    mean = data.train.mean(0)
    components = torch.linalg.svd(data.train - mean, full_matrices=False).Vh[: max(KS)]
    rows = []
    for k in KS:
        x_hat = (data.test - mean) @ components[:k].T @ components[:k] + mean
        rows.append({"k": k, **quality(data.test, x_hat, mean)})
        rows[-1]["sample"] = quality(data.test[:SAMPLE], x_hat[:SAMPLE], mean)
        print(f"pca k {k:4}  MSE {rows[-1]['mse']:.5f}  Pearson {rows[-1]['pearson']:.4f}", flush=True)
    return rows


def quality(x, x_hat, mean):
    named = {"mse": sae.mse(x, x_hat), "pearson": sae.pearson(x, x_hat)}
    return {**{name: value.item() for name, value in named.items()},
            "explained_variance": sae.explained_variance(x, x_hat, mean).item()}  # fmt: skip


def width(d_sae, data):
    """A model for each k; each at its own k on all test images, and against OMP on some of them."""
    rows, mean, sample = [], data.train.mean(0), data.test[:SAMPLE]
    for ks in (KS[:3], KS[3:]):  # codes are as long as the largest k of a run, so the small ones go together
        start = time.process_time()
        trainer = sae.Trainer(replace(SWEEP, d_sae=d_sae, k=ks, n_members=len(ks)), data.train).run(progress=False)
        seconds = time.process_time() - start
        own = sae.evaluate(trainer.model, data.test, mean)
        with torch.no_grad():
            x_hats = trainer.model(sample)
        for m, k in enumerate(ks):
            b_dec = trainer.model.b_dec[m].detach()
            best = sample - omp(sample - b_dec, trainer.model.features()[m], k)
            row = {"k": k, **{name: own[name][m].item() for name in QUALITY}}
            row |= {"sample": quality(sample, x_hats[m], mean), "omp": quality(sample, best, mean)}
            rows.append(row)
            print(
                f"{d_sae:5} features, k {k:4}  MSE {row['mse']:.5f}  Pearson {row['pearson']:.4f}  dead "
                f"{row['dead_fraction']:.1%}; sample {row['sample']['mse']:.5f}, OMP {row['omp']['mse']:.5f}  "
                f"({seconds:.0f} s of CPU for {len(ks)})",
                flush=True,
            )
        if d_sae == SWEEP.d_sae:
            at_test(trainer.model, data, rows[-len(ks) :])
    return {"epochs": SWEEP.epochs, "sample": SAMPLE, "rows": rows}


def wide(data):
    """Is it the learning rate, or the short training, that the widest dictionary suffers from?"""
    rows = {}
    for label, settings in (
        ("8,192 features, half the rate", {"d_sae": 8192, "learning_rate": SWEEP.learning_rate / 2}),
        ("8,192 features, nine epochs", {"d_sae": 8192, "epochs": 9}),
        ("1,024 features, nine epochs", {"epochs": 9}),
    ):
        recipe = replace(SWEEP, k=(50, 200), n_members=2, **settings)
        model = sae.Trainer(recipe, data.train).run(progress=False).model
        found = sae.evaluate(model, data.test, data.train.mean(0))
        rows[label] = [{"k": k, **{name: found[name][m].item() for name in QUALITY}} for m, k in enumerate(recipe.k)]
        for row in rows[label]:
            print(f"{label}, k {row['k']:4}  MSE {row['mse']:.5f}  dead {row['dead_fraction']:.1%}", flush=True)
    return rows


def at_test(model, data, rows):
    """Add to each member's row its quality at every k."""
    for k in KS:
        model.k = k
        found = sae.evaluate(model, data.test, data.train.mean(0))
        for m, row in enumerate(rows):
            for name in ("mse", "pearson"):
                row.setdefault(f"{name}_at", []).append(found[name][m].item())


# ---- several k ----------------------------------------------------------------------------


class Drawn(sae.Trainer):
    """Each batch draws its k."""

    def update(self, x):
        self.model.k = int(np.random.default_rng([self.recipe.seed, self.step]).choice(KS))
        return super().update(x)


class DrawnLog(Drawn):
    """The logarithm makes every k count alike, however small its error."""

    def losses(self, x, x_hat):
        return super().losses(x, x_hat).log()


class TwoKs(sae.Trainer):
    """Multi-TopK of Gao et al. (2024): L(k) + L(4k) / 8."""

    def losses(self, x, x_hat):
        self.model.k = 4 * self.recipe.k
        more = sae.mse(x, self.model(x))
        self.model.k = self.recipe.k
        return sae.mse(x, x_hat) + more / 8


def several_k(data):
    rows = {}
    for label, trainer in {
        "k = 50 only": sae.Trainer, "each batch draws its k": Drawn,
        "each batch draws its k, logarithm of the loss": DrawnLog, "L(50) + L(200) / 8": TwoKs,
    }.items():  # fmt: skip
        row = {}
        at_test(trainer(SWEEP, data.train).run(progress=False).model, data, [row])
        rows[label] = row
        print(f"{label:50} MSE " + " ".join(f"{value:.5f}" for value in row["mse_at"]), flush=True)
    return {"ks": KS, "epochs": SWEEP.epochs, "rows": rows}


# ---- 1,000 features, k = 10 ---------------------------------------------------------------


def small(data):
    """Training and validation images of Costa et al. (2025)."""
    return data.train[:50_000], data.train[50_000:]


def train_small(data, label, trainer=sae.Trainer, **settings):
    """Train in the small setting; quality on validation and training images, and bounds with the same dictionary."""
    (x, valid), start = small(data), time.process_time()
    trained = trainer(replace(SMALL, **settings), x).run(progress=False)
    row = {"epochs": trained.recipe.epochs, "batch_size": trained.recipe.batch_size}
    row["learning_rate"] = trained.recipe.learning_rate
    seconds = time.process_time() - start
    D, b_dec = trained.model.features()[0], trained.model.b_dec[0].detach()
    x_hat, indices = reconstruct(trained, valid)
    row |= quality(valid, x_hat, x.mean(0))
    row["mse_train"] = sae.mse(x[:10_000], reconstruct(trained, x[:10_000])[0]).item()
    row["dead_fraction"] = 1 - len(indices.unique()) / len(D)
    row["distinct"] = float(np.mean([len(one.unique()) for one in indices]))
    left = torch.cat([valid_part - b_dec for valid_part in valid.split(1000)])
    refitted = torch.cat([
        (fit_values(part, D, chosen)[..., None] * D[chosen]).sum(1)
        for part, chosen in zip(left.split(1000), indices.split(1000))
    ])  # fmt: skip
    row["mse_refitted"] = sae.mse(left, refitted).item()
    row["mse_omp"] = omp(left, D, SMALL.k).square().mean().item()
    if hasattr(trained, "step_sizes"):
        row["step_sizes"] = trained.step_sizes.tolist()
    print(
        f"{label:44} MSE {row['mse']:.5f} (train {row['mse_train']:.5f})  Pearson {row['pearson']:.4f}  dead "
        f"{row['dead_fraction']:.1%}; refitted {row['mse_refitted']:.5f}, OMP {row['mse_omp']:.5f}  "
        f"({seconds:.0f} s of CPU)",
        flush=True,
    )
    return row, trained


@torch.no_grad()
def reconstruct(trained, x):
    """Reconstructions [n, d_in] and the features chosen [n, k]."""
    if isinstance(trained, OtherEncoder):
        parts = [trained.autoencode(part) for part in x.split(1000)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])
    values, indices = trained.model.encode(x)
    return trained.model.decode(values, indices)[0], indices[0]


def steps(n, kind=Refinement):
    return type(f"{kind.__name__}{n}", (kind,), {"steps": n})


def runs(cases):
    """A part that trains each case: label, trainer and changed settings."""
    cases = list(cases)
    return lambda data: {label: train_small(data, label, trainer, **settings)[0] for label, trainer, settings in cases}


class Annealed(sae.Trainer):
    """k falls from `k_start` to the recipe's over the first `share` of the steps."""

    k_start, share = 20, 0.8

    def update(self, x):
        left = max(0.0, 1 - self.step / (self.share * self.total_steps))
        self.model.k = round(self.recipe.k + left * (self.k_start - self.recipe.k))
        return super().update(x)


class LargestByMagnitude(OtherEncoder):
    """One shot, but the k largest by absolute value."""

    def encode(self, x):
        return one_shot(x, self.model.W[0], self.model.b_enc[0], self.recipe.k, signed=True)


class Untied(OtherEncoder):
    """One shot, but after the share `tied_until` of the steps the encoder's rows are parameters of their own."""

    tied_until = 0.5

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        self.W_enc = self.model.W[0].detach().clone().requires_grad_()
        self.untied_from = int(self.tied_until * self.total_steps)
        self.optimizer.add_param_group({"params": [self.W_enc], "lr": 0.0})

    def learning_rates(self):
        return super().learning_rates() * 2

    def encode(self, x):
        W_enc = self.model.W[0] if self.step < self.untied_from else self.W_enc
        return one_shot(x, W_enc, self.model.b_enc[0], self.recipe.k)

    def update(self, x):
        if self.step == self.untied_from:
            with torch.no_grad():
                self.W_enc.copy_(self.model.W[0])
        return super().update(x)

    def reinit_features(self, m, features, directions=None):
        super().reinit_features(m, features, directions)
        with torch.no_grad():
            self.W_enc[features] = self.model.W[m, features]


class UntiedAtOnce(Untied):
    tied_until = 0.0


class SharedMap(OtherEncoder):
    """One shot and tied, but each image first passes a square matrix, learnt from the identity on: the encoder is W A.

    All features share it, so fewer are lost than with rows of their own that part from theirs too early.
    """

    slower = 0.3  # its share of the learning rate: at the full one the error is higher
    start = None  # another matrix than the identity

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        self.A = (torch.eye(x.shape[1]) if self.start is None else self.start.clone()).requires_grad_()
        self.optimizer.add_param_group({"params": [self.A], "lr": 0.0})

    def learning_rates(self):
        (rate,) = super().learning_rates()
        return [rate, self.slower * rate]

    def encode(self, x):
        return one_shot(x @ self.A.T, self.model.W[0], self.model.b_enc[0], self.recipe.k)


class FromPursuit(sae.Trainer):
    """One shot, but the dictionary starts as one that was trained for matching pursuit, for three epochs."""

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        start = MatchingPursuit(replace(recipe, epochs=3), x, device).run(progress=False)
        with torch.no_grad():
            self.model.W.copy_(start.model.features() / 2)  # that long are an encoder's rows in the end
            self.model.b_dec.copy_(start.model.b_dec)


class Shifted(sae.Trainer):
    """A quarter of the images is moved by up to one pixel."""

    def update(self, x):
        generator = torch.Generator().manual_seed(self.step)
        images = x.reshape(-1, 28, 28).clone()
        for part in torch.randperm(len(x), generator=generator)[: len(x) // 4].chunk(4):
            by = torch.randint(-1, 2, (2,), generator=generator).tolist()
            images[part] = images[part].roll(by, (1, 2))
        return super().update(images.flatten(1))


def at_50(data):
    """Other encoders with the settings of `improved`: 1,024 features, k = 50, five epochs, quality on test images."""
    mean, rows = data.train.mean(0), {}

    def measure(label, kind, **settings):
        trained = kind(replace(LIKE_IMPROVED, **settings), data.train).run(progress=False)
        x_hat, indices = reconstruct(trained, data.test)
        dead = 1 - len(indices.unique()) / trained.recipe.d_sae
        row = rows[label] = {**quality(data.test, x_hat, mean), "dead_fraction": dead}
        print(f"k 50, {label:50} MSE {row['mse']:.5f}  Pearson {row['pearson']:.5f}  dead {dead:.2%}", flush=True)
        return trained

    measure("tied, as in the recipe", sae.Trainer)
    measure("own rows from halfway on", Untied)
    A = measure("one map before tied rows", SharedMap).A.detach()
    # By how much the map changes what lies along each principal component.
    directions = torch.linalg.eigh((data.train - mean).T @ (data.train - mean)).eigenvectors.flip(1)
    gains = (directions * (A @ directions)).sum(0)
    rows["one map before tied rows"]["gains"] = gains[:400].tolist()
    measure("the same, features start anew until 95 %", SharedMap, reinit_until=0.95)
    fixed = type("FixedMap", (SharedMap,), {"slower": 0.0, "start": (directions * gains) @ directions.T})
    measure("a fixed map with its gains along the components", fixed)
    measure("one refinement step", steps(1))
    measure("the same, responses of the encoder's rows", steps(1, ByEncoderRows))
    return rows


def price(data, turns=3, steps_of_a_turn=10):
    """CPU milliseconds of a step with each encoder, the fastest of several turns in which they alternate."""
    kinds = {"one shot": sae.Trainer, "one shot, own rows": UntiedAtOnce, "one shot, one map before": SharedMap}
    kinds |= {f"refined, steps: {n}": steps(n) for n in (1, 2, 6)}
    kinds |= {"pursuit by absolute value": MatchingPursuit, "pursuit values fitted": Fitted}
    trainers = {label: kind(SMALL, small(data)[0]) for label, kind in kinds.items()}
    milliseconds = {label: [] for label in trainers}
    for _ in range(turns + 1):
        for label, trainer in trainers.items():
            start = time.process_time()
            for _ in range(steps_of_a_turn):
                trainer.train_step()
            milliseconds[label].append(1e3 * (time.process_time() - start) / steps_of_a_turn)
    fastest = {label: min(values[1:]) for label, values in milliseconds.items()}
    print("price " + ", ".join(f"{label} {value:.0f} ms" for label, value in fastest.items()), flush=True)
    return fastest


PARTS = {
    "pca": pca,
    **{f"width_{d_sae}": partial(width, d_sae) for d_sae in WIDTHS},
    "wide": wide,
    "several_k": several_k,
    "one_shot": runs((f"{n} epochs", sae.Trainer, {"epochs": n}) for n in (5, 10, 20)),
    "levers": runs(
        [
            ("k falls from 20 to 10", Annealed, {"epochs": 5}),
            ("images shifted", Shifted, {"epochs": 5}),
            ("largest by absolute value", LargestByMagnitude, {"epochs": 5}),
            ("start from a pursuit's dictionary", FromPursuit, {"epochs": 5}),
        ]
    ),
    "annealed_long": runs([("k falls from 20 to 10", Annealed, {"epochs": 40})]),
    "untied": runs(
        [
            ("own rows from the start, 5 epochs", UntiedAtOnce, {"epochs": 5}),
            ("own rows from the start, rate 0.001, 20 epochs", UntiedAtOnce, {"epochs": 20, "learning_rate": 1e-3}),
            ("own rows from halfway on, 10 epochs", Untied, {"epochs": 10}),
            ("own rows from halfway on, 20 epochs", Untied, {"epochs": 20}),
            ("one map before tied rows, 20 epochs", SharedMap, {"epochs": 20, "reinit_until": 0.85}),
        ]
    ),
    "at_50": at_50,
    "refinement": runs(
        [(f"{n} steps", steps(n), {"epochs": 10, "reinit_until": 0.85}) for n in (1, 2, 6)]
        + [("2 steps, responses of the encoder's rows", steps(2, ByEncoderRows), {"epochs": 10, "reinit_until": 0.85})]
    ),
    "pursuit": runs(
        (name, kind, {"epochs": 10})
        for name, kind in (
            ("by value", ByValue),
            ("by absolute value", MatchingPursuit),
            ("values fitted", Fitted),
        )
    ),
    "seeds": runs(
        (f"{label}, seed {seed}", kind, {**settings, "seed": seed})
        for label, kind, settings in (
            ("one shot, 20 epochs", sae.Trainer, {"epochs": 20}),
            ("own rows from halfway on, 20 epochs", Untied, {"epochs": 20}),
            ("one map before tied rows, 20 epochs", SharedMap, {"epochs": 20, "reinit_until": 0.85}),
            ("pursuit values fitted, 10 epochs", Fitted, {"epochs": 10}),
        )
        for seed in (1, 2)
    ),
    "price": price,
}


if __name__ == "__main__":
    main("sparsity", PARTS, sys.argv[1:])
