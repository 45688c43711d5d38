"""The autoencoders: start, code, reconstruction, gradient, and the file that holds them."""

from __future__ import annotations

import contextlib
import itertools
import re

import numpy as np
import pytest
import torch
from conftest import one_line_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import sae_helpers as sae

D_IN, D_SAE, K, B = 20, 32, 5, 16
SEEDS, KS = (3, 1, 4), (2, 7, 4)
EXACT = dict(rtol=0, atol=1e-12)  # float64 rounding; the numbers compared are of size 1
BARELY = 2**-20

every_kind = pytest.mark.parametrize(
    "kind",
    [dict(relu=relu, A=A) for relu in (False, True) for A in (None, "shared", "own")],
    ids=lambda kind: f"{'relu' if kind['relu'] else 'plain'}, {kind['A'] or 'no'} map",
)
every_k = pytest.mark.parametrize("k", [K, KS], ids=["one k", "a k for each"])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(seeds=SEEDS, relu=False, A=None, d_in=D_IN, d_sae=D_SAE, k=K):
    """In float64, and away from the start, where biases are zero, rows equally long and A is the identity."""
    model = sae.TopKSAE(d_in, d_sae, k, seeds, encoder_map=bool(A), relu=relu).double()
    with torch.no_grad():
        for m, seed in enumerate(seeds):
            model.W[m] *= draw(d_sae, 1, seed=seed).exp()
            model.b_enc[m] = draw(d_sae, seed=seed + 100) / 2 - 3 * relu  # some kept values below zero
            model.b_dec[m] = draw(d_in, seed=seed + 200)
    if A:
        draws = [draw(d_in, d_in, seed=seed + 300) for seed in (seeds if A == "own" else (0,))]
        model.A = nn.Parameter(torch.eye(d_in).double() + 0.5 * torch.stack(draws) / d_in**0.5)
    return model


def gradients(model, x_hat, target):
    """Of a loss that weights members, images and pixels differently."""
    model.zero_grad()
    (x_hat * target).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def mapped(model, x, m):
    """What member m's encoder rows are multiplied with, [B, d_in]."""
    return x - model.b_dec[m] if model.A is None else (x - model.b_dec[m]) @ model.A[m if len(model.A) > 1 else 0]


# Start


@pytest.mark.parametrize("d_sae", [12, 20, 32])
def test_start_is_orthogonal(d_sae):
    W = sae.TopKSAE(D_IN, d_sae, K, seeds=(0, 1)).W.detach()
    # With more features than pixels the columns are orthonormal, not the features.
    product = W.mT @ W if d_sae > D_IN else W @ W.mT
    assert_close(product, torch.eye(min(d_sae, D_IN)).expand_as(product), rtol=0, atol=1e-6)


def test_member_does_not_depend_on_those_beside_it():
    together = sae.TopKSAE(D_IN, D_SAE, K, SEEDS)
    for m, seed in enumerate(SEEDS):
        assert torch.equal(together.W[m], sae.TopKSAE(D_IN, D_SAE, K, seeds=(seed,)).W[0])


def test_seeds_make_members_different():
    W = sae.TopKSAE(D_IN, D_SAE, K, SEEDS).W
    assert all((a != b).any() for a, b in itertools.combinations(W, 2))


