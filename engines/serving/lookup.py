"""Guessing the next tokens from the text itself: prompt lookup (Saxena, 2023; transformers'
PromptLookupCandidateGenerator). What followed the last tokens before will often follow them again.
"""

from __future__ import annotations

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array

_LONGEST, _SHORTEST = 4, 2  # tokens that must be the same
_MOST, _PAUSE = 6, 16  # tokens guessed at once; tokens without a guess after wrong ones


def guess(ids: Array, most: int) -> list[int]:
    """Up to `most` tokens that followed an earlier occurrence of the last ones; often none.

    The latest occurrence of the longest ending counts that so many tokens follow. Negative ids are
    no tokens.
    """
    for size in range(_LONGEST, _SHORTEST - 1, -1):
        begins = len(ids) - size  # the earlier occurrence begins before this
        if begins < 1:
            continue
        matches = np.ones(begins, bool)
        for offset in range(size):
            matches &= ids[offset : offset + begins] == ids[begins + offset]
        found = np.flatnonzero(matches)
        if len(found):
            ends = found + size
            whole = ends[ends + most <= len(ids)]  # a run that repeats itself is cut off by its end
            end = int(whole[-1] if len(whole) else ends[0])
            following = ids[end : end + most]
            stop = np.flatnonzero(following < 0)
            return [int(i) for i in (following[: stop[0]] if len(stop) else following)]
    return []


class Guesses:
    """How many tokens are guessed for one answer: fewer, or none for a while, if they are wrong."""

    def __init__(self) -> None:
        self._most, self._waits = _MOST // 2, 0

    def most(self) -> int:
        """Tokens to guess now."""
        if self._waits:
            self._waits -= 1
            return 0
        return self._most

    def were(self, right: int, guessed: int) -> None:
        """So many of the tokens guessed were right."""
        if right == guessed:
            self._most = min(2 * self._most, _MOST)
        elif right == 0:
            self._most = max(self._most // 2, 1)
            self._waits = _PAUSE if self._most == 1 else 0
