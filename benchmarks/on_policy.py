"""DPO on an adapter's own wrong answers: execution accuracy on unseen schemas before and after, seed by seed.

    python benchmarks/on_policy.py                       # sft, pairs, dpo and both scores, three seeds
    python benchmarks/on_policy.py --control             # and as many steps of sft on the right answers of the pairs
    python benchmarks/on_policy.py --levels in_turn      # as many hard prompts asked as easy ones

The schemas are of three disjoint sets of domains: sft trains on one half of the training domains, the pairs are of
prompts about the other half, and the scores are of rows about the test domains.

Each part is a command of `lightning-peft` in a process of its own. It goes on where it was stopped: a seed in the
result file is not run again, and neither is a part whose result lies in --folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, Results
from lightning_peft.tasks.text_to_sql.grammar.database_schema import DOMAINS
from lightning_peft.tasks.text_to_sql.rows import generate_row


@dataclass(frozen=True)
class Plan:
    """The parts of one seed."""

    model: str = "smollm2_135m"
    rows: int = 1600
    """Training rows, about half of them for each of sft and the pairs."""
    sft_steps: int = 80
    """Steps of 512 tokens, rank 16, learning rate 1.5e-3, as recipe=lora/text_to_sql."""
    asked_rows: int = 200
    levels: str = "drawn"
    """Order of the rows that are asked, of which the first are: as drawn, or easy, medium and hard in turn. Drawn ones
    give few hard pairs, as few hard prompts are answered rightly even once."""
    samples: int = 4
    temperature: float = 0.8
    chosen: str = "own"
    """The better answer of a pair: a right one that the adapter gave itself."""
    pairs_per_prompt: int = 2
    dpo_steps: int = 30
    """Steps of the pairs in a packed row of 1,024 tokens, about five."""
    dpo_lr: float = 1e-4
    beta: float = 0.1
    sft_weight: float = 1.0
    """`objective.sft_weight` of the DPO run, as in the paper that it is of."""
    scored_rows: int = 200
    scored_seed: int = 0
    """`data.split_seed` of the scored rows: a setting that was chosen by its scores is scored on other rows."""


def lightning_peft(log: Path, *words: str) -> None:
    """Run one command in a process of its own. Raises RuntimeError with the end of its output when it fails."""
    with log.open("a") as output:
        done = subprocess.run([sys.executable, "-m", "lightning_peft", *words], stdout=output, stderr=output)
    if done.returncode != 0:
        raise RuntimeError(f"lightning-peft {' '.join(words)}:\n{log.read_text()[-2000:]}")


def in_turn(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows ordered so that the first of each level come first, then the second of each, and so on."""
    by_level: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_level.setdefault(row["level"], []).append(row)
    return [row for turn in zip_longest(*by_level.values()) for row in turn if row is not None]


LEVELS: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {"drawn": list, "in_turn": in_turn}


