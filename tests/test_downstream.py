"""The parts of benchmarks/downstream.py that its conclusions rest on."""

from __future__ import annotations

from dataclasses import replace

import downstream
import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("encoder_map", [False, True])
def test_codes_of_members_stand_side_by_side(encoder_map):
    torch.manual_seed(0)
    model = sae.TopKSAE(12, 20, 3, seeds=(0, 1), b_dec=torch.rand(12), encoder_map=encoder_map)
    if encoder_map:
        model.A.data += 0.3 * torch.randn(1, 12, 12)
    x = torch.rand(9, 12)
    values, indices = model.encode(x)
    both = downstream.codes(model, x, [1, 0], 3, downstream.hard).detach()
    expected = torch.zeros(2, 9, 20).scatter_(2, indices, values).detach()
    assert torch.allclose(both, torch.cat([expected[1], expected[0]], 1), atol=1e-6)
    assert torch.allclose(downstream.pre_activations(model, 1, x), model.pre_activations(x)[1], atol=1e-6)


@pytest.fixture
def halves(problem, monkeypatch):
    """The problem as a data set whose first 1,000 training images are fitted on."""
    features, labels = problem
    monkeypatch.setattr(downstream, "CHOOSE_ON", 1000)
    return sae.Images("blobs", (5, 6), features, labels, features[:0], labels[:0])


def test_svm_reads_far_more_than_chance_with_few_and_with_many_features(problem):
    features, labels = problem
    for one in (features, torch.cat([features, torch.zeros(1200, 1000)], 1)):
        model = downstream.support_vectors(downstream.scaled(one.clone(), 1000)[:1000], labels[:1000], 1e-3)
        assert model.score(one[1000:].numpy(), labels[1000:].numpy()) > 0.4  # chance is 0.1


def test_penalty_means_the_same_for_both_classifiers_whatever_the_number_of_images(problem):
    features, labels = problem
    for fit in (downstream.support_vectors, downstream.logistic):
        once, twice = (fit(features.repeat(n, 1), labels.repeat(n), 1e-2).coef_ for n in (1, 2))
        assert np.abs(once - twice).max() < 0.02 * np.abs(once).max()


def test_strength_is_the_best_on_the_held_out_images(halves, monkeypatch):
    errors = {}
    for strengths in ((10.0,), (1e-3,), (10.0, 1e-3)):
        monkeypatch.setattr(downstream, "STRENGTHS", strengths)
        read, strength = downstream.held_out(halves, halves.train.clone())
        errors[strengths] = (read != halves.train_labels[1000:]).sum().item(), strength
    assert errors[10.0, 1e-3] == min(errors[(10.0,)], errors[(1e-3,)])


def test_scaling_needs_no_look_at_held_out_images(problem):
    features, _ = problem
    other = features.clone()
    other[1000:] *= 10
    assert torch.equal(downstream.scaled(features.clone(), 1000)[:1000], downstream.scaled(other, 1000)[:1000])


def test_held_out_labels_do_not_reach_the_classifier(halves, monkeypatch):
    monkeypatch.setattr(downstream, "STRENGTHS", (1e-3,))
    labels = torch.cat([halves.train_labels[:1000], halves.train_labels[1000:].flip(0)])
    other = replace(halves, train_labels=labels)
    first, second = (downstream.held_out(one, one.train.clone())[0] for one in (halves, other))
    assert torch.equal(first, second)


def test_interval_covers_the_true_error_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [downstream.interval(wrong, 1000) for wrong in generator.binomial(1000, 0.02, 400)]
    covered = np.mean([i["low"] <= 0.02 <= i["high"] for i in intervals])
    assert 0.92 <= covered <= 0.98


def test_difference_comes_with_its_paired_standard_error(halves):
    generator = torch.Generator().manual_seed(0)
    truth = halves.train_labels[1000:]
    base = torch.where(torch.rand(200, generator=generator) < 0.2, (truth + 1) % 10, truth)
    worse = torch.where(torch.rand(200, generator=generator) < 0.1, (truth + 1) % 10, base)
    result = downstream.row(halves, "worse", [worse], [base])
    only = (worse != base).double().mean().item()
    assert 0 < result["difference"] == pytest.approx(only)
    assert result["se"] == pytest.approx((only * (1 - only) / 200) ** 0.5, rel=0.01)


def test_representations_of_all_images_come_with_the_test_images(halves, monkeypatch):
    monkeypatch.setattr(downstream, "train", lambda recipe, x: pytest.fail("pixels need no autoencoder"))
    every = downstream.representations(halves, on_all=True)
    assert every["raw pixels"]().shape == (len(halves.train) + len(halves.test), 30)
    assert set(downstream.FEW) < set(every)


def test_principal_components_rebuild_best(problem):
    features, _ = problem
    found = downstream.principal_components(features, 1000, 3)
    centred = features - features[:1000].mean(0)
    largest = torch.linalg.svdvals(centred[:1000])[:3].square()
    assert torch.allclose(found[:1000].square().sum(0), largest, rtol=1e-3)


def test_draws_give_every_digit_its_number():
    labels = torch.arange(10).repeat(30)
    chosen = downstream.draw(labels, 3, seed=0)
    assert labels[chosen].bincount().tolist() == [3] * 10
    assert len(chosen.unique()) == 30
    assert not torch.equal(chosen, downstream.draw(labels, 3, seed=1))


def test_best_together_passes_over_a_copy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (5000,), generator=generator)
    target = (labels == 3).float()
    strong, weak = (target + s * torch.randn(5000, generator=generator) for s in (0.5, 1.5))
    copy = strong + 0.1 * torch.randn(5000, generator=generator)
    noise = torch.randn(5000, 5, generator=generator)
    features = downstream.standardised(torch.cat([torch.stack([strong, copy, weak], 1), noise], 1), 5000)
    assert downstream.best_together(features, labels, 2)[3].tolist() == [0, 2]


def test_standardising_leaves_out_what_never_varies():
    features = torch.cat([torch.zeros(100, 1), torch.randn(100, 1)], 1)
    result = downstream.standardised(features, 80)
    assert not result[:, 0].any()
    assert result[:80, 1].std() == pytest.approx(1)


def test_few_labels_and_few_features_read_more_than_chance(problem):
    features, labels = problem
    few = downstream.with_few_labels(downstream.scaled(features.clone(), 1000), labels, 1000, 10, 1e-3, range(2))
    assert len(few) == 2 and max(few) < 0.75  # chance is 0.9
    found = downstream.with_few_features(features, labels, 1000)
    assert list(found) == list(downstream.PER_CLASS)
    assert found[1]["features"] <= 10 and found[20]["error"] < found[1]["error"] < 0.85