def test_start_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    sae.TopKSAE(D_IN, D_SAE, K, SEEDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_biases_start_at_zero_and_the_map_at_the_identity():
    model = sae.TopKSAE(D_IN, D_SAE, K, SEEDS, encoder_map=True)
    assert not model.b_enc.any() and not model.b_dec.any()
    assert torch.equal(model.A, torch.eye(D_IN)[None])
    x = draw(B, D_IN).float()
    assert torch.equal(model(x), sae.TopKSAE(D_IN, D_SAE, K, SEEDS)(x))


def test_centre_is_as_given_in_every_member_and_not_trained():
    start = draw(D_IN).float()
    model = sae.TopKSAE(D_IN, D_SAE, K, SEEDS, b_dec=start)
    assert torch.equal(model.b_dec, start.expand(3, -1)) and torch.equal(start, draw(D_IN).float())
    assert {name for name, _ in model.named_parameters()} == {"W", "b_enc"}
    with_map = sae.TopKSAE(D_IN, D_SAE, K, SEEDS, encoder_map=True)
    assert {name for name, _ in with_map.named_parameters()} == {"W", "b_enc", "A"}


@pytest.mark.parametrize("k", [0, -1, D_SAE + 1, (K, 0, K)])
def test_impossible_k_is_an_error(k):
    wrong = 0 if isinstance(k, tuple) else k
    with one_line_error(f"k = {wrong}", D_SAE, "choose k"):
        sae.TopKSAE(D_IN, D_SAE, k, SEEDS)


@pytest.mark.parametrize("ks", [(1, 2), (1, 2, 3, 4)])
def test_number_of_ks_that_is_not_that_of_members_is_named(ks):
    with one_line_error("k has", len(ks), "3 members"):
        make(k=ks)


# Code and reconstruction


@every_kind
def test_shapes(kind):
    model, x = make(**kind), draw(B, D_IN)
    values, indices = model.encode(x)
    assert model.n_members == 3
    assert model.W.shape == model.features().shape == (3, D_SAE, D_IN)
    assert model.b_enc.shape == (3, D_SAE) and model.b_dec.shape == (3, D_IN)
    assert model.pre_activations(x).shape == (3, B, D_SAE)
    assert values.shape == indices.shape == (3, B, K)
    assert model.decode(values, indices).shape == model(x).shape == (3, B, D_IN)


@every_kind
def test_code_and_reconstruction_follow_the_definition(kind):
    model, x = make(**kind), draw(B, D_IN)
    values, indices = model.encode(x)
    x_hat = model(x)
    for m, b in itertools.product(range(3), range(B)):
        pre = model.W[m] @ mapped(model, x, m)[b] + model.b_enc[m]
        assert_close(model.pre_activations(x)[m, b], pre, **EXACT)
        kept = pre.argsort(descending=True)[:K]
        assert set(indices[m, b].tolist()) == set(kept.tolist())
        expected = pre[indices[m, b]]
        expected = expected.clamp_min(0) if model.relu else expected
        assert_close(values[m, b], expected, **EXACT)
        rows = model.W[m, indices[m, b]]
        expected = (expected / rows.norm(dim=1)) @ rows + model.b_dec[m]
        assert_close(x_hat[m, b], expected, **EXACT)


def test_relu_meets_values_on_both_sides_of_zero():
    # Else the tests with relu would show nothing.
    for A in (None, "shared", "own"):
        values, _ = make(relu=True, A=A).encode(draw(B, D_IN))
        assert 0.1 < (values == 0).double().mean() < 0.9


@pytest.mark.parametrize("A", ["shared", "own"])
def test_map_folds_into_an_encoder_with_rows_of_its_own(A):
    model, x = make(A=A), draw(B, D_IN)
    rows = model.W @ model.A.mT
    untied = (x - model.b_dec[:, None]) @ rows.mT + model.b_enc[:, None]
    assert_close(model.pre_activations(x), untied, **EXACT)
    assert_close(model.features(), make().features(), **EXACT)  # the dictionary is that of W alone


def test_ties_keep_exactly_k():
    model = make()
    with torch.no_grad():
        model.b_enc.fill_(1.0)
    values, indices = model.encode(torch.zeros(B, D_IN).double() + model.b_dec[0])
    assert (values[0] == 1).all()  # every pre-activation of member 0 is its bias
    assert all(len(set(kept)) == K for kept in indices.flatten(0, 1).tolist())


@pytest.mark.parametrize("n", [1, 3, D_SAE])
def test_any_number_of_features_is_decoded(n):
    model = make()
    values, indices = draw(3, B, n), torch.arange(n).expand(3, B, n)
    assert_close(model.decode(values, indices), values @ model.features()[:, :n] + model.b_dec[:, None], **EXACT)


def test_features_have_length_one_and_no_gradient():
    features = make().features()
    assert_close(features.norm(dim=-1), torch.ones(3, D_SAE).double(), **EXACT)
    assert not features.requires_grad


# What changes no reconstruction


@every_kind
def test_order_of_the_features_is_arbitrary(kind):
    model, x = make(**kind), draw(B, D_IN)
    before, order = model(x).detach(), torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.W.copy_(model.W[:, order])
        model.b_enc.copy_(model.b_enc[:, order])
    assert_close(model(x).detach(), before, **EXACT)


@every_kind
def test_image_is_reconstructed_the_same_whatever_stands_beside_it(kind):
    model, x = make(**kind), draw(B, D_IN)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    assert_close(model(x[order]), model(x)[:, order], **EXACT)
    assert_close(model(x[3:4]), model(x)[:, 3:4], **EXACT)


def test_length_of_a_row_does_not_change_what_its_value_means():
    model = make()
    code = model.encode(draw(B, D_IN))
    before = model.decode(*code).detach()
    with torch.no_grad():
        model.W *= draw(3, D_SAE, 1, seed=1).exp()
    assert_close(model.decode(*code).detach(), before, **EXACT)


def test_moving_images_and_centre_alike_moves_the_reconstruction_with_them():
    model, x, shift = make(A="own"), draw(B, D_IN), draw(D_IN, seed=1)
    before = model(x).detach()
    model.b_dec += shift
    assert_close(model(x + shift).detach(), before + shift, **EXACT)


# Gradient


@every_k
@every_kind
def test_forward_is_decode_of_encode(kind, k):
    model, x, target = make(**kind, k=k), draw(B, D_IN).requires_grad_(), draw(3, B, D_IN, seed=1)
    fast, slow = model(x), model.decode(*model.encode(x))
    assert_close(fast, slow, **EXACT)
    expected, of_x = gradients(model, slow, target), x.grad
    x.grad = None
    actual = gradients(model, fast, target)
    assert set(actual) == {"W", "b_enc"} | ({"A"} if model.A is not None else set())
    for name, gradient in (expected | {"x": of_x}).items():
        assert gradient.abs().max() > 0.1
        assert_close((actual | {"x": x.grad})[name], gradient, rtol=1e-12, atol=1e-11, msg=name)


@every_k
@every_kind
def test_gradient_is_that_of_finite_differences(kind, k):
    model, x = make((3, 1), **kind, d_in=4, d_sae=7, k=k if k == K else (2, 3)), draw(3, 4)
    ks = (5, 5) if k == K else (2, 3)
    for pre, k_ in zip(model.pre_activations(x).detach(), ks):
        ranked = pre.sort(descending=True).values
        # The differences step by 1e-6: the k kept stay the same, and on the same side of zero.
        assert (ranked[..., k_ - 1] - ranked[..., k_]).min() > 1e-3
        assert not model.relu or ranked[..., :k_].abs().min() > 1e-3
    names = [name for name, _ in model.named_parameters()]
    inputs = [x.requires_grad_(), *(getattr(model, name).detach().requires_grad_() for name in names)]
    assert torch.autograd.gradcheck(lambda x, *given: functional_call(model, dict(zip(names, given)), (x,)), inputs)


@every_kind
def test_members_may_keep_different_numbers_of_features(kind):
    together, x = make(**kind, k=KS), draw(B, D_IN)
    values, indices = together.encode(x)
    assert values.shape == indices.shape == (3, B, 7)
    x_hat = together(x)
    for m, (seed, k) in enumerate(zip(SEEDS, KS)):
        alone = one_alone(seed, kind, k)
        assert not values[m, :, k:].any()
        assert_close(alone(x)[0], x_hat[m], **EXACT)


def one_alone(seed, kind, k=K):
    """A member that is what it is in an ensemble of SEEDS."""
    return make((seed,), kind["relu"], kind["A"], k=k)


@every_k
@every_kind
def test_ensemble_equals_separate_members(kind, k):
    together, x, target = make(**kind, k=k), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    x_hat = together(x)
    grads, of_A = gradients(together, x_hat, target), []
    for m, (seed, its_k) in enumerate(zip(SEEDS, sae.per_member("k", k, 3))):
        alone = one_alone(seed, kind, its_k)
        assert torch.equal(alone.W[0], together.W[m])
        x_hat_alone = alone(x)
        assert_close(x_hat_alone[0], x_hat[m], **EXACT)
        expected = gradients(alone, x_hat_alone, target[m : m + 1])
        of_A.append(expected.pop("A", None))
        for name, gradient in expected.items():
            assert_close(grads[name][m], gradient[0], rtol=1e-12, atol=1e-12)
    if kind["A"]:  # what all share gets the sum of what each would give it
        expected = sum(of_A) if kind["A"] == "shared" else torch.cat(of_A)
        assert_close(grads["A"], expected, rtol=1e-12, atol=1e-11)


# A boost in the choice of the k largest


def boosted(**changes):
    """A model, images, a boost of a third of the features, and what is chosen with it."""
    model, x = make(**changes), draw(B, D_IN)
    boost = (3 * draw(3, D_SAE, seed=5) - 1).clamp_min(0)
    return model, x, boost, (model.pre_activations(x).detach() + boost[:, None]).topk(K)


@every_kind
def test_boost_changes_the_choice_and_not_the_values(kind):
    model, x, boost, chosen = boosted(**kind)
    _, values, indices = model.autoencode(x, boost)
    pre = model.pre_activations(x)
    met = {"kept as it is": 0, "barely": 0, "negative and not boosted": 0}
    for m, b in itertools.product(range(3), range(B)):
        assert set(indices[m, b].tolist()) == set(chosen.indices[m, b].tolist())
        for value, i in zip(values[m, b].tolist(), indices[m, b].tolist()):
            own = pre[m, b, i].item()
            case = "kept as it is" if own >= 0 else "barely" if boost[m, i] > 0 else "negative and not boosted"
            expected = {"kept as it is": own, "barely": BARELY}.get(case, 0 if model.relu else own)
            assert value == pytest.approx(expected, abs=1e-12)
            met[case] += 1
    assert met["kept as it is"] and met["barely"] and (met["negative and not boosted"] or not model.relu)
    assert (indices.sort().values != model.encode(x)[1].sort().values).any(-1).double().mean() > 0.1


def test_feature_that_is_not_boosted_keeps_its_negative_value():
    model = make((3,), d_sae=8, k=8)  # all are kept, whatever their value
    x, boost = draw(B, D_IN), torch.zeros(1, 8).double()
    boost[0, 5] = 1e-3
    _, values, indices = model.autoencode(x, boost)
    expected = model.pre_activations(x).detach()
    assert (expected < 0).any(1).sum() > 5 and 0 < (expected[..., 5] < 0).sum() < B
    expected[..., 5] = torch.where(expected[..., 5] < 0, BARELY, expected[..., 5])
    assert_close(torch.zeros(1, B, 8).double().scatter(-1, indices, values), expected, **EXACT)


@every_kind
def test_feature_chosen_against_its_sign_only_learns_to_be_used_more(kind):
    model, x, boost, _ = boosted(**kind)
    target = draw(3, B, D_IN, seed=1)
    x_hat, values, indices = model.autoencode(x, boost)
    gradient = gradients(model, x_hat, target)["b_enc"]
    expected, signs = torch.zeros(3, D_SAE).double(), set()
    for m, b in itertools.product(range(3), range(B)):
        for value, i in zip(values[m, b].tolist(), indices[m, b].tolist()):
            p = (target[m, b] @ model.features()[m, i]).item() if value else 0.0  # at the pre-activation
            if value == BARELY:
                signs.add(p > 0)
                p = min(p, 0.0)
            expected[m, i] += p
    assert signs == {True, False}
    assert_close(gradient, expected, rtol=1e-12, atol=1e-11)


@every_kind
def test_gradient_with_a_boost_is_autograds_where_no_chosen_value_is_negative(kind):
    model, x, boost, _ = boosted(**kind)
    with torch.no_grad():
        model.b_enc += 9
    pre, target = model.pre_activations(x), draw(3, B, D_IN, seed=1)
    values, indices = (pre + boost[:, None]).topk(K)
    values = pre.gather(-1, indices)
    assert (values > 0).all()
    expected = gradients(model, model.decode(values, indices), target)
    for name, gradient in gradients(model, model.autoencode(x, boost)[0], target).items():
        assert_close(gradient, expected[name], rtol=1e-12, atol=1e-11, msg=name)


@every_k
@every_kind
def test_boost_of_zero_changes_nothing(kind, k):
    model, x, target = make(**kind, k=k), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    (x_hat, *code), (with_zero, *code_with_zero) = model.autoencode(x), model.autoencode(x, torch.zeros(3, D_SAE))
    assert torch.equal(x_hat, with_zero) and all(map(torch.equal, code, code_with_zero))
    plain = {name: grad.clone() for name, grad in gradients(model, x_hat, target).items()}
    assert all(torch.equal(grad, plain[name]) for name, grad in gradients(model, with_zero, target).items())


def test_boost_leaves_each_member_its_own_k():
    model, x, boost, _ = boosted(k=KS)
    _, values, indices = model.autoencode(x, boost)
    ranked = (model.pre_activations(x) + boost[:, None]).argsort(-1, descending=True)
    for m, k in enumerate(KS):
        assert not values[m, :, k:].any()
        assert torch.equal(indices[m, :, :k], ranked[m, :, :k])


# Sums of few rows, and the dense products that take their place on a GPU


class Elsewhere(torch.Tensor):
    """Says that it lies on a GPU."""

    device = torch.device("cuda")


both_ways = pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere], ids=["few rows", "dense"])


