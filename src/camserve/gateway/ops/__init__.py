"""Holds what operators set and see: settings, TLS and shutdown, metrics and traces.

The other rooms of the gateway take their bounds from `settings`, count in `metrics` and open spans in `tracing`.
"""
