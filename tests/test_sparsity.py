"""The encoders that benchmarks/sparsity.py compares, against plain loops and other implementations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import schedules
import sparsity
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import sae_helpers as sae

D_IN, D_SAE, K, B = 20, 32, 5, 16
OTHERS = [sparsity.Untied, sparsity.Refinement, sparsity.MatchingPursuit, sparsity.Fitted]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dictionary(seed=1):
    return F.normalize(draw(D_SAE, D_IN, seed=seed), dim=1)


def trainer(kind):
    """In float64, away from the start."""
    made = kind(replace(sparsity.OTHERS, d_sae=D_SAE, k=K), draw(B, D_IN).float())
    made.model.double()
    with torch.no_grad():
        made.model.W *= draw(D_SAE, 1, seed=2).exp()
        made.model.b_enc.copy_(draw(1, D_SAE, seed=3) / 2)
    return made


def test_pursuit_is_the_greedy_loop():
    x, D = draw(B, D_IN), dictionary()
    for image, its_indices in zip(x, sparsity.pursue(x, D, K)):
        residual = image.clone()
        for index in its_indices:
            responses = D @ residual
            assert index == responses.abs().argmax()
            residual -= responses[index] * D[index]


def test_pursuit_of_orthonormal_features_keeps_the_largest():
    x, D = draw(B, D_IN), torch.linalg.qr(draw(D_IN, D_IN, seed=1)).Q
    assert torch.equal(sparsity.pursue(x, D, K), (x @ D.T).abs().topk(K).indices)


def test_fitted_values_are_least_squares():
    x, D = draw(B, D_IN), dictionary()
    indices = sparsity.pursue(x, D, K)
    values = sparsity.fit_values(x, D, indices)
    for image, its_values, its_indices in zip(x, values, indices):
        if len(its_indices.unique()) == K:
            best = torch.linalg.lstsq(D[its_indices].T, image[:, None]).solution[:, 0]
            assert_close(its_values, best, rtol=1e-3, atol=1e-3)  # the ridge


def test_fitted_values_of_a_feature_chosen_twice_are_finite():
    x, D = draw(B, D_IN), dictionary()
    twice = torch.zeros(B, 2, dtype=torch.int64)
    values = sparsity.fit_values(x, D, twice)
    assert_close(values.sum(1), x @ D[0], rtol=1e-3, atol=1e-3)


def test_omp_leaves_what_a_plain_loop_leaves():
    x, D = draw(B, D_IN), dictionary()
    left = sparsity.omp(x.float(), D.float(), K)
    for image, its_left in zip(x, left):
        chosen, residual = [], image
        for _ in range(K):
            chosen.append(int((D @ residual).abs().argmax()))
            rows = D[chosen].T
            residual = image - rows @ torch.linalg.lstsq(rows, image[:, None]).solution[:, 0]
        assert_close(its_left.double(), residual, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [sparsity.Untied, type("NoStep", (sparsity.Refinement,), {"steps": 0})])
def test_what_it_starts_from_is_the_helpers_encoder(kind):
    """Values, choice and gradient, before the rows part and without refinement."""
    one, x = trainer(kind), draw(B, D_IN, seed=5)
    ours, _, indices = one.autoencode(x)
    theirs, _, their_indices = one.model.autoencode(x)
    assert_close(ours, theirs[0])
    assert torch.equal(indices.sort().values, their_indices[0].sort().values)
    parameters, target = list(one.model.parameters()), draw(B, D_IN, seed=6)
    gradients = [torch.autograd.grad((x_hat * target).sum(), parameters) for x_hat in (ours, theirs[0])]
    for a, b in zip(*gradients):
        assert_close(a, b)


@pytest.mark.parametrize("kind", [sparsity.MatchingPursuit, sparsity.Refinement])
def test_gradient_is_that_of_finite_differences(kind):
    one, x = trainer(kind), draw(B, D_IN, seed=5)
    if hasattr(one, "step_sizes"):
        one.step_sizes = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)
    W, direction, size = one.model.W, draw(1, D_SAE, D_IN, seed=7), 1e-6
    sae.mse(x, one.autoencode(x)[0]).backward()
    slope = (W.grad * direction).sum()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            W += sign * size * direction
            losses.append(sae.mse(x, one.autoencode(x)[0]))
            W -= sign * size * direction
    assert_close((losses[0] - losses[1]) / (2 * size), slope, rtol=1e-5, atol=1e-8)
    if hasattr(one, "step_sizes"):
        assert (one.step_sizes.grad != 0).all()


def test_fitted_values_need_no_gradient(monkeypatch):
    """With the values' dependence on the features left out, the gradient is the same."""
    monkeypatch.setattr(sparsity, "RIDGE", 1e-12)
    one, x = trainer(sparsity.Fitted), draw(B, D_IN, seed=5)
    sae.mse(x, one.autoencode(x)[0]).backward()
    W, ours = one.model.W, one.model.W.grad.clone()
    one.model.zero_grad()
    D, centred = one.dictionary(), x - one.model.b_dec[0]
    rows = D[one.autoencode(x)[2]]
    values = torch.linalg.solve(rows @ rows.mT + 1e-12 * torch.eye(K), rows @ centred[..., None])
    sae.mse(centred, (values * rows).sum(1)).backward()
    assert_close(ours, W.grad)


