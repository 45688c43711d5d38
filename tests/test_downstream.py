"""The parts of benchmarks/downstream.py that its conclusions rest on."""

from __future__ import annotations

from dataclasses import replace

import downstream
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import sae_helpers as sae


@pytest.fixture
def problem():
    """Three noisy blobs for each of ten digits: [1200, 30], the last 200 held out."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (1200,), generator=generator)
    centres = torch.randn(10, 30, generator=generator)
    return centres[labels] + 1.5 * torch.randn(1200, 30, generator=generator), labels


def pre_activations():
    return torch.randn(50, 40, generator=torch.Generator().manual_seed(1))


def test_codes_keep_n_features_by_value_or_above_the_next_one():
    pre = pre_activations()
    ranked = pre.sort(dim=1, descending=True).values
    by_value, soft = downstream.hard(pre, 7), downstream.soft(pre, 7)
    assert ((by_value != 0).sum(1) == 7).all()
    assert torch.equal(by_value[by_value != 0], pre[pre >= ranked[:, 6:7]])
    assert ((soft > 0).sum(1) == 7).all()
    assert torch.allclose(soft.sum(1), (ranked[:, :7] - ranked[:, 7:8]).sum(1))


def test_lifetime_code_fires_each_feature_for_its_share_of_the_fitted_images():
    pre = torch.randn(3000, 20) * torch.arange(1, 21) + torch.arange(20)
    fires = (downstream.lifetime(pre, 0.1, 2000) > 0).double()
    assert (fires[:2000].mean(0) - 0.1).abs().max() < 0.002
    assert (fires[2000:].mean(0) - 0.1).abs().max() < 0.05


def test_codes_of_members_stand_side_by_side():
    model = sae.TopKSAE(12, 20, 3, seeds=(0, 1), b_dec=torch.rand(12))
    x = torch.rand(9, 12)
    values, indices = model.encode(x)
    both = downstream.codes(model, x, [1, 0], 3, downstream.hard).detach()
    expected = torch.zeros(2, 9, 20).scatter_(2, indices, values).detach()
    assert torch.allclose(both, torch.cat([expected[1], expected[0]], 1), atol=1e-6)


@pytest.mark.parametrize("loss", ["logistic", "squared hinge"])
def test_probes_side_by_side_find_what_scikit_learn_finds(problem, loss):
    features, labels = problem
    features, fit = downstream.scaled(features, 1000), 1000
    strengths = (1e-1, 1e-3)
    predicted = downstream.side_by_side(features, labels, fit, strengths, loss, epochs=200)
    for strength, ours in zip(strengths, predicted):
        C = 1 / (strength * fit)
        exact = LogisticRegression(C=C, max_iter=1000) if loss == "logistic" else LinearSVC(C=C, intercept_scaling=30)
        exact.fit(features[:fit].numpy(), labels[:fit].numpy())
        assert (exact.predict(features[fit:].numpy()) == ours.numpy()).mean() > 0.97
        assert exact.score(features[fit:].numpy(), labels[fit:].numpy()) > 0.5  # chance is 0.1


def test_scaling_needs_no_look_at_held_out_images(problem):
    features, _ = problem
    other = features.clone()
    other[1000:] *= 10
    assert torch.equal(downstream.scaled(features.clone(), 1000)[:1000], downstream.scaled(other, 1000)[:1000])


def test_held_out_images_do_not_reach_the_classifier(problem):
    features, labels = problem
    other = torch.cat([labels[:1000], labels[1000:].flip(0)])
    first, second = (downstream.side_by_side(features, one, 1000, (1e-3,)) for one in (labels, other))
    assert torch.equal(first, second)


def test_interval_covers_the_true_error_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [downstream.interval(wrong, 1000) for wrong in generator.binomial(1000, 0.02, 400)]
    covered = np.mean([i["low"] <= 0.02 <= i["high"] for i in intervals])
    assert 0.92 <= covered <= 0.98


def test_difference_comes_with_its_paired_standard_error():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(4000, generator=generator) < 0.1
    worse = base | (torch.rand(4000, generator=generator) < 0.01)
    result = downstream.row("worse", [worse], [base])
    only = (worse & ~base).double().mean().item()
    assert result["difference"] == pytest.approx(only)
    assert result["se"] == pytest.approx((only * (1 - only) / 4000) ** 0.5, rel=0.01)


def test_draws_give_every_digit_its_number():
    labels = torch.arange(10).repeat(30)
    chosen = downstream.draw(labels, 3, seed=0)
    assert labels[chosen].bincount().tolist() == [3] * 10
    assert len(chosen.unique()) == 30
    assert not torch.equal(chosen, downstream.draw(labels, 3, seed=1))


def test_best_together_passes_over_a_copy_and_best_alone_does_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (5000,), generator=generator)
    target = (labels == 3).float()
    strong, weak = (target + s * torch.randn(5000, generator=generator) for s in (0.5, 1.5))
    copy = strong + 0.1 * torch.randn(5000, generator=generator)
    noise = torch.randn(5000, 5, generator=generator)
    features = downstream.standardised(torch.cat([torch.stack([strong, copy, weak], 1), noise], 1), 5000)
    assert downstream.best_alone(features, labels, 2)[3].sort().values.tolist() == [0, 1]
    assert downstream.best_together(features, labels, 2)[3].tolist() == [0, 2]


def test_standardising_leaves_out_what_never_varies():
    features = torch.cat([torch.zeros(100, 1), torch.randn(100, 1)], 1)
    result = downstream.standardised(features, 80)
    assert not result[:, 0].any()
    assert result[:80, 1].std() == pytest.approx(1)


def test_winner_take_all_gives_every_feature_its_share_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 4, generator=generator) ** 4 @ torch.rand(4, 16, generator=generator)
    recipe = replace(
        sae.RECIPES["improved"], n_members=2, d_sae=32, k=32, epochs=100, batch_size=100, learning_rate=0.01,
        reinit="none", consistency_weight=0,
    )  # fmt: skip
    trainer = downstream.WinnerTakeAll(recipe, x)
    _, fires, _ = trainer.update(x[:100])
    assert (fires <= 5).all()
    assert fires.double().mean() > 4
    trainer.share = 0.25
    history = trainer.run(progress=False).history["mse"]
    assert (torch.tensor(history[-1]) < 0.5 * torch.tensor(history[0])).all()
