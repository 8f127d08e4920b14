"""Write what the pages take from the code: tables of methods and options, words of other tools, the examples.

    python docs/generate.py

A test holds the pages to it. The text stands between `<!-- generated NAME -->` and `<!-- end -->`; the first page of
the site is the README.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.registry import METHODS
from lightning_peft.cluster.job import ClusterConfig
from lightning_peft.cluster.registry import CLUSTERS
from lightning_peft.compose import compose_config
from lightning_peft.composition_errors import groups_and_defaults
from lightning_peft.config import TrainConfig
from lightning_peft.help import GROUPS, TRAINER, none_or
from lightning_peft.models.families import CHECKS, COLUMNS, families, in_short, refusals
from lightning_peft.objectives.objective import ObjectiveConfig
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerConfig
from lightning_peft.options import Option, options_of
from lightning_peft.other_tools import OURS
from lightning_peft.schemas import CONF_DIR, ROOTS, register_schemas

DOCS = Path(__file__).parent
ROOT = DOCS.parent
MARKED = re.compile(r"(<!-- generated ([\w-]+)(?: ([\w.]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
OTHER_COMMANDS = (
    "data",
    "estimate",
    "submit_sweep",
    "sweep",
    "evaluate",
    "generate",
    "pairs",
    "merge",
    "export",
    "serve",
    "calibrate",
    "inspect",
    "convert",
    "d90",
)


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def methods() -> str:
    rows = [[f"`{name}`", row.change, row.paper, row.count] for name, row in METHODS.items()]
    return table(["method", "change to the weight", "paper", "trained per linear (d x k)"], rows)


def reconstructions() -> str:
    rows = [[f"`{name}`", row.paper, row.reconstruction] for name, row in METHODS.items() if row.reconstruction]
    return table(["method", "paper", "what is ours in it"], rows)


def method_words() -> str:
    rows = []
    for path in sorted((CONF_DIR / "method").glob("*.yaml")):
        config = compose_config("train", [f"method={path.stem}"])
        start, ratio = getattr(config.adapter, "init_name", ""), config.optimizer.lora_plus_ratio
        more = [f"`adapter.init={start}`"] if start not in ("", "kaiming") else []
        more += [f"`optimizer.lora_plus_ratio={ratio:g}`"] if ratio is not None else []
        rank = "-" if config.adapter.rank is None else str(config.adapter.rank)
        base = config.quantization.kind.name.replace("none", "dense")
        row = [f"`{path.stem}`", f"`{config.adapter.method}`", base, rank, f"{config.optimizer.lr:g}", ", ".join(more)]
        rows.append(row)
    return table(["method=", "row", "base", "rank", "learning rate", "also sets"], rows)


def groups() -> str:
    register_schemas()
    defaults, _ = groups_and_defaults("submit")
    rows = []
    for group, meaning in GROUPS.items():
        folder, first = CONF_DIR / group, none_or(defaults.get(group, "none"))
        names = [str(path.relative_to(folder).with_suffix("")) for path in sorted(folder.glob("**/*.yaml"))]
        listed = "files under `recipes/`" if group == "recipe" else ", ".join(name for name in names if name != first)
        rows.append([f"`{group}`", meaning, first, listed])
    return table(["group", "what it is", "default", "others"], rows)


def options_table(options: Iterable[Option]) -> str:
    rows = []
    for option in options:
        choices = f" One of {', '.join(option.choices)}." if option.choices else ""
        meaning = (option.doc + choices).replace("|", "\\|").replace("<", "&lt;")
        typed = option.shown_default or '""'
        default = "has to be given" if typed == "???" else f"`{typed}`"
        rows.append([f"`{option.key}`", default, meaning])
    return table(["key", "default", "meaning"], rows)


def options() -> str:
    sections: dict[str, list[Option]] = {"the run": []}
    for option in options_of(TrainConfig):
        section = option.key.partition(".")[0] if "." in option.key else "the run"
        sections.setdefault(section, []).append(option)
    parts = [f"### {name}\n\n{options_table(rows)}" for name, rows in sections.items()]
    common = {option.key for option in options_of(AdapterConfig, "adapter.")}
    for name, row in METHODS.items():
        own = [option for option in options_of(row.config, "adapter.") if option.key not in common]
        if own:
            parts.append(f"### adapter, with a method of the row {name}\n\n{options_table(own)}")
    for group, table_of, base in (
        ("optimizer", OPTIMIZERS, OptimizerConfig),
        ("objective", OBJECTIVES, ObjectiveConfig),
        ("cluster", CLUSTERS, ClusterConfig),
    ):
        known = {option.key for option in options_of(base, f"{group}.")}
        for name, choice in table_of.items():
            own = [option for option in options_of(choice.config, f"{group}.") if option.key not in known]
            if own:
                parts.append(f"### {group}={name}\n\n{options_table(own)}")
    trainer = [[f"`{key}`", meaning] for key, meaning in TRAINER.items()]
    parts.append(f"### trainer, whose keys are Lightning's\n\n{table(['key', 'meaning'], trainer)}")
    shared = {option.key for option in options_of(TrainConfig)}
    for command in OTHER_COMMANDS:
        own = [option for option in options_of(ROOTS[command]) if option.key not in shared or command in RUN_FREE]
        own = [option for option in own if not option.key.startswith(("model.", "data."))]
        title = command.replace("submit_sweep", "submit -m")
        parts.append(f"### Command {title}\n\n{options_table(own)}")
    return "\n".join(parts)


RUN_FREE = (
    "sweep", "evaluate", "generate", "pairs", "merge", "export", "serve", "calibrate", "inspect", "convert", "d90",
)  # fmt: skip
"""Commands whose keys are not those of train."""


def words() -> str:
    rows = [[f"`{ours}`", ", ".join(f"`{name}`" for name in theirs.split())] for ours, theirs in OURS.items()]
    return table(["here", "elsewhere"], rows)


def example(name: str) -> str:
    return f"```python\n{(ROOT / 'examples' / name).read_text()}```\n"


def objectives() -> str:
    rows = [
        [f"`{name}`", row.formula.replace("|", "\\|"), row.rows.name, row.paper] for name, row in OBJECTIVES.items()
    ]
    return table(["objective=", "loss", "rows", "paper"], rows)


def family_table() -> str:
    rows = [[f"`{name}`", *(in_short(row, column) for column in COLUMNS)] for name, row in families().items()]
    return table(["family", *COLUMNS], rows)


def family_checks() -> str:
    versions = ", ".join(sorted({row.transformers for row in families().values()}))
    columns = {check: column for column, checks in COLUMNS.items() for check in checks}
    rows = [[f"`{check}`", columns[check], meaning] for check, meaning in CHECKS.items()]
    return f"{len(families())} families, with transformers {versions}:\n\n" + table(["check", "in", "ok means"], rows)


def family_refusals() -> str:
    rows = [
        [f"`{check}`", reason.replace("|", "\\|").replace("<", "&lt;"), ", ".join(names)]
        for (check, reason), names in sorted(refusals().items(), key=lambda item: list(CHECKS).index(item[0][0]))
    ]
    return table(["check", "what is said", "families"], rows)


GENERATED: dict[str, Callable[..., str]] = {
    "methods": methods,
    "reconstructions": reconstructions,
    "objectives": objectives,
    "method-words": method_words,
    "groups": groups,
    "options": options,
    "words": words,
    "example": example,
    "families": family_table,
    "family-checks": family_checks,
    "family-refusals": family_refusals,
}


def with_generated(text: str) -> str:
    """Return the page with everything between its marks made anew."""

    def made(found: re.Match[str]) -> str:
        arguments = [found.group(3)] if found.group(3) else []
        return f"{found.group(1)}\n{GENERATED[found.group(2)](*arguments)}\n{found.group(4)}"

    return MARKED.sub(made, text)


def index() -> str:
    """Return the README as the first page of the site: its links begin at docs/, and other files are not linked."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|[A-Z]+\.md)\)", r"\1", text)


def main() -> int:
    for page in DOCS.glob("*.md"):
        page.write_text(with_generated(page.read_text()))
    (DOCS / "index.md").write_text(index())
    return 0


if __name__ == "__main__":
    sys.exit(main())
