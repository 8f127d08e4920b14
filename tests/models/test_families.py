"""Families of transformers through what users do with them, each against plain transformers and HF PEFT.

The families people use most are in the default suite, every other one is marked families; so is what starts commands.
"""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import EVERY, MOST_USED, small_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.merged import MergeError, Receipt, merge
from lightning_peft.checkpoint.peft_check import objection_of_peft
from lightning_peft.checkpoint.peft_format import file_tensors, save_adapter
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.attention import supports_packing
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.quantization.weights import is_transposed

GENERATOR_SEED = 3
LENGTHS = (23, 30, 14, 19)


def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    return [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]


def batch(packing: bool):
    encoded = [Encoded(ids.tolist(), [-100, *ids[1:].tolist()], True) for ids in samples()]
    rows = [encoded[:2], encoded[2:]] if packing else [[sample] for sample in encoded]
    return collate(rows, 0, 56 if packing else 32, packing)


def own_loss(model: PreTrainedModel) -> torch.Tensor:
    """Cross entropy of transformers' logits of each sample by itself."""
    logits = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in samples()]
    return sum(F.cross_entropy(x[:-1], ids[1:], reduction="sum") for x, ids in zip(logits, samples(), strict=True))


def own_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=samples()[1][None], use_cache=False).logits.float()


class Family:
    """A small random model of a family in a folder, and ways to load it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        model = small_model(name)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        self.config = ModelConfig("hf", str(folder))

    def ours(self) -> PreTrainedModel:
        return load_model(self.config, torch.float32)

    def plain(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def adapted(self) -> tuple[PreTrainedModel, LoRAConfig]:
        model, config = self.ours(), LoRAConfig(rank=4)
        torch.manual_seed(0)
        inject_adapters(model, config)
        with torch.no_grad():
            for tensor in file_tensors(model).values():
                tensor.add_(0.05 * torch.randn(tensor.shape))
        return model.eval(), config

    def summed(self, model: PreTrainedModel) -> PreTrainedModel:
        """Plain transformers with scaling B A added to its weights."""
        plain = self.plain()
        with torch.no_grad():
            for name, layer in adapters(model):
                change = layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight)
                plain.get_submodule(name).weight.add_(change.t() if is_transposed(layer.base_layer) else change)
        return plain


def close(logits: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """fp32 through other kernels and orders of summation."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def check_load(family: Family) -> None:
    ours, plain = family.ours().state_dict(), family.plain().state_dict()
    assert ours.keys() == plain.keys()
    assert [name for name in ours if not torch.equal(ours[name], plain[name])] == []


def check_loss(family: Family) -> None:
    with torch.no_grad():
        got, expected = SupervisedLoss(family.ours())(batch(packing=False)), own_loss(family.plain())
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)


def check_packed(family: Family) -> None:
    objective = SupervisedLoss(family.ours())
    with torch.no_grad():
        if not supports_packing(objective.model):
            with pytest.raises(RuntimeError, match="packed samples would see each other|see each other"):
                objective(batch(packing=True))
            return
        torch.testing.assert_close(objective(batch(packing=True)), own_loss(family.plain()), rtol=2e-5, atol=0)
        assert objective.packing_difference < 1e-4


def check_adapted(family: Family) -> None:
    model, _ = family.adapted()
    close(own_logits(model), own_logits(family.summed(model)))


