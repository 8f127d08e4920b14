"""`lightning-peft convert`: adapters cut to a rank, several made one, LoRA made DoRA and back, with a receipt."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lightning_peft.adapters.base import AdapterConfig, LowRank
from lightning_peft.adapters.changes import (
    Change,
    NotOneMatrixError,
    WeightedSum,
    changes_of,
    inject_changes,
    take_out_adapters,
)
from lightning_peft.adapters.combine import DENSE, DENSITY, Combine, Cut, combined, cut, cut_dense
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.checkpoint.atomic import atomic_folder
from lightning_peft.checkpoint.lineage import Lineage, check_lineage, check_one_base, read_lineage
from lightning_peft.checkpoint.merged import Comparison, MergeError, Receipt, check_unused
from lightning_peft.checkpoint.model_card import write_card
from lightning_peft.checkpoint.peft_format import (
    WEIGHTS_NAME,
    adapter_config_from_peft,
    file_sha256,
    load_adapter,
    save_adapter,
    tensors_beside,
)
from lightning_peft.checkpoint.peft_parameters import is_weight
from lightning_peft.checkpoint.peft_words import read_words
from lightning_peft.command_configs.of_adapters import ConvertConfig, LowRankMethod
from lightning_peft.commands.adapted import base_of, best_of_sweep, layout_of, load_base, saved_config
from lightning_peft.commands.merge import sample_ids
from lightning_peft.config import plain
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.load import is_whole_model, refuse_rewards, tuned_folder
from lightning_peft.models.loading import load_tokenizer, model_context, model_name
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.progress import Part
from lightning_peft.quantization.config import Kind
from lightning_peft.runs.lock import only_maker
from lightning_peft.serving.engines import features_of, not_low_rank
from lightning_peft.strict_json import json_text

logger = logging.getLogger(__name__)

RECEIPT_NAME = "convert_receipt.json"
EXACT_MAX_KL = 0.01
"""Largest KL, nats per token, of a conversion that loses nothing by its formula."""


@dataclass(frozen=True)
class Parent:
    """One of the adapters that are converted."""

    path: str
    folder: Path
    weight: float
    lineage: Lineage | None
    adapter: AdapterConfig

    @property
    def name(self) -> str:
        """Return the name of the run: that of the folder around `adapter/`."""
        return self.folder.parent.name if self.folder.name == "adapter" else self.folder.name


def convert(config: ConvertConfig) -> Receipt:
    """Write the adapter that is asked for, read the file back, and compare its logits with what was asked.

    Raises ValueError, before a model is loaded, for a conversion that cannot be; MergeError, with nothing left at
    `output`, where the file is further off than `max_kl`.
    """
    disable_progress_bar()  # ours stands in place of transformers' bar
    output = Path(config.output)
    with only_maker(output):
        check_unused(output)
        return convert_into(output, config)


def convert_into(output: Path, config: ConvertConfig) -> Receipt:
    """Convert into a folder that nobody else makes meanwhile."""
    parents = [read_parent(path, weight) for path, weight in zip(config.paths, config.shares, strict=True)]
    method = checked(config, parents)
    first = parents[0].path
    base, quantization = base_of(first, config.model)
    fingerprint = source_fingerprint(base)
    for parent in parents:
        check_lineage(parent.folder, fingerprint, quantization.kind.name, model_name(base))
    tokenizer = load_tokenizer(base)
    layout = common_layout(parents, [layout_of(parent.path, tokenizer) for parent in parents])
    context = model_context(base)
    drawn = [sample for parent in parents for sample in sample_ids(saved_config(parent.path), tokenizer, context)]
    samples = list({tuple(sample.flatten().tolist()): sample for sample in drawn}.values())  # each data set counts once
    model = load_base(first, config.model, config.precision)
    asked, comparison = ask(config, parents, model, samples)
    changes, lost = cut_all(config, parents, asked)
    written = inject_changes(model, changes, method)
    lineage = lineage_of(parents, written, fingerprint, model_name(base), quantization.kind)
    with atomic_folder(output) as partial:
        words = read_words(parents[0].folder)
        save_adapter(model, written, partial, words.get("base_model_name_or_path"), lineage)
        take_out_adapters(model)
        inject_adapters(model, adapter_config_from_peft(partial))
        load_adapter(model, partial)
        receipt = comparison.receipt(model)
        content = json.loads(receipt.json_text()) | {"ranks": {n: len(c.A) for n, c in changes.items()}, "lost": lost}
        (partial / RECEIPT_NAME).write_text(json_text(content))
        layout.save(partial)
        write_card(partial)
        most = config.max_kl or (None if any(share > 0 for share in lost.values()) else EXACT_MAX_KL)
        if most is not None and not receipt.mean_kl <= most:
            raise MergeError(
                f"output={output}: not written, KL {receipt.mean_kl:.3g} nats to what was asked is above "
                f"max_kl={most}; {receipt.line('written against asked')}"
            )
    for line in said(parents, changes, lost):
        print(line)
    print(f"{output}: {receipt.line('written against asked')}")
    return receipt


def read_parent(path: str, weight: float) -> Parent:
    """Return what an adapter's folder says of it. Raises ValueError for a whole model, or more than adapters."""
    path = best_of_sweep(path)
    folder = tuned_folder(path)
    if is_whole_model(folder):
        raise ValueError(f"adapter_path={path}: a whole model, and convert works on adapters")
    adapter = adapter_config_from_peft(folder)
    refuse_rewards(folder)
    if beside := tensors_beside(folder):
        raise ValueError(
            f"adapter_path={path}: trains {beside[0]} of the base as well, which is no change that convert carries; "
            "use `lightning-peft merge`"
        )
    if stacks := [name for name in read_words(folder).get("target_parameters") or [] if not is_weight(name)]:
        raise ValueError(
            f"adapter_path={path}: adapts {len(stacks)} stacks of experts, as {stacks[0]}, whose changes are a matrix "
            "for every expert, and convert works on layers of one matrix; use `lightning-peft merge`, or train at the "
            "rank wanted"
        )
    if adapter.initialization.rewrites_base:
        raise ValueError(
            f"adapter_path={path}: is for a base that its start rewrote; `lightning-peft export format=plain` makes it "
            "one of the published base"
        )
    return Parent(path, folder, weight, read_lineage(folder), adapter)


