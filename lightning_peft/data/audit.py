"""The checks and counts before the first step, so that a run does not train on nothing for hours."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.chat import Encoded
from lightning_peft.data.config import Format
from lightning_peft.data.conversation import BadRow, Message
from lightning_peft.data.preferences import Standing
from lightning_peft.data.rendering import TokenKind

SHOWN_BAD_ROWS = 3


class DuplicateBosError(ValueError):
    """A sample starts with two BOS tokens, as the chat template and the tokenizer, or the text, each bring one."""


@dataclass
class Audit:
    """Counts over the samples of a split."""

    format: str | None = None
    """Shape of the rows, known with the first of them."""
    files: int | None = None
    """Files the rows were read from; None where they come from elsewhere."""
    rows: int = 0
    bad_rows: int = 0
    bad_row_messages: list[str] = field(default_factory=list)
    """The errors of the first few bad rows."""
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    """Tokens with a label."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Tokens with a label by their kind: answer, reasoning, tool_call, end."""
    listed: dict[str, int] = field(default_factory=dict)
    """Rows that have a column, or a key of a turn, which nobody reads and which holds an id, a score or the like."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Rows that have what `data.ignore_columns` names."""
    own_turns: int = 0
    """Turns with a sample of their own, as the chat template writes them otherwise once the conversation goes on."""
    lost_turns: int = 0
    """Samples left out as their prompt fills `data.max_length`, of conversations that have others."""
    truncated: int = 0
    """Samples with trained tokens cut at `data.max_length`."""
    lost: int = 0
    """Tokens that were to be trained and are cut."""
    skipped_long: int = 0
    split_long: int = 0
    ended: int = 0
    """Samples with an end token that is trained."""
    repeated: int = 0
    """Samples that are copies of an earlier one."""
    seen_in_training: int = 0
    """Validation samples that are training samples as well."""
    seen_in_sources: int = 0
    """Samples of a source that an earlier one of the mixture has as well."""
    tools: str | None = None
    """Tools of the first row, as JSON; "" where another row has others."""
    system: str | None = None
    """System message of the first row, as JSON; "" where another row has another, or none."""
    preferences: dict[str, int] = field(default_factory=dict)
    """Counts over preference rows: pairs, ties, chosen_tokens, rejected_tokens, chosen_longer, shared_tokens; or wanted
    and unwanted answers."""
    without_others: int = 0
    """Labelled rows read alone, whose own answer stands for that to another prompt."""
    taught_tokens: int = 0
    """Tokens that a teacher reads in place of the samples, where it reads others."""
    highest: dict[str, int] = field(default_factory=dict)
    """The highest token id, by the place of the first row that has it; of several sources one each."""
    packing_fill: float | None = None
    """Share of tokens that are not padding, without packing None."""

    @classmethod
    def of_all(cls, audits: Sequence["Audit"]) -> "Audit":
        """Return the counts over several sources together; the format is that of the conversations among them."""
        formats = [audit.format for audit in audits if audit.format is not None]
        tools, systems = ({getattr(audit, name) for audit in audits} - {None} for name in ("tools", "system"))
        found = cls(
            format=next((name for name in formats if name != Format.text), formats[0] if formats else None),
            files=sum(audit.files or 0 for audit in audits) or None,
            tools=tools.pop() if len(tools) == 1 else "" if tools else None,
            system=systems.pop() if len(systems) == 1 else "" if systems else None,
            bad_row_messages=[line for audit in audits for line in audit.bad_row_messages][:SHOWN_BAD_ROWS],
        )
        for entry in fields(cls):
            values = [getattr(audit, entry.name) for audit in audits]
            if entry.type is int:
                setattr(found, entry.name, sum(values))
            elif isinstance(values[0], dict):
                setattr(found, entry.name, {name: sum(v.get(name, 0) for v in values) for v in values for name in v})
        if found.taught_tokens:  # the teacher reads other sources' samples themselves
            found.taught_tokens += sum(audit.tokens for audit in audits if not audit.taught_tokens)
        return found

    def count_bad_row(self, error: ValueError) -> None:
        self.bad_rows += 1
        if len(self.bad_row_messages) < SHOWN_BAD_ROWS:
            self.bad_row_messages.append(str(error))

    def count_tools(self, tools: list[dict[str, Any]] | None) -> None:
        # The keys keep their order, in which the template writes them.
        text = "null" if tools is None else json.dumps(tools)
        self.tools = text if self.tools in (None, text) else ""

    @property
    def shared_tools(self) -> list[dict[str, Any]] | None:
        """Return the tools that all rows offer."""
        return json.loads(self.tools) if self.tools else None

    def count_system(self, conversation: Sequence[Message]) -> None:
        """Count the system message that a conversation begins with."""
        first = conversation[0] if conversation else None
        text = json.dumps(first.content if first is not None and first.role == "system" else None)
        self.system = text if self.system in (None, text) else ""

    @property
    def shared_system(self) -> str | None:
        """Return the system message that all rows begin with."""
        return json.loads(self.system) if self.system else None

    def count_listed(self, names: Iterable[str]) -> None:
        for name in names:
            self.listed[name] = self.listed.get(name, 0) + 1

    def count_ignored(self, counts: Mapping[str, bool]) -> None:
        """Count a row in which each of the names is there, or not."""
        for name, is_there in counts.items():
            self.ignored[name] = self.ignored.get(name, 0) + is_there

    def count_sample(self, sample: Encoded, kinds: bytes, origin: str) -> None:
        """Count a sample of the row at `origin`; `kinds` has a `TokenKind` for each token, as the labels have them."""
        highest = max(sample.input_ids, default=-1)
        if all(highest > before for before in self.highest.values()):
            self.highest = {origin: highest}
        self.samples += 1
        self.tokens += len(kinds)
        self.supervised += len(kinds) - kinds.count(TokenKind.none)
        for kind in (TokenKind.answer, TokenKind.reasoning, TokenKind.tool_call, TokenKind.end):
            if count := kinds.count(kind):
                self.kinds[kind.name] = self.kinds.get(kind.name, 0) + count
        self.truncated += sample.truncated
        self.ended += TokenKind.end in kinds

    def count_unit(self, unit: Sequence[Encoded]) -> None:
        """Count samples that belong together: both answers of a pair, or a labelled one and its mismatch."""
        first, second = unit
        if second.standing is Standing.mismatched:
            self._count_preferences(**{"wanted" if first.standing is Standing.chosen else "unwanted": 1})
            return
        chosen, rejected = ([label for label in sample.labels if label != IGNORED_LABEL] for sample in unit)
        differ = (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        self._count_preferences(
            pairs=1,
            ties=int(chosen == rejected),
            chosen_tokens=len(chosen),
            rejected_tokens=len(rejected),
            chosen_longer=int(len(chosen) > len(rejected)),
            shared_tokens=next(differ, min(len(chosen), len(rejected))),
        )

    def _count_preferences(self, **counts: int) -> None:
        for name, count in counts.items():
            self.preferences[name] = self.preferences.get(name, 0) + count

    def lines(self) -> list[str]:
        """Return the counts in words."""
        share = self.supervised / self.tokens if self.tokens else 0.0
        files = f" of {self.files:,} files" if self.files is not None and self.files > 1 else ""
        lines = [
            f"{self.samples:,} samples of {self.rows:,} rows{files}, {self.tokens:,} tokens, "
            f"{self.supervised:,} trained ({share:.1%})"
        ]
        if set(self.kinds) - {TokenKind.answer.name, TokenKind.end.name}:
            parts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.kinds.items())
            lines.append(f"trained tokens: {parts}")
        if self.taught_tokens:
            more = (self.taught_tokens - self.tokens) / self.samples
            lines.append(f"the teacher reads {self.taught_tokens:,} tokens for them, {more:.1f} more a sample")
        lines += self._preference_lines()
        if self.own_turns:
            lines.append(
                f"{self.own_turns:,} turns are samples of their own: the chat template rewrites them when the "
                "conversation goes on, and each is trained as it is generated"
            )
        if self.listed:
            names = ", ".join(f"{name} ({count:,} rows)" for name, count in self.listed.items())
            lines.append(f"not read: {names}")
        if self.ignored:
            names = ", ".join(f"{name} ({count:,} rows)" for name, count in self.ignored.items())
            lines.append(f"left out by data.ignore_columns: {names}")
        if self.packing_fill is not None:
            lines.append(f"packed rows are {self.packing_fill:.1%} full")
        return lines

    def _preference_lines(self) -> list[str]:
        found = self.preferences
        if pairs := found.get("pairs"):
            chosen, rejected, shared = (found[f"{name}_tokens"] / pairs for name in ("chosen", "rejected", "shared"))
            return [
                f"{pairs:,} pairs: chosen answers of {chosen:.1f} tokens, rejected of {rejected:.1f} (chosen is longer "
                f"in {found['chosen_longer'] / pairs:.0%}), which share their first {shared:.1f}"
            ]
        if found:
            return [f"{found.get('wanted', 0):,} answers are wanted, {found.get('unwanted', 0):,} are not"]
        return []

    def _preference_warnings(self) -> list[str]:
        found = self.preferences
        if found.get("ties"):
            return [
                f"{found['ties']:,} of {found['pairs']:,} pairs have the same tokens in both answers: nothing to prefer"
            ]
        lines = []
        if "pairs" not in found and len(found) == 1:
            lines.append(f"every answer is {next(iter(found))}: a preference needs both")
        if self.without_others:
            lines.append(
                f"{self.without_others:,} rows were read alone, so that the distance to the reference is of their own "
                "answers; give more rows, or another data.shuffle_window"
            )
        return lines

    def warnings(self) -> list[str]:
        """Return a line for each thing that is left out, cut, or likely to be a mistake, with its number and remedy."""
        lines = []
        if self.bad_rows:
            first = "; ".join(self.bad_row_messages)
            lines.append(f"{self.bad_rows:,} of {self.rows:,} rows are skipped (data.on_bad_row=skip): {first}")
        if self.truncated:
            lines.append(
                f"{self.truncated:,} answers are cut at data.max_length: {self.lost:,} of their tokens and their end "
                "are not trained"
            )
        lines += self._preference_warnings()
        if self.lost_turns:
            lines.append(f"{self.lost_turns:,} turns are left out, their prompts alone fill data.max_length")
        if self.skipped_long:
            lines.append(f"{self.skipped_long:,} rows over data.max_length are skipped (data.on_too_long=skip)")
        if self.split_long:
            lines.append(f"{self.split_long:,} rows over data.max_length are split into several samples")
        units = self.preferences.get("pairs", self.samples)
        what = "pairs" if "pairs" in self.preferences else "samples"
        if self.repeated:
            lines.append(f"{self.repeated:,} of {units:,} {what} are copies of an earlier one")
        if self.seen_in_sources:
            lines.append(
                f"{self.seen_in_sources:,} of {units:,} {what} are in an earlier source of the mixture as well"
            )
        if self.seen_in_training:
            lines.append(
                f"{self.seen_in_training:,} of {units:,} {what} are training {what} as well: their loss says "
                "nothing of unseen rows"
            )
        if set(self.kinds) == {TokenKind.end.name}:
            lines.append("only end tokens are trained: no row has another part that data.train_on names")
        if self.samples and not self.ended:
            reason = (
                "every answer is cut at data.max_length"
                if self.truncated == self.samples
                else "the chat template puts no special token after an answer, or the tokenizer has no EOS"
            )
            lines.append(f"no end token is trained, so generation will not learn to stop: {reason}")
        return lines


