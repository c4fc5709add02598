"""Three tasks for the small model, as ordinary task files of lm-evaluation-harness, from the held-out modules alone.

    python assets/make_tasks.py             # writes assets/tasks/, the same bytes every time

next_line        which of four lines of the file comes next; the others stand elsewhere in it, indented alike and about as long
bracket_close    how two or more open brackets are closed before the line goes on: as it was, with one too few, one too many, or of
                 another kind
python_validity  write the body of a function from what stands before it, its signature and its docstring: at least three statements,
                 as the function's own body has

Everything is drawn by sha256 of where it stands, so nothing depends on a seed, an order or a Python release. Prompts are the
`CONTEXT` characters before the place in question (`SHORT_CONTEXT` where text is generated), from the start of a line.
"""

import argparse
import ast
import hashlib
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CONTEXT = 800  # characters: about 240 tokens of the small model, which reads 512
SHORT_CONTEXT = 500  # where text is generated
MIN_CONTEXT = 200
MIN_LINE = 12  # characters of a line in question, without its indentation
NEXT_LINE_ITEMS, MAX_PER_MODULE = 300, 8
MAX_REST = 40  # characters of a line after its brackets
MIN_STATEMENTS = 3
NEW_TOKENS = 96
CLOSERS = {"(": ")", "[": "]", "{": "}"}

