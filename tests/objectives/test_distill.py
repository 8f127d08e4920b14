"""Distillation against TRL's divergence and our own sft on the same rows, and the teachers there can be."""

import json
import warnings

import pytest
import torch
from preference_rows import parts
from preference_rows import words as drawn_words
from safetensors.torch import load_file
from test_preference import FP32, gradients, mean_loss
from tiny_runs import plain_trainer
from tiny_runs import tiny_config as run_config

from lightning_peft.adapters.inject import disable_adapters
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.checkpoint.resume import checkpoint_path
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.inference.load import load_adapted
from lightning_peft.models.loading import load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.training.teacher import check_teacher, teacher_packs
from lightning_peft.words import everyday

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def answer_rows(count, seed=0):
    import random

    draw = random.Random(seed)
    return [{"prompt": drawn_words(draw, 2, 9), "completion": drawn_words(draw, 1, 12)} for _ in range(count)]


ROWS = answer_rows(9)


def taught(tmp_path, *more, rows=ROWS):
    return parts(tmp_path, "distill", rows, "data.micro_batch_size=2", *more)


def plain_logits(model, data):
    """Return (logits, tokens) of the trained tokens of every sample, run alone."""
    samples = data.training_samples
    found = []
    for place in range(len(samples)):
        ids, labels = torch.tensor(samples[place].input_ids), torch.tensor(samples[place].labels[1:])
        kept = labels != IGNORED_LABEL
        found.append((model(input_ids=ids[None], use_cache=False).logits[0, :-1][kept].float(), labels[kept]))
    return [torch.cat(part) for part in zip(*found, strict=True)]


def trl_divergence(student, teacher, beta, temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], None, beta, temperature, reduction="none")


@pytest.mark.parametrize(("kind", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 2.5), ("jsd", 2.5)])
def test_loss_and_gradient_are_trls(kind, temperature, tmp_path):
    words = [f"objective.divergence={kind}", f"objective.temperature={temperature}", "objective.weight=0.8"]
    module, data = taught(tmp_path, *words, "objective.teacher=tiny_tied")
    loss, measured = mean_loss(module, data)
    student, labels = plain_logits(module.model, data)
    with torch.no_grad():
        teacher, _ = plain_logits(tiny_model(tied=True).eval(), data)
    divergence = trl_divergence(student, teacher, BETAS[kind], temperature).sum() / len(labels)
    cross_entropy = torch.nn.functional.cross_entropy(student, labels)
    expected = 0.2 * cross_entropy + 0.8 * temperature**2 * divergence
    torch.testing.assert_close(loss, expected, **FP32)
    assert measured["divergence"] == pytest.approx(float(divergence.detach()), rel=1e-5, abs=1e-5)
    assert measured["cross_entropy"] == pytest.approx(float(cross_entropy.detach()), rel=1e-5)
    torch.testing.assert_close(gradients(module, loss), gradients(module, expected), rtol=1e-4, atol=1e-5)


def test_weight_0_is_sft(tmp_path):
    module, data = taught(tmp_path, "objective.weight=0")
    (tmp_path / "sft").mkdir()
    plain, plain_data = parts(tmp_path / "sft", "sft", ROWS, "data.micro_batch_size=2")
    (loss, measured), (expected, _) = mean_loss(module, data), mean_loss(plain, plain_data)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(module, loss), gradients(plain, expected), rtol=1e-5, atol=1e-7)
    assert measured["divergence"] > 1e-4


def test_weighted_tokens_count_by_their_weights(tmp_path):
    module, data = taught(tmp_path)
    batch = next(iter(data.train_dataloader()))
    loss, measured = module.objective(batch).detach(), module.objective.measured
    batch.weights, batch.weight_sum = torch.full(batch.labels.shape, 0.25), 0.25 * batch.num_supervised
    torch.testing.assert_close(module.objective(batch), 0.25 * loss, **FP32)
    for name, (total, count) in module.objective.measured.items():
        torch.testing.assert_close((total, count), tuple(0.25 * part for part in measured[name]), **FP32)


CUTS = [("true", 1), ("true", 3), ("false", 1), ("false", 5)]


