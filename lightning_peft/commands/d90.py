"""`lightning-peft d90`: the intrinsic dimension of a task, from the runs of a sweep over `adapter.dimension`."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_peft.command_configs.of_runs import D90Config
from lightning_peft.evaluation.intrinsic_dimension import Dimensions, read_dimensions


def d90(config: D90Config) -> Dimensions:
    """Read the sweep and the reference, and print the share of the reference that each dimension reaches."""
    found = read_dimensions(Path(config.sweep_path), Path(config.reference_path), config.metric, config.share)
    what = "loss below the base's" if config.metric == "loss" else config.metric.replace("_", " ")
    table = Table("trained numbers", what, "share of the reference")
    for trial in found.trials:
        table.add_row(f"{trial.dimension:,}", f"{trial.score:.4f}", f"{trial.score / found.reference:.1%}")
    table.add_section()
    table.add_row("reference", f"{found.reference:.4f}", "100.0%")
    Console().print(table)
    if found.d90 is None:
        print(f"no dimension reaches {config.share:.0%} of the reference: sweep further up")
    else:
        print(f"d{100 * config.share:.0f} = {found.d90:,}")
    return found
