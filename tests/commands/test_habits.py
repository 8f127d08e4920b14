"""Habits of people who come from other tools, and slips of the hand: the right word in one line, before any work."""

import ast
import os
import sys
from pathlib import Path

import pytest
import started
import yaml

from lightning_peft.__main__ import main
from lightning_peft.command_line import one_of_each_value
from lightning_peft.compose import compose_config
from lightning_peft.composition_errors import nearest
from lightning_peft.other_tools import ours, what_instead
from lightning_peft.words import everyday, no_such_option, options_of_group, words_of_file

KEYS = {
    "optimizer.lr": "peak_lr training.lr optimizer.learning_rate model.lr train.lr Learning-Rate",
    "optimizer.beta2": "adam_beta2", "optimizer.eps": "adam_epsilon", "optimizer.beta1": "optimizer.betas",
    "schedule.min_lr_ratio": "cosine_min_lr_ratio", "schedule": "schedule.name",
    "trainer.max_steps": "max_iters", "trainer.precision": "mixed_precision bnb_4bit_compute_dtype model.dtype",
    "trainer.accumulate_grad_batches": "gradient_accumulation_iters", "trainer.log_every_n_steps": "log_interval",
    "data.micro_batch_size": "per_device_eval_batch_size data.batch_size data.micro-batch-size",
    "data.max_length": "model_max_length data.seq_len", "data.train_path": "data.path",
    "data.validation_fraction": "val_split_fraction", "data.text_column": "dataset_text_field",
    "data.prompt_column": "field_instruction", "data.train_on": "train_on_inputs completion_only_loss",
    "data=FILE": "data_files train_dataset", "data.ignore_columns": "remove_unused_columns",
    "data.cache_dir": "dataset_prepared_path", "seed": "data_seed", "objective.noise_alpha": "neftune_noise_alpha",
    "rank": "adapter.r lora.r peft.r lora_dim", "adapter.alpha": "adapter.lora_alpha",
    "adapter.bias": "lora_bias", "adapter.rank_pattern": "rank_pattern", "adapter.init_from": "adapter_name_or_path",
    "method=dora": "use_dora adapter.use_dora", "method=qlora": "use_qlora bnb_4bit_quant_type",
    "quantization": "quantization_config", "model.revision": "model_revision", "hardware": "device_map use_cpu",
    "run_dir": "log_dir", "resume=auto": "resume_from", "checkpoint.every_n_steps": "save_strategy",
    "checkpoint.best_by": "metric_for_best_model", "early_stopping.patience": "early_stopping_patience",
    "validation.every_n_steps": "eval_strategy", "activation_checkpointing": "use_gradient_checkpointing",
    "logger": "use_wandb", "strategy": "deepspeed_config fsdp_config", "dry_run": "dryrun",
}  # fmt: skip
"""Our key -> keys of HF Trainer, TRL, PEFT, axolotl, LLaMA-Factory, torchtune, litgpt and unsloth."""

KEYS_OF_FILES = """
auto_find_batch_size eval_delay full_determinism hub_token ignore_data_skip label_smoothing_factor logging_first_step
save_only_model save_safetensors torch_compile_backend padding_free eval_packing dataset_num_proc max_prompt_length
ref_model eos_token task_type inference_mode target_parameters trainable_token_indices loftq_config eva_config
model_type strict plugins wandb_watch wandb_log_model lora_mlp_kernel eager_attention unfrozen_parameters relora_steps
noisy_embedding_alpha overrides_of_model_config mask_history neat_packing mix_strategy resize_vocab use_galore
infer_backend export_dir enable_thinking plot_loss kto_chosen_weight create_new_adapter rope_scaling lora_query lora_head
train.tie_embeddings eval.interval eval.max_new_tokens logger_name access_token apply_lora_to_mlp quantize_base shuffle
checkpointer metric_logger max_steps_per_epoch optimizer_in_bwd fsdp_cpu_offload tensor_parallel_dim
save_adapter_weights_only log_peak_memory_stats double_quantization disable_tqdm dataloader_drop_last
""".split()
"""Keys of other tools' files, as their users paste them."""

