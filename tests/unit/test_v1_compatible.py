"""Clients of 0.1 keep working: `camserve.v1` has all that it had, under the same numbers and types.

`explain_0_1.json` is the descriptor of proto/camserve/v1/explain.proto as version 0.1 had it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto

from camserve.v1 import explain_pb2 as pb

BEFORE = json_format.Parse((Path(__file__).parent / "explain_0_1.json").read_text(), FileDescriptorProto())
NOW = FileDescriptorProto()
pb.DESCRIPTOR.CopyToProto(NOW)


def messages(file: FileDescriptorProto) -> dict[str, DescriptorProto]:
    def inside(prefix: str, found: DescriptorProto) -> Iterator[tuple[str, DescriptorProto]]:
        yield prefix + found.name, found
        for nested in found.nested_type:
            yield from inside(f"{prefix}{found.name}.", nested)

    return {name: found for message in file.message_type for name, found in inside("", message)}


def enums(file: FileDescriptorProto) -> dict[str, EnumDescriptorProto]:
    nested = {f"{name}.{enum.name}": enum for name, found in messages(file).items() for enum in found.enum_type}
    return {enum.name: enum for enum in file.enum_type} | nested


def fields(message: DescriptorProto) -> dict[str, tuple[object, ...]]:
    """What a client relies on of each field: number, type, how often it comes, and what it excludes."""
    groups = [group.name for group in message.oneof_decl]
    return {
        field.name: (
            field.number,
            field.type,
            field.type_name,
            field.label,
            field.proto3_optional,
            groups[field.oneof_index] if field.HasField("oneof_index") else "",
        )
        for field in message.field
    }


def differences(before: FileDescriptorProto, now: FileDescriptorProto) -> list[str]:
    """Returns what a client of `before` would miss in `now`, or read wrongly."""
    wrong = [] if before.package == now.package else ["package"]
    for name, message in messages(before).items():
        known = fields(messages(now).get(name, DescriptorProto()))
        wrong += [f"{name}.{field}" for field, what in fields(message).items() if known.get(field) != what]
    for name, enum in enums(before).items():
        there = {value.name: value.number for value in enums(now).get(name, EnumDescriptorProto()).value}
        wrong += [f"{name}.{value.name}" for value in enum.value if there.get(value.name) != value.number]
    calls = {(service.name, call.name): call.SerializeToString() for service in now.service for call in service.method}
    wrong += [
        f"{service.name}.{call.name}"
        for service in before.service
        for call in service.method
        if calls.get((service.name, call.name)) != call.SerializeToString()
    ]
    return wrong


def test_nothing_of_0_1_is_gone_renumbered_or_of_another_type():
    assert sum(len(message.field) for message in messages(BEFORE).values()) == 185
    assert differences(BEFORE, NOW) == []


def without_top_k(now: FileDescriptorProto) -> None:
    (target,) = (message for message in now.message_type if message.name == "Target")
    target.field.remove(target.field[2])


def with_another_number(now: FileDescriptorProto) -> None:
    messages(now)["Cost"].field[0].number = 99


def with_another_type(now: FileDescriptorProto) -> None:
    messages(now)["SaliencyMap"].field[5].type = descriptor_pb2.FieldDescriptorProto.TYPE_STRING


def out_of_its_oneof(now: FileDescriptorProto) -> None:
    messages(now)["Target"].field[0].ClearField("oneof_index")


def with_another_enum_number(now: FileDescriptorProto) -> None:
    enums(now)["Output.Encoding"].value[2].number = 77


def without_a_call(now: FileDescriptorProto) -> None:
    now.service[0].method.remove(now.service[0].method[1])


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (without_top_k, ["Target.top_k"]),
        (with_another_number, ["Cost.queries"]),
        (with_another_type, ["SaliencyMap.data"]),
        (out_of_its_oneof, ["Target.index"]),
        (with_another_enum_number, ["Output.Encoding.FLOAT16"]),
        (without_a_call, ["ExplanationService.StreamExplain"]),
    ],
)
def test_what_a_client_would_miss_is_found(change, missed):
    changed = FileDescriptorProto()
    changed.CopyFrom(NOW)
    change(changed)
    assert differences(BEFORE, changed) == missed


def test_a_client_of_0_1_reads_a_reply_of_today_and_is_read():
    pool = descriptor_pool.DescriptorPool()
    pool.Add(BEFORE)
    old = {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"camserve.v1.{name}"))
        for name in ("ExplainReply", "ExplainRequest")
    }
    boat = pb.Prediction(index=7, label="boat", probability=0.5)
    saliency = pb.SaliencyMap(target=boat, data=b"1234", target_text="contrast:boat>cup", classes=[boat], score=0.25)
    read = old["ExplainReply"].FromString(pb.ExplainReply(predictions=[boat], maps=[saliency]).SerializeToString())
    assert (read.maps[0].target.label, read.maps[0].target.probability, read.maps[0].data) == ("boat", 0.5, b"1234")
    asked = old["ExplainRequest"](model="lite0")
    asked.targets.add(label="tabby")
    asked.targets.add(top_k=3)
    assert pb.ExplainRequest.FromString(asked.SerializeToString()) == pb.ExplainRequest(
        model="lite0", targets=[pb.Target(label="tabby"), pb.Target(top_k=3)]
    )
