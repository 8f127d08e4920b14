"""A YAML file of another tool, given whole: one line says what each of its keys is called here."""

import pytest

from lightning_peft.__main__ import main
from lightning_peft.words import everyday

FILES = {
    "axolotl": (
        """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 16
wandb_project:
gradient_accumulation_steps: 2
num_epochs: 1
lr_scheduler: cosine
learning_rate: 0.0002
loss_watchdog_threshold: 5.0
special_tokens:
  pad_token: "<|end_of_text|>"
""",
        17,
        "write base_model as model, load_in_4bit as method=qlora, datasets as data=FILE, val_set_size as "
        "data.validation_fraction, output_dir as run_dir, sequence_len as data.max_length, sample_packing as "
        "data.packing, "
        "lora_r as rank, gradient_accumulation_steps as trainer.accumulate_grad_batches, num_epochs as "
        "trainer.max_epochs, "
        "lr_scheduler as schedule, learning_rate as optimizer.lr; leave out load_in_8bit, strict, wandb_project, "
        "special_tokens; loss_watchdog_threshold: guard.factor and guard.patience watch the loss",
    ),
    "LLaMA-Factory": (
        """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
plot_loss: true
ddp_timeout: 180000000
""",
        12,
        "write model_name_or_path as model, stage as objective, finetuning_type as method, lora_rank as rank, "
        "lora_target as "
        "target_modules, dataset as data=FILE, cutoff_len as data.max_length, max_samples as data.max_rows; leave out "
        "do_train, template, ddp_timeout; plot_loss: use lightning-peft report RUN after training",
    ),
    "TRL": (
        """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
use_peft: true
per_device_train_batch_size: 2
eval_strategy: steps
packing: false
made_up_by_nobody: 3
""",
        7,
        "write model_name_or_path as model, dataset_name as data=FILE, use_peft as method, "
        "per_device_train_batch_size as "
        "data.micro_batch_size, eval_strategy as validation.every_n_steps, packing as data.packing; not known: "
        "made_up_by_nobody",
    ),
    "torchtune": (
        """
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/tokenizer.model
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: True
seed: null
epochs: 1
lr_scheduler:
  num_warmup_steps: 100
enable_activation_offloading: True
""",
        7,
        "write epochs as trainer.max_epochs, enable_activation_offloading as activation_checkpointing=offload, "
        "dataset._component_ as data=FILE, dataset.packed as data.packing, lr_scheduler.num_warmup_steps as "
        "schedule.warmup_steps; leave out tokenizer",
    ),
    "litgpt": (
        """
checkpoint_dir: checkpoints/meta-llama/Llama-3.2-1B
lora_r: 32
train:
  save_interval: 200
  global_batch_size: 8
  tie_embeddings:
eval:
  interval: 100
""",
        6,
        "write checkpoint_dir as model, lora_r as rank, train.save_interval as checkpoint.every_n_steps, "
        "train.global_batch_size as trainer.accumulate_grad_batches, eval.interval as validation.every_n_steps; "
        "leave out "
        "train.tie_embeddings",
    ),
    "Unsloth": (
        """
training: {max_seq_length: 2048, learning_rate: 0.0002, optim: adamw_8bit}
lora: {lora_r: 16, use_rslora: false}
logging: {enable_wandb: true, log_frequency: 10}
""",
        7,
        "write training.max_seq_length as data.max_length, training.learning_rate as optimizer.lr, training.optim as "
        "optimizer, lora.lora_r as rank, lora.use_rslora as adapter.rank_stabilized, logging.enable_wandb as logger, "
        "logging.log_frequency as trainer.log_every_n_steps",
    ),
}  # fmt: skip
"""Tool -> the file, how many of its keys are no keys here, and what is said of them."""


@pytest.mark.parametrize("tool", FILES)
def test_every_key_of_another_tool_s_file_is_named_at_once(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, count, said = FILES[tool]
    (tmp_path / "their.yaml").write_text(text)
    assert main(["train", "their.yaml"]) == 2
    assert capsys.readouterr().err == f"error: their.yaml: {count} of its keys are another tool's; {said}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["their.yaml"]


def test_groups_of_ones_own_are_no_other_tool_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "foo.yaml").write_text("# @package _global_\nseed: 7\n")
    (tmp_path / "my.yaml").write_text("conf_dir: conf\nexperiment: foo\nlimit: 3\n")
    assert "experiment=foo" in everyday("train", ["my.yaml"])


def test_keys_of_hydra_are_no_other_tool_s(tmp_path, monkeypatch):
    """A sweep's file may say where its trials go, and by which launcher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("hydra/launcher: basic\nhydra:\n  job: {name: a}\n  sweep: {dir: trials}\n")
    assert everyday("train", ["my.yaml"]) == ["hydra/launcher=basic", "hydra.job.name=a", "hydra.sweep.dir=trials"]
