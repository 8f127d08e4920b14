"""Checks of an adapter's folder by the standard library alone, as vLLM's interpreter makes them."""

import ast
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_adapters import OTHER_TYPES, with_lineage
from safetensors.torch import load_file, save_file

from lightning_peft.serving.adapter_checks import Settings, check_adapter, is_finite
from lightning_peft.serving.vllm import MIDDLEWARE


def test_the_files_need_each_other_and_the_standard_library_alone() -> None:
    for module in MIDDLEWARE:
        tree = ast.parse(Path(str(module.__file__)).read_text())
        imported = [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        others = {*imported} - {module.__name__ for module in MIDDLEWARE}
        assert {name.split(".")[0] for name in others} <= {*sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("foreign", "this adapter was trained on tiny_tied"),
        ("dora", "lora_magnitude_vector is no factor of a LoRA"),
        ("adalora", "peft_type ADALORA is no LoRA; `lightning-peft export format=plain`"),
        ("wide", "is of rank 32, vLLM has place for 8; start with serve.max_rank=32"),
        ("damaged", "is damaged: "),
        ("pickled", "weights are read from safetensors files alone"),
        ("deeper", "is no layer of tiny"),
        ("other_width", "is of shape [8, 127]; the layer has 128 inputs and 64 outputs"),
        ("ranks", "r=[8] in adapter_config.json is no rank"),
        ("patterns", "has ranks or alphas of its own for some layers, which this vLLM scales as all others"),
        ("start", "init_lora_weights=pissa rewrote the base, which vLLM does not repeat"),
        ("gradients", "init_lora_weights='lora_ga' changed the base weights, so the file alone is not enough"),
        ("replicated", "uses layer_replication=[[0, 1], [0, 1]], a feature of HF PEFT not supported here"),
        ("nan", "has numbers that are not finite; the adapter has no answers"),
        ("scaled", "was trained with the scaling model.rope_scaling.type=linear model.rope_scaling.factor=2.0, "),
        ("tokens", "knows tokens that the base served has not, <a>, <b>; give it a server of its own"),
    ],
)
def test_what_vllm_would_get_wrong_is_refused(place: Path, settings: Settings, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        check_adapter(place / "dir" / name, settings)


@pytest.mark.parametrize(("change", "says"), [*OTHER_TYPES, (None, "maximum recursion depth")], ids=str)
def test_a_lineage_that_is_none_is_named(
    place: Path, settings: Settings, tmp_path: Path, change: dict[str, Any] | None, says: str
) -> None:
    with_lineage(place / "a", tmp_path / "a", change)
    with pytest.raises(ValueError, match=re.escape(says)):
        check_adapter(tmp_path / "a", settings)


def test_ranks_of_layers_are_for_a_vllm_that_reads_them(place: Path, settings: Settings) -> None:
    assert check_adapter(place / "dir" / "patterns", replace(settings, reads_patterns=True)) == 8


def test_a_changed_file_of_weights_is_refused(place: Path, settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(place / "a", folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: value + torch.ones_like(value) for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="is not the file that lineage.json was written for"):
        check_adapter(folder, settings)
    (folder / "lineage.json").unlink()
    assert check_adapter(folder, settings) == 8


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
def test_what_is_not_finite_is_found_at_any_place(dtype: str) -> None:
    kind = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    info, generator = torch.finfo(kind), torch.Generator().manual_seed(0)
    ends = torch.tensor([info.max, -info.max, info.tiny, info.smallest_normal / 4, 0.0, -0.0, 1.0], dtype=kind)
    numbers = torch.cat([ends, torch.randn(200, generator=generator).to(kind)])
    assert is_finite(numbers.view(torch.uint8).numpy().tobytes(), dtype)
    for bad in (torch.inf, -torch.inf, torch.nan):
        for at in (0, 100, len(numbers) - 1):
            changed = numbers.clone()
            changed[at] = bad
            assert not is_finite(changed.view(torch.uint8).numpy().tobytes(), dtype)