def check_sample(sample: Encoded, origin: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `BadRow` for a sample with nothing to train, `DuplicateBosError` for one that starts with two BOS."""
    bos = tokenizer.bos_token_id
    if bos is not None and sample.input_ids[:2] == [bos, bos]:
        raise DuplicateBosError(
            f"{origin}: the sample starts with two BOS tokens {tokenizer.bos_token!r}, it must be one; "
            "look at the chat template and the tokenizer's post-processor, or take BOS out of the text"
        )
    if not any(label != IGNORED_LABEL for label in reversed(sample.labels)):
        if sample.truncated:
            raise BadRow.because(
                origin,
                f"expected an answer that begins before data.max_length, got a prompt of {len(sample.input_ids)} "
                "tokens or more (raise data.max_length, or data.on_too_long=skip)",
            )
        raise BadRow(origin, "at least one token to train", tokenizer.decode(sample.input_ids))


def preview(sample: Encoded, tokenizer: PreTrainedTokenizerBase, has_colours: bool = True) -> Text:
    """Return a sample as text, trained parts on green, the rest dim; special tokens are shown.

    Where there are no colours, as in a log file, trained parts stand in [[ ]].
    """
    text = Text()
    for start, stop in _runs(sample.labels):
        trained = sample.labels[start] != IGNORED_LABEL
        part = str(tokenizer.decode(sample.input_ids[start:stop], skip_special_tokens=False))
        shown = part if has_colours or not trained else f"[[{part}]]"
        text.append(shown, style="black on green" if trained else "dim")
    return text


KIND_STYLES = {
    TokenKind.answer: "black on green",
    TokenKind.reasoning: "black on cyan",
    TokenKind.tool_call: "black on yellow",
    TokenKind.end: "black on magenta",
}
"""The style that shows each kind of trained tokens."""


def preview_kinds(sample: Encoded, tokenizer: PreTrainedTokenizerBase, has_colours: bool = True) -> Text:
    """Return a sample as text, trained parts coloured by what they are, the rest dim.

    Where there are no colours, as in a log file, trained parts stand in [[ ]] behind what they are.
    """
    text = Text()
    kinds = list(sample.kinds or bytes(len(sample.labels)))
    for start, stop in _runs_of(kinds):
        part = str(tokenizer.decode(sample.input_ids[start:stop], skip_special_tokens=False))
        kind = TokenKind(kinds[start])
        shown = part if has_colours or kind not in KIND_STYLES else f"[[{words_of(kind)}: {part}]]"
        text.append(shown, style=KIND_STYLES.get(kind, "dim"))
    return text


def words_of(kind: TokenKind) -> str:
    return kind.name.replace("_", " ")


def _runs_of(values: Sequence[int]) -> list[tuple[int, int]]:
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    return _runs_of([label != IGNORED_LABEL for label in labels])
