"""What each target can do: the opset that it reads, what it computes in, and a row for every op.

An op without a row is not supported there, and the build says so by name instead of finding out on
the device. The rows of a backend are in a file of their own, which needs onnx; what a target
computes in is known without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import Target, Version

if TYPE_CHECKING:
    import onnx

    from edgevlm.engines.lowering.graph import Rewriter

Action = Literal["keep", "swap", "decompose", "refuse"]
Rewrite = Callable[["onnx.NodeProto", "Rewriter"], "list[onnx.NodeProto]"]


@dataclass(frozen=True)
class Row:
    """One op on one target.

    since: the first backend version for which this alternative holds. fits: whether it suits a
    call (None: every call). formats: the float formats of models that it holds for (none: all).
    Where one of them does not hold, `otherwise` is tried. Decomposing puts our function's standard
    body in its place; refusing gives the reason in `why`.
    """

    action: Action
    why: str
    rewrite: Rewrite | None = None
    into: str = ""
    since: Version = ()
    fits: Callable[[onnx.NodeProto], bool] | None = None
    otherwise: Row | None = None
    formats: tuple[str, ...] = ()

    def at(self, version: Version) -> Row | None:
        """This row with the alternatives that hold in `version`, None if none does."""
        otherwise = self.otherwise.at(version) if self.otherwise else None
        return replace(self, otherwise=otherwise) if _holds(self.since, version) else otherwise

    def choose(self, node: onnx.NodeProto, dtype: str = "fp32") -> Row | None:
        """The first alternative that suits this call in a model of `dtype`, None if none does."""
        held = not self.formats or dtype in self.formats
        if held and (self.fits is None or self.fits(node)):
            return self
        return self.otherwise.choose(node, dtype) if self.otherwise else None

    def alternatives(self) -> Iterator[Row]:
        """This row and all that are tried where it does not fit."""
        yield self
        if self.otherwise:
            yield from self.otherwise.alternatives()


@dataclass(frozen=True)
class Decision:
    """One line of a lowering table: what happened to one kind of op in one component."""

    component: str
    op: str
    count: int
    action: Action
    into: str
    why: str


@dataclass(frozen=True)
class Capabilities:
    """What one target can do.

    opset: the newest standard opset that it reads. compute: the float formats that it has kernels
    for; a model in another is upcast to fp32. kv_dtype: the format of the KV cache, None for the
    model's own. rows: makes the table of ops, with plugins for those that are named; empty where no
    lowering has been written. lint: raises UnsupportedError for a component's lowered graph that
    would not become an engine.
    """

    opset: int
    compute: tuple[str, ...]
    kv_dtype: str | None
    rows: Callable[..., Mapping[str, Row]]
    lint: Callable[[str, onnx.ModelProto], None]

    def computes_in(self, dtype: str) -> str:
        """What a model whose weights are stored as `dtype` is computed in."""
        return dtype if dtype in self.compute else "fp32"

    def cache_in(self, dtype: str) -> str:
        """What the KV cache of such a model is stored as."""
        return self.kv_dtype or self.computes_in(dtype)


@dataclass(frozen=True)
class _Backend:
    """The same over all releases of a backend. opsets: with the release since which each is read,
    newest first. rows: the file of this folder that holds `ROWS`; lint: that which has `check`;
    plugins: that which holds `PLUGINS`, the rows of ops that a plugin is asked for.
    releases: which release of TensorRT equals each of another backend, oldest first; rows and
    opsets are stated in those.
    """

    opsets: tuple[tuple[int, Version], ...]
    compute: tuple[str, ...]
    kv_dtype: str | None = None
    rows: str = ""
    lint: str = ""
    plugins: str = ""
    releases: tuple[tuple[Version, Version], ...] = ()

    def release(self, version: Version) -> Version:
        """The release in which the rows are stated; () for the newest."""
        if not version or not self.releases:
            return version
        equal = [theirs for ours, theirs in self.releases if ours <= version]
        return equal[-1] if equal else self.releases[0][1]


_TENSORRT = _Backend(
    ((24, (10, 15)), (23, (10, 14)), (21, ())),
    ("fp32", "fp16", "bf16"),
    rows="tensorrt_rows",
    lint="tensorrt_lint",
    plugins="tensorrt_plugins",
)
_BACKENDS = {
    "onnxruntime": _Backend(
        opsets=((24, (1, 24)), (23, ())),
        compute=("fp32",),
        kv_dtype="fp32",
        rows="onnxruntime_rows",
    ),
    # Its kernels of Cast, Reshape, Transpose and others end with opset 23; what a newer one renews
    # would run on the processor.
    "onnxruntime-cuda": _Backend(
        opsets=((23, ()),),
        compute=("fp32", "fp16", "bf16"),
        rows="onnxruntime_cuda_rows",
        lint="onnxruntime_cuda_lint",
    ),
    "reference": _Backend(opsets=((24, ()),), compute=("fp32",), kv_dtype="fp32"),
    "tensorrt": _TENSORRT,
    # by the classes, methods and ops of each; 1.4 lacks Swish, which 11.0 brought
    # It ends the process whose parser takes a plugin.
    "tensorrt-rtx": replace(
        _TENSORRT,
        plugins="",
        releases=(
            ((1, 4), (10, 16)),
            ((1, 5), (11, 1)),
            ((1, 6), (11, 3)),
            ((1, 7), (11, 4)),
        ),
    ),
}


def of(target: Target) -> Capabilities:
    """What `target` can do in its release; a target without a version is the newest release."""
    backend = _BACKENDS[target.backend]
    release = backend.release(target.version)
    opset = next(opset for opset, since in backend.opsets if _holds(since, release))

    def rows(plugins: Collection[str] = ()) -> Mapping[str, Row]:
        if not backend.rows:
            _plugins(backend, target, plugins)
            return {}
        table = import_module(f"edgevlm.engines.lowering.{backend.rows}").ROWS
        table = table | _plugins(backend, target, plugins)
        known = {op: row.at(release) for op, row in table.items()}
        return {op: row for op, row in known.items() if row is not None}

    def lint(component: str, model: onnx.ModelProto) -> None:
        if backend.lint:
            module = import_module(f"edgevlm.engines.lowering.{backend.lint}")
            module.check(component, model, target)

    return Capabilities(opset, backend.compute, backend.kv_dtype, rows, lint)


def _plugins(backend: _Backend, target: Target, asked: Collection[str]) -> dict[str, Row]:
    """The rows of ops for which plugins are asked. Raises UnsupportedError for any other."""
    module = f"edgevlm.engines.lowering.{backend.plugins}"
    known: dict[str, Row] = import_module(module).PLUGINS if asked and backend.plugins else {}
    missing = sorted(set(asked) - set(map(_short, known)))
    if missing:
        raise UnsupportedError(
            f"{target} takes no plugin for {', '.join(missing)}",
            hint=f"there are plugins for {', '.join(map(_short, known))}"
            if known
            else "build without: the standard bodies run everywhere",
        )
    return {op: row for op, row in known.items() if _short(op) in asked}


def _short(op: str) -> str:
    return op.rpartition(".")[2]


def _holds(since: Version, version: Version) -> bool:
    """Whether `version` is at least `since`; an empty version is the newest release."""
    return not version or version >= since
