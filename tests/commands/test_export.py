"""`export` on small trained runs: what is written, what it says of engines, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.commands.adapted import load_for_inference
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig

RUN = [
    "train", "model=tiny", "data.max_rows=24", "data.max_validation_rows=4", "data.micro_batch_size=2",
    "trainer.max_steps=4", "trainer.accelerator=cpu", "trainer.precision=32-true", "optimizer.lr=0.01",
    "validation.samples=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "rslora"
    words = ["method=rslora", "adapter.rank_pattern={q_proj:4}", f"run_dir={folder}"]
    assert main([*RUN, *words]) == 0
    return folder


@pytest.fixture(scope="module")
def dora_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dora"
    assert main([*RUN, "method=dora", f"run_dir={folder}"]) == 0
    return folder


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_plain_is_the_adapter_in_hf_peft_with_prompt_and_lineage(run_dir, tmp_path, capsys):
    output = tmp_path / "plain"
    words = [
        f"adapter_path={run_dir}",
        f"output={output}",
        "format=plain",
        "base_name=org/tiny",
        "engine=[vllm,sglang]",
    ]
    assert main(["export", *words]) == 0
    said = capsys.readouterr().out
    assert (
        "sglang     computes it rightly" in said and "would compute it wrongly (rsLoRA)" not in said.split("lorax")[1]
    )
    ours, tokenizer = load_for_inference(str(run_dir), None, "32-true")
    theirs = PeftModel.from_pretrained(load_model(ModelConfig(name="tiny"), torch.float32), output).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=2e-5)
    lineage = read_lineage(output)
    assert lineage is not None and lineage.created_by == "lightning-peft export" and lineage.base_name == "tiny"
    receipt = json.loads((output / "export_receipt.json").read_text())
    assert receipt["mean_kl"] < 1e-9 and receipt["top1_agreement"] == 1
    layout = json.loads((output / "prompt_layout.json").read_text())
    assert layout["system_prompt"] in (output / "chat_template.jinja").read_text() and layout["stop_token_ids"] == [2]


def test_an_export_is_an_adapter_like_any_other(run_dir, tmp_path, capsys):
    output = tmp_path / "plain"
    assert main(["export", f"adapter_path={run_dir}", f"output={output}", "format=plain", "base_name=org/tiny"]) == 0
    answers = []
    for folder in (run_dir, output):
        capsys.readouterr()
        words = [f"adapter_path={folder}", "prompt=How many?", "sampling.max_new_tokens=6", "precision=32-true"]
        assert main(["generate", *words]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["format=gguf_lora", "engine=[llama_cpp]"], {"adapter.gguf"}),
        (["format=gguf", "dtype=q8_0"], {"model.gguf"}),
        (["format=ollama", "base_name=tiny:latest", "engine=[ollama]"], {"adapter.gguf", "Modelfile"}),
        (["format=ollama"], {"model.gguf", "Modelfile"}),
    ],
    ids=["gguf_lora", "gguf", "ollama_adapter", "ollama_merged"],
)
def test_files_of_each_format(words, files, run_dir, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["export", f"adapter_path={run_dir}", f"output={output}", *words]) == 0
    beside = {"export_receipt.json", "prompt_layout.json", "chat_template.jinja"}
    assert {path.name for path in output.iterdir()} == files | beside
    if "Modelfile" in files:
        base = "tiny:latest\nADAPTER ./adapter.gguf" if "base_name=tiny:latest" in words else "./model.gguf"
        assert (output / "Modelfile").read_text().startswith(f"FROM {base}\nTEMPLATE ")
        refuses = "Ollama from 0.34.1 on refuses a Modelfile with ADAPTER"
        assert (refuses in capsys.readouterr().err) is ("base_name=tiny:latest" in words)


def test_what_is_not_low_rank_is_written_whole(dora_run, tmp_path, capsys):
    whole = [f"adapter_path={dora_run}", f"output={tmp_path / 'whole'}", "format=gguf", "dtype=fp32"]
    assert main(["export", *whole, "engine=[llama_cpp]", "precision=32-true"]) == 0
    assert json.loads((tmp_path / "whole" / "export_receipt.json").read_text())["mean_kl"] < 1e-9
    for format in ("plain", "gguf_lora"):
        said = refused([f"adapter_path={dora_run}", f"output={tmp_path / 'x'}", f"format={format}"], capsys)
        assert "has DoRA, which is no low-rank sum; use format=gguf, or `lightning-peft merge`" in said
        assert "; svd_rank= makes the nearest one" in said
    cut = [f"adapter_path={dora_run}", f"output={tmp_path / 'cut'}", "format=gguf_lora", "svd_rank=64"]
    assert main(["export", *cut, "precision=32-true", "max_kl=0.1"]) == 0
    assert "svd_rank=64: loses" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "cut" / "svd_residual.json").read_text()).values()) <= {0.0}


REFUSED = {
    "no format": ([], "format=...: has to be given"),
    "our own name for the base": (["format=plain"], "base_name=null: the adapter's base is model=tiny, which only"),
    "one of our options": (["format=plain", "base_name=tiny"], "base_name=tiny: is our option's name"),
    "no such folder": (["format=plain", "base_name=./no/such"], "base_name=./no/such: no such folder, and not a hub"),
    "wrong engine": (["format=plain", "base_name=a/b", "engine=[llama_cpp]"], "does not read format=plain; use"),
    "unknown engine": (["format=gguf_lora", "engine=[lama]"], "engine=lama: no such engine in the table"),
    "dtype of an adapter": (["format=gguf_lora", "dtype=q8_0"], "dtype=q8_0: only format=gguf and ollama have one"),
    "rank below one": (["format=plain", "svd_rank=0"], "svd_rank=0: must be at least 1, or null"),
    "rank of a whole model": (["format=gguf", "svd_rank=4"], "svd_rank=4 format=gguf: a whole model has no rank"),
    "rank of one file": (["format=ollama", "svd_rank=4"], "svd_rank=4 format=ollama: base and adapter are one file"),
    "dtype beside a base": (["format=ollama", "base_name=a", "dtype=q8_0"], "base_name=a: an adapter alone is fp32"),
    "unknown dtype": (["format=gguf", "dtype=q4"], "dtype=q4: must be one of fp32, bf16, q8_0"),
    "base of a whole model": (["format=gguf", "base_name=a/b"], "base_name=a/b: only format=plain and ollama"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_words_get_one_line(case, run_dir, tmp_path, capsys):
    words, says = REFUSED[case]
    assert says in refused([f"adapter_path={run_dir}", f"output={tmp_path / 'out'}", *words], capsys)
    assert not (tmp_path / "out").exists()


def test_a_file_too_far_from_the_trained_model_is_not_left(run_dir, tmp_path, capsys):
    words = ["format=gguf", "dtype=q8_0", "max_kl=1e-12"]
    said = refused([f"adapter_path={run_dir}", f"output={tmp_path / 'out'}", *words], capsys)
    assert "not written, KL" in said and "is above max_kl=1e-12" in said
    assert not (tmp_path / "out").exists()


def test_train_checks_its_target_server_before_the_first_step(tmp_path, capsys):
    words = ["method=dora", "target_server=[vllm]", f"run_dir={tmp_path / 'run'}"]
    assert main([*RUN, *words]) == 2
    assert "target_server=vllm: vLLM cannot serve DoRA beside its base" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
