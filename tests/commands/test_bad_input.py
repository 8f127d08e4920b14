"""The answer to wrong input: exit status 2 and one line that names the key or file, before a model is loaded."""

import json

import pytest

from lightning_peft.__main__ import main

TINY = ["train", "model=tiny", "data.max_rows=8", "data.max_validation_rows=4", "trainer.max_steps=1"]

TRAIN_CASES = {
    "unknown option of a group": (["method=nope"], r"method=nope: no such option; method is one of .*lora"),
    "unknown rank option": (["rank=r3"], r"rank=r3: no such option; rank is one of .*r16"),
    "unknown key": (["foo=1"], r"foo: no such option"),
    "mistyped key": (["adapter.rnk=3"], r"adapter.rnk: no such option; did you mean .*adapter.rank"),
    "key of another choice": (
        ["objective=dpo", "objective.noise_alpha=5"],
        r"objective.noise_alpha: no such option; objective=sft has it, and what was chosen has not$",
    ),
    "key of another method": (
        ["method=ia3", "adapter.bias=all"], r"adapter.bias: no such option; method=lora has it",
    ),
    "mistyped group": (["metod=lora"], r"metod: no such option; did you mean method"),
    "text for a number": (["adapter.rank=x"], r"adapter.rank=x: must be a whole number$"),
    "text for a rate": (["optimizer.lr=fast"], r"optimizer.lr=fast: must be a number, as in 2e-4$"),
    "unknown enum value": (["adapter.init=zeros"], r"adapter.init=zeros: .*kaiming"),
    "word without =": (["fast"], r"fast: not of the form key=value"),
    "several values without -m": (["adapter.rank=4,8"], r"adapter.rank=4,8: several values; add -m"),
    "rank 0": (["adapter.rank=0"], r"adapter.rank=0: a rank is at least 1"),
    "negative rank": (["adapter.rank=-2"], r"adapter.rank=-2: a rank is at least 1"),
    "rank of a rankless method": (["method=ia3", "rank=r4"], r"adapter.rank=4: method 'ia3' has no rank; use rank=none"),
    "no rank for LoRA": (["rank=none"], r"adapter.rank=null: method 'lora' needs a rank"),
    "rank above the SVD": (["method=pissa", "adapter.rank=48"], r"rank.*48.*32"),
    "negative alpha": (["adapter.alpha=-1"], r"adapter.alpha=-1.0: must be above 0"),
    "dropout above 1": (["adapter.dropout=1.5"], r"adapter.dropout=1.5: must be in \[0, 1\)"),
    "no matching target": (["adapter.target_modules=[q_prj]"], r"target_modules.*q_prj.*q_proj"),
    "one of two targets matches nothing": (["adapter.target_modules=[q_proj,w_proj]"], r"target_modules.*w_proj"),
    "tied head": (["model.name=tiny_tied", "adapter.target_modules=[lm_head]"], r"lm_head shares its weight"),
    "malformed layer range": (["adapter.layers=x"], r"adapter.layers='x'"),
    "warm start from nowhere": (["adapter.init_from=/nowhere"], r"adapter.init_from=/nowhere"),
    "4-bit full fine-tuning": (["method=full", "quantization=nf4"], r"method=full quantization.kind=nf4"),
    "block size": (["quantization=nf4", "quantization.block_size=48"], r"quantization.block_size=48"),
    "learning rate 0": (["optimizer.lr=0"], r"optimizer.lr=0.0: must be above 0"),
    "LoRA+ ratio below 1": (["optimizer.lora_plus_ratio=0.5"], r"optimizer.lora_plus_ratio=0.5: must be at least 1"),
    "negative warm-up": (["schedule.warmup_steps=-1"], r"schedule.warmup_steps=-1"),
    "no rows file": (["data=jsonl"], r"data.train_path=null: give a JSONL"),
    "missing rows file": (["data=jsonl", "data.train_path=/no/rows.jsonl"], r"data.train_path=/no/rows.jsonl"),
    "sequence beyond the context": (["data.max_length=99999"], r"data.max_length=99999: must be at most 2048, the model's context"),
    "length 1": (["data.max_length=1"], r"data.max_length=1: must be at least 2"),
    "micro batch 0": (["data.micro_batch_size=0"], r"data.micro_batch_size=0: must be at least 1"),
    "no rows": (["data.max_rows=0"], r"data.max_rows=0: must be at least 1"),
    "held-out share": (["data.validation_fraction=1"], r"data.validation_fraction=1.0"),
    "unknown task": (["data.task=poetry"], r"data.task=poetry: must be one of text_to_sql"),
    "unknown source": (["data.source=tape"], r"data.source=tape: must be one of"),
    "no steps": (["trainer.max_steps=0"], r"trainer.max_steps=0: must be at least 1"),
    "stream without an end": (["data.streaming=true", "trainer.max_steps=-1"], r"data.streaming=true: .*give trainer.max_steps"),
    "text for steps": (["trainer.max_steps=abc"], r"trainer.max_steps=abc: must be a whole number"),
    "a thousand steps": (["trainer.max_steps=1k"], r"trainer.max_steps=1k: must be a whole number; write 1000, without quotes"),
    "epochs for steps": (["trainer.max_steps=3epochs"], r"trainer.max_steps=3epochs: must be a whole number$"),
    "steps with their name": (["trainer.max_steps=100 steps"], r"trainer.max_steps=100 steps: must be a whole number; write 100, without quotes"),
    "half a window": (["trainer.accumulate_grad_batches=2.5"], r"trainer.accumulate_grad_batches=2.5: must be a whole number"),
    "negative clipping": (["trainer.gradient_clip_val=-1"], r"trainer.gradient_clip_val=-1: must be at least 0"),
    "what train sets itself": (["+trainer.callbacks=[x]"], r"trainer.callbacks: set by train itself; use callbacks"),
    "LoftQ without quantisation": (["method=loftq", "quantization=none"], r"adapter.init=loftq .*quantization=nf4"),
    "accumulation 0": (["trainer.accumulate_grad_batches=0"], r"trainer.accumulate_grad_batches=0: must be at least 1"),
    "unknown Trainer argument": (["+trainer.speed=9"], r"trainer.speed: lightning.pytorch.Trainer has no such argument"),
    "noise in a compiled embedding": (["objective.noise_alpha=5", "compile=full"], r"noise_alpha=5.0 compile=full: .*use compile=blocks"),
    "clipping by value": (["+trainer.gradient_clip_algorithm=value"], r"gradient_clip_algorithm='value': only norm"),
    "mistyped Trainer argument": (["trainer.max_stps=9"], r"trainer.max_stps: .* did you mean trainer.max_steps"),
    "added to a dataclass": (["+data.micro_batchsize=16"], r"data.micro_batchsize: no such option; did you mean data.micro_batch_size"),
    "added to the root": (["+sede=3"], r"sede: no such option; did you mean seed"),
    "forced into a dataclass": (["++optimizer.learning_rate=1"], r"optimizer.learning_rate: no such option"),
    "added group of nobody": (["+experimnet=foo"], r"experimnet: no such option"),
    "added below a method's options": (["method=dora", "+adapter.rnak=4"], r"adapter.rnak: no such option; did you mean adapter.rank"),
    "callback without a target": (["callbacks.mine.patience=3"], r"callbacks.mine: has no callbacks.mine._target_"),
    "logger that was not chosen": (["logger.wandb.project=x"], r"logger.wandb: has no logger.wandb._target_"),
    "callback of no module": (["callbacks.mine._target_=nowhere.Mine"], r"callbacks.mine._target_=nowhere.Mine: .*nowhere"),
    "callback that is none": (["callbacks.mine._target_=pathlib.Path"], r"callbacks.mine._target_=pathlib.Path: no Lightning callback"),
    "callback's argument": (["callbacks.t._target_=lightning.pytorch.callbacks.Timer", "callbacks.t.nope=1"], r"callbacks.t._target_=.*'nope'"),
    "callback's value": (["callbacks.t._target_=lightning.pytorch.callbacks.EarlyStopping", "callbacks.t.monitor=loss", "callbacks.t.mode=up"], r"callbacks.t: .*mode"),
    "callback Lightning refuses": (["callbacks.mc._target_=lightning.pytorch.callbacks.ModelCheckpoint"], r"trainer: .*ModelCheckpoint"),
    "profiler of nobody": (["trainer.profiler=nope"], r"trainer: .*`profiler`"),
    "time in words": (["trainer.max_time=tomorrow"], r"trainer.max_time=tomorrow: must be DD:HH:MM:SS"),
    "argument of a logger": (["logger=wandb", "logger.wandb.projct=x", "dry_run=true"], r"^error: logger.wandb.projct: wandb.init has no such argument; did you mean project\?$"),
    "added to a logger": (["logger=wandb", "+logger.wandb.mod=offline"], r"^error: logger.wandb.mod: wandb.init .*did you mean mode\?$"),
    "mode of a logger": (["logger=wandb", "logger.wandb.mode=ofline", "dry_run=true"], r"^error: logger.wandb.mode='ofline': must be auto, online"),
    "argument of another logger": (["logger=tensorboard", "+logger.tensorboard.nme=1", "dry_run=true"], r"logger.tensorboard._target_=.*'nme'"),
    "word to Hydra": (["+hydra.foo=1", "dry_run=true"], r"^error: \+hydra.foo=1: a single run reads hydra.searchpath alone"),
    "Hydra's folder": (["hydra.run.dir=x"], r"^error: hydra.run.dir=x: a single run reads hydra.searchpath alone"),
    "launcher of one run": (["hydra/launcher=joblib"], r"^error: hydra/launcher=joblib: .*launchers and sweepers are for train -m"),
    "unknown precision": (["trainer.precision=bf8"], r"trainer.precision='bf8': must be auto"),
    "fp16 on a CPU": (["trainer.accelerator=cpu", "trainer.precision=16-mixed"], r"16-mixed needs a CUDA device"),
    "unknown accelerator": (["trainer.accelerator=abacus"], r"trainer.accelerator='abacus': must be auto"),
    "several devices": (["trainer.devices=2"], r"trainer.devices=2 strategy=single: one process; use strategy=ddp or strategy=fsdp"),
    "AdaLoRA in slices": (["method=adalora", "strategy=fsdp"], r"method=adalora strategy=fsdp: .*use strategy=ddp"),
    "one set of coefficients in slices": (
        ["method=lr_lora", "adapter.share=model", "strategy=fsdp"],
        r"method=lr_lora strategy=fsdp: all layers have one lora_c, .*use strategy=ddp",
    ),
    "model without a path": (["model=hf"], r"model.path=null: model=hf needs"),
    "missing model folder": (["model=hf", "model.path=/no/model"], r"model.path=/no/model"),
    "missing checkpoint": (["resume=/no/step.ckpt"], r"resume=/no/step.ckpt: no such checkpoint"),
    "checkpoint interval 0": (["checkpoint.every_n_steps=0"], r"checkpoint.every_n_steps=0: must be at least 1"),
    "validation interval 0": (["validation.every_n_steps=0"], r"validation.every_n_steps=0: must be at least 1"),
    "negative seed": (["seed=-1"], r"seed=-1: must be 0 or more"),
}  # fmt: skip

