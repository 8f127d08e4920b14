"""The commands of README and docs, run: on the tiny model, two steps and a few rows, and otherwise as they stand."""

import io
import json
import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_docs import COMMAND_LINES, blocks

from lightning_peft.__main__ import main
from lightning_peft.sweeps.sweep import FINISHED, PAUSED, changed_sweep, read_sweep, refresh

NOT_RUN = {
    "demo": "fetches a package: tests/commands/test_demo.py",
    "train model=Qwen/Qwen3-8B-FP8": "a model of the hub: tests/quantization/test_published.py",
    "train method=lora model=Qwen/Qwen3-30B-A3B": "a mixture of the hub: tests/adapters/test_experts.py",
    "train method=lora model=mistralai/Mixtral-8x7B-v0.1": "a mixture of the hub: tests/adapters/test_experts.py",
    "evaluate adapter_path=runs/mine benchmark=lm_eval": "a package of its own: tests/evaluation/test_gate.py",
    "train logger=mlflow": "a package of its own, and a server: tests/training/test_services.py",
    "train 'logger=[wandb,mlflow]'": "a package of its own: tests/training/test_services.py",
    "train logger=trackio": "a package of its own: tests/training/test_services.py",
    "train logger=comet": "a package of its own: tests/training/test_services.py",
    "serve adapters=[sql=runs/a,phones=runs/b]": "serves until it is ended: tests/serving/test_server.py",
    "serve adapter_dir=sweeps/rank": "serves until it is ended: tests/serving/test_server.py",
    "serve model=smollm2_135m": "serves until it is ended: tests/serving/test_server.py",
    "serve adapters=[sql=runs/a] adapter_dir=adapters serve.engine=vllm": "vLLM: tests/serving/test_vllm_server.py",
}
"""Beginning of a command -> the reason why it is not run here, and the tests that do what it does."""
TO_THE_SCRIPT = {
    "submit method=qlora model=llama_3_1_70b": "SLURM: tests/cluster/test_slurm_jobs.py",
    "submit -m adapter.rank=4,8,16,64 adapter.alpha=16,32 sweep_dir=sweeps/rank cluster.gpus_per_node=1": "SLURM: "
    "tests/cluster/test_slurm_sweep.py",
    "submit -m 'optimizer.lr=tag(log,interval(1e-5,1e-2))' adapter.rank=4,8 sweep.search=random": "SLURM: "
    "tests/cluster/test_slurm_searches.py",
    "submit -m adapter.rank=4,8,16,32 method=lora,rslora sweep.together=auto": "SLURM: "
    "tests/cluster/test_slurm_sweep.py",
    "submit method=qlora model=llama_3_1_8b cluster=kubernetes": "a cluster: tests/cluster/test_clouds.py",
    "submit -m adapter.rank=4,8,16 sweep.parallel=2 cluster=kubernetes": "a cluster: tests/cluster/test_clouds.py",
    "submit method=lora model=llama_3_1_8b cluster=skypilot": "a cluster: tests/cluster/test_clouds.py",
}
"""Beginning of a command -> the reason why it is run up to the script it would submit, and the tests that submit it."""
LONG = (" -m ", "sweep ", "strategy=", "sweeps/", "smaller_ranks", "logger=wandb")
"""Parts of commands that train a sweep, or start processes of their own."""

FEW = {"data.max_rows": "8", "data.max_validation_rows": "2"}
SHORT = FEW | {
    "model": "tiny", "trainer.max_steps": "2", "trainer.accelerator": "cpu", "data.micro_batch_size": "1"
}  # fmt: skip
"""Words of a training beside its own, and in place of them."""
INSTEAD: dict[str, dict[str, str]] = {
    **dict.fromkeys(("train", "estimate", "submit"), SHORT),
    "data": FEW | {"model": "tiny"},
    "pairs": {"max_rows": "2", "max_new_tokens": "8", "samples": "2", "pairs_per_prompt": "1"},
    "generate": {"sampling.max_new_tokens": "4"}, "evaluate": {"max_rows": "2"}, "calibrate": {"max_rows": "2"},
}  # fmt: skip
"""Command -> words that make it short."""
HERE = {
    "data=alpaca": "data=text_to_sql", "objective.teacher=qwen3_8b": "objective.teacher=base",
    "model.path=DIR": "model.path=base", "trainer.devices=8": "trainer.devices=2",
}  # fmt: skip
"""Word -> what stands for it here."""
SWEPT = {
    "sweeps/rank": "adapter.rank=4,8 adapter.alpha=16,32",
    "sweeps/asha": "adapter.rank=4,8 sweep.pruning=asha sweep.min_steps=1",
    "sweeps/seeds": "adapter.rank=4,64 optimizer.lr=1e-4,1e-3 seed=0,1",
    "sweeps/dimension": "recipe=intrinsic/dimension adapter.dimension=16,128",
}  # fmt: skip
RUNS = {
    **dict.fromkeys(("runs/mine", "runs/a", "runs/b", "runs/c", "runs/demo"), ""),
    "runs/bayes": "method=balora", "runs/large": "rank=64", "runs/reward": "recipe=lora/reward_text_to_sql",
    "runs/dpo": "recipe=lora/dpo_text_to_sql",
}  # fmt: skip
"""Folder that commands take -> the words it is made with."""
PROMPTS = [f"What is {n} plus {n}?" for n in range(12)]


