import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run as NumPy: slow, exact, and good enough without a GPU

# The same examples in every run, however busy the machine is.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    torch.manual_seed(0)  # a test draws the same numbers whichever tests its process has run before


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
