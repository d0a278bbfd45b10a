"""Packs networks as Hugging Face saves them; no other package knows the ways of transformers."""

from camserve.archive.hugging_face.directory import (
    CONFIG,
    HUGGING_FACE,
    Found,
    build_network,
    file_names,
    read_directory,
)

__all__ = ["CONFIG", "HUGGING_FACE", "Found", "build_network", "file_names", "read_directory"]
