"""The seed papers' own ablations on text-to-SQL, over seeds: the part of a method that makes the difference.

    python benchmarks/ablations.py                            # all parts, tiny model
    python benchmarks/ablations.py --parts score --model smollm2_135m

score        Hybrid-LoRA: modules chosen by each score against modules drawn at random, and LoRA alone
share        LR-LoRA, its coefficients each layer's own or one set for all, and gated, beside LoRA: stable rank, and the
             share of the change that each block has
calibration  BaLoRA: the mean beside draws, LoRA with dropout and an ensemble of LoRAs beside both
wins         MoLF-Efficient: steps that each expert won by either score of the routing, by kind of module

The command goes on where it was stopped: a run in the result file is not made again.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, Results
from lightning_peft.adapters.hybrid_lora import SCORES
from lightning_peft.commands.calibrate import calibrate
from lightning_peft.commands.inspect import inspect
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.optim.routed_adamw import SCORES as ROUTES

BUDGET = 0.3
"""Share of the parameters that Hybrid-LoRA may train in full; its default holds no module of the tiny model."""
FULL_RATE = 0.1
"""Learning rate of modules trained in full to that of LoRA, as the method's preset has it."""

SHARED = {
    "lora": ["method=lora"],
    "lr_lora": ["method=lr_lora"],
    "lr_lora, one set for all": ["method=lr_lora", "adapter.share=model"],
    "lr_lora_gate": ["method=lr_lora_gate", "adapter.penalty=0.05"],
}
"""Words of each run of the part `share`."""

Run = Callable[..., tuple[Path, dict[str, Any]]]
"""Function that trains with words of `train` in a fresh folder, and returns the folder and the result."""


def score_part(run: Run, seed: int) -> dict[str, Any]:
    """Return the validation loss by what chose the modules to train in full, as many parameters each, and of LoRA."""
    found: dict[str, Any] = {"lora": {"validation_loss": run("method=lora")[1]["validation_loss"]}}
    for score in SCORES:
        draw = [f"adapter.draw_seed={seed}"] if score == "random" else []
        folder, result = run("method=hybrid_lora", f"adapter.score={score}", f"adapter.budget={BUDGET}", *draw)
        chosen = json.loads((folder / "selection.json").read_text())["chosen"]
        found[score] = {"validation_loss": result["validation_loss"], "chosen": chosen}
    return found


def share_part(run: Run, seed: int) -> dict[str, Any]:
    """Return the validation loss, the layers' stable ranks, and the share of the squared change of each block."""
    found = {}
    for name, words in SHARED.items():
        folder, result = run(*words)
        spectra = inspect(compose_config("inspect", [f"adapter_path={folder}"]))
        ranks = [spectrum.stable_rank for spectrum in spectra.values()]
        found[name] = {
            "validation_loss": result["validation_loss"],
            "stable_rank": {"least": min(ranks), "median": statistics.median(ranks), "most": max(ranks)},
            "energy_by_block": json.loads((folder / "inspection.json").read_text())["energy_by_block"],
        }
    return found


def calibration_part(run: Run, seed: int) -> dict[str, Any]:
    """Return the calibration of BaLoRA's mean and draws, and of LoRA, with dropout and as an ensemble of two."""
    bayes, _ = run("method=balora")
    loras = [run("method=lora", "adapter.dropout=0.1", f"seed={one}")[0] for one in (seed, seed + 100)]
    own = calibrate(compose_config("calibrate", [f"adapter_path={bayes}", "passes=8"]))
    words = [f"adapter_path={loras[0]}", "passes=8", "dropout=0.1", f"ensemble=[{loras[1]}]"]
    others = calibrate(compose_config("calibrate", words))
    named = {f"balora, {key}": value for key, value in own.items()}
    named |= {f"lora, {key}": value for key, value in others.items()}
    return {name: {k: v for k, v in asdict(scores).items() if k != "bins"} for name, scores in named.items()}


def wins_part(run: Run, seed: int) -> dict[str, Any]:
    """Return by each score of the routing the share of the steps that each expert won, by kind of module."""
    found = {}
    for score in ROUTES:
        folder, result = run("method=molf_e", f"optimizer.score={score}")
        sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for layer, wins in json.loads((folder / "wins.json").read_text()).items():
            for expert, count in wins.items():
                sums[layer.rpartition(".")[2]][expert] += count
        shares = {kind: {e: n / sum(wins.values()) for e, n in wins.items()} for kind, wins in sums.items()}
        found[score] = {"validation_loss": result["validation_loss"], "wins": shares}
    return found


PARTS = {"score": score_part, "share": share_part, "calibration": calibration_part, "wins": wins_part}


def trainer_in(folder: Path, seed: int, options: argparse.Namespace) -> Run:
    """Return what trains in folders below `folder`; a word given to it wins."""

    def run(*words: str) -> tuple[Path, dict[str, Any]]:
        place = folder / str(len(list(folder.iterdir())))
        common = [
            f"model={options.model}", "data=text_to_sql", f"seed={seed}", f"optimizer.lr={options.lr}",
            f"trainer.max_steps={options.steps}", "data.micro_batch_size=1", f"data.max_rows={8 * options.steps}",
            f"data.max_validation_rows={options.rows}", "validation.samples=0", "logger=none", "schedule=linear",
            *([f"optimizer.full_lr={FULL_RATE * options.lr:g}"] if words[0] == "method=hybrid_lora" else []),
        ]  # fmt: skip
        return place, train(compose_config("train", [*words[:1], *common, *words[1:], f"run_dir={place}"]))

    return run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=32, help="validation rows")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--output", type=Path, default=FOLDER / "ablations.json")
    options = parser.parse_args(arguments)
    settings = {key: getattr(options, key) for key in ("model", "steps", "rows", "lr")}
    results = Results(options.output, settings)
    for part in options.parts:
        for seed in options.seeds:
            if (key := f"{part}, seed {seed}") in results.rows:
                print(f"{key}: run before", flush=True)
                continue
            with tempfile.TemporaryDirectory() as temporary:
                results.add(key, PARTS[part](trainer_in(Path(temporary), seed, options), seed))
            print(f"{key}: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
