"""The folder in which this package keeps what can be made again."""

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """Return lightning_peft under $XDG_CACHE_HOME or ~/.cache; without a home, a temporary folder of this user's.

    A path there that is not absolute counts as none, as the XDG specification has it.
    """
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.expanduser("~/.cache")
    if folder.startswith("~"):
        return Path(tempfile.gettempdir()) / f"lightning_peft-{os.getuid()}"
    return Path(folder) / "lightning_peft"
