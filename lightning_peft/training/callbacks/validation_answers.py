"""Answers to a few validation prompts, so that a reader sees what the loss means."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.adapters.inject import adapters, disable_adapters
from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.data.conversation import Conversation
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.prompt_rows import prompts_of
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.strict_json import json_line
from lightning_peft.tracking.loggers import RunLogger
from lightning_peft.training.strategies import ShardedModel

logger = logging.getLogger(__name__)


class ValidationAnswers(Callback):
    """After each validation during training, writes what base and adapter answer to `<run_dir>/samples.jsonl`.

    Each conversation is asked for its last answer; what the data give is written beside the model's. A resumed run has
    the lines of one that was never stopped.
    """

    def __init__(
        self,
        conversations: list[Conversation],
        tokenizer: PreTrainedTokenizerFast,
        run_dir: Path,
        layout: PromptLayout,
    ):
        asked = [(messages, place) for messages in conversations if (place := messages.last_answer) is not None]
        if len(asked) < len(conversations):
            logger.info("validation.samples: plain text rows ask nothing, so none of them is answered")
        self.prompts = prompts_of([messages.before(place) for messages, place in asked], layout, tokenizer)
        self.references = [messages[place].content for messages, place in asked]
        self.tokenizer, self.stops = tokenizer, layout.stop_token_ids
        self.path = run_dir / "samples.jsonl"
        self.base_answers: list[str] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the answers of steps behind the checkpoint, which are written again, and lines that a crash has cut."""
        if not trainer.is_global_zero or not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (step := step_of(line)) is not None and step <= trainer.global_step]
        if kept != lines:
            with atomic_file(self.path) as path:
                path.write_bytes(b"".join(kept))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.prompts:
            return
        if isinstance(trainer.strategy, ShardedModel):
            with trainer.strategy.root_gathered():  # every rank generates, as each holds a part of every block
                base, answers = self.generate(pl_module)
        elif trainer.is_global_zero:
            base, answers = self.generate(pl_module)
        if trainer.is_global_zero:
            self.write(trainer, base, answers)

    def generate(self, pl_module: LightningModule) -> tuple[Sequence[str | None], list[str]]:
        """Return (what the base answers, None where it is trained itself; what the model answers now)."""
        model = pl_module.model
        assert isinstance(model, PreTrainedModel)
        if self.base_answers is None and next(adapters(model), None) is not None:
            with disable_adapters(model):
                self.base_answers = self.answers(model)
        return self.base_answers or [None] * len(self.prompts), self.answers(model)

    def write(self, trainer: Trainer, base: Sequence[str | None], answers: list[str]) -> None:
        step = trainer.global_step
        rows = [
            [step, self.tokenizer.decode(prompt), *texts]
            for prompt, *texts in zip(self.prompts, base, answers, self.references, strict=True)
        ]
        columns = ["step", "prompt", "base", "answer", "reference"]
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json_line(dict(zip(columns, row, strict=True))) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_samples(columns, rows, step)

    def answers(self, model: PreTrainedModel) -> list[str]:
        sampling = SamplingConfig(max_new_tokens=96)
        return generate_batch(model, self.tokenizer, self.prompts, sampling, stops=self.stops)


def step_of(line: bytes) -> int | None:
    """Return the step of a line of samples.jsonl; None for one that no run has written so."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None
