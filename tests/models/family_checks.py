"""The checks of every family of models, each against plain transformers and HF PEFT.

A check returns nothing where the family passes, why it is refused where the refusal is one that the check expects, and
`NOT_APPLICABLE` where there is nothing to check; everything else is a failed assertion.
"""

import json
import re
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import OF_GGUF, small_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig, LoRAExperts
from lightning_peft.checkpoint.merged import MergeError, Receipt, merge
from lightning_peft.checkpoint.peft_check import objection_of_peft
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, file_tensors, load_adapter, save_adapter
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.attention import supports_packing
from lightning_peft.models.families import NOT_APPLICABLE, OK, families
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.experts import expert_stacks
from lightning_peft.quantization.linear import CodedWeight
from lightning_peft.quantization.quantize import dequantized_layer
from lightning_peft.quantization.weights import is_linear, is_transposed, linear_shape
from lightning_peft.serving.gguf_lora import read_gguf_lora, write_gguf_lora
from lightning_peft.serving.gguf_model import write_gguf_model
from lightning_peft.serving.plain import inject_pairs, plain_pairs

GENERATOR_SEED = 3
LENGTHS = (23, 30, 14, 19)
VOCABULARY = 320
"""Embeddings of a model that the tiny tokenizer goes with."""
BLOCK = 32
"""Block size of 4-bit codes: the width of small experts."""


def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    return [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]


def batch(packing: bool):
    encoded = [Encoded(ids.tolist(), [-100, *ids[1:].tolist()], True) for ids in samples()]
    rows = [encoded[:2], encoded[2:]] if packing else [[sample] for sample in encoded]
    return collate(rows, 0, 56 if packing else 32, packing)


def own_loss(model: PreTrainedModel) -> torch.Tensor:
    """Return the cross entropy of transformers' logits of each sample by itself."""
    logits = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in samples()]
    return sum(F.cross_entropy(x[:-1], ids[1:], reduction="sum") for x, ids in zip(logits, samples(), strict=True))


def own_logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=samples()[1][None], use_cache=False).logits.float()


