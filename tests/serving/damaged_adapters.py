"""Adapters of the tiny model with something the matter with each, and the settings that they are checked by."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter_models import config_for
from safetensors.torch import load_file, save_file
from server_process import save

from lightning_peft.checkpoint.peft_methods import KEEPS_BASE, REWRITES_BASE, SWITCHED_OFF
from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.loading import empty_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.models.tiny import CHAT_TEMPLATE
from lightning_peft.serving.adapter_checks import Settings
from lightning_peft.serving.vllm import layers_of


def save_all(place: Path) -> None:
    """Save adapters of the tiny model by what is the matter with them; `dir` is the folder that is served."""
    save(place / "a", config_for("lora", rank=8), 0.2)
    save(place / "dir" / "foreign", config_for("lora"), 0.1, "tiny_tied")
    save(place / "dir" / "dora", config_for("dora"), 0.1)
    save(place / "dir" / "adalora", config_for("adalora"), 0.1)
    save(place / "dir" / "wide", config_for("lora", rank=32), 0.1)
    for name in (
        "copy",
        "damaged",
        "pickled",
        "deeper",
        "other_width",
        "raw",
        "text",
        "refused",
        "layout",
        "types",
        "ranks",
        "patterns",
        "start",
        "gradients",
        "replicated",
        "nan",
        "scaled",
        "tokens",
        "other_dtype",
    ):
        shutil.copytree(place / "a", place / "dir" / name)
    weights = "adapter_model.safetensors"
    damaged = place / "dir" / "damaged" / weights
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (place / "dir" / "pickled" / weights).rename(place / "dir" / "pickled" / "adapter_model.bin")
    changed(place / "dir" / "deeper", lambda name, value: (name.replace("layers.1.", "layers.9."), value))
    changed(place / "dir" / "other_width", lambda name, value: (name, value[:, :-1] if "lora_A" in name else value))
    PromptLayout(kind="raw", stop_token_ids=[5]).save(place / "dir" / "raw")
    (place / "dir" / "layout" / "prompt_layout.json").write_text("[]")
    (place / "dir" / "types" / "prompt_layout.json").write_text('{"system_prompt": 3}')
    words = json.loads((place / "a" / "adapter_config.json").read_text())
    (place / "dir" / "ranks" / "adapter_config.json").write_text(json.dumps(words | {"r": [8]}))
    for name, more in (
        ("patterns", {"rank_pattern": {"q_proj": 4}}),
        ("start", {"init_lora_weights": "pissa"}),
        ("gradients", {"init_lora_weights": "lora_ga"}),
        ("replicated", {"layer_replication": [[0, 1], [0, 1]]}),
    ):
        (place / "dir" / name / "adapter_config.json").write_text(json.dumps(words | more))
    last = next(reversed(load_file(place / "a" / weights)))
    changed(place / "dir" / "nan", lambda name, value: (name, value / (0 if name == last else 1)))
    scaled = {"type": "linear", "factor": 2.0, "original_max_position_embeddings": None}
    for name, lineage in (
        ("scaled", {"config": {"model": {"rope_scaling": scaled}}}),
        ("tokens", {"config": {"model": {"new_tokens": ["<a>", "<b>"], "rope_scaling": {"type": None}}}}),
        ("other_dtype", {"precision": "bf16-true", "quantization": "nf4"}),
    ):
        path = place / "dir" / name / "lineage.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | lineage))


OTHER_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"base_fingerprint": 5}, "base_fingerprint=5 is of another type"),
    ({"precision": ["bf16-true"]}, "precision=['bf16-true'] is of another type"),
    ({"config": [1]}, "config=[1] is of another type"),
    ({"config": {"model": {"rope_scaling": [1]}}}, "rope_scaling=[1] is of another type"),
    ({"config": {"model": {"new_tokens": 5}}}, "new_tokens=5 is of another type"),
]
"""Changes of a lineage, and what is said of each."""


def with_lineage(source: Path, folder: Path, change: dict[str, Any] | None) -> None:
    """Copy an adapter with a change of its lineage; None nests it deeper than JSON is read."""
    shutil.copytree(source, folder)
    path = folder / "lineage.json"
    path.write_text("[" * 100_000 if change is None else json.dumps(json.loads(path.read_text()) | change))


def changed(folder: Path, change: Any) -> None:
    """Write an adapter's tensors anew; they have no lineage, as others' adapters."""
    path = folder / "adapter_model.safetensors"
    tensors = dict(change(name, value) for name, value in load_file(path).items())
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    (folder / "lineage.json").unlink()


def settings_of(place: Path) -> Settings:
    base = ModelConfig("tiny")
    layout = asdict(PromptLayout(template=CHAT_TEMPLATE, stop_token_ids=[2]))
    layers = layers_of(empty_model(base))
    return Settings(
        "tiny", source_fingerprint(base), layers, 8, layout, {"a": str(place / "a")}, str(place / "dir"), True, 3,
        False, "float32", {"32-true": "float32", "bf16-true": "bfloat16"}, [*KEEPS_BASE], [*REWRITES_BASE],
        {word: [*off] for word, off in SWITCHED_OFF.items()},
    )  # fmt: skip
