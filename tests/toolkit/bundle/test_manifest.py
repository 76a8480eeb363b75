"""Bundles: what was changed, cut short or comes from elsewhere is noticed; goldens come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.export.write import write_bundle
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import Golden
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import BundleError, ToolkitError
from tests.conftest import HERE
from tests.pipeline import silent
from tests.sealing import edit_sealed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of the tiny LLaVA."""
    source = systems.load(HERE / "goldens/e2e_llava15/llava-v1.5-tiny", Options())
    out = tmp_path / "bundle"
    write_bundle(source, out, dtype="fp32", made_by="tests", force=False, progress=silent)
    return out


def changed(folder: Path, **values: Any) -> None:
    edit_sealed(folder / "manifest.json", lambda data: data.update(values))


def test_a_bundle_knows_its_files(folder: Path) -> None:
    bundle = Bundle.open(folder)
    bundle.verify()
    assert set(bundle.manifest.files) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    for component in bundle.manifest.components:
        tensors = bundle.tensors(component.name)
        assert len(tensors) == len(list(tensors)) > 0
        assert all(tensors[key].shape == tensors.shape(key) for key in tensors)
        assert "nothing" not in tensors
        with pytest.raises(KeyError):
            _ = tensors["nothing"]


def test_every_changed_file_is_noticed(folder: Path) -> None:
    bundle = Bundle.open(folder)
    for name in bundle.manifest.files:
        path = folder / name
        whole = path.read_bytes()
        zero_point = len(whole) // 2
        path.write_bytes(
            whole[:zero_point] + bytes([whole[zero_point] ^ 1]) + whole[zero_point + 1 :]
        )
        bundle.check_sizes()
        with pytest.raises(BundleError, match=f"{name} was changed"):
            bundle.verify()
        path.write_bytes(whole[:-1])
        with pytest.raises(BundleError, match=f"{len(whole) - 1} bytes"):
            bundle.check_sizes()
        path.unlink()
        with pytest.raises(BundleError, match=f"lacks {name}"):
            bundle.check_sizes()
        path.write_bytes(whole)
    bundle.verify()


def test_the_identity_is_that_of_the_content(folder: Path) -> None:
    before = Bundle.open(folder).sha256
    assert Bundle.open(folder).sha256 == before
    changed(folder, made_by="somebody else")
    assert Bundle.open(folder).sha256 != before


@pytest.mark.parametrize(
    "values",
    [
        {"format": 1},
        {"format": None},
        {"surprise": 1},
        {"components": 5},
        {"opset": True},
        {"model": {"name": "x"}},
    ],
)
def test_a_manifest_that_was_changed_is_refused(folder: Path, values: dict[str, Any]) -> None:
    changed(folder, **values)
    with pytest.raises(ToolkitError, match=r"manifest\.json"):
        Bundle.open(folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BundleError, match="is not a bundle") as refused:
            Bundle.open(place)
        assert "edgevlm export" in refused.value.hint
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.open(tmp_path)


# -- goldens -------------------------------------------------------------------------------


def test_goldens_come_back_in_their_order(tmp_path: Path) -> None:
    made = [
        Golden(f"part.{n % 2}", {"x": np.arange(n + 1)}, {"y": np.full(3, n, np.float32)})
        for n in range(12)
    ]
    goldens.save(tmp_path / "golden.npz", made)
    found = goldens.load(tmp_path / "golden.npz")
    assert [golden.component for golden in found] == [golden.component for golden in made]
    for one, other in zip(found, made, strict=True):
        np.testing.assert_array_equal(one.inputs["x"], other.inputs["x"])
        np.testing.assert_array_equal(one.outputs["y"], other.outputs["y"])


def test_large_outputs_are_sampled_from_end_to_end() -> None:
    np.testing.assert_array_equal(goldens.sample(5), range(5))
    places = goldens.sample(1_000_003)
    assert (len(places), places[0], places[-1]) == (1 << 16, 0, 1_000_002)
    assert (np.diff(places) > 0).all()


def test_goldens_of_a_bundle_are_exact_in_every_type(folder: Path) -> None:
    found = goldens.load(folder / "golden.npz")
    names = [golden.component for golden in found]
    assert names == ["encoder.clip", "merger", "lm", "lm", "lm"]
    for golden in found:
        for array in golden.inputs.values():
            half = array.astype(np.float16).astype(array.dtype)
            assert array.dtype == np.int64 or (half == array).all()
        assert all(np.isfinite(array).all() for array in golden.outputs.values())
