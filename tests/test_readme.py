"""The README in two languages: short, the same commands, numbers and links; tables from the stored files."""

import re
from pathlib import Path
from statistics import mean

import pytest

import sae_helpers as sae

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def links(text):
    """Where links lead, without those from one README to the other."""
    return sorted(set(re.findall(r"\]\(([^)\s]+)\)", text)) - {"README.md", "README.zh-CN.md"})


def code(text):
    return sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))))


def numbers(text):
    """All numbers but those in code and links, separators of thousands left out."""
    prose = re.sub(r"```.*?```|`[^`\n]+`|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return sorted(set(number.replace(",", "").rstrip(".") for number in re.findall(r"\d[\d.,]*", prose)))


def test_english_readme_is_read_in_six_minutes():
    assert sum(any(map(str.isalnum, word)) for word in ENGLISH.split()) <= 1200  # a table's bars are no words


@pytest.mark.parametrize("part", [links, code, numbers], ids=lambda part: part.__name__)
def test_both_languages_say_the_same(part):
    assert part(CHINESE) == part(ENGLISH)


def test_both_languages_have_the_same_commands():
    def commands(text):
        blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
        return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]

    assert commands(CHINESE) == commands(ENGLISH) != []


ROWS = {
    "reference, one member": "reference, one member",
    "improved, one member": "improved, one member",
    "**improved, five members**": "improved, five members, consistency loss",
}
COLUMNS = {
    "mse": "{:.4f}", "pearson": "{:.4f}", "explained_variance": "{:.3f}", "dead_fraction": "{:.2%}",
    "rare_fraction": "{:.2%}",
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_results_are_the_stored_ones(row):
    runs = sae.stored_results("dead_features")["final"]["results"][ROWS[row]]
    cells = [form.format(mean(run[column] for run in runs)) for column, form in COLUMNS.items()]
    assert f"| {row} | {' | '.join(cells)} |" in ENGLISH


def test_times_are_the_stored_ones():
    stored = sae.stored_results("training_cpu")
    times, memory = stored["ensemble"]["results"], stored["memory"]["results"]
    for name in ("reference loop", "five separate modules", "ours, with the consistency loss", "ours, without"):
        beyond = memory[name] - memory["libraries and images"]
        assert f"| {name} | {min(times[name]):,.0f} ms | {beyond:.0f} MiB |" in ENGLISH


def test_the_two_judges_say_what_notebook_06_has():
    prose = (ROOT / "notebooks" / "06_trusting_features.ipynb").read_text(encoding="utf-8")
    network, neighbours = re.search(r"network (\d+) %, neighbours ([\d.]+) %", prose).groups()
    assert f"the network read a 9 in {float(network) / 10:.0f} of 10" in ENGLISH
    assert float(neighbours) < 1 and "a 9 in fewer than 1 of 100" in ENGLISH