NO_COUNTERPART = {
    "do_train": "leave it out", "overwrite_output_dir": "resume=auto", "push_to_hub": "lightning-peft push",
    "load_best_model_at_end": "adapter_best", "chat_template": "data.layout=raw", "merge_weights": "lightning-peft merge",
    "use_liger_kernel": "always on", "group_by_length": "packed", "config": "lightning-peft train my.yaml",
}  # fmt: skip

OPTIONS = {
    "method=qlora": "method=qLoRA method=QLORA method=qlora_4bit method=qlra", "method=lora_plus": "method=lora+ method=LoRA-Plus",
    "method=full": "method=fft method=full-finetuning method=full_parameter", "method=ia3": "method=IA3",
    "objective=dpo": "method=dpo objective=rlhf objective=DPO", "objective=sft": "method=sft objective=pretrain",
    "model=llama_3_1_8b": "model=llama-3.1-8b model=Llama-3.1-8B", "model=tiny": "model=Tiny model=tinny",
    "hardware=auto": "hardware=cuda hardware=gpu", "hardware=gpu_80gb": "hardware=a100 hardware=GPU-80GB",
    "strategy=fsdp": "strategy=deepspeed strategy=zero3", "strategy=single": "strategy=auto",
    "optimizer=adamw": "optimizer=adam optimizer=AdamW optimizer=adamw_torch", "schedule=constant": "schedule=none",
    "optimizer=adamw_8bit": "optimizer=adamw_bnb_8bit", "logger=tensorboard": "logger=tensorbord", "data=hub": "data=hf",
    "quantization=nf4": "quantization=4bit quantization=NF4", "data=alpaca": "data=alpacca",
    "objective=reward": "objective=rm", "objective=dpo, on answers that lightning-peft pairs RUN draws": "objective=grpo",
    "strategy.tensor_parallel=2 with strategy=fsdp": "strategy=tp", "strategy=ddp": "strategy=ddp_spawn",
    "model=org/name of a checkpoint that is published so": "quantization=gptq quantization=awq quantization=fp8",
    "hardware=gpu_80gb_x8": "hardware=h100x8", "hardware=gpu_24gb": "hardware=24gb", "method=lora": "method=loar",
    "schedule=cosine": "schedule=cosine_with_restarts", "model=smollm2_135m": "model=smollm2",
    "recipe=lora/text_to_sql": "recipe=text_to_sql",
    "model=hf model.path=gpt2": "model=gpt2", "data=hub data.hub_name=tatsu-lab/alpaca": "data=tatsu-lab/alpaca",
}  # fmt: skip
"""Answer -> options as they are typed."""

