"""Knows the TorchServes behind the gateway, whether they answer, and sends them the steps of requests.

`discovery` finds backends, `registry` and `readiness` watch their models, and `torchserve` speaks to them. The
`dispatcher` of a model admits requests to its planner (`camserve.planning`), sends the steps that this decides, has
`check_answer` look at what comes back and hands it to the runs. `fake` is a backend without TorchServe.
"""
