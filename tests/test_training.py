"""Training: the consistency loss, the alignment of members, determinism, schedule, moments, precision, settings."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from conftest import one_line_error
from torch.testing import assert_close

import sae_helpers as sae

D_IN, D_SAE, K, N = 20, 32, 5, 100
# 100 images in batches of 32 are four steps an epoch, the last one of four images.
SMALL = sae.Recipe(
    "small", encoder_map=False, row_moments=False, selection_floor=0, learning_rate=5e-3, decay=0.5, d_sae=D_SAE, k=K,
    n_members=3, epochs=4, batch_size=32, consistency_weight=0, match_every=5,
)  # fmt: skip
ALL = dict(encoder_map=True, row_moments=True, selection_floor=0.5, consistency_weight=0.01)  # that a recipe can switch
EXACT = dict(rtol=0, atol=1e-12)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trainer(double=False, steps=0, **changes):
    """A small trainer after some steps; in float64, so that rounding hides nothing, where asked for."""
    x = draw(N, D_IN).float()
    result = sae.Trainer(replace(SMALL, **changes), x.double() if double else x)
    for _ in range(steps):
        result.train_step()
    return result


def twin(of):
    """Another trainer that stands where `of` stands."""
    result = sae.Trainer(of.recipe, of.x)
    result.model.load_state_dict(of.model.state_dict())
    result.optimizer.load_state_dict(copy.deepcopy(of.optimizer.state_dict()))
    result.generator.set_state(of.generator.get_state())
    for name in ("fires", "use", "scale"):
        getattr(result, name).copy_(getattr(of, name))
    for name in ("order", "step", "restarts", "history"):
        setattr(result, name, copy.deepcopy(getattr(of, name)))
    return result


def batch(one):
    """The images of the step that was just taken."""
    position = (one.step - 1) % one.steps_per_epoch
    return one.x[one.order[position * one.recipe.batch_size : (position + 1) * one.recipe.batch_size]]


def parameters(of):
    return {name: tensor.detach().clone() for name, tensor in of.model.state_dict().items()}


def moments_of(of, m):
    """Adam's moments of member m: copies, by parameter and kind."""
    return {
        (name, key): of.optimizer.state[part][key].clone()
        for name, part in of.parts[m].items()
        for key in ("exp_avg", "exp_avg_sq")
    }


