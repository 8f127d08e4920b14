"""`lightning-peft evaluate`: loss, perplexity and the data set's own metric, base against adapter in one table."""

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.adapters.balora import sampling
from lightning_peft.adapters.inject import disable_adapters
from lightning_peft.checkpoint.atomic import check_can_write, write_text
from lightning_peft.checkpoint.model_card import write_card
from lightning_peft.checkpoint.peft_format import changes_base
from lightning_peft.checkpoint.peft_words import gives_rewards
from lightning_peft.command_configs.of_answers import CalibrateConfig, EvaluateConfig, PairsConfig, Scored
from lightning_peft.commands.adapted import (
    best_of_sweep,
    layout_of,
    load_base,
    load_for_inference,
    saved_config,
    tokenizer_for_inference,
)
from lightning_peft.config import TrainConfig
from lightning_peft.data.audit import Audit
from lightning_peft.data.config import DataConfig, RowKind
from lightning_peft.data.conversation import Conversation
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.mixture import shared_option, sources_of
from lightning_peft.data.samples import read_conversations
from lightning_peft.evaluation.calibration import Calibration, Way, calibration
from lightning_peft.evaluation.gate import DoNotShip, Metric, verdicts
from lightning_peft.evaluation.harness import check_harness, run_harness
from lightning_peft.evaluation.rewards import reward_scores
from lightning_peft.evaluation.runner import PREFERENCES, Scores, score, with_shots
from lightning_peft.evaluation.scorers import with_answer
from lightning_peft.inference.drawn import check_draws
from lightning_peft.inference.load import is_whole_model, tuned_folder
from lightning_peft.models.packing_choice import packing_of
from lightning_peft.objectives.reward import RewardConfig
from lightning_peft.strict_json import json_text
from lightning_peft.tasks.registry import TASKS
from lightning_peft.tasks.task import Task, TaskRow

logger = logging.getLogger(__name__)

