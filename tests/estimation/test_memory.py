"""The estimate as a whole: sums, formulas, phases, ranks."""

import math
import random
import re

import pytest
import torch
from empty_models import config_folder, config_of, tiny_estimate

from benchmarks.floor import peak_allocation, random_batch
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.segments import in_passes
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.commands.step_estimate import estimate_of
from lightning_peft.estimation.memory import Estimate, StepOptions
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_model
from lightning_peft.models.twin import copy_around_same_tensors
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.training.shared_passes import SharedPasses, trained_parameters
from lightning_peft.training.together import RunGroup, random_states

CASES = [(), ("method=qlora", "activation_checkpointing=blocks"), ("method=full",), ("method=dora", "rank=r4")]


def value_of(formula: str, legend: str) -> int:
    """Return a printed formula, worked out with the printed sizes."""
    sizes = {name: int(size.replace(",", "")) for name, size in re.findall(r"(\w) = ([\d,]+)", legend)}
    total = 0
    for itemsize, terms in re.findall(r"(\d+) x \(([^)]*)\)", formula):
        for term in terms.split(" + "):
            product = int(itemsize)
            for factor in term.split():
                product *= sizes[factor] if factor in sizes else int(factor.replace(",", ""))
            total += product
    return total


@pytest.mark.parametrize("words", CASES)
def test_components_add_up_to_the_peak(words):
    estimate = tiny_estimate(*words)
    assert sum(component.at_peak for component in estimate.components) == estimate.peak
    assert all(component.at_peak <= component.largest for component in estimate.components)


@pytest.mark.parametrize("words", CASES)
def test_printed_formulas_give_the_bytes(words):
    estimate = tiny_estimate(*words)
    for component in estimate.components:
        assert value_of(component.formula, estimate.legend) == (component.at_peak or component.largest), component


def size(estimate: Estimate, name: str) -> int:
    return sum(component.largest for component in estimate.components if component.name == name)


def test_teacher_counts_as_what_it_stores_beside_the_base_and_its_hidden_states(tmp_path):
    words = ["objective=distill", "data.micro_batch_size=2"]
    shared, own = tiny_estimate(*words), tiny_estimate(*words, "objective.teacher=tiny_tied")
    model = tiny_model(tied=True)
    assert size(shared, "teacher") == 0
    assert size(own, "teacher") == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert own.peak - shared.peak == size(own, "teacher")
    head = tiny_estimate(*words, "adapter.trainable_modules=[lm_head]")
    assert size(head, "teacher") == model.lm_head.weight.nbytes
    folders = [config_folder(tmp_path / str(width), hidden_size=width) for width in (64, 512)]
    narrow, wide = (tiny_estimate(*words, f"objective.teacher={folder}") for folder in folders)
    stored = size(wide, "teacher") - size(narrow, "teacher")
    assert wide.phases["optimiser"] - narrow.phases["optimiser"] == stored
    hidden = wide.phases["loss"] - narrow.phases["loss"] - stored
    assert hidden == 2 * 63 * (512 - 64) * 4  # rows, supervised tokens, width, fp32
    base = tiny_model()
    inject_adapters(base, LoRAConfig(rank=8))
    save_adapter(base, LoRAConfig(rank=8), tmp_path / "adapter")
    adapted = tiny_estimate(*words, f"objective.teacher_adapter={tmp_path}/adapter")
    assert size(adapted, "teacher") == sum(p.nbytes for p in base.parameters() if p.requires_grad)


def test_accumulation_and_ddp_keep_gradients_through_the_backward_pass():
    plain, accumulated = tiny_estimate("rank=r64"), tiny_estimate("rank=r64", "trainer.accumulate_grad_batches=4")
    assert accumulated.phases["backward"] > plain.phases["backward"]
    assert accumulated.flops == 4 * plain.flops
    assert accumulated.tokens == 4 * plain.tokens


def test_offloaded_block_inputs_leave_a_cuda_device_and_stay_on_a_cpu():
    words = ("trainer.accelerator=gpu", "activation_checkpointing=offload")
    offloaded, kept = tiny_estimate(*words), tiny_estimate(words[0], "activation_checkpointing=blocks")
    block_inputs = 2 * 2 * 64 * 64 * 4  # blocks, rows, tokens, width, fp32
    assert offloaded.host == block_inputs
    assert size(kept, "activations") - size(offloaded, "activations") == block_inputs
    assert tiny_estimate("activation_checkpointing=offload").host == 0


