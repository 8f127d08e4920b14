"""Every method on a model that FSDP2 shards over two processes, dense and NF4."""

from pathlib import Path

import pytest
from adapter_models import WRAPPING
from started import run_on_ranks


@pytest.mark.multi_process
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_sharded_training_equals_training_whole(base: str) -> None:
    printed, _ = run_on_ranks(2, Path(__file__).with_name("sharded_adapters.py"), base, seconds=240)

    assert printed.splitlines() == [f"{method} equal" for method in WRAPPING]
