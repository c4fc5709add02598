"""What an engine loads, as data: `pipeline/engines/*.yaml`, one file for each engine. Here is how such a file is read.

A rule says when it is asked, what must hold then, and the sentence for where it does not:

    - {id: int8_scheme, level: refuse, when: {method: compressed-tensors, format: int-quantized}, must: {act_bits: 8},
       says: "int-quantized weights need 8-bit activations; write format pack-quantized", source: ..., date: 2026-11-01}

`level` is `refuse` (it does not load), `remark` (it loads, and this should be known) or `need` (a package, a GPU). Without `must` the
sentence stands wherever `when` holds. Conditions are mappings of a fact (pipeline/engine_facts.py) to a test, of which all must pass:

    x                      it is x               [x, y]              it is one of them
    {not: x}, {not: [..]}  it is none of them    {listed: name}      it is in that list of the file
    {at_least: n}          n or more             {at_most: n}        n or less
    {multiple_of: n}       n divides it; n may name another fact

and `any: [...]` of conditions, of which one must pass. A fact that is not known passes no `when` and breaks no `must` (a plain value tests
it all the same: `context: null`). A rule that names a fact of a weight scheme is asked of each scheme.
"""

import datetime
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import yaml
from pydantic import model_validator

from pipeline.engine_facts import FACTS, SCHEME_FACTS
from pipeline.layout import Frozen

FOLDER = Path(__file__).parent / "engines"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, faster where libyaml is there
ASKED_OF_SIZES = frozenset({"size", "group_span"})  # what the tests of `split` know besides the facts ...
PLACES = frozenset({"model", "folder", "model_text", "folder_text", "file_text", "flags"})  # ... and the commands (engine_contract.py)
Level = Literal["refuse", "remark", "need"]
Condition = dict[str, Any]


class Rule(Frozen):
    """One row of the table. `source` is where its author read it, `date` when that was published or read."""

    id: str
    level: Level
    when: Condition = {}
    must: Condition | None = None
    says: str
    source: str
    date: datetime.date

    @property
    def each(self) -> bool:
        """Whether it is asked of each weight scheme."""
        return bool((names(self.when) | names(self.must or {}) | fields(self.says)) & SCHEME_FACTS)


class Part(Frozen):
    """A piece of the command line, added where `when` holds."""

    when: Condition = {}
    add: str


class Command(Frozen):
    """The first whose `when` holds is the command. `prepare` are commands to run once before it."""

    when: Condition = {}
    line: str
    prepare: tuple[str, ...] = ()


class Split(Frozen):
    """Over how many GPUs the engine can split a model: the sizes at which every test holds."""

    flag: str
    sizes: tuple[int, ...]
    must: tuple[Condition, ...]


class Engine(Frozen):
    """One file. `version` is the release whose code and documents the rules were read from; `server`: it answers requests."""

    name: str
    version: str
    date: datetime.date
    rank: int  # place in the table
    server: bool = True
    lists: dict[str, tuple[str, ...]] = {}
    commands: tuple[Command, ...]
    flags: tuple[Part, ...] = ()
    limits: tuple[Part, ...] = ()  # of the context: shown by `mode=check`, left to the engine elsewhere
    split: Split | None = None
    rules: tuple[Rule, ...]

    @model_validator(mode="after")
    def _names_are_known(self) -> "Engine":
        """A misspelt fact or list would make a rule that is never asked."""
        sizes = self.split.must if self.split else ()
        rows: list[tuple[str, Condition, frozenset[str]]] = [("split", test, names(test) - ASKED_OF_SIZES) for test in sizes]
        for rule in self.rules:
            rows += [(rule.id, condition, names(condition) | fields(rule.says)) for condition in (rule.when, rule.must or {})]
        for command in self.commands:
            rows += [("commands", command.when, names(command.when) | fields(line) - PLACES) for line in (command.line, *command.prepare)]
        rows += [("flags", part.when, names(part.when) | fields(part.add)) for part in (*self.flags, *self.limits)]
        for where, condition, named in rows:
            unknown = named - FACTS - SCHEME_FACTS
            if unknown:
                raise ValueError(f"{where}: there is no fact {', '.join(sorted(unknown))}")
            missing = {test["listed"] for test in tests(condition) if isinstance(test, dict) and "listed" in test} - set(self.lists)
            if missing:
                raise ValueError(f"{where}: there is no list {', '.join(sorted(missing))}")
        return self

    def holds(self, condition: Condition, facts: Mapping[str, Any], *, unknown: bool) -> bool:
        """Whether `facts` pass every test; one whose fact is not known counts as `unknown`."""
        for name, test in condition.items():
            if name == "any":
                passed: bool | None = any(self.holds(part, facts, unknown=unknown) for part in test)
            else:
                passed = self._passes(test, facts.get(name), facts)
            if not (unknown if passed is None else passed):
                return False
        return True

    def _passes(self, test: Any, value: Any, facts: Mapping[str, Any]) -> bool | None:
        """None: not known."""
        if isinstance(test, list):
            return value in test
        if not isinstance(test, dict):
            return bool(value == test)
        if value is None:
            return None
        ((kind, wanted),) = test.items()
        if kind == "not":
            return value not in wanted if isinstance(wanted, list) else value != wanted
        if kind == "listed":
            return value in self.lists[wanted]
        number = facts.get(wanted) if isinstance(wanted, str) else wanted
        if number is None:
            return None
        match kind:
            case "at_least":
                return bool(value >= number)
            case "at_most":
                return bool(value <= number)
            case "multiple_of":
                return bool(value % number == 0)
        raise ValueError(f"there is no test '{kind}'")


def names(condition: Condition) -> frozenset[str]:
    """The facts that a condition asks for."""
    inner = [names(part) for part in condition.get("any", [])]
    compared = {test["multiple_of"] for test in tests(condition) if isinstance(test, dict) and isinstance(test.get("multiple_of"), str)}
    return frozenset(condition).difference({"any"}).union(compared, *inner)


def fields(text: str) -> frozenset[str]:
    """What stands in braces in a sentence or a command."""
    return frozenset(name for _, name, _, _ in Formatter().parse(text) if name)


def tests(condition: Condition) -> Iterator[Any]:
    for name, test in condition.items():
        if name == "any":
            for part in test:
                yield from tests(part)
        else:
            yield test


@cache
def engines() -> tuple[Engine, ...]:
    """Those of the package, in the order of the table."""
    found = [read_engine(file) for file in sorted(FOLDER.glob("*.yaml"))]
    return tuple(sorted(found, key=lambda engine: engine.rank))


def read_engine(file: Path) -> Engine:
    """ValueError where the file is not as this module says."""
    return Engine.model_validate(yaml.load(file.read_text(encoding="utf-8"), Loader=LOADER))
