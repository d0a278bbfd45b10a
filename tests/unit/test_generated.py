"""The generated code in src/ is what the .proto files give."""

from pathlib import Path

import grpc_tools
import pytest
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTO, SRC = ROOT / "proto", ROOT / "src"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("generated")
    sources = sorted(PROTO.rglob("*.proto"))
    run_protoc(sources, f"--python_out={out}", f"--pyi_out={out}")
    run_protoc([path for path in sources if "\nservice " in path.read_text()], f"--grpc_python_out={out}")
    return out


def run_protoc(sources: list[Path], *outputs: str) -> None:
    assert protoc.main(["protoc", f"-I{PROTO}", f"-I{WELL_KNOWN}", *outputs, *map(str, sources)]) == 0


def modules(directory: Path) -> dict[str, str]:
    """Text of the generated files by path."""
    patterns = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
    paths = [path for pattern in patterns for path in directory.rglob(pattern)]
    return {str(path.relative_to(directory)): path.read_text() for path in paths}


def test_protobuf_code_is_up_to_date(generated):
    committed, expected = modules(SRC), modules(generated)
    assert committed.keys() == expected.keys()
    stale = [path for path, text in expected.items() if committed[path] != text]
    assert stale == [], "run `make proto`"
