"""Training: the consistency loss, the alignment of members, determinism, stop and resume, schedule, settings."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace

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
    "small", decoder_bias=True, learning_rate=5e-3, decay=0.5, reinit="none", d_sae=D_SAE, k=K, n_members=3, epochs=4,
    batch_size=32, consistency_weight=0, match_every=5,
)  # fmt: skip
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


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def twin(of):
    """Another trainer that stands where `of` stands."""
    result = trainer(double=of.x.dtype == torch.float64, seed=of.recipe.seed, relu=of.recipe.relu)
    result.recipe = of.recipe
    result.load_state_dict(through_a_file(of.state_dict()))
    return result


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
    for p, q in zip(a.parts, b.parts):
        for part in p:
            for name, tensor in a.optimizer.state.get(p[part], {}).items():
                assert torch.equal(tensor, b.optimizer.state[q[part]][name]), name
    assert torch.equal(a.fires, b.fires) and a.reinits == b.reinits
    assert a.history == b.history and a.step == b.step


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


def test_consistency_weight_falls_late_in_training():
    one = trainer(consistency_weight=0.1, consistency_warmup=1, consistency_until=0.5)  # 16 steps
    weights = []
    for _ in range(16):
        one.train_step()
        weights.append(one.weight.item())
    expected = [0, *[0.1] * 7, *(0.1 * (16 - step) / 8 for step in range(8, 16))]
    assert weights == pytest.approx(expected, rel=1e-6)


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
    before, fires = parameters(one), one.fires.clone()
    one.align_members()
    assert torch.equal(one.model.W[0], before["W"][0])
    for m in range(3):
        order = torch.cdist(one.model.W[m].detach(), before["W"][m]).argmin(1)
        assert m == 0 or (order != torch.arange(D_SAE)).any()  # else nothing is shown
        assert torch.equal(order.sort().values, torch.arange(D_SAE))
        assert torch.equal(one.fires[m], fires[m, order])
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
    one = trainer(double=True, steps=6)
    before = one.model(one.x).detach()
    one.align_members()
    assert_close(one.model(one.x).detach(), before, **EXACT)


def test_training_goes_on_after_alignment_as_if_nothing_had_happened():
    aligned = trainer(double=True, steps=6)
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
        order, _ = sae.match_features(features[:m].sum(0), features[m])
        assert torch.equal(order, torch.arange(D_SAE))


def test_members_are_aligned_as_often_as_the_recipe_says():
    one = trainer(consistency_weight=0.1, consistency_warmup=1000)
    aligned_at, align = [], one.align_members
    one.align_members = lambda: (aligned_at.append(one.step), align())
    for _ in range(11):
        one.train_step()
    assert aligned_at == [0, 5, 10]


def test_training_that_diverges_is_named():
    # Features that are no numbers cannot be matched, and their quality is no JSON.
    with one_line_error("learning_rate", 1e30):
        trainer(learning_rate=1e30, consistency_weight=0.1).run(progress=False)


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
        assert_close(alone.model.b_dec[0], together.model.b_dec[m], rtol=0, atol=1e-10)


def test_member_does_not_depend_on_the_size_of_the_ensemble():
    assert torch.equal(trainer(n_members=5).model.W[:2], trainer(n_members=2).model.W)


def test_ensembles_of_different_seeds_share_no_member():
    starts = {tuple(W[0].tolist()) for seed in range(20) for W in trainer(seed=seed).model.W}
    assert len(starts) == 20 * 3


def test_same_seed_gives_the_same_training():
    assert_identical(*(trainer(steps=10, consistency_weight=0.01, seed=7) for _ in range(2)))


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
    assert one.epoch == 2


def test_one_step_is_one_step_of_adam_on_the_batch():
    one = trainer(double=True)
    reference = sae.TopKSAE(D_IN, D_SAE, K, seeds=(0,) * 3, b_dec=torch.zeros(D_IN)).double()
    reference.load_state_dict(one.model.state_dict())
    optimizer = torch.optim.Adam(reference.parameters(), lr=SMALL.learning_rate)
    one.train_step()
    x = one.x[one.order[:32]]
    sum(F.mse_loss(x_hat, x) for x_hat in reference.decode(*reference.encode(x))).backward()
    optimizer.step()
    for name, tensor in reference.state_dict().items():
        assert_close(one.model.state_dict()[name], tensor, rtol=0, atol=1e-10)


def test_run_trains_to_the_end_and_reports_each_epoch():
    seen = []
    one = trainer()
    assert one.run(progress=False, after_epoch=lambda t: seen.append((t.epoch, t.step))) is one
    assert seen == [(1, 4), (2, 8), (3, 12), (4, 16)]
    first, last = one.history["mse"][0], one.history["mse"][-1]
    assert all(b < 0.8 * a for a, b in zip(first, last))


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


def test_dead_features_are_those_silent_since_the_look_before_the_last():
    one, fires = trainer(epochs=6, k=1), []
    one.look_every = 4
    for _ in range(21):
        one.train_step()
        fires.append(one.fires.clone())
    # Entries of the steps 0, 10, 20, each with its batch; looks after 4, 8, 12, 16 and 20 steps.
    for entry, (first, last) in zip(one.history["dead_fraction"], ((None, 0), (3, 10), (15, 20))):
        window = fires[last] - (fires[first] if first is not None else 0)
        assert entry == pytest.approx((window == 0).double().mean(1).tolist())
    assert any(0 < share < 1 for share in one.history["dead_fraction"][2])


def twin_order(one, step):
    """The images of a step, from the generator's seed alone."""
    generator = torch.Generator().manual_seed(one.recipe.seed)
    for _ in range(step // one.steps_per_epoch + 1):
        order = torch.randperm(N, generator=generator)
    position = step % one.steps_per_epoch * one.recipe.batch_size
    return order[position : position + one.recipe.batch_size]


def test_decoder_bias_starts_at_the_mean_image_and_is_trained():
    one = trainer()
    assert torch.equal(one.model.b_dec, one.x.mean(0).expand(3, -1))
    one.train_step()
    assert (one.model.b_dec != one.x.mean(0)).any(1).all()


def test_without_decoder_bias_it_stays_zero():
    assert not trainer(steps=3, decoder_bias=False).model.b_dec.any()


# Stop and resume


@pytest.mark.parametrize("stop", [0, 6, 8], ids=["before the first step", "within an epoch", "between epochs"])
@pytest.mark.parametrize("reinit", ["members", "features"])
def test_stopped_and_resumed_is_as_if_never_stopped(stop, reinit):
    def begun():
        one = trainer(consistency_weight=0.01, consistency_warmup=3, seed=5, reinit=reinit)
        one.log_every, one.look_every, one.rare, one.monitor_threshold = 3, 4, 1.0, 3.0
        return one

    whole = begun().run(progress=False)
    assert whole.reinits[0][0] <= 6 < whole.reinits[-1][0]  # before and after the stop
    stopped = begun()
    for _ in range(stop):
        stopped.train_step()
    state = through_a_file(stopped.state_dict())
    resumed = begun()
    resumed.load_state_dict(state)
    assert resumed.step == stop
    resumed.run(progress=False)
    assert_identical(resumed, whole)


def test_training_on_leaves_a_loaded_state_as_it_was():
    one = trainer(steps=6)
    state = through_a_file(one.state_dict())
    resumed = trainer()
    resumed.load_state_dict(state)
    resumed.run(progress=False)
    again = trainer()
    again.load_state_dict(state)
    assert_identical(again, one)


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


def test_learning_rate_can_fall_fast_at_first():
    result = rates(decay=0.5, decay_power=0.5)
    assert result[:21] == [0.1] * 21
    expected = [0.1 * (1 - math.sqrt((step - 20) / 20)) for step in range(20, 40)]
    assert result[20:] == pytest.approx(expected, rel=1e-12)


def test_optimizer_takes_the_steps_learning_rate():
    one = trainer(steps=12)
    expected = one.learning_rates()[0]
    one.train_step()
    assert one.optimizer.param_groups[0]["lr"] == expected < SMALL.learning_rate


@pytest.mark.parametrize("changes", [{"learning_rate": (1e-3, 5e-3, 1e-2)}, {"k": (2, 5, 9)}], ids=["rate", "k"])
def test_members_with_their_own_settings_train_like_separate_ones(changes):
    together = trainer(double=True, **changes)
    start = parameters(together)["W"]
    for _ in range(10):
        together.train_step()
    for m in range(3):
        alone = trainer(double=True, n_members=1, **{name: values[m] for name, values in changes.items()})
        with torch.no_grad():
            alone.model.W[0] = start[m]
        for _ in range(10):
            alone.train_step()
        assert_close(alone.model.W[0], together.model.W[m], rtol=0, atol=1e-10)
    assert together.history["learning_rate"][0] == list(sae.per_member("", together.recipe.learning_rate, 3))


def test_members_with_their_own_k_start_rare_features_anew():
    one = trainer(k=(2, 5, 9), reinit="features")
    one.look_every, one.rare = 5, 1.0
    for _ in range(5):
        one.train_step()
    assert all(one.reinits[0][1])


# Precision


def test_bfloat16_trains_like_float32_up_to_rounding():
    runs = {name: trainer(steps=12, precision=name) for name in ("float32", "bfloat16", "auto")}
    assert_identical(runs["auto"], runs["float32"])  # on a CPU
    low, full = runs["bfloat16"], runs["float32"]
    assert not low.scaler.is_enabled()
    assert low.model.W.dtype == low.model.W.grad.dtype == torch.float32
    assert all(state["exp_avg"].dtype == torch.float32 for state in low.optimizer.state.values())
    assert (low.model.W != full.model.W).any()
    for a, b in zip(low.history["mse"][-1], full.history["mse"][-1]):
        assert a == pytest.approx(b, rel=0.05)


def test_bfloat16_is_the_precision_of_the_products(monkeypatch):
    seen = []
    original = sae._encode
    monkeypatch.setattr(sae, "_encode", lambda *given: (seen.append(original(*given)), seen[-1])[1])
    trainer(steps=1, precision="bfloat16")
    trainer(steps=1)
    assert [values.dtype for values, _ in seen] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    "precision, device", [("float16", "cpu"), ("float16", "mps"), ("bfloat16", "mps")], ids=lambda value: value
)
def test_precision_that_a_device_does_not_train_in_is_named(precision, device):
    with one_line_error(precision, device, "choose auto or float32"):
        sae.pick_precision(precision, torch.device(device))


