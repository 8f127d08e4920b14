"""Tell the loggers, once the ranks exist, which run they log and where it starts."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.adapters.inject import trainable_parameter_counts
from lightning_peft.tracking.loggers import RunLogger


class RunRecord(Callback):
    """Opens the loggers at the step the run starts from, with its resolved config and the number of parameters.

    Every checkpoint says of which rows and weights the run is: `content` maps a name to a fingerprint.
    """

    def __init__(self, config: dict[str, Any], content: dict[str, str]):
        self.config = config
        self.content = content

    def state_dict(self) -> dict[str, Any]:
        return {"content": self.content}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained, total = trainable_parameter_counts(pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.start_at(trainer.global_step)
            logger.log_hyperparams(self.config | {"trainable_parameters": trained, "total_parameters": total})
