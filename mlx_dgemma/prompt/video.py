"""Frames of a video, sampled as Gemma 4's video processor samples them.

A video is a list of pictures, an animated GIF or WebP, or a file that PyAV decodes (the `video`
extra). A frame's time is its index in the source over the source's frame rate.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_dgemma.errors import InputError
from mlx_dgemma.files import open_regular
from mlx_dgemma.prompt.pictures import (
    LOCAL,
    MAX_PIXELS,
    Access,
    Picture,
    decoding,
    name_of,
    open_image,
    open_picture,
    read_source,
    to_rgb,
    too_large,
)

LISTED_FPS = 24.0  # of a list of pictures without a rate, as the reference assumes
_STILL_FPS = 10.0  # of an animation whose frames have no duration, as browsers show it
# Frames of an animation, and pixels of them all: each frame is drawn over those before it, twice.
_MOST_FRAMES = 10_000
_MOST_DRAWN = 500_000_000
# Containers that hold pictures themselves: no playlists, which could point anywhere.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg"


@dataclass(frozen=True)
class Sampling:
    """Which frames: `count` of them (fewer when there are fewer), or `rate` a second."""

    count: int = 32
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or (self.rate is not None and not 0 < self.rate < float("inf")):
            raise InputError("A video is sampled at one frame at least: num_frames or fps above 0.")

    def indices(self, total: int, fps: float) -> list[int]:
        """Evenly spaced indices of `total` frames."""
        count = self.count if self.rate is None else max(1, int(total / fps * self.rate))
        count = min(count, total)
        return [index * total // count for index in range(count)]


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames, or what was made of each, and their times in seconds; every frame has the
    same size."""

    name: str
    frames: list[Any]
    seconds: list[float]


def _itself(picture: Picture) -> Any:
    return picture


def open_video(
    source: Any,
    sampling: Sampling,
    *,
    source_fps: float | None = None,
    access: Access = LOCAL,
    name: str | None = None,
    keep: Callable[[Picture], Any] = _itself,
) -> Video:
    """Frames of a list of pictures, or of an animation or video by path, URL or bytes.

    source_fps: frames a second of a list of pictures (default: LISTED_FPS). keep: called with each
    frame, gives what is kept of it; whole frames of a large video would take gigabytes.
    Raises InputError for what is no video, and for a video file without the `video` extra.
    """
    if isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray):
        fps = source_fps or LISTED_FPS
        return _from_list(source, sampling, fps, access, name or "video", keep)
    name = name or name_of(source)
    content = read_source(source, access)
    animation = _from_animation(content, sampling, name, keep)
    return _from_file(content, sampling, name, keep) if animation is None else animation


def timestamp(seconds: float) -> str:
    """mm:ss, as it stands before a frame."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _from_list(
    pictures: Sequence[Any],
    sampling: Sampling,
    fps: float,
    access: Access,
    name: str,
    keep: Callable[[Picture], Any],
) -> Video:
    if not pictures:
        raise InputError("A video of pictures needs at least one.")
    if not 0 < fps < float("inf"):
        raise InputError(f"A video of {fps:g} frames per second is not possible.")
    chosen = sampling.indices(len(pictures), fps)
    read = (open_picture(pictures[index], access) for index in chosen)
    frames = [keep(picture) for picture in _of_one_size(read)]
    return Video(name, frames, [index / fps for index in chosen])


def _of_one_size(pictures: Iterable[Picture]) -> Iterator[Picture]:
    first = None
    for picture in pictures:
        first = first or picture.image.size
        if picture.image.size != first:
            sizes = sorted((first, picture.image.size))
            raise InputError(
                "The pictures of a video have one size; these have "
                f"{' and '.join(f'{width}x{height}' for width, height in sizes)}."
            )
        yield picture


def _from_animation(
    content: bytes | Path, sampling: Sampling, name: str, keep: Callable[[Picture], Any]
) -> Video | None:
    """None when Pillow does not know the format: then it may be a video."""
    start = content[:16] if isinstance(content, bytes) else _first_bytes(content)
    if not (start.startswith((b"GIF8", b"\x89PNG", b"\xff\xd8")) or start[8:12] == b"WEBP"):
        return None
    with decoding(name), open_image(content, name) as image:
        durations = list(_durations(image, name))
        total = len(durations)
        fps = 1000 * total / sum(durations) if sum(durations) > 0 else _STILL_FPS
        chosen = sampling.indices(total, fps)
        frames = []
        for index in chosen:
            image.seek(index)
            frames.append(keep(Picture(name, to_rgb(image, name))))
    return Video(name, frames, [index / fps for index in chosen])


def _durations(image: Any, name: str) -> Iterator[float]:
    """How long each frame is shown, in milliseconds."""
    total = getattr(image, "n_frames", 1)
    most = min(_MOST_FRAMES, _MOST_DRAWN // (image.width * image.height))
    if total > max(most, 1):
        raise InputError(
            f"{name} has {total:,} frames of {image.width}x{image.height}, and at most {most:,} of "
            "this size are read: cut it shorter, or scale it down."
        )
    for index in range(total):
        image.seek(index)
        image.load()  # WebP knows a frame's duration only then
        yield image.info.get("duration", 0)


def _first_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(16)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _from_file(
    content: bytes | Path, sampling: Sampling, name: str, keep: Callable[[Picture], Any]
) -> Video:
    try:
        import av
    except ImportError:
        raise InputError(
            f"{name} is no animated GIF or WebP, and other videos need the video extra: "
            "pip install 'mlx-dgemma[video]'."
        ) from None

    file: Any = io.BytesIO(content) if isinstance(content, bytes) else str(content)
    try:
        with av.open(file, options={"format_whitelist": _CONTAINERS}) as container:
            if not container.streams.video:
                raise InputError(f"{name} has no pictures in it.")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise too_large(name, (stream.width, stream.height))
            total = stream.frames or _count(container, stream)
            fps = float(stream.average_rate or 0)
            if total < 1 or fps <= 0:
                raise InputError(f"{name} has no pictures in it.")
            chosen = sampling.indices(total, fps)
            frames = [keep(frame) for frame in _decode(container, stream, chosen, name)]
    except InputError:
        raise
    except Exception as error:  # decoders raise anything on untrusted bytes
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        raise InputError(f"{name} is not a video that can be read: {reason}.") from error
    if not frames:
        raise InputError(f"{name} is damaged: none of its frames can be decoded.")
    return Video(name, frames, [index / fps for index in chosen[: len(frames)]])


def _count(container: Any, stream: Any) -> int:
    """Frames of a container that does not say, counted without decoding them."""
    total = sum(1 for packet in container.demux(stream) if packet.size)
    container.seek(0)
    return total


def _decode(container: Any, stream: Any, chosen: list[int], name: str) -> Iterator[Picture]:
    """The chosen frames; fewer when the file ends early."""
    wanted = iter(chosen)
    following = next(wanted, None)
    stream.thread_type = "AUTO"
    for index, frame in enumerate(container.decode(stream)):
        if index == following:
            image: Image.Image = frame.to_image()
            yield Picture(name, image)
            following = next(wanted, None)
        if following is None:
            return
