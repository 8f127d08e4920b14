"""Pages of help: a command at a glance, a group or a section in full, and what a choice sets."""

import textwrap
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_peft.command_configs.of_runs import SubmitSweepConfig, SweepVerb
from lightning_peft.compose import compose_config
from lightning_peft.composition_errors import groups_and_defaults
from lightning_peft.config import plain
from lightning_peft.options import Option, options_of, shown
from lightning_peft.schemas import CONF_DIR, ROOTS
from lightning_peft.words import FIRST_WORD, RUN_COMMANDS

WIDTH = 80
GROUPS = {
    "method": "how the model is tuned; picks adapter, quantisation and optimiser",
    "model": "which model: a name, org/name on the hub, a folder or a .gguf file",
    "data": "which rows: a data set, or a file of your own",
    "objective": "what is trained for: answers (sft), a teacher (distill), preferences (dpo, ...), scores (reward)",
    "rank": "size of the adapter; any number, as in rank=16",
    "target_modules": "which layers are adapted",
    "hardware": "what it runs on: strategy, precision, batch, recomputation",
    "recipe": "a paper's run, with what it claims",
    "strategy": "one process, copies on several GPUs (ddp), or slices (fsdp)",
    "quantization": "how the frozen weights are stored",
    "optimizer": "what steps the trained parameters",
    "schedule": "learning rate over the run",
    "logger": "where metrics go",
    "cluster": "where submit runs it",
}
"""Groups that people choose from, the most used first; `adapter` is what a method picks."""
MOST_USED = (
    "run_dir", "resume", "seed", "optimizer.lr", "trainer.max_steps", "trainer.max_epochs", "adapter.rank",
    "adapter.alpha", "adapter.dropout", "data.train_path", "data.validation_path", "data.max_length",
    "data.micro_batch_size", "data.max_rows", "trainer.accumulate_grad_batches", "trainer.devices", "trainer.precision",
    "validation.every_n_steps", "checkpoint.every_n_steps", "dry_run",
)  # fmt: skip
TRAINER = {
    "trainer.max_steps": "Optimiser steps of the run; -1 goes by max_epochs.",
    "trainer.max_epochs": "Passes over the rows; null is one where max_steps is not given.",
    "trainer.accumulate_grad_batches": "Micro batches of a rank in one optimiser step.",
    "trainer.devices": "Ranks on this node; auto takes every GPU.",
    "trainer.precision": "auto, 32-true, bf16-true, bf16-mixed or 16-mixed.",
}
"""Lightning's arguments with our words, as their docstrings are not ours."""
EXAMPLES = {
    "train": (
        "train my.yaml                            # a file of your own",
        "train method=qlora model=org/name data=rows.jsonl rank=16",
        "train run_dir=runs/mine resume=auto      # goes on where it stopped",
        "train -m adapter.rank=4,8,16 run_dir=sweeps/rank",
    ),
    "submit": (
        "submit method=qlora cluster.partition=gpu cluster.gpus_per_node=2",
        "submit -m adapter.rank=4,8 sweep_dir=sweeps/rank",
        "submit -m adapter.rank=4,8 cluster=local    # on this machine",
    ),
    "sweep": tuple(f"sweep {verb.name} sweeps/rank" for verb in SweepVerb if verb is not SweepVerb.ask),
}


WORDS_ONLY = {
    "init": "usage: lightning-peft init [FILE.yaml] [method=...] [model=...] [data=...] [key=value] ...\n\n"
    "Writes a file of the choices and the keys used most, with comments; then: lightning-peft train FILE.yaml",
    "config": "usage: lightning-peft config train [FILE.yaml] [group=option] [key=value] ...\n\n"
    "Prints every key of the composed config, and behind it the word that set it.",
    "schema": "usage: lightning-peft schema [FILE]\n\nPrints the JSON schema of train's files, or writes it to FILE.",
    "completion": "usage: lightning-peft completion bash|zsh|fish\n\n"
    "Prints a script: source <(lightning-peft completion bash)",
    "models": "usage: lightning-peft models [FAMILY|DIR|ORG/NAME|OPTION]\n\n"
    "Prints what was verified of each family of models; of one, check by check, with the reasons of refusals.",
}


def command_help(command: str, words: list[str]) -> str:
    """Return the page of a command, of a group or section that a word names, or of what choices set otherwise."""
    if command in WORDS_ONLY:
        return WORDS_ONLY[command]
    topics = [word for word in words if "=" not in word]
    choices = [word for word in words if "=" in word]
    if topics:
        return "\n\n".join(topic_help(command, topic) for topic in topics)
    if choices and command in ("train", "submit", "estimate"):
        return choices_help(command, choices)
    return page(command)


def taken_by(command: str) -> str:
    """Return what stands behind a command."""
    if command == "sweep":
        return "|".join(verb.name for verb in SweepVerb if verb is not SweepVerb.ask) + " DIR [key=value]"
    if command in FIRST_WORD:
        return "DIR [key=value]"
    return f"{'[FILE.yaml] ' if command in RUN_COMMANDS else ''}[group=option] [key=value]"


