"""Image files that were made to harm: what they cost is bounded, and whatever Pillow raises is typed."""

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from camserve import containers, images
from camserve.errors import InvalidImage, Unavailable
from camserve.types import Preprocessing

MIB = 2**20


def encoded(picture: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def waves(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Slow waves: every format makes little of them, and no two rows or columns are alike."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 7), (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def filled(before: bytes, part: bytes, after: bytes, size: int = 4 * MIB) -> bytes:
    """A file with copies of a part in it, so many that it is of a size."""
    return before + part * ((size - len(before) - len(after)) // len(part)) + after


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


JPEG = encoded(waves(48, 64), "JPEG")
PROGRESSIVE = encoded(waves(48, 64), "JPEG", progressive=True)
PNG = encoded(waves(48, 64), "PNG")
WEBP = encoded(waves(48, 64), "WEBP", lossless=True)
IDAT = PNG.index(b"IDAT") - 4


def with_scans(number: int, picture: Image.Image) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are a number of scans."""
    data = encoded(picture, "JPEG", progressive=True)
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    scan = data[starts[-1] : -2]
    return data[:-2] + scan * (number - len(starts)) + data[-2:]


# Headers

PADDED = {
    "JPEG with padding": filled(JPEG[:2], b"\xff", JPEG[2:]),
    "JPEG with stuffed bytes": filled(JPEG[:20], b"\xff\0", JPEG[20:]),
    "JPEG with large comments": filled(JPEG[:2], segment(0xFE, b"x" * 65000), JPEG[2:]),
    "JPEG with restarts": filled(JPEG[:20], b"\xff\xd0", JPEG[20:]),
    "JPEG with junk": filled(JPEG[:20], b"\0", JPEG[20:]),
    "JPEG with another picture behind it": filled(JPEG, JPEG, b""),
    "JPEG with anything behind it": filled(JPEG, b"\xff\xda\0\2", b""),
    "PNG with large texts": filled(PNG[:IDAT], chunk(b"tEXt", b"a\0" + b"x" * MIB), PNG[IDAT:]),
    "PNG with large texts at its end": filled(PNG[:-12], chunk(b"zTXt", b"a\0\0" + b"x" * MIB), PNG[-12:]),
    "WebP with a large chunk": riff(WEBP[12:], webp_chunk(b"ABCD", b"x" * 4 * MIB)),
}

CUT_UP = {
    "JPEG with comments": filled(JPEG[:2], segment(0xFE, b""), JPEG[2:]),
    "JPEG with comments behind junk": filled(JPEG[:2], segment(0xFE, b"") + b"\0", JPEG[2:]),
    "JPEG with comments between scans": filled(PROGRESSIVE[:-2], segment(0xFE, b""), PROGRESSIVE[-2:]),
    "PNG with texts": filled(PNG[:IDAT], chunk(b"tEXt", b"a\0b"), PNG[IDAT:]),
    "PNG with texts at its end": filled(PNG[:-12], chunk(b"tEXt", b"a\0b"), PNG[-12:]),
    "PNG with empty pixels": filled(PNG[:IDAT], chunk(b"IDAT", b""), PNG[IDAT:]),
    "WebP with chunks": riff(filled(WEBP[12:], webp_chunk(b"ABCD", b""), b"")),
}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of bytes of each file that Pillow gets to see."""
    sizes: list[int] = []
    pillow = Image.open

    def noting(file: io.BytesIO, **options) -> Image.Image:
        sizes.append(len(file.getbuffer()))
        return pillow(file, **options)

    monkeypatch.setattr(Image, "open", noting)
    return sizes


@pytest.mark.parametrize("name", PADDED)
def test_pillow_sees_nothing_of_what_has_no_pixels(name: str, shown: list[int]):
    assert images.probe(PADDED[name]) == (48, 64)
    pixels = np.asarray(images.decode(PADDED[name]))
    assert max(shown) <= 20_000
    (plain,) = [data for data in (JPEG, PNG, WEBP) if data[:2] == PADDED[name][:2]]
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(plain))))


@pytest.mark.parametrize("name", CUT_UP)
def test_the_number_of_parts_is_bounded(name: str, shown: list[int]):
    for function in (images.probe, images.decode):
        with pytest.raises(InvalidImage, match=r"at most 16384 (segments|chunks), got more"):
            function(CUT_UP[name])
    assert not shown


