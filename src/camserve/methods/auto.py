"""Describes the server's choice, no method of the catalogue: it becomes one before any query is asked."""

from __future__ import annotations

from dataclasses import dataclass

from camserve.methods.spec import MethodSpec


@dataclass(frozen=True)
class Auto(MethodSpec):
    """Stands for the most faithful method of the server's ladder that will fit into the request's deadline."""

    title = "Automatic"
    requires = frozenset()
    positive = "the method that a server chooses may have positive evidence alone"
    paper = ""
