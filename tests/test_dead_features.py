"""Dead features: counting what fires, the selection floor, the reference monitor and a member's restart."""

from __future__ import annotations

import pytest
import torch
from test_training import (
    D_IN,
    D_SAE,
    EXACT,
    K,
    N,
    assert_identical,
    batch,
    moments_of,
    parameters,
    trainer,
    twin,
)
from torch.testing import assert_close

import sae_helpers as sae

RARE = torch.tensor([3, 17, 30])
SILENT = -3.0  # a bias that keeps a feature from ever being among the k largest, as large as two mean values kept

every_k = pytest.mark.parametrize("k", [K, (2, 5, 9)], ids=["one k", "a k for each"])


def kept_by_hand(model, x, boost=None):
    """How many images fire each feature, and the sum of what is kept, image by image, from the definition."""
    counts, sums = torch.zeros(model.n_members, model.d_sae, dtype=torch.int64), [0.0] * model.n_members
    for m, k in enumerate(sae.per_member("k", model.k, model.n_members)):
        for image in x:
            y = (image - model.b_dec[m]) @ (torch.eye(D_IN).to(image) if model.A is None else model.A[0])
            pre = (model.W[m] @ y + model.b_enc[m]).detach()
            more = torch.zeros_like(pre) if boost is None else boost[m]
            for feature in (pre + more).argsort(descending=True)[:k].tolist():
                value = 2**-20 if more[feature] > 0 and pre[feature] < 0 else pre[feature].item()
                value = max(value, 0) if model.relu else value
                counts[m, feature] += value != 0
                sums[m] += value
    return counts, torch.tensor(sums, dtype=torch.float64)


# Activity and use


@every_k
@pytest.mark.parametrize("floor", [0, 0.9], ids=["no floor", "floor"])
@pytest.mark.parametrize("relu", [False, True])
def test_fires_use_and_scale_follow_a_computation_by_hand(relu, floor, k):
    one = trainer(double=True, relu=relu, k=k, selection_floor=floor, encoder_map=True)
    one.memory = 0.5  # so that features fall below the floor within a few steps
    with torch.no_grad():
        one.model.b_enc -= 1  # so that some kept values fall below zero
    helped = 0
    for _ in range(7):  # over the end of an epoch, whose last batch is smaller
        before, fires, use = twin(one), one.fires.clone(), one.use.clone()
        boost = one.boost()
        helped += (boost > 0).sum() if floor else 0
        one.train_step()
        counts, sums = kept_by_hand(before.model, batch(one), boost)
        assert torch.equal(one.fires - fires, counts)
        total = counts.sum(1)
        assert_close(one.use, 0.5 * use + 0.5 * counts.double() * D_SAE / total[:, None], **EXACT)
        assert_close(one.use.mean(1), torch.ones(3).double(), **EXACT)  # 1 is the mean feature
        assert_close(one.scale, sums / total, **EXACT)
    assert not floor or helped > 50
    every = 196 * torch.tensor(sae.per_member("k", k, 3))
    assert torch.equal(one.fires.sum(1), every) is not relu  # every image keeps k; with relu, fewer fire


def test_use_remembers_about_a_hundred_steps():
    one = trainer(double=True)
    one.train_step()
    assert_close(one.use, 0.99 + 0.01 * one.fires.double() * D_SAE / (K * 32), **EXACT)


def test_member_that_fires_nothing_has_no_use_and_goes_on():
    one = trainer(relu=True, selection_floor=0.2)
    with torch.no_grad():
        one.model.b_enc[1] = -100
    one.train_step()
    assert not one.fires[1].any() and one.scale[1] == 0
    assert_close(one.use[1], torch.full((D_SAE,), 0.99))
    for _ in range(3):
        one.train_step()
    assert all(tensor.isfinite().all() for tensor in one.model.parameters())


def test_evaluation_and_count_agree():
    one = trainer(steps=6)
    activity = sae.evaluate(one.model, one.x, one.x.mean(0), chunk=7)["activity"]
    assert_close(activity, kept_by_hand(one.model, one.x)[0] / N)


# The selection floor


