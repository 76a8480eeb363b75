"""GenerationRules: what a checkpoint says about choosing tokens, besides the logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class GenerationRules:
    """The settings of generation_config.json, as transformers' `generate` means them.

    Applied to every answer: repetition_penalty, no_repeat_ngram_size, bad_words_ids, min_length
    (positions of prompt and answer), min_new_tokens (which replaces min_length), suppress_tokens,
    begin_suppress_tokens (of the first token), stop_strings.

    Shown only: do_sample and `sampling`, the checkpoint's settings for drawing tokens by name,
    because answers are greedy unless the user asks for sampling; max_length and max_new_tokens,
    because every question has a limit of its own, which `generate` puts before both.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    do_sample: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)
    max_length: int | None = None
    max_new_tokens: int | None = None

    def stated(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name."""
        plain = GenerationRules()
        names = [f.name for f in fields(self)]
        values = {name: getattr(self, name) for name in names}
        return {name: v for name, v in values.items() if v != getattr(plain, name)}


def described(rules: GenerationRules) -> str:
    """The settings in one line; a list of ids is shown by its length, "" if there are none."""
    stated = rules.stated()
    stated |= stated.pop("sampling", {})
    shown = [f"{name} {_short(value)}" for name, value in stated.items()]
    return ", ".join(shown)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({len(value)} entries)" if len(value) > 4 else json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)
