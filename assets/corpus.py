"""The small model's text: the Python standard library's own sources, split by a hash of each module's name.

Every machine that can run llmpress already has these files (PSF licence). A module goes to a split by
`sha256(relative path) % 100`: 0-9 eval, 10-14 calibration, the rest train. So the split depends on no file order,
machine or seed, and no module is in two splits. The library's own tests are training text only, and a test named after
a held-out module (`test_json*` where any `json/*.py` is held out) is left out, as are generated tables such as
`encodings/cp*.py`, near copies of each other that would leak from one split into the next.

Sources differ between Python releases. What the product ships and measures on is therefore the snapshot that
`python assets/corpus.py` writes to `assets/data/*.jsonl` (one `{"id", "text"}` a line) from the release named in assets/README.md.
"""

import argparse
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

GENERATED = re.compile(
    r"^(site-packages|config-|ensurepip/_bundled|lib2to3/tests/data|test/(bad|encoded_modules|tokenizedata))|__pycache__"
    r"|^encodings/(cp|mac_|iso8859|koi8|kz1048|hp_roman|ptcp|tis_)|_sysconfigdata|(^|/)_?pyrepl|^pydoc_data"
)
TESTS = re.compile(r"^test/|/(test|tests|idle_test)/")
SNAPSHOT_BYTES = {"eval": 400_000, "calibration": 250_000, "train": 2_000_000}
MAX_DOCUMENT_BYTES = {"eval": 8_000, "calibration": 24_000, "train": 24_000}  # many documents make intervals narrow, long ones fill windows
MIN_DOCUMENT_BYTES = 500


def split_of(name: str) -> str:
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "eval" if bucket < 10 else "calibration" if bucket < 15 else "train"


def modules(stdlib: Path) -> Iterator[str]:
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        if not GENERATED.search(name) and path.stat().st_size >= MIN_DOCUMENT_BYTES:
            yield name


def documents(split: str, stdlib: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (module path, source text) of one split, in order of path."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    names = list(modules(root))
    held_out = {name.split("/")[0].removesuffix(".py") for name in names if not TESTS.search(name) and split_of(name) != "train"}
    for name in names:
        if TESTS.search(name):
            tested = Path(name).stem.removeprefix("test_").split("_")[0]
            wanted = split == "train" and not {tested, *Path(name).parts} & held_out
        else:
            wanted = split_of(name) == split
        if wanted:
            yield name, (root / name).read_text(encoding="utf-8", errors="ignore")


def snapshot(split: str, limit: int) -> list[dict[str, str]]:
    """Modules in order of their hash, each cut at its split's `MAX_DOCUMENT_BYTES`, up to `limit` bytes in all."""
    rows, total = [], 0
    for name, text in sorted(documents(split), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        text = text[: MAX_DOCUMENT_BYTES[split]]
        if total + len(text.encode()) <= limit:
            rows.append({"id": name, "text": text})
            total += len(text.encode())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Write data/{calibration,eval,train}.jsonl from this Python's sources.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, limit in SNAPSHOT_BYTES.items():
        rows = snapshot(split, limit)
        (args.out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{split}: {len(rows)} documents, {sum(len(row['text'].encode()) for row in rows):,} bytes")


if __name__ == "__main__":
    main()
