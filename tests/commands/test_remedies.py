"""Remedies that a refusal of `export` or `serve` names: each of them works for that very adapter."""

import re
from pathlib import Path

import pytest
from families import small_model
from peft import LoraConfig
from peft_adapters import save_changed

from lightning_peft.__main__ import main
from lightning_peft.models.tiny import tiny_tokenizer

WHOLE = {"format=gguf", "lightning-peft merge", "serve it alone"}
ADAPTERS = {
    "lora_bias": ("llama", {"lora_bias": True}, WHOLE),
    "lora_bias_without_room": ("mistral", {"lora_bias": True}, {"serve it unmerged", "serve it alone"}),
    "rows": ("llama", {"trainable_token_indices": [5, 9]}, WHOLE),
    "rows_of_gemma": ("gemma2", {"trainable_token_indices": [5, 9]}, WHOLE - {"format=gguf"}),
    "dora_beside_a_norm": ("llama", {"use_dora": True, "modules_to_save": ["norm"]}, WHOLE),
    "dora": ("llama", {"use_dora": True}, WHOLE | {"svd_rank="}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, WHOLE),
}
"""Family, words of HF PEFT, and the remedies that are named."""
REMEDIES = {
    "format=gguf": ["export", "format=gguf", "dtype=fp32"],
    "lightning-peft merge": ["merge"],
    "svd_rank=": ["export", "format=plain", "svd_rank=8", "max_kl=100"],
    "serve it unmerged": ["serve"],
    "serve it alone": ["serve"],
}
"""What a message says, and the command that does it."""


def save_all(form: str, tmp_path: Path) -> Path:
    """Save an adapter of HF PEFT as `adapter`, beside `base` and a plain adapter of it."""
    family, words, _ = ADAPTERS[form]
    small_model(family, vocab_size=320).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name, own in (("adapter", words), ("plain", {})):
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **own})
        save_changed(tmp_path / "base", config, tmp_path / name)
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ADAPTERS)
def test_remedies_work_for_the_adapter_that_they_are_named_for(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_all(form, tmp_path)
    base = ["model=hf", f"model.path={tmp_path / 'base'}"]
    both = f"adapters=[a={adapter},b={tmp_path / 'plain'}]"
    named: set[str] = set()
    for words in (
        ["export", f"adapter_path={adapter}", "format=plain", f"output={tmp_path / 'x'}"],
        ["export", f"adapter_path={adapter}", "format=gguf_lora", f"output={tmp_path / 'x'}"],
        ["serve", both, "serve.dry_run=true"],
    ):
        assert main([*words, *base]) == 2
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        behind = re.split(r"[;:] ", said, maxsplit=2)[-1]
        found = {remedy for remedy in REMEDIES if re.search(rf"{remedy}(?!\w)", behind)}
        assert found or "is served alone" in said, said
        named |= found or {"serve it alone"}
    assert named == ADAPTERS[form][2]
    for number, remedy in enumerate(sorted(named)):
        command, *words = REMEDIES[remedy]
        what = (
            [f"adapters=[a={adapter}]", "serve.dry_run=true"]
            if command == "serve"
            else [f"adapter_path={adapter}", f"output={tmp_path / str(number)}"]
        )
        assert main([command, *base, *what, *words]) == 0, (remedy, capsys.readouterr().err)
        if command != "serve":
            assert "100.00% of the adapter's effect kept" in capsys.readouterr().out or remedy == "svd_rank="
