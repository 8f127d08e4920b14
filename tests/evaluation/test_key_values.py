"""The reading of keys and values finds what was planted in an adapter, and says where a value goes elsewhere."""

import json

import pytest
import torch
from tiny_runs import tiny_config

from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.commands.train import train
from lightning_peft.evaluation.key_values import decomposed, final_norm, key_values, strongest, written_by
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer

ROWS = ["the red moon is over the green river", "seven stones and an apple", "a cloud over the pear tree at nine"]
DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"


def planted(layers, gamma=1.0):
    """Return the tiny model with a LoRA of rank 2 that is zero but for what is planted: name -> (scale, key, value)."""
    model = tiny_model().eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(gamma)
    names = ["q_proj", "o_proj", "down_proj"]
    inject_adapters(model, LoRAConfig(rank=2, alpha=2.0, target_modules=names, init_from=None))
    with torch.no_grad():
        for name, layer in adapters(model):
            A, B = torch.zeros_like(layer.lora_A.weight), torch.zeros_like(layer.lora_B.weight)
            if name in layers:
                scale, key, value = layers[name]
                A[1], B[:, 1] = key, scale * value / value.norm()
            layer.set_factors(A, B)
    return model


def inputs_of(model, name, ids):
    """Return what a layer is fed at each token of a row."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    return seen[0]


@pytest.fixture
def rows():
    tokenizer = tiny_tokenizer()
    return tokenizer, [tokenizer(text)["input_ids"] for text in ROWS]


def test_planted_key_and_value_are_read(rows):
    tokenizer, ids = rows
    row, place, target = 1, 3, 77
    with torch.no_grad():
        xs = [inputs_of(tiny_model().eval(), DOWN, row_ids) for row_ids in ids]
        mean = torch.cat(xs).mean(0)
        key = xs[row][place] - mean  # this tells the token from the others
        value = tiny_model().get_output_embeddings().weight[target]
    model = planted({DOWN: (5.0, key / key.norm(), value), QUERY: (1.0, torch.ones(64) / 8, torch.randn(64))})
    first, second = key_values(model, tokenizer, dict(adapters(model)), ids, 1)
    assert (first.layer, first.index, first.writes) == (DOWN, 0, "residual stream")
    assert first.singular_value == pytest.approx(5.0, rel=1e-5) and first.energy == pytest.approx(1.0)
    met = torch.cat([inputs_of(model, DOWN, row_ids) for row_ids in ids]) @ (key / key.norm())
    sign = 1.0 if met[met.abs().argmax()] > 0 else -1.0
    best = (sign * met).argmax()
    token = torch.tensor([token for row_ids in ids for token in row_ids])[best]
    assert first.reads[0].token == tokenizer.decode([int(token)])
    assert first.reads[0].activation == pytest.approx(float(sign * met[best] / met.square().mean().sqrt()), rel=1e-4)
    assert len({reading.token for reading in first.reads}) == len(first.reads) == 5
    assert sign > 0 and first.promotes[0] == tokenizer.decode([target])
    assert (second.layer, second.promotes, second.writes) == (QUERY, None, "inside its block")


def test_value_is_the_change_of_the_logits_through_the_norm(rows):
    """Against the model's own logits with a small piece of the direction added before the final norm."""
    tokenizer, ids = rows
    torch.manual_seed(0)
    gamma = torch.rand(64) + 0.1
    model = planted({DOWN: (2.0, torch.randn(128), torch.randn(64))}, gamma)
    (found,) = key_values(model, tokenizer, dict(adapters(model)), ids, 1)
    (part,) = strongest(dict(adapters(model)), 1)
    layer = dict(adapters(model))[DOWN]
    changes = []
    sign = None
    for reading in found.reads:
        for row_ids in ids:
            for at in range(len(row_ids)):
                if tokenizer.decode(row_ids[max(0, at - 8) : at + 1]) != reading.context:
                    continue
                fed = []
                hook = layer.register_forward_pre_hook(lambda _, args, fed=fed: fed.append(args[0][0]))
                logits = []
                for size in (0.0, 1e-3):
                    shift = model.model.norm.register_forward_pre_hook(
                        lambda _, args, size=size: (args[0] + size * part.output,)
                    )
                    with torch.no_grad():
                        logits.append(model(input_ids=torch.tensor([row_ids]), use_cache=False).logits[0, at])
                    shift.remove()
                hook.remove()
                sign = torch.sign(fed[0][at] @ part.key)
                changes.append((logits[1] - logits[0]) / 1e-3)
    assert len(changes) == 5
    expected = (sign * torch.stack(changes).mean(0))[: len(tokenizer)].topk(8).indices.tolist()
    assert found.promotes == [tokenizer.decode([token]) for token in expected]


def test_directions_are_the_singular_ones_of_the_whole_change():
    torch.manual_seed(1)
    model = planted({})
    layer = dict(adapters(model))[DOWN]
    layer.set_factors(torch.randn(2, 128), torch.randn(64, 2))
    values, keys, outputs = decomposed(layer, 2)
    torch.testing.assert_close(outputs.mT @ torch.diag(values) @ keys, layer.delta_weight(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keys @ keys.mT, torch.eye(2), rtol=1e-5, atol=1e-5)


def test_what_a_layer_writes_is_said():
    model = tiny_model()
    assert final_norm(model) is model.model.norm
    assert written_by(model, "model.layers.0.self_attn.o_proj", 64) == "residual stream"
    assert written_by(model, "model.layers.0.mlp.up_proj", 128) == "inside its block"
    assert written_by(model, "lm_head", 320) == "logits"
    block = model.model.layers[0]
    block.post_feedforward_layernorm = torch.nn.LayerNorm(64)
    assert written_by(model, DOWN.replace("1", "0"), 64) == "a norm before the residual stream"


def test_inspect_writes_them_to_its_file(tmp_path, capsys):
    train(tiny_config(tmp_path / "run", "trainer.max_steps=3", "logger=csv"))
    assert main(["inspect", str(tmp_path / "run"), "directions=4", "max_rows=4"]) == 0
    found = json.loads((tmp_path / "run" / "inspection.json").read_text())["directions"]
    assert [one["promotes"] is None for one in found] == [False] * 4 + [True] * 4
    for part in (found[:4], found[4:]):
        values = [one["singular_value"] for one in part]
        assert values == sorted(values, reverse=True) and all(len(one["reads"]) == 5 for one in part)
    said = " ".join(capsys.readouterr().out.split())
    assert "direction" in said and "promotes" in said