def rows(*columns: str, **values: Any) -> str:
    """Return lines of rows with texts in the columns, and beside them the same values in each."""
    return "".join(
        json.dumps({column: f"{prompt} {column}" for column in columns} | values) + "\n" for prompt in PROMPTS
    )


DIALOG = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
FILES = {
    "rows.jsonl": rows("prompt", "completion"),
    "train.jsonl": rows("question", "answer"), "test.jsonl": rows("question", "answer"),
    "pairs.jsonl": rows("prompt", "chosen", "rejected"), "labels.jsonl": rows("prompt", "completion", label=True),
    "rows.csv": "question,answer\n" + "".join(f"{prompt},2\n" for prompt in PROMPTS),
    "my_metrics.py": "def rouge(rows, answers):\n    return sum(map(len, answers)) / len(answers)\n",
}  # fmt: skip
ROWS_OF = {
    "data.messages_column=dialog": ("rows.jsonl", rows(dialog=DIALOG, rating=5)),
    "data.chosen_column=good": ("pairs.jsonl", rows("question", "good", "bad")),
    "data.margin_column=margin": ("pairs.jsonl", rows("prompt", "chosen", "rejected", margin=0.5)),
    "{{ document }}": ("rows.jsonl", rows("prompt", "completion", "document")),
}
"""Part of a command -> a file with the columns that it names."""


