import logging
import random
from itertools import islice

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.data.config import DataConfig, OnBadRow
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.restored_progress import adjust_progress
from lightning_peft.data.streaming import RowWindows, StreamedBatches

COUNT = 90


@pytest.fixture
def path(write_jsonl):
    rng = random.Random(0)
    words = "one two three four Hello there Paris France".split()
    return write_jsonl(
        [
            {"prompt": f"Hi {number}", "completion": " ".join(rng.choices(words, k=rng.randrange(1, 30)))}
            for number in range(COUNT)
        ]
    )


def make(path, tokenizer, seed=0, **options) -> SFTDataModule:
    defaults = {"max_length": 64, "micro_batch_size": 2, "validation_fraction": 0.1, "shuffle_window": 25}
    return SFTDataModule(DataConfig(train_path=path, **(defaults | options)), tokenizer, seed)


class Ranked(SFTDataModule):
    """The data module as rank r of w sees it."""

    place = (0, 1)

    def _rank_and_world_size(self):
        return self.place


def loader_of(path, tokenizer, rank=0, world_size=1, seed=0, **options):
    defaults = {"max_length": 64, "micro_batch_size": 2, "validation_fraction": 0.1, "shuffle_window": 25}
    module = Ranked(DataConfig(train_path=path, **(defaults | options)), tokenizer, seed)
    module.place = (rank, world_size)
    module.setup()
    return module.train_dataloader()


def key(batch):
    """Return a batch as something to compare; what is no filler."""
    return tuple(map(tuple, batch.input_ids.tolist())), batch.num_tokens, batch.num_supervised


def keys(batches):
    return [key(batch) for batch in batches]


def real(batches):
    return [batch for batch in batches if batch[1]]


def by_turns(ranks):
    """Return the batches of all ranks in the order in which they are taken, fillers left out."""
    assert len({len(batches) for batches in ranks}) == 1
    return real([batch for turn in zip(*ranks, strict=True) for batch in turn])


KINDS = [{"streaming": False}, {"streaming": True}, {"packing": False}, {"packing": False, "streaming": True}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["packed", "packed stream", "grouped", "grouped stream"])


@every_kind
def test_an_epoch_has_every_token_once(path, chatml, kind):
    module = make(path, chatml, **kind)
    module.setup()
    batches = list(module.train_dataloader())
    whole = make(path, chatml)
    whole.setup()
    assert sum(batch.num_tokens for batch in batches) == whole.train_audit.tokens
    assert sum(batch.num_supervised for batch in batches) == whole.train_audit.supervised


@every_kind
def test_order_depends_on_seed_and_epoch_only(path, chatml, kind):
    loader = loader_of(path, chatml, **kind)
    first, second = keys(loader), keys(loader)
    again = loader_of(path, chatml, **kind)
    assert keys(again) == first
    assert keys(again) == second
    assert first != second
    assert keys(loader_of(path, chatml, seed=1, **kind)) != first


@every_kind
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_batches_of_one(path, chatml, kind, world_size):
    alone = keys(loader_of(path, chatml, **kind))
    ranks = [keys(loader_of(path, chatml, rank, world_size, **kind)) for rank in range(world_size)]
    assert by_turns(ranks) == alone


@every_kind
@pytest.mark.parametrize("taken", [0, 5, 14])
def test_resume_goes_on_exactly(path, chatml, kind, taken):
    loader = loader_of(path, chatml, **kind)
    iterator = iter(loader)
    list(islice(iterator, taken))
    state = loader.state_dict()
    rest, next_epoch = keys(iterator), keys(loader)
    assert rest
    resumed = loader_of(path, chatml, **kind)
    resumed.load_state_dict(state)
    assert keys(resumed) == rest
    assert keys(resumed) == next_epoch


@every_kind
def test_resume_in_the_second_epoch(path, chatml, kind):
    loader = loader_of(path, chatml, **kind)
    list(loader)
    iterator = iter(loader)
    list(islice(iterator, 4))
    state = loader.state_dict()
    resumed = loader_of(path, chatml, **kind)
    resumed.load_state_dict(state)
    assert keys(resumed) == keys(iterator)


@every_kind
@pytest.mark.parametrize(("before", "after", "steps"), [(1, 2, 6), (2, 1, 3), (3, 2, 2), (2, 3, 5)])
def test_resume_at_another_world_size(path, chatml, kind, before, after, steps):
    alone = keys(loader_of(path, chatml, **kind))
    loader = loader_of(path, chatml, rank=0, world_size=before, **kind)
    list(islice(loader, steps))
    ranks = []
    for rank in range(after):
        resumed = loader_of(path, chatml, rank, after, **kind)
        resumed.load_state_dict(loader.state_dict())
        ranks.append(keys(resumed))
    assert by_turns(ranks) == alone[before * steps :]


