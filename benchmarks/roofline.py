"""The demands of a training step on an H100, counted without one, and the rate that its own rates would allow.

    python -m benchmarks.roofline                  # LoRA, QLoRA and DoRA of an 8B shape on 2 x 4,096 tokens
    python -m benchmarks.roofline --variants lora --tflops 700 --launch-us 3

Nothing is run: the real step, compiled block by block, is followed on fake tensors. The compiler's own kernels and
their bytes are read from the code that Inductor makes for sm_90; every other operator, and what ours consist of, is
counted as it is called. Seconds are a model: the larger of work over rate and bytes over bandwidth, and never below a
launch.
Needs a `triton` that can be imported; a CPU build of torch comes without (pip install triton).
"""

import benchmarks.cuda_code as cuda_code  # isort: skip  before torch

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2, auto_functionalized_v2_dense
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shapes import SHAPES, write_shape
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.shared_input import FactorCopies, adapt_together
from lightning_peft.compat import set_up_compiler
from lightning_peft.data.batch import Batch
from lightning_peft.estimation.trace import make_fake
from lightning_peft.kernels import codes
from lightning_peft.kernels.inside_product import write_into_wide_rows
from lightning_peft.models.attention import accept_packed_batches
from lightning_peft.models.blocks import decoder_of, transformer_blocks
from lightning_peft.models.loading import empty_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.logits import LogitPath
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.optim.optimizers import OptimizerConfig, build_optimizer
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import prepare_quantized
from lightning_peft.training.token_scaling import scale_gradients

VARIANTS = ("frozen", "lora", "qlora", "dora", "qdora")
PRODUCTS, SKINNY, ATTENTION, PASSES, DECODING = "frozen products", "adapters", "attention", "fused passes", "codes"
SKINNY_SIDE = 128
"""Products with a side up to this are bound by bandwidth: those of the factors. Ours."""
ATTENTION_LAUNCHES = {
    "_varlen_attn": 2, "_varlen_attn_backward": 5, "_scaled_dot_product_cudnn_attention_backward": 3,
}  # fmt: skip
"""FlashAttention-2 forward: its kernel and the seed it clears; backward: dot, main, a cast and two sums over groups of
heads, as its source has it. cuDNN backward: dot, main and a cast, from others' profiles."""
ATTENTION_OPERATORS = {
    "_varlen_attn": (0, 1), "_varlen_attn_backward": (1, 2.5), "_scaled_dot_product_cudnn_attention": (0, 1),
    "_scaled_dot_product_cudnn_attention_backward": (1, 2.5),
}  # fmt: skip
"""Place of the queries among the arguments, and how many times the forward's FLOPs it takes."""
WITHOUT_KERNEL = frozenset(
    """
    view _unsafe_view reshape t transpose permute expand slice select unsqueeze squeeze as_strided detach alias split
    split_with_sizes unbind unflatten flatten empty new_empty empty_like empty_strided new_empty_strided lift_fresh
    _reshape_alias view_as set_ resize_ chunk narrow diagonal t_ transpose_ movedim mT sym_size sym_stride sym_numel
    is_same_size promote_types result_type device
    """.split()
)


@dataclass(frozen=True)
class Rates:
    """The rates that the GPU sustains; by default an H100 SXM's, as far as they are published or were seen."""

    tflops: float = 650
    """Large products in bf16."""
    fp32_tflops: float = 45
    """Products in fp32 without TF32."""
    attention_tflops: float = 310
    """Causal attention, forward and backward: FlashAttention-2 on Hopper."""
    sample_attention_tflops: float = 550
    """The same where every row is one sample: cuDNN."""
    terabytes: float = 2.8
    """Memory bandwidth of passes, TB/s."""
    skinny_share: float = 0.8
    """Share of it that products with a short side reach."""
    decoding_share: float = 0.6
    """Share of it that decoding 4-bit codes reaches."""
    launch_us: float = 2.5
    """The shortest kernel."""


