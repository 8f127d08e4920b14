"""Every recipe composes, says where it comes from and what it claims, and trains two steps on the tiny model."""

from pathlib import Path

import pytest
import yaml

from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.config import TrainConfig
from lightning_peft.schemas import CONF_DIR

FOLDER = CONF_DIR / "recipe"
RECIPES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.yaml"))
METHODS = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
SMALL = [
    "model=tiny", "data=text_to_sql", "data.max_rows=16", "data.max_validation_rows=4", "data.micro_batch_size=1",
    "data.max_length=512", "trainer.accelerator=cpu", "trainer.precision=auto", "trainer.accumulate_grad_batches=1",
    "trainer.max_steps=2", "validation.samples=0",
]  # fmt: skip
OWN_COLUMNS = {"lora/gsm8k": ["data.prompt_column=null", "data.completion_column=null"]}
SMALL_RANK = {
    "adalora": ["adapter.rank=4", "adapter.target_rank=2"],
    "hybrid_lora": ["adapter.rank=4", "adapter.budget=0.3"],
}


def lines(recipe: str) -> list[str]:
    return (FOLDER / f"{recipe}.yaml").read_text().splitlines()


def test_every_method_has_a_recipe():
    assert sorted({recipe.split("/")[0] for recipe in RECIPES}) == METHODS


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_paper_hardware_and_command(recipe):
    header = [line for line in lines(recipe) if line.startswith("#")]
    for word in ("# Paper:", "Hardware:", f"# lightning-peft train recipe={recipe}"):
        assert any(word in line for line in header), f"the header of {recipe} lacks {word!r}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_claims_a_metric_its_value_and_where_it_stands(recipe):
    claim = yaml.safe_load("\n".join(lines(recipe)))["claim"]

    if not claim:
        assert any(line.startswith("# No claim: ") for line in lines(recipe))
        return
    assert {"metric", "value", "where"} <= claim.keys() <= {"metric", "value", "where", "base"}
    assert isinstance(claim["value"], float) and claim["where"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes(recipe):
    config = compose_config("train", [f"recipe={recipe}"])

    folder = recipe.split("/")[0]
    own = compose_config("train", [f"method={folder}"])
    assert isinstance(config, TrainConfig) and config.adapter.method == own.adapter.method
    assert getattr(config.adapter, "init", None) == getattr(own.adapter, "init", None)
    assert getattr(config.adapter, "rank_stabilized", None) == getattr(own.adapter, "rank_stabilized", None)
    assert config.optimizer.lora_plus_ratio == own.optimizer.lora_plus_ratio
    assert config.quantization.kind == own.quantization.kind or folder == "vera"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_two_steps_on_the_tiny_model(recipe: str, tmp_path: Path):
    full_size = compose_config("train", [f"recipe={recipe}"])
    rank = [] if full_size.adapter.rank is None else SMALL_RANK.get(full_size.adapter.method, ["adapter.rank=4"])

    words = [f"recipe={recipe}", *SMALL, *OWN_COLUMNS.get(recipe, []), *rank, f"run_dir={tmp_path}/run"]

    assert train(compose_config("train", words))["steps"] == 2
