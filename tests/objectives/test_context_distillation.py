"""A teacher that reads more than the model that learns from it."""

import json

import pytest
import torch
from preference_rows import parts, written
from test_distill import answer_rows
from test_preference import FP32, gradients, mean_loss
from tiny_runs import tiny_config, tiny_parts
from transformers import Phi3Config, Phi3ForCausalLM

from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.objectives.distill import DistillConfig, DistilledLoss
from lightning_peft.objectives.teacher import Teacher

HINTS = "seven rivers one moon two apples three pears under the sky and five at sea".split()
ROWS = [{**row, "hint": " ".join(HINTS[: 3 + place])} for place, row in enumerate(answer_rows(9))]
ANSWER = {"prompt": "say one", "completion": "one"}
PROMPT = "data.teacher_prompt='Know this: {{ hint }}.'"


def taught(tmp_path, *more, rows=ROWS, prompt=PROMPT):
    return parts(tmp_path, "distill", rows, "data.micro_batch_size=2", "objective.weight=1", prompt, *more)


def plain_divergence(module, data, tokenizer, rows=ROWS, system=""):
    """Return mean KL(q || p) over the answers' tokens: q is the base's behind the hint, p the model's without."""
    base = tiny_model().eval()
    total, count = 0.0, 0
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        own = [{"role": "system", "content": system}] if system else []
        hint = f"Know this: {row['hint']}." + (f"\n\n{system}" if system else "")
        logits = []
        for model, messages in ((module.model, own), (base, [{"role": "system", "content": hint}])):
            ids = tokenizer.apply_chat_template(messages + turns, tokenize=True, return_dict=False)
            question = tokenizer.apply_chat_template(
                messages + turns[:1], tokenize=True, return_dict=False, add_generation_prompt=True
            )
            length = answer_length(data, row, tokenizer)
            found = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            logits.append(found[len(question) - 1 : len(question) - 1 + length].float().log_softmax(-1))
        student, teacher = logits
        teacher = teacher.detach()
        total = total + (teacher.exp() * (teacher - student)).sum()
        count += len(student)
    return total / count


def answer_length(data, row, tokenizer):
    """Return the number of a row's answer tokens that are trained, by the sample that holds it."""
    samples = data.training_samples
    ids = tokenizer(row["prompt"])["input_ids"]
    for place in range(len(samples)):
        sample = samples[place]
        if any(sample.input_ids[start : start + len(ids)] == ids for start in range(len(sample.input_ids))):
            return len(sample.labels) - sample.labels.count(IGNORED_LABEL)
    raise AssertionError(row)


