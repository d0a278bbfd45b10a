"""Runs beside the model: decodes, makes one forward, asks masked queries, returns partials.

Importing this package imports nothing, so that the gateway can use the generated code in `camserve.worker.v1` without
torch.
"""