@pytest.mark.parametrize("name", [*PADDED, *CUT_UP])
def test_reading_a_header_takes_few_steps(name: str):
    """The steps of Python are counted, calls into C included; a parser that goes byte by byte takes millions."""
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        images.probe((PADDED | CUT_UP)[name])
    except InvalidImage:
        pass
    finally:
        sys.setprofile(None)
    assert steps < 20 * containers.MAX_PARTS


def test_tables_of_a_jpeg_are_bounded():
    with pytest.raises(InvalidImage, match="at most 65536 bytes of tables"):
        images.probe(filled(JPEG[:2], segment(0xDB, b"\0" + b"\1" * 64), JPEG[2:]))


def test_a_second_size_does_not_replace_the_one_that_was_checked():
    frame = JPEG.index(b"\xff\xc0")
    larger = JPEG[:frame] + JPEG[frame : frame + 5] + b"\xff\xff\xff\xff" + JPEG[frame + 9 :]
    two_frames = JPEG[:frame] + JPEG[frame : frame + 19] + larger[frame:]
    with pytest.raises(InvalidImage, match="two frames"):
        images.probe(two_frames)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    assert images.probe(PNG[:IDAT] + header + PNG[IDAT:]) == (48, 64)
    assert images.decode(PNG[:IDAT] + header + PNG[IDAT:]).size == (64, 48)


def test_a_canvas_that_is_cut_off_or_comes_again_is_no_surprise():
    canvas = webp_chunk(b"VP8X", struct.pack("<I", 8) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little"))
    for chunks in ((canvas[:8],), (canvas, canvas[:8]), (canvas, b"VP8X\0\0\0\0")):
        with pytest.raises(InvalidImage, match=r"broken or truncated: (it does not begin|could not create)"):
            images.probe(riff(*chunks))


# TIFF


def tags(order: str = "<", **changes: tuple[int, tuple[int, ...]] | None) -> bytes:
    """A TIFF of 4 x 3 grey pixels, its tags changed, added (`t` and the number) or left out; values lie behind."""
    pixels = bytes(range(12))
    known = {"t256": (3, (4,)), "t257": (3, (3,)), "t258": (3, (8,)), "t259": (3, (1,)), "t262": (3, (1,))}
    known |= {"t273": (4, (8,)), "t277": (3, (1,)), "t278": (3, (3,)), "t279": (4, (12,))}
    wanted = [(int(name[1:4]), entry) for name, entry in (known | changes).items() if entry is not None]
    start = 8 + len(pixels)
    place, entries, values = start + 2 + 12 * len(wanted) + 4, b"", b""
    for tag, (kind, numbers) in wanted:
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        where = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", place + len(values))
        values += b"" if len(packed) <= 4 else packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + where
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", start) + pixels + struct.pack(f"{order}H", len(wanted))
    return head + entries + bytes(4) + values


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_small_tiff_is_read(order: str):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    strips = {"t273": (4, (8, 12, 16)), "t278": (3, (1,)), "t279": (3, (4, 4, 4))}
    for changes in ({}, strips, {"t258": None, "t277": None, "t278": None} | {"t258": (3, (8,))}, {"t270": (4, (1,))}):
        np.testing.assert_array_equal(np.asarray(images.decode(tags(order, **changes)))[..., 0], pixels)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"t258": (3, (32,))}, "1, 8 or 16 bits for each pixel, got BitsPerSample 32"),
        ({"t258": (3, (8, 8, 8))}, "1, 8 or 16 bits for each pixel, got BitsPerSample 8, 8, 8"),
        ({"t259": (3, (7,))}, "no compression, LZW, Deflate or PackBits, got Compression 7"),
        ({"t262": (3, (2,))}, "grey pixels, got PhotometricInterpretation 2; send anything else as JPEG, PNG, WEBP"),
        ({"t262": None}, "grey pixels, got PhotometricInterpretation none"),
        ({"t277": (3, (3,))}, "one value for each pixel, got SamplesPerPixel 3"),
        ({"t317": (3, (3,))}, "horizontal differences or none, got Predictor 3"),
        ({"t339": (3, (2,))}, "unsigned whole numbers, got SampleFormat 2"),
        ({"t256": None}, "does not say its size"),
        ({"t257": (3, (3, 3))}, "does not say its size"),
        ({"t256": (3, (0,))}, "this file's size is 0 x 3"),
        ({"t256": (4, (100_000,)), "t257": (4, (100_000,))}, "at most 64000000 pixels"),
        ({"t273": None}, "pixels are not where it says"),
        ({"t279": None}, "pixels are not where it says"),
        ({"t273": (4, (8,) * 400), "t279": (4, (12,) * 400)}, "pixels are not where it says"),  # they overlap
        ({"t273": (4, (2**31,))}, "broken or truncated"),
        ({"t273": (4, (8,) * 16385)}, "at most 16384 strips or tiles, got 16385"),
        (
            {"t322": (4, (2**14,)), "t323": (4, (2**14,)), "t324": (4, (8,)), "t325": (4, (12,))},
            "at most 1048576 pixels",
        ),
        ({"t322": (4, (16,)), "t324": (4, (8,)), "t325": (4, (12,))}, "does not say its size"),
    ],
)
def test_an_odd_tiff_is_refused(changes: dict, text: str):
    for order in "<>":
        with pytest.raises(InvalidImage, match=text):
            images.decode(tags(order, **changes))


