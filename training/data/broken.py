"""Samples that cannot be used: each is skipped, counted and named; too many end the training."""

from __future__ import annotations

from collections.abc import Iterable

from edgevlm.toolkit.errors import DataError

BROKEN_JSON = "broken JSON"
STRUCTURE = "wrong structure"
MISSING_IMAGE = "missing image"
BAD_IMAGE = "image that cannot be decoded"
IMAGE_COUNT = "number of <image> differs from that of images"
ROLES = "wrong roles"
EMPTY_QUESTION = "empty question"
EMPTY_ANSWER = "empty answer"
NO_ANSWER = "no answer"
MISMATCH = "tokenization mismatch"
UNKNOWN_TOKEN = "token without embedding"
BEYOND = "answer beyond the context"
DAMAGED_SHARD = "damaged shard"
BAD_MASK = "masks that do not fit the answer or its image"
NO_CLASS = "image without a class"
TRUNCATED = "answer truncated"  # not broken: a part of the answer is left and is learned

NAMED = 10  # names that a report shows of each kind
FEWEST = 1000  # of a stream of unknown length, the limit is a share of at least so many samples


class BrokenSample(Exception):
    """A sample that cannot be used. kind: one of the short texts above, for counting."""

    def __init__(self, name: str, kind: str, reason: str = "") -> None:
        super().__init__(name, kind, reason)  # all of them, so that it can be pickled
        self.name = name
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        """One line: the name, what is wrong, and the details."""
        return f"{self.name}: {self.kind}" + (f" ({self.reason})" if self.reason else "")


class Report:
    """Counts broken and truncated samples by kind, each name once.

    size: samples in the data set, None for a stream of unknown length. limit: the share of them
    that may be broken.
    """

    def __init__(self, size: int | None, limit: float = 0.01) -> None:
        self.size = size
        self.limit = limit
        self._seen = 0
        self._names: dict[str, dict[str, str]] = {}

    def good(self, name: str, *, truncated: bool = False) -> None:
        """Count a sample that was used."""
        self._seen += 1
        if truncated:
            self._names.setdefault(TRUNCATED, {}).setdefault(name, "")

    def add(self, broken: BrokenSample) -> None:
        """Count a broken sample; one that is counted already is not counted again."""
        self._seen += 1
        self._names.setdefault(broken.kind, {}).setdefault(broken.name, broken.reason)

    def merge(self, other: Report) -> None:
        """Count what another process met."""
        self._seen += other._seen
        for kind, names in other._names.items():
            own = self._names.setdefault(kind, {})
            for name, reason in names.items():
                own.setdefault(name, reason)

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples by kind, the truncated ones among them."""
        return {kind: len(names) for kind, names in self._names.items()}

    @property
    def broken(self) -> int:
        """Number of samples that were skipped."""
        return sum(count for kind, count in self.counts.items() if kind != TRUNCATED)

    def lines(self) -> list[str]:
        """A line for each kind, the most frequent first: how many, and the first names."""
        ordered = sorted(self._names.items(), key=lambda item: -len(item[1]))
        return [_line(kind, names) for kind, names in ordered]

    def check(self) -> None:
        """Raise DataError if more than `limit` of the samples are broken."""
        size = self.size if self.size is not None else max(self._seen, FEWEST)
        if self.broken <= self.limit * size:
            return
        of = f"of {size} samples" if self.size is not None else f"of the first {self._seen} samples"
        share = f"{100 * self.limit:g} %"
        listed = [line for line in self.lines() if not line.startswith(TRUNCATED)]
        raise DataError(
            f"{self.broken} {of} are broken, more than {share}: " + "; ".join(listed),
            hint="correct the data set, or allow more with --max-broken SHARE (0.05 is 5 %)",
        )


def _line(kind: str, names: dict[str, str]) -> str:
    shown = [f"{name} ({why})" if why else name for name, why in list(names.items())[:NAMED]]
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{kind}: {len(names)}: {', '.join(shown)}{more}"


def report(samples: Iterable[BrokenSample], size: int | None, limit: float = 0.01) -> Report:
    """A report of the broken samples that a scan found."""
    made = Report(size, limit)
    for broken in samples:
        made.add(broken)
    return made
