"""What notebooks show: pictures that name their data, tables, stored results and claims that are checked."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import IPython.display
import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import PROJECT, one_line_error

import sae_helpers as sae


def tiles(figure, shape, columns, label=False):
    """The images of a grid in reading order; between them lies nothing (nan)."""
    canvas = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    step_y, step_x = shape[0] + 2 + 10 * label, shape[1] + 2
    rows = range(10 * label, canvas.shape[0], step_y)
    cut = [canvas[y : y + shape[0], x * step_x : x * step_x + shape[1]] for y in rows for x in range(columns)]
    cut = [tile for tile in cut if tile.size and not np.isnan(tile).any()]
    assert sum(tile.size for tile in cut) == (~np.isnan(canvas)).sum()
    return cut


def of_shape(height, width):
    """A data set of which only name and shape are asked."""
    nothing = torch.empty(0)
    return sae.Images("shapes", (height, width), nothing, nothing, nothing, nothing)


def test_images_fill_rows():
    images = torch.rand(7, 42)
    figure = sae.show_images(images, of_shape(6, 7), "seven", columns=3, titles=list("abcdefg"))
    assert np.allclose([tile.ravel() for tile in tiles(figure, (6, 7), 3, label=True)], images, atol=1e-6)
    assert [text.get_text() for text in figure.axes[0].texts] == list("abcdefg")
    places = np.array([text.get_position() for text in figure.axes[0].texts])
    assert (np.diff(places[:3, 0]) > 0).all() and len(set(places[:3, 1])) == 1 and places[3, 1] > places[0, 1]
    assert figure.get_suptitle() == "shapes: seven"


@pytest.mark.parametrize("n", [1, 3, 4])
def test_few_images_are_shown_in_one_row(n):
    images = torch.rand(n, 42)
    figure = sae.show_images(images, of_shape(6, 7), "few", columns=4)
    assert np.allclose([tile.ravel() for tile in tiles(figure, (6, 7), 4)], images, atol=1e-6)


def test_title_stands_above_the_images_and_on_the_page():
    for n, columns in ((1, 4), (40, 10), (3, 1)):
        figure = sae.show_images(torch.rand(n, 42), of_shape(6, 7), "title", columns=columns, titles=["1"] * n)
        figure.canvas.draw()
        title, images = figure._suptitle.get_window_extent(), figure.axes[0].get_window_extent()
        assert title.y0 >= images.y1 - 1 and title.y1 <= figure.bbox.y1 + 1


def test_images_are_drawn_on_an_axis_that_is_given():
    figure, axes = plt.subplots(1, 2)
    images = torch.rand(3, 42)
    assert sae.show_images(images, of_shape(6, 7), "here", columns=3, axis=axes[0]) is figure
    assert axes[0].get_title() == "here" and not axes[1].images and len(plt.get_fignums()) == 1
    assert np.allclose([tile.ravel() for tile in tiles(figure, (6, 7), 3)], images, atol=1e-6)


def test_images_of_a_model_are_shown_as_they_are():
    model = sae.TopKSAE(42, 50, 3)
    x_hat = model(torch.rand(2, 42)).double()[0]  # with a gradient, in float64
    shown = tiles(sae.show_images(x_hat, of_shape(6, 7), "two"), (6, 7), 10)
    assert np.allclose([tile.ravel() for tile in shown], x_hat.detach(), atol=1e-6)


def test_grey_images_share_a_scale_and_signed_ones_have_zero_in_the_middle():
    images = torch.tensor([[-0.5, 0.25], [0.1, 0.2], [0.0, 0.0]])
    grey = sae.show_images(images, of_shape(1, 2), "pairs", columns=3)
    assert grey.axes[0].images[0].get_clim() == (0, 1)
    assert np.allclose([tile.ravel() for tile in tiles(grey, (1, 2), 3)], images)
    signed = sae.show_images(images, of_shape(1, 2), "pairs", columns=3, signed=True)
    assert signed.axes[0].images[0].get_clim() == (-1, 1)
    assert np.allclose([tile.ravel() for tile in tiles(signed, (1, 2), 3)], [[-1, 0.5], [0.5, 1], [0, 0]])


def test_signed_colours_grow_lighter():
    figure = sae.show_images(torch.rand(1, 2), of_shape(1, 2), "one", signed=True)
    colours = figure.axes[0].images[0].cmap
    red, green, blue = matplotlib.colors.to_rgba_array(colours(np.linspace(0, 1, colours.N)))[:, :3].T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(lightness) > 0).all()


def test_shown_figure_names_its_data():
    figure = plt.figure()
    sae.show(figure, of_shape(1, 1))
    assert [text.get_text() for text in figure.texts] == ["shapes"]


# Tables, stored results and claims


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
    sae.table(("x",), [("|a|b",)], of_shape(1, 1))
    assert shown == ["| x |\n| --- |\n| \\|a\\|b |\n\n*Data: shapes*"]


def test_stored_results_are_those_of_the_benchmark():
    path = PROJECT / "benchmarks" / "results" / "downstream.json"
    assert sae.stored_results("downstream") == json.loads(path.read_text())


@pytest.mark.parametrize("place", ["project", "installation", "here"])
def test_stored_results_are_found_without_the_project(tmp_path, monkeypatch, place):
    folders = {"project": "benchmarks/results", "installation": "prefix/share/mnist-sae", "here": "."}
    (tmp_path / folders[place]).mkdir(parents=True, exist_ok=True)
    (tmp_path / folders[place] / "speed.json").write_text('{"länge": [1]}', encoding="utf-8")
    monkeypatch.setattr(sae, "_PROJECT", tmp_path)
    monkeypatch.setattr(sae.sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.chdir(tmp_path)
    assert sae.stored_results("speed") == {"länge": [1]}


def test_results_that_are_nowhere_are_named():
    with one_line_error("none.json is not here", "beside the notebook"):
        sae.stored_results("none")


KNOWN = replace(of_shape(1, 1), is_mnist=True)


@pytest.mark.parametrize("measured", [0.1, 0.15, 0.2])
def test_claims_that_hold_take_one_line(measured, capsys):
    sae.check_claims([("loss", measured, 0.1, 0.2), ("share", 1, 1, 1)], KNOWN)
    assert capsys.readouterr().out == "2 claims, all hold\n"


@pytest.mark.parametrize("measured", [0.0999, 0.2001, math.nan, math.inf])
def test_claim_that_fails_is_named_alone(measured):
    with pytest.raises(AssertionError) as caught:
        sae.check_claims([("share", 0.5, 0, 1), ("loss", measured, 0.1, 0.2)], KNOWN)
    assert str(caught.value) == f"loss: {measured:.4g}, not 0.1 to 0.2"


def test_every_failed_claim_is_named():
    claims = iter([("first", 1, 2, 3), ("second", 2, 2, 3), ("third", 4, 2, 3)])  # may be made one by one
    with pytest.raises(AssertionError, match=r"^first: 1, not 2 to 3; third: 4, not 2 to 3$"):
        sae.check_claims(claims, KNOWN)


def test_claims_are_not_checked_on_other_data(capsys):
    sae.check_claims([("loss", 0.15, 0.1, 0.2), ("share", 7, 0, 1)], of_shape(1, 1))
    assert capsys.readouterr().out == "2 claims, not checked (not MNIST)\n"