@pytest.mark.parametrize("system", ["", "Be short."])
def test_teacher_reads_the_prompt_of_each_row_and_the_model_does_not(system, tmp_path):
    words = [f"data.system_prompt='{system}'"] if system else []
    module, data = taught(tmp_path, *words)
    loss, measured = mean_loss(module, data)
    expected = plain_divergence(module, data, data._tokenizer, system=system)
    torch.testing.assert_close(loss, expected, **FP32)
    torch.testing.assert_close(gradients(module, loss), gradients(module, expected), rtol=1e-4, atol=1e-5)
    assert measured["divergence"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert "the teacher reads" in "\n".join(data.train_audit.lines())


def test_loss_and_gradient_do_not_depend_on_packing_and_cut(tmp_path):
    found = []
    for number, (packing, size) in enumerate([("true", 1), ("true", 3), ("false", 1), ("false", 5)]):
        (tmp_path / str(number)).mkdir()
        words = [f"data.packing={packing}", f"data.micro_batch_size={size}"]
        module, data = parts(tmp_path / str(number), "distill", ROWS, *words, PROMPT)
        loss, measured = mean_loss(module, data)
        found.append((loss.detach(), gradients(module, loss), torch.tensor(list(measured.values()))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_samples_that_are_run_apart_meet_their_own(tmp_path):
    rows = [{**row, "hint": " ".join(HINTS[: 12 - place])} for place, row in enumerate(ROWS)]
    module, data = taught(tmp_path, rows=rows)
    together = mean_loss(module, data)
    module.objective.runs_apart = module.objective.teacher.loss.runs_apart = True
    apart = mean_loss(module, data)
    torch.testing.assert_close(apart[0], together[0], **FP32)
    assert apart[1] == pytest.approx(together[1], rel=1e-4)


@pytest.mark.parametrize("hint", [4, 60])
def test_teacher_beyond_its_first_set_of_frequencies_meets_the_same_tokens(hint, tmp_path):
    """Phi 3's longrope: a packed row is run apart where one sample is beyond 64 tokens, be it the teacher's alone."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = Phi3Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=96, pad_token_id=0,
        max_position_embeddings=256, original_max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        rope_parameters=factors,
    )  # fmt: skip
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        Phi3ForCausalLM(config).save_pretrained(tmp_path / str(seed))
        models.append(load_model(ModelConfig("hf", str(tmp_path / str(seed))), torch.float32).eval())
    draw = torch.Generator().manual_seed(1)
    samples = []
    for prompt, answer, more in ((6, 5, 3), (5, 13, 4), (8, 9, hint)):
        ids = torch.randint(5, 96, (more + prompt + answer,), generator=draw).tolist()
        labels = [IGNORED_LABEL] * (more + prompt) + ids[more + prompt :]
        theirs = Encoded(ids, labels, ends=True)
        samples.append(Encoded(ids[more:], labels[more:], ends=True, taught=theirs))
    objective = DistilledLoss(models[0], DistillConfig(weight=1.0), True).eval()
    objective.teacher = Teacher(models[1], True)
    with torch.no_grad():
        packed = objective(collate([samples], 0, 64, True))
        alone = sum(objective(collate([[sample]], 0, 64, False)) for sample in samples)
    torch.testing.assert_close(packed, alone, **FP32)


def test_sources_without_a_prompt_are_read_as_they_are(tmp_path):
    """A mixture: its loss is that of its sources, each by itself."""
    folders = [tmp_path / name for name in ("a", "b", "both")]
    for folder in folders:
        folder.mkdir()
    plain = [{key: value for key, value in row.items() if key != "hint"} for row in answer_rows(5, seed=1)]
    apart = [taught(folders[0]), taught(folders[1], rows=plain, prompt="data.preview=0")]
    words = ["data.train_path=null", f"data.sources.a.train_path={folders[0]}/rows.jsonl"]
    words += [f"data.sources.b.train_path={folders[1]}/rows.jsonl", PROMPT.replace("data.", "data.sources.a.")]
    module, data = taught(folders[2], *words, prompt="data.preview=0")
    audits = [part[1].train_audit for part in apart]
    tokens = audits[0].taught_tokens + audits[1].tokens
    more = (tokens - audits[0].tokens - audits[1].tokens) / 14
    assert f"the teacher reads {tokens:,} tokens for them, {more:.1f} more a sample" in data.train_audit.lines()
    sums = [summed(*part) for part in (*apart, (module, data))]
    torch.testing.assert_close(sums[2], sums[0] + sums[1], **FP32)


def summed(module, data):
    """Return the losses of all samples, packed in one row."""
    samples = [data.training_samples[place] for place in range(len(data.training_samples))]
    width = sum(len(sample.input_ids) for sample in samples)
    with torch.no_grad():
        return module.objective(collate([samples], 0, width, True))


def test_cut_answers_are_cut_alike_for_the_teacher(tmp_path):
    module, data = taught(tmp_path, "data.max_length=80")
    assert 0 < data.train_audit.truncated < 9
    for batch in data.train_dataloader():
        own, theirs = (one.labels[one.labels != IGNORED_LABEL] for one in (batch, batch.taught))
        assert torch.equal(own, theirs)
    mean_loss(module, data)


def test_twins_are_kept_by_the_token_cache_and_by_streams(tmp_path):
    path = written(tmp_path / "rows.jsonl", ROWS)
    words = ["objective=distill", "data=jsonl", f"data.train_path={path}", "data.validation_fraction=0", PROMPT]
    words += ["data.micro_batch_size=1", f"data.cache_dir={tmp_path}/cache"]
    found = []
    for more in ([], [], ["data.streaming=true", "trainer.max_steps=7"]):
        _, data = tiny_parts(tiny_config(tmp_path / "run", *words, *more))
        data.setup()
        found.append(sorted(batch.taught.num_tokens for batch in data.train_dataloader()))
    assert sum(found[0]) == sum(found[1]) == sum(found[2])
    assert len(list((tmp_path / "cache").glob("*/taught/tokens.npy"))) == 1


def test_validation_divergence_falls_and_the_prompt_layout_has_no_hint(tmp_path):
    path = written(tmp_path / "rows.jsonl", ROWS * 4)
    words = [
        "objective=distill", "objective.weight=1", "data=jsonl", f"data.train_path={path}", "data.max_length=160",
        f"data.validation_path={path}", PROMPT, "logger=csv",
    ]  # fmt: skip
    before = train(tiny_config(tmp_path / "none", *words, "trainer.max_steps=1", "optimizer.lr=1e-9"))
    after = train(tiny_config(tmp_path / "run", *words, "trainer.max_steps=40", "optimizer.lr=2e-3"))
    name = "validation_divergence"
    assert after["metrics"][name] < 0.7 * before["metrics"][name]
    layout = json.loads((tmp_path / "run" / "adapter" / "prompt_layout.json").read_text())
    assert layout["system_prompt"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([PROMPT], "data.teacher_prompt: objective=sft has no teacher that reads it; use objective=distill"),
        (["objective=dpo", PROMPT], "data.teacher_prompt: objective=dpo has no teacher"),
    ],
)
def test_prompt_without_a_teacher_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        compose_config("train", ["model=tiny", *words])


@pytest.mark.parametrize(
    ("prompt", "rows", "message"),
    [
        ("data.teacher_prompt='{{ other }}'", ROWS, "data.teacher_prompt: the rows have no column other, only prompt"),
        ("data.teacher_prompt='{{ hint'", ROWS, "data.teacher_prompt='{{ hint': not a Jinja template"),
        (PROMPT, [ROWS[0], ANSWER], "data.teacher_prompt cannot be filled in .* takes rows without one"),
        ("data.teacher_prompt='{{ hint }}'", [{**ROWS[0], "hint": " "}], "expected text from data.teacher_prompt"),
        (PROMPT, [{"text": "a b c", "hint": "d"}], "data.teacher_prompt: stands before a prompt, and rows of .*text"),
    ],
)
def test_prompt_that_rows_do_not_make_is_named(prompt, rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        taught(tmp_path, rows=rows, prompt=prompt)


def test_prompt_beyond_the_context_is_refused(tmp_path):
    rows = [{**ROWS[0], "hint": "far " * 3000}]
    path = written(tmp_path / "rows.jsonl", rows)
    words = ["objective=distill", "data=jsonl", f"data.train_path={path}", "data.validation_fraction=0", PROMPT]
    with pytest.raises(ValueError, match=r"data.teacher_prompt: the longest sample behind it has \d+ tokens, and the"):
        train(tiny_config(tmp_path / "run", *words))


def test_context_behind_the_prompt_is_the_teachers(tmp_path):
    for context in (96, 512):
        model = tiny_model()
        model.config.max_position_embeddings = context
        model.save_pretrained(tmp_path / str(context))
        tiny_tokenizer().save_pretrained(tmp_path / str(context))
    path = written(tmp_path / "rows.jsonl", [{**row, "hint": "far " * 20} for row in ROWS])
    words = ["objective=distill", "data=jsonl", f"data.train_path={path}", "data.validation_fraction=0", PROMPT]
    words += ["model=hf", "data.max_length=96", "dry_run=true"]

    def check(own, theirs):
        train(
            tiny_config(
                tmp_path / "run", *words, f"model.path={tmp_path / own}", f"objective.teacher={tmp_path / theirs}"
            )
        )

    check("96", "512")
    with pytest.raises(ValueError, match=r"behind it has \d+ tokens, and the teacher reads 96; shorten it"):
        check("512", "96")


def test_prompt_is_ordinary_text_on_the_command_line():
    words = ["model=tiny", "objective=distill", "data.teacher_prompt=Answer {{ hint }}, no more: 'yes' or no = fine."]
    assert compose_config("train", words).data.teacher_prompt == "Answer {{ hint }}, no more: 'yes' or no = fine."
