"""What runs beside the model: decode, one forward, masked queries, partials.

Importing this package imports nothing, so that the gateway can use the generated code in `camserve.worker.v1` without
torch.
"""
