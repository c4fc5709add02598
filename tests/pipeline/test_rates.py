"""How fast this machine computes: asked once, remembered by what decides it, and never in the way."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import rates
from pipeline.compose import resources
from pipeline.errors import RecipeError
from pipeline.plan import make_plan
from pipeline.rates import BUSY_LASTS, GIVEN, LOOP, Rates, at_measured_rates
from pipeline.remembered import Remembered
from pipeline.roofline import Work, seconds
from pipeline.store import Store
from pipeline.target import Target
from tests.pipeline.shipped import plan_of_shipped

FOUND = Rates(flops=2e11, float32_flops=1e11, bandwidth=1e10, loop=2 * LOOP, threads=1)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rates]]:
    """Measurements so far; the folder of remembered ones is the test's own, and every look at them is of another process."""
    found: list[Rates] = []

    def measure() -> Rates:
        found.append(FOUND)
        return FOUND

    monkeypatch.delenv(GIVEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "_measure", measure)
    rates._measured.cache_clear()
    yield found
    rates._measured.cache_clear()


def asked_anew() -> Target:
    rates._measured.cache_clear()
    return at_measured_rates(Target.host())


def test_a_machine_is_measured_once(measured: list[Rates], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = asked_anew()
    assert (host.flops, host.float32_flops, host.bandwidth, host.core_speed, host.cores) == (2e11, 1e11, 1e10, 0.5, 1)
    assert "remembered" in capsys.readouterr().err
    assert asked_anew() == host and len(measured) == 1
    (file,) = (tmp_path / "cache/llmpress").iterdir()
    assert file.name == "rates.json"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["", "{}", "[]", "\udcff"])
def test_a_damaged_file_is_measured_again(measured: list[Rates], tmp_path: Path, content: str) -> None:
    host = asked_anew()
    (file,) = (tmp_path / "cache/llmpress").iterdir()
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert asked_anew() == host == asked_anew()
    assert len(measured) == 2


@pytest.mark.parametrize("kept", [{}, [], {"rates": FOUND.model_dump() | {"flops": 5e-324}, "time": 0}, {"rates": FOUND.model_dump()}])
def test_what_makes_no_sense_is_measured_again(measured: list[Rates], kept: object) -> None:
    Remembered("rates").keep(json.dumps(rates._identity()), None, kept)
    assert asked_anew() == asked_anew() and len(measured) == 1


def test_a_home_that_cannot_be_written_is_no_error(measured: list[Rates], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert asked_anew() == asked_anew()
    assert len(measured) == 2


def test_other_instructions_are_another_machine(measured: list[Rates], monkeypatch: pytest.MonkeyPatch) -> None:
    asked_anew()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    asked_anew()
    assert len(measured) == 2


def test_what_was_measured_on_a_busy_machine_lasts_an_hour(measured: list[Rates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_measure", lambda: measured.append(FOUND) or FOUND.model_copy(update={"quiet": False}))
    assert asked_anew() == asked_anew() and len(measured) == 1
    now = time.time()
    monkeypatch.setattr(rates.time, "time", lambda: now + 2 * BUSY_LASTS)
    asked_anew()
    assert len(measured) == 2


def test_what_a_recipe_states_goes_first(measured: list[Rates]) -> None:
    told = at_measured_rates(Target(name="host", flops=5e11))
    assert (told.flops, told.float32_flops) == (5e11, 1e11)
    whole = Target(name="host", flops=1, float32_flops=1, bandwidth=1, core_speed=1)
    rates._measured.cache_clear()
    measured.clear()
    assert at_measured_rates(whole) == whole and not measured


@pytest.mark.parametrize("target", [Target(name="other"), Target(name="host", gpus=1), Target(name="a100", gpus=1, flops=312e12)])
def test_other_machines_are_as_they_are_told(measured: list[Rates], target: Target) -> None:
    assert at_measured_rates(target) == target and not measured


def test_rates_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GIVEN, '{"flops": -1}')
    with pytest.raises(
        RecipeError, match=r"LLMPRESS_RATES: flops: .*; write a JSON object with flops, float32_flops, bandwidth, loop, threads, or leave"
    ):
        at_measured_rates(Target.host())


def test_a_process_that_cannot_measure_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv(GIVEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates.sys, "executable", str(tmp_path / "absent"))
    rates._measured.cache_clear()
    assert at_measured_rates(Target.host()) == Target.host()
    assert "warning: how fast this machine computes could not be measured, so that its plan has no hours" in capsys.readouterr().err
    rates._measured.cache_clear()


def test_a_process_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it says makes sense: a copy is no faster than 10 TB/s, and a loop takes no second."""
    found = rates._measure()
    assert found is not None and found.float32_flops > 1e8 and found.bandwidth < 1e13 and found.loop < 1


def test_slower_cores_take_longer_at_everything_else() -> None:
    fast = Target(name="host", cores=2, flops=1e12, bandwidth=1e10, core_speed=1)
    slow = fast.model_copy(update={"core_speed": 0.5})
    work = Work(cpu=3, overhead=2, overhead_shared=4)
    assert (seconds(work, fast), seconds(work, slow)) == (7, 14)
    assert seconds(work, fast.model_copy(update={"core_speed": None})) == 3


def test_rates_change_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned() -> tuple[str, list[str], float | None]:
        plan = plan_of_shipped(tmp_path, "quickstart")
        plan = make_plan(plan.recipe, Store(tmp_path), resources(), execute=True)
        return plan.digest, [node.key for node in plan.nodes], plan.seconds

    digest, keys, hours = planned()
    monkeypatch.setenv(GIVEN, Rates(flops=1e9, float32_flops=1e9, bandwidth=1e9, loop=1, threads=1).model_dump_json())
    assert planned()[:2] == (digest, keys) and all(keys)
    assert hours and (slower := planned()[2]) and slower > hours