OTHER_CASES = {
    "unknown command": (["tarin"], r"tarin: no such command; choose one of demo, train, "),
    "evaluate nothing": (["evaluate"], r"adapter_path=null: give a run or adapter folder"),
    "evaluate a missing folder": (["evaluate", "adapter_path=/no/run"], r"adapter_path=/no/run: no such folder"),
    "evaluate with a part of null": (
        ["evaluate", "adapter_path=x", "data.validation_path=b.jsonl"],
        r"data.validation_path: data is null for evaluate until .*data=NAME data.validation_path=VALUE",
    ),
    "a cluster's key without a cluster": (
        ["train", "model=tiny", "+cluster.partition=x"],
        r"cluster.partition: cluster is null for train until .*cluster=NAME cluster.partition=VALUE",
    ),
    "a name no hub has": (["models", "a b/c"], r"a b/c: no such folder here, and not a name that the hub can have"),
    "evaluate no rows": (["evaluate", "adapter_path=x", "max_rows=0"], r"max_rows=0: must be at least 1"),
    "prices into a missing folder": (
        ["estimate", "-m", "model=tiny", "seed=1,2", "output=/no/such/p.json"],
        r"price.output=/no/such/p.json: there is no folder /no/such; make it first",
    ),
    "prices on a GPU of nobody": (
        ["estimate", "-m", "model=tiny", "seed=1,2", "price.gpu=NOPE"],
        r"price.gpu=NOPE: its peak is not known and no run in price.measured was on it; choose one of GB200, ",
    ),
    "word to Hydra in a sweep": (
        ["train", "-m", "model=tiny", "seed=1,2", "+hydra.foo=1"],
        r"hydra.foo: no such option",
    ),
    "word to Hydra's sweeper": (
        ["train", "-m", "model=tiny", "seed=1,2", "+hydra.sweeper.max_batch=1"],
        r"hydra.sweeper.max_batch: no such option; did you mean hydra.sweeper.max_batch_size\?",
    ),
    "logger of a sweep": (
        ["train", "-m", "model=tiny", "seed=1,2", "logger=wandb", "logger.wandb.projct=x"],
        r"logger.wandb.projct: wandb.init has no such argument",
    ),
    "logger of a sweep on a cluster": (
        ["submit", "-m", "model=tiny", "seed=1,2", "logger=wandb", "logger.wandb.projct=x", "sweep_dir=/tmp/no/sweep"],
        r"logger.wandb.projct: wandb.init has no such argument",
    ),
    "inspection into a missing folder": (
        ["inspect", "x", "output=/no/such/p.json"],
        r"output=/no/such/p.json: there is no",
    ),
    "generate nothing": (["generate"], r"adapter_path=null: give a run or adapter folder, or model="),
    "two kinds of prompt": (["generate", "model=tiny", "prompt=a", "prompt_path=b"], r"prompt and prompt_path=b"),
    "missing prompts": (["generate", "model=tiny", "prompt_path=/no/p.txt"], r"prompt_path=/no/p.txt: no such file"),
    "top_p without drawing": (["generate", "model=tiny", "sampling.top_p=0.5"], r"sampling.top_p=0.5: .*temperature"),
    "output of one prompt": (["generate", "model=tiny", "prompt=a", "output=b"], r"output=b: only the answers"),
    "temperature": (["generate", "model=tiny", "sampling.temperature=-1"], r"sampling.temperature=-1.0"),
    "merge without output": (["merge", "adapter_path=x"], r"output"),
    "merge threshold": (
        ["merge", "adapter_path=x", "output=y", "merge.max_kl=0"],
        r"merge.max_kl=0.0: must be above 0",
    ),
}