SLIPS = [
    (["rank", "=", "16"], "rank = 16: no space around =, as in rank=16"),
    (["rank", "=16"], "rank =16: no space around =, as in rank=16"),
    (["rank=", "16"], "rank= 16: no space around =, as in rank=16"),
    (["rank:", "16"], "rank:: options are key=value, as in rank=16"),
    (["optimizer.lr: 1e-4"], "optimizer.lr: 1e-4: options are key=value, as in optimizer.lr=1e-4"),
    (["rank==16"], "rank==16: two =, as in rank=16 with one"),
    (["rank=16,"], "rank=16,: ends in ,; write rank=16"),
    (["optimizer.lr=1e-4;"], "optimizer.lr=1e-4;: ends in ;; write optimizer.lr=1e-4"),
    (["=16"], "=16: no key before the =; options are key=value"),
    ([""], "'': an empty word; options are key=value"),
    (["rank=“16”"], "rank=“16”: has quotes or dashes of a word processor; use plain ones, as in rank=\"16\""),
    (["optimizer.lr=1e−4"], "optimizer.lr=1e−4: has quotes or dashes of a word processor; use plain ones"),
    (["––rank=16"], "––rank=16: options are key=value without dashes, as in rank=16"),
    (["--lr", "1e-4"], "--lr: options are key=value without dashes, as in optimizer.lr=1e-4"),
    (["--dry-run"], "--dry-run: options are key=value without dashes, as in dry_run=true"),
    (["-c", "my.yaml"], "-c: name the file itself, as in lightning-peft train my.yaml"),
    (["--config=my.yaml"], "--config=my.yaml: name the file itself, as in lightning-peft train my.yaml"),
    (["--bf16", "True"], "--bf16: options are key=value without dashes, as in trainer.precision=bf16-mixed"),
    (["--deepspeed", "z3.json"], "--deepspeed: options are key=value without dashes, as in strategy=fsdp"),
    (["--resume"], "--resume: options are key=value without dashes, as in resume=auto"),
    (["--no-packing"], "--no-packing: options are key=value without dashes, as in data.packing=false"),
    (["--lora_target_modules", "q_proj", "v_proj"], "--lora_target_modules: options are key=value without dashes, as in target_modules=q_proj,v_proj"),
    (["-y"], "-y: no such option; leave it out: nothing is asked, and no run is written over"),
    (["--config-dir", "conf"], "--config-dir: no such option; conf_dir=FOLDER is the folder of one's own options"),
    (["rank", ":16"], "rank :16: options are key=value, as in rank=16"),
    (["adapter.rank:=8"], "adapter.rank:=8: options are key=value, as in adapter.rank=8"),
    (["adapter:rank=8"], "adapter:rank=8: options are key=value, as in adapter.rank=8"),
    (["optimizer.lr=1e–4"], "optimizer.lr=1e–4: has quotes or dashes of a word processor; use plain ones, as in optimizer.lr=1e-4"),
    (["rank=inf"], "rank=inf: no such option; rank is one of "),
    (["method=nan"], "method=nan: no such option; method is one of "),
    (["model=hf.co/org/name"], "model=hf.co/org/name: give its name on the hub, as in model=org/name"),
    (["model=org/name/"], "model=org/name/: give its name on the hub, as in model=org/name"),
    (["model=org/name@v1"], "model=org/name@v1: give the revision beside it, as in model=org/name model.revision=v1"),
    (["--version"], "--version: `lightning-peft --version` prints the version"),
    (["--overwrite_output_dir"], "--overwrite_output_dir: no such option; a used run_dir is an error"),
    (["~rank"], "~rank: nothing is taken away with ~; give the value that is wanted"),
    (["~trainer"], "~trainer: nothing is taken away with ~; give the value that is wanted"),
    (["run_dir="], "run_dir=: is empty; give one, or leave it out"),
    (["qlora"], "qlora: not of the form key=value; use method=qlora"),
    (["org/name"], "org/name: not of the form key=value; use model=org/name for a model, data=FILE for rows"),
    (["rows.csv"], "rows.csv: not of the form key=value; use data=rows.csv"),
    (["help"], "help: not of the form key=value; use --help"),
    (["my.toml"], "my.toml: not of the form key=value; a file of options is YAML and ends in .yaml"),
    (["method=[lora,dora]"], "method=[lora,dora]: takes one option; add -m and write method=lora,dora for a sweep"),
    (["method=null"], "method=null: no such option; method is one of "),
    (["logger=false"], "logger=false: no such option; use logger=none; "),
    (["model=7"], "model=7: no such option; "),
    (["rank=[4,8]"], "rank=[4,8]: takes one option; add -m and write rank=4,8 for a sweep"),
    (["cluster=local"], "cluster=local: train runs here; submit takes the same words"),
    (["model=https://huggingface.co/gpt2"], "model=https://huggingface.co/gpt2: give its name on the hub, as in model=hf model.path=gpt2"),
    (["model=hf.co/org/name?x=1"], "model=hf.co/org/name?x=1: give its name on the hub, as in model=org/name"),
    (["model=https://a.com/b/c.gguf"], "model=https://a.com/b/c.gguf: is no address of the hub; fetch it"),
    (["model=https://huggingface.co/org/name"], "model=https://huggingface.co/org/name: give its name on the hub, as in model=org/name"),
]  # fmt: skip
"""Words as typed -> the line that answers them, without composing anything."""

