"""The documentation's links lead somewhere, in the repository and on the site, which loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

from camserve.v1 import explain_pb2

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "benchmarks/**/*.md", "model_store/**/*.md")
    for path in ROOT.glob(pattern)
)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found, seen = set(), Counter()
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def links(page: Path) -> Iterator[str]:
    text = re.sub(
        r"^```.*?^```|^    .*?$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_the_repository_leads_to_something(page: Path):
    for link in links(page):
        if urlparse(link).scheme:
            continue
        path, anchor = urldefrag(link)
        target = (page.parent / unquote(path)).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


class Loaded(HTMLParser):
    """Collects what a page has a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.addresses.append(given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built; a link without an end, or a page that no list has, is an error there."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert not [address for address in loaded.addresses if urlparse(address).netloc], page
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?https?:", styles)


def test_the_reference_has_every_call_message_and_class(site):
    grpc_page = (site / "reference" / "grpc.html").read_text(encoding="utf-8")
    for call in explain_pb2.DESCRIPTOR.services_by_name["ExplanationService"].methods:
        assert f'id="{call.name.lower()}"' in grpc_page
    for name, message in explain_pb2.DESCRIPTOR.message_types_by_name.items():
        assert f'id="{name.lower()}"' in grpc_page
        for field in message.fields:
            assert f"<code>{field.name}</code>" in grpc_page
    assert "Adds deletion and insertion (RISE protocol) of every map in the reply" in grpc_page
    python_page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in ("camserve.Client.explain_many", "camserve.Engine.explain", "camserve.errors.Overloaded"):
        assert f'id="{name}"' in python_page


@pytest.fixture(scope="module")
def maker():
    """The module `docs/site.py`."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "source", "page", "expected"),
    [
        ("[a](docs/b.md#c)", "README.md", "index.md", "[a](b.md#c)"),
        ("![a](docs/images/x.png)", "README.md", "index.md", "![a](images/x.png)"),
        ("[a](../README.md)", "docs/b.md", "b.md", "[a](index.md)"),
        ("[a](../b.md)", "docs/decisions/0001.md", "decisions/0001.md", "[a](../b.md)"),
        ("[deploy](../deploy)", "docs/b.md", "b.md", "`deploy`"),
        ("[the manifests](../deploy)", "docs/b.md", "b.md", "the manifests (`deploy`)"),
        ("[a](#c) [d](https://e.f/g)", "docs/b.md", "b.md", "[a](#c) [d](https://e.f/g)"),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(maker, text, source, page, expected):
    known = {"index.md", "b.md", "images/x.png", "decisions/0001.md"}
    assert maker.with_links(text, source, page, known) == expected
