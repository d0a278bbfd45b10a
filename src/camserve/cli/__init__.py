"""Provides the command `camserve`: its commands, and what they show in a terminal."""

from camserve.cli.commands import camserve, main, run, write_pictures

__all__ = ["camserve", "main", "run", "write_pictures"]