LOSSES = ("loss", "perplexity")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score base and adapter on the first `max_rows` test rows; return and write {"base": ..., "adapter": ...}."""
    if config.adapter_path is not None:
        config = replace(config, adapter_path=best_of_sweep(config.adapter_path))
    if (path := report_path(config)) is not None:
        check_can_write(path)
    saved = saved_config(config.adapter_path)
    data_config = data_of(saved, config)
    if config.adapter_path is None and config.models is not Scored.base:
        raise ValueError("adapter_path=null: without an adapter only models=base can be scored")
    data_config = replace(data_config, max_validation_rows=config.max_rows)
    if config.adapter_path is not None and not is_whole_model(folder := tuned_folder(config.adapter_path)):
        if gives_rewards(folder):
            return evaluate_rewards(config, saved, data_config)
    refuse_margins(data_config)
    task = TASKS[data_config.task]
    if config.benchmark is not None:
        check_harness(config.tasks, config.tasks_path)
    check_gate(config, task, data_config)
    tokenizer = tokenizer_for_inference(config.adapter_path, config.model)
    found = read_conversations(data_config, "test", tokenizer=tokenizer)
    if not found:
        raise ValueError(
            f"data has no validation rows: give data.validation_path, or raise data.validation_fraction="
            f"{data_config.validation_fraction}, which may hold out none of a few rows"
        )
    asked = [(row, messages, place) for row, messages in found if (place := messages.last_answer) is not None]
    if task.max_new_tokens > 0 and not asked:
        raise ValueError(f"data.task={task.name}: needs rows with a question and its answer, plain text rows have none")
    tuned, _ = load_for_inference(config.adapter_path, config.model, config.precision)
    if config.passes > 1:
        check_draws(tuned, config.passes)
    base = tuned
    if config.adapter_path is not None and is_whole_model(tuned_folder(config.adapter_path)):
        assert saved is not None, "a run of full fine-tuning has its config"
        base, _ = load_for_inference(None, saved.model, config.precision)
    elif config.adapter_path is not None and config.models is not Scored.adapter:
        if changes_base(tuned_folder(config.adapter_path)):
            base = load_base(config.adapter_path, config.model, config.precision)
    layout = layout_of(config.adapter_path, tokenizer, config.model)
    questions = [messages.before(place) for _, messages, place in asked]
    rows = [with_answer(row, messages, place) for row, messages, place in asked]
    sources = [messages.source for _, messages, _ in asked]

    data = validation_data(replace(data_config, packing=packing_of(data_config, tuned)), tokenizer)
    loader: Any = data.val_dataloader()  # the type of a data loader names no batches
    loss_rows = data.validation_audit.rows
    answered = task.max_new_tokens > 0
    results: dict[str, Scores] = {}
    metrics: dict[str, dict[str, Metric]] = {}
    suites: dict[str, dict[str, Metric]] = {}
    seconds: dict[str, float] = {}
    if config.models in (Scored.both, Scored.base):
        shots = shot_conversations(task, data_config, tokenizer)
        logger.info("the base: loss of %d validation rows, answers to %d", loss_rows, len(rows) if answered else 0)
        with disable_adapters(base):
            started = time.perf_counter()
            base_questions = with_shots(questions, shots)
            results["base"] = score(
                base, tokenizer, loader, rows, base_questions, task, config.batch_size, layout, sources
            )
            suites["base"] = benchmarked(base, tokenizer, config)
            metrics["base"] = metrics_of(results["base"], task) | suites["base"]
            seconds["base"] = time.perf_counter() - started
    if config.models in (Scored.both, Scored.adapter):
        logger.info("the adapter: loss of %d validation rows, answers to %d", loss_rows, len(rows) if answered else 0)
        started = time.perf_counter()
        results["adapter"] = score(tuned, tokenizer, loader, rows, questions, task, config.batch_size, layout, sources)
        suites["adapter"] = benchmarked(tuned, tokenizer, config)
        metrics["adapter"] = metrics_of(results["adapter"], task) | suites["adapter"]
        seconds["adapter"] = time.perf_counter() - started
    counts = rows_by_source(data.validation_audits, sources if answered else [])
    show(results, task, loss_rows, len(rows), counts)
    show_benchmark(suites)
    drawn: dict[str, Calibration] = {}
    if config.passes > 1:
        ways = {"mean": Way([tuned]), f"{config.passes} draws": Way([tuned], config.passes, sampling)}
        drawn = {name: calibration(way, loader, seed=0) for name, way in ways.items()}
        show_calibration(drawn, loss_rows)
    show_samples(results, task, rows, config.samples)
    report: dict[str, Any] = {
        name: {"loss": scores.loss, "perplexity": scores.perplexity}
        | {"metrics": {key: metric.value for key, metric in metrics[name].items() if key not in LOSSES}}
        | {"intervals": {key: metric.interval for key, metric in metrics[name].items() if metric.interval is not None}}
        | {"seconds": seconds[name]}
        for name, scores in results.items()
    } | {"rows": len(rows), "loss_rows": loss_rows, "task": task.name, "base_shots": task.num_shots}
    if counts:
        report["sources"] = counts
    if drawn:
        report["calibration"] = {name: asdict(found) for name, found in drawn.items()}
    write_report(report, config)
    if config.gate:
        judged = verdicts(config.gate, metrics["base"], metrics["adapter"])
        report["gate"] = {v.name: asdict(v) | {"passes": v.passes} for v in judged}
        report["ship"] = all(verdict.passes for verdict in judged)
        write_report(report, config)
        for verdict in judged:
            print(verdict.words())
        print("ship" if report["ship"] else "do not ship")
        if not report["ship"]:
            raise DoNotShip
    return report


def evaluate_rewards(config: EvaluateConfig, saved: TrainConfig | None, data: DataConfig) -> dict[str, Any]:
    """Score the adapter of a reward model on validation pairs; its base has no head that gives rewards."""
    if data.rows not in (None, RowKind.pairs):
        raise ValueError(
            f"data.rows={data.rows.name}: {config.adapter_path} is a reward model's, which is scored on pairs"
        )
    refused = {
        "models=base": config.models is Scored.base,
        "gate=": bool(config.gate),
        f"benchmark={config.benchmark}": config.benchmark is not None,
        f"passes={config.passes}": config.passes > 1,
    }
    for words, is_asked in refused.items():
        if is_asked:
            raise ValueError(
                f"{words}: {config.adapter_path} is a reward model's, which writes no answers and whose base has no "
                "head of rewards; leave it out"
            )
    model, tokenizer = load_for_inference(config.adapter_path, config.model, config.precision, takes_rewards=True)
    data = replace(data, rows=RowKind.pairs, packing=packing_of(data, model))
    loader, pairs = validation_loader(data, tokenizer)
    options = saved.objective if saved is not None and isinstance(saved.objective, RewardConfig) else RewardConfig()
    started = time.perf_counter()
    found = reward_scores(model, options, loader)
    table = Table("", "adapter", title=f"{pairs} pairs never seen in training; the base has no head of rewards")
    table.add_row("loss per pair", f"{found['loss'].value:.4f}")
    table.add_row("preference accuracy", f"{found['preference_accuracy'].value:.1%}")
    table.add_row("reward margin", f"{found['reward_margin'].value:.4f}")
    console().print(table)
    scores = {
        "loss": found["loss"].value,
        "metrics": {key: metric.value for key, metric in found.items() if key != "loss"},
        "intervals": {key: metric.interval for key, metric in found.items() if metric.interval is not None},
        "seconds": time.perf_counter() - started,
    }
    report = {"adapter": scores, "loss_rows": pairs, "task": data.task}
    write_report(report, config)
    return report


def check_gate(config: EvaluateConfig, task: Task, data: DataConfig) -> None:
    """Raise ValueError for a threshold of a metric that will not be scored, as far as that is known without rows."""
    sources = [f"loss/{source.name}" for source in sources_of(data) if source.name]
    of_sources = [f"{name}/{source.name}" for name in task.metric_names for source in sources_of(data) if source.name]
    known = [*LOSSES, *sources, *task.metric_names, *of_sources, *(PREFERENCES if data.rows is RowKind.pairs else ())]
    for name, least in config.gate.items():
        # A task that names no metrics may score others beside its headline.
        is_beside = not task.metrics and task.headline is not None and name.startswith(f"{task.headline}_")
        is_of_rows = name in known or is_beside
        suite = name.rpartition("/")[0]
        is_of_suite = bool(suite) and any(suite == each or suite.startswith(f"{each}_") for each in config.tasks)
        if not is_of_rows and not is_of_suite:
            more = [f"{each}/acc" for each in config.tasks] or ["TASK/METRIC with benchmark=lm_eval tasks=[TASK]"]
            raise ValueError(f"gate.{name}={least:g}: is not scored; choose one of {', '.join([*known, *more])}")


def metrics_of(scores: Scores, task: Task) -> dict[str, Metric]:
    """Return loss, perplexity, the loss of each source and the task's metrics with their values on every row."""
    losses = {"loss": Metric(scores.loss, small_is_good=True), "perplexity": Metric(scores.perplexity, [], True)}
    losses |= {f"loss/{name}": Metric(loss, small_is_good=True) for name, loss in scores.source_losses.items()}
    return losses | {
        name: Metric(value, scores.row_metrics.get(name, []), name.split("/")[0] in task.small_is_good)
        for name, value in (scores.metrics | scores.source_metrics).items()
    }


