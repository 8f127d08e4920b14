"""Names of layers and blocks: the patterns that choose them, presets, and what is said where none matches."""

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

FUSED_QUERY_KEY_VALUE = ["query_key_value", "qkv_proj", "qkv", "c_attn", "Wqkv"]
FEED_FORWARD_OUT = ["down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h", "w2"]

PRESETS: dict[str, list[str]] = {
    "all_linear": ["*"],
    "attention": ["re:.*(?i:attn|attention).*"],
    "mlp": ["re:(?!.*(attn|attention)).*(mlp|ffn|feed_forward).*", "fc1", "fc2"],
    "query_value": ["q_proj", "v_proj", "query", "value", *FUSED_QUERY_KEY_VALUE],
    "query_key_value": ["q_proj", "k_proj", "v_proj", "query", "key", "value", *FUSED_QUERY_KEY_VALUE],
    "key_value_down": ["k_proj", "v_proj", "key", "value", *FUSED_QUERY_KEY_VALUE, *FEED_FORWARD_OUT],
}
"""Patterns per preset, over linear layers of the transformer blocks only: never embeddings, never the output head.

Architectures differ in names, so a preset lists them all and asks that one matches: llama's q_proj, GPT-2's c_attn,
GPT-NeoX's query_key_value, phi-3's qkv_proj.
"""

BLOCK_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def matches(pattern: str, name: str) -> bool:
    """Return whether a dotted module name fits: an exact name or its end after a dot, a glob, or `re:` and a regex."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def block_depth(name: str) -> int | None:
    """Return the index of the transformer block a module lies in: the first number in its dotted name."""
    found = BLOCK_NUMBER.search(name)
    return int(found.group(1)) if found else None


def parse_layers(layers: str, blocks: int | None = None) -> Callable[[int], bool]:
    """Return a test whether a block is in "0-3,7,10-". Raises ValueError, also for a block beyond `blocks` of them."""
    ranges: list[tuple[int, float]] = []
    for part in layers.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d*))?\s*", part)
        if found is None:
            raise ValueError(f"adapter.layers={layers!r}: write block numbers and ranges, as in 0-3,7,10-")
        first = int(found.group(1))
        last = first if found.group(2) is None else int(found.group(3)) if found.group(3) else float("inf")
        if last < first:
            raise ValueError(f"adapter.layers={layers!r}: {part.strip()} ends before it starts")
        if blocks is not None and max(first, last if last < float("inf") else first) >= blocks:
            raise ValueError(
                f"adapter.layers={layers!r}: this model's blocks are 0-{blocks - 1}"
                + (f"; {first}- takes all from {first} on" if first < blocks else "")
            )
        ranges.append((first, last))
    return lambda depth: any(first <= depth <= last for first, last in ranges)


def form_of_list(entry: str) -> str:
    """Return how a list or a regular expression is written, for an entry that was meant for one; else nothing."""
    names = re.findall(r"[\w.]+", entry)
    if len(names) > 1 and re.fullmatch(r"[\w.,;\s'\"\[\]()]+", entry):
        return f"; write a list as [{','.join(names)}]"
    is_pattern = not entry.startswith("re:") and re.search(r"[*+?|^$(\[\\]", entry)
    return f"; a regular expression begins with re:, as in ['re:{entry}']" if is_pattern else ""


def nearest_names(patterns: Iterable[str], names: Iterable[str]) -> str:
    """Return the last parts of `names` most like the patterns, for an error message."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    close = [leaf for pattern in patterns for leaf in difflib.get_close_matches(pattern, leaves, n=3, cutoff=0.4)]
    return ", ".join(dict.fromkeys(close)) or ", ".join(leaves[:12])
