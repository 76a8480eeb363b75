"""Each form of our own kernels (engines/native) beside ONNX Runtime's ops, on one call of CLIP-L's.

    python -m benchmarks.native_forms [--runs 9] [--forms avx2 plain]

Milliseconds of processor time, one thread: the shortest run of each, all in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgevlm.engines.backends import sessions
from edgevlm.engines.lowering import native as calls
from edgevlm.engines.lowering.graph import CONTRIB
from edgevlm.engines.native import library
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import processor_name

TOKENS, HEADS, WIDTH, INNER = 577, 16, 1024, 4096
_OPSETS = [helper.make_opsetid(*o) for o in (("", 21), (CONTRIB, 1), (library.DOMAIN, 1))]
_SMALLEST = 1e-30


def _model(
    nodes: Sequence[NodeProto], feed: dict[str, Array], outputs: dict[str, int]
) -> ModelProto:
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in feed.items()
    ]
    results = [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()]
    graph = helper.make_graph(list(nodes), "call", ports, results, _constants())
    return helper.make_model(graph, opset_imports=_OPSETS, ir_version=10)


def _constants() -> list[TensorProto]:
    named: dict[str, Any] = {
        "last": np.asarray([-1]),
        "tiny": np.asarray(_SMALLEST, np.float32),
        "most": np.asarray(127, np.float32),
        "middle": np.asarray(128, np.uint8),
    }
    return [
        helper.make_tensor(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value.ravel()
        )
        for name, value in named.items()
    ]


def _rounding(x: str, width: int) -> list[NodeProto]:
    """What a lowered graph has for RowQuantize (engines/lowering/rewrites.py)."""
    make = helper.make_node
    return [
        make("ReduceMax", [x, "last"], ["high"], keepdims=1),
        make("ReduceMin", [x, "last"], ["low"], keepdims=1),
        make("Neg", ["low"], ["minus"]),
        make("Max", ["high", "minus", "tiny"], ["span"]),
        make("Div", ["span", "most"], ["steps"]),
        make("Shape", ["steps"], ["shape"]),
        make("Expand", ["middle", "shape"], ["zeros"]),
        make("QuantizeLinear", [x, "steps", "zeros"], ["codes"], axis=-1, block_size=width),
    ]


def _calls() -> dict[str, tuple[ModelProto, ModelProto, dict[str, Array]]]:
    """By name: the graph of ONNX Runtime's ops, that of ours, and the inputs of both."""
    random = np.random.default_rng(0)
    make = helper.make_node
    codes: dict[str, int] = {"codes": TensorProto.UINT8, "steps": TensorProto.FLOAT}

    def values(*shape: int) -> Array:
        return random.standard_normal(shape, np.float32)

    narrow = {"x": values(1, TOKENS, WIDTH)}
    vectors = {"weight": values(WIDTH), "bias": values(WIDTH)}
    wide = {"x": values(1, TOKENS, INNER), "scales": values(1, TOKENS, 1), "bias": values(INNER)}
    added = narrow | {"scales": values(1, TOKENS, 1), "bias": values(WIDTH)}
    added |= {"other": values(1, TOKENS, WIDTH)}
    scaled = [make("Mul", ["x", "scales"], ["m"]), make("Add", ["m", "bias"], ["a"])]
    ours = partial(make, domain=library.DOMAIN)
    found: dict[str, tuple[Sequence[NodeProto], NodeProto, dict[str, Array], dict[str, int]]] = {
        f"RoundRows, {TOKENS} x {WIDTH}": (
            _rounding("x", WIDTH),
            ours(calls.ROUND, ["x"], ["codes", "steps"]),
            narrow,
            codes,
        ),
        f"NormAndRound, {TOKENS} x {WIDTH}": (
            [make("LayerNormalization", ["x", "weight", "bias"], ["y"]), *_rounding("y", WIDTH)],
            ours(calls.NORM, ["x", "weight", "bias"], ["codes", "steps"], epsilon=1e-5),
            narrow | vectors,
            codes,
        ),
        f"ScaleRowsOnto, {TOKENS} x {WIDTH}": (
            [*scaled, make("Add", ["a", "other"], ["y"])],
            ours(calls.ONTO, ["x", "scales", "bias", "other"], ["y"]),
            added,
            {"y": TensorProto.FLOAT},
        ),
    }
    activations: dict[str, tuple[NodeProto, int]] = {
        "QuickGelu": (make("QuickGelu", ["a"], ["y"], domain=CONTRIB, alpha=1.702), 3),
        "Gelu": (make("Gelu", ["a"], ["y"]), 1),
    }
    for name, (node, number) in activations.items():
        call = ours(
            calls.ACTIVATE,
            ["x", "scales", "bias"],
            ["codes", "steps"],
            activation=number,
            alpha=1.702,
        )
        plain = [*scaled, node, *_rounding("y", INNER)]
        found[f"ActivateAndRound, {name}, {TOKENS} x {INNER}"] = (plain, call, wide, codes)
    rows = {
        name: (_model(plain, feed, outputs), _model([call], feed, outputs), feed)
        for name, (plain, call, feed, outputs) in found.items()
    }
    return {f"attention, {TOKENS} tokens, {HEADS} heads of {WIDTH // HEADS}": _attention()} | rows


def _attention() -> tuple[ModelProto, ModelProto, dict[str, Array]]:
    random = np.random.default_rng(0)
    feed = {name: random.standard_normal((1, TOKENS, WIDTH), np.float32) for name in "qkv"}
    plain, ours = calls.lone_attention(WIDTH, HEADS), calls.lone_attention(WIDTH, HEADS)
    calls.call_attention(ours)
    return plain, ours, feed


def _session(model: ModelProto, path: str) -> Any:
    options = sessions.session_options(1)
    options.register_custom_ops_library(path)
    return sessions.open_session(model.SerializeToString(), options)


def _shortest(works: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    best = dict.fromkeys(works, float("inf"))
    for _ in range(runs + 1):
        for name, work in works.items():
            begun = time.process_time()
            work()
            best[name] = min(best[name], 1000 * (time.process_time() - begun))
    return best


def main() -> None:
    found = library.native()
    if found.path is None:
        raise SystemExit(f"there are no kernels of ours here: {found.why}")
    here = library.forms_here(found)
    command_line = argparse.ArgumentParser(description=__doc__)
    command_line.add_argument("--runs", type=int, default=9)
    command_line.add_argument("--forms", nargs="+", default=here[::-1], choices=here)
    asked = command_line.parse_args()
    kernels = ctypes.CDLL(str(found.path))
    print(f"{processor_name()}; forms: {', '.join(here)}\n")
    print("| ms | ONNX Runtime | " + " | ".join(asked.forms) + " |")
    print("|---" * (2 + len(asked.forms)) + "|")
    for name, (plain, ours, feed) in _calls().items():
        one, other = _session(plain, str(found.path)), _session(ours, str(found.path))

        def in_form(form: str, session: Any = other, feed: dict[str, Array] = feed) -> None:
            kernels.edgevlm_use_form(library.FORMS.index(form))
            session.run(None, feed)

        works: dict[str, Callable[[], object]] = {"": partial(one.run, None, feed)}
        works |= {form: partial(in_form, form) for form in asked.forms}
        best = _shortest(works, asked.runs)
        print(f"| {name} | " + " | ".join(f"{ms:.2f}" for ms in best.values()) + " |")
    kernels.edgevlm_use_form(-1)


if __name__ == "__main__":
    main()
