"""How many features does an image need, and who chooses them?

    python benchmarks/sparsity.py [part ...]

Without a name all parts run, one after the other, about twenty minutes on one CPU core.
`k_10` … `k_200` are the frontier: one model for each k and each of WIDTHS, every model with an
encoder map of its own, so in a Trainer of its own. Their bound, in the same parts, is
orthogonal matching pursuit (OMP) on a sample. The others are the setting of Costa et al.
(2025): 1,000 features, k = 10, trained on images 0 to 49,999, validated on 50,000 to 59,999,
where all was chosen. Each part prints a line for each run and replaces its part of
benchmarks/results/sparsity.json; notebooks 07 and 08 show that file.
"""

import sys
import time
import warnings
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from common import CHOOSE_ON, Restarts, main
from sklearn.linear_model import orthogonal_mp_gram

import sae_helpers as sae

KS = (10, 25, 50, 100, 200)
WIDTHS = (256, 1024, 4096)
IMPROVED = replace(sae.RECIPES["improved"], n_members=1)
RIDGE = 1e-5  # in least squares, for a feature that was chosen twice
SAMPLE = 500  # test images on which OMP runs
# The setting of Costa et al. 2025, for `improved`. Larger batches: OMP and pursuits are cheaper with them.
ONE_SHOT = replace(IMPROVED, d_sae=1000, k=10, batch_size=512)
RATE = 6e-3  # of these, the best in `rates`
# For the other encoders: settings of their own, with re-initialisation in place of the floor. A pursuit has
# no use for b_enc or for a map, and nothing to boost.
OTHERS = replace(
    ONE_SHOT, name="other encoders", encoder_map=False, row_moments=False, selection_floor=0,
    learning_rate=4e-3, decay=0.5,
)  # fmt: skip


# ---- encoders -----------------------------------------------------------------------------


@torch.no_grad()
def pursue(x, D, k):
    """Matching pursuit (Mallat & Zhang 1993): k times, take the feature with the largest response to what is left.

    x [B, d_in], unit-length rows D [d_sae, d_in] → feature indices [B, k], in order of choice; a
    feature may be chosen again. The largest is that by absolute value.
    The residual itself is never formed: taking z · D_i off it takes z · D D_iᵀ off the responses.
    """
    responses, gram = x @ D.T, D @ D.T  # [B, d_sae], [d_sae, d_sae]
    indices = []
    for _ in range(k):
        chosen = responses.abs().argmax(1)
        responses.addcmul_(gram[chosen], responses.gather(1, chosen[:, None]), value=-1)
        indices.append(chosen)
    return torch.stack(indices, 1)


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


def respond(x, rows, indices):
    """Products of x [B, d_in] with chosen rows of [d_sae, d_in] → [B, k]; with a gradient to both."""
    return (F.embedding(indices, rows) * x[:, None]).sum(-1)


class OtherEncoder(Restarts):
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

    def reconstruct(self, x, m=0):
        return self.autoencode(x)[0]

    until = 0.5

    def learning_rates(self):
        return super().learning_rates() * 2  # the second is that of what an encoder has besides W and b_enc

    def one_shot(self, x, W_enc):
        """The k largest responses of an encoder's rows."""
        b_enc = self.model.b_enc[0]
        with torch.no_grad():
            indices = torch.addmm(b_enc, x, W_enc.T).topk(self.recipe.k, sorted=False).indices
        return respond(x, W_enc, indices) + b_enc[indices], indices

    def update(self, x):
        x_hat, values, indices = self.autoencode(x)
        fires = sae.count_fires(values[None], indices[None], self.recipe.d_sae)
        self.fires += fires
        self.optimizer.zero_grad()
        self.model.zero_grad()
        sae.mse(x, x_hat).backward()
        for name, view in self.parts[0].items():
            gradient = getattr(self.model, name).grad
            view.grad = torch.zeros_like(view) if gradient is None else gradient[0]  # a pursuit has no use for b_enc
        self.optimizer.step()
        return x_hat.detach()[None], fires, torch.zeros(())


class Untied(OtherEncoder):
    """One shot, but after the share `tied_until` of the steps the encoder's rows are parameters of their own."""

    tied_until = 0.5

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        self.W_enc = self.model.W[0].detach().clone().requires_grad_()
        self.untied_from = int(self.tied_until * self.total_steps)
        self.optimizer.add_param_group({"params": [self.W_enc], "lr": 0.0})

    def encode(self, x):
        return self.one_shot(x, self.model.W[0] if self.step < self.untied_from else self.W_enc)

    def update(self, x):
        if self.step == self.untied_from:
            with torch.no_grad():
                self.W_enc.copy_(self.model.W[0])
        return super().update(x)


class Refinement(OtherEncoder):
    """One shot, then `steps` times: add step size · response to the residual, keep the k largest again.

    A learned step of iterative hard thresholding (Blumensath & Davies 2008; learned steps:
    Gregor & LeCun 2010). The responses are those of unit-length features.
    """

    steps, until = 2, 0.85

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        self.step_sizes = torch.full((self.steps,), 0.5, requires_grad=True)
        self.optimizer.add_param_group({"params": [self.step_sizes], "lr": 0.0})

    def encode(self, x):
        D, k = self.dictionary(), self.recipe.k
        values, indices = self.one_shot(x, self.model.W[0])
        for size in self.step_sizes:
            residual = x - F.embedding_bag(indices, D, per_sample_weights=values, mode="sum")
            with torch.no_grad():
                moved = (residual @ D.T).mul_(size).scatter_add_(1, indices, values)
                kept = moved.topk(k, sorted=False).indices
            before = torch.zeros_like(moved).scatter(1, indices, values).gather(1, kept)
            values, indices = before + size * respond(residual, D, kept), kept
        return values, indices


