"""The picture beside a command's figures, where there is something to draw it with."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_peft.checkpoint.atomic import names_file

logger = logging.getLogger(__name__)


def write_picture(path: Path, draw: Callable[[], Any]) -> None:
    """Write the matplotlib figure that `draw` makes as a PNG; say so where matplotlib is not there.

    `draw` imports the libraries that it draws with, which are slow and which other commands do without.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("%s: not drawn, which needs matplotlib; pip install 'lightning-peft[report]'", path)
        return
    with names_file(path):
        draw().savefig(path, dpi=150)
    print(path)
