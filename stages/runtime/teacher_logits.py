"""Score text with a teacher, keep each token's largest logits, and read them again while a student is trained.

A teacher is resident, or runs layer by layer where it does not fit. Which windows stand in which file depends on the parameters alone.
A file is written under another name and renamed when it is whole, so an interrupted run goes on with what is missing, also with other
execution settings: whoever ran out of memory continues layer by layer. No more than the files scored at once are ever in memory.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from pipeline.headers import CheckpointFileError, read_header
from pipeline.stage import Context
from stages.functional.top_logits import TopLogits, top_logits
from stages.runtime.layerwise import LayerwiseModel, micro_batches, token_pieces
from stages.runtime.loading import load_model
from stages.runtime.logits_layout import LOGITS_FILE, SHARDS, LogitsFile
from stages.runtime.scoring import hidden_states
from stages.runtime.tensors import DTYPES, TensorReader
from stages.runtime.windows import chunk_tokens

Progress = Callable[[int, int], None]


class Teacher(Protocol):
    """Whatever can say the `TopLogits` [n, T, k] of windows [n, T]. `progress` takes steps done and steps in all."""

    def __call__(self, windows: torch.Tensor, k: int, temperature: float, progress: Progress) -> TopLogits: ...


class ResidentTeacher:
    """The whole model in memory. The output embedding is applied to chunks of tokens."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        self.model, self.device, self.batch_size = load_model(folder, device, dtype=dtype), device, batch_size

    @torch.inference_mode()
    def __call__(self, windows: torch.Tensor, k: int, temperature: float, progress: Progress) -> TopLogits:
        head, parts = self.model.get_output_embeddings(), []
        for first in range(0, len(windows), self.batch_size):
            states = hidden_states(self.model, windows[first : first + self.batch_size].to(self.device))
            for piece in token_pieces([states], chunk_tokens(self.model.config.vocab_size)):
                parts.append(top_logits(head(piece).float(), k, temperature).cpu())
            progress(min(first + self.batch_size, len(windows)), len(windows))
        return _joined(parts, windows)


class LayerwiseTeacher:
    """One decoder layer in memory, beside the hidden states of at most `at_once` windows."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, batch_size: int, at_once: int) -> None:
        self.model, self.batch_size, self.at_once = LayerwiseModel(folder, dtype, device), batch_size, at_once

    def __call__(self, windows: torch.Tensor, k: int, temperature: float, progress: Progress) -> TopLogits:
        parts: list[TopLogits] = []
        groups = torch.split(windows, self.at_once)
        steps = len(self.model.layers) + 1  # of one sweep: the head is one more
        for number, group in enumerate(groups):

            def on_layer(i: int, _: torch.nn.Module, before: int = number * steps) -> tuple[()]:
                progress(before + i, len(groups) * steps)
                return ()

            hidden = self.model.sweep(micro_batches(group, self.batch_size * group.shape[1]), on_layer=on_layer)
            progress(number * steps + steps - 1, len(groups) * steps)
            parts += self.model.top_logits(token_pieces(hidden), k, temperature)
        return _joined(parts, windows)


def _joined(parts: Sequence[TopLogits], windows: torch.Tensor) -> TopLogits:
    """Of tokens in order [tokens, k] to [windows, T, k]."""
    ids, logits, log_sums = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return TopLogits(ids.view(*windows.shape, -1), logits.view(*windows.shape, -1), log_sums.view(windows.shape))


def store_logits(ctx: Context, windows: torch.Tensor, layout: LogitsFile, files_at_once: int, make_teacher: Callable[[], Teacher]) -> float:
    """Write the teacher's logits at every token of `windows` [N, T] to `ctx.output`.

    Returns the share of the teacher's probability, at the layout's temperature, that the kept words hold: mean over tokens. Files of
    an interrupted attempt are taken as they are; where all are there, the teacher is not even loaded. ValueError where its logits are
    nan or infinite.
    """
    for stale in ctx.output.glob("*.partial"):
        stale.unlink()
    groups = torch.split(windows, layout.windows_per_file)
    names = (f"logits-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1))
    parts = [(ctx.output / name, group) for name, group in zip(names, groups, strict=True)]
    missing = [(file, group) for file, group in parts if not _is_whole(file, layout, len(group))]
    if len(missing) < len(parts):
        ctx.resumed(f"{len(parts) - len(missing)} of {len(parts)} files were there")
    if missing:
        _score(ctx, missing, len(windows), layout, files_at_once, make_teacher())
    (ctx.output / LOGITS_FILE).write_text(layout.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return sum(_kept_mass(file, layout.temperature) for file, _ in parts) / windows.numel()


def _score(
    ctx: Context, missing: Sequence[tuple[Path, torch.Tensor]], of: int, layout: LogitsFile, files_at_once: int, teacher: Teacher
) -> None:
    """Write the missing files, given with their windows. `of` counts the windows of all files."""
    done = of - sum(len(group) for _, group in missing)
    for first in range(0, len(missing), files_at_once):
        files = missing[first : first + files_at_once]
        windows = torch.cat([group for _, group in files])

        def progress(step: int, steps: int, done: int = done, count: int = len(windows)) -> None:
            ctx.progress("scoring windows", done + count * step // steps, of)

        top = teacher(windows, layout.k, layout.temperature, progress)
        sizes = [len(group) for _, group in files]
        for (file, group), *split in zip(files, *(torch.split(tensor, sizes) for tensor in top), strict=True):
            _write(file, group, TopLogits(*split), layout)
        done += len(windows)
        ctx.progress("scoring windows", done, of)


def _is_whole(file: Path, layout: LogitsFile, windows: int) -> bool:
    """Whether an interrupted attempt got so far: a file has its name only when it is whole."""
    if not file.exists():
        return False
    return {name: (entry.dtype, entry.shape) for name, entry in read_header(file).items()} == layout.tensors(windows)


def _write(file: Path, windows: torch.Tensor, top: TopLogits, layout: LogitsFile) -> None:
    if not (top.logits.isfinite().all() and top.logsumexp.isfinite().all()):
        raise ValueError("the teacher's logits are nan or infinite on the training text; its weights are damaged or its dtype overflows")
    values = {"windows": windows, "ids": top.ids, "logits": top.logits, "logsumexp": top.logsumexp}
    dtypes = {name: DTYPES[dtype] for name, (dtype, _) in layout.tensors(len(windows)).items()}
    partial = file.with_suffix(".partial")
    save_file({name: tensor.to(dtypes[name]).contiguous() for name, tensor in values.items()}, partial)
    with open(partial, "rb") as stream:
        os.fsync(stream.fileno())  # before the rename, or a crash of the machine could leave the name without the content
    partial.rename(file)


def _kept_mass(file: Path, temperature: float) -> float:
    """Sum over the file's tokens of the probability of the words that are kept."""
    stored = load_file(file)
    log_mass = (stored["logits"].float() / temperature).logsumexp(-1) - stored["logsumexp"]
    return float(log_mass.exp().sum(dtype=torch.float64))


