"""Dead features: counting, the reference monitor, a member's restart, single features that start anew, AuxK."""

from __future__ import annotations

import dead_features
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_error
from test_training import D_IN, D_SAE, EXACT, K, N, assert_identical, moments_of, parameters, trainer, twin
from torch.testing import assert_close

import sae_helpers as sae

RARE = torch.tensor([3, 17, 30])


def fires_by_hand(model, x):
    """Counts, image by image and feature by feature, from the definition."""
    counts = torch.zeros(model.n_members, model.d_sae, dtype=torch.int64)
    for m in range(model.n_members):
        for image in x:
            pre = model.W[m] @ (image - model.b_dec[m]) + model.b_enc[m]
            for feature in pre.argsort(descending=True)[: model.k].tolist():
                counts[m, feature] += bool(pre[feature] > 0) or not model.relu
    return counts


# Activity


@pytest.mark.parametrize("relu", [False, True])
def test_activity_of_a_window_is_a_brute_force_count(relu):
    one = trainer(double=True, steps=6, relu=relu)
    if relu:
        with torch.no_grad():
            one.model.b_enc -= 1.5  # so that some kept values fall below zero
    expected, before, images = torch.zeros(3, D_SAE, dtype=torch.int64), one.fires.clone(), one.images_seen
    for _ in range(7):  # over the end of an epoch, whose last batch is smaller
        model, order = twin(one).model, one.order
        position = one.step % one.steps_per_epoch
        one.train_step()
        order = one.order if position == 0 else order
        expected += fires_by_hand(model, one.x[order[32 * position : 32 * (position + 1)]])
    assert torch.equal(one.fires - before, expected)
    assert one.images_seen - images == 32 + 4 + 100 + 32
    assert (expected.sum(1) == K * 168).all().item() is not relu  # every image keeps K features; with relu, fewer fire


@pytest.mark.parametrize("steps, images", [(0, 0), (1, 32), (3, 96), (4, 100), (5, 132), (8, 200)])
def test_images_seen(steps, images):
    assert trainer(steps=steps).images_seen == images


def test_evaluation_and_count_agree():
    one = trainer(steps=6)
    activity = sae.evaluate(one.model, one.x, one.x.mean(0), chunk=7)["activity"]
    assert_close(activity, fires_by_hand(one.model, one.x) / N)


# The reference monitor


def test_monitor_score_is_the_stated_formula():
    activity = torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [sum((abs(a - 0.0625) / 0.0625) ** 3 for a in row) / 9 for row in activity.tolist()]
    assert sae.monitor_score(activity).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("activity, score", [(0.0625, 0), (0.0, 1), (0.125, 1), (1.0, 3375)])
def test_monitor_score_of_one_feature(activity, score):
    assert sae.monitor_score(torch.tensor([[activity]])).item() == pytest.approx(score)


def test_monitor_restarts_the_members_above_its_threshold():
    one = trainer(steps=1, reinit="members")
    plain = twin(one)
    scores = sae.monitor_score(one.fires / 32)
    highest = scores.argmax().item()
    one.monitor_threshold = scores.sort().values[-2:].mean().item()  # one of the three lies above
    again = trainer(reinit="members")
    again.monitor_threshold = one.monitor_threshold
    again.train_step()
    assert again.reinits == [(1, [D_SAE if m == highest else 0 for m in range(3)])]
    for m in range(3):
        assert torch.equal(again.model.W[m], plain.model.W[m]) is (m != highest)


def test_monitor_that_never_fires_changes_nothing():
    watched, plain = (trainer(reinit=reinit) for reinit in ("members", "none"))
    watched.monitor_threshold = 3376.0  # above what any activity can score
    for one in (watched, plain):
        one.run(progress=False)
    assert_identical(watched, plain)


def test_restarted_member_starts_anew_and_the_others_go_on():
    one = trainer(double=True, steps=6)
    before, moments, plain = parameters(one), [moments_of(one, m) for m in range(3)], twin(one)
    one.restart_member(1)
    W = one.model.W[1].detach()
    assert_close(W.mT @ W, torch.eye(D_IN, dtype=W.dtype), rtol=0, atol=1e-6)
    assert (before["W"][1] != W).any() and not one.model.b_enc[1].any()
    assert torch.equal(one.model.b_dec[1], one.x.mean(0))
    start = parameters(one)
    for m in (0, 2):
        assert all(torch.equal(start[name][m], tensor[m]) for name, tensor in before.items())
        assert all(torch.equal(moment, moments[m][key]) for key, moment in moments_of(one, m).items())

    # It goes on as a new member would, with a new Adam, on the same batches; the others as if nothing had been.
    fresh = sae.TopKSAE(D_IN, D_SAE, K, seeds=(0,), b_dec=torch.zeros(D_IN)).double()
    fresh.load_state_dict({name: tensor[1:2] for name, tensor in start.items()})
    adam = torch.optim.Adam(fresh.parameters())
    first = sae.mse(one.x, one.model(one.x))[1].item()
    for _ in range(9):
        adam.param_groups[0]["lr"] = one.learning_rates()[0]
        one.train_step()
        plain.train_step()
        position = (one.step - 1) % one.steps_per_epoch
        x = one.x[one.order[32 * position : 32 * (position + 1)]]
        adam.zero_grad()
        sae.mse(x, fresh(x)).sum().backward()
        adam.step()
    for name, tensor in fresh.state_dict().items():
        assert_close(one.model.state_dict()[name][1], tensor[0], rtol=0, atol=1e-10)
        for m in (0, 2):
            assert_close(one.model.state_dict()[name][m], plain.model.state_dict()[name][m], **EXACT)
    assert sae.mse(one.x, one.model(one.x))[1].item() < 0.9 * first


