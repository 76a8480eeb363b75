"""Weights that GPTQ or AWQ quantized: a checkpoint's packed tensors as the linears they stand for.

A linear X is X.qweight, X.qzeros, X.scales and, of GPTQ, X.g_idx: weight = (code - zero point) *
scale, with zero point and scale of the group that the input is in. Codes and zero points fill words
of 32 bits, the first in the lowest bits. qzeros [groups, outputs / n] has n outputs in a word; so
has AWQ's qweight [inputs, outputs / n], both in the order of _AWQ_ORDER; GPTQ's [inputs / n,
outputs] has n inputs. GPTQ's first format stores zero points less one.

Written by AutoGPTQ (auto_gptq/nn_modules/qlinear), GPTQModel and AutoAWQ
(awq/modules/linear/gemm.py, awq/utils/packing_utils.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from edgevlm.toolkit.checkpoints.weights import FLOAT_WEIGHTS, Checkpoint, Recipes, TensorSource
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.recipes import transposed
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import BLOCK_SIZES, LINEAR, Bits, StorageFormat
from edgevlm.toolkit.quantization.coded import Codes
from edgevlm.toolkit.quantization.plan import Block, Precision, PrecisionPlan, Rule
from edgevlm.toolkit.strict import Reader

METHODS = ("gptq", "awq")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of the lowest bits, of the next, ...
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_FETCH = "the download or copy is incomplete, or another program's; fetch the checkpoint again"


@dataclass(frozen=True)
class Packing:
    """How a checkpoint packs its quantized weights.

    group: the inputs that share a scale, None for all. zero_points: whether groups have zero points
    of their own; otherwise all are 8 (128 at 8 bits). less_one: they are stored less one.
    reordered: whether groups may be of inputs in another order, which g_idx says (desc_act).
    """

    method: Literal["gptq", "awq"]
    bits: Bits
    group: int | None
    zero_points: bool
    less_one: bool
    reordered: bool = False

    @property
    def storage(self) -> StorageFormat:
        """How a bundle stores such a weight: in blocks that are whole parts of a group."""
        sizes = (n for n in BLOCK_SIZES if self.group is None or self.group % n == 0)
        return replace(LINEAR[self.bits], block=next(sizes), zero_points=self.zero_points)

    def __str__(self) -> str:
        group = "one group" if self.group is None else f"groups of {self.group}"
        return f"{self.method}, {self.bits} bits, {group}"


def read(stated: Mapping[str, Any], where: str, allow: Iterable[str] = ()) -> Packing:
    """The packing that a quantization_config states, of `gptq` or `awq`; `where` it stands.

    Raises ConfigError for what is not implemented.
    """
    r = Reader(stated, f"{where}: quantization_config", allow)
    method = _one_of(r, "quant_method", METHODS)
    awq = method == "awq"
    bits = _one_of(r, "bits", (4,) if awq else (4, 8), 4 if awq else None)
    group = r.take("group_size", int, 128)
    if group != -1 and (group < 1 or group % BLOCK_SIZES[-1]):
        known = f"-1 and multiples of {BLOCK_SIZES[-1]}"
        raise _unknown(r, "group_size", group, known)
    layouts = ("gemm",) if awq else ("gptq", "gptq_v2")
    named = [r.raw(key) for key in ("checkpoint_format", "format", *(["version"] * awq))]
    layout = next((str(name).lower() for name in named if name is not None), layouts[0])
    if layout not in layouts or any(n is not None and str(n).lower() != layout for n in named):
        found = ", ".join(str(name) for name in named if name is not None)
        raise _unknown(r, "the format of packed weights", found, ", ".join(layouts))
    _one_of(r, "is_marlin_format", (False,), False)
    _one_of(r, "pack_dtype", ("int32",), "int32")
    if awq:
        _one_of(r, "zero_point", (True,), True)
    own_rules = r.raw("dynamic") or {}
    if not isinstance(own_rules, dict) or any(not key.startswith("-:") for key in own_rules):
        raise _unknown(r, "dynamic", own_rules, "rules that leave modules in float")
    symmetric = not awq and r.take("sym", bool, True)
    reordered = not awq and group != -1 and r.take("desc_act", bool, False)
    r.ignore("packed")
    r.done()
    return Packing(
        "awq" if awq else "gptq",
        8 if bits == 8 else 4,
        None if group == -1 else group,
        not symmetric,
        layout == "gptq",
        reordered,
    )


def _one_of(r: Reader, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    value = r.raw(key)
    value = default if value is None else value
    known = [option for option in allowed if option == value and type(option) is type(value)]
    if not known:
        raise _unknown(r, key, value, ", ".join(map(str, allowed)))
    return known[0]


def _unknown(r: Reader, key: str, value: object, known: str) -> ConfigError:
    return ConfigError(
        f"{r.where}: {key} = {str(value)[:200]!r} is not implemented (implemented: {known})",
        hint=FLOAT_WEIGHTS,
    )


def unpacked(checkpoint: Checkpoint, packing: Packing) -> Checkpoint:
    """The checkpoint with X.weight, and its codes, for every X.qweight and what belongs to it.

    Raises CheckpointError if there is none, or one lacks a part or has one of another shape.
    """
    keys = checkpoint.keys()
    modules = [key.removesuffix(".qweight") for key in keys if key.endswith(".qweight")]
    if not modules:
        raise CheckpointError(
            f"{checkpoint.where} has no packed weights (.qweight), and quantization_config names "
            f"{packing.method!r}",
            hint="if the weights are float, take quantization_config out of config.json",
        )
    packed = Packed(checkpoint, packing, modules)
    parts = {f"{module}.{part}" for module in modules for part in _PARTS}
    plain = {key: checkpoint.source(key) for key in keys if key not in parts}
    both = sorted(plain.keys() & set(packed.keys()))
    if both:
        raise CheckpointError(f"{checkpoint.where} holds {both[0]} twice, packed and plain")
    storages = dict.fromkeys(packed.keys(), packed.storage)
    # Older programs give every packed linear a bias; one of zeros changes nothing.
    biases = [f"{module}.bias" for module in modules if f"{module}.bias" in plain]
    idle = tuple(key for key in biases if not checkpoint.read(key).any())
    sources: dict[str, TensorSource] = {**plain, **dict.fromkeys(packed.keys(), packed)}
    return Checkpoint(sources, checkpoint.where, storages, idle)


def plan(component: str, weights: Recipes, packing: Packing) -> PrecisionPlan:
    """The plan under which a component's packed linears keep their codes; the rest is float."""
    checkpoint = weights.checkpoint
    assert isinstance(checkpoint, Checkpoint)
    storage = next(iter(checkpoint.packed.values()))

    def keeps(source: str) -> bool:
        return (
            source in checkpoint.packed
            and storage.block_in(checkpoint.shape(source)[1]) is not None
        )

    linears = {k: keeps(r.sources[0]) for k, r in weights.table.items() if r.make is transposed}
    layers = {key: kept for key, kept in linears.items() if key.startswith("layers.")}
    paths = [f"{component}/layers.*"] * any(layers.values())
    paths += [_path(component, key) for key in linears.keys() - layers.keys() if linears[key]]
    precision: Precision = "int8_weights" if packing.bits == 8 else "int4_weights"
    block = cast(Block, storage.block)
    rules = [Rule(p, precision, block, storage.zero_points, storage.ordered) for p in paths]
    rules += [Rule(_path(component, key), "float") for key, kept in layers.items() if not kept]
    return PrecisionPlan(rules=tuple(rules), method=f"{packing.method} checkpoint")


