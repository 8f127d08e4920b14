"""Run `train` up to its first step with its loading measured, started with torchrun on overrides."""

import sys

from loading_peak import Measured

from lightning_peft import distributed
from lightning_peft.command_line import set_up_logging
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config


def main(folder: str, *overrides: str) -> None:
    set_up_logging()
    distributed.connect("cpu")
    measure = f"+callbacks.peak={{_target_: loading_peak.LoadingPeak, folder: '{folder}'}}"
    try:
        train(compose_config("train", [*overrides, f"run_dir={folder}/run", measure]))
    except Measured:
        pass
    distributed.disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
