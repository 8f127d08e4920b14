"""A run that diverges names the rows of the step at which it did."""

import json
from pathlib import Path

import pytest
import started
from tiny_runs import TINY, tiny_config

from lightning_peft.commands.train import train
from lightning_peft.data.origins import GrowingOrigins, Origins
from lightning_peft.training.guard import Diverged

LONG = " ".join(["one two three four five"] * 12)
EXPLODE = "+callbacks.explode={_target_: signalling.ExplodeOnLong, tokens: 100}"
BASE = [
    "trainer.max_steps=40", "checkpoint.every_n_steps=null", "validation.every_n_steps=null", "data.max_rows=null",
    "data.micro_batch_size=2", "data.packing=false", EXPLODE,
]  # fmt: skip


def row(number: int, answer: str = "") -> str:
    return json.dumps({"prompt": f"Say {number}", "completion": answer or f"It is {number}"}) + "\n"


def write_rows(path: Path, long_line: int | None, count: int = 14) -> Path:
    """Lines from 1 on; line 3 is blank and line 5 is no JSON, and the long row is somewhere behind them."""
    odd = {3: "\n", 5: "{no row\n"}
    lines = [odd.get(line) or row(line, LONG if line == long_line else "") for line in range(1, count + 1)]
    path.write_text("".join(lines))
    return path


def rows_of(run_dir: Path) -> list[str]:
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "diverged"
    return result["diverged"]["rows"]


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        (["cold", "warm"], []),
        (["packed"], ["data.cache_dir=null", "data.packing=true", "data.max_length=128"]),
        (["streamed"], ["data.streaming=true"]),
    ],
    ids=["kept", "packed", "streamed"],
)
def test_rows_of_the_step_are_named_by_file_and_line(tmp_path, starts, words, caplog):
    path = write_rows(tmp_path / "rows.jsonl", long_line=9)
    own = ["data=jsonl", f"data.train_path={path}", "data.on_bad_row=skip"]
    for start in starts:  # warm: its tokens are those that the first kept
        with pytest.raises(Diverged):
            train(tiny_config(tmp_path / start, *BASE, *own, *words))
        named = rows_of(tmp_path / start)
        assert f"{path} line 9" in named and len(named) == len(set(named))
        assert not {f"{path} line 3", f"{path} line 5"} & set(named)
        assert len(named) == 2 or "data.packing=true" in words
    assert f"its rows: {path} line " in caplog.text


def test_rows_of_a_window_of_a_mixture_are_those_of_all_its_micro_batches(tmp_path):
    one, other = write_rows(tmp_path / "a.jsonl", long_line=None), write_rows(tmp_path / "b.jsonl", long_line=11)
    own = ["data.source=files", f"+data.sources.a.train_path={one}", f"+data.sources.b.train_path={other}"]
    own += ["data.on_bad_row=skip", "trainer.accumulate_grad_batches=3"]
    with pytest.raises(Diverged):
        train(tiny_config(tmp_path / "r", *BASE, *own))
    named = rows_of(tmp_path / "r")
    assert f"{other} line 11" in named and len(named) == 6


@pytest.mark.slow
@pytest.mark.multi_process
def test_rows_are_those_of_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    path = write_rows(tmp_path / "rows.jsonl", long_line=9)
    own = ["data=jsonl", f"data.train_path={path}", "data.on_bad_row=skip", "strategy=ddp", "trainer.devices=2"]
    words = [*TINY, *BASE, *own, f"run_dir={tmp_path}/r"]
    started.run_on_ranks(2, *started.COMMAND[1:], "train", *words, status=3)
    named = rows_of(tmp_path / "r")
    assert f"{path} line 9" in named and len(named) == 4


def test_rows_of_a_skipped_step_are_logged(tmp_path, caplog):
    path = write_rows(tmp_path / "rows.jsonl", long_line=9)
    own = ["data=jsonl", f"data.train_path={path}", "data.on_bad_row=skip", "guard.action=skip", "guard.patience=1"]
    with pytest.raises(Diverged) as found:
        train(tiny_config(tmp_path / "r", *BASE, *own))
    assert f"{path} line 9" in found.value.rows and "guard.patience=1 steps left out in a row" in found.value.reason


def test_origins_come_back_as_they_were(tmp_path):
    texts = [
        "a.jsonl line 12",
        "a.jsonl line 007",
        "b 1.csv lines 3-5",
        "no number",
        "",
        "7",
        "ü row 0",
        "x" + "9" * 40,
    ]
    growing = GrowingOrigins()
    for text in texts:
        growing.add(text)
    kept = growing.origins()
    assert kept is not None
    kept.save(tmp_path)
    for origins in (kept, Origins.mapped(tmp_path)):
        assert [origins[index] for index in range(len(origins))] == texts
    assert GrowingOrigins().origins() is None
