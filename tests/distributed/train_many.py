"""Train one config after the other on every rank, given as a JSON list of lists of overrides.

The error of a config goes to `error.txt` in its run folder, on rank zero.
"""

import json
import sys
from pathlib import Path

from lightning_peft import distributed
from lightning_peft.command_line import set_up_logging
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config


def main(file: str) -> None:
    set_up_logging()
    distributed.connect("cpu")
    for overrides in json.loads(Path(file).read_text()):
        config = compose_config("train", overrides)
        try:
            train(config)
        except ValueError as error:
            if distributed.rank() == 0:
                Path(config.run_dir).mkdir(parents=True, exist_ok=True)
                (Path(config.run_dir) / "error.txt").write_text(str(error))
    distributed.disconnect()


if __name__ == "__main__":
    main(sys.argv[1])