def test_a_list_that_many_tags_share_is_read_once(monkeypatch: pytest.MonkeyPatch):
    """65535 entries, each with the same 16384 numbers: a billion, if each were read."""
    read: list[str] = []
    unpack = struct.unpack_from
    monkeypatch.setattr(struct, "unpack_from", lambda form, *rest: read.append(form) or unpack(form, *rest))
    numbers = struct.pack("<16384I", *[8] * 16384)
    for tag in (279, 50839):  # sizes of strips, and one that is not read
        head = b"II*\0" + struct.pack("<I", 8 + len(numbers)) + numbers + struct.pack("<H", 65535)
        data = head + struct.pack("<HHII", tag, 4, 16384, 8) * 65535
        read.clear()
        with pytest.raises(InvalidImage):
            images.probe(data)
        assert sum(form == "<16384I" for form in read) == (tag == 279)
        assert len(read) <= containers.MAX_PARTS + 4


TIFFS = {how or "plain": encoded(waves(12, 9, "L"), "TIFF", compression=how) for how in (None, "tiff_lzw", "packbits")}


@pytest.mark.parametrize("name", TIFFS)
def test_cut_anywhere_a_tiff_is_read_or_refused(name: str):
    for length in range(len(TIFFS[name])):
        for function in (images.probe, images.decode):
            try:
                function(TIFFS[name][:length])
            except InvalidImage as error:
                assert str(error)  # noqa: PT017  (both outcomes are allowed)


# Scans


def test_scans_are_bounded():
    assert images.decode(with_scans(64, waves(48, 64))).size == (64, 48)
    for function in (images.probe, images.decode):
        with pytest.raises(InvalidImage, match="at most 64 scans, got more"):
            function(with_scans(65, waves(48, 64)))


@pytest.mark.parametrize("marker", [0xE1, 0xFE])
def test_scans_of_a_thumbnail_or_of_what_follows_do_not_count(marker: int):
    scans = b"\xff\xda\0\2" * 100
    photo = PROGRESSIVE[:2] + segment(marker, scans) + PROGRESSIVE[2:] + scans
    np.testing.assert_array_equal(np.asarray(images.decode(photo)), np.asarray(images.decode(PROGRESSIVE)))


def test_the_end_of_a_jpeg_cannot_be_feigned():
    """An end inside a comment is none, so the scans behind it count."""
    feigned = segment(0xFE, b"\xff\xd9")
    data = with_scans(65, waves(48, 64))
    first = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    with pytest.raises(InvalidImage, match="at most 64 scans"):
        images.probe(data[:first] + feigned + data[first:])


@pytest.mark.parametrize("marker", [0x01, 0x02, 0xBF])
def test_scans_cannot_hide_behind_a_reserved_marker(marker: int):
    """Where libjpeg expects a restart it steps over such a marker, and not over what would be its segment."""
    scans = b"\xff\xda\0\2" * 100
    with pytest.raises(InvalidImage, match=f"it has a segment {marker:02X}"):
        images.probe(PROGRESSIVE[:-2] + segment(marker, scans) + PROGRESSIVE[-2:])


# Processor time


@pytest.mark.parametrize("data", [PROGRESSIVE, JPEG, PNG], ids=["progressive", "JPEG", "PNG"])
def test_a_decode_ends_when_its_processor_time_is_over(data: bytes, monkeypatch: pytest.MonkeyPatch):
    now_s = iter(range(1000))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(now_s)))
    with pytest.raises(InvalidImage, match=r"may take at most 2 s of processor time"):
        images.decode(data)


