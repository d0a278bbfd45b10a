"""Takes image files apart without decoding: JPEG segments, PNG chunks, WebP chunks, TIFF tags. No Pillow, no torch.

A decoder gets only the parts that pixels are made of. Whatever else a file carries (comments, thumbnails, profiles,
texts, padding, what follows the picture) is stepped over in time that does not depend on its size, so nothing a
stranger writes there can cost anything. Each part may be looked at once, and the number of parts is bounded.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from camserve.errors import InvalidImage

FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats of files of any colours; beside them TIFF is read, of grey."""

MAX_PARTS = 2**14
"""Segments or chunks of a file. Encoders cut the pixels of a PNG into chunks of 8 KiB or more: 2048 in 16 MiB."""

MAX_TABLE_BYTES = 2**16
"""Bytes of a JPEG's tables and frame header before its first scan. Four tables of each kind take 3 kB."""

MAX_SCANS = 64
"""Scans of a JPEG. Encoders write about ten in a progressive file; each makes the decoder pass over all pixels."""

_METADATA_BYTES = 2**16
"""Bytes of EXIF and XMP in which the orientation is looked for; a JPEG segment holds no more."""

_ORIENTATION = 0x0112  # tag of EXIF
_WHOLE_NUMBERS = {3: "H", 4: "I"}  # types of EXIF
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

# Segments that libjpeg decodes by: frames (C0-CF with the tables C4 and CC), DQT, DRI, JFIF and Adobe's colour space.
_JPEG_KEPT = {*range(0xC0, 0xD0), 0xDB, 0xDD, 0xE0, 0xEE}
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_FIRST_FRAME, _SOI, _EOI, _SOS, _APP1 = 0xC0, 0xD8, 0xD9, 0xDA, 0xE1
_JPEG_NO_MARKERS = {0x00, *range(0xD0, 0xD8), 0xFF}  # behind FF: a byte FF of pixels, restarts, and padding

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_GREY_ALPHA_16, _PNG_RGBA_8 = b"\x10\x04", b"\x08\x06"  # depth and colour type in IHDR
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS"}  # the first of each, and all of IDAT

