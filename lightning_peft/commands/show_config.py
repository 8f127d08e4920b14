"""`lightning-peft config train WORDS`: the composed config, and which word or file each value came from."""

import yaml

from lightning_peft.compose import compose_config
from lightning_peft.config import plain
from lightning_peft.help import flat
from lightning_peft.words import everyday

COMPOSED = ("train", "estimate", "submit")


def show_config(words: list[str]) -> None:
    """Print every key with its value and the word that set it. Raises ValueError for words that do not compose."""
    if not words or words[0] not in COMPOSED:
        raise ValueError(f"config: name one of {', '.join(COMPOSED)} and its words, as in config train method=qlora")
    command, *given = words
    print(text_of(command, given))


def text_of(command: str, given: list[str]) -> str:
    """Return the lines of the composed config in the order of the config."""
    origins: dict[str, str] = {}
    words: list[str] = []
    before = values_of(command, [])
    compose_config(command, everyday(command, given))  # an error in the whole is the user's
    for word in given:
        words.append(word)
        try:
            after = values_of(command, words)
        except ValueError:  # a word that needs a later one
            continue
        origins |= {key: word for key, value in after.items() if before.get(key, None) != value or key not in before}
        before = after
    lines = []
    for key, value in before.items():
        shown = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
        lines.append(f"{key}: {shown}" + (f"    # {origins[key]}" if key in origins else ""))
    return "\n".join(lines)


def values_of(command: str, words: list[str]) -> dict[str, object]:
    """Return every key and its value; the default run folder without the time in it, which is another at each look."""
    values = flat(plain(compose_config(command, everyday(command, words))))
    if not any(word.startswith("run_dir=") for word in words):
        values["run_dir"] = "runs/<time>-<method>-<model>"
    return {key: value for key, value in values.items() if not (key.startswith("logger.") and key.endswith("run_dir"))}
