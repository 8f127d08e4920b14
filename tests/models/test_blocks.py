"""The layers of a decoder, each of which is sharded and recomputed by itself."""

import pytest
from families import small_model

from lightning_peft.models.blocks import block_names, check_blocks_can_be_sharded


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["falcon_mamba", "mamba", "llama", "gpt2"])
def test_no_block_lies_inside_another(family: str) -> None:
    names = block_names(small_model(family))
    assert len(names) == 2
    assert not any(name.startswith(f"{other}.") for name in names for other in names)


@pytest.mark.filterwarnings("ignore")
def test_blocks_that_share_weights_are_not_sharded() -> None:
    with pytest.raises(ValueError, match=r"strategy=fsdp: .* and .* of Zamba2ForCausalLM share weights"):
        check_blocks_can_be_sharded(small_model("zamba2"))
    check_blocks_can_be_sharded(small_model("llama"))
