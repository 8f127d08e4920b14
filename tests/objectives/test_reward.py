"""The reward head against TRL's loss on the same rows, and the uses of its adapter."""

import csv
import json
import math
import warnings
from collections import defaultdict
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from preference_rows import draw_adapters, labelled_rows, pair_rows, parts, written
from safetensors.torch import load_file
from test_preference import FP32, gradients, mean_loss
from tiny_runs import tiny_config, tiny_parts

from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.checkpoint.resume import checkpoint_path
from lightning_peft.commands import COMMANDS
from lightning_peft.commands.calibrate import calibrate
from lightning_peft.commands.evaluate import evaluate
from lightning_peft.commands.inspect import inspect
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.models.reward_head import reward_head
from lightning_peft.models.tiny import tiny_model
from lightning_peft.training.module import FinetuneModule

MARGINS = [{**row, "margin": margin} for row, margin in zip(pair_rows(7), [0, 0.5, 1, 2, -1, 3, 0.25], strict=True)]


def drawn(tmp_path, rows, *more):
    """Return the module with adapters and a head that are not zero, and its data."""
    module, data = parts(tmp_path, "reward", rows, *more)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head = reward_head(module.model)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / 4)
    return module, data


def plain_rewards(module, data):
    """Return the head's number at the last token of each sample, run alone, (P,) of chosen and of rejected answers."""
    samples = data.training_samples
    found = []
    for place in range(len(samples)):
        ids = torch.tensor([samples[place].input_ids])
        hidden = module.model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        found.append(hidden.float() @ reward_head(module.model).weight[0])
    return torch.stack(found).view(-1, 2).unbind(1)


def trl_loss(chosen, rejected, margins, coefficient):
    """Run TRL's own code on these rewards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.reward_trainer import RewardTrainer
    logits = torch.cat([chosen, rejected])[:, None]
    trainer = SimpleNamespace(
        model=torch.nn.Identity(), args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu"),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        maybe_activation_offload_context=warnings.catch_warnings(),
    )  # fmt: skip
    inputs = {"input_ids": torch.ones(len(logits), 1), "attention_mask": torch.ones(len(logits), 1)}
    if margins is not None:
        inputs["margin"] = margins
    loss = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("words", [[], ["objective.centering=0.01"], ["data.margin_column=margin"]])
def test_loss_gradient_and_accuracy_are_trls(words, tmp_path):
    is_read = "data.margin_column=margin" in words
    module, data = drawn(tmp_path, MARGINS if is_read else pair_rows(7), "data.micro_batch_size=2", *words)
    loss, measured = mean_loss(module, data)
    chosen, rejected = plain_rewards(module, data)
    margins = torch.tensor([row["margin"] for row in MARGINS]) if is_read else None
    expected, theirs = trl_loss(chosen, rejected, margins, 0.01 if "objective.centering=0.01" in words else None)
    torch.testing.assert_close(loss, expected, **FP32)
    assert abs(float(loss.detach()) - math.log(2)) > 1e-2
    torch.testing.assert_close(gradients(module, loss), gradients(module, expected), rtol=1e-4, atol=1e-5)
    assert measured["rewards/accuracy"] == pytest.approx(theirs["accuracy"])
    assert measured["rewards/margin"] == pytest.approx(theirs["margin"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("words", [[], ["method=qlora"]])
def test_loss_and_gradient_do_not_depend_on_packing_and_cut(words, tmp_path):
    found = []
    for number, (packing, size) in enumerate([("true", 1), ("true", 3), ("false", 1), ("false", 5)]):
        (tmp_path / str(number)).mkdir()
        more = [f"data.packing={packing}", f"data.micro_batch_size={size}", "data.margin_column=margin", *words]
        module, data = drawn(tmp_path / str(number), MARGINS, *more)
        loss, measured = mean_loss(module, data)
        found.append((loss.detach(), gradients(module, loss), torch.tensor(list(measured.values()))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_packed_samples_that_are_run_apart_have_their_rewards(tmp_path):
    module, data = drawn(tmp_path, pair_rows(7), "data.micro_batch_size=2")
    together = mean_loss(module, data)
    module.objective.runs_apart = True
    apart = mean_loss(module, data)
    torch.testing.assert_close(apart[0], together[0], **FP32)
    assert apart[1] == pytest.approx(together[1], rel=1e-4)


def test_margins_are_kept_by_the_token_cache_and_by_streams(tmp_path):
    path = written(tmp_path / "rows.jsonl", MARGINS)
    words = ["objective=reward", "data=jsonl", f"data.train_path={path}", "data.validation_fraction=0"]
    words += ["data.margin_column=margin", "data.micro_batch_size=1", f"data.cache_dir={tmp_path}/cache"]
    found = []
    for more in ([], [], ["data.streaming=true", "trainer.max_steps=7"]):
        _, data = tiny_parts(tiny_config(tmp_path / "run", *words, *more))
        data.setup()
        batches = iter(data.train_dataloader())
        found.append(sorted(value for batch in batches for value in batch.margins.tolist()))
    assert found == [sorted(row["margin"] for row in MARGINS)] * 3
    assert len(list((tmp_path / "cache").glob("*/margins.npy"))) == 1


def run(folder, *more):
    words = [
        "objective=reward", "data.max_rows=24", "data.max_validation_rows=8", "trainer.max_steps=6", "logger=csv",
        "data.on_too_long=skip",
    ]  # fmt: skip
    return train(tiny_config(folder, *words, *more))


def rewards_in_transformers(folder, base, tokens):
    """Return what transformers and HF PEFT read of the folder: one number for each row of tokens."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = None
        tuned = PeftModel.from_pretrained(model, str(folder)).eval()
        with torch.no_grad():
            return torch.stack([tuned(input_ids=torch.tensor([ids])).logits[0, 0] for ids in tokens])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapter_gives_the_same_rewards_in_transformers_with_hf_peft(method, tmp_path):
    module, data = drawn(tmp_path, pair_rows(7), f"method={method}")
    module.eval()
    with torch.no_grad():
        expected = torch.stack(plain_rewards(module, data), 1).flatten()
        ours = torch.cat([module.objective.rewards(batch) for batch in data.train_dataloader()])
    save_adapter(module.model, module.adapter_config, tmp_path / "adapter", "tiny")
    words = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert words["task_type"] == "SEQ_CLS" and words["modules_to_save"] == ["score"]
    tiny_model().save_pretrained(tmp_path / "base")
    tokens = [data.training_samples[place].input_ids for place in range(len(data.training_samples))]
    theirs = rewards_in_transformers(tmp_path / "adapter", tmp_path / "base", tokens)
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.sort().values, theirs.sort().values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [[], ["method=qlora", "objective.centering=0.01"]])
def test_run_is_evaluated_at_its_validation_loss_and_trained_on(words, tmp_path, caplog):
    result = run(tmp_path / "run", *words)
    found = evaluate(compose_config("evaluate", [f"adapter_path={tmp_path}/run", "max_rows=8"]))
    assert found["adapter"]["loss"] == pytest.approx(result["validation_loss"], rel=1e-5)
    accuracy = result["metrics"]["validation_rewards/accuracy"]
    assert found["adapter"]["metrics"]["preference_accuracy"] == pytest.approx(accuracy) and found["loss_rows"] == 8
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "pipeline_tag: text-classification" in card
    run(tmp_path / "on", *words, f"adapter.init_from={tmp_path}/run", "trainer.max_steps=1", "optimizer.lr=1e-9")
    first, on = (load_file(tmp_path / f"{name}/adapter/adapter_model.safetensors") for name in ("run", "on"))
    torch.testing.assert_close(on, first, rtol=1e-4, atol=1e-6)


