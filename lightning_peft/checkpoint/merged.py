"""An adapter written into its base: a plain model folder, and a receipt of what the rounding cost."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lightning_peft import distributed
from lightning_peft.adapters.inject import adapters, disable_adapters
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.checkpoint.atomic import atomic_folder
from lightning_peft.checkpoint.merge_config import MergeBase, MergeConfig
from lightning_peft.checkpoint.resume import gathered
from lightning_peft.kernels.codes import INT8
from lightning_peft.kernels.low_bit import LOW_BIT
from lightning_peft.models.multimodal import LeftOnDisk, save_left
from lightning_peft.models.weight_streaming import fp32_pattern
from lightning_peft.progress import Part
from lightning_peft.quantization.experts import QuantizedExperts
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.weights import computing_dtype, is_transposed

logger = logging.getLogger(__name__)

RECEIPT_NAME = "merge_receipt.json"
"""Name of the file beside the merged model."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MergeError(ValueError):
    """The merged model is not the adapted one, or cannot be written where it should go."""


@dataclass(frozen=True)
class Receipt:
    """The saved model, read back, against the adapted one on sample text."""

    max_logit_difference: float
    mean_logit_difference: float
    """Mean of the absolute differences."""
    mean_kl: float
    """KL(adapter || merged), nats per token."""
    top1_agreement: float
    """Share of tokens for which both predict the same next one."""
    recovered: float
    """1 - ||merged - adapter|| / ||adapter - base|| over all logits; nan for an adapter without effect."""
    tokens: int

    def json_text(self) -> str:
        """Return strict JSON: a number that is not finite is null."""
        finite = {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}
        return json.dumps(finite, indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        return self.line("merged against adapter")

    def line(self, compared: str) -> str:
        """Return the receipt in a line that begins with what was compared with what."""
        return (
            f"{compared} on {self.tokens} tokens: logits differ by {self.mean_logit_difference:.2e} "
            f"(at most {self.max_logit_difference:.2e}), KL {self.mean_kl:.2e} nats, same first choice for "
            f"{self.top1_agreement:.2%}, {self.recovered:.2%} of the adapter's effect kept"
        )


def check_unused(output: Path) -> None:
    """Raise MergeError where something lies already that a model would be written over."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MergeError(f"output={output}: exists already; give a new folder")


def merge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    samples: Iterable[Tensor],
    config: MergeConfig | None = None,
    original: PreTrainedModel | None = None,
    base_logits: list[Tensor] | None = None,
) -> Receipt:
    """Write `model` with its adapters merged to `output`, a folder `AutoModelForCausalLM.from_pretrained` loads.

    `samples` are token ids (B, T) without padding, on which the saved model is compared with the adapted one; their
    logits are kept in memory. `original` is the base as its checkpoint stores it, which the change is then added to:
    needed for `MergeBase.original`, and where the model was loaded in another dtype. `base_logits` are those of the
    base on the samples, where disabling the adapters does not give it. `model` and `original` are used up. Raises
    NotMergeableError, and MergeError, with nothing left at `output`, when the models differ too much.
    """
    config = config or MergeConfig()
    output = Path(output)
    check_unused(output)
    if config.base is MergeBase.original and original is None:
        raise MergeError("merge.base=original needs the base before quantisation")
    if config.base is MergeBase.requantised and any(getattr(m, "kind", None) == INT8 for m in model.modules()):
        raise MergeError("merge.base=requantised writes 4-bit layers, this base is int8; use merge.base=dequantised")
    if config.base is MergeBase.requantised and any(getattr(m, "kind", None) in LOW_BIT for m in model.modules()):
        raise MergeError(
            "merge.base=requantised writes 4-bit layers of bitsandbytes, and this base keeps the codes it was "
            "published in; use merge.base=dequantised"
        )
    if config.base is MergeBase.requantised and any(isinstance(m, QuantizedExperts) for m in model.modules()):
        raise MergeError(
            "merge.base=requantised writes 4-bit linear layers, and this base has stacks of experts in 4 bits, which "
            "transformers does not read; use merge.base=dequantised"
        )
    for _, layer in adapters(model):
        layer.check_mergeable()
    _refuse_shared(model)
    device = model.device
    comparison = Comparison(model, samples, base_logits)
    dtype = DTYPES[config.dtype] if config.dtype is not None else computing_dtype(model) if original is None else None
    trained_in, requantise = computing_dtype(model), config.base is MergeBase.requantised
    with Part("merge: adding the adapters to their layers"):
        merged = merge_adapters(model, dtype, requantise, original, from_codes=config.base is MergeBase.dequantised)
    with atomic_folder(output) as partial:
        if requantise:
            # transformers reads 4-bit layers only with accelerate installed, so the codes are tried before saving.
            receipt = comparison.receipt(merged)
            save_model(merged, tokenizer, partial, dtype)
        else:
            with Part("merge: writing the model and reading it back"):
                save_model(merged, tokenizer, partial, dtype)
                merged.to_empty(device="meta")
                compared = torch.promote_types(trained_in, dtype or merged.dtype)
                saved: nn.Module = type(model).from_pretrained(partial, dtype=compared)
            receipt = comparison.receipt(saved.to(device))
        _check(receipt, config, output)
        (partial / RECEIPT_NAME).write_text(receipt.json_text())
    return receipt


def _refuse_shared(model: PreTrainedModel) -> None:
    """Raise MergeError where two adapters change one weight, each in its own way: blocks that Zamba 2 repeats."""
    names: dict[int, str] = {}
    for name, layer in adapters(model):
        weight = layer.base_layer.get_parameter("weight")
        if (other := names.setdefault(id(weight), name)) != name:
            raise MergeError(f"{other} and {name} share one weight, and their adapters differ: serve them unmerged")


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model whose LoRAs are added to its weights, whole and on rank zero, the model untouched.

    Sums are taken in fp32 and rounded once, a layer at a time. Every rank must call it where the model is sharded.
    """
    state = gathered(model.state_dict(keep_vars=True))
    if distributed.rank() != 0:
        return {}
    for name, layer in adapters(model):
        prefix = f"{name}."
        own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        base = {key.removeprefix("base_layer."): own.pop(key) for key in list(own) if key.startswith("base_layer.")}
        factors = layer.published(own)
        scaling: Any = layer.scaling
        change = scaling * (factors["lora_B.weight"].float() @ factors["lora_A.weight"].float())
        change = change.t() if is_transposed(layer.base_layer) else change
        weight = base["weight"]
        base["weight"] = (weight.float() + change).to(weight.dtype)
        state |= {prefix + key: tensor for key, tensor in base.items()}
    return state


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a model without adapters and its tokenizer; 4-bit layers as bitsandbytes stores them.

    The model is cast in place where it is not in `dtype` already, but for what its architecture keeps in fp32; without
    a dtype every tensor keeps its own. `state` holds its tensors where it is sharded itself.
    """
    kept = fp32_pattern(model, dtype)
    for name, parameter in model.named_parameters():
        if dtype is not None and parameter.is_floating_point() and not (kept is not None and kept.search(name)):
            parameter.data = parameter.data.to(dtype)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if type(model).__module__.startswith("transformers.") and hasattr(model.config, "auto_map"):
        del model.config.auto_map  # it names Python files that did not run, and that the folder has not
    coded = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    if coded:
        _save_coded(model, coded, folder)
    else:
        disable_progress_bar()  # the bar of transformers draws into other output
        model.save_pretrained(folder, state_dict=state)
        if dtype is None and state is None:
            # transformers writes the dtype of the first weight, and would load all others in it.
            sizes: Counter[torch.dtype] = Counter()
            for parameter in model.parameters():
                sizes[parameter.dtype] += parameter.numel() * parameter.is_floating_point()
            model.config.dtype = max(sizes, key=lambda kind: sizes[kind])
            model.config.save_pretrained(folder)
    save_left(model, folder)
    tokenizer.save_pretrained(folder)


class Comparison:
    """Logits of an adapted model on sample text, kept to compare another model with."""

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        samples: Iterable[Tensor],
        base_logits: list[Tensor] | None = None,
        command: str = "merge",
    ):
        model.eval()
        self.command = command
        self.samples = [sample.to(model.device) for sample in samples]
        if not self.samples:
            raise MergeError(f"{command}: no sample text to compare the merged model on")
        self.adapted: list[Tensor] = []
        self.effect = 0.0
        with Part(f"{command}: asking the adapted model", len(self.samples)) as part:
            for number, sample in enumerate(self.samples):
                logits = logits_of(model, sample)
                if base_logits is not None:
                    base = base_logits[number]
                else:
                    with disable_adapters(model) if next(adapters(model), None) is not None else nullcontext():
                        base = logits_of(model, sample)
                self.effect += float((logits - base).double().square().sum())
                self.adapted.append(logits)
                part.advance()

    @torch.inference_mode()
    def receipt(self, merged: nn.Module) -> Receipt:
        merged.eval()
        tokens = agreeing = 0
        largest = absolute = squared = kl = 0.0
        with Part(f"{self.command}: comparing the written model", len(self.samples)) as part:
            for sample, adapted in zip(self.samples, self.adapted, strict=True):
                logits = logits_of(merged, sample)
                difference = (logits - adapted).abs()
                tokens += sample.numel()
                largest = max(largest, float(difference.max()))
                absolute += float(difference.double().mean(-1).sum())
                squared += float(difference.double().square().sum())
                kl += sum(_kl_divergence(*rows) for rows in zip(adapted, logits, strict=True))
                agreeing += int((logits.argmax(-1) == adapted.argmax(-1)).sum())
                part.advance()
        recovered = 1 - math.sqrt(squared / self.effect) if self.effect > 0 else math.nan
        return Receipt(largest, absolute / tokens, kl / tokens, agreeing / tokens, recovered, tokens)


@torch.inference_mode()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the fp32 logits (B, T, V) of ids (B, T), on the host."""
    return model(input_ids=ids, use_cache=False).logits.float().cpu()


def _kl_divergence(adapted: Tensor, merged: Tensor) -> float:
    """Return KL(adapted || merged), summed over tokens, from logits (T, V).

    The sum is computed in fp64: fp32 would add about 1e-8 a token.
    """
    logs = merged.double().log_softmax(-1), adapted.double().log_softmax(-1)
    return float(F.kl_div(*logs, reduction="sum", log_target=True))


def _save_coded(model: PreTrainedModel, coded: dict[str, QuantizedLinear], folder: Path) -> None:
    # This imports bitsandbytes, which is slow.
    from lightning_peft.quantization.bitsandbytes_format import to_bitsandbytes_state

    state = {n: t for n, t in model.state_dict().items() if not n.startswith(tuple(f"{name}." for name in coded))}
    for name, layer in coded.items():
        state.update({f"{name}.{key}": tensor for key, tensor in to_bitsandbytes_state(layer).items()})
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    first = next(iter(coded.values()))
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=first.kind,
        bnb_4bit_use_double_quant=first.double_quantization,
        bnb_4bit_compute_dtype=first.dtype,
        llm_int8_skip_modules=[n for n, module in model.named_modules() if isinstance(module, nn.Linear | LeftOnDisk)],
    ).to_dict()
    model.config.dtype = first.dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict(state, folder, max_shard_size="5GB")


def _check(receipt: Receipt, config: MergeConfig, output: Path) -> None:
    if not receipt.mean_kl <= config.max_kl:
        raise MergeError(
            f"output={output}: not written, KL {receipt.mean_kl:.3g} nats to the adapter is above "
            f"merge.max_kl={config.max_kl}; {receipt}"
        )
    if config.min_recovered is not None and not receipt.recovered >= config.min_recovered:
        raise MergeError(
            f"output={output}: not written, {receipt.recovered:.1%} of the adapter's effect is below "
            f"merge.min_recovered={config.min_recovered}; {receipt}"
        )
    if receipt.recovered < 0.5:
        logger.warning(
            "%.1f %% of the adapter's effect is left after rounding: merge.dtype=fp32 keeps it", 100 * receipt.recovered
        )