def test_precision_of_each_device():
    auto = {device: sae.pick_precision("auto", torch.device(device)) for device in ("cpu", "cuda", "mps")}
    assert auto == {"cpu": torch.float32, "cuda": torch.float16, "mps": torch.float32}


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def cuda_run(steps=16, capture=True, **changes):
    changes = {"precision": "float32", "consistency_weight": 0.1, "reinit": "features", **changes}
    one = sae.Trainer(replace(SMALL, **changes), draw(N, D_IN).float(), "cuda")
    one.capture, one.look_every, one.rare = capture, 5, 1.0
    for _ in range(steps):
        one.train_step()
    return one


@on_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_captured_step_is_the_plain_one(precision):
    captured, plain = (cuda_run(capture=capture, precision=precision) for capture in (True, False))
    assert captured.graph is not None and plain.graph is None
    assert captured.reinits and captured.reinits == plain.reinits
    assert_close(captured.model.W, plain.model.W, rtol=0, atol=1e-4)
    assert_close(torch.tensor(captured.history["mse"]), torch.tensor(plain.history["mse"]), rtol=1e-3, atol=0)


@on_cuda
def test_float16_uses_a_scaler_and_trains():
    low, full = cuda_run(precision="auto"), cuda_run()
    assert low.precision == torch.float16 and low.scaler.is_enabled() and not full.scaler.is_enabled()
    for a, b in zip(low.history["mse"][-1], full.history["mse"][-1]):
        assert a == pytest.approx(b, rel=0.05)


