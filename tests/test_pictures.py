"""Pictures that name their data, tables, and claims that are checked."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import replace

import IPython.display
import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import sae_helpers as sae


@pytest.fixture(scope="module")
def digits():
    """28 × 28 pixels, under a name that no picture shows by chance."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:400], dtype=torch.float32).div(16)
    images = images.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :28, :28].flatten(1)
    labels = torch.tensor(load_digits().target[:400])
    return sae.Images("Some Digits", (28, 28), images[:300], labels[:300], images[300:], labels[300:])


@pytest.fixture(scope="module")
def trained(digits):
    recipe = replace(sae.RECIPES["improved"], n_members=2, epochs=4)
    return sae.Trainer(recipe, digits.train).run(progress=False)


def epochs(trained):
    return [{"step": step, "test": {"mse": [0.05, 0.06], "pearson": [0.5, 0.6]}} for step in (6, 12)]


def activity(trained, digits):
    return sae.evaluate(trained.model, digits.test, digits.train.mean(0))["activity"]


def plot(name, trained, digits):
    return {
        "reconstructions": lambda: sae.plot_reconstructions(trained.model, digits),
        "training": lambda: sae.plot_training(trained.history, digits),
        "training with epochs": lambda: sae.plot_training(trained.history, digits, epochs(trained)),
        "features": lambda: sae.plot_features(trained.model, activity(trained, digits), digits),
    }[name]()


def tiles(figure, shape, columns, label=False):
    """The images of a grid in reading order; between them lies nothing (nan)."""
    canvas = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    step_y, step_x = shape[0] + 2 + 9 * label, shape[1] + 2
    rows = range(9 * label, canvas.shape[0], step_y)
    cut = [canvas[y : y + shape[0], x * step_x : x * step_x + shape[1]] for y in rows for x in range(columns)]
    cut = [tile for tile in cut if tile.size and not np.isnan(tile).any()]
    assert sum(tile.size for tile in cut) == (~np.isnan(canvas)).sum()
    return cut


def labels(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def text(figure):
    return " ".join([figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)])


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


every_plot = pytest.mark.parametrize("name", ["reconstructions", "training", "training with epochs", "features"])


@every_plot
def test_picture_names_its_data(name, trained, digits):
    assert "Some Digits" in text(plot(name, trained, digits))


@every_plot
def test_picture_is_a_small_png(name, trained, digits):
    content = png(plot(name, trained, digits))
    assert content.startswith(b"\x89PNG") and 5_000 < len(content) < 300_000


