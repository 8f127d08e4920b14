"""Peak memory and work of one training step on one rank, by component and with the formula of each."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from lightning_peft.adapters.segments import most_tokens
from lightning_peft.estimation.model_states import (
    ADAPTERS,
    BASE,
    EMBEDDINGS,
    GATHERED,
    IMPORTANCE,
    OPTIMIZER,
    SCALES,
    factor_copies,
    gathered_weights,
    importance_scores,
    loaded_weights,
    loading_scratch,
    optimizer_scratch,
    optimizer_states,
    shard,
    stored_weights,
    whole_weights,
)
from lightning_peft.estimation.recorder import Array, Held, held_bytes
from lightning_peft.estimation.symbols import Symbols
from lightning_peft.estimation.trace import ACTIVATIONS, BLOCK_INPUTS, GRADIENTS, LOGITS, WORKSPACE, trace_step
from lightning_peft.objectives.model_loss import ModelLoss

PROCESS, TEACHER = "process", "teacher"
PROCESS_BYTES = {"cpu": 24 * 2**20, "cuda": 32 * 2**20}
"""CPU: tokenizer, rows, the Trainer and the matrix library's buffers, measured on Linux; CUDA: cuBLAS' workspace."""
COMPONENTS = (
    BASE, SCALES, EMBEDDINGS, ADAPTERS, TEACHER, GRADIENTS, OPTIMIZER, IMPORTANCE, ACTIVATIONS, LOGITS, WORKSPACE,
    GATHERED, PROCESS,
)  # fmt: skip


@dataclass(frozen=True)
class StepOptions:
    """The options that decide the memory of a step beside the model."""

    rows: int
    length: int
    optimizer: str
    accumulate: int = 1
    autocast: torch.dtype | None = None
    offloads_activations: bool = False
    accelerator: str = "cpu"
    strategy: str = "single"
    ranks: int = 1
    slices_on_host: bool = False
    """True where FSDP's slices, their gradients and optimiser states wait in host memory."""
    loads_whole: bool = False
    """True where FSDP's ranks read the whole model before they shard it, as some inits need."""
    teacher: Counter[Array] = field(default_factory=Counter)
    """The arrays that a teacher stores beside the base."""
    adapter_rank: int | None = None
    """The adapters' rank, for the formulas only."""
    together: int = 1
    """Runs like this one that train together on one base, each with its own rows, adapters and states."""

    @property
    def pass_shape(self) -> tuple[int, int]:
        """Return the rows and their tokens of the largest pass, which all runs may share where their rows are short.

        No pass that `in_passes` makes takes more tokens or runs.
        """
        tokens = most_tokens(self.rows * self.length, self.together, self.accelerator)
        rows = math.ceil(tokens / self.length)
        return rows, math.ceil(tokens / rows)

    @property
    def shards(self) -> int:
        return self.ranks if self.strategy == "fsdp" else 1

    @property
    def offloads_to_host(self) -> bool:
        """Return whether block inputs wait in host memory; on a CPU they stay where they are."""
        return self.offloads_activations and self.accelerator == "cuda"

    @property
    def keeps_gradients(self) -> bool:
        """Return whether the last step's gradients are there in the backward pass; DDP's buckets always hold them."""
        return self.accumulate > 1 or self.strategy == "ddp"

    @property
    def cuts_gradients(self) -> bool:
        """Return whether FSDP cuts each gradient once it is made; those of runs together are cut behind a pass."""
        return self.shards > 1 and self.together == 1


@dataclass(frozen=True)
class Component:
    """One line of an estimate."""

    name: str
    at_peak: int
    """Bytes at the moment when all components together hold most."""
    largest: int
    """Bytes when this one holds most."""
    formula: str
    """The formula of `at_peak`, or of `largest` where `at_peak` is 0."""