def test_loss_and_gradient_do_not_depend_on_packing_and_cut(tmp_path):
    found = []
    for number, (packing, size) in enumerate(CUTS):
        (tmp_path / str(number)).mkdir()
        words = [f"data.packing={packing}", f"data.micro_batch_size={size}", "objective.divergence=jsd"]
        module, data = parts(tmp_path / str(number), "distill", ROWS, *words)
        loss, measured = mean_loss(module, data)
        found.append((loss.detach(), gradients(module, loss), torch.tensor(list(measured.values()))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of_teacher", [True, False])
def test_samples_that_one_of_both_mixes_are_run_apart_by_it(of_teacher, tmp_path):
    module, data = taught(tmp_path, "objective.teacher=tiny_tied")
    together = mean_loss(module, data)
    objective = module.objective
    (objective.teacher.loss if of_teacher else objective).runs_apart = True
    apart = mean_loss(module, data)
    assert objective.runs_apart is not of_teacher
    torch.testing.assert_close(apart[0], together[0], **FP32)
    assert apart[1] == pytest.approx(together[1], rel=1e-4)


@pytest.mark.parametrize("words", [[], ["method=qlora"], ["method=dora"], ["adapter.trainable_modules=[lm_head]"]])
def test_base_teaches_from_the_same_tensors_and_stays_what_it_was(words, tmp_path):
    module, data = taught(tmp_path, *words)
    teacher, student = module.objective.teacher.loss.model, module.model
    frozen = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    own = [name for name, p in teacher.named_parameters() if p.data_ptr() not in frozen]
    assert own == (["lm_head.weight"] if "adapter.trainable_modules=[lm_head]" in words else [])
    with torch.no_grad(), disable_adapters(student):
        expected, _ = plain_logits(student, data)
        assert torch.equal(plain_logits(teacher, data)[0], expected)
    plain_trainer(max_steps=2).fit(module, datamodule=data)
    with torch.no_grad():
        assert torch.equal(plain_logits(teacher, data)[0], expected)
        assert not torch.equal(plain_logits(student.eval(), data)[0], expected)
    names = module.state_dict().keys() | dict(module.named_parameters()).keys()
    assert not any("teacher" in name for name in names) and not any(p.requires_grad for p in teacher.parameters())


def test_student_that_is_its_teacher_has_no_divergence(tmp_path):
    first, data = taught(tmp_path)
    save_adapter(first.model, first.adapter_config, tmp_path / "adapter", "tiny")
    words = [f"objective.teacher_adapter={tmp_path}/adapter", f"adapter.init_from={tmp_path}/adapter"]
    module, data = taught(tmp_path, *words, "objective.divergence=jsd", "objective.weight=1")
    loss, measured = mean_loss(module, data)
    assert abs(measured["divergence"]) < 1e-6 and gradients(module, loss).abs().max() < 1e-6


@pytest.mark.parametrize("more", [[], ["adapter.trainable_modules=[lm_head]"]])
def test_adapter_that_teaches_is_the_model_it_was_saved_from(more, tmp_path):
    """With a trained head the folder changes the base, so the teacher has one of its own."""
    first, _ = taught(tmp_path, "adapter.rank=4", "method=dora", *more)
    with torch.no_grad():
        first.model.lm_head.weight.mul_(1.25 if more else 1.0)
    save_adapter(first.model, first.adapter_config, tmp_path / "adapter", "tiny")
    module, data = taught(tmp_path, f"objective.teacher_adapter={tmp_path}/adapter")
    with torch.no_grad():
        found, _ = plain_logits(module.objective.teacher.loss.model, data)
        loaded = load_adapted(
            tmp_path / "adapter", ModelConfig(name="tiny"), QuantizationConfig(), torch.float32, torch.device("cpu")
        )
        expected, _ = plain_logits(loaded, data)
        base, _ = plain_logits(tiny_model().eval(), data)
        with disable_adapters(module.model):
            torch.testing.assert_close(plain_logits(module.model, data)[0], base, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - base).abs().max() > 1e-3


def test_inference_mode_and_recomputation_give_the_same_numbers(tmp_path):
    module, data = taught(tmp_path, "objective.teacher=tiny_tied")
    loss, measured = mean_loss(module, data)
    with torch.inference_mode():
        again, measured_again = mean_loss(module.eval(), data)
    torch.testing.assert_close(again, loss.detach(), **FP32)
    assert measured_again == pytest.approx(measured, rel=1e-5)
    assert not module.objective.teacher.loss.model.training


def folder_with(path, vocabulary=320, token=None):
    from transformers import LlamaForCausalLM

    config = tiny_config()
    config.vocab_size, config.hidden_size, config.num_hidden_layers = vocabulary, 32, 1
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = tiny_tokenizer()
    if token:
        tokenizer.add_tokens([token])
    tokenizer.save_pretrained(path)
    return path


def test_larger_head_of_the_same_tokens_teaches(tmp_path, caplog):
    """Families pad their heads by size: 151,936 and 152,064 rows for one vocabulary."""
    path = folder_with(tmp_path / "teacher", vocabulary=384)
    with caplog.at_level("INFO"):
        module, data = taught(tmp_path, f"objective.teacher={path}", "objective.weight=1")
    assert "heads of 384 (teacher) and 320 tokens: compared over the first 320" in caplog.text
    loss, _ = mean_loss(module, data)
    student, labels = plain_logits(module.model, data)
    with torch.no_grad():
        teacher, _ = plain_logits(module.objective.teacher.loss.model, data)
    expected = trl_divergence(student, teacher[:, :320], 0.0, 1.0).sum() / len(labels)
    torch.testing.assert_close(loss, expected, **FP32)


def checked(config):
    tokenizer = load_tokenizer(config.model)
    check_teacher(config.objective, config.model, config.quantization, tokenizer, config.data.max_length)


def test_teacher_that_mixes_packed_samples_or_reads_fewer_tokens_is_noticed(tmp_path):
    path = folder_with(tmp_path / "teacher")
    shape = json.loads((path / "config.json").read_text())
    words = ["model=tiny", "objective=distill", f"objective.teacher={path}", "data.max_length=64"]
    config = compose_config("train", words)
    assert teacher_packs(config.objective, config.data)
    shape |= {"max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    shape.pop("rope_parameters", None)
    (path / "config.json").write_text(json.dumps(shape))
    assert not teacher_packs(config.objective, config.data)
    with pytest.raises(ValueError, match="data.packing=true: the longest of packed samples"):
        teacher_packs(config.objective, compose_config("train", [*words, "data.packing=true"]).data)
    shape |= {"rope_scaling": None}
    (path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(ValueError, match=r"objective.teacher=.*: reads up to 32 tokens, and data.max_length=64"):
        checked(config)


def test_new_tokens_of_an_adapter_that_teaches_are_those_of_the_run(tmp_path):
    added = ["adapter.trainable_modules=[embed_tokens,lm_head]", "trainer.max_steps=1", "logger=none"]
    train(run_config(tmp_path / "run", *added, "model.new_tokens=['<a>']"))
    words = ["model=tiny", "objective=distill", f"objective.teacher_adapter={tmp_path}/run", *added[:1]]
    checked(compose_config("train", [*words, "model.new_tokens=['<a>','<b>']"]))
    with pytest.raises(ValueError, match=r"objective.teacher_adapter=.*new_tokens=\['<a>'\], and here they are \['<b>"):
        checked(compose_config("train", [*words, "model.new_tokens=['<b>']"]))


def test_trained_head_in_bf16_is_rebuilt_and_the_result_has_both_losses(tmp_path, caplog):
    options = ["objective=distill", "objective.teacher=tiny_tied", "adapter.trainable_modules=[lm_head]"]
    train(run_config(tmp_path / "run", *options, "trainer.precision=bf16-true", "trainer.max_steps=1", "logger=none"))
    assert "model's own logits" not in caplog.text
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics.keys() == {"validation_cross_entropy", "validation_divergence"}
    words = ["model=tiny", "objective=distill", "early_stopping.metric=validation_divergence"]
    assert compose_config("train", [*words, "validation.every_n_steps=1"]).early_stopping.metric is not None


def test_teacher_with_other_tokens_is_refused_before_its_weights(tmp_path):
    path = folder_with(tmp_path / "teacher", token="<tool>")
    config = compose_config("train", ["model=tiny", "objective=distill", f"objective.teacher={path}"])
    (path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"objective.teacher=.*its token 259 is '<tool>', here no token \(260 and 259 t"
    ):
        checked(config)


def test_teacher_that_is_not_there_is_refused(tmp_path):
    config = compose_config("train", ["model=tiny", "objective=distill", "objective.teacher=/no/model"])
    with pytest.raises(ValueError, match="objective.teacher=/no/model: no such file or folder"):
        checked(config)
    config = compose_config("train", ["model=tiny", "objective=distill", f"objective.teacher_adapter={tmp_path}"])
    with pytest.raises(ValueError, match="objective.teacher_adapter=.*: neither a run nor an adapter folder"):
        checked(config)


@pytest.mark.slow
def test_resumed_run_ends_bit_equal_and_another_teacher_cannot_go_on(tmp_path):
    options = [
        "objective=distill", "objective.teacher=tiny_tied", "adapter.dropout=0.1", "trainer.max_steps=4",
        "checkpoint.every_n_steps=2", "trainer.accumulate_grad_batches=2", "logger=none",
    ]  # fmt: skip
    train(run_config(tmp_path / "whole", *options))
    stopped = checkpoint_path(tmp_path / "whole" / "checkpoints", 2)
    train(run_config(tmp_path / "resumed", *options, f"resume={stopped}"))
    whole, resumed = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = ["objective.teacher=tiny", f"resume={stopped}"]
    with pytest.raises(ValueError, match="objective.teacher"):
        train(run_config(tmp_path / "other", *options, *other))


@pytest.mark.parametrize("words", [["objective=distill", "objective.teacher_adapter="], ["adapter.init_from="]])
def test_adapter_that_is_scaled_anew_between_stop_and_resume_is_noticed(words, tmp_path):
    train(run_config(tmp_path / "first", "trainer.max_steps=1", "logger=none"))
    adapter = tmp_path / "first/adapter"
    options = [*words[:-1], f"{words[-1]}{adapter}", "checkpoint.every_n_steps=2", "logger=none"]
    train(run_config(tmp_path / "run", *options, "trainer.max_steps=2"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    stopped = checkpoint_path(tmp_path / "run/checkpoints", 2)
    with pytest.raises(ValueError, match="its files of .* are others now .*: bring the same ones back"):
        train(run_config(tmp_path / "resumed", *options, "trainer.max_steps=3", f"resume={stopped}"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strategy=fsdp"], "objective=distill strategy=fsdp: every rank .* use strategy=ddp"),
        (["method=hybrid_lora"], "objective=distill method=hybrid_lora: chooses its modules"),
        (
            ["method=pissa"],
            "objective=distill adapter.init=pissa: .* .* or read it once more with objective.teacher=tiny",
        ),
        (["objective.weight=1.5"], "objective.weight=1.5: must be at least 0 and at most 1"),
        (["objective.temperature=0"], "objective.temperature=0.0: must be above 0"),
        (["objective.jsd_beta=1"], "objective.jsd_beta=1.0: must be above 0 and below 1; the ends are"),
        (["objective.quantize_teacher=true"], "objective.quantize_teacher=true: the teacher is the base"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(ValueError, match=message):
        compose_config("train", ["model=tiny", "objective=distill", *words])


def test_preset_names_its_path():
    assert everyday("train", ["objective.teacher=qwen3_8b"]) == ["objective.teacher=Qwen/Qwen3-8B"]
    assert everyday("train", ["objective.teacher=tiny"]) == ["objective.teacher=tiny"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "adapter/adapter_config.json",
            "objective.teacher=.*/run: holds an adapter; give it as objective.teacher_adap",
        ),
        (
            "adapter_config.json",
            "objective.teacher=.*/run: holds an adapter; give it as objective.teacher_adapter=.*/run",
        ),
        ("model/config.json", "objective.teacher=.*/run: a run; its model is objective.teacher=.*/run/model"),
    ],
)
def test_teacher_that_is_a_run_says_where_it_belongs(file, message, tmp_path):
    (tmp_path / "run" / file).parent.mkdir(parents=True)
    (tmp_path / "run" / file).write_text("{}")
    words = ["model=tiny", "objective=distill", f"objective.teacher={tmp_path}/run", f"run_dir={tmp_path}/next"]
    with pytest.raises(ValueError, match=message):
        train(compose_config("train", words))
