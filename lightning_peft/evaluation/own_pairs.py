"""Pairs of answers of which the worse is the model's own: preference objectives learn most from such pairs.

On-policy pairs: the rejected answer is one that the model gives, so that its probability is there to be taken away
(Tajwar et al. 2024, arXiv:2404.14367).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from lightning_peft.data.conversation import Conversation, Message
from lightning_peft.evaluation.scorers import Scorer
from lightning_peft.tasks.task import TaskRow


class Chosen(Enum):
    """The better answer of a pair that `pairs` writes."""

    row = "row"
    """The answer of the row."""
    best = "best"
    """The best of the adapter's own answers, the row's where none is as good."""
    own = "own"
    """The best of the adapter's own answers; a prompt with none that is as good as the row's has no pair."""


Score = Callable[[TaskRow, str], float]
"""The worth of an answer to a row; a large value is good."""


def score_of(scorer: Scorer, small_is_good: bool) -> Score:
    """Return what scores one answer by a metric. The score raises ValueError where the metric gives no number."""
    (name,) = scorer.names
    sign = -1.0 if small_is_good else 1.0

    def score(row: TaskRow, answer: str) -> float:
        value = scorer.score([row], [answer])[name]
        if math.isnan(value):
            raise ValueError(f"metric={name}: is nan for the answer {answer!r} to {row['prompt']!r}")
        return sign * value

    return score


@dataclass
class Counts:
    """The numbers of answers and rows by what became of them."""

    prompts: int = 0
    same_prompts: int = 0
    """Rows left out, as one before them asks the same for the same answer."""
    answers: int = 0
    as_good: int = 0
    """Answers that are as good as the chosen one."""
    repeated: int = 0
    """Worse answers that were drawn before to the same prompt."""
    empty: int = 0
    """Worse answers without a word, which make no pair."""
    unmatched: int = 0
    """Worse answers to prompts that the model has not answered right, where the chosen one is to be its own."""
    over_limit: int = 0
    """Worse answers beyond `pairs_per_prompt`."""
    own_chosen: int = 0
    """Pairs whose better answer is the model's own, too."""
    prompts_with_pairs: int = 0
    pairs: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class Asked:
    """One row, its conversation up to the answer, and the answers drawn."""

    row: TaskRow
    """The row with `prompt` and `completion`, as tasks read them."""
    conversation: Conversation
    answers: list[str] = field(default_factory=list)


def without_repeats(asked: Sequence[Asked], counts: Counts) -> list[Asked]:
    """Return the rows without those that ask for the same answer to the same conversation as one before."""
    found: dict[str, Asked] = {}
    for each in asked:
        found.setdefault(repr((list(each.conversation), each.conversation.tools, each.row["completion"])), each)
    counts.same_prompts += len(asked) - len(found)
    counts.prompts += len(found)
    return list(found.values())


def pairs_of(asked: Asked, score: Score, limit: int, takes: Chosen, counts: Counts) -> list[tuple[str, str]]:
    """Return at most `limit` pairs (chosen, rejected) of one prompt: each rejected answer is drawn, and scores less.

    The chosen one is the row's, or the best one drawn where it scores no less. Among worse answers the worst come
    first, among equals those drawn most often.
    """
    counts.answers += len(asked.answers)
    drawn = Counter(map(str.strip, asked.answers))
    texts = {answer.strip(): answer for answer in reversed(asked.answers)}
    scores = {answer: score(asked.row, texts[answer]) for answer in drawn}
    chosen = asked.row["completion"]
    least = score(asked.row, chosen)
    best = max(filter(None, scores), key=scores.__getitem__, default=None)
    has_own = best is not None and scores[best] >= least
    if takes is not Chosen.row and best is not None and has_own:
        chosen, least = texts[best], scores[best]
    worse = [answer for answer in drawn if scores[answer] < least]
    counts.as_good += sum(drawn[answer] for answer in drawn if scores[answer] >= least)
    counts.repeated += sum(drawn[answer] - 1 for answer in worse)
    counts.empty += "" in worse
    if takes is Chosen.own and not has_own:
        counts.unmatched += len(list(filter(None, worse)))
        return []
    worse = sorted(filter(None, worse), key=lambda answer: (scores[answer], -drawn[answer]))
    counts.over_limit += len(worse[limit:])
    pairs = [(chosen, texts[answer]) for answer in worse[:limit]]
    counts.pairs += len(pairs)
    counts.prompts_with_pairs += bool(pairs)
    counts.own_chosen += len(pairs) if chosen.strip() in drawn else 0
    return pairs


def pair_row(asked: Asked, chosen: str, rejected: str, columns: Sequence[str]) -> dict[str, Any]:
    """Return a row that preference objectives read: prompt, chosen, rejected, `tools`, and what its task scores by."""
    turns = list(asked.conversation)
    prompt: Any = [_turn(message) for message in turns]
    if len(turns) == 1 and turns[0].role == "user":
        prompt = turns[0].content
    tools = {} if asked.conversation.tools is None else {"tools": asked.conversation.tools}
    kept = {name: asked.row[name] for name in columns if name in asked.row}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | tools | kept


def _turn(message: Message) -> dict[str, Any]:
    """Return a turn as rows of conversations hold it."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        found["reasoning_content"] = message.reasoning
    if message.tool_calls:
        found["tool_calls"] = list(message.tool_calls)
    return found | {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
