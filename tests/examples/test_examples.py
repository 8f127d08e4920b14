"""Parts from outside the package train, resume, sweep and are scored through the command line alone."""

import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import started
import yaml
from safetensors.torch import load_file
from tiny_runs import TINY

from lightning_peft.adapters.registry import METHODS
from lightning_peft.compose import compose_config
from lightning_peft.optim.optimizers import OPTIMIZERS
from lightning_peft.plugins import PluginError
from lightning_peft.tables import TABLES

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SHORT = ["trainer.max_steps=3", "logger=csv", "validation.samples=0"]
METHOD = ["imports=[own_method]", "method=row_gain", *SHORT]


def command(*words: str, cwd: Path = EXAMPLES) -> subprocess.CompletedProcess[str]:
    return started.run([*started.COMMAND, *words], cwd=cwd)


def succeeded(*words: str, cwd: Path = EXAMPLES) -> str:
    done = command(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("own") / "run"
    succeeded("train", *TINY, *METHOD, f"run_dir={run_dir}", "adapter.largest=0.25", "checkpoint.every_n_steps=2")
    return run_dir


def test_own_method_trains_with_its_own_options(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["imports"], config["method"]) == (["own_method"], "row_gain")
    assert (config["adapter"]["method"], config["adapter"]["largest"]) == ("row_gain", 0.25)
    gains = [value for key, value in load_file(run / "adapter" / "adapter_model.safetensors").items() if "gain" in key]
    assert gains and all(gain.abs().max() > 0 for gain in gains)


def test_own_option_is_checked(tmp_path):
    done = command("train", *TINY, *METHOD, f"run_dir={tmp_path}/run", "adapter.largest=2")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: adapter.largest=2.0: must be above 0 and at most 1"


@pytest.mark.slow
def test_folder_of_somebody_else_runs_no_code(run, tmp_path):
    # The module lies where it would be found, and leaves a file if it is imported.
    (tmp_path / "own_method.py").write_text("open('imported', 'w')\n" + (EXAMPLES / "own_method.py").read_text())
    words = ["evaluate", f"adapter_path={run}", "max_rows=4", f"output={tmp_path}/scores.json"]
    refused = command(*words, cwd=tmp_path)
    assert refused.returncode == 2 and not (tmp_path / "imported").exists()
    assert "method=row_gain: it was made with imports=[own_method]: give that too, if you trust it" in refused.stderr
    succeeded(*words, "imports=[own_method]", cwd=tmp_path)
    assert (tmp_path / "imported").exists()
    assert json.loads((tmp_path / "scores.json").read_text())["adapter"]["loss"] > 0


@pytest.mark.slow
def test_method_inside_the_package_is_three_files(tmp_path):
    """docs/extending.md followed in a copy of the package: the method's file, its row, and its option file."""
    for name in ("lightning_peft", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (EXAMPLES / "own_method.py").read_text()
    row = text[text.index('METHODS["row_gain"] = ') :].replace('METHODS["row_gain"]', "METHOD")
    text = text[: text.index('METHODS["row_gain"] = ')].replace("row_gain", "mine") + row.replace("row_gain", "mine")
    without = "from lightning_peft.adapters.registry import METHODS\n"
    (tmp_path / "lightning_peft" / "adapters" / "mine.py").write_text(text.replace(without, ""))
    registry = tmp_path / "lightning_peft" / "adapters" / "registry.py"
    table = registry.read_text().replace("    miss,\n", "    mine,\n    miss,\n", 1)
    registry.write_text(table.replace('    "miss": miss', '    "mine": mine.METHOD,\n    "miss": miss', 1))
    page = (ROOT / "docs" / "extending.md").read_text()
    option = page[page.index("# @package _global_") :]
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(option[: option.index("```")])
    tiny = [word for word in TINY if not word.startswith("optimizer.lr")]
    words = ["train", *tiny, *SHORT, "method=mine", "adapter.largest=0.25", f"run_dir={tmp_path}/run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["adapter"]["method"], config["adapter"]["largest"]) == ("mine", 0.25)
    assert config["optimizer"]["lr"] == 1e-3
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_own_method_is_merged(run, tmp_path):
    out = succeeded("merge", f"adapter_path={run}", f"output={tmp_path}/merged", "imports=own_method")
    assert "100.00% of the adapter's effect kept" in out or "99." in out
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_own_method_resumes_from_its_saved_config(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    saved["trainer"]["max_steps"] = 5
    saved["resume"] = "auto"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(saved))
    succeeded("train", f"config_path={tmp_path}/run/config.yaml")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 5


@pytest.mark.slow
def test_own_initialisation_and_optimiser(tmp_path):
    words = ["imports=[own_optimizer]", "adapter.init=orthonormal", "optimizer=sgd", "optimizer.momentum=0.5", *SHORT]
    succeeded("train", *TINY, *words, f"run_dir={tmp_path}/run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


OBJECTIVE = ["imports=[own_objective]", "objective=focal", "objective.focus=1", "validation.every_n_steps=2", *SHORT]


@pytest.mark.slow
def test_own_objective_trains_measures_and_is_recorded(tmp_path):
    succeeded("train", *TINY, *OBJECTIVE, f"run_dir={tmp_path}/run")
    lineage = json.loads((tmp_path / "run" / "adapter" / "lineage.json").read_text())
    assert lineage["objective"] == "focal" and lineage["config"]["objective"] == {"name": "focal", "focus": 1.0}
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(0 < float(row["missed"]) < 1 for row in rows if row["loss"])
    assert any(row["validation_missed"] for row in rows)
    resumed = command("train", *TINY, *OBJECTIVE[:2], *SHORT, f"run_dir={tmp_path}/run", "resume=auto")
    assert resumed.returncode == 2 and "objective.focus (was 1.0, is 2.0)" in resumed.stderr
    other = command("train", *TINY, *SHORT, f"run_dir={tmp_path}/run", "resume=auto")
    assert other.returncode == 2 and "objective.name (was 'focal', is 'sft')" in other.stderr


@pytest.mark.slow
def test_own_rows_and_their_score(tmp_path):
    words = ["imports=[own_data]", "data=jsonl", "data.source=sums", "data.task=sums", *SHORT]
    succeeded("train", *TINY, *words, f"run_dir={tmp_path}/run")
    succeeded("evaluate", f"adapter_path={tmp_path}/run", "imports=[own_data]", "max_rows=8")
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 <= scores["adapter"]["metrics"]["right"] <= 1


@pytest.mark.slow
def test_own_source(tmp_path):
    with sqlite3.connect(tmp_path / "rows.db") as database:
        database.execute("CREATE TABLE rows (prompt TEXT, completion TEXT)")
        database.executemany("INSERT INTO rows VALUES (?, ?)", [(f"{a} + 1?", str(a + 1)) for a in range(16)])
    words = ["imports=[own_source]", "data=jsonl", "data.source=sqlite", "data.cache_dir=null", "model=tiny"]
    run = [f"run_dir={tmp_path}/run", "trainer.accelerator=cpu", *SHORT]
    succeeded("train", *words, f"data.train_path={tmp_path}/rows.db", *run)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    refused = command("data", *words, f"data.train_path={tmp_path}/none.db")
    assert (
        refused.returncode == 2 and refused.stderr == f"error: data.train_path={tmp_path}/none.db: no such database\n"
    )


@pytest.mark.slow
def test_own_row_format(tmp_path):
    rows = [{"problem": f"{a} + 1?", "steps": [f"{a} + 1 = {a + 1}"], "solution": str(a + 1), "system": "Count."}
            for a in range(16)]  # fmt: skip
    (tmp_path / "worked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["imports=[own_rows]", f"data={tmp_path}/worked.jsonl", "data.cache_dir=null"]
    shown = succeeded("data", *words, "model=tiny")
    assert "Count." in shown and "Answer: " in shown
    succeeded("train", *words, *SHORT, "model=tiny", "trainer.accelerator=cpu", f"run_dir={tmp_path}/run")
    unknown = command("data", *words[1:], "data.format=worked", "model=tiny")
    assert unknown.returncode == 2 and "data.format=worked: no such format" in unknown.stderr
    rows[3]["steps"] = "none"
    (tmp_path / "worked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    refused = command("data", *words, "model=tiny")
    assert refused.returncode == 2 and "worked.jsonl line 4" in refused.stderr and "a list of texts" in refused.stderr


REPLACES = "from lightning_peft.adapters import dora\nfrom lightning_peft.adapters.registry import METHODS\n"
UNWANTED = {
    "absent": (None, "no module of that name in the working folder ("),
    "needs": ("import not_there", "it imports not_there, which is not installed"),
    "raises": ("1 / 0", "ZeroDivisionError: division by zero ("),
    "says_two_lines": ("raise OSError('one\\ntwo')", "OSError: one two ("),
    "is_no_python": ("def f(:", "SyntaxError: invalid syntax ("),
    "is_a_script": ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])", "ends the program while it is"),
    "ends": ("import sys\nsys.exit(3)", "ends the program while it is imported (sys.exit(3)); put what a script"),
    "replaces": (f"{REPLACES}METHODS['lora'] = dora.METHOD", "replaces METHODS['lora'], which runs and adapters mean"),
    "updates": (f"{REPLACES}METHODS |= {{'vera': dora.METHOD}}", "replaces METHODS['vera'], which runs and adapters"),
    "removes": (f"{REPLACES}del METHODS['lora']", "removes METHODS['lora'], which runs and adapters mean"),
    "adds_no_row": (f"{REPLACES}METHODS['mine'] = dora.DoRALinear", "METHODS['mine']=ABCMeta: must be a Method"),
    "has_a_blank": (f"{REPLACES}METHODS['my own'] = dora.METHOD", "METHODS['my own']: a name is letters, digits and _"),
    "a.py": ("", "must be a module by its dotted name, as in imports=[a], from"),
    "token": ("", "which comes before"),
}


@pytest.mark.parametrize("name", UNWANTED)
def test_module_that_cannot_be_imported_is_one_line(tmp_path, name, monkeypatch):
    text, message = UNWANTED[name]
    if text is not None:
        (tmp_path / f"{name.removesuffix('.py')}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [dict(table.rows) for table in TABLES]
    for _ in range(2):  # what failed once is not taken for imported
        with pytest.raises(PluginError, match=re.escape(f"imports={name}: ") + ".*" + re.escape(message)) as raised:
            compose_config("train", ["model=tiny", f"imports=[{name}]"])
        assert "\n" not in str(raised.value)
    assert [table.rows for table in TABLES] == rows


def test_module_that_ends_the_program_is_one_line_of_the_command(tmp_path):
    (tmp_path / "ends.py").write_text(UNWANTED["is_a_script"][0])
    done = command("train", "imports=[ends]", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: imports=ends: ends the program")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_what_a_module_prints_is_kept_off_stdout(tmp_path):
    (tmp_path / "speaks.py").write_text("print('hello')\nprint('there')")
    done = command("config", "train", "model=tiny", "imports=[speaks]", cwd=tmp_path)
    assert done.returncode == 0 and "hello" not in done.stdout
    assert done.stderr == "imports=speaks: prints while it is imported: hello there\n"


def test_row_has_the_name_that_it_is_chosen_by(tmp_path, monkeypatch):
    (tmp_path / "unnamed.py").write_text(
        "from lightning_peft.adapters import lora\nfrom lightning_peft.adapters.registry import METHODS\n"
        "from lightning_peft.optim.optimizers import OPTIMIZERS\n"
        "METHODS['unnamed'] = lora.METHOD\nOPTIMIZERS['unnamed'] = OPTIMIZERS['adamw']"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        config = compose_config("train", ["model=tiny", "imports=[unnamed]", "method=unnamed", "optimizer=unnamed"])
    finally:
        del METHODS["unnamed"], OPTIMIZERS["unnamed"]
    assert (config.adapter.method, config.optimizer.name) == ("unnamed", "unnamed")


def test_installed_package_announces_its_module(tmp_path):
    shutil.copy(EXAMPLES / "own_method.py", tmp_path)
    announced = tmp_path / "own-1.0.dist-info"
    announced.mkdir()
    (announced / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (announced / "entry_points.txt").write_text("[lightning_peft.plugins]\nrow_gain = own_method\n")
    code = (
        "from lightning_peft.compose import compose_config\n"
        "print(compose_config('train', ['method=row_gain', 'model=tiny']).adapter.largest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout == "0.5\n", done.stderr


@pytest.mark.multi_process
def test_own_method_trains_on_several_ranks(run, tmp_path):
    words = [*METHOD, "adapter.largest=0.25", "strategy=ddp", "trainer.devices=2"]
    succeeded("train", *TINY, *words, f"run_dir={tmp_path}/run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


@pytest.mark.multi_process
def test_own_objective_trains_on_several_ranks(tmp_path):
    succeeded("train", *TINY, *OBJECTIVE, "strategy=ddp", "trainer.devices=2", f"run_dir={tmp_path}/run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


@pytest.mark.multi_process
def test_own_method_is_swept(tmp_path):
    words = [*METHOD, "adapter.largest=0.2,0.4"]
    succeeded("train", "-m", *TINY, *words, f"run_dir={tmp_path}/sweep")
    results = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/result.json")]
    assert [result["status"] for result in results] == ["finished", "finished"]
