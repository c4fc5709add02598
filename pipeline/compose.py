"""Hydra's side: which recipes and stages there are, recipes given as files, and its errors as one sentence.

Stages are the group `stage`, so that `stage@stages.quantize=gptq` swaps one and `--help` and completion list them. Recipes are the group
`recipe`, at the root of the config. What Hydra is given of both is made in pipeline/config_source.py.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from pipeline import config_source
from pipeline.errors import RecipeError, did_you_mean
from pipeline.learned import Composed
from pipeline.resources import recipe_files, resources

ON_OTHER_MACHINES = ("SlurmLauncher", "RayLauncher", "RayAWSLauncher")  # whose jobs share the outputs folder between machines
FLAGS = ("-m", "--multirun")
SHOWING = ("-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion", "--version")
RENAMED = {"dtype": "compute_dtype"}  # settings of stages that had another name
YAML_FILE = re.compile(r"\.ya?ml$")
ADDED = {  # mappings that take entries of any name, and what to write for a new one
    r"models\.(\w+)": r"+models.\1.path=/folder",
    r"data\.splits\.(\w+)": r"+data.splits.\1=/file.jsonl",
    r"model\.architecture\.(\w+)": r"+model.architecture.\1=...",
    r"stages\.(\w+)\.inputs\.(\w+)": r"+stages.\1.inputs.\2=...",
}
EXTRAS = {  # what brings a launcher that Hydra does not have by itself
    "joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray", "ray_aws": "ray",
}  # fmt: skip
ORDERS = "hydra/sweeper=orders"
FILE_DIGEST = re.compile(r"-[0-9a-f]{8}$")
_files: dict[str, str] = {}  # recipes given as files: what was written, by the name that they are registered under
_contents: dict[str, dict[str, Any]] = {}  # and what they say


def register() -> None:
    """Make every stage, every shipped recipe and the sweeper over orders known to Hydra."""
    config_source.register_stages()
    for file in recipe_files():
        config_source.register_recipe(file.stem, file)
    config_source.register("hydra/sweeper", "orders", _orders_sweeper)


def _orders_sweeper() -> DictConfig:
    from pipeline.sweep import orders_sweeper  # here: it plans and draws, which only a sweep over orders needs

    return orders_sweeper.register(resources())


def take_recipe_files(arguments: list[str]) -> list[str]:
    """Register each file of `recipe=path.yaml[,other]` under a name of its own and put that name in its place.

    A sweep's `-m` may stand anywhere; it is put first, as Hydra takes it. The sweeper over orders needs none.
    """
    taken = []
    if ORDERS in arguments and not any(argument.startswith("-") for argument in arguments):
        taken.append("-m")
    for argument in sorted(arguments, key=lambda given: given not in FLAGS):
        key, equals, value = argument.partition("=")
        if equals and key.lstrip("+") == "recipe" and any(YAML_FILE.search(part.strip("'\" ")) for part in value.split(",")):
            value = ",".join(_take(part.strip("'\" ")) for part in value.split(","))
            argument = f"{key}={value}"
        taken.append(argument)
    return taken


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether jobs are to be run, or planned one by one. RecipeError where something is to be shown as well, which Hydra cannot do."""
    if not any(flag in arguments for flag in FLAGS):
        return False
    if shown := [flag for flag in SHOWING if flag in arguments]:
        raise RecipeError(f"{shown[0]}: it shows one configuration, and -m makes many; leave one of the two out")
    return True


def composed(overrides: list[str]) -> DictConfig:
    """The config of one run without Hydra's own flags and settings. `hydra.main` would compose it twice, first to look for a sweep."""
    with hydra.initialize_config_dir(str(resources() / "conf"), job_name="run", version_base="1.3"):
        config = hydra.compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def read(config: DictConfig) -> Composed:
    """Plain values of a composed config, Hydra's own aside. OmegaConfBaseException: something is missing, or refers to nothing."""
    content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    hydra_config = HydraConfig.get()
    recipe = hydra_config.runtime.choices.get("recipe")
    return Composed(
        content={str(key): value for key, value in content.items()},
        recipe=None if recipe is None else display_name(recipe),
        text=OmegaConf.to_yaml(config, resolve=True) if content.get("mode") == "run" else "",
        on_other_machines=hydra_config.launcher._target_.endswith(ON_OTHER_MACHINES),
    )