def error_line(capsys, words):
    """Return the only line on stderr that is an error; the exit status must be 2."""
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("case", TRAIN_CASES)
def test_train_names_what_is_wrong(case, capsys, tmp_path):
    words, expected = TRAIN_CASES[case]
    assert_matches(expected, error_line(capsys, [*TINY, f"run_dir={tmp_path}/run", *words]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", OTHER_CASES)
def test_commands_name_what_is_wrong(case, capsys):
    words, expected = OTHER_CASES[case]
    assert_matches(expected, error_line(capsys, words))


def assert_matches(expected, line):
    import re

    assert re.search(expected, line), line


ROWS = {
    "not JSON": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n',
        r"rows.jsonl line 2: expected a JSON object",
    ),
    "missing column": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', r"rows.jsonl line 2.*'completion'"),
    "empty answer": ('{"prompt": "a", "completion": ""}\n', r"rows.jsonl line 1, column 'completion': .*non-empty"),
    "number for text": ('{"prompt": "a", "completion": 3}\n', r"rows.jsonl line 1, column 'completion'"),
    "empty file": ("", r"rows.jsonl is empty"),
    "unknown shape": ('{"a": 1}\n', r"no known shape of row, the columns are a"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_named(case, capsys, tmp_path):
    content, expected = ROWS[case]
    (tmp_path / "rows.jsonl").write_text(content)
    words = [*TINY[:2], "data=jsonl", f"data.train_path={tmp_path}/rows.jsonl", f"run_dir={tmp_path}/run"]
    assert_matches(expected, error_line(capsys, words))


def test_missing_column_option_lists_the_columns(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    words = [*TINY[:2], "data=jsonl", f"data.train_path={tmp_path}/rows.jsonl", "data.prompt_column=ask"]
    assert_matches(
        r"data.prompt_column=ask: the rows have no such column, only question, answer", error_line(capsys, words)
    )
