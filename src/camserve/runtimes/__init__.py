"""Runs a network: by PyTorch as it is, or by ONNX Runtime, whichever measuring finds faster on this machine."""
