"""The question that a prediction is for, as the options of `plan` say it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from edgevlm.engines.profiling.roofline import question
from edgevlm.engines.sizing.predict import Asked
from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.vlm.config import ModelConfig

CONTEXT = 4096  # positions that are planned for unless the question needs more
_STEP = 1024


@dataclass(frozen=True)
class Question:
    """As given; max_context: None for CONTEXT, or what the question needs, or the model has."""

    max_context: int | None = None
    prompt_tokens: int = 32
    max_tokens: int = 64
    image_size: str = "640x480"


def refuse_for_tower(asked: Question, source: str) -> None:
    """Raise ConfigError for what has no meaning for a vision tower by itself."""
    for option in fields(Question):
        if getattr(asked, option.name) != option.default:
            flag = "--" + option.name.replace("_", "-")
            raise ConfigError(
                f"{source} is a vision tower by itself; {flag} is for models with a language model",
                hint="leave it out: a tower sees images of one size, and answers with embeddings",
            )


def settled(model: ModelConfig, asked: Question) -> Asked:
    """The question as numbers. Raises ConfigError or InputError for what cannot be."""
    longest, size = int(model.lm.config.context), _size(asked.image_size)
    context = asked.max_context
    if context is None:
        needed = question(model, size, asked.prompt_tokens).prompt_tokens + asked.max_tokens
        context = min(longest, max(CONTEXT, -(-needed // _STEP) * _STEP))
    if not 1 <= context <= longest:
        raise ConfigError(
            f"--max-context {context} does not fit: the model has {longest} positions",
            hint=f"choose 1 to {longest}",
        )
    for name in ("prompt_tokens", "max_tokens"):
        if (value := getattr(asked, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is less than 1")
    return Asked(context, asked.prompt_tokens, asked.max_tokens, size)


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT as two numbers."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise InputError(f"--image-size {text!r} is no size", hint="such as 640x480")
    return int(width), int(height)
