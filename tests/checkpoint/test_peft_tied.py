"""HF PEFT's adapters of one or both ends of a tied model: PEFT unties them, and so does reading its folders."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter
from lightning_peft.checkpoint.peft_words import AdapterFileError
from lightning_peft.command_configs.of_adapters import MergeCommandConfig
from lightning_peft.commands.adapted import load_for_inference
from lightning_peft.commands.merge import merge
from lightning_peft.inference.generate import generate_batch
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.quantization.weights import computing_dtype

IDS = torch.arange(3, 43)[None]
FORMS = {
    "both_saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "head_saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding_saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head_adapted": {"target_modules": ["q_proj", "lm_head"]},
    "embedding_adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "head_adapted_rows_trained": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 5, 9]},
    "tying_ensured": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    tiny_model(tied=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved_by_peft(base, folder, **words):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM", **words))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_ends_are_untied_as_peft_does(form, has_bf16, base, tmp_path, monkeypatch):
    # Where the machine computes in bf16, a merge of an fp32 base rounds nothing through it.
    monkeypatch.setattr("lightning_peft.commands.adapted.has_fast_bf16", lambda device: has_bf16)
    expected = saved_by_peft(base, tmp_path / "adapter", **FORMS[form])
    model, _ = load_for_inference(str(tmp_path / "adapter"), ModelConfig("hf", str(base)), "32-true")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    config = MergeCommandConfig(str(tmp_path / "adapter"), str(tmp_path / "merged"), ModelConfig("hf", str(base)))
    config.merge.dtype = "fp32"
    merge(config)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_a_bf16_model_with_ends_that_train_in_fp32_answers(form, base, tmp_path):
    saved_by_peft(base, tmp_path / "adapter", **FORMS[form])
    model, tokenizer = load_for_inference(str(tmp_path / "adapter"), ModelConfig("hf", str(base)), "bf16-true")
    assert computing_dtype(model) is torch.bfloat16
    # The decoder's own steps, and the model's forward for every token.
    answer = generate_batch(model, tokenizer, [IDS[0].tolist()], SamplingConfig(max_new_tokens=6))
    ids = IDS
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert answer == [tokenizer.decode(ids[0, IDS.shape[1] :], skip_special_tokens=True)]


@pytest.mark.filterwarnings("ignore")
def test_two_values_of_one_tied_tensor_are_refused(base, tmp_path):
    saved_by_peft(base, tmp_path, **FORMS["both_saved"])
    config = adapter_config_from_peft(tmp_path)
    config.untie_embeddings = False
    model = load_model(ModelConfig("hf", str(base)), torch.float32)
    inject_adapters(model, config)
    with pytest.raises(AdapterFileError, match="differ, and are one tensor in this model"):
        load_adapter(model, tmp_path)
