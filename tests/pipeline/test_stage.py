"""The registry and the ports read from annotations."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pipeline import stage as registry
from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint, EvalReport, QuantizedCheckpoint
from pipeline.errors import RecipeError
from pipeline.stage import Context, Stage, find_stage, input_ports, output_ports, stage_names


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    find_stage.cache_clear()
    yield
    find_stage.cache_clear()


@dataclass(frozen=True)
class Two:
    model: DenseCheckpoint
    extra: Artifact


class Ported(Stage):
    name, version = "ported", 1
    infer = memory = lambda self, **specs: None  # type: ignore[assignment]

    def run(  # type: ignore[override]
        self, ctx: Context, model: DenseCheckpoint, teacher: Checkpoint | EvalReport, text: Dataset | None = None
    ) -> Two: ...


class Wrong(Ported):
    def run(self, ctx: Context, model: int) -> DenseCheckpoint: ...  # type: ignore[override]


def test_the_annotations_of_run_are_the_ports() -> None:
    ports = input_ports(Ported)
    assert list(ports) == ["model", "teacher", "text"]
    assert ports["teacher"].takes(QuantizedCheckpoint) and ports["teacher"].takes(EvalReport)
    assert not ports["model"].takes(Checkpoint)
    assert [port.optional for port in ports.values()] == [False, False, True]
    assert str(ports["teacher"]) == "Checkpoint | EvalReport"
    assert list(output_ports(Ported)) == ["model", "extra"]


def test_an_annotation_that_is_no_artifact_is_the_author_s_mistake() -> None:
    with pytest.raises(TypeError, match=r"port model: .* is not an artifact type"):
        input_ports(Wrong)


def test_every_built_in_stage_is_found_by_its_name() -> None:
    assert [find_stage(name).name for name in registry.BUILT_IN] == list(registry.BUILT_IN)


def test_a_broken_plugin_is_one_sentence_when_it_is_used(monkeypatch: pytest.MonkeyPatch, fresh_registry: None) -> None:
    monkeypatch.setattr(registry, "plugin_paths", lambda: {"broken": "no_such_package.stages:Broken"})
    assert "broken" in stage_names()
    with pytest.raises(RecipeError, match=r"stage 'broken' cannot be loaded from no_such_package\.stages:Broken .*uninstall that package"):
        find_stage("broken")


def test_a_plugin_cannot_take_a_built_in_name(monkeypatch: pytest.MonkeyPatch, fresh_registry: None) -> None:
    assert find_stage("gptq").__module__ == "stages.gptq"
    registry.plugin_paths.cache_clear()
    monkeypatch.setattr(registry, "entry_points", lambda group: [type("Point", (), {"name": "gptq", "value": "evil:Stage"})])
    assert registry.plugin_paths() == {}
    registry.plugin_paths.cache_clear()