def checked(config: ConvertConfig, parents: list[Parent]) -> str:
    """Return the method that is written, lora or dora. Raises ValueError for parents that do not allow it."""
    asked = "lora" if config.to is None else config.to.value
    for parent in parents:
        is_sum = not_low_rank(features_of(parent.adapter)) is None
        if len(parents) > 1 and not is_sum:
            raise ValueError(
                f"adapter_path={parent.path}: has {parent.adapter.method}, which is no low-rank sum; "
                f"`lightning-peft convert {parent.path} method=lora rank=RANK output=DIR` makes the nearest, and that "
                "one can be combined"
            )
        if not is_sum and config.to is not LowRankMethod.lora:
            ask = "is that already" if asked == parent.adapter.method else "is no low-rank sum"
            raise ValueError(
                f"adapter_path={parent.path}: has {parent.adapter.method}, which {ask}; "
                "method=lora makes the nearest LoRA of rank=RANK"
            )
        needs_size = not is_sum and parent.adapter.rank is None and config.svd_rank is None and config.energy is None
        if needs_size:
            raise ValueError(
                f"svd_rank=null energy=null: {parent.adapter.method} at {parent.path} has no rank of its own; "
                "give rank=RANK, or energy= for a share as 0.99"
            )
    first = parents[0]
    is_cut = config.svd_rank is not None or config.energy is not None
    if len(parents) == 1 and not is_cut and asked == first.adapter.method:
        raise ValueError(
            f"adapter_path={first.path}: nothing to convert; give rank= or energy= to cut it, method=dora, or several "
            "adapters"
        )
    check_one_base([(f"adapter_path={parent.path}", parent.folder) for parent in parents], "combined")
    log_differences(parents)
    return asked


def log_differences(parents: list[Parent]) -> None:
    """Log which adapters were trained on other rows, or for another objective, than the first."""
    known = [(parent, parent.lineage) for parent in parents if parent.lineage is not None]
    for parent, lineage in known[1:]:
        first, of_first = known[0]
        for key in ("data", "objective"):
            if lineage.config.get(key) != of_first.config.get(key):
                logger.info("%s has another %s: the written adapter names that of %s", parent.path, key, first.path)


def common_layout(parents: list[Parent], layouts: list[PromptLayout]) -> PromptLayout:
    """Return the prompt layout of the first adapter; log the difference of another's."""
    first = layouts[0]
    for parent, layout in zip(parents[1:], layouts[1:], strict=True):
        if differing := [name for name, value in asdict(first).items() if value != getattr(layout, name)]:
            logger.warning(
                "%s was trained with another prompt layout (%s): that of %s is written",
                parent.path, ", ".join(differing), parents[0].path,
            )  # fmt: skip
    return first


