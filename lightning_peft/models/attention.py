"""Attention over packed samples: each sees itself and nothing else, and no mask of T x T is ever built.

Registered with transformers under `VARLEN`. A call that carries `cu_seq_lens_q` (where samples begin in the flattened
batch) runs causal attention sample by sample; any other call, such as generation with a cache and left padding, is
transformers' own sdpa with its mask.
"""

import inspect
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_peft.kernels.attention.grouping import find_samples
from lightning_peft.kernels.attention.operator import sample_attention
from lightning_peft.models.blocks import decoder_of
from lightning_peft.models.source import VARLEN

logger = logging.getLogger(__name__)


FEWER_KEY_HEADS: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 takes them without being told."""
ROW_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Backends that attend to rows of one sample; the first that takes them does."""


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Return the causal attention inside each sample of a packed batch, (B, T, H, D).

    The result has the dtype of `query`, or of autocast where that is on.

    query (B, H, T, D); key and value (B, G, T, D), H a multiple of G; cu_seqlens (S + 1,) int32, from 0 to B * T, no
    sample longer than `max_seqlen` or over two rows, else ValueError. A position sees at most the last `window`
    positions, itself included.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # fp32 rotary tables made fp32 of q and k
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if query.is_cuda and dropout == 0 and _has_flash_attention(query, value):
        # The shape of the bounds says it, so that the compiler and the host know: no device is asked.
        if window is None and cu_seqlens.numel() == query.shape[0] + 1 and _prefers_cudnn(query):
            with sdpa_kernel(ROW_BACKENDS, set_priority=True):
                by_head = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
                )
            return by_head.transpose(1, 2)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = varlen_attn(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            **FEWER_KEY_HEADS,
        )
        assert isinstance(output, Tensor)
        return output.unflatten(0, (query.shape[0], query.shape[2]))
    if device == "cpu" and dropout == 0 and query.shape[-1] == value.shape[-1]:
        return sample_attention(query, key, value, cu_seqlens, scaling, window)[0]
    return _attend_by_sample(query, key, value, cu_seqlens, scaling, dropout, window)


def _prefers_cudnn(query: Tensor) -> bool:
    """Return whether cuDNN's attention is the fastest: on Hopper about twice FlashAttention-2, on others it is slower.

    Measured by others (huggingface/transformers#48163), not by us.
    """
    return torch.cuda.get_device_properties(query.device).major == 9


def _has_flash_attention(query: Tensor, value: Tensor) -> bool:
    """Return whether the kernel takes these: heads of one width for queries and values, a multiple of 8 up to 256."""
    major: int = torch.cuda.get_device_properties(query.device).major
    width = query.shape[-1]
    fits = width % 8 == 0 and width <= 256 and value.shape[-1] == width
    return major >= 8 and fits and query.dtype in (torch.float16, torch.bfloat16)


@torch.compiler.disable  # it would compile anew for every composition of a batch
def _attend_by_sample(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float, dropout: float, window: int | None
) -> Tensor:
    """Compute `varlen_attention` where no kernel takes samples of different lengths: fp32, old GPUs, dropout."""
    outputs = []
    width = query.shape[2]
    for first, last in find_samples(cu_seqlens, query.shape[0], width):
        row, start, stop = first // width, first % width, first % width + last - first
        mask = window_mask(stop - start, window, query)
        q, k, v = (x[row : row + 1, :, start:stop] for x in (query, key, value))
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).reshape(query.shape[0], query.shape[2], query.shape[1], -1)


def window_mask(length: int, window: int | None, like: Tensor) -> Tensor | None:
    """Return a sliding window's additive causal mask (length, length), or None where the window covers the sample."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=like.device)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < window)
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers has `VARLEN` do; shapes are those of `varlen_attention`."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return varlen_attention(
        query,
        key,
        value,
        cu_seq_lens_q,
        max_length_q or query.shape[2],
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        dropout,
        sliding_window,
    ), None


AttentionInterface.register(VARLEN, attention_forward)
AttentionMaskInterface.register(VARLEN, sdpa_mask)

# Model types whose packed logits equal unpacked ones under VARLEN, each checked in tests/models/test_attention.py.
# Others mix samples: in a recurrence or convolution, in chunks, or by building on the mask themselves.
VARLEN_TYPES = frozenset(
    """
    afmoe apertus arcee aria_text bitnet cohere cohere2 cwm dots1 ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma
    gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense
    jais2 jetmoe llama minimax_m2 ministral ministral3 mistral mixtral olmo olmo2 olmo3 olmoe opt persimmon phi phi3
    qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2
    """.split()
)
# Model types whose own mask, (B, 1, T, T) from the position ids, keeps samples apart under eager and sdpa.
MASKED_TYPES = (VARLEN_TYPES | {"gemma2"}) - {"afmoe", "opt"}


def choose_attention(config: PreTrainedConfig, requested: str) -> str | None:
    """Return the implementation to give transformers for `model.attention`; None leaves the choice to it."""
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()} - {VARLEN}
    # A name with a slash is a kernel of the hub.
    if requested not in {"auto", "varlen", *known} and "/" not in requested:
        raise ValueError(f"model.attention={requested}: must be one of auto, varlen, {', '.join(sorted(known))}")
    packs = config.model_type in VARLEN_TYPES and getattr(config, "attn_logit_softcapping", None) is None
    if requested not in ("auto", "varlen"):
        return requested
    if packs:
        return VARLEN
    if requested == "varlen":
        raise ValueError(f"model.attention=varlen: not for models of type {config.model_type}; use auto, sdpa or eager")
    logger.info("attention: models of type %s run in transformers' own implementation", config.model_type)
    return None


def supports_packing(model: PreTrainedModel) -> bool:
    """Return whether samples packed into one row stay independent of each other in this model."""
    config = model.config
    if config._attn_implementation == VARLEN:
        return config.model_type in VARLEN_TYPES
    return config._attn_implementation in ("eager", "sdpa") and config.model_type in MASKED_TYPES


def accept_packed_batches(model: PreTrainedModel) -> None:
    """Let the decoder take batches that carry `cu_seq_lens_q`: no mask is built for `VARLEN`, mixing samples raises."""

    def before_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is None:
            return None
        inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        rows, width = next(x for x in inputs if x is not None).shape[:2]
        if cu_seqlens.numel() - 1 > rows and not supports_packing(model):
            raise RuntimeError(
                f"packed samples would see each other in a {model.config.model_type} model with "
                f"model.attention={model.config._attn_implementation}: use data.packing=false"
            )
        # A sample is no longer than its row. The longest one's length would be a constant in compiled code.
        kwargs["max_length_q"] = kwargs["max_length_k"] = width
        if model.config._attn_implementation == VARLEN and kwargs.get("attention_mask") is None:
            # A 4-D mask is passed on as it is; an empty one fails loudly in anything that would apply it.
            kwargs["attention_mask"] = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=cu_seqlens.device)
        return args, kwargs

    decoder_of(model).register_forward_pre_hook(before_forward, with_kwargs=True)