VALUES = {
    "rank=-1": "adapter.rank=-1: a rank is at least 1", "rank=1.5": "adapter.rank=1.5: must be a whole number$",
    "rank='0'": "adapter.rank=0: a rank is at least 1", "seed=4294967296": "seed=4294967296: must be below",
    "seed=a": "seed=a: must be a whole number$", "optimizer.lr=null": "optimizer.lr=null: .*leave it out",
    "trainer.devices=0,1": "^trainer.devices=0,1: several values", "trainer=[1]": "trainer=.*; must be keys with values",
    "adapter.rank=range(4,8)": "adapter.rank=range.4,8.: several values; add -m", "run-dir=x": "run-dir: .*did you mean run_dir",
    "METHOD=lora": "METHOD: no such option; did you mean method", "learnig_rate=1": "learnig_rate: .*did you mean optimizer.lr",
    "method=lora+": "method=lora.: no such option; use method=lora_plus; method is one of",
    "conf_dir=nope": "conf_dir=nope: no such folder",
    "optimizer.lr=10^-4": "^optimizer.lr=10.-4: must be a number; write 0.0001$",
    "optimizer.lr=1/10000": "^optimizer.lr=1/10000: must be a number; write 0.0001$",
    "optimizer.lr=2x10**-5": "^optimizer.lr=2x10..-5: must be a number; write 2e-05$",
    "optimizer.lr=auto": "^optimizer.lr=auto: must be a number, as in 2e-4$", "optimizer.lr=1/0": "^optimizer.lr=1/0: must be a number, as in 2e-4$",
    "optimizer.lr=1,5e-4": "several values; .*; one number is optimizer.lr=1.5e-4$",
    "trainer.max_steps=1,000": "several values; .*; one number is trainer.max_steps=1000$",
    "adapter.rank=4,8,16": r"several values; add -m for a sweep, or write a list as key=\[a,b\]$",
    "adapter.dropout=10%": "^adapter.dropout=10%: must be a number; write 0.1$",
    "data.max_length=4k": "^data.max_length=4k: must be a whole number; write 4000$",
    "data.max_length=30m": "^data.max_length=30m: must be a whole number$", "seed=0x10": "^seed=0x10: must be a whole number$",
    "device_memory_gib=24GB": "^device_memory_gib=24GB: must be a number; write 24$",
    "device_memory_gib=24000MB": "^device_memory_gib=24000MB: must be a number, as in 2e-4$",
    "rank=16.0": "^adapter.rank=16.0: must be a whole number; write 16$",
    "data.max_length=1e300": "^data.max_length=1e300: must be a whole number$",
    "adapter.target_modules=(q_proj,v_proj)": r"a list is written in brackets, as \[q_proj,v_proj\]$",
    "adapter.target_modules=[q_proj;v_proj]": r"a list is written in brackets, as \[q_proj,v_proj\]$",
    "seed": "^seed: not of the form key=value; give it a value, as in seed=VALUE$",
    "sweep.search=random": "sweep.search: no such option; it is of a sweep, which -m begins",
    "early_stopping.patience=5": "^early_stopping.patience=5: nothing is watched; give early_stopping.metric",
    "guard=off": "guard=off: .*must be keys with values inside", "qlora.rank=8": "qlora.rank: .*did you mean rank",
    "model.name=org/name": "model.name=org/name: must be one of .*; use model=org/name",
    "model=rows.jsonl": "model=rows.jsonl: no such option; rows are data=rows.jsonl",
    "model=x.safetensors": "model=x.safetensors: .*a model is the folder with its config.json",
    "model=$MODEL": r"model=\$MODEL: no such option; a variable of the environment is \${oc.env:MODEL}",
    "model=${oc.env:NO_MODEL}": r"\${oc.env:NO_MODEL}: refers to nothing that is there",
    "data=rows.jsonl#100": "data=rows.jsonl#100: no such option; use data=rows.jsonl data.max_rows=100",
    "recipe=nope": "recipe=nope: no such option; recipe is one of .*lora/text_to_sql",
    "lora_target=q_proj,v_proj": r"lora_target: no such option; use target_modules=\[q_proj,v_proj\]$",
    "learning_rate=1e-4,1e-5": "learning_rate: no such option; use -m for a sweep, with optimizer.lr=1e-4,1e-5$",
}  # fmt: skip
"""Word -> the line that answers it once the config is composed."""

