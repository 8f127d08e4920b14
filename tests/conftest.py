"""What all tests share: tokens are kept in a folder of the session, not of whoever runs them."""

import signal
from collections import Counter
from collections.abc import Iterator

import pytest

LONGEST_FIRST = ("slurm", "multi_process", "slow")
"""Markers of tests whose files are begun first, so that no worker waits for one of them at the end."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by what their longest tests are marked as, and within that by their number of tests."""
    ranks: dict[object, int] = {}
    counts = Counter(item.path for item in items)
    for item in items:
        of_item = [place for place, name in enumerate(LONGEST_FIRST) if item.get_closest_marker(name) is not None]
        ranks[item.path] = min(ranks.get(item.path, len(LONGEST_FIRST)), *of_item, len(LONGEST_FIRST))
    items.sort(key=lambda item: (ranks[item.path], -counts[item.path], item.path))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A run that is left ignores signals until its process ends, which here is that of the tests behind it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
