"""Messages with images and videos become prompt ids and the pictures they stand for.

An image is `<|image>`, a placeholder per soft token, `<image|>`. A video is such a block per
frame, each after its time, joined by spaces. The network sees one kind of placeholder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from mlx_dgemma.errors import CheckpointError, InputError, MediaError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.prompt.chat_template import Piece, encode_messages
from mlx_dgemma.prompt.messages import IMAGE_PARTS, VIDEO_PARTS, check_messages
from mlx_dgemma.prompt.patches import ImageProcessor, PreparedImage
from mlx_dgemma.prompt.pictures import LOCAL, Access, Picture, open_picture
from mlx_dgemma.prompt.tokenizer import SPELLINGS, Tokenizer
from mlx_dgemma.prompt.video import Sampling, open_video, timestamp

Messages = Sequence[Mapping[str, Any]]
_IMAGE_SOURCES = ("image", "image_url", "url", "path")
_VIDEO_SOURCES = ("video", "video_url", "url", "path")
SOURCES = frozenset(_IMAGE_SOURCES + _VIDEO_SOURCES)  # of a part, where it may say what it shows


@dataclass(frozen=True)
class Medium:
    """An image, or a video's frames, as a summary lists it. soft_tokens: of all frames."""

    name: str
    width: int
    height: int
    soft_tokens: int
    frames: int = 0

    @classmethod
    def of(cls, image: PreparedImage) -> Medium:
        return cls(image.name, image.width, image.height, image.soft_tokens)

    def __str__(self) -> str:
        size = f"{self.name} {self.width}x{self.height}"
        if not self.frames:
            return f"{size}, {self.soft_tokens} soft tokens"
        each = self.soft_tokens // self.frames
        frames = "1 frame" if self.frames == 1 else f"{self.frames} frames"
        return f"{size}, {frames} of {each} soft tokens"


@dataclass(frozen=True)
class PreparedPrompt:
    """What `stream_generate` takes in place of messages, once its images are read.

    ids: prompt ids, a placeholder per soft token. images: one per run of placeholders, frames
    included; equal pictures are one object. media: what the user gave.
    """

    ids: list[int]
    images: list[PreparedImage] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    placeholders: frozenset[int] = frozenset()

    def network_ids(self, image_token_id: int) -> list[int]:
        """The ids with every placeholder of an image or frame spelled in the network's way."""
        if not self.images:
            return self.ids
        return [image_token_id if token in self.placeholders else token for token in self.ids]

    @property
    def keys(self) -> list[int]:
        """The ids with every picture's own key for its placeholders: equal keys, equal context."""
        keys = list(self.ids)
        for (start, stop), image in zip(self._runs(), self.images, strict=True):
            keys[start:stop] = [image.key] * (stop - start)
        return keys

    def images_after(self, read: int) -> list[PreparedImage]:
        """The images of the ids from `read` on, which must not divide an image."""
        starts = [start for start, _ in self._runs()]
        return [image for image, start in zip(self.images, starts, strict=True) if start >= read]

    def _runs(self) -> list[tuple[int, int]]:
        """(start, stop) of every image's placeholders."""
        if not self.images:
            return []
        return runs(self.ids, self.placeholders)


def runs(ids: Sequence[int], placeholders: Set[int]) -> list[tuple[int, int]]:
    """(start, stop) of every contiguous stretch of placeholders."""
    found = []
    groups = itertools.groupby(range(len(ids)), key=lambda place: ids[place] in placeholders)
    for inside, places in groups:
        if inside:
            stretch = list(places)
            found.append((stretch[0], stretch[-1] + 1))
    return found


def has_media(messages: Messages) -> bool:
    """Whether any message holds an image or a video."""
    return any(True for _ in _media_parts(messages))