@every_plot
def test_picture_warns_of_nothing(name, trained, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png(plot(name, trained, digits))


@every_plot
def test_nothing_of_a_picture_is_cut_off(name, trained, digits):
    figure = plot(name, trained, digits)
    figure.canvas.draw()
    drawn, page = figure.get_tightbbox(), figure.bbox_inches.padded(1e-6)  # inches
    assert page.x0 <= drawn.x0 and drawn.x1 <= page.x1 and page.y0 <= drawn.y0 and drawn.y1 <= page.y1


def test_reconstructions_are_the_best_median_and_worst(trained, digits):
    figure = sae.plot_reconstructions(trained.model, digits)
    x_hat = trained.model(digits.test)[0].detach()
    scores = torch.stack([sae.pearson(x[None], y[None]) for x, y in zip(digits.test, x_hat)])
    ranked = scores.sort(descending=True).values
    expected = [*ranked[:4], *ranked[48:52], *ranked[-4:]]
    assert labels(figure)[12:] == [f"{score:.3f}" for score in expected]
    images = [image.ravel() for image in tiles(figure, (28, 28), 12, label=True)]
    assert len(images) == 24
    for above, below, score in zip(images[:12], images[12:], expected):
        assert np.corrcoef(above, below)[0, 1] == pytest.approx(score.item(), abs=1e-5)
        assert any(np.allclose(above, image, atol=1e-6) for image in digits.test.numpy())


def test_training_is_drawn_with_a_line_for_each_member(trained, digits):
    history = trained.history
    for axis, name in zip(sae.plot_training(history, digits, epochs(trained)).axes, ("mse", "pearson")):
        drawn = [line.get_ydata() for line in axis.lines if len(line.get_ydata())]
        for m in range(2):
            assert np.allclose(drawn[m], [values[m] for values in history[name]], rtol=0, atol=0)
        means = [np.mean(entry["test"][name]) for entry in epochs(trained)]
        assert np.allclose(drawn[2], means, rtol=0, atol=0)
        assert axis.get_xlabel() == "step" and axis.get_ylabel()


def test_features_are_ordered_by_use(trained, digits):
    use = torch.arange(1024).flip(0)[None].float().repeat(2, 1)  # feature 0 is used most
    figure = sae.plot_features(trained.model, use, digits, n=4)
    for image, feature in zip(tiles(figure, (28, 28), 20), (0, 341, 682, 1023), strict=True):
        expected = trained.model.features()[0, feature]
        assert np.allclose(image.ravel(), expected / expected.abs().max(), atol=1e-6)


def test_dead_features_are_counted_in_the_title(trained, digits):
    use = torch.ones(2, 1024)
    use[0, :256] = 0
    assert "25.0% dead" in sae.plot_features(trained.model, use, digits).get_suptitle()


def test_few_features_are_each_shown_once(digits):
    model = sae.TopKSAE(784, 30, 5)
    figure = sae.plot_features(model, torch.rand(1, 30), digits)
    shown = [tuple(image.ravel()) for image in tiles(figure, (28, 28), 20)]
    assert len(shown) == len(set(shown)) == 30
    assert "30 of 30" in figure.get_suptitle()


def of_shape(height, width):
    """A data set of which only name and shape are asked."""
    nothing = torch.empty(0)
    return sae.Images("shapes", (height, width), nothing, nothing, nothing, nothing)


def test_images_fill_rows():
    images = torch.rand(7, 42)
    figure = sae.show_images(images, of_shape(6, 7), "seven", columns=3, titles=list("abcdefg"))
    assert np.allclose([tile.ravel() for tile in tiles(figure, (6, 7), 3, label=True)], images, atol=1e-6)
    assert labels(figure) == list("abcdefg")
    places = np.array([text.get_position() for text in figure.axes[0].texts])
    assert (np.diff(places[:3, 0]) > 0).all() and len(set(places[:3, 1])) == 1 and places[3, 1] > places[0, 1]
    assert figure.get_suptitle() == "shapes: seven"


def test_grey_images_share_a_scale_and_signed_ones_have_zero_in_the_middle():
    images = torch.tensor([[-0.5, 0.25], [0.1, 0.2], [0.0, 0.0]])
    grey = sae.show_images(images, of_shape(1, 2), "pairs", columns=3)
    assert grey.axes[0].images[0].get_clim() == (0, 1)
    assert np.allclose([tile.ravel() for tile in tiles(grey, (1, 2), 3)], images)
    signed = sae.show_images(images, of_shape(1, 2), "pairs", columns=3, signed=True)
    assert signed.axes[0].images[0].get_clim() == (-1, 1)
    assert np.allclose([tile.ravel() for tile in tiles(signed, (1, 2), 3)], [[-1, 0.5], [0.5, 1], [0, 0]])


def test_signed_colours_grow_lighter():
    red, green, blue = matplotlib.colors.to_rgba_array(sae.SIGNED(np.linspace(0, 1, sae.SIGNED.N)))[:, :3].T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(lightness) > 0).all()


def test_shown_figure_names_its_data():
    figure = plt.figure()
    sae.show(figure, of_shape(1, 1))
    assert [text.get_text() for text in figure.texts] == ["shapes"]


# Tables and claims


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show."""
    result = []
    monkeypatch.setattr(IPython.display, "display", lambda markdown: result.append(markdown.data))
    return result


def test_table_is_markdown_with_four_decimals(shown):
    sae.table(("name", "value"), [("a", 0.123456), ("b", 7)], of_shape(1, 1))
    assert shown == ["| name | value |\n| --- | --- |\n| a | 0.1235 |\n| b | 7 |\n\n*Data: shapes*"]


def test_bar_in_a_cell_does_not_end_it(shown):
    sae.table(("|x|",), [("a|b",)], of_shape(1, 1))
    assert shown == ["| \\|x\\| |\n| --- |\n| a\\|b |\n\n*Data: shapes*"]


@pytest.fixture
def known(small_mnist):
    return sae.load_mnist(small_mnist)


@pytest.mark.parametrize("measured", [0.1, 0.15, 0.2])
def test_claim_that_holds_is_shown_to_hold(shown, known, measured):
    sae.check_claims([("loss", measured, 0.1, 0.2)], known)
    assert f"| loss | {measured:.4g} | 0.1 to 0.2 | holds |" in shown[0]


@pytest.mark.parametrize("measured", [0.0999, 0.2001, math.nan, math.inf])
def test_claim_that_fails_raises_and_is_shown(shown, known, measured):
    claims = [("loss", measured, 0.1, 0.2), ("share", 0.5, 0, 1)]
    with pytest.raises(AssertionError, match=f"loss: measured {measured:.4g}, accepted 0.1 to 0.2"):
        sae.check_claims(claims, known)
    assert "**FAILS**" in shown[0] and "| share | 0.5 | 0 to 1 | holds |" in shown[0]


def test_every_failed_claim_is_named(shown, known):
    with pytest.raises(AssertionError, match=r"first: .*; second: "):
        sae.check_claims([("first", 1, 2, 3), ("second", 4, 2, 3)], known)


def test_claims_are_not_checked_on_other_data(shown, digits):
    sae.check_claims([("loss", 0.15, 0.1, 0.2), ("share", 7, 0, 1)], digits)
    assert shown[0].count("not checked (not MNIST)") == 2
    assert not any(word in shown[0] for word in ("holds", "FAILS"))
