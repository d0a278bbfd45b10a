"""From merged sums to what a caller looks at: maps, boxes, pictures, encodings. numpy and Pillow; no torch, no gRPC."""
