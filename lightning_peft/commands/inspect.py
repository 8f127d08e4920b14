"""`lightning-peft inspect`: the figures of what an adapter has learned, in a table, a JSON file and a picture."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.adapters.base import Adapter, LowRank
from lightning_peft.adapters.changes import Change, NotOneMatrixError, changes_of
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.layer_names import block_depth
from lightning_peft.adapters.spectrum import (
    LayerSpectrum,
    energy_shares,
    layer_spectrum,
    mean,
    overlap,
    relative,
    warnings_of,
)
from lightning_peft.checkpoint.atomic import check_can_write, write_text
from lightning_peft.checkpoint.lineage import check_one_base, read_lineage
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, tensors_beside
from lightning_peft.command_configs.of_adapters import InspectConfig
from lightning_peft.commands.adapted import base_of, best_of_sweep, inference_dtype, load_for_inference, saved_config
from lightning_peft.commands.evaluate import console, validation_loader
from lightning_peft.commands.picture import write_picture
from lightning_peft.data.config import DataConfig
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.evaluation.key_values import key_values
from lightning_peft.evaluation.smaller_ranks import RankScore, score_ranks, smallest_as_good
from lightning_peft.inference.load import is_whole_model, refuse_rewards, tuned_folder
from lightning_peft.models.loading import load_model
from lightning_peft.models.packing_choice import packing_of
from lightning_peft.progress import Part
from lightning_peft.quantization.experts import ExpertLinear, QuantizedExperts
from lightning_peft.quantization.weights import dense_weight, is_quantized, weight_shape
from lightning_peft.strict_json import json_text

logger = logging.getLogger(__name__)

OF_SOME = {"magnitude": "magnitude", "codes / W": "quantization_error"}
"""Columns that only a DoRA, or an adapter of a quantised base, has -> the figure in them."""


@torch.no_grad()
def inspect(config: InspectConfig) -> dict[str, LayerSpectrum]:
    """Measure the change of every layer: print a table by kind of layer, write every layer's figures and a picture."""
    path = best_of_sweep(config.adapter_path)
    option = "smaller_ranks=true" if config.smaller_ranks else f"directions={config.directions}"
    rows = _validation_rows(path, config, option) if config.smaller_ranks or config.directions else None
    other = None if config.other_path is None else _other_of_one_base(path, config.other_path)
    data = rows if config.smaller_ranks else None
    output = Path(config.output) if config.output else tuned_folder(path).parent / "inspection.json"
    check_can_write(output)
    model, tokenizer = _model_of(path, config)
    found = _adapters_in(model, path)
    beside = tensors_beside(tuned_folder(path))
    to_cut = None if data is None else _to_cut(path, model, data, tokenizer)
    with Part("inspecting", len(found)) as part:
        spectra = {name: layer_spectrum(layer, config.intruders) for name, layer in part.counting(found.items())}
    spectra |= _with_quantization_errors(path, found, spectra, config)
    common = {} if other is None else _overlaps(found, other, config)
    kinds = {name: _kind(name) for name in spectra}
    blocks = {name: str(block_depth(name)) for name in spectra}
    warnings = warnings_of(spectra)
    lineage = read_lineage(tuned_folder(path))
    content: dict[str, Any] = {
        "adapter_sha256": None if lineage is None else lineage.adapter_sha256,
        "layers": {name: asdict(spectrum) for name, spectrum in spectra.items()},
        "energy_by_kind": energy_shares(spectra, kinds),
        "energy_by_block": energy_shares(spectra, blocks),
        "warnings": warnings,
        "trained_beside": beside,
    }
    if common:
        content["overlap"] = common
    _show(spectra, kinds, common)
    for warning in warnings:
        print(warning)
    if beside:
        print(f"also trained, and in no figure here: {len(beside)} of the base's tensors, as {beside[0]}")
    if rows is not None and config.directions:
        content["directions"] = _directions(path, model, tokenizer, found, rows, config.directions)
    write_text(output, json_text(content))
    print(output)
    write_picture(output.with_suffix(".png"), partial(_map, spectra, kinds))
    if to_cut is not None:
        content["smaller_ranks"] = _smaller_ranks(path, model, to_cut)
        write_text(output, json_text(content))
    return spectra


def _model_of(path: str, config: InspectConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if is_whole_model(tuned_folder(path)):
        raise ValueError(f"adapter_path={path}: a whole model, and inspect looks at adapters")
    if config.smaller_ranks or config.directions:
        refuse_rewards(tuned_folder(path))
    return load_for_inference(path, config.model, config.precision, True)


def _adapters_in(model: PreTrainedModel, path: str) -> dict[str, Adapter]:
    """Return the adapters around one matrix each, by name. Raises ValueError without any, or for broken numbers."""
    found = dict(adapters(model))
    stacks = [name for name, layer in found.items() if isinstance(layer.base_layer, ExpertLinear | QuantizedExperts)]
    if stacks:
        logger.info("%d stacks of experts are left out, as %s: their matrices are not one", len(stacks), stacks[0])
    if len(stacks) == len(found):
        raise ValueError(f"adapter_path={path}: adapts no layer of one matrix, and others are not inspected")
    found = {name: layer for name, layer in found.items() if name not in stacks}
    for name, layer in found.items():
        for key, parameter in layer.named_parameters():
            if not key.startswith("base_layer.") and not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"adapter_path={path}: {name}.{key} has numbers that are not finite, as of a run that diverged"
                )
    return found


