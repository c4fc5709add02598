"""Does an engine load a checkpoint, why not, and with which command line? Its rules (engine_rules.py) asked of facts (engine_facts.py)."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.engine_facts import Facts, Scheme
from pipeline.engine_rules import Engine, Part, Rule, engines
from pipeline.layout import Frozen

Outcome = Literal["loads", "loads with a remark", "does not load"]


class Finding(Frozen):
    """A rule's sentence about this checkpoint, and where the rule is from."""

    rule: str
    says: str
    source: str
    date: str


class Answer(Frozen):
    """One engine's. `command` is empty where it does not load the checkpoint; `prepare` is to be run once before it."""

    engine: str
    version: str
    outcome: Outcome
    prepare: tuple[str, ...] = ()
    command: str = ""
    split_flag: str = ""
    split_sizes: tuple[int, ...] = ()
    reasons: tuple[Finding, ...] = ()
    remarks: tuple[Finding, ...] = ()
    needs: tuple[Finding, ...] = ()

    @property
    def loads(self) -> bool:
        return self.outcome != "does not load"


def answers(facts: Facts, model: str, *, template: bool = False) -> tuple[Answer, ...]:
    """Every engine's. `model` is the folder or file, quoted in commands where a shell wants that.

    `template`: it is a placeholder that is filled in later, so nothing is quoted, and the context is left to the engine.
    """
    return tuple(answer(engine, facts, model, template=template) for engine in engines())


def answer(engine: Engine, facts: Facts, model: str, *, template: bool = False) -> Answer:
    found: dict[str, list[Finding]] = {"refuse": [], "remark": [], "need": []}
    for rule in engine.rules:
        says = list(dict.fromkeys(_says(engine, rule, facts)))
        found[rule.level] += [Finding(rule=rule.id, says=line, source=rule.source, date=rule.date.isoformat()) for line in says]
    reasons, remarks, needs = (tuple(found[level]) for level in ("refuse", "remark", "need"))
    if reasons:
        return Answer(engine=engine.name, version=engine.version, outcome="does not load", reasons=reasons)
    prepare, command = _command(engine, facts, model, template)
    return Answer(
        engine=engine.name,
        version=engine.version,
        outcome="loads with a remark" if remarks else "loads",
        prepare=prepare,
        command=command,
        split_flag=engine.split.flag if engine.split else "",
        split_sizes=_sizes(engine, facts),
        remarks=remarks,
        needs=needs,
    )


def _says(engine: Engine, rule: Rule, facts: Facts) -> Iterator[str]:
    """The sentence, for each scheme that breaks the rule."""
    rows = [scheme.model_dump() for scheme in facts.schemes] if rule.each else [{}]
    for row in rows:
        known = {**facts.values(), **row}
        asked = engine.holds(rule.when, known, unknown=False)
        if asked and (rule.must is None or not engine.holds(rule.must, known, unknown=True)):
            yield rule.says.format_map(known)


def _command(engine: Engine, facts: Facts, model: str, template: bool) -> tuple[tuple[str, ...], str]:
    """What is to run once before, and the command line."""
    known = {**Scheme().model_dump(), **(facts.schemes[0].model_dump() if facts.schemes else {}), **facts.values()}
    chosen = next(command for command in engine.commands if engine.holds(command.when, known, unknown=False))
    flags = _parts(engine, engine.flags, known) + ("" if template else _parts(engine, engine.limits, known))
    folder = str(Path(model).parent) if facts.file else model
    quote = str if template else shlex.quote
    texts = {"model_text": repr(model), "folder_text": repr(folder), "file_text": repr(facts.file)}
    named = {name: quote(value) for name, value in {**known, "model": model, "folder": folder}.items() if isinstance(value, str)}
    fields = {**known, **named, **texts, "flags": flags}
    return tuple(line.format_map(fields) for line in chosen.prepare), chosen.line.format_map(fields)


def _parts(engine: Engine, parts: tuple[Part, ...], known: Mapping[str, Any]) -> str:
    return "".join(part.add.format_map(known) for part in parts if engine.holds(part.when, known, unknown=False))


def _sizes(engine: Engine, facts: Facts) -> tuple[int, ...]:
    """Over how many GPUs it can be split: the sizes at which every test holds for every scheme."""
    split = engine.split
    if split is None:
        return ()
    schemes = facts.schemes or (Scheme(),)
    return tuple(
        size
        for size in split.sizes
        if all(engine.holds(test, _at(facts, scheme, size), unknown=True) for test in split.must for scheme in schemes)
    )


def _at(facts: Facts, scheme: Scheme, size: int) -> dict[str, Any]:
    """`group_span`: a width that is a multiple of it is cut into `size` parts of whole groups."""
    group = scheme.group_size if scheme.group_size and scheme.group_size > 0 else 1
    return {**facts.values(), **scheme.model_dump(), "size": size, "group_span": size * group}


def model_place(folder: str, facts: Facts) -> str:
    """What a command names: the folder, or the GGUF file in it."""
    return f"{folder}/{facts.file}" if facts.file else folder
