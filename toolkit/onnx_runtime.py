"""The package onnxruntime, loaded in one place: it reports nothing to anybody, and prints nothing.

Its official builds send events to Microsoft unless ORT_DISABLE_TELEMETRY is set before they start;
they begin with a store in the user's cache folder and a look-up of the receiving host
(onnxruntime/Privacy.md). A value that the user has set stays.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from edgevlm.toolkit.errors import needing

_SWITCH = "ORT_DISABLE_TELEMETRY"
_ERRORS_ONLY = 3


def load(
    package: str = "onnxruntime", extra: str = "cpu", purpose: str = "running on this processor"
) -> Any:
    """The module. Raises MissingExtra, naming `package` and `extra`."""
    if "onnxruntime" in sys.modules:
        return sys.modules["onnxruntime"]
    os.environ.setdefault(_SWITCH, "1")
    with needing(package, extra, purpose=purpose):
        import onnxruntime
    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    return onnxruntime