_WEBP_KEPT = {b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF"}
_WEBP_PICTURES = {b"VP8 ", b"VP8L", b"ANMF"}
_WEBP_FLAGS = 0x12  # of VP8X: alpha and animation; the others announce metadata

# Tags of TIFF 6.0. A file is in strips, or in tiles.
_WIDTH, _HEIGHT, _DEPTH, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 256, 257, 258, 259, 262, 277
_PREDICTOR, _SAMPLE_FORMAT, _WHITE_IS_ZERO = 317, 339, 0
_STRIPS, _STRIP_ROWS, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_TIFF_TYPES = {3: "H", 4: "I"}  # SHORT and LONG
_TIFF_ALLOWED = {
    _PHOTOMETRIC: ("grey pixels", "PhotometricInterpretation", (_WHITE_IS_ZERO, 1), ()),
    _SAMPLES: ("one value for each pixel", "SamplesPerPixel", (1,), (1,)),
    _SAMPLE_FORMAT: ("unsigned whole numbers", "SampleFormat", (1,), (1,)),
    _DEPTH: ("1, 8 or 16 bits for each pixel", "BitsPerSample", (1, 8, 16), (1,)),
    _COMPRESSION: ("no compression, LZW, Deflate or PackBits", "Compression", (1, 5, 8, 32773, 32946), (1,)),
    _PREDICTOR: ("horizontal differences or none", "Predictor", (1, 2), (1,)),
}
"""Values of each tag that are read, behind what they mean and its name; then its value where a file lacks it.

What tells most about a file that is refused comes first."""
_TIFF_READ = {
    *_TIFF_ALLOWED,
    *(_WIDTH, _HEIGHT, _ORIENTATION),
    *(_STRIPS, _STRIP_ROWS, _STRIP_BYTES),
    *(_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES),
}

MAX_TILE_PIXELS = 2**20
"""Pixels of a tile of a TIFF, which may be larger than the picture. Writers make 256 x 256 or 512 x 512."""


@dataclass(frozen=True)
class Container:
    """Holds what a decoder needs of an image file, and what the header says."""

    format: str
    """One of `FORMATS`, or TIFF."""
    size: tuple[int, int]
    """(height, width) in pixels, before orientation."""
    content: bytes
    """The file without the parts that have no pixels."""
    orientation: int
    """Orientation of EXIF, else of XMP, in 1..8; 1 (upright) where there is none or it cannot be read."""
    inverted: bool = False
    """Whether pixels of value 0 are white, and the largest ones black, in a TIFF; Pillow is not told."""
    halved: bool = False
    """Whether pixels are grey and alpha of 16 bits each, in a PNG. To the decoder they are RGBA of 8 bits, the high and
    the low byte of both: it would take the high ones alone."""


def take_apart(data: bytes) -> Container:
    """Returns the parts of an image file that matter; of an animation those of the first picture.

    Raises:
        InvalidImage: not JPEG, PNG, WebP, or TIFF of grey, without a picture, or with too many parts.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(data)
    raise InvalidImage(f"not a {', '.join(FORMATS)} image ({len(data)} bytes), nor a TIFF of grey")


def _jpeg(data: bytes) -> Container:
    kept, kept_bytes, size, exif, xmp = [memoryview(b"\xff\xd8")], 0, None, b"", b""
    view = memoryview(data)  # slices of it are no copies
    for marker, start, stop in _jpeg_segments(data, 2):
        if marker == _SOS:
            if size is None:
                raise _broken("pixels come before their size")
            kept.append(view[start : _jpeg_end(data, stop)])
            return Container("JPEG", size, b"".join(kept), _orientation(exif, xmp))
        body = start + 4
        if marker in _JPEG_FRAMES:
            if size is not None:
                raise _broken("it has two frames")
            size = struct.unpack(">HH", data[body + 1 : body + 5].ljust(4, b"\0"))
        if marker in _JPEG_KEPT:
            kept.append(view[start:stop])
            kept_bytes += stop - start
            if kept_bytes > MAX_TABLE_BYTES:
                raise InvalidImage(f"a JPEG file may have at most {MAX_TABLE_BYTES} bytes of tables")
        if marker == _APP1 and not exif and data.startswith(b"Exif\0\0", body):
            exif = data[body:stop]
        if marker == _APP1 and not xmp and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", body):
            xmp = data[body:stop]
    raise _broken("it ends before its pixels")


def _jpeg_end(data: bytes, start: int) -> int:
    """Returns where the picture ends whose first scan header ends at `start`; what follows are other pictures.

    Raises:
        InvalidImage: too many scans.
    """
    scans = 1
    for marker, _, stop in _jpeg_segments(data, start):
        scans += marker == _SOS
        if scans > MAX_SCANS:
            raise InvalidImage(f"a JPEG file may have at most {MAX_SCANS} scans, got more")
        if marker == _EOI:
            return stop
    return len(data)


def _jpeg_segments(data: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, start, stop) of the segments from a position on, compressed data between them stepped over.

    It ends with the file, with EOI, or with a segment that is cut off.
    """
    for _ in range(MAX_PARTS):
        start = _jpeg_marker(data, position)
        if start < 0:
            return
        marker, position = data[start + 1], start + 2
        if marker == _EOI:
            yield marker, start, position
            return
        length = int.from_bytes(data[position : position + 2])
        # A marker below the frames is reserved: libjpeg may look for the next one inside of what would be its segment.
        if marker < _FIRST_FRAME or marker == _SOI or length < 2:
            raise _broken(f"it has a segment {marker:02X} of {length} bytes")
        position += length
        if position > len(data):
            return
        yield marker, start, position
    raise InvalidImage(f"a JPEG file may have at most {MAX_PARTS} segments, got more")


def _jpeg_marker(data: bytes, position: int) -> int:
    """Returns where the next marker is, -1 if there is none.

    In compressed data it is found with numpy, in growing blocks: 16 MiB take milliseconds, whatever the bytes are.
    """
    for _ in range(4):  # in a header the first FF is a marker's, nearly always
        position = data.find(0xFF, position)
        if not 0 <= position < len(data) - 1:
            return -1
        if data[position + 1] not in _JPEG_NO_MARKERS:
            return position
        position += 1
    values, block = np.frombuffer(data, np.uint8), 2**12
    while position < len(data) - 1:
        seen, following = values[position : position + block], values[position + 1 : position + 1 + block]
        found = (seen[: len(following)] == 0xFF) & (following != 0) & (following - 0xD0 > 7) & (following != 0xFF)
        if found.any():
            return position + int(found.argmax())
        position, block = position + block, min(2 * block, 2**16)
    return -1


def _png(data: bytes) -> Container:
    found: dict[bytes, bytes] = {}
    pixels, exif, xmp = list[bytes](), b"", b""
    for kind, start, stop in _chunks(data, len(_PNG_SIGNATURE), "PNG"):
        if not found and (kind != b"IHDR" or stop - start < 25):
            raise _broken("it does not begin with its size")
        body = data[start + 8 : min(stop - 4, start + 8 + _METADATA_BYTES)] if kind in (b"eXIf", b"iTXt") else b""
        if kind == b"IDAT":
            pixels.append(data[start:stop])
        elif kind in _PNG_KEPT:
            found.setdefault(kind, data[start:stop])
        elif kind == b"eXIf":
            exif = body
        elif body.startswith(b"XML:com.adobe.xmp\0"):
            xmp = body
        elif kind == b"IEND":
            break
    if not pixels:
        raise _broken("it ends before its pixels")
    width, height = struct.unpack(">II", found[b"IHDR"][8:16].ljust(8, b"\0"))
    halved = found[b"IHDR"][16:18] == _PNG_GREY_ALPHA_16
    if halved:  # filters and interlacing go by the bytes of a pixel, of which both have four
        header = found[b"IHDR"][4:16] + _PNG_RGBA_8 + found[b"IHDR"][18:21]
        found = {b"IHDR": found[b"IHDR"][:4] + header + zlib.crc32(header).to_bytes(4)}
    content = b"".join((_PNG_SIGNATURE, *found.values(), *pixels))
    return Container("PNG", (height, width), content, _orientation(exif, xmp), halved=halved)


def _webp(data: bytes) -> Container:
    kept, size, exif, xmp = list[bytes](), None, b"", b""
    for kind, start, stop in _chunks(data, 12, "WEBP"):
        if size is None:
            size = _webp_size(kind, data[start + 8 : start + 18])
        body = start + 8
        if kind == b"VP8X" and not kept:
            kept.append(data[start:body] + bytes([data[body] & _WEBP_FLAGS]) + data[body + 1 : stop])
        if kind in _WEBP_KEPT and not any(part[:4] in _WEBP_PICTURES for part in kept):
            kept.append(data[start:stop])
        if kind == b"EXIF":
            exif = data[body : min(stop, body + _METADATA_BYTES)]
        if kind == b"XMP ":
            xmp = data[body : min(stop, body + _METADATA_BYTES)]
    if size is None:
        raise _broken("it ends before its size")
    content = b"".join(kept)
    head = b"RIFF" + (len(content) + 4).to_bytes(4, "little") + b"WEBP"
    return Container("WEBP", size, head + content, _orientation(exif, xmp))


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    """Returns (height, width) as the first chunk of a WebP file says."""
    if kind == b"VP8X" and len(body) == 10:
        return int.from_bytes(body[7:10], "little") + 1, int.from_bytes(body[4:7], "little") + 1
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", body[6:10].ljust(4, b"\0"))
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L" and body[:1] == b"\x2f":
        bits = int.from_bytes(body[1:5], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    raise _broken("it does not begin with its size")


def _tiff(data: bytes) -> Container:
    """Returns the first picture of a TIFF file: its pixels, and of its tags those that pixels are decoded by."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        tags = _tiff_tags(data, order)
    except struct.error:
        raise _broken("it ends before its pixels") from None
    kept: dict[int, tuple[int, ...]] = {}
    for tag, (what, name, allowed, default) in _TIFF_ALLOWED.items():
        kept[tag] = tags.get(tag, default)
        if len(kept[tag]) != 1 or kept[tag][0] not in allowed:
            raise InvalidImage(
                f"a TIFF must have {what}, got {name} {', '.join(map(str, kept[tag][:4])) or 'none'}; "
                f"send anything else as {', '.join(FORMATS)}"
            )
    tiled = _TILES in tags
    places, sizes = (_TILES, _TILE_BYTES) if tiled else (_STRIPS, _STRIP_BYTES)
    tags.setdefault(_STRIP_ROWS, tags.get(_HEIGHT, ()))
    for tag in (_WIDTH, _HEIGHT, *((_TILE_WIDTH, _TILE_HEIGHT) if tiled else (_STRIP_ROWS,))):
        if len(tags.get(tag, ())) != 1:
            raise _broken("it does not say its size")
        kept[tag] = tags[tag]
    if tiled and kept[_TILE_WIDTH][0] * kept[_TILE_HEIGHT][0] > MAX_TILE_PIXELS:
        raise InvalidImage(f"a tile of a TIFF file may have at most {MAX_TILE_PIXELS} pixels, got more")
    parts = [data[place : place + size] for place, size in zip(tags.get(places, ()), tags.get(sizes, ()), strict=False)]
    if not parts or sum(map(len, parts)) > len(data):  # parts that overlap would be decoded more than once
        raise _broken("its pixels are not where it says")
    kept[places], kept[sizes] = (), tuple(map(len, parts))
    (height,), (width,) = kept[_HEIGHT], kept[_WIDTH]
    inverted = kept[_PHOTOMETRIC] == (_WHITE_IS_ZERO,)
    kept[_PHOTOMETRIC] = (1,)
    content, orientation = _tiff_file(order, kept, places, parts), tags.get(_ORIENTATION, (1,))[0]
    return Container("TIFF", (height, width), content, orientation if 1 <= orientation <= 8 else 1, inverted)


def _tiff_tags(data: bytes, order: str) -> dict[int, tuple[int, ...]]:
    """Returns the numbers of the first directory's tags that are read, of each tag the first."""
    tags = dict[int, tuple[int, ...]]()
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, directory)
    for entry in range(directory + 2, directory + 2 + 12 * min(entries, MAX_PARTS), 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, entry)
        if tag not in _TIFF_READ or tag in tags or kind not in _TIFF_TYPES or not number:
            continue
        if number > MAX_PARTS:
            raise InvalidImage(f"a TIFF file may have at most {MAX_PARTS} strips or tiles, got {number}")
        form = f"{order}{number}{_TIFF_TYPES[kind]}"
        inline = struct.calcsize(form) <= 4
        place = entry + 8 if inline else struct.unpack_from(f"{order}I", data, entry + 8)[0]
        tags.setdefault(tag, struct.unpack_from(form, data, place))
    return tags


def _tiff_file(order: str, tags: dict[int, tuple[int, ...]], places: int, parts: list[bytes]) -> bytes:
    """Returns a TIFF file with these tags and parts, whose places go into the tag `places`."""
    head = 8 + 2 + 12 * len(tags) + 4
    start = head + 8 * len(parts)  # behind the two lists of places and sizes
    ends = np.cumsum([len(part) for part in parts])
    tags[places] = tuple(int(start + end) for end in (0, *ends[:-1]))
    entries, lists = b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        place = struct.pack(f"{order}I", head + len(lists)) if len(values) > 1 else packed
        lists += packed if len(values) > 1 else b""
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + place
    lists = lists.ljust(8 * len(parts), b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    top = mark + struct.pack(f"{order}IH", 8, len(tags))
    return b"".join((top, entries, b"\0\0\0\0", lists, *parts))


def _chunks(data: bytes, position: int, file_format: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields (kind, start, stop) of the chunks of a PNG or WebP file from a position on; the last may be cut off."""
    for _ in range(MAX_PARTS):
        head = data[position : position + 8]
        if len(head) < 8:
            return
        if file_format == "PNG":  # length, kind, body, checksum
            kind, stop = head[4:], position + 12 + int.from_bytes(head[:4])
        else:  # kind, length, body, padded to an even length
            length = int.from_bytes(head[4:], "little")
            kind, stop = head[:4], position + 8 + length + length % 2
        yield kind, position, stop
        position = stop
    raise InvalidImage(f"a {file_format} file may have at most {MAX_PARTS} chunks, got more")


def _orientation(exif: bytes, xmp: bytes) -> int:
    """Returns the orientation that the metadata say, 1 where they do not; they may be anything."""
    found = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    if found is None and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return 1 if found is None or not 1 <= found <= 8 else found


def _exif_orientation(exif: bytes) -> int | None:
    """Returns the orientation of the first directory of EXIF; None where there is none.

    Pillow would copy the value of every tag to find this one, and values may overlap: 64 kB can become many MB.
    """
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "<")
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", exif, entry)
            if tag == _ORIENTATION and kind in _WHOLE_NUMBERS and number == 1:
                return int(struct.unpack_from(order + _WHOLE_NUMBERS[kind], exif, entry + 8)[0])
    except struct.error:  # it is cut off
        pass
    return None


def _broken(reason: str) -> InvalidImage:
    return InvalidImage(f"the image file is broken or truncated: {reason}")
