"""Training, samples, evaluate and generate build prompts alike: by what is saved with the adapter."""

import json

import pytest
import torch

from lightning_peft.__main__ import main
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.answer_rows import ends_of
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer

TRAIN = [
    "train", "model=tiny", "data=jsonl", "data.micro_batch_size=2", "trainer.max_steps=2", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "validation.every_n_steps=1", "validation.samples=2", "data.cache_dir=null",
]  # fmt: skip


def train(folder, rows, *words):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*TRAIN, f"data.train_path={path}", f"run_dir={folder}/run", *words]) == 0
    return folder / "run"


def test_text_run_is_generated_from_without_a_chat_template(tmp_path, capsys):
    run = train(tmp_path, [{"text": f"Story number {n} begins here."} for n in range(40)])
    layout = PromptLayout.load(run / "adapter")
    tokenizer = tiny_tokenizer()
    assert layout.kind == "text" and layout.stop_token_ids == [tokenizer.eos_token_id]
    ids = layout.prompt(layout.conversation("Story number"), tokenizer)
    assert ids == tokenizer("Story number")["input_ids"]
    words = ["generate", f"adapter_path={run}", "prompt=Story number", "sampling.max_new_tokens=2"]
    assert main(words) == 0
    assert main([*words, "system_prompt=Be brief"]) == 2
    assert "the adapter was trained on text without turns" in capsys.readouterr().err


def test_samples_ask_for_the_last_answer_where_a_conversation_ends_with_the_user(tmp_path):
    turns = [("user", "Hi"), ("assistant", "Hello there."), ("user", "Thanks, bye")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    run = train(tmp_path, [row] * 40, "data.validation_fraction=0.2")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["reference"] for sample in samples} == {"Hello there."}
    assert all(sample["prompt"].endswith("Hi<|im_end|>\n<|im_start|>assistant\n") for sample in samples)


def test_empty_system_prompt_is_the_same_in_training_and_generation(tmp_path):
    run = train(tmp_path, [{"prompt": f"Q{n}", "completion": "A"} for n in range(20)], "data.system_prompt=''")
    layout = PromptLayout.load(run / "adapter")
    assert layout.system_prompt == ""
    text = tiny_tokenizer().decode(layout.prompt(layout.conversation("Q"), tiny_tokenizer()))
    assert text == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_evaluate_on_other_rows_keeps_the_layout_and_counts_them(tmp_path, capsys):
    rows = [{"prompt": f"How many is {n}", "completion": f"It is {n}"} for n in range(60)]
    run = train(tmp_path, rows, "data.system_prompt=Be_terse.", "data.max_validation_rows=2")
    words = ["evaluate", f"adapter_path={run}", "data=jsonl", f"data.train_path={tmp_path}/rows.jsonl"]
    words += [f"data.validation_path={tmp_path}/rows.jsonl", "data.cache_dir=null", "max_rows=7", "precision=32-true"]
    assert main([*words, "models=adapter"]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert (report["rows"], report["loss_rows"]) == (7, 7)
    assert "data.system_prompt='Be_terse.', as in training" in capsys.readouterr().err


def test_task_on_text_rows_is_refused_before_loading(tmp_path, capsys):
    run = train(tmp_path, [{"text": f"Story number {n}."} for n in range(40)], "validation.samples=0")
    words = ["evaluate", f"adapter_path={run}", "data=jsonl", f"data.train_path={tmp_path}/rows.jsonl"]
    assert main([*words, "data.task=final_number", "data.cache_dir=null"]) == 2
    assert "data.task=final_number: needs rows with a question and its answer" in capsys.readouterr().err


def test_generation_stops_where_the_models_own_configuration_says():
    model, tokenizer = load_model(ModelConfig(name="tiny"), torch.float32), tiny_tokenizer()
    model.generation_config.eos_token_id = [0, 7]
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends_of(model, tokenizer) == {0, 7, turn_end, tokenizer.eos_token_id}


def test_prompt_file_is_cut_at_line_ends_only(tmp_path):
    from lightning_peft.commands.generate import read_prompts

    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefffirst\u2028still first\nsecond \x0c still second\r\nthird\x85still third\n".encode())
    prompts = [prompt.row["prompt"] for prompt in read_prompts(str(path))]
    assert prompts == ["first\u2028still first", "second \x0c still second", "third\x85still third"]
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_prompts(str(path))


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_on_replaced_rows_is_one_line(tmp_path, capsys, streaming):
    rows = [{"prompt": f"Q{n}", "completion": f"A{n}"} for n in range(60)]
    words = [f"data.streaming={streaming}", "data.shuffle_window=10", "data.packing=false", "data.micro_batch_size=1"]
    words.append("checkpoint.every_n_steps=1")
    train(tmp_path, rows, *words)
    capsys.readouterr()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"X{n}", "completion": "Y"}) + "\n" for n in range(25)))
    again = [*TRAIN, f"data.train_path={path}", f"run_dir={tmp_path}/run", *words, "trainer.max_steps=4", "resume=auto"]
    assert main(again) == 2
    assert "resumes, and its training rows are others now" in capsys.readouterr().err.strip().splitlines()[-1]
