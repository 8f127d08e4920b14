"""Answers by the mean of several draws of a BaLoRA adapter."""

import json

import pytest
import torch
from tiny_runs import tiny_config

from lightning_peft.__main__ import main
from lightning_peft.adapters.balora import BaLoRAConfig, InputVariance, sampling
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.commands.train import train
from lightning_peft.inference.drawn import generate_drawn
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer

PROMPT = list(range(70, 90))


def drawn_model(variance):
    """Return the tiny model with a BaLoRA that changes it a lot, its variance near the given one for any input."""
    torch.manual_seed(0)
    model = tiny_model().eval()
    inject_adapters(model, BaLoRAConfig(rank=4, alpha=8.0, target_modules="all_linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_B.weight.copy_(torch.randn(layer.lora_B.weight.shape, generator=generator) / 4)
        shared = next(module for module in model.modules() if isinstance(module, InputVariance))
        last = shared.variance_net[-1]
        last.weight.zero_()
        last.bias.fill_(torch.tensor(variance).expm1().log() if variance > 1e-6 else -40.0)
    return model.eval()


def test_without_variance_the_answer_is_the_plain_one():
    model, tokenizer = drawn_model(0.0), tiny_tokenizer()
    options = SamplingConfig(max_new_tokens=8)
    found = generate_drawn(model, tokenizer, PROMPT, options, 3)
    assert [found.text] == generate_batch(model, tokenizer, [PROMPT], options)
    assert abs(found.disagreement) < 1e-3 and 0 < found.confidence <= 1


def test_token_and_figures_are_those_of_the_mean_of_the_draws():
    model, tokenizer = drawn_model(4.0), tiny_tokenizer()
    found = generate_drawn(model, tokenizer, PROMPT, SamplingConfig(max_new_tokens=1, seed=5), 6)
    torch.manual_seed(5)
    with torch.no_grad(), sampling(model):
        p = model(input_ids=torch.tensor([PROMPT] * 6), use_cache=False).logits[:, -1].double().softmax(-1)
    mean = p.mean(0)
    total = -(mean * mean.log()).sum()
    own = -(p * p.log()).sum(-1).mean()
    assert found.text == tokenizer.decode([int(mean.argmax())], skip_special_tokens=True)
    assert found.entropy == pytest.approx(float(total), rel=1e-4)
    assert found.disagreement == pytest.approx(float(total - own), rel=1e-3) and found.disagreement > 0.01
    assert found.confidence == pytest.approx(float(mean.max()), rel=1e-4)
    again = generate_drawn(model, tokenizer, PROMPT, SamplingConfig(max_new_tokens=1, seed=5), 6)
    assert again == found


def test_commands_draw_and_refuse_what_draws_nothing(tmp_path, capsys):
    train(tiny_config(tmp_path / "bayes", "method=balora", "trainer.max_steps=2", "logger=none"))
    train(tiny_config(tmp_path / "plain", "trainer.max_steps=1", "logger=none"))
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    words = [f"prompt_path={tmp_path / 'p.txt'}", f"output={tmp_path / 'a.jsonl'}", "sampling.max_new_tokens=3"]
    assert main(["generate", f"adapter_path={tmp_path / 'bayes'}", "passes=3", *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two"]
    assert all(row["entropy"] > 0 and row.keys() >= {"answer", "disagreement", "confidence"} for row in rows)
    capsys.readouterr()
    assert main(["generate", f"adapter_path={tmp_path / 'bayes'}", "passes=2", "prompt=Hi", *words[2:]]) == 0
    assert "is disagreement of 2 draws; confidence" in capsys.readouterr().err
    assert main(["generate", f"adapter_path={tmp_path / 'plain'}", "passes=2", "prompt=Hi"]) == 2
    assert "passes=2: draws are of an adapter of method=balora" in capsys.readouterr().err
    assert main(["generate", f"adapter_path={tmp_path / 'bayes'}", "passes=2"]) == 2
    assert "passes=2: needs prompt= or prompt_path=" in capsys.readouterr().err