def benchmarked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: EvaluateConfig
) -> dict[str, Metric]:
    """Return the metrics that `benchmark` gives; empty without one."""
    if config.benchmark is None:
        return {}
    logger.info("lm_eval: %s", ", ".join(config.tasks))
    batch = min(config.batch_size, 16)  # these rows are whole contexts, unlike prompts
    return run_harness(
        model, tokenizer, config.tasks, config.tasks_path, config.benchmark_limit, batch, config.num_fewshot
    )


def data_of(saved: TrainConfig | None, config: EvaluateConfig | CalibrateConfig | PairsConfig) -> DataConfig:
    """Return the rows that a command asks for: its own, laid out as in the adapter's training, else those of the run.

    `saved` is the run's config. Raises ValueError where no rows are given, and for a prompt of a teacher.
    """
    given = config.data
    if given is None:
        if saved is None:
            raise ValueError(f"adapter_path={config.adapter_path}: the folder does not say its data; give data=")
        return replace(saved.data, streaming=False)
    refuse_teacher_prompt(given)
    return replace(given if saved is None else laid_out_as(saved.data, given), streaming=False)


def refuse_teacher_prompt(data: DataConfig) -> None:
    """Raise ValueError for a text that a teacher alone would read, where there is none."""
    for key, _ in given_for_rows(data, "teacher_prompt"):
        raise ValueError(f"{key}: a teacher reads it in training, and here is none; the model reads data.system_prompt")


