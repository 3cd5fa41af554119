"""Where pictures may come from, and one sentence for everything that is none."""

from __future__ import annotations

import base64
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.pictures import (
    MAX_PIXELS,
    Access,
    decoding,
    open_image,
    open_picture,
    to_rgb,
)
from tests.prompt.drawings import animation, gif, photograph, saved

PICTURE = photograph(40, 30)
FILES = {
    form: saved(PICTURE, form, **options)
    for form, options in {
        "PNG": {},
        "JPEG": {"exif": b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x00\x00"},
        "WEBP": {},
        "GIF": {},
        "BMP": {},
        "TIFF": {"compression": "tiff_lzw"},
        "ICO": {"sizes": [(16, 16), (32, 32)]},
        "JPEG2000": {},
        "PPM": {},
    }.items()
} | {"animated GIF": animation(), "animated WEBP": animation(form="WEBP")}


def png_header(width, height):
    """A PNG that says how large it is and has next to nothing of it."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refusal(source, access=None):
    with pytest.raises(InputError) as caught:
        open_picture(source, access or Access())
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def read_or_refuse(content):
    """The picture, or None after one sentence that says why there is none."""
    try:
        return open_picture(content)
    except InputError as error:
        sentence = str(error)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return None


@pytest.mark.parametrize("form", FILES)
def test_every_format_is_read(form):
    assert open_picture(FILES[form]).image.mode == "RGB"


def test_data_urls():
    body = base64.b64encode(FILES["PNG"]).decode()
    for url in (
        f"data:image/png;base64,{body}",
        f"DATA:;BASE64,{body[:20]}\n{body[20:]}",
        "data:image/png," + "".join(f"%{byte:02X}" for byte in FILES["PNG"]),
    ):
        np.testing.assert_array_equal(open_picture(url).image, PICTURE)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
        ("ftp://host/a.png", "http and https URLs alone, not from ftp:"),
        ("file:///etc/passwd", "not from file:"),
    ],
)
def test_urls_that_are_none(url, words):
    assert words in refusal(url)


def test_a_long_data_url_is_not_decoded():
    url = "data:;base64," + "A" * 2_000_000
    assert "larger than 1 MB" in refusal(url, Access(max_bytes=1 << 20))


def test_paths_that_are_none(tmp_path):
    assert "There is no file" in refusal(tmp_path / "nothing.png")
    assert "is not a file" in refusal(str(tmp_path))
    assert "There is no file" in refusal("A" * 5000)
    assert "There is no file" in refusal("a\0b")
    assert "'' is not a file" in refusal("")
    (tmp_path / "empty.png").touch()
    assert "not an image" in refusal(tmp_path / "empty.png")
    (tmp_path / "letter.png").write_text("Dear Sir or Madam")
    assert "letter.png is not an image" in refusal(tmp_path / "letter.png")


def test_files_may_be_forbidden(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(FILES["PNG"])
    for source in (path, str(path), "a.png"):
        assert "not as a path" in refusal(source, Access(files=False))


def test_things_that_are_no_image():
    assert "not 7" in refusal(7)
    assert "0x5" in refusal(Image.new("RGB", (0, 5)))
    assert "0x3" in refusal(np.zeros((3, 0, 3), np.uint8))
    assert "[height, width]" in refusal(np.zeros((3, 4, 5), np.uint8))
    assert "int64" in refusal(np.zeros((3, 4), np.int64))
    assert "0 to 1" in refusal(np.full((3, 4), 7.0))
    assert "0 to 1" in refusal(np.full((3, 4), np.nan))
    assert "not an image" in refusal(b"%PDF-1.7 a document")
    assert "not an image" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_colour_spaces_that_are_not_supported(mode):
    assert f"colour space {mode}" in refusal(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "JPEG2000", "BMP"])
def test_truncated_files(form):
    sentence = refusal(FILES[form][: len(FILES[form]) * 2 // 3])
    # A TIFF's directory is at its end: without it nothing is left to recognise.
    assert ("not an image" if form == "TIFF" else "damaged or truncated") in sentence


@pytest.mark.parametrize("size", [(10_000, 10_000), (65_000, 65_000), (2**31 - 1, 1)])
def test_pictures_of_too_many_pixels_are_refused_before_they_are_read(size, recwarn):
    sentence = refusal(png_header(*size))
    assert "million pixels" in sentence
    assert not recwarn.list
    assert "million pixels" in refusal(np.broadcast_to(np.uint8(0), size[::-1]))
    assert size[0] * size[1] > MAX_PIXELS


@pytest.fixture
def few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_dgemma.prompt.picture_files._LOOKS", 8_000)


@pytest.mark.usefixtures("few_looks")
def test_a_file_of_millions_of_parts_is_refused_after_some() -> None:
    """Comments of one byte each took 35 times their size, and held every other thread."""
    comment = b"!\xfe\x01a\0"
    assert open_picture(gif(3, comment * 1000)).image.size == (1, 1)
    assert "too many small parts" in refusal(gif(1, comment * 5_000))
    chunk = b"\0\0\0\0abcd" + struct.pack(">I", zlib.crc32(b"abcd"))
    png = FILES["PNG"]
    assert open_picture(png[:33] + chunk * 1000 + png[33:]).image.size == (40, 30)
    assert "too many small parts" in refusal(png[:33] + chunk * 5_000 + png[33:])


@pytest.mark.usefixtures("few_looks")
def test_a_file_on_the_disk_is_counted_too(tmp_path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(gif(1, b"!\xfe\x01a\0" * 5_000))
    assert "a.gif is made of too many small parts" in refusal(path)


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    """A scan of a few bytes goes through all the pixels."""
    usual = saved(photograph(300, 300), "JPEG", progressive=True)
    assert open_picture(usual).image.size == (300, 300)
    scan = usual[usual.rindex(b"\xff\xda") : -2]
    assert "scans, too many to be read" in refusal(usual[:-2] + scan * 12_000 + usual[-2:])


def test_a_tiff_whose_tile_is_larger_than_it_is_refused() -> None:
    def tag(number: int, value: int) -> bytes:
        return struct.pack("<HHII", number, 4, 1, value)

    data = zlib.compress(b"\0" * 256)
    for side, words in ((16, ""), (20_000, "MB of memory")):
        tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side,
                324: 8, 325: len(data)}  # fmt: skip
        place = 8 + len(data)
        directory = struct.pack("<H", len(tags)) + b"".join(tag(*one) for one in tags.items())
        content = b"II*\0" + struct.pack("<I", place) + data + directory + bytes(4)
        if words:
            assert words in refusal(content)
        else:
            assert open_picture(content).image.size == (10, 10)


@pytest.mark.parametrize("options", [{"tile_size": (4, 4)}, {"codeblock_size": (4, 4)}])
def test_a_jpeg_2000_of_tiny_pieces_is_refused(
    options: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """62,500 tiles took 730 MB; a code block of 4x4 takes as much as one of 64x64."""
    monkeypatch.setattr("mlx_dgemma.prompt.pictures._MEMORY", 20 << 20)
    small, large = Image.new("RGB", (90, 90)), Image.new("RGB", (500, 500))
    assert open_picture(saved(small, "JPEG2000", **options)).image.size == (90, 90)
    usual = {"tile_size": (256, 256), "codeblock_size": (32, 32), "precinct_size": (128, 128)}
    assert open_picture(saved(large, "JPEG2000", **usual)).image.size == (500, 500)
    assert "MB of memory" in refusal(saved(large, "JPEG2000", **options))


def test_a_plain_ppm_is_read_up_to_a_size() -> None:
    assert open_picture(b"P3 2 1 255 " + b"1 2 3 " * 2).image.getpixel((1, 0)) == (1, 2, 3)
    assert "too many small parts" in refusal(b"P3 2 1 255 " + b"1 " * (9 << 20))


@pytest.mark.usefixtures("few_looks")
def test_a_ppm_of_16_bits_is_read_number_by_number() -> None:
    deep = b"P6 300 100 65535 " + b"\x7f\xff" * 90_000
    assert open_picture(deep).image.getpixel((299, 99)) == (127, 127, 127)


def test_rows_cost_memory_too() -> None:
    """20 million rows of one pixel took 401 MB."""
    assert "MB of memory" in refusal(png_header(1, 12_000_000))
    assert "damaged" in refusal(png_header(12_000_000, 1))  # read, and found to be cut


def test_a_picture_of_no_width():
    assert refusal(png_header(0, 9))


@pytest.mark.parametrize("form", FILES)
@settings(max_examples=30, derandomize=True, database=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(form, data):
    """Bytes changed, cut out or repeated: a picture or one sentence, never a crash."""
    content = bytearray(FILES[form])
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(content) - 1))
        stop = min(len(content), start + data.draw(st.integers(1, 9)))
        content[start:stop] = data.draw(st.binary(max_size=12))
        if not content:
            break
    picture = read_or_refuse(bytes(content))
    if picture is not None:
        assert picture.image.mode == "RGB"
        assert picture.image.width * picture.image.height <= MAX_PIXELS


@settings(max_examples=60, derandomize=True, database=None)
@given(start=st.sampled_from(sorted(FILES)), body=st.binary(max_size=200))
def test_any_bytes_behind_a_true_beginning(start, body):
    picture = read_or_refuse(FILES[start][:24] + body)
    assert picture is None or picture.image.size > (0, 0)


def test_a_lazy_image_of_a_truncated_file():
    image = Image.open(io.BytesIO(FILES["PNG"][:-600]))
    assert "damaged or truncated" in refusal(image)


def test_a_phones_picture_is_read_or_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"\0\0\0\x18ftypheic" + bytes(40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with (
        pytest.raises(InputError, match=r"HEIC image.*pip install pillow-heif, or save it"),
        decoding("a.heic"),
    ):
        open_image(head, "a.heic")
    monkeypatch.undo()
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    written = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (20, 10), (200, 10, 10))).save(written)
    with decoding("a.heic"):
        image = to_rgb(open_image(written.getvalue(), "a.heic"), "a.heic")
    assert image.size == (20, 10)
    assert image.getpixel((5, 5))[0] > 150
