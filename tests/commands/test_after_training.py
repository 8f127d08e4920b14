"""evaluate, generate and merge on a small trained run, and their words about damaged or foreign adapters."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest
import started
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_peft import progress
from lightning_peft.__main__ import main
from lightning_peft.checkpoint.merge_config import MergeConfig
from lightning_peft.checkpoint.merged import merge
from lightning_peft.commands.adapted import load_for_inference, saved_config
from lightning_peft.commands.merge import sample_ids
from lightning_peft.models import loading
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.runs.lock import only_maker

RUN = [
    "train", "model=tiny", "data.max_rows=40", "data.max_validation_rows=6", "data.micro_batch_size=2",
    "trainer.max_steps=12", "trainer.accelerator=cpu", "trainer.precision=32-true", "validation.every_n_steps=6",
]  # fmt: skip


def run(words, capsys=None):
    assert main(words) == 0
    return capsys.readouterr() if capsys else None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "lora"
    run([*RUN, "optimizer.lr=0.01", f"run_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def full_run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "full"
    run([*RUN, "method=full", "optimizer.lr=0.01", f"run_dir={folder}"])
    return folder


def test_run_folder_holds_what_the_design_says(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "adapter", "adapter_best", "metrics.csv", "result.json", "samples.jsonl"}
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == 12
    assert result["trainable_parameters"] == 32768 and result["tokens_per_second"] > 0
    assert {"torch", "lightning"} <= result["versions"].keys()


def test_validation_during_training_equals_the_one_at_the_end(run_dir):
    """The last validation inside fit and the final one see the same weights."""
    rows = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("validation_loss")
    losses = [row[column] for row in rows[1:] if row[column]]
    assert len(losses) == 3 and losses[1] == losses[2]


def test_hf_peft_loads_the_adapter_with_equal_logits(run_dir):
    """HF PEFT on a fresh base is held against our own reload; fp32, another order of summation."""
    ours, _ = load_for_inference(str(run_dir), None, "32-true")
    theirs = PeftModel.from_pretrained(load_model(ModelConfig(name="tiny"), torch.float32), run_dir / "adapter").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=2e-5)


def test_evaluate_scores_base_and_adapter(run_dir, capsys):
    run(["evaluate", f"adapter_path={run_dir}", "max_rows=6", "samples=1", "precision=32-true"], capsys)
    report = json.loads((run_dir / "evaluation.json").read_text())
    assert report["adapter"]["loss"] < report["base"]["loss"]
    result = json.loads((run_dir / "result.json").read_text())
    assert report["adapter"]["loss"] == pytest.approx(result["validation_loss"], rel=1e-5)
    assert 0 <= report["base"]["metrics"]["execution_accuracy"] <= 1


def test_generate_answers_one_prompt_and_a_file(run_dir, tmp_path, capsys):
    words = ["generate", f"adapter_path={run_dir}", "sampling.max_new_tokens=4"]
    run([*words, 'prompt=What\'s 1 + 1, "x" = (y'], capsys)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    run([*words, f"prompt_path={tmp_path}/prompts.txt", f"output={tmp_path}/answers.jsonl"])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "two"]
    assert torch.is_grad_enabled(), "a program that trains afterwards finds gradients as it left them"


def test_generate_answers_rows_of_json(run_dir, tmp_path, capsys):
    rows = [
        {"id": 7, "prompt": "one"},
        {"messages": [{"role": "user", "content": "one"}]},
        {"messages": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "one"}]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", str(run_dir), "sampling.max_new_tokens=4", f"prompt_path={tmp_path}/prompts.jsonl"]
    run([*words, f"output={tmp_path}/answers.jsonl"])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "answer"} for row in answers] == rows
    assert answers[0]["answer"] == answers[1]["answer"]


def test_generate_says_which_columns_are_no_part_of_a_prompt(run_dir, tmp_path, capsys):
    row = {"id": 7, "context": "c", "prompt": "one", "system": "Be brief."}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    words = ["generate", str(run_dir), "sampling.max_new_tokens=4", f"prompt_path={tmp_path}/prompts.jsonl"]
    said = run([*words, f"output={tmp_path}/answers.jsonl"], capsys).err
    assert "not part of the prompts, and written beside the answers: column 'context' (1 rows), column 'id'" in said
    assert json.loads((tmp_path / "answers.jsonl").read_text()).items() >= row.items()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "cut \\ud83d"}', "line 1: expected UTF-8 text, got half of a surrogate pair"),
        ('{"question": "one"}', "line 1: expected text under prompt, or turns under messages"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 1: its messages end in an answer"),
        ('{"prompt": "one", "answer": "x"}', "line 1: has a key answer"),
        ("{", "line 1"),
        ("\n", "the file has no row"),
    ],
)
def test_prompt_that_is_none_is_named(run_dir, tmp_path, capsys, row, message):
    (tmp_path / "prompts.jsonl").write_text(row + "\n")
    assert main(["generate", str(run_dir), f"prompt_path={tmp_path}/prompts.jsonl"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("last", ["", "exit", "/bye", "Quit"])
def test_chat_ends_as_chats_do(run_dir, monkeypatch, capsys, last):
    lines = iter(["hello", "/help", last])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    said = run(["generate", f"adapter_path={run_dir}", "sampling.max_new_tokens=4"], capsys)
    assert next(lines, None) is None
    assert said.out.count("\n") == 1 and said.err.count("ends the chat") == 2


def test_merge_writes_a_plain_model_and_a_receipt(run_dir, tmp_path, capsys):
    printed = run(["merge", f"adapter_path={run_dir}", f"output={tmp_path}/merged"], capsys).out
    receipt = re.search(r"merged against adapter .* KL (\S+) nats, same first choice for (\S+)%", printed)
    assert receipt is not None
    # Where logits are bf16 the first two are now and then equal, and rounding says which is first.
    assert float(receipt[1]) < 1e-6 and float(receipt[2]) > 99.5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weights = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    base = load_model(ModelConfig(name="tiny"), merged.dtype)  # it is bf16 where the processor has it
    name = "model.layers.0.mlp.up_proj"
    A, B = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = base.get_submodule(name).weight.float() + 2.0 * B @ A
    torch.testing.assert_close(merged.get_submodule(name).weight, expected.to(merged.dtype), rtol=1e-5, atol=1e-6)


def test_merge_leaves_its_receipt_as_a_file_and_says_it_once(run_dir, tmp_path, capsys):
    said = run(["merge", f"adapter_path={run_dir}", f"output={tmp_path / 'merged'}"], capsys)
    receipt = json.loads((tmp_path / "merged" / "merge_receipt.json").read_text())
    assert receipt["tokens"] > 0 and receipt["mean_kl"] < 1e-3
    assert (said.out + said.err).count(f"KL {receipt['mean_kl']:.2e} nats") == 1
    assert "it/s" not in said.err


def test_files_may_be_read_by_whom_the_umask_says(run_dir, tmp_path):
    """safetensors gives its files to the owner alone."""
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_mode == (run_dir / "config.yaml").stat().st_mode
    previous = os.umask(0o027)
    try:
        run(["merge", f"adapter_path={run_dir}", f"output={tmp_path / 'merged'}"])
    finally:
        os.umask(previous)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "merged").iterdir()}
    assert modes["model.safetensors"] == "0o640" and set(modes.values()) == {"0o640"}


def test_long_parts_tell_how_far_they_are(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOOKS", 0.001)
    read = loading.load_by_block

    def read_like_a_large_model(*arguments):
        time.sleep(0.2)  # `tiny` can be there before anybody looks
        return read(*arguments)

    monkeypatch.setattr(loading, "load_by_block", read_like_a_large_model)
    words = ["evaluate", f"adapter_path={run_dir}", "max_rows=6", "precision=32-true"]
    said = run(words, capsys).err.splitlines()
    assert any(re.fullmatch(r"answers  \d/6  .* left", line) for line in said)
    assert any(re.fullmatch(r"loss of the validation rows  \d/\d+  .*", line) for line in said)
    assert any(re.fullmatch(r"loading \S+  \d+ s so far", line) for line in said)
    assert "the base: loss of 6 validation rows, answers to 6" in said


def test_a_merge_in_fp32_keeps_every_first_choice(run_dir, tmp_path):
    model, tokenizer = load_for_inference(str(run_dir), None, "32-true")
    samples = sample_ids(saved_config(str(run_dir)), tokenizer)
    receipt = merge(model, tokenizer, tmp_path / "merged", samples, MergeConfig(), None)
    assert "same first choice for 100.00%" in str(receipt)


def test_merge_above_the_threshold_leaves_nothing(run_dir, tmp_path, capsys):
    words = ["merge", f"adapter_path={run_dir}", f"output={tmp_path}/m", "merge.dtype=fp16", "merge.max_kl=1e-15"]
    assert main(words) == 2
    assert "above merge.max_kl=1e-15" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_merge_refuses_a_used_folder(run_dir, capsys):
    assert main(["merge", f"adapter_path={run_dir}", f"output={run_dir}"]) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "adapter_path=RUN"],
        ["convert", "RUN", "rank=2"],
        ["export", "adapter_path=RUN", "format=gguf"],
    ],
    ids=["merge", "convert", "export"],
)
def test_folder_that_another_process_makes_is_refused(run_dir, tmp_path, capsys, words):
    output = tmp_path / "new" / "made"
    with only_maker(output):
        assert main([*(word.replace("RUN", str(run_dir)) for word in words), f"output={output}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: output={output}: process {os.getpid()} on ") and "writes it: wait for it" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.multi_process
def test_of_two_merges_into_one_folder_one_is_refused(run_dir, tmp_path):
    output = tmp_path / "merged"
    command = [*started.COMMAND, "merge", f"adapter_path={run_dir}", f"output={output}"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], texts
    refused = next(text for process, text in zip(both, texts, strict=True) if process.returncode)
    assert "Traceback" not in refused and f"error: output={output}: " in refused
    AutoModelForCausalLM.from_pretrained(output)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_full_fine_tuning_is_evaluated_against_its_base(full_run_dir, capsys):
    assert (full_run_dir / "model" / "config.json").exists() and not (full_run_dir / "adapter").exists()
    run(["evaluate", f"adapter_path={full_run_dir}", "max_rows=4", "samples=0", "precision=32-true"], capsys)
    report = json.loads((full_run_dir / "evaluation.json").read_text())
    assert report["adapter"]["loss"] < report["base"]["loss"]


def test_adapter_of_another_base_is_refused(run_dir, capsys):
    assert main(["evaluate", f"adapter_path={run_dir}", "model=tiny", "model.name=tiny_tied", "max_rows=4"]) == 2
    assert "this adapter was trained on tiny" in capsys.readouterr().err


def damaged(run_dir, tmp_path):
    shutil.copytree(run_dir / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_truncated_adapter_is_named(run_dir, tmp_path, capsys):
    folder = damaged(run_dir, tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert main(["evaluate", f"adapter_path={folder}", "max_rows=4"]) == 2
    assert str(path) in capsys.readouterr().err


def test_adapter_without_weights_is_named(run_dir, tmp_path, capsys):
    folder = damaged(run_dir, tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    assert main(["generate", f"adapter_path={folder}", "prompt=a"]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_damaged_lineage_is_named(run_dir, tmp_path, capsys):
    folder = damaged(run_dir, tmp_path)
    (folder / "lineage.json").write_text("{")
    assert main(["generate", f"adapter_path={folder}", "prompt=a"]) == 2
    assert "lineage.json: not JSON" in capsys.readouterr().err


def test_folder_without_an_adapter_is_named(tmp_path, capsys):
    assert main(["evaluate", f"adapter_path={tmp_path}"]) == 2
    assert "neither a run nor an adapter folder" in capsys.readouterr().err


@pytest.mark.parametrize("status", ["interrupted", "preempted", None])
def test_run_without_an_adapter_says_how_to_go_on(status, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    if status is not None:
        (tmp_path / "result.json").write_text(json.dumps({"status": status}))
    state = "this run has not ended" if status is None else f"this run is {status}"
    for words in (["evaluate", str(tmp_path)], ["merge", str(tmp_path), f"output={tmp_path}/merged"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"adapter_path={tmp_path}: {state}, and no adapter is saved yet" in said, said
        assert f"run_dir={tmp_path} resume=auto goes on with it" in said and "adapter_best" not in said
    best = tmp_path / "adapter_best"
    best.mkdir()
    (best / "adapter_config.json").write_text("{}")
    assert main(["evaluate", str(tmp_path)]) == 2
    assert f"{best} is the best it had" in capsys.readouterr().err


def test_damaged_checkpoint_is_named(run_dir, tmp_path, capsys):
    (tmp_path / "step.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    words = [*RUN, f"resume={tmp_path}/step.ckpt", f"run_dir={tmp_path}/run"]
    assert main(words) == 2
    assert f"{tmp_path}/step.ckpt: truncated or not a checkpoint" in " ".join(capsys.readouterr().err.split())


def test_trained_tokens_reach_hf_peft(tmp_path):
    """New tokens with trained embeddings: the rows PEFT loads are the rows we trained."""
    words = ["model.new_tokens=['<sql>']", "adapter.trainable_modules=[embed_tokens,lm_head]"]
    run([*RUN, *words, f"run_dir={tmp_path}/run"])
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    tokenizer = load_tokenizer(ModelConfig(name="tiny", new_tokens=["<sql>"]))
    embeddings = next(value for key, value in weights.items() if "embed_tokens" in key)
    assert embeddings.shape[0] > tokenizer.convert_tokens_to_ids("<sql>")
