"""Describes the HTTP door by OpenAPI 3.1, made of the descriptors of the proto file; Open Inference has its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from camserve import __version__
from camserve.codecs.oip_json import HEADER_LENGTH
from camserve.codecs.v1_json import IMAGE_PART, JSON, MULTIPART, REQUEST_PART
from camserve.gateway.web.open_inference import BINARY, DETAIL, PREFIX
from camserve.gateway.web.problems import PROBLEM_TYPE
from camserve.v1 import explain_pb2 as pb

_REFERENCE = "#/components/schemas/"
_SCALARS: Mapping[int, dict[str, Any]] = {
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.TYPE_UINT64: {"type": "string", "format": "uint64"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
"""Schemas of what ProtoJSON writes for each type."""

_PROBLEM = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "kind": {"type": "string", "description": "Name of the class in camserve.errors."},
        "request_id": {"type": "string"},
        DETAIL: {
            "type": "string",
            "description": f"The detail again, under {PREFIX}: what clients of the protocol read.",
        },
    },
}
_HEADERS = [
    {
        "name": "Request-Timeout",
        "in": "header",
        "description": "Seconds in which an answer is wanted.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    {"name": "X-Request-Id", "in": "header", "description": "Id for the log.", "schema": {"type": "string"}},
]
_JSON_LENGTH = {
    "name": HEADER_LENGTH.title(),
    "in": "header",
    "description": "Bytes of the body that are JSON; binary elements of tensors follow them.",
    "schema": {"type": "integer", "minimum": 0},
}
_PARAMETERS = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}


def _tensor(**further: Any) -> dict[str, Any]:
    """Returns the schema of a tensor of the Open Inference Protocol."""
    properties = {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
    }
    return {"type": "object", "required": list(properties), "properties": properties | further}


_OPEN_INFERENCE: Mapping[str, dict[str, Any]] = {
    "InferenceRequest": {
        "type": "object",
        "additionalProperties": False,
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "parameters": _PARAMETERS,
            "inputs": {"type": "array", "items": _tensor(parameters=_PARAMETERS, data={"type": "array"})},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}, "parameters": _PARAMETERS},
                },
            },
        },
    },
    "InferenceResponse": {
        "type": "object",
        "required": ["model_name", "model_version", "parameters", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": _PARAMETERS,
            "outputs": {"type": "array", "items": _tensor(parameters=_PARAMETERS, data={"type": "array"})},
        },
    },
    "InferenceServer": {
        "type": "object",
        "required": ["name", "version", "extensions"],
        "properties": {
            "name": {"type": "string"},
            "version": {"type": "string"},
            "extensions": {"type": "array", "items": {"type": "string"}},
        },
    },
    "InferenceModel": {
        "type": "object",
        "required": ["name", "versions", "platform", "inputs", "outputs"],
        "properties": {
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"type": "string"},
            "inputs": {"type": "array", "items": _tensor()},
            "outputs": {"type": "array", "items": _tensor()},
        },
    },
}
"""Schemas of the Open Inference Protocol, whose JSON is its own and not protobuf's."""


def document() -> dict[str, Any]:
    """Returns the document."""
    schemas: dict[str, Any] = {"Problem": _PROBLEM, **_OPEN_INFERENCE}
    for message in (pb.ExplainRequest, pb.ExplainReply, pb.Progress, pb.ListModelsReply, pb.Model):
        _add(message.DESCRIPTOR, schemas)
    events = (
        "Server-sent events: `progress`, each with a Progress, then one `reply` with an ExplainReply, or `problem`."
    )
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "camserve", "version": __version__},
        "paths": {
            "/v1/explain": {"post": _explain("Explains an image.", {JSON: _schema("ExplainReply")})},
            "/v1/explain:stream": {"post": _explain(events, {"text/event-stream": {"schema": {"type": "string"}}})},
            "/v1/models": {"get": _operation("Lists the models.", {JSON: _schema("ListModelsReply")})},
            "/v1/models/{name}": {
                "get": {**_operation("Describes a model.", {JSON: _schema("Model")}), "parameters": [name]}
            },
            "/openapi.json": {"get": _operation("Returns this document.", {JSON: {}}) | {"security": []}},
            "/healthz": {"get": _operation("Tells that the server runs.", {JSON: {}}) | {"security": []}},
            "/readyz": {"get": _operation("Tells whether a model is ready.", {JSON: {}}) | {"security": []}},
            **_inference_paths(),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _inference_paths() -> dict[str, Any]:
    """Returns the paths of the Open Inference Protocol."""
    paths: dict[str, Any] = {
        PREFIX: {"get": _operation("Describes the server.", {JSON: _schema("InferenceServer")})},
        f"{PREFIX}/health/live": {"get": _operation("Tells that the server runs.", {JSON: {}}) | {"security": []}},
        f"{PREFIX}/health/ready": {"get": _operation("Tells whether a model is ready.", {JSON: {}}) | {"security": []}},
    }
    both = {kind: _schema("InferenceResponse") for kind in (JSON, BINARY)}
    asked = {"required": True, "content": {kind: _schema("InferenceRequest") for kind in (JSON, BINARY)}}
    for path, names in (("/models/{name}", ["name"]), ("/models/{name}/versions/{version}", ["name", "version"])):
        of_path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        infer = _operation("Explains an image.", both) | {"parameters": [*_HEADERS, _JSON_LENGTH], "requestBody": asked}
        of_model = {
            "": {"get": _operation("Describes a model.", {JSON: _schema("InferenceModel")})},
            "/ready": {"get": _operation("Tells whether a model is ready.", {JSON: {}})},
            "/infer": {"post": infer},
        }
        paths |= {f"{PREFIX}{path}{end}": {"parameters": of_path, **found} for end, found in of_model.items()}
    return paths


def _explain(description: str, content: dict[str, Any]) -> dict[str, Any]:
    form = {
        "type": "object",
        "required": [IMAGE_PART],
        "properties": {
            IMAGE_PART: {"type": "string", "contentMediaType": "application/octet-stream"},
            REQUEST_PART: {"$ref": f"{_REFERENCE}ExplainRequest"},
        },
    }
    body = {"required": True, "content": {JSON: _schema("ExplainRequest"), MULTIPART: {"schema": form}}}
    return {**_operation(description, content), "parameters": _HEADERS, "requestBody": body}


def _operation(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": description,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "What is wrong.", "content": {PROBLEM_TYPE: _schema("Problem")}},
        },
    }


def _schema(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"{_REFERENCE}{name}"}}


def _add(message: Any, schemas: dict[str, Any]) -> None:
    """Adds the schema of a message, and of all that is in it."""
    name = _name(message)
    if name in schemas:
        return
    schemas[name] = {"type": "object", "additionalProperties": False, "properties": {}}
    for field in message.fields:
        schemas[name]["properties"][field.json_name] = _field(field, schemas)


def _field(field: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _value(kind.fields_by_name["value"], schemas)}
    value = _value(field, schemas)
    return {"type": "array", "items": value} if field.is_repeated else value


def _value(field: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None:
        _add(field.message_type, schemas)
        return {"$ref": f"{_REFERENCE}{_name(field.message_type)}"}
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    return _SCALARS[field.type]


def _name(message: Any) -> str:
    return str(message.full_name.removeprefix("camserve.v1."))
