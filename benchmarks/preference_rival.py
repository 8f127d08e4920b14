"""TRL's DPOTrainer in a process of its own, taking its steps in turn: `preference_rival.py FOLDER --lr 2e-4 ...`.

FOLDER is as `preference.py` fills it: the pairs of each step as token ids, the model, the adapter that both start from.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from benchmarks.memory import PeakMemory, synchronize
from benchmarks.rivals import TakeTurns, load, training_arguments
from benchmarks.turns import Turns
from benchmarks.workloads import TokenRow
from lightning_peft.data.batch import IGNORED_LABEL


class OnTokens(DPOTrainer):
    """TRL's trainer on rows that are token ids already; everything else is its own."""

    def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
        return dataset


def pad_pairs(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the pairs of one step as TRL's own collator has them: chosen, then rejected, padded on the right."""
    (item,) = items
    samples: list[TokenRow] = [
        {"input_ids": ids, "labels": labels} for ids, labels in zip(item["input_ids"], item["labels"], strict=True)
    ]
    samples = samples[::2] + samples[1::2]
    width = max(len(sample["input_ids"]) for sample in samples)

    def padded(rows: list[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    return {
        "input_ids": padded([sample["input_ids"] for sample in samples]),
        "attention_mask": padded([[1] * len(sample["input_ids"]) for sample in samples]),
        "completion_mask": padded([[int(label != IGNORED_LABEL) for label in s["labels"]] for s in samples]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    steps: list[list[TokenRow]] = json.loads((options.folder / "steps.json").read_text())
    rows = Dataset.from_list([{key: [row[key] for row in step] for key in ("input_ids", "labels")} for step in steps])
    turns = Turns(synchronize, PeakMemory())
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as output:
        arguments = training_arguments(len(steps), options.lr, dtype, output)
        # Nothing is kept that was computed before: each step runs the reference, as ours does.
        config = DPOConfig(**arguments, beta=options.beta, max_length=None, precompute_ref_log_probs=False)
        trainer = OnTokens(
            model=load(options.folder, dtype),
            args=config,
            processing_class=AutoTokenizer.from_pretrained(options.folder / "model"),
            train_dataset=rows,
            data_collator=pad_pairs,
            callbacks=[TakeTurns(turns)],
        )
        trainer.train()
        turns.end()


if __name__ == "__main__":
    main()
