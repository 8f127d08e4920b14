"""Files are UTF-8 whatever the locale."""

import json
import os
import subprocess
import sys

import pytest

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_text_of_any_script_is_trained_on_and_written_in_an_ascii_locale(tmp_path):
    rows = [{"prompt": f"Größe {n}?", "completion": f"größer als {n} – 大きい"} for n in range(12)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    words = [
        "train", "model=tiny", "data=jsonl", f"data.train_path={tmp_path}/rows.jsonl", "data.validation_fraction=0.2",
        "data.preview=true", "trainer.max_steps=2", "trainer.accelerator=cpu", "validation.every_n_steps=1",
        f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "lightning_peft", *words], capture_output=True, env=os.environ | ASCII, timeout=400
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["reference"].endswith(" – 大きい") for line in lines) and lines
    assert json.loads((tmp_path / "run" / "adapter" / "lineage.json").read_text(encoding="utf-8"))
