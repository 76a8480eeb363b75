"""Checks that need no onnx: made before anything is read."""

from __future__ import annotations

from edgevlm.toolkit.errors import ConfigError, MissingExtra

DTYPES = ("fp32", "fp16", "bf16")


def check_dtype(dtype: str) -> None:
    """Raise ConfigError for an unknown dtype, MissingExtra if onnx is not installed."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is unknown", hint=f"known: {', '.join(DTYPES)}")
    check()


def check() -> None:
    """Raise MissingExtra if onnx is not installed."""
    from importlib.util import find_spec

    if find_spec("onnx") is None:
        raise MissingExtra("onnx", "export", purpose="recording a model")
