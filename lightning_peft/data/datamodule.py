"""The data of a run as Lightning takes them."""

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch.distributed
from lightning.pytorch import LightningDataModule
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit
from lightning_peft.data.batch import Batch, SourceOf
from lightning_peft.data.cache import cached_samples
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import CollatedBatches, MicroBatchLoader, unchanged
from lightning_peft.data.config import DataConfig, Format, RowKind
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.mixed_samples import MixedSamples, MixturePlan
from lightning_peft.data.mixture import MixedSource, naming, shared_option, shares_of, sources_of
from lightning_peft.data.packing import MicroBatch, fill_ratio, plan_micro_batches
from lightning_peft.data.sampler import MicroBatchSampler, Request, check_fingerprint
from lightning_peft.data.streaming import MixedWindows, RowWindows, StreamedBatches
from lightning_peft.data.token_store import Samples

log = logging.getLogger(__name__)

OF_TURNS = ("system_prompt", "template_options", "reasoning", "train_on", "train_on_last_turn")
"""Options of `data` that speak of the turns of a conversation."""


def beyond_context(length: int, context: int) -> str:
    """Say that rows of a length are longer than a model's context, and what reaches farther."""
    factor = max(2, math.ceil(length / context))
    return (
        f"data.max_length={length}: must be at most {context}, the model's context; model.rope_scaling.type=yarn "
        f"model.rope_scaling.factor={factor} reaches beyond it"
    )


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
        teacher_context: int | None = None,
    ) -> None:
        """Keep the options. vocabulary: tokens with an embedding. teacher_context: of the reader of
        data.teacher_prompt.
        """
        super().__init__()
        if model_context is not None and config.max_length > model_context:
            raise ValueError(beyond_context(config.max_length, model_context))
        self._config = config
        self._teacher_context = teacher_context
        self._sources = sources_of(config)
        self._tokenizer = tokenizer
        self._seed = seed
        self._accumulate_grad_batches = accumulate_grad_batches
        self._vocabulary = vocabulary
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_token_id: int = next(token for token in ids if token is not None)
        self._train: Samples | MixedSamples | None = None
        self._train_plan: Callable[[int], list[MicroBatch]] = lambda epoch: []
        self._micro_batches_per_epoch = 0
        self._shares: list[float] = [1.0]
        self._validation: Samples | MixedSamples | None = None
        self._validation_plan: list[MicroBatch] = []
        self.train_audit = Audit()
        """Counts of the training samples; when streaming, of the first window."""
        self.validation_audit = Audit()
        self.train_audits: dict[str, Audit] = {}
        """The counts of each source of a mixture."""
        self.validation_audits: dict[str, Audit] = {}
        self.example: Encoded | None = None
        """The first training sample, for `audit.preview`."""

    def setup(self, stage: str | None = None) -> None:
        """Prepare the rows a stage needs: validation rows for "validate", else training rows as well."""
        if self._train is None and stage != "validate":
            self._setup_training_rows()
        if self._validation is None:
            parts = self._read("validation", self.validation_audits)
            self._validation = parts[0] if len(parts) == 1 else MixedSamples(parts)
            self._check_tokens(self._validation, self.validation_audits.values())
            self._validation_plan = self._plan_by_source(parts)
            self._count_copies(parts)
            self.validation_audit.packing_fill = self._fill(self._validation, self._validation_plan)
            self._report("validation", self.validation_audits, self.validation_audit)

    def _read(self, split: str, audits: dict[str, Audit]) -> list[Samples]:
        """Return the samples of each source; put their counts into `audits`."""
        parts = []
        for source in self._sources:
            with naming(source.name):
                samples, audits[source.name] = cached_samples(source.config, split, self._tokenizer)
            parts.append(samples)
        return parts

    def _setup_training_rows(self) -> None:
        parts = self._read("train", self.train_audits)
        train = parts[0] if len(parts) == 1 else MixedSamples(parts)
        for source, part in zip(self._sources, parts, strict=True):
            if len(part) == 0 and source.weight != 0:
                self._refuse_empty(source)
        tokens = [sum(part.lengths) for part in parts]
        self._shares = shares_of(self._sources, tokens, self._config.temperature)
        self._train, self.example = train, train.unit(0)[0]
        self._check_tokens(train, self.train_audits.values())
        before = np.empty(0, dtype=np.uint64)
        for audit, part in zip(self.train_audits.values(), parts, strict=True):
            audit.repeated = len(part.digests) - len(np.unique(part.digests))
            audit.seen_in_sources = int(np.isin(part.digests, before).sum())
            before = np.concatenate([before, part.digests])
        self.train_audit = Audit.of_all(list(self.train_audits.values()))
        self._say_what_rows_without_turns_ignore()
        self._train_plan = self._training_plan(train)
        first = self._train_plan(0)
        self._micro_batches_per_epoch = len(first)
        self.train_audit.packing_fill = self._fill(train, first)
        self._report("training", self.train_audits, self.train_audit)
        if not self._config.streaming and self._rank_and_world_size()[0] == 0:
            log.info("an epoch is %d optimiser steps", self.steps_per_epoch)

    def _say_what_rows_without_turns_ignore(self) -> None:
        default = DataConfig()
        for source in self._sources:
            given = [name for name in OF_TURNS if getattr(source.config, name) != getattr(default, name)]
            format = self.train_audits[source.name].format
            if given and format in (Format.text, Format.tokens) and self._rank_and_world_size()[0] == 0:
                prefix, names = f"{source.name}: " * bool(source.name), ", ".join(f"data.{name}" for name in given)
                log.warning("%s%s: rows of %s have no turns, so it changes nothing of them", prefix, names, format)

    def _refuse_empty(self, source: MixedSource) -> None:
        audit = self.train_audits[source.name]
        reasons = "; ".join(audit.warnings())
        found = f"nothing to train on in {audit.rows} rows. {reasons}".strip()
        key = f"sources.{source.name}" if source.name else f"source={source.config.source}"
        if not source.name and source.config.train_path is not None:
            key = f"train_path={source.config.train_path}"
        raise ValueError(f"data.{key}: {found}")

    def _training_plan(self, samples: Samples | MixedSamples) -> Callable[[int], list[MicroBatch]]:
        """Return a function from the number of an epoch to its micro batches."""
        if isinstance(samples, MixedSamples):
            plan = MixturePlan(samples, self._sources, self._shares, self._seed, self._plan)
            if self._rank_and_world_size()[0] == 0 and not self._config.streaming:
                for source, share, passes in zip(self._sources, self._shares, plan.passes, strict=True):
                    log.info("%s: %.1f %% of the tokens, %.3g passes an epoch", source.name, 100 * share, passes)
            return plan
        return lambda epoch: self._plan(samples.unit_lengths, random.Random(f"{self._seed} {epoch}"))

    def _check_tokens(self, samples: Samples | MixedSamples, audits: Iterable[Audit]) -> None:
        parts = samples.parts if isinstance(samples, MixedSamples) else [samples]
        longest = max((max(part.taught.lengths) for part in parts if part.taught is not None), default=0)
        if self._teacher_context is not None and longest > self._teacher_context:
            raise ValueError(
                f"data.teacher_prompt: the longest sample behind it has {longest} tokens, and the teacher reads "
                f"{self._teacher_context}; shorten it, or lower data.max_length={self._config.max_length}"
            )
        highest = max(samples.largest_token, self._pad_token_id)
        if self._vocabulary is not None and highest >= self._vocabulary:
            token = self._tokenizer.convert_ids_to_tokens(highest) if highest < len(self._tokenizer) else None
            name = "a token" if token is None else f"token {token!r}"
            at = next((place for audit in audits for place, top in audit.highest.items() if top == highest), None)
            name = name if at is None else f"{at}: {name}"
            raise ValueError(
                f"{name} has the id {highest}, the model has embeddings for {self._vocabulary}: take the "
                "tokenizer that belongs to the model, or give its new tokens as model.new_tokens"
            )

    def _count_copies(self, validation: Sequence[Samples]) -> None:
        for audit, part in zip(self.validation_audits.values(), validation, strict=True):
            audit.repeated = len(part.digests) - len(np.unique(part.digests))
            if self._train is not None and len(part):
                audit.seen_in_training = int(np.isin(part.digests, self._train.digests).sum())
        self.validation_audit = Audit.of_all(list(self.validation_audits.values()))
        if self._rank_and_world_size()[0] != 0:
            return
        for source in self._sources:
            trained, validated = self.train_audits.get(source.name), self.validation_audits[source.name]
            if trained is None:
                continue
            if len({trained.format, validated.format} - {None}) > 1:
                log.warning(
                    "%straining rows are %s, validation rows %s: their losses do not compare; data.format= reads both "
                    "alike",
                    f"{source.name}: " * bool(source.name),
                    trained.format,
                    validated.format,
                )
            if validated.samples == 0:
                self._say_why_none_is_held_out(source, trained.rows)

    def _say_why_none_is_held_out(self, source: MixedSource, rows: int) -> None:
        config, of_it = source.config, f" of {source.name}" * bool(source.name)
        own = config.validation_path if config.source == "files" else config.hub_validation_split
        if own is not None:
            log.warning("no validation%s: %s holds no usable row", of_it, own)
        elif config.validation_fraction > 0:
            log.warning(
                "no validation%s: data.validation_fraction=%s of %d rows is none; raise it or give "
                "data.validation_path",
                of_it,
                config.validation_fraction,
                rows,
            )

    @cached_property
    def prompt_layout(self) -> PromptLayout:
        """Return the layout of prompts in the training rows. Needs `setup`."""
        audits = self.train_audits
        without_turns = [name for name, audit in audits.items() if audit.format in (Format.text, Format.tokens)]
        system = shared_option(self._config, "system_prompt", without_turns)
        config = replace(self._config, system_prompt=self.train_audit.shared_system if system is None else system)
        return PromptLayout.of(config, self.train_audit.format, self._tokenizer, self.train_audit.shared_tools)

    def _report(self, split: str, audits: dict[str, Audit], whole: Audit) -> None:
        if self._rank_and_world_size()[0] != 0:
            return
        for name, audit in (audits if len(audits) > 1 else {"": whole}).items():
            prefix = f"{split} data: " + f"{name}: " * bool(name)
            is_none = split == "validation" and not audit.rows and not self.is_streaming
            for line in [] if is_none else audit.lines():  # why there is none is said where it is not held out
                log.info("%s%s", prefix, line)
            for line in audit.warnings():
                log.warning("%s%s", prefix, line)
        if len(audits) > 1:
            for line in whole.lines():
                log.info("%s data: %s", split, line)

    @property
    def is_streaming(self) -> bool:
        """Return whether rows are read during training, so that their number is not known."""
        return self._config.streaming

    @property
    def fingerprint(self) -> str:
        """Return digits that change with any training token, of the first window when streaming. Needs `setup`."""
        return self.training_samples.fingerprint

    @property
    def validation_fingerprint(self) -> str | None:
        """Return digits that change with any validation token; None without validation rows. Needs `setup`."""
        return self._validation.fingerprint if self._validation else None

    @property
    def steps_per_epoch(self) -> int:
        """Return an epoch's optimiser steps, that of a last partial window included. Needs `setup`; not streaming."""
        if self._train is None:
            raise RuntimeError("call SFTDataModule.setup first")
        return -(-self._micro_batches_per_epoch // (self._rank_and_world_size()[1] * self._accumulate_grad_batches))

    def train_dataloader(self) -> MicroBatchLoader | StatefulDataLoader:
        rank, world_size = self._rank_and_world_size()
        if self._config.streaming:
            several = len(self._sources) > 1
            listed = {(name * several, what) for name, audit in self.train_audits.items() for what in audit.listed}
            common = (self._tokenizer, self._seed, rank == 0, self._check_tokens, listed)
            windows = (
                RowWindows(self._sources[0].config, *common)
                if not several
                else MixedWindows(self._config, self._sources, self._shares, *common)
            )
            stream = StreamedBatches(
                windows, self._config, self._pad_token_id, rank, world_size, lookahead=self.trainer is not None
            )
            with warnings.catch_warnings():
                # torchdata 0.11 calls a function that torch 2.13 deprecates.
                warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
                return StatefulDataLoader(stream, batch_size=None, collate_fn=unchanged)
        samples = self.training_samples
        return self._sampled_loader(samples, MicroBatchSampler(self._train_plan, rank, world_size, samples.fingerprint))

    def first_batches(self, count: int) -> list[Batch]:
        """Return the first micro batches of the first epoch, or streamed window, alike on every rank. Needs `setup`."""
        samples = self.training_samples
        batches = CollatedBatches(samples, self._config, self._pad_token_id)
        return [batches[Request(rows, filler=False)] for rows in self._train_plan(0)[:count]]

    def val_dataloader(self) -> MicroBatchLoader | list[MicroBatchLoader]:
        """Return the validation rows in the same batches each time; no loader where there are none."""
        samples = self._validation
        if samples is None:
            raise RuntimeError("call SFTDataModule.setup first")
        if len(samples) == 0:
            return []
        sampler = MicroBatchSampler(
            lambda epoch: self._validation_plan, *self._rank_and_world_size(), samples.fingerprint
        )
        return self._sampled_loader(samples, sampler)

    @property
    def sample_sets(self) -> list[Samples]:
        """Return the samples of every source, of training and validation rows. Needs `setup`."""
        found = []
        for samples in (self._train, self._validation):
            found += samples.parts if isinstance(samples, MixedSamples) else [samples] if samples is not None else []
        return found

    def validation_ids(self) -> Iterator[list[int]]:
        """Iterate over the token ids of the validation samples, each without padding. Needs `setup`."""
        samples = self._validation
        if samples is None:
            raise RuntimeError("call SFTDataModule.setup first")
        return (samples[place].input_ids for place in range(len(samples)))

    @property
    def validation_names(self) -> tuple[str, ...]:
        """Return the sources of a mixture with validation rows; empty without a mixture. Needs `setup`."""
        if not isinstance(self._validation, MixedSamples):
            return ()
        counted = zip(self._sources, self._validation.parts, strict=True)
        return tuple(source.name for source, part in counted if len(part))

    def _sampled_loader(self, samples: Samples | MixedSamples, sampler: MicroBatchSampler) -> MicroBatchLoader:
        source_of = None
        if isinstance(samples, MixedSamples) and samples is self._validation:
            sources, names, place_of = self._sources, self.validation_names, samples.source_of

            def source_of(unit: int) -> SourceOf:
                return SourceOf(sources[place_of(unit)].name, names)

        batches = CollatedBatches(samples, self._config, self._pad_token_id, source_of)
        return MicroBatchLoader(batches, sampler, self._config.num_workers)

    def _plan_by_source(self, parts: Sequence[Samples]) -> list[MicroBatch]:
        """Return micro batches of validation rows, each of one source."""
        plans, first = [], 0
        for part in parts:
            lengths = part.unit_lengths
            plans += [[[first + unit for unit in row] for row in batch] for batch in self._plan(lengths)]
            first += len(lengths)
        return plans

    def _fill(self, samples: Samples | MixedSamples, plan: list[MicroBatch]) -> float | None:
        """Return the share of packed rows that is no padding; None without packing."""
        if not self._config.packing or not plan:
            return None
        packs = [pack for micro_batch in plan for pack in micro_batch]
        return fill_ratio(packs, samples.unit_lengths, self._config.max_length * samples.group)

    def _plan(self, lengths: Sequence[int], rng: random.Random | None = None) -> list[MicroBatch]:
        config = self._config
        group = (config.rows or RowKind.answers).samples
        return plan_micro_batches(lengths, config.max_length * group, config.micro_batch_size, config.packing, rng)

    @property
    def training_samples(self) -> Samples | MixedSamples:
        """Return the tokenised training rows, of the first window when streaming. Needs `setup`."""
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
        """Load the position in the data. Raises ValueError where the checkpoint was made with other rows, or another
        first window when streaming.
        """
        check_fingerprint(state_dict.get("fingerprint", self.fingerprint), self.fingerprint)
