import logging
import mmap
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_peft.data import tokenizer_template
from lightning_peft.data.cache import cache_folder, cached_samples, entry_name
from lightning_peft.data.config import DataConfig, Format, OnBadRow, OnTooLong
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.samples import make_samples

LONG = " ".join(["one two three four"] * 12)
ROWS = [{"prompt": f"Hi {n}", "completion": LONG if n % 9 == 0 else "Hello there " * (1 + n % 5)} for n in range(60)]
TEXTS = [{"text": LONG if n % 7 == 0 else f"Paris {n} France"} for n in range(40)]


@pytest.fixture
def config(tmp_path, write_jsonl):
    return DataConfig(
        train_path=write_jsonl(ROWS), validation_fraction=0.1, max_length=64, cache_dir=str(tmp_path / "kept")
    )


def entries(config):
    return sorted(path for path in cache_folder(config.cache_dir).iterdir() if path.is_dir())


def tokens_of(samples):
    return [(samples[index].input_ids, samples[index].labels) for index in range(len(samples))]


def everything(config, tokenizer, caplog):
    """Return the batches, counts and log lines of a start, those about the cache itself left out."""
    tokenizer_template._log_plain_layout.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning_peft"):
        module = SFTDataModule(config, tokenizer, seed=3)
        module.setup()
        batches = [*module.train_dataloader(), *module.val_dataloader()]
    tensors = [(b.input_ids, b.labels, b.position_ids, b.cu_seqlens) for b in batches]
    numbers = [(b.max_seqlen, b.num_tokens, b.num_supervised) for b in batches]
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if not r.name.endswith(".cache")]
    return tensors, (numbers, lines, module.train_audit, module.validation_audit, module.fingerprint, module.example)


KINDS = {
    "packed and cut": {},
    "grouped": {"packing": False, "micro_batch_size": 2},
    "long rows skipped": {"on_too_long": OnTooLong.skip},
    "bad rows skipped": {"on_bad_row": OnBadRow.skip, "rows": [*ROWS, "{", {"prompt": "Hi"}, {"prompt": 3}]},
    "text split": {"on_too_long": OnTooLong.split, "rows": TEXTS},
    "nothing held out": {"validation_fraction": 0.0},
    "no template": {"template": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_cold_warm_and_no_cache_are_the_same_to_the_bit(kind, config, make_tokenizer, chatml, write_jsonl, caplog):
    options = dict(KINDS[kind])
    tokenizer = make_tokenizer(options.pop("template")) if "template" in options else chatml
    if rows := options.pop("rows", None):
        options["train_path"] = write_jsonl(rows, "others.jsonl")
    config = replace(config, **options)

    tensors, rest = everything(replace(config, cache_dir=None), tokenizer, caplog)
    for _ in ("cold", "warm"):
        kept_tensors, kept_rest = everything(config, tokenizer, caplog)
        assert kept_rest == rest
        assert len(kept_tensors) == len(tensors)
        for batch, kept_batch in zip(tensors, kept_tensors, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, kept_batch, strict=True))
    assert "tokens read from" in caplog.text and "tokenised in" not in caplog.text


def test_warm_samples_are_mapped_and_not_in_memory(config, chatml):
    for _ in ("cold", "warm"):
        samples, _ = cached_samples(config, "train", chatml)
        for part in samples._parts:
            assert isinstance(part.base, np.memmap | mmap.mmap)


def test_both_starts_name_the_entry_and_its_size(config, chatml, caplog):
    with caplog.at_level(logging.INFO):
        for _ in ("cold", "warm"):
            cached_samples(config, "train", chatml)
    (entry,) = entries(config)
    assert caplog.messages[0].startswith("train rows: tokenised in ") and f"kept in {entry} (0.0 MiB)" in caplog.text
    assert caplog.messages[1:] == [f"train rows: tokens read from {entry} (0.0 MiB)"]


CHANGES = {
    "max_length": 63,
    "max_rows": 50,
    "system_prompt": "Be brief",
    "on_too_long": OnTooLong.skip,
    "on_bad_row": OnBadRow.skip,
    "format": Format.prompt_completion,
    "prompt_column": "completion",
    "validation_fraction": 0.2,
    "split_seed": 1,
}


@pytest.mark.parametrize("option", CHANGES)
def test_option_that_decides_tokens_names_another_entry(option, config, chatml):
    assert entry_name(replace(config, **{option: CHANGES[option]}), "train", chatml) != entry_name(
        config, "train", chatml
    )


@pytest.mark.parametrize("change", [{"packing": False}, {"micro_batch_size": 1}, {"num_workers": 1}, {"preview": True}])
def test_option_without_effect_on_tokens_finds_the_entry(change, config, chatml):
    assert entry_name(replace(config, **change), "train", chatml) == entry_name(config, "train", chatml)


def test_rows_of_the_same_length_and_time_name_another_entry(config, chatml, write_jsonl, tmp_path):
    before = entry_name(config, "train", chatml)
    path = tmp_path / "rows.jsonl"
    times = path.stat()
    path.write_text(path.read_text().replace("Hi 7", "Hi 8"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert entry_name(config, "train", chatml) != before


def test_rows_that_change_while_they_are_read_are_not_kept(config, chatml, write_jsonl, monkeypatch, caplog):
    def make_slowly(*arguments):
        samples = make_samples(*arguments)
        write_jsonl(ROWS[:30])
        return samples

    monkeypatch.setattr("lightning_peft.data.cache.make_samples", make_slowly)
    cached_samples(config, "train", chatml)
    assert entries(config) == []
    assert "changed while it was read" in caplog.text


def test_tokenizer_and_split_name_another_entry(config, make_tokenizer, chatml):
    added, template = make_tokenizer(chatml.chat_template), make_tokenizer(chatml.chat_template + " ")
    same = make_tokenizer(chatml.chat_template)
    added.add_tokens(["Paris France"])
    names = [entry_name(config, "train", tokenizer) for tokenizer in (same, added, template, chatml)]
    assert len({*names, entry_name(config, "validation", chatml)}) == 5
    assert entry_name(config, "train", make_tokenizer(chatml.chat_template)) == names[0]


def test_validation_file_names_the_validation_entry_only(config, chatml, write_jsonl):
    config = replace(config, validation_path=write_jsonl(ROWS[:5], "held.jsonl"))
    train, validation = (entry_name(config, split, chatml) for split in ("train", "validation"))
    write_jsonl(ROWS[:6], "held.jsonl")
    assert entry_name(config, "train", chatml) == train
    assert entry_name(config, "validation", chatml) != validation


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit flipped": flip_a_bit,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tokens.npy", "trained.npy", "starts.npy", "counts.json"])
def test_damaged_entry_is_reported_and_made_again(name, damage, config, chatml, caplog):
    samples, audit = cached_samples(config, "train", chatml)
    wanted = tokens_of(samples), audit
    (entry,) = entries(config)
    DAMAGES[damage](entry / name)
    if (name, damage) == ("counts.json", "a bit flipped"):  # its last character is the closing brace
        assert (entry / name).read_text()[-1] != "}"

    again, audit = cached_samples(config, "train", chatml)
    assert (tokens_of(again), audit) == wanted
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.startswith(f"{entry} is damaged (") and line.endswith("): tokenising again")

    caplog.clear()
    with caplog.at_level(logging.INFO):
        cached_samples(config, "train", chatml)
    assert caplog.messages == [f"train rows: tokens read from {entry} (0.0 MiB)"]


def test_several_at_once_tokenise_once(config, chatml, caplog):
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cached_samples(config, "train", chatml), range(4)))
    assert sum("tokenised in" in line for line in caplog.messages) == 1
    assert sum("tokens read from" in line for line in caplog.messages) == 3
    assert len({samples.fingerprint for samples, _ in found}) == 1


