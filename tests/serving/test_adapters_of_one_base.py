"""Adapters that share a server's base: what would be answered otherwise than by `generate` is said or refused."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from adapter_models import config_for
from families import small_model
from server_process import save

from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.slots import Slots
from lightning_peft.checkpoint.lineage import FILE_NAME, LineageError
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.commands.adapted import layout_of
from lightning_peft.commands.serve import check_is_of_base, check_later, checked, try_adapters
from lightning_peft.commands.serve_vllm import Served
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.continuous_batching import Decoder
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.rope import RopeScaling
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.models.tiny import CHAT_TEMPLATE
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.serving.engine import Engine, GenerationRequest, Piece
from lightning_peft.serving.tiers import AdapterTiers

TINY = ModelConfig("tiny")
SCALED = {"type": "linear", "factor": 2.0, "original_max_position_embeddings": None}

SERVABLE = {"mamba": ["in_proj"], "opt": ["q_proj", "v_proj"]}
OF_SCALED = ModelConfig("hf", "base", rope_scaling=RopeScaling(**SCALED))
OF_TOKENS = ModelConfig("hf", "base", new_tokens=["<a>"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save(folder := tmp_path_factory.mktemp("adapter"), config_for("lora", rank=2), 0.3)
    return folder


def trained(folder: Path, **changes: object) -> dict[str, Path]:
    """Return the adapter as if it had been trained otherwise."""
    path = folder / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return {"a": folder}


def served(base: ModelConfig = TINY, kind: Kind = Kind.none) -> Served:
    return Served("tiny", base, QuantizationConfig(kind=kind), source_fingerprint(TINY), None, None, ())


@pytest.mark.parametrize(
    ("model", "base", "says"),
    [
        ({"rope_scaling": SCALED}, TINY, "was trained with the scaling .*type=linear .*, the base has none"),
        ({"name": "tiny"}, OF_SCALED, "was trained with the scaling none, the base has model"),
        ({"new_tokens": ["<a>", "<b>"]}, OF_TOKENS, "knows tokens .* has not, <b>"),
    ],
    ids=["scaled", "not_scaled", "tokens"],
)
def test_an_adapter_of_other_positions_or_tokens_is_refused(adapter, model, base, says) -> None:
    with pytest.raises(ValueError, match=f"adapters: a=.*: {says}.*; give it a server of its own"):
        checked(trained(adapter, config={"model": model}), served(base))


def test_one_that_was_trained_as_the_base_is_served_passes(adapter, caplog) -> None:
    config = {"model": {"rope_scaling": {"type": None}, "new_tokens": []}}
    with caplog.at_level("INFO"):
        assert checked(trained(adapter, config=config, quantization="nf4"), served(kind=Kind.nf4)) == (
            [2],
            None,
            [("a", adapter)],
        )
    assert "outputs differ" not in caplog.text
    with caplog.at_level("INFO"):
        checked(trained(adapter, config={}, quantization="none"), served(kind=Kind.nf4))
    assert "quantization.kind=none, this one has nf4: outputs differ" in caplog.text
    with pytest.raises(LineageError):
        checked(trained(adapter), replace(served(), fingerprint="0" * 64))


def test_an_adapter_that_was_trained_in_another_dtype_is_named_once_whenever_it_comes(adapter, caplog) -> None:
    trained(adapter, precision="bf16-true")
    check_later(adapter, served(), torch.bfloat16)
    assert not caplog.records
    for _ in range(2):  # it is read again when others have taken its place on the host
        check_later(adapter, served(), torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        f"{adapter}: was trained in bf16-true and is served in float32, so its answers are not those of `generate`"
    ]


def test_an_adapter_that_comes_later_is_checked_as_those_at_the_start(adapter, caplog) -> None:
    slots = Slots(load_model(TINY, torch.float32), 1, 2, torch.float32)

    def tiers(base: ModelConfig = TINY) -> AdapterTiers:
        return AdapterTiers(slots, 1, partial(check_is_of_base, served=served(base, Kind.nf4)))

    trained(adapter, config={"model": {"rope_scaling": {"type": None}}}, quantization="nf4")
    with caplog.at_level("INFO"):
        assert tiers().on_host(adapter) and "outputs differ" not in caplog.text
    with pytest.raises(ValueError, match=f"{adapter}: was trained with the scaling none, the base has model"):
        tiers(OF_SCALED).on_host(adapter)


def saved(family: str, folder: Path) -> None:
    """Save an adapter of layers that the model calls, `good`, and one of all its layers, `bad`."""
    for name, targets in (("good", SERVABLE[family]), ("bad", "all_linear")):
        model, config = small_model(family), config_for("lora", rank=2, target_modules=targets)
        inject_adapters(model, config)
        save_adapter(model, config, folder / name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(("family", "says"), [("mamba", "no attribute 'weight'"), ("opt", "needs as many routes")])
def test_a_model_that_computes_with_its_layers_by_itself_is_said_to_a_later_request(
    family, says, on_host, tmp_path
) -> None:
    """It had status 500, and so had what ran beside it and, of Mamba, whatever was asked from then on."""
    saved(family, tmp_path)
    model = small_model(family).requires_grad_(False)
    slots = Slots(model, 1, 2, torch.float32, on_host)
    decoder = Decoder(model, slots)
    tiers = AdapterTiers(slots, 2, partial(check_is_of_base, served=served()), try_slot=decoder.try_slot)
    engine = Engine(decoder, tiers, load_tokenizer(TINY), 4, 8)

    def answers(*names: str | None) -> list[tuple[list[int], Exception | None]]:
        pieces: list[list[Piece]] = [[] for _ in names]
        requests = [
            GenerationRequest([5, 6, 7], SamplingConfig(4), frozenset(), own.append, name and tmp_path / name)
            for name, own in zip(names, pieces, strict=True)
        ]
        for request in requests:
            engine.submit(request)
        while engine.waiting or engine.running:
            engine.turn()
        return [(request.tokens, own[-1].error) for request, own in zip(requests, pieces, strict=True)]

    expected = answers(None, "good")
    for names in ((None, "bad", "good"), ("bad", None, "good")):
        found = dict(zip(names, answers(*names), strict=True))
        tokens, error = found["bad"]
        assert tokens == [] and isinstance(error, ValueError)
        assert says in str(error) and str(error).startswith(f"{tmp_path / 'bad'}: ")
        assert [found[None], found["good"]] == expected
    assert all(error is None and len(tokens) == 4 for tokens, error in expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "says"), [("mamba", "no attribute 'weight'"), ("opt", "needs as many routes")])
def test_a_model_that_computes_with_its_layers_by_itself_is_said_at_the_start(family, says, tmp_path) -> None:
    """Every request to the adapter had status 500; with layers that the model calls it is served."""
    saved(family, tmp_path)
    model = small_model(family).requires_grad_(False)
    slots = Slots(model, 1, 2, torch.float32)
    decoder = Decoder(model, slots)
    try_adapters(decoder, slots, [("good", tmp_path / "good")])
    with pytest.raises(ValueError, match=f"adapters: bad=.* cannot be asked .*{says}.*lightning-peft merge"):
        try_adapters(decoder, slots, [("good", tmp_path / "good"), ("bad", tmp_path / "bad")])


def test_a_whole_model_is_no_adapter_and_brings_its_prompt_along(tmp_path, capsys) -> None:
    """That of a run of all weights, and one that `merge` has made: a server of it had no system prompt."""
    model, tokenizer = load_model(TINY, torch.float32), load_tokenizer(TINY)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "run" / "model")
    layout = PromptLayout(system_prompt="Answer in SQL.", template=CHAT_TEMPLATE, stop_token_ids=[2])
    layout.save(tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        assert main(["serve", f"adapters=[a={path}]", "serve.dry_run=true"]) == 2
        said = (
            f"adapters: a={path}: holds a whole model, which is no adapter; commands with model= take it as model=hf "
        )
        assert f"{said}model.path={tmp_path / 'run' / 'model'}" in capsys.readouterr().err
    whole = ModelConfig("hf", str(tmp_path / "run" / "model"))
    assert layout_of(None, tokenizer, whole) == layout
    assert layout_of(None, tokenizer, TINY).system_prompt is None
    prompts = []
    for words in ([], ["system_prompt=Answer in SQL."]):
        base = ["model=hf", f"model.path={whole.path}"] if not words else ["model=tiny"]
        assert main(["generate", *base, *words, "prompt=List all.", "sampling.max_new_tokens=12"]) == 0
        prompts.append(capsys.readouterr().out)
    assert prompts[0] == prompts[1]


def test_slots_below_the_rank_of_a_named_adapter_are_refused(tmp_path, capsys) -> None:
    """Each request to it had status 400."""
    save(tmp_path, config_for("lora", rank=8), 0.1)
    words = ["serve", f"adapters=[a={tmp_path}]", "model=tiny", "serve.dry_run=true"]
    assert main([*words, "serve.max_rank=4"]) == 2
    assert "serve.max_rank=4: the adapters named are of rank 8; give that" in capsys.readouterr().err
    assert main([*words, "serve.max_rank=8"]) == 0
