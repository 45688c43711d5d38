"""What holds for every notebook, and the set-up cell where the project is not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from conftest import one_line_error

import sae_helpers as sae

ROOT = Path(__file__).resolve().parent.parent
STORED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))[0]  # any of them
FILES = sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
NOTEBOOKS = [path for path in FILES if re.match(r"A?\d", path.name)]  # the others are pages to look things up in
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path):
    return [(cell, "".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def prose_of(path):
    return "\n".join(source for cell, source in cells_of(path) if cell["cell_type"] == "markdown")


def stamped_address(folder):
    """The address in pyproject.toml, and for each notebook the addresses in its badge and set-up cell."""
    address = re.search(r'Repository = "https://github.com/(.+)"', (folder / "pyproject.toml").read_text())[1]
    found = {}
    for path in sorted((folder / "notebooks").rglob("*.ipynb")):
        sources = "\n".join(source for _, source in cells_of(path))
        badges = re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/(\S+?)\)", sources)
        found[path.relative_to(folder).as_posix()] = badges, re.findall(r'^REPO = "(.*?)"', sources, re.MULTILINE)
    return address, found


def agrees(folder):
    address, found = stamped_address(folder)
    if address == "OWNER/NAME":  # not stamped: no dead badge, nothing to install from
        return all(badges == [] and repos in ([""], []) for badges, repos in found.values())
    return all(
        badges == [(address, name)] and repos == [address] for name, (badges, repos) in found.items() if repos or badges
    )


def test_notebooks_and_pyproject_agree_on_the_address():
    assert len(NOTEBOOKS) >= 2
    assert agrees(ROOT)


@each_notebook
def test_exercises_can_be_checked_and_are_solved(path):
    """Each has a difficulty, a time, a hint, a check that runs unanswered, and a solution that the tests run."""
    cells = cells_of(path)
    start = next(i for i, (_, source) in enumerate(cells) if source.startswith("## Exercises"))
    prose = "\n".join(source for cell, source in cells[start:] if cell["cell_type"] == "markdown")
    asked = re.findall(r"^\*\*(\d+)\. .+ \((?:easy|medium|hard), \d+ minutes?\)", prose, re.MULTILINE)
    assert len(asked) >= (1 if path.parent.name == "appendix" else 4)
    assert prose.count("<summary>Hint</summary>") == len(asked)
    solutions = re.findall(r"<summary>Solution</summary>\n\n```python\n(.*?)```\n\n</details>", prose, re.DOTALL)
    assert len(solutions) == prose.count("<summary>Solution</summary>") == len(asked)
    for number, solution in zip(asked, solutions):
        assert f"\nassert check_{number}(" in solution
        (unanswered,) = [
            cell for cell, source in cells if cell["cell_type"] == "code" and f"def check_{number}(" in source
        ]
        assert "not yet" in "".join(text for output in unanswered["outputs"] for text in output.get("text", []))


@each_notebook
def test_ends_with_what_to_take_away_and_checked_claims(path):
    (table,) = re.findall(r"^## What to take away\n+((?:\|.*\n?)+)", prose_of(path), re.MULTILINE)
    assert 3 <= len(table.splitlines()) - 2 <= 6
    cell, source = [both for both in cells_of(path) if both[0]["cell_type"] == "code"][-1]
    assert source.startswith("# @title Claims") and "sae.check_claims(" in source
    assert cell["metadata"]["jupyter"]["source_hidden"] and cell["metadata"]["cellView"] == "form"
    shown = "".join(text for output in cell["outputs"] for text in output.get("text", []))
    assert re.fullmatch(r"[1-9]\d* claims, all hold\n", shown)


@each_notebook
def test_every_picture_can_be_read(path):
    """An alternative text for those who do not see it, and no letters below nine points."""
    for cell, source in cells_of(path):
        assert not re.search(r"(fontsize|labelsize|font\.size\W+)=?\s*[1-8](\.\d+)?\b", source), source[:80]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = cell["metadata"].get("alt", "")
                assert len(alt) >= 30, f"no alternative text: {source[:80]}"
                assert "".join(output["data"]["text/plain"]) == output["metadata"]["image/png"]["alt"] == alt


@each_file
def test_is_stored_clean(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    assert "widgets" not in json.loads(text)["metadata"]
    assert "application/vnd.jupyter.widget-view+json" not in text
    for cell, source in cells_of(path):
        if cell["cell_type"] == "code":
            assert cell["execution_count"], f"never run: {source[:60]}"
            assert all(output.get("name") != "stderr" for output in cell["outputs"])


PAGES = [*FILES, *sorted(ROOT.glob("*.md")), *sorted((ROOT / "tests").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = prose_of(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]+`", "", text, flags=re.DOTALL)  # code has brackets of its own
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]:\s+(\S+)", text, re.MULTILINE)
    for link in links:
        if re.match(r"https?://|#", link):
            continue
        assert (path.parent / link.split("#")[0]).exists(), link


def tool(folder, *arguments):
    return subprocess.run(
        [sys.executable, folder / "tools" / "notebooks.py", *arguments], capture_output=True, text=True, timeout=120
    )


TELLS = ["import ipywidgets", "out = ipywidgets.Output()\nwith out:\n    print('shown')", "assert out.outputs == ()"]


@pytest.mark.parametrize(
    "command", [["tools/notebooks.py", "run"], ["-m", "pytest", "--nbmake"]], ids=["tool", "nbmake"]
)
def test_kernel_is_sent_nothing_while_a_cell_runs(copy, command):
    """Else a notebook may stand still: see notebooks/conftest.py. Told of an output, the third cell would fail."""
    path = copy / "notebooks" / "widget.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in TELLS])
    nbformat.write(notebook, path)
    result = subprocess.run([sys.executable, *command, path], cwd=copy, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def copy(tmp_path):
    """The project's own files, to be stamped."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "sae_helpers.py", "mnist_sae_train.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("notebooks", "tools", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("data", ".ipynb_checkpoints"))
    return tmp_path


