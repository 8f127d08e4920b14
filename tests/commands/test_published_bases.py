"""Published low-bit checkpoints through the commands: trained, scored, merged and estimated, or refused in a line."""

import json

import pytest
import torch
from families import small_model
from published_checkpoints import PUBLISHED, publish, publish_experts, publish_mxfp4
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.models.loading import empty_model, load_model, prepare_as_published
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.quantization.linear import CodedWeight
from lightning_peft.quantization.quantize import bits_per_parameter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.08, generator=torch.Generator().manual_seed(1))
    publish(model, folder / "gptq", PUBLISHED["gptq_desc_act"], folder / "dense")
    for name in ("gptq", "dense"):
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"<add> {a} {b}", "completion": f"<sum> {a + b}"} for a in range(4) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words_of(folder, model):
    rows = folder / "rows.jsonl"
    return [
        "model=hf", f"model.path={folder / model}", "data=jsonl", f"data.train_path={rows}", "data.cache_dir=null",
        f"data.validation_path={rows}", "rank=r4", "data.max_length=64", "trainer.accelerator=cpu",
        "trainer.precision=32-true",
    ]  # fmt: skip


def train(folder, model, *more):
    words = ["train", *words_of(folder, model), "optimizer.lr=0.01", "trainer.max_steps=4"]
    assert main([*words, f"run_dir={folder}/runs/{model}", *more]) == 0
    return folder / "runs" / model


@pytest.fixture(scope="module")
def run(folder):
    return train(folder, "gptq")


