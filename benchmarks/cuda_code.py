"""The code that torch's compiler makes for a Hopper GPU, made on a machine without one: it is read, not run.

Import it before anything else of torch. It takes a `triton` that can be imported; on a CPU build of torch, which lacks
it, `pip install triton` brings one that finds no driver, and one in name is put in its place.
"""

import re
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import benchmarks.fake_cuda  # noqa: F401  isort: skip  before torch

import torch
from torch import Tensor

HOPPER = types.SimpleNamespace(
    major=9, minor=0, name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 * 2**30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32, gcnArchName="", uuid="0",
    L2_cache_size=50 * 2**20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, is_integrated=0,
)  # fmt: skip


class Driver:
    """A driver of Triton that knows its GPU by name."""

    launcher_cls = None
    limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    utils = types.SimpleNamespace(get_device_properties=lambda *_: Driver.limits)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def believe() -> None:
    """Let torch, its compiler and Triton see one Hopper GPU. Raises ImportError without Triton."""
    import bitsandbytes  # noqa: F401  while there is no GPU: it would look for the libraries of one
    from torch._dynamo import device_interface
    from torch.utils import _triton
    from triton.runtime import driver

    driver.set_active(Driver())
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: HOPPER,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: HOPPER.name,
        "_lazy_init": lambda: None,
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.version.cuda = "13.0"
    # A CPU build would take attention apart.
    attention = torch.ops.aten.scaled_dot_product_attention.default
    attention.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(_cudnn_attention)
    interface = device_interface.CudaInterface
    more: dict[str, Callable[..., Any]] = {
        "get_compute_capability": lambda *_: 90,
        "get_raw_stream": lambda *_: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "is_dtype_supported": lambda *_, **__: True,
        "is_triton_capable": lambda *_: True,
        "raise_if_triton_unavailable": lambda *_: None,
    }
    for name, answer in (answers | more).items():
        setattr(interface, name, staticmethod(answer))
    for name in ("get_device_properties", "current_device"):
        setattr(interface.Worker, name, staticmethod(answers[name]))
    device_interface.get_interface_for_device("cpu")  # fills the table
    for device in ("cuda", "cuda:0"):
        device_interface.device_interfaces[device] = interface
    for name in ("has_triton", "has_triton_package"):
        setattr(_triton, name, lambda *_, **__: True)


def _cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    output: Tensor = operator(query, key, value, mask, True, dropout_p, is_causal, False, scale=scale)[0]
    return output


@dataclass
class Fused:
    """The compiler's product from a graph beside the operators that it calls: kernels of its own."""

    direction: str
    """forward or backward."""
    launches: int
    bytes_moved: int
    code: str


class CodeReader:
    """A compiler that makes the code of every graph and runs the graph itself, operator by operator.

    `watch` sees those operators: the compiler takes nothing that runs under a dispatch mode.
    """

    def __init__(self, watch: AbstractContextManager[Any]) -> None:
        self.watch = watch
        self.made: list[Fused] = []

    def backend(self) -> Any:
        """Return what `torch.compile` takes as its backend."""
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        return aot_autograd(
            fw_compiler=self._compiler("forward"),
            bw_compiler=self._compiler("backward"),
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
            decompositions=select_decomp_table(),
        )

    def _compiler(self, direction: str) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            self.made.append(lowered(deepcopy(graph), inputs, direction))

            def run(*arguments: Any) -> Any:
                with self.watch:
                    return graph.forward(*arguments)

            return make_boxed_func(run)

        return compiler


def lowered(graph: torch.fx.GraphModule, inputs: list[Any], direction: str) -> Fused:
    """Return the kernels that Inductor makes for a graph of forward or backward."""
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = detect_fake_mode(inputs)
    assert mode is not None
    with ExitStack() as stack:
        stack.enter_context(V.set_fake_mode(mode))
        view_to_reshape(graph)
        with mode:
            post_grad_passes(graph, False)
        lowering = GraphLowering(
            graph, example_inputs=inputs, shape_env=mode.shape_env, is_backward=direction != "forward"
        )
        for context in (
            V.set_debug_handler(DebugContext()),
            V.set_graph_handler(lowering),
            V.set_extern_kernel_nodes([]),
        ):
            stack.enter_context(context)
        lowering.run(*inputs)
        code, _ = lowering.codegen()
        text = str(getattr(code, "value", code))
        moved = sum(node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes if not node.is_extern())
    return Fused(direction, len(re.findall(r"triton_\w+\.run\(", text)), moved, text)


def kept_for_backward(run: Callable[[], Tensor], parameters: set[int]) -> tuple[Tensor, int]:
    """Return what `run` returns, and the bytes that it keeps beside the storages of parameters, by their numbers."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return output, sum(kept.values())
