"""The schemas and names that Hydra finds: the schema of every option file, and the names of runs and trials."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from lightning_peft.adapters.registry import METHODS
from lightning_peft.cluster.registry import CLUSTERS
from lightning_peft.cluster.slurm import SlurmConfig
from lightning_peft.command_configs.of_adapters import (
    ConvertConfig,
    ExportConfig,
    InspectConfig,
    MergeCommandConfig,
    PushConfig,
)
from lightning_peft.command_configs.of_answers import (
    CalibrateConfig,
    EvaluateConfig,
    GenerateConfig,
    PairsConfig,
    ServeConfig,
)
from lightning_peft.command_configs.of_runs import (
    D90Config,
    DataCommandConfig,
    EstimateConfig,
    ReportConfig,
    SubmitSweepConfig,
    SweepCommandConfig,
)
from lightning_peft.config import TrainConfig
from lightning_peft.data.config import DataConfig
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.objectives.sft import SFTConfig
from lightning_peft.optim.optimizers import OPTIMIZERS
from lightning_peft.optim.schedules import ScheduleConfig
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.training.config import StrategyConfig

CONF_DIR = next(
    folder for parent in (Path(__file__).parent, Path(__file__).parent.parent) if (folder := parent / "conf").is_dir()
)
"""Folder of the option files: inside the package in a wheel, beside it in a checkout."""


ROOTS: dict[str, type] = {
    "train": TrainConfig,
    "data": DataCommandConfig,
    "estimate": EstimateConfig,
    "submit_sweep": SubmitSweepConfig,
    "sweep": SweepCommandConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "pairs": PairsConfig,
    "merge": MergeCommandConfig,
    "push": PushConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "calibrate": CalibrateConfig,
    "inspect": InspectConfig,
    "convert": ConvertConfig,
    "d90": D90Config,
}


def register_schemas() -> None:
    """Put every schema where the option files under `conf/` look for it; again where a module has added rows."""
    _register(tuple(METHODS), tuple(OPTIMIZERS), tuple(OBJECTIVES))


@cache
def _register(methods: tuple[str, ...], optimizers: tuple[str, ...], objectives: tuple[str, ...]) -> None:
    store = ConfigStore.instance()
    for command, root in ROOTS.items():
        store.store(name=f"{command}_schema", node=beyond_train(root) if issubclass(root, TrainConfig) else root)
    for name, method in METHODS.items():
        store.store(group="adapter", name=f"{name}_schema", node=with_open_dictionaries(method.config))
    for name, optimizer in OPTIMIZERS.items():
        store.store(group="optimizer", name=f"{name}_schema", node=optimizer.config)
    for name, objective in OBJECTIVES.items():
        store.store(group="objective", name=f"{name}_schema", node=with_open_dictionaries(objective.config))
    for name, row in CLUSTERS.items():
        store.store(group="cluster", name=f"{name}_schema", node=with_open_dictionaries(row.config))
    for name in methods:
        store.store(group="adapter", name=name, node={"defaults": [f"{name}_schema", "_self_"], "method": name})
        if not (CONF_DIR / "method" / f"{name}.yaml").exists():  # it sets nothing beside its name
            overrides = {"adapter": name, "quantization": "none", "optimizer": "adamw"}
            defaults = [*({f"override /{group}": option} for group, option in overrides.items()), "_self_"]
            store.store(group="method", name=name, package="_global_", node={"defaults": defaults, "method": name})
    for group, rows in {"optimizer": optimizers, "objective": objectives}.items():
        for name in rows:
            if not (CONF_DIR / group / f"{name}.yaml").exists():
                store.store(group=group, name=name, node={"defaults": [f"{name}_schema", "_self_"], "name": name})
    singles = {
        "model": ModelConfig, "quantization": QuantizationConfig, "schedule": ScheduleConfig, "data": DataConfig,
        "strategy": StrategyConfig, "cluster": SlurmConfig,
    }  # fmt: skip
    for group, node in singles.items():
        store.store(group=group, name="schema", node=with_open_dictionaries(node))


def with_open_dictionaries(options: type) -> DictConfig:
    """Return the schema of a class of options whose dictionaries take keys that are not there yet."""
    schema = OmegaConf.structured(options)
    for field_ in fields(options):
        if isinstance(schema._get_node(field_.name), DictConfig):
            OmegaConf.set_struct(schema[field_.name], False)
    return schema


def beyond_train(root: type[TrainConfig]) -> DictConfig:
    """Return the schema of a command whose option file starts from train's: what the command has beyond train."""
    schema = OmegaConf.structured(root)
    if root is not TrainConfig:
        OmegaConf.set_struct(schema, False)
        for inherited in fields(TrainConfig):
            del schema[inherited.name]
        OmegaConf.set_struct(schema, None)
    return schema


