"""A state and a form as the message that the model reads: the state first, the question last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dgemma.decisions.questions import as_text
from mlx_dgemma.prompt.messages import IMAGE_PARTS

Part = dict[str, Any]


def state_parts(state: Any) -> list[Part]:
    """A state as message parts: a list of parts stays one, everything else is a text."""
    if isinstance(state, list) and any(map(is_image, state)):
        return [_part(part) for part in state]
    text = as_text(state)
    return [] if text is None else [{"type": "text", "text": text}]


def question_messages(parts: Sequence[Part], text: str) -> list[dict[str, Any]]:
    """The messages that ask a form's text about the parts of a state."""
    asked = [*parts, {"type": "text", "text": text}]
    content: Any = asked
    if not any(map(is_image, asked)):
        content = "\n\n".join(part["text"] for part in asked)
    return [{"role": "user", "content": content}]


def is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS


def _part(value: Any) -> Part:
    if is_image(value) or (isinstance(value, Mapping) and value.get("type") == "text"):
        return dict(value)
    return {"type": "text", "text": as_text(value) or ""}
