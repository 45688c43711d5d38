"""What the recipes reach on the real MNIST, with room for other machines' rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest

import sae_helpers as sae

pytestmark = pytest.mark.slow


def quality(mnist, recipe, **changes):
    """Means over the members, on the test images."""
    trainer = sae.Trainer(replace(sae.RECIPES[recipe], **changes), mnist.train).run(progress=False)
    result = sae.evaluate(trainer.model, mnist.test, mnist.train.mean(0))
    reached = {name: result[name].mean().item() for name in ("mse", "pearson", "dead_fraction", "rare_fraction")}
    return {**reached, "matched_cosine": sae.matched_cosine(trainer.model.features())}


def test_reference_recipe_reconstructs_as_published_and_uses_half_of_its_features(mnist):
    reached = quality(mnist, "reference", n_members=1)
    assert reached["pearson"] >= 0.972
    assert reached["mse"] <= 0.0050
    assert 0.48 <= reached["rare_fraction"] <= 0.56


def test_improved_recipe_reconstructs_better_and_its_members_agree_on_features_that_all_fire(mnist):
    reached = quality(mnist, "improved")
    assert reached["pearson"] >= 0.981
    assert reached["dead_fraction"] <= 0.002
    assert reached["rare_fraction"] <= 0.025
    assert reached["matched_cosine"] >= 0.85


def test_without_the_consistency_loss_it_is_better_still(mnist):
    reached = quality(mnist, "improved", consistency_weight=0, n_members=2)
    assert reached["pearson"] >= 0.9815
    assert reached["rare_fraction"] <= 0.02