def assert_identical(a, b):
    for name, tensor in a.model.state_dict().items():
        assert torch.equal(tensor, b.model.state_dict()[name]), name
    states = [
        [one.optimizer.state.get(p, {}) for g in one.optimizer.param_groups for p in g["params"]] for one in (a, b)
    ]
    for state, other in zip(*states, strict=True):
        for name, tensor in state.items():
            assert torch.equal(tensor, other[name]), name
    for name in ("fires", "use", "scale"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.history == b.history and a.step == b.step and a.restarts == b.restarts


def consistency(W):
    """The definition: mean over pairs of members of 1 - mean cosine similarity of their features."""
    pairs = itertools.combinations(F.normalize(W, dim=-1), 2)
    return torch.stack([1 - (a * b).sum(-1).mean() for a, b in pairs]).mean()


# The consistency loss


@pytest.mark.parametrize("n_members", [2, 3, 5])
def test_consistency_gradient_is_autograds(n_members):
    W = (draw(n_members, D_SAE, D_IN) * draw(n_members, D_SAE, 1, seed=1).exp()).requires_grad_()
    loss = consistency(W)
    (gradient,) = torch.autograd.grad(loss, W)
    before = draw(n_members, D_SAE, D_IN, seed=2)
    W.grad = before.clone()
    value = sae.add_consistency_gradient(W, 0.3)
    assert_close(value, loss.detach(), **EXACT)
    assert gradient.abs().max() > 1e-3
    assert_close(W.grad - before, 0.3 * gradient, **EXACT)


def test_equal_members_are_consistent():
    W = draw(1, D_SAE, D_IN).repeat(3, 1, 1) * torch.tensor([1.0, 2.0, 0.5]).double()[:, None, None]
    W.requires_grad_().grad = torch.zeros_like(W)
    assert sae.add_consistency_gradient(W, 1.0).item() == pytest.approx(0, abs=1e-12)
    assert_close(W.grad, torch.zeros_like(W), **EXACT)


@pytest.mark.parametrize("step, share", [(1, 0.5 * (1 - math.cos(math.pi / 4))), (2, 0.5), (4, 1.0), (9, 1.0)])
def test_training_adds_the_consistency_gradient_and_warms_it_up(step, share):
    # A weight that rounding swallows, so that the other steps (alignment among them) are the same.
    with_loss, without = (
        trainer(double=True, steps=1, consistency_weight=weight, consistency_warmup=4) for weight in (0.1, 1e-30)
    )
    assert torch.equal(with_loss.model.W, without.model.W)  # at step 0 the weight is 0
    with_loss.step = without.step = step
    W = with_loss.model.W.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(consistency(W), W)
    for one in (with_loss, without):
        one.train_step()
    assert_close(with_loss.model.W.grad - without.model.W.grad, 0.1 * share * gradient, **EXACT)


def test_training_with_the_consistency_loss_makes_members_alike():
    cosines = [
        sae.matched_cosine(trainer(steps=16, consistency_weight=weight, consistency_warmup=1).model.features())
        for weight in (0.0, 1.0)
    ]
    assert cosines[1] > cosines[0] + 0.05


def test_one_member_has_nothing_to_agree_with():
    assert_identical(
        trainer(steps=6, n_members=1, consistency_weight=0.1), trainer(steps=6, n_members=1, consistency_weight=0)
    )


# Alignment of members


def test_alignment_moves_features_with_their_moments():
    one = trainer(steps=6)
    moments = [moments_of(one, m) for m in range(3)]
    before, fires, use = parameters(one), one.fires.clone(), one.use.clone()
    one.align_members()
    assert torch.equal(one.model.W[0], before["W"][0])
    for m in range(3):
        order = torch.cdist(one.model.W[m].detach(), before["W"][m]).argmin(1)
        assert m == 0 or (order != torch.arange(D_SAE)).any()  # else nothing is shown
        assert torch.equal(order.sort().values, torch.arange(D_SAE))
        assert torch.equal(one.fires[m], fires[m, order]) and torch.equal(one.use[m], use[m, order])
        for name in ("W", "b_enc"):
            assert torch.equal(getattr(one.model, name)[m], before[name][m, order])
            for key in ("exp_avg", "exp_avg_sq"):
                assert moments[m][name, key].any()
                assert torch.equal(moments_of(one, m)[name, key], moments[m][name, key][order])


@pytest.mark.parametrize("shared", [False, True])
def test_weights_of_a_row_share_their_second_moment_where_asked_for(shared):
    one, plain = trainer(double=True, steps=10, row_moments=shared), trainer(double=True, steps=10)
    for steps in (1, 4):  # after step 10 the weights of a row have one moment; then they part, until step 20
        for _ in range(steps):
            one.train_step()
            plain.train_step()
        for part in one.parts:
            v = one.optimizer.state[part["W"]]["exp_avg_sq"]
            within = v.std(1) / v.mean(1)  # of a row
            assert (within < 1e-12).all() == (shared and steps == 1)
            assert v.mean(1).std() > 0.01 * v.mean()  # each row has its own
    assert shared == (one.model.W != plain.model.W).any()
    assert torch.equal(one.optimizer.state[one.parts[0]["b_enc"]]["step"], torch.tensor(15.0))


def test_sharing_keeps_the_mean_and_leaves_the_biases_alone():
    one = trainer(double=True, steps=6)
    before = [moments_of(one, m) for m in range(3)]
    one.share_second_moments()
    for m in range(3):
        after = moments_of(one, m)
        mean = before[m]["W", "exp_avg_sq"].mean(1, keepdim=True)
        assert_close(after["W", "exp_avg_sq"], mean.expand(-1, D_IN), rtol=1e-12, atol=0)
        for key in before[m].keys() - {("W", "exp_avg_sq")}:
            assert torch.equal(after[key], before[m][key]), key


def test_alignment_changes_no_reconstruction():
    one = trainer(double=True, steps=6, **ALL)
    before = one.model(one.x).detach()
    one.align_members()
    assert_close(one.model(one.x).detach(), before, **EXACT)


def test_training_goes_on_after_alignment_as_if_nothing_had_happened():
    aligned = trainer(double=True, steps=6, **ALL | {"consistency_weight": 0})
    plain = twin(aligned)
    aligned.align_members()
    assert (aligned.model.W != plain.model.W).any()
    for one in (aligned, plain):
        one.train_step()
    assert_close(aligned.model(aligned.x), plain.model(plain.x), **EXACT)


def test_alignment_finds_the_copies_of_a_feature():
    one = trainer()
    with torch.no_grad():
        one.model.W[1], one.model.W[2] = one.model.W[0].flip(0), one.model.W[0].roll(5, 0)
    one.align_members()  # before the first step, when the optimizer holds nothing yet
    assert torch.equal(one.model.W[1], one.model.W[0]) and torch.equal(one.model.W[2], one.model.W[0])


def test_each_member_stands_beside_the_sum_of_those_before_it():
    one = trainer(steps=6)
    one.align_members()
    features = one.model.features()
    for m in (1, 2):
        order, _ = sae.match_features(features[:m].sum(0), features[m], exact=False)
        assert torch.equal(order, torch.arange(D_SAE))


def test_members_are_aligned_as_often_as_the_recipe_says():
    one = trainer(consistency_weight=0.1, consistency_warmup=1000)
    aligned_at, align = [], one.align_members
    one.align_members = lambda: (aligned_at.append(one.step), align())
    for _ in range(11):
        one.train_step()
    assert aligned_at == [0, 5, 10]


@pytest.mark.parametrize("members", [1, 3])
def test_training_that_diverges_is_named(members):
    # Features that are no numbers cannot be matched, and their quality is no JSON.
    diverging = trainer(**ALL | {"learning_rate": 1e12, "consistency_weight": 0.1, "n_members": members})
    with one_line_error("no longer a number", "learning_rate", 1e12):
        diverging.run(progress=False)


def test_learning_rate_at_which_weights_overflow_unseen_is_refused():
    # Rows whose length is infinite decode to the mean image, which is a number.
    with one_line_error("learning_rate is 1e+19"):
        trainer(learning_rate=1e19)
    assert trainer(learning_rate=1e12).run(progress=False).model.W.norm(dim=-1).isfinite().all()


# Members and seeds


def test_ensemble_trains_like_separate_members():
    together = trainer(double=True)
    start = parameters(together)["W"]
    for _ in range(10):
        together.train_step()
    for m in range(3):
        alone = trainer(double=True, n_members=1)
        with torch.no_grad():
            alone.model.W[0] = start[m]
        for _ in range(10):
            alone.train_step()
        assert_close(alone.model.W[0], together.model.W[m], rtol=0, atol=1e-10)
        assert_close(alone.model.b_enc[0], together.model.b_enc[m], rtol=0, atol=1e-10)


def test_member_does_not_depend_on_the_size_of_the_ensemble():
    assert torch.equal(trainer(n_members=5).model.W[:2], trainer(n_members=2).model.W)


def test_ensembles_of_different_seeds_share_no_member():
    starts = {tuple(W[0].tolist()) for seed in range(20) for W in trainer(seed=seed).model.W}
    assert len(starts) == 20 * 3


def test_same_seed_gives_the_same_training():
    assert_identical(*(trainer(steps=10, seed=7, **ALL) for _ in range(2)))


def test_other_seed_gives_another_training():
    a, b = (trainer(steps=10, seed=seed) for seed in (7, 8))
    assert (a.model.W != b.model.W).any() and (a.order != b.order).any()


# Steps and epochs


def test_every_epoch_shows_every_image_once():
    one = trainer()
    assert (one.steps_per_epoch, one.total_steps) == (4, 16)
    orders = []
    for _ in range(2):
        for _ in range(4):
            one.train_step()
        orders.append(one.order)
        assert torch.equal(one.order.sort().values, torch.arange(N))
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize("encoder_map", [False, True])
def test_step_is_one_step_of_adam_on_the_batch(encoder_map):
    one = trainer(double=True, encoder_map=encoder_map)
    reference = sae.TopKSAE(D_IN, D_SAE, K, seeds=(0,) * 3, encoder_map=encoder_map).double()
    reference.load_state_dict(one.model.state_dict())
    groups = [{"params": [p], "lr": SMALL.learning_rate / 4 ** (n == "A")} for n, p in reference.named_parameters()]
    optimizer = torch.optim.Adam(groups)
    for _ in range(3):  # A's gradient is one of all members
        one.train_step()
        optimizer.zero_grad()
        sum(F.mse_loss(x_hat, batch(one)) for x_hat in reference.decode(*reference.encode(batch(one)))).backward()
        optimizer.step()
    for name, tensor in reference.state_dict().items():
        assert_close(one.model.state_dict()[name], tensor, rtol=0, atol=1e-10)
    assert not encoder_map or (torch.eye(D_IN) != one.model.A).all()


def test_run_trains_to_the_end_and_reports_each_epoch():
    seen = []
    one = trainer()
    assert one.run(progress=False, after_epoch=lambda t: seen.append((t, t.step))) is one
    assert seen == [(one, 4), (one, 8), (one, 12), (one, 16)]
    first, last = one.history["mse"][0], one.history["mse"][-1]
    assert all(b < 0.8 * a for a, b in zip(first, last))


def test_run_goes_on_from_where_training_stands():
    one = trainer(steps=6, **ALL)
    assert_identical(one.run(progress=False), trainer(**ALL).run(progress=False))
    assert one.step == 16
    assert_identical(one.run(progress=False), twin(one))  # and at the end there is nothing left to do


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_only_where_asked_for(progress, capsys):
    trainer().run(progress=progress)
    assert bool(capsys.readouterr().err) is progress


def test_history_is_measured_before_every_tenth_step():
    one = trainer(epochs=6, steps=10)
    model = twin(one).model
    one.run(progress=False)
    assert one.history["step"] == [0, 10, 20]
    x = one.x[twin_order(one, 10)]
    assert_close(torch.tensor(one.history["mse"][1]), sae.mse(x, model(x)).detach())
    assert_close(torch.tensor(one.history["pearson"][1]), sae.pearson(x, model(x)).detach())
    assert all(len(values) == 3 for values in one.history.values())
    assert json.loads(json.dumps(one.history, allow_nan=False)) == one.history


@pytest.mark.parametrize("relu", [False, True])
def test_history_counts_dead_and_rare_features_by_their_use(relu):
    one = trainer(double=True, relu=relu, k=(2, 5, 9))
    one.log_every, one.memory = 1, 0.01  # a feature that is not used is dead after three steps
    with torch.no_grad():
        one.model.b_enc -= 1.5 * relu  # so that not all kept values are above zero
    seen = []
    for _ in range(16):
        before = one.fires.clone()
        one.train_step()
        share = one.use / one.use.sum(1, keepdim=True) * (one.fires - before).sum(1, keepdim=True) / len(batch(one))
        for name, limit in (("dead_fraction", 1e-5), ("rare_fraction", 1e-3)):
            expected = [sum(value < limit for value in member) / D_SAE for member in share.tolist()]
            assert one.history[name][-1] == pytest.approx(expected, rel=1e-6)
            seen += expected
    assert len(set(seen)) > 5


def test_consistency_of_history_is_the_loss_before_the_step():
    one = trainer(double=True, consistency_weight=0.1)
    one.log_every, one.match_every = 1, 100
    for _ in range(3):
        one.align_members()
        expected = consistency(one.model.W.detach())
        one.train_step()
        assert one.history["consistency"][-1] == pytest.approx(expected.item(), abs=1e-3)
    assert trainer(steps=1).history["consistency"] == [0]


def twin_order(one, step):
    """The images of a step, from the generator's seed alone."""
    generator = torch.Generator().manual_seed(one.recipe.seed)
    for _ in range(step // one.steps_per_epoch + 1):
        order = torch.randperm(N, generator=generator)
    position = step % one.steps_per_epoch * one.recipe.batch_size
    return order[position : position + one.recipe.batch_size]


@pytest.mark.parametrize("changes", [{}, ALL], ids=["plain", "all"])
def test_centre_is_the_mean_image_and_stays(changes):
    one = trainer(steps=3, **changes)
    assert torch.equal(one.model.b_dec, one.x.mean(0).expand(3, -1))


def test_without_decoder_bias_the_centre_is_zero():
    one = trainer(steps=3, decoder_bias=False)
    assert not one.model.b_dec.any() and one.x.mean(0).abs().max() > 0.1


# Learning rate


def rates(**changes):
    one = trainer(learning_rate=0.1, epochs=10, **changes)
    result = []
    for step in range(one.total_steps):
        one.step = step
        result.append(one.learning_rates()[0])
    return result


def test_learning_rate_is_constant_without_decay():
    assert rates(decay=0) == [0.1] * 40


def test_learning_rate_falls_linearly_at_the_end():
    result = rates(decay=0.5)
    assert result[:21] == [0.1] * 21
    assert result[20:] == pytest.approx([0.1 * (40 - step) / 20 for step in range(20, 40)], rel=1e-12)


def test_learning_rate_can_fall_from_the_start():
    assert rates(decay=1) == pytest.approx([0.1 * (40 - step) / 40 for step in range(40)], rel=1e-12)


def test_optimizer_takes_the_steps_learning_rate():
    one = trainer(steps=12)
    expected = one.learning_rates()[0]
    one.train_step()
    assert one.optimizer.param_groups[0]["lr"] == expected < SMALL.learning_rate


def test_map_takes_a_quarter_of_the_mean_learning_rate():
    one = trainer(steps=12, encoder_map=True, learning_rate=(1e-3, 2e-3, 6e-3))
    rates = one.learning_rates()
    one.train_step()
    assert [group["lr"] for group in one.optimizer.param_groups] == pytest.approx([*rates, 3e-3 * rates[0] / 1e-3 / 4])
    assert len(one.optimizer.param_groups[-1]["params"]) == 1
    assert one.optimizer.param_groups[-1]["params"][0] is one.model.A


OWN = {"learning_rate": (1e-3, 5e-3, 1e-2), "k": (2, 5, 9)}


@pytest.mark.parametrize("floor", [0, 0.9])
@pytest.mark.parametrize("names", [("learning_rate",), ("k",), ("learning_rate", "k")], ids=" and ".join)
def test_members_with_their_own_settings_train_like_separate_ones(names, floor):
    own, shared = {name: OWN[name] for name in names}, {"selection_floor": floor, "row_moments": True}
    together = trainer(double=True, **own, **shared)
    assert together.recipe.learning_rate == own.get("learning_rate", SMALL.learning_rate)
    start, helped = parameters(together)["W"], 0
    together.memory = 0.5  # so that features fall below the floor within a few steps
    for _ in range(10):
        helped += (together.boost() > 0).any(1).long() if floor else 0
        together.train_step()
    assert not floor or (helped >= 5).all()  # in every member
    for m in range(3):
        alone = trainer(double=True, n_members=1, **{name: values[m] for name, values in own.items()}, **shared)
        alone.memory = 0.5
        with torch.no_grad():
            alone.model.W[0] = start[m]
        for _ in range(10):
            alone.train_step()
        for name in ("W", "b_enc"):
            assert_close(getattr(alone.model, name)[0], getattr(together.model, name)[m], rtol=0, atol=1e-10)
        for name in ("fires", "use", "scale"):
            assert_close(getattr(alone, name)[0], getattr(together, name)[m], rtol=0, atol=1e-10)
    assert together.history["learning_rate"][0] == list(sae.per_member("", together.recipe.learning_rate, 3))


# Precision


@pytest.mark.parametrize("changes", [{}, ALL], ids=["plain", "all"])
def test_bfloat16_trains_like_float32_up_to_rounding(changes):
    runs = {name: trainer(steps=12, precision=name, **changes) for name in ("float32", "bfloat16", "auto")}
    assert_identical(runs["auto"], runs["float32"])  # on a CPU
    low, full = runs["bfloat16"], runs["float32"]
    assert not low.scaler.is_enabled()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in low.model.parameters())
    assert all(state["exp_avg"].dtype == torch.float32 for state in low.optimizer.state.values())
    assert (low.model.W != full.model.W).any()
    for a, b in zip(low.history["mse"][-1], full.history["mse"][-1]):
        assert a == pytest.approx(b, rel=0.05)


def test_bfloat16_is_the_precision_of_the_products(monkeypatch):
    seen = []
    original = sae._keep
    monkeypatch.setattr(sae, "_keep", lambda *given: (seen.append(given[0].dtype), original(*given))[1])
    trainer(steps=1, precision="bfloat16")
    trainer(steps=1)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    "precision, device", [("float16", "cpu"), ("float16", "meta"), ("bfloat16", "meta")], ids=lambda value: value
)
def test_precision_that_a_device_does_not_train_in_is_named(precision, device):
    with one_line_error(precision, device, "choose auto or float32"):
        sae.Trainer(replace(SMALL, precision=precision), draw(N, D_IN).float(), device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, ALL], ids=["plain", "all"])
