"""Makes an `ExplainRequest` of what comes in, and what goes out of an `Explanation`: one module for each door.

`v1` is the typed gRPC API of servers and clients, `oip` the Open Inference Protocol, `plain` what TorchServe's own
clients send and get, `step` what travels between the gateway and a worker. `texts` is what doors without typed messages
share.

A codec refuses what has the wrong form. Whether a value is allowed is said by the types that it makes, and whether the
request fits the model by `ExplainRequest.fit`, so that every door refuses with the same words.
"""