@pytest.mark.parametrize("kind", OTHERS)
def test_training_lowers_the_error(kind):
    x = F.relu(draw(400, D_IN).float())
    one = kind(replace(sparsity.OTHERS, d_sae=D_SAE, k=K, epochs=60, batch_size=50), x)
    before = sae.mse(x, one.reconstruct(x))
    one.run(progress=False)
    assert sae.mse(x, one.reconstruct(x)) < 0.8 * before
    for extra in ("step_sizes", "W_enc"):
        if hasattr(one, extra):
            learnt_for = one.total_steps - getattr(one, "untied_from", 0)
            assert one.optimizer.state[getattr(one, extra)]["step"] == learnt_for


@pytest.mark.parametrize("kind", [sae.Trainer, *OTHERS])
def test_fires_and_reconstructions_are_those_of_all_images(kind):
    x = F.relu(draw(1500, D_IN).float())  # more than one chunk
    recipe = replace(sparsity.ONE_SHOT if kind is sae.Trainer else sparsity.OTHERS, d_sae=D_SAE, k=K)
    one = kind(recipe, x)
    x_hat, fires = sparsity.reconstruct(one, x)
    assert fires.sum() == len(x) * K
    theirs = one.model(x)[0] if kind is sae.Trainer else one.reconstruct(x)
    assert_close(x_hat, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_features_of_every_encoder_can_start_anew(kind):
    one = kind(replace(sparsity.OTHERS, d_sae=D_SAE, k=K, epochs=10, batch_size=B), draw(B, D_IN).float())
    one.train_step()
    before = one.model.W[0].detach().clone()
    one.restart_features(0, torch.tensor([2, 5]))
    changed = (one.model.W[0] != before).any(1)
    assert changed.nonzero()[:, 0].tolist() == [2, 5]
    one.train_step()
    assert one.model.W.isfinite().all()


def test_encoder_rows_part_from_the_features_halfway():
    recipe = replace(sparsity.OTHERS, d_sae=D_SAE, k=K, epochs=10, batch_size=B)
    one = sparsity.Untied(recipe, draw(B, D_IN).float())
    while one.step < one.untied_from:
        one.train_step()
    assert one.step == one.total_steps // 2
    W = one.model.W[0].detach().clone()
    one.train_step()
    assert not torch.equal(one.W_enc, one.model.W[0])
    assert_close(one.W_enc.detach(), W, rtol=0, atol=1.01 * one.recipe.learning_rate)  # Adam's first step


@pytest.mark.parametrize("shape", schedules.SHAPES)
def test_shapes_are_shares_of_the_highest_rate(shape):
    shares = [shape(i / 100) for i in range(100)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shape is schedules.constant or 0 <= shape(1 - 1e-9) < 1e-4


def test_the_recipe_has_the_late_linear_shape():
    recipe = replace(schedules.IMPROVED, d_sae=D_SAE, k=K, epochs=5, batch_size=B)
    x = draw(10 * B, D_IN).float()
    ours, theirs = schedules.Scheduled(recipe, x), sae.Trainer(recipe, x)
    for step in range(ours.total_steps):
        ours.step = theirs.step = step
        assert ours.learning_rates() == pytest.approx(theirs.learning_rates())


def test_the_best_rate_lies_inside_the_grid(monkeypatch):
    """The grid goes on where its end is best, and only seed 0 chooses."""

    def train(data, shape, learning_rate, seed):
        return {"learning_rate": learning_rate, "seed": seed, "mse_chosen_by": abs(learning_rate - 0.013)}

    monkeypatch.setattr(schedules, "train", train)
    found = schedules.tuned(schedules.constant, None)
    assert [row["learning_rate"] for row in found["rates"]] == [0.0015, 0.003, 0.006, 0.012, 0.024]
    assert found["learning_rate"] == 0.012
    assert [(row["seed"], row["learning_rate"]) for row in found["seeds"]] == [(0, 0.012), (1, 0.012), (2, 0.012)]