def _path(component: str, key: str) -> str:
    """As plans name it: "layers.0.mlp.up.weight" is lm/layers.0/mlp/up."""
    return f"{component}/{re.sub(r'[.](?![0-9])', '/', key.removesuffix('.weight'))}"


class Packed:
    """The packed linears of a checkpoint, as torch stores linears: X.weight [outputs, inputs].

    Each is read when it is used; the codes of the last one are kept, as their parts are asked for
    one after another. storage: how a bundle stores them.
    """

    def __init__(self, checkpoint: Checkpoint, packing: Packing, modules: Iterable[str]) -> None:
        self._checkpoint = checkpoint
        self._packing = packing
        self._per_word = 32 // packing.bits
        self._sizes = {f"{module}.weight": self._check(module) for module in modules}
        ordered = any(self._order(key) is not None for key in self._sizes)
        self.storage = replace(packing.storage, ordered=ordered)
        self._last: tuple[str, Codes | None] = ("", None)

    def keys(self) -> Iterable[str]:
        return self._sizes

    def shape(self, key: str) -> tuple[int, ...]:
        return self._sizes[key]

    def dtype(self, key: str) -> str:
        """Of what `read` gives."""
        return "fp32"

    def read(self, key: str) -> Array:
        """The weight that the codes stand for, in float32."""
        _, inputs = self.shape(key)
        block = math.gcd(self._group(inputs), inputs)
        zeros = self._zero_points(key)
        spread = None if zeros is None else self._spread(zeros, inputs, block)
        scales = self._spread(self._scales(key), inputs, block)
        codes, order = self._codes(key), self._order(key)
        columns = blockwise.dequantize(codes, scales, self._packing.bits, spread)
        return columns if order is None else blockwise.inputs_of(columns, order)

    def codes(self, key: str) -> Codes | None:
        """The codes as a bundle stores them; None where no block divides the inputs."""
        if self._last[0] != key:
            self._last = (key, self._made(key))
        return self._last[1]

    def _made(self, key: str) -> Codes | None:
        storage, (_, inputs) = self.storage, self.shape(key)
        block = storage.block_in(inputs)
        if block is None:
            return None
        zeros = self._zero_points(key)
        if zeros is not None:
            zeros = self._spread(zeros, inputs, block)
            zeros = zeros if storage.bits == 8 else blockwise.pack(zeros)
        scales = self._spread(self._scales(key), inputs, block)
        order = self._order(key)
        if order is None and storage.ordered:
            order = np.arange(inputs)
        return Codes(storage, self._codes(key), scales, zeros, order)

    def _group(self, inputs: int) -> int:
        return self._packing.group or inputs

    def _spread(self, groups: Array, inputs: int, block: int) -> Array:
        """What groups [outputs, groups] have for each block, which is a whole part of a group."""
        each = np.repeat(groups, self._group(inputs) // block, 1)
        return np.ascontiguousarray(each[:, : inputs // block])

    def _part(self, key: str, part: str) -> Array:
        return self._checkpoint.read(f"{key.removesuffix('.weight')}.{part}")

    def _codes(self, key: str) -> Array:
        """uint8 [outputs, inputs], two in a byte at 4 bits; the columns in the order of groups."""
        outputs, _ = self.shape(key)
        words = np.ascontiguousarray(self._part(key, "qweight"), "<i4")
        if self._packing.method == "awq":
            return blockwise.pack(np.ascontiguousarray(self._fields(words).T))
        split = words.view(np.uint8).reshape(len(words), outputs, 4)
        # The bytes of GPTQ's words, from one word of an output to the next, are what we store.
        codes = np.ascontiguousarray(split.transpose(1, 0, 2)).reshape(outputs, -1)
        order = self._order(key)
        if order is None:
            return codes
        if self._packing.bits == 8:
            return codes[:, order]
        return blockwise.pack(blockwise.unpack(codes)[:, order])

    def _fields(self, words: Array) -> Array:
        """uint8 [rows, outputs] from words [rows, outputs / n]."""
        bits, count = self._packing.bits, self._per_word
        order = _AWQ_ORDER if self._packing.method == "awq" else range(count)
        unsigned = np.ascontiguousarray(words, "<i4").view("<u4")
        fields = np.empty((len(words), words.shape[1] * count), np.uint8)
        for place, output in enumerate(order):
            fields[:, output::count] = (unsigned >> (bits * place)) & ((1 << bits) - 1)
        return fields

    def _scales(self, key: str) -> Array:
        """float32 [outputs, groups]."""
        scales = self._part(key, "scales")
        if scales.dtype.kind != "f" or not np.isfinite(scales).all():
            raise self._broken(key, "scales", "are no finite floating-point numbers", _FETCH)
        return np.ascontiguousarray(scales.T, np.float32)

    def _zero_points(self, key: str) -> Array | None:
        """uint8 [outputs, groups]; None if all are the fixed one. Raises CheckpointError."""
        p = self._packing
        zeros = self._fields(self._part(key, "qzeros"))
        if p.less_one:
            if zeros.max(initial=0) == (1 << p.bits) - 1:
                raise self._broken(
                    key,
                    "qzeros",
                    f"state zero points of 0 less one, which format 'gptq' cannot hold: "
                    f"programs read them as 0 or as {1 << p.bits}",
                    f"take the checkpoint in format gptq_v2, or {FLOAT_WEIGHTS}",
                )
            zeros += np.uint8(1)
        if p.zero_points:
            return np.ascontiguousarray(zeros.T)
        fixed = blockwise.ZERO_POINT[p.bits]
        if (zeros != fixed).any():
            raise self._broken(
                key,
                "qzeros",
                f"state other zero points than {fixed}, and quantization_config says that weights "
                "are symmetric",
                'set "sym": false in quantization_config of config.json',
            )
        return None

    def _broken(self, key: str, part: str, why: str, hint: str) -> CheckpointError:
        name = f"{key.removesuffix('.weight')}.{part}"
        return CheckpointError(f"{self._checkpoint.where}: {name} {why}", hint=hint)

    def _check(self, module: str) -> tuple[int, int]:
        """Outputs and inputs of a packed linear. Raises CheckpointError if its parts do not fit."""
        key, stored = f"{module}.weight", self._checkpoint
        for part in _PARTS[:3]:
            if f"{module}.{part}" not in stored:
                raise self._broken(key, part, "is missing", _FETCH)
        shapes = {part: stored.shape(f"{module}.{part}") for part in _PARTS[:3]}
        if any(len(shape) != 2 for shape in shapes.values()):
            raise self._broken(key, "qweight", f"and what belongs to it are {shapes}", _FETCH)
        rows, columns = shapes["qweight"]
        along = self._per_word
        awq = self._packing.method == "awq"
        inputs, outputs = (rows, columns * along) if awq else (rows * along, columns)
        groups = -(-inputs // self._group(inputs))
        expected = {"qzeros": (groups, outputs // along), "scales": (groups, outputs)}
        for part, shape in expected.items():
            if shapes[part] != shape or outputs % along:
                raise self._broken(
                    key,
                    part,
                    f"is {shapes[part]}, expected {shape} for qweight {shapes['qweight']}, "
                    f"{self._packing}",
                    "quantization_config and the weights do not belong together; fetch both again",
                )
        for part in ("qweight", "qzeros"):
            if stored.dtype(f"{module}.{part}") != "int32":
                raise self._broken(key, part, "is not stored as int32", _FETCH)
        self._check_order(key, inputs)
        return outputs, inputs

    def _order(self, key: str) -> Array | None:
        """int64 [inputs]: the inputs by group; None if groups are of neighbours."""
        if f"{key.removesuffix('.weight')}.g_idx" not in self._checkpoint:
            return None
        groups = self._part(key, "g_idx")
        return None if (np.diff(groups) >= 0).all() else np.argsort(groups, kind="stable")

    def _check_order(self, key: str, inputs: int) -> None:
        """Raise CheckpointError unless groups are whole, and reordered only where that is said."""
        if f"{key.removesuffix('.weight')}.g_idx" not in self._checkpoint:
            if self._packing.reordered:
                raise self._broken(key, "g_idx", "is missing, and desc_act needs it", _FETCH)
            return
        groups = self._part(key, "g_idx")
        expected = np.arange(inputs) // self._group(inputs)
        if not np.array_equal(np.sort(groups), expected):
            raise self._broken(key, "g_idx", f"does not make {self._packing} of inputs", _FETCH)
        if not self._packing.reordered and not np.array_equal(groups, expected):
            raise self._broken(
                key,
                "g_idx",
                "puts inputs into groups in an order of its own, and quantization_config does not "
                "say desc_act",
                'set "desc_act": true in quantization_config of config.json',
            )
