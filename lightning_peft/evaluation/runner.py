"""Runs a model over held-out rows: loss per supervised token, and the data set's own metric on generated answers."""

import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.data.batch import Batch
from lightning_peft.data.conversation import Conversation, Message, tools_of
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.preferences import Standing
from lightning_peft.evaluation.gate import row_scores
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.progress import Part
from lightning_peft.tasks.task import Row, Task

PREFERENCES = ("preference_accuracy", "preference_accuracy_per_token")
"""What is scored of rows that are pairs of answers."""


@dataclass
class Scores:
    """What one model reached."""

    loss: float
    perplexity: float
    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    row_metrics: dict[str, list[float]] = field(default_factory=dict)
    """Those of the metrics that are means over rows, for each row."""


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
    """Cross entropy per supervised token, in nats; of preference rows that of the chosen answers.

    The second are scores of pairs of answers: `preference_accuracy`, how often the chosen one is the more likely, and
    the same by the log-probability per token.
    """
    objective = SupervisedLoss(model)
    total, tokens = 0.0, 0.0
    ahead: list[Tensor] = []
    found = iter(batches)  # workers are forked before a thread of ours runs
    with Part("loss of the validation rows", len(batches) if isinstance(batches, Sized) else None) as part:
        for batch in found:
            moved = move_data_to_device(batch, model.device)
            if moved.standings is None:
                total += float(objective(moved))
                tokens += batch.loss_weight
            elif moved.num_units:
                sums, counts = objective.sums_per_sample(moved, objective.token_losses(moved))
                chosen = moved.standings == Standing.chosen
                total -= float(sums[chosen].sum())
                tokens += float(counts[chosen].sum())
                if not bool((moved.standings == Standing.mismatched).any()):
                    both = torch.stack([sums, sums / counts]).view(2, -1, 2)
                    ahead.append(both[..., 0] > both[..., 1])
            part.advance()
    shares = torch.cat(ahead, 1).float().mean(1).tolist() if ahead else []
    return (total / tokens if tokens else 0.0), dict(zip(PREFERENCES, shares, strict=False))


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[Message]],
    task: Task,
    batch_size: int,
    layout: PromptLayout,
) -> list[str]:
    """Greedy answers to conversations that end with a user turn."""
    prompts = [layout.prompt(messages, tokenizer) for messages in conversations]
    return generate_batch(
        model, tokenizer, prompts, SamplingConfig(max_new_tokens=task.max_new_tokens), batch_size=batch_size
    )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterable[Batch],
    rows: list[Row],
    conversations: Sequence[Sequence[Message]],
    task: Task,
    batch_size: int,
    layout: PromptLayout,
) -> Scores:
    """Loss over `batches`, and `task`'s metrics of the answers to `conversations`, one for each of `rows`."""
    loss, preferences = mean_loss(model, batches)
    if task.max_new_tokens == 0:
        return Scores(loss, math.exp(min(loss, 700.0)), preferences)
    answers = answer_rows(model, tokenizer, conversations, task, batch_size, layout)
    metrics, by_row = row_scores(task, rows, answers)
    return Scores(loss, math.exp(min(loss, 700.0)), metrics | preferences, answers, by_row)


def with_shots(conversations: Sequence[Sequence[Message]], shots: Sequence[Sequence[Message]]) -> list[Conversation]:
    """Conversations that begin with solved examples, after the system message if there is one."""
    turns = [message for shot in shots for message in shot if message.role != "system"]
    started = []
    for messages in conversations:
        system = [message for message in messages if message.role == "system"]
        started.append(Conversation([*system, *turns, *messages[len(system) :]], tools_of(messages)))
    return started
