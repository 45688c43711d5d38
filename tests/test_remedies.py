"""The remedies for dead features that live with the benchmarks: re-initialisation of single features, AuxK."""

from __future__ import annotations

import common
import dead_features
import pytest
import torch
import torch.nn.functional as F
from test_training import D_SAE, EXACT, SMALL, draw, moments_of, parameters
from torch.testing import assert_close

RARE = torch.tensor([3, 17, 30])
FORGETFUL = (dead_features.MomentsAtZero, dead_features.WarmAgain, dead_features.AtImages)


def trained(kind=common.Restarts, steps=6, **changes):
    """A small trainer of this kind after some steps, in float64."""
    one = kind(dead_features.replace(SMALL, epochs=10, **changes), draw(100, 20))
    for _ in range(steps):
        one.train_step()
    return one


def missed(residuals):
    """By the definition, image by image: the worst first, each with the residuals that point the same way."""
    result = []
    for i in residuals.norm(dim=1).argsort(descending=True):
        cosines = [F.cosine_similarity(residuals[i], other, dim=0) for other in residuals]
        result.append(sum(c**8 * other for c, other in zip(cosines, residuals) if c > 0))
    return F.normalize(torch.stack(result), dim=1)


def test_restarted_features_leave_all_else_bit_identical():
    one = trained()
    before, moments, fires = parameters(one), [moments_of(one, m) for m in range(3)], one.fires.clone()
    one.restart_features(1, RARE)
    others = torch.ones(D_SAE, dtype=torch.bool)
    others[RARE] = False
    for m in range(3):
        kept = others if m == 1 else slice(None)
        for name in ("W", "b_enc"):
            assert torch.equal(getattr(one.model, name)[m][kept], before[name][m][kept])
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(moments_of(one, m)[name, key][kept], moments[m][name, key][kept])
    assert torch.equal(one.fires, fires) and one.started_anew == 3


def test_restarted_features_point_at_what_the_member_misses_and_are_like_the_others_in_all_else():
    one = trained()
    residuals = (one.x - one.model(one.x)[1]).detach()
    one.restart_features(1, RARE)
    others = [i for i in range(D_SAE) if i not in RARE.tolist()]
    W, b_enc, moments = one.model.W[1], one.model.b_enc[1], moments_of(one, 1)
    assert_close(one.model.features()[1, RARE], missed(residuals)[:3], **EXACT)  # all 100 images are candidates
    assert_close(W[RARE].norm(dim=1), W[others].norm(dim=1).mean().expand(3), **EXACT)
    assert_close(b_enc[RARE], b_enc[others].mean().expand(3), **EXACT)
    for name in ("W", "b_enc"):
        assert not moments[name, "exp_avg"][RARE].any()
        second = moments[name, "exp_avg_sq"]
        assert_close(second[RARE], second[others].mean(0).expand(second[RARE].shape), **EXACT)


def test_rare_features_start_anew_until_late_in_training():
    class Often(common.Restarts):
        look_every, until, rare = 5, 0.6, 1.0  # some features always fire less than the mean

    one, started = Often(dead_features.replace(SMALL, epochs=10), draw(100, 20)), []
    while one.step < one.total_steps:
        before = one.started_anew
        one.train_step()
        if one.started_anew > before:
            started.append(one.step)
    assert started == [5, 10, 15, 20]


def test_silent_features_come_back():
    class Soon(common.Restarts):
        look_every = 5

    one = trained(Soon, steps=0)
    with torch.no_grad():
        one.model.b_enc[2, RARE] = -100
    for _ in range(15):
        one.train_step()
    assert (one.model.b_enc[2, RARE] > -1).all() and (one.fires[2, RARE] > 0).all()


def test_dead_features_start_anew_at_the_residuals_of_the_worst_images():
    one = trained(dead_features.Resampling)
    residuals = (one.x - one.model(one.x)[1]).detach()
    worst = residuals[residuals.norm(dim=1).argsort(descending=True)[:3]]
    one.restart_features(1, RARE)
    assert_close(one.model.features()[1, RARE], F.normalize(worst, dim=1), **EXACT)


def test_published_choice_is_of_different_images_with_odds_that_grow_with_the_loss():
    one = trained(dead_features.AtImages)
    one.x[7] *= 1000  # its loss squared is all but the sum of all: it is drawn whatever the seed
    one.restart_features(1, RARE)
    cosines = one.model.features()[1, RARE] @ F.normalize(one.x - one.model.b_dec[1], dim=1).T
    best, images = cosines.max(1)
    assert_close(best, torch.ones(3).double(), **EXACT)
    assert 7 in images and len(images.unique()) == 3


@pytest.mark.parametrize(
    ("kind", "forgets"),
    [(dead_features.Resampling, False), *((kind, True) for kind in FORGETFUL)],
)
def test_only_some_restarts_forget_the_second_moment(kind, forgets):
    one = trained(kind)
    one.restart_features(1, RARE)
    for name in ("W", "b_enc"):
        assert bool(moments_of(one, 1)[name, "exp_avg_sq"][RARE].any()) is not forgets


def test_learning_rate_is_warmed_up_again_after_each_look():
    one = trained(dead_features.WarmAgain, steps=0)
    one.total_steps = 10**6
    for step, share in ((0, 1.0), (249, 1.0), (250, 0.01), (252, 0.03), (350, 1.0), (500, 0.01)):
        one.step = step
        assert one.learning_rates()[0] == pytest.approx(one.recipe.learning_rate * share)


def test_auxiliary_loss_reaches_dead_features_and_no_others():
    one = trained(dead_features.AuxK, steps=4, n_members=2)
    one.dead = torch.zeros(2, D_SAE, dtype=torch.bool)
    one.dead[1, RARE] = True
    loss = one.auxiliary(one.x, one.model(one.x), 1)
    gradients = dict(zip(("W", "b_enc"), torch.autograd.grad(loss, [one.model.W, one.model.b_enc])))
    for gradient in gradients.values():
        assert (gradient[1, RARE] != 0).flatten(1).any(1).all() if gradient.dim() == 3 else gradient[1, RARE].all()
        assert not gradient[1, ~one.dead[1]].any() and not gradient[0].any()


def test_effective_features_counts_equal_use():
    activity = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.2, 0.2, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0]])
    assert_close(common.effective_features(activity), torch.tensor([2.0, 4.0, 1.0]))
