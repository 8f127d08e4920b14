"""Llama's step written out: products, and a cache that lies still.

At one token a row the modules, masks and growing caches of the general forward cost as much as the products do.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import SiLUActivation

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.lora import LoRALinear
from lightning_peft.adapters.slots import SlotLinear, Slots
from lightning_peft.inference.steps import cache_keyword, can_repeat_prefix, routed
from lightning_peft.kernels import decoding, few_rows
from lightning_peft.kernels.frozen_linear import DENSE, Base, base_with_product
from lightning_peft.models.rope import follows_length
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.weights import computing_dtype

STATIC_BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Blocks of transformers that are Llama's: two RMS norms, rotary attention, a gated MLP."""
WIDTH_STEP = 64
"""Positions by which a static cache grows at least."""
CACHE_BYTES = 2**30
"""Memory that a reserved cache may take in any case; beyond, as much as the weights."""
FEW_ROWS = 64
"""Rows up to which a product is computed the other way around on a CPU."""


def why_not_static(model: PreTrainedModel) -> str | None:
    """Return why `StaticSteps` do not compute this model; None where they do."""
    blocks = getattr(model.base_model, "layers", None)
    if blocks is None or any(type(block).__name__ not in STATIC_BLOCKS for block in blocks):
        return "its blocks are not Llama's"
    if not can_repeat_prefix(model):
        return "its cache is more than keys and values of all positions"
    if follows_length(model.config, None):
        return "the length of an answer sets its rotary frequencies"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "its weights are sharded"
    called = (part for block in blocks for part in (block, block.self_attn, block.mlp))
    if any(part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part) for part in called):
        return "its blocks have hooks"
    return None


class Products:
    """Linear layers that read one input; the factors of their adapters are scaled, cast and stacked once."""

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype):
        self.layers: list[tuple[nn.Module, Base | None, Tensor | None]] = []
        """Layer, its frozen base, and B^T (rank, out_features) of its adapter."""
        self.dtype = dtype
        self.is_read: list[bool] = []
        """True where the kernel of few rows can read a layer's weight."""
        self.slices: list[slice] = []
        stacked: list[Tensor] = []
        probe, end = torch.empty(0, dtype=dtype, device=next(layers[0].parameters()).device), 0
        for layer in layers:
            if isinstance(layer, Adapter) and not layer.enabled:
                layer = layer.base_layer
            base, B = None, None
            if isinstance(layer, Adapter) and is_plain_lora(layer):
                base = frozen_base(layer.base_layer, probe)
                if base is not None:
                    A, factor = layer.factors()
                    stacked.append((layer.scaling * A).to(dtype))
                    B = factor.t().to(dtype).contiguous()
            elif isinstance(layer, SlotLinear):
                base = frozen_base(layer.base_layer, probe) if layer.slots.on_host else None
            elif not isinstance(layer, Adapter):
                base = frozen_base(layer, probe)
            start, end = end, end + (0 if B is None else len(B))
            self.layers.append((layer, base, B))
            is_dense = base is not None and base.form == DENSE and base.first.dtype is dtype
            is_dense &= not isinstance(layer, SlotLinear) or layer.slots.dtype is dtype
            self.is_read.append(is_dense and few_rows.reads(base.first, base.tensors[-1]))  # type: ignore[union-attr]
            self.slices.append(slice(start, end))
        self.A = torch.cat(stacked) if stacked else None
        self.row_factors: dict[tuple[int, int], few_rows.RowFactors] = {}
        """Factors by a layer's place and the number of rows."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Map (rows, in_features) to (rows, out_features) of each layer."""
        inner: Tensor | None = None
        outputs = []
        are_few = x.dtype is self.dtype and few_rows.takes_rows(x)
        for place, (layer, base, B) in enumerate(self.layers):
            if base is None or (B is None and base.form != DENSE):
                outputs.append(layer(x))
            elif are_few and self.is_read[place]:
                factors = self.factors_of_rows(place, x.shape[0])
                outputs.append(few_rows.product(x, base.first, base.tensors[-1], factors))
            elif isinstance(layer, SlotLinear):
                outputs.append(layer(x))
            elif B is None:
                outputs.append(dense_product(x, base))
            else:
                assert self.A is not None
                inner = x @ self.A.t() if inner is None else inner
                own = inner[:, self.slices[place]]
                if base.form == DENSE and x.dtype is torch.float32:
                    outputs.append(dense_product(x, base).addmm_(own, B))
                else:
                    # In 16 bits the change is added in fp32, as in training.
                    outputs.append(base_with_product(x, base, own.contiguous(), B.t()))
        return outputs

    def factors_of_rows(self, place: int, rows: int) -> few_rows.RowFactors | None:
        """Return the factors at a layer: the same for each of so many rows, or of each row's slot."""
        layer, _, B = self.layers[place]
        if isinstance(layer, SlotLinear):
            routing = layer.slots.routing
            return None if routing is None else routing.factors_of_rows(layer)
        if B is None:
            return None
        if (place, rows) not in self.row_factors:
            assert self.A is not None
            self.row_factors[place, rows] = few_rows.RowFactors.of([(self.A[self.slices[place]], B)] * rows, B.dtype)
        return self.row_factors[place, rows]


