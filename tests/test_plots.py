"""The pictures of a run, and that no setting of the user's changes them."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

import mnist_sae_train as cli
import sae_helpers as sae


@pytest.fixture(scope="module")
def digits():
    """28 × 28 pixels, under a name that no picture shows by chance."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:150], dtype=torch.float32).div(16)
    images = images.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :28, :28].flatten(1)
    labels = torch.tensor(load_digits().target[:150])
    return sae.Images("Some Digits", (28, 28), images[:50], labels[:50], images[50:], labels[50:])


@pytest.fixture(scope="module")
def trained(digits):
    recipe = replace(sae.RECIPES["improved"], n_members=2, epochs=2, d_sae=200, k=9, batch_size=5)
    return sae.Trainer(recipe, digits.train).run(progress=False)


EPOCHS = [{"step": step, "test": {"mse": [0.05, 0.06], "pearson": [0.5, 0.6]}} for step in (10, 20)]


def plot(name, trained, digits):
    return {
        "reconstructions": lambda: cli.plot_reconstructions(trained.model, digits),
        "training": lambda: cli.plot_training(trained.history, digits),
        "training with epochs": lambda: cli.plot_training(trained.history, digits, EPOCHS),
        "features": lambda: cli.plot_features(trained.model, trained.use / 50, digits),
    }[name]()


def tiles(figure, shape, columns, label=False):
    """The images of a grid in reading order; between them lies nothing (nan)."""
    canvas = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    step_y, step_x = shape[0] + 2 + 10 * label, shape[1] + 2
    rows = range(10 * label, canvas.shape[0], step_y)
    cut = [canvas[y : y + shape[0], x * step_x : x * step_x + shape[1]] for y in rows for x in range(columns)]
    return [tile for tile in cut if tile.size and not np.isnan(tile).any()]


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
def test_picture_names_its_data_and_is_a_small_png_without_a_warning(name, trained, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "__array__ implementation")  # of torch's tensors
        figure = plot(name, trained, digits)
        content = png(figure)
    assert "Some Digits" in text(figure)
    assert content.startswith(b"\x89PNG") and 5_000 < len(content) < 300_000


@every_plot
def test_nothing_of_a_picture_is_cut_off(name, trained, digits):
    figure = plot(name, trained, digits)
    figure.canvas.draw()
    drawn, page = figure.get_tightbbox(), figure.bbox_inches.padded(1e-6)  # inches
    assert page.x0 <= drawn.x0 and drawn.x1 <= page.x1 and page.y0 <= drawn.y0 and drawn.y1 <= page.y1


@every_plot
def test_settings_of_the_user_change_nothing(name, trained, digits, tmp_path):
    def pictures(folder):
        (tmp_path / folder).mkdir()
        cli.save_pictures({"it": plot(name, trained, digits)}, tmp_path / folder)
        return (tmp_path / folder / "it.png").read_bytes()

    expected = pictures("plain")
    user = {
        "image.origin": "lower", "text.usetex": True, "savefig.bbox": "tight", "axes.titlesize": 40,
        "axes.facecolor": "red", "image.cmap": "hot", "figure.dpi": 30, "savefig.transparent": True,
    }  # fmt: skip
    with matplotlib.rc_context(user):
        assert pictures("user") == expected
        assert matplotlib.rcParams["image.origin"] == "lower"  # and they are left as they were


@every_plot
@pytest.mark.parametrize("given", ["$$", "$\\frac{$", "a_b^c$", "手書き"])
def test_name_is_never_markup(name, trained, digits, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "__array__ implementation")
        warnings.filterwarnings("ignore", "Glyph")
        figure = plot(name, trained, replace(digits, name=given))
        assert png(figure) and given in text(figure)


def few(digits, n):
    return replace(digits, test=digits.test[:n], test_labels=digits.test_labels[:n])


