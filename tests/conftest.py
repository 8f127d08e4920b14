"""The fixtures of all tests: tokens are kept in a folder of the session, not of whoever runs them."""

import logging
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest

LONG = ("slow", "multi_process", "slurm")
"""Markers of long tests, in the order in which their files are begun."""
HANDLERS = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
HANDLERS |= {signal.SIGINT: signal.default_int_handler}  # a shell has what runs behind it ignore Ctrl-C
"""What signals do before any test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long-until", type=float, help="Unix time from which on no long test is begun")
    parser.addoption("--record", action="store_true", help="write what families of models do into the record of it")


def long_markers(item: pytest.Item) -> list[int]:
    """Return the places in LONG of a test's markers."""
    return [place for place, name in enumerate(LONG) if item.get_closest_marker(name) is not None]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files without a long test first, then those with one by its marker; of each, the largest first."""
    ranks: dict[object, int] = {}
    counts = Counter(item.path for item in items)
    for item in items:
        found = [place + 1 for place in long_markers(item)]
        ranks[item.path] = max(ranks.get(item.path, 0), *found, 0)
    items.sort(key=lambda item: (ranks[item.path], -counts[item.path], item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--long-until")
    if until is not None and time.time() > until and long_markers(item):
        pytest.skip("there was no time left for long tests (--long-until)")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Give signals back their meaning: a run that is left ignores them until its process ends, as here.

    They have it when a test begins, too: a fixture of a whole module may have left a run.
    """
    give_signals_back()
    yield
    give_signals_back()


def give_signals_back() -> None:
    for number, handler in HANDLERS.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Take away the handlers of commands that ran in this process: they write to the stderr of a test that is over."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's own are of classes derived from it
            root.removeHandler(handler)
    yield


@pytest.fixture(scope="session", autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
