"""The choice and the time of who is taken into the batch: the engine's turns, without a server around it."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_models import config_for
from safetensors.torch import load_file, save_file
from server_process import save

from lightning_peft.adapters.slots import Factors, Slots
from lightning_peft.checkpoint.lineage import check_lineage
from lightning_peft.inference.continuous_batching import Decoder
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.steps import PREFILL_TOKENS
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.serving.engine import Engine, GenerationRequest, Piece
from lightning_peft.serving.tiers import AdapterTiers

TINY = ModelConfig("tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    for number in range(4):
        save(place / str(number), config_for("lora", rank=2 + number), 0.3, seed=number)
    return [place / str(number) for number in range(4)]


def engine(slots: int, max_batch: int = 8, on_host: bool = True) -> Engine:
    model = load_model(TINY, torch.float32).eval().requires_grad_(False)
    room = Slots(model, slots, 8, torch.float32, on_host)
    tiers = AdapterTiers(room, 2, lambda folder: check_lineage(folder, source_fingerprint(TINY)))
    return Engine(Decoder(model, room), tiers, load_tokenizer(TINY), max_batch, 64)


def request(prompt: list[int], folder: Path | None, pieces: list[Piece], tokens: int = 6) -> GenerationRequest:
    return GenerationRequest(prompt, SamplingConfig(max_new_tokens=tokens), frozenset(), pieces.append, folder)


def answers(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    for one in requests:
        engine.submit(one)
    while engine.waiting or engine.running:
        engine.turn()
    return [one.tokens for one in requests]


def test_more_adapters_than_slots_and_host_places_run_at_once(folders: list[Path]) -> None:
    """Four adapters over one slot, two of them on the host, are each answered as by themselves, on a CPU."""
    alone = [answers(engine(1), [request([5, 6, 7], folder, [])])[0] for folder in folders]
    assert len({tuple(tokens) for tokens in alone}) == 4
    shared = engine(1)
    requests = [request([5, 6, 7], folder, []) for folder in folders]
    for one in requests:
        shared.submit(one)
    shared.turn()
    assert len(shared.running) == len(shared.tiers.slots.held) == 4 and len(shared.tiers.host) == 2
    assert answers(shared, []) == [] and [one.tokens for one in requests] == alone
    assert list(shared.tiers.slots.held) == [0] and not any(shared.tiers.users)


def test_more_adapters_than_slots_wait_where_they_are_copied(folders: list[Path]) -> None:
    """As on a GPU: three slots hold what a batch has, and the fourth adapter comes when one is free."""
    alone = [answers(engine(1), [request([5, 6, 7], folder, [])])[0] for folder in folders]
    shared = engine(3, on_host=False)
    requests = [request([5, 6, 7], folder, []) for folder in folders]
    for one in requests:
        shared.submit(one)
    shared.turn()
    assert len(shared.running) == 3 and len(shared.waiting) == 1
    assert answers(shared, []) == [] and [one.tokens for one in requests] == alone
    assert not any(shared.tiers.users) and len(shared.tiers.in_slot) == 3


def test_a_probability_is_computed_where_it_is_asked_for() -> None:
    asked: list[Piece] = []
    plain: list[Piece] = []
    shared = engine(1)
    requests = [request([5, 6, 7], None, pieces) for pieces in (asked, plain)]
    requests[0].wants_logprobs = True
    first, second = answers(shared, requests)
    assert first == second and len(asked) == len(plain) == 6
    assert all(piece.choice is not None and piece.choice.logprob < 0 for piece in asked)
    assert all(piece.choice is not None and math.isnan(piece.choice.logprob) for piece in plain)


def test_prompts_that_join_together_are_of_a_length(folders: list[Path]) -> None:
    """A long prompt beside short ones would have them padded to its length: it runs behind them."""
    shared, lengths = engine(2), (3, 4, 3, 300, 3)
    for length in lengths:
        shared.submit(request([5] * length, folders[length % 2], []))
    assert [len(row.prompt) for row in shared._joining()] == [3, 4, 3]
    assert [len(row.prompt) for row in shared._joining()] == [300, 3]  # less padding than prompt


def test_prompts_that_join_together_fit_one_prefill() -> None:
    shared = engine(1, max_batch=64)
    for _ in range(9):
        shared.submit(request([5] * (PREFILL_TOKENS // 4), None, []))
    assert [len(shared._joining()) for _ in range(3)] == [4, 4, 1]


def test_a_token_without_an_embedding_is_its_own_request_s_error() -> None:
    shared, pieces = engine(1), []
    foreign = shared.decoder.model.get_input_embeddings().num_embeddings
    bad, good = request([5, foreign], None, pieces), request([5, 6], None, [])
    assert [len(tokens) for tokens in answers(shared, [bad, good])] == [0, 6]
    assert isinstance(pieces[0].error, ValueError) and f"a token with the id {foreign}" in str(pieces[0].error)


def test_a_failure_leaves_no_adapter_behind(folders: list[Path]) -> None:
    shared, pieces = engine(1), [[], [], []]
    for folder, own in zip(folders, pieces, strict=False):
        shared.submit(request([5, 6], folder, own))
    shared.turn()
    shared._fail_all(RuntimeError("out of memory"))
    assert all(str(own[-1].error) == "out of memory" for own in pieces)
    assert not shared.tiers.slots.held and not shared.running
    assert len(answers(shared, [request([5, 6], folders[0], [])])[0]) == 6


def test_a_folder_is_forgotten_while_the_engine_releases_another(folders: list[Path]) -> None:
    """The slot of the other had the adapter's name again, without the adapter: its next request failed for all."""
    tiers = engine(0).tiers
    slots = [tiers.acquire(folder) for folder in folders[:2]]

    class Compared(type(Path())):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            if Path(str(other)) == folders[1]:
                tiers.release(slots[1])  # as the engine's thread may in the middle of it
            return bool(Path(self) == Path(str(other)))

        __hash__ = Path.__hash__

    tiers.forget(Compared(folders[0]))
    assert tiers.in_slot == [None, None] and [*tiers.slots.held] == [slots[0]]


