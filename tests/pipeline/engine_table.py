"""The table of docs/engines.md, from the rules. `python -m tests.pipeline.engine_table` writes it there."""

from pathlib import Path

from pipeline.engine_rules import Engine, engines

DOCUMENT = Path(__file__).parents[2] / "docs" / "engines.md"
BEGIN, END = "<!-- rules: written by tests/pipeline/engine_table.py -->", "<!-- end of rules -->"


def table() -> str:
    return "\n".join(_engine(engine) for engine in engines())


def _engine(engine: Engine) -> str:
    rows = [f"| `{rule.id}` | {rule.level} | {rule.says} | {rule.source} | {rule.date} |" for rule in engine.rules]
    head = [f"## {engine.name} ({engine.version})", "", "| rule | level | what is said | source | date |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def written(text: str) -> str:
    """The document with its table as the rules are now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
