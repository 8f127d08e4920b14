"""Runs tasks of EleutherAI's lm-evaluation-harness on a model that is in memory."""

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.evaluation.gate import Metric


def check_harness(tasks: Sequence[str], tasks_path: str | None) -> None:
    """Raise ValueError where the harness is not installed, or knows no such task."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("benchmark=lm_eval: not installed; pip install 'lightning-peft[lm_eval]'")
    if not tasks:
        raise ValueError("benchmark=lm_eval tasks=[]: give the harness's tasks, as tasks=[arc_easy,hellaswag]")
    known = task_manager(tuple(tasks), tasks_path)
    for task in tasks:
        if not known.match_tasks([task]):
            raise ValueError(f"tasks={task}: the harness has no such task; tasks_path=FOLDER adds those of your own")


@cache
def task_manager(tasks: tuple[str, ...], tasks_path: str | None) -> Any:
    """Return an index that holds the tasks: of the files in `tasks_path` alone where they hold all, as the harness's
    own are ten thousand."""
    # The harness is an optional extra and takes seconds to import.
    from lm_eval.tasks import TaskManager

    if tasks_path is not None:
        own = TaskManager(include_path=tasks_path, include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    return TaskManager(include_path=tasks_path)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[str],
    tasks_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
) -> dict[str, Metric]:
    """Return the metrics of the tasks as TASK/METRIC, of at most `limit` documents each."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        task_manager=task_manager(tuple(tasks), tasks_path),
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None, "the harness runs on one rank"
    metrics: dict[str, Metric] = {}
    for task, results in found["results"].items():
        samples = sorted(found["samples"].get(task, []), key=lambda sample: sample["doc_id"])
        directions = found.get("higher_is_better", {}).get(task, {})
        for key, value in results.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            own = [sample for sample in samples if sample.get("filter", "none") == filtered]
            rows = [float(s[name]) for s in own if isinstance(s.get(name), int | float)]
            is_mean = len(rows) == len(own) > 0 and math.isclose(sum(rows) / len(rows), value, abs_tol=1e-9)
            label = f"{task}/{name}" if filtered == "none" else f"{task}/{name}/{filtered}"
            metrics[label] = Metric(float(value), rows if is_mean else [], directions.get(name) is False)
    return metrics
