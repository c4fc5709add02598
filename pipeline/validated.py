"""Content held against a pydantic model, its problems as this project's sentences."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import did_you_mean

Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], content: Any, where: str, problems: list[str]) -> Model | None:
    """One pydantic model, or None after noting each of its problems as `where.field: what; what instead`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        for row in error.errors(include_url=False):
            spot = ".".join(part for part in (where, *map(str, row["loc"])) if part)
            message = row["msg"].removeprefix("Value error, ")
            if row["type"] == "extra_forbidden":
                message = f"there is no such parameter{did_you_mean(str(row['loc'][-1]), kind.model_fields)}"
                message += "" if message.endswith("?") else f"; remove it (on the command line: ~{spot})"
            elif row["type"] == "model_type":
                message = f"{row['input']!r} does not fit; a mapping of names to values is needed"
            elif row["type"] == "missing":
                message = "a value is needed"
            elif row["loc"] and row["loc"][-1] != "uri":  # whose value may hold a password
                message = f"{row['input']!r} does not fit; {message[0].lower()}{message[1:]}"
            problems.append(f"{spot or 'recipe'}: {message}")
        return None