def test_a_decode_is_ended_while_it_runs(monkeypatch: pytest.MonkeyPatch):
    """With the bound on scans gone: 3000 scans, each a pass over 9 megapixels, would take minutes."""
    monkeypatch.setattr(containers, "MAX_SCANS", 10**9)
    monkeypatch.setattr(images, "MIN_DECODE_S", 0.1)
    monkeypatch.setattr(images, "DECODE_S_PER_PIXEL", 0.0)
    with pytest.raises(InvalidImage, match=r"at most 0.1 s of processor time"):
        images.decode(with_scans(3000, Image.new("L", (3000, 3000), 77)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_the_clock_is_looked_at_every_few_bytes(file_format: str, monkeypatch: pytest.MonkeyPatch):
    looks: list[float] = []
    monkeypatch.setattr(time, "thread_time", lambda: looks.append(0.0) or 0.0)
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (800, 1000, 3), np.uint8)), file_format)
    images.decode(data)
    assert len(looks) >= len(data) // 4096 > 10


def test_the_time_of_a_decode_grows_with_its_pixels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "thread_time", iter([0.0, *[2.9] * 1000]).__next__)
    assert images.decode(encoded(Image.new("L", (5000, 3000)), "PNG")).size == (5000, 3000)
    monkeypatch.setattr(time, "thread_time", iter([0.0, *[3.1] * 1000]).__next__)
    with pytest.raises(InvalidImage, match="at most 3 s"):
        images.decode(encoded(Image.new("L", (5000, 3000)), "PNG"))


