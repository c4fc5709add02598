"""A split of a hub dataset as an ordinary jsonl file: found at its commit, fetched once, kept below the outputs folder.

    datasets/<name>-<digest12>/data.jsonl     what stages read (pipeline/documents.py)
    datasets/<name>-<digest12>/source.json    the `HubSplit` that it holds; a folder appears whole, by one rename

The folder is named for everything that decides the rows, so that another commit is another folder. Where the hub does not answer,
what was fetched of that revision is used, at its recorded commit. The hub's own look-up order finds the token; it is never read here.
"""

import errno
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.artifact_spec import DataFormat
from pipeline.documents import is_conversation
from pipeline.errors import RecipeError
from pipeline.identity import digest
from pipeline.layout import Frozen
from pipeline.recipe import SplitSource

ROWS, RECORD = "data.jsonl", "source.json"
SHORT = 12
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class HubSplit(Frozen):
    """What decides the rows of an export. `revision` is as the recipe wrote it, and does not."""

    hub: str
    config: str | None
    split: str
    column: str
    format: DataFormat
    commit: str
    revision: str

    def folder(self, cache: Path) -> Path:
        key = digest("hub data", self.model_dump(mode="json", exclude={"revision"}))
        return cache / f"{self.hub.rpartition('/')[2]}-{key[:SHORT]}"

    def is_of(self, source: SplitSource) -> bool:
        """Whether it is what the recipe asks for, of any commit that its revision has had."""
        same = (self.hub, self.config, self.split, self.column, self.format) == _wanted(source)
        return same and source.revision in (self.revision, self.commit)

    def __str__(self) -> str:
        config = f", config {self.config}" if self.config else ""
        return f"{self.hub}{config}, split {self.split}, column {self.column}, commit {self.commit}"


def find_hub_split(source: SplitSource, cache: Path, where: str) -> tuple[HubSplit, int]:
    """The split at its commit, and what the hub says of its bytes: 0 where it was not asked. RecipeError where it cannot be had."""
    import httpx  # with the hub's client 0.3 s, and only hub data needs them
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    assert source.hub
    kept = [found for found in _exports(cache) if found.is_of(source)]
    exact = next((found for found in kept if found.commit == source.revision), None)
    if exact:  # a commit never changes
        return exact, 0
    try:
        info = HfApi().dataset_info(source.hub, revision=source.revision, files_metadata=True)
    except (httpx.TransportError, ConnectionError) as error:
        if not kept:
            raise _unavailable(source, where, error) from None
        return kept[0], 0
    except (OSError, httpx.HTTPError, HfHubHTTPError, HFValidationError) as error:
        raise _unavailable(source, where, error) from None
    hub, config, split, column, form = _wanted(source)
    found = HubSplit(
        hub=hub, config=config, split=split, column=column, format=form, commit=info.sha or source.revision, revision=source.revision
    )
    return found, _stated_bytes(info, source)


def exported(found: HubSplit, cache: Path) -> Path | None:
    """The file of an earlier export."""
    file = found.folder(cache) / ROWS
    return file if file.is_file() else None


def export(found: HubSplit, source: SplitSource, cache: Path, where: str) -> Path:
    """Fetch the split and write it as a jsonl file. RecipeError: it cannot be had, or a row is no document."""
    from datasets.exceptions import DatasetsError  # two seconds, once for each dataset

    folder = found.folder(cache)
    scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        with open(scratch / ROWS, "w", encoding="utf-8", newline="\n") as stream:
            for row in _samples(_load(found), found):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        (scratch / RECORD).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
        try:
            scratch.rename(folder)
        except OSError:
            if exported(found, cache) is None:
                raise
    except _Row as error:
        raise RecipeError(f"{where}: {error}") from None
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise RecipeError(f"{where}: {cache} cannot be written ({error.strerror}); choose another folder with outputs=...") from None
        raise _unavailable(source, where, error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder / ROWS


class _Row(ValueError):
    """A row, or all of them, that are not what the recipe says."""


def _load(found: HubSplit) -> Any:
    """The rows, as a `datasets.Dataset`. ValueError where a local folder would be read in the hub's place."""
    import datasets

    if Path(found.hub).exists():
        raise _Row(f"a file or folder `{found.hub}` stands in this folder and would be read in the hub's place; run llmpress elsewhere")
    return datasets.load_dataset(found.hub, name=found.config, split=found.split, revision=found.commit)


def _samples(rows: Any, found: HubSplit) -> Iterator[dict[str, Any]]:
    """`{"id", "text" or "messages"}` of each row."""
    names: list[str] = rows.column_names
    if found.column not in names:
        raise _Row(f"{found.hub} has no column `{found.column}`; write column: {' or '.join(names)}")
    wanted = "text that is a string" if found.format == "text" else 'list of objects whose "role" and "content" are strings'
    for number, row in enumerate(rows.select_columns(sorted({found.column, "id"} & set(names))), 1):
        value = row[found.column]
        if not (isinstance(value, str) if found.format == "text" else is_conversation(value)):
            raise _Row(f"row {number} of {found.hub} has in its column `{found.column}` no {wanted}; write another column or format")
        name = row.get("id") if found.column != "id" else None
        yield {"id": str(number if name is None else name), found.format: value}


def _wanted(source: SplitSource) -> tuple[str, str | None, str, str, DataFormat]:
    assert source.hub
    return source.hub, source.config, source.split, source.column or source.format, source.format


def _exports(cache: Path) -> list[HubSplit]:
    """What was fetched before, the latest first."""
    found = []
    for record in sorted(cache.glob(f"*/{RECORD}"), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            found.append(HubSplit.model_validate_json(record.read_bytes()))
        except ValidationError:  # damaged, or of another version: it is fetched again
            continue
    return [split for split in found if exported(split, cache)]


def _stated_bytes(info: Any, source: SplitSource) -> int:
    """Of the split, as the dataset's card has it; of all its files where the card says nothing."""
    card = (info.card_data.to_dict() if info.card_data else {}).get("dataset_info") or []
    for entry in card if isinstance(card, list) else [card]:
        if entry.get("config_name", "default") in (source.config or "default", source.config):
            for split in entry.get("splits") or []:
                if split.get("name") == source.split.partition("[")[0] and isinstance(split.get("num_bytes"), int):
                    return int(split["num_bytes"])
    return sum(file.size or 0 for file in info.siblings or [])


def _unavailable(source: SplitSource, where: str, error: Exception) -> RecipeError:
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    config = f" ({source.config})" if source.config else ""
    return RecipeError(
        f"{where}.hub: split '{source.split}' of '{source.hub}'{config} at revision '{source.revision}' cannot be had from the hub "
        f"({reason}); check the names and your access, or give {where}.path=/file.jsonl"
    )
