"""Train in a child process that is killed with SIGKILL at a random moment, and resume from what it left, many times.

usage: kill_during_save.py FOLDER KILLS. It prints one JSON line: kills, killed_while_saving, steps.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from lightning_peft.checkpoint.resume import AtomicCheckpointIO, checkpoints, latest_checkpoint, verify_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from training import TinyFinetune, batches, trainer  # noqa: E402


def train(folder: Path) -> None:
    """Resume from the latest checkpoint, train and save each step until killed."""
    warnings.simplefilter("ignore")
    # Rank 64 makes a checkpoint of about 1.3 MB: a good part of a step is spent writing it.
    trainer(folder, steps=100_000, keep_last=3).fit(
        TinyFinetune(rank=64), batches(), ckpt_path=latest_checkpoint(folder)
    )


def main(folder: Path, kills: int) -> None:
    moments = random.Random(0)
    latest: Path | None = None
    while_saving = step = 0
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            train(folder)
            os._exit(1)
        deadline = time.monotonic() + 60
        while latest_checkpoint(folder) == latest:
            assert time.monotonic() < deadline, "the child saved nothing"
            time.sleep(0.01)
        while not any(folder.glob(".*.partial")):
            assert time.monotonic() < deadline, "the child is not saving"
        # Every other child is killed as soon as it writes, the rest a little later: between and after the renames too.
        time.sleep(moments.uniform(0, 0.05) * (kill % 2))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        while_saving += any(folder.glob(".*.partial"))
        for path in checkpoints(folder):
            verify_checkpoint(path)
        latest = latest_checkpoint(folder)
        assert latest is not None
        state = AtomicCheckpointIO().load_checkpoint(latest)
        assert state["global_step"] > step, (state["global_step"], step)
        step = state["global_step"]
        assert all(torch.isfinite(tensor).all() for tensor in state["state_dict"].values())
        assert {s["step"].item() for s in state["optimizer_states"][0]["state"].values()} == {step}
    print(json.dumps({"kills": kills, "killed_while_saving": while_saving, "steps": step}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
