"""Answers one request, whichever door it came by: chooses its methods, follows its run, renders and keeps its reply.

`Explainer.explain` is the way through: `auto` and `demands` prepare a request for the planner, `running` is what
`camserve.gateway.pool` reports to while its steps come and go, `rendering` and `reply_cache` make and keep replies.
"""