@dataclass(frozen=True)
class Estimate:
    """Memory and work of one rank."""

    components: list[Component]
    phases: dict[str, int]
    """Peak bytes of loading, forward, loss, backward, optimiser and, where slices are gathered for it, saving; with
    runs together also of handing over their gradients."""
    host: int
    """Bytes that a CUDA run keeps in host memory instead: offloaded activations, paged optimiser states."""
    legend: str
    """The letters of the formulas."""
    flops: int
    """FLOPs of an optimiser step."""
    bytes_moved: int
    """Bytes read and written in an optimiser step, each operator by itself."""
    tokens: int
    """Tokens of an optimiser step."""
    of_each: int
    """Bytes that each of the runs together keeps through the passes of the others: adapters, optimiser states, the
    gradients of a window, and, where ranks hold slices, its adapters whole, as it may be in the same pass."""

    @property
    def peak(self) -> int:
        """Return the bytes at the peak: max_memory_allocated on CUDA; on a CPU the process's anonymous memory above
        that after imports.
        """
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """Return the phase in which the peak is reached."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def estimate_step(objective: ModelLoss, options: StepOptions) -> Estimate:
    """Return the estimate for a model on the meta device, quantised, adapted and checkpointed as for training.

    The model is used up. Every token counts as supervised, every row as full; of runs together all may be in one pass.
    """
    model, shards, together = objective.model, options.shards, options.together
    rows, length = options.pass_shape
    symbols = Symbols(model.config, rows, length, options.adapter_rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    process: Held = Counter({(PROCESS, Array((PROCESS_BYTES[options.accelerator],), torch.uint8)): 1})
    states, paged = optimizer_states(trained, options.optimizer, shards, options.accelerator == "cuda")
    states += importance_scores(model)
    if options.accelerator == "cuda" and options.strategy != "fsdp" and together == 1:
        states += factor_copies(model)
    one, stored = stored_weights(model, shards), of_runs(stored_weights(model, shards), together)
    of_each = held_bytes(states) + held_bytes(only(one, ADAPTERS))
    states = repeated(states, together)
    gathered = gathered_weights(model) if shards > 1 or options.slices_on_host else Counter()
    if shards > 1 and together > 1:  # a pass of all has every adapter whole
        whole = only(stored_weights(model), ADAPTERS)
        gathered += repeated(whole, together)
        of_each += held_bytes(whole)
    loaded = of_runs(stored_weights(model) if options.loads_whole else loaded_weights(model, shards), together)
    teacher: Held = Counter({(TEACHER, array): count for array, count in options.teacher.items()})
    always, on_host = stored + states + process + teacher, 0
    if options.slices_on_host:
        waiting = stored_weights(model, shards, buffers=False) + states
        always, on_host = always - waiting, held_bytes(waiting)
        loaded = gathered + always - process
    moments = {"loading": loaded + loading_scratch(model) + process + teacher}
    scratch = optimizer_scratch(trained, options.optimizer, shards, options.accelerator)

    trace = trace_step(
        objective, rows, length, options.keeps_gradients, options.autocast, options.accelerator,
        together if together > 1 else None,
    )  # fmt: skip

    def settled(held: Held) -> Held:
        """Cut gradients to this rank's slices, and count block inputs where they wait."""
        own: Held = Counter()
        for (name, array), count in held.items():
            if name == GRADIENTS and options.slices_on_host:
                continue
            if name == BLOCK_INPUTS:
                if options.offloads_to_host:
                    continue
                name = ACTIVATIONS
            own[(name, shard(array, shards) if name == GRADIENTS and options.cuts_gradients else array)] += count
        return own

    for moment in trace.moments:
        moments[moment.phase] = always + gathered + settled(moment.held)
    if together > 1:  # each run's become one block, one run after the other
        passed = repeated(trace.gradients, 2 if options.keeps_gradients else 1)
        of_one: Held = Counter({(WORKSPACE, array): n // together for (_, array), n in trace.gradients.items()})
        moments["handing over"] = always + gathered + passed + of_one
    slices: Held = Counter()
    for (name, array), count in trace.gradients.items():
        slices[(name, shard(array, shards))] += 0 if options.slices_on_host else count
    moments["optimiser"] = always + slices + scratch
    if shards > 1 and options.accelerator == "cpu":  # the slices of GPUs are gathered in host memory
        moments["saving"] = always + slices + whole_weights(trained)
    parameter_bytes = sum(shard(array, shards).nbytes * count for (_, array), count in trace.gradients.items())
    of_each += parameter_bytes // together if options.keeps_gradients else 0
    tokens = options.rows * together * options.length * options.accumulate
    passes = tokens / (rows * length)
    largest = {name: settled(held) for name, held in trace.largest.items()} | {ACTIVATIONS: settled(trace.kept)}
    host = paged + on_host + (parameter_bytes if options.slices_on_host else 0)
    host += held_bytes(only(trace.kept, BLOCK_INPUTS)) if options.offloads_to_host else 0
    return Estimate(
        components=list_components(moments, largest, symbols),
        phases={phase: held_bytes(held) for phase, held in moments.items()},
        host=host,
        legend=symbols.legend(),
        flops=round(trace.flops * passes),
        # AdamW reads parameter, gradient and two states and writes all but the gradient.
        bytes_moved=round(trace.bytes_moved * passes) + 7 * parameter_bytes,
        tokens=tokens,
        of_each=of_each,
    )


def list_components(moments: dict[str, Held], largest: dict[str, Held], symbols: Symbols) -> list[Component]:
    """Return the components there are, with the bytes they hold at the peak of all moments."""
    peak = max(moments.values(), key=held_bytes)
    components = []
    for name in COMPONENTS:
        candidates = [largest.get(name, Counter()), *(only(held, name) for held in moments.values())]
        most = max(candidates, key=held_bytes)
        if most:
            at_peak = only(peak, name)
            formula = symbols.formula(at_peak or most)
            components.append(Component(name, held_bytes(at_peak), held_bytes(most), formula))
    return components


def repeated(held: Held, count: int) -> Held:
    """Return so many times what is held."""
    return Counter({key: count * number for key, number in held.items()})


def of_runs(stored: Held, together: int) -> Held:
    """Return what so many runs store: the adapters of each around one base."""
    return stored + repeated(only(stored, ADAPTERS), together - 1)


def only(held: Held, component: str) -> Held:
    return Counter({key: count for key, count in held.items() if key[0] == component})
