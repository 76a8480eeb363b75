"""The table of docs/systems.md is true: every cell is tried here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from edgevlm import api
from edgevlm.engines.build.build import build, lint
from edgevlm.engines.build.check import TOLERANCE
from edgevlm.export.write import graphs
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.goldens import relative_difference
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ToolkitError
from edgevlm.toolkit.target import parse
from edgevlm.training import stages
from tests.conftest import ROOT, golden_case
from tests.pipeline import ask, engine_of, requantized, silent
from tests.systems import segmenting, test_comm, test_huggingface, test_huggingface_next
from tests.systems.test_huggingface import IMAGE
from tests.systems.test_same_answer import replayed
from tests.training import runs

COLUMNS = ("system", "loads original", "loads Hugging Face", "exports", "runs on CPU", "trains",
           "int8", "int4", "TensorRT lowering")  # fmt: skip

ORIGINALS = {
    "llava": "e2e_llava15/llava-v1.5-tiny",
    "convllava": "e2e_convllava/convllava-tiny",
    "mmfuser": "e2e_mmfuser/llava-mmfuser-tiny",
    "mlcd": "mlcd_llavanext_e2e",
}


def _comm(folder: Path) -> None:
    test_comm.write(folder)


def _next_original(folder: Path) -> None:
    """MLCD's golden as LLaVA-NeXT, whose tower must not be called mlcd.

    The golden LLaVA-1.5 with tiles is.
    """
    import json
    import shutil

    case = golden_case("e2e_llava15")
    shutil.copytree(case / "llava-v1.5-tiny", folder)
    shutil.copytree(case / "clip-vit-tiny", folder.parent / "clip-vit-tiny")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial",
               "image_grid_pinpoints": [[84, 168], [168, 84]]}  # fmt: skip
    path.write_text(json.dumps(config))


def _segmenting(folder: Path) -> None:
    segmenting.checkpoint(folder, segmenting.sam())


MAKERS: dict[str, Callable[[Path], object]] = {
    "comm": _comm,
    "llava_next": _next_original,
    "mlcd_seg": _segmenting,
}
HUGGINGFACE: dict[str, Callable[[Path], object]] = {
    "llava": lambda folder: test_huggingface.save(folder, "grouped heads"),
    "llava_next": lambda folder: test_huggingface_next.save(folder, True, "qwen2"),
}


def original(system: str, work: Path) -> Path:
    if system in ORIGINALS:
        return golden_case(ORIGINALS[system].split("/")[0]).joinpath(
            *ORIGINALS[system].split("/")[1:]
        )
    MAKERS[system](work / "checkpoint")
    return work / "checkpoint"


def tried(action: Callable[[], object]) -> bool:
    try:
        action()
    except ToolkitError:
        return False
    return True


def loads_huggingface(system: str, work: Path) -> bool:
    if system not in HUGGINGFACE:
        return False
    HUGGINGFACE[system](work / "hf")
    return systems.load(work / "hf", Options()).model.system == system


def answers_in(kind: str, work: Path) -> None:
    """Build the bundle with weight-only quantization, and ask."""
    build(work / "bundle", work / kind, requantized(work / "bundle", kind), silent)
    assert ask(work / kind, "<image>What?", [IMAGE], 2).token_ids


def trains(system: str, folder: Path, work: Path) -> bool:
    """Whether the system's last published stage takes steps from this checkpoint, and is read."""
    stage = [stage.name for stage in stages.STAGES if system in stage.systems][-1]
    data, out = runs.data_set(work / "data", 8), work / "trained"
    result = api.train(
        stage, str(folder), out, data=[str(data)], batch=4, micro_batch=2, steps=2, log_every=1
    )
    finite = result.last_loss is not None and math.isfinite(result.last_loss)
    return finite and systems.load(out, Options()).model.system == system


def portable(bundle: Path) -> bool:
    """Whether plain ONNX Runtime reproduces the goldens with the unlowered graphs."""
    pairs = list(replayed(Bundle.open(bundle)))
    return all(relative_difference(a, b) < TOLERANCE["fp32"] for a, b in pairs) and bool(pairs)


def row(system: str, work: Path) -> tuple[str, ...]:
    """One line of the table, every cell tried on a tiny checkpoint."""
    folder = original(system, work)
    source = systems.load(folder, Options())
    loads = source.model.system == system
    recorded = graphs(source, "fp32")
    engine = engine_of(folder, work)
    runs = len(ask(engine, "<image>What?", [IMAGE], 2).token_ids) > 0
    lowers = tried(lambda: lint(recorded, parse("jetson-agx-orin")))
    quantized = [tried(lambda kind=kind: answers_in(kind, work)) for kind in ("int8", "int4")]  # type: ignore[misc]
    exports = portable(work / "bundle")
    loads_hf = loads_huggingface(system, work)
    cells = (loads, loads_hf, exports, runs, trains(system, folder, work), *quantized, lowers)
    return (system, *("yes" if cell else "-" for cell in cells))


@pytest.mark.parametrize("system", systems.names())
def test_the_table_tells_the_truth(system: str, tmp_path: Path) -> None:
    text = (ROOT / "docs/systems.md").read_text()
    first = text[text.index("| system") :].split("\n\n")[0]
    lines = first.splitlines()
    assert tuple(c.strip() for c in lines[0].strip("|").split("|")) == COLUMNS
    found = {cells[0]: cells for cells in (
        tuple(c.strip() for c in line.strip("|").split("|")) for line in lines[2:]
    )}  # fmt: skip
    assert found[system] == row(system, tmp_path)


def test_every_preset_is_named_in_the_page() -> None:
    text = (ROOT / "docs/systems.md").read_text()
    assert [name for name in systems.presets() if not re.search(rf"`{name}`", text)] == []