def sparse_code(n_repeats=1):
    indices = torch.stack([torch.randperm(D_SAE, generator=torch.Generator().manual_seed(i))[:K] for i in range(2 * B)])
    return indices.view(2, B, K).repeat(1, 1, n_repeats), draw(2, B, K * n_repeats)


def dense(indices, weights):
    result = torch.zeros(2, B, D_SAE).double()
    for m, b, i in itertools.product(range(2), range(B), range(indices.shape[-1])):
        result[m, b, indices[m, b, i]] += weights[m, b, i]
    return result


def assert_same(actual, expected):
    assert_close(actual.as_subclass(torch.Tensor), expected, **EXACT)


@both_ways
@pytest.mark.parametrize("n_repeats", [1, 2], ids=["once", "twice"])
def test_gathered_rows_are_the_dense_product(kind, n_repeats):
    # decode takes any number of features; one that comes twice (padding, say) counts twice on every device.
    (indices, weights), rows = sparse_code(n_repeats), draw(2, D_SAE, D_IN, seed=1)
    assert_same(sae._gather_rows(indices, weights, rows.as_subclass(kind)), dense(indices, weights) @ rows)


@both_ways
@pytest.mark.parametrize("n_repeats", [1, 2], ids=["once", "twice"])
def test_scattered_rows_are_the_dense_product(kind, n_repeats):
    (indices, weights), rows = sparse_code(n_repeats), draw(2, B, D_IN, seed=1)
    assert_same(sae._scatter_rows(indices, weights, rows.as_subclass(kind), D_SAE), dense(indices, weights).mT @ rows)


