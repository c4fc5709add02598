"""Packs what `tests.gpu.measure` needs on a machine with an NVIDIA card that has torch and no network: `make gpu-bundle`.

    tree/      of this repository's tracked files, those that the rows import and read
    wheels/    libraries that such a machine lacks, in the versions of constraints.txt, for Python 3.12 on x86-64 Linux
    run.sh     unpacks the wheels beside itself and runs the rows

Needs no library itself. What the machine must have is `MACHINE`, with all that these require; `WHEELS` comes along. Neither Hydra,
OmegaConf, MLflow nor bitsandbytes is in either: the rows do without.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "llmpress-gpu"
LIMIT = 60 << 20  # bytes, unpacked
TREE = ("pipeline", "stages", "conf", "assets/data", "assets/small-llama", "bench/memory.py", "tests/__init__.py", "tests/gpu", "LICENSE")
LEFT = ("assets/small-llama/model.safetensors",)  # the rows make their own weights
MACHINE = ("torch", "transformers", "accelerate", "pandas", "pyarrow", "requests", "xxhash")
WHEELS = (
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection",
    "compressed-tensors", "llmcompressor", "loguru", "datasets", "dill", "multiprocess",
)  # fmt: skip
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def tracked(root: Path) -> list[str]:
    """Names of the tree's files, relative to `root` and sorted: what git knows of, and nothing that merely lies there."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z", "--", *TREE], capture_output=True, text=True, check=True)
    return sorted(set(filter(None, listed.stdout.split("\0"))) - set(LEFT))


def pins(root: Path) -> dict[str, str]:
    """Version by distribution, as constraints.txt names them."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def download(root: Path, folder: Path) -> None:
    """The wheels, by pip, as the machine's own would choose them."""
    versions = pins(root)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    chosen = [*platforms, "--python-version", PYTHON, "--implementation", "cp"]
    subprocess.run([*command, *chosen, *(f"{name}=={versions[name]}" for name in WHEELS)], check=True)


def check_size(files: Iterable[Path]) -> int:
    """Bytes of them all. SystemExit where they are more than may be carried."""
    sizes = {file: file.stat().st_size for file in files}
    total = sum(sizes.values())
    if total > LIMIT:
        largest = max(sizes, key=lambda file: sizes[file])
        raise SystemExit(
            f"the bundle has {total:,} bytes and {LIMIT:,} may be carried; its largest file is {largest.name} with {sizes[largest]:,}"
        )
    return total


def pack(root: Path, wheels: Path, output: Path) -> int:
    """Write the archive. Returns the bytes of its files."""
    content = {f"tree/{name}": root / name for name in tracked(root)}
    content |= {f"wheels/{file.name}": file for file in sorted(wheels.glob("*.whl"))}
    content["run.sh"] = root / "tests/gpu/run.sh"
    total = check_size(content.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(output, "w:gz") as archive:
        for name, file in content.items():
            archive.add(file, f"{NAME}/{name}", recursive=False)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / f"dist/{NAME}.tar.gz")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        download(ROOT, Path(folder))
        total = pack(ROOT, Path(folder), options.output)
    packed = options.output.stat().st_size
    print(f"{options.output}: {packed / (1 << 20):.1f} MiB, unpacked {total / (1 << 20):.1f} of the {LIMIT >> 20} that may be carried")


if __name__ == "__main__":
    main()
