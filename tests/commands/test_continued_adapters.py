"""A folder says what it is: how it is continued, which base it belongs to, its card, and what is sent to the hub."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_runs import TINY
from transformers import AutoModelForCausalLM

from lightning_peft.__main__ import main
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig

SHORT = ["trainer.max_steps=2", "data.max_validation_rows=2"]
SYSTEM = "Answer in SQL."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a base on disk, as people have theirs."""
    folder = tmp_path_factory.mktemp("base") / "tiny base"
    load_model(ModelConfig(name="tiny"), torch.float32).save_pretrained(folder)
    load_tokenizer(ModelConfig(name="tiny")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_peft(base, tmp_path_factory):
    """Return an adapter that HF PEFT wrote: other ranks, scaling and layers than our defaults."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, use_rslora=True,
        lora_dropout=0.05, init_lora_weights="gaussian", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def without_model(words):
    return [word for word in words if not word.startswith("model=")]


def test_adapter_of_peft_is_continued_by_its_folder_alone(base, of_peft, tmp_path):
    run = tmp_path / "run"
    words = [*without_model(TINY), *SHORT, f"adapter.init_from={of_peft}", "optimizer.lr=1e-20", f"run_dir={run}"]
    assert main(["train", *words]) == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (of_peft, run / "adapter"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.tensor([[5, 9, 12, 31, 2, 7]])
    logits = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()(ids).logits
        for folder in (of_peft, run / "adapter")
    ]
    assert torch.allclose(*logits, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # PEFT warns that tied layers are adapted
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapter_of_one_end_of_a_tied_base_is_continued(target, tmp_path):
    """HF PEFT adapts the end alone, which unties the two."""
    base, adapter, run = (tmp_path / name for name in ("base", "adapter", "run"))
    load_model(ModelConfig(name="tiny_tied"), torch.float32).save_pretrained(base)
    load_tokenizer(ModelConfig(name="tiny")).save_pretrained(base)
    config = LoraConfig(r=3, target_modules=["q_proj", target], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(adapter)
    words = [*without_model(TINY), *SHORT, f"adapter.init_from={adapter}", "optimizer.lr=1e-20", f"run_dir={run}"]
    assert main(["train", *words]) == 0
    ids = torch.tensor([[5, 9, 12, 31, 2, 7]])
    continued = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    expected = model(ids).logits
    assert torch.allclose(continued(ids).logits, expected, atol=1e-6)
    assert main(["merge", str(run), f"output={tmp_path}/merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4 * float(expected.abs().max()))


def test_words_of_ones_own_win_over_the_folders(of_peft, tmp_path, capsys):
    words = [*TINY, f"adapter.init_from={of_peft}", "adapter.dropout=0.2", "rank=4", f"run_dir={tmp_path}/run"]
    assert main(["config", "train", *words]) == 0
    shown = yaml.safe_load("\n".join(line.partition("#")[0] for line in capsys.readouterr().out.splitlines()))
    assert (shown["adapter.dropout"], shown["adapter.rank"], shown["adapter.alpha"]) == (0.2, 4, 5)
    assert shown["model.name"] == "tiny"


def test_base_of_a_peft_folder_is_read_from_it(base, of_peft, capsys):
    assert main(["generate", str(of_peft), "prompt=list all singers", "sampling.max_new_tokens=2"]) == 0
    assert f"model={base}, the base that {of_peft} names" in capsys.readouterr().err


@pytest.fixture(scope="module")
def own_run(base, tmp_path_factory):
    run = tmp_path_factory.mktemp("own") / "run"
    words = ["method=dora", "adapter.rank=4", "adapter.layers=1-", f"data.system_prompt={SYSTEM}", "seed=3"]
    assert main(["train", *without_model(TINY), f"model={base}", *SHORT, *words, f"run_dir={run}"]) == 0
    return run


def test_own_adapter_is_continued_in_its_own_words(own_run, tmp_path, capsys):
    assert main(["config", "train", f"adapter.init_from={own_run}", f"run_dir={tmp_path}/run"]) == 0
    shown = yaml.safe_load("\n".join(line.partition("#")[0] for line in capsys.readouterr().out.splitlines()))
    assert shown["method"] == "dora" and shown["adapter.rank"] == 4 and shown["adapter.layers"] == "1-"
    assert shown["adapter.target_modules"] == "all_linear"
    assert shown["model.path"].endswith("tiny base")


def test_adapter_names_a_base_that_others_load_and_is_readable(base, own_run):
    words = json.loads((own_run / "adapter" / "adapter_config.json").read_text())
    assert words["base_model_name_or_path"] == str(base)
    assert all(path.stat().st_mode & 0o044 for path in (own_run / "adapter").iterdir())


def test_card_says_where_an_adapter_comes_from(own_run):
    result = json.loads((own_run / "result.json").read_text())
    lineage = json.loads((own_run / "adapter" / "lineage.json").read_text())
    card = (own_run / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft" and "dora" in front["tags"]
    assert SYSTEM in card and lineage["data_fingerprint"][:12] in card
    assert f"| validation loss | {result['validation_loss']:.4g} |" in card
    assert "| rank and alpha | 4 and 8 |" in card and "| seed | 3 |" in card


def test_card_gets_the_scores_of_evaluate_and_keeps_off_anothers_readme(own_run):
    assert main(["evaluate", str(own_run), "max_rows=2", "samples=0"]) == 0
    scores = json.loads((own_run / "evaluation.json").read_text())
    card = own_run / "adapter" / "README.md"
    assert f"| adapter: loss | {scores['adapter']['loss']:.4g} |" in card.read_text()
    ours = card.read_text()
    card.write_text("# mine\n")
    assert main(["evaluate", str(own_run), "max_rows=2", "samples=0"]) == 0
    assert card.read_text() == "# mine\n"
    card.write_text(ours)


def test_merged_model_has_a_card_with_its_system_prompt(own_run, tmp_path):
    assert main(["merge", str(own_run), f"output={tmp_path}/merged"]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert SYSTEM in card and "merged against adapter: recovered" in card


def test_push_without_a_hub_says_what_sends_the_folder(own_run, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(own_run), "repo=me/sql"]) == 2
    error = capsys.readouterr().err
    assert f"`hf upload me/sql {own_run}/adapter` sends it" in error and error.count("error: ") == 1
    assert main(["push", str(own_run), "repo=me/sql", "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    assert "README.md" in shown and "adapter_model.safetensors" in shown and "prompt_layout.json" in shown


@pytest.mark.parametrize("repo", ["", "a b", "me/../sql", "a/b/c"])
def test_push_refuses_what_is_no_name(own_run, repo, capsys):
    assert main(["push", str(own_run), f"repo='{repo}'"]) == 2
    assert f"repo={repo}: not a name such as me/my-adapter" in capsys.readouterr().err


def test_exported_scaling_is_not_taken_twice(base, tmp_path, capsys):
    """An export has the scaling in its factors: it is read as the file says, not as its run once did."""
    run = tmp_path / "run"
    words = ["method=rslora", "adapter.rank=4", "adapter.alpha=32", f"run_dir={run}"]
    assert main(["train", *without_model(TINY), f"model={base}", *SHORT, *words]) == 0
    plain = ["format=plain", f"base_name={base}", f"output={tmp_path}/plain"]
    assert main(["export", f"adapter_path={run}", *plain]) == 0
    capsys.readouterr()
    assert main(["config", "train", f"adapter.init_from={tmp_path}/plain", f"run_dir={tmp_path}/next"]) == 0
    shown = yaml.safe_load("\n".join(line.partition("#")[0] for line in capsys.readouterr().out.splitlines()))
    assert (shown["adapter.rank"], shown["adapter.alpha"]) == (4, 4)
    assert not shown.get("adapter.rank_stabilized")
