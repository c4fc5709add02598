"""An installed package works outside the checkout: conf/, recipes/ and assets/ travel inside the wheel, and nothing else does."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_plans_the_quickstart_outside_the_checkout(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pipeline", "stages"}
    kinds = {name.split("/")[2] for name in names if name.startswith("pipeline/resources/")}
    assert kinds == {"conf", "recipes", "assets"}
    assert {f"pipeline/engines/{name}.yaml" for name in ("vllm", "transformers", "lmdeploy", "llama_cpp")} <= set(names)
    assert not [name for name in names if ".training/" in name or name.endswith((".pt", ".bin"))]

    script = "import pipeline, sys; print(pipeline.__file__); from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "recipe=quickstart", "mode=plan"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "quickstart: prune > evaluate > distill > evaluate" in done.stdout
