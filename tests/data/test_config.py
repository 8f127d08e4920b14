import pytest
from omegaconf import OmegaConf

from lightning_peft.data.config import DataConfig, Format, OnTooLong

REFUSED = {
    "max_length": (0, "data.max_length=0: must be at least 1"),
    "micro_batch_size": (-3, "data.micro_batch_size=-3: must be at least 1"),
    "shuffle_window": (0, "data.shuffle_window=0: must be at least 1"),
    "max_rows": (0, "data.max_rows=0: must be at least 1"),
    "max_validation_rows": (0, "data.max_validation_rows=0: must be at least 1"),
    "num_workers": (-1, "data.num_workers=-1: must be 0 or more"),
    "validation_fraction": (1.0, "data.validation_fraction=1.0: must be at least 0 and below 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_value_out_of_range_is_named(name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        DataConfig(**{name: value})


def test_one_token_samples_are_refused():
    with pytest.raises(ValueError, match="data.max_length=1: must be at least 2"):
        DataConfig(max_length=1)


def test_workers_with_streaming_are_refused():
    with pytest.raises(ValueError, match="data.num_workers=2: must be 0 with data.streaming=true"):
        DataConfig(streaming=True, num_workers=2)


def test_names_from_the_command_line_become_enums():
    typed = OmegaConf.merge(OmegaConf.structured(DataConfig), {"format": "text", "on_too_long": "split"})
    config = OmegaConf.to_object(typed)
    assert (config.format, config.on_too_long) == (Format.text, OnTooLong.split)