NAME_LENGTH, NAME_BYTES = 120, 200
"""Longest folder name of a trial, without its digest; file systems take 255 bytes, of which a letter may have four."""


def trial_name(overrides: str) -> str:
    """Return the folder of a sweep's trial: "adapter.rank=4,adapter.alpha=16" -> "rank4_alpha16"; no = and no , in it.

    Other overrides have another name: where one is cut, or a character replaced, a digest of the whole follows.
    """
    words = [override.lstrip("+").partition("=") for override in overrides.split(",") if override]
    name = "_".join(key.rpartition(".")[2] + value for key, _, value in words) or "trial"
    whole = "".join(c if c.isalnum() or c in "._+-" else "-" for c in name)
    folder = whole[:NAME_LENGTH].encode()[:NAME_BYTES].decode(errors="ignore")
    keys = {key.rpartition(".")[2] for key, _, _ in words}
    may_read_otherwise = len(words) > 1 and any(f"_{key}" in value for key in keys for _, _, value in words)
    if folder == name and not may_read_otherwise:
        return folder
    digits = 4 if folder == whole else 8  # nothing else may tell apart what is cut
    return f"{folder}-{hashlib.sha256(overrides.encode()).hexdigest()[:digits]}"


def model_label(*, _root_: DictConfig) -> str:
    """Return the model's name for people: llama_3_1_8b, or the last part of `model.path`."""
    model = _root_.model
    if model.label or model.name != "hf" or not model.path:
        return str(model.label or model.name)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(model.path).name.removesuffix(".gguf"))


def run_label(*, _root_: DictConfig) -> str:
    """Return method and model of a run, as in qlora-llama_3_1_8b."""
    return f"{_root_.method}-{model_label(_root_=_root_)}"


def config_digest(*, _root_: DictConfig) -> str:
    """Return eight letters that tell configs apart; a run's folder, its loggers and its cluster do not count.

    Only values other than the defaults count, so that a version with one more option finds the runs of this one.
    """
    uncounted = ("run_dir", "cluster", "resume", "dry_run", "logger")
    counted = {key: value for key, value in set_options(_root_).items() if key.partition(".")[0] not in uncounted}
    counted |= {"adapter": _root_.adapter.method, "optimizer": _root_.optimizer.name}  # a default of their own classes
    if _root_.objective.name != SFTConfig.name:  # sft, once the only one, is not counted
        counted["objective"] = _root_.objective.name
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:8]


def set_options(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Return every option, by its whole key, that differs from its dataclass, or for the Trainer from train.yaml."""
    kind = OmegaConf.get_type(config)
    defaults = OmegaConf.structured(kind) if is_dataclass(kind) else OmegaConf.create(trainer_defaults(prefix))
    given = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    default = OmegaConf.to_container(defaults, resolve=False, enum_to_str=True)
    assert isinstance(given, dict) and isinstance(default, dict)
    differing: dict[str, Any] = {}
    for key, value in ((str(key), value) for key, value in given.items()):
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            differing |= set_options(node, f"{prefix}{key}.")
        elif key not in default or default[key] != value:
            differing[f"{prefix}{key}"] = value
    return differing


@cache
def trainer_defaults(prefix: str) -> dict[Any, Any]:
    """Return what train.yaml gives the keys below `trainer.`; nothing for other prefixes."""
    if prefix != "trainer.":
        return {}
    defaults = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "train.yaml").trainer, resolve=False)
    assert isinstance(defaults, dict)
    return defaults


# Resolvers are added at the import: processes that a Hydra launcher starts get the schemas from it, but no resolvers.
OmegaConf.register_new_resolver("trial_name", trial_name, replace=True)
OmegaConf.register_new_resolver("model_label", model_label, replace=True)
OmegaConf.register_new_resolver("run_label", run_label, replace=True)
OmegaConf.register_new_resolver("config_digest", config_digest, replace=True)