def test_elongation_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decompressed"))
    preprocessing = Preprocessing(256, (224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for size in ((20_000, 1), (1, 20_000)):
        with pytest.raises(InvalidImage, match=f"{size[0]} x {size[1]} is too elongated"):
            images.sent_view(encoded(Image.new("L", size), "PNG"), preprocessing)


# EXIF


def tiff(order: str, entries: bytes, number: int | None = None, directory: int = 8) -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", directory, len(entries) // 12 if number is None else number) + entries


ODD_EXIF = {
    "nothing": b"",
    "no TIFF": b"\x7f" * 40,
    "cut off": b"II*\0\x08\0",
    "a directory beyond the end": tiff("<", b"", directory=2**32 - 1),
    "a directory in itself": tiff("<", b"", directory=0),
    "entries beyond the end": tiff(">", b"", number=65535),
    "a text as orientation": tiff("<", struct.pack("<HHI4s", 0x0112, 2, 4, b"six\0")),
    "a fraction as orientation": tiff("<", struct.pack("<HHII", 0x0112, 5, 1, 8)),
    "no value as orientation": tiff("<", struct.pack("<HHII", 0x0112, 3, 0, 0)),
    "many values as orientation": tiff("<", struct.pack("<HHII", 0x0112, 3, 2**31, 8)),
    "an unknown type": tiff(">", struct.pack(">HHII", 0x0112, 77, 1, 7 << 16)),
    "resolutions of nothing": tiff("<", struct.pack("<HHII", 0x011A, 5, 1, 8) + struct.pack("<HHII", 0x0128, 2, 1, 3)),
    "a loop of directories": tiff("<", struct.pack("<HHII", 0x8769, 4, 1, 8)),
    "overlapping values": tiff("<", struct.pack("<HHII", 0x9000, 7, 60000, 10) * 4000, number=65535),
    "a large tag": tiff("<", struct.pack("<HHII", 0x0112, 3, 1, 2**31)),
}


def jpeg_with_exif(exif: bytes) -> bytes:
    return JPEG[:2] + segment(0xE1, b"Exif\0\0" + exif[:65000]) + JPEG[2:]


def png_with_exif(exif: bytes) -> bytes:
    return PNG[:IDAT] + chunk(b"eXIf", exif) + PNG[IDAT:]


def webp_with_exif(exif: bytes) -> bytes:
    canvas = webp_chunk(b"VP8X", struct.pack("<I", 8) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little"))
    return riff(canvas, WEBP[12:], webp_chunk(b"EXIF", exif))


@pytest.mark.parametrize("with_exif", [jpeg_with_exif, png_with_exif, webp_with_exif], ids=lambda made: made.__name__)
@pytest.mark.parametrize("name", ODD_EXIF)
def test_odd_exif_does_not_cost_the_picture(with_exif: Callable[[bytes], bytes], name: str):
    data = with_exif(ODD_EXIF[name])
    plain = {b"\xff\xd8": JPEG, b"\x89P": PNG, b"RI": WEBP}[data[:2]]
    assert images.probe(data) == (48, 64)
    np.testing.assert_array_equal(np.asarray(images.decode(data)), np.asarray(Image.open(io.BytesIO(plain))))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["H", "I"])
@pytest.mark.parametrize("with_exif", [jpeg_with_exif, png_with_exif, webp_with_exif], ids=lambda made: made.__name__)
def test_an_orientation_is_found_in_either_byte_order(with_exif: Callable[[bytes], bytes], order: str, kind: str):
    value = struct.pack(order + kind, 6).ljust(4, b"\0")
    entries = struct.pack(f"{order}HHII", 0x010F, 2, 4, 0) + struct.pack(
        f"{order}HHI4s", 0x0112, 3 if kind == "H" else 4, 1, value
    )
    assert images.decode(with_exif(tiff(order, entries))).size == (48, 64)


@pytest.mark.parametrize("text", [b'<x tiff:Orientation="6"/>', b"<tiff:Orientation>6</tiff:Orientation>"])
def test_an_orientation_is_found_in_xmp(text: bytes):
    for data in (
        JPEG[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text) + JPEG[2:],
        PNG[:IDAT] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text) + PNG[IDAT:],
        riff(WEBP[12:], webp_chunk(b"XMP ", text)),
    ):
        assert images.decode(data).size == (48, 64)


@pytest.mark.parametrize("error", [struct.error, AttributeError, TypeError, KeyError, RecursionError])
def test_odd_exif_does_not_cost_a_picture_of_this_process(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def broken(_: Image.Image) -> None:
        raise error("odd")

    picture = waves(4, 6)
    monkeypatch.setattr(Image.Image, "getexif", broken)
    for found in (images.picture(picture), Image.open(io.BytesIO(images.png(picture)))):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(picture))
    assert images.digest(picture)


# What Pillow raises

FOREIGN = [struct.error, zlib.error, AttributeError, TypeError, KeyError, IndexError, OverflowError, AssertionError]
READERS = {
    "probe": lambda: images.probe(PNG),
    "decode": lambda: images.decode(PNG),
    "picture": lambda: images.picture(Image.open(io.BytesIO(PNG))),
    "png": lambda: images.png(Image.open(io.BytesIO(PNG))),
    "digest": lambda: images.digest(Image.open(io.BytesIO(PNG))),
}


def raising(error: Exception) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize("error", [*FOREIGN, RecursionError, SyntaxError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("read", READERS)
def test_whatever_pillow_raises_is_an_invalid_image(read: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    picture = Image.open(io.BytesIO(PNG))
    monkeypatch.setattr(Image, "open", raising(error("x" * 5000)) if read == "probe" else lambda *_, **__: picture)
    monkeypatch.setattr(ImageFile.ImageFile, "load", raising(error("x" * 5000)))
    with pytest.raises(InvalidImage, match="file is broken or truncated: ") as caught:
        READERS[read]()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("read", [read for read in READERS if read != "probe"])
def test_a_lack_of_memory_is_not_the_images_fault(read: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", raising(MemoryError()))
    with pytest.raises(Unavailable, match="not enough memory"):
        READERS[read]()


# Memory

MEASURE = """
import sys
from camserve import images
from camserve.types import Preprocessing
channels = int(sys.argv[3])
preprocessing = Preprocessing(224, (224, 224), (0.5,) * channels, (0.5,) * channels)
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
data = open(sys.argv[1], "rb").read()
images.decode(open(sys.argv[2], "rb").read())  # what a first decode sets up is not counted
before = peak()
images.sent_view(data, preprocessing)
print(peak() - before)
"""
SIDE = 4000


def flat(mode: str) -> Image.Image:
    """A picture of 16 megapixels that compresses well."""
    if mode == "I;16":
        return Image.fromarray(np.full((SIDE, SIDE), 12345, np.uint16))
    return Image.new(
        mode,
        (SIDE, SIDE),
        1 if mode in ("1", "P", "L") else (10, 20, 30, 40)[: len(Image.new(mode, (1, 1)).getbands())],
    )


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def deep_tiff(byteorder: str = "<", **options) -> bytes:
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, np.asarray(flat("I;16")), byteorder=byteorder, **options)
    return file.getvalue()


MODES = {
    "grey": (lambda: encoded(flat("L"), "PNG"), 8),
    "16-bit grey": (lambda: encoded(flat("I;16"), "PNG"), 8),
    "grey with alpha": (lambda: encoded(flat("LA"), "PNG"), 8),
    "palette with alpha": (lambda: encoded(flat("P"), "PNG", transparency=1), 8),
    "RGB": (lambda: encoded(flat("RGB"), "PNG"), 8),
    "RGB with a transparent colour": (lambda: encoded(flat("RGB"), "PNG", transparency=(10, 20, 30)), 8),
    "RGBA": (lambda: encoded(flat("RGBA"), "PNG"), 8),
    "JPEG": (lambda: encoded(flat("RGB"), "JPEG"), 8),
    "turned JPEG": (lambda: encoded(flat("RGB"), "JPEG", exif=turned()), 8),
    "CMYK": (lambda: encoded(flat("CMYK"), "JPEG"), 8),
    # libjpeg holds the coefficients of all scans: 2 bytes for each sample.
    "progressive JPEG": (lambda: encoded(flat("RGB"), "JPEG", progressive=True, subsampling=0), 10),
    "progressive CMYK": (lambda: encoded(flat("CMYK"), "JPEG", progressive=True), 12),
    # Pillow's decoder holds two canvases for animations, and hands out bytes.
    "WebP": (lambda: encoded(flat("RGB"), "WEBP", method=0), 16),
    "WebP with alpha": (lambda: encoded(flat("RGBA"), "WEBP", method=0), 16),
    "TIFF": (lambda: encoded(flat("L"), "TIFF", compression="tiff_lzw"), 8),
    "16-bit TIFF": (lambda: encoded(flat("I;16"), "TIFF", compression="tiff_lzw"), 8),
    "16-bit TIFF, 0 is white": (lambda: deep_tiff(">", photometric="miniswhite", compression="zlib"), 8),
}
GREY_MODES = {
    "16-bit grey": 4,  # a picture of 16 bits, and what decoders hold
    "16-bit TIFF": 4,
    "16-bit TIFF, 0 is white": 6,  # put the right way round in place, after the bytes of each pixel
    "RGBA": 8,
    "grey": 4,
}
"""Bytes for each pixel where a network of one channel looks at it."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("mode", MODES)
def test_a_decode_takes_two_pictures_of_memory(mode: str, tmp_path: Path):
    """In bytes for each pixel; Pillow keeps a pixel of RGB in 4 bytes."""
    made, bytes_per_pixel = MODES[mode]
    assert peak(made(), tmp_path, 3) < (bytes_per_pixel + 1) * SIDE * SIDE  # 1: strips of 5 MB, and the allocator


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("mode", GREY_MODES)
def test_a_look_at_grey_takes_no_more_memory(mode: str, tmp_path: Path):
    assert peak(MODES[mode][0](), tmp_path, 1) < (GREY_MODES[mode] + 1) * SIDE * SIDE


def peak(image: bytes, tmp_path: Path, channels: int) -> int:
    """Bytes that a look at an image takes."""
    (tmp_path / "image").write_bytes(image)
    (tmp_path / "small").write_bytes(WEBP)
    command = [sys.executable, "-c", MEASURE, tmp_path / "image", tmp_path / "small", str(channels)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


SPEAKS = """
import sys
from camserve import images
from camserve.errors import InvalidImage
if sys.argv[1] == "server":
    images.silence_libtiff()
try:
    images.decode(sys.stdin.buffer.read())
except InvalidImage as error:
    print(error)
"""


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_a_server_has_no_line_of_libtiff_past_its_log(compression):
    """As a library camserve leaves libtiff as it is: there the line shows that this file makes it speak."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (64, 64), dtype=np.uint16))
    data = bytearray(encoded(noise, "TIFF", compression=compression))
    data[200:4000:301] = bytes(byte ^ 0x55 for byte in data[200:4000:301])
    said = {}
    for role in ("library", "server"):
        done = subprocess.run(
            [sys.executable, "-c", SPEAKS, role], input=bytes(data), capture_output=True, check=True, timeout=60
        )
        assert b"the TIFF file is broken or truncated" in done.stdout
        said[role] = done.stderr
    assert said["library"]
    assert not said["server"]
