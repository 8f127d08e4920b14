"""Compiled training steps: the same numbers, one compilation for all batches, everything else uncompiled."""

import csv
import random
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.batch import Batch
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_config as tiny_config_of_transformers
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.compilation import compile_model, resolve_compilation
from lightning_peft.training.config import ActivationCheckpointing, Compilation

# PyTorch's own: its compiler instantiates every autograd function and looks at the gradient of every tensor it meets.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

WIDTH = 48


@pytest.fixture(autouse=True)
def forget_compilations():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def packed_batch(seed: int, rows: int = 1) -> Batch:
    """Return rows of two to five samples; their number and lengths depend on the seed."""
    draw = random.Random(seed)
    bounds = [0]
    for row in range(rows):
        cuts = sorted(draw.sample(range(4, WIDTH - 4), draw.randint(1, 4)))
        bounds += [row * WIDTH + place for place in (*cuts, WIDTH)]
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    ids = torch.tensor([draw.randrange(1, 200) for _ in range(rows * WIDTH)])
    labels = ids.clone()
    labels[bounds[:-1]] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    ids, labels, positions = (tensor.view(rows, WIDTH) for tensor in (ids, labels, positions))
    return Batch(
        ids, labels, positions, torch.tensor(bounds, dtype=torch.int32), max(lengths), rows * WIDTH,
        rows * WIDTH - len(lengths),
    )  # fmt: skip


def objective(mode: Compilation, checkpointing: str, kind: Kind, backend: str = "aot_eager") -> SupervisedLoss:
    model = load_model(ModelConfig(name="tiny"), torch.float32, QuantizationConfig(kind=kind))
    torch.manual_seed(0)
    inject_adapters(model, LoRAConfig(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    checkpoint_blocks(model, ActivationCheckpointing[checkpointing])
    compile_model(model, mode, backend)
    return SupervisedLoss(model).train()


def step(loss: SupervisedLoss, batch: Batch) -> list[Tensor]:
    """Take a step; return the loss and every gradient."""
    loss.zero_grad()
    value = loss(batch)
    value.backward()
    return [value.detach(), *(p.grad for p in loss.parameters() if p.grad is not None)]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("mode", "checkpointing", "kind"),
    [
        (Compilation.blocks, "none", Kind.nf4),
        (Compilation.blocks, "elementwise", Kind.none),
        slow(Compilation.blocks, "selective", Kind.none),
        slow(Compilation.blocks, "blocks", Kind.nf4),
        slow(Compilation.full, "none", Kind.nf4),
        slow(Compilation.full, "blocks", Kind.none),
        slow(Compilation.full, "selective", Kind.nf4),
    ],
)
def test_loss_and_gradients_are_those_without_compiling(mode, checkpointing, kind):
    plain, compiled = objective(Compilation.none, "none", kind), objective(mode, checkpointing, kind)
    for seed in range(2):
        torch.testing.assert_close(step(compiled, packed_batch(seed)), step(plain, packed_batch(seed)))
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize(("mode", "graphs"), [(Compilation.blocks, 2), slow(Compilation.full, 1)])
def test_packed_epochs_are_compiled_once(mode, graphs):
    plain, loss = objective(Compilation.none, "none", Kind.none), objective(mode, "none", Kind.none)
    for epoch in range(2):
        for seed in range(6):
            step(loss, packed_batch(10 * epoch + seed, rows=3))
        last = packed_batch(epoch, rows=2)  # the rest of the epoch follows
        torch.testing.assert_close(step(loss, last), step(plain, last))
        with torch.no_grad():
            loss.eval()(packed_batch(epoch, rows=3))
        loss.train()
    assert counters["stats"]["unique_graphs"] == graphs  # the input of the first block has no gradient


def test_equal_blocks_share_one_compilation():
    config = tiny_config_of_transformers()
    config.num_hidden_layers = 5
    model = AutoModelForCausalLM.from_config(config).train()
    inject_adapters(model, LoRAConfig(rank=4))
    compile_model(model, Compilation.blocks, "aot_eager")
    model(input_ids=torch.arange(6)[None], use_cache=False).logits.sum().backward()
    # The input of the first one needs no gradient.
    assert counters["stats"]["unique_graphs"] == 2


def test_generation_and_validation_are_not_compiled():
    loss = objective(Compilation.blocks, "none", Kind.none).eval()
    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    generate_batch(loss.model, tokenizer, [[5, 6, 7]], SamplingConfig(max_new_tokens=4))
    with torch.no_grad():
        loss(packed_batch(0))
    assert counters["stats"]["unique_graphs"] == 0


def test_automatic_compiles_nothing_without_a_gpu():
    for checkpointing in ActivationCheckpointing:
        assert resolve_compilation(Compilation.auto, "cpu", checkpointing) is Compilation.none
    assert resolve_compilation(Compilation.full, "cpu", ActivationCheckpointing.none) is Compilation.full


def test_machine_without_a_compiler_says_so_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"compile=blocks: this machine has no compiler \(g\+\+.*use compile=none"):
        train(tiny_config(tmp_path / "run", "compile=blocks"))
    assert not (tmp_path / "run").exists()


def test_machine_without_python_headers_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    with pytest.raises(ValueError, match=r"compile=blocks: this machine has no Python\.h in .*use compile=none"):
        resolve_compilation(Compilation.blocks, "cpu", ActivationCheckpointing.none)


@pytest.mark.slow
def test_every_block_may_differ():
    config = tiny_config_of_transformers()
    config.num_hidden_layers = 12
    model = AutoModelForCausalLM.from_config(config).train()
    inject_adapters(model, LoRAConfig(rank=2, rank_last=13))
    compile_model(model, Compilation.blocks, "aot_eager")
    model(input_ids=torch.arange(6)[None], use_cache=False).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] == 12


def test_offloaded_activations_are_refused():
    with pytest.raises(ValueError, match="compile=blocks activation_checkpointing=offload: .* use compile=none"):
        compose_config("train", ["model=tiny", "compile=blocks", "activation_checkpointing=offload"])


@pytest.mark.slow
def test_compiled_run_learns_what_a_plain_one_does(tmp_path: Path):
    columns = {}
    for mode in ("none", "blocks"):
        train(tiny_config(tmp_path / mode, f"compile={mode}", "trainer.max_steps=4", "validation.every_n_steps=2"))
        rows = list(csv.DictReader((tmp_path / mode / "metrics.csv").read_text().splitlines()))
        columns[mode] = [[float(row[key]) for key in ("loss", "grad_norm")] for row in rows if row["loss"]]
    assert len(columns["none"]) == 4
    torch.testing.assert_close(torch.tensor(columns["blocks"]), torch.tensor(columns["none"]), rtol=1e-4, atol=1e-6)
