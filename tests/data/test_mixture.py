"""Several sets of rows in one training: shares in tokens, passes, order, and where to go on."""

import json
import random
from collections import Counter
from itertools import islice

import pytest

from lightning_peft.commands.evaluate import laid_out_as
from lightning_peft.data.config import DataConfig, Reasoning, Trained
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.mixture import sources_of, validation_losses
from lightning_peft.data.samples import read_conversations

WORDS = "one two three four Hello there Paris France".split()
NAMES = ("chat", "code", "story")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Return a file for each source; the prompts of its rows begin with its name."""
    folder, rng = tmp_path_factory.mktemp("mixed"), random.Random(0)

    def said(most):
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, most)))

    rows = {
        "chat": [{"prompt": f"chat {n}", "completion": said(20)} for n in range(90)],
        "code": [{"prompt": f"code {n}", "completion": said(9)} for n in range(40)],
        "story": [{"text": f"story {n} {said(60)}"} for n in range(30)],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


class Ranked(SFTDataModule):
    """The data module as rank r of w sees it."""

    place = (0, 1)

    def _rank_and_world_size(self):
        return self.place


def mixed(paths, tokenizer, weights=(0.5, 0.3, 0.2), place=(0, 1), seed=0, more=None, **options):
    sources = {
        name: {"train_path": paths[name]} | ({} if weights is None else {"weight": weight})
        for name, weight in zip(NAMES, weights or NAMES, strict=True)
    }
    for name, own in (more or {}).items():
        sources[name] |= own
    defaults = {"max_length": 64, "micro_batch_size": 2, "validation_fraction": 0.1, "shuffle_window": 25}
    config = DataConfig(sources=sources, cache_dir=None, **(defaults | options))
    module = Ranked(config, tokenizer, seed)
    module.place = place
    module.setup()
    return module


def samples_of(batches, tokenizer):
    """Return the text of each sample and its tokens, without padding."""
    found = []
    for batch in batches:
        if batch.num_tokens:
            ids, bounds = batch.input_ids.flatten().tolist(), batch.cu_seqlens.tolist()
            found += [ids[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    return [(tokenizer.decode(ids), len([token for token in ids if token != tokenizer.pad_token_id])) for ids in found]


def name_of(text):
    return min((name for name in NAMES if name in text), key=text.index)


def tokens_by_name(batches, tokenizer):
    found = Counter()
    for text, tokens in samples_of(batches, tokenizer):
        found[name_of(text)] += tokens
    return found


def keys(batches):
    return [(tuple(map(tuple, b.input_ids.tolist())), b.num_tokens, b.num_supervised) for b in batches]


@pytest.fixture(scope="module")
def tokenizer(chatml):
    chatml.pad_token = "<s>"  # no sample holds it, so that padding can be told
    yield chatml
    chatml.pad_token = None


KINDS = [{"streaming": False}, {"streaming": True}, {"packing": False}, {"packing": False, "streaming": True}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["packed", "packed stream", "grouped", "grouped stream"])
BATCHES = 120
"""Batches of a stream, which has no end: several passes over the small sources."""


def some_of(loader, kind):
    return islice(loader, BATCHES) if kind.get("streaming") else loader


@every_kind
def test_tokens_are_shared_by_weight(paths, tokenizer, kind):
    loader = mixed(paths, tokenizer, **kind).train_dataloader()
    epochs = [list(some_of(loader, kind)) for _ in range(1 if kind.get("streaming") else 4)]
    batches = [batch for epoch in epochs for batch in epoch]
    tokens = tokens_by_name(batches, tokenizer)
    total = sum(tokens.values())
    window = sum(batch.num_tokens for batch in batches) if kind.get("streaming") else 0
    assert window in (0, total)
    # A share is kept to a sample where a window ends; a stream is cut within one, of 25 samples.
    slack = 25 * 64 if kind.get("streaming") else 3 * 64
    for name, share in zip(NAMES, (0.5, 0.3, 0.2), strict=True):
        assert abs(tokens[name] - share * total) < slack
    assert tokens["code"] > 2 * sum(mixed(paths, tokenizer).training_samples.parts[1].lengths)  # several passes


@pytest.mark.parametrize("packing", [True, False])
def test_without_weights_each_row_comes_once_an_epoch(paths, tokenizer, packing):
    module = mixed(paths, tokenizer, weights=None, packing=packing)
    loader = module.train_dataloader()
    samples = module.training_samples
    expected = sorted(tokenizer.decode(samples[index].input_ids) for index in range(len(samples)))
    epochs = [[text.split("<s>")[0] for text, _ in samples_of(loader, tokenizer)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_row_holds_samples_of_several_sources(paths, tokenizer):
    batch = next(iter(mixed(paths, tokenizer, max_length=256).train_dataloader()))
    assert len({name_of(text) for text, _ in samples_of([batch], tokenizer)}) > 1


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_as_many_micro_batches(paths, tokenizer, packing):
    loader = mixed(paths, tokenizer, packing=packing).train_dataloader()
    assert {len(list(loader)) for _ in range(6)} == {len(loader)}


@every_kind
def test_order_depends_on_seed_and_epoch_only(paths, tokenizer, kind):
    loader = mixed(paths, tokenizer, **kind).train_dataloader()
    first = keys(some_of(loader, kind))
    assert keys(some_of(mixed(paths, tokenizer, **kind).train_dataloader(), kind)) == first
    assert keys(some_of(mixed(paths, tokenizer, seed=1, **kind).train_dataloader(), kind)) != first
    if not kind.get("streaming"):
        assert keys(loader) != first


@every_kind
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one(paths, tokenizer, kind, world_size):
    alone = keys(some_of(mixed(paths, tokenizer, **kind).train_dataloader(), kind))
    ranks = [
        keys(islice(mixed(paths, tokenizer, place=(rank, world_size), **kind).train_dataloader(), BATCHES))
        for rank in range(world_size)
    ]
    together = [batch for turn in zip(*ranks, strict=True) for batch in turn if batch[1]]
    assert together[: len(alone)] == alone


@every_kind
@pytest.mark.parametrize(("taken", "before", "after"), [(0, 1, 1), (7, 1, 1), (31, 1, 1), (8, 1, 2), (6, 2, 3)])
def test_resume_goes_on_exactly(paths, tokenizer, kind, taken, before, after):
    alone = keys(some_of(mixed(paths, tokenizer, **kind).train_dataloader(), kind))
    loader = mixed(paths, tokenizer, place=(0, before), **kind).train_dataloader()
    list(islice(loader, taken))
    state = json.loads(json.dumps(loader.state_dict())) if not kind.get("streaming") else loader.state_dict()
    ranks = []
    for rank in range(after):
        resumed = mixed(paths, tokenizer, place=(rank, after), **kind).train_dataloader()
        resumed.load_state_dict(state)
        ranks.append(keys(islice(resumed, BATCHES)))
    together = [batch for turn in zip(*ranks, strict=True) for batch in turn if batch[1]]
    assert together[: len(alone) - before * taken] == alone[before * taken :]


def test_resume_in_a_later_epoch(paths, tokenizer):
    loader = mixed(paths, tokenizer).train_dataloader()
    for _ in range(3):
        list(loader)
    iterator = iter(loader)
    list(islice(iterator, 5))
    resumed = mixed(paths, tokenizer).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert keys(resumed) == keys(iterator)


@every_kind
def test_a_source_ends_after_its_passes_and_the_others_go_on(paths, tokenizer, kind):
    weights = (0.2, 0.6, 0.2)
    loader = mixed(paths, tokenizer, weights, more={"code": {"max_epochs": 2}}, **kind).train_dataloader()
    batches = list(islice(loader, 250)) if kind.get("streaming") else [batch for _ in range(4) for batch in loader]
    rows = Counter(text.split("<s>")[0] for text, _ in samples_of(batches, tokenizer) if name_of(text) == "code")
    assert len(rows) == 36 and set(rows.values()) == {2}
    late = tokens_by_name(batches[-40:], tokenizer)
    assert set(late) == {"chat", "story"}
    assert 0.5 < late["chat"] / late["story"] < 2  # their weights are alike; 40 batches are a part of a window


@pytest.mark.parametrize("weights", [None, (1, 8, 1)])
def test_temperature_brings_shares_closer(paths, tokenizer, weights):
    module = mixed(paths, tokenizer, weights, temperature=3.0, validation_fraction=0.0)
    sizes = [sum(part.lengths) for part in module.training_samples.parts] if weights is None else weights
    powers = [size ** (1 / 3) for size in sizes]
    tokens = tokens_by_name([batch for _ in range(5) for batch in module.train_dataloader()], tokenizer)
    for name, power in zip(NAMES, powers, strict=True):
        assert tokens[name] / sum(tokens.values()) == pytest.approx(power / sum(powers), abs=0.02)


@every_kind
def test_weight_zero_is_validated_and_not_trained(paths, tokenizer, kind):
    module = mixed(paths, tokenizer, weights=(1, 0, 1), **kind)
    assert set(tokens_by_name(some_of(module.train_dataloader(), kind), tokenizer)) == {"chat", "story"}
    assert module.validation_names == NAMES


def test_validation_batches_are_of_one_source_each(paths, tokenizer):
    module = mixed(paths, tokenizer)
    batches = list(module.val_dataloader())
    for batch in batches:
        assert batch.source.names == NAMES
        assert {name_of(text) for text, _ in samples_of([batch], tokenizer)} == {batch.source.name}
    assert {batch.source.name for batch in batches} == set(NAMES)


def test_options_of_a_source_are_its_own(paths, tokenizer):
    own = {"code": {"system_prompt": "Thanks France", "max_rows": 5}, "story": {"on_too_long": "split"}}
    module = mixed(paths, tokenizer, more=own, max_length=40, validation_fraction=0.0, on_too_long="skip")
    chat, code, story = module.training_samples.parts
    assert len(code) <= 5 and "Thanks France" in tokenizer.decode(code[0].input_ids)
    assert "Thanks France" not in tokenizer.decode(chat[0].input_ids)
    assert module.train_audits["story"].split_long > 0 and module.train_audits["chat"].skipped_long > 0
    assert module.train_audit.rows == 90 + 5 + 30


def test_prompts_have_the_system_prompt_that_all_sources_have(paths, tokenizer, caplog):
    same = {name: {"system_prompt": "Thanks France"} for name in ("chat", "code")}  # story has no turns
    assert mixed(paths, tokenizer, more=same).prompt_layout.system_prompt == "Thanks France"
    assert "data.sources differ" not in caplog.text
    other = same | {"code": {"system_prompt": "Hello"}}
    assert mixed(paths, tokenizer, more=other, system_prompt="Hi").prompt_layout.system_prompt == "Hi"
    said = "data.sources differ in system_prompt (chat 'Thanks France', code 'Hello'): beyond their rows it is data."
    assert f"{said}system_prompt='Hi'" in caplog.text
    unused = same | {"code": {"system_prompt": "Hello", "weight": 0}}
    assert mixed(paths, tokenizer, more=unused).prompt_layout.system_prompt == "Thanks France"


def test_other_rows_are_laid_out_as_those_of_the_sources(paths):
    own = {"system_prompt": "Thanks France", "train_on": ["answer"], "reasoning": "drop"}
    trained = DataConfig(sources={name: {"train_path": paths[name]} | own for name in ("chat", "code")})
    found = laid_out_as(trained, DataConfig(train_path=paths["story"]))
    assert (found.system_prompt, found.train_on, found.reasoning) == ("Thanks France", [Trained.answer], Reasoning.drop)


def test_rows_that_several_sources_have_are_counted(paths, tokenizer):
    twice = {"code": {"train_path": paths["chat"]}}
    module = mixed(paths, tokenizer, more=twice, validation_fraction=0.0)
    assert module.train_audits["code"].seen_in_sources == 90
    assert "90 of 90 samples are in an earlier source of the mixture as well" in module.train_audits["code"].warnings()
    held_out = mixed(paths, tokenizer, more={"story": {"train_path": paths["chat"], "validation_path": paths["code"]}})
    assert held_out.validation_audits["story"].seen_in_training == 36


def test_conversations_come_from_the_sources_in_turn(paths):
    config = DataConfig(sources={name: {"train_path": paths[name]} for name in NAMES}, validation_fraction=0.1)
    found = read_conversations(config, "validation", 4, tokenizer=None)
    assert [name_of(messages[0].content) for _, messages in found] == ["chat", "code", "story", "chat"]


def test_weights_change_no_token_that_is_kept(paths, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    for weight in (0.2, 0.7):
        sources = {name: {"train_path": paths[name], "weight": weight if name == "chat" else 1.0} for name in NAMES}
        SFTDataModule(DataConfig(sources=sources, cache_dir=str(tmp_path)), tokenizer, 0).setup()
    assert caplog.text.count("tokenised in") == 6 and caplog.text.count("tokens read from") == 6


def test_a_list_of_sources_is_named_by_name_or_place(paths):
    listed = [{"train_path": paths["chat"], "name": "chat"}, {"train_path": paths["code"], "weight": None}]
    assert [source.name for source in sources_of(DataConfig(sources=listed))] == ["chat", "1"]
    assert validation_losses(DataConfig(sources=listed)) == [
        "validation_loss", "validation_loss/chat", "validation_loss/1",
    ]  # fmt: skip


WRONG = {
    "no mapping": ({"a": "rows.jsonl"}, {}, r"data.sources.a=rows.jsonl: must hold options"),
    "unknown option": ({"a": {"wieght": 1}}, {}, r"data.sources.a.wieght: no such option of a source; did you mean we"),
    "shared option": ({"a": {"max_length": 9}}, {}, r"data.sources.a.max_length: all sources share it"),
    "negative weight": ({"a": {"weight": -1}}, {}, r"data.sources.a.weight=-1: must be a number from 0 on"),
    "text weight": ({"a": {"weight": "x"}}, {}, r"data.sources.a.weight=x: must be a number"),
    "half a pass": ({"a": {"max_epochs": 0.5}}, {}, r"data.sources.a.max_epochs=0.5: must be a whole number"),
    "some weights": ({"a": {"weight": 1}, "b": {"format": "text"}}, {}, r"data.sources.b.weight=null: give every"),
    "no weight": ({"a": {"weight": 0}, "b": {"weight": 0.0}}, {}, r"every weight is 0"),
    "all end": ({"a": {"max_epochs": 1}, "b": {"max_epochs": 2}}, {}, r"data.sources.a.max_epochs=1: every source has"),
    "rows beside them": ({"a": {"weight": 1}}, {"train_path": "x"}, r"data.train_path=x: data.sources name the rows"),
    "wrong value": ({"a": {"format": "poem"}}, {}, r"data.sources.a.format=poem: no such format"),
    "value out of range": ({"a": {"validation_fraction": 2}}, {}, r"data.sources.a: data.validation_fraction=2"),
    "two places": ({"a": {"train_path": "x", "hub_name": "y"}}, {}, r"data.sources.a: has train_path and hub_name"),
    "name": ({"a b": {"train_path": "x"}}, {}, r"data.sources.a b: a source's name"),
    "streamed sizes": ({"a": {"train_path": "x"}}, {"streaming": True}, r"sizes of streamed rows are not known"),
    "list entry": (["x"], {}, r"data.sources: entry 0 must hold options"),
    "twice": ([{"name": "a"}, {"name": "a"}], {}, r"the name a stands twice"),
    "cold": ({"a": {"weight": 1}}, {"temperature": 0}, r"data.temperature=0: must be above 0"),
    "heat for nothing": ({}, {"temperature": 2}, r"data.temperature=2: needs data.sources"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_are_named(case):
    sources, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        sources_of(DataConfig(sources=sources, **options))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_wrong_with_a_source_names_it(paths, tokenizer, tmp_path, streaming):
    with pytest.raises(ValueError, match=r"data.sources.code: data.train_path=/nowhere: there is no such file"):
        mixed(paths, tokenizer, more={"code": {"train_path": "/nowhere"}}, streaming=streaming)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "one", "completion": "two " * 99}) + "\n")
    with pytest.raises(ValueError, match=r"data.sources.code: nothing to train on"):
        own = {"train_path": str(long), "on_too_long": "skip", "validation_fraction": 0}
        mixed(paths, tokenizer, more={"code": own}, streaming=streaming)