def refuse_margins(data: DataConfig) -> None:
    """Raise ValueError for a column of margins where a model gives no rewards."""
    for key, column in given_for_rows(data, "margin_column"):
        raise ValueError(f"{key}={column}: margins are of rewards, and this model gives none; leave it out")


def given_for_rows(data: DataConfig, option: str) -> list[tuple[str, Any]]:
    """Return where an option of rows is given, for all of them or for a source of a mixture, with its value."""
    keys = [("data.sources." + source.name if source.name else "data", source.config) for source in sources_of(data)]
    return [(f"{key}.{option}", value) for key, config in keys if (value := getattr(config, option)) is not None]


def laid_out_as(trained: DataConfig, data: DataConfig) -> DataConfig:
    """Return other rows in the layout of the rows an adapter was trained on, wherever they give none."""
    default = DataConfig()
    names = ("system_prompt", "template_options", "layout", "reasoning", "train_on", "train_on_last_turn")
    unsaid = [name for name in names if getattr(data, name) == getattr(default, name)]
    kept = {name: value for name in unsaid if (value := shared_option(trained, name)) != getattr(default, name)}
    for name, value in kept.items():
        logger.info("data.%s=%r, as in training", name, value)
    return replace(data, **kept)


def shot_conversations(task: Task, config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> list[Conversation]:
    """Return the solved training examples that the base is shown; the adapter has seen its own in training."""
    if task.num_shots == 0:
        return []
    found = read_conversations(replace(config, max_rows=64), "train", tokenizer=tokenizer)
    shots = task.few_shot([row for row, _ in found])
    return [messages for row, messages in found if row in shots]


def validation_loader(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, int]:
    """Return batches of the rows the run was validated on, so that losses compare, and the number of rows."""
    data = validation_data(config, tokenizer)
    return data.val_dataloader(), data.validation_audit.rows


def validation_data(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> SFTDataModule:
    """Return the rows the run was validated on."""
    data = SFTDataModule(config, tokenizer, seed=0)
    data.setup("validate")
    return data


def rows_by_source(audits: dict[str, Audit], answered: list[str]) -> dict[str, dict[str, int]]:
    """Return how many rows of each source of a mixture are scored: `loss_rows`, and `rows` that are answered.

    answered: the source of each row that is answered. Empty where there is one source.
    """
    if len(audits) == 1:
        return {}
    return {name: {"rows": answered.count(name), "loss_rows": audit.rows} for name, audit in audits.items()}


def show(results: dict[str, Scores], task: Task, loss_rows: int, rows: int, counts: dict[str, dict[str, int]]) -> None:
    """Print the scores: losses over `loss_rows` validation rows, metrics over `rows` rows that are answered.

    counts: the rows of each source, as `rows_by_source` has them.
    """
    title = f"{loss_rows} rows never seen in training"
    if task.headline is not None and rows != loss_rows:
        title = f"loss of {loss_rows} validation rows, metrics of {rows} rows, none seen in training"
    table = Table("", *results, title=title)
    table.add_row("loss per token", *(f"{s.loss:.4f}" for s in results.values()))
    for name in next(iter(results.values())).source_losses:
        cells = (f"{s.source_losses[name]:.4f}" for s in results.values())
        table.add_row(f"  of {name}, {counts[name]['loss_rows']} rows", *cells)
    table.add_row("perplexity", *(f"{s.perplexity:,.2f}" for s in results.values()))
    for metric in next(iter(results.values())).metrics:
        table.add_row(metric.replace("_", " "), *(f"{s.metrics[metric]:.1%}" for s in results.values()))
        for name, count in counts.items():
            of_it = [s.source_metrics.get(f"{metric}/{name}") for s in results.values()]
            if set(of_it) != {None}:
                cells = ("" if value is None else f"{value:.1%}" for value in of_it)
                table.add_row(f"  of {name}, {count['rows']} rows", *cells)
    if "base" in results and task.num_shots:
        table.caption = f"the base answers with {task.num_shots} solved examples before each question"
    console().print(table)


def show_calibration(found: dict[str, Calibration], rows: int) -> None:
    """Print the calibration of each way's probabilities, a column each."""
    tokens = next(iter(found.values())).tokens
    table = Table("", *found, title=f"{tokens:,} supervised tokens of {rows} rows never seen in training")
    for name in ("accuracy", "nll", "brier", "ece", "entropy"):
        table.add_row(name, *(f"{getattr(scores, name):.4f}" for scores in found.values()))
    console().print(table)


def show_benchmark(metrics: dict[str, dict[str, Metric]]) -> None:
    """Print what the harness gave, each value with its 95 % interval."""
    names = list(next(iter(metrics.values())))
    if not names:
        return
    table = Table("", *metrics, title="lm-evaluation-harness")
    for name in names:
        cells = []
        for found in metrics.values():
            interval = found[name].interval
            within = "" if interval is None else f"  ({interval[0]:.4g} to {interval[1]:.4g})"
            cells.append(f"{found[name].value:.4g}{within}")
        table.add_row(name, *cells)
    console().print(table)


def show_samples(results: dict[str, Scores], task: Task, rows: list[TaskRow], count: int) -> None:
    """Print a few questions, each with the right answer and what every model said."""
    answers = {name: scores.answers for name, scores in results.items() if scores.answers}
    if not answers or count == 0:
        return
    table = Table(show_header=False, title="answers")
    marks = {True: "[green]right[/green]", False: "[red]wrong[/red]", None: ""}
    for sample in task.samples(rows, answers, count):
        table.add_row("question", escape(sample.prompt))
        table.add_row("expected", escape(sample.expected))
        for name, (answer, right) in sample.answers.items():
            table.add_row(f"{name} {marks[right]}", escape(answer))
        table.add_section()
    console().print(table)


def console() -> Console:
    """Return the terminal to print on; a file or pipe gets lines of 120 characters."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)


def report_path(config: EvaluateConfig) -> Path | None:
    if config.output is not None:
        return Path(config.output)
    return None if config.adapter_path is None else tuned_folder(config.adapter_path).parent / "evaluation.json"


def write_report(report: dict[str, Any], config: EvaluateConfig) -> None:
    """Write the scores to `output`, else to the run's folder, and into the card of what the run made."""
    if (path := report_path(config)) is None:
        return
    write_text(path, json_text(report))
    if config.output is None and config.adapter_path is not None:
        write_card(tuned_folder(config.adapter_path), path.parent)
