"""`pytest --nbmake notebooks` runs the folded solutions too, and no widget makes it wait.

A solution stands once, in a Markdown cell, where it is folded wherever the notebook is
read. Here it becomes a code cell behind that Markdown cell, for the test alone.
"""

import re
from types import SimpleNamespace

import nbformat
from nbclient.output_widget import OutputWidget
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

# nbclient tells the kernel what a widget shows, on the socket on which it waits for the end of the cell. Sending there
# can swallow the signal that this end has come, and the cell stands until its time limit
# (https://github.com/jupyter/nbclient/issues/312). Nothing reads what the kernel is told.
OutputWidget.sync_state = lambda self: None
