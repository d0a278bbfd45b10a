"""Reads and writes the messages of `camserve.v1` as JSON, by protobuf's own mapping (ProtoJSON).

Names of fields may be those of the proto file or in lowerCamelCase, in which they are written; bytes are base64.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from typing import Any

import python_multipart
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from camserve.codecs.json_text import read_object, url_safe
from camserve.errors import InvalidInput
from camserve.v1 import explain_pb2 as pb
from camserve.wording import close_to, shown

JSON = "application/json"
MULTIPART = "multipart/form-data"

IMAGE_PART, REQUEST_PART = "image", "request"
"""Names of the parts of a form: the image's file, and the request without it as JSON."""


def request_bytes(body: bytes, content_type: str) -> bytes:
    """Returns the serialized `ExplainRequest` of a body.

    Args:
        body: JSON, or a form with a file and JSON.
        content_type: header that says which.

    Raises:
        InvalidInput: it is none; the text says where, and what was allowed.
    """
    if content_type.partition(";")[0].strip().lower() == MULTIPART:
        parts = _parts(body, content_type)
        if IMAGE_PART not in parts:
            raise InvalidInput(
                f"the form has no file {IMAGE_PART!r}; it has {', '.join(map(shown, parts)) or 'nothing'}"
            )
        message = _parsed(parts.get(REQUEST_PART) or b"{}")
        message.image.encoded = parts[IMAGE_PART]
    else:
        message = _parsed(body)
    return bytes(message.SerializeToString())


def to_json(message: Message) -> bytes:
    """Returns a message as JSON in one line; fields without a value have their default."""
    values = json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()


def _parsed(text: bytes) -> pb.ExplainRequest:
    values = read_object(text)
    _check(pb.ExplainRequest.DESCRIPTOR, values, "")
    try:
        return json_format.ParseDict(values, pb.ExplainRequest())
    except (json_format.ParseError, RecursionError) as error:
        raise InvalidInput(f"the body is no request: {_reason(error)}") from None


def _check(kind: Any, values: dict[str, Any], path: str) -> None:
    """Raises InvalidInput where a name is unknown, or bytes are no base64: ProtoJSON's reader lets odd bytes pass.

    `kind` is the descriptor of a message, of which protobuf has several classes.
    """
    known = {name: field for field in kind.fields for name in (field.name, field.json_name)}
    for name, value in values.items():
        where = f"{path}{name}"
        if name not in known:
            near = close_to(name, sorted(known)) or sorted(field.json_name for field in kind.fields)
            raise InvalidInput(f"unknown field {shown(where)}; did you mean {', '.join(near[:8])}?")
        field = known[name]
        for number, one in enumerate(value if isinstance(value, list) else [value]):
            _check_value(field, one, f"{where}[{number}]" if isinstance(value, list) else where)


def _check_value(field: FieldDescriptor, value: Any, where: str) -> None:
    if field.type == FieldDescriptor.TYPE_MESSAGE and isinstance(value, dict):
        _check(field.message_type, value, f"{where}.")
    if field.type == FieldDescriptor.TYPE_BYTES and value is not None:
        try:
            base64.b64decode(url_safe(value), validate=True)
        except (AttributeError, binascii.Error, ValueError):
            raise InvalidInput(f"{where} is no base64: {shown(value)}") from None


def _reason(error: Exception) -> str:
    """Returns what protobuf says of a value, without the names of its own functions."""
    text = re.sub(r"Failed to parse (\S+) field: ", r"\1: ", str(error))
    return shown(text.splitlines()[0] if text else "too deep")[1:-1]


def _parts(body: bytes, content_type: str) -> dict[str, bytes]:
    """Returns the parts of a form by name."""
    parts: dict[str, bytes] = {}
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)
    if boundary is None:
        raise InvalidInput("the content type of a form names its boundary, and this one does not")

    def on_field(field: Any) -> None:
        parts[(field.field_name or b"").decode("utf-8", "replace")] = field.value or b""

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        parts[(file.field_name or b"").decode("utf-8", "replace")] = file.file_object.read()

    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # it is in memory already; else it would go to a disk
    form = _form(on_field, on_file, boundary[1].encode("latin-1", "replace"), config)
    try:
        form.write(body)
        form.finalize()
    except python_multipart.exceptions.FormParserError as error:
        raise InvalidInput(f"the body is no form: {shown(str(error))}") from None
    return parts


def _form(on_field: Callable[[Any], None], on_file: Callable[[Any], None], boundary: bytes, config: Any) -> Any:
    return python_multipart.FormParser(MULTIPART, on_field, on_file, boundary=boundary, config=config)
