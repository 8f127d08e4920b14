"""`convert` on small trained runs: what is written, read back by HF PEFT, and what is refused in a line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_runs import TINY
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.checkpoint.peft_format import file_sha256
from lightning_peft.commands.adapted import load_for_inference
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer

IDS = torch.arange(40)[None]
METHODS = {
    "lora": ["method=lora", "rank=4"],
    "few": ["method=rslora", "rank=2", "target_modules=query_value", "seed=3"],
    "dora": ["method=dora", "rank=4"],
    "vera": ["method=vera"],
    "ia3": ["method=ia3"],
    "hira": ["method=hira", "rank=4"],
    "nf4": ["method=qlora", "rank=4"],
    "wide": ["method=lora", "rank=2", "adapter.rank_pattern={q_proj:6}", "seed=5"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parents")
    for name, words in METHODS.items():
        given = [*TINY, *words, "trainer.max_steps=2", "logger=none", f"run_dir={folder / name}"]
        assert main(["train", *given]) == 0
    return folder


def converted(words: list[str], output: Path) -> dict:
    assert main(["convert", *map(str, words), f"output={output}"]) == 0
    return json.loads((output / "convert_receipt.json").read_text())


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["convert", *map(str, words)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def changes(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = load_for_inference(str(folder), None, "32-true")
    return {name: layer.delta_weight().detach().double() for name, layer in adapters(model)}


def logits(folder: Path) -> torch.Tensor:
    model, _ = load_for_inference(str(folder), None, "32-true")
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits_in_peft(folder: Path) -> torch.Tensor:
    theirs = PeftModel.from_pretrained(load_model(ModelConfig(name="tiny"), torch.float32), folder).eval()
    with torch.no_grad():
        return theirs(input_ids=IDS).logits


def test_cut_to_a_rank_is_the_nearest_and_names_what_each_layer_loses(runs, tmp_path, capsys):
    receipt = converted([runs / "lora", "rank=2"], tmp_path / "cut")
    whole, part = changes(runs / "lora"), changes(tmp_path / "cut")
    for name, change in whole.items():
        values = torch.linalg.svdvals(change)
        assert receipt["ranks"][name] == 2 == torch.linalg.matrix_rank(part[name], rtol=1e-4)
        assert receipt["lost"][name] == pytest.approx(
            float(values[2:].square().sum() / values.square().sum()), rel=1e-3, abs=1e-9
        )
        residual = (change - part[name]).square().sum()
        assert float(residual) == pytest.approx(float(values[2:].square().sum()), rel=1e-2)
    worst = max(receipt["lost"], key=lambda name: receipt["lost"][name])
    assert f"at {worst}" in capsys.readouterr().out
    torch.testing.assert_close(logits(tmp_path / "cut"), logits_in_peft(tmp_path / "cut"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("factor", "says"), [(torch.nan, "has numbers that are not finite"), (1e30, "too large for its singular values")]
)
def test_numbers_that_have_no_singular_values_are_refused(runs, tmp_path, capsys, factor, says):
    adapter = tmp_path / "adapter"
    shutil.copytree(runs / "lora" / "adapter", adapter)
    weights = adapter / "adapter_model.safetensors"
    save_file({name: value * factor for name, value in load_file(weights).items()}, weights)
    (adapter / "lineage.json").unlink()
    words = [f"adapter_path={adapter}", "model=tiny", "svd_rank=2", f"output={tmp_path / 'cut'}"]
    assert says in refused(words, capsys)


def test_cut_to_a_share_of_the_energy_gives_each_layer_its_rank(runs, tmp_path):
    receipt = converted([runs / "lora", "energy=0.8"], tmp_path / "cut")
    assert len(set(receipt["ranks"].values())) > 1 and max(receipt["lost"].values()) <= 0.2
    torch.testing.assert_close(logits(tmp_path / "cut"), logits_in_peft(tmp_path / "cut"), rtol=1e-4, atol=1e-4)


def test_sum_of_other_ranks_scalings_and_layers_is_exact(runs, tmp_path, capsys):
    words = [f"adapter_path=[{runs / 'lora'},{runs / 'few'}]", "weights=[0.7,0.3]"]
    receipt = converted(words, tmp_path / "both")
    first, second, both = changes(runs / "lora"), changes(runs / "few"), changes(tmp_path / "both")
    assert both.keys() == first.keys() > second.keys()
    for name, change in both.items():
        expected = 0.7 * first[name] + 0.3 * second.get(name, torch.zeros_like(change))
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-7)
    assert receipt["mean_kl"] < 1e-9 and set(receipt["ranks"].values()) == {4, 6}
    torch.testing.assert_close(logits(tmp_path / "both"), logits_in_peft(tmp_path / "both"), rtol=1e-4, atol=1e-4)
    lineage = read_lineage(tmp_path / "both")
    assert lineage is not None and lineage.created_by == "lightning-peft convert"
    assert [part["weight"] for part in lineage.parents] == [0.7, 0.3]
    file = runs / "few" / "adapter" / "adapter_model.safetensors"
    assert lineage.parents[1]["adapter_sha256"] == file_sha256(file) and lineage.parents[1]["name"] == "few"
    card = (tmp_path / "both" / "README.md").read_text()
    assert "0.7 x lora" in card and "0.3 x few" in card and "learning rate" not in card


@pytest.mark.parametrize(("combine", "rank"), [("svd", 4), ("ties", 4), ("dare", 4)])
def test_combinations_are_cut_to_the_largest_rank(runs, tmp_path, combine, rank):
    receipt = converted([runs / "lora", runs / "few", f"combine={combine}"], tmp_path / "both")
    assert max(receipt["ranks"].values()) == rank and max(receipt["lost"].values()) > 0
    if combine != "dare":  # half of them was noise
        assert receipt["recovered"] > 0.8


def test_largest_rank_counts_those_of_patterns(runs, tmp_path):
    receipt = converted([f"[{runs / 'wide'},{runs / 'few'}]", "combine=svd"], tmp_path / "svd")
    assert max(receipt["ranks"].values()) == 6  # 2 and 6 beside 2: cut to the largest of all
    assert LoRAConfig(rank=2, rank_last=3, rank_pattern={"q": 6}).largest_rank == 6 == LoRAConfig(rank=6).largest_rank


def test_dare_follows_its_seed(runs, tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        converted([runs / "lora", runs / "few", "combine=dare", f"seed={seed}"], tmp_path / name)
        found.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("run", ["lora", "nf4"])
def test_lora_as_dora_and_back_computes_the_same(runs, tmp_path, run):
    assert converted([runs / run, "method=dora"], tmp_path / "dora")["mean_kl"] < 1e-9
    lineage = read_lineage(tmp_path / "dora")
    assert lineage is not None and lineage.method == "dora"
    assert converted([tmp_path / "dora", "method=lora"], tmp_path / "lora")["mean_kl"] < 1e-9
    torch.testing.assert_close(logits(tmp_path / "lora"), logits(runs / run), rtol=1e-5, atol=1e-5)
    if run == "lora":
        torch.testing.assert_close(logits(tmp_path / "dora"), logits_in_peft(tmp_path / "dora"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", ["dora", "hira"])
def test_nearest_lora_of_what_is_no_low_rank_sum(runs, tmp_path, run):
    receipt = converted([runs / run, "method=lora", "rank=6"], tmp_path / "lora")
    whole, part = changes(runs / run), changes(tmp_path / "lora")
    for name, change in whole.items():
        values = torch.linalg.svdvals(change)
        residual = float((change - part[name]).square().sum())
        assert residual == pytest.approx(float(values[6:].square().sum()), rel=1e-2, abs=1e-12)
        assert receipt["lost"][name] > 0


def test_other_low_rank_method_becomes_a_lora(runs, tmp_path):
    assert converted([runs / "vera"], tmp_path / "lora")["mean_kl"] < 1e-9
    lineage = read_lineage(tmp_path / "lora")
    assert lineage is not None and (lineage.method, lineage.parents[0]["method"]) == ("lora", "vera")
    torch.testing.assert_close(logits_in_peft(tmp_path / "lora"), logits(runs / "vera"), rtol=1e-4, atol=1e-4)


def test_written_adapter_is_trained_on_evaluated_and_answers(runs, tmp_path, capsys):
    converted([runs / "lora", "energy=0.8"], tmp_path / "cut")
    words = [*TINY[1:], f"adapter.init_from={tmp_path / 'cut'}", "trainer.max_steps=1", "logger=none"]
    assert main(["train", *words, "optimizer.lr=1e-12", f"run_dir={tmp_path / 'on'}"]) == 0
    assert "was scaled by" not in capsys.readouterr().err
    torch.testing.assert_close(logits(tmp_path / "on"), logits(tmp_path / "cut"), rtol=1e-4, atol=1e-5)
    assert main(["generate", str(tmp_path / "cut"), "prompt=How many?", "sampling.max_new_tokens=3"]) == 0


def test_another_prompt_layout_is_a_line(runs, tmp_path, capsys):
    words = [*TINY, "rank=2", "data.system_prompt=Answer in SQL.", "trainer.max_steps=1", "logger=none"]
    assert main(["train", *words, f"run_dir={tmp_path / 'other'}"]) == 0
    capsys.readouterr()
    converted([runs / "lora", tmp_path / "other"], tmp_path / "both")
    said = f"other was trained with another prompt layout (system_prompt): that of {runs / 'lora'} is written"
    assert said in " ".join(capsys.readouterr().err.split())
    layouts = [
        json.loads((folder / "prompt_layout.json").read_text()) for folder in (tmp_path / "both", runs / "lora/adapter")
    ]
    assert layouts[0] == layouts[1]


def test_what_cannot_be_is_refused_in_a_line(runs, tmp_path, capsys):
    out = f"output={tmp_path / 'none'}"
    assert "dora, which is no low-rank sum; `lightning-peft convert" in refused(
        [runs / "lora", runs / "dora", out], capsys
    )
    assert "method=lora makes the nearest LoRA" in refused([runs / "hira", "rank=2", out], capsys)
    assert "nothing to convert; give rank=" in refused([runs / "lora", out], capsys)
    assert "weights=[1.0]: must be one for each of the 2" in refused(
        [runs / "lora", runs / "few", "weights=[1]", out], capsys
    )
    both = [runs / "lora", runs / "few", out]
    assert "weights=nan: must be a finite number" in refused([*both, "weights=[nan,1]"], capsys)
    assert f"seed={2**64}: must be from 0 to 2^62 - 1" in refused([*both, "combine=dare", f"seed={2**64}"], capsys)
    assert "density=0.5: only combine=ties" in refused([runs / "lora", runs / "few", "density=0.5", out], capsys)
    assert "energy=1.5: is a share" in refused([runs / "lora", "energy=1.5", out], capsys)
    assert "weights, combine and density are for several" in refused([runs / "lora", "weights=[2]", out], capsys)
    assert "has no rank of its own; give rank=" in refused([runs / "ia3", "method=lora", out], capsys)
    assert "max_kl" in refused([runs / "lora", "rank=1", "max_kl=1e-12", out], capsys)
    assert not (tmp_path / "none").exists()


def test_adapters_of_two_bases_are_refused(runs, tmp_path, capsys):
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = [*TINY[1:], "model=hf", f"model.path={tmp_path / 'model'}", "trainer.max_steps=1", "logger=none"]
    assert main(["train", *words, f"run_dir={tmp_path / 'other'}"]) == 0
    said = refused([runs / "lora", tmp_path / "other", f"output={tmp_path / 'none'}"], capsys)
    assert "only adapters of one base are combined" in said and str(runs / "lora") in said


def test_two_folders_are_for_commands_that_take_two(runs, capsys):
    assert main(["evaluate", str(runs / "lora"), str(runs / "few")]) == 2
    assert "evaluate takes one of them" in capsys.readouterr().err
    assert main(["inspect", str(runs / "lora"), str(runs / "few"), f"output={runs / 'both.json'}"]) == 0
    assert json.loads((runs / "both.json").read_text())["overlap"]


def test_stacks_of_experts_are_refused_before_the_base_is_read(tmp_path, capsys):
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    config = Qwen3MoeConfig(
        **sizes, num_key_value_heads=4, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = [f"model.path={tmp_path / 'model'}", "adapter.experts=2", "trainer.max_steps=1", "logger=none"]
    assert main(["train", *TINY[1:], "model=hf", *words, f"run_dir={tmp_path / 'run'}"]) == 0
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    for more in (["svd_rank=1"], ["method=dora"], [f"adapter_path=[{tmp_path / 'run'},{tmp_path / 'run'}]"]):
        path = [] if more[0].startswith("adapter_path") else [f"adapter_path={tmp_path / 'run'}"]
        said = refused([*path, *more, f"output={tmp_path / 'out'}"], capsys)
        assert "adapts 4 stacks of experts, as model.layers.0.mlp.experts.down_proj" in said, said
