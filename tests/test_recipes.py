"""Every recipe composes, says where it comes from, and trains two steps on the tiny model."""

import pytest
import yaml

from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.config import CONF_DIR

FOLDER = CONF_DIR / "recipe"
RECIPES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.yaml"))
SMALL = [
    "model=tiny", "data.max_rows=16", "data.max_validation_rows=4", "data.micro_batch_size=1", "data.max_length=512",
    "trainer.accelerator=cpu", "trainer.precision=auto", "trainer.accumulate_grad_batches=1", "trainer.max_steps=2",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_paper_hardware_and_command(recipe):
    text = (CONF_DIR / "recipe" / f"{recipe}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("# Paper:", "Hardware:", f"lightning-peft train recipe={recipe}"):
        assert any(word in line for line in header), f"the header of {recipe} lacks {word!r}"
    assert yaml.safe_load(text)["claim"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_two_steps_on_the_tiny_model(recipe, tmp_path):
    generated = compose_config("train", [f"recipe={recipe}"]).data.source == "text_to_sql"
    data = [] if generated else ["data=text_to_sql", "data.prompt_column=null", "data.completion_column=null"]
    config = compose_config("train", [f"recipe={recipe}", *data, *SMALL, f"run_dir={tmp_path}/run"])
    assert train(config)["steps"] == 2
