"""The public face of camserve: a gRPC server that validates, plans, merges and renders. No torch."""