HOLD = (
    "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(); time.sleep(99)"
)


def test_one_that_is_killed_at_work_lets_the_next_one_in(config, chatml, caplog):
    entry = cache_folder(config.cache_dir) / entry_name(config, "train", chatml)
    leftover = entry.with_suffix(".partial") / "tokens.npy"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, entry.with_suffix(".lock")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cached_samples, config, "train", chatml)
        while not caplog.messages and not waiting.done():
            time.sleep(0.01)
        assert caplog.messages == ["another process is tokenising the same rows: waiting for it"]
        assert not waiting.done()
        holder.kill()
        holder.communicate()
        samples, _ = waiting.result()
    assert caplog.messages[1] == "train rows: the process waited for kept no tokens"
    assert tokens_of(samples) == tokens_of(cached_samples(config, "train", chatml)[0])
    assert entries(config) == [entry] and not leftover.parent.exists()


def test_folder_that_cannot_be_made_is_named(config, chatml, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    samples, _ = cached_samples(replace(config, cache_dir=str(tmp_path / "file" / "kept")), "train", chatml)
    assert len(samples) == 54
    assert caplog.messages == [
        f"data.cache_dir={tmp_path}/file/kept: Not a directory, so tokens are not kept; "
        "give a folder that can be written to, or null"
    ]


def test_disk_that_is_full_costs_the_entry_only(config, chatml, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        samples, _ = cached_samples(config, "train", chatml)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tokens_of(samples) == tokens_of(cached_samples(replace(config, cache_dir=None), "train", chatml)[0])
    assert entries(config) == [] and caplog.messages[0].endswith("so tokens are not kept")


@pytest.mark.parametrize("change", [{"cache_dir": None}, {"streaming": True}])
def test_nothing_is_kept_without_a_folder_or_of_a_stream(change, config, chatml, tmp_path):
    module = SFTDataModule(replace(config, **change), chatml, seed=0)
    module.setup()
    assert not (tmp_path / "kept").exists()


def test_auto_is_under_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "lightning_peft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder("auto")) == "/home/someone/.cache/lightning_peft"
    assert str(cache_folder("~/tokens")) == "/home/someone/tokens"
