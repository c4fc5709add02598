"""Which of llama.cpp's tokenizers reads text as a `tokenizer.json` says: told from its content, so that a plan refuses what none does.

llama.cpp has its own code for the expressions that cut text into words, and a file only names one (`tokenizer.ggml.pre`). A wrong name
costs quality and says nothing. So the name is looked up by the very expressions, never by a hash of known models; what is not listed is
refused. Two kinds are written: byte-level BPE (`gpt2` there), and BPE over characters that falls back to bytes (`llama`, SentencePiece's).

Names and what they do: llama-vocab.cpp of llama.cpp, as built into llama-cpp-python 0.3.36. It applies no Unicode normalization: text that
is not NFC is read differently by a model whose tokenizer normalizes it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTRACTIONS, LAST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + LAST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + LAST
GPT2 = "ByteLevel"  # what this pre-tokenizer of Hugging Face does by itself
DIGITS = "Digits"  # each digit alone, before that
# (how words are cut, whether a whole word that is a token is taken without merging) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",  # the same expression, but always merging
    ((QWEN2,), False): "qwen2",
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
}
SPACE = "\u2581"  # SentencePiece's
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NO_MERGE = -1e6  # score of a token that no merge makes: below that of all that one makes
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_TOKEN = 1, 2, 3, 4, 5, 6  # llama.cpp's token types


@dataclass(frozen=True)
class TokenizerKind:
    """`model` and `pre` as llama.cpp names them. `space_prefix`: whether text gets a space in front (SentencePiece's kind).

    `metaspace`: Hugging Face puts none before text that begins with one, and none behind a special token, where llama.cpp does.
    """

    model: str
    pre: str
    space_prefix: bool = False
    metaspace: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """One entry for each id. `scores` order the merges of SentencePiece's kind, `merges` those of byte-level BPE."""

    tokens: list[bytes]
    types: list[int]
    scores: list[float]
    merges: list[str]


def tokenizer_kind(content: Mapping[str, Any]) -> TokenizerKind:
    """Of the content of a tokenizer.json. ValueError: why llama.cpp cannot read text as it does."""
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"its tokenizer is of type {model.get('type')}, and only BPE is written to GGUF")
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if odd:
        raise ValueError(f"its tokenizer has a {odd[0]}, which llama.cpp does not know")
    return _sentencepiece(content) if model.get("byte_fallback") else _byte_level(content)


def _byte_level(content: Mapping[str, Any]) -> TokenizerKind:
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise ValueError(f"its tokenizer normalizes text ({step['type']}), which llama.cpp does not")
    cuts: list[str] = []
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Isolated", "invert": False}:
                cuts.append(expression)
            case {"type": "Digits", "individual_digits": True}:
                cuts.append(DIGITS)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                cuts += [GPT2] if step.get("use_regex", True) else []
            case _:
                cuts.append(", ".join([str(step["type"]), *(f"{name}={value}" for name, value in step.items() if name != "type")]))
    ignore_merges = bool(content["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((tuple(cuts), ignore_merges))
    if name is None:
        merging = "with" if ignore_merges else "without"
        raise ValueError(
            f"its pre-tokenizer ({' then '.join(cuts) or 'none'}, {merging} ignore_merges) is none that llama.cpp is known to have; "
            f"known are: {', '.join(sorted(PRE_TOKENIZERS.values()))}"
        )
    return TokenizerKind("gpt2", name)


def _sentencepiece(content: Mapping[str, Any]) -> TokenizerKind:
    """Spaces become SPACE; one may be put in front of the text."""
    vocabulary, prefix, replaces, metaspace = content["model"]["vocab"], False, False, False
    if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        raise ValueError("its tokenizer falls back to bytes and has no token for each of them, which llama.cpp needs")
    if content["model"].get("unk_token") is None:
        raise ValueError("its tokenizer falls back to bytes and has no unknown token, which llama.cpp needs")
    steps = [*_steps(content.get("normalizer"), "normalizers"), *_steps(content.get("pre_tokenizer"), "pretokenizers")]
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                replaces = True
            case {"type": "Metaspace", "replacement": "\u2581", "split": False}:
                metaspace, replaces = step.get("prepend_scheme", "always") != "never", True
            case _:
                raise ValueError(f"its tokenizer prepares text by {step['type']} in a way that llama.cpp's SentencePiece does not")
    if not replaces:
        raise ValueError(f"its tokenizer falls back to bytes and keeps spaces, where llama.cpp's SentencePiece writes {SPACE!a}")
    return TokenizerKind("llama", "default", prefix or metaspace, metaspace and not prefix)


def _steps(given: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """A normalizer's or pre-tokenizer's parts, those of a Sequence one by one."""
    if not given:
        return []
    return [part for step in given[name] for part in _steps(step, name)] if given["type"] == "Sequence" else [given]


def vocabulary(content: Mapping[str, Any], kind: TokenizerKind, size: int) -> Vocabulary:
    """Of the content of a tokenizer.json. Ids up to `size`, the model's, that it does not use are filled in. ValueError for one beyond."""
    words = {number: word for word, number in content["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in content.get("added_tokens") or ()}
    words |= {number: entry["content"] for number, entry in added.items()}
    if max(words) >= size:
        raise ValueError(f"the tokenizer has token id {max(words)}, and the model {size} tokens; the tokenizer is another model's")
    pairs = [entry if isinstance(entry, list) else entry.split(" ", 1) for entry in content["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    unknown = content["model"].get("unk_token")
    tokens, types, scores = [], [], []
    for number in range(size):
        word = words.get(number)
        if word is None:
            tokens.append(f"[PAD{number}]".encode())
            types.append(UNUSED)
        else:
            tokens.append(word.encode())
            types.append(_token_type(word, added.get(number), kind, unknown))
        scores.append(-float(ranks[word]) if word in ranks else NO_MERGE)
    return Vocabulary(tokens, types, scores, [" ".join(pair) for pair in pairs])


def _token_type(word: str, added: Mapping[str, Any] | None, kind: TokenizerKind, unknown: str | None) -> int:
    if kind.model == "llama" and word == unknown:
        return UNKNOWN
    if added:
        return CONTROL if added["special"] else USER_DEFINED
    return BYTE_TOKEN if kind.model == "llama" and BYTE.fullmatch(word) else NORMAL
