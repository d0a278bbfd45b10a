"""Masked queries of many images and methods, packed into micro-batches. torch only."""
