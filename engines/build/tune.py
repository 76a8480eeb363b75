"""Which number format each component runs fastest in on this machine, by timing its linears.

`--precision` says how few bits weights may have. How products of such weights are computed is
chosen here: with the inputs' rows rounded to 8 bits too (int8_rows), with the weights alone in
blocks (int8_weights, int4_weights), or in float where that is faster. All other ops are the same
in every format. A language model is judged by one question: a prompt with an image of 640 x 480
and 32 tokens of text, and 64 tokens of answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgevlm.engines.build.timings import Product, Timings
from edgevlm.engines.manifest import PREFILL_CHUNK, Trial
from edgevlm.engines.profiling.roofline import question
from edgevlm.toolkit.quantization.plan import Precision
from edgevlm.toolkit.target import CUDA, Target
from edgevlm.toolkit.vlm import components, towers
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import count, image_axes
from edgevlm.toolkit.vlm.towers import Model

ANSWER = 64  # tokens
# A second form of the language model takes as much memory again as its layers in 8 bits: it has to
# save this share of the time of the question.
WORTH_A_SECOND_FORM = 0.1
_VISION: tuple[Precision, ...] = ("float", "int8_rows", "int8_weights")
_TOKENS: Mapping[str, tuple[Precision, ...]] = {
    "int8": ("float", "int8_rows", "int8_weights"),
    "int4": ("float", "int4_weights"),
}
_PROMPTS: Mapping[str, tuple[Precision, ...]] = {
    "int8": _TOKENS["int8"],
    "int4": ("float", "int8_rows", "int4_weights"),
}
# What is taken without measuring, as on every processor measured so far it was the fastest in the
# encoders and for prompts; in 4 bits that which takes the least memory.
UNTUNED: Mapping[str, Precision] = {"int8": "int8_rows", "int4": "int4_weights"}
# On a card only the weights are in 8 or 4 bits, which single tokens read; prompts and images are
# computed in float, which codes would have to become first.
UNTUNED_ON_CARDS: Mapping[str, Precision] = {"int8": "int8_weights", "int4": "int4_weights"}


@dataclass(frozen=True)
class Choice:
    """The precision of each component's linears; of the language model's that for single tokens.

    prompts: that of the language model for prompts, where it is another one. trials: what was
    timed. notes: for the user.
    """

    forms: Mapping[str, Precision]
    prompts: Precision | None = None
    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()


def untuned(model: Model, kind: str, target: Target) -> Choice:
    """The table's choice for weights in `kind`: int8 or int4."""
    names = [component.name for component in components.components(model)]
    on_card = target.backend == CUDA
    lm = (UNTUNED_ON_CARDS if on_card else UNTUNED)[kind]
    vision: Precision = "float" if on_card else UNTUNED["int8"]
    decoder = towers.language_model(model)
    forms = dict.fromkeys(names, vision)
    return Choice(forms if decoder is None else {**forms, decoder.name: lm})


def tuned(
    model: Model,
    kind: str,
    timings: Timings,
    progress: Callable[[str], None],
    *,
    keep_slower: bool,
) -> Choice:
    """The fastest choice by measurement. keep_slower: low precision where float is faster too."""
    work = question(model)
    axes = image_axes(model, work.views, work.image_tokens)
    encoders = components.one_image_each(model)
    lm = towers.language_model(model)
    forms: dict[str, Precision] = {}
    trials, notes = list[Trial](), list[str]()
    for component in components.components(model):
        if lm is not None and component.name == lm.name:
            continue
        views = {"tiles": 1} if component.name in encoders else {}
        products = products_of(component, {**axes, **views})
        if not products:
            continue
        progress(f"{component.name}: timing number formats")
        times = _times(products, timings, _VISION)
        best = _fastest(times, keep_slower)
        forms[component.name] = best
        trials += _trials(component.name, "view", times, best)
        notes += _note(component.name, best, times)
    if not isinstance(model, ModelConfig):
        timings.save()
        return Choice(forms, None, tuple(trials), tuple(notes))
    progress(f"{model.lm.name}: timing number formats")
    choice = _language_model(model, kind, timings, axes, work.prompt_tokens, keep_slower)
    timings.save()
    return Choice(
        {**forms, **choice.forms},
        choice.prompts,
        (*trials, *choice.trials),
        (*notes, *choice.notes),
    )