def _with_quantization_errors(
    path: str, found: dict[str, Adapter], spectra: dict[str, LayerSpectrum], config: InspectConfig
) -> dict[str, LayerSpectrum]:
    """Return the figures of layers whose base is quantised, with the error of its codes: the base is read once more."""
    coded = {name: layer for name, layer in found.items() if is_quantized(layer.base_layer) and not layer.rewrote_base}
    if not coded:
        return {}
    base, _ = base_of(path, config.model)
    whole = load_model(base, inference_dtype(path, config.precision))
    result = {}
    for name, layer in coded.items():
        weight = dense_weight(whole.get_submodule(name)).float()
        error = dense_weight(layer.base_layer).float().cpu() - weight
        result[name] = replace(spectra[name], quantization_error=relative(error.norm(), weight.norm()))
    return result


def _directions(
    path: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    found: dict[str, Adapter],
    data: DataConfig,
    count: int,
) -> list[dict[str, Any]]:
    """Read the strongest directions on validation rows and print them; return them for the file."""
    if any(layer.rewrote_base for layer in found.values()):
        raise ValueError(
            f"directions={count}: {path} is for a base that its start rewrote; convert it by `export` first"
        )
    samples = SFTDataModule(replace(data, packing=False), tokenizer, seed=0)
    samples.setup("validate")
    with Part("reading the validation rows", samples.validation_audit.samples) as part:
        directions = key_values(model, tokenizer, found, part.counting(samples.validation_ids()), count)
    numbers = Column("s", justify="right"), Column("energy", justify="right")
    table = Table(Column("direction", overflow="fold"), *numbers, "reads", "promotes")
    for one in directions:
        reads = [f"{reading.token!r} {reading.activation:.1f}" for reading in one.reads]
        promoted = f"- (writes {one.writes})" if one.promotes is None else " ".join(map(repr, one.promotes))
        name = f"{one.layer} {one.index}"
        table.add_row(*map(escape, (name, f"{one.singular_value:.3g}", f"{one.energy:.0%}", " ".join(reads), promoted)))
    table.caption = "reads: tokens at which the key is met most, and how much, as a multiple of its root mean square"
    console().print(table)
    return [asdict(one) for one in directions]


def _validation_rows(path: str, config: InspectConfig, option: str) -> DataConfig:
    saved = saved_config(path)
    if saved is None:
        raise ValueError(f"{option}: {path} does not say its data, on whose validation rows the adapter is run")
    return replace(saved.data, streaming=False, max_validation_rows=config.max_rows)


class _ToCut(NamedTuple):
    """The parts that the scores of smaller ranks are made of."""

    changes: dict[str, Change]
    largest: int | None
    loader: Any
    rows: int


