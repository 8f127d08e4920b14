"""Equal input for every trainer: a model folder, a file of rows, the same rows as token ids, one starting adapter."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lightning_peft.compose import compose_config
from lightning_peft.data.batch import Batch
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.tasks.text_to_sql.rows import generate_rows

TokenRow = dict[str, list[int]]
"""input_ids and labels of one sample."""


@dataclass
class Workload:
    """Rows of one kind and the words with which `train` reads them."""

    name: str
    rows: int
    """Rows in a step."""
    tokens: int
    """Length of a row in tokens."""
    packed: bool = False
    """Each row is several short ones of a real task; a rival pads the same ones to the longest of the step."""
    compiled: bool = False
    """Ours runs with compile=blocks; its compilation is in the time to the first step."""

    def write_rows(self, folder: Path, steps: int) -> list[str]:
        """Write `rows.jsonl`; return the overrides for it."""
        path = folder / "rows.jsonl"
        # No tokenizer makes fewer than 40 tokens of a row.
        needed = steps * self.rows * self.tokens // 40 if self.packed else 64
        found = generate_rows(max(64, needed), seed=0, split="train")
        if self.packed:
            lines = [json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) for row in found]
            columns = ["data.prompt_column=prompt", "data.completion_column=completion"]
            shape = ["data.packing=true"]
        else:
            lines = [json.dumps({"text": text}) for text in self._long_texts(found, steps * self.rows)]
            columns = ["data.text_column=text"]
            shape = ["data.packing=false"]
        path.write_text("\n".join(lines) + "\n")
        return [
            "data=jsonl", f"data.train_path={path}", "data.validation_fraction=0", f"data.max_length={self.tokens}",
            f"data.micro_batch_size={self.rows}", f"compile={'blocks' if self.compiled else 'auto'}", *columns, *shape,
        ]  # fmt: skip

    def _long_texts(self, rows: list[dict[str, str]], count: int) -> list[str]:
        """Return texts longer than `tokens` in any tokenizer, all different: questions and answers in random order."""
        draw = random.Random(0)
        texts = []
        for _ in range(count):
            text = ""
            while len(text) < 6 * self.tokens:
                row = draw.choice(rows)
                text += f"{row['prompt']}\n{row['completion']}\n\n"
            texts.append(text)
        return texts


WORKLOADS = {
    "4x512": Workload("4x512", 4, 512),
    "short rows": Workload("short rows", 1, 2048, packed=True),
    "4x512 compiled": Workload("4x512 compiled", 4, 512, compiled=True),
    "short rows compiled": Workload("short rows compiled", 1, 2048, packed=True, compiled=True),
}


def split_samples(batch: Batch) -> list[TokenRow]:
    """Return the samples of a micro batch, without its padding; a batch of several rows must have none."""
    assert batch.num_tokens == batch.input_ids.numel() or batch.input_ids.shape[0] == 1
    ids = batch.input_ids.flatten()[: batch.num_tokens].tolist()
    labels = batch.labels.flatten()[: batch.num_tokens].tolist()
    bounds = [min(bound, batch.num_tokens) for bound in batch.cu_seqlens.tolist()]
    return [
        {"input_ids": ids[start:end], "labels": labels[start:end]}
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]


def write_steps(overrides: list[str], folder: Path, steps: int) -> int:
    """Write `steps.json`, the token rows of each of the steps that `train` takes; return the tokens of all."""
    config = compose_config("train", overrides)
    data = SFTDataModule(config.data, load_tokenizer(config.model), config.seed)
    data.setup()
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(steps), strict=False)]
    assert len(batches) == steps, f"{len(batches)} steps in the rows, {steps} wanted"
    (folder / "steps.json").write_text(json.dumps([split_samples(batch) for batch in batches]))
    return sum(batch.num_tokens for batch in batches)


def write_model(name: str, folder: Path, rank: int, targets: list[str] | str = "all-linear") -> None:
    """Write `model/`, the named model as safetensors with its tokenizer, and `start/`, HF PEFT's fresh LoRA for it."""
    config = ModelConfig(name=name)
    load_model(config, torch.float32).save_pretrained(folder / "model")
    load_tokenizer(config).save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    get_peft_model(model, adapter).save_pretrained(str(folder / "start"))
