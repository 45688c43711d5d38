"""The autoencoders: start, code, reconstruction, gradient, and the file that holds them."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import one_line_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.testing import assert_close

import sae_helpers as sae

D_IN, D_SAE, K, B = 20, 32, 5, 16
SEEDS = (3, 1, 4)
EXACT = dict(rtol=0, atol=1e-12)  # float64 rounding; the numbers compared are of size 1

every_kind = pytest.mark.parametrize(
    "relu, bias",
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["plain", "bias", "relu", "relu and bias"],
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(seeds=SEEDS, relu=False, bias=True, d_in=D_IN, d_sae=D_SAE, k=K):
    """In float64, and away from the start, where biases are zero and rows equally long."""
    model = sae.TopKSAE(d_in, d_sae, k, seeds, b_dec=torch.zeros(d_in) if bias else None, relu=relu).double()
    with torch.no_grad():
        for m, seed in enumerate(seeds):
            model.W[m] *= draw(d_sae, 1, seed=seed).exp()
            model.b_enc[m] = draw(d_sae, seed=seed + 100) / 2 - 3 * relu  # some kept values below zero
            if bias:
                model.b_dec[m] = draw(d_in, seed=seed + 200)
    return model


def gradients(model, x_hat, target):
    """Of a loss that weights members, images and pixels differently."""
    model.zero_grad()
    (x_hat * target).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


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


def test_biases_start_at_zero():
    model = sae.TopKSAE(D_IN, D_SAE, K, SEEDS)
    assert not model.b_enc.any() and not model.b_dec.any()
    assert not model.b_dec.requires_grad


def test_decoder_bias_starts_as_given_in_every_member():
    start = draw(D_IN).float()
    model = sae.TopKSAE(D_IN, D_SAE, K, SEEDS, b_dec=start)
    assert torch.equal(model.b_dec, start.expand(3, -1)) and model.b_dec.requires_grad
    assert torch.equal(start, draw(D_IN).float())


@pytest.mark.parametrize("k", [0, -1, D_SAE + 1])
def test_impossible_k_is_an_error(k):
    with one_line_error(f"k = {k}", D_SAE, "choose k"):
        sae.TopKSAE(D_IN, D_SAE, k)


# Code and reconstruction


@every_kind
def test_shapes(relu, bias):
    model, x = make(relu=relu, bias=bias), draw(B, D_IN)
    values, indices = model.encode(x)
    assert model.n_members == 3
    assert model.W.shape == model.features().shape == (3, D_SAE, D_IN)
    assert model.b_enc.shape == (3, D_SAE) and model.b_dec.shape == (3, D_IN)
    assert values.shape == indices.shape == (3, B, K)
    assert model.decode(values, indices).shape == model(x).shape == (3, B, D_IN)


@every_kind
def test_code_and_reconstruction_follow_the_definition(relu, bias):
    model, x = make(relu=relu, bias=bias), draw(B, D_IN)
    values, indices = model.encode(x)
    x_hat = model(x)
    for m, b in itertools.product(range(3), range(B)):
        pre = model.W[m] @ (x[b] - model.b_dec[m]) + model.b_enc[m]
        kept = pre.argsort(descending=True)[:K]
        assert set(indices[m, b].tolist()) == set(kept.tolist())
        expected = pre[indices[m, b]]
        expected = expected.clamp_min(0) if relu else expected
        assert_close(values[m, b], expected, **EXACT)
        rows = model.W[m, indices[m, b]]
        expected = (expected / rows.norm(dim=1)) @ rows + model.b_dec[m]
        assert_close(x_hat[m, b], expected, **EXACT)


def test_relu_meets_values_on_both_sides_of_zero():
    # Else the tests with relu would show nothing.
    values, _ = make(relu=True).encode(draw(B, D_IN))
    assert 0.1 < (values == 0).double().mean() < 0.9


def test_ties_keep_exactly_k():
    model = make()
    with torch.no_grad():
        model.b_enc.fill_(1.0)
    values, indices = model.encode(torch.zeros(B, D_IN).double() + model.b_dec[0].detach())
    assert (values[0] == 1).all()  # every pre-activation of member 0 is its bias
    assert all(len(set(kept)) == K for kept in indices.flatten(0, 1).tolist())


@pytest.mark.parametrize("n", [1, 3, D_SAE])
def test_any_number_of_features_is_decoded(n):
    model = make()
    values, indices = draw(3, B, n), torch.arange(n).expand(3, B, n)
    assert_close(
        model.decode(values, indices), values @ model.features()[:, :n] + model.b_dec[:, None].detach(), **EXACT
    )


def test_features_have_length_one_and_no_gradient():
    features = make().features()
    assert_close(features.norm(dim=-1), torch.ones(3, D_SAE).double(), **EXACT)
    assert not features.requires_grad


@every_kind
def test_forward_is_decode_of_encode(relu, bias):
    model, x, target = make(relu=relu, bias=bias), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    fast, slow = model(x), model.decode(*model.encode(x))
    assert_close(fast, slow, **EXACT)
    expected = gradients(model, slow, target)
    actual = gradients(model, fast, target)
    assert set(actual) == ({"W", "b_enc", "b_dec"} if bias else {"W", "b_enc"})
    for name in expected:
        assert expected[name].abs().max() > 0.1
        assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


def test_forward_passes_the_gradient_on_to_the_images():
    model, target = make(), draw(3, B, D_IN, seed=1)
    x = draw(B, D_IN).requires_grad_()
    expected = torch.autograd.grad(model.decode(*model.encode(x)), x, target)[0]
    (actual,) = torch.autograd.grad(model(x), x, target, allow_unused=True)
    assert actual is not None, "forward has no gradient at its input, where decode(encode(x)) has one"
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_kind
def test_gradient_is_that_of_finite_differences(relu, bias):
    model, x = make((3, 1), relu, bias, d_in=4, d_sae=7, k=3), draw(3, 4)
    pre = torch.baddbmm(model.b_enc[:, None], x - model.b_dec[:, None], model.W.mT).detach()
    ranked = pre.sort(descending=True).values
    # The differences step by 1e-6: the k kept stay the same, and on the same side of zero.
    assert (ranked[..., 2] - ranked[..., 3]).min() > 1e-3
    assert not relu or ranked[..., :3].abs().min() > 1e-3
    names = ("W", "b_enc", "b_dec") if bias else ("W", "b_enc")
    inputs = [getattr(model, name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *given: functional_call(model, dict(zip(names, given)), (x,)), inputs)


@every_kind
def test_members_may_keep_different_numbers_of_features(relu, bias):
    ks = (2, 7, 4)
    together, x, target = make(relu=relu, bias=bias, k=ks), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    values, indices = together.encode(x)
    assert values.shape == indices.shape == (3, B, 7)
    x_hat = together(x)
    assert_close(x_hat, together.decode(values, indices), **EXACT)
    grads = gradients(together, x_hat, target)
    for m, (seed, k) in enumerate(zip(SEEDS, ks)):
        alone = make((seed,), relu, bias, k=k)
        assert not values[m, :, k:].any()
        assert_close(alone(x)[0], x_hat[m], **EXACT)
        for name, expected in gradients(alone, alone(x), target[m : m + 1]).items():
            assert_close(grads[name][m], expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ks", [(1, 2), (1, 2, 3, 4)])
def test_number_of_ks_that_is_not_that_of_members_is_named(ks):
    with one_line_error("k has", len(ks), "3 members"):
        make(k=ks)


@every_kind
def test_ensemble_equals_separate_members(relu, bias):
    together, x, target = make(relu=relu, bias=bias), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    x_hat = together(x)
    grads = gradients(together, x_hat, target)
    for m, seed in enumerate(SEEDS):
        alone = make((seed,), relu, bias)
        assert torch.equal(alone.W[0], together.W[m])
        x_hat_alone = alone(x)
        assert_close(x_hat_alone[0], x_hat[m], **EXACT)
        for name, expected in gradients(alone, x_hat_alone, target[m : m + 1]).items():
            assert_close(grads[name][m], expected[0], rtol=1e-12, atol=1e-12)


# Sums of few rows, and the dense products that take their place on a GPU


def sparse_code(n_repeats=1):
    indices = torch.stack([torch.randperm(D_SAE, generator=torch.Generator().manual_seed(i))[:K] for i in range(2 * B)])
    return indices.view(2, B, K).repeat(1, 1, n_repeats), draw(2, B, K * n_repeats)


def dense(indices, weights):
    result = torch.zeros(2, B, D_SAE).double()
    for m, b, i in itertools.product(range(2), range(B), range(indices.shape[-1])):
        result[m, b, indices[m, b, i]] += weights[m, b, i]
    return result


def test_gathered_rows_are_the_dense_product():
    indices, weights = sparse_code()
    rows = draw(2, D_SAE, D_IN, seed=1)
    assert_close(sae._gather_rows(indices, weights, rows), dense(indices, weights) @ rows, **EXACT)


def test_scattered_rows_are_the_dense_product():
    indices, weights = sparse_code()
    rows = draw(2, B, D_IN, seed=1)
    assert_close(sae._scatter_rows(indices, weights, rows, D_SAE), dense(indices, weights).mT @ rows, **EXACT)


def test_products_with_rows_are_those_of_the_dense_product():
    indices, _ = sparse_code()
    rows, g = draw(2, D_SAE, D_IN, seed=1), draw(2, B, D_IN, seed=2)
    assert_close(sae._row_products(indices, g, rows), (g @ rows.mT).gather(-1, indices), **EXACT)


@every_kind
@pytest.mark.parametrize("k", [K, (2, 7, 4)], ids=["one k", "three"])
def test_dense_path_of_a_gpu_is_the_sparse_one(relu, bias, k, monkeypatch):
    model, x, target = make(relu=relu, bias=bias, k=k), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    x_hat = model(x)
    expected = {name: grad.clone() for name, grad in gradients(model, x_hat, target).items()}
    monkeypatch.setattr(sae, "_dense_is_faster", lambda rows: True)
    assert_close(model(x), x_hat, **EXACT)
    for name, grad in gradients(model, model(x), target).items():
        assert_close(grad, expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_autocast_reaches_forward_and_backward(dense, monkeypatch):
    monkeypatch.setattr(sae, "_dense_is_faster", lambda rows: dense)
    model = make().float()
    with torch.no_grad():
        model.b_enc += 20 * torch.arange(D_SAE)  # so far apart that rounding changes no choice of features
    x, target = draw(B, D_IN).float(), draw(3, B, D_IN, seed=1).float()
    exact = gradients(model, model(x), target)
    with torch.autocast("cpu", torch.bfloat16):
        x_hat, values, _ = model.autoencode(x)
    assert values.dtype == torch.bfloat16 and x_hat.dtype == torch.float32
    for name, grad in gradients(model, x_hat, target).items():
        assert grad.dtype == torch.float32
        error = (grad - exact[name]).norm() / exact[name].norm()
        assert error < 0.02, name  # bfloat16 has 8 bits
        assert error > 1e-6 or name == "b_dec" or not dense, name  # else nothing was cast


@pytest.mark.parametrize("n_repeats", [1, 2], ids=["once", "twice"])
def test_dense_code_is_the_sparse_one(n_repeats):
    # decode takes any number of features; one that comes twice (padding, say) counts twice on every device.
    indices, weights = sparse_code(n_repeats)
    assert_close(sae._dense(indices, weights, D_SAE), dense(indices, weights), **EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_cuda_computes_the_same(relu, bias):
    model, x, target = make(relu=relu, bias=bias), draw(B, D_IN), draw(3, B, D_IN, seed=1)
    x_hat = model(x)
    expected = {name: grad.clone() for name, grad in gradients(model, x_hat, target).items()}
    model.cuda()
    on_cuda = model(x.cuda())
    assert_close(on_cuda.cpu(), x_hat, **EXACT)
    for name, grad in gradients(model, on_cuda, target.cuda()).items():
        assert_close(grad.cpu(), expected[name], rtol=1e-11, atol=1e-11)


# The file


@pytest.fixture
def saved(tmp_path):
    model = make(relu=True).float()
    model.save(tmp_path / "sae.safetensors", data="letters", recipe="improved")
    return model, tmp_path / "sae.safetensors"


def test_what_is_saved_is_loaded(saved):
    model, path = saved
    loaded = sae.TopKSAE.load(path)
    assert (loaded.d_in, loaded.d_sae, loaded.k, loaded.relu) == (D_IN, D_SAE, K, True)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    x = draw(B, D_IN).float()
    assert torch.equal(loaded(x), model(x))


def test_different_ks_are_remembered(tmp_path):
    make(k=(2, 7, 4)).save(tmp_path / "sae.safetensors", data="letters", recipe="improved")
    assert sae.TopKSAE.load(tmp_path / "sae.safetensors").k == (2, 7, 4)


def test_checkpoint_holds_what_is_promised_to_other_readers(saved):
    _, path = saved
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W": (3, D_SAE, D_IN),
        "b_enc": (3, D_SAE),
        "b_dec": (3, D_IN),
    }
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "k": "5",
            "relu": "1",
            "d_in": "20",
            "d_sae": "32",
            "n_members": "3",
            "data": "letters",
            "recipe": "improved",
        }


def test_saving_leaves_one_file(saved):
    _, path = saved
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("relu", [False, True])
def test_relu_is_remembered(tmp_path, relu):
    make(relu=relu).save(tmp_path / "sae.safetensors", data="letters", recipe="improved")
    assert sae.TopKSAE.load(tmp_path / "sae.safetensors").relu is relu


def test_missing_checkpoint_is_named(tmp_path):
    with one_line_error(tmp_path / "none.safetensors", "train one, or give another"):
        sae.TopKSAE.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04 something else"])
def test_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with one_line_error(path, "is no checkpoint", "train one, or give another"):
        sae.TopKSAE.load(path)


@pytest.mark.parametrize("change", ["no metadata", "other metadata", "a tensor missing", "other sizes"])
def test_checkpoint_of_another_project_is_named(saved, change):
    _, path = saved
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change == "no metadata":
        metadata = None
    elif change == "other metadata":
        metadata = {"format": "pt"}
    elif change == "a tensor missing":
        del tensors["b_dec"]
    else:
        metadata["d_sae"] = "33"
    save_file(tensors, path, metadata)
    with one_line_error(path, "is no checkpoint", "train one, or give another"):
        sae.TopKSAE.load(path)


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