@on_cuda
def test_stopped_and_resumed_on_cuda():
    whole, stopped = cuda_run(precision="float16"), cuda_run(steps=9, precision="float16")
    resumed = cuda_run(steps=0, precision="float16")
    resumed.load_state_dict(through_a_file(stopped.state_dict()))
    while resumed.step < whole.step:
        resumed.train_step()
    assert_close(resumed.model.W, whole.model.W, rtol=0, atol=1e-3)


@on_cuda
def test_step_that_cannot_be_captured_goes_on_without(capsys):
    class Asks(sae.Trainer):
        def losses(self, x, x_hat):
            assert super().losses(x, x_hat).sum().item() > 0  # waits for the device
            return super().losses(x, x_hat)

    one = Asks(replace(SMALL, precision="float16"), draw(N, D_IN).float(), "cuda").run(progress=False)
    assert one.graph is None and "cannot be captured" in capsys.readouterr().err


# Settings


@pytest.mark.parametrize(
    "field, value",
    [
        *((field, value) for field in ("d_sae", "k", "n_members", "epochs", "batch_size") for value in (0, -3)),
        ("match_every", 0),
        ("reinit", "both"),
        ("precision", "float8"),
        ("learning_rate", (1e-3, -0.5, 1e-3)),
        ("learning_rate", (1e-3, 1e-3)),
        ("k", (3, 0, 3)),
        ("k", (3, 3)),
        *(("learning_rate", value) for value in (0.0, -0.5, math.nan, math.inf)),
        *(("consistency_weight", value) for value in (-0.5, math.nan, math.inf)),
        *((f, v) for f in ("decay", "reinit_until", "consistency_until") for v in (-0.5, 1.5, math.nan)),
        *(("decay_power", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("seed", value) for value in (-1, 2**32)),
        ("k", D_SAE + 1),
    ],
)
def test_setting_that_makes_no_sense_is_named(field, value):
    with one_line_error(field, *([] if isinstance(value, tuple) else [value])):
        replace(SMALL, **{field: value})


def test_recipes_are_those_of_the_design():
    reference, improved = sae.RECIPES["reference"], sae.RECIPES["improved"]
    assert (reference.decoder_bias, reference.learning_rate, reference.decay) == (False, 1e-3, 0)
    assert (improved.decoder_bias, improved.learning_rate, improved.decay) == (True, 2e-3, 0.3)
    assert (reference.reinit, improved.reinit) == ("members", "features")
    assert (reference.row_moments, improved.row_moments) == (False, True)
    assert (improved.decay_power, improved.reinit_until, improved.consistency_until) == (0.5, 0.85, 0.7)
    for name, recipe in sae.RECIPES.items():
        assert recipe.name == name and not recipe.relu
        assert (recipe.d_sae, recipe.k, recipe.n_members, recipe.epochs, recipe.batch_size) == (1024, 50, 5, 5, 128)
        assert (recipe.consistency_weight, recipe.consistency_warmup) == (0.01, 100)


# Devices


def test_cpu_can_be_asked_for():
    assert sae.pick_device("cpu").type == "cpu"


def test_auto_takes_the_fastest_device():
    has_mps = torch.backends.mps.is_available()
    expected = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    assert sae.pick_device().type == expected


def test_unknown_device_is_named():
    with one_line_error("'tpu'", "choose auto", "cpu"):
        sae.pick_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_named():
    with one_line_error("'cuda'", "choose auto", "cpu"):
        sae.pick_device("cuda")


# What the benchmark compares with


def test_separate_modules_of_the_benchmark_do_what_ours_do():
    recipe = replace(SMALL, decoder_bias=False, decay=0)
    x = draw(N, D_IN).float()
    separate, ours = training.Separate(recipe, x), sae.Trainer(recipe, x)
    for _ in range(5):
        separate.train_step()
        ours.train_step()
    for encoder, W in zip(separate.members, ours.model.W):
        assert_close(encoder.weight, W, rtol=0, atol=1e-4)


def test_reference_loop_of_the_benchmark_has_one_consistency_loss():
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
