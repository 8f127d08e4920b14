"""Runs a model over held-out rows: loss per supervised token, and the data set's own metric on generated answers."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.data.batch import Batch
from lightning_peft.data.conversation import Conversation, Message
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.preferences import Standing
from lightning_peft.data.prompt_rows import prompts_of
from lightning_peft.evaluation.gate import row_scores, scores_by_source
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.progress import Part
from lightning_peft.tasks.task import Task, TaskRow

PREFERENCES = ("preference_accuracy", "preference_accuracy_per_token")
"""The scores of rows that are pairs of answers."""


@dataclass
class Scores:
    """The scores that one model reached."""

    loss: float
    perplexity: float
    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    source_losses: dict[str, float] = field(default_factory=dict)
    """The loss over the rows of each source of a mixture."""
    row_metrics: dict[str, list[float]] = field(default_factory=dict)
    """The values by row of the metrics that are means over rows."""
    source_metrics: dict[str, float] = field(default_factory=dict)
    """The metrics over the rows of each source of a mixture, as METRIC/SOURCE."""


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel, batches: Iterable[Batch]
) -> tuple[float, dict[str, list[float]], dict[str, float]]:
    """Return the cross entropy per supervised token, in nats; in preference rows that of the chosen answers.

    The second are scores of each pair of answers, 1 or 0: `preference_accuracy`, whether the chosen one is the more
    likely, and the same by the log-probability per token. The third are the losses of the sources of a mixture.
    """
    objective = SupervisedLoss(model)
    sums_of: dict[str, float] = defaultdict(float)
    tokens_of: dict[str, float] = defaultdict(float)
    ahead: list[Tensor] = []
    found = iter(batches)  # workers are forked before a thread of ours runs
    with Part("loss of the validation rows", len(batches) if isinstance(batches, Sized) else None) as part:
        for batch in found:
            moved = move_data_to_device(batch, model.device)
            name = "" if batch.source is None else batch.source.name
            if moved.standings is None:
                sums_of[name] += float(objective(moved))
                tokens_of[name] += batch.loss_weight
            elif moved.num_units:
                sums, counts = objective.sums_per_sample(moved, objective.token_losses(moved))
                chosen = moved.standings == Standing.chosen
                sums_of[name] -= float(sums[chosen].sum())
                tokens_of[name] += float(counts[chosen].sum())
                if not bool((moved.standings == Standing.mismatched).any()):
                    both = torch.stack([sums, sums / counts]).view(2, -1, 2)
                    ahead.append(both[..., 0] > both[..., 1])
            part.advance()
    pairs = torch.cat(ahead, 1).float().tolist() if ahead else []
    tokens = sum(tokens_of.values())
    losses = {name: sums_of[name] / count for name, count in tokens_of.items() if name and count}
    mean = sum(sums_of.values()) / tokens if tokens else 0.0
    return mean, dict(zip(PREFERENCES, pairs, strict=False)), losses


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Conversation],
    task: Task,
    batch_size: int,
    layout: PromptLayout,
) -> list[str]:
    """Return greedy answers to conversations that end with a user turn."""
    prompts = prompts_of(conversations, layout, tokenizer)
    sampling = SamplingConfig(max_new_tokens=task.max_new_tokens)
    return generate_batch(model, tokenizer, prompts, sampling, batch_size, layout.stop_token_ids)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterable[Batch],
    rows: list[TaskRow],
    conversations: Sequence[Conversation],
    task: Task,
    batch_size: int,
    layout: PromptLayout,
    sources: Sequence[str] = (),
) -> Scores:
    """Return the loss over `batches`, and `task`'s metrics of the answers to `conversations`, one for each of `rows`.

    sources: the source of a mixture of each row.
    """
    loss, pairs, source_losses = mean_loss(model, batches)
    preferences = {name: sum(values) / len(values) for name, values in pairs.items()}
    perplexity = math.exp(min(loss, 700.0))
    if task.max_new_tokens == 0:
        return Scores(loss, perplexity, preferences, source_losses=source_losses, row_metrics=pairs)
    answers = answer_rows(model, tokenizer, conversations, task, batch_size, layout)
    metrics, by_row = row_scores(task, rows, answers)
    of_sources, more = scores_by_source(task, rows, answers, sources, by_row)
    return Scores(loss, perplexity, metrics | preferences, answers, source_losses, by_row | more | pairs, of_sources)


def with_shots(conversations: Sequence[Conversation], shots: Sequence[Sequence[Message]]) -> list[Conversation]:
    """Return the conversations, which begin with solved examples, after the system message if there is one."""
    turns = [message for shot in shots for message in shot if message.role != "system"]
    started = []
    for messages in conversations:
        system = [message for message in messages if message.role == "system"]
        begun = Conversation([*system, *turns, *messages[len(system) :]], messages.tools)
        started.append(messages.at_its_place(begun))
    return started
