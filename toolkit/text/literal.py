"""User text as data: a prompt in which what a user typed never becomes a control token.

Control tokens inside a turn are broken by a mark, a character that no turn contains. When the
prompt is tokenized, the tokens that are still whole are the template's own: they are written in
another form, by which a copy of the tokenizer knows its added tokens, and the marks go away. So
every other character is tokenized exactly as it would be otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from edgevlm.toolkit.text.tokenizer import Tokenizer

# Planes 15 and 16 of Unicode: characters without a meaning of their own.
_CANDIDATES = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


def unused_mark(texts: Iterable[str]) -> str:
    """A character that none of the texts contains."""
    taken = set().union(*texts)
    return next(chr(code) for code in _CANDIDATES if chr(code) not in taken)


def control_tokens(tokenizer: Tokenizer, template: str) -> tuple[str, ...]:
    """The tokens by which a text acts on the prompt around it.

    Those are the special ones, and added tokens in the text of the template. One character alone
    is no control token: some tokenizers list blanks among the added ones.
    """
    found = {token for token, special in tokenizer.added().items() if special or token in template}
    return tuple(sorted(token for token in found if len(token) > 1))


def broken(text: str, tokens: Sequence[str], mark: str) -> str:
    """The text with a mark inside each control token, overlapping ones included."""
    if not tokens:
        return text
    ahead = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return re.sub(f"(?=(?:{ahead}))(.)", lambda found: found[1] + mark, text, flags=re.DOTALL)


def encode(tokenizer: Tokenizer, text: str, mark: str, *, special: bool) -> list[int]:
    """Ids of a text with marks; see Tokenizer.encode."""
    added = sorted(tokenizer.added(), key=len, reverse=True)
    whole = "|".join([re.escape(token) for token in added] + [f"(?P<mark>{mark})"])

    def written(found: re.Match[str]) -> str:
        return "" if found["mark"] else f"{mark}{found[0]}{mark}"

    renamed = tokenizer.rewritten(mark, lambda data: _renamed(data, mark))
    return renamed.encode(re.sub(whole, written, text), special=special)


def _renamed(data: str, mark: str) -> str:
    """A tokenizer.json whose added tokens are surrounded by marks, their ids unchanged."""
    tokenizer: dict[str, Any] = json.loads(data)
    names = {token["content"] for token in tokenizer["added_tokens"]}

    def new(name: str) -> str:
        return f"{mark}{name}{mark}" if name in names else name

    for token in tokenizer["added_tokens"]:
        token["content"] = new(token["content"])
    model = tokenizer["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new(name): number for name, number in vocab.items()}
    else:
        model["vocab"] = [[new(name), score] for name, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new(model["unk_token"])
    if "merges" in model:  # a merge whose parts or result are gone cannot be read
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    return json.dumps(tokenizer, ensure_ascii=False)


def _touches(merge: Any, names: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return bool(names & {left, right, left + right})