@both_ways
def test_products_with_rows_are_those_of_the_dense_product(kind):
    indices, _ = sparse_code()
    rows, g = draw(2, D_SAE, D_IN, seed=1), draw(2, B, D_IN, seed=2)
    assert_same(sae._row_products(indices, g, rows.as_subclass(kind)), (g @ rows.mT).gather(-1, indices))


@contextlib.contextmanager
def all_dense():
    """The products of a GPU on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for original in (sae._gather_rows, sae._row_products, sae._scatter_rows):

            def elsewhere(indices, given, rows, *more, original=original):
                return original(indices, given, rows.as_subclass(Elsewhere), *more).as_subclass(torch.Tensor)

            patch.setattr(sae, original.__name__, elsewhere)
        yield


@every_k
@every_kind
def test_dense_products_compute_the_same(kind, k):
    model, x, target = make(**kind, k=k), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    with all_dense():
        on_dense = model(x)
        actual = gradients(model, on_dense, target)
    x_hat = model(x)
    assert_close(on_dense, x_hat, **EXACT)
    for name, grad in gradients(model, x_hat, target).items():
        assert_close(actual[name], grad, rtol=1e-11, atol=1e-11, msg=name)


@every_kind
@pytest.mark.parametrize("way", ["few rows", "dense"])
def test_bfloat16_rounds_and_nothing_more(kind, way):
    model = make(**kind).float()
    with torch.no_grad():
        model.b_enc += 20 * torch.arange(D_SAE)  # so far apart that rounding changes no choice of features
    x, target = draw(B, D_IN).float(), draw(3, B, D_IN, seed=1).float()
    exact = gradients(model, model(x), target)
    with all_dense() if way == "dense" else contextlib.nullcontext():
        with torch.autocast("cpu", torch.bfloat16):
            x_hat, values, _ = model.autoencode(x)
        rounded = gradients(model, x_hat, target)
    assert values.dtype == torch.bfloat16 and x_hat.dtype == torch.float32
    for name, grad in rounded.items():
        assert grad.dtype == torch.float32
        error = (grad - exact[name]).norm() / exact[name].norm()
        assert error < 0.02, name  # bfloat16 has 8 bits
        assert error > 1e-6 or way == "few rows", name  # else nothing was cast


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_k
@every_kind
def test_cuda_computes_the_same(kind, k):
    model, x, target = make(**kind, k=k), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    boost = boosted()[2]
    x_hat = model.autoencode(x, boost)[0]
    expected = {name: grad.clone() for name, grad in gradients(model, x_hat, target).items()}
    model.cuda()
    on_cuda = model.autoencode(x.cuda(), boost.cuda())[0]
    assert_close(on_cuda.cpu(), x_hat, **EXACT)
    for name, grad in gradients(model, on_cuda, target.cuda()).items():
        assert_close(grad.cpu(), expected[name], rtol=1e-11, atol=1e-11)


# The file


def assert_loads_as(path, model):
    loaded = sae.TopKSAE.load(path)
    assert (loaded.d_in, loaded.d_sae, loaded.k, loaded.relu) == (model.d_in, model.d_sae, model.k, model.relu)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    x = draw(B, D_IN).float()
    assert torch.equal(loaded(x), model(x))


@every_k
@every_kind
def test_what_is_saved_is_loaded(tmp_path, kind, k):
    model = make(**kind, k=k).float()
    model.save(tmp_path / "sae.safetensors", data="letters", recipe="improved")
    assert list(tmp_path.iterdir()) == [tmp_path / "sae.safetensors"]
    assert_loads_as(tmp_path / "sae.safetensors", model)


@pytest.fixture
def saved(tmp_path):
    model = make(relu=True, A="shared").float()
    model.save(tmp_path / "sae.safetensors", data="letters", recipe="improved")
    return model, tmp_path / "sae.safetensors"


def test_one_member_with_a_map_is_loaded(tmp_path):
    model = make((3,), A="shared").float()
    model.save(tmp_path / "sae.safetensors", data="letters", recipe="improved")
    assert_loads_as(tmp_path / "sae.safetensors", model)


def test_checkpoint_without_a_map_is_loaded(tmp_path):
    # As earlier versions of the project wrote it.
    tensors = {"W": draw(2, D_SAE, D_IN).float(), "b_enc": draw(2, D_SAE).float(), "b_dec": draw(2, D_IN).float()}
    metadata = {"d_in": "20", "d_sae": "32", "n_members": "2", "relu": "0", "k": "5", "data": "MNIST", "recipe": "x"}
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    loaded = sae.TopKSAE.load(tmp_path / "old.safetensors")
    assert loaded.A is None and all(torch.equal(getattr(loaded, name), tensor) for name, tensor in tensors.items())
    pre = (draw(B, D_IN).float() - tensors["b_dec"][:, None]) @ tensors["W"].mT + tensors["b_enc"][:, None]
    assert_close(loaded.pre_activations(draw(B, D_IN).float()), pre)


def test_loaded_model_can_be_trained_on(saved):
    loaded = sae.TopKSAE.load(saved[1])
    x = draw(B, D_IN).float()
    sae.mse(x, loaded(x)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_checkpoint_holds_what_is_promised_to_other_readers(saved):
    _, path = saved
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W": (3, D_SAE, D_IN),
        "b_enc": (3, D_SAE),
        "b_dec": (3, D_IN),
        "A": (1, D_IN, D_IN),
    }
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert len(metadata.pop("sha256")) == 64
        assert metadata == {
            "k": "5",
            "relu": "1",
            "d_in": "20",
            "d_sae": "32",
            "n_members": "3",
            "data": "letters",
            "recipe": "improved",
        }


def test_missing_checkpoint_is_named(tmp_path):
    with one_line_error(tmp_path / "none.safetensors", "train one, or give another"):
        sae.TopKSAE.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04 something else"])
def test_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with one_line_error(path, "is no checkpoint", "train one, or give another"):
        sae.TopKSAE.load(path)


CHANGES = {
    "no metadata": lambda tensors, metadata: metadata.clear(),
    "other metadata": lambda tensors, metadata: (metadata.clear(), metadata.update(format="pt")),
    "a tensor missing": lambda tensors, metadata: tensors.pop("b_dec"),
    "a tensor too many": lambda tensors, metadata: tensors.update(b_other=torch.zeros(3)),
    "other sizes": lambda tensors, metadata: metadata.update(d_sae="33"),
    "sizes of terabytes": lambda tensors, metadata: metadata.update(d_sae="1000000000", d_in="1000000"),
    "a map of another size": lambda tensors, metadata: tensors.update(A=torch.zeros(1, D_IN, D_IN + 1)),
    "two maps for three members": lambda tensors, metadata: tensors.update(A=torch.zeros(2, D_IN, D_IN)),
    "huge map": lambda tensors, metadata: tensors.update(A=torch.zeros(1, 0, 0)),
    "members without weights": lambda tensors, metadata: (
        tensors.update(W=torch.zeros(2**40, 0, 20)),
        metadata.update(n_members=str(2**40), d_sae="0"),
    ),
    "a k too many": lambda tensors, metadata: metadata.update(k="5,5,5,5"),
    "a k that is too large": lambda tensors, metadata: metadata.update(k="33"),
    "a k that is no number": lambda tensors, metadata: metadata.update(k="five"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_of_another_project_is_named(saved, change):
    _, path = saved
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["sha256"]  # which finds any change of what the project wrote
    tensors = load_file(path)
    CHANGES[change](tensors, metadata)
    save_file(tensors, path, metadata)
    with one_line_error(path, "is no checkpoint", "train one, or give another"):
        sae.TopKSAE.load(path)


def test_changed_weight_is_found(saved):
    _, path = saved
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with one_line_error(path, "its checksum is wrong"):
        sae.TopKSAE.load(path)


@pytest.mark.parametrize("by_other_writer", [False, True])
def test_weights_of_another_type_are_found(saved, by_other_writer):
    _, path = saved
    content = path.read_bytes()
    if by_other_writer:  # without a checksum; the header keeps its length
        content = re.sub(rb'"sha256": "(\w{64})"', rb'"sha257": "\1"', content)
    changed = content.replace(b'"F32"', b'"I32"')
    assert changed != content
    path.write_bytes(changed)
    with one_line_error(path, "is no checkpoint", "torch.int32" if by_other_writer else "its checksum is wrong"):
        sae.TopKSAE.load(path)


@pytest.mark.parametrize("k, same", [(np.int64(5), 5), (torch.tensor(5), 5), (5.0, 5)])
def test_k_may_be_a_number_of_another_library(tmp_path, k, same):
    model = sae.TopKSAE(D_IN, D_SAE, k)
    assert type(model.k) is int and model.k == same and model(torch.rand(B, D_IN)).shape == (1, B, D_IN)


def test_k_that_is_no_whole_number_is_refused():
    with one_line_error("k = 2.5"):
        sae.TopKSAE(D_IN, D_SAE, 2.5)


# Writing files


def test_file_is_written_under_its_name(tmp_path):
    sae.write_atomically(tmp_path / "a.txt", lambda path: path.write_text("new"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "new")]


def test_old_file_stays_whole_where_writing_fails(tmp_path):
    def fail(path):
        path.write_text("half of it")
        raise OSError("disk full")

    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        sae.write_atomically(tmp_path / "a.txt", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_reader_of_the_old_file_is_not_disturbed(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with open(tmp_path / "a.txt") as reader:
        sae.write_atomically(tmp_path / "a.txt", lambda path: path.write_text("new"))
        assert reader.read() == "old"


def test_temporary_file_keeps_the_suffix(tmp_path):
    # matplotlib and torch choose their format by it.
    seen = []
    sae.write_atomically(tmp_path / "a.png", lambda path: (seen.append(path), path.touch()))
    assert seen[0].suffix == ".png" and seen[0].parent == tmp_path and seen[0] != tmp_path / "a.png"
