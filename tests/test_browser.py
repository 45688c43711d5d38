"""A real browser: JupyterLab opens notebook 05, runs it, and its sliders change their pictures.

Screenshots of it all, and of a failure, lie in the project's folder `screenshots` afterwards.
"""

import base64
import contextlib
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import psutil
import pytest
from conftest import PROJECT, REAL_MNIST

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"),
]
# Root may not use Chromium's sandbox; the rest keeps it from calling home.
BROWSER_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-quic",
]  # fmt: skip
SCREENSHOTS = PROJECT / "screenshots"
LAB_SETTINGS = {  # no questions, no look for news, and all cells on the page, not only those in view
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


@contextlib.contextmanager
def jupyterlab(folder):
    """Serve `folder` with this environment's kernel and nobody's settings; yields the address and the token."""
    home = folder / "jupyter"
    settings = home / "config" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(LAB_SETTINGS))
    # Neither the user's settings, nor pytest's choice to show no pictures.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON", "MPLBACKEND"))}
    own = {f"JUPYTER_{name.upper()}_DIR": str(home / name) for name in ("config", "data", "runtime")}
    own |= {"IPYTHONDIR": str(home / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1", "MNIST_ROOT": str(REAL_MNIST)}
    token = secrets.token_hex()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += ["--ServerApp.port=0", f"--ServerApp.root_dir={folder}"]  # 0: a free one
    with open(folder / "server.log", "w") as log:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        server = psutil.Popen(command, env=kept | own | {"JUPYTER_TOKEN": token}, cwd=folder, **quiet)
    try:
        running = home / "runtime" / f"jpserver-{server.pid}.json"
        deadline = time.monotonic() + 120
        while not running.exists() or not running.read_text().endswith("}"):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield json.loads(running.read_text())["url"], token
    finally:
        # Its kernels too, which it ends itself, unless it is stuck.
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [server, *server.children(recursive=True)]
            server.terminate()
            _, stuck = psutil.wait_procs(family, timeout=30)
            for process in stuck:
                process.kill()
            psutil.wait_procs(stuck, timeout=30)


@contextlib.contextmanager
def opened(folder, name, notebook):
    """The page of a notebook in JupyterLab, its kernel ready; and the server's address."""
    nbformat.write(notebook, folder / f"{name}.ipynb")
    SCREENSHOTS.mkdir(exist_ok=True)
    failure = SCREENSHOTS / f"failed_{name}.png"
    failure.unlink(missing_ok=True)
    with (
        jupyterlab(folder) as (address, token),
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=BROWSER, args=BROWSER_OPTIONS) as browser,
    ):
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        try:
            page.goto(f"{address}lab/tree/{name}.ipynb?token={token}")
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
            yield page, address
        except Exception:
            page.screenshot(path=failure)
            raise


def run_all_cells(page):
    page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def complaints(page):
    """What is on the page as an error or on stderr, but for the word that this is not MNIST."""
    shown = page.locator('[data-mime-type$="jupyter.error"], [data-mime-type$="jupyter.stderr"]').all_inner_texts()
    return [text for text in shown if not text.startswith("*** NOT MNIST")]


def picture(cell):
    """The picture in a cell's output, as the browser has it, in grey."""
    data = base64.b64decode(cell.locator("img").get_attribute("src").partition("base64,")[2])
    return plt.imread(io.BytesIO(data))[..., :3].mean(-1)


def move_to_least(page, name):
    """Move the slider of this name to its least value by key; returns the pictures before and after, and seconds."""
    slider = page.locator(".widget-slider").filter(has=page.locator(f".widget-label:text-is('{name}')"))
    cell = page.locator(".jp-CodeCell").filter(has=slider)
    file = re.sub(r"\W+", "_", name).strip("_")
    before, source = picture(cell), cell.locator("img").get_attribute("src")
    cell.screenshot(path=SCREENSHOTS / f"slider_{file}_before.png")
    slider.get_by_role("slider").focus()
    start = time.perf_counter()
    page.keyboard.press("Home")
    page.wait_for_function(
        "([cell, before]) => [...cell.querySelectorAll('img')].some(img => img.complete && img.src != before)",
        arg=[cell.element_handle(), source],
    )
    seconds = time.perf_counter() - start
    cell.screenshot(path=SCREENSHOTS / f"slider_{file}_after.png")
    return before, picture(cell), seconds


def test_sliders_of_notebook_05_change_their_pictures(tmp_path, capsys):
    # A copy without outputs: what the page shows then is of this run.
    notebook = nbformat.read(PROJECT / "notebooks" / "05_feature_visualization.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.update(outputs=[], execution_count=None)
    code[-1].metadata.pop("jupyter")  # its prompt, by which the end is seen, is folded away with its source
    with opened(tmp_path, "05", notebook) as (page, address):
        with pytest.raises(urllib.error.HTTPError, match="403"):  # without the token
            urllib.request.urlopen(f"{address}api/contents", timeout=60)
        run_all_cells(page)
        prompt = page.locator(".jp-CodeCell").last.locator(".jp-InputPrompt")
        failed = page.locator('[data-mime-type$="jupyter.error"]')
        playwright.expect(prompt.filter(has_text=re.compile(r"\d")).or_(failed).first).to_be_visible(timeout=900_000)
        assert complaints(page) == []
        assert prompt.inner_text() == f"[{len(code)}]:"
        page.locator(".jp-Notebook .jp-Cell").first.scroll_into_view_if_needed()
        page.screenshot(path=SCREENSHOTS / "page.png")
        seen = []
        for name in ("rank of use", "k", "1."):
            before, after, seconds = move_to_least(page, name)
            height, width = np.minimum(before.shape, after.shape)
            changed = (np.abs(before[:height, :width] - after[:height, :width]) > 0.1).mean()
            seen.append(f"{name}: {1e3 * seconds:.0f} ms, {changed:.1%} of the pixels")
            assert changed > 0.002, seen[-1]  # a new title alone changes 0.0003
        assert complaints(page) == []  # an error of a slider's function stands in its output
    with capsys.disabled():
        print("\nfrom key to changed picture in the browser:", "; ".join(seen))


def test_server_kernel_and_browser_end_when_the_test_is_broken_off(tmp_path):
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.cells.append(nbformat.v4.new_code_cell("import time; time.sleep(999)"))
    already, family = psutil.Process().children(recursive=True), {}
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, "busy", notebook) as (page, _):
        run_all_cells(page)
        page.get_by_text("Python 3 (ipykernel) | Busy").wait_for()
        for process in set(psutil.Process().children(recursive=True)).difference(already):
            with contextlib.suppress(psutil.NoSuchProcess):  # a helper that had its moment
                family[process] = " ".join(process.cmdline())
        raise KeyboardInterrupt
    for part in (f"{sys.executable} -m jupyterlab", f"{sys.executable} -m ipykernel_launcher", "--headless"):
        assert any(part in command for command in family.values())
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
