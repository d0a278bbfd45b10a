"""Keeps evidence: records of what was asked and computed, chained by hashes, that can be verified and replayed."""
