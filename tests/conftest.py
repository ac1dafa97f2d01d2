import contextlib
import os
import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, settings

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if (
    WORKERS > 1 and "OMP_NUM_THREADS" not in os.environ
):  # side by side: a share of the processors each, or all wait for all
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, processors // WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of the processes that a test starts
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run as NumPy: slow, exact, and good enough without a GPU

# The same examples in every run, however busy the machine is.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    torch.manual_seed(0)  # a test draws the same numbers whichever tests its process has run before


@pytest.fixture
def never_waiting():
    """A context in which a GPU call that makes the host wait is an error; what torch says of that mode is not."""

    @contextlib.contextmanager
    def entered():
        def debug(mode):
            with warnings.catch_warnings():  # "a prototype feature"
                warnings.simplefilter("ignore", UserWarning)
                torch.cuda.set_sync_debug_mode(mode)

        try:
            debug("error")
            yield
        finally:  # or the next test of this process has it, too
            debug("default")

    return entered


@pytest.fixture(scope="module")  # no longer: an event loop runs as long as it does
def chromium():
    """A browser."""
    from benchmarks._page import FLAGS, browser

    playwright = pytest.importorskip("playwright.sync_api", reason="pages are tested with playwright: the test extra")
    program = browser()
    if program is None:
        pytest.skip("pages are tested in Chromium, and none is installed: apt-get install chromium")
    with playwright.sync_playwright() as run:
        chromium = run.chromium.launch(executable_path=program, args=FLAGS, env=dict(os.environ), timeout=120_000)
        yield chromium
        chromium.close()


@pytest.fixture(autouse=True)
def _no_notebook(request, monkeypatch):
    """transformers takes a process that has imported marimo for a notebook, and its Trainer then asks for IPython."""
    if "marimo" in sys.modules and (request.path.parent.name == "integrations" or request.path.name == "test_docs.py"):
        monkeypatch.delitem(sys.modules, "marimo")