def prepare_messages(
    tokenizer: Tokenizer,
    config: ModelConfig,
    messages: Messages,
    *,
    images: Sequence[Any] = (),
    image_tokens: int | None = None,
    access: Access = LOCAL,
    system_prompt: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
) -> PreparedPrompt:
    """Reads every image and video of the messages and encodes them with the text.

    images: for the parts that bring none of their own, in order. image_tokens: the budget of
        each image; frames of videos keep theirs. access: where pictures may come from.
    Raises MediaError for what cannot be read, InputError for what does not fit the context, and
    CheckpointError for a model that has no vision tower.
    """
    check_messages(messages, system_prompt=system_prompt)
    reader = _Reader(tokenizer, config, iter(images), image_tokens, access)
    for where, kind, part in _media_parts(messages):
        try:
            reader.read(where, kind, part)
        except InputError as error:
            raise MediaError(str(error), where) from error
    unused = sum(1 for _ in reader.given)
    if unused:
        raise InputError(
            f"{unused} of the given images have no place in the messages: add a "
            "{'type': 'image'} part for each."
        )
    ids = encode_messages(
        tokenizer,
        messages,
        system_prompt=system_prompt,
        tools=tools,
        enable_thinking=enable_thinking,
        expand=reader.expand,
    )
    reader.check_spent()
    prompt = PreparedPrompt(ids, reader.images, reader.media, reader.placeholders)
    check_room(prompt, config)
    return prompt


def prepare_ids(
    tokenizer: Tokenizer,
    config: ModelConfig,
    ids: list[int],
    images: Sequence[Any],
    image_tokens: int | None = None,
) -> PreparedPrompt:
    """Ids that already hold a placeholder per soft token, and the images they stand for, in order.

    Raises InputError when the placeholders do not fit the images.
    """
    reader = _Reader(tokenizer, config, iter(images), image_tokens, LOCAL)
    for index in range(len(images)):
        reader.read(f"images[{index}]", "image", {})
    prompt = PreparedPrompt(ids, reader.images, reader.media, reader.placeholders)
    found = [stop - start for start, stop in runs(ids, prompt.placeholders)]
    expected = [image.soft_tokens for image in prompt.images]
    if found != expected:
        raise InputError(
            f"The prompt's placeholders come in runs of {found}, but the images need {expected}."
        )
    return prompt


def check_room(prompt: PreparedPrompt, config: ModelConfig) -> None:
    """Refuses images that do not fit the context beside a canvas."""
    room = config.text.max_position_embeddings - config.canvas_length
    if prompt.images and len(prompt.ids) > room:
        soft = sum(image.soft_tokens for image in prompt.images)
        raise InputError(
            f"The prompt has {len(prompt.ids)} tokens, {soft} of them for {len(prompt.images)} "
            f"images, but only {room} fit into the context: give fewer images, or fewer tokens "
            "for each."
        )


