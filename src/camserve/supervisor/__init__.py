"""Runs TorchServe's JVM, alone or together with the gateway. No torch, and no `ts`, is imported here.

`settings` has what can be set, `java` finds a Java, `config` says how TorchServe is set up, `process` starts and stops
it, `serving` puts the gateway in front of it or runs it alone.
"""

from camserve.supervisor.java import find_java
from camserve.supervisor.process import TorchServe
from camserve.supervisor.serving import serve, serve_worker
from camserve.supervisor.settings import WorkerSettings

__all__ = ["TorchServe", "WorkerSettings", "find_java", "serve", "serve_worker"]