def test_float16_uses_a_scaler_and_trains(changes):
    runs = []
    for precision in ("auto", "float32"):
        recipe = replace(SMALL, precision=precision, **changes)
        runs.append(sae.Trainer(recipe, draw(N, D_IN).float(), "cuda").run(progress=False))
    low, full = runs
    assert low.precision == torch.float16 and low.scaler.is_enabled() and not full.scaler.is_enabled()
    for a, b in zip(low.history["mse"][-1], full.history["mse"][-1]):
        assert a == pytest.approx(b, rel=0.05)


# Settings


NO_NUMBERS = (
    math.nan,
    math.inf,
    -math.inf,
    True,
    "5",
    None,
    1j,
    np.array([[1, 2], [3, 4]]),
    torch.ones(2, 2),
    np.bool_(True),
)


@pytest.mark.parametrize(
    "field, value",
    [
        *((field, value) for field in ("d_sae", "k", "n_members", "epochs", "batch_size") for value in (0, -3, 2.5)),
        *((field, value) for field in ("k", "epochs", "seed", "learning_rate", "decay") for value in NO_NUMBERS),
        *((field, 2**31) for field in ("d_sae", "n_members", "epochs", "batch_size", "consistency_warmup")),
        ("match_every", 0),
        ("consistency_warmup", -1),
        ("precision", "float8"),
        *(("learning_rate", value) for value in ((1e-3, -0.5, 1e-3), (1e-3, 1e-3), (), [1e-3, "1", 1e-3])),
        *(("k", value) for value in ((3, 0, 3), (3, 3), (3, 2.5, 3), [3, D_SAE + 1, 3])),
        *(("learning_rate", value) for value in (0.0, -0.5, 1e31, 10**400)),
        *((f, v) for f in ("consistency_weight", "selection_floor") for v in (-0.5, math.nan, math.inf, "0")),
        *((f, v) for f in ("decay", "selection_floor") for v in (-0.5, 1.5, Fraction(3, 2))),
        *(("seed", value) for value in (-1, 2**32)),
        ("k", D_SAE + 1),
    ],
)
def test_setting_that_makes_no_sense_is_named(field, value):
    with one_line_error(field):
        replace(SMALL, **{field: value})