def write_rows(plan: Plan, seed: int, folder: Path) -> None:
    """Write the training rows of a seed, of every second domain to a file of their own: `learned` and `asked`."""
    half = {table.name: number % 2 for number, tables in enumerate(DOMAINS["train"]) for table in tables}
    learned: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    for number in range(plan.rows):
        row = generate_row(seed, "train", number)
        (learned, asked)[half[row["schema"].partition("(")[0]]].append(row)
    for name, rows in (("learned", learned), ("asked", LEVELS[plan.levels](asked))):
        (folder / f"{name}-{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def words_of(plan: Plan, seed: int, folder: Path) -> dict[str, list[str]]:
    """Return the words of each part of a seed, by the name of what it leaves in `folder`, in their order."""
    rows = ["data=text_to_sql", "data.source=files", "data.validation_fraction=0"]
    base = [f"model={plan.model}", f"seed={seed}"]
    pairs, sft = folder / f"pairs-{seed}.jsonl", folder / f"sft-{seed}"
    continued = [f"adapter.init_from={sft}", "data=jsonl", f"data.train_path={pairs}", "data.validation_fraction=0",
                 "data.ignore_columns=[schema,level,seed]", "schedule=linear", "schedule.warmup_steps=5",
                 "validation.samples=0", "data.max_length=512", "data.micro_batch_size=1",
                 f"optimizer.lr={plan.dpo_lr}", f"trainer.max_steps={plan.dpo_steps}"]  # fmt: skip
    return {
        f"sft-{seed}/result.json": [
            "train", *base, *rows, f"data.train_path={folder}/learned-{seed}.jsonl",
            "data.ignore_columns=[schema,seed,level,kind]", "data.micro_batch_size=1", "validation.samples=0",
            "rank=r16", "schedule=linear", "schedule.warmup_steps=5", "optimizer.lr=1.5e-3",
            f"trainer.max_steps={plan.sft_steps}", f"run_dir={sft}",
        ],
        f"pairs-{seed}.json": [
            "pairs", str(sft), *rows, f"data.train_path={folder}/asked-{seed}.jsonl", f"output={pairs}",
            f"max_rows={plan.asked_rows}", f"samples={plan.samples}", f"temperature={plan.temperature}",
            f"chosen={plan.chosen}", f"pairs_per_prompt={plan.pairs_per_prompt}", f"seed={seed}",
        ],
        f"dpo-{seed}/result.json": [
            "train", *base, "objective=dpo", *continued, f"objective.beta={plan.beta}",
            f"objective.sft_weight={plan.sft_weight}", f"run_dir={folder}/dpo-{seed}",
        ],
        f"sft-{seed}.json": scored(plan, sft, folder / f"sft-{seed}.json"),
        f"dpo-{seed}.json": scored(plan, folder / f"dpo-{seed}", folder / f"dpo-{seed}.json"),
    }  # fmt: skip


def words_of_control(plan: Plan, seed: int, folder: Path) -> dict[str, list[str]]:
    """Return the words of as many steps of sft on the chosen answers of the same rows, at the same rate."""
    run = folder / f"control-{seed}"
    return {
        f"control-{seed}/result.json": [
            "train", f"model={plan.model}", f"seed={seed}", f"adapter.init_from={folder}/sft-{seed}", "data=jsonl",
            f"data.train_path={folder}/pairs-{seed}.jsonl", "data.completion_column=chosen",
            "data.ignore_columns=[rejected,schema,level,seed]", "data.validation_fraction=0", "schedule=linear",
            "schedule.warmup_steps=5", "validation.samples=0",
            "data.max_length=512", "data.micro_batch_size=1", f"optimizer.lr={plan.dpo_lr}",
            f"trainer.max_steps={plan.dpo_steps}", f"run_dir={run}",
        ],
        f"control-{seed}.json": scored(plan, run, folder / f"control-{seed}.json"),
    }  # fmt: skip


def scored(plan: Plan, run: Path, output: Path) -> list[str]:
    """Return the words that score a run on rows of schemas that no training row is about."""
    return ["evaluate", f"adapter_path={run}", "data=text_to_sql", f"data.split_seed={plan.scored_seed}",
            f"max_rows={plan.scored_rows}", "models=adapter", "samples=0", f"output={output}"]  # fmt: skip


def is_done(result: Path) -> bool:
    """Return whether a part is at its end: a training that was told to leave has a result too."""
    return result.is_file() and json.loads(result.read_text()).get("status", "finished") == "finished"


def keep_plan(plan: Plan, folder: Path) -> None:
    """Leave the plan in a new folder. Raises SystemExit where the folder holds runs of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "plan.json", json.dumps(asdict(plan), indent=2)
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f"--folder {folder}: holds runs of another plan ({path}); name another folder")
    path.write_text(text)


def run_parts(parts: dict[str, list[str]], folder: Path) -> None:
    """Run the parts that have left nothing yet; a training that was stopped goes on."""
    for result, words in parts.items():
        if not is_done(folder / result):
            more = ["resume=auto"] if words[0] == "train" else []
            lightning_peft(folder / "log.txt", *words, *more)
            print(f"{result}: done", flush=True)


def summary(folder: Path, seed: int, names: list[str]) -> dict[str, Any]:
    """Return what a seed gave: counts of the pairs, and scores of each run."""
    scores = {name: json.loads((folder / f"{name}-{seed}.json").read_text())["adapter"] for name in names}
    row: dict[str, Any] = {"pairs": json.loads((folder / f"pairs-{seed}.json").read_text())}
    for name, found in scores.items():
        row[name] = {
            "execution_accuracy": found["metrics"]["execution_accuracy"],
            "interval": found["intervals"]["execution_accuracy"],
            "levels": {key: value for key, value in found["metrics"].items() if key != "execution_accuracy"},
            "loss": found["loss"],
        }
    row["gain"] = row["dpo"]["execution_accuracy"] - row["sft"]["execution_accuracy"]
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--control", action="store_true", help="also train the same steps of sft on the right answers")
    parser.add_argument("--folder", type=Path, default=Path("runs/on_policy"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=FOLDER / "on_policy.json")
    for key, value in asdict(Plan()).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    plan = Plan(**{key: getattr(options, key) for key in asdict(Plan())})
    if plan.levels not in LEVELS:
        parser.error(f"--levels {plan.levels}: must be one of {', '.join(LEVELS)}")
    results = Results(options.output, asdict(plan))
    keep_plan(plan, options.folder)
    names = ["sft", "dpo", *(["control"] if options.control else [])]
    for seed in options.seeds:
        if set(names) <= results.rows.get(f"seed {seed}", {}).keys():
            print(f"seed {seed}: run before", flush=True)
            continue
        write_rows(plan, seed, options.folder)
        run_parts(words_of(plan, seed, options.folder), options.folder)
        if options.control:
            run_parts(words_of_control(plan, seed, options.folder), options.folder)
        row = summary(options.folder, seed, names)
        results.add(f"seed {seed}", row)
        print(f"seed {seed}: {row['gain']:+.1%} execution accuracy", flush=True)
    gains = [row["gain"] for row in results.rows.values()]
    print(f"mean of {len(gains)} seeds: {statistics.mean(gains):+.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
