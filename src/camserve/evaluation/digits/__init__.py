"""Offers a benchmark with known truth: real handwritten digits composed into scenes over photo textures.

`scenes` makes the scenes from fixed seeds, `network` is a compact classifier of them with the weights beside it, which
`benchmarks/digits/train.py` made.
"""
