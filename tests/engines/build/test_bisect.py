"""The search for the first wrong op, by itself: what it finds, and that it writes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from edgevlm.engines.build.bisect import Divergence, first_divergence
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.manifest import GOLDENS, Bundle
from tests.refusals import tree


def search(
    ready: Path, engine: Path, component: str, calls: int | None = None
) -> Divergence | None:
    bundle = Bundle.open(ready / "bundle")
    record = bundle.manifest.component(component)
    own = [g for g in goldens.load(ready / "bundle" / GOLDENS) if g.component == component]
    return first_divergence(bundle, record, engine, own[:calls], 1e-3)


def states(*folders: Path) -> list[object]:
    """What is in folders, and when a name was last added or taken away there."""
    return [(folder.stat().st_mtime_ns, tree(folder)) for folder in folders]


def changed(
    ready: Path, work: Path, component: str, change: Callable[[onnx.ModelProto], str]
) -> tuple[Path, str]:
    """A copy of the engine whose graph was changed, and what `change` says of it."""
    engine = Path(shutil.copytree(ready / "engine-cpu", work / "engine"))
    path = engine / f"{component}.onnx"
    model = onnx.load(str(path), load_external_data=False)
    told = change(model)
    path.write_bytes(model.SerializeToString())
    return engine, told


def steeper(model: onnx.ModelProto) -> str:
    """The second QuickGelu gets another slope; its output."""
    node = [n for n in model.graph.node if n.op_type == "QuickGelu"][1]
    node.attribute[0].f = 1.9
    return str(node.output[0])


def other_scale(model: onnx.ModelProto) -> str:
    """Attention of the second layer gets another scale; its output."""
    node = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"][1]
    next(a for a in node.attribute if a.name == "scale").f *= 3
    return str(node.output[0])


@pytest.mark.parametrize(
    ("component", "change", "op"),
    [("encoder.clip", steeper, "QuickGelu"), ("lm", other_scale, "GroupQueryAttention")],
)
def test_the_first_wrong_op_is_found(
    component: str,
    change: Callable[[onnx.ModelProto], str],
    op: str,
    ready: Path,
    tmp_path: Path,
) -> None:
    engine, output = changed(ready, tmp_path, component, change)
    before = states(ready / "bundle", engine)
    found = search(ready, engine, component)
    assert found is not None
    assert (found.tensor, found.op) == (output, f"com.microsoft.{op}")
    assert found.difference > 1e-3
    assert states(ready / "bundle", engine) == before


def only_later(model: onnx.ModelProto) -> str:
    """The prompt's second piece sees a window that the first does not fill; its output."""
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    next(a for a in node.attribute if a.name == "local_window_size").i = 3
    return str(node.output[0])


def test_a_fault_that_a_later_call_shows_is_found_with_the_states_of_the_earlier(
    ready: Path, tmp_path: Path
) -> None:
    engine, output = changed(ready, tmp_path, "lm", only_later)
    assert search(ready, engine, "lm", calls=1) is None  # three tokens, all inside the window
    found = search(ready, engine, "lm")
    assert found is not None
    assert found.tensor == output


@pytest.mark.parametrize("component", ["encoder.clip", "merger", "lm"])
def test_a_right_engine_has_none(component: str, ready: Path) -> None:
    folders = ready / "bundle", ready / "engine-cpu"
    before = states(*folders)
    assert search(ready, ready / "engine-cpu", component) is None
    assert states(*folders) == before