def short(command: str, words: list[str]) -> list[str]:
    """Return a command's words with those of `INSTEAD` and `HERE` in place of its own."""
    instead = INSTEAD.get(command, {})
    words = [HERE.get(word, word) for word in words]
    if "model=hf" in words or any(word.startswith("config_path=") for word in words):
        instead = {key: value for key, value in instead.items() if key != "model"}
    if "method=hybrid_lora" in words and "adapter.budget_in=modules" not in words:
        instead = instead | {"adapter.budget": "0.6"}  # a tenth of the tiny model holds no layer
    kept = [word for word in words if word.partition("=")[0] not in (*instead, "hardware")]
    return [*kept, *(f"{key}={value}" for key, value in instead.items())]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], None]:
    """Return what copies a run, a sweep or a model that commands take into a folder; each is made once."""
    store = tmp_path_factory.mktemp("made")

    def make(name: str) -> None:
        """Make the folder in this one."""
        words = shlex.split({**RUNS, **SWEPT}.get(name, ""))
        if name in RUNS:
            run("train", [*words, f"run_dir={name}"], "trainer.max_steps=1", "checkpoint.every_n_steps=1")
        elif name == "base":
            put("runs/mine", store)
            assert main(["merge", "adapter_path=runs/mine", "output=base", "merge.max_kl=10"]) == 0
        elif name == "sweeps/dimension":
            run("train", ["-m", *words, f"run_dir={name}"])
            for trial in (store / name).glob("*/config.yaml"):
                run("evaluate", [f"adapter_path={trial.parent}"])
        else:
            run("submit", ["-m", *words, f"sweep_dir={name}", "cluster=local"], "sweep.together=8")
            wait_for_sweep(store / name)

    def put(name: str, folder: Path) -> None:
        if not (store / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(store)
                make(name)
        if folder != store:
            shutil.copytree(store / name, folder / name)

    return put


def run(command: str, words: list[str], *more: str) -> None:
    assert main([command, *short(command, words), *more]) == 0


def wait_for_sweep(folder: Path) -> None:
    """Wait for the last of a sweep's workers, and see that no trial has failed."""
    deadline = time.monotonic() + 900
    while any(worker.is_alive for worker in read_sweep(folder).workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with changed_sweep(folder) as sweep:
        refresh(sweep, folder, {})
    states = {trial.name: trial.state for trial in sweep.trials}
    assert states and set(states.values()) <= {FINISHED, PAUSED}, states


def value_of(words: list[str], *keys: str) -> str | None:
    """Return the value of the first of these keys that is given."""
    given = dict(word.partition("=")[::2] for word in words)
    return next((given[key] for key in keys if key in given), None)


def prepare(page: str, line: str, words: list[str], folder: Path, put: Callable[[str, Path], None]) -> None:
    """Leave the files and folders that a command works on in the folder."""
    of_line = dict(content for part, content in ROWS_OF.items() if part in line)
    for name, text in (FILES | of_line).items():
        (folder / name).write_text(text)
    if "my.yaml" in words and "init" not in words:
        (folder / "my.yaml").write_text(blocks("README.md", "yaml")[0])
    if "mixed.yaml" in words:
        text = next(block for block in blocks(page, "yaml") if "mixed" in block)
        (folder / "mixed.yaml").write_text(text.replace("hub_name: org/chat", "train_path: chat.jsonl"))
        (folder / "docs").mkdir()
        for name, columns in (
            ("sql", ("prompt", "completion")),
            ("chat", ("prompt", "completion")),
            ("docs/a", ("body",)),
        ):
            (folder / f"{name}.jsonl").write_text(rows(*columns))
    for name in (*RUNS, *SWEPT, "base"):
        is_made = name == value_of(words, "run_dir", "sweep_dir") and "resume=auto" not in words
        if not is_made and re.search(rf"(?<![\w/]){name}(?![\w])", " ".join(words)):
            put(name, folder)
    if words[0] == "d90":
        run("evaluate", ["adapter_path=runs/mine"])
    if words[:2] == ["sweep", "retry"]:
        next(folder.glob("sweeps/rank/*/result.json")).unlink()  # as where the trial was killed


def beginning(line: str, table: dict[str, str]) -> str | None:
    """Return the text by which a table knows a command."""
    plain = re.sub(r"^lightning-peft +(\S+) *", r"\1 ", line)
    return next((start for start in table if plain == start or plain.startswith(f"{start} ")), None)


def is_long(line: str) -> bool:
    return any(part in line for part in LONG) and not line.startswith("lightning-peft submit method")


@pytest.mark.parametrize(
    ("page", "line"),
    [
        pytest.param(page, line, marks=pytest.mark.slow if is_long(line) else (), id=" ".join(line.split()[1:6]))
        for line, page in reversed({line: page for page, line in reversed(COMMAND_LINES)}.items())
        if beginning(line, NOT_RUN) is None
    ],
)
def test_command_runs(page, line, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, command, *words = shlex.split(line, comments=True)
    words = short(command, words)
    if beginning(line, TO_THE_SCRIPT) is not None:
        (tmp_path / "volume").mkdir()
        words = [word.replace("/runs", f"{tmp_path}/volume") for word in words] + ["cluster.dry_run=true"]
    if "cluster=local" in words and not any(word.startswith("sweep.together=") for word in words):
        words.append("sweep.together=9")  # trials of one process, where each would have one of its own
    prepare(page, line, [command, *words], tmp_path, made)
    monkeypatch.setattr("sys.stdin", io.StringIO("How many singers are there?\nexit\n"))
    try:
        status = main([command, *words])
    except SystemExit as end:  # as a gate ends the command
        status = end.code
    assert status in ((0, 4) if "gate=" in line else (0,))
    output = value_of(words, "run_dir", "sweep_dir", "output", "output_path", "histogram_path")
    if output is not None and not any("dry_run=true" in word for word in words):
        assert Path(output).exists()
    if command == "train" and "-m" not in words and (run_dir := value_of(words, "run_dir")):
        assert json.loads((Path(run_dir) / "result.json").read_text())["status"] == FINISHED
    if command == "submit" and "cluster=local" in words:
        wait_for_sweep(Path(str(output)))


def test_each_exception_is_of_a_command():
    for table in (NOT_RUN, TO_THE_SCRIPT):
        assert set(table) == {beginning(line, table) for _, line in COMMAND_LINES} - {None}
        for reason in table.values():
            assert (Path(__file__).parents[1] / reason.rpartition(": ")[2]).exists()
