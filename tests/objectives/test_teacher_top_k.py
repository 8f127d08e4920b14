"""A teacher that reads the rows once: the part of it that is kept, and the loss on that."""

import json
from contextlib import closing
from pathlib import Path
from subprocess import PIPE, STDOUT

import numpy as np
import pytest
import torch
from preference_rows import parts, written
from safetensors.torch import load_file
from started import COMMAND, Started
from test_context_distillation import PROMPT, ROWS
from test_distill import plain_logits
from test_preference import FP32, gradients, mean_loss
from tiny_runs import tiny_config

from lightning_peft.checkpoint.resume import checkpoint_path
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.top_tokens import IDS, LOG_PROBABILITIES
from lightning_peft.kernels.divergence import divergence
from lightning_peft.models.tiny import tiny_model
from lightning_peft.objectives.linear_divergence import bucketed
from lightning_peft.training import teacher_files
from lightning_peft.training.teacher_files import RowFile, is_whole
from lightning_peft.training.teacher_store import check_room, keep_teacher, naming_cache, write_top

ANSWERS = [{key: value for key, value in row.items() if key != "hint"} for row in ROWS]
VOCABULARY = 320


def kept(tmp_path, top_k, *more, rows=ANSWERS):
    words = [f"objective.teacher_top_k={top_k}", f"data.cache_dir={tmp_path}/cache"] if top_k else []
    module, data = parts(tmp_path, "distill", rows, "data.micro_batch_size=2", *words, *more)
    if top_k:
        model, quantization = module.model_config, module.quantization_config
        cache = str(tmp_path / "cache")
        keep_teacher(data, module.objective_config, model, quantization, torch.float32, torch.device("cpu"), cache)
    return module, data


KINDS = [("forward_kl", 1.0), ("reverse_kl", 2.5), ("jsd", 2.5)]


@pytest.mark.parametrize(("kind", "temperature"), KINDS)
@pytest.mark.parametrize("more", [["objective.teacher=tiny_tied"], [PROMPT], ["method=qlora"]])
def test_all_tokens_kept_are_the_teacher_itself(kind, temperature, more, tmp_path):
    words = [f"objective.divergence={kind}", f"objective.temperature={temperature}", *more]
    rows = ROWS if PROMPT in more else ANSWERS
    for name in ("whole", "kept"):
        (tmp_path / name).mkdir()
    whole, whole_data = kept(tmp_path / "whole", None, *words, rows=rows)
    module, data = kept(tmp_path / "kept", VOCABULARY, *words, rows=rows)
    assert module.objective.teacher is None
    (loss, measured), (expected, whole_measured) = mean_loss(module, data), mean_loss(whole, whole_data)
    torch.testing.assert_close(loss, expected, **FP32)
    assert measured == pytest.approx(whole_measured, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradients(module, loss), gradients(whole, expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)])
def test_others_are_one_token_with_their_mass(kind, beta, tmp_path):
    """Torch has them on whole logits: probabilities of the teacher's five likeliest, and of all others summed."""
    words = [f"objective.divergence={kind}", "objective.weight=1", "objective.teacher=tiny_tied"]
    module, data = kept(tmp_path, 5, *words)
    loss, _ = mean_loss(module, data)
    student, _ = plain_logits(module.model, data)
    with torch.no_grad():
        teacher, _ = plain_logits(tiny_model(tied=True).eval(), data)
    ids = teacher.topk(5).indices
    both = []
    for logits in (student, teacher):
        probabilities = logits.double().softmax(-1)
        top = probabilities.gather(1, ids)
        both.append(torch.cat([top, 1 - top.sum(1, keepdim=True)], 1).log())
    expected = divergence(both[0], both[1], beta).mean().float()
    torch.testing.assert_close(loss, expected, **FP32)
    torch.testing.assert_close(gradients(module, loss), gradients(module, expected), rtol=1e-4, atol=1e-6)


def test_mass_of_others_is_exact_where_there_is_next_to_none():
    logits = torch.tensor([[40.0, 0.0, 0.0, -3.0]])
    rest = bucketed(logits, torch.tensor([[0]]))[0, 1]
    expected = logits.double().log_softmax(-1)[0, 1:].logsumexp(0)
    torch.testing.assert_close(rest.double(), expected, rtol=1e-6, atol=0)