class Family:
    """A small random model of a family in a folder, and ways to load it."""

    def __init__(self, name: str, folder: Path, **options: object):
        self.name, self.folder = name, folder
        sizes = {"vocab_size": VOCABULARY}
        if name in ("gemma3n_text", "gemma4_text"):
            sizes["vocab_size_per_layer_input"] = VOCABULARY
        model = small_model(name, **sizes, **options)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        self.config = ModelConfig("hf", str(folder))

    def ours(self, quantization: QuantizationConfig | None = None) -> PreTrainedModel:
        return load_model(self.config, torch.float32, quantization)

    def plain(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def adapted(self, **options: object) -> tuple[PreTrainedModel, LoRAConfig]:
        model, config = self.ours(), LoRAConfig(rank=4, **options)
        torch.manual_seed(0)
        inject_adapters(model, config)
        with torch.no_grad():
            for tensor in file_tensors(model).values():
                tensor.add_(0.05 * torch.randn(tensor.shape))
        return model.eval(), config

    def summed(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return plain transformers with scaling B A added to its weights."""
        plain = self.plain()
        with torch.no_grad():
            for name, layer in adapters(model):
                if isinstance(layer, LoRAExperts):
                    change = layer.scaling * (layer.lora_B @ layer.lora_A)
                    plain.get_parameter(name).add_(change.mT if layer.base_layer.transposed else change)
                    continue
                change = layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight)
                changed = plain.get_submodule(name)
                # A new parameter, as blocks may share one.
                changed.weight = nn.Parameter(changed.weight + (change.t() if is_transposed(changed) else change))
        return plain

    def train_words(self) -> list[str]:
        """Return the words of a training with the defaults on rows of its own."""
        rows = [{"prompt": f"Add {a} and {b}.", "completion": f"It is {a + b}."} for a in range(4) for b in range(4)]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [
            "model=hf", f"model.path={self.folder}", "data=jsonl", f"data.train_path={self.folder}/rows.jsonl",
            f"data.validation_path={self.folder}/rows.jsonl", "data.max_length=56", "data.cache_dir=null", "rank=r4",
            "trainer.accelerator=cpu", "trainer.precision=32-true", "schedule=constant",
        ]  # fmt: skip


Check = Callable[[Family], str | None]
"""A check returns what is to be said of a family; None where all is right."""


def compare(family: Family, check: str, run: Check) -> None:
    """Run a check and compare what it found to the record's cell."""
    cell, expected = run(family) or OK, families()[family.name].cells[check]
    # The text behind a colon may be another package's words, which change with its version.
    assert cell.partition(": ")[0] == expected.partition(": ")[0]


def close(logits: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Compare in fp32, through other kernels and orders of summation."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def refused(error: BaseException) -> str:
    """Return what a refusal says, without folders and in one line."""
    return re.sub(r"(/[\w.=-]+)+/([\w.-]+)", r"\2", " ".join(str(error).split()))


def losses_of(model: PreTrainedModel, steps: int) -> list[float]:
    """Train a new adapter so many steps; return the loss of each."""
    torch.manual_seed(0)
    inject_adapters(model, LoRAConfig(rank=4))
    objective = SupervisedLoss(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = objective(batch(packing=False))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.inference_mode():
        objective.eval()(batch(packing=False))
    return losses


def check_load(family: Family) -> None:
    ours, plain = family.ours().state_dict(), family.plain().state_dict()
    assert ours.keys() == plain.keys()
    assert [name for name in ours if not torch.equal(ours[name], plain[name])] == []


def check_loss(family: Family) -> None:
    with torch.no_grad():
        got, expected = SupervisedLoss(family.ours())(batch(packing=False)), own_loss(family.plain())
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)


def check_pack(family: Family) -> str | None:
    objective = SupervisedLoss(family.ours())
    with torch.no_grad():
        if not supports_packing(objective.model):
            with pytest.raises(RuntimeError, match="packed samples would see each other|see each other"):
                objective(batch(packing=True))
            return "its samples would see each other; data.packing=auto trains them unpacked"
        torch.testing.assert_close(objective(batch(packing=True)), own_loss(family.plain()), rtol=2e-5, atol=0)
        assert objective.packing_difference < 1e-4
    return None


def check_adapt(family: Family) -> None:
    model, _ = family.adapted()
    close(own_logits(model), own_logits(family.summed(model)))


def check_train(family: Family) -> None:
    losses = losses_of(family.ours(), 20)
    assert losses[-1] < losses[0]


def check_nf4(family: Family) -> str | None:
    # Small models have layers narrower than a block, which no real one has.
    narrow = [
        name for name, layer in family.ours().named_modules() if is_linear(layer) and linear_shape(layer)[1] % BLOCK
    ]
    config = QuantizationConfig(Kind.nf4, block_size=BLOCK, exclude=narrow)
    stacks = expert_stacks(family.ours())
    if any(not stack.opens for stack in stacks.values()):
        with pytest.raises(ValueError, match="holds its experts in one 3-D parameter") as error:
            family.ours(config)
        return refused(error.value)
    model, dense = family.ours(config), family.ours(config)
    coded = [name for name, layer in dense.named_modules() if isinstance(layer, CodedWeight)]
    assert coded
    for name in coded:
        dense.set_submodule(name, dequantized_layer(dense.get_submodule(name)))
    close(own_logits(model), own_logits(dense))
    losses = losses_of(model, 8)
    assert losses[-1] < losses[0]
    return None


def check_experts(family: Family) -> str | None:
    stacks = expert_stacks(family.ours())
    if not stacks:
        with pytest.raises(ValueError, match="has no experts stacked"):
            family.adapted(experts=2)
        return NOT_APPLICABLE
    if not any(stack.opens for stack in stacks.values()):
        with pytest.raises(ValueError, match="multiplied by code of its own, which no adapter covers") as error:
            family.adapted(experts=2)
        return refused(error.value)
    model, _ = family.adapted(experts=2)
    assert any(isinstance(layer, LoRAExperts) for _, layer in adapters(model))
    close(own_logits(model), own_logits(family.summed(model)))
    return None


def check_peft(family: Family) -> str | None:
    model, config = family.adapted()
    save_adapter(model, config, family.folder / "adapter", str(family.folder))
    plain = family.plain()
    objection = objection_of_peft(family.folder / "adapter", model)
    assert (objection is not None) is (family.name in [*REFUSED_BY_PEFT, *OTHER_IN_PEFT]), objection
    if family.name in REFUSED_BY_PEFT:
        with pytest.raises(ValueError, match=REFUSED_BY_PEFT[family.name]):
            PeftModel.from_pretrained(plain, str(family.folder / "adapter"))
        return objection
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(plain, str(family.folder / "adapter")).eval()
    if family.name in OTHER_IN_PEFT:
        assert float((own_logits(theirs) - own_logits(model)).abs().max()) > 1e-2, "PEFT reads it now: shorten the list"
        return objection
    close(own_logits(theirs), own_logits(model))
    return None


def check_from_peft(family: Family) -> str | None:
    """Check an adapter of all linear layers, or of the attention where that one changes routers, which is refused."""
    theirs = peft_model(family, "all-linear")
    if isinstance(theirs, str):
        return theirs
    try:
        read_from_peft(family, theirs)
    except ValueError as error:
        refusal = r"(gate|router) \(\w+\) are no linear layers|belongs to stacked experts, which"
        assert re.search(refusal, str(error)), error
        attention = peft_model(family, ["q_proj", "k_proj", "v_proj", "o_proj"])
        assert not isinstance(attention, str)
        read_from_peft(family, attention)
        return "an adapter of all linear layers changes the router too, which is refused; one of the attention is read"
    return None


def peft_model(family: Family, targets: str | list[str]) -> PeftModel | str:
    """Return a model of HF PEFT with random factors, or why PEFT refuses these layers."""
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    try:
        model = get_peft_model(family.plain(), config).eval()
    except ValueError as error:
        assert family.name in REFUSED_BY_PEFT, error
        return f"HF PEFT does not adapt all its linear layers: {refused(error)[:120]}"
    if family.name == "jamba":
        for name, parameter in model.named_parameters():
            if "dt_proj.lora_B" in name:  # PEFT adapts it in vain, so training leaves it at zero
                nn.init.zeros_(parameter)
    return model


def read_from_peft(family: Family, theirs: PeftModel) -> None:
    folder = family.folder / "from_peft"
    theirs.save_pretrained(folder)
    ours = family.ours()
    inject_adapters(ours, adapter_config_from_peft(folder))
    load_adapter(ours, folder)
    if family.name == "rwkv":  # for evaluation it divides weights and not what PEFT adds to them
        theirs.train()
    close(own_logits(ours.eval()), own_logits(theirs))


def check_merge(family: Family) -> str | None:
    model, _ = family.adapted()
    if family.name == "zamba2":
        with pytest.raises(MergeError, match="share one weight") as error:
            merge(model, tiny_tokenizer(), family.folder / "merged", [samples()[0][None]])
        return refused(error.value)
    expected = own_logits(family.summed(model))
    receipt = merge(model, tiny_tokenizer(), family.folder / "merged", [samples()[0][None]])
    assert isinstance(receipt, Receipt) and receipt.recovered > 0.99
    merged = AutoModelForCausalLM.from_pretrained(family.folder / "merged", dtype=torch.float32).eval()
    close(own_logits(merged), expected)
    return None


def check_generate(family: Family) -> str | None:
    model, tokenizer = family.ours(), tiny_tokenizer()
    ids = [sample.tolist() for sample in samples()]
    prompts = [ids[0][:10] + row[:length] for row, length in zip(ids, (3, 9, 12, 9), strict=True)]
    sampling = SamplingConfig(max_new_tokens=6)
    together = generate_batch(model, tokenizer, prompts, sampling)
    assert together == [generate_batch(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    return None


def check_gguf(family: Family) -> str | None:
    # A model that llama.cpp computes as transformers does: without a window that it lacks, or weights that it scales.
    model = small_model(family.name, **{"vocab_size": VOCABULARY, **OF_GGUF.get(family.name, {})})
    path = family.folder / "model.gguf"
    try:
        write_gguf_model(model, tiny_tokenizer(), PromptLayout(), path, "fp32", None, "small")
    except ValueError as error:
        assert re.search("the metadata of [a-z0-9_-]+ is not known here", str(error)), error
        return refused(error)
    read = load_model(ModelConfig("hf", str(path)), torch.float32)
    close(own_logits(read), own_logits(model))
    return None


def check_gguf_lora(family: Family) -> str | None:
    model, _ = family.adapted()
    path = family.folder / "adapter.gguf"
    try:
        write_gguf_lora(plain_pairs(model), model, path, "small")
    except ValueError as error:
        assert re.search("llama.cpp's layout of [a-z0-9_-]+ is not known here", str(error)), error
        return refused(error)
    fresh = family.ours()
    inject_pairs(fresh, read_gguf_lora(path, fresh, list(plain_pairs(model))))
    close(own_logits(fresh.eval()), own_logits(model))
    return None


def check_resume(family: Family) -> None:
    """Train by the command with the defaults, in one go and in two."""
    folder = family.folder
    words = ["train", *family.train_words(), "data.micro_batch_size=2", "checkpoint.every_n_steps=2"]
    assert main([*words, f"run_dir={folder}/whole", "trainer.max_steps=4"]) == 0
    for steps in (2, 4):
        assert main([*words, f"run_dir={folder}/halves", f"trainer.max_steps={steps}", "resume=auto"]) == 0
    whole, halves = (folder / run / "adapter/adapter_model.safetensors" for run in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()


def check_evaluate(family: Family) -> str | None:
    """Score, generate with and merge the run of `check_resume` by the commands."""
    folder = family.folder
    assert main(["evaluate", f"adapter_path={folder}/whole", "samples=0"]) == 0
    result = json.loads((folder / "whole/result.json").read_text())
    scores = json.loads((folder / "whole/evaluation.json").read_text())
    assert scores["adapter"]["loss"] == pytest.approx(result["validation_loss"], rel=1e-4)
    (folder / "prompts.txt").write_text("Add 1 and 2.\nAdd 3.\n")
    words = [f"adapter_path={folder}/whole", "sampling.max_new_tokens=4"]
    generates = ["generate", *words, f"prompt_path={folder}/prompts.txt", f"output={folder}/answers.jsonl"]
    merges = ["merge", f"adapter_path={folder}/whole", f"output={folder}/merged_run"]
    lines = []
    for command in (generates, merges):
        with redirect_stderr(StringIO()) as said:
            status = main(command)
        if status != 0:
            assert status == 2 and re.search("share one weight", said.getvalue()), said.getvalue()
            lines.append(refused(ValueError(said.getvalue().strip().splitlines()[-1].removeprefix("error: "))))
    return "; ".join(lines) or None


REFUSED_BY_PEFT = dict.fromkeys(["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"], "incompatible")
"""Families whose out_proj PEFT does not adapt."""
OTHER_IN_PEFT = {
    "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "ernie4_5_moe", "exaone_moe", "afmoe", "hunyuan_v1_moe",
    "qwen3_next", "longcat_flash", "jamba", "rwkv",
}  # fmt: skip
"""Families whose dense and shared experts PEFT 0.21 takes for stacked ones (huggingface/peft issue 3711), Jamba,
whose dt_proj it adapts in vain, and RWKV, which divides weights for evaluation and no adapter of PEFT's."""

QUICK: dict[str, Check] = {
    "load": check_load, "loss": check_loss, "pack": check_pack, "adapt": check_adapt, "train": check_train,
    "nf4": check_nf4, "experts": check_experts, "generate": check_generate, "merge": check_merge, "peft": check_peft,
    "from_peft": check_from_peft, "gguf": check_gguf, "gguf_lora": check_gguf_lora,
}  # fmt: skip
"""Checks of a second or less."""
BY_COMMANDS: dict[str, Check] = {"resume": check_resume, "evaluate": check_evaluate}
"""Checks that run commands, in this order."""
