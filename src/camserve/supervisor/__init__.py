"""Runs TorchServe's JVM and the gateway together. No torch, and no `ts`, is imported here.

`java` finds a Java, `config` says how TorchServe is set up, `process` starts and stops it, `serving` puts the gateway
in front of it.
"""

from camserve.supervisor.config import ServeOptions
from camserve.supervisor.java import find_java
from camserve.supervisor.process import TorchServe
from camserve.supervisor.serving import serve

__all__ = ["ServeOptions", "TorchServe", "find_java", "serve"]