def test_a_run_learns_what_it_learns_on_the_dense_weights(folder, run):
    dense = train(folder, "dense")
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, dense))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)
    losses = [json.loads((path / "result.json").read_text())["validation_loss"] for path in (run, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert read_lineage(run / "adapter").quantization == "none"


def test_evaluate_scores_the_published_base(folder, run):
    assert main(["evaluate", f"adapter_path={run}", "max_rows=4", f"output={folder}/scores.json"]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    expected = json.loads((run / "result.json").read_text())["validation_loss"]
    assert scores["adapter"]["loss"] < scores["base"]["loss"]
    assert scores["adapter"]["loss"] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("base", ["dequantised", "original"])
def test_merged_model_is_dense_and_the_adapted_one(base, folder, run):
    output = folder / f"merged_{base}"
    assert main(["merge", f"adapter_path={run}", f"output={output}", f"merge.base={base}"]) == 0
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    A, B = (factors[f"base_model.model.{name}.lora_{end}.weight"] for end in "AB")
    scaling = json.loads((run / "adapter" / "adapter_config.json").read_text())["lora_alpha"] / 4
    expected = start.get_submodule(name).weight + scaling * B @ A
    torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=0, atol=1e-6)


REFUSED = {
    "quantised again": (["quantization=nf4"], "the checkpoint is GPTQ of 4 bits in groups of 32, groups by activation"),
    "trained in full": (["method=full", "rank=none"], "method=full trains the weights of the base"),
    "rewritten by its start": (["method=pissa"], "adapter.init=pissa rewrites the base"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_write_codes_is_refused_before_loading(what, folder, tmp_path, capsys):
    more, message = REFUSED[what]
    assert main(["train", *words_of(folder, "gptq"), f"run_dir={tmp_path}/run", *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and not (tmp_path / "run" / "result.json").exists()


def test_coded_modules_cannot_train_in_full(folder, tmp_path, capsys):
    more = ["adapter.trainable_modules=[mlp]", "adapter.target_modules=[q_proj]"]
    assert main(["train", *words_of(folder, "gptq"), f"run_dir={tmp_path}/run", *more]) == 2
    assert "model.layers.0.mlp is quantised and cannot be trained in full" in capsys.readouterr().err


def test_requantised_merge_is_refused(folder, run, tmp_path, capsys):
    words = ["merge", f"adapter_path={run}", f"output={tmp_path}/merged", "merge.base=requantised"]
    assert main(words) == 2
    assert "merge.base=dequantised" in capsys.readouterr().err


def test_estimate_counts_the_codes(folder, tmp_path):
    sizes = {}
    for model in ("gptq", "dense"):
        output = tmp_path / f"{model}.json"
        assert main(["estimate", *words_of(folder, model), f"output={output}"]) == 0
        found = json.loads(output.read_text())["components"]
        sizes[model] = sum(part["at_peak"] for part in found if part["name"] in ("base", "quantisation scales"))
    loaded = load_model(ModelConfig("hf", str(folder / "gptq")), torch.float32)
    layers = [layer for layer in loaded.modules() if isinstance(layer, CodedWeight)]
    codes = sum(tensor.nbytes for layer in layers for tensor in layer.codes if tensor is not None)
    dense = sum(4 * layer.out_features * layer.in_features for layer in layers)
    assert sizes["dense"] - sizes["gptq"] == dense - codes


@pytest.mark.parametrize("name", [*PUBLISHED, "moe_fp8_128", "moe_gptq", "moe_packed_int4", "mxfp4"])
def test_the_layers_are_known_without_their_files(name, tmp_path):
    """They have the size that they have once loaded, from the names in the files or from config.json alone."""
    path = tmp_path / "low"
    if name == "mxfp4":
        publish_mxfp4(small_model("gpt_oss"), path, tmp_path / "dense")
    elif name.startswith("moe_"):
        publish_experts(small_model("qwen3_moe"), path, PUBLISHED[name.removeprefix("moe_")], tmp_path / "dense")
        words = json.loads((path / "config.json").read_text())
        gates = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
        key = "ignore" if "ignore" in words["quantization_config"] else "modules_to_not_convert"
        words["quantization_config"][key] = [*words["quantization_config"].get(key, []), *gates]
        (path / "config.json").write_text(json.dumps(words))
    else:
        publish(small_model("llama"), path, PUBLISHED[name])
    config = ModelConfig("hf", str(path))

    def shapes(model):
        coded = {n: m for n, m in model.named_modules() if isinstance(m, CodedWeight)}
        return {n: [None if t is None else t.shape for t in m.codes] for n, m in coded.items()}

    expected = shapes(load_model(config, torch.float32))
    for _ in range(2):
        model = empty_model(config)
        prepare_as_published(model, config)
        assert shapes(model) == expected and bits_per_parameter(model) > 2
        (path / "model.safetensors").unlink(missing_ok=True)


VARIANTS = {
    "bits": ("gptq", {"bits": 5}, "bits=5 of gptq is not read"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format=marlin of gptq is not read"),
    "bits by layer": ("gptq", {"dynamic": {".*down.*": {"bits": 8}}}, "dynamic=.*down.* of gptq gives layers bits"),
    "gemv": ("awq", {"version": "gemv"}, "version=gemv of awq is not read, only gemm"),
    "2:4": ("packed_int4", {"format": "marlin-24"}, "format=marlin-24 of compressed-tensors is not read"),
    "nvfp4": ("packed_int4", {"format": "nvfp4-pack-quantized"}, "format=nvfp4-pack-quantized of compressed"),
    "sparse": ("packed_int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format=sparse-24"),
    "turned": (
        "packed_int4",
        {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}},
        "transform_config of compressed-tensors, which turns activations, is not read",
    ),
    "fp4 experts": ("fp8_blocks", {"expert_dtype": "fp4"}, "expert_dtype=fp4 of fp8 is not read"),
}


@pytest.mark.parametrize("what", VARIANTS)
def test_a_variant_that_is_not_read_is_refused_by_config_alone(what, tmp_path):
    name, change, message = VARIANTS[what]
    publish(small_model("llama"), tmp_path, PUBLISHED[name])
    words = json.loads((tmp_path / "config.json").read_text())
    words["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(words))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError) as caught:
        empty_model(ModelConfig("hf", str(tmp_path)))
    assert message in str(caught.value) and "give the original model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_eight_bits_of_bitsandbytes_are_refused_by_name(tmp_path):
    small_model("llama").save_pretrained(tmp_path)
    words = json.loads((tmp_path / "config.json").read_text())
    words["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="load_in_8bit of bitsandbytes is not read; give the original model"):
        empty_model(ModelConfig("hf", str(tmp_path)))


def test_a_head_in_codes_gets_no_new_rows(tmp_path):
    model = small_model("llama", tie_word_embeddings=False)
    publish(model, tmp_path, PUBLISHED["gptq"])
    tensors = load_file(tmp_path / "model.safetensors")
    parts, _ = PUBLISHED["gptq"].layer(tensors.pop("lm_head.weight").float())
    save_file(tensors | {f"lm_head{end}": part for end, part in parts.items()}, tmp_path / "model.safetensors")
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig("hf", str(tmp_path), new_tokens=["<sql>"])
    for load in (lambda: load_model(config, torch.float32), lambda: prepare_as_published(empty_model(config), config)):
        with pytest.raises(
            ValueError, match="model.new_tokens: the checkpoint holds embeddings or head as uint4 codes"
        ):
            load()


def drop_config(folder, words, tensors):
    del words["quantization_config"]


def drop_part(folder, words, tensors):
    del tensors["model.layers.1.mlp.up_proj.scales"]


def say_dense(folder, words, tensors):
    for key in [key for key in tensors if key.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]:
        del tensors[key]


def other_bits(folder, words, tensors):
    words["quantization_config"]["bits"] = 8


def other_groups(folder, words, tensors):
    words["quantization_config"]["group_size"] = 64


MIXTURES = {
    "config.json says nothing": (drop_config, "has no quantization_config that says which"),
    "a part is missing": (drop_part, "model.layers.1.mlp.up_proj.scales is not there"),
    "no tensor is low-bit": (say_dense, "no tensor of the files is"),
    "other bits": (other_bits, "the shapes of its parts differ"),
    "other groups": (other_groups, "the shapes of its parts differ"),
}


@pytest.mark.parametrize("what", MIXTURES)
def test_files_that_are_not_what_config_says_are_refused(what, tmp_path):
    change, message = MIXTURES[what]
    publish(small_model("llama"), tmp_path, PUBLISHED["gptq"])
    words, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    change(tmp_path, words, tensors)
    (tmp_path / "config.json").write_text(json.dumps(words))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(ModelConfig("hf", str(tmp_path)), torch.float32)


@pytest.mark.parametrize("end", [".weight_scale_inv", ".weight_scale", None])
def test_fp8_without_its_config_is_no_weight(end, tmp_path):
    """Read as numbers without their scales, FP8 would be another model."""
    publish(small_model("llama"), tmp_path, PUBLISHED["fp8_blocks"])
    words, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    del words["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(words))
    renamed = {name.replace(".weight_scale_inv", str(end)): tensor for name, tensor in tensors.items()}
    if end is None:
        renamed = {name: tensor for name, tensor in tensors.items() if "scale" not in name}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no quantization_config that"):
        load_model(ModelConfig("hf", str(tmp_path)), torch.float32)


def test_random_weights_of_a_published_shape_are_dense_or_quantised(tmp_path, caplog):
    publish_mxfp4(small_model("gpt_oss"), tmp_path / "low", tmp_path / "dense")
    config = ModelConfig("hf", str(tmp_path / "low"), random_weights=True)
    with caplog.at_level("INFO"):
        model = load_model(config, torch.float32)
    assert not any(isinstance(module, CodedWeight) for module in model.modules())
    assert "drawn dense, not as MXFP4" in caplog.text