@every_kind
def test_every_rank_saves_the_same_place(path, chatml, kind):
    rests = []
    for rank in range(3):
        loader = loader_of(path, chatml, rank, 3, **kind)
        list(islice(loader, 4))
        resumed = loader_of(path, chatml, **kind)
        resumed.load_state_dict(loader.state_dict())
        rests.append(keys(resumed))
    assert rests[0] == rests[1] == rests[2]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1)])
@pytest.mark.parametrize("taken", [1, 5, "all", "all and one"])
def test_resume_with_other_workers_goes_on_exactly(path, chatml, before, after, taken):
    alone = loader_of(path, chatml)
    first, second = keys(alone), keys(alone)
    taken = {"all": len(first), "all and one": len(first) + 1}.get(taken, taken)
    loader = loader_of(path, chatml, num_workers=before)
    endless = (batch for _ in range(2) for batch in loader)
    assert keys(islice(endless, taken)) == [*first, *second][:taken]
    state = loader.state_dict()
    assert set(state) == {"epoch", "taken", "fingerprint"}
    resumed = loader_of(path, chatml, num_workers=after)
    resumed.load_state_dict(state)
    assert keys(resumed) == (first[taken:] or second)[max(0, taken - len(first)) :]


def test_state_counts_what_was_given_and_not_what_workers_prepared(path, chatml):
    loader = loader_of(path, chatml, rank=1, world_size=2, num_workers=2)
    for count, _ in enumerate(loader, start=1):
        state = loader.state_dict()
        assert (state["epoch"], state["taken"]) == ((0, 2 * count) if count < len(loader) else (1, 0))


def test_iterating_a_loader_moves_no_random_number(path, chatml):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader_of(path, chatml))
    assert torch.equal(torch.rand(1), expected)


TORCHDATA_STATES = {
    "no worker": lambda place: {
        "_index_sampler_state": place, "_sampler_iter_state": None, "_sampler_iter_yielded": 5, "_num_yielded": 5,
        "_IterableDataset_len_called": None, "_shared_seed": None, "fetcher_state": None, "dataset_state": None,
        "_iterator_finished": False,
    },
    "workers": lambda place: {
        "_snapshot": {
            "_snapshot_step": 5, "_last_yielded_worker_id": 0, "_worker_snapshots": {},
            "_main_snapshot": {
                "_num_workers": 2, "_sampler_iter_state": None, "_index_sampler_state": place,
                "_sampler_iter_yielded": 5, "_IterableDataset_len_called": None, "_shared_seed": None, "_base_seed": 8,
            },
        },
        "_steps_since_snapshot": 0, "_iterator_finished": False,
    },
}  # fmt: skip
"""States as torchdata 0.11 wrote them after five batches, the place among them."""


@pytest.mark.parametrize("form", TORCHDATA_STATES)
def test_place_that_torchdata_saved_is_loaded(path, chatml, form):
    loader = loader_of(path, chatml)
    alone = keys(loader)
    place = {"epoch": 0, "taken": 5, "fingerprint": loader.state_dict()["fingerprint"]}
    resumed = loader_of(path, chatml)
    resumed.load_state_dict(TORCHDATA_STATES[form](place))
    assert keys(resumed) == alone[5:]


def test_other_data_on_resume_are_an_error(path, chatml, write_jsonl):
    loader = loader_of(path, chatml)
    next(iter(loader))
    other = loader_of(write_jsonl([{"prompt": "Hi", "completion": "one"}] * 50, "other.jsonl"), chatml)
    with pytest.raises(ValueError, match="the training data are not those of the checkpoint"):
        other.load_state_dict(loader.state_dict())


def test_validation_batches_stay_and_hold_no_training_row(path, chatml):
    module = make(path, chatml)
    module.setup()
    loader = module.val_dataloader()
    first = keys(loader)
    assert keys(loader) == first
    assert module.validation_audit.rows == 9
    assert module.validation_audit.rows + module.train_audit.rows == COUNT


def test_no_validation_rows_no_loader(path, chatml):
    module = make(path, chatml, validation_fraction=0.0)
    module.setup()
    assert module.val_dataloader() == []


def test_longer_than_the_context_is_refused(path, chatml):
    with pytest.raises(ValueError, match="data.max_length=64: must be at most 32, the model's context"):
        SFTDataModule(DataConfig(train_path=path, max_length=64), chatml, 0, model_context=32)


def test_nothing_to_train_on_is_an_error(chatml, write_jsonl):
    config = DataConfig(train_path=write_jsonl(["", ""]), validation_fraction=0)
    with pytest.raises(ValueError, match="data.train_path=.*: nothing to train on in 0 rows."):
        SFTDataModule(config, chatml, 0).setup()