def test_restarts_at_different_steps_differ():
    one = trainer(steps=2)
    one.restart_member(0)
    first = one.model.W[0].clone()
    one.train_step()
    one.restart_member(0)
    one.restart_member(1)
    assert (one.model.W[0] != first).any() and (one.model.W[0] != one.model.W[1]).any()


# Single features


def test_reinitialised_features_leave_all_else_bit_identical():
    one = trainer(steps=6)
    before, moments = parameters(one), [moments_of(one, m) for m in range(3)]
    fires, generator = one.fires.clone(), one.generator.get_state()
    one.reinit_features(1, RARE)
    others = torch.ones(D_SAE, dtype=torch.bool)
    others[RARE] = False
    for m in range(3):
        kept = others if m == 1 else slice(None)
        for name in ("W", "b_enc"):
            assert torch.equal(getattr(one.model, name)[m][kept], before[name][m][kept])
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(moments_of(one, m)[name, key][kept], moments[m][name, key][kept])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments_of(one, m)["b_dec", key], moments[m]["b_dec", key])
    assert torch.equal(one.model.b_dec, before["b_dec"]) and torch.equal(one.fires, fires)
    assert torch.equal(one.generator.get_state(), generator)
    assert one.reinits == [(6, [0, 3, 0])]


def missed(residuals):
    """By the definition, image by image: the worst first, each with the residuals that point the same way."""
    result = []
    for i in residuals.norm(dim=1).argsort(descending=True):
        cosines = [F.cosine_similarity(residuals[i], other, dim=0) for other in residuals]
        result.append(sum(c**8 * other for c, other in zip(cosines, residuals) if c > 0))
    return F.normalize(torch.stack(result), dim=1)


def test_reinitialised_features_point_at_what_the_member_misses():
    one = trainer(double=True, steps=6)
    residuals = (one.x - one.model(one.x)[1]).detach()
    one.reinit_features(1, RARE)
    # All 100 images are candidates here, so the three worst are taken.
    assert_close(one.model.features()[1, RARE], missed(residuals)[:3], **EXACT)


def test_reinitialised_features_are_like_the_others_in_all_but_direction():
    one = trainer(double=True, steps=6)
    one.reinit_features(1, RARE)
    others = [i for i in range(D_SAE) if i not in RARE.tolist()]
    W, b_enc, moments = one.model.W[1], one.model.b_enc[1], moments_of(one, 1)
    assert_close(W[RARE].norm(dim=1), W[others].norm(dim=1).mean().expand(3), **EXACT)
    assert_close(b_enc[RARE], b_enc[others].mean().expand(3), **EXACT)
    for name in ("W", "b_enc"):
        assert not moments[name, "exp_avg"][RARE].any()
        second = moments[name, "exp_avg_sq"]
        assert_close(second[RARE], second[others].mean(0).expand(second[RARE].shape), **EXACT)


def test_reinitialised_features_take_no_longer_steps_than_the_others():
    one = trainer(double=True, steps=40, epochs=40)
    one.reinit_features(1, RARE)
    longest = torch.zeros(D_SAE, dtype=torch.float64)
    for _ in range(20):
        before = one.model.W[1].detach().clone()
        one.train_step()
        longest = longest.maximum((one.model.W[1].detach() - before).abs().mean(1))
    assert longest[RARE].max() < 2 * longest.max() and longest[RARE].max() < 2 * one.learning_rates()[0]


def test_features_can_start_anew_before_the_first_step():
    one = trainer()
    one.reinit_features(0, RARE)
    one.train_step()
    assert one.model.W.isfinite().all()


@pytest.mark.parametrize("n", [D_SAE - 1, 20])
def test_many_features_at_once_start_in_different_directions(n):
    one = trainer(steps=6)
    one.reinit_features(0, torch.arange(n))
    similarity = one.model.features()[0, :n] @ one.model.features()[0, :n].T
    assert (similarity - torch.eye(n)).max() < 0.999


