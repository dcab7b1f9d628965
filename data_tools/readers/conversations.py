"""Conversations about an image: LLaVA's `conversations` and chat `messages`, as SOLO writes them.

    LLaVA     [{"from": "human", "value": "<image>\\nDescribe it."}, {"from": "gpt", "value": "A dog."}]
    messages  [{"role": "user", "content": "text"}, {"role": "assistant", "content": [PART, ...]}]
    PART      {"type": "text", "text": TEXT}
              {"type": "image_url", "image_url": {"url": BASE64}}     or "image_url": BASE64
              {"type": "image", "image": BASE64}                      or "source": {"data": BASE64}
              {"type": "image"}                                       the image is in the record's image column

BASE64 is a data URL or bare base64. A shard's samples show their image first, so the image's place among the words is not
kept: `<image>` in a LLaVA prompt and image parts are taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

from megaprior.data_tools.readers.samples import Turn, Unfit, clean_text, json_type

COLUMNS = ("conversations", "messages")
_PLACEHOLDER = "<image>"
_ANSWERS = {"gpt", "assistant", "chatgpt", "model"}
_PROMPTS = {"human", "user", "system"}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns in order, blank prompts left out, and the images among their parts, undecoded."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...]

    @property
    def answers(self) -> list[str]:
        return [turn.text for turn in self.turns if turn.loss]


def as_record(value: Any) -> Any:
    """A record around a bare list of messages, or around one message; any other value as it is."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return {"messages": value}
    if isinstance(value, dict) and "role" in value and "content" in value:
        return {"messages": [value]}
    return value


def is_conversation(value: Any) -> TypeGuard[list[Any]]:
    """Whether a caption column's value is a list of turns rather than of captions."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def parse_conversation(turns: list[Any]) -> Conversation:
    """The turns of a record.

    Raises:
        Unfit: not of the shapes above, a blank answer, several image placeholders, or no answer at all.
    """
    found: list[Turn] = []
    images: list[Any] = []
    placeholders = 0
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Unfit(f"conversation of a wrong shape: turn {number} is {json_type(turn)}, expected an object")
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker.lower() not in _ANSWERS | _PROMPTS:
            known = "human, user, system, gpt, assistant"
            raise Unfit(f"conversation of a wrong shape: turn {number} is by {str(speaker)[:40]!r}, expected {known}")
        answer = speaker.lower() in _ANSWERS
        text, parts = _content(number, turn.get("value", turn.get("content")))
        images += parts
        if not answer:
            placeholders += text.count(_PLACEHOLDER)
            text = text.replace(_PLACEHOLDER, "")
        text = text.strip()
        if text or answer:
            found.append(Turn(text=clean_text(text), loss=answer))
    if placeholders > 1:
        raise Unfit(f"more than one image: {placeholders} times {_PLACEHOLDER}; a sample has one")
    conversation = Conversation(turns=tuple(found), images=tuple(images))
    if not conversation.answers:
        raise Unfit("no answer: no turn is by gpt or assistant")
    return conversation


def _content(number: int, content: Any) -> tuple[str, list[Any]]:
    """The text of one turn, its parts joined by line ends, and its images."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise Unfit(f"conversation of a wrong shape: turn {number} says {json_type(content)}, expected text or parts")
    texts: list[str] = []
    images: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            images += _image(part)
        else:
            raise Unfit(f"conversation of a wrong shape: a part of turn {number} is neither text nor image: {kind!r}")
    return "\n".join(text for text in texts if text.strip()), images


def _image(part: dict[str, Any]) -> list[Any]:
    """The one image of a part; none where it only marks the place of the record's own."""
    value = next((part[name] for name in ("image_url", "image", "source") if part.get(name) is not None), None)
    if isinstance(value, dict):
        value = next((value[name] for name in ("url", "data", "bytes") if value.get(name) is not None), value)
    return [] if value is None else [value]