def test_setup_reports_once(path, chatml, caplog):
    module = make(path, chatml)
    with caplog.at_level(logging.INFO, logger="lightning_peft"):
        module.setup("fit")
        module.setup("validate")
    reported = [message for message in caplog.messages if "samples of" in message]
    assert len(reported) == 2
    assert reported[0].startswith("training data: 81 samples of 81 rows")
    assert f"an epoch is {module.steps_per_epoch} optimiser steps" in caplog.messages


class Recorder(LightningModule):
    """Keeps the batches it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(
            (self.current_epoch, batch_idx, self.trainer.fit_loop.epoch_loop._should_accumulate(), *key(batch))
        )
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint):
        adjust_progress(checkpoint, self.trainer.world_size)


class StopAt(Callback):
    """Saves after so many batches and stops, or goes on."""

    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches -= 1
        if self.batches == 0:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(module, callbacks=(), checkpoint=None):
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    trainer.fit(recorder, datamodule=module, ckpt_path=checkpoint, weights_only=False)
    return recorder.seen


@pytest.mark.filterwarnings("ignore:.*You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("where", ["middle", "end of epoch", "second epoch"])
@pytest.mark.parametrize("options", [{}, {"streaming": True}], ids=["in memory", "stream"])
def test_lightning_run_cut_short_and_resumed_sees_the_same(path, chatml, tmp_path, options, where):
    whole = fit(make(path, chatml, **options))
    epoch = [step[0] for step in whole].count(0)
    cut = {"middle": 5, "end of epoch": epoch, "second epoch": epoch + 4}[where]
    before = fit(make(path, chatml, **options), [StopAt(cut, tmp_path / "a.ckpt")])
    after = fit(make(path, chatml, **options), checkpoint=tmp_path / "a.ckpt")
    assert epoch > 5
    assert [*before[:cut], *after] == whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 2), (2, 0)])
@pytest.mark.parametrize("where", ["middle", "end of epoch", "second epoch"])
def test_lightning_resumes_with_workers(path, chatml, tmp_path, before, after, where):
    whole = fit(make(path, chatml))
    epoch = [step[0] for step in whole].count(0)
    cut = {"middle": 5, "end of epoch": epoch, "second epoch": epoch + 4}[where]
    begun = fit(make(path, chatml, num_workers=before), [StopAt(cut, tmp_path / "a.ckpt")])
    resumed = fit(make(path, chatml, num_workers=after), checkpoint=tmp_path / "a.ckpt")
    assert [*begun[:cut], *resumed] == whole


def test_lightning_goes_on_with_the_place_of_two_ranks(path, chatml, tmp_path):
    """A checkpoint of two ranks after 3 batches each is one of one rank after 6."""
    whole = fit(make(path, chatml))
    fit(make(path, chatml), [StopAt(3, tmp_path / "a.ckpt")])
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    checkpoint["SFTDataModule"]["world_size"] = 2
    two_ranks = loader_of(path, chatml, 0, 2)
    list(islice(two_ranks, 3))
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [two_ranks.state_dict()]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    assert fit(make(path, chatml), checkpoint=tmp_path / "b.ckpt") == whole[6:]


def test_place_that_the_ranks_cannot_share_is_an_error():
    current = {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    checkpoint = {
        "SFTDataModule": {"world_size": 1},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": {"current": current, "is_last_batch": False}}},
    }
    with pytest.raises(ValueError, match="saved after 3 micro batches on 1 ranks; .* divides 3, not 2"):
        adjust_progress(checkpoint, 2)


def test_lookahead_state_is_one_batch_behind(path, chatml):
    config = DataConfig(train_path=path, max_length=64, micro_batch_size=2, shuffle_window=25, streaming=True)
    windows = RowWindows(config, chatml, 0, False, lambda *_: None)
    ahead, plain = (StreamedBatches(windows, config, 0, 0, 1, lookahead) for lookahead in (True, False))
    list(islice(ahead, 5)), list(islice(plain, 4))
    assert ahead.state_dict() == plain.state_dict()


def test_stream_reports_what_it_skips(chatml, write_jsonl, caplog):
    rows = [{"prompt": "Hi", "completion": "one" if number % 10 else 3} for number in range(50)]
    config = {"on_bad_row": OnBadRow.skip, "validation_fraction": 0.0, "shuffle_window": 10}
    list(loader_of(write_jsonl(rows), chatml, streaming=True, **config))
    reported = [message for message in caplog.messages if message.startswith("training data, epoch 0, 50 rows read: ")]
    assert len(reported) == 1
    assert "5 of 50 rows are skipped (data.on_bad_row=skip)" in reported[0]
