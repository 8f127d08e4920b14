"""The `data.*` options."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any


class Format(StrEnum):
    """Shapes of rows that this package reads; `auto` goes by the columns. Modules of one's own may add others."""

    auto = "auto"
    messages = "messages"
    instruction = "instruction"
    prompt_completion = "prompt_completion"
    text = "text"
    tokens = "tokens"
    preference = "preference"
    labelled = "labelled"


class RowKind(Enum):
    """The content of a row: answers to learn, a chosen and a rejected answer, or an answer and whether it is wanted."""

    answers = "answers"
    pairs = "pairs"
    labelled = "labelled"

    @property
    def samples(self) -> int:
        """Return how many samples of a row belong together; a labelled one has the prompt with another answer too."""
        return 1 if self is RowKind.answers else 2


class OnBadRow(Enum):
    """A row that cannot be read or does not have its format's columns: stop, or leave it out and count it."""

    error = "error"
    skip = "skip"


class OnTooLong(Enum):
    """A sample over `max_length`: cut its end, cut it into several (plain text only), leave it out, or stop."""

    truncate = "truncate"
    split = "split"
    skip = "skip"
    error = "error"


class Layout(Enum):
    """The layout of a prompt: the tokenizer's chat template, or the text as it stands in the row."""

    chat = "chat"
    raw = "raw"


class Reasoning(Enum):
    """The thoughts that are trained: each, as its answer is generated; none; or the last answer's of a conversation."""

    keep = "keep"
    drop = "drop"
    last = "last"


class Trained(Enum):
    """Parts of an assistant's turn."""

    answer = "answer"
    reasoning = "reasoning"
    tool_call = "tool_call"


def named_sources(entries: list[Any]) -> dict[str, Any]:
    """Return a list of sources as a mapping, each by its `name`, else by its place in the list from 0 on.

    Raises ValueError for a source that is no mapping, or two of one name.
    """
    found: dict[str, Any] = {}
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"data.sources: entry {place} must hold options, as in {{train_path: FILE}}, got {entry}")
        name = str(entry.get("name", place))
        if name in found:
            raise ValueError(f"data.sources: the name {name} stands twice")
        found[name] = {key: value for key, value in entry.items() if key != "name"}
    return found


