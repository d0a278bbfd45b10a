"""Computes the methods, as functions on tensors. torch only: no gRPC, no images, no asyncio.

`capture` runs the one forward pass that every method starts from; `registry` says which functions make up a method.
"""