class MatchingPursuit(OtherEncoder):
    """The features are pursued; then the loop is run again along them, with a gradient (after Costa et al. 2025)."""

    def encode(self, x):
        D = self.dictionary()
        indices = pursue(x.detach(), D.detach(), self.recipe.k)
        values, residual = [], x
        for row in F.embedding(indices, D).unbind(1):
            values.append((residual * row).sum(1, keepdim=True))
            residual = residual - values[-1] * row
        return torch.cat(values, 1), indices


class Fitted(MatchingPursuit):
    """The features are pursued, their values fitted: at their best the error's gradient to them is 0."""

    def encode(self, x):
        D = self.dictionary().detach()
        indices = pursue(x.detach(), D, self.recipe.k)
        return fit_values(x.detach(), D, indices), indices


# ---- the frontier -------------------------------------------------------------------------


def quality(x, x_hat):
    return {"mse": sae.mse(x, x_hat).item(), "pearson": sae.pearson(x, x_hat).item()}


def measured(model, data, x):
    """Quality of a single member on images x."""
    found = sae.evaluate(model, x, data.train.mean(0))
    return {name: found[name].item() for name in ("mse", "pearson", "dead_fraction", "rare_fraction")}


def frontier(k, data):
    """A model for each width with this k, for three epochs: on all test images, and against OMP on some of them."""
    rows, sample = [], data.test[:SAMPLE]
    for d_sae in WIDTHS:
        start = time.process_time()
        model = sae.Trainer(replace(IMPROVED, d_sae=d_sae, k=k, epochs=3), data.train).run(progress=False).model
        seconds = time.process_time() - start
        best = sample - omp(sample - model.b_dec[0], model.features()[0], k)
        with torch.no_grad():
            one_shot = quality(sample, model(sample)[0])
        row = {"d_sae": d_sae, **measured(model, data, data.test), "sample": one_shot, "omp": quality(sample, best)}
        rows.append(row)
        print(
            f"{d_sae:5} features, k {k:4}  MSE {row['mse']:.5f}  Pearson {row['pearson']:.4f}  dead "
            f"{row['dead_fraction']:.1%}  rare {row['rare_fraction']:.1%}; sample {row['sample']['mse']:.5f}, "
            f"OMP {row['omp']['mse']:.5f}  ({seconds:.0f} s of CPU)",
            flush=True,
        )
    return {"epochs": 3, "sample": SAMPLE, "rows": rows}


# ---- 1,000 features, k = 10 ---------------------------------------------------------------


def train_small(data, label, trainer, recipe):
    """Train in the small setting; quality on validation, training and test images, and bounds with the dictionary."""
    x, valid, start = data.train[:CHOOSE_ON], data.train[CHOOSE_ON:], time.process_time()
    trained = trainer(recipe, x).run(progress=False)
    seconds = time.process_time() - start
    D, left = trained.model.features()[0], valid - trained.model.b_dec[0]
    x_hat, fires = reconstruct(trained, valid)
    row = {"learning_rate": recipe.learning_rate, "epochs": recipe.epochs, **quality(valid, x_hat)}
    row["mse_train"] = sae.mse(x[:10_000], reconstruct(trained, x[:10_000])[0]).item()
    row["mse_test"] = sae.mse(data.test, reconstruct(trained, data.test)[0]).item()
    row["mse_omp"] = omp(left, D, recipe.k).square().mean().item()
    row["dead_fraction"] = (fires == 0).double().mean().item()
    row["rare_fraction"] = (fires < len(valid) / 1000).double().mean().item()
    row["cpu_seconds"] = round(seconds)
    print(f"{label:48} " + "  ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
    return row


@torch.no_grad()
def reconstruct(trained, x):
    """Reconstructions [n, d_in], and how often each feature fires [d_sae]."""
    x_hats, fires = [], 0
    for part in x.split(1000):
        if isinstance(trained, OtherEncoder):
            x_hat, values, indices = trained.autoencode(part)
        else:
            x_hat, values, indices = (one[0] for one in trained.model.autoencode(part))
        x_hats.append(x_hat)
        fires += sae.count_fires(values[None], indices[None], trained.recipe.d_sae)[0]
    return torch.cat(x_hats), fires


def small(rate, epochs=10, **settings):
    return replace(ONE_SHOT, learning_rate=rate, epochs=epochs, **settings)


def runs(*cases):
    """A part that trains each case: label, trainer, recipe."""
    return lambda data: {label: train_small(data, label, trainer, recipe) for label, trainer, recipe in cases}


PARTS = {
    **{f"k_{k}": partial(frontier, k) for k in KS},
    "rates": runs(
        *((f"improved, 10 epochs, rate {rate:g}", sae.Trainer, small(rate)) for rate in (3e-3, 6e-3, 1.2e-2)),
        *((f"no map, 10 epochs, rate {rate:g}", sae.Trainer, small(rate, encoder_map=False)) for rate in (3e-3, 6e-3)),
    ),
    # A part for each seed, so that none takes long.
    **{
        f"one_shot_{seed}": runs((f"improved, 20 epochs, seed {seed}", sae.Trainer, small(RATE, 20, seed=seed)))
        for seed in (0, 1, 2)
    },
    "untied": runs(("untied, 10 epochs", Untied, replace(OTHERS, epochs=10))),
    "refinement": runs(("two refinements, 10 epochs", Refinement, replace(OTHERS, epochs=10))),
    "pursuit": runs(
        ("pursuit, 10 epochs", MatchingPursuit, replace(OTHERS, epochs=10)),
        ("pursuit, values fitted, 10 epochs", Fitted, replace(OTHERS, epochs=10)),
    ),
}


if __name__ == "__main__":
    main("sparsity", PARTS, sys.argv[1:])
