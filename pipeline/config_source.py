"""What stages and recipes are to Hydra: nodes of its config store that are known by name, and made when Hydra reads them.

    stage/<name>     from the stage's own `Params` and `Execution`: its module is imported by the recipe that uses it, by no other
    recipe/<name>    from the recipe's file, which is then checked (`recipe.check_document`)

A launcher's worker processes, on other machines too, are handed a copy of the store: so a node holds what it is made from and nothing else.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from pipeline.errors import RecipeError
from pipeline.layout import Frozen
from pipeline.recipe import check_document
from pipeline.stage import find_stage, stage_names

PROVIDER = "llmpress"
Content = dict[str, Any]


class Deferred(ConfigNode):
    """A node of Hydra's store that is made when it is read."""

    def __init__(self, group: str, name: str, make: Callable[[], DictConfig], package: str | None = None) -> None:
        self.name, self.group, self.package, self.provider, self.make = f"{name}.yaml", group, package, PROVIDER, make

    @property
    def node(self) -> DictConfig:
        return self.make()

    @node.setter
    def node(self, copied: DictConfig) -> None:
        """Hydra puts a copy of it into a copy of this."""
        self.make = partial(_same, copied)


class Nodes(dict[str, Any]):
    """The store's nodes. Hydra copies them all whenever it composes or lists a group, and each again when it is read, which is enough."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Nodes":
        return self


def register(group: str, name: str, make: Callable[[], DictConfig], package: str | None = None) -> None:
    """`make` is called when the node is read, in this process or, found there by import, in a launcher's worker."""
    store = ConfigStore.instance()
    if not isinstance(store.repo, Nodes):
        store.repo = Nodes(store.repo)
    place = store.repo
    for part in group.split("/"):
        place = place.setdefault(part, {})
    place[f"{name}.yaml"] = Deferred(group, name, make, package)


def register_stages() -> None:
    """The group `stage`. Nothing is imported: a broken plugin is an error of the recipe that uses it."""
    for name in stage_names():
        register("stage", name, partial(_stage_node, name))


def register_recipe(name: str, file: Path) -> None:
    """A recipe that is read when it is chosen."""
    register("recipe", name, partial(_recipe_node, file), "_global_")


def register_content(name: str, content: Content) -> None:
    """A recipe that has been read, as it was then: its file may be on another machine."""
    ConfigStore.instance().store(group="recipe", name=name, node=content, package="_global_", provider=PROVIDER)


def read_recipe(file: Path) -> Content:
    """Checked. RecipeError: what is wrong with it."""
    try:
        with open(file, encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"recipe: {file} is not readable YAML ({reason})") from None
    if content is not None and not isinstance(content, dict):
        raise RecipeError(f"recipe: {file} is not a mapping; see `run recipe=quickstart --cfg job` for what a recipe holds")
    check_document(content or {}, file.name)
    return content or {}


@cache
def _stage_node(name: str) -> DictConfig:
    stage = find_stage(name)
    return OmegaConf.create({"stage": name, **_defaults(stage.Params), "inputs": {}, "execution": _defaults(stage.Execution)})


@cache
def _recipe_node(file: Path) -> DictConfig:
    return OmegaConf.create(read_recipe(file))


def _same(node: DictConfig) -> DictConfig:
    return node


def _defaults(model: type[Frozen]) -> Content:
    """Each field's default as a plain value, `???` where there is none."""
    fields = model.model_fields.items()
    made = model.model_construct()
    return {name: MISSING if field.is_required() else made.model_dump(mode="json", include={name})[name] for name, field in fields}


@cache
def _loader() -> Any:
    """OmegaConf's reading of YAML (1e-3 is a number, a key stands once) on libyaml, where PyYAML was built with it: ten times as fast."""
    plain = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return plain
    from yaml.cyaml import CParser  # type: ignore[attr-defined]  # there only then

    class Loader(CParser, plain):  # type: ignore[misc, valid-type]
        def __init__(self, stream: Any) -> None:
            CParser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    return Loader
