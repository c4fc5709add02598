"""A TAB gets from memory what Hydra would say, and Hydra is asked where memory cannot know."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.plugins.completion_plugin import DefaultCompletionPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pipeline import cli, completion, compose, learned, remembered, with_hydra
from pipeline.completion_source import learn
from pipeline.resources import resources
from tests.yardsticks import command_seconds, import_seconds

LINES = """\
r | rec | recipe | recipe= | recipe=q | recipe=70b_to_ | recipe=nothing | m | mode | mode= | mode=p | mode. | mo | model=
model=ll | model. | model.p | model.path= | model.path=x | model.revision= | model.architecture. | st | stage | stage=
stage@stages.x= | stage@stages.x=gp | stages. | tracking | tracking. | tracking.en | tracking.enabled= | tracking.uri=
data.splits. | data.splits.eval | data. | target. | target=a1 | serve= | gates. | gates= | sweep. | nothing. | nothing=
n.m.o | + | +mod | +model= | +models.a.path= | ~ | ~mod | ~model | ~stages. | +target@compute=h1 | hy | hydra/ | hydra/la
hydra/launcher= | hydra/sweeper=o | hydra/nothing= | target/ | target/x | +hydra/ | objectives= | fit= | order= | order.
recipe=quickstart st | recipe=quickstart stages. | recipe=quickstart stages.q | recipe=quickstart stages.quantize.
recipe=quickstart stages.quantize.group | recipe=quickstart stages.quantize.group_size=
recipe=quickstart stages.quantize.group_size=6 | recipe=quickstart stages.quantize.execution.
recipe=quickstart stages.distill.inputs. | recipe=quickstart stages.distill.learning_rate= | recipe=quickstart order.
recipe=quickstart order.1= | recipe=quickstart order.99= | recipe=quickstart order.0
recipe=quickstart stages.quantize.num_bits=3 stages.quantize. | recipe=quickstart mode=plan mode=
recipe=quickstart mode=plan mode. | recipe=quickstart mode=plan stages.prune.
recipe=quickstart stage@stages.quantize=gptq stages.quantize. | recipe=quickstart stage@stages.quantize=
recipe=quickstart nothing=1 stages. | recipe=quickstart stages.quantize.nothing=1 stages.
recipe=quickstart model=llama3_1_70b model.architecture. | recipe=quickstart target=h100_80gb target.
recipe=nothing stages. | recipe=quickstart +models.large.path=/a models. | recipe=quickstart ~stages.prune stages.
recipe=quickstart order=[prune] stages. | recipe=quickstart data.splits={a:b} data.splits.
recipe=quickstart recipe=whole_pipeline sta | recipe=quickstart stages.prune={} stages.
-m recipe=quickstart stages.quantize.num_bits=4,3 stages.quantize. | recipe=quickstart -m
-m recipe=quickstart,whole_pipeline st | --multirun recipe=quickstart stages. | model.path=./ | recipe=./mi | recipe=/tm
+models.x.path=./mine | recipe=. | recipe=./nowhere/x | recipe=./mine.yaml stages. | recipe=quickstart outputs=a/b outputs
recipe=quickstart export_to=null export_to= | stages.quantize | recipe=mixed_precision stages.quantize.mixed_precision.
recipe=gated_quantize gates.0. | recipe=gated_quantize gates.0.metric=
"""
AT_A_NEW_WORD = ["", "recipe=quickstart ", "recipe=quickstart mode=plan "]
ASKED = "hydra. | hydra.run.dir= | recipe=quickstart hydra.verbose=true mod | recipe=quickstart stages[ | recipe=quickstart a..b | ./x | ="


def each(lines: str) -> list[str]:
    return [line for row in lines.splitlines() for line in row.split(" | ")]


@pytest.fixture(scope="module", autouse=True)
def hydra() -> None:
    compose.register()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "SETTLED", -1)
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "minor.yaml", "other"):
        (tmp_path / name).write_text("order: []\n")
    learned._installation.cache_clear()
    return tmp_path


def by_hydra(line: str) -> list[str]:
    with initialize_config_dir(str(resources() / "conf"), job_name="run", version_base="1.3"):
        return DefaultCompletionPlugin(GlobalHydra.instance().config_loader())._query(config_name="config", line=line)


def from_memory(line: str, monkeypatch: pytest.MonkeyPatch, shell: str = "bash") -> str | None:
    monkeypatch.setenv("COMP_LINE", f"run {line}")
    return completion.answer(["-sc", f"query={shell}"])


SAMPLED = [pytest.param(line, marks=[pytest.mark.slow] if number % 4 else []) for number, line in enumerate(each(LINES))]


@pytest.mark.parametrize("line", [*AT_A_NEW_WORD, *SAMPLED])
def test_memory_says_what_hydra_says(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = completion.read_line(f"run {line}")
    assert read is not None
    learn(read)
    found = from_memory(line, monkeypatch)
    if found is None:
        assert "order=[" in line or "{" in line or "nothing=1" in line, "asked each time only where a value is no plain one"
    else:
        assert found == " ".join(by_hydra(line))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["70b_to_single_a100", "mixed_precision", "gated_quantize"])
def test_every_key_of_a_recipe_is_completed_as_hydra_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(completion.Line((f"recipe={name}",), "", False))
    with initialize_config_dir(str(resources() / "conf"), job_name="run", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", [f"recipe={name}"], run_mode=RunMode.RUN)
        monkeypatch.setattr(loader, "load_configuration", lambda **_: config)
        waiting, seen = [""], 0
        while waiting:
            word = waiting.pop()
            expected = DefaultCompletionPlugin(loader)._query(config_name="config", line=f"recipe={name} {word}")
            found = from_memory(f"recipe={name} {word}", monkeypatch)
            assert found == " ".join(expected) or (found is None and refers(config, word.removesuffix("="))), word
            waiting += [key for key in expected if key.endswith((".", "=")) and len(key) > len(word) and not key.startswith("hydra")]
            seen += 1
    assert seen > 100


def refers(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    return OmegaConf.is_interpolation(OmegaConf.select(config, parent), name)


@pytest.mark.parametrize("line", each(ASKED))
def test_hydra_is_asked_where_memory_cannot_know(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = completion.read_line(f"run {line}")
    with suppress(HydraException):
        learn(read) if read else None
    assert from_memory(line, monkeypatch) is None


@pytest.mark.parametrize("line", ["--cfg job recipe=", "recipe=quickstart -m stages.", "-x"])
def test_a_line_with_other_flags_is_hydra_s(line: str) -> None:
    assert completion.read_line(f"run {line}") is None


@pytest.mark.parametrize(("text", "word"), [("run mo", "mo"), ("  ./run mo", "mo"), ("python3 run.py mo", "mo"), ("/usr/bin/run a=1 ", "")])
def test_the_program_s_name_is_not_part_of_the_line(text: str, word: str) -> None:
    read = completion.read_line(text)
    assert read is not None and read.word == word
    assert completion.read_line(DefaultCompletionPlugin.strip_python_or_app_name(text).join(("run ", ""))) == read


@pytest.fixture
def tab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The command that a shell runs."""

    def command(line: str, shell: str = "bash") -> str:
        monkeypatch.setenv("COMP_LINE", f"run {line}")
        learned._installation.cache_clear()
        GlobalHydra.instance().clear()
        with redirect_stdout(io.StringIO()) as out:
            cli._main(["-sc", f"query={shell}"])
        return out.getvalue()

    yield command
    GlobalHydra.instance().clear()


