"""Metrics of generated answers at validations: what the loss is for."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft import distributed
from lightning_peft.data.conversation import Conversation
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.prompt_rows import prompts_of
from lightning_peft.evaluation.scorers import Scorer, scores_of, spread, with_answer
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.tasks.task import TaskRow
from lightning_peft.training.config import ValidationConfig
from lightning_peft.training.strategies import ShardedModel

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
"""Prompts answered at once."""


@dataclass(frozen=True)
class Questions:
    """The validation rows that are answered each time."""

    rows: list[TaskRow]
    prompts: list[list[int]]
    """Token ids."""
    stops: list[int]
    """Tokens at which answers end, by the layout."""

    @classmethod
    def of(
        cls,
        found: list[tuple[TaskRow, Conversation]],
        tokenizer: PreTrainedTokenizerFast,
        layout: PromptLayout,
        count: int,
        longest: int | None,
    ) -> "Questions":
        """Take `count` rows evenly spaced over those that ask for an answer and whose prompt has at most `longest`
        tokens. Raises ValueError where there are none."""
        asked = [(row, messages, place) for row, messages in found if (place := messages.last_answer) is not None]
        chosen = [asked[index] for index in spread(count, len(asked))]
        prompts = prompts_of([messages.before(place) for _, messages, place in chosen], layout, tokenizer)
        kept = [index for index, prompt in enumerate(prompts) if longest is None or len(prompt) <= longest]
        if len(kept) < len(chosen):
            logger.warning(
                "validation.metrics: %d of %d prompts are longer than %d tokens, which leaves no room for an answer "
                "in the model's context; they are left out", len(chosen) - len(kept), len(chosen), longest or 0,
            )  # fmt: skip
        if not kept:
            raise ValueError(
                "validation.metrics: no validation row asks for an answer; metrics need rows with a question and its "
                "answer, held out by data.validation_path or data.validation_fraction"
            )
        rows = [with_answer(*chosen[index]) for index in kept]
        return cls(rows, [prompts[index] for index in kept], layout.stop_token_ids)


class TaskMetrics(Callback):
    """Answers the same validation rows at each validation and logs what the answers score.

    Every rank answers its share of the rows; of a sharded model all ranks answer all of them together, as each holds a
    part of every block. Rank zero scores. During training `config.budget` bounds the share of the time this takes; the
    last validation of a run, and those at `config.at_steps`, always score.
    """

    def __init__(
        self,
        config: ValidationConfig,
        scorers: list[Scorer],
        questions: Questions,
        tokenizer: PreTrainedTokenizerFast,
    ):
        self.budget = config.budget
        self.at_steps = frozenset(config.at_steps)
        self.scorers = scorers
        self.questions = questions
        self.tokenizer = tokenizer
        self.sampling = SamplingConfig(
            max_new_tokens=config.max_new_tokens or max(scorer.max_new_tokens for scorer in scorers)
        )
        self.clock = time.perf_counter
        self.started = self.clock()
        self.spent = 0.0
        """Seconds of this start that scoring took."""
        self.last = 0.0
        """Seconds the last scoring took."""
        self.scored_step = -1
        self.values: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = self.clock()
        self.scored_step = -1  # a run that was rolled back comes by the same steps again

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for scorer in self.scorers:
            for name in scorer.names:
                trainer.callback_metrics.pop(name, None)  # this validation may score none

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.global_step != self.scored_step:  # the validation at the end may follow one behind the last step
            is_bounded = trainer.state.fn == "fit" and trainer.global_step not in self.at_steps
            if is_bounded and self.is_beyond_budget(trainer):
                return
            self.score(trainer, pl_module)
        for name, value in self.values.items():
            pl_module.log(name, value, batch_size=1)

    def score(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the metrics of the model as it is. All ranks call it together."""
        began = self.clock()
        answers = self.answers(trainer, pl_module)
        values = distributed.on_rank_zero(lambda: scores_of(self.scorers, self.questions.rows, answers))
        self.last = self.clock() - began
        self.spent += self.last
        self.scored_step, self.values = trainer.global_step, values
        if trainer.is_global_zero:
            logger.info(
                "step %d: %s of %d validation rows, in %.1f s", trainer.global_step,
                ", ".join(f"{name} {value:.4g}" for name, value in values.items()), len(self.questions.rows), self.last,
            )  # fmt: skip

    def is_beyond_budget(self, trainer: Trainer) -> bool:
        """Return whether another scoring like the last would take more than the share; rank zero's clock decides."""
        elapsed = self.clock() - self.started
        is_beyond = self.budget is not None and self.spent + self.last > self.budget * (elapsed + self.last)
        is_beyond = distributed.on_rank_zero(lambda: is_beyond)
        if is_beyond and self.last and trainer.is_global_zero:
            logger.info(
                "step %d: validation.metrics are not scored: they took %.1f of %.1f s, and another %.1f s would be "
                "more than validation.budget=%g of the time", trainer.global_step, self.spent, elapsed, self.last,
                self.budget,
            )  # fmt: skip
        return is_beyond

    def answers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Generate an answer to each prompt, alike on every rank."""
        model = pl_module.model
        assert isinstance(model, PreTrainedModel)
        prompts = self.questions.prompts
        if isinstance(trainer.strategy, ShardedModel):
            with trainer.strategy.root_gathered():
                return self.generate(model, prompts)
        if not distributed.is_connected():
            return self.generate(model, prompts)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, self.generate(model, prompts[rank::ranks]))
        answers = [""] * len(prompts)
        for start, part in enumerate(parts):
            answers[start::ranks] = part
        return answers

    def generate(self, model: PreTrainedModel, prompts: list[list[int]]) -> list[str]:
        return generate_batch(model, self.tokenizer, prompts, self.sampling, BATCH_SIZE, self.questions.stops)
