"""What a finished run leaves, and how it is found again."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import one_line_error

import sae_helpers as sae

RECIPE = replace(sae.RECIPES["improved"], d_sae=20, k=(3, 4), n_members=2, epochs=1, batch_size=32)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, whose module is older than every run."""
    monkeypatch.setattr(sae, "_PROJECT", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def saved(folder, data, recipe=RECIPE, age=0):
    trainer = sae.Trainer(recipe, data.train).run(progress=False)
    sae.save_run(trainer, data, [sae.report(trainer, data)[0]], 1.5, folder)
    changed = (folder / "metrics.json").stat().st_mtime - age
    os.utime(folder / "metrics.json", (changed, changed))
    return trainer


def test_a_run_is_found_with_its_weights(project, small):
    trainer = saved(project / "runs" / "one", small)
    found = sae.find_run(RECIPE, small)
    assert found == project / "runs" / "one"
    model = sae.TopKSAE.load(found / "sae.safetensors")
    assert torch.equal(model.W, trainer.model.W) and model.k == (3, 4)
    metrics = json.loads((found / "metrics.json").read_text())
    assert metrics["seconds"] == 1.5 and metrics["final"]["test"] == metrics["epochs"][-1]["test"]


def test_the_newest_of_the_right_kind_is_found(project, small):
    runs = project / "runs"
    saved(runs / "older", small, age=3)
    saved(runs / "newer", small, age=2)
    saved(runs / "other seed", small, replace(RECIPE, seed=1), age=1)
    saved(runs / "other data", replace(small, name="others"))
    assert sae.find_run(RECIPE, small) == runs / "newer"


def test_a_run_older_than_the_code_is_passed_over(project, small):
    saved(project / "runs" / "one", small, age=10**9)
    assert sae.find_run(RECIPE, small) is None


def test_without_runs_none_is_found(project, small):
    assert sae.find_run(RECIPE, small) is None


def test_a_damaged_run_is_named(project, small):
    saved(project / "runs" / "one", small)
    (project / "runs" / "one" / "metrics.json").write_text("{")
    with one_line_error(project / "runs" / "one", "delete"):
        sae.find_run(RECIPE, small)


def test_without_the_project_runs_lie_here(tmp_path, small, monkeypatch):
    monkeypatch.setattr(sae, "_PROJECT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "runs" / "one", small)
    assert sae.find_run(RECIPE, small).resolve() == tmp_path / "runs" / "one"


def test_pictures_are_written_by_name(tmp_path):
    figures = {"one": plt.figure(figsize=(1, 1)), "two": plt.figure(figsize=(2, 1))}
    sae.save_pictures(figures, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
