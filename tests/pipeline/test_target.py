from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.compose import resources
from pipeline.errors import RecipeError
from pipeline.recipe import read_config
from pipeline.target import Target

FILES = sorted((resources() / "conf" / "target").glob("*.yaml"))


def shipped(name: str) -> Target:
    return Target.model_validate(yaml.safe_load((resources() / "conf" / "target" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_target_names_every_field_so_that_each_can_be_overridden(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    assert list(content) == list(Target.model_fields)
    target = Target.model_validate(content)
    assert target.name == file.stem
    assert target.room
    assert (target.price is None) == (target.price_date is None) == (target.price_source is None)
    assert (target.gpus > 0) == (target.flops is not None) == (target.bandwidth is not None)


def test_what_a_driver_reports_is_not_what_the_box_says() -> None:
    assert shipped("a100_80gb").memory == 81920 * 2**20
    assert shipped("h100_80gb").memory == 81559 * 2**20
    pair = shipped("h100_nvl_188gb")
    assert (pair.gpus, pair.memory, pair.price) == (2, 95830 * 2**20, 12)
    mac = shipped("m3_pro_36gb")
    assert (mac.unified, mac.bandwidth, mac.ram, mac.memory) == (True, 150e9, 36 * 2**30, 27 * 2**30)


@pytest.mark.parametrize(
    ("written", "flops", "bandwidth"),
    [
        ({"flops": "312TFLOP/s", "bandwidth": "2039GB/s"}, 312e12, 2039e9),
        ({"flops": "1.5 PFLOPS", "bandwidth": "4.8 TB/s"}, 1.5e15, 4.8e12),
        ({"flops": 70e12, "bandwidth": "6e11"}, 70e12, 6e11),
    ],
)
def test_rates_are_written_with_their_units(written: dict[str, Any], flops: float, bandwidth: float) -> None:
    target = Target(name="x", gpus=1, **written)
    assert (target.flops, target.bandwidth) == (flops, bandwidth)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"gpus": 1, "memory": 0}, "target.memory: 0 does not fit; input should be greater than 0"),
        ({"gpus": -1}, "target.gpus: -1 does not fit; input should be greater than or equal to 0"),
        ({"memory": "24GiB"}, "target: memory is that of a GPU and there is none; write gpus: 1, or ram for a machine without one"),
        (
            {"gpus": 1, "memory": "48GiB", "ram": "36GiB", "unified": True},
            "target: the GPU shares the RAM (unified) and has more memory than there is RAM; write a smaller memory",
        ),
        ({"bandwidth": "fast"}, "target.bandwidth: 'fast' does not fit; write for example 2039GB/s"),
        ({"flops": "312T"}, "target.flops: '312T' does not fit; write for example 312TFLOP/s"),
        ({"price": -1}, "target.price: -1 does not fit; input should be greater than or equal to 0"),
        ({"price_date": "May"}, "target.price_date: 'May' does not fit; write a day such as 2026-11-21"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused_by_field(content: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_config({"target": {"name": "mine", **content}, "order": ["a"], "model": {"path": "m"}}, "mine")
    assert [problem for problem in caught.value.problems if problem.startswith("target")] == [sentence]


def test_this_machine_is_detected_where_it_is_not_told() -> None:
    host = shipped("host")
    assert host == Target.host()
    assert host.ram and host.ram > 2**30
    assert host.cores
    told = Target(name="host", ram="3GiB", gpus=1, memory="2GiB")  # type: ignore[arg-type]
    assert (told.ram, told.cores, told.room) == (3 * 2**30, host.cores, 2 * 2**30)
    assert Target(name="other").ram is None


def test_the_engine_keeps_two_gib_and_a_tenth_unless_told_otherwise() -> None:
    assert Target(name="x", gpus=2, memory=80 * 2**30).kept == 10 * 2**30
    assert Target(name="x", ram=20 * 2**30).kept == 4 * 2**30
    assert Target(name="x", gpus=1, memory=27 * 2**30, unified=True).kept == 2 * 2**30
    assert Target(name="x", gpus=1, memory=80 * 2**30, reserve=0).kept == 0


def test_a_target_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Target(name="x").gpus = 2