def _media_parts(messages: Messages) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(where, "image" or "video", part) of every picture, in order."""
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for j, part in enumerate(content if isinstance(content, list | tuple) else ()):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in IMAGE_PARTS:
                yield f"messages[{i}].content[{j}]", "image", part
            elif kind in VIDEO_PARTS:
                yield f"messages[{i}].content[{j}]", "video", part


class _Reader:
    """Reads parts one by one, then replaces the template's placeholders by their blocks."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        given: Iterator[Any],
        image_tokens: int | None,
        access: Access,
    ):
        self.given = given
        self.images: list[PreparedImage] = []
        self.media: list[Medium] = []
        self._tokenizer, self._config = tokenizer, config
        self._image_tokens, self._access = image_tokens, access
        self._known: dict[int, PreparedImage] = {}
        self._blocks: dict[str, list[list[Piece]]] = {"image": [], "video": []}
        names = ("image", "video")
        self.placeholders = frozenset(tokenizer.ids[n] for n in names if n in tokenizer.ids)

    def read(self, where: str, kind: str, part: Mapping[str, Any]) -> None:
        processor = self._processor(kind)
        if kind == "image":
            self._blocks[kind].append(self._read_image(where, part, processor))
        else:
            self._blocks[kind].append(self._read_video(where, part, processor))

    def expand(self, spelling: str) -> list[Piece]:
        """The block of the next image or video where the template has its placeholder."""
        for kind, blocks in self._blocks.items():
            if spelling == SPELLINGS[kind]:
                if not blocks:
                    raise InputError(f"The chat template writes more {kind}s than were given.")
                return blocks.pop(0)
        return [(True, spelling)]

    def check_spent(self) -> None:
        left = sum(map(len, self._blocks.values()))
        if left:
            raise InputError(
                f"The chat template leaves out {left} of the images and videos: put them into "
                "messages of the user."
            )

    def _processor(self, kind: str) -> ImageProcessor:
        processor = ImageProcessor.from_config(self._config)
        missing = [name for name in ("boi", "eoi", kind) if name not in self._tokenizer.ids]
        if missing:
            raise CheckpointError(
                f"The tokenizer at {self._tokenizer.source} has no {SPELLINGS[missing[0]]} token, "
                f"so it cannot write {kind}s."
            )
        return processor

    def _read_image(
        self, where: str, part: Mapping[str, Any], processor: ImageProcessor
    ) -> list[Piece]:
        source = _source(part, _IMAGE_SOURCES)
        if source is None:
            source = next(self.given, None)
        if source is None:
            raise InputError(f"{where} has no image: give its path, URL, bytes, image or array.")
        if not isinstance(source, PreparedImage):
            picture = open_picture(source, self._access)
            source = processor.prepare(picture, self._image_tokens)
            self._access.hold(source.values.nbytes)
        elif source.values.shape[1] != 3 * processor.patch_size**2:
            raise InputError(f"{source.name} was prepared for another model: give the picture.")
        self.media.append(Medium.of(source))
        return self._block(source, "image")

    def _read_video(
        self, where: str, part: Mapping[str, Any], processor: ImageProcessor
    ) -> list[Piece]:
        source = _source(part, _VIDEO_SOURCES)
        if source is None:
            raise InputError(f"{where} has no video: give its path, URL, bytes or list of images.")
        count, rate = _number(part, "num_frames", where), _number(part, "fps", where)
        if count is not None and rate is not None:
            raise InputError(f"{where} has both num_frames and fps: keep one of the two.")
        sampling = Sampling(processor.num_frames if count is None else int(count), rate)
        room = self._config.text.max_position_embeddings

        def prepare(frame: Picture) -> PreparedImage:
            nonlocal room
            prepared = processor.prepare(frame, processor.frame_tokens)
            room -= prepared.soft_tokens
            if room < 0:
                raise InputError(
                    f"The frames of {frame.name} do not fit into the context: ask for fewer."
                )
            return prepared

        video = open_video(
            source,
            sampling,
            source_fps=_number(part, "source_fps", where),
            access=self._access,
            keep=prepare,
        )
        frames: list[PreparedImage] = video.frames
        soft = sum(frame.soft_tokens for frame in frames)
        first = frames[0]
        self.media.append(Medium(video.name, first.width, first.height, soft, len(frames)))
        pieces: list[Piece] = []
        for index, (frame, seconds) in enumerate(zip(frames, video.seconds, strict=True)):
            space = " " if index else ""
            pieces += [(False, f"{space}{timestamp(seconds)} "), *self._block(frame, "video")]
        return pieces

    def _block(self, image: PreparedImage, placeholder: str) -> list[Piece]:
        self.images.append(self._known.setdefault(image.key, image))
        inner = [(True, SPELLINGS[placeholder])] * image.soft_tokens
        return [(True, SPELLINGS["boi"]), *inner, (True, SPELLINGS["eoi"])]


def _source(part: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        value = part.get(name)
        if isinstance(value, Mapping):  # OpenAI's {"image_url": {"url": ...}}
            value = value.get("url")
        if value is not None:
            return value
    return None


def _number(part: Mapping[str, Any], name: str, where: str) -> float | None:
    value = part.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InputError(f"{where}.{name} must be a number.")
    return value
