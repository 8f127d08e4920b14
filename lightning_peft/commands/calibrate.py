"""`lightning-peft calibrate`: the calibration of an adapter's probabilities, drawn, dropped and in an ensemble."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_peft.adapters.balora import InputVariance, sampling
from lightning_peft.checkpoint.atomic import check_can_write, write_text
from lightning_peft.checkpoint.lineage import check_one_base
from lightning_peft.command_configs.of_answers import CalibrateConfig
from lightning_peft.commands.adapted import load_for_inference, saved_config
from lightning_peft.commands.evaluate import data_of, refuse_margins, show_calibration, validation_loader
from lightning_peft.commands.picture import write_picture
from lightning_peft.evaluation.calibration import Calibration, Way, calibration, dropping
from lightning_peft.inference.load import tuned_folder
from lightning_peft.models.packing_choice import packing_of
from lightning_peft.strict_json import json_text


def calibrate(config: CalibrateConfig) -> dict[str, Calibration]:
    """Score the mean adapter and what is random beside it; print a table, write the scores and a diagram."""
    path = Path(config.output) if config.output else tuned_folder(config.adapter_path).parent / "calibration.json"
    check_can_write(path)
    data = replace(data_of(saved_config(config.adapter_path), config), max_validation_rows=config.max_rows)
    refuse_margins(data)
    others = [(f"ensemble={path}", tuned_folder(path)) for path in config.ensemble]
    check_one_base([(config.adapter_path, tuned_folder(config.adapter_path)), *others], "averaged")
    model, tokenizer = load_for_inference(config.adapter_path, config.model, config.precision)
    ways = {"mean": Way([model])}
    if any(isinstance(module, InputVariance) for module in model.modules()):
        ways[f"{config.passes} draws"] = Way([model], config.passes, sampling)
    if config.dropout is not None:
        ways[f"{config.passes} passes with dropout"] = Way(
            [model], config.passes, partial(dropping, dropout=config.dropout)
        )
    if config.ensemble:
        members = [load_for_inference(path, config.model, config.precision)[0] for path in config.ensemble]
        ways[f"ensemble of {1 + len(members)}"] = Way([model, *members])
    loader, rows = validation_loader(replace(data, packing=packing_of(data, model)), tokenizer)
    if not rows:
        raise ValueError("data has no validation rows: give data.validation_path, or raise data.validation_fraction")
    found = {name: calibration(way, loader, config.seed) for name, way in ways.items()}
    show_calibration(found, rows)
    write_text(path, json_text({name: asdict(scores) for name, scores in found.items()} | {"rows": rows}))
    print(path)
    write_picture(path.with_suffix(".png"), partial(diagram, found))
    return found


def diagram(found: dict[str, Calibration]) -> Any:
    """Draw the reliability of each way."""
    from lightning_peft.report.figures import reliability  # matplotlib

    return reliability({name: scores.bins for name, scores in found.items()})