def test_adapter_of_answers_is_a_start_and_the_head_is_new(tmp_path, caplog):
    train(tiny_config(tmp_path / "sft", "trainer.max_steps=2", "logger=csv"))
    with caplog.at_level("INFO"):
        run(tmp_path / "run", f"adapter.init_from={tmp_path}/sft", "trainer.max_steps=1", "optimizer.lr=1e-9")
    assert "has no score.weight: it starts anew" in caplog.text
    first, on = (load_file(tmp_path / f"{name}/adapter/adapter_model.safetensors") for name in ("sft", "run"))
    head = on.pop("base_model.model.score.weight")
    torch.testing.assert_close(on, first, rtol=1e-4, atol=1e-6)
    assert head.shape == (1, 64) and 0.01 < float(head.std()) < 0.04


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate", ["adapter_path={run}", "prompt=Hello"]),
        ("merge", ["adapter_path={run}", "output={run}/merged"]),
        ("export", ["adapter_path={run}", "output={run}/export", "format=gguf"]),
        ("convert", ["adapter_path={run}", "svd_rank=2", "output={run}/cut"]),
        ("calibrate", ["adapter_path={run}"]),
        ("serve", ['adapters=["a={run}"]', "serve.dry_run=true"]),
        ("inspect", ["adapter_path={run}", "smaller_ranks=true"]),
        ("train", ["model=tiny", "run_dir={run}-on", "adapter.init_from={run}"]),
        ("train", ["model=tiny", "run_dir={run}-on", "objective=distill", "objective.teacher_adapter={run}"]),
    ],
)
def test_commands_of_what_writes_refuse_it_in_a_line(command, words, reward_run):
    module, name = COMMANDS[command][0].split(":")
    config = compose_config(command, [word.format(run=reward_run) for word in words])
    with pytest.raises(ValueError, match=r"reward model") as error:
        getattr(import_module(module), name)(config)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    run(folder)
    return folder


def test_inspect_measures_its_layers(reward_run):
    assert len(inspect(compose_config("inspect", [f"adapter_path={reward_run}"]))) == 14


