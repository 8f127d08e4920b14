"""Where this package keeps what can be made again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """lightning_peft under $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "lightning_peft"