def check_trains(family: Family) -> None:
    model = family.ours()
    torch.manual_seed(0)
    inject_adapters(model, LoRAConfig(rank=4))
    objective = SupervisedLoss(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = objective(batch(packing=False))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        objective.eval()(batch(packing=False))


def check_peft(family: Family) -> None:
    model, config = family.adapted()
    save_adapter(model, config, family.folder / "adapter", str(family.folder))
    plain = family.plain()
    objection = objection_of_peft(family.folder / "adapter", model)
    assert (objection is not None) is (family.name in [*REFUSED_BY_PEFT, *OTHER_IN_PEFT]), objection
    if family.name in REFUSED_BY_PEFT:
        with pytest.raises(ValueError, match=REFUSED_BY_PEFT[family.name]):
            PeftModel.from_pretrained(plain, str(family.folder / "adapter"))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(plain, str(family.folder / "adapter")).eval()
    if family.name in OTHER_IN_PEFT:
        assert float((own_logits(theirs) - own_logits(model)).abs().max()) > 1e-2, "PEFT reads it now: shorten the list"
        return
    close(own_logits(theirs), own_logits(model))


def check_merge(family: Family) -> None:
    model, _ = family.adapted()
    if family.name == "zamba2":
        with pytest.raises(MergeError, match="share one weight"):
            merge(model, tiny_tokenizer(), family.folder / "merged", [samples()[0][None]])
        return
    expected = own_logits(family.summed(model))
    receipt = merge(model, tiny_tokenizer(), family.folder / "merged", [samples()[0][None]])
    assert isinstance(receipt, Receipt) and receipt.recovered > 0.99
    merged = AutoModelForCausalLM.from_pretrained(family.folder / "merged", dtype=torch.float32).eval()
    close(own_logits(merged), expected)


def check_generate(family: Family) -> None:
    if family.name == "xlstm":
        pytest.skip("transformers 5.24 hands xLSTM a cache that it cannot use")
    model, tokenizer = family.ours(), tiny_tokenizer()
    ids = [sample.tolist() for sample in samples()]
    prompts = [ids[0][:10] + row[:length] for row, length in zip(ids, (3, 9, 12, 9), strict=True)]
    sampling = SamplingConfig(max_new_tokens=6)
    together = generate_batch(model, tokenizer, prompts, sampling)
    assert together == [generate_batch(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]


def check_commands(family: Family) -> None:
    """Train with the defaults, twice in one go and once in two; evaluate, generate and merge."""
    folder = family.folder
    rows = [{"prompt": f"Add {a} and {b}.", "completion": f"It is {a + b}."} for a in range(4) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "train", "model=hf", f"model.path={folder}", "data=jsonl", f"data.train_path={folder}/rows.jsonl",
        f"data.validation_path={folder}/rows.jsonl", "data.max_length=56", "data.cache_dir=null", "rank=r4",
        "data.micro_batch_size=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "schedule=constant",
        "checkpoint.every_n_steps=2",
    ]  # fmt: skip
    assert main([*words, f"run_dir={folder}/whole", "trainer.max_steps=4"]) == 0
    for steps in (2, 4):
        assert main([*words, f"run_dir={folder}/halves", f"trainer.max_steps={steps}", "resume=auto"]) == 0
    whole, halves = (folder / run / "adapter/adapter_model.safetensors" for run in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()
    assert main(["evaluate", f"adapter_path={folder}/whole", "max_rows=4"]) == 0
    result = json.loads((folder / "whole/result.json").read_text())
    scores = json.loads((folder / "whole/evaluation.json").read_text())
    assert scores["adapter"]["loss"] == pytest.approx(result["validation_loss"], rel=1e-4)
    (folder / "prompts.txt").write_text("Add 1 and 2.\nAdd 3.\n")
    words = [f"adapter_path={folder}/whole", "sampling.max_new_tokens=4"]
    assert main(["generate", *words, f"prompt_path={folder}/prompts.txt", f"output={folder}/answers.jsonl"]) == 0
    assert main(["merge", f"adapter_path={folder}/whole", f"output={folder}/merged_run"]) == 0


REFUSED_BY_PEFT = dict.fromkeys(["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"], "incompatible")
"""Families whose out_proj PEFT does not adapt."""
OTHER_IN_PEFT = {"deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "exaone_moe", "afmoe", "qwen3_next"}
"""Families whose dense and shared experts PEFT 0.21 takes for stacked ones (huggingface/peft issue 3711)."""

QUICK = {
    "load": check_load, "loss": check_loss, "packed": check_packed, "adapted": check_adapted, "peft": check_peft,
    "merge": check_merge, "generate": check_generate, "trains": check_trains,
}  # fmt: skip


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", QUICK)
@pytest.mark.parametrize("family", MOST_USED, indirect=True)
def test_most_used_family(family: Family, check: str) -> None:
    QUICK[check](family)


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", QUICK)
@pytest.mark.parametrize("family", [name for name in EVERY if name not in MOST_USED], indirect=True)
def test_family(family: Family, check: str) -> None:
    QUICK[check](family)


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_commands(name: str, tmp_path: Path) -> None:
    check_commands(Family(name, tmp_path))
