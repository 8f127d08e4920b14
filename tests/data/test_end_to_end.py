"""Thoughts and calls of tools through training and generation, on a small model of Qwen3's shape."""

import json
from pathlib import Path

import pytest
import torch
from chat_templates import TRL
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_peft.__main__ import main
from lightning_peft.commands.adapted import layout_of, load_for_inference
from lightning_peft.inference.answer_rows import AnswerRows
from lightning_peft.inference.continuous_batching import Decoder
from lightning_peft.inference.generate import why_not_decoded
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.tiny import tiny_tokenizer

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"
ROOM = 300
"""Tokens that an answer may have."""
CITIES = ("Oslo", "Rome")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model folder with Qwen3's template."""
    folder, tokenizer = tmp_path_factory.mktemp("qwen3"), tiny_tokenizer()
    tokenizer.chat_template = (TRL / "qwen3.jinja").read_text()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(model, path, run_dir, *words):
    common = ["model=hf", f"model.path={model}", "method=full", "optimizer.lr=0.005", "data.micro_batch_size=2"]
    assert main(["train", *common, f"data={path}", f"run_dir={run_dir}", *words]) == 0
    return json.loads((run_dir / "result.json").read_text())


def answered(run_dir, prompt, capsys, *words):
    capsys.readouterr()
    assert (
        main(["generate", f"adapter_path={run_dir}", f"prompt={prompt}", f"sampling.max_new_tokens={ROOM}", *words])
        == 0
    )
    return capsys.readouterr().out.strip()


def generated_tokens(run_dir, prompt):
    """Return an answer's tokens, special ones among them, as the decoder of `generate` writes it; and the tokenizer."""
    model, tokenizer = load_for_inference(str(run_dir), None, "auto")
    assert why_not_decoded(model) is None
    layout = layout_of(str(run_dir), tokenizer)
    ids = layout.prompt(layout.conversation(prompt), tokenizer)
    decoder = Decoder(model)
    (row,) = AnswerRows(model, tokenizer, [ids], SamplingConfig(max_new_tokens=ROOM)).rows
    decoder.add(row)
    while decoder.rows:
        decoder.step()
    return row.tokens, tokenizer


@pytest.mark.slow
def test_trained_call_is_generated_and_generation_stops_behind_it(model, tmp_path, capsys):
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    rows = []
    for city in CITIES:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        turns = [
            {"role": "user", "content": city},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": "3 C"},
            {"role": "assistant", "content": f"{city}: 3 C"},
        ]
        rows.append({"messages": turns, "tools": [tool]})
    path = write(tmp_path / "calls.jsonl", rows)
    words = ["data.max_length=1200", "data.validation_fraction=0", "trainer.max_steps=300", "data.packing=false"]
    result = train(model, path, tmp_path / "run", *words)
    assert result["train_loss"] < 0.1
    for city in CITIES:
        # The template writes an empty thought before a call that ends the conversation.
        call = json.dumps({"name": "weather", "arguments": {"city": city}})
        expected = f"<think>\n\n</think>\n\n<tool_call>\n{call}\n</tool_call>"
        assert answered(tmp_path / "run", city, capsys) == expected
        tokens, tokenizer = generated_tokens(tmp_path / "run", city)
        assert tokenizer.decode(tokens) == f"{expected}<|im_end|>" and len(tokens) < ROOM


@pytest.mark.slow
def test_thought_and_answer_are_learned_and_end(model, tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | thought]}
        for question, answer, thought in (
            ("2+2?", "4", {"reasoning_content": "Two and two."}),
            ("3+3?", "6", {"reasoning_content": "Three twice."}),
        )
    ]
    path = write(tmp_path / "thoughts.jsonl", rows)
    words = ["data.max_length=256", "data.validation_fraction=0", "trainer.max_steps=150"]
    assert train(model, path, tmp_path / "run", *words)["train_loss"] < 0.1
    assert answered(tmp_path / "run", "2+2?", capsys) == "<think>\nTwo and two.\n</think>\n\n4"
    assert answered(tmp_path / "run", "3+3?", capsys) == "<think>\nThree twice.\n</think>\n\n6"


def gsm8k_rows():
    rows = []
    for line in GSM8K.read_text().splitlines():
        row = json.loads(line)
        working, _, number = row["answer"].partition("\n#### ")
        answer = {"role": "assistant", "content": number, "reasoning_content": working}
        rows.append({"messages": [{"role": "user", "content": row["question"]}, answer]})
    return rows


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_file(), reason="gsm8k is not here")
def test_gsm8k_with_its_working_as_thoughts(model, tmp_path):
    path = write(tmp_path / "gsm8k.jsonl", gsm8k_rows()[:200])
    words = ["data.max_length=1024", "trainer.max_steps=40", "data.max_validation_rows=8"]
    result = train(model, path, tmp_path / "run", *words)
    counts = result["data"]
    assert counts["ended"] == counts["samples"] - counts["truncated"]
    assert result["validation_loss"] < 0.6 * 5.6  # a random model has log(vocabulary)


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_file(), reason="gsm8k is not here")
def test_gsm8k_answer_is_thought_out_and_stops_at_its_end(model, tmp_path, capsys):
    """The end token is generated, is the last one, and comes before the room for the answer is used up."""
    rows = sorted(gsm8k_rows(), key=lambda row: len(json.dumps(row)))[:4]
    path = write(tmp_path / "gsm8k.jsonl", rows)
    words = ["data.max_length=512", "data.validation_fraction=0", "trainer.max_steps=250"]
    assert train(model, path, tmp_path / "run", *words)["train_loss"] < 0.1
    for row in rows:
        question, answer = row["messages"]
        tokens, tokenizer = generated_tokens(tmp_path / "run", question["content"])
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert len(tokens) < ROOM and tokens.index(end) == len(tokens) - 1
        said = f"<think>\n{answer['reasoning_content']}\n</think>\n\n{answer['content']}"
        assert tokenizer.decode(tokens[:-1]) == said
    assert answered(tmp_path / "run", question["content"], capsys) == said
