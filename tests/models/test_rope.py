"""Positions beyond a model's context: the numbers of transformers with the same configuration, from run to merge."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import small_model
from family_checks import Family, batch, samples
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CTRLConfig,
    GPTJConfig,
    IdeficsConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    RobertaConfig,
)

from lightning_peft.__main__ import main
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.loading import empty_model, load_model, model_config, model_context
from lightning_peft.models.rope import RopeScaling, scale_positions, table_of_positions
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from lightning_peft.objectives.sft import SupervisedLoss

IDS = torch.randint(3, 90, (1, 150), generator=torch.Generator().manual_seed(3))
"""Row that is longer than the 64 tokens of the models."""
FAMILIES = ["llama", "qwen3", "gemma3_text", "deepseek_v3", "mistral"]


def expected(path: Path, scaling: RopeScaling) -> torch.Tensor:
    """Return the logits of transformers' own model, its configuration written by hand."""
    words = json.loads((path / "config.json").read_text())
    rope = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "yarn":
        rope["original_max_position_embeddings"] = 64
    own = words["rope_parameters"]
    if "full_attention" in own:
        own["full_attention"] = {"rope_theta": own["full_attention"]["rope_theta"], **rope}
    else:
        words["rope_parameters"] = {k: v for k, v in own.items() if k in ("rope_theta", "partial_rotary_factor")} | rope
    words["max_position_embeddings"] = 64 if scaling.type == "dynamic" else 64 * 4
    if "original_max_position_embeddings" in words:
        words["original_max_position_embeddings"] = 64
    (path / "config.json").write_text(json.dumps(words))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_with_the_same_configuration(family: str, kind: str, tmp_path: Path) -> None:
    small_model(family).save_pretrained(tmp_path)
    scaling = RopeScaling(kind, 4.0)
    config = ModelConfig("hf", str(tmp_path), attention="eager", rope_scaling=scaling)
    with torch.no_grad():
        ours = load_model(config, torch.float32)(IDS, use_cache=False).logits
        plain = load_model(ModelConfig("hf", str(tmp_path), attention="eager"), torch.float32)(
            IDS, use_cache=False
        ).logits
    assert model_context(config) == 256
    theirs = expected(tmp_path, scaling)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", {"beta_fast": 16.0}),
        ("deepseek_v3", {"mscale": 1.0, "mscale_all_dim": 1.0}),
        ("gpt_oss", {"truncate": False}),
        ("ministral3", {"llama_4_scaling_beta": 0.1}),
    ],
)
def test_a_models_own_scaling_asked_for_again_changes_nothing(family: str, own: dict, tmp_path: Path) -> None:
    small_model(family).save_pretrained(tmp_path)
    words = json.loads((tmp_path / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    words["rope_parameters"] = {"rope_theta": words["rope_parameters"]["rope_theta"], **own, **yarn}
    words["max_position_embeddings"] = 128
    (tmp_path / "config.json").write_text(json.dumps(words))
    plain = ModelConfig("hf", str(tmp_path), attention="eager")
    again = ModelConfig("hf", str(tmp_path), attention="eager", rope_scaling=RopeScaling("yarn", 4.0, 32))
    with torch.no_grad():
        logits, expected = (load_model(one, torch.float32)(IDS, use_cache=False).logits for one in (again, plain))
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_what_is_no_scaling_is_kept_beside_another() -> None:
    section = {"mrope_section": [4, 2, 2], "rope_type": "default", "rope_theta": 1e4}
    architecture = small_model("qwen3").config
    architecture.rope_parameters = dict(section)
    scale_positions(architecture, RopeScaling("linear", 2.0))
    assert architecture.rope_parameters == section | {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"type": "ntk", "factor": 2.0}, "model.rope_scaling.type=ntk: must be one of linear, dynamic, yarn"),
        ({"type": "yarn"}, "model.rope_scaling.factor=None: must be above 1"),
        ({"type": "yarn", "factor": 1.0}, "model.rope_scaling.factor=1.0: must be above 1"),
        ({"factor": 2.0}, "model.rope_scaling.type=null: give one of"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "must be at least 1"),
    ],
)
def test_wrong_options_are_refused(words: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**words)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "gpt2 has no rotary positions"),
        ("bloom", "bloom has no rotary positions"),
        ("phi3", "no such type for phi3"),
    ],
)
def test_a_family_that_cannot_is_refused_before_its_weights(family: str, message: str, tmp_path: Path) -> None:
    small_model(family).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        empty_model(ModelConfig("hf", str(tmp_path), rope_scaling=RopeScaling("yarn", 2.0)))