def test_refused_setting_is_shown_with_what_it_must_be():
    with one_line_error("k is 2.5: it must be a whole number from 1 to 32"):
        replace(SMALL, k=2.5)
    with one_line_error("learning_rate is nan: it must be a number from"):
        replace(SMALL, learning_rate=np.float32("nan"))
    with one_line_error("precision is 'float8'", "auto, float32, float16 or bfloat16"):
        replace(SMALL, precision="float8")


@pytest.mark.parametrize("field", ["d_sae", "n_members", "epochs", "batch_size", "seed", "decay", "selection_floor"])
def test_setting_that_all_members_share_has_one_value(field):
    with one_line_error(field):
        replace(SMALL, **{field: (1, 1, 1)})


@pytest.mark.parametrize(
    "field, given, meant",
    [
        ("k", np.int64(5), 5),
        ("k", 5.0, 5),
        ("k", np.float32(5), 5),
        ("k", torch.tensor(5), 5),
        ("k", (np.int64(5), 6.0, torch.tensor(7)), (5, 6, 7)),
        ("k", [5, 6, 7], (5, 6, 7)),
        ("k", Fraction(5), 5),
        ("epochs", np.int64(2), 2),
        ("seed", np.uint32(2**32 - 1), 2**32 - 1),
        ("learning_rate", np.float32(1e-3), float(np.float32(1e-3))),
        ("learning_rate", torch.tensor(0.5), 0.5),
        ("learning_rate", 1, 1.0),
        ("learning_rate", [np.float64(0.1), torch.tensor(0.5, dtype=torch.float64), 1], (0.1, 0.5, 1.0)),
        ("decay", np.float16(0.5), 0.5),
        ("selection_floor", 0, 0.0),
    ],
    ids=str,
)
def test_numbers_of_any_kind_become_pythons(field, given, meant):
    recipe = replace(SMALL, **{field: given})
    found = getattr(recipe, field)
    assert found == meant and type(found) is type(meant)
    assert not isinstance(found, tuple) or list(map(type, found)) == list(map(type, meant))
    assert json.loads(json.dumps(asdict(recipe)))[field] == (list(meant) if isinstance(meant, tuple) else meant)
    assert sae.Recipe(**asdict(recipe)) == recipe


