"""A training step run on fake tensors, a few transformer blocks standing for all that are like them."""

from collections import Counter
from collections.abc import Container
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lightning_peft.data.batch import Batch
from lightning_peft.estimation.recorder import Array, Held, RecordedSegment, Recorder, held_bytes
from lightning_peft.kernels.codes import dynamic_map
from lightning_peft.kernels.native.library import without_kernels
from lightning_peft.models.blocks import transformer_blocks
from lightning_peft.objectives.linear_cross_entropy import chunks_as_on
from lightning_peft.objectives.logits import LogitPath
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.quantization.linear import CodedWeight

ACTIVATIONS, LOGITS, GRADIENTS, WORKSPACE = "activations", "logits chunk", "gradients", "workspace"
BLOCK_INPUTS = "block inputs"
"""Activations that activation_checkpointing=offload keeps in host memory."""


@dataclass(frozen=True)
class Moment:
    """The storages that live at one moment of a step, beside weights and optimiser states."""

    phase: str
    held: Held


@dataclass(frozen=True)
class StepTrace:
    """Forward and backward pass of one micro batch."""

    moments: list[Moment]
    """The largest moment of each phase: forward, loss, backward."""
    largest: dict[str, Held]
    """The storages of each component when it holds most."""
    kept: Held
    """The storages that the forward pass keeps for the backward pass."""
    gradients: Held
    flops: int
    bytes_moved: int


def trace_step(
    objective: ModelLoss,
    rows: int,
    length: int,
    keeps_gradients: bool = False,
    autocast: torch.dtype | None = None,
    accelerator: str = "cpu",
    together: int | None = None,
) -> StepTrace:
    """Trace one micro batch of `rows` full rows of `length` tokens, every one supervised.

    `objective` holds a model on the meta device, quantised, adapted and checkpointed as for training; it is used up.
    Gradients of the step before live until the backward pass starts, and with `keeps_gradients` (a later micro batch
    of an accumulation window) through it. The rows may be of so many runs of a group `together`, each with such
    adapters: their gradients are made in one pass, those of the step before are gone by then, and with
    `keeps_gradients` are beside the new ones.
    """
    runs = together or 1
    model = objective.model
    blocks = transformer_blocks(model)
    stand_ins = choose_stand_ins(model, blocks)
    trained = [p for p in objective.parameters() if p.requires_grad]
    gradients: Held = Counter()
    for parameter in trained:
        gradients[(GRADIENTS, Array(tuple(parameter.shape), parameter.dtype))] += runs
    keep_blocks(model, blocks, sorted(set(stand_ins)))
    recorder = Recorder()
    if any(isinstance(module, CodedWeight) for module in model.modules()):
        dynamic_map(torch.device("cpu"))  # computed from values, so before values are fake
    # Fake tensors lie on the host; what a GPU runs is nearer to what hosts without kernels do.
    kernels = nullcontext() if accelerator == "cpu" else without_kernels()
    with FakeTensorMode(allow_non_fake_inputs=True), kernels, chunks_as_on(accelerator):
        make_fake(objective, recorder)
        batch = fake_batch(rows, length, recorder)
        tags = Tags(recorder)
        tags.watch(model, [blocks[index] for index in sorted(set(stand_ins))])
        for parameter in objective.parameters():
            if keeps_gradients and parameter.requires_grad and together is None:
                parameter.grad = torch.empty_like(parameter)
                recorder.ignore(parameter.grad)
        objective.train()
        objective.assume(LogitPath())
        with recorder.recording():
            recorder.mark("start")
            with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
                loss = objective(batch)
            tags.kept = recorder.living()
            recorder.mark("backward start")
            loss.backward()
    vocabulary = model.config.get_text_config().vocab_size
    parts = {
        s.name: SegmentSummary(s, lambda number, array: tags.component(number, array, vocabulary), runs)
        for s in recorder.segments
    }
    order = {index: place for place, index in enumerate(sorted(set(stand_ins)))}
    held = {"forward", "loss"} if together is None else set()
    if keeps_gradients:
        held = {"forward", "loss", "backward"}
    return compose(parts, [order[index] for index in stand_ins], gradients, held)


def choose_stand_ins(model: PreTrainedModel, blocks: list[nn.Module]) -> list[int]:
    """Return for every block the index of the one that is run in its place: its own for the first and the last."""
    last = len(blocks) - 1
    if container(model, blocks) is None:
        return list(range(len(blocks)))
    first_of_kind: dict[Any, int] = {}
    inner = [first_of_kind.setdefault(kind(blocks[index]), index) for index in range(1, last)]
    return [0, *inner, last] if last else [0]


def kind(block: nn.Module) -> Any:
    """Return a value that is equal for blocks of the same memory."""
    tensors = [(n, t.shape, t.dtype, t.requires_grad) for n, t in block.state_dict(keep_vars=True).items()]
    options = [
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, int | float | str) and key not in ("layer_idx", "layer_index")
    ]
    return tuple(tensors), tuple(options)


