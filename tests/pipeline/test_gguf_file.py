"""The header of a GGUF file is read whole, or the file is refused."""

import struct
from pathlib import Path

import pytest

from pipeline.ggml import BLOCKS, row_bytes, tensor_bytes
from pipeline.gguf_file import GGUFTensor, read_gguf
from pipeline.headers import CheckpointFileError


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(version: int = 3, kind: int = 12, data: int = 2 * 144) -> bytes:
    """One tensor of 2 rows of 256, as Q4_K unless `kind` says otherwise; metadata of each sort."""
    entries = [
        string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        string("llama.block_count") + struct.pack("<II", 4, 7),
        string("general.alignment") + struct.pack("<II", 4, 64),
        string("tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b"),
        string("scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, 1.5),
    ]
    tensor = string("output.weight") + struct.pack("<IQQIQ", 2, 256, 2, kind, 0)
    head = b"GGUF" + struct.pack("<IQQ", version, 1, len(entries)) + b"".join(entries) + tensor
    return head + b"\0" * (-len(head) % 64) + b"\0" * data


def test_metadata_and_tensors_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf())
    found = read_gguf(tmp_path / "m.gguf")
    assert found.metadata["general.architecture"] == "llama" and found.metadata["llama.block_count"] == 7
    assert found.metadata["tokens"] == ["a", "b"] and found.metadata["scores"] == [0.5, 1.5]
    (tensor,) = found.tensors.values()
    assert tensor == GGUFTensor("Q4_K", (2, 256), tensor.offset) and tensor.offset % 64 == 0
    assert found.tensor_bytes == 288 and tensor.offset + 288 == (tmp_path / "m.gguf").stat().st_size


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    content = gguf()
    for length in range(0, len(content), 5):
        (tmp_path / "m.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointFileError):
            read_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"GGML" + gguf()[4:], "is not a GGUF file"),
        (gguf(version=1), "is GGUF version 1; versions 2 and 3 are read"),
        (gguf(kind=99), "tensor output.weight has type 99; there are: F32"),
        (gguf()[:24] + b"\xff" * 8 + gguf()[32:], "unreadable GGUF header"),
    ],
)
def test_what_is_no_such_file_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointFileError, match=told):
        read_gguf(tmp_path / "m.gguf")


def test_a_row_takes_whole_blocks() -> None:
    assert row_bytes("Q4_K", 4096) == 16 * 144 and row_bytes("Q8_0", 33) == 2 * 34 and tensor_bytes("F32", (7,)) == 28
    assert {kind: 8 * nbytes / values for kind, (values, nbytes) in BLOCKS.items() if kind.endswith("_K")} == {
        "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625,
    }  # fmt: skip