class StoredLogits(TensorReader):
    """The logits in a folder that `store_logits` made. Only the rows that are asked for are read.

    CheckpointFileError where files are missing, damaged or others than `logits.json` says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.layout, self.table = folder, LogitsFile.load(folder), {}
        self.starts = [0]  # of each file's windows; the last one is the count of all
        for number, file in enumerate(sorted(folder.glob(SHARDS))):
            header = read_header(file)
            count = header["windows"].shape[0] if "windows" in header else 0
            if {name: (entry.dtype, entry.shape) for name, entry in header.items()} != self.layout.tensors(count):
                raise CheckpointFileError(f"{file} does not hold what {LOGITS_FILE} beside it says; make the logits again")
            self.table |= {f"{number}.{name}": entry for name, entry in header.items()}
            self.starts.append(self.starts[-1] + count)
        if self.starts[-1] != self.layout.num_samples:
            raise CheckpointFileError(
                f"{folder} holds {self.starts[-1]} of {self.layout.num_samples} windows of logits; make the logits again"
            )

    @property
    def nbytes(self) -> int:
        """Of tensor data."""
        return sum(entry.nbytes for entry in self.table.values())

    @cached_property
    def windows(self) -> torch.Tensor:
        """[N, T] int64: the token ids that the teacher read."""
        return torch.cat([self.read(f"{number}.windows") for number in range(len(self.starts) - 1)]).long()

    def batch(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the windows with these numbers: ids [B, T, k] int64, logits [B, T, k] fp32 as the teacher gave them, and
        logsumexp [B, T] fp32 of logits / temperature over the whole vocabulary."""
        places = [self._place(int(index)) for index in indices]
        ids, logits, log_sums = (
            torch.cat([self.read(f"{number}.{name}", rows=(row, row + 1)) for number, row in places])
            for name in ("ids", "logits", "logsumexp")
        )
        return ids.long(), logits.float(), log_sums

    def _place(self, index: int) -> tuple[int, int]:
        """(number of the file, row in it) of a window."""
        if not 0 <= index < self.layout.num_samples:
            raise IndexError(f"window {index} of {self.layout.num_samples}")
        number = bisect_right(self.starts, index) - 1
        return number, index - self.starts[number]
