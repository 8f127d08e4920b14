"""The number of places that a reader is led through; `walks.py` says what counts."""

import json
import sys

import pytest
from tiny_runs import plain_trainer, tiny_config, tiny_parts
from walks import Hop, RowWalk, Traced, profiled, stack_of

from lightning_peft.adapters.lora import LoRALinear

MARK = "quokkas and numbats"


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> list[Hop]:
    """Return the walk of a plain prompt and completion, tokens kept on disk, from the file to the loss of a step."""
    folder = tmp_path_factory.mktemp("walk")
    rows = [{"prompt": f"Question {place}", "completion": f"{MARK} {place}"} for place in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("data=jsonl", f"data.train_path={folder}/rows.jsonl", f"data.cache_dir={folder}/cache")
    limits = ("data.max_rows=null", "data.max_validation_rows=null", "data.validation_fraction=0")
    module, data = tiny_parts(tiny_config(folder / "run", *options, *limits))
    walk = RowWalk(MARK, data._tokenizer)
    with profiled(walk.see):
        data.setup()
    trainer = plain_trainer(max_steps=2, accumulate_grad_batches=1, callbacks=[Traced(walk)])
    with profiled(None):
        trainer.fit(module, datamodule=data)
    return walk.hops


def test_row_is_at_its_loss_within_12_hops(walk):
    assert walk[0] == ("data/files.py", "read_rows")
    assert walk[-1] == ("objectives/sft.py", "SupervisedLoss.forward")
    assert len(walk) <= 12, "\n".join(map(str, walk))


def test_each_form_of_a_row_is_seen(walk):
    """The tracer sees the row on its whole way, or a short walk would say nothing."""
    files = [file for file, _ in walk]
    forms = ["files", "formats", "rendering", "chat", "samples", "token_store", "collate"]
    assert [file for file in files if file.removeprefix("data/").removesuffix(".py") in forms] == [
        f"data/{name}.py" for name in forms
    ]
    assert "kernels/cross_entropy.py" in files


def test_rank_is_at_its_layer_within_5_functions(tmp_path, monkeypatch):
    module, data = tiny_parts(tiny_config(tmp_path / "run"))
    make, stacks = LoRALinear.__init__, []

    def seen(self, *arguments):
        stacks.append([*stack_of(sys._getframe()), ("adapters/lora.py", "LoRALinear.__init__")])
        make(self, *arguments)

    monkeypatch.setattr(LoRALinear, "__init__", seen)
    plain_trainer(max_steps=1).fit(module, datamodule=data)
    assert all(len(stack) <= 5 and len({file for file, _ in stack}) <= 3 for stack in stacks), stacks[0]
    assert ("adapters/inject.py", "Injection.adapt") in stacks[0]
