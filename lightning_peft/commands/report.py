"""`lightning-peft report RUN|SWEEP`: one HTML page that needs no network, its pictures as PNG, and W&B's report."""

import importlib.util
import logging
from pathlib import Path

from lightning_peft.checkpoint.atomic import names_file, write_text
from lightning_peft.command_configs.of_runs import ReportConfig
from lightning_peft.sweeps.place import find_jobs
from lightning_peft.sweeps.sweep import MANIFEST, read_sweep, refresh

logger = logging.getLogger(__name__)


def report(config: ReportConfig) -> Path:
    """Write the page of a run or sweep and return its path.

    Raises ValueError for a folder that holds neither, for an output that is no .html, and without matplotlib,
    and, once the page is written, where W&B takes no report.
    """
    folder = Path(config.path)
    if not folder.is_dir():
        raise ValueError(f"path={config.path}: no such folder; give a run or a sweep")
    output = Path(config.output) if config.output is not None else folder / "report.html"
    if output.suffix != ".html":
        raise ValueError(f"output={output}: must end in .html")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("report: needs matplotlib; pip install 'lightning-peft[report]'")
    # This imports matplotlib, which other commands do without.
    from lightning_peft.report.run import run_page
    from lightning_peft.report.sweep import sweep_page
    from lightning_peft.report.wandb_report import check_wandb_report, write_wandb_report

    sweep = read_sweep(folder) if (folder / MANIFEST).is_file() else None
    if config.wandb:
        check_wandb_report(folder, sweep)
    if sweep is not None:
        refresh(sweep, folder, find_jobs(sweep))
        page = sweep_page(folder, sweep)
    else:
        page = run_page(folder)
    write_text(output, page.text())
    print(output)
    if config.png:
        for name, figure in page.figures.items():
            path = output.with_name(f"{output.stem}_{name}.png")
            with names_file(path):
                figure.savefig(path, dpi=150)
            print(path)
    if config.wandb:
        assert sweep is not None, "check_wandb_report refuses a run"
        print(write_wandb_report(folder, sweep))
    return output
