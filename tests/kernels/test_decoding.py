"""The operations between the products of a decoding step, beside transformers' modules and torch's attention."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lightning_peft.kernels import decoding
from lightning_peft.kernels.native.library import AVX512_BF16, library

pytestmark = pytest.mark.skipif(library(AVX512_BF16) is None, reason="no processor with AVX-512 and bf16, or no g++")

LAST_PLACE = 2**-8
"""Half a unit of bf16's last place, in parts of a number, and one more where a sum is rounded on the way."""


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("shape", [(1, 64), (5, 576), (3, 9, 128)])
def test_norm_is_the_modules(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).bfloat16()
    norm.weight.data.copy_(bf16(shape[-1]))
    x = bf16(*shape) * 3
    with torch.no_grad():
        assert decoding.takes(x)
        ours, theirs = decoding.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
    # The mean of squares is another sum: now and then a number is on the other side of an edge.
    assert (ours == theirs).float().mean() > 0.99
    torch.testing.assert_close(ours, theirs, rtol=2 * LAST_PLACE, atol=0)


def test_gate_is_torchs() -> None:
    torch.manual_seed(0)
    gate, up = bf16(4, 1536) * 8, bf16(4, 1536)
    gate[0, :4] = torch.tensor([200.0, -200.0, 0.0, -90.0])
    expected = F.silu(gate) * up
    with torch.no_grad():
        ours = decoding.gate_(gate, up)
    assert ours is gate
    assert (ours == expected).float().mean() > 0.99
    torch.testing.assert_close(ours, expected, rtol=2 * LAST_PLACE, atol=1e-30)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [32, 64, 96, 256])
def test_attention_is_that_of_fp64(size: int, group: int, threads: int) -> None:
    """Each row sees its own positions, whatever else lies in the cache, and its key and value are put there."""
    torch.manual_seed(size)
    rows, heads, width = 3, 2, 70
    lengths = torch.tensor([0, 37, 69])
    kept = torch.full((2, rows + 1, heads, width, size), torch.nan).bfloat16()[:, :rows]
    for row, length in enumerate(lengths.tolist()):
        kept[:, row, :, :length] = bf16(2, heads, length, size)
    queries, keys, values = bf16(rows, heads * group, size), bf16(rows, heads, size), bf16(rows, heads, size)
    angles = torch.rand(rows, size // 2) * 6
    cosine, sine = (torch.cat([f(angles)] * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
    turned, turned_key = (
        part[:, :, 0]
        for part in apply_rotary_pos_emb(queries[:, :, None], keys[:, :, None], cosine[:, None], sine[:, None])
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            assert decoding.takes_heads(queries, kept)
            signed = torch.cat([-sine[:, : size // 2], sine[:, size // 2 :]], -1)
            mixed = decoding.attend(queries, keys, values, (cosine, signed), lengths, kept, size**-0.5)
    finally:
        torch.set_num_threads(before)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(kept[0, row, :, length], turned_key[row])
        assert torch.equal(kept[1, row, :, length], values[row])
        seen_keys, seen_values = kept[:, row, :, : length + 1].double().repeat_interleave(group, 1)
        scores = (turned[row].double()[:, None] @ seen_keys.transpose(1, 2)) * size**-0.5
        expected = (scores.softmax(-1) @ seen_values)[:, 0]
        torch.testing.assert_close(mixed[row].double(), expected, rtol=LAST_PLACE, atol=LAST_PLACE)
    assert kept[:, 0, :, 1:].isnan().all()


def test_other_numbers_are_torchs() -> None:
    x = bf16(2, 64)
    assert not decoding.takes(x)  # gradients may be asked for
    with torch.no_grad():
        assert not decoding.takes(x.float())
        assert not decoding.takes(bf16(2, 60))
        assert not decoding.takes(bf16(64, 2).t())
        assert not decoding.takes_heads(bf16(1, 2, 48), x)
        assert not decoding.takes_heads(bf16(1, 2, 512), x)
        assert not decoding.takes_heads(bf16(1, 2, 64), x.float())
