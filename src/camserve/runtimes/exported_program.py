"""Reads programs of torch.export, which others have made, without running anything that is in them.

`torch.export.load` trusts its file: it unpickles objects, evaluates the text of sizes, looks up the functions of the
graph by name anywhere in torch, and makes Python code of a graph's names. So a file is taken apart here, and an archive
with what is left is written anew: tensors as plain numbers, operators that compute on tensors, names that are names,
sizes that are sums and products. What a file has beyond that is refused, or left out where nothing depends on it.
"""

from __future__ import annotations

import io
import json
import keyword
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from camserve.archive.untrusted import opened_zip, reading, short

WHAT = "a program that torch.export.save wrote"
MAX_BYTES = 2**32
"""Bytes of a program with its weights."""
MAX_GRAPH_BYTES = 2**27
"""Bytes of a graph without its weights; that of a deep network has some millions."""

_NEWER = "save it again by PyTorch 2.8 or newer: torch.export.save(torch.export.load(FILE), FILE)"
_NAMESPACES = ("aten", "torchvision")
_FORBIDDEN = frozenset({"from_file", "save", "warn"})
"""Operators that touch more than tensors."""
_TEXTS = frozenset(
    {"rounding_mode", "approximate", "mode", "padding", "padding_mode", "indexing", "reduce", "equation"}
)
"""Arguments of operators that are texts."""
_SCALARS = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(trunc|ceil|floor|sqrt)|torch\.sym_(int|float|max|min|not|ite|sum)"
)
"""Functions of numbers that a graph may use beside operators."""
_FUNCTIONS = re.compile(
    r"Max|Min|FloorDiv|CleanDiv|CeilDiv|Mod|PythonMod|ModularIndexing|CeilToInt|FloorToInt|TruncToInt|RoundToInt|ToFloat"
    r"|IntTrueDiv|FloatTrueDiv|Identity|Eq|Ne|And|Or|Not|True|False|int_oo|oo"
    r"|Symbol|Integer|Add|Mul|Rational|positive|nonnegative|integer"
)
"""Functions and constants of the expressions of sizes."""
_SYMBOL = re.compile(r"z?[su]f?\d+")
_QUOTED = re.compile(rf"'({_SYMBOL.pattern})'")
_WORD = re.compile(r"[A-Za-z_]\w*")
_EXPRESSION = re.compile(r"[\w\s+\-*/(),<>=~&|%]{1,1000}", re.ASCII)
_PLAIN = re.compile(r"[\w.:\-+/@ ]{0,400}", re.ASCII)
"""Texts that are names of something, and neither names in the graph nor expressions."""
_STACK = re.compile(r"[\w.@'\[\]()]*,[\w.@]*,[\w.<>]*", re.ASCII)
"""A module on the way to an operator: its key, its address and its type."""
_NAMES = frozenset({"name", "as_name"})
_ABOUT = ("archive_format", "archive_version", "byteorder", ".data/version")
"""Files that say what an archive is."""
_STRUCTURES = ("builtins.tuple", "builtins.list", "builtins.dict")


def read_program(path: Path) -> bytes:
    """Returns a program as an archive that holds nothing but its graph and numbers.

    Raises:
        InvalidInput: it is none, or has what cannot be read safely; the text says what.
    """
    with reading(path, WHAT):
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it may have at most {MAX_BYTES} bytes, has {size}")
        with opened_zip(path) as archive:
            return _clean(archive)


def checked(data: bytes, name: str) -> bytes:
    """Returns a program in the same way, of the bytes of an archive; raises as `read_program`."""
    with reading(Path(name), WHAT), zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its members must be stored as they are")
        return _clean(archive)