def test_recipe_of_other_kinds_of_numbers_trains_the_same():
    changes = dict(k=np.int64(4), epochs=np.int64(2), learning_rate=np.float64(1e-3), seed=torch.tensor(3))
    plain = dict(k=4, epochs=2, learning_rate=1e-3, seed=3)
    assert_identical(trainer(**changes).run(progress=False), trainer(**plain).run(progress=False))


def test_recipes_are_those_of_the_design():
    reference, improved = sae.RECIPES["reference"], sae.RECIPES["improved"]
    assert (reference.decoder_bias, reference.encoder_map, reference.row_moments) == (False, False, False)
    assert (improved.decoder_bias, improved.encoder_map, improved.row_moments) == (True, True, True)
    assert (reference.selection_floor, improved.selection_floor) == (0, 0.2)
    assert (reference.learning_rate, reference.decay) == (1e-3, 0)
    assert (improved.learning_rate, improved.decay) == (3e-3, 0.3)
    assert (reference.monitor, improved.monitor) == (True, False)
    for name, recipe in sae.RECIPES.items():
        assert recipe.name == name and not recipe.relu and recipe.precision == "auto"
        assert (recipe.d_sae, recipe.k, recipe.n_members, recipe.epochs, recipe.batch_size) == (1024, 50, 5, 5, 128)
        assert (recipe.consistency_weight, recipe.consistency_warmup, recipe.match_every) == (0.01, 100, 100)


