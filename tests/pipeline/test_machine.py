"""The machine in one line: what makes a computation slower or faster is in it, and nothing else."""

import platform
from pathlib import Path

import pytest

from pipeline.machine import describe, fingerprint

RAM = 126 << 30
XEON = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)  Platinum 8480+\ncpu MHz\t\t: 2000.1\n\nprocessor\t: 1\nmodel name\t: another\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(XEON)
    return tmp_path


def add_gpus(root: Path, *models: str) -> None:
    for number, model in enumerate(models):
        folder = root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 1{number}\nGPU UUID: \t GPU-{number}\n")


def test_processor_cores_memory_and_gpus(root: Path) -> None:
    assert describe(root, "", None, 16, RAM) == "Intel(R) Xeon(R) Platinum 8480+, 16 cores, 126 GiB RAM"
    add_gpus(root, "NVIDIA H200", "NVIDIA L4", "NVIDIA H200")
    assert describe(root, "", None, 1, RAM + 1000) == "Intel(R) Xeon(R) Platinum 8480+, 1 core, 126 GiB RAM, 2 x NVIDIA H200, NVIDIA L4"


def test_what_is_left_of_the_machine_counts(root: Path) -> None:
    whole = describe(root, "", None, 16, RAM)
    assert describe(root, "4", None, 16, RAM) == whole.replace("16 cores", "16 cores, OMP_NUM_THREADS=4")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert describe(root, "", None, 16, RAM) == whole
    (root / "sys/fs/cgroup/cpu.max").write_text("250000 100000\n")
    assert describe(root, "", None, 16, RAM) == whole.replace("16 cores", "16 cores, limited to 2.5")


@pytest.mark.parametrize(
    ("models", "visible", "said"),
    [
        (["A", "A"], "1", ", A"),
        (["A", "A"], "0,1", ", 2 x A"),
        (["A", "A"], "", ""),
        (["A", "B"], "1", ", A, B, CUDA_VISIBLE_DEVICES=1"),
        (["A"], "MIG-7", ", A, CUDA_VISIBLE_DEVICES=MIG-7"),
        ([], "0", ""),
    ],
)
def test_hidden_gpus_do_not_count(root: Path, models: list[str], visible: str, said: str) -> None:
    without = describe(root, "", None, 16, RAM)
    add_gpus(root, *models)
    assert describe(root, "", visible, 16, RAM) == without + said


def test_a_processor_without_a_name_has_its_numbers(root: Path) -> None:
    (root / "proc/cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")
    assert " 0x41 0xd4f, 8 cores, 126 GiB RAM" in describe(root, "", None, 8, RAM)


def test_it_is_this_machine_and_no_name_of_it() -> None:
    assert fingerprint().count(", ") >= 2 and platform.node() not in fingerprint()