def test_training_reinitialises_rare_features_through_one_argument():
    one = trainer(double=True, reinit="features", epochs=10, decay=0.5)
    one.look_every = 5
    with torch.no_grad():
        one.model.b_enc[2, RARE] = -100  # dead from the start
    for _ in range(5):
        one.train_step()
    step, counts = one.reinits[0]
    rare = one.fires < one.rare * one.fires.double().mean(1, keepdim=True)
    assert rare[2, RARE].all() and step == 5
    assert counts == rare.sum(1).tolist()
    assert (one.model.b_enc[2, RARE] > -1).all()
    before = one.fires.clone()
    for _ in range(10):
        one.train_step()
    assert ((one.fires - before)[2, RARE] > 0).all()


def with_rare(rare, **changes):
    """A trainer just before a look at which exactly the features of `rare` (by member) have not fired."""
    one = trainer(double=True, steps=6, reinit="features", epochs=10, **changes)
    one.fires_at_last_look = one.fires - 100
    for m, features in rare.items():
        one.fires_at_last_look[m, features] = one.fires[m, features]
    return one


def test_with_the_consistency_loss_a_rare_feature_joins_its_living_partners():
    one = with_rare({0: [3], 1: [3, 17]}, consistency_weight=0.01)
    before = one.model.features()
    one.reinit_rare_features()
    after = one.model.features()
    assert one.reinits == [(6, [1, 2, 0])]
    assert_close(after[0, 3], before[2, 3], **EXACT)  # its only living partner
    assert_close(after[1, 3], before[2, 3], **EXACT)  # two partners now, in the same direction
    assert_close(after[1, 17], F.normalize(before[0, 17] + before[2, 17], dim=0), **EXACT)


def test_with_the_consistency_loss_a_feature_that_is_rare_everywhere_stays_common():
    one = with_rare({m: [30] for m in range(3)}, consistency_weight=0.01)
    residuals = (one.x - one.model(one.x)[0]).detach()
    one.reinit_rare_features()
    after = one.model.features()[:, 30]
    assert_close(after[0], missed(residuals)[0], **EXACT)
    assert_close(after[1:], after[:1].expand(2, -1), **EXACT)


def test_without_the_consistency_loss_each_member_goes_its_own_way():
    one = with_rare({m: [30] for m in range(3)})
    one.reinit_rare_features()
    after = one.model.features()[:, 30]
    assert (after @ after.T - torch.eye(3)).max() < 0.999


def test_all_features_at_once_are_an_error():
    with one_line_error(f"all {D_SAE} features of member 1", "restart_member"):
        trainer(steps=1).reinit_features(1, torch.arange(D_SAE))


def test_no_feature_starts_anew_after_the_share_of_the_steps_that_the_recipe_names():
    one = trainer(reinit="features", epochs=10, reinit_until=0.6)  # 24 of 40 steps
    one.look_every, one.rare = 5, 1.0  # some features always fire less than the mean
    one.run(progress=False)
    assert [step for step, _ in one.reinits] == [5, 10, 15, 20]


def test_a_window_in_which_no_feature_is_rare_changes_nothing():
    watched, plain = (trainer(reinit=reinit, epochs=10) for reinit in ("features", "none"))
    watched.look_every, watched.rare = 5, 0.0
    for one in (watched, plain):
        one.run(progress=False)
    assert_identical(watched, plain)


def test_alignment_moves_the_counts_of_the_window_too():
    one = trainer(steps=6, reinit="features")
    one.fires_at_last_look = one.fires - torch.arange(3 * D_SAE).view(3, D_SAE)
    before = {tuple(row.tolist()) for row in torch.stack([one.fires[2], one.fires_at_last_look[2]], 1)}
    one.align_members()
    assert {tuple(row.tolist()) for row in torch.stack([one.fires[2], one.fires_at_last_look[2]], 1)} == before


# AuxK, which lives with the benchmark


def auxk(recipe_changes):
    plain = trainer(double=True, steps=4, **recipe_changes)
    return dead_features.AuxK(plain.recipe, plain.x)


def test_auxiliary_loss_reaches_dead_features_and_no_others():
    one = auxk({"n_members": 2})
    one.dead = torch.zeros(2, D_SAE, dtype=torch.bool)
    one.dead[1, RARE] = True
    x_hat = one.model(one.x)
    loss = one.auxiliary(one.x, x_hat, 1)
    gradients = dict(zip(("W", "b_enc"), torch.autograd.grad(loss, [one.model.W, one.model.b_enc])))
    for gradient in gradients.values():
        assert (gradient[1, RARE] != 0).flatten(1).any(1).all() if gradient.dim() == 3 else gradient[1, RARE].all()
        assert not gradient[1, ~one.dead[1]].any() and not gradient[0].any()
    (b_dec,) = torch.autograd.grad(one.auxiliary(one.x, one.model(one.x), 1), [one.model.b_dec], allow_unused=True)
    assert b_dec is None or not b_dec.any()
