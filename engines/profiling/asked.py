"""The question of a profile: the same for every run and every engine that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import Prompt, PromptSequence


@dataclass(frozen=True)
class ProfileRequest:
    """What is measured. image: None for a generated one of 640 x 480."""

    image: Path | None = None
    prompt_tokens: int = 32
    max_tokens: int = 64
    runs: int = 5
    warmup: int = 1
    threads: int = 0
    layers: bool = False

    def check(self) -> None:
        """Raise InputError for a number below the least that can be measured."""
        least = {"runs": 1, "max_tokens": 2, "prompt_tokens": 1, "warmup": 0}
        for name, smallest in least.items():
            if (value := getattr(self, name)) < smallest:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {value} is less than {smallest}")


def sequence(session: Session, request: ProfileRequest, indices: Sequence[Array]) -> PromptSequence:
    """The prompt: one id, the image, the others. Raises InputError where it is too long."""
    ids = _token_ids(session, request.prompt_tokens)
    found = prompts.assemble(Prompt((ids[:1], ids[1:])), indices)
    if found.length + request.max_tokens > session.engine.context:
        raise InputError(
            f"{found.length} prompt tokens and {request.max_tokens} more do not fit into the "
            f"engine's context of {session.engine.context}",
            hint="lower --prompt-tokens or --max-tokens",
        )
    return found


def image(request: ProfileRequest, number: int) -> LoadedImage:
    """The image of run `number`: the given one, or one that is drawn from it."""
    if request.image is not None:
        return decode.load(request.image)
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (480, 640, 3), np.uint8)
    return LoadedImage(Image.fromarray(pixels))


def _token_ids(session: Session, count: int) -> tuple[int, ...]:
    vocab: int = session.model.lm.config.vocab_size
    return tuple(int(i) for i in np.random.default_rng(0).integers(0, vocab, count))
