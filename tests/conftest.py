"""One compute thread, the same seed for every test, and no screen.

The seed and the thread count are set here for the tests only; the library never sets either.
"""

import os

# read when the libraries load, so before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import signal

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw without a generator repeat, in any order and on any worker."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A shell starts background jobs with SIGINT ignored, and their children inherit that: undo it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests and examples run untraced: quick tests reach the same lines, and tracing costs up to a half more."""
    if config.pluginmanager.hasplugin("pytest_cov"):
        for item in items:
            if item.get_closest_marker("slow") or item.path.name == "test_examples.py":
                item.add_marker(pytest.mark.no_cover)
