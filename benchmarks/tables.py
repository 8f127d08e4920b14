"""The tables of results in docs/benchmarks.md, made from JSON files; `python benchmarks/tables.py` writes them anew."""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.floor import ratio
from benchmarks.results import FOLDER

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A table in the page between two comments."""

Row = dict[str, Any]


def read(name: str) -> dict[str, Row]:
    """Return the rows of a result file; none when it is not there."""
    path = FOLDER / f"{name}.json"
    rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path.is_file() else {}
    return rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(row: Row, key: str, form: str) -> str:
    """Return the value in this format; a dash when the row lacks it."""
    return format(row[key], form) if key in row else "-"


def compare_table() -> str:
    rows = []
    for name, row in read("compare").items():
        if "ours" not in row:  # all others are measured against these losses
            continue
        workload, _, rival = name.partition(", ")
        ours, other = row["ours"], row[rival]
        memory = "device_gib" if "device_gib" in ours["peak"] else "anonymous_gib"
        rows.append([
            workload, rival, f"{other['tokens_per_second']:,.0f}", f"{ours['tokens_per_second']:,.0f}",
            f"{row['speedup']:.2f}x", f"{other['peak'][memory]:.2f}", f"{ours['peak'][memory]:.2f}",
            f"{row['memory_ratio']:.2f}x", f"{other['first_step_seconds']:.0f} / {ours['first_step_seconds']:.0f}",
            f"{other['largest_loss_error']:.0e} / {ours['largest_loss_error']:.0e}",
        ])  # fmt: skip
    header = [
        "workload", "beside", "its tokens/s", "ours", "speed", "its peak GiB", "ours", "memory",
        "seconds to first step, its / ours", "losses off fp32's by at most, its / ours",
    ]  # fmt: skip
    return markdown(header, rows)


def methods_table() -> str:
    rows, costs = [], {"lora": {"time_to_lora": 1.0, "memory_to_lora": 1.0}} | read("methods_time")
    for name, row in read("methods").items():
        cost = costs.get(name, {})
        rows.append([
            f"`{name}`" if name != "base" else "no training", show(row, "trainable_parameters", ","),
            show(row, "learning_rate", "g"), show(row, "validation_loss", ".3f"),
            show(row, "execution_accuracy", ".0%"), show(cost, "time_to_lora", ".2f"),
            show(cost, "memory_to_lora", ".2f"),
        ])  # fmt: skip
    header = [
        "method", "trained", "learning rate", "validation loss", "execution accuracy", "step time / LoRA's",
        "peak memory / LoRA's",
    ]  # fmt: skip
    return markdown(header, rows)


def scaling_table() -> str:
    rows = [
        [name, f"{row['tokens_per_second']:,.0f}", f"{row['step_seconds']:.2f}", f"{row['peak_gib']:.2f}"]
        for name, row in read("scaling").items()
    ]
    return markdown(["step", "tokens/s", "seconds", "peak GiB"], rows)


def floor_table() -> str:
    rows, found = [], read("floor")
    for name, row in found.items():
        to_floor, to_lora = (ratio(row["seconds"], found[other]["seconds"]) for other in ("frozen", "lora"))
        seconds = statistics.median(row["seconds"])
        rows.append([name, f"{seconds:.2f}", f"{to_floor:.2f}x", f"{to_lora:.2f}x", f"{row['peak_mib']:,.0f}"])
    return markdown(["step", "seconds", "to the frozen floor", "to LoRA", "MiB above weights and states"], rows)


def attention_table() -> str:
    found = read("attention")
    names = list(next(iter(found.values()), {}))
    rows = [[samples, *(f"{row[name] * 1e3:.0f}" for name in names)] for samples, row in found.items()]
    return markdown(["samples of tokens", *(f"{name}, ms" for name in names)], rows)


def generate_table() -> str:
    rows = []
    for name, row in read("generate").items():
        to = row["ours_to"]
        ratios = [f"{to[other]:.2f}x" for other in ("before", "peft", "base", "our_base")]
        rate = f"{row['tokens_per_cpu_second']['ours']:.0f}"
        rows.append([name, rate, *ratios, row["same_greedy_answers_as_before"]])
    header = [
        "answers", "tokens by CPU second", "to `generate` over our adapter", "over HF PEFT's", "over the base",
        "to our base", "the same greedy answers",
    ]  # fmt: skip
    return markdown(header, rows)


def serve_table() -> str:
    found = read("serve")
    figures = [
        ("8 adapters in 16 rows, to one adapter in 16: rate", "mixed", "eight_to_one", "{:.2f}x"),
        ("the same, to HF PEFT's `adapter_names`: rate", "mixed", "eight_to_peft_adapter_names", "{:.2f}x"),
        ("an adapter into a slot, from the host", "swap", "host_cpu_milliseconds", "{:.1f} ms"),
        ("an adapter into a slot, from disk", "swap", "disk_cpu_milliseconds", "{:.1f} ms"),
        ("64 adapters over 8 slots, to one adapter: time", "more adapters than slots", "many_to_one_time", "{:.2f}x"),
        ("1,000 adapters registered, above 8: memory", "registered", "mib_above_eight", "{:.0f} MiB"),
    ]  # fmt: skip
    rows = [[what, form.format(found[part][key])] for what, part, key, form in figures if part in found]
    return markdown(["serving", "measured"], rows)


def busy_table() -> str:
    found = read("busy")
    figures = [
        ("a step beside one busy process, to a quiet one", "beside", "1_to_quiet"),
        ("a step beside two", "beside", "2_to_quiet"),
        ("a quiet step, to one whose threads spin as OpenMP's do by default", "quiet", "to_spinning"),
    ]
    rows = [[what, f"{found[part][key]:.2f}x"] for what, part, key in figures if part in found]
    return markdown(["time", "measured"], rows)


def preference_table() -> str:
    rows = []
    for name, row in read("preference").items():
        ours, theirs = row["ours"], row["trl"]
        rows.append([
            name, f"{theirs['pairs_per_cpu_second']:.3g}", f"{ours['pairs_per_cpu_second']:.3g}",
            f"{row['speedup_in_cpu_seconds']:.2f}x", f"{theirs['peak']['anonymous_gib']:.2f}",
            f"{ours['peak']['anonymous_gib']:.2f}", f"{row['memory_ratio']:.2f}x",
            f"{row['largest_loss_difference']:.0e}",
        ])  # fmt: skip
    header = [
        "objective, beside",
        "its pairs by CPU second",
        "ours",
        "rate",
        "its peak GiB",
        "ours",
        "memory",
        "losses",
    ]
    return markdown(header, rows)


def on_policy_table() -> str:
    rows = []
    for name, row in read("on_policy").items():
        scores = [row[run]["execution_accuracy"] if run in row else None for run in ("sft", "control", "dpo")]
        cells = ["-" if score is None else f"{score:.1%}" for score in scores]
        rows.append([name, str(row["pairs"]["pairs"]), *cells, f"{100 * row['gain']:+.1f}"])
    header = ["run", "own wrong answers", "sft", "the same steps of sft", "DPO", "DPO over sft, points"]
    return markdown(header, rows)


def ablations_table() -> str:
    """Return the table of ablations: the mean over seeds, and the least and the most in brackets."""
    values: dict[str, list[float]] = {}
    for name, row in read("ablations").items():
        for what, value in figures_of_ablation(name.partition(",")[0], row):
            values.setdefault(what, []).append(value)
    rows = [
        [what, f"{statistics.mean(found):.4g}", f"{min(found):.4g} to {max(found):.4g}", str(len(found))]
        for what, found in values.items()
    ]
    return markdown(["figure", "mean", "seeds from, to", "seeds"], rows)


def figures_of_ablation(part: str, row: Row) -> list[tuple[str, float]]:
    """Return name and value of what an ablation's row is read for."""
    if part == "score":
        return [(f"Hybrid-LoRA, {name}: validation loss", found["validation_loss"]) for name, found in row.items()]
    if part == "share":
        return [
            figure
            for name, found in row.items()
            for figure in (
                (f"`{name}`: validation loss", found["validation_loss"]),
                (f"`{name}`: median stable rank", found["stable_rank"]["median"]),
                (f"`{name}`: largest share of a block in the change", max(found["energy_by_block"].values())),
            )
        ]
    if part == "calibration":
        return [(f"{name}: {key}", found[key]) for name, found in row.items() for key in ("nll", "ece")]
    return [
        (f"MoLF-E, {score}: {what}", figure)
        for score, found in row.items()
        for what, figure in (
            ("validation loss", found["validation_loss"]),
            *((f"steps won by expert {expert}, mean of kinds", share) for expert, share in mean_wins(found["wins"])),
        )
    ]


def mean_wins(wins: dict[str, dict[str, float]]) -> list[tuple[str, float]]:
    """Return the share of the steps that each expert won, a mean over the kinds of modules."""
    experts = next(iter(wins.values()))
    return [(expert, statistics.mean(of_kind[expert] for of_kind in wins.values())) for expert in experts]


TABLES: dict[str, Callable[[], str]] = {
    "ablations": ablations_table,
    "attention": attention_table,
    "busy": busy_table,
    "compare": compare_table,
    "floor": floor_table,
    "generate": generate_table,
    "methods": methods_table,
    "on_policy": on_policy_table,
    "preference": preference_table,
    "scaling": scaling_table,
    "serve": serve_table,
}


def with_tables(text: str) -> str:
    """Return the text with every marked table as the result files have it."""
    return MARKED.sub(lambda found: found.group(1) + TABLES[found.group(2)]() + found.group(3), text)


def main() -> int:
    PAGE.write_text(with_tables(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
