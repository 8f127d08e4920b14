"""Everyday words are understood, and those of other tools are answered with ours in one line."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lightning_peft.__main__ import main
from lightning_peft.commands.plan_sweep import planned, split_words
from lightning_peft.compose import compose_config
from lightning_peft.composition_errors import nearest
from lightning_peft.config import plain
from lightning_peft.help import WIDTH, command_help
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.options import options_of
from lightning_peft.runs.folder import starting_config
from lightning_peft.schemas import ROOTS
from lightning_peft.words import BY_THEIRS, everyday, words_of_file

THEIRS = {
    "lr=1e-4": "optimizer.lr", "learning_rate=1e-4": "optimizer.lr", "epochs=3": "trainer.max_epochs",
    "num_train_epochs=3": "trainer.max_epochs", "num_epochs=3": "trainer.max_epochs", "max_steps=10": "trainer.max_steps",
    "batch_size=4": "data.micro_batch_size", "per_device_train_batch_size=4": "data.micro_batch_size",
    "micro_batch_size=4": "data.micro_batch_size", "gradient_accumulation_steps=2": "trainer.accumulate_grad_batches",
    "alpha=32": "adapter.alpha", "lora_alpha=32": "adapter.alpha", "r=8": "rank", "lora_r=8": "rank",
    "lora_dropout=0.1": "adapter.dropout", "dropout=0.1": "adapter.dropout", "weight_decay=0.1": "optimizer.weight_decay",
    "warmup_steps=5": "schedule.warmup_steps", "warmup_ratio=0.1": "schedule.warmup_fraction",
    "max_grad_norm=1": "trainer.gradient_clip_val", "lr_scheduler_type=linear": "schedule", "optim=adamw": "optimizer",
    "max_seq_length=512": "data.max_length", "sequence_len=512": "data.max_length", "cutoff_len=512": "data.max_length",
    "max_length=512": "data.max_length", "sample_packing=true": "data.packing", "packing=true": "data.packing",
    "val_set_size=0.1": "data.validation_fraction", "eval_dataset=v.jsonl": "data.validation_path",
    "dataset=x": "data=FILE", "datasets=x": "data=FILE", "train_file=x.jsonl": "data=FILE",
    "model_name_or_path=x": "model", "base_model=org/name": "model", "model_name=x": "model",
    "load_in_4bit=true": "method=qlora", "load_in_8bit=true": "quantization=int8", "bf16=true": "trainer.precision",
    "fp16=true": "trainer.precision", "precision=bf16-true": "trainer.precision", "output_dir=out": "run_dir",
    "out_dir=out": "run_dir", "resume_from_checkpoint=x": "resume=auto", "save_steps=5": "checkpoint.every_n_steps",
    "save_total_limit=2": "checkpoint.keep_last", "eval_steps=5": "validation.every_n_steps",
    "logging_steps=5": "trainer.log_every_n_steps", "gradient_checkpointing=true": "activation_checkpointing",
    "report_to=wandb": "logger", "wandb_project=x": "logger.wandb.project", "run_name=x": "logger.wandb.name",
    "deepspeed=z3.json": "strategy", "fsdp=full_shard": "strategy", "devices=2": "trainer.devices",
    "num_gpus=2": "trainer.devices", "num_nodes=2": "trainer.num_nodes", "modules_to_save=[lm_head]": "adapter.trainable_modules",
    "use_rslora=true": "adapter.rank_stabilized", "lora_target_modules=[q_proj]": "target_modules",
    "attn_implementation=sdpa": "model.attention", "trust_remote_code=true": "model.trust_remote_code",
    "torch_compile=true": "compile", "max_samples=10": "data.max_rows", "partition=gpu": "cluster.partition",
    "mbs=2": "data.micro_batch_size", "limit=3": "data.max_rows", "eval=true": "validation.every_n_steps",
    "dataset.path=x": "data.train_path", "dataset.split=x": "data.hub_split", "gres=gpu:1": "cluster.gpus_per_node",
    "cpu=true": "hardware=cpu", "name=x": "run_dir", "dora=true": "method=dora", "attn=sdpa": "model.attention",
    "lora_init=pissa": "adapter.init", "response_template=x": "data.train_on", "4bit=true": "method=qlora",
    "push=true": "lightning-peft push RUN repo=NAME after training",
    "merge=true": "lightning-peft merge RUN output=FOLDER after training",
}  # fmt: skip


@pytest.mark.parametrize("word", THEIRS)
def test_word_of_another_tool_is_answered_with_ours(word):
    assert nearest(word.partition("=")[0], "train") == f"; use {THEIRS[word]}"


@pytest.mark.parametrize("word", ["lr=1e-4", "load_in_4bit=true", "dataset=x"])
def test_answer_is_the_error_of_the_command(word):
    with pytest.raises(ValueError) as wrong:
        compose_config("train", everyday("train", [word]))
    assert str(wrong.value) == f"{word.partition('=')[0]}: no such option; use {THEIRS[word]}"


def test_every_answer_is_a_word_we_have():
    known = {option.key for option in options_of(ROOTS["submit_sweep"])}
    known |= {option.key for option in options_of(ROOTS["train"])}
    groups = {path.name for path in (Path(__file__).parents[2] / "conf").iterdir() if path.is_dir()}
    known |= {f"objective.{option.name}" for row in OBJECTIVES.values() for option in fields(row.config)}
    for ours in set(BY_THEIRS.values()):
        key = ours.partition("=")[0]
        is_known = key in known or key in groups or key.startswith(("trainer.", "logger.", "adapter.", "optimizer."))
        assert is_known or key.startswith("cluster."), ours


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--lr=1e-4", "--lr=1e-4: options are key=value without dashes, as in optimizer.lr=1e-4"),
        ("--output_dir", "--output_dir: options are key=value without dashes, as in run_dir=VALUE"),
        ("my.yaml", "my.yaml: no such file; `lightning-peft init my.yaml` writes one to start from"),
        ("hello", "hello: not of the form key=value (quote text with special characters)"),
        ("+sede=3", "sede: no such option; did you mean seed"),
        ("4bit=true", "4bit: no such option; use method=qlora"),
        ("account=me", "account: no such option; submit takes it as cluster.sbatch=['--account=VALUE']"),
        ("mem=64G", "mem: no such option; submit takes it as cluster.sbatch=['--mem=VALUE']"),
        ("sweep_dir=x", "sweep_dir: no such option; train -m takes run_dir=FOLDER for it, and submit -m sweep_dir"),
    ],
)
def test_wrong_word_is_one_line_and_status_2(word, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", word]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}") and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["rank=16"], ["adapter.rank=16"]),
        (["rank=4,8"], ["adapter.rank=4,8"]),
        (["rank=r8"], ["rank=r8"]),
        (["model=org/name"], ["model=hf", "model.path=org/name"]),
        (["model=llama_3_1_8b"], ["model=llama_3_1_8b"]),
        (["data=rows.csv"], ["data=jsonl", "data.train_path=rows.csv"]),
        (["data=alpaca"], ["data=alpaca"]),
        (["data=alpaca,gsm8k"], ["data=alpaca,gsm8k"]),
        (["data.train_path=rows.jsonl"], ["data=jsonl", "data.train_path=rows.jsonl"]),
        (["data.sources={a:{train_path:x}}"], ["data=jsonl", "data.sources={a:{train_path:x}}"]),
        (["data.sources.a.train_path=x"], ["data=jsonl", "data.sources.a.train_path=x"]),
        (["data.hub_name=org/name"], ["data=hub", "data.hub_name=org/name"]),
        (["data=alpaca", "data.train_path=x"], ["data=alpaca", "data.train_path=x"]),
        (["target_modules=all-linear"], ["target_modules=all_linear"]),
        (["adapter.target_modules=all"], ["adapter.target_modules=all_linear"]),
        (["target_modules=q_proj,v_proj"], ["adapter.target_modules=[q_proj,v_proj]"]),
        (["target_modules=[q_proj]"], ["adapter.target_modules=[q_proj]"]),
        (["target_modules=attention,mlp"], ["target_modules=attention,mlp"]),
    ],
)
def test_everyday_word_means_what_it_says(words, written):
    assert everyday("train", words) == written


MINE = """
method: qlora
model: org/name
rank: 8
data:
  train_path: my rows.jsonl
  max_length: 256
