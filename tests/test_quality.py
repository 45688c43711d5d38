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
    return {name: result[name].mean().item() for name in ("mse", "pearson", "dead_fraction")}


def test_reference_recipe_reconstructs_as_published(mnist):
    reached = quality(mnist, "reference", n_members=1)
    assert reached["pearson"] >= 0.972
    assert reached["mse"] <= 0.0050


def test_improved_recipe_reconstructs_better_with_few_dead_features(mnist):
    reached = quality(mnist, "improved")
    assert reached["pearson"] >= 0.979
    assert reached["mse"] <= 0.0041
    assert reached["dead_fraction"] <= 0.01


def test_without_the_consistency_loss_it_is_better_still(mnist):
    reached = quality(mnist, "improved", consistency_weight=0)
    assert reached["pearson"] >= 0.979
    assert reached["mse"] <= 0.0040
    assert reached["dead_fraction"] <= 0.005
