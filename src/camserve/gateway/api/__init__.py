"""Holds what clients reach: thin servicers, each of which decodes, calls and encodes.

The servicers (`explanation`, `inference`) have `calls` read, measure and end every explain call; `Calls.explain` hands
it to `camserve.gateway.requests`. Before that `request_ids` names the call and `auth` lets it in; `access` says what
its caller may ask for, and `status` turns errors into gRPC statuses.
"""