MEANT = {
    "rank = 16": ["adapter.rank=16"], " rank=16 ": ["adapter.rank=16"], "rank='16'": ["adapter.rank=16"],
    "+method=dora": ["method=dora"], "target_modules=all": ["target_modules=all_linear"],
    "data=~/rows.csv": ["data=jsonl", f"data.train_path={Path.home()}/rows.csv"],
    "adapter.layers=[0,3]": ["adapter.layers='0,3'"], "run_dir=~/runs/a": [f"run_dir={Path.home()}/runs/a"], "logger=[csv,wandb]": ["logger=[csv,wandb]"],
    "model=./merged/": ["model=hf", "model.path=./merged/"], "model=../a@b": ["model=hf", "model.path=../a@b"],
    "data.system_prompt=": ["data.system_prompt="], "run_dir=a – b": ["run_dir=a – b"],
}  # fmt: skip

FILES = {
    "data:\n\tmax_length: 64\n": "my.yaml: not YAML .line 2: a tab, where YAML takes spaces only",
    "data:\n  system_prompt: You are: a bot\n": "my.yaml: not YAML .line 2: a second colon, or a line too far to the right; put text that holds a colon in quotes",
    "model:\u00a0tiny\nrank: 8\n": "my.yaml: not YAML .it holds no-break spaces, as of a web page",
    "method: @lora\n": "my.yaml: not YAML .line 1: .*put such text in quotes",
    "data.max_length: 64\ndata:\n  max_length: 32\n": "my.yaml: has data.max_length twice",
    "data: {}\n": "my.yaml: data: has nothing inside", "logger: {}\n": "my.yaml: logger: has nothing inside",
    "data: !!set {a, b}\n": "my.yaml: data: must be keys with values, or a list",
}  # fmt: skip

COMMANDS = {
    "trian": "train", "finetune": "train", "eval": "evaluate", "chat": "generate", "upload": "push", "my.yaml": "train my.yaml",
    "method=lora": "train method=lora", "version": "--version", "quantize": "export", "TRAIN": "train",
}  # fmt: skip


@pytest.mark.parametrize(("own", "theirs"), [(own, key) for own, keys in KEYS.items() for key in keys.split()])
def test_key_of_another_tool_is_answered_with_ours(own, theirs):
    assert nearest(theirs, "train") == f"; use {own}"


@pytest.mark.parametrize("key", KEYS_OF_FILES)
def test_key_of_another_tool_s_file_is_known(key):
    """Nearness of letters, which would answer `shuffle` with `data.shuffle_window`, does not decide."""
    assert (ours(key) is None) != (what_instead(key) is None)


def test_key_of_another_command_is_not_proposed_in_its_own_place():
    assert "did you mean early_stopping.patience" not in nearest("early_stopping.patience", "generate")


@pytest.mark.parametrize("key", NO_COUNTERPART)
def test_key_without_a_counterpart_is_answered_with_what_to_do(key):
    assert NO_COUNTERPART[key] in nearest(key, "train")


@pytest.mark.parametrize(("ours", "typed"), [(ours, word) for ours, words in OPTIONS.items() for word in words.split()])
def test_option_of_another_tool_is_answered_with_ours(ours, typed):
    group, _, name = typed.partition("=")
    said = no_such_option(group, name, options_of_group(group))
    assert said.startswith(f"{typed}: no such option") and f"use {ours}; {group} is one of " in said


@pytest.mark.parametrize(("words", "line"), SLIPS)
def test_slip_of_the_hand_is_answered_with_the_right_form(words, line):
    with pytest.raises(ValueError) as wrong:
        everyday("train", words)
    assert str(wrong.value).startswith(line)


@pytest.mark.parametrize("word", VALUES)
def test_wrong_value_says_what_would_be_right(word):
    with pytest.raises(ValueError, match=VALUES[word]):
        compose_config("train", everyday("train", [word]))