CHOICE = {"output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "answer"}
ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
FIELDS: dict[str, dict[str, Any]] = {
    "next_line": CHOICE | {"metric_list": ACCURACY},
    "bracket_close": CHOICE | {"metric_list": ACCURACY},
    "python_validity": {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "function",
        "generation_kwargs": {"until": ["\ndef ", "\nclass ", "\n@"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "python_validity", "min_statements": MIN_STATEMENTS, "aggregation": "mean", "higher_is_better": True}],
    },
}

Item = dict[str, Any]


def draw(*where: object) -> int:
    return int(hashlib.sha256("\0".join(map(str, where)).encode()).hexdigest(), 16)


def before(text: str, end: int, length: int = CONTEXT) -> str:
    """At most `length` characters of `text` before `end`, from the start of a line; nothing where these are fewer than MIN_CONTEXT."""
    start = max(0, end - length)
    if start:
        start = text.find("\n", start, end) + 1
    found = text[start:end]
    return found if len(found) >= MIN_CONTEXT else ""


def line_starts(text: str) -> list[int]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def choice_item(name: str, prompt: str, right: str, *wrong: str) -> Item:
    choices = sorted([right, *wrong], key=lambda choice: draw("order", name, choice))
    return {"id": name, "prompt": prompt, "choices": choices, "answer": choices.index(right)}


def next_lines(module: str, text: str) -> Iterator[Item]:
    lines, starts = text.splitlines(keepends=True)[:-1], line_starts(text)  # the last may be cut
    found = []
    for number, line in enumerate(lines):
        prompt = before(text, starts[number])
        if not prompt or len(line.strip()) < MIN_LINE:
            continue
        name, seen = f"{module}:{number + 1}", {line.strip(), *(other.strip() for other in prompt.splitlines())}
        others = {other.strip(): other for other in lines if alike(other, line) and other.strip() not in seen}
        wrong = sorted(others.values(), key=lambda other: (abs(len(other) - len(line)), draw(name, other)))[:3]
        if len(wrong) == 3:
            found.append(choice_item(name, prompt, line, *wrong))
    yield from sorted(found, key=lambda item: draw(item["id"]))[:MAX_PER_MODULE]


def alike(other: str, line: str) -> bool:
    """Indented alike, and of about the same length, which a sum over tokens would else go by."""
    return margin(other) == margin(line) and 0.8 < len(other.strip()) / len(line.strip()) < 1.25


def margin(line: str) -> int:
    return len(line) - len(line.lstrip())


def tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    """Up to where the text, which may be cut, is no Python any more; without what is inside f-strings, which Python reads from 3.12 on."""
    depth = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = tokenize.tok_name[token.type]
            depth += kind == "FSTRING_START"
            if depth == 0:
                yield token
            depth -= kind == "FSTRING_END"
    except (tokenize.TokenError, SyntaxError):
        return


def closing_brackets(module: str, text: str) -> Iterator[Item]:
    starts, stack, run = line_starts(text), [], []
    for token in tokens(text):
        joined = run and token.start == run[-1].end and token.string in CLOSERS.values()
        if not joined:
            if len(run) > 1:
                yield from bracket_item(module, text, starts, run)
            run = []
        if token.type == tokenize.OP and token.string in CLOSERS:
            stack.append(token.string)
        elif token.type == tokenize.OP and token.string in CLOSERS.values() and stack:
            stack.pop()
            run.append(token)


def bracket_item(module: str, text: str, starts: list[int], run: list[tokenize.TokenInfo]) -> Iterator[Item]:
    """Choices begin with what stands before the brackets without a space: tokenizers may join it with them."""
    (row, column), right = run[0].start, "".join(token.string for token in run)
    end = starts[row - 1] + column
    rest, start = text[end + len(right) : starts[row]], end
    while start and not (text[start - 1].isalnum() or text[start - 1].isspace() or text[start - 1] == "_"):
        start -= 1
    prompt = before(text, start)
    if not prompt or len(rest) > MAX_REST or not rest.endswith("\n"):
        return
    name = f"{module}:{row}:{column}"
    kinds = sorted(set(CLOSERS.values()) - {right[0]}, key=lambda kind: draw(name, kind))
    closings = [right, right[:-1], right + right[-1], kinds[0] + right[1:]]
    yield choice_item(name, prompt, *(text[start:end] + closing + rest for closing in closings))


def functions(module: str, text: str) -> Iterator[Item]:
    starts = line_starts(text)
    for node in ast.walk(whole_part(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        statements = sum(isinstance(inner, ast.stmt) for outer in body for inner in ast.walk(outer))
        if statements < MIN_STATEMENTS or goes_on(text[starts[node.end_lineno or 0] :], margin(text[starts[node.lineno - 1] :])):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        inside = min([body[0].lineno, *(decorator.lineno for decorator in getattr(body[0], "decorator_list", []))])
        start = starts[first - 1]
        head = text[start : starts[inside - 1]].rstrip() + "\n"
        prompt = before(text, start + len(head), SHORT_CONTEXT)
        if inside > node.lineno and len(prompt) > len(head) and is_start(head):
            yield {"id": f"{module}:{node.lineno}", "prompt": prompt, "function": head}


def goes_on(rest: str, indentation: int) -> bool:
    """Whether a function is cut: the text after it is still inside."""
    following = next((line for line in rest.splitlines() if line.strip()), "")
    return margin(following) > indentation


def is_start(head: str) -> bool:
    """Whether a body can follow: not where a comment stands in between."""
    try:
        ast.parse(textwrap.dedent(head + " " * (margin(head) + 4) + "pass"))
    except SyntaxError:
        return False
    return head.endswith((":\n", '"\n', "'\n"))


def whole_part(text: str) -> ast.Module:
    """Of a module that was cut: its statements up to the last whole one."""
    lines = text.splitlines(keepends=True)
    for end in range(len(lines), 0, -1):
        try:
            return ast.parse("".join(lines[:end]))
        except SyntaxError:
            continue
    return ast.Module([], [])


def build(documents: list[tuple[str, str]]) -> dict[str, list[Item]]:
    lines = [item for module, text in documents for item in next_lines(module, text)]
    return {
        "next_line": sorted(lines, key=lambda item: draw(item["id"]))[:NEXT_LINE_ITEMS],
        "bracket_close": [item for module, text in documents for item in closing_brackets(module, text)],
        "python_validity": [item for module, text in documents for item in functions(module, text)],
    }


def task_file(name: str) -> str:
    head = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test"}
    tail = {"target_delimiter": "", "num_fewshot": 0, "metadata": {"version": 1}}
    return yaml.safe_dump(head | FIELDS[name] | tail, sort_keys=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "tasks")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (HERE / "data/eval.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, items in build([(row["id"], row["text"]) for row in rows]).items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        (out / f"{name}.yaml").write_text(task_file(name), encoding="utf-8")
        print(f"{name}: {len(items)} items of {len({item['id'].partition(':')[0] for item in items})} modules")


if __name__ == "__main__":
    main()