@dataclass
class Work:
    """Launches, bytes and FLOPs by kind, and the modelled seconds."""

    launches: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, launches: int, moved: int, flops: float, seconds: float) -> None:
        self.launches[kind] += launches
        self.moved[kind] += moved
        self.flops[kind] += flops  # type: ignore[assignment]  # counts may be fractions
        self.seconds[kind] += seconds  # type: ignore[assignment]

    def plus(self, other: "Work", times: int = 1) -> "Work":
        total = Work()
        for part, factor in ((self, 1), (other, times)):
            for name in ("launches", "moved", "flops", "seconds"):
                for kind, value in getattr(part, name).items():
                    getattr(total, name)[kind] += value * factor
        return total


class Counting(TorchDispatchMode):
    """Counts the operators that are called, ours by what is in them; without `passes` products and attention alone."""

    def __init__(self, rates: Rates, tokens: int, passes: bool):
        super().__init__()
        self.rates, self.tokens, self.passes = rates, tokens, passes
        self.work = Work()
        self.inside = 0

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            assert func is auto_functionalized_v2  # writes over a copy; one that the code keeps is among its passes
            with self:
                return auto_functionalized_v2_dense(*args, **kwargs)
        if func is torch.ops.lightning_peft.wide_rows.default:
            return func(*args, **kwargs)  # the compiler's own code
        if func.namespace == "lightning_peft" and is_composite(func):
            self.inside += 1
            try:
                with self:
                    return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            finally:
                self.inside -= 1
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        on_device = any(isinstance(t, Tensor) and t.is_cuda for t in tree_leaves((args, kwargs, output)))
        if on_device and name not in WITHOUT_KERNEL and not changes_nothing(name, args, output):
            self.count(func, name, args, kwargs, output)
        return output

    def count(self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        rates, moved = self.rates, bytes_of(func, args, kwargs, output)
        bandwidth = rates.terabytes * 1e12
        if name in ATTENTION_OPERATORS:
            place, times = ATTENTION_OPERATORS[name]
            flops = times * 4 * args[place].numel() * self.tokens / 2
            rate = rates.attention_tflops if "varlen" in name else rates.sample_attention_tflops
            launches = ATTENTION_LAUNCHES.get(name, 1)
            self.work.add(ATTENTION, launches, moved, flops, flops / rate / 1e12)
            return
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            left, right = args[-2:] if name in ("mm", "bmm") and len(args) == 2 else factors(name, args)
            flops = 2 * left.numel() * right.shape[-1]
            rate = rates.tflops if left.dtype.itemsize == 2 else rates.fp32_tflops
            skinny = min(left.shape[-2], left.shape[-1], right.shape[-1]) <= SKINNY_SIDE
            share = rates.skinny_share if skinny else 1.0
            seconds = max(flops / rate / 1e12, moved / bandwidth / share)
            kind = SKINNY if skinny else PRODUCTS
        else:
            kind, flops, share = PASSES, 0, 1.0
            if func.namespace == "bitsandbytes" or "decode" in name:
                kind, share = DECODING, rates.decoding_share
            elif self.inside or name == "row_norms":
                kind = SKINNY
                share = rates.skinny_share if name == "read_once" else 1.0
            elif not self.passes:
                return
            seconds = moved / bandwidth / share
        self.work.add(kind, 1, moved, flops, max(seconds, rates.launch_us / 1e6))


def is_composite(func: Any) -> bool:
    return bool(func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeExplicitAutograd))


def factors(name: str, args: Any) -> tuple[Tensor, Tensor]:
    return (args[1], args[2]) if name.startswith(("addmm", "baddbmm")) else (args[0], args[1])


def changes_nothing(name: str, args: Any, output: Any) -> bool:
    """Return whether the operator gave back what it was given, as `contiguous` does."""
    return name in ("contiguous", "to", "clone") and args and output is args[0]


