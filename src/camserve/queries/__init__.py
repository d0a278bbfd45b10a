"""Packs masked queries of many images and methods into micro-batches. torch only."""
