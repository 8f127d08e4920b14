"""The short way from Python: rows in, a run out, with the words of the command line.

from lightning_peft import finetune

run = finetune(rows, "method=lora", "model=tiny", "trainer.max_steps=100")
run.metrics["validation_loss"], run.generate("How many singers are there?"), run.merge("merged")
"""

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.checkpoint.merged import Receipt
from lightning_peft.command_line import ignore_library_noise
from lightning_peft.commands.adapted import continues_text, layout_of, load_for_inference
from lightning_peft.commands.generate import Prompt, not_part_of, prompt_of_row, text_prompt
from lightning_peft.commands.merge import merge
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.conversation import Row
from lightning_peft.data.prompt_rows import prompts_of
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.load import tuned_folder
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.own_file import words_of_keys
from lightning_peft.rows_in_memory import lines_of
from lightning_peft.runs.folder import folder_of, is_used, starting_config
from lightning_peft.strict_json import read_object
from lightning_peft.tracking.metrics_csv import MetricsCSV
from lightning_peft.words import everyday

logger = logging.getLogger(__name__)

Rows = Iterable[Mapping[str, Any]]
NAME_ROWS = ("data=", "data.train_path=", "data.source=", "data.sources=", "data.sources.")
"""Beginnings of words that would name other rows than those given."""
OnePrompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


class Run:
    """A finished run, or an adapter folder of ours or of HF PEFT: what it learned, ready to answer."""

    def __init__(self, folder: str | Path) -> None:
        """Take a run folder or an adapter folder; nothing is loaded before it is asked for."""
        self.folder = Path(folder)
        self._tuned = tuned_folder(str(self.folder))

    @property
    def adapter(self) -> Path:
        """Return the adapter folder, which HF PEFT loads; the whole model's folder after full fine-tuning."""
        return self._tuned

    @property
    def metrics(self) -> dict[str, Any]:
        """Return `result.json`: losses, steps, tokens a second, memory. Raises ValueError for a bare adapter."""
        path = self.folder / "result.json"
        if not path.is_file():
            raise ValueError(f"{self.folder}: no result.json, so it is an adapter folder and no run")
        return read_object(path, "the run did not live to write it")

    @property
    def history(self) -> list[dict[str, str]]:
        """Return the rows of `metrics.csv`, one a step and one a validation."""
        return MetricsCSV(str(self.folder)).read()[1]

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Return the adapted model, in the precision it was trained in, and its tokenizer."""
        return load_for_inference(str(self.folder), None, "auto")

    def generate(self, prompt: OnePrompt | Sequence[OnePrompt], **sampling: Any) -> Any:
        """Answer a prompt, or several in a batch, as they were laid out in training.

        A prompt is a text, a conversation to go on with (a list of `{"role": ..., "content": ...}`), or a row as
        `lightning-peft generate prompt_path=` reads them, such as `{"messages": [...], "tools": [...]}`. `sampling` are
        fields of `SamplingConfig`, such as max_new_tokens and temperature. Return a string for one prompt and a list
        for a list of them. Raises ValueError for a prompt of another kind, or one that ends in an answer.
        """
        is_one = isinstance(prompt, str | Mapping) or _is_conversation(prompt)
        is_raw = continues_text(str(self.folder))
        prompts = [_prompt(each, place, is_raw) for place, each in enumerate([prompt] if is_one else prompt)]
        if names := not_part_of(prompts):
            logger.warning("prompt: not part of the prompts: %s", names)
        model, tokenizer = self.loaded
        layout = layout_of(str(self.folder), tokenizer)
        ids = prompts_of([each.conversation(layout) for each in prompts], layout, tokenizer)
        with torch.no_grad():
            answers = generate_batch(model, tokenizer, ids, SamplingConfig(**sampling), stops=layout.stop_token_ids)
        return answers[0] if is_one else answers

    def merge(self, output: str | Path, *words: str) -> Receipt:
        """Write base and adapter as one plain model; `words` are those of `lightning-peft merge`."""
        _each_a_word(words)
        return merge(compose_config("merge", [f"adapter_path={self.folder}", f"output={output}", *words]))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


def finetune(rows: Rows | str | Path, *words: str, validation_rows: Rows | None = None, **options: Any) -> Run:
    """Fine-tune on rows and return the finished run.

    `rows` are dictionaries (a list, a `datasets.Dataset`, a table of pandas) or the path of a file; `words` are those
    of `lightning-peft train`, such as "method=qlora", "model=org/name", "rank=16", "run_dir=runs/mine". `options` say
    the same as keys of a YAML file do, as method="qlora", rank=16, data={"max_length": 1024}; words win over them, as
    over those of a file. Rows given in memory are kept in the run's folder as JSON lines. Raises ValueError, before a
    model is loaded, for wrong words or rows.
    """
    _each_a_word(words)
    of_options = words_of_keys(options, "options")
    typed = (word for word in (*of_options, *words) if word != "data=jsonl")
    if named := next((word for word in typed if word.lstrip("+").startswith(NAME_ROWS)), None):
        raise ValueError(f"{named}: names rows, and rows are given already; leave one of them out")
    given = [f"data={rows}"] if isinstance(rows, str | Path) else ["data=jsonl", "data.train_path=rows"]
    config = starting_config(everyday("train", [*words, *given], before=of_options))
    if validation_rows is not None and config.data.validation_path is not None:
        raise ValueError(f"validation_rows and data.validation_path={config.data.validation_path}: give one of them")
    if not isinstance(rows, str | Path):
        folder = folder_of(config) / "rows"
        data = replace(config.data, train_path=_written(rows, "rows", folder / "train.jsonl"))
        if validation_rows is not None:
            data = replace(
                data, validation_path=_written(validation_rows, "validation_rows", folder / "validation.jsonl")
            )
        config = replace(config, data=data)
    elif validation_rows is not None:
        raise ValueError("validation_rows: rows of a file have theirs in data.validation_path=FILE")
    with shown():
        train(config)
    return Run(folder_of(config))


def load(folder: str | Path) -> Run:
    """Return a run, or an adapter of ours or of HF PEFT, by its folder."""
    return Run(folder)


@contextmanager
def shown() -> Iterator[None]:
    """Let audit and losses appear on stderr, as in a notebook's cell, unless the program set up logging itself."""
    ours = logging.getLogger("lightning_peft")
    if ours.hasHandlers():
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            ignore_library_noise()
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