def test_boost_is_the_stated_formula():
    one = trainer(selection_floor=0.2)
    one.use[:] = torch.tensor([0.0, 0.05, 0.1, 0.15, 0.2, 1.0, 2.0, 9.0]).repeat(D_SAE // 8)
    one.scale.copy_(torch.tensor([0.5, 1.0, 3.0]))
    for scale, row in zip((0.5, 1.0, 3.0), one.boost().tolist()):
        assert row[:8] == pytest.approx([4 * scale, 3 * scale, 2 * scale, scale, 0, 0, 0, 0], abs=1e-5)


def test_without_a_floor_there_is_no_boost():
    assert trainer(steps=6).boost() is None


def test_floor_that_is_never_reached_changes_nothing():
    low, none = (trainer(steps=6, selection_floor=floor) for floor in (0.9, 0))  # in six steps use stays above 0.94
    assert low.use.min() > 0.94
    assert_identical(low, none)


def silenced(floor, steps=90, **changes):
    """A trainer after some steps in which three features of member 1 were silent from the start."""
    one = trainer(double=True, selection_floor=floor, epochs=100, decay=0, learning_rate=0.02, **changes)
    one.memory = 0.8  # so that few steps are enough
    with torch.no_grad():
        one.model.b_enc[1, RARE] = SILENT
    for _ in range(steps):
        one.train_step()
    return one


@pytest.mark.parametrize(
    "changes", [{}, {"encoder_map": True, "row_moments": True}, {"relu": True}], ids=["plain", "map", "relu"]
)
def test_silenced_feature_comes_back_with_the_floor_and_stays_silent_without(changes):
    without, with_it = (silenced(floor, **changes) for floor in (0, 0.5))
    assert not without.fires[1, RARE].any() and without.use[1, RARE].max() < 1e-8
    assert (without.model.b_enc[1, RARE] == SILENT).all()
    assert (with_it.model.b_enc[1, RARE] > SILENT + 0.2).all() and (with_it.use[1, RARE] > 0.25).all()
    # A code is chosen without a boost: there too they fire now.
    activity = sae.evaluate(with_it.model, with_it.x, with_it.x.mean(0))["activity"]
    assert (activity[1, RARE] > 0).all()


def test_floor_leaves_members_without_silent_features_alone():
    helped, plain = silenced(0.01), silenced(0)
    for m in (0, 2):
        assert_close(helped.model.W[m], plain.model.W[m], **EXACT)
    assert (helped.model.W[1] != plain.model.W[1]).any()


# The reference monitor


def test_monitor_score_is_the_stated_formula():
    activity = torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [sum((abs(a - 0.0625) / 0.0625) ** 3 for a in row) / 9 for row in activity.tolist()]
    assert sae.monitor_score(activity).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("activity, score", [(0.0625, 0), (0.0, 1), (0.125, 1), (1.0, 3375)])
def test_monitor_score_of_one_feature(activity, score):
    assert sae.monitor_score(torch.tensor([[activity]])).item() == pytest.approx(score)


def test_monitor_restarts_the_members_above_its_threshold():
    plain = trainer(steps=1)
    scores = sae.monitor_score(plain.fires / 32)
    highest = scores.argmax().item()
    again = trainer(monitor=True)
    again.monitor_threshold = scores.sort().values[-2:].mean().item()  # one of the three lies above
    again.train_step()
    assert again.restarts == [(1, highest)]
    for m in range(3):
        assert torch.equal(again.model.W[m], plain.model.W[m]) is (m != highest)


def test_monitor_judges_each_batch_by_itself_whatever_its_size():
    plain = trainer(steps=3)
    before = plain.fires.clone()
    plain.train_step()
    assert len(batch(plain)) == 4  # the last of an epoch
    scores = sae.monitor_score((plain.fires - before) / 4)
    assert (scores > 2 * sae.monitor_score((plain.fires - before) / 32)).all()
    for share, restarts in ((0.99, [(4, 0), (4, 1), (4, 2)]), (1.01, [])):
        one = trainer(monitor=True, steps=3)
        one.monitor_threshold = share * (scores.min() if share < 1 else scores.max()).item()
        one.train_step()
        assert one.restarts == restarts


def test_monitor_that_never_fires_changes_nothing():
    watched, plain = (trainer(monitor=monitor) for monitor in (True, False))
    watched.monitor_threshold = 3376.0  # above what any activity can score
    for one in (watched, plain):
        one.run(progress=False)
    assert_identical(watched, plain)


def test_without_the_monitor_no_member_starts_anew():
    one = trainer()
    one.monitor_threshold = 0.0
    assert one.run(progress=False).restarts == []


def test_restarted_member_starts_anew_and_the_others_go_on():
    one = trainer(double=True, steps=6, row_moments=True)
    before, moments, plain = parameters(one), [moments_of(one, m) for m in range(3)], twin(one)
    use = one.use.clone()
    one.restart_member(1)
    W = one.model.W[1].detach()
    assert_close(W.mT @ W, torch.eye(D_IN, dtype=W.dtype), rtol=0, atol=1e-6)
    assert (before["W"][1] != W).any() and not one.model.b_enc[1].any()
    assert torch.equal(one.use[1], torch.ones(D_SAE).double()) and one.restarts == [(6, 1)]
    assert not any(moment.any() for moment in moments_of(one, 1).values())
    start = parameters(one)
    for m in (0, 2):
        assert all(torch.equal(start[name][m], tensor[m]) for name, tensor in before.items())
        assert all(torch.equal(moment, moments[m][key]) for key, moment in moments_of(one, m).items())
        assert torch.equal(one.use[m], use[m])

    # It goes on as a new member would, with a new Adam, on the same batches; the others as if nothing had been.
    one.share_every = plain.share_every = 10**9
    fresh = sae.TopKSAE(D_IN, D_SAE, K, seeds=(0,)).double()
    fresh.load_state_dict({name: tensor[1:2] for name, tensor in start.items()})
    adam = torch.optim.Adam(fresh.parameters())
    first = sae.mse(one.x, one.model(one.x))[1].item()
    for _ in range(9):
        adam.param_groups[0]["lr"] = one.learning_rates()[0]
        one.train_step()
        plain.train_step()
        adam.zero_grad()
        sae.mse(batch(one), fresh(batch(one))).sum().backward()
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


def test_restarts_draw_nothing_from_the_generator_of_the_batches():
    one, plain = (trainer(double=True, steps=2) for _ in range(2))
    one.restart_member(0)
    for both in (one, plain):
        both.run(progress=False)
    assert torch.equal(one.order, plain.order) and torch.equal(one.generator.get_state(), plain.generator.get_state())
    assert_close(one.model.W[1:], plain.model.W[1:], **EXACT)


def test_member_can_start_anew_before_the_first_step():
    one = trainer(selection_floor=0.2)
    one.restart_member(2)
    one.run(progress=False)
    assert one.restarts == [(0, 2)] and one.model.W.isfinite().all()