def test_reconstructions_are_the_best_median_and_worst(trained, digits):
    figure = cli.plot_reconstructions(trained.model, digits)
    x_hat = trained.model(digits.test)[0].detach()
    scores = torch.stack([sae.pearson(x[None], y[None]) for x, y in zip(digits.test, x_hat)])
    ranked = scores.sort(descending=True).values
    expected = [*ranked[:4], *ranked[48:52], *ranked[-4:]]
    assert labels(figure)[12:] == [f"{score:.3f}" for score in expected]
    images = [image.ravel() for image in tiles(figure, (28, 28), 12, label=True)]
    assert len(images) == 24 and "worst four of 100" in text(figure)
    for above, below, score in zip(images[:12], images[12:], expected):
        assert np.corrcoef(above, below)[0, 1] == pytest.approx(score.item(), abs=1e-5)
        assert any(np.allclose(above, image, atol=1e-6) for image in digits.test.numpy())


@pytest.mark.parametrize("n", [1, 2, 3, 11, 12])
def test_few_test_images_are_each_shown_once(trained, digits, n):
    data = few(digits, n)
    figure = cli.plot_reconstructions(trained.model, data)
    images = [tuple(image.ravel()) for image in tiles(figure, (28, 28), 12, label=True)]
    originals = {tuple(image) for image in data.test.numpy()}
    assert len(images) == 2 * n and set(images[:n]) == originals and not set(images[n:]) & originals
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape[0] == 2 * (28 + 2 + 10) - 2  # the originals in one row, the reconstructions in the next
    assert f"all {n} test images" in text(figure)


def test_labels_are_digits_only_on_mnist(trained, digits):
    shown = {kind: labels(cli.plot_reconstructions(trained.model, replace(digits, is_mnist=kind))) for kind in (0, 1)}
    assert all(label.startswith("label ") for label in shown[0][:12])
    assert all(label.startswith("digit ") for label in shown[1][:12])


def test_training_is_drawn_with_a_line_for_each_member(trained, digits):
    history = trained.history
    for axis, name in zip(cli.plot_training(history, digits, EPOCHS).axes, ("mse", "pearson")):
        drawn = [line.get_ydata() for line in axis.lines if len(line.get_ydata())]
        for m in range(2):
            assert np.allclose(drawn[m], [values[m] for values in history[name]], rtol=0, atol=0)
        assert np.allclose(drawn[2], [np.mean(entry["test"][name]) for entry in EPOCHS], rtol=0, atol=0)
        assert axis.get_xlabel() == "step" and axis.get_ylabel()


def test_training_without_a_loss_or_with_an_undefined_figure_is_drawn(digits):
    history = {"step": [0, 10], "mse": [[0.0], [0.0]], "pearson": [[0.0], [0.0]]}
    epochs = [{"step": 20, "test": {"mse": [0.0], "pearson": None}}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png(cli.plot_training(history, digits, epochs))


def test_features_are_ordered_by_use(trained, digits):
    use = torch.arange(200).flip(0)[None].float().repeat(2, 1)  # feature 0 is used most
    figure = cli.plot_features(trained.model, use, digits, n=4)
    for image, feature in zip(tiles(figure, (28, 28), 10), (0, 66, 132, 199), strict=True):
        expected = trained.model.features()[0, feature]
        assert np.allclose(image.ravel(), expected / expected.abs().max(), atol=1e-6)


def test_dead_and_rare_features_are_counted_in_the_title(trained, digits):
    use = torch.ones(2, 200)
    use[0, :50] = 0
    use[0, 50:60] = 0.0009
    assert "25.0% dead, 30.0% rare" in text(cli.plot_features(trained.model, use, digits))


def test_few_features_are_each_shown_once(digits):
    figure = cli.plot_features(sae.TopKSAE(784, 30, 5), torch.rand(1, 30), digits)
    shown = [tuple(image.ravel()) for image in tiles(figure, (28, 28), 10)]
    assert len(shown) == len(set(shown)) == 30 and "30 of 30" in text(figure)


def test_pictures_are_written_by_name(tmp_path, trained, digits):
    figures = cli.plot_run(trained, digits, EPOCHS, trained.use)
    cli.save_pictures(figures, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.png" for name in figures)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