def _written(rows: Any, name: str, path: Path) -> str:
    """Keep the rows in the run's folder. Raises ValueError where a run began with other rows."""
    text = "\n".join(lines_of(rows, name)) + "\n"
    is_begun = path.is_file() and is_used(path.parent.parent)
    if is_begun and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path}: the run in this folder has other rows; give those, or name a new run_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def _is_conversation(prompt: Any) -> bool:
    """Return whether this is a list of turns, each of which says whose it is."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(map(_is_turn, prompt))


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _prompt(given: Any, place: int, is_raw: bool) -> Prompt:
    """Return a text, a conversation or a row as a prompt. Raises ValueError for anything else."""
    if isinstance(given, str):
        return text_prompt(given)
    row = {"messages": list(given)} if _is_conversation(given) else given
    if not isinstance(row, Mapping):
        right = "give a text, a list of turns with role and content, or a list of such prompts"
        raise ValueError(f"prompt[{place}]={given!r}: is a {type(given).__name__}; {right}")
    return prompt_of_row(Row(dict(row), f"prompt[{place}]"), is_raw)


def _each_a_word(words: tuple[Any, ...]) -> None:
    """Raise ValueError for words that are no texts, as a list of them."""
    for word in words:
        if not isinstance(word, str):
            right = "put a star before it" if isinstance(word, list | tuple) else 'each is a text, as in "rank=16"'
            raise ValueError(f"words: {word!r} is a {type(word).__name__}; {right}")