def test_a_second_tab_needs_no_hydra(tab: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["recipe=q", "recipe=quickstart stages.quantize.", "recipe=quickstart mode=plan stages.prune.mlp_ratio=0.25 stages.prune."]
    first = [tab(line) for line in lines]
    assert first == [" ".join(by_hydra(line)) + "\n" for line in lines]
    monkeypatch.setattr(with_hydra, "command", lambda arguments: pytest.fail("Hydra was asked again"))
    assert [tab(line) for line in lines] == first
    assert tab(lines[1], "fish").split("\n") == [*first[1].split(), ""] and tab(lines[1], "zsh") == first[1]


def test_what_memory_cannot_know_hydra_says(tab: Callable[..., str]) -> None:
    assert "hydra.run.dir=." in tab("hydra.run.dir=") and "hydra.run." in tab("hydra.ru")


def test_a_home_that_cannot_be_written_is_no_problem(tab: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tab("recipe=q")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "mine.yaml"))
    assert tab("recipe=q") == expected


def test_a_tab_takes_less_than_the_imports_that_it_does_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "run recipe=quickstart stages.quantize.")
    code = "from pipeline import remembered\nremembered.SETTLED = -1\nfrom pipeline.cli import main\nmain()"
    command = [sys.executable, "-c", code, "-sc", "query=bash"]
    command_seconds(command, resources(), repeats=1)
    assert command_seconds(command, resources(), repeats=3) < 0.8 * import_seconds()