def ask(
    config: ConvertConfig, parents: list[Parent], model: PreTrainedModel, samples: list[Tensor]
) -> tuple[dict[str, Change], Comparison]:
    """Return the change that is asked for by layer, and the logits of a model that has it; `model` stays the base."""
    found = []
    for parent in parents:
        inject_adapters(model, parent.adapter)
        load_adapter(model, parent.folder)
        model.eval()
        if len(parents) == 1:
            comparison = Comparison(model, samples, command="convert")
        try:
            found.append(changes_of(model))
        except NotOneMatrixError as error:
            raise ValueError(f"adapter_path={parent.path}: {error}, which convert does not carry; merge it") from error
        take_out_adapters(model)
    if len(parents) == 1:
        return found[0], comparison
    asked: dict[str, Change] = {}
    generator = torch.Generator().manual_seed(config.seed)
    names = sorted({name for changes in found for name in changes})
    how, density = config.combine, config.density or DENSITY.get(config.combine, 1.0)
    with Part("convert: combining", len(names)) as part:
        for name in part.counting(names):
            both = zip(found, parents, strict=True)
            present = [(changes[name], parent.weight) for changes, parent in both if name in changes]
            changes_here = [change for change, _ in present if isinstance(change, LowRank)]
            weights = [weight for _, weight in present]
            asked[name] = combined(changes_here, weights, how, density, generator)
            together = how in DENSE
            parts, scales = ([asked[name]], [1.0]) if together else (changes_here, weights)
            layer = WeightedSum(model.get_submodule(name), parts, scales)
            model.set_submodule(name, layer)
    comparison = Comparison(model, samples, command="convert")
    take_out_adapters(model)
    return asked, comparison


def cut_all(
    config: ConvertConfig, parents: list[Parent], asked: dict[str, Change]
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """Return every layer's change as a low-rank sum of scaling one, and the share of its energy that is lost."""
    largest = max((parent.adapter.largest_rank or 0 for parent in parents), default=0) or None
    changes, lost = {}, {}
    with Part("convert: cutting", len(asked)) as part:
        for name, change in part.counting(asked.items()):
            to = Cut(config.svd_rank, config.energy)
            if to == Cut() and (isinstance(change, Tensor) or config.combine is Combine.svd and len(parents) > 1):
                to = Cut(largest)
            try:
                if isinstance(change, Tensor):
                    changes[name], lost[name] = cut_dense(change, to)
                elif to == Cut():
                    changes[name], lost[name] = LowRank(change.A, change.scaling * change.B, 1.0), 0.0
                else:
                    changes[name], lost[name] = cut(change, to)
            except torch.linalg.LinAlgError as error:
                raise ValueError(f"{name}: the adapter's numbers are too large for its singular values") from error
    return changes, lost


def lineage_of(parents: list[Parent], written: AdapterConfig, fingerprint: str, base_name: str, kind: Kind) -> Lineage:
    """Return the record of the written adapter: the first parent's run, with the adapter that it has now."""
    first = parents[0].lineage
    content: dict[str, Any] = dict(first.config) if first is not None else {}
    if content:
        preset = f"q{written.method}" if kind is Kind.nf4 else written.method
        content |= {"adapter": plain(written), "method": preset}
    rows = {parent.lineage.data_fingerprint if parent.lineage is not None else None for parent in parents}
    return Lineage(
        base_fingerprint=fingerprint,
        base_name=base_name if first is None else first.base_name,
        method=written.method,
        quantization=kind.name,
        precision=first.precision if first is not None else None,
        packing_difference=first.packing_difference if first is not None else None,
        config=content,
        data_fingerprint=rows.pop() if len(rows) == 1 else None,
        created_by="lightning-peft convert",
        objective=first.objective if first is not None else "sft",
        parents=[
            {
                "name": parent.name,
                "method": parent.adapter.method,
                "rank": parent.adapter.rank,
                "weight": parent.weight,
                "adapter_sha256": file_sha256(parent.folder / WEIGHTS_NAME),
            }
            for parent in parents
        ],
    )


def said(parents: list[Parent], changes: dict[str, LowRank], lost: dict[str, float]) -> list[str]:
    """Return sentences that say what was made of what, at which ranks, and where most was lost."""
    made = " + ".join(f"{parent.weight:g} x {parent.path}" for parent in parents)
    made = made if len(parents) > 1 else parents[0].path
    ranks = [len(change.A) for change in changes.values()]
    size = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    lines = [f"{made}: {len(changes)} layers of rank {size}"]
    worst = max(lost, key=lambda name: lost[name])
    if lost[worst] > 0:
        mean = sum(lost.values()) / len(lost)
        lines.append(f"loses {mean:.2%} of a layer's change in the mean, {lost[worst]:.2%} at {worst}")
    return lines
