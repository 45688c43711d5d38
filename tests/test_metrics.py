"""Metrics, against scipy, scikit-learn and plain counting."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.metrics import r2_score
from torch.testing import assert_close

import sae_helpers as sae

D_IN, D_SAE, K, N = 20, 32, 5, 50
EXACT = dict(rtol=0, atol=1e-12)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_mse_is_that_of_each_member():
    x, x_hat = draw(N, D_IN), draw(3, N, D_IN, seed=1)
    expected = [sum(((x_hat[m, i] - x[i]) ** 2).mean() for i in range(N)) / N for m in range(3)]
    assert_close(sae.mse(x, x_hat), torch.stack(expected), **EXACT)


def test_pearson_is_scipys_image_by_image():
    x, x_hat = draw(N, D_IN) + 3, draw(3, N, D_IN, seed=1)
    expected = torch.tensor([[scipy.stats.pearsonr(x[i], x_hat[m, i])[0] for i in range(N)] for m in range(3)])
    each = torch.stack([sae.pearson(x[i : i + 1], x_hat[:, i : i + 1]) for i in range(N)], 1)
    assert_close(each, expected, **EXACT)
    assert_close(sae.pearson(x, x_hat), expected.mean(1), **EXACT)


def test_pearson_ignores_scale_and_offset():
    x = draw(N, D_IN)
    assert_close(sae.pearson(x, 3 * x + 2), torch.tensor(1.0).double(), **EXACT)
    assert_close(sae.pearson(x, -x), torch.tensor(-1.0).double(), **EXACT)


@pytest.mark.parametrize("constant", ["x", "x_hat"])
def test_image_without_variation_counts_as_zero(constant):
    x, x_hat = draw(2, D_IN), draw(2, D_IN, seed=1)
    (x if constant == "x" else x_hat)[1] = 0.5
    assert_close(sae.pearson(x, x_hat), sae.pearson(x[:1], x_hat[:1]) / 2, **EXACT)


# evaluate


@pytest.fixture(params=[False, True], ids=["signed", "relu"])
def model(request):
    model = sae.TopKSAE(D_IN, D_SAE, K, seeds=(0, 1), b_dec=torch.zeros(D_IN), relu=request.param)
    with torch.no_grad():
        model.b_enc += draw(2, D_SAE, dtype=torch.float32) - 1.5
        model.b_enc[:, :4] = -9  # never among the k largest
    return model


@pytest.fixture
def images():
    return draw(N, D_IN, dtype=torch.float32) / 5


def test_counts_are_those_of_brute_force(model, images):
    quality = sae.evaluate(model, images, images.mean(0))
    values, indices = model.encode(images)
    for m in range(2):
        fired = [{i for i, v in zip(*code) if v != 0} for code in zip(indices[m].tolist(), values[m].tolist())]
        counts = torch.tensor([sum(i in features for features in fired) for i in range(D_SAE)])
        assert_close(quality["activity"][m], counts / N, rtol=0, atol=0)
        assert quality["dead_fraction"][m].item() == (counts == 0).sum().item() / D_SAE > 0
        assert torch.equal(sae.count_fires(values, indices, D_SAE)[m], counts)


def test_exactly_k_are_active_without_relu_and_fewer_with(model, images):
    active = sae.evaluate(model, images, images.mean(0))["activity"].sum(1)
    assert (active < K - 0.01).all() if model.relu else active.tolist() == pytest.approx([K, K])


@pytest.mark.parametrize("chunk", [100, 1000])
def test_rare_features_fire_for_fewer_than_one_image_in_a_thousand(chunk):
    fires = [0, 1, 2, 3, 4, 2990]  # of 3,000 images
    model = sae.TopKSAE(6, 6, 1)
    with torch.no_grad():
        model.W[0] = torch.eye(6)
    x = torch.eye(6).repeat_interleave(torch.tensor(fires), 0)
    x = x[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    quality = sae.evaluate(model, x, x.mean(0), chunk)
    assert_close(quality["activity"][0], torch.tensor(fires) / 3000)
    assert quality["rare_fraction"].tolist() == pytest.approx([3 / 6])  # 0, 1 and 2; 3 are exactly one in a thousand
    assert quality["dead_fraction"].tolist() == pytest.approx([1 / 6])


def test_members_may_keep_different_numbers_of_features(images):
    model = sae.TopKSAE(D_IN, D_SAE, (2, 7), seeds=(0, 1), encoder_map=True)
    quality = sae.evaluate(model, images, images.mean(0))
    assert quality["activity"].sum(1).tolist() == pytest.approx([2, 7])
    for m, k in enumerate((2, 7)):
        alone = sae.evaluate(sae.TopKSAE(D_IN, D_SAE, k, seeds=(m,)), images, images.mean(0))
        assert all(
            quality[name][m].tolist() == pytest.approx(value[0].tolist(), rel=1e-5) for name, value in alone.items()
        )


def test_quality_is_that_of_the_reconstructions(model, images):
    mean = images.mean(0) + 0.1
    quality, x_hat = sae.evaluate(model, images, mean), model(images).detach()
    assert_close(quality["mse"], sae.mse(images, x_hat), rtol=1e-5, atol=0)
    assert_close(quality["pearson"], sae.pearson(images, x_hat), rtol=1e-5, atol=0)
    expected = 1 - (x_hat - images).square().sum((1, 2)) / (images - mean).square().sum()
    assert_close(quality["explained_variance"], expected, rtol=1e-5, atol=1e-6)
    # scikit-learn takes the mean of the images that it is given.
    expected = [r2_score(images, x_hat[m], multioutput="variance_weighted") for m in range(2)]
    assert sae.evaluate(model, images, images.mean(0))["explained_variance"].tolist() == pytest.approx(
        expected, rel=1e-5
    )


def test_explained_variance_is_zero_for_the_mean_image_and_one_for_the_image(images):
    model = sae.TopKSAE(D_IN, D_IN, D_IN, b_dec=images.mean(0), relu=True)
    with torch.no_grad():
        model.b_enc.fill_(-9)
    quality = sae.evaluate(model, images, images.mean(0))
    assert quality["explained_variance"].item() == pytest.approx(0, abs=1e-6) and quality["dead_fraction"] == 1
    all_kept = sae.evaluate(sae.TopKSAE(D_IN, D_IN, D_IN), images, images.mean(0))
    assert all_kept["explained_variance"].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, N, N + 1])
def test_chunks_change_nothing(model, images, chunk):
    expected = sae.evaluate(model, images, images.mean(0))
    actual = sae.evaluate(model, images, images.mean(0), chunk=chunk)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, rtol=1e-5, atol=1e-6)


def test_evaluation_leaves_no_gradient(model, images):
    assert not any(value.requires_grad for value in sae.evaluate(model, images, images.mean(0)).values())


# Matching


@pytest.mark.parametrize("exact", [True, False])
def test_known_permutation_is_recovered(exact):
    a = draw(D_SAE, D_IN)
    permutation = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    order, cosine = sae.match_features(a, a[permutation], exact)
    assert torch.equal(order, permutation.argsort())
    assert_close(cosine, torch.ones(D_SAE).double(), **EXACT)


def test_matching_ignores_length_but_not_sign():
    a = draw(D_SAE, D_IN)
    _, cosine = sae.match_features(a, a * draw(D_SAE, 1, seed=1).exp())
    assert_close(cosine, torch.ones(D_SAE).double(), **EXACT)
    _, cosine = sae.match_features(a[:2], -a[:2])
    assert cosine.mean() < 0.9


def dictionaries(shared, seed, n=200, d=30):
    """Two whose first `shared` features are nearly the same; in the second they stand elsewhere."""
    a, b = draw(n, d, seed=seed), draw(n, d, seed=seed + 100)
    b[:shared] = a[:shared] + 0.5 * draw(shared, d, seed=seed + 200)
    return a, b[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("shared", [0, 100, 200])
def test_fast_matching_is_a_permutation_and_nearly_the_best(shared):
    for seed in range(5):
        a, b = dictionaries(shared, seed)
        order, cosine = sae.match_features(a, b, exact=False)
        assert torch.equal(order.sort().values, torch.arange(200))
        assert_close(cosine, F.cosine_similarity(a, b[order], dim=1), **EXACT)
        best = sae.match_features(a, b)[1].mean()
        assert best - 0.01 <= cosine.mean() <= best + 1e-12


def test_fast_matching_pairs_nearest_features():
    a, b = dictionaries(100, seed=0)
    similarity = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    order, _ = sae.match_features(a, b, exact=False)
    nearest = [(i, j) for i, j in enumerate(similarity.argmax(1).tolist()) if similarity[:, j].argmax() == i]
    assert 100 <= len(nearest) < 200
    assert all(order[i] == j for i, j in nearest)


@pytest.mark.parametrize("exact", [True, False])
def test_equal_features_are_matched_all_the_same(exact):
    a = draw(D_SAE, D_IN)
    a[5:9] = a[4]
    order, cosine = sae.match_features(a, a.flip(0), exact)
    assert torch.equal(order.sort().values, torch.arange(D_SAE))
    assert_close(cosine, torch.ones(D_SAE).double(), **EXACT)
    assert sae.match_features(a[:1], -a[:1], exact)[0].tolist() == [0]


def test_matching_is_the_best_of_all():
    a, b = draw(5, 3), draw(5, 3, seed=1)
    order, cosine = sae.match_features(a, b)
    pairs = F.cosine_similarity(a[:, None], b[None], dim=-1)
    best = max(sum(pairs[i, p[i]].item() for i in range(5)) for p in itertools.permutations(range(5)))
    assert cosine.sum().item() == pytest.approx(best, abs=1e-12)
    assert_close(cosine, pairs[range(5), order], **EXACT)


def test_permuted_copies_match_with_cosine_one():
    a = F.normalize(draw(D_SAE, D_IN), dim=-1)
    copies = torch.stack([a, a.flip(0), a.roll(3, 0)])
    assert sae.matched_cosine(copies) == pytest.approx(1, abs=1e-12)


def test_matched_cosine_is_the_mean_over_pairs():
    features = draw(3, D_SAE, D_IN)
    pairs = [sae.match_features(features[i], features[j])[1].mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert sae.matched_cosine(features) == pytest.approx(sum(pairs) / 3, abs=1e-12)


def test_one_member_matches_nobody():
    assert math.isnan(sae.matched_cosine(draw(1, D_SAE, D_IN)))
