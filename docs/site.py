"""Makes the pages of the documentation site that are written elsewhere; a hook of MkDocs, see `mkdocs.yml`.

The first page is the README; contributing and changes are the files of the repository. The gRPC reference is made of
the proto files with their comments, the Python reference of docstrings. Links to files that are no page of the site
become the names of these files.
"""

from __future__ import annotations

import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/decisions": "decisions/index.md",
    "proto/camserve/v1/explain.proto": "reference/grpc.md",
}
"""Pages of the site by the files of the repository that they are made of; those in docs/ have their own names."""

PYTHON = {
    "Clients": ("camserve.Client", "camserve.AsyncClient", "camserve.Tls", "camserve.many.Answered"),
    "Without a server": ("camserve.Engine",),
    "Options": ("camserve.types.request.Options", "camserve.types.BoxOptions", "camserve.types.StreamOptions"),
    "Targets": ("camserve.types.targets",),
    "Answers": ("camserve.types.explanation",),
    "Notebooks": ("camserve.notebook",),
    "Errors": ("camserve.errors",),
}
"""What the Python reference has, by heading."""

_LINK = re.compile(r"(?<!\\)(!?\[[^\]]*\])\(([^)\s]+)\)")
_TYPES = {number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}
_LABELS = {FieldDescriptorProto.LABEL_REPEATED: "repeated "}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made here."""
    from mkdocs.structure.files import File

    for page, text in made_pages().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Returns a page whose links lead to pages of the site, or nowhere."""
    own = (path for path, made in PAGES.items() if made == page.file.src_uri and path.endswith(".md"))
    source = next(own, f"docs/{page.file.src_uri}")
    known = {file.src_uri for file in files}
    return with_links(markdown, source, page.file.src_uri, known)


def made_pages() -> dict[str, str]:
    """Returns the texts of the pages that are made here, by their paths on the site."""
    texts = {page: (ROOT / path).read_text(encoding="utf-8") for path, page in PAGES.items() if path.endswith(".md")}
    return texts | {
        "reference/grpc.md": grpc_reference(),
        "reference/python.md": python_reference(),
        "decisions/index.md": list_of_decisions(),
    }


def with_links(text: str, source: str, page: str, known: set[str]) -> str:
    """Returns a text with its links changed from those of a repository to those of the site.

    Args:
        text: Markdown.
        source: path of the file in the repository; links are relative to it.
        page: path of its page on the site.
        known: paths of all pages and pictures of the site.
    """

    def changed(link: re.Match[str]) -> str:
        label, (path, hash_mark, anchor) = link[1], link[2].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        on_site = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if on_site not in known:
            return f"`{target}`" if label in (f"[{target}]", f"[{path}]") else f"{label[1:-1]} (`{target}`)"
        return f"{label}({posixpath.relpath(on_site, posixpath.dirname(page) or '.')}{hash_mark}{anchor})"

    return _LINK.sub(changed, text)


def list_of_decisions() -> str:
    """Returns the page that names all decisions, in their order."""
    names = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    titles = [path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in names]
    entries = [f"- [{title}]({path.name})" for title, path in zip(titles, names, strict=True)]
    return "\n".join(["# Decisions", "", *entries, ""])


def python_reference() -> str:
    """Returns the page whose parts mkdocstrings fills in."""
    parts = "\n\n".join(
        f"## {heading}\n\n" + "\n\n".join(f"::: {name}" for name in names) for heading, names in PYTHON.items()
    )
    return f"# Python\n\n{parts}\n"


def grpc_reference() -> str:
    """Returns the page of `camserve.v1`: services, messages and enumerations with the comments of the proto file."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "set"
        _compile(compiled)
        (file,) = FileDescriptorSet.FromString(compiled.read_bytes()).file
    comments = {tuple(each.path): each.leading_comments.strip() for each in file.source_code_info.location}
    lines = ["# gRPC", "", f"Package `{file.package}`. The file is `{_proto()}`.", ""]
    for number, service in enumerate(file.service):
        lines += [f"## {service.name}", "", _prose(comments.get((6, number), "")), ""]
        for index, call in enumerate(service.method):
            returned = f"{'stream of ' if call.server_streaming else ''}{_short(call.output_type)}"
            lines += [f"### {call.name}", "", f"`{_short(call.input_type)}` to `{returned}`", ""]
            lines += [_prose(comments.get((6, number, 2, index), "")), ""]
    lines += ["## Messages", ""]
    for number, message in enumerate(file.message_type):
        lines += _message(message, (4, number), comments, "")
    for number, values in enumerate(file.enum_type):
        lines += _enumeration(values, (5, number), comments, "")
    return "\n".join(lines)


def _compile(out: Path) -> None:
    """Writes the descriptors of the API's proto file, comments included.

    Raises:
        RuntimeError: the file cannot be compiled.
    """
    from grpc_tools import protoc

    arguments = ["protoc", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={out}", "--include_source_info"]
    if protoc.main([*arguments, str(ROOT / _proto())]):
        raise RuntimeError(f"{_proto()} cannot be compiled")


def _proto() -> str:
    return next(path for path in PAGES if path.endswith(".proto"))


def _message(
    message: DescriptorProto, path: tuple[int, ...], comments: Mapping[tuple[int, ...], str], outer: str
) -> Iterator[str]:
    """Yields the lines of a message and of what is declared inside it."""
    name = f"{outer}{message.name}"
    yield from (f"### {name}", "", _prose(comments.get(path, "")), "")
    if message.field:
        yield from ("| field | type | number | |", "| --- | --- | ---: | --- |")
    for number, field in enumerate(message.field):
        kind = _short(field.type_name) if field.type_name else _TYPES[field.type]
        said = _cell(comments.get((*path, 2, number), ""))
        yield f"| `{field.name}` | {_LABELS.get(field.label, '')}{kind} | {field.number} | {said} |"
    yield ""
    for number, inner in enumerate(message.nested_type):
        if not inner.options.map_entry:
            yield from _message(inner, (*path, 3, number), comments, f"{name}.")
    for number, values in enumerate(message.enum_type):
        yield from _enumeration(values, (*path, 4, number), comments, f"{name}.")


def _enumeration(
    values: EnumDescriptorProto, path: tuple[int, ...], comments: Mapping[tuple[int, ...], str], outer: str
) -> Iterator[str]:
    yield from (f"### {outer}{values.name}", "", _prose(comments.get(path, "")), "")
    yield from ("| value | number | |", "| --- | ---: | --- |")
    for number, value in enumerate(values.value):
        yield f"| `{value.name}` | {value.number} | {_cell(comments.get((*path, 2, number), ''))} |"
    yield ""


def _short(name: str) -> str:
    """Returns the name of a type without its package."""
    return name.removeprefix(".camserve.v1.").lstrip(".")


def _prose(comment: str) -> str:
    return "\n".join(line.strip() for line in comment.splitlines())


def _cell(comment: str) -> str:
    return _prose(comment).replace("\n", " ").replace("|", "\\|")