@pytest.mark.parametrize("word", MEANT)
def test_what_cannot_be_mistaken_is_taken_as_meant(word):
    assert everyday("train", [word]) == MEANT[word]


@pytest.mark.parametrize("text", FILES)
def test_file_with_a_slip_is_answered_by_line_or_key(tmp_path, text):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError, match=FILES[text]):
        words_of_file(tmp_path / "my.yaml")


def test_name_of_rows_that_is_nearly_there_is_proposed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for typed in ("rows", "rows.jsnl", "row.jsonl2"):
        assert "did you mean data=rows.jsonl?" in no_such_option("data", typed, options_of_group("data"))
    (tmp_path / "cfg.json").write_text('{"model": "tiny"}')
    with pytest.raises(ValueError, match="use data=cfg.json for rows; a file of options is YAML and ends in .yaml"):
        everyday("train", ["cfg.json"])


@pytest.mark.parametrize(
    "text",
    ["use \\n here", "a\\\\b", "it's", "\\'", "end\\", "\\\\'\\\\", "C:\\new rows", 'say "hi"', "end\\\nof line\\\n"],
)
def test_text_of_a_file_is_what_stands_in_it(tmp_path, text):
    """A backslash stood twice in prompts and paths of a file."""
    path = tmp_path / "my.yaml"
    path.write_text(
        yaml.safe_dump({"model": "tiny", "data": {"system_prompt": text, "train_path": text}, "run_dir": text})
    )
    config = compose_config("train", everyday("train", [str(path)]))
    assert (config.data.system_prompt, config.data.train_path, config.run_dir) == (text, text, text)


def test_early_stopping_of_a_file_is_switched_off(tmp_path):
    """A rule that watches nothing is refused where no word says so."""
    (tmp_path / "my.yaml").write_text("early_stopping: {metric: loss, patience: 5}\nvalidation.every_n_steps: 2\n")
    words = everyday("train", [str(tmp_path / "my.yaml"), "early_stopping.metric=null"])
    assert compose_config("train", words).early_stopping.metric is None


def test_file_may_merge_an_anchor(tmp_path):
    (tmp_path / "my.yaml").write_text("data: &d\n  max_length: 64\nvalidation:\n  <<: {every_n_steps: 5}\n")
    assert words_of_file(tmp_path / "my.yaml") == ["data.max_length=64", "validation.every_n_steps=5"]


def test_folder_in_place_of_a_file_is_said(tmp_path):
    (tmp_path / "my.yaml").mkdir()
    with pytest.raises(ValueError, match="my.yaml: is a folder; give a YAML file"):
        words_of_file(tmp_path / "my.yaml")