def container(model: PreTrainedModel, blocks: list[nn.Module]) -> nn.ModuleList | None:
    """Return the list that holds all blocks and nothing else."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((module for module in lists if list(module) == blocks), None)


def keep_blocks(model: PreTrainedModel, blocks: list[nn.Module], indices: list[int]) -> None:
    """Leave only these blocks in the model."""
    if len(indices) == len(blocks):
        return
    holder = container(model, blocks)
    assert holder is not None
    config = model.config.get_text_config()
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in indices]
    for index in reversed(range(len(blocks))):
        if index not in indices:
            del holder[index]


def make_fake(module: nn.Module, recorder: Recorder | None = None, device: str = "cpu") -> None:
    """Give every parameter and buffer a fake tensor on the device, shared ones a shared one; none is recorded."""
    memo: dict[int, Tensor] = {}
    for part in module.modules():
        named: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in named:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in memo:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if recorder is not None:
                        recorder.ignore(fake)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = memo[id(tensor)]


def fake_batch(rows: int, length: int, recorder: Recorder) -> Batch:
    """Return a batch of full rows, one sample each, all but the first token of each supervised."""
    input_ids, labels, position_ids = (torch.empty(rows, length, dtype=torch.int64, device="cpu") for _ in range(3))
    cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device="cpu")
    lengths = torch.full((rows,), length, dtype=torch.int64, device="cpu")
    for tensor in (input_ids, labels, position_ids, cu_seqlens, lengths):
        recorder.ignore(tensor)
    supervised = rows * (length - 1)
    return Batch(
        input_ids, labels, position_ids, cu_seqlens, length, rows * length, supervised,
        lengths=lengths, num_units=rows // 2,
    )  # fmt: skip


class Tags:
    """The recorded storages that are gradients, block inputs, or kept for the backward pass."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.gradients: set[int | None] = set()
        self.block_inputs: set[int | None] = set()
        self.kept: set[int] = set()

    def watch(self, model: PreTrainedModel, blocks: list[nn.Module]) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._tag_gradient)
        model.base_model.register_forward_hook(lambda *_: self.recorder.mark("loss"))
        for place, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before(place), with_kwargs=True)
            block.register_forward_hook(self._after(place))

    def _tag_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients.add(self.recorder.number(parameter.grad))

    def _before(self, place: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.block_inputs.add(self.recorder.number(hidden))
            self.recorder.mark(f"forward {place}")

        return hook

    def _after(self, place: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                # The hook runs once the gradient of the block's output is complete: the block's own backward pass
                # begins.
                hidden.register_hook(lambda _: self.recorder.mark(f"backward {place}"))

        return hook

    def component(self, number: int, array: Array, vocabulary: int) -> str:
        if number in self.gradients:
            return GRADIENTS
        if number in self.kept:
            return BLOCK_INPUTS if number in self.block_inputs else ACTIVATIONS
        return LOGITS if array.shape[-1:] == (vocabulary,) else WORKSPACE


class SegmentSummary:
    """A segment summed up: what it adds for good, and at its largest moments, every gradient `together` times."""

    def __init__(self, segment: RecordedSegment, component: Any, together: int = 1):
        self.flops, self.bytes_moved = segment.flops, segment.bytes_moved
        self.change: Held = Counter()
        self.peak: Held = Counter()
        self.peaks: dict[str, Held] = {}
        total = 0
        highest = 0
        highest_of: Counter[str] = Counter()
        totals: Counter[str] = Counter()
        for change, number, array in segment.events:
            name = component(number, array)
            key = (name, array)
            change *= together if name == GRADIENTS else 1
            self.change[key] += change
            total += change * array.nbytes
            totals[name] += change * array.nbytes
            if total > highest:
                highest, self.peak = total, self.change.copy()
            if totals[name] > highest_of[name]:
                highest_of[name] = totals[name]
                self.peaks[name] = Counter({k: count for k, count in self.change.items() if k[0] == name})


def compose(parts: dict[str, SegmentSummary], places: list[int], gradients: Held, held_in: Container[str]) -> StepTrace:
    """Return the step of the whole model, whose i-th block is like the run one at `places[i]`.

    The gradients of the step before are there in the phases `held_in`.
    """
    phases = {
        "forward": ["start", *(f"forward {place}" for place in places)],
        "loss": ["loss"],
        "backward": ["backward start", *(f"backward {place}" for place in reversed(places))],
    }
    held: Held = Counter()
    moments = []
    largest: dict[str, Held] = {GRADIENTS: gradients}
    kept: Held = Counter()
    flops = bytes_moved = 0
    for phase, names in phases.items():
        old = gradients if phase in held_in else Counter()
        moment: Held = Counter()
        for name in names:
            part = parts.get(name)
            if part is None:  # the gradient stops above the block
                continue
            moment = max(moment, added(held, part.peak), key=held_bytes)
            for component, peak in part.peaks.items():
                now = added(Counter({k: c for k, c in held.items() if k[0] == component}), peak)
                largest[component] = max(largest.get(component, Counter()), now, key=held_bytes)
            held = added(held, part.change)
            flops, bytes_moved = flops + part.flops, bytes_moved + part.bytes_moved
        moments.append(Moment(phase, added(moment, old)))
        if phase == "loss":
            kept = held
    return StepTrace(moments, largest, kept, gradients, flops, bytes_moved)


def added(a: Held, b: Held) -> Held:
    """Return the sum, without what comes to nothing."""
    total = a.copy()
    total.update(b)
    return Counter({key: count for key, count in total.items() if count})
