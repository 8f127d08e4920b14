"""`lightning-peft pairs`: preference rows of an adapter's own wrong answers beside right ones."""

import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_peft.checkpoint.atomic import check_can_write, write_text
from lightning_peft.command_configs.of_answers import PairsConfig
from lightning_peft.commands.adapted import (
    best_of_sweep,
    layout_of,
    load_for_inference,
    saved_config,
    tokenizer_for_inference,
)
from lightning_peft.commands.evaluate import console, data_of, given_for_rows, refuse_margins
from lightning_peft.config import plain
from lightning_peft.data.audit import Audit
from lightning_peft.data.config import DataConfig, RowKind
from lightning_peft.data.prompt_rows import prompts_of
from lightning_peft.data.samples import read_conversations
from lightning_peft.evaluation.own_pairs import Asked, Chosen, Counts, pair_row, pairs_of, score_of, without_repeats
from lightning_peft.evaluation.scorers import scorers_of, task_of_metric, with_answer
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.load import refuse_rewards, tuned_folder
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.own_file import typed_value
from lightning_peft.progress import Part
from lightning_peft.strict_json import json_line, json_text
from lightning_peft.tasks.registry import TASKS

logger = logging.getLogger(__name__)

LAYOUT = ("layout", "template_options", "reasoning")
"""Options by which prompts are laid out; the system message stands in the rows."""


def pairs(config: PairsConfig) -> dict[str, Any]:
    """Draw answers to training prompts, score them, and write the pairs; return and write the counts."""
    config = replace(config, adapter_path=best_of_sweep(config.adapter_path))
    refuse_rewards(tuned_folder(config.adapter_path))
    check_can_write(Path(config.output))
    data = rows_asked(config)
    metric, small_is_good = metric_of(config, data)
    audit, tokenizer = Audit(), tokenizer_for_inference(config.adapter_path, config.model)
    found = read_conversations(data, "train", config.max_rows, tokenizer=tokenizer, audit=audit)
    for line in audit.warnings():
        logger.warning("%s", line)
    (scorer,) = scorers_of([metric], data.task, list(found[0][0]) if found else None, option="metric")
    counts = Counts()
    asked = without_repeats(rows_with_answers(found, config), counts)
    model, _ = load_for_inference(config.adapter_path, config.model, config.precision)
    layout = layout_of(config.adapter_path, tokenizer)
    sampling = SamplingConfig(
        max_new_tokens=config.max_new_tokens or scorer.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
    logger.info("%d answers to each of %d prompts, scored by %s", config.samples, len(asked), metric)
    prompts = prompts_of([each.conversation for each in asked], layout, tokenizer)
    repeated = [prompt for prompt in prompts for _ in range(config.samples)]
    answers = generate_batch(model, tokenizer, repeated, sampling, config.batch_size, layout.stop_token_ids)
    score, lines = score_of(scorer, small_is_good), []
    with Part("scores", len(asked)) as part:
        for place, each in enumerate(asked):
            each.answers = answers[place * config.samples : (place + 1) * config.samples]
            for chosen, rejected in pairs_of(each, score, config.pairs_per_prompt, config.chosen, counts):
                row = pair_row(each, chosen, rejected, scorer.columns)
                lines.append(json_line(row) + "\n")
            part.advance()
    return write(config, data, counts, lines, metric)


def rows_asked(config: PairsConfig) -> DataConfig:
    """Return the data options of the rows whose prompts are asked. Raises ValueError where nothing names rows."""
    data = data_of(saved_config(config.adapter_path), config)
    refuse_margins(data)
    for key, value in given_for_rows(data, "rows"):
        if value is RowKind.labelled:
            raise ValueError(f"{key}=labelled: a row may hold a wrong answer; give data= with rows of right ones")
    return replace(data, max_rows=config.max_rows)


def metric_of(config: PairsConfig, data: DataConfig) -> tuple[str, bool]:
    """Return what answers are scored by, and whether a small value is good. ValueError where nothing scores them."""
    metric = config.metric or TASKS[data.task].headline
    if metric is None:
        raise ValueError(
            f"data.task={data.task}: scores no answers; give metric=, as metric=module:function or "
            f"metric={TASKS['final_number'].headline}"
        )
    owner = None if ":" in metric else task_of_metric(metric, data.task)
    if metric in TASKS and owner is None:
        raise ValueError(f"metric={metric}: names a task; give one of {', '.join(TASKS[metric].metric_names)}")
    return metric, owner is not None and metric in owner.small_is_good


def rows_with_answers(found: list[Any], config: PairsConfig) -> list[Asked]:
    """Return the rows that ask for an answer in words. Raises ValueError for another row, and without any."""
    asked = []
    for values, messages in found:
        place = messages.last_answer
        if place is None:
            raise ValueError("data: its rows have no question with an answer, so there is nothing to ask")
        answer = messages[place]
        if answer.tool_calls or answer.reasoning or not answer.content.strip():
            raise ValueError(
                "data: answers with calls of tools or thoughts are not scored, which are more than their words; give "
                "data= with rows whose last answer is text"
            )
        asked.append(Asked(with_answer(values, messages, place), messages.before(place)))
    if not asked:
        raise ValueError(f"adapter_path={config.adapter_path}: its data has no training row")
    return asked


def words_of_layout(data: DataConfig) -> list[str]:
    """Return the options under which a run lays out prompts as these rows are, for a shell."""
    given, default = plain(data), plain(DataConfig())
    changed = [name for name in LAYOUT if given[name] != default[name]]
    return [shlex.quote(f"data.{name}={typed_value(given[name])}") for name in changed]


def write(config: PairsConfig, data: DataConfig, counts: Counts, lines: list[str], metric: str) -> dict[str, Any]:
    """Write pairs and counts, and print the counts. Raises ValueError where there is no pair."""
    table = Table(show_header=False, title=f"{config.samples} answers to a prompt, scored by {metric}")
    for name, count in counts.as_dict().items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console().print(table)
    if not lines:
        own = " beside a right one of the model's own" if config.chosen is Chosen.own else ""
        raise ValueError(
            f"samples={config.samples} temperature={config.temperature}: no answer is worse than the chosen ones{own}, "
            "so there are no pairs; ask for more rows, samples, or a higher temperature"
        )
    path = Path(config.output)
    write_text(path, "".join(lines))
    report = {"metric": metric, "samples": config.samples, "temperature": config.temperature, "seed": config.seed}
    report |= counts.as_dict()
    write_text(path.with_suffix(".json"), json_text(report))
    print(f"{path}: {counts.pairs} pairs")
    files = [shlex.quote(f"data={path}"), shlex.quote(f"adapter.init_from={config.adapter_path}")]
    read = ("prompt", "chosen", "rejected", "tools")
    beside = sorted({name for line in lines for name in json.loads(line)}.difference(read))  # columns of the task
    ignored = [shlex.quote(f"data.ignore_columns=[{','.join(beside)}]")] * bool(beside)
    words = ["lightning-peft train objective=dpo", *files, *words_of_layout(data), *ignored]
    print(f"{' '.join(words)} trains on them")
    return report