def bytes_of(func: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> int:
    """Return what an operator reads and writes; what it changes in place, but for an `out`, counts twice."""
    moved: dict[tuple[Any, ...], int] = {}

    def see(value: Any, times: int) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape))
                moved[key] = max(moved.get(key, 0), times * tensor.numel() * tensor.element_size())

    is_read = kwargs.get("beta", 1) != 0
    for argument, value in zip(func._schema.arguments, args, strict=False):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        see(value, 2 if is_written and is_read else 1)
    see(kwargs, 1)
    see(output, 1)
    return sum(moved.values())


@dataclass
class Block:
    """One compiled block."""

    graphs: int
    launches: int
    kept: int
    """Bytes kept for the backward pass."""
    work: Work


def build(variant: str, shape: str, layers: int, rank: int, head: bool) -> SupervisedLoss:
    """Make the loss over a model on the meta device."""
    with tempfile.TemporaryDirectory() as folder:
        write_shape(shape, Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text()) | {"num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = empty_model(ModelConfig("hf", folder, random_weights=True), torch.bfloat16)
    accept_packed_batches(model)
    method = variant.removeprefix("q")
    if method != variant:
        prepare_quantized(model, QuantizationConfig(kind=Kind.nf4))
    model.requires_grad_(False)
    if method != "frozen":
        trained = ["embed_tokens", "lm_head"] if head else []
        inject_adapters(model, METHODS[method].config(method=method, rank=rank, trainable_modules=trained))
        adapt_together(model, decoder_of(model), in_weights=True)
    objective = SupervisedLoss(model).train()
    objective.assume(LogitPath())
    return objective


def measure_block(objective: SupervisedLoss, rows: int, tokens: int, rates: Rates) -> Block:
    """Follow forward and backward pass of the second block, compiled."""
    model = objective.model
    width = model.config.hidden_size
    counting = Counting(rates, tokens, passes=False)
    reader = cuda_code.CodeReader(counting)
    with torch.device("cuda:0"):
        x = torch.empty(rows, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        tables = torch.empty(2, rows, tokens, width // model.config.num_attention_heads, dtype=torch.bfloat16)
        bounds = torch.empty(rows + 1, dtype=torch.int32)
        positions = torch.empty(rows, tokens, dtype=torch.int64)
    options = {
        "position_embeddings": tuple(tables), "attention_mask": None, "position_ids": positions, "use_cache": False,
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": tokens, "max_length_k": tokens,
    }  # fmt: skip
    block = transformer_blocks(model)[1]
    compiled = torch.compile(block.forward, backend=reader.backend())
    parameters = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    output, kept = cuda_code.kept_for_backward(lambda: compiled(x, **options), parameters)
    output.backward(torch.empty_like(output))
    for made in reader.made:
        seconds = max(made.bytes_moved / rates.terabytes / 1e12, made.launches * rates.launch_us / 1e6)
        counting.work.add(PASSES, made.launches, made.bytes_moved, 0, seconds)
    return Block(len(reader.made), sum(counting.work.launches.values()), kept, counting.work)


def measure_rest(objective: SupervisedLoss, rows: int, tokens: int, rates: Rates) -> Work:
    """Follow what is left of the step without its blocks: embedding, last norm, head and loss."""
    model = objective.model
    model.model.layers = nn.ModuleList()
    model.config.num_hidden_layers = 0
    if not model.get_input_embeddings().weight.requires_grad:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    with torch.device("cuda:0"):
        ids, labels, positions = (torch.empty(rows, tokens, dtype=torch.int64) for _ in range(3))
        bounds = torch.empty(rows + 1, dtype=torch.int32)
    batch = Batch(ids, labels, positions, bounds, tokens, rows * tokens, rows * (tokens - 1))
    counting = Counting(rates, tokens, passes=True)
    with counting:
        objective(batch).backward()
    return counting.work


def measure_casts(objective: SupervisedLoss, rates: Rates) -> Work:
    """Follow what happens once before the blocks: the factors of both are cast, and DoRA's norms taken."""
    counting = Counting(rates, 1, passes=True)
    for hook in decoder_of(objective.model)._forward_pre_hooks.values():
        copies = getattr(hook, "__self__", None)
        if isinstance(copies, FactorCopies):
            copies.before_forward(objective.model, None)  # makes room
            with counting:
                copies.before_forward(objective.model, None)
    return counting.work


def measure_optimizer(objective: SupervisedLoss, rates: Rates) -> Work:
    """Follow scaling, clipping and AdamW over the adapters of one block."""
    block = transformer_blocks(objective.model)[1]
    trained = [(name, parameter) for name, parameter in block.named_parameters() if parameter.requires_grad]
    counting = Counting(rates, 1, passes=True)
    if not trained:
        return counting.work
    parameters = [parameter for _, parameter in trained]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = build_optimizer(trained, OptimizerConfig())
    with counting:
        scale_gradients(parameters, torch.empty((), device="cuda:0"))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return counting.work


def measure(variant: str, shape: str, rows: int, tokens: int, rank: int, rates: Rates, head: bool) -> dict[str, Any]:
    """Return the figures of one variant."""
    torch._dynamo.reset()
    objective = build(variant, shape, 2, rank, head)
    layers = SHAPES[shape]["num_hidden_layers"]
    set_up_compiler(layers, on_cuda=True)
    write_into_wide_rows()
    if variant.startswith("q"):
        codes.dynamic_map(torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(objective, device="cuda:0")
        casts = measure_casts(objective, rates)
        table = torch.empty(256, device="cuda:0")
        # Two tables that are made from values.
        codes.dynamic_map = codes.levels = lambda *_: table  # type: ignore[assignment]
        block = measure_block(objective, rows, tokens, rates)
        optimizer = measure_optimizer(objective, rates)
        rest = measure_rest(objective, rows, tokens, rates)
    total = rest.plus(casts, layers // 2).plus(block.work, layers).plus(optimizer, layers)
    # Factors of all blocks are cast at once; norms, and the weights that are decoded for them, are each block's own.
    beside_casts = sum(count for kind, count in casts.launches.items() if kind != PASSES)
    return {
        "graphs": block.graphs,
        "launches_a_block": block.launches + beside_casts // 2,
        "kept_gb_a_block": block.kept / 1e9,
        "launches": dict(block.work.launches),
        "adapters_gb": total.moved[SKINNY] / 1e9,
        "passes_gb": total.moved[PASSES] / 1e9,
        "rest_ms": sum(rest.seconds.values()) * 1e3,
        "step_ms": {kind: value * 1e3 for kind, value in total.seconds.items()},
        "tflop": sum(total.flops.values()) / 1e12,
        "gb": {kind: value / 1e9 for kind, value in total.moved.items()},
        "tokens_per_second": rows * tokens / sum(total.seconds.values()),
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print a table of the variants."""
    table = Table("step", "launches a block", "kept GB a block", "graphs", "TFLOP", "adapters' GB", "ms", "tokens/s")
    for name, row in rows.items():
        table.add_row(
            name, str(row["launches_a_block"]), f"{row['kept_gb_a_block']:.3f}", str(row["graphs"]),
            f"{row['tflop']:.0f}", f"{row['adapters_gb']:.0f}", f"{sum(row['step_ms'].values()):.0f}",
            f"{row['tokens_per_second']:,.0f}",
        )  # fmt: skip
    Console().print(table)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["frozen", "lora", "qlora", "dora"])
    parser.add_argument("--shape", choices=SHAPES, default="llama_8b")
    for name, default in (("rows", 2), ("tokens", 4096), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head", action="store_true", help="train embeddings and head as well")
    parser.add_argument("--json", type=Path, help="file for all figures")
    for name, rate in asdict(Rates()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=rate)
    options = parser.parse_args(arguments)
    cuda_code.believe()
    rates = Rates(**{name: getattr(options, name) for name in asdict(Rates())})
    rows = {
        variant: measure(variant, options.shape, options.rows, options.tokens, options.rank, rates, options.head)
        for variant in options.variants
    }
    show(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