def page(command: str) -> str:
    lines = [f"usage: lightning-peft {command} {taken_by(command)} ...", ""]
    lines += [f"  lightning-peft {example}" for example in EXAMPLES.get(command, ())]
    defaults, config = ({}, None) if command == "sweep" else groups_and_defaults(command)
    groups = [group for group in (*GROUPS, *(g for g in defaults if g not in GROUPS)) if group in defaults]
    if groups:
        lines += ["", "Groups, as in method=qlora:"]
        for group in groups:
            lines += entry(group, f"{GROUPS.get(group, 'set by method')} ({none_or(defaults[group])})", 18)
        lines += ["", f"`lightning-peft {command} --help GROUP` shows a group's options and keys."]
    known = {option.key: option for option in options_of(ROOTS.get(command, ROOTS["train"]))}
    used = [key for key in MOST_USED if key in known or key in TRAINER] if groups else list(known)
    lines += ["", "Keys used most, with their defaults:" if groups else "Keys, with their defaults:"]
    for key in used:
        text = known[key].doc if key in known else TRAINER[key]
        lines += entry(f"{key}={value_of(config, key, known.get(key))}", text, 34)
    if command == "submit":
        lines += ["", "Keys of submit -m, which starts a sweep:"]
        for option in options_of(SubmitSweepConfig):
            lines += entry(f"{option.key}={option.shown_default}", option.doc, 34)
    return "\n".join(lines)


def topic_help(command: str, topic: str) -> str:
    """Return a group's options, one a line, and its keys; or the keys that begin with a section's name."""
    folder = CONF_DIR / topic
    defaults, config = groups_and_defaults(command if command != "sweep" else "train")
    lines = []
    if folder.is_dir():
        names = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("**/*.yaml"))
        lines += [f"{topic}: {GROUPS.get(topic, 'set by method')}", "", "Options:"]
        lines += textwrap.wrap(", ".join(names), WIDTH, initial_indent="  ", subsequent_indent="  ")
    section = "adapter" if topic in ("method", "rank", "target_modules") else topic
    keys = [option for option in every_option() if option.key.startswith(f"{section}.") or option.key == section]
    if not lines and not keys:
        raise ValueError(f"--help {topic}: no such group or section; one of {', '.join([*GROUPS, *sections()])}")
    if keys:
        lines += ["", "Keys, with their defaults:"]
    seen = set()
    for option in keys:
        if option.key in seen:
            continue
        seen.add(option.key)
        text = option.doc + (f" One of {', '.join(option.choices)}." if option.choices else "")
        lines += entry(f"{option.key}={value_of(config, option.key, option)}", text, 34)
    return "\n".join(lines)


def choices_help(command: str, choices: list[str]) -> str:
    """Return what some choices change in the composed config."""
    before, after = (flat(plain(compose_config(command, words))) for words in ([], choices))
    changed = [f"  {key}={after[key]}" + (f"   (else {before[key]})" if key in before else "") for key in sorted(after)
               if before.get(key) != after[key] and not key.endswith("run_dir")]  # fmt: skip
    return "\n".join([f"{' '.join(choices)} sets:", *(changed or ["  nothing: these are the defaults"])])


def every_option() -> Iterable[Option]:
    """Return the options of `train`, with those of every method, optimiser, objective and cluster."""
    from lightning_peft.adapters.registry import METHODS  # imports torch, which other pages do without
    from lightning_peft.cluster.registry import CLUSTERS
    from lightning_peft.objectives.registry import OBJECTIVES
    from lightning_peft.optim.optimizers import OPTIMIZERS

    yield from options_of(ROOTS["train"])
    for method in METHODS.values():
        yield from options_of(method.config, "adapter.")
    for optimizer in OPTIMIZERS.values():
        yield from options_of(optimizer.config, "optimizer.")
    for objective in OBJECTIVES.values():
        yield from options_of(objective.config, "objective.")
    for cluster in CLUSTERS.values():
        yield from options_of(cluster.config, "cluster.")


def sections() -> list[str]:
    """Return the parts of the config that are no group, such as checkpoint and validation."""
    found = {option.key.partition(".")[0] for option in options_of(ROOTS["train"]) if "." in option.key}
    return sorted(found - GROUPS.keys() - {"adapter"})


def value_of(config: DictConfig | None, key: str, option: Option | None) -> str:
    """Return the default that a command composes, else the class's own."""
    value: Any = None if config is None else OmegaConf.select(config, key, default=None, throw_on_missing=False)
    if value is None:
        return "null" if option is None else option.shown_default
    raw = OmegaConf.to_container(config, resolve=False) if config is not None else {}
    for part in key.split("."):
        raw = raw.get(part, value) if isinstance(raw, dict) else value
    if option is not None and (isinstance(raw, list) or "${" in str(raw)):
        return option.shown_default
    return shown(raw)


def none_or(name: str) -> str:
    return "none" if name == "None" else name


def entry(name: str, text: str, indent: int) -> list[str]:
    """Return a name and its text, beside each other where there is room, within WIDTH columns."""
    wrapped = textwrap.wrap(text, WIDTH - indent - 2) or [""]
    if len(name) + 4 > indent:
        return [f"  {name}", *(" " * indent + line for line in wrapped)]
    return [f"  {name:<{indent - 2}}{wrapped[0]}".rstrip(), *(" " * indent + line for line in wrapped[1:])]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options as one dictionary of the keys that are typed."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
