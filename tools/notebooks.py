"""Look after the notebooks.

python tools/notebooks.py run [NOTEBOOK ...]     run from a fresh kernel and store the outputs (default: all)
python tools/notebooks.py colab OWNER/NAME       stamp the repository's address into every notebook
"""

import base64
import io
import json
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.output_widget import OutputWidget
from PIL import Image

from sae_helpers import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "visualizations"
ADDRESS = re.compile(r'^Repository = "https://github\.com/(.+)"$', re.MULTILINE)
REPO_LINE = re.compile(r'^REPO = ".*?"', re.MULTILINE)
BADGE_LINE = re.compile(r"^.*<!-- colab -->$", re.MULTILINE)
# As in notebooks/conftest.py, where the reason stands.
OutputWidget.sync_state = lambda self: None


def all_notebooks() -> list[Path]:
    paths = (ROOT / "notebooks").rglob("*.ipynb")
    return sorted(path for path in paths if ".ipynb_checkpoints" not in path.parts)


def run(paths: list[Path]) -> None:
    for path in paths:
        print(f"running {path.name} …", flush=True)
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            timeout=600,
            # Outputs that come late, on a busy machine, would be left out with no more than a line in a log.
            iopub_timeout=60,
            raise_on_iopub_timeout=True,
            record_timing=False,
            resources={"metadata": {"path": path.parent}},
        )
        client.execute()
        # Widget state is incomplete without its kernel, and GitHub refuses a notebook that holds it.
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if not is_debris(output)]
                for output in cell.outputs:
                    if "image/png" in output.get("data", {}):
                        output.data["image/png"] = lean(output.data["image/png"])
                        describe(output, cell.metadata.get("alt"))
                        if "picture" in cell.metadata:  # the README shows it too
                            png = base64.b64decode(output.data["image/png"])
                            write_atomically(PICTURES / cell.metadata.picture, lambda to, png=png: to.write_bytes(png))
        write_atomically(path, lambda temporary, notebook=notebook: nbformat.write(notebook, temporary))


def is_debris(output) -> bool:
    """A dead widget, or a progress bar as text."""
    if output.output_type == "stream" and output.name == "stderr":
        if re.search(r"\d%\|", output.text):
            return True
        sys.exit(f"a notebook wrote to stderr, which a reader would see as a warning: {output.text}")
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def describe(output, alt: str | None) -> None:
    """Give a picture its alternative text, which stands in the metadata of its cell."""
    if alt:
        output.data["text/plain"] = alt
        output.metadata["image/png"] = {"alt": alt}


def lean(picture: str) -> str:
    """A PNG, in base64, with a palette where nobody would see the difference: a third of the size."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    few = image.quantize(256, dither=Image.Dither.NONE)
    if np.abs(np.asarray(image, int) - np.asarray(few.convert("RGB"), int)).max() > 3:
        return picture
    file = io.BytesIO()
    few.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def badge(repo: str, path: Path) -> str:
    where = path.relative_to(ROOT).as_posix()
    link = f"https://colab.research.google.com/github/{repo}/blob/main/{where}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link}) <!-- colab -->"


def colab(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        sys.exit(f"{repo!r} is not a repository: make colab REPO=owner/name")
    project = ROOT / "pyproject.toml"
    stamped = ADDRESS.sub(f'Repository = "https://github.com/{repo}"', project.read_text())
    write_atomically(project, lambda path: path.write_text(stamped))
    for path in all_notebooks():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            source = REPO_LINE.sub(f'REPO = "{repo}"', source)
            source = BADGE_LINE.sub(badge(repo, path), source)
            cell["source"] = source.splitlines(keepends=True)
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    print(f"stamped {repo} into pyproject.toml and the notebooks")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *names]:
            run([Path(name).resolve() for name in names] or all_notebooks())
        case ["colab", repo]:
            colab(repo)
        case _:
            sys.exit(__doc__)
