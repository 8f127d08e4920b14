"""Steps that recompute elementwise operations are the plain ones, bit for bit, and keep less."""

import gc
from collections import Counter
from functools import partial

import pytest
import torch
from adapter_models import config_for, perturb
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen3Config,
)

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.models.attention import FEWER_KEY_HEADS
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import quantize_linears
from lightning_peft.training import recomputation
from lightning_peft.training.activation_checkpointing import checkpoint_blocks, keep_attention
from lightning_peft.training.config import ActivationCheckpointing
from lightning_peft.training.recomputation import keep, restore

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES),
    "phi": PhiConfig(**SIZES | {"num_key_value_heads": 4}),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, activation_function="gelu"),
}
IDS = torch.arange(64).view(2, 32)


def build(name: str, method: str, dtype: torch.dtype, quantized: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=dtype)
    if quantized:
        quantize_linears(model, QuantizationConfig(kind=Kind.nf4))
    inject_adapters(model, config_for(method))
    perturb(model)
    return model.train()


def take_step(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Take a step; return the logits and every gradient."""
    torch.manual_seed(seed)
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return {"logits": logits} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "method", "quantized"),
    [
        ("llama", "lora", False), ("llama", "lora", True), ("llama", "dora", False), ("llama", "ia3", False),
        ("llama", "vera", True), ("llama", "full", False), ("qwen3", "lora", False), ("gemma3", "lora", False),
        ("phi", "lora", False), ("gpt2", "lora", False),
    ],
)  # fmt: skip
def test_gradients_are_the_plain_ones(name, method, quantized, dtype):
    expected = take_step(build(name, method, dtype, quantized))
    model = build(name, method, dtype, quantized)
    checkpoint_blocks(model, ActivationCheckpointing.elementwise)
    found = take_step(model)
    assert found.keys() == expected.keys() and len(found) > 2
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)


def kept_bytes(model: nn.Module, monkeypatch: pytest.MonkeyPatch, mode: str) -> int:
    """Return the bytes of all tensors that autograd keeps of a forward pass, the model's own aside."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}
    alive = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def keep_and_count(tensor: torch.Tensor) -> object:
        kept = keep(tensor)
        if isinstance(kept, recomputation.Kept):
            count(kept.tensor)
        return kept

    monkeypatch.setattr(recomputation, "keep", keep_and_count)
    checkpoint_blocks(model, ActivationCheckpointing[mode])
    with saved_tensors_hooks(count, lambda tensor: tensor):
        model.model(input_ids=IDS, use_cache=False)
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_norms_and_gates_are_not_kept(monkeypatch):
    """A block's 10 D + 4 F numbers a token lack two norms' outputs, the activated gate and its product with up."""
    sizes = {
        mode: kept_bytes(build("llama", "lora", torch.float32), monkeypatch, mode) for mode in ("none", "elementwise")
    }
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    # The first block's input needs no gradient, so its norm is no operation autograd knows.
    left_out = 4 * IDS.numel() * (3 * width + 2 * 2 * inner)
    assert sizes["none"] - sizes["elementwise"] == left_out
    assert left_out > 0.3 * sizes["none"]


def test_validation_keeps_nothing():
    model = build("llama", "lora", torch.float32).eval()
    checkpoint_blocks(model, ActivationCheckpointing.elementwise)
    with torch.no_grad(), saved_tensors_hooks(lambda tensor: pytest.fail("saved"), lambda tensor: tensor):
        model(input_ids=IDS, use_cache=False)


def test_kept_tensor_that_is_written_to_is_an_error():
    weight = torch.ones(3, requires_grad=True)
    kept = weight * 2
    with saved_tensors_hooks(keep, restore):
        result = kept.sin()
    with torch.no_grad():
        kept.add_(1)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(3,\) that the backward pass needs was modified"):
        result.sum().backward()


def test_chain_of_products_and_casts_is_followed():
    x = torch.randn(8, requires_grad=True)
    scale = torch.randn(8, dtype=torch.bfloat16)
    weight = torch.randn(8, dtype=torch.bfloat16, requires_grad=True)

    def loss() -> torch.Tensor:
        normed = scale * (x * x.detach().rsqrt().nan_to_num().requires_grad_()).to(torch.bfloat16)
        return (normed * weight).float().sum()

    expected = torch.autograd.grad(loss(), [x, weight])
    with saved_tensors_hooks(keep, restore):
        found = loss()
    for ours, plain in zip(torch.autograd.grad(found, [x, weight]), expected, strict=True):
        assert torch.equal(ours, plain)


def test_product_of_a_scalar_tensor_and_a_number_keeps_its_dtype():
    x = torch.tensor(0.3, requires_grad=True)
    with saved_tensors_hooks(keep, restore):
        scaled = torch.nn.functional.silu(x) * 2.0
        squared = scaled * scaled
    assert squared.grad_fn._saved_self.dtype == torch.float32


def test_selective_runs_the_kernel_of_packed_attention_once():
    """The tensors have no values: the kernel is CUDA's, its formulas of shapes are everywhere."""
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    query = torch.empty(128, 4, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key = torch.empty(128, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    bounds = torch.empty(3, dtype=torch.int32, device="meta")

    def block(query):
        attended = varlen_attn(query * 2, key, key, bounds, bounds, 64, 64, window_size=(-1, 0), **FEWER_KEY_HEADS)
        return attended * 2

    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    with Calls():
        checkpoint(block, query, use_reentrant=False, context_fn=contexts).sum().backward()
    assert calls.count("torch_attn._varlen_attn.default") == 1
    assert calls.count("aten.mul.Tensor") > 2  # all around it runs again


def test_what_several_read_is_made_once():
    """Two blocks: each activated gate is read by its product's gradient and, through it, by the down projection."""
    model = build("llama", "lora", torch.float32)
    checkpoint_blocks(model, ActivationCheckpointing.elementwise)
    counted = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted[func] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        take_step(model)
    assert counted[torch.ops.aten.silu.default] == 2 + 2


def test_nothing_stays_after_the_backward_pass():
    model = build("llama", "lora", torch.float32)
    checkpoint_blocks(model, ActivationCheckpointing.elementwise)
    logits = model(input_ids=IDS, use_cache=False).logits
    readers = [x for x in gc.get_objects() if type(x) is recomputation.Readers]
    assert readers and all(x.output is None for x in readers)
    logits.float().logsumexp(-1).sum().backward()
    assert all(x.output is None for x in readers)
