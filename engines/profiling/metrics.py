"""Metrics of a profile under the names that NVIDIA's AIPerf gives them, with their distribution.

Definitions are AIPerf's: of one request, `inter_token_latency` is (request_latency -
time_to_first_token) / (tokens - 1). Stages are metrics too, under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distribution:
    """Of one metric over the runs, or over all tokens of all runs."""

    unit: str
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    count: int


@dataclass(frozen=True)
class Request:
    """What one run took: milliseconds until the first token, and of each token after it."""

    first_ms: float
    decode_ms: Sequence[float]
    prompt_tokens: int


def distribution(values: Sequence[float], unit: str) -> Distribution:
    """Of at least one value; std is that of these values, 0 for a single one."""
    p50, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99])
    numbers = (np.mean(values), np.std(values), min(values), p50, p90, p95, p99, max(values))
    rounded = [round(float(x), 4) for x in numbers]
    return Distribution(unit, *rounded, count=len(values))


def of_requests(
    requests: Sequence[Request], stages: Mapping[str, Sequence[float]]
) -> dict[str, Distribution]:
    """AIPerf's metrics of all runs, then the stages. stages: milliseconds by name."""
    rows: dict[str, tuple[str, list[float]]] = {
        "time_to_first_token": ("ms", [r.first_ms for r in requests]),
        "time_to_second_token": ("ms", [r.decode_ms[0] for r in requests]),
        "inter_token_latency": ("ms", [float(np.mean(r.decode_ms)) for r in requests]),
        "request_latency": ("ms", [_latency(r) for r in requests]),
        "output_token_throughput": (
            "tokens/s",
            [1000 * _tokens(r) / _latency(r) for r in requests],
        ),
        "output_token_throughput_per_user": (
            "tokens/s",
            [1000 / float(np.mean(r.decode_ms)) for r in requests],
        ),
        "prefill_throughput_per_user": (
            "tokens/s",
            [1000 * r.prompt_tokens / r.first_ms for r in requests],
        ),
        "input_sequence_length": ("tokens", [float(r.prompt_tokens) for r in requests]),
        "output_sequence_length": ("tokens", [float(_tokens(r)) for r in requests]),
    }
    found = {name: distribution(values, unit) for name, (unit, values) in rows.items()}
    return found | {name: distribution(values, "ms") for name, values in stages.items()}


def _latency(request: Request) -> float:
    return request.first_ms + float(np.sum(request.decode_ms))


def _tokens(request: Request) -> int:
    return len(request.decode_ms) + 1