@pytest.mark.slow
def test_resumed_run_ends_bit_equal(tmp_path):
    more = [
        "checkpoint.every_n_steps=2",
        "adapter.dropout=0.1",
        "trainer.accumulate_grad_batches=2",
        "trainer.max_steps=4",
    ]
    run(tmp_path / "whole", *more)
    stopped = checkpoint_path(tmp_path / "whole" / "checkpoints", 2)
    run(tmp_path / "resumed", *more, f"resume={stopped}")
    whole, resumed = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=reward", "method=full"], "objective=reward method=full: its whole model .* use method=lora"),
        (["objective=reward", "validation.metrics=[exact_match]"], r"objective=reward validation.metrics=\['exact"),
        (["objective=reward", "objective.centering=-1"], "objective.centering=-1.0: must be 0 or more"),
        (["objective=dpo", "data.margin_column=m"], "data.margin_column=m: objective=dpo has no margins of rows"),
        (["data.margin_column=m"], "data.margin_column=m: objective=sft has no margins of rows"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(ValueError, match=message):
        compose_config("train", ["model=tiny", *words])


@pytest.mark.parametrize("words", ["adapter.target_modules=[q_proj,lm_head]", "adapter.trainable_modules=[lm_head]"])
def test_head_of_tokens_that_would_train_unread_is_refused(words, tmp_path):
    with pytest.raises(ValueError, match="objective=reward: lm_head trains, and no reward is read of it"):
        run(tmp_path / "run", words)


@pytest.mark.parametrize("value", [None, True, "", "much", "inf", 1e39, [1], 10**400, float("nan")])
def test_margin_that_is_no_number_is_named(value, tmp_path):
    rows = [dict(MARGINS[0], margin=value)]
    with pytest.raises(ValueError, match="line 1, column 'margin': expected a finite number, got"):
        drawn(tmp_path, rows, "data.margin_column=margin")


def test_margins_of_a_table_of_text_are_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, MARGINS[0])
        table.writeheader()
        table.writerows(MARGINS)
    _, data = drawn(tmp_path, MARGINS, "data.margin_column=margin", f"data.train_path={path}")
    samples = data.training_samples
    found = [samples[place].margin for place in range(len(samples)) if samples[place].margin is not None]
    assert sorted(found) == sorted(row["margin"] for row in MARGINS)


def test_margins_that_nobody_reads_stop_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"nobody reads column 'margin' .*objective=reward reads data.margin_column"):
        drawn(tmp_path, MARGINS)


def test_rows_without_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"objective=dpo \(or ipo, simpo, orpo, reward\) takes pairs"):
        drawn(tmp_path, labelled_rows(3))


def test_adapters_are_found_beside_the_head_and_it_is_none_of_them(tmp_path):
    module, _ = parts(tmp_path, "reward", pair_rows(2), "adapter.target_modules=all_linear")
    assert isinstance(module, FinetuneModule)
    draw_adapters(module)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and not any(name.startswith("score.") and "lora" in name for name in trained)


def test_modules_are_chosen_by_gradients_of_the_rewards(tmp_path):
    run(tmp_path / "run", "method=hybrid_lora", "adapter.budget=0.5", "trainer.max_steps=2")
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    whole = [name for name in tensors if "lora" not in name]
    assert "base_model.model.score.weight" in whole and len(whole) > 1
    found = evaluate(compose_config("evaluate", [f"adapter_path={tmp_path}/run", "max_rows=8"]))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert found["adapter"]["loss"] == pytest.approx(result["validation_loss"], rel=1e-5)


def test_margins_of_an_adapter_that_writes_are_refused(tmp_path):
    train(tiny_config(tmp_path / "sft", "trainer.max_steps=1", "logger=csv"))
    path = written(tmp_path / "rows.jsonl", MARGINS)
    words = [f"adapter_path={tmp_path}/sft", "data=jsonl", f"data.train_path={path}", "data.rows=pairs"]
    with pytest.raises(ValueError, match="data.margin_column=margin: margins are of rewards"):
        evaluate(compose_config("evaluate", [*words, "data.margin_column=margin"]))
    with pytest.raises(ValueError, match="data.teacher_prompt: a teacher reads it in training, and here is none"):
        evaluate(compose_config("evaluate", [*words[:3], "data.teacher_prompt=Hi"]))
    with pytest.raises(ValueError, match="data.margin_column=margin: margins are of rewards"):
        calibrate(compose_config("calibrate", [*words, "data.margin_column=margin"]))
    sources = [*words[:2], *(f"data.sources.{name}.train_path={path}" for name in "ab")]
    for given in ("data.sources.b.margin_column=margin", "data.sources.b.teacher_prompt=Hi"):
        with pytest.raises(ValueError, match=given.partition("=")[0]):
            evaluate(compose_config("evaluate", [*sources, given]))
