"""Serves camserve's public gRPC API: validates, plans, merges and renders, without torch.

One explain call goes through the rooms `api` -> `requests` -> `pool` -> `camserve.planning`, and its reply comes back
the same way:

    servicer              api/explanation.py or inference.py: hands in the bytes, and how its messages are read
    Calls.explain         api/calls.py: decodes, bounds the caller, counts, logs, ends with a status
    Explainer.explain     requests/explainer.py: validates against the model, chooses the method, renders the reply
    Dispatcher.running    pool/dispatcher.py: admits the request, sends steps to TorchServe, merges their answers
    Planner               planning/planner.py: decides which queries go into which step, and where

`ops` holds what operators set and see, and `server` puts everything together.
"""