@dataclass
class DataConfig:
    source: str = "files"
    """The source of the rows: a name in `lightning_peft.data.sources.SOURCES`."""
    train_path: Any = None
    """For `source=files`: a JSONL, JSON, CSV, TSV, parquet, Arrow or Excel file, a folder, a pattern of several (`**`
    goes into folders), or a list of them. Text may end in .gz, .bz2, .xz or .zst; s3://, gs:// and hf:// are read
    through fsspec."""
    validation_path: Any = None
    """For `source=files`: rows to validate on; without it `validation_fraction` of the training rows are held out."""
    hub_name: str | None = None
    """For `source=hub`: data set on the Hugging Face hub, or a local folder that `datasets.load_dataset` reads."""
    hub_config: str | None = None
    """Configuration name of the hub data set."""
    hub_split: str = "train"
    """Split of the hub data set to train on."""
    hub_validation_split: str | None = None
    """Split to validate on; without it `validation_fraction` of the training rows are held out."""
    rows: RowKind | None = None
    """The content of a row: answers, pairs of a chosen and a rejected one, or labelled ones; null takes the kind that
    the objective trains on, and answers where there is none."""
    task: str = "none"
    """Task by which `evaluate` scores answers: a name in `lightning_peft.tasks.registry.TASKS`; none for the loss only.
    """
    format: str = "auto"
    """Shape of the rows: messages, instruction, prompt_completion, text, tokens, preference, labelled, or one of your
    own; auto goes by the columns."""
    chosen_column: str | None = None
    """Column of the better answer in preference rows, usually `chosen`."""
    rejected_column: str | None = None
    """Column of the worse answer in preference rows, usually `rejected`."""
    margin_column: str | None = None
    """Column of a number by which the reward of the better answer is to be ahead, of objective=reward; null for
    none."""
    label_column: str | None = None
    """Column that says of a labelled row whether its answer is wanted, usually `label`."""
    prompt_column: str | None = None
    """Column of the prompt in prompt/completion rows, usually `prompt`."""
    completion_column: str | None = None
    """Column of the answer in prompt/completion rows, usually `completion`."""
    text_column: str | None = None
    """Column of plain text rows, usually `text`."""
    messages_column: str | None = None
    """Column of chat rows, usually `messages` or `conversations`."""
    system_column: str | None = None
    """Column of a row's system message, usually `system`."""
    history_column: str | None = None
    """Column of earlier question and answer pairs, usually `history`; they are context and not trained."""
    input_column: str | None = None
    """Column of what an instruction or prompt is about, usually `input`."""
    tools_column: str | None = None
    """Column of the tools a conversation offers, usually `tools`: a list, or JSON."""
    reasoning_column: str | None = None
    """Column of the thought before the answer, of rows that are no turns; usually `reasoning_content`."""
    prompt_template: str | None = None
    """Jinja text over the columns of a row that makes its prompt; the answer is `completion_column`."""
    teacher_prompt: str | None = None
    """Jinja text over the columns of a row that the teacher of objective=distill alone reads, as a system message
    before the conversation: what it makes of that is learned without it."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns, and keys of turns, that are left out on purpose."""
    layout: Layout = Layout.chat
    """The layout of prompts; raw takes prompt/completion rows as they stand, without a chat template."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `{enable_thinking: false}`, in training and generation."""
    reasoning: Reasoning = Reasoning.keep
    """The thoughts that are trained. The chat template decides which earlier thoughts a later prompt shows."""
    train_on: list[Trained] = field(default_factory=lambda: [Trained.answer, Trained.reasoning, Trained.tool_call])
    """Parts of an assistant's turn that are trained."""
    train_on_last_turn: bool = False
    """Train the last turn of a conversation only."""
    system_prompt: str | None = None
    """System message put before every conversation that has none."""
    max_length: int = 512
    """Longest sample in tokens, and with packing the length of every row of a batch."""
    on_too_long: OnTooLong = OnTooLong.truncate
    """The treatment of samples over `max_length`, which are always counted and reported."""
    on_bad_row: OnBadRow = OnBadRow.error
    """The treatment of rows that cannot be used; skipped ones are counted and reported."""
    max_rows: int | None = None
    """Train on the first so many rows; null takes all (generated sources: their own default)."""
    max_validation_rows: int | None = 200
    """Validate on the first so many rows; null takes all."""
    validation_fraction: float = 0.05
    """Share of the training rows held out when the source has no validation rows of its own; 0 turns validation off."""
    split_seed: int = 0
    """Seed of the held-out share and of generated rows. A seed apart from the run's lets runs with different seeds, and
    `evaluate` after them, use the same validation rows."""
    packing: Any = "auto"
    """Several samples to a row of `max_length` tokens; without it, samples of similar length share a micro batch. auto
    packs for the models that keep samples apart, true refuses the others, false never packs."""
    micro_batch_size: int = 4
    """Rows in a micro batch."""
    streaming: bool = False
    """Read, tokenise and pack during training instead of before it."""
    shuffle_window: int = 1000
    """Rows that are shuffled and packed together when streaming."""
    cache_dir: str | None = "auto"
    """Folder that keeps tokenised rows for later starts and other ranks, safe to delete while no run reads it; auto is
    lightning_peft under $XDG_CACHE_HOME or ~/.cache, null keeps none. Streamed rows are not kept."""
    num_workers: int = 0
    """Processes that prepare batches beside the training process."""
    sources: Any = field(default_factory=dict)
    """Several sets of rows that are mixed, each under a name: `data.sources.chat.train_path=chat.jsonl`
    `data.sources.chat.weight=0.7`. Each takes the options of `data` that say where rows are and how they are read,
    `weight` (its part of the tokens; null goes by its size) and `max_epochs` (most passes over its rows in the run)."""
    temperature: float = 1.0
    """With `sources`: weights, or sizes where none are given, are taken to the power 1 / temperature; above 1 evens
    them out."""
    preview: bool = False
    """Show one sample before training, trained tokens highlighted."""

    def __post_init__(self) -> None:
        if isinstance(self.sources, list):
            self.sources = named_sources(self.sources)
        if not self.train_on:
            raise ValueError("data.train_on=[]: name at least one of answer, reasoning, tool_call")
        if self.packing not in ("auto", True, False):
            raise ValueError(f"data.packing={self.packing}: must be auto, true or false")
        for name in ("train_path", "validation_path"):
            paths = getattr(self, name)
            if isinstance(paths, str) and paths.startswith("[") and paths.endswith("]"):
                # The command line takes the words of a path as they stand, those of a list too.
                paths = [path.strip(" '\"") for path in paths[1:-1].split(",") if path.strip()]
                setattr(self, name, paths)
            listed = isinstance(paths, list) and paths != [] and all(isinstance(path, str) for path in paths)
            if not listed and not isinstance(paths, str | None):
                raise ValueError(f"data.{name}={paths}: must be a file, a folder, a pattern, or a list of them")
        for name in ("max_length", "micro_batch_size", "shuffle_window", "max_rows", "max_validation_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value}: must be at least 1")
        if self.max_length < 2:
            raise ValueError(
                f"data.max_length={self.max_length}: must be at least 2, a token is predicted from another"
            )
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers}: must be 0 or more")
        if self.streaming and self.num_workers:
            raise ValueError(f"data.num_workers={self.num_workers}: must be 0 with data.streaming=true")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"data.temperature={self.temperature}: must be above 0")
        if self.temperature != 1 and not self.sources:
            raise ValueError(f"data.temperature={self.temperature}: needs data.sources, whose weights it evens out")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction={self.validation_fraction}: must be at least 0 and below 1")
