"""The other trainers, each in a process of its own, taking their steps in turn: HF PEFT with Trainer, TRL, Unsloth.

Run by `compare.py`: `python rivals.py NAME FOLDER --lr 2e-4 --dtype float32`, FOLDER as `workloads.py` fills it.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.machine import fastest_dtype
from benchmarks.memory import PeakMemory, synchronize
from benchmarks.turns import WARM_UP_STEPS, Turns, run_in_turns
from benchmarks.workloads import TokenRow, write_steps


class TakeTurns(TrainerCallback):
    """Asks for its turn before each step; the loss comes with the log line that follows the step."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.turns.begin()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.turns.loss = kwargs["logs"]["loss"]


def pad(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the rows of one step, padded on the right to the longest of them."""
    (item,) = items
    rows: list[TokenRow] = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(item["input_ids"], item["labels"], strict=True)
    ]  # fmt: skip
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": torch.tensor(mask)
    }  # fmt: skip


def training_arguments(
    steps: int, lr: float, dtype: torch.dtype, folder: str, checkpointing: bool = False
) -> dict[str, Any]:
    """Return `train`'s defaults in the words of `transformers`: AdamW, gradients clipped at 1, rows in order."""
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 1, "learning_rate": lr,
        "lr_scheduler_type": "constant", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "remove_unused_columns": False,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False, "use_cache": False,
        "bf16": dtype is torch.bfloat16, "fp16": False, "gradient_checkpointing": checkpointing, "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def load(folder: Path, dtype: torch.dtype) -> PeftModel:
    """Load the model in `folder` with its starting adapter; a shape without weights is drawn, with a fresh one."""
    if not (folder / "start").is_dir():
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"), dtype=dtype)
        fresh = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, fresh)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    model.config.use_cache = False
    return PeftModel.from_pretrained(model, folder / "start", is_trainable=True)


def peft_trainer(folder: Path, dtype: torch.dtype, options: dict[str, Any], **common: Any) -> Trainer:
    return Trainer(model=load(folder, dtype), args=TrainingArguments(**options), **common)


def trl_trainer(folder: Path, dtype: torch.dtype, options: dict[str, Any], **common: Any) -> Trainer:
    from trl import SFTConfig, SFTTrainer  # HF PEFT alone does not need it

    # The rows are token ids already, which is the point; TRL would pad them as `pad` does.
    config = SFTConfig(**options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return SFTTrainer(model=load(folder, dtype), args=config, processing_class=tokenizer, **common)


def unsloth_trainer(folder: Path, dtype: torch.dtype, options: dict[str, Any], **common: Any) -> Trainer:
    from unsloth import FastLanguageModel  # it patches what it finds on import

    model, _ = FastLanguageModel.from_pretrained(str(folder / "model"), dtype=dtype, load_in_4bit=False)
    start = json.loads((folder / "start" / "adapter_config.json").read_text())
    model = FastLanguageModel.get_peft_model(
        model, r=start["r"], lora_alpha=start["lora_alpha"], target_modules=start["target_modules"],
        use_gradient_checkpointing=False, random_state=0,
    )  # fmt: skip
    return Trainer(model=model, args=TrainingArguments(**options), **common)


RIVALS = {"peft": peft_trainer, "trl": trl_trainer, "unsloth": unsloth_trainer}


def why_not(name: str) -> str | None:
    """Return why a rival cannot run here; None when it can."""
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    if name == "unsloth" and not torch.cuda.is_available():
        return "unsloth needs a GPU"
    return None


def rival_command(name: str, folder: Path, lr: float, dtype: torch.dtype, checkpointing: bool = False) -> list[str]:
    words = [name, str(folder), "--lr", str(lr), "--dtype", str(dtype).removeprefix("torch.")]
    return [sys.executable, "-m", "benchmarks.rivals", *words, *(["--checkpointing"] if checkpointing else [])]


def measure_rival(name: str, overrides: list[str], steps: int, folder: Path, timeout: float) -> dict[str, Any]:
    """Measure a rival alone, recomputing activations, on the rows that `train` with these overrides reads."""
    tokens = write_steps(overrides, folder, steps) / steps
    dtype = getattr(torch, fastest_dtype("cuda" if torch.cuda.is_available() else "cpu"))
    command = rival_command(name, folder, 2e-4, dtype, checkpointing=True)
    side = run_in_turns({name: command}, steps, folder, timeout)[name]
    side["step_seconds"] = statistics.median(side["seconds"][WARM_UP_STEPS:])
    return side | {"tokens_per_second": tokens / side["step_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=RIVALS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    steps: list[list[TokenRow]] = json.loads((options.folder / "steps.json").read_text())
    rows = Dataset.from_list([{key: [row[key] for row in step] for key in ("input_ids", "labels")} for step in steps])
    turns = Turns(synchronize, PeakMemory())
    with tempfile.TemporaryDirectory() as output:
        arguments = training_arguments(len(steps), options.lr, dtype, output, options.checkpointing)
        trainer = RIVALS[options.name](
            options.folder, dtype, arguments, train_dataset=rows, data_collator=pad, callbacks=[TakeTurns(turns)]
        )
        trainer.train()
        turns.end()


if __name__ == "__main__":
    main()
