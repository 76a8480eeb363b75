"""Every error that edgevlm raises on purpose, as one tree.

ToolkitError                 message + hint (the next step)
├── ConfigError              a config file or option with an unknown or conflicting value
├── CheckpointError          weights on disk: missing, unexpected, mis-shaped, truncated
├── BundleError              a bundle or engine folder that does not match its manifest
├── InputError               an image, prompt or request that cannot be used
│   └── PromptTooLong        the prompt does not fit into the engine's context
├── UnsupportedError         this op, model or precision does not exist on that target
├── MissingExtra             an optional package is needed; the hint is the install command
├── DataError                a data set that cannot be read, or with too many broken samples
├── CalibrationError         the samples cannot give a precision plan
├── BuildError               a backend refused to compile a component
├── TargetMismatch           the engine was built for another machine; the hint rebuilds it
├── OutOfMemory              memory needed, memory free, and what lowers the need
├── OutputError              the artifact could not be written (exists, disk full, no permission)
└── AccuracyError            a built component differs from the reference by too much
"""

from __future__ import annotations


class ToolkitError(Exception):
    """An error with the offending value in `message` and the next step in `hint`."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(ToolkitError):
    """A configuration value is unknown, missing, of the wrong type or not implemented."""


class CheckpointError(ToolkitError):
    """A checkpoint's tensors are missing, unexpected, mis-shaped or unreadable."""


class BundleError(ToolkitError):
    """A bundle or engine folder is damaged or of another format."""


class InputError(ToolkitError):
    """An image, a prompt or a request file cannot be used."""


class PromptTooLong(InputError):
    """A prompt has more tokens than the engine's context; a chat drops its oldest turns then."""


class UnsupportedError(ToolkitError):
    """The combination of model, op, precision and target is not implemented."""


class MissingExtra(ToolkitError):
    """A package that only this verb needs is not installed."""

    def __init__(self, package: str, extra: str, *, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"pip install 'edgevlm[{extra}]'",
        )


class DataError(ToolkitError):
    """A data set for training cannot be read, or too many of its samples are broken."""


class CalibrationError(ToolkitError):
    """The calibration samples or ranges cannot give a precision plan."""


class BuildError(ToolkitError):
    """A backend could not compile or load a component."""


class TargetMismatch(ToolkitError):
    """An engine is opened on a machine, backend or version other than it was built for."""


class OutOfMemory(ToolkitError):
    """The work needs more memory than is free."""


class OutputError(ToolkitError):
    """An artifact could not be written."""


class AccuracyError(ToolkitError):
    """The output of a built component differs from the reference by more than is allowed."""
