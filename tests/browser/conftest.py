"""A JupyterLab on loopback with a small study's artefacts, and pages of it in headless Chromium."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from helpers import places, study
from helpers.stages import artifacts
from tools import headless

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKEN = "loopback"
TIMEOUT = 60_000  # ms; for whatever a test waits for
NOTEBOOKS = ("03_steering_vector", "09_explorer")
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # there is no network
    "notebook-extension/tracker": {"windowingMode": "none"},  # keep the cells that are out of sight on the page
}
GIVEN = os.environ.get("DSTEER_BROWSER_PROFILE")  # another profile, whose artefacts are in the cache, for pictures
PROFILE = GIVEN or "test"
CACHE = artifacts.root() if GIVEN else places.PROJECT / "build" / "test" / "artifacts"  # where `make test` leaves them


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The notebooks about the profile, none of them run; the artefacts that they read are in the cache."""
    found = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTEER_ARTIFACTS", str(CACHE))
        made = study.load(PROFILE)
        assert made.caveat and made.replicates
        made.measure()
    for name in NOTEBOOKS:
        headless.prepare(name, made.profile, {"PROFILE": PROFILE}, found)
        notebook = nbformat.read(found / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, found / f"{name}.ipynb")
    return found


@pytest.fixture(scope="session")
def lab(folder):
    """The address of a JupyterLab whose files are those of `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        name: str(folder / "home" / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
                     "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    }  # fmt: skip
    for plugin, settings in SETTINGS.items():
        path = Path(own["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", f"{plugin}.jupyterlab-settings")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    own |= {"DSTEER_FIGURES": str(folder / "figures"), "DSTEER_ARTIFACTS": str(CACHE)}
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    log = folder / "lab.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api?token={TOKEN}", server, log)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, f"JupyterLab ended: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(address, timeout=1)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab does not answer: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: make chromium installs Debian's")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: make test-browser installs it")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


workspaces = map("workspace{}".format, itertools.count())


@pytest.fixture
def run_all(browser, lab):
    """Open a notebook, run all its cells and wait until something is there; return the page, and its errors so far."""
    pages = []

    def run(name: str, until: str):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        pages.append(page)
        page.set_default_timeout(TIMEOUT)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        own = next(workspaces)  # with nothing else open
        page.goto(f"{lab}/lab/workspaces/{own}/tree/{name}.ipynb?token={TOKEN}")
        page.get_by_text("(ipykernel) | Idle").wait_for()  # in the status bar: the kernel is there
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.locator(".jp-CodeCell .jp-InputPrompt").last.get_by_text(re.compile(r"\d")).wait_for()  # the last has run
        page.locator(until).first.wait_for()
        return page, errors

    yield run
    for page in pages:
        page.close()