def tuned_prompts(model: ModelConfig, timings: Timings, progress: Callable[[str], None]) -> Choice:
    """The language model alone, of a bundle that has its layers in 4 bits already."""
    work = question(model)
    axes = image_axes(model, work.views, work.image_tokens)
    progress(f"{model.lm.name}: timing number formats")
    choice = _language_model(model, "int4", timings, axes, work.prompt_tokens, True)
    timings.save()
    return choice


def _language_model(
    model: ModelConfig,
    kind: str,
    timings: Timings,
    axes: Mapping[str, int],
    length: int,
    keep_slower: bool,
) -> Choice:
    """One form for all calls, or one for prompts and one for tokens if that is worth it."""
    lm = components.language_model(model)
    chunks = -(-length // PREFILL_CHUNK)
    lengths = {"prompt": -(-length // chunks), "token": 1}
    calls = {
        call: products_of(lm, {**axes, "sequence": n, "context": length})
        for call, n in lengths.items()
    }
    prompt = {p: ms * chunks for p, ms in _times(calls["prompt"], timings, _PROMPTS[kind]).items()}
    token = _times(calls["token"], timings, _TOKENS[kind])
    single = {p: prompt[p] + ANSWER * token[p] for p in token}
    form = _fastest(single, keep_slower)
    prompts, tokens, notes = form, form, _note(model.lm.name, form, single)
    if form != "float":
        p, t = (_fastest(times, keep_slower=True) for times in (prompt, token))
        saved = 1 - (prompt[p] + ANSWER * token[t]) / single[form]
        if p != t and saved >= WORTH_A_SECOND_FORM:
            prompts, tokens = p, t
            notes = [
                f"{model.lm.name}: prompts in {p}, tokens in {t}: its linears take {saved:.0%} "
                f"less time than in {form} alone, and more memory (--no-tune has one form)"
            ]
    return Choice(
        {model.lm.name: tokens},
        prompts if prompts != tokens else None,
        (
            *_trials(model.lm.name, "prompt", prompt, prompts),
            *_trials(model.lm.name, "token", token, tokens),
        ),
        tuple(notes),
    )


def products_of(component: Component, axes: Mapping[str, int]) -> Counter[Product]:
    """How often a call multiplies what; without the language model's output layer, which has the
    same format in every choice.
    """
    found: Counter[Product] = Counter()
    for cost in count(component, axes).costs:
        if cost.op != "linear" or not cost.matrix_elements or cost.path.endswith("/head"):
            continue
        outputs = cost.matrix_elements // cost.matrix_inputs
        rows = cost.written_elements // outputs
        found[Product(cost.matrix_inputs, outputs, rows)] += 1
    return found


def _times(
    products: Counter[Product], timings: Timings, precisions: Sequence[Precision]
) -> dict[Precision, float]:
    """Milliseconds of all products of a call in each precision."""
    totals = dict.fromkeys(precisions, 0.0)
    for product, times in products.items():
        for precision, ms in timings.ms(product, precisions).items():
            totals[precision] += times * ms
    return totals


def _fastest(times: Mapping[Precision, float], keep_slower: bool) -> Precision:
    """keep_slower: of the low precisions alone."""
    candidates = [p for p in times if p != "float" or not keep_slower]
    return min(candidates, key=lambda precision: times[precision])


def _note(name: str, best: Precision, times: Mapping[Precision, float]) -> list[str]:
    if best != "float":
        return []
    second = _fastest(times, keep_slower=True)
    slower = times[second] / max(times["float"], 1e-9)
    return [
        f"{name}: stays in float, as {second} takes {slower:.1f} times as long on this machine "
        "(--keep-slower quantizes it all the same)"
    ]


def _trials(
    name: str, call: str, times: Mapping[Precision, float], chosen: Precision
) -> list[Trial]:
    return [Trial(name, call, p, round(ms, 3), p == chosen) for p, ms in times.items()]
