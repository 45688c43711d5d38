"""The world of notebook 10: it is what its words say, and the benchmark's is the same."""

import known_features
import pytest
import torch
from test_notebooks import ROOT, cells_of

import sae_helpers as sae

KINDS = [{}, {"correlation": 0.5}, {"family": True}]


def of_notebook():
    cells = cells_of(ROOT / "notebooks" / "10_known_features.ipynb")
    (source,) = [source for _, source in cells if source.startswith("def world(")]
    names = {"torch": torch, "F": torch.nn.functional}
    exec(source, names)
    return names["world"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_benchmark_and_notebook_draw_the_same(kind):
    (a, draw_a), (b, draw_b) = of_notebook()(3, **kind), known_features.world(3, **kind)
    assert torch.equal(a, b)
    assert torch.equal(draw_a(50, 7), draw_b(50, 7))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_codes_are_sparse_with_unequal_frequencies(kind):
    truth, draw = known_features.world(0, **kind)
    fires = draw(4_000, 1) > 0
    assert torch.allclose(truth.norm(dim=1), torch.ones(192), atol=1e-5)
    assert 7 < fires.sum(1).double().mean() < 9
    assert fires[:, 0].double().mean() > 20 * fires[:, -40:].double().mean()


def test_children_fire_only_with_their_parent_and_groups_together():
    codes = known_features.world(0, family=True)[1](4_000, 1)
    parents, children = codes[:, :16] > 0, codes[:, 16:64].view(-1, 16, 3) > 0
    assert children.any() and not (children & ~parents[..., None]).any()
    assert children.sum() / (3 * parents.sum()) == pytest.approx(0.25, abs=0.02)

    def together(correlation):  # how uneven the number of those that fire at a time is
        return (known_features.world(0, correlation=correlation)[1](4_000, 1) > 0).sum(1).double().var()

    assert together(0.5) > 1.5 * together(0.0)


def test_recovery_of_the_truth_is_whole_and_of_anything_else_is_not():
    truth, _ = known_features.world(0)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    assert known_features.recovery(truth, truth[order]) == pytest.approx({"mcc": 1, "found": 1}, abs=1e-5)
    other, _ = known_features.world(1)
    assert known_features.recovery(truth, other)["found"] == 0


def test_pursuit_starts_away_from_the_truth():
    """With the world's own seed it would find what it was given."""
    truth, draw = known_features.world(0)
    x = draw(256, 1) @ truth
    start = known_features.train_pursuit(x, k=2, seed=0, epochs=1, rate=1e-6)
    assert known_features.recovery(truth, start)["mcc"] < 0.4


def test_shared_counts_what_is_true_and_what_agrees():
    a = torch.eye(4)
    shared = known_features.shared(truth=a[:2], a=a, b=a[1:3])
    assert shared == {
        "true": 0.5, "agree": 0.5, "true_of_agreeing": 0.5, "true_of_others": 0.5, "wrong_and_agreeing": 0.25
    }  # fmt: skip


def test_pursuit_subtracts_what_it_has_chosen():
    x = torch.tensor([[3.0, 1.0, 2.0]])
    assert torch.equal(known_features.pursue(x, torch.eye(3), 2), torch.tensor([[3.0, 0.0, 2.0]]))
    assert sae.mse(x, known_features.pursue(x, torch.eye(3), 3)) == 0
