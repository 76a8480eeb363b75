"""What reports say of each kind of profile: of a whole model, or of a tower by itself. All else in
them is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from edgevlm.engines.profiling.context import warnings
from edgevlm.engines.profiling.drift import Drift
from edgevlm.engines.profiling.profile import Profile
from edgevlm.engines.profiling.tower import TowerDrift, TowerProfile

Shown: TypeAlias = "Profile | TowerProfile"
AFTER_ANSWER = "segmenter."  # what stages behind an answer begin with


@dataclass(frozen=True)
class Figure:
    """A figure by which engines are compared: its field, the column of a table, title and unit of
    bars.
    """

    field: str
    column: str
    title: str
    unit: str


@dataclass(frozen=True)
class Form:
    """Words and figures of one kind of profile.

    request: what one run measures; size: of it. shares: columns of a stage's share of it. drifts:
    columns of how far an engine is from the first. single: metrics of one value: name, unit, field.
    series: title and values of the times that are drawn one by one; often: whether there are enough
    of them to show how often each comes.
    """

    request: str
    size: Callable[[Any], str]
    totals: Callable[[Any], list[str]]
    shares: tuple[str, ...]
    share: Callable[[str, float, Any], tuple[str, ...]]
    drifts: tuple[str, str]
    drift: Callable[[Any], tuple[str, str]]
    figures: tuple[Figure, ...]
    single: tuple[tuple[str, str, str], ...]
    series: Callable[[Any], tuple[str, Sequence[float]]]
    often: bool


def of(profile: Shown) -> Form:
    """The form of a profile."""
    return _TOWER if isinstance(profile, TowerProfile) else _MODEL


def totals(p: Shown) -> list[str]:
    """The figures that people quote, a line each."""
    return [
        *of(p).totals(p),
        f"device                 {p.device.get('card') or p.device['processor']}, "
        f"{p.device['threads']} threads, {p.device['target']}, {p.device['precision']}",
        *(f"warning                {line}" for line in warnings(p.context)),
    ]


def _load(p: Shown) -> str:
    return f"load / peak memory     {p.load_ms:.0f} ms / {p.peak_rss_mb:.0f} MB"


# -- of a whole model ----------------------------------------------------------------------------


def _model_totals(p: Profile) -> list[str]:
    decode = next(b for b in p.roofline.stages if b.stage == "decode")
    return [
        f"time to first token    {p.time_to_first_token_ms:.1f} ms "
        f"({p.prompt_tokens} prompt tokens, {p.image_tokens} of them image)",
        f"inter-token latency    {p.inter_token_latency_ms:.2f} ms "
        f"({p.output_token_throughput_per_user:.1f} tokens/s)",
        f"prefill                {p.prefill_tokens_per_s:.0f} tokens/s",
        *_masks(p),
        _load(p),
        f"speed of light         {decode.gbytes:.3g} GB of weights and KV cache a token "
        f"at the measured {p.roofline.peak_gb_s:.3g} GB/s: "
        f"{_rate(1000 / max(decode.floor_ms, 1e-9))} tokens/s at best",
    ]


def _masks(p: Profile) -> list[str]:
    """A line on what a mask takes behind the answer, if the model makes any."""
    stages = [s.p50_ms for name, s in p.stages.items() if name.startswith(AFTER_ANSWER)]
    line = f"one mask               {sum(stages):.1f} ms, behind the answer"
    return [line] if stages else []


def _rate(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _of_first_token(stage: str, ms: float, p: Profile) -> tuple[str, ...]:
    """The share of the first token's time that a stage takes; nothing of a later one."""
    later = stage == "decode" or stage.startswith(AFTER_ANSWER)
    return ("" if later else f"{ms / p.time_to_first_token_ms:.0%}",)


def _model_drift(drift: Drift) -> tuple[str, str]:
    return f"{drift.kl:.3g}", f"{drift.top1:.0%}"


_MODEL = Form(
    "question",
    lambda p: f"{p.prompt_tokens} prompt tokens, {p.generated_tokens} generated",
    _model_totals,
    ("of first token",),
    _of_first_token,
    ("KL to the first", "same top-1"),
    _model_drift,
    (
        Figure("time_to_first_token_ms", "first token ms", "time to first token", "ms"),
        Figure("inter_token_latency_ms", "ms a token", "inter-token latency", "ms"),
    ),
    (),
    lambda p: ("Milliseconds per token, in order", p.samples["decode"]),
    True,
)

# -- of a tower by itself ------------------------------------------------------------------------


def _tower_totals(p: TowerProfile) -> list[str]:
    return [
        f"an image by itself     {p.image_ms:.1f} ms, {p.channels} channels",
        f"in batches of {p.batch}        {p.images_per_s:.3g} images/s (the engine alone)",
        _load(p),
    ]


def _tower_drift(drift: TowerDrift) -> tuple[str, str]:
    return f"{drift.cosine:.6f}", f"{drift.relative_rms:.3g}"


def _runs(p: TowerProfile) -> tuple[str, Sequence[float]]:
    encoder = next(stage for stage in p.stages if stage.startswith("encoder."))
    return f"Milliseconds of {encoder}, run by run", p.samples[encoder]


_TOWER = Form(
    "image",
    lambda p: f"one image, {p.channels} channels",
    _tower_totals,
    (),
    lambda stage, ms, p: (),
    ("cosine to the first", "relative rms"),
    _tower_drift,
    (
        Figure("image_ms", "image ms", "one image", "ms"),
        Figure("images_per_s", "images/s", "images a second", ""),
    ),
    (("throughput", "images/s", "images_per_s"),),
    _runs,
    False,
)