@pytest.mark.parametrize("typed", COMMANDS)
def test_command_of_another_tool_is_answered_with_ours(typed, capsys):
    assert main([typed]) == 2
    assert capsys.readouterr().err.endswith(f"; use lightning-peft {COMMANDS[typed]}\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model=tiny"], "train -m: no key has several values; as in train -m adapter.rank=4,8"),
        (["adapter.rank=4,0"], "adapter.rank=0: a rank is at least 1"),
        (["method=lora,doraa"], "method=doraa: no such option; use method=dora"),
        (["adapter.rank=4,abc"], "adapter.rank=abc: "),
        (["adapter.rank=range(8,8)"], "adapter.rank=range(8,8): holds no value, so there is nothing to train"),
        (["seed=range(0,2,0)"], "seed=range(0,2,0): range() arg 3 must not be zero"),
        (["method=glob(none*)"], "method=glob(none*): holds no value"),
        (["adapter.rank=interval(4,8)"], "adapter.rank=interval(4,8): an interval has no end of values; use range()"),
        (["rank=r4,8"], "rank=r4,8: numbers beside names; give numbers alone, as in rank=4,8, or names"),
        (["method=lora,8"], "method=8: no such option; method is one of"),
    ],
)
def test_every_value_of_a_sweep_is_checked_before_its_first_trial(words, line, capsys, tmp_path):
    assert main(["train", "-m", *words, f"run_dir={tmp_path}/sweep"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
    assert not (tmp_path / "sweep").exists()


def test_swept_words_of_functions_are_read_as_lists_are():
    written = everyday("train", ["rank=range(4,9,4)", "method=glob(lora_*,exclude=lora_fa)"])
    trials = one_of_each_value([*written, "seed=sort(choice(2,1))"])
    assert trials == [
        ["adapter.rank=4", "method=lora_plus", "seed=1"],
        ["adapter.rank=8", "method=lora_plus", "seed=1"],
        ["adapter.rank=4", "method=lora_plus", "seed=2"],
    ]
    for word in ("rank=sort(range(4,9,4),reverse=true)", "rank=choice(4, 8)", "rank=shuffle(range(start=4,stop=9))"):
        assert everyday("train", [word]) == [f"adapter.{word}"]


def test_failed_file_operation_names_the_file_first(capsys, tmp_path):
    assert main(["generate", "model=tiny", f"prompt_path={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: prompt_path={tmp_path}: ")


@pytest.mark.parametrize("words", [["train", "--help"], ["config", "train"], ["schema"]])
def test_pages_may_be_cut_off_by_their_reader(words):
    reader, writer = os.pipe()
    os.close(reader)  # `| head` does so
    done = started.run([*started.COMMAND, *words], stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_chat_without_stdin_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "model=tiny"]) == 2
    assert capsys.readouterr().err.startswith("error: prompt=null: a chat reads from stdin, which is closed")


def test_empty_prompt_is_one_line(capsys):
    assert main(["generate", "model=tiny", "prompt="]) == 2
    assert capsys.readouterr().err == "error: prompt=: is empty; leave it out to chat\n"


def test_merge_into_the_name_of_a_file_is_refused(capsys, tmp_path):
    assert main(["merge", f"adapter_path={tmp_path}", f"output={tmp_path}/model.gguf"]) == 2
    assert "use export format=gguf" in capsys.readouterr().err


def test_finished_run_without_a_checkpoint_is_not_written_over(capsys, tmp_path):
    tiny = ["train", "model=tiny", "data.max_rows=4", "data.max_validation_rows=2", f"run_dir={tmp_path}/run"]
    assert main([*tiny, "trainer.max_steps=1"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([*tiny, "trainer.max_steps=2", "adapter.rank=4", "resume=auto"]) == 2
    assert "holds a run that is finished after 1 steps, and no checkpoint to go on from" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_no_answer_names_a_word_twice():
    text = Path(no_such_option.__code__.co_filename).with_name("other_tools.py").read_text()
    (table,) = [
        node.value for node in ast.parse(text).body if isinstance(node, ast.Assign) and node.targets[0].id == "OURS"
    ]
    names = [name for names in ast.literal_eval(table).values() for name in names.split()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "adapter:\n",
            "adapter=null: no such option; leave it out, or choose a method as method=lora, and its own keys",
        ),
        (
            "adapter: 5\n",
            "adapter=5: no such option; choose a method as method=lora, and its own keys as adapter.rank=8",
        ),
        ("optimizer:\n", "optimizer=null: no such option; optimizer is one of adamw"),
        ("data: {ignore_columns: id}\n", "data.ignore_columns=id: .*; must be a list, in brackets, as [a,b]"),
    ],
)
def test_section_of_a_file_without_keys_is_one_line(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(f"model: tiny\n{text}")
    assert main(["train", "my.yaml", "dry_run=true"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(part in said for part in message.split(".*"))


def test_file_by_its_other_ending_is_proposed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("model: tiny\n")
    with pytest.raises(ValueError, match=r"^my.yml: no such file; did you mean my.yaml\?$"):
        everyday("train", ["my.yml"])


@pytest.mark.parametrize(("command", "ours"), [("merge", "output"), ("export", "output"), ("train", "run_dir")])
def test_folder_to_write_is_named_by_the_commands_own_word(command, ours):
    assert nearest("out_dir", command) == nearest("output_dir", command) == f"; use {ours}"
