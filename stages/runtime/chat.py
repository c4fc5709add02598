"""Conversations as tokens: the model's own chat template, and which tokens the assistant said.

Most templates do not mark what the assistant generates, so its part is found from outside: the text of the messages before a turn,
rendered with the prompt for an answer, is where that turn begins, and the text rendered with the turn is where it ends:

    <|user|>hi<|end|><|assistant|>                  messages[:1] with the prompt
    <|user|>hi<|end|><|assistant|>hello<|end|>      messages[:2]; learned is `hello<|end|>`

That needs each rendering to be the beginning of the next. A template that rewrites earlier turns is refused; nothing is guessed.
"""

from datetime import datetime
from typing import Any, Literal

from jinja2 import TemplateError

from pipeline.documents import Message

TODAY = datetime(2024, 7, 26)  # for templates that write the date: Llama 3's own default, so that a result does not depend on the day

LossOn = Literal["assistant", "all"]


def encode_conversation(name: str, messages: list[Message], tokenizer: Any, loss_on: LossOn) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether it is to be learned. ValueError names the conversation."""
    try:
        text = _render(tokenizer, messages)
        spans = [(0, len(text))] if loss_on == "all" else assistant_spans(messages, tokenizer, text)
    except (TemplateError, ValueError) as error:
        raise ValueError(f"train: conversation {name}: {error}") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)  # the template writes the special tokens
    # A token that begins before an answer and ends within it is never generated as an answer's first, and so is not learned.
    counted = [any(first <= start < last for first, last in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], counted


def assistant_spans(messages: list[Message], tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """[first, last) in `text`, which is all messages rendered, of each assistant turn with its end mark. ValueError: see the module."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("has no turn of the assistant, so nothing to learn; remove it or write loss_on: all")
    if turns[0] == 0:
        raise ValueError("begins with the assistant, who then answers nobody; give it a user's turn before or remove it")
    spans = []
    for turn in turns:
        before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        through = _render(tokenizer, messages[: turn + 1]) if turn + 1 < len(messages) else text
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"the chat template does not write message {turn + 1} as a continuation of those before it, so what the assistant said "
                "cannot be told from the rest; write loss_on: all, or give the model a template that leaves earlier turns as they were"
            )
        spans.append((len(before), len(through)))
    return spans


def _render(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    rendered: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, strftime_now=TODAY.strftime
    )
    return rendered
