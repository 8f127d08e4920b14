"""A run whose kernel for packed samples mixes them: the default goes on, a sample at a time."""

import json

import pytest

from lightning_peft.__main__ import main
from lightning_peft.models import attention


def run(folder, name, *words):
    rows = [{"prompt": f"Add {a} and {b}.", "completion": f"It is {a + b}."} for a in range(4) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "train", "model=tiny", "data=jsonl", f"data.train_path={folder}/rows.jsonl",
        f"data.validation_path={folder}/rows.jsonl", "data.max_length=128", "data.cache_dir=null", "rank=r4",
        "data.micro_batch_size=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "schedule=constant",
        "trainer.max_steps=3", f"run_dir={folder}/{name}", *words,
    ]  # fmt: skip
    return main(words)


@pytest.fixture
def mixing(monkeypatch):
    """Return attention that takes all samples of a batch for one."""
    own = attention.varlen_attention

    def varlen_attention(query, key, value, cu_seqlens, *args):
        rows = query.shape[0]
        return own(
            query, key, value, cu_seqlens.new_tensor(range(rows + 1)) * query.shape[2], query.shape[2], *args[1:]
        )

    return lambda: monkeypatch.setattr(attention, "varlen_attention", varlen_attention)


def test_a_run_goes_on_where_packed_samples_see_each_other(tmp_path, mixing, capfd):
    assert run(tmp_path, "exact") == 0
    mixing()
    assert run(tmp_path, "apart") == 0
    assert capfd.readouterr().err.count("packed samples see each other in LlamaForCausalLM") == 1
    exact, apart = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("exact", "apart"))
    for loss in ("train_loss", "validation_loss"):
        assert apart[loss] == pytest.approx(exact[loss], rel=1e-4)
    lineage = json.loads((tmp_path / "apart/adapter/lineage.json").read_text())
    assert lineage["packing_difference"] > 1e-2


def test_packing_that_was_asked_for_stops_before_the_first_step(tmp_path, mixing, capfd):
    mixing()
    assert run(tmp_path, "asked", "data.packing=true") == 2
    assert "error: data.packing=true: packed samples see each other" in capfd.readouterr().err
    assert not (tmp_path / "asked/adapter").exists()