optimizer: {lr: 3e-4}
adapter:
  target_modules: [q_proj, "re:.*mlp.*"]
logger: wandb
trainer: {max_epochs: 2, gradient_clip_val: null}
"""


def test_own_file_gives_groups_and_keys_and_later_words_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(MINE)
    config = starting_config(everyday("train", ["my.yaml", "data.max_length=128", "run_dir=r"]))
    assert (config.method, config.quantization.kind.name, config.adapter.rank) == ("qlora", "nf4", 8)
    assert (config.model.path, config.data.train_path, config.data.max_length) == ("org/name", "my rows.jsonl", 128)
    assert config.optimizer.lr == 3e-4 and config.adapter.target_modules == ["q_proj", "re:.*mlp.*"]
    assert config.trainer["max_epochs"] == 2 and config.trainer["gradient_clip_val"] is None
    assert "wandb" in config.logger


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("rank=r16", {"rank": 16}),
        ("rank=16", {"rank": 16}),
        ("target_modules=all", {"target_modules": "all_linear"}),
        ("target_modules=mlp", {"target_modules": "mlp"}),
        ("adapter.target_modules=all-linear", {"target_modules": "all_linear"}),
        ("other.yaml", {"rank": 4}),
    ],
)
@pytest.mark.parametrize("text", ["rank: 8\ntarget_modules: [q_proj]", "adapter: {rank: 8, target_modules: [q_proj]}"])
def test_later_word_wins_over_a_file_by_key_and_by_group(tmp_path, monkeypatch, text, word, changed):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text)
    Path("other.yaml").write_text("rank: r4\n")
    adapter = compose_config("train", everyday("train", ["my.yaml", word, "run_dir=r"])).adapter
    found = {"rank": adapter.rank, "target_modules": adapter.target_modules}
    assert found == {"rank": 8, "target_modules": ["q_proj"]} | changed


def test_option_takes_back_what_a_file_says_in_other_words(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("model: org/name\ndata: rows.csv\nrank: tapered\n")
    assert everyday("train", [str(path), "model=tiny", "data=alpaca", "rank=8"]) == [
        "model=tiny", "data=alpaca", "adapter.rank=8"
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["rank=4,8", "rank=r4,r8", "adapter.rank=4,8", "data.sources.a.weight=1,2"])
def test_key_of_a_file_may_be_swept(tmp_path, word):
    path = tmp_path / "my.yaml"
    path.write_text("rank: 16\nmodel: tiny\ndata: {sources: {a: {train_path: a.jsonl, weight: 3}}}\n")
    own, words = split_words(everyday("submit", [str(path), word, "cluster=local"]))
    sweep, runs = planned(compose_config("submit_sweep", own), words, tmp_path / "sweep")
    key = "data.sources.a.weight" if "weight" in word else "adapter.rank"
    swept = [run.data.sources["a"]["weight"] if "weight" in word else run.adapter.rank for run in runs]
    assert swept == ([1, 2] if "weight" in word else [4, 8]) and not any(w.startswith(key) for w in sweep.words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "not YAML"),
        ("rank: 8\nmethod: dora\nrank: 16\n", "not YAML .*key 'rank' twice"),
        ("data:\n  max_length: 64\n  max_length: 128\n", "not YAML .*key 'max_length' twice"),
        ("- method", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("1: 2", "a key must be text"),
    ],
)
def test_file_that_is_none_is_said(tmp_path, text, message):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"my.yaml: .*{message}"):
        words_of_file(path)


def test_config_of_a_run_is_not_taken_for_a_file_of_words(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain(compose_config("train", ["run_dir=r"]))))
    with pytest.raises(ValueError, match="is the whole config of a run; config_path="):
        words_of_file(path)


@pytest.mark.parametrize("command", ["train", "submit", "sweep", "estimate", "evaluate", "generate", "merge"])
def test_help_is_a_page_of_80_columns_with_docstrings(command, capsys):
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= WIDTH + 4
    key = {"train": "optimizer.lr=0.0002", "submit": "sweep.parallel=null", "sweep": "failed=false"}.get(command, "=")
    assert key in page and page.count("\n") > 10
    takes = {"sweep": "status|retry|cancel|table DIR", "evaluate": "DIR ", "generate": "DIR ", "merge": "DIR "}
    assert page.startswith(f"usage: lightning-peft {command} {takes.get(command, '[FILE.yaml] ')}")


def test_help_of_a_group_has_its_options_and_every_key(capsys):
    assert main(["train", "--help", "data"]) == 0
    page = capsys.readouterr().out
    assert "text_to_sql" in page and "data.on_too_long=truncate" in page
    assert "always counted and reported" in " ".join(page.split())


def test_help_of_a_choice_says_what_it_sets():
    page = command_help("train", ["method=qlora", "model=tiny"])
    assert "quantization.kind=nf4   (else none)" in page and "model.name=tiny   (else smollm2_135m)" in page


def test_every_option_has_a_docstring():
    undocumented = [option.key for root in ROOTS.values() for option in options_of(root) if not option.doc]
    assert [key for key in undocumented if not key.endswith(".method") and key != "adapter.method"] == []