def test_scaled_positions_are_scaled_again_only_from_a_known_context(tmp_path: Path) -> None:
    architecture = deepcopy(tiny_config())
    architecture.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    architecture.save_pretrained(tmp_path)
    config = ModelConfig("hf", str(tmp_path), rope_scaling=RopeScaling("yarn", 2.0))
    with pytest.raises(ValueError, match="are scaled by llama3 already; give .*original_max_position_embeddings"):
        model_config(config)
    known = ModelConfig("hf", str(tmp_path), rope_scaling=RopeScaling("yarn", 16.0, 256))
    assert model_config(known).rope_parameters == {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 256,
    }  # fmt: skip
    assert model_context(known) == 4096


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a tiny model of 128 tokens and rows of more."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model()
    model.config.max_position_embeddings = 128
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"prompt": "<add> " + f"{a} {b} " * 25, "completion": f"<sum> {a + b}"} for a in range(2) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(base, folder, *words):
    rows = base / "rows.jsonl"
    return main([
        "train", "model=hf", f"model.path={base}", "data=jsonl", f"data.train_path={rows}", "data.cache_dir=null",
        f"data.validation_path={rows}", "rank=r4", "data.max_length=200", "trainer.max_steps=2", "optimizer.lr=0.01",
        "trainer.accelerator=cpu", "trainer.precision=32-true", f"run_dir={folder}", *words,
    ])  # fmt: skip


def test_rows_beyond_the_context_are_refused_with_the_option_that_takes_them(base, tmp_path, capsys):
    assert train(base, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "data.max_length=200: must be at most 128, the model's context; model.rope_scaling.type=yarn" in error
    assert "model.rope_scaling.factor=2 reaches beyond it" in error


def test_a_run_takes_its_positions_to_evaluate_merge_and_export(base, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert train(base, run, "model.rope_scaling.type=yarn", "model.rope_scaling.factor=2") == 0
    trained = json.loads((run / "result.json").read_text())["validation_loss"]
    for words in ([], ["model=hf", f"model.path={base}"]):  # once as trained, and once the base does not say
        assert main(["evaluate", f"adapter_path={run}", f"output={tmp_path}/scores.json", *words]) == 0
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["adapter"]["loss"] == pytest.approx(trained, rel=1e-5)
    assert main(["merge", f"adapter_path={run}", f"output={merged}"]) == 0
    words = json.loads((merged / "config.json").read_text())
    assert words["max_position_embeddings"] == 256
    assert words["rope_parameters"]["rope_type"] == "yarn" and words["rope_parameters"]["factor"] == 2.0
    assert words["rope_parameters"]["original_max_position_embeddings"] == 128


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
BY_LENGTH = [
    ("llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    ("gemma3_text", {
        "max_position_embeddings": 16,
        "query_pre_attn_scalar": 1,
        "rope_parameters": {
            "full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }),
    ("llama", {"rope_parameters": LONGROPE}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20, "sliding_window": None}),
    ("minicpm3", {"rope_parameters": LONGROPE}),
]  # fmt: skip
"""Frequencies that change at 16 or 20 tokens: two of the samples are longer, two are shorter."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), BY_LENGTH, ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_has_the_positions_it_has_alone(name: str, options: dict, tmp_path: Path) -> None:
    family = Family(name, tmp_path, **options)
    with torch.no_grad():
        # Each begins anew alone, as a dynamic base remembers the longest so far.
        expected = sum(one_loss(family.plain(), ids) for ids in samples())
        objective = SupervisedLoss(family.ours())
        for packing in (False, True, False):
            got = objective(batch(packing))
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)
        # transformers, in one batch, gives every row those of the longest.
        width = max(map(len, samples()))
        ids = torch.stack([F.pad(ids, (0, width - len(ids))) for ids in samples()])
        together = family.plain()(input_ids=ids, use_cache=False).logits
        summed = sum(
            F.cross_entropy(x[: len(i) - 1], i[1:], reduction="sum") for x, i in zip(together, samples(), strict=True)
        )
        assert abs(summed - expected) > 1e-3 * expected


def one_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), BY_LENGTH, ids=lambda value: value if isinstance(value, str) else "")
def test_an_answer_is_the_one_it_is_alone(name: str, options: dict, tmp_path: Path) -> None:
    family, tokenizer = Family(name, tmp_path, **options), tiny_tokenizer()
    rows = [ids.tolist() for ids in samples()]
    prompts = [rows[0][:10], rows[1][:10], rows[0][:14], rows[0][:14] + rows[1][:9]]
    sampling = SamplingConfig(max_new_tokens=12)
    together = generate_batch(family.ours(), tokenizer, prompts, sampling)
    alone = []
    for prompt in prompts:
        output = family.plain().generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        alone.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    assert together == alone


def test_samples_under_a_dynamic_base_are_not_packed(base, tmp_path, capsys):
    words = ["model.rope_scaling.type=dynamic", "model.rope_scaling.factor=2"]
    assert train(base, tmp_path / "run", *words) == 0
    assert "would set the rotary frequencies of all, so rows are padded" in capsys.readouterr().err
    assert train(base, tmp_path / "packed", *words, "data.packing=true") == 2


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [
        (CTRLConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2, dff=16, vocab_size=50), 32),  # no buffer
        (RobertaConfig(max_position_embeddings=18, is_decoder=True, **SIZES), 16),  # begin behind the padding's
        (OPTConfig(max_position_embeddings=32, ffn_dim=16, word_embed_proj_dim=16, **SIZES), 32),  # two rows more
        (GPTJConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=50), 32),
        (LlamaConfig(**SIZES), None),
        (IdeficsConfig(**SIZES), None),  # its tower of vision has one
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_positions_of_a_table_are_those_that_text_can_take(architecture, positions):
    made = AutoModelForImageTextToText if architecture.model_type == "idefics" else AutoModelForCausalLM
    with torch.device("meta"):
        assert table_of_positions(made.from_config(architecture)) == positions
