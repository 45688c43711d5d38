"""`pytest --nbmake notebooks` runs the folded solutions too.

A solution stands once, in a Markdown cell, where it is folded wherever the notebook is
read. Here it becomes a code cell behind that Markdown cell, for the test alone.
"""

import re
from types import SimpleNamespace

import nbformat
from nbmake import nb_run

SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)


def read_with_solutions(path, version):
    notebook = nbformat.read(path, version)
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            cells += [nbformat.v4.new_code_cell(code) for code in SOLUTION.findall(cell.source)]
    notebook.cells = cells
    return notebook


nb_run.nbformat = SimpleNamespace(**{**vars(nbformat), "read": read_with_solutions})
