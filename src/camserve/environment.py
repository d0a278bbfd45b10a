"""Makes up for what a bare environment lacks: in a container the user may be a number without a name and a home."""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Variables in which Python looks for the name of the user, before it asks the list of users."""


def complete(environ: MutableMapping[str, str]) -> None:
    """Adds a name and a home for a user who has none, so that libraries need not ask the list of users for them.

    Torch asks for the name when it is imported, and fails without one. A home that is missing is the folder for
    temporary files: what libraries keep there is kept by nobody else.
    """
    known = _is_known()
    if not known and not any(environ.get(name) for name in _NAMES):
        environ["LOGNAME"] = f"uid{os.getuid()}"
    if not known and not environ.get("HOME"):
        environ["HOME"] = tempfile.gettempdir()


def _is_known() -> bool:
    """Tells whether the list of users has that of this process."""
    try:
        import pwd
    except ImportError:  # a system that has no numbers for users
        return True
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True
