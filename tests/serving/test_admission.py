"""Who is taken into the batch, and when: the engine's turns, without a server around it."""

from pathlib import Path

import pytest
import torch
from adapter_models import config_for
from server_process import save

from lightning_peft.adapters.slots import Slots
from lightning_peft.inference.decoding import Decoder
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.steps import PREFILL_TOKENS
from lightning_peft.models.loading import load_model, load_tokenizer, source_fingerprint
from lightning_peft.models.source import ModelConfig
from lightning_peft.serving.engine import Engine, Job, Piece
from lightning_peft.serving.tiers import AdapterTiers

TINY = ModelConfig("tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    for number in range(4):
        save(place / str(number), config_for("lora", rank=2 + number), 0.3, seed=number)
    return [place / str(number) for number in range(4)]


def engine(slots: int, max_batch: int = 8) -> Engine:
    model = load_model(TINY, torch.float32).eval().requires_grad_(False)
    room = Slots(model, slots, 8, torch.float32)
    tiers = AdapterTiers(room, 2, source_fingerprint(TINY), "tiny")
    return Engine(Decoder(model, room), tiers, load_tokenizer(TINY), max_batch, 64)


def job(prompt: list[int], folder: Path | None, pieces: list[Piece], tokens: int = 6) -> Job:
    return Job(prompt, SamplingConfig(max_new_tokens=tokens), frozenset(), pieces.append, folder)


def answers(engine: Engine, jobs: list[Job]) -> list[list[int]]:
    for one in jobs:
        engine.submit(one)
    while engine.waiting or engine.running:
        engine.turn()
    return [one.tokens for one in jobs]


def test_more_adapters_than_slots_and_host_places_run_at_once(folders: list[Path]) -> None:
    """On a CPU: four adapters over one slot, two on the host; each is answered as by itself."""
    alone = [answers(engine(1), [job([5, 6, 7], folder, [])])[0] for folder in folders]
    assert len({tuple(tokens) for tokens in alone}) == 4
    shared = engine(1)
    jobs = [job([5, 6, 7], folder, []) for folder in folders]
    for one in jobs:
        shared.submit(one)
    shared.turn()
    assert len(shared.running) == 4 and len(shared.tiers.slots.guests) == 3 and len(shared.tiers.host) == 2
    assert answers(shared, []) == [] and [one.tokens for one in jobs] == alone
    assert not shared.tiers.slots.guests and shared.tiers.users == [0]


def test_prompts_that_join_together_are_of_a_length(folders: list[Path]) -> None:
    """A long prompt beside short ones would have them padded to its length: it runs behind them."""
    shared, lengths = engine(2), (3, 4, 3, 300, 3)
    for length in lengths:
        shared.submit(job([5] * length, folders[length % 2], []))
    assert [len(row.prompt) for row in shared._joining()] == [3, 4, 3]
    assert [len(row.prompt) for row in shared._joining()] == [300, 3]  # less padding than prompt


def test_prompts_that_join_together_fit_one_prefill() -> None:
    shared = engine(1, max_batch=64)
    for _ in range(9):
        shared.submit(job([5] * (PREFILL_TOKENS // 4), None, []))
    assert [len(shared._joining()) for _ in range(3)] == [4, 4, 1]


def test_a_failure_leaves_no_guest_behind(folders: list[Path]) -> None:
    shared, pieces = engine(1), [[], [], []]
    for folder, own in zip(folders, pieces, strict=False):
        shared.submit(job([5, 6], folder, own))
    shared.turn()
    shared._fail_all(RuntimeError("out of memory"))
    assert all(str(own[-1].error) == "out of memory" for own in pieces)
    assert not shared.tiers.slots.guests and not shared.running
    assert len(answers(shared, [job([5, 6], folders[0], [])])[0]) == 6