def _clean(archive: zipfile.ZipFile) -> bytes:
    """Returns an archive with what can be read safely of another one; raises ValueError as the module's text says."""
    members = _members(archive)
    if "archive_format" not in members and "serialized_exported_program.json" in members:
        raise ValueError(f"it has the form of PyTorch before 2.8: {_NEWER}")
    if not members.get("archive_format", b"").strip() == b"pt2":
        raise ValueError("it has no archive_format pt2")
    graphs = [name for name in members if name.startswith("models/") and name.endswith(".json")]
    if compiled := next((name for name in members if name.startswith("data/aotinductor")), None):
        raise ValueError(f"it holds code that a compiler has made ({short(compiled)}), and no code is run")
    if len(graphs) != 1:
        raise ValueError(f"it must hold one program, has {len(graphs)}")
    (graph,) = graphs
    model = PurePosixPath(graph).stem
    if len(members[graph]) > MAX_GRAPH_BYTES:
        raise ValueError(f"its graph may have at most {MAX_GRAPH_BYTES} bytes, has {len(members[graph])}")
    kept = {name: members[name] for name in _ABOUT if name in members}
    kept[graph] = json.dumps(_program(json.loads(members[graph]))).encode()
    for folder in ("weights", "constants"):
        kept |= dict(_numbers(members, f"data/{folder}/", f"data/{folder}/{model}_{folder}_config.json"))
    kept[f"data/sample_inputs/{model}.pt"] = b""  # they are pickled, and nothing depends on them
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as clean:
        for name, content in kept.items():
            clean.writestr(zipfile.ZipInfo(f"network/{name}", (1980, 1, 1, 0, 0, 0)), content)
    return written.getvalue()


def _members(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """Returns the files of an archive by name, without the folder that all of them are in."""
    infos = archive.infolist()
    if sum(info.file_size for info in infos) > MAX_BYTES:
        raise ValueError(f"it may unpack to at most {MAX_BYTES} bytes")
    found = {}
    for info in infos:
        folder, _, inner = info.filename.partition("/")
        name = inner or folder
        if name in found:
            raise ValueError(f"it has two files of the name {short(repr(name))}")
        found[name] = archive.read(info)
    return found


def _program(given: Any) -> dict[str, Any]:
    """Returns what a graph's JSON says, without what nothing depends on; raises ValueError where it says too much."""
    if not isinstance(given, dict) or not isinstance(given.get("graph_module"), dict):
        raise ValueError("it has no graph")
    content: dict[str, Any] = given | {"guards_code": []}  # texts of code; what the input must be is checked here
    if not set(content.get("verifiers", [])) <= {"TRAINING", "ATEN"}:
        raise ValueError(f"it is of a dialect that is not known: {short(repr(content['verifiers']))}")
    content["graph_module"] = content["graph_module"] | {"metadata": {}, "treespec_namedtuple_fields": {}}
    graph = content["graph_module"]["graph"]
    for node in graph["nodes"]:
        node["metadata"] = _metadata(node.get("metadata") or {})
        _check_operator(node)
    for call in content["graph_module"]["module_call_graph"]:
        for key in ("in_spec", "out_spec"):
            if call.get("signature"):
                call["signature"][key] = json.dumps(_structure(json.loads(call["signature"][key])))
    _check_values(content, "")
    return content


def _metadata(given: Mapping[str, Any]) -> dict[str, str]:
    """Returns the modules on the way to an operator; what else is told of one is for people."""
    stack = given.get("nn_module_stack")
    if not stack:
        return {}
    if not all(_STACK.fullmatch(part) for part in str(stack).split(";")):
        raise ValueError(f"it names modules that cannot be: {short(repr(stack))}")
    return {"nn_module_stack": str(stack)}


def _check_operator(node: Mapping[str, Any]) -> None:
    import torch

    target = str(node["target"])
    if _SCALARS.fullmatch(target):
        return
    parts = target.split(".")
    known: Any = None
    if len(parts) == 5 and parts[:2] == ["torch", "ops"] and parts[2] in _NAMESPACES and parts[3] not in _FORBIDDEN:
        known = getattr(getattr(getattr(torch.ops, parts[2]), parts[3], None), parts[4], None)
    if not isinstance(known, torch._ops.OpOverload):
        raise ValueError(
            f"its operators must be those of PyTorch on tensors, and it has {short(repr(target))}: no other code is "
            "run; program.run_decompositions() may take it apart"
        )
    for given in node.get("inputs", ()):
        if {"as_string", "as_strings"} & set(given["arg"]) and given["name"] not in _TEXTS:
            raise ValueError(f"the operator {target} is given a text as {short(repr(given['name']))}")


def _structure(said: Any) -> Any:
    """Returns the structure of inputs or outputs: what other classes hold by name, as a dict does, becomes one."""
    if not isinstance(said, list) or len(said) != 2 or not isinstance(said[0], int):
        raise ValueError("its inputs or outputs have a structure that is none")
    return [said[0], _part(said[1])]


def _part(part: Any) -> Any:
    children, kind, context = part["children_spec"], part["type"], part["context"]
    found = {"type": kind, "context": context, "children_spec": [_part(child) for child in children]}
    if kind is None or kind in _STRUCTURES[:2]:
        if context not in (None, "null", '""'):
            raise ValueError("its inputs or outputs have a structure that is none")
        return found
    names = json.loads(context) if isinstance(context, str) else context
    if not isinstance(names, list) or len(names) != len(children) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"its inputs or outputs are in a {short(repr(kind))}: export a network that returns a tensor, a tuple, a "
            "list or a dict"
        )
    return found | {"type": _STRUCTURES[2]}