def _to_cut(path: str, model: PreTrainedModel, data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> _ToCut:
    """Return the changes and the rows to score them on. Raises ValueError without rows, or without changes to cut."""
    if any(layer.rewrote_base for _, layer in adapters(model)):
        raise ValueError(
            f"smaller_ranks=true: {path} is for a base that its start rewrote; `lightning-peft export format=plain` "
            "makes it one of the published base"
        )
    loader, rows = validation_loader(replace(data, packing=packing_of(data, model)), tokenizer)
    if not rows:
        raise ValueError("smaller_ranks=true: the run's data has no validation rows")
    try:
        changes = changes_of(model)
    except NotOneMatrixError as error:
        raise ValueError(f"smaller_ranks=true: {error}, which is not cut") from error
    return _ToCut(changes, adapter_config_from_peft(tuned_folder(path)).largest_rank, loader, rows)


def _smaller_ranks(path: str, model: PreTrainedModel, to_cut: _ToCut) -> dict[str, Any]:
    """Score the adapter at halved ranks, and print what was found and the words that cut it; `model` ends as its base.

    The losses of the file are per supervised token.
    """
    changes, largest, loader, rows = to_cut
    whole, scores = score_ranks(model, changes, largest, loader)
    table = Table(
        "rank", *(Column(name, justify="right") for name in ("loss", "more", "95 %")), box=None, pad_edge=False
    )
    table.add_row("whole", f"{whole:.4f}", "", "")
    for score in scores:
        low, high = score.interval
        table.add_row(str(score.rank), f"{score.loss:.4f}", f"{score.difference:+.4f}", f"{low:+.4f} to {high:+.4f}")
    Console().print(table)
    best = smallest_as_good(scores)
    if best is None:
        print(_why_none(scores, rows))
    else:
        print(f"rank {best.rank} does as well as the whole adapter on {rows} validation rows:")
        method = "" if all(isinstance(change, LowRank) for change in changes.values()) else " method=lora"
        print(f"lightning-peft convert {path} rank={best.rank}{method} output={path}-r{best.rank}")
    return {
        "loss": whole, "rows": rows, "as_good": best.rank if best is not None else None,
        "ranks": [asdict(score) for score in scores],
    }  # fmt: skip


def _why_none(scores: Sequence[RankScore], rows: int) -> str:
    """Say why no smaller rank is named; one that does as well below a rank that does worse may do so by chance."""
    if not scores:
        return "rank 1 is the smallest there is"
    first, *rest = scores
    line = f"rank {first.rank} does worse than the whole adapter on {rows} validation rows, by {first.difference:.2g}"
    if others := [str(score.rank) for score in rest if not score.is_worse]:
        return f"{line}; of rank {', '.join(others)} that is not shown: more rows would tell"
    return f"{line}, and so does every smaller one"


def _other_of_one_base(path: str, other_path: str) -> str:
    """Return the path of the other adapter. Raises ValueError where it is none, LineageError for another base."""
    other = best_of_sweep(other_path)
    if is_whole_model(folder := tuned_folder(other)):
        raise ValueError(f"other_path={other}: a whole model, and inspect looks at adapters")
    check_one_base([(path, tuned_folder(path)), (f"other_path={other}", folder)], "compared")
    return other


def _overlaps(found: dict[str, Adapter], path: str, config: InspectConfig) -> dict[str, float]:
    """Return by layer what the adapter has in common with another. Raises ValueError for layers of other shapes."""
    others = _adapters_in(_model_of(path, config)[0], path)
    if not (both := found.keys() & others.keys()):
        raise ValueError(f"other_path={config.other_path}: adapts no layer that the first adapter adapts")
    for name in sorted(both):
        here, there = (weight_shape(adapter.base_layer) for adapter in (found[name], others[name]))
        if here != there:
            raise ValueError(
                f"other_path={config.other_path}: its {name} is of {there}, here {here}; only adapters of one base are "
                "compared"
            )
    shared = {name: overlap(found[name], others[name]) for name in found if name in both}
    found_common = {name: value for name, value in shared.items() if value is not None}
    if len(found_common) < len(shared):
        logger.info(
            "%d of %d layers are not compared: the change of one of the two is no low-rank sum",
            len(shared) - len(found_common), len(shared),
        )  # fmt: skip
    return found_common


def _kind(name: str) -> str:
    """Return the name of a layer without its block, as self_attn.q_proj."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _show(spectra: dict[str, LayerSpectrum], kinds: dict[str, str], common: dict[str, float]) -> None:
    """Print means over the layers of each kind, and each kind's share of the change."""
    shares = energy_shares(spectra, kinds)
    columns = ["dW / W", "share", "rank", "effective", "stable", "dead"]
    columns += ["intruders"] if any(spectrum.intruders is not None for spectrum in spectra.values()) else []
    columns += [column for column, key in OF_SOME.items() if any(getattr(s, key) is not None for s in spectra.values())]
    columns += ["in common"] if common else []
    short = {kind: kind.rpartition(".")[2] for kind in shares}
    table = Table("", *(Column(name, justify="right") for name in columns), box=None, pad_edge=False)
    for kind in shares:
        names = [name for name in spectra if kinds[name] == kind]
        group = [spectra[name] for name in names]
        row = [
            _mean_share(s.relative_norm for s in group), f"{shares[kind]:.1%}",
            f"{mean(s.rank for s in group):.4g}", f"{mean(s.effective_rank for s in group):.1f}",
            f"{mean(s.stable_rank for s in group):.1f}", f"{sum(s.dead for s in group):,}",
        ]  # fmt: skip
        if "intruders" in columns:
            row.append(f"{sum(s.intruders or 0 for s in group):,}")
        for column, key in OF_SOME.items():
            if column in columns:
                row.append(_mean_share(getattr(s, key) for s in group))
        if common:
            shared = [common[name] for name in names if name in common]
            row.append(f"{mean(shared):.0%}" if shared else "-")
        table.add_row(kind if list(short.values()).count(short[kind]) > 1 else short[kind], *row)
    Console().print(table)


def _mean_share(values: Iterable[float | None]) -> str:
    """Write the mean of the values that there are; a dash without any."""
    found = [value for value in values if value is not None]
    return f"{mean(found):.2%}" if found else "-"


def _map(spectra: dict[str, LayerSpectrum], kinds: dict[str, str]) -> Any:
    """Draw a map of the layers and the spectra."""
    from lightning_peft.report.figures import layer_map  # matplotlib

    found = {name: spectrum.relative_norm for name, spectrum in spectra.items()}
    cells = {(kinds[name], block_depth(name)): size for name, size in found.items() if size is not None}
    curves = {name: spectrum.singular_values for name, spectrum in spectra.items()}
    return layer_map(cells, curves, "||dW|| / ||W||")
