"""The encoders that benchmarks/sparsity.py compares, against plain loops and other implementations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sparsity
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import sae_helpers as sae

D_IN, D_SAE, K, B = 20, 32, 5, 16


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dictionary(seed=1):
    return F.normalize(draw(D_SAE, D_IN, seed=seed), dim=1)


def trainer(kind, **changes):
    """In float64, away from the start."""
    recipe = replace(sparsity.SMALL, d_sae=D_SAE, k=K, **changes)
    made = kind(recipe, draw(B, D_IN).float())
    made.model.double()
    with torch.no_grad():
        made.model.W *= draw(D_SAE, 1, seed=2).exp()
        made.model.b_enc.copy_(draw(1, D_SAE, seed=3) / 2)
    return made


@pytest.mark.parametrize("signed", [True, False])
def test_pursuit_is_the_greedy_loop(signed):
    x, D = draw(B, D_IN), dictionary()
    values, indices = sparsity.pursue(x, D, K, signed)
    for image, its_values, its_indices in zip(x, values, indices):
        residual = image.clone()
        for value, index in zip(its_values, its_indices):
            responses = D @ residual
            assert index == (responses.abs() if signed else responses).argmax()
            assert_close(value, responses[index])
            residual -= value * D[index]


def test_pursuit_of_orthonormal_features_keeps_the_largest():
    x, D = draw(B, D_IN), torch.linalg.qr(draw(D_IN, D_IN, seed=1)).Q
    _, indices = sparsity.pursue(x, D, K)
    largest = (x @ D.T).abs().topk(K).indices
    assert torch.equal(indices, largest)


def test_fitted_values_are_least_squares():
    x, D = draw(B, D_IN), dictionary()
    _, indices = sparsity.pursue(x, D, K)
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


def test_bounds_are_in_order():
    x, D = draw(B, D_IN), dictionary()
    values, indices = sparsity.pursue(x, D, K)
    greedy = (x - (values[..., None] * D[indices]).sum(1)).square().mean()
    refitted = (x - (sparsity.fit_values(x, D, indices)[..., None] * D[indices]).sum(1)).square().mean()
    assert refitted < greedy
    assert sparsity.omp(x.float(), D.float(), K).square().mean() < greedy


@pytest.mark.parametrize("kind", [sparsity.steps(0), sparsity.Untied, sparsity.SharedMap])
def test_what_it_starts_from_is_the_helpers_encoder(kind):
    """Values, choice and gradient, without refinement, before the rows part, and with the identity as the map."""
    one = trainer(kind)
    if kind is sparsity.SharedMap:
        one.A = one.A.detach().double()
    x = draw(B, D_IN, seed=5)
    ours, _, indices = one.autoencode(x)
    theirs, _, their_indices = one.model.autoencode(x)
    assert_close(ours, theirs[0])
    assert torch.equal(indices.sort().values, their_indices[0].sort().values)
    parameters = list(one.model.parameters())
    target = draw(B, D_IN, seed=6)
    gradients = [torch.autograd.grad((x_hat * target).sum(), parameters) for x_hat in (ours, theirs[0])]
    for a, b in zip(*gradients):
        assert_close(a, b)


@pytest.mark.parametrize("kind", [sparsity.MatchingPursuit, sparsity.ByValue, sparsity.steps(2)])
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
    W, b_dec = one.model.W, one.model.b_dec
    ours = W.grad.clone(), b_dec.grad.clone()
    one.model.zero_grad()
    D, centred = one.dictionary(), x - b_dec[0]
    indices = one.autoencode(x)[2]
    rows = D[indices]
    values = torch.linalg.solve(rows @ rows.mT + 1e-12 * torch.eye(K), rows @ centred[..., None])
    sae.mse(centred, (values * rows).sum(1)).backward()
    assert_close(ours[0], W.grad)
    assert_close(ours[1], b_dec.grad)


@pytest.mark.parametrize(
    "kind",
    [sparsity.MatchingPursuit, sparsity.ByValue, sparsity.Fitted, sparsity.steps(2),
     sparsity.LargestByMagnitude, sparsity.Untied, sparsity.SharedMap],
)  # fmt: skip
def test_training_lowers_the_error(kind):
    x = F.relu(draw(400, D_IN).float())
    one = kind(replace(sparsity.SMALL, d_sae=D_SAE, k=K, epochs=60, batch_size=50), x)
    before = sae.mse(x, sparsity.reconstruct(one, x)[0])
    one.run(progress=False)
    assert sae.mse(x, sparsity.reconstruct(one, x)[0]) < 0.8 * before
    for extra in ("step_sizes", "W_enc", "A"):
        if hasattr(one, extra):
            learnt_for = one.total_steps - getattr(one, "untied_from", 0)
            assert one.optimizer.state[getattr(one, extra)]["step"] == learnt_for


def test_encoder_rows_part_from_the_features_halfway():
    one = sparsity.Untied(replace(sparsity.SMALL, d_sae=D_SAE, k=K, epochs=10, batch_size=B), draw(B, D_IN).float())
    while one.step < one.untied_from:
        one.train_step()
    assert one.step == one.total_steps // 2
    W = one.model.W[0].detach().clone()
    one.train_step()
    assert not torch.equal(one.W_enc, one.model.W[0])
    assert_close(one.W_enc.detach(), W, rtol=0, atol=1.01 * one.recipe.learning_rate)  # Adam's first step


def test_annealed_k_falls_to_the_recipes():
    one = sparsity.Annealed(replace(sparsity.SMALL, d_sae=D_SAE, k=K, epochs=10, batch_size=B), draw(B, D_IN).float())
    ks = []
    while one.step < one.total_steps:
        one.train_step()
        ks.append(one.model.k)
    assert ks == sorted(ks, reverse=True)
    assert ks[0] == 20
    assert ks[-1] == K


def test_a_batch_draws_its_k(monkeypatch):
    monkeypatch.setattr(sparsity, "KS", (2, 4, 8))
    one = sparsity.Drawn(replace(sparsity.SMALL, d_sae=D_SAE, k=K, epochs=30, batch_size=B), draw(B, D_IN).float())
    ks = []
    while one.step < one.total_steps:
        one.train_step()
        ks.append(one.model.k)
    assert set(ks) == {2, 4, 8}