def test_colab_stamps_every_notebook_and_can_stamp_again(copy):
    for address in ("someone/some-notebooks", "another.one/elsewhere"):
        result = tool(copy, "colab", address)
        assert result.returncode == 0, result.stderr
        assert stamped_address(copy)[0] == address
        assert agrees(copy)


def test_colab_refuses_what_is_no_repository(copy):
    result = tool(copy, "colab", "https://example.org/x")
    assert result.returncode == 1
    assert result.stderr == "'https://example.org/x' is not a repository: make colab REPO=owner/name\n"
    assert agrees(copy)


# ---- stored results ---------------------------------------------------------------------


def test_stored_results_lie_with_the_project_or_beside_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sae.stored_results(STORED.stem) == json.loads(STORED.read_text())
    (tmp_path / "mine.json").write_text('{"a": 1}')
    assert sae.stored_results("mine") == {"a": 1}


def test_missing_stored_results_are_named():
    with one_line_error("no_such_results.json", "beside the notebook"):
        sae.stored_results("no_such_results")


# ---- the set-up cell in Colab ---------------------------------------------------------


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A stand-in for Colab: all packages but this project, and a module google.colab."""
    folder = tmp_path_factory.mktemp("colab")
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not re.match(r"(__editable__|mnist_sae|sae_helpers|google$)", entry.name):
            (packages / entry.name).symlink_to(entry)
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)

    def run_setup(source, content, extra="", **environment):
        content.mkdir(exist_ok=True)
        (content / "cell.py").write_text(source + "\nimport sae_helpers, torch\nprint(sae_helpers.__file__)\n" + extra)
        return subprocess.run(
            [folder / "venv" / "bin" / "python", "-c", "import google.colab; exec(open('cell.py').read())"],
            cwd=content, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(packages), **environment},
        )  # fmt: skip

    run_setup.installed = lambda: {
        path.name for path in (folder / "venv").glob("lib/python*/site-packages/*") if path.suffix != ".pth"
    }
    return run_setup


def setup_cell(path):
    return next(source for _, source in cells_of(path) if source.startswith("# @title Set-up"))


def test_set_up_cell_is_the_same_everywhere():
    assert len({setup_cell(path) for path in NOTEBOOKS}) == 1


def test_unstamped_set_up_says_in_one_line_what_to_upload(colab, tmp_path):
    cell = re.sub(r'REPO = ".*?"', 'REPO = ""', setup_cell(NOTEBOOKS[0]))
    missing = colab(cell, tmp_path / "content")
    assert missing.returncode == 1
    assert missing.stderr == "Upload sae_helpers.py with the Files panel on the left, then run this cell again.\n"

    (tmp_path / "content" / "sae_helpers.py").write_text((ROOT / "sae_helpers.py").read_text())
    uploaded = colab(cell, tmp_path / "content")
    assert uploaded.returncode == 0, uploaded.stderr
    assert uploaded.stdout.strip().endswith("sae_helpers.py")


def test_stamped_set_up_installs_the_project_and_nothing_else(colab, copy):
    assert tool(copy, "colab", "owner/name").returncode == 0
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-C", str(copy)]
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "a copy"]):
        subprocess.run([*git, *arguments], check=True)
    before = colab.installed()
    result = colab(
        setup_cell(next((copy / "notebooks").glob("*.ipynb"))), copy / "content",
        f"print(len(sae_helpers.stored_results('{STORED.stem}')), 'stored results')\n",
        # Git fetches the copy where the cell says GitHub; the build uses the setuptools that is here.
        GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0=f"url.file://{copy}.insteadOf",
        GIT_CONFIG_VALUE_0="https://github.com/owner/name", PIP_NO_BUILD_ISOLATION="0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "site-packages" in result.stdout
    assert f"{len(json.loads(STORED.read_text()))} stored results" in result.stdout  # they come along
    new = {name for name in colab.installed() - before if not name.startswith(("mnist_sae", "__pycache__"))}
    assert new == {"sae_helpers.py"}, "Colab's own packages, torch above all, must stay"
