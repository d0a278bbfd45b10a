"""Generated from proto/camserve/oip: the Open Inference Protocol."""
