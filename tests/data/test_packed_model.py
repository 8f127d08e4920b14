"""The model's numbers on our batches."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_and_padded_logits_equal_those_alone(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    samples = [Encoded(torch.randint(1, 50, (length,)).tolist(), [0] * length, True) for length in (5, 9, 1, 7)]
    rows = [[0, 1], [2, 3]]
    batch = collate([[samples[i] for i in row] for row in rows], 0, max_length=20, packing=True)
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for number, row in enumerate(rows):
            start = 0
            for index in row:
                ids = torch.tensor([samples[index].input_ids])
                stop = start + ids.shape[1]
                # fp32, sums in another order
                torch.testing.assert_close(packed[number, start:stop], model(ids).logits[0], atol=1e-5, rtol=1e-5)
                start = stop