def _check_values(value: Any, key: str) -> None:
    """Raises ValueError where a text is neither a name, nor an expression of sizes, nor plain."""
    if isinstance(value, dict):
        for inner, content in value.items():
            if inner in ("as_custom_obj", "custom_obj", "as_graph", "as_graphs") and content:
                raise ValueError(f"it has objects or graphs inside of its graph ({inner}), and only tensors are read")
            if inner == "device" and isinstance(content, dict) and content.get("type") != "cpu":
                raise ValueError(_device(content))
            if inner == "as_device" and content and content.get("type") != "cpu":
                raise ValueError(_device(content))
            if not _PLAIN.fullmatch(inner):
                raise ValueError(f"it has a name that cannot be: {short(repr(inner))}")
            _check_values(content, inner)
    elif isinstance(value, list):
        for content in value:
            _check_values(content, key)
    elif isinstance(value, str):
        _check_text(value, key)


def _device(said: Mapping[str, Any]) -> str:
    return (
        f"its numbers lie on {short(str(said.get('type')))}: move it before it is saved, "
        "torch.export.passes.move_to_device_pass(program, 'cpu')"
    )


def _check_text(text: str, key: str) -> None:
    if key == "expr_str":
        text = _QUOTED.sub(r"\1", text)
        words = _WORD.findall(text)
        known = all(_SYMBOL.fullmatch(word) or _FUNCTIONS.fullmatch(word) for word in words)
        if not known or not _EXPRESSION.fullmatch(text) or "**" in text:  # a power of a power never ends
            raise ValueError(f"it has a size that is no sum or product of sizes: {short(repr(text))}")
    elif key in _NAMES and text:
        if not text.isidentifier() or not text.isascii() or keyword.iskeyword(text):
            raise ValueError(f"it has a name that cannot be: {short(repr(text))}")
    elif key not in ("in_spec", "out_spec", "nn_module_stack") and not _PLAIN.fullmatch(text):
        raise ValueError(f"it has a text that cannot be: {short(repr(text))}")


def _numbers(members: Mapping[str, bytes], folder: str, config: str) -> Iterator[tuple[str, bytes]]:
    """Yields the files of tensors of a program, all of which are plain numbers."""
    if config not in members:
        raise ValueError(f"it has no {config}; it may have the form of an older PyTorch: {_NEWER}")
    content = json.loads(members[config])
    _check_values(content, "")
    for name, said in content["config"].items():
        file = str(said["path_name"])
        if said.get("use_pickle") or not said.get("tensor_meta"):
            raise ValueError(f"{short(repr(name))} is pickled, by which code could be run: {_NEWER}")
        if not re.fullmatch(r"(?:weight|tensor)_\d+", file) or folder + file not in members:
            raise ValueError(f"the file of {short(repr(name))} is not there: {short(repr(file))}")
        if not members[folder + file] and all(size.get("as_int") != 0 for size in said["tensor_meta"]["sizes"]):
            raise ValueError(f"{short(repr(name))} has no numbers")
        yield folder + file, members[folder + file]
    yield config, members[config]
