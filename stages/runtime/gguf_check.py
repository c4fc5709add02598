"""What a GGUF file must prove before it is published: it holds what was planned, and llama.cpp reads text with it as transformers does."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.gguf_file import read_gguf
from pipeline.spec import ModelSpec
from stages.runtime.gguf_names import gguf_name
from stages.runtime.gguf_tokenizer import tokenizer_kind
from stages.runtime.text import load_tokenizer

PROBLEMS_SHOWN = 5
WORDS = 64  # of the vocabulary, in one text
# Places where pre-tokenizers differ: contractions, digits, runs of spaces and line ends, scripts, emoji, punctuation.
HARD_PLACES = (
    "I'm sure they'll say IT'S what we'd've done; 'tis DON'T.",
    "1 12 123 1234 12345 1,234,567.89 0x1F 3rd 10e-5 v2.0.1",
    "a  b   c    d\te\t\tf \t g\n\nh\r\ni \n j\n   k  \n\n\n l ",
    "   leading and trailing   ",
    "def f(x):\n    return x**2 + _y[0] if x != None else {}\n\t# done\n",
    "caf\u00e9 na\u00efve \u00dcber \u0159e\u010d \u043f\u0440\u0438\u0432\u0435\u0442 \u03b3\u03b5\u03b9\u03ac",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f680\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2603\ufe0f \u00bd \u00b2 \u2014 \u2026 \u00a0 \u2003 x",
    "https://example.org/a_b-c?d=e&f=%20#g <tag attr=\"v\"/> $9.99 50% @me #1 ~/x\\y",
    "......!!!!????----____====****((()))[[]]{{}}",
)  # fmt: skip


def check_file(file: Path, spec: ModelSpec) -> None:
    """ValueError says how names, types, shapes or bytes depart from `spec`."""
    found = {name: (tensor.type, tensor.shape) for name, tensor in read_gguf(file).tensors.items()}
    expected = {gguf_name(name): entry for name, entry in spec.tensors().items()}
    problems = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if problems:
        more = f" and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise ValueError(f"the GGUF file is not what was planned: {'; '.join(problems[:PROBLEMS_SHOWN])}{more}")


def check_reading(file: Path, tokenizer_folder: Path) -> str:
    """A sentence that says how many tokens llama.cpp and transformers read alike. ValueError where they do not; that they could not be
    compared is the sentence where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "not opened by llama.cpp: llama-cpp-python is not installed; pip install 'llmpress[gguf]' to have exports checked"
    from stages.runtime.llama_cpp_engine import LlamaModel, check_tokens

    tokenizer = load_tokenizer(tokenizer_folder)
    with LlamaModel(file, vocabulary_only=True) as model:
        count = check_tokens(model, tokenizer, probe_texts(tokenizer))
    alike = f"llama.cpp and transformers read {count:,} tokens of hard places and of the vocabulary alike"
    if not tokenizer_kind(json.loads(tokenizer.backend_tokenizer.to_str())).metaspace:
        return alike
    return f"{alike}; before text that begins with a space, or follows a special token, llama.cpp puts a space and transformers does not"


def probe_texts(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """(name, text): the hard places, then every word of the vocabulary that is text by itself, many at a time."""
    for number, text in enumerate(HARD_PLACES, 1):
        yield f"hard place {number}", text
    special = set(tokenizer.all_special_ids)
    decoded = (tokenizer.decode([number]) for number in range(len(tokenizer)) if number not in special)
    words = [word for word in decoded if "\ufffd" not in word]
    for first in range(0, len(words), WORDS):
        yield f"words {first} to {first + WORDS} of the vocabulary", " ".join(words[first : first + WORDS])