def axes_of(arguments: Iterable[str]) -> dict[str, Any]:
    """The `sweep` of the recipe that is chosen; of several recipes, which are an axis themselves, none."""
    name = next((argument.removeprefix("recipe=") for argument in arguments if argument.startswith("recipe=")), "")
    shipped = {file.stem: file for file in recipe_files()}
    content = config_source.read_recipe(shipped[name]) if name in shipped else _contents.get(name, {})
    return content.get("sweep") or {}


def as_written(override: str) -> str:
    """`recipe=path/my_recipe.yaml` of the name that `take_recipe_files` put in its place."""
    key, _, name = override.partition("=")
    return f"{key}={_files[name]}" if name in _files else override


def display_name(name: str) -> str:
    """`my_recipe` for a recipe that was given as `path/my_recipe.yaml`."""
    return FILE_DIGEST.sub("", name)


def explain(error: Exception) -> RecipeError:
    """A Hydra or OmegaConf error as one sentence with a close match, without search paths."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException):
        group, _, wanted = (error.missing_cfg_file or "").rpartition("/")
        if group.startswith("recipe/"):
            return RecipeError(f"recipe: there is no '{group.removeprefix('recipe/')}/{wanted}'; the name of a recipe's file ends in .yaml")
        if group == "hydra/launcher" and wanted in EXTRAS:
            return RecipeError(f"hydra/launcher: {wanted} is not installed; to have it, pip install 'llmpress[{EXTRAS[wanted]}]'")
        return RecipeError(f"{group or 'config'}: there is no '{wanted}'{did_you_mean(wanted, error.options or [])}")
    if isinstance(error, OverrideParseException):
        named = f"write recipe={error.override}" if error.override in [file.stem for file in recipe_files()] else ""
        return RecipeError(f"{error.override}: this is not `key=value`; {named or 'quote values that hold spaces, commas or brackets'}")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        return RecipeError(f"{cause.full_key}: {_absent(str(cause.full_key), cause.parent_node)}")
    first = str(error).strip().splitlines()[0]
    if isinstance(error, ConfigCompositionException):
        return RecipeError(f"{first[0].lower()}{first[1:].rstrip('.')}; `run --help` shows what can be set")
    return RecipeError(f"{getattr(error, 'full_key', None) or 'recipe'}: {first}")


def _absent(spot: str, parent: Any) -> str:
    """Why `spot` cannot be set, `parent` being the node that does not hold it."""
    for pattern, written in ADDED.items():
        if found := re.fullmatch(pattern, spot):
            return f"it is not there yet; to add it write {found.expand(written)}"
    known = [str(key) for key in parent if key != "hydra"] if hasattr(parent, "__iter__") else []
    if not known:
        return f"it is not there yet; to add it write +{spot}=..."
    if "." not in spot and spot in (parent.get("stages") or {}):
        return f"a stage's settings stand under `stages`; write stages.{spot}..."
    before, _, name = spot.rpartition(".")
    if name in RENAMED and RENAMED[name] in known:
        return f"it is called {RENAMED[name]}; write {before}.{RENAMED[name]}"
    return f"there is no such setting{did_you_mean(name, known)}"


def _take(value: str) -> str:
    if not YAML_FILE.search(value):
        return value
    file = Path(value).expanduser()
    if not file.is_file():
        raise RecipeError(f"recipe: {value} does not exist{did_you_mean(value, [f.stem for f in recipe_files()])}")
    name = re.sub(r"\W", "_", file.stem, flags=re.ASCII) + "-" + hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    _contents[name] = config_source.read_recipe(file)
    config_source.register_content(name, _contents[name])
    _files[name] = value
    return name
