"""Whatever a caller calls a prompt becomes prompt ids, and the images they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.chat_template import encode_messages
from mlx_dgemma.prompt.media import PreparedPrompt, has_media, prepare_ids, prepare_messages
from mlx_dgemma.prompt.pictures import LOCAL, Access
from mlx_dgemma.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlx_dgemma.model import Model

FORMS = "A prompt is a str, a list of messages or a flat list of token ids."
Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int] | np.ndarray | PreparedPrompt


def prepare_prompt(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    images: Sequence[Any] | None = None,
    image_tokens: int | None = None,
    access: Access = LOCAL,
    system_prompt: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
) -> PreparedPrompt:
    """Prompt ids with the images and videos of the messages read, on the caller's thread.

    images: paths, URLs, bytes, PIL images or numpy arrays, for the messages' image parts that
        name none, in order; before the text of a str prompt. image_tokens: the most soft tokens
        an image may take, 70, 140, 280, 560 or 1120 (default: the checkpoint's).
    access: where pictures may come from; anywhere, unless untrusted people write the messages.

    The result goes to `stream_generate` in the prompt's place. Raises InputError and
    CheckpointError as `stream_generate` does.
    """
    if isinstance(prompt, PreparedPrompt):
        return prompt
    _check_form(prompt)
    if images is not None and (isinstance(images, str | bytes) or not isinstance(images, Sequence)):
        raise InputError("images is a list of paths, URLs, bytes, PIL images or numpy arrays.")
    if isinstance(prompt, str) and images:
        if not prompt.strip():
            raise InputError("The prompt is empty: write something to answer.")
        parts: list[Message] = [{"type": "image", "image": image} for image in images]
        prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
        images = None
    if _is_messages(prompt) and (images or has_media(prompt)):
        return prepare_messages(
            tokenizer,
            model.config,
            prompt,
            images=images or (),
            image_tokens=image_tokens,
            access=access,
            system_prompt=system_prompt,
            tools=tools,
            enable_thinking=enable_thinking,
        )
    ids = encode_prompt(
        tokenizer, prompt, system_prompt=system_prompt, tools=tools, enable_thinking=enable_thinking
    )
    if images:
        return prepare_ids(tokenizer, model.config, ids, images, image_tokens)
    return PreparedPrompt(ids)


def _check_form(prompt: object) -> None:
    """Refuses what has no order or no length: None, a dict, a generator."""
    array = getattr(prompt, "shape", ()) != ()
    if isinstance(prompt, str | Sequence) or array:
        return
    raise InputError(FORMS)


def _is_messages(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    if isinstance(prompt, str | PreparedPrompt) or len(prompt) == 0:
        return False
    return isinstance(prompt[0], Mapping)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system_prompt: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
) -> list[int]:
    """Prompt ids: a str is one user message, messages go through the chat template, ids stay.

    An image part becomes one placeholder id; `prepare_prompt` reads images.
    """
    if isinstance(prompt, PreparedPrompt):
        return prompt.ids
    _check_form(prompt)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError("The prompt is empty: write something to answer.")
        prompt = [{"role": "user", "content": prompt}]
    if len(prompt) == 0:
        raise InputError("The prompt is empty: write something to answer.")
    if _is_messages(prompt):
        return encode_messages(
            tokenizer,
            prompt,
            system_prompt=system_prompt,
            tools=tools,
            enable_thinking=enable_thinking,
        )
    if system_prompt or tools or enable_thinking:
        raise InputError(
            "A prompt of token ids is taken as it is: put the system prompt, tools and thinking "
            "into it, or pass messages."
        )
    try:
        ids = np.asarray(prompt)
    except (ValueError, TypeError) as error:  # lists of several lengths
        raise InputError(FORMS) from error
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(FORMS)
    if ids.min() < 0 or ids.max() >= len(tokenizer):
        raise InputError(f"A prompt id is outside the vocabulary of {len(tokenizer)} tokens.")
    return [int(token) for token in ids]
