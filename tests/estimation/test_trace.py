"""The fake step against real ones on the CPU."""

import pytest
import torch
from empty_models import TINY, config_folder, empty
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.compose import compose_config
from lightning_peft.data.batch import Batch
from lightning_peft.estimation import recorder, trace
from lightning_peft.estimation.recorder import held_bytes
from lightning_peft.kernels.native.library import library, without_kernels
from lightning_peft.models.loading import load_model
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.training.activation_checkpointing import checkpoint_blocks

ROWS, LENGTH = 2, 64


def real_objective(*overrides: str) -> SupervisedLoss:
    config = compose_config("train", [*TINY, *overrides])
    model = load_model(config.model, torch.float32, config.quantization)
    inject_adapters(model, config.adapter)
    checkpoint_blocks(model, config.activation_checkpointing)
    return SupervisedLoss(model).train()


def real_batch() -> Batch:
    ids = torch.randint(3, 259, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, 0] = -100
    starts = torch.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=torch.int32)
    positions = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    return Batch(ids, labels, positions, starts, LENGTH, ROWS * LENGTH, ROWS * (LENGTH - 1))


class AttentionOutputs(TorchDispatchMode):
    """Collects what selective checkpointing keeps outside autograd's hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.lightning_peft.sample_attention.default:
            self.tensors += output
        return output


def saved_bytes(objective: SupervisedLoss, batch: Batch, mode: str) -> int:
    """Return the bytes of storages that autograd or a checkpoint keeps after the forward, but for weights and batch."""
    saved: list[torch.Tensor] = []
    objective.check(batch)

    def keep_arguments(block, args, kwargs):
        # A checkpoint keeps the arguments to call the block again: rotary tables are among them.
        saved.extend(t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t))

    if mode != "none":
        for block in objective.model.model.layers:
            block.register_forward_pre_hook(keep_arguments, with_kwargs=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    outputs = AttentionOutputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), outputs:
        loss = objective(batch)
    known = [*objective.parameters(), *objective.buffers(), *(t for t in vars(batch).values() if torch.is_tensor(t))]
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept = [*saved, loss, *(outputs.tensors if mode == "selective" else [])]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in ignored)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "vera", "full"])
@pytest.mark.parametrize("mode", ["none", "blocks", "selective"])
def test_kept_activations_are_what_a_real_step_saves(method, mode):
    words = (f"method={method}", f"activation_checkpointing={mode}")
    traced = trace.trace_step(empty(*words), ROWS, LENGTH)
    assert held_bytes(traced.kept) == saved_bytes(real_objective(*words), real_batch(), mode)


def test_offload_keeps_what_blocks_keep():
    by_mode = [
        trace.trace_step(empty(f"activation_checkpointing={mode}"), ROWS, LENGTH).kept for mode in ("blocks", "offload")
    ]
    assert by_mode[0] == by_mode[1]


@pytest.mark.parametrize("mode", ["none", "blocks"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_flops_are_those_torch_counts_in_a_real_step(method, mode):
    # Eager attention is plain products; torch has no formula for the adapters' two operators.
    words = (f"method={method}", f"activation_checkpointing={mode}", "model.attention=eager")
    traced = trace.trace_step(empty(*words), ROWS, LENGTH)
    ours = {
        torch.ops.lightning_peft.low_rank_sum: lambda x, W, h, F, *_, **options: 2 * h[0] * (W[0] * W[1] + F[0] * F[1]),
        torch.ops.lightning_peft.low_rank_gradients: lambda g, x, h, B, **options: (
            2 * h[0] * h[1] * (g[1] + x[1] + g[1])
        ),
    }
    objective, batch = real_objective(*words), real_batch()
    objective.check(batch)
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        objective(batch).backward()
    assert traced.flops == counter.get_total_flops()


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_flash_attention_repeats_one_product_in_the_backward_pass(attention):
    flash, eager = (trace.trace_step(empty(f"model.attention={name}"), ROWS, LENGTH) for name in (attention, "eager"))
    heads, head_dim, blocks = 4, 16, 2
    assert flash.flops - eager.flops == blocks * 2 * ROWS * heads * LENGTH * LENGTH * head_dim


def test_quantised_linears_take_the_flops_of_dense_ones_and_hold_one_dense_weight():
    words = "model.attention=eager"  # strips of attention hold more than a weight of this model
    dense, coded = (trace.trace_step(empty(f"method={m}", words), rows=1, length=8) for m in ("lora", "qlora"))
    assert dense.flops == coded.flops
    largest = max(array.nbytes for _, array in coded.largest[trace.WORKSPACE])
    assert largest == 64 * 128 * 4


@pytest.mark.parametrize("words", [(), ("quantization=nf4", "activation_checkpointing=blocks"), ("method=full",)])
def test_a_few_blocks_stand_for_all(words, tmp_path, monkeypatch):
    folder = config_folder(tmp_path / "deep", num_hidden_layers=7)
    words = ("model=hf", f"model.path={folder}", *words)
    short = trace.trace_step(empty(*words), ROWS, LENGTH)
    monkeypatch.setattr(trace, "choose_stand_ins", lambda model, blocks: list(range(len(blocks))))
    assert short == trace.trace_step(empty(*words), ROWS, LENGTH)


def test_blocks_of_different_rank_stand_for_themselves(tmp_path):
    folder = config_folder(tmp_path / "deep", num_hidden_layers=6)
    model = empty("model=hf", f"model.path={folder}", "adapter.rank_last=4").model
    assert trace.choose_stand_ins(model, list(model.model.layers)) == [0, 1, 2, 3, 4, 5]


def test_what_a_gpu_needs_does_not_depend_on_the_processor_that_estimates():
    def traced(accelerator: str) -> trace.StepTrace:
        return trace.trace_step(empty(dtype=torch.bfloat16), rows=4, length=LENGTH, accelerator=accelerator)

    here = traced("cuda")
    with without_kernels():
        assert traced("cpu") == traced("cuda") == here
    assert (traced("cpu") != here) == (library() is not None)


def test_what_an_operator_holds_while_it_runs_is_added_up():
    watch = recorder.Recorder()
    grad, x, inner, B = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((8, 6), (8, 4), (8, 2), (6, 2)))
    with watch.recording():
        watch.mark("part")
        torch.ops.lightning_peft.low_rank_gradients(grad, x, inner, B)
    part = trace.SegmentSummary(watch.segments[0], lambda number, array: str(number == recorder.SCRATCH_STORAGE))
    assert sum(array.nbytes * n for (_, array), n in part.peaks["True"].items()) == 2 * (6 * 2 + 2 * 4)
    assert all(count == 0 for (name, _), count in part.change.items() if name == "True")


def test_every_operator_of_ours_is_known():
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in registered if name.startswith("lightning_peft::")}
    known = {func._opname for table in (recorder.OPENED, recorder.SCRATCH) for func in table}
    assert ours - known == set()
