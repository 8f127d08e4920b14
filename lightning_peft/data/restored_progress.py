"""The place where a run goes on that was saved on another number of ranks."""

from typing import Any

from lightning_peft.data.datamodule import SFTDataModule


def adjust_progress(checkpoint: dict[str, Any], world_size: int) -> None:
    """Make Lightning's count of batches in a loaded checkpoint right for this number of ranks.

    Lightning counts the batches of one rank and ends the epoch, and an accumulation window, by that count. Lightning
    also fails to start again from 0 where the checkpoint is of the last batch of a stream. The caller is
    `LightningModule.on_load_checkpoint`, which runs before the loops are restored. Raises ValueError where the
    position cannot be divided among the ranks.
    """
    saved_world_size = checkpoint[SFTDataModule.__qualname__]["world_size"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    current = progress["current"]
    taken = 0 if progress["is_last_batch"] else current["ready"] * saved_world_size
    if taken % world_size:
        raise ValueError(
            f"the checkpoint was saved after {taken} micro batches on {saved_world_size} ranks; it can go on with a "
            f"number of ranks that divides {taken}, not {world_size}"
        )
    behind = current["ready"] - current["completed"]
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]
    if epochs["processed"] < epochs["started"]:
        # The checkpoint is of the middle of an epoch. A checkpoint written after a validation counts its last batch as
        # completed, and behind an epoch's last batch Lightning would then begin the same epoch again.
        behind = 1
    ready = taken // world_size
    current.update(ready=ready, started=ready, processed=ready, completed=ready - behind)
    # This is the count over all epochs, which the validations and the random numbers of a batch go by.
    ready = progress["total"]["ready"] * saved_world_size // world_size
    progress["total"].update(ready=ready, started=ready, processed=ready, completed=ready - behind)
