"""The recipes that come with llmpress, composed as the command line does."""

from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from pipeline import compose
from pipeline.plan import Plan, make_plan
from pipeline.recipe import Recipe, read_config
from pipeline.store import Store


def shipped_recipe(name: str, *overrides: str) -> Recipe:
    compose.register()
    with initialize_config_dir(str(compose.resources() / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(hydra_compose("config", [f"recipe={name}", *overrides]), resolve=True)
    assert isinstance(config, dict)
    return read_config({str(key): value for key, value in config.items()}, name)[0]


def plan_of_shipped(outputs: Path, name: str, *overrides: str) -> Plan:
    return make_plan(shipped_recipe(name, *overrides), Store(outputs), compose.resources(), execute=False)