def dense_product(x: Tensor, base: Base) -> Tensor:
    """Return x W^T + bias, (rows, out_features)."""
    weight, bias = base.first, base.tensors[-1]
    if x.device.type != "cpu" or x.dtype is not torch.float32 or not 1 < len(x) <= FEW_ROWS:
        return F.linear(x, weight, bias)
    # The library reads a large matrix faster as the first factor: 0.5 (4 rows) to 0.8 (32) of the time, on AVX2.
    output = (weight @ x.t()).t().contiguous()
    return output if bias is None else output.add_(bias)


def is_plain_lora(layer: Adapter) -> bool:
    """Return whether a layer computes its base and scaling * B A x, and nothing else."""
    return isinstance(layer, LoRALinear) and layer.is_product() and not layer.active_dropout


class Block:
    """One block of Llama's plan."""

    def __init__(self, block: Any, dtype: torch.dtype):
        attention, mlp = block.self_attn, block.mlp
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.query_key_value = Products([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.output = Products([attention.o_proj], dtype)
        self.gate_up = Products([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = Products([mlp.down_proj], dtype)
        self.activation = mlp.act_fn
        self.is_silu = type(mlp.act_fn) in (SiLUActivation, nn.SiLU)


class StaticSteps:
    """Llama's plan on a cache (layers, 2, rows, heads, positions, head_dim); row i's tokens lie at the first ones.

    Made anew after the weights of an adapter changed: its factors are cast here.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots | None = None):
        if (reason := why_not_static(model)) is not None:
            raise ValueError(f"{type(model).__name__}: {reason}")
        self.model, self.slots, self.dtype = model, slots, computing_dtype(model)
        self.changes = 0
        self.blocks, self.head = self._read()
        self.lengths: list[int] = []
        self.cache: Tensor | None = None
        self.prefix: list[int] = []
        """Tokens whose keys and values are kept for the prompts that begin with them."""
        self.prefix_cache: list[tuple[Tensor, Tensor]] = []

    def _read(self) -> tuple[list[Block], Products]:
        self.changes = 0 if self.slots is None else self.slots.changes
        blocks = [Block(block, self.dtype) for block in self.model.base_model.layers]  # type: ignore[union-attr]
        return blocks, Products([self.model.get_output_embeddings()], self.dtype)  # type: ignore[list-item]

    def share(self, prefix: list[int], route: int = -1) -> None:
        """Run what the prompts that follow begin with."""
        layers = self._prefill([prefix], [route], 0)[1]
        self.prefix, self.prefix_cache = prefix, [(layer.keys, layer.values) for layer in layers]

    def reserve(self, rows: int, width: int) -> int:
        """Make room for rows of so many positions, as many of them as memory is meant for; return how many."""
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        heads = self.model.config.get_text_config().num_key_value_heads
        token = 2 * len(self.blocks) * heads * self.blocks[0].head_dim * self.dtype.itemsize
        rows = max(1, min(rows, max(CACHE_BYTES, weights) // (token * width)))
        self._room(rows, width, heads)
        return rows

    def begin(self, prompts: Sequence[list[int]], routes: Sequence[int]) -> Tensor:
        """Run prompts, which become the last rows; return the scores (prompts, V) of their first tokens."""
        shared = len(self.prefix) if all(prompt[: len(self.prefix)] == self.prefix for prompt in prompts) else 0
        scores, layers = self._prefill(prompts, routes, shared)
        first = len(self.lengths)
        self.lengths += map(len, prompts)
        cache = self._room(len(self.lengths), max(self.lengths) + 1, layers[0].keys.shape[1])
        for kept, layer in zip(cache[:, :, first : len(self.lengths)], layers, strict=True):
            for into, found in zip(kept, (layer.keys, layer.values), strict=True):
                into[:, :, : found.shape[2]] = found
        return scores

    def _prefill(self, prompts: Sequence[list[int]], routes: Sequence[int], shared: int) -> tuple[Tensor, list[Any]]:
        """Return scores (prompts, V), and for each layer keys and values (prompts, heads, positions, head_dim).

        Padding is on the right, where no token of the prompt sees it.
        """
        device = self.model.device
        longest = max(map(len, prompts))
        ids = torch.tensor([p[shared:] + [p[-1]] * (longest - len(p)) for p in prompts], device=device)
        last = torch.tensor([len(prompt) - 1 - shared for prompt in prompts], device=device)
        cache = DynamicCache(config=self.model.config)
        if shared:
            for number, pair in enumerate(self.prefix_cache):
                keys, values = (part.expand(len(prompts), -1, -1, -1) for part in pair)
                cache.update(keys, values, number)
        needed, row = last.unique(return_inverse=True)
        keywords: dict[str, Any] = {str(cache_keyword(self.model)): cache, "logits_to_keep": needed}
        with routed(self.slots, routes):
            logits = self.model(input_ids=ids, use_cache=True, **keywords).logits
        return logits[torch.arange(len(prompts), device=device), row], list(cache.layers)

    def _room(self, rows: int, width: int, heads: int) -> Tensor:
        """Return the cache, of at least so many rows and positions."""
        if self.cache is not None and rows <= self.cache.shape[2] and width <= self.cache.shape[4]:
            return self.cache
        old_rows, old_width = (0, 0) if self.cache is None else (self.cache.shape[2], self.cache.shape[4])
        rows = old_rows if rows <= old_rows else max(rows, min(2 * old_rows, rows + 8))
        width = old_width if width <= old_width else (width // WIDTH_STEP + 1) * WIDTH_STEP
        size = self.blocks[0].head_dim
        grown = torch.zeros(len(self.blocks), 2, rows, heads, width, size, dtype=self.dtype, device=self.model.device)
        if self.cache is not None:
            grown[:, :, :old_rows, :, :old_width] = self.cache
        self.cache = grown
        return grown

    def step(self, tokens: Sequence[int], routes: Sequence[int]) -> Tensor:
        """Run a token of each row; return the scores (rows, V) of the next ones."""
        assert self.cache is not None
        assert len(tokens) == len(routes), "a kernel reads the adapter of every row by its address"
        if self.slots is not None and self.slots.changes != self.changes:  # an adapter of other layers came
            self.blocks, self.head = self._read()
        device = self.model.device
        rows, width = len(tokens), max(self.lengths) + 1
        cache = self._room(rows, width, self.cache.shape[3])[:, :, :rows]
        lengths = torch.tensor(self.lengths, device=device)
        ids = torch.tensor(tokens, device=device)[:, None]
        x = self.model.get_input_embeddings()(ids)
        cosine, sine = self.model.base_model.rotary_emb(x, lengths[:, None])  # type: ignore[operator, union-attr]
        half = sine.shape[-1] // 2
        turn = cosine[:, 0].contiguous(), torch.cat([-sine[:, 0, :half], sine[:, 0, half:]], -1)
        mask = None
        if min(self.lengths) + 1 < width:
            hidden = torch.arange(width, device=device) > lengths[:, None]
            mask = x.new_zeros(rows, width).masked_fill_(hidden, -torch.inf)[:, None, None]
        place = torch.arange(rows, device=device), lengths
        with routed(self.slots, routes):
            x = x[:, 0]
            for block, kept in zip(self.blocks, cache, strict=True):
                x = attend(block, x, kept, place, turn, mask, width)
            x = normed(self.model.base_model.norm, x)  # type: ignore[union-attr]
            (logits,) = self.head(x)
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Take all other rows out; row i is then the one that was rows[i], which must not lie before i."""
        if self.cache is not None:
            for place, row in enumerate(rows):
                if place != row:  # one at a time: a copy of them all would be as large as the cache
                    self.cache[:, :, place, :, : self.lengths[row]] = self.cache[:, :, row, :, : self.lengths[row]]
        self.lengths = [self.lengths[i] for i in rows]


def attend(
    block: Block, x: Tensor, kept: Tensor, place: tuple[Tensor, Tensor], turn: tuple[Tensor, Tensor],
    mask: Tensor | None, width: int,
) -> Tensor:  # fmt: skip
    """Return a block's output (rows, D); the rows' keys and values go to their places in `kept`."""
    rows, size = x.shape[0], block.head_dim
    queries, keys, values = (y.view(rows, -1, size) for y in block.query_key_value(normed(block.norms[0], x)))
    if block.head_norms[0] is not None:
        queries, keys = normed(block.head_norms[0], queries), normed(block.head_norms[1], keys)
    if decoding.takes_heads(queries, kept):
        mixed = decoding.attend(queries, keys, values, turn, place[1], kept, block.scaling)
    else:
        mixed = attended(queries, keys, values, kept, place, turn, mask, width, block.scaling)
    x = x + block.output(mixed.view(rows, -1))[0]
    gate, up = block.gate_up(normed(block.norms[1], x))
    if block.is_silu and decoding.takes(gate) and decoding.takes(up):
        return x + block.down(decoding.gate_(gate, up))[0]
    return x + block.down(block.activation(gate) * up)[0]


def attended(
    queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor, place: tuple[Tensor, Tensor],
    turn: tuple[Tensor, Tensor], mask: Tensor | None, width: int, scaling: float,
) -> Tensor:  # fmt: skip
    """Return what `decoding.attend` does, (rows, heads of queries, size), by torch's operators."""
    rows, heads, size = keys.shape
    cosine, sine = (part[:, None] for part in turn)
    both = torch.cat([queries, keys], 1)
    both = torch.addcmul(both * cosine, both.roll(size // 2, -1), sine)
    kept[0].index_put_(
        (place[0][:, None], torch.arange(heads, device=keys.device), place[1][:, None]), both[:, -heads:]
    )
    kept[1].index_put_((place[0][:, None], torch.arange(heads, device=keys.device), place[1][:, None]), values)
    # The queries that share a head of keys stand in the place of positions, so that nothing is repeated.
    mixed = F.scaled_dot_product_attention(
        both[:, :-heads].reshape(rows, heads, -1, size), kept[0, :, :, :width], kept[1, :, :, :width], mask,
        scale=scaling,
    )  # fmt: skip
    return mixed.reshape(rows, -1, size)


def normed(norm: Any, x: Tensor) -> Tensor:
    """Return the norm of x; one that is no module's call where both round alike."""
    if norm._forward_pre_hooks or norm._forward_hooks:
        return norm(x)
    if x.dtype is torch.float32 and norm.weight.dtype is torch.float32:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    if decoding.takes(x) and norm.weight.dtype is torch.bfloat16:
        return decoding.rms_norm(x, norm.weight, norm.variance_epsilon)
    return norm(x)
