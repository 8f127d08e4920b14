"""Where this package keeps what can be made again."""

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """lightning_peft under $XDG_CACHE_HOME or ~/.cache; a folder of this user's for temporary files without a home."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~"):
        return Path(tempfile.gettempdir()) / f"lightning_peft-{os.getuid()}"
    return Path(folder) / "lightning_peft"
