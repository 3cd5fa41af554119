"""Pictures from wherever a user has them, as upright 8-bit RGB.

As transformers' processor does it: transparency is laid over white, animations show their first
frame. Two deviations on purpose: 16-bit pictures are scaled to 8 bits (there they turn white),
and the orientation in EXIF is always applied (there to files alone).
"""

from __future__ import annotations

import base64
import binascii
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.download import MAX_BYTES, MAX_SECONDS, Resolver, any_address, fetch
from mlx_dgemma.prompt.picture_files import (
    TooManyPartsError,
    count_scans,
    counted,
    hidden_bytes,
)

MAX_PIXELS = 50_000_000  # of any picture
_MEMORY = 200 << 20  # bytes that reading one picture may take
# Bytes of a pixel: as Pillow keeps it, and in the decoder beside that, as measured.
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "LA": 4, "PA": 4}
_DECODER_BYTES = {"WEBP": 12, "AVIF": 8, "JPEG2000": 20}
_ROW_BYTES = 24  # where a row begins, and what fills it up, before and after it is made RGB
_PROGRESSIVE_BYTES = 6  # the coefficients of a whole JPEG
_MOST_SCANNED = 1_000_000_000  # pixels of all scans of a progressive JPEG; a usual one has ten
_MOST_NUMBERS = 6_000_000  # of a PPM
_STRIP = 1 << 20  # pixels that are laid over white at a time
# Formats that are pictures and nothing else: no documents, no programs that draw.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO",
           "HEIF")  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
