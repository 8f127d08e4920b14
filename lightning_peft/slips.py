"""Slips in the words of a command line: dashes, spaces, colons, quotes of a word processor."""

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile, zip_longest
from pathlib import Path

from lightning_peft.other_tools import LISTS, NOT_HERE, ours

VERBATIM = re.compile(
    r"^\+{0,2}(?:prompt|run_dir|sweep_dir|output|init_from|(?:[\w-]+\.)*(?:\w+_path|cache_dir|init_from|path|teacher|teacher_adapter|\w+_prompt|prompt_template))="
)
"""Keys whose values are ordinary text: everything after the first = belongs to them."""
TEXT = re.compile(r"^\+{0,2}(?:[\w-]+\.)*(?:prompt|\w+_prompt|prompt_template)=")
"""Keys of words for a model, in which ${ is no reference to another key either."""
OPEN = re.compile(r"^(?:(?:trainer|callbacks|logger|claim|gate)\.|gate=)")
"""Keys below which anything may be added: arguments of other libraries."""
NAMED = re.compile(rf"{OPEN.pattern}|^data\.sources\.|^(?:callbacks|logger|claim|gate)$")
"""Keys with names of the user's own, each of which, or all at once, may be taken away with ~."""
TYPOGRAPHIC = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2010": "-",
        "\u2013": "-",
        "\u2014": "--",
        "\u2212": "-",
    }
)
"""Quotes and dashes as word processors and web pages write them, with the plain ones."""
KEY = r"[+~]{0,2}[A-Za-z_][\w./-]*"
SWITCHES = {
    "bf16": "trainer.precision=bf16-mixed", "fp16": "trainer.precision=16-mixed", "tf32": "trainer.precision=32-true",
    "deepspeed": "strategy=fsdp", "fsdp": "strategy=fsdp", "ddp": "strategy=ddp", "resume": "resume=auto",
    "resume_from_checkpoint": "resume=auto", "packing": "data.packing=true", "gradient_checkpointing":
    "activation_checkpointing=blocks", "wandb": "logger=wandb", "streaming": "data.streaming=true",
    "report_to": "logger=wandb", "cpu": "hardware=cpu",
}  # fmt: skip
"""Options that others switch on by their name alone, or by a value that is none here."""
FLAGS = ("dry_run", "model.trust_remote_code", "data.streaming", "data.packing", "smaller_ranks", "failed", "private")


SHORT = {
    **dict.fromkeys(("v", "verbose", "q", "quiet"), "leave it out: each message is printed once"),
    **dict.fromkeys(("y", "yes", "f", "force"), "leave it out: nothing is asked, and no run is written over"),
    **dict.fromkeys(("config_name", "config_dir", "config_path"), "conf_dir=FOLDER is the folder of one's own options"),
    "info": "lightning-peft config train prints the composed config, and what set each value",
}
"""Options with dashes that are no keys anywhere -> the thing to do instead."""


def check_dashes(command: str, words: Sequence[str]) -> None:
    """Raise ValueError for options with dashes, as other tools have them, with ours beside it."""
    for place, (word, following) in enumerate(zip_longest(words, words[1:])):
        if not word.translate(TYPOGRAPHIC).startswith("-"):
            continue
        key, sign, value = word.translate(TYPOGRAPHIC).lstrip("-").partition("=")
        if not sign and following is not None and not following.startswith("-") and "=" not in following:
            value = following
        name = key.replace("-", "_")
        if value.endswith((".yaml", ".yml")):
            raise ValueError(f"{word}: name the file itself, as in lightning-peft {command} {value}")
        if name in ("version", "V"):
            raise ValueError(f"{word}: `lightning-peft --version` prints the version")
        if name in NOT_HERE:
            raise ValueError(f"{word}: no such option; {NOT_HERE[name]}")
        off = re.fullmatch(r"no_?(\w+)", name)
        if off is not None and (meant := ours(off.group(1))) is not None:
            raise ValueError(f"{word}: options are key=value without dashes, as in {meant.partition('=')[0]}=false")
        if name in SHORT:
            raise ValueError(f"{word}: no such option; {SHORT[name]}")
        known = ours(key) or name
        several = list(takewhile(lambda text: re.fullmatch(r"[\w.]+", text), words[place + 1 :]))
        if known in LISTS and len(several) > 1:
            value = ",".join(several) if known == "target_modules" else f"[{','.join(several)}]"
        example = known if "=" in known else f"{known}={value or ('true' if known in FLAGS else 'VALUE')}"
        if name in SWITCHES and (known == "strategy" or not value or value.lower() in ("true", "1", "yes")):
            example = SWITCHES[name]
        raise ValueError(f"{word}: options are key=value without dashes, as in {example}")