def widen_q(A_and_B: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give a layer another width."""
    return {name: torch.cat([value, value], 1) if "q_proj.lora_A" in name else value for name, value in A_and_B.items()}


def flatten_B(A_and_B: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.flatten() if "lora_B" in name else value for name, value in A_and_B.items()}


def add_a_dimension(A_and_B: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[None] if "lora_B" in name else value for name, value in A_and_B.items()}


def make_numbers(A_and_B: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[0, 0] for name, value in A_and_B.items()}


def cut_B(A_and_B: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give B another rank than A."""
    return {name: value[:, :1].contiguous() if "lora_B" in name else value for name, value in A_and_B.items()}


@pytest.mark.parametrize("slots", [1, 2], ids=["beyond the slots", "in a slot"])
@pytest.mark.parametrize("change", [widen_q, flatten_B, add_a_dimension, make_numbers, cut_B])
def test_an_adapter_that_does_not_fit_ends_its_own_request_alone(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    slots: int,
    folders: list[Path],
    tmp_path: Path,
) -> None:
    """It is asked for while another has its slot, or beside it in a free one; its layers are those of the first."""
    misshapen = tmp_path / "misshapen"
    shutil.copytree(folders[0], misshapen)
    (misshapen / "lineage.json").unlink()
    weights = misshapen / "adapter_model.safetensors"
    save_file({name: value.clone() for name, value in change(load_file(weights)).items()}, weights)
    [expected] = answers(engine(1), [request([5, 6, 7], folders[1], [])])
    shared, pieces = engine(slots), []
    good, bad = request([5, 6, 7], folders[1], []), request([5, 6, 7], misshapen, pieces)
    for one in (good, bad, request([5, 6, 7], folders[2], [])):
        shared.submit(one)
    for _ in range(10):
        shared.turn()
    assert not shared.waiting and not shared.running
    assert good.tokens == expected and not bad.tokens
    [piece] = pieces
    assert isinstance(piece.error, ValueError) and any(
        says in str(piece.error)
        for says in ("do not fit the model's layer of shape", "which are no pair", "and no matrix")
    )


def test_a_failure_of_any_kind_while_joining_is_one_requests(folders: list[Path], monkeypatch) -> None:
    """Memory that is out, here a read that raises what nobody foresaw."""
    shared, pieces = engine(2), []
    read = shared.tiers.on_host

    def out_of_memory(folder: Path) -> Factors:
        if folder == folders[1]:
            raise RuntimeError("out of memory")
        return read(folder)

    monkeypatch.setattr(shared.tiers, "on_host", out_of_memory)
    requests = [request([5, 6], folders[0], []), request([5, 6], folders[1], pieces), request([5, 6], folders[2], [])]
    tokens = answers(shared, requests)
    assert [len(found) for found in tokens] == [6, 0, 6]
    assert [str(piece.error) for piece in pieces] == ["out of memory"]


def test_answers_that_end_at_once_hold_up_none_that_run() -> None:
    """Each asks for the next one as it ends: a running answer still gets its token a turn."""
    shared, short = engine(1, max_batch=4), []

    def take(piece: Piece) -> None:
        short.append(piece)
        if len(short) < 100:
            shared.submit(one_token())

    def one_token() -> GenerationRequest:
        return GenerationRequest([5] * 50, SamplingConfig(max_new_tokens=1), frozenset(), take)

    running = request([5, 6], None, [], 50)
    shared.submit(running)
    shared.turn()
    before = len(running.tokens)
    for _ in range(3):
        shared.submit(one_token())
    shared.turn()
    assert len(short) == 4 and len(running.tokens) == before + 1
