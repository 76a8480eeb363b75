"""verify: an engine that was built without its card is compared once, where it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgevlm.engines import manifest
from edgevlm.engines.build.verify import verify
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.bundle.manifest import GOLDENS
from edgevlm.toolkit.errors import AccuracyError, BundleError
from tests.conftest import HERE
from tests.pipeline import engine_of, silent
from tests.sealing import edit_sealed, reseal

CHECKPOINT = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"


@pytest.fixture
def unverified(tmp_path: Path) -> Path:
    """An engine that says of itself what a builder without the card would."""
    folder = engine_of(CHECKPOINT, tmp_path)
    engine = manifest.read(folder)
    build = replace(engine.build, kernel_differences={}, precision_losses={})
    manifest.write(folder, replace(engine, build=build, verified=False))
    return folder


def test_it_answers_nothing_until_it_is_verified(unverified: Path) -> None:
    with pytest.raises(AccuracyError, match="never compared with the reference") as caught:
        Session.open(unverified)
    assert caught.value.hint.endswith(f"edgevlm verify {unverified}")
    verified = verify(unverified, silent)
    assert verified.verified
    assert max(verified.build.kernel_differences.values()) < 1e-4
    assert manifest.read(unverified) == verified
    Session.open(unverified).close()


def test_wrong_kernels_stay_unverified(unverified: Path) -> None:
    weights = next(unverified.glob("merger*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-400:] = bytes(400)
    weights.write_bytes(content)
    reseal(unverified / manifest.DESCRIPTION)
    with pytest.raises(AccuracyError, match="merger differs from the reference"):
        verify(unverified, silent)
    assert not manifest.read(unverified).verified


def test_goldens_are_those_of_the_engine_or_its_bundle(unverified: Path, tmp_path: Path) -> None:
    goldens = tmp_path / "bundle" / GOLDENS
    goldens.rename(unverified / GOLDENS)
    assert verify(unverified, silent).verified
    (unverified / GOLDENS).unlink()
    with pytest.raises(BundleError, match="has no goldens") as caught:
        verify(unverified, silent)
    assert "edgevlm build" in caught.value.hint


def test_engine_json_without_the_mark_is_of_a_verified_engine(tmp_path: Path) -> None:
    folder = engine_of(CHECKPOINT, tmp_path)

    def forget(data: dict[str, Any]) -> None:
        del data["verified"], data["plans"]

    edit_sealed(folder / manifest.DESCRIPTION, forget)
    assert manifest.read(folder).verified


def test_an_interrupted_verification_leaves_engine_json_whole(
    unverified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (unverified / manifest.DESCRIPTION).read_bytes()

    def interrupted(self: Path, content: str, **how: object) -> int:
        self.write_bytes(content[:100].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify(unverified, silent)
    assert (unverified / manifest.DESCRIPTION).read_bytes() == before
    assert not list(unverified.glob("*.new"))