def corrected(words: Sequence[str]) -> Iterator[str]:
    """Yield words without spaces around them, and with the folder that ~ stands for.

    Raises ValueError for a word that is typed as no option is, with the right form in the message.
    """
    for place, word in enumerate(words):
        if not word.strip():
            raise ValueError(f"{word!r}: an empty word; options are key=value")
        if VERBATIM.match(word):
            yield _text(word)
            continue
        typed, following = word.strip(), [*words, "", ""][place + 1 : place + 3]
        if re.fullmatch(KEY, typed) and following[0].startswith("="):
            given = following[0].lstrip("=") or following[1]
            raise ValueError(f"{typed} {' '.join(filter(None, following))}: no space around =, as in {typed}={given}")
        if re.fullmatch(f"{KEY}=", typed) and following[0] and not re.search("[=.]", following[0]):
            raise ValueError(f"{typed} {following[0]}: no space around =, as in {typed}{following[0]}")
        if re.fullmatch(KEY, typed) and re.fullmatch(r":[^:]+", following[0]):
            raise ValueError(f"{typed} {following[0]}: options are key=value, as in {typed}={following[0][1:]}")
        if (colon := re.fullmatch(rf"({KEY}):\s*(.*)", typed)) and "://" not in typed and not Path(typed).exists():
            given = (colon.group(2) or following[0] or "VALUE").removeprefix("=")
            joined = "." if "=" in given else "="
            raise ValueError(f"{typed}: options are key=value, as in {colon.group(1)}{joined}{given}")
        key, sign, value = (part.strip() for part in typed.partition("="))
        if key.startswith("~") and not NAMED.match(key[1:]):
            raise ValueError(f"{typed}: nothing is taken away with ~; give the value that is wanted")
        if not sign:
            yield typed
            continue
        if not key:
            raise ValueError(f"{typed}: no key before the =; options are key=value")
        if value.startswith("="):
            raise ValueError(f"{typed}: two =, as in {key}{value} with one")
        is_number = re.fullmatch(r"[-+\d.,e]+", value.translate(TYPOGRAPHIC))
        edges = value if is_number else value[:1] + value[-1:] + "".join(re.findall("\u2212", value))
        if key.translate(TYPOGRAPHIC) != key or edges.translate(TYPOGRAPHIC) != edges:
            plain = f"{key}={value}".translate(TYPOGRAPHIC)
            raise ValueError(f"{typed}: has quotes or dashes of a word processor; use plain ones, as in {plain}")
        if value[-1:] in (",", ";") and len(value) > 1:
            raise ValueError(f"{typed}: ends in {value[-1]}; write {key}={value.rstrip(',; ')}")
        yield f"{key}={with_home(value)}"


def _text(word: str) -> str:
    key, _, value = word.partition("=")
    if not value.strip(" '\"") and not key.endswith("system_prompt"):
        remedy = "leave it out to chat" if key == "prompt" else "give one, or leave it out"
        raise ValueError(f"{key}=: is empty; {remedy}")
    return word if key.endswith("prompt") else f"{key}={with_home(value)}"


def with_home(value: str) -> str:
    """Return a path whose ~/ the shell has left as it is, as it does behind a =."""
    return str(Path(value).expanduser()) if value.startswith("~/") or value == "~" else value