# What 8-bit RGB can be made of without a profile.
_COLOURS = ("1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "PA", "CMYK", "YCbCr", "HSV")
_SHOWN = 80
# Pillow reports through warnings, whose filters are global: one decoding at a time.
_decoding = threading.Lock()


@dataclass(frozen=True)
class Access:
    """Where pictures may come from.

    files: paths of this machine. resolve: hosts of URLs. hold: called with the bytes that every
    prepared picture keeps until its request is over; what it raises ends the request.
    """

    files: bool = True
    resolve: Resolver = any_address
    max_bytes: int = MAX_BYTES
    seconds: float = MAX_SECONDS
    hold: Callable[[int], None] = lambda _: None


LOCAL = Access()


@dataclass(frozen=True, eq=False)
class Picture:
    """name: for people. image: RGB, upright, one frame."""

    name: str
    image: Image.Image


def open_picture(source: Any, access: Access = LOCAL, name: str | None = None) -> Picture:
    """A picture from a path, an http(s) or data: URL, bytes, a PIL image or a numpy array.

    Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; uint8, uint16, or floats from 0 to 1.
    Raises InputError for anything that is not a picture of at most MAX_PIXELS pixels.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        name = name or Path(getattr(source, "filename", "") or "image").name
        with decoding(name):
            return Picture(name, to_rgb(source, name))
    if isinstance(source, np.ndarray):
        name = name or "image"
        image = _from_array(source, name)
        with decoding(name):
            return Picture(name, to_rgb(image, name))
    name = name or name_of(source)
    content = read_source(source, access)
    with decoding(name), open_image(content, name) as image:
        return Picture(name, to_rgb(image, name))


def read_source(source: Any, access: Access = LOCAL) -> bytes | Path:
    """The bytes that a URL names, or the path of a file that is there."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str):
        scheme = source[: source.find(":")].lower() if ":" in source[:12] else ""
        if scheme == "data":
            return _from_data_url(source, access.max_bytes)
        if scheme in ("http", "https"):
            return fetch(source, access.resolve, max_bytes=access.max_bytes, seconds=access.seconds)
        if "://" in source[:16]:
            raise InputError(f"Images come from http and https URLs alone, not from {scheme}:.")
    if not isinstance(source, str | Path):
        if not access.files:
            raise InputError(
                f"An image is given as an http(s) or data: URL, not as {source!r:.80}."
            )
        raise InputError(
            f"An image is a path, a URL, bytes, a PIL image or a numpy array, not {source!r:.80}."
        )
    if not access.files:
        raise InputError("An image is given as an http(s) or data: URL here, not as a path.")
    path = Path(source)
    try:
        if path.is_file():
            return path
        found = path.exists()
    except OSError:
        found = False
    shown = str(source)[:_SHOWN] or "''"
    raise InputError(f"{shown} is not a file." if found else f"There is no file {shown}.")


def name_of(source: Any) -> str:
    """How a list of images calls this one."""
    if isinstance(source, Path):
        return source.name
    if isinstance(source, str) and not source.lower().startswith("data:"):
        if "://" not in source[:16]:
            return Path(source).name[-_SHOWN:] or "image"
        try:
            parts = urlsplit(source)
        except ValueError:
            return "image"
        return (Path(unquote(parts.path)).name or parts.netloc)[-_SHOWN:]
    return "image"


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turns whatever a decoder says of damaged data into one sentence."""
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except InputError:
            raise
        except UnidentifiedImageError:
            raise InputError(
                f"{name} is not an image that can be read: give PNG, JPEG, WebP, GIF, BMP, TIFF "
                "or AVIF."
            ) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
            raise too_large(name) from None
        except TooManyPartsError:
            raise InputError(
                f"{name} is made of too many small parts to be read: save it anew."
            ) from None
        except Exception as error:  # decoders raise anything on untrusted bytes
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise InputError(f"{name} is damaged or truncated: {reason}.") from error


def too_large(name: str, size: tuple[int, int] | None = None) -> InputError:
    found = "" if size is None else f" {size[0]}x{size[1]} pixels,"
    return InputError(
        f"{name} has{found} more than the {MAX_PIXELS // 10**6} million pixels or the "
        f"{_MEMORY >> 20} MB of memory that a picture may take: scale it down."
    )


def open_image(content: bytes | Path, name: str) -> Image.Image:
    """A PIL image whose pixels are still unread; call it, and use it, inside `decoding`."""
    Image.init()
    try:
        _allow_heif(content, name)
        readable = [form for form in FORMATS if form in Image.OPEN]
        file = counted(content)
        image = Image.open(file, formats=readable)
        if image.format == "PPM":  # of 16 bits is read number by number
            file.allow(min(3 * image.width * image.height, _MOST_NUMBERS))
    except PermissionError:
        raise InputError(f"{name} cannot be read: permission denied.") from None
    hidden = hidden_bytes(image, content)
    if hidden and hidden + _cost(image) > _MEMORY:
        raise too_large(name)
    if image.info.get("progressive"):
        if image.width * image.height > MAX_PIXELS // 2:
            raise too_large(name, image.size)
        scans = count_scans(content)
        if scans * image.width * image.height > _MOST_SCANNED:
            raise InputError(f"{name} has {scans:,} scans, too many to be read: save it anew.")
    if image.format in ("JPEG", "MPO") and _cost(image) > _MEMORY:
        # Half, a quarter or an eighth of the size, which the decoder gives for less memory.
        shrink = math.sqrt(_cost(image) / _MEMORY)
        image.draft("RGB", (int(image.width / shrink / 2), int(image.height / shrink / 2)))
    _check_size(image, name)
    return image


def _allow_heif(content: bytes | Path, name: str) -> None:
    """A phone's picture needs a reader that Pillow does not bring."""
    if isinstance(content, bytes):
        head = content[:12]
    else:
        with content.open("rb") as file:
            head = file.read(12)
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIF_BRANDS:
        return
    try:
        import pillow_heif
    except ImportError:
        raise InputError(
            f"{name} is a HEIC image, which needs a reader of its own: pip install pillow-heif, or "
            "save it as JPEG."
        ) from None
    pillow_heif.register_heif_opener()
    Image.init()


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels: it is {width}x{height}.")
    if width * height > MAX_PIXELS or _cost(image) > _MEMORY:
        raise too_large(name, image.size)


def _cost(image: Image.Image) -> int:
    """Bytes that reading an image and bringing it to upright RGB takes."""
    each = _MODE_BYTES.get(image.mode, 4) + _DECODER_BYTES.get(image.format or "", 0)
    if image.info.get("progressive"):
        each += _PROGRESSIVE_BYTES  # whatever size is asked of the decoder
    if image.mode != "RGB":
        each += 4
    if image.format in ("JPEG", "MPO") and _turn(image) is not None:
        each += 4
    return image.height * (image.width * each + _ROW_BYTES)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The frame at hand, upright, as 8-bit RGB; call it inside `decoding`."""
    _check_size(image, name)
    image.load()
    _check_size(image, name)  # an icon's true size shows only now
    deep_png = image.mode == "I" and image.format == "PNG"  # 16-bit grey, in older Pillows
    image = _upright(image)
    if image.mode.startswith("I;16") or deep_png:
        # The high byte, as Pillow itself reads 16-bit RGB.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _COLOURS:
        raise InputError(
            f"{name} has the colour space {image.mode}, which is not supported: save it as RGB "
            "with 8 bits per channel."
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _over_white(image)
    if image.mode == "RGB" and not getattr(image, "is_animated", False):
        return image
    return image.convert("RGB")  # a copy of this frame


def _over_white(image: Image.Image) -> Image.Image:
    """A transparent image over white, some rows at a time: it takes no second copy."""
    whole = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        whole.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return whole


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the image is made upright, where its EXIF says so."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return None


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _from_array(values: np.ndarray, name: str) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise InputError(
            f"An image array is [height, width] or [height, width, 3], not {list(values.shape)}."
        )
    if 0 in values.shape:
        raise InputError(f"{name} has no pixels: it is {values.shape[1]}x{values.shape[0]}.")
    if values.shape[0] * values.shape[1] > MAX_PIXELS:
        raise too_large(name, (values.shape[1], values.shape[0]))
    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    elif np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise InputError("An image array of floats holds values from 0 to 1.")
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise InputError(f"An image array holds uint8, uint16 or floats, not {values.dtype}.")
    return Image.fromarray(np.ascontiguousarray(values))


def _from_data_url(url: str, max_bytes: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise InputError("A data: URL has its data after a comma; this one has none.")
    if len(body) > max_bytes * 4 // 3 + 4:
        raise InputError(f"The image in the data: URL is larger than {max_bytes >> 20} MB.")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("The data: URL is not valid base64.") from None
