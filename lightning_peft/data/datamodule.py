"""The data of a run as Lightning takes them."""

import logging
import random
import warnings
from typing import Any

import numpy as np
import torch.distributed
from lightning.pytorch import LightningDataModule
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit
from lightning_peft.data.batch import Batch
from lightning_peft.data.cache import cached_samples
from lightning_peft.data.chat import Encoded
from lightning_peft.data.config import DataConfig
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.loader import CollatedBatches, MicroBatchLoader, unchanged
from lightning_peft.data.packing import MicroBatch, fill_ratio, plan_micro_batches
from lightning_peft.data.sampler import MicroBatchSampler, Request, check_fingerprint
from lightning_peft.data.samples import Samples
from lightning_peft.data.streaming import StreamedBatches

log = logging.getLogger(__name__)


class SFTDataModule(LightningDataModule):
    """Batches to fine-tune on, in an order that depends on seed and epoch and not on the number of ranks.

    `setup` reads, tokenises and checks everything it can before a model is loaded: it raises ValueError (`BadRow`,
    `ChatTemplateError`, `DuplicateBosError` are some) for what is wrong with the data or the options. Loaders are
    stateful: Lightning saves their position and goes on exactly there. The Trainer needs
    `use_distributed_sampler=False`; the ranks share the batches here.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        model_context: int | None = None,
        accumulate_grad_batches: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        """vocabulary: tokens the model has embeddings for."""
        super().__init__()
        if model_context is not None and config.max_length > model_context:
            raise ValueError(
                f"data.max_length={config.max_length}: must be at most {model_context}, the model's context"
            )
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._accumulate_grad_batches = accumulate_grad_batches
        self._vocabulary = vocabulary
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_token_id: int = next(token for token in ids if token is not None)
        self._train: Samples | None = None
        self._micro_batches_per_epoch = 0
        self._validation: Samples | None = None
        self._validation_plan: list[MicroBatch] = []
        self.train_audit = Audit()
        """Counts of the training samples; when streaming, of the first window."""
        self.validation_audit = Audit()
        self.example: Encoded | None = None
        """The first training sample, for `audit.preview`."""

    def setup(self, stage: str | None = None) -> None:
        """Prepare the rows a stage needs: validation rows for "validate", else training rows as well."""
        if self._train is None and stage != "validate":
            self._setup_training_rows()
        if self._validation is None:
            self._validation, self.validation_audit = cached_samples(self._config, "validation", self._tokenizer)
            self._check_vocabulary(self._validation)
            self._count_copies(self._validation)
            self._validation_plan = self._plan(self._validation)
            self._report("validation", self._validation, self.validation_audit, self._validation_plan)

    def _setup_training_rows(self) -> None:
        train, self.train_audit = cached_samples(self._config, "train", self._tokenizer)
        if len(train) == 0:
            reasons = "; ".join(self.train_audit.warnings())
            found = f"nothing to train on in {self.train_audit.rows} rows. {reasons}".strip()
            raise ValueError(f"data.source={self._config.source}: {found}")
        self._train, self.example = train, train[0]
        self._check_vocabulary(train)
        self.train_audit.repeated = len(train.digests) - len(np.unique(train.digests))
        plan = self._plan(train)
        self._micro_batches_per_epoch = len(plan)
        self._report("training", train, self.train_audit, plan)
        if not self._config.streaming and self._rank_and_world_size()[0] == 0:
            log.info("an epoch is %d optimiser steps", self.steps_per_epoch)

    def _check_vocabulary(self, samples: Samples) -> None:
        highest = max(samples.largest_token, self._pad_token_id)
        if self._vocabulary is not None and highest >= self._vocabulary:
            token = self._tokenizer.convert_ids_to_tokens(highest)
            raise ValueError(
                f"token {token!r} has the id {highest}, the model has embeddings for {self._vocabulary}: take the "
                "tokenizer that belongs to the model, or give its new tokens as model.new_tokens"
            )

    def _count_copies(self, validation: Samples) -> None:
        audit = self.validation_audit
        audit.repeated = len(validation.digests) - len(np.unique(validation.digests))
        if self._train is not None and len(validation):
            audit.seen_in_training = int(np.isin(validation.digests, self._train.digests).sum())
        formats = {self.train_audit.format, audit.format} - {None}
        if len(formats) > 1 and self._rank_and_world_size()[0] == 0:
            log.warning(
                "training rows are %s, validation rows %s: their losses do not compare; data.format= reads both alike",
                self.train_audit.format,
                audit.format,
            )
        if audit.samples == 0 and self._train is not None and self._rank_and_world_size()[0] == 0:
            self._say_why_none_is_held_out()

    def _say_why_none_is_held_out(self) -> None:
        config = self._config
        own = config.validation_path if config.source == "files" else config.hub_validation_split
        if own is not None:
            log.warning("no validation: %s holds no usable row", own)
        elif config.validation_fraction > 0:
            log.warning(
                "no validation: data.validation_fraction=%s of %d rows is none; raise it or give data.validation_path",
                config.validation_fraction,
                self.train_audit.rows,
            )

    @property
    def prompt_layout(self) -> PromptLayout:
        """How prompts are written in the training rows. Needs `setup`."""
        return PromptLayout.of(self._config, self.train_audit.format, self._tokenizer, self.train_audit.shared_tools)

    def _report(self, split: str, samples: Samples, audit: Audit, plan: list[MicroBatch]) -> None:
        if self._config.packing and plan:
            packs = [pack for micro_batch in plan for pack in micro_batch]
            audit.packing_fill = fill_ratio(packs, samples.unit_lengths, self._config.max_length * samples.group)
        if self._rank_and_world_size()[0] == 0:
            for line in audit.lines():
                log.info("%s data: %s", split, line)
            for line in audit.warnings():
                log.warning("%s data: %s", split, line)

    @property
    def is_streaming(self) -> bool:
        """Whether rows are read during training, so that their number is not known."""
        return self._config.streaming

    @property
    def fingerprint(self) -> str:
        """Changes with any training token; of the first window when streaming. Needs `setup`."""
        return self.training_samples.fingerprint

    @property
    def validation_fingerprint(self) -> str | None:
        """Changes with any validation token; None where there are no validation rows. Needs `setup`."""
        return self._validation.fingerprint if self._validation else None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch, the last one of a part of a window included. Needs `setup`; not streaming."""
        if self._train is None:
            raise RuntimeError("call SFTDataModule.setup first")
        return -(-self._micro_batches_per_epoch // (self._rank_and_world_size()[1] * self._accumulate_grad_batches))

    def train_dataloader(self) -> MicroBatchLoader | StatefulDataLoader:
        rank, world_size = self._rank_and_world_size()
        if self._config.streaming:
            stream = StreamedBatches(
                self._config,
                self._tokenizer,
                self._pad_token_id,
                self._seed,
                rank,
                world_size,
                lookahead=self.trainer is not None,
            )
            with warnings.catch_warnings():
                # torchdata 0.11 calls a function that torch 2.13 deprecates.
                warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
                return StatefulDataLoader(stream, batch_size=None, collate_fn=unchanged)
        samples = self.training_samples

        def plan(epoch: int) -> list[MicroBatch]:
            return self._plan(samples, random.Random(f"{self._seed} {epoch}"))

        return self._sampled_loader(samples, MicroBatchSampler(plan, rank, world_size, samples.fingerprint))

    def first_batches(self, count: int) -> list[Batch]:
        """The first micro batches of the first epoch, or window when streaming, alike on every rank. Needs `setup`."""
        samples = self.training_samples
        batches = CollatedBatches(samples, self._config, self._pad_token_id)
        plan = self._plan(samples, random.Random(f"{self._seed} 0"))
        return [batches[Request(rows, filler=False)] for rows in plan[:count]]

    def val_dataloader(self) -> MicroBatchLoader | list[MicroBatchLoader]:
        """The validation rows in the same batches each time; no loader where there are none."""
        samples = self._validation
        if samples is None:
            raise RuntimeError("call SFTDataModule.setup first")
        if len(samples) == 0:
            return []
        sampler = MicroBatchSampler(
            lambda epoch: self._validation_plan, *self._rank_and_world_size(), samples.fingerprint
        )
        return self._sampled_loader(samples, sampler)

    def _sampled_loader(self, samples: Samples, sampler: MicroBatchSampler) -> MicroBatchLoader:
        batches = CollatedBatches(samples, self._config, self._pad_token_id)
        return MicroBatchLoader(batches, sampler, self._config.num_workers)

    def _plan(self, samples: Samples, rng: random.Random | None = None) -> list[MicroBatch]:
        config = self._config
        capacity = config.max_length * samples.group
        return plan_micro_batches(samples.unit_lengths, capacity, config.micro_batch_size, config.packing, rng)

    @property
    def training_samples(self) -> Samples:
        """The tokenised training rows, of the first window when streaming. Needs `setup`."""
        if self._train is None:
            raise RuntimeError("call SFTDataModule.setup first")
        return self._train

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def state_dict(self) -> dict[str, Any]:
        return {"world_size": self._rank_and_world_size()[1], "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint was made with other rows, or another first window when streaming."""
        check_fingerprint(state_dict.get("fingerprint", self.fingerprint), self.fingerprint)


def adjust_progress(checkpoint: dict[str, Any], world_size: int) -> None:
    """Make Lightning's count of batches in a loaded checkpoint right for this number of ranks.

    Lightning counts the batches of one rank and ends the epoch, and an accumulation window, by that count. It also
    fails to start again from 0 where the checkpoint is of the last batch of a stream. For
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
        # Written within an epoch. One written after a validation counts its last batch as completed, and behind an
        # epoch's last batch Lightning would then begin the same epoch again.
        behind = 1
    ready = taken // world_size
    current.update(ready=ready, started=ready, processed=ready, completed=ready - behind)
    # Over all epochs: what the validations and the random numbers of a batch go by.
    ready = progress["total"]["ready"] * saved_world_size // world_size
    progress["total"].update(ready=ready, started=ready, processed=ready, completed=ready - behind)
