"""`mode=check`: which engines load a checkpoint, why not, and with which command line. Read are config.json and headers, no weights.

Exit codes: 0 where at least one engine loads it (remarks included), that of PlanError where none does, that of RecipeError where the
question makes no sense: no `path`, nothing there, a file that cannot be read.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.engine_contract import Answer, answers, model_place
from pipeline.engine_facts import Facts
from pipeline.engine_folder import read_facts
from pipeline.errors import InputProblems, PlanError, RecipeError
from pipeline.recipe import Settings, resolve_path

CHECK_SCHEMA = 1
COLOURS = {"loads": "green", "loads with a remark": "yellow", "does not load": "red"}


def check_checkpoint(settings: Settings, resources: Path) -> dict[str, float]:
    """Print the answers of every engine; returns how many load it. RecipeError and PlanError as the module says."""
    if settings.path is None:
        raise RecipeError("path: which checkpoint is to be checked? write mode=check path=/folder")
    place = resolve_path(settings.path, resources)
    facts = _read(place)
    found = answers(facts, model_place(str(place), facts) if place.is_dir() else str(place))
    loading = sum(answer.loads for answer in found)
    if settings.format == "json":
        print(json.dumps(check_json(place, facts, found), indent=1))
    else:
        print_check(place, facts, found, Console())
    if not loading:
        raise PlanError(f"path: no engine loads {place}; the reasons stand above, each with what to write instead")
    return {"engines": float(loading)}


def _read(place: Path) -> Facts:
    try:
        return read_facts(place)
    except InputProblems as error:
        raise RecipeError(f"path: {problem}" for problem in error.problems) from None
    except FileNotFoundError:
        raise RecipeError(f"path: {place} does not exist") from None
    except OSError as error:
        raise RecipeError(f"path: {place} cannot be read ({error.strerror})") from None
    except ValueError as error:  # CheckpointFileError is one
        raise RecipeError(f"path: {error}") from None


def check_json(place: Path, facts: Facts, found: tuple[Answer, ...]) -> dict[str, object]:
    """For scripts: `facts` as engines see them, and every engine's answer with the source and date of each rule it is made of."""
    return {
        "schema_version": CHECK_SCHEMA,
        "path": str(place),
        "facts": facts.model_dump(mode="json"),
        "engines": [answer.model_dump(mode="json") for answer in found],
    }


def print_check(place: Path, facts: Facts, found: tuple[Answer, ...], console: Console) -> None:
    console.print(f"{place}: {_summary(facts)}\n", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("engine", "version", "verdict", "GPUs"):
        table.add_column(name, no_wrap=True)
    for answer in found:
        sizes = ", ".join(map(str, answer.split_sizes)) if answer.loads else ""
        table.add_row(answer.engine, answer.version, f"[{COLOURS[answer.outcome]}]{answer.outcome}[/]", sizes)
    console.print(table)
    for answer in found:
        console.print("\n" + "\n".join(_lines(answer)), highlight=False, markup=False, soft_wrap=True)


def _lines(answer: Answer) -> Iterator[str]:
    yield answer.engine
    for label, findings in (("why not", answer.reasons), ("needs", answer.needs), ("remark", answer.remarks)):
        yield from (f"  {label:<8} {finding.says}" for finding in findings)
    yield from (f"  {'first':<8} {command}" for command in answer.prepare)
    if answer.command:
        yield f"  {'command':<8} {answer.command}"
    more = [size for size in answer.split_sizes if size > 1] if answer.loads else []
    if more:
        yield f"  {'GPUs':<8} {answer.split_flag} {' or '.join(map(str, more))}"


def _summary(facts: Facts) -> str:
    """`LlamaForCausalLM, compressed-tensors 4-bit int in groups of 128 (pack-quantized), INT8 cache per_token_head`."""
    weights = [
        " ".join(
            str(part)
            for part in (
                f"{scheme.num_bits}-bit" if scheme.num_bits else "",
                scheme.type or "",
                f"in groups of {scheme.group_size}" if scheme.group_size and scheme.group_size > 0 else "",
                f"({scheme.format})" if scheme.format else "",
            )
            if part
        )
        for scheme in facts.schemes
    ]
    parts = [
        facts.architecture or facts.model_type or facts.stored,
        f"adapter of rank {facts.rank}" if facts.rank else "",
        f"{facts.method} {' and '.join(weights)}".strip() if facts.method else (facts.dtype or ""),
        f"INT8 cache {facts.cache}" if facts.cache else "",
        "no safetensors headers: the sizes of its tensors were not checked" if facts.stored in ("config", "pickle") else "",
    ]
    return ", ".join(part for part in parts if part)