def test_loss_and_gradient_do_not_depend_on_packing_and_cut(tmp_path):
    found = []
    for number, (packing, size) in enumerate([("true", 1), ("true", 3), ("false", 1), ("false", 5)]):
        (tmp_path / str(number)).mkdir()
        words = [f"data.packing={packing}", f"data.micro_batch_size={size}", "objective.teacher=tiny_tied"]
        module, data = kept(tmp_path / str(number), 7, *words)
        loss, measured = mean_loss(module, data)
        found.append((loss.detach(), gradients(module, loss), torch.tensor(list(measured.values()))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_samples_that_are_run_apart_meet_their_own(tmp_path):
    module, data = kept(tmp_path, 7, "objective.teacher=tiny_tied")
    together = mean_loss(module, data)
    module.objective.runs_apart = True
    apart = mean_loss(module, data)
    torch.testing.assert_close(apart[0], together[0], **FP32)
    assert apart[1] == pytest.approx(together[1], rel=1e-4)


def words_of(tmp_path):
    path = written(tmp_path / "rows.jsonl", ROWS * 3)
    return [
        "objective=distill", "objective.teacher=tiny_tied", "objective.teacher_top_k=8", "data=jsonl", PROMPT,
        f"data.train_path={path}", "data.validation_fraction=0.2", f"data.cache_dir={tmp_path}/cache", "logger=csv",
        "trainer.max_steps=4", "checkpoint.every_n_steps=2", "trainer.accumulate_grad_batches=2", "adapter.dropout=0.1",
    ]  # fmt: skip


def test_teacher_is_run_once_and_a_resumed_run_ends_bit_equal(tmp_path, caplog):
    words = words_of(tmp_path)
    with caplog.at_level("INFO"):
        result = train(tiny_config(tmp_path / "whole", *words))
        assert caplog.text.count("likeliest tokens at") == 2 and "memory: teacher" not in caplog.text
        assert result["metrics"]["validation_divergence"] > 0
        caplog.clear()
        stopped = checkpoint_path(tmp_path / "whole" / "checkpoints", 2)
        train(tiny_config(tmp_path / "resumed", *words, f"resume={stopped}"))
        assert caplog.text.count("likeliest tokens are read from") == 2 and "likeliest tokens at" not in caplog.text
        caplog.clear()
        train(tiny_config(tmp_path / "other", *words, "objective.temperature=2", "trainer.max_steps=1"))
        assert caplog.text.count("likeliest tokens at") == 2
    whole, resumed = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_adapter_that_teaches_is_run_again_when_its_scaling_is_another(tmp_path, caplog):
    train(tiny_config(tmp_path / "first", "trainer.max_steps=1", "logger=none"))
    adapter = tmp_path / "first/adapter"
    words = [f"objective.teacher_adapter={adapter}", "objective.teacher_top_k=5", f"data.cache_dir={tmp_path}/cache"]
    (tmp_path / "before").mkdir()
    module, data = parts(tmp_path / "before", "distill", ANSWERS, *words)
    config = json.loads((adapter / "adapter_config.json").read_text())
    with caplog.at_level("INFO"):
        for alpha in (config["lora_alpha"], 2 * config["lora_alpha"]):
            (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
            keep(module, data, tmp_path / "cache")
    assert caplog.text.count("likeliest tokens at") == 2
    first, second = (np.load(path) for path in (tmp_path / "cache").glob(f"teacher-*/{LOG_PROBABILITIES}"))
    assert not np.allclose(first, second)


def keep(module, data, cache):
    options = module.objective_config, module.model_config, module.quantization_config
    keep_teacher(data, *options, torch.float32, torch.device("cpu"), str(cache))


@pytest.mark.slow
def test_trials_that_start_together_run_the_teacher_once(tmp_path):
    words = [word for word in words_of(tmp_path) if "max_steps" not in word]
    command = [*COMMAND, "train", "model=tiny", *words, "trainer.max_steps=1", "trainer.accelerator=cpu"]
    trials = [Started([*command, f"run_dir={tmp_path}/{name}"], stdout=PIPE, stderr=STDOUT, text=True) for name in "ab"]
    said = "".join(trial.communicate(timeout=300)[0] for trial in trials)
    assert [trial.returncode for trial in trials] == [0, 0], said
    assert said.count("likeliest tokens at") == said.count("likeliest tokens are read from") == 2, said
    assert len(list((tmp_path / "cache").glob("teacher-*/sums.json"))) == 2
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_teachers_that_run_side_by_side_without_locks_leave_a_whole_store(tmp_path):
    module, data = kept(tmp_path, 5)
    samples, folder = data.sample_sets[0], tmp_path / "teacher-x"
    teacher = tiny_model(tied=True).eval()
    first, second = (write_top(teacher, samples, module.objective_config, 320, folder, "x") for _ in range(2))
    next(first), next(second), next(second)
    assert len(list(first)) == len(samples) - 1 and is_whole(folder)
    probabilities = np.load(folder / LOG_PROBABILITIES)
    np.testing.assert_allclose(np.exp(probabilities).sum(1), 1, rtol=1e-5)
    assert len(list(second)) == len(samples) - 2 and is_whole(folder)
    assert np.array_equal(np.load(folder / LOG_PROBABILITIES), probabilities)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_pass_that_was_stopped_goes_on_at_its_last_mark(is_damaged, tmp_path, monkeypatch, caplog):
    """Bit-equal to one that was not; what was written after the mark is dropped, and a damaged part starts over."""
    module, data = kept(tmp_path, 5)
    samples, folder, teacher = data.sample_sets[0], tmp_path / "teacher-x", tiny_model(tied=True).eval()
    monkeypatch.setattr(teacher_files, "SECONDS_BETWEEN_MARKS", 0.0)

    def a_pass(into):
        return write_top(teacher, samples, module.objective_config, 320, into, "x", is_locked=True)

    stopped = a_pass(folder)
    for _ in range(3):
        next(stopped)
    stopped.close()
    assert not folder.exists()
    path = tmp_path / "teacher-x.partial" / LOG_PROBABILITIES
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?" if is_damaged else content + b"half a row")

    with caplog.at_level("INFO"):
        assert len(list(a_pass(folder))) == len(samples) - (0 if is_damaged else 3)

    assert ("stopped after 3 rows: it goes on there" in caplog.text) == (not is_damaged)
    assert len(list(a_pass(tmp_path / "whole"))) == len(samples) and is_whole(folder)
    for name in (IDS, LOG_PROBABILITIES, "sums.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob("*.partial")) and not (folder / "marks.json").exists()


def test_damaged_store_is_made_again(tmp_path, caplog):
    module, data = kept(tmp_path, 5)
    (path,) = tmp_path.glob(f"cache/teacher-*/{IDS}")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + bytes(4))
    keep(module, data, tmp_path / "cache")
    assert "is damaged (its checksum is another): the teacher is run again" in caplog.text
    assert path.read_bytes() == whole


def test_whole_store_is_read_without_writing(tmp_path):
    module, data = kept(tmp_path, 5)
    for path in (tmp_path / "cache").glob("*.lock"):
        path.unlink()
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*"))
    keep(module, data, tmp_path / "cache")
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*")) == before


def test_full_disk_is_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="data.cache_dir=here: No space left on device, and what is kept of the"):  # noqa: SIM117
        with naming_cache("here"), closing(RowFile(Path("/dev/full"), np.int32, (4, 5))) as rows:
            rows.write(np.zeros((4, 5)))
    module, data = kept(tmp_path, None)
    module.objective_config.teacher_top_k = 10**12
    with pytest.raises(ValueError, match=r"data.cache_dir=here: has [\d,]+ MiB free, and objective.teacher_top_k=1000"):
        check_room(data.sample_sets[0], module.objective_config, 10**12, tmp_path, "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.teacher_top_k=0"], "objective.teacher_top_k=0: must be at least 1, or null"),
        (
            ["objective.teacher_top_k=4", "data.cache_dir=null"],
            "objective.teacher_top_k=4 data.cache_dir=null: names no",
        ),
        (
            ["objective.teacher_top_k=4", "data.streaming=true", "trainer.max_steps=3"],
            "objective.teacher_top_k=4 data.streaming=true: rows that are read during training",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        compose_config("train", ["model=tiny", "objective=distill", *words])