# What the benchmark compares with


@pytest.fixture
def on_cpu(monkeypatch):
    """The benchmark takes CUDA where it is."""
    monkeypatch.setattr(training, "DEVICE", torch.device("cpu"))


def test_separate_modules_of_the_benchmark_do_what_ours_do(on_cpu):
    recipe = replace(SMALL, decoder_bias=False, decay=0)
    x = draw(N, D_IN).float()
    separate, ours = training.Separate(recipe, x), sae.Trainer(recipe, x)
    for _ in range(5):
        separate.train_step()
        ours.train_step()
    for encoder, W in zip(separate.members, ours.model.W):
        assert_close(encoder.weight, W, rtol=0, atol=1e-4)


def test_reference_loop_of_the_benchmark_has_one_consistency_loss(on_cpu):
    # Copies of one member match themselves, so exact and rare matching are the same.
    recipe = replace(SMALL, decoder_bias=False, decay=0, consistency_weight=0.5, consistency_warmup=1)
    x, noise = draw(N, D_IN).float(), 0.05 * draw(3, D_SAE, D_IN, seed=3).float()
    starts = sae.initial_weights(D_SAE, D_IN, 0) + noise
    reference, ours = training.Reference(recipe, x, starts), sae.Trainer(recipe, x)
    with torch.no_grad():
        ours.model.W.copy_(starts)
    for _ in range(3):
        reference.train_step()
        ours.train_step()
    without = training.Separate(recipe, x, starts)
    for _ in range(3):
        without.train_step()
    for encoder, plain, W in zip(reference.members, without.members, ours.model.W):
        assert_close(encoder.weight, W, rtol=0, atol=1e-4)
        assert (plain.weight - W).abs().max() > 1e-3  # the loss does something here
