"""A TAB, answered from what Hydra said before: the candidates for the last word of a command line, the same that Hydra gives.

    run recipe=qu            ->  recipe=quickstart
    run recipe=quickstart stages.quantize.gr     ->  stages.quantize.group_size=

Two things are remembered (pipeline/learned.py): which groups there are with their choices, and, for the choices that a line makes, the keys
and values of the config. Setting a value changes no key, so that one config serves a line however many values it sets. What is written
in another way than these, such as a list, a resolver or Hydra's own settings, is asked of Hydra each time: `answer` is then None.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.learned import Learned

FLAGS = ("-sc", "--shell-completion")
SHELLS = {"query=bash": " ", "query=zsh": " ", "query=fish": "\n"}  # with what candidates are told apart
MULTIRUN = ("-m", "--multirun")
APPLICATION = re.compile(r"^\s*[\w_\-=\./]+\s*(.*)")
PYTHON = re.compile(r"^\s*[\w\/]*python[3]?\s*[\w/\.]*\s*(.*)")
WORD = re.compile(r"[+~]?[\w@-]*(?:[./][\w@-]+)*[./]?(?:=[\w./-]*)?", re.ASCII)
VALUE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=([\w/-][\w./+-]*)", re.ASCII)  # sets one value that is there already
PLACE = (".", "/", "\\")  # what a file's name begins with

Groups = Mapping[str, Mapping[str, Sequence[str]]]  # `configs` and `groups` in each, "" being the root
Tree = Any  # {"keys": {name: Tree}}, {"items": [Tree]} or {"value": ...}; {"ask": "." or "="}, its mark, where Hydra is to be asked


@dataclass(frozen=True)
class Line:
    """What is to be completed, and the words before it."""

    words: tuple[str, ...]
    word: str
    multirun: bool


def is_query(arguments: Sequence[str]) -> bool:
    return len(arguments) == 2 and arguments[0] in FLAGS and arguments[1] in SHELLS and "COMP_LINE" in os.environ


def answer(arguments: Sequence[str], known: "Known | None" = None) -> str | None:
    """What the shell is to be told, from what is `known` or else remembered. None: Hydra has to be asked."""
    line = read_line(os.environ["COMP_LINE"])
    found = None if line is None else _candidates(line, known)
    return None if found is None else SHELLS[arguments[1]].join(sorted(set(found)))


def read_line(text: str) -> Line | None:
    """None for a line with other flags than that of a sweep."""
    begun = PYTHON.match(text) or APPLICATION.match(text)
    rest = begun.group(1) if begun else ""
    words = rest.split()
    multirun = bool(words) and (words[0] in MULTIRUN or words[-1] in MULTIRUN)
    if multirun:
        words = words[1:] if words[0] in MULTIRUN else words[:-1]
    if not begun or any(word.startswith("-") for word in words):
        return None
    if not words or rest[-1] == " ":
        return Line(tuple(words), "", multirun)
    return Line(tuple(words[:-1]), words[-1], multirun)


def learned_groups() -> Learned:
    return Learned("completion", ["groups"])


def learned_tree(words: Sequence[str], multirun: bool) -> Learned:
    return Learned("completion", ["keys", "-m" if multirun else "", *words])


@dataclass(frozen=True)
class Known:
    """What one line can be completed by. `root` None: what it chooses makes no config."""

    groups: Groups
    root: Tree | None


def remembered(line: Line) -> Known | None:
    groups = learned_groups().recall()
    if groups is None:
        return None
    tree = learned_tree(choices(line, groups), line.multirun).recall()
    return None if tree is None else Known(groups, tree["root"])


def choices(line: Line, groups: Groups) -> tuple[str, ...]:
    """The words that decide which keys there are: all but those that set a value."""
    return tuple(word for word in line.words if not _sets_value(word, groups) or word.partition("=")[0] == line.word.rstrip(".="))


def _sets_value(word: str, groups: Groups) -> bool:
    found = VALUE.fullmatch(word)
    return found is not None and found.group(1) not in groups


def _candidates(line: Line, known: Known | None) -> list[str] | None:
    key, equals, value = line.word.rpartition("=")
    if equals and value.startswith(PLACE):
        return [f"{key}={file}" for file in _files(value)]
    if not WORD.fullmatch(line.word) or line.word.startswith((".", "=")):
        return None
    known = known or remembered(line)
    if known is None or not _fits(line, known):
        return None
    chosen, exact = _groups(line.word, known.groups)
    if exact or known.root is None:  # without a config there are no keys
        return chosen
    keys = _keys(known.root, line.word)
    return None if keys is None else chosen + keys


def _fits(line: Line, known: Known) -> bool:
    """Whether every value that the line sets is there to be set, so that Hydra would compose the config."""
    paths = [word.partition("=")[0] for word in line.words if _sets_value(word, known.groups)]
    return known.root is None or all("value" in (_at(known.root, path) or {}) for path in paths)


def _files(start: str) -> list[str]:
    folder, begun = (start, "") if os.path.isdir(start) else os.path.split(start)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if name.startswith(begun)]


def _groups(word: str, groups: Groups) -> tuple[list[str], bool]:
    """Groups and choices that begin so, and whether the word names a group whose choices these are."""
    sign = word[:1] if word.startswith(("+", "~")) else ""
    word = word[len(sign) :]
    named, equals, _ = word.rpartition("=")
    if equals:
        configs = groups.get(named, {}).get("configs", ())
        return [f"{sign}{named}={config}" for config in configs if f"{named}={config}".startswith(word)], bool(configs)
    parent = word.rpartition("/")[0]
    names = [f"{parent}/{name}" if parent else name for name in groups.get(parent, {}).get("groups", ())]
    return [f"{sign}{name}{_ending(groups[name], sign)}" for name in names if name.startswith(word)], False


def _ending(group: Mapping[str, Sequence[str]], sign: str) -> str:
    if group["configs"]:
        return "=" if not group["groups"] and sign != "~" else ""
    return "/" if group["groups"] else ""


def _keys(root: Tree, word: str) -> list[str] | None:
    """Keys of the config that begin so, or the value of the one that is named. None: it has to be composed to be known."""
    if word.endswith((".", "=")):
        place = _at(root, word[:-1])
        if place is not None and "ask" in place:
            return None
        if place is None or "value" in place:
            return [] if place is None or place["value"] is None else [f"{word}{_shown(place['value'])}"]
        return [f"{word}{name}" for name in _names(place)]
    base, dot, begun = word.rpartition(".")
    place = _at(root, base) if dot else root
    if place is None:
        return []
    if "ask" in place or "value" in place:
        return None
    return [f"{base}{dot}{name}" for name in _names(place) if name.startswith(begun)]


def _at(root: Tree, path: str) -> Tree | None:
    """None where nothing is."""
    place = root
    for part in path.split("."):
        if "keys" in place and part in place["keys"]:
            place = place["keys"][part]
        elif "items" in place and part.isdigit() and int(part) < len(place["items"]):
            place = place["items"][int(part)]
        else:
            return place if "ask" in place else None
    return place


def _names(place: Tree) -> list[str]:
    inside = place["keys"].items() if "keys" in place else enumerate(place["items"])
    return [f"{name}{found.get('ask', '=' if 'value' in found else '.')}" for name, found in inside]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
