"""What completion remembers (pipeline/completion.py), asked of Hydra: the groups with their choices, and the keys of one config."""

from typing import Any

import hydra
from hydra._internal.config_repository import IConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from pipeline.completion import Known, Line, Tree, choices, learned_groups, learned_tree
from pipeline.learned import others_stages
from pipeline.resources import resources

CONFIG = "config"


def learn(line: Line) -> Known:
    """Of what this line chooses; remembered for other lines. HydraException for a line that cannot be read."""
    groups_memory = learned_groups()
    with hydra.initialize_config_dir(str(resources() / "conf"), job_name="run", version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        groups = groups_memory.recall()
        if groups is None:
            groups = {}
            _add_groups(loader.repository, "", groups)
            groups_memory.keep(groups)
        words = choices(line, groups)
        memory = learned_tree(words, line.multirun)
        try:
            mode = RunMode.MULTIRUN if line.multirun else RunMode.RUN
            config = loader.load_configuration(CONFIG, list(words), run_mode=mode)
        except ConfigCompositionException:
            memory.keep({"root": None})
            return Known(groups, None)
    root = _tree(config)
    if not others_stages({"stages": OmegaConf.to_container(config.stages, resolve=False)}):
        memory.keep({"root": root})
    return Known(groups, root)


def _add_groups(repository: IConfigRepository, name: str, groups: dict[str, dict[str, list[str]]]) -> None:
    found = {
        kind: repository.get_group_options(name, wanted) for kind, wanted in (("configs", ObjectType.CONFIG), ("groups", ObjectType.GROUP))
    }
    groups[name] = found
    for inner in found["groups"]:
        _add_groups(repository, f"{name}/{inner}" if name else inner, groups)


def _tree(config: DictConfig) -> Tree:
    """Hydra's own settings depend on the moment, and are always asked for."""
    found = _encode(config)
    found["keys"]["hydra"] = {"ask": "."}
    return found


def _encode(node: Any) -> Tree:
    """Of a node, not resolved: what refers to another is to be asked for."""
    if isinstance(node, DictConfig | ListConfig):
        if node._is_none() or node._is_missing() or node._is_interpolation():
            return {"ask": "."}
        return _encode_items(node) if isinstance(node, ListConfig) else _encode_keys(node)
    if node._is_interpolation():
        return {"ask": "="}
    return {"value": "" if node._is_missing() else node._value()}


def _encode_keys(node: DictConfig) -> Tree:
    inside = {key: node._get_node(key) for key in node}
    return {"keys": {key: _encode(item) for key, item in inside.items()}} if all(isinstance(key, str) for key in inside) else {"ask": "."}


def _encode_items(node: ListConfig) -> Tree:
    inside: list[Any] = [node._get_node(place) for place in range(len(node))]
    plain = not any(item._is_interpolation() or item._is_missing() for item in inside)
    return {"items": [_encode(item) for item in inside]} if plain else {"ask": "."}
