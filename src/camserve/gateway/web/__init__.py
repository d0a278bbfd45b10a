"""Answers over HTTP what the typed gRPC service answers, by the same path: extra `web`, on a port of its own."""
