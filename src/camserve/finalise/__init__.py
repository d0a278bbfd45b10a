"""Turns merged sums into what a caller looks at: maps, boxes, pictures, encodings. No torch and no gRPC."""
