"""Conversations to tokens: what is learned is what the assistant said, by whatever template, or nothing is."""

from pathlib import Path
from typing import Any

import pytest

from stages.runtime.chat import encode_conversation
from stages.runtime.text import load_tokenizer
from tests.stages.models import save_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (  # trims, and writes the beginning of the text itself
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
MISTRAL = (  # no prompt for the answer, and roles that must alternate
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
REWRITING = (  # thinks in its last turn only, as Qwen3's
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNPREFIXED = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML

DIALOGUE = [
    ("system", "Be brief."),
    ("user", "a fox?"),
    ("assistant", " The lazy \u00e9\U0001f98a dog. "),
    ("user", "so"),
    ("assistant", "Yes"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(made, 307)
    return made


def tokenizer_with(folder: Path, template: str) -> Any:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def learned(tokenizer: Any, turns: list[dict[str, str]], loss_on: Any = "assistant") -> list[str]:
    """The text of each run of tokens that is learned; the tokens together are the whole rendered text."""
    ids, counted = encode_conversation("7", turns, tokenizer, loss_on)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    runs, run = [], []
    for token, inside in [*zip(ids, counted, strict=True), (None, False)]:
        if inside:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_exactly_the_assistants_turns_and_their_end_marks_are_learned(folder: Path) -> None:
    answers = [" The lazy \u00e9\U0001f98a dog. ", "Yes"]
    assert learned(tokenizer_with(folder, CHATML), messages(*DIALOGUE)) == [f"{answer}<|im_end|>\n" for answer in answers]
    assert learned(tokenizer_with(folder, LLAMA), messages(*DIALOGUE)) == [f"{answer.strip()}<|eot|>" for answer in answers]
    assert learned(tokenizer_with(folder, MISTRAL), messages(*DIALOGUE[1:])) == [f" {answer}</s>" for answer in answers]
    assert learned(tokenizer_with(folder, REWRITING), messages(*DIALOGUE[:3])) == [f"<think></think>{answers[0]}"]


def test_a_conversation_may_end_with_the_user(folder: Path) -> None:
    assert learned(tokenizer_with(folder, CHATML), messages(*DIALOGUE[:4])) == [" The lazy \u00e9\U0001f98a dog. <|im_end|>\n"]


def test_loss_on_all_learns_every_token_even_of_templates_that_rewrite(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, REWRITING)
    assert learned(tokenizer, messages(*DIALOGUE), "all") == [tokenizer.apply_chat_template(messages(*DIALOGUE), tokenize=False)]


def test_a_token_that_reaches_into_the_prompt_is_not_learned(folder: Path) -> None:
    """` dog` is one token of the whole text, but no answer begins with it once the prompt has ended with the space."""
    tokenizer = tokenizer_with(
        folder, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = messages(("user", "who"), ("assistant", "dog and"))
    assert " dog" in [tokenizer.decode([token]) for token in encode_conversation("1", turns, tokenizer, "assistant")[0]]
    assert learned(tokenizer, turns) == [" and"]


def test_a_date_in_the_template_does_not_depend_on_the_day(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, DATED)
    ids, _ = encode_conversation("1", messages(*DIALOGUE), tokenizer, "assistant")
    assert tokenizer.decode(ids).startswith("26 Jul 2024<|im_start|>system")


@pytest.mark.parametrize(
    ("template", "turns", "sentence"),
    [
        (CHATML, DIALOGUE[:2], "train: conversation 7: has no turn of the assistant"),
        (CHATML, DIALOGUE[2:], "train: conversation 7: begins with the assistant"),
        (REWRITING, DIALOGUE, "conversation 7: the chat template does not write message 3 as a continuation"),
        (UNPREFIXED, DIALOGUE, "does not write message 3 as a continuation"),
        (MISTRAL, DIALOGUE, "train: conversation 7: roles must alternate"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name(folder: Path, template: str, turns: list[tuple[str, str]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        encode_conversation("7", messages(*turns), tokenizer_with(folder, template), "assistant")