def test_a_gpu_keeps_the_factors_in_the_dtype_of_the_products():
    # With dropped inputs they need no room at the weights' edges, which tests/adapters/test_wide_weights.py counts.
    bf16 = ("rank=r16", "trainer.precision=bf16-true", "adapter.dropout=0.1")
    host, device = tiny_estimate(*bf16), tiny_estimate(*bf16, "trainer.accelerator=gpu")
    trained = size(host, "gradients")
    assert size(device, "adapters") - size(host, "adapters") == trained // 2  # 2 bytes for every 4
    assert size(tiny_estimate(*bf16[:2], "trainer.accelerator=gpu"), "adapters") > size(device, "adapters")
    single = tiny_estimate("rank=r16", "trainer.accelerator=gpu", "trainer.precision=32-true")
    assert size(single, "adapters") == size(host, "adapters")


def test_fsdp_shards_what_is_stored():
    words = ("rank=r64", "data.max_length=8", "strategy=fsdp", "trainer.devices=2")
    alone, sharded = tiny_estimate(*words[:2]), tiny_estimate(*words)
    for name in ("gradients", "optimiser states"):
        assert size(sharded, name) * 2 == size(alone, name)
    assert size(sharded, "gathered weights") > 0


def test_offloaded_slices_wait_on_the_host():
    words = ("rank=r64", "data.max_length=8", "strategy=fsdp", "trainer.accelerator=gpu", "trainer.devices=2")
    kept, offloaded = tiny_estimate(*words), tiny_estimate(*words, "strategy.cpu_offload=true")
    trained = sum(size(kept, name) for name in ("gradients", "optimiser states"))
    assert kept.host == 0 and offloaded.host > trained
    assert kept.peak - offloaded.peak == pytest.approx(offloaded.host, rel=0.2)
    assert size(offloaded, "gathered weights") == size(kept, "gathered weights")


def test_buffers_are_not_offloaded():
    """FSDP leaves them on the device, whole on every rank: intrinsic's are 2 bytes a weight."""
    words = ("method=intrinsic", "strategy=fsdp", "trainer.accelerator=gpu", "trainer.devices=2")
    kept, offloaded = tiny_estimate(*words), tiny_estimate(*words, "strategy.cpu_offload=true")
    buffers = 2 * 131_072
    assert size(kept, "adapters") > size(offloaded, "adapters") > buffers


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_fsdp_never_loads_the_whole(accelerator, tmp_path):
    folder = config_folder(tmp_path / "deep", num_hidden_layers=12)
    words = ("model=hf", f"model.path={folder}", f"trainer.accelerator={accelerator}")
    alone, sharded = tiny_estimate(*words), tiny_estimate(*words, "strategy=fsdp", "trainer.devices=4")
    assert sharded.phases["loading"] < alone.phases["loading"]


def test_init_that_needs_it_loads_the_whole():
    words = ("method=pissa", "quantization=nf4", "data.max_length=8")
    alone, sharded = tiny_estimate(*words), tiny_estimate(*words, "strategy=fsdp", "trainer.devices=2")
    assert sharded.phases["loading"] == alone.phases["loading"]


def test_bf16_halves_the_base_and_not_the_adapters():
    fp32, bf16 = tiny_estimate(), tiny_estimate("trainer.precision=bf16-true")
    assert size(bf16, "embeddings") * 2 == size(fp32, "embeddings")
    assert size(bf16, "adapters") == size(fp32, "adapters")


