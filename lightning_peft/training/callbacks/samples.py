"""Answers to a few validation prompts, so that a reader sees what the loss means."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from transformers import PreTrainedTokenizerFast

from lightning_peft.data.chat import encode_prompt
from lightning_peft.data.formats import Message
from lightning_peft.inference.generate import SamplingConfig, generate_batch
from lightning_peft.training.strategies import ShardedModel


class Samples(Callback):
    """After each validation during training, writes the model's greedy answers to `<run_dir>/samples.jsonl`.

    Each conversation ends with the answer the data gives, which is written beside the model's.
    """

    def __init__(self, conversations: list[list[Message]], tokenizer: PreTrainedTokenizerFast, run_dir: Path):
        self.prompts = [encode_prompt(messages[:-1], tokenizer) for messages in conversations if len(messages) > 1]
        self.references = [messages[-1].content for messages in conversations if len(messages) > 1]
        self.tokenizer = tokenizer
        self.path = run_dir / "samples.jsonl"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.prompts:
            return
        if isinstance(trainer.strategy, ShardedModel):
            with trainer.strategy.root_gathered():  # every rank generates, as each holds a part of every block
                answers = self.answers(pl_module)
        elif trainer.is_global_zero:
            answers = self.answers(pl_module)
        if trainer.is_global_zero:
            self.write(trainer, answers)

    def answers(self, pl_module: LightningModule) -> list[str]:
        training = pl_module.training
        pl_module.eval()
        with torch.random.fork_rng(devices=[]):
            answers = generate_batch(
                pl_module.model,  # type: ignore[arg-type]
                self.tokenizer,
                self.prompts,
                SamplingConfig(max_new_tokens=96),
            )
        pl_module.train(training)
        return answers

    def write(self, trainer: Trainer, answers: list[str]) -> None:
        rows = [
            [trainer.global_step, self.tokenizer.decode(prompt), answer, reference]
            for prompt, answer, reference in zip(self.prompts, answers, self.references, strict=True)
        ]
        columns = ["step", "prompt", "answer", "reference"]
        with self.path.open("a") as file:
            for row in rows:
                file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", columns=columns, data=rows, step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                text = "\n\n".join(f"{prompt}\n{answer}" for _, prompt, answer, _ in rows)
                logger.experiment.add_text("samples", text, trainer.global_step)
