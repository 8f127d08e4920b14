"""init writes a file that trains, config says what is composed and why, schema and completion know every word."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from lightning_peft.__main__ import main
from lightning_peft.commands.completion import all_words
from lightning_peft.commands.init import DEFAULTS, text_of
from lightning_peft.commands.schema import schema_of_file
from lightning_peft.compose import compose_config
from lightning_peft.help import GROUPS
from lightning_peft.runs.folder import starting_config
from lightning_peft.schemas import CONF_DIR
from lightning_peft.words import everyday, options_of_group


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "choices",
    [
        [],
        ["method=qlora", "model=org/name", "data=rows.jsonl"],
        ["method=dora", "model=tiny", "data=alpaca", "optimizer.lr=0.01", "data.max_length=64"],
        ["method=ia3", "logger=wandb"],
        ["method=full", "hardware=cpu"],
        ["objective=dpo", "objective.beta=0.2", "optimizer=adamw_8bit", "optimizer.lr=0.01", "schedule=linear"],
        ["rank=tapered", "target_modules=[q_proj,v_proj]", "quantization=nf4", "strategy=ddp"],
        ["rank=16", "target_modules=attention", "logger=[csv,wandb]", "dry_run=true", "resume=auto"],
        ["recipe=lora/text_to_sql", "model=tiny"],
        ["data.train_path=rows, mine.jsonl", "+data.template_options={enable_thinking:false}", "++seed=3"],
        ["+callbacks.timer._target_=lightning.pytorch.callbacks.Timer", "trainer.deterministic=warn"],
    ],
)
def test_init_writes_a_file_that_composes_to_the_choices(choices):
    assert main(["init", "my.yaml", *choices]) == 0
    ours = starting_config(everyday("train", ["my.yaml", "run_dir=r"]))
    assert ours == compose_config("train", everyday("train", [*choices, "run_dir=r"]))
    assert Path("my.yaml").read_text().count("#") > 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["there.yaml"], "there.yaml: exists already"),
        (["my.json"], "my.json: must end in .yaml"),
        (["my.yaml", "method=qlaro"], "method=qlaro: no such option"),
        (["my.yaml", "lr=1"], "lr: no such option; use optimizer.lr"),
        (["my.yaml", "~logger"], "~logger: a file gives keys their values; use lightning-peft train my.yaml ~logger"),
        (["my.yaml", "config_path=r/config.yaml"], "config_path=r/config.yaml: is a whole config already"),
    ],
)
def test_init_refuses_in_one_line_and_writes_nothing(words, message, capsys):
    Path("there.yaml").write_text("method: lora\n")
    assert main(["init", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert [path.name for path in Path().iterdir()] == ["there.yaml"]


def test_init_keeps_the_folder_of_the_run():
    assert main(["init", "my.yaml", "run_dir=runs/ours"]) == 0
    assert starting_config(everyday("train", ["my.yaml"])).run_dir == "runs/ours"


def test_every_group_of_train_is_kept_by_init_or_refused():
    options = {group: options_of_group(group) for group in GROUPS if group not in ("cluster", "adapter")}
    for group, names in options.items():
        name = next(name for name in names if "schema" not in name and name not in DEFAULTS.values())
        assert text_of(Path("my.yaml"), [f"{group}={name}"]).count(f"{group}: {name}\n") == 1, group


def test_config_says_what_set_each_value(capsys):
    Path("my.yaml").write_text("method: qlora\ndata: {max_length: 64}\n")
    assert main(["config", "train", "my.yaml", "optimizer.lr=0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "quantization.kind: nf4    # my.yaml" in lines and "data.max_length: 64    # my.yaml" in lines
    assert "optimizer.lr: 0.01    # optimizer.lr=0.01" in lines and "seed: 0" in lines
    assert {line.partition(":")[0] for line in lines} >= {"adapter.rank", "trainer.max_steps", "guard.factor"}
    assert main(["config", "nope"]) == 2


def test_schema_describes_a_file(capsys):
    assert main(["schema", "schema.json"]) == 0
    properties = json.loads(Path("schema.json").read_text())["properties"]
    assert "qlora" in properties["method"]["enum"]
    assert properties["guard"]["properties"]["patience"]["type"] == ["integer"]
    assert properties["guard"]["properties"]["action"]["enum"] == ["stop", "rollback", "skip", "none"]
    (data,) = [part for part in properties["data"]["anyOf"] if "properties" in part]
    assert "Longest sample in tokens" in data["properties"]["max_length"]["description"]


SCHEMA = jsonschema.Draft202012Validator(schema_of_file())


def test_written_files_and_recipes_fit_the_schema():
    assert main(["init", "my.yaml", "method=qlora", "data=rows.jsonl", "data.system_prompt=Costs ${5}"]) == 0
    files = [Path("my.yaml"), *(CONF_DIR / "recipe").rglob("*.yaml")]
    assert len(files) > 10
    for file in files:
        assert not list(SCHEMA.iter_errors(yaml.safe_load(file.read_text()))), file


FITS = """
adapter: {rank: 3}
adapter.rank: 3
logger: csv
logger: [csv, wandb]
logger: {wandb: {project: x}}
model: {path: x}
model: org/name
data: {train_path: [a, b]}
data: {sources: [{train_path: a}]}
data.sources.a.weight: 2
data: {packing: auto}
trainer: {anything: 1}
trainer.anything: 1
callbacks: {mine: {_target_: my.Callback}}
rank: 16
target_modules: [q_proj]
optimizer: {lr: 2e-4}
imports: my_module
sweep: {search: random}
cluster: local
conf_dir: conf
""".strip().splitlines()
FITS_NOT = """
adapter: {rnk: 3}
adapter.rnk: 3
data: {max_rows: ten}
optimizer: {lr: fast}
logger: [nope]
validation: {every: 3}
lr: 2e-4
""".strip().splitlines()


@pytest.mark.parametrize("line", [*FITS, *FITS_NOT])
def test_schema_takes_what_train_takes(line):
    assert SCHEMA.is_valid(yaml.safe_load(line)) == (line in FITS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_groups_and_keys(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "estimate" in script and "method=qlora" in script and "optimizer.lr=" in script
    assert "adapter.use_dora=" not in script and "adapter.dimension=" in script and "objective.beta=" in script
    assert "optimizer.lora_plus_ratio=" in all_words()
    assert main(["completion", "tcsh"]) == 2


MIXED = """
data: {sources: {sql: {train_path: a.jsonl}, chat: {train_path: b.jsonl}}}
callbacks: {timer: {_target_: lightning.pytorch.callbacks.Timer, duration: {}}, other: {_target_: other.Callback}}
"""


@pytest.mark.parametrize(
    ("word", "sources", "callbacks", "loggers"),
    [
        ("seed=1", ["sql", "chat"], ["timer", "other"], ["metrics_csv"]),
        ("~data.sources.sql", ["chat"], ["timer", "other"], ["metrics_csv"]),
        ("~callbacks.other", ["sql", "chat"], ["timer"], ["metrics_csv"]),
        ("~callbacks", ["sql", "chat"], [], ["metrics_csv"]),
        ("~logger", ["sql", "chat"], ["timer", "other"], []),
    ],
)
def test_what_a_file_names_may_be_taken_away(word, sources, callbacks, loggers):
    Path("my.yaml").write_text(MIXED)
    config = compose_config("train", everyday("train", ["my.yaml", word, "run_dir=r"]))
    assert (list(config.data.sources), list(config.callbacks), list(config.logger)) == (sources, callbacks, loggers)
    assert "timer" not in callbacks or config.callbacks["timer"]["duration"] == {}


def test_what_is_not_there_cannot_be_taken_away(capsys):
    assert main(["train", "model=tiny", "~logger.csv", "run_dir=r"]) == 2
    assert "logger.csv" in (said := capsys.readouterr().err) and "data=" not in said


def test_file_may_say_that_there_are_no_callbacks():
    Path("my.yaml").write_text("callbacks: {}\nclaim: {}\n")
    config = compose_config("train", everyday("train", ["my.yaml", "run_dir=r"]))
    assert config.callbacks == {} and config.claim == {}
