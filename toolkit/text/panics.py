"""The package tokenizers, kept from doing harm: its panics, and files that make it fill the memory.

It is written in Rust. A panic comes as a BaseException after its text was printed on standard
error; memory that cannot be had ends the process, so what may need it is refused beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgevlm.toolkit.errors import ConfigError, ToolkitError, silenced

if TYPE_CHECKING:
    import tokenizers

_MOST_GROWTH = 64  # how many times longer the replacements of a file may make a text


@contextmanager
def calm(what: str) -> Iterator[None]:
    """Call the package inside. Raises ConfigError for whatever it raises; what it prints is lost.

    what: what failed then, as in "the tokenizer cannot be read".
    """
    try:
        with silenced():
            yield
    except (ToolkitError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as broken:  # bare Exceptions, and panics
        raise ConfigError(f"{what}: {broken}") from None


def tame(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same without padding and truncation, which are not ours to do: a file may ask for padding
    to 10^9 tokens. Raises ConfigError if its replacements can make a text many times longer.
    """
    inner.no_padding()
    inner.no_truncation()
    for step in (inner.normalizer, inner.decoder):
        growth = _growth(json.loads(step.__getstate__())) if step is not None else 1
        if growth > _MOST_GROWTH:
            raise ConfigError(
                f"its replacements can make a text {growth:.3g} times longer, the limit is "
                f"{_MOST_GROWTH}"
            )
    return inner


def _growth(step: Any) -> float:
    """How many times longer the replacements of a step can make a text."""
    growth = 1.0
    for part in step.get("normalizers") or step.get("decoders") or ():
        growth *= _growth(part)
    if step.get("type") == "Replace":
        pattern, content = step.get("pattern", {}), len(step.get("content", ""))
        found = len(pattern.get("String", ""))  # a regular expression may find no letter at all
        growth *= max(1.0, content / found if found else content + 1.0)
    return growth