@pytest.mark.parametrize("words", [("method=qlora",), ("activation_checkpointing=blocks",)])
def test_runs_together_share_the_base_and_a_pass(words):
    words = *words, "data.max_length=32"
    alone, three = tiny_estimate(*words), estimate_of(config_of(*words), together=3)
    rows = tiny_estimate(*words, "data.micro_batch_size=6")
    for name in ("base", "quantisation scales", "embeddings"):
        assert size(three, name) == size(alone, name)
    own = ("adapters", "optimiser states", "gradients")
    assert [size(three, name) for name in own] == [3 * size(alone, name) for name in own]
    assert size(three, "activations") == size(rows, "activations")
    # One run keeps the gradients of its last step until it goes backward; no run keeps them through the pass of all.
    others = 2 * (size(alone, "adapters") + size(alone, "optimiser states"))
    assert three.phases["forward"] == rows.phases["forward"] - size(alone, "gradients") + others
    assert estimate_of(config_of(*words), together=2).peak < three.peak < 3 * alone.peak


@pytest.mark.parametrize("accumulate", [1, 2])
def test_runs_that_fill_a_pass_take_turns(accumulate):
    words = f"trainer.accumulate_grad_batches={accumulate}", "data.max_length=512"  # two rows of a run are a pass
    alone, three = tiny_estimate(*words), estimate_of(config_of(*words), together=3)
    own = ("adapters", "optimiser states")
    assert [size(three, name) for name in own] == [3 * size(alone, name) for name in own]
    assert size(three, "activations") == size(alone, "activations")
    # Rows that are short pass together, however many tokens they might have.
    others = sum(2 * size(alone, name) for name in (*own, "gradients"))
    assert three.phases["optimiser"] == alone.phases["optimiser"] + others
    assert (three.flops, three.tokens) == (3 * alone.flops, 3 * alone.tokens)
    if accumulate == 1:  # the gradients of a window are added up behind the pass
        assert three.bytes_moved == 3 * alone.bytes_moved


@pytest.mark.parametrize("length", [64, 200, 300, 512, 700])
def test_no_pass_takes_more_than_is_estimated_whatever_its_rows(length):
    draw, options = random.Random(0), StepOptions(rows=1, length=length, optimizer="adamw", together=16)
    planned, largest, most = math.prod(options.pass_shape), 0, 0
    for longest in (5, 40, length):
        for _ in range(100):
            tokens = [draw.randint(1, min(longest, length)) for _ in range(16)]
            passes = [tokens[run] for run in in_passes(tokens, "cpu")]
            largest = max(largest, *(sum(own) for own in passes))
            most = max(most, *(len(own) for own in passes))
    assert largest <= planned <= largest + length
    assert most == options.together


def test_pass_of_many_short_rows_holds_no_more_than_is_estimated():
    """Twelve runs of large adapters, whose rows might be as long as a pass and have eight tokens."""
    words, count, tokens = ("rank=r256", "data.micro_batch_size=1", "data.max_length=512"), 12, 8
    planned = estimate_of(config_of(*words), together=count)
    base = load_model(ModelConfig(name="tiny"), torch.float32).requires_grad_(False)
    group = RunGroup([str(number) for number in range(count)])
    group.base.template = base
    for member in group.members:
        model = copy_around_same_tensors(base)
        inject_adapters(model, LoRAConfig(rank=256))
        member.model, member.loss = model, SupervisedLoss(model)
        member.batch, member.random = random_batch(base.config.vocab_size, 1, tokens), random_states()
    group.members[0].loss.check(group.members[0].batch)
    passes = SharedPasses(group.base, group.members)
    (every,) = in_passes(count * [tokens], "cpu")
    taken = peak_allocation(lambda: passes.take(group.members[every]))
    own = sum(parameter.nbytes for parameter in trained_parameters(group.members[0].model))
    before = sum(size(planned, name) for name in ("base", "embeddings", "adapters", "optimiser states", "process"))
    assert count * own < taken <= 1.01 * (planned.peak - before)


def test_runs_together_under_fsdp_have_whole_adapters_in_a_pass():
    words = ("strategy=fsdp", "trainer.devices=2", "data.max_length=8", "rank=r64")
    alone, three = tiny_estimate(*words), estimate_of(config_of(*words), together=3)
    rows = tiny_estimate(*words, "data.micro_batch_size=6")
    whole = size(tiny_estimate("rank=r64"), "adapters")
    others = 2 * (whole // 2 + size(alone, "optimiser states"))
    assert three.phases["forward"] == rows.phases["forward"] - size(alone, "gradients") + others + 3 * whole
    assert size(three, "gradients") == 3 * whole
