"""`lightning-peft inspect`: what an adapter has learned, in a table, a JSON file and a picture."""

import importlib.util
import json
import logging
import re
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.spectrum import LayerSpectrum, energy_shares, layer_spectrum, mean, overlap, warnings_of
from lightning_peft.adapters.targets import block_depth
from lightning_peft.command_configs import InspectConfig
from lightning_peft.commands.adapted import best_of_sweep, load_for_inference
from lightning_peft.inference.load import is_whole_model, tuned_folder
from lightning_peft.progress import Part

logger = logging.getLogger(__name__)


@torch.no_grad()
def inspect(config: InspectConfig) -> dict[str, LayerSpectrum]:
    """Measure the change of every layer: print a table by kind of layer, write every layer's figures and a picture."""
    path = best_of_sweep(config.adapter_path)
    found = _adapters_of(path, config)
    with Part("inspecting", len(found)) as part:
        spectra = {name: layer_spectrum(layer, config.intruders) for name, layer in part.counting(found.items())}
    common = _overlaps(found, config)
    kinds = {name: _kind(name) for name in spectra}
    blocks = {name: str(block_depth(name)) for name in spectra}
    content = {
        "layers": {name: asdict(spectrum) for name, spectrum in spectra.items()},
        "energy_by_kind": energy_shares(spectra, kinds),
        "energy_by_block": energy_shares(spectra, blocks),
        "warnings": warnings_of(spectra),
    }
    if common:
        content["overlap"] = common
    _show(spectra, kinds, common)
    for warning in warnings_of(spectra):
        print(warning)
    output = Path(config.output) if config.output else tuned_folder(path).parent / "inspection.json"
    output.write_text(json.dumps(content, indent=2, allow_nan=False))
    print(output)
    _draw(spectra, kinds, output.with_suffix(".png"))
    return spectra


def _adapters_of(path: str, config: InspectConfig) -> dict[str, Adapter]:
    if is_whole_model(tuned_folder(path)):
        raise ValueError(f"adapter_path={path}: a whole model, and inspect looks at adapters")
    model, _ = load_for_inference(path, config.model, config.precision)
    return {name: layer for name, layer in adapters(model) if not getattr(layer.base_layer, "experts", 0)}


def _overlaps(found: dict[str, Adapter], config: InspectConfig) -> dict[str, float]:
    """Return by layer what the adapter has in common with another; empty without another."""
    if config.other_path is None:
        return {}
    others = _adapters_of(best_of_sweep(config.other_path), config)
    if not (both := found.keys() & others.keys()):
        raise ValueError(f"other_path={config.other_path}: adapts no layer that the first adapter adapts")
    shared = {name: overlap(found[name], others[name]) for name in found if name in both}
    return {name: value for name, value in shared.items() if value is not None}


def _kind(name: str) -> str:
    """Return what a layer is called without its block, as self_attn.q_proj."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _show(spectra: dict[str, LayerSpectrum], kinds: dict[str, str], common: dict[str, float]) -> None:
    """Print means over the layers of each kind, and each kind's share of the change."""
    shares = energy_shares(spectra, kinds)
    columns = ["dW / W", "share", "rank", "effective", "stable", "dead"]
    columns += ["intruders"] if any(spectrum.intruders is not None for spectrum in spectra.values()) else []
    columns += ["in common"] if common else []
    short = {kind: kind.rpartition(".")[2] for kind in shares}
    table = Table("", *columns, box=None, pad_edge=False)
    for kind in shares:
        names = [name for name in spectra if kinds[name] == kind]
        group = [spectra[name] for name in names]
        row = [
            f"{mean(s.relative_norm for s in group):.2%}", f"{shares[kind]:.1%}",
            f"{mean(s.rank for s in group):.4g}", f"{mean(s.effective_rank for s in group):.1f}",
            f"{mean(s.stable_rank for s in group):.1f}", f"{sum(s.dead for s in group):,}",
        ]  # fmt: skip
        if "intruders" in columns:
            row.append(f"{sum(s.intruders or 0 for s in group):,}")
        if common:
            shared = [common[name] for name in names if name in common]
            row.append(f"{mean(shared):.0%}" if shared else "-")
        table.add_row(kind if list(short.values()).count(short[kind]) > 1 else short[kind], *row)
    Console().print(table)


def _draw(spectra: dict[str, LayerSpectrum], kinds: dict[str, str], path: Path) -> None:
    """Write a map of the layers and the spectra; say so where there is nothing to draw them with."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("%s: not drawn, which needs matplotlib; pip install 'lightning-peft[report]'", path)
        return
    # matplotlib, which other commands do without.
    from lightning_peft.report.figures import layer_map

    cells = {(kinds[name], block_depth(name)): spectrum.relative_norm for name, spectrum in spectra.items()}
    curves = {name: spectrum.singular_values for name, spectrum in spectra.items()}
    layer_map(cells, curves, "||dW|| / ||W||").savefig(path, dpi=150)
    print(path)
