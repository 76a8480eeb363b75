"""Bundles and engines: changed ones are refused, and no other folder is overwritten."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit.bundle import unfinished
from edgevlm.toolkit.bundle.atomic import writing
from edgevlm.toolkit.errors import OutputError
from tests.refusals import ASK, GOLDEN, IMAGE, LM, checkpoint_in, edgevlm, edit, refuses, tree


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Lose the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


FILES = ("encoder.clip.onnx", "lm.safetensors", "tokenizer.json", "golden.npz")
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "changed": (flip, "was changed after the export (its checksum differs)"),
    "cut": (cut, "bytes, the manifest says"),
    "lost": (Path.unlink, "lacks"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_bundle_that_was_changed_is_refused(
    name: str, damage: str, bundle: Path, tmp_path: Path
) -> None:
    change, reason = DAMAGES[damage]
    change(bundle / name)
    error, hint = refuses(tmp_path, "build", bundle, tmp_path / "engine", "--quiet")
    assert name in error
    assert reason in error
    assert "export it again" in hint


BROKEN = {"cut": b'{"format": 1, ', "latin-1": b'{"a": "\xe9"}', "a list": b"[]", "empty": b""}


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_description_is_refused(
    way: str, bundle: Path, engine: Path, tmp_path: Path
) -> None:
    (bundle / "manifest.json").write_bytes(BROKEN[way])
    (engine / "engine.json").write_bytes(BROKEN[way])
    words: tuple[object, ...]
    for words in (
        ("build", bundle, tmp_path / "never"),
        ("inspect", bundle),
        ("export", bundle, tmp_path / "never"),
    ):
        assert str(bundle / "manifest.json") in refuses(tmp_path, *words, "--quiet")[0]
    for words in (("run", engine, *ASK), ("profile", engine), ("inspect", engine)):
        assert str(engine / "engine.json") in refuses(tmp_path, *words, "--quiet")[0]


ODD: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("manifest.json", lambda d: d.update(format=99), "has format 99"),
    ("manifest.json", lambda d: d.update(components=3), "components = 3"),
    ("manifest.json", lambda d: d.update(components=[]), "components"),
    ("manifest.json", lambda d: d["model"]["lm"].update(kind="../x"), "'../x'"),
    (
        "manifest.json",
        lambda d: d["model"]["lm"]["config"].update(hidden_size="w"),
        "hidden_size = 'w'",
    ),
    ("manifest.json", lambda d: d["components"][0].update(name="x"), "encoder.clip"),
    ("manifest.json", lambda d: d["files"].pop("lm.onnx"), "lm.onnx"),
    ("manifest.json", lambda d: d["files"].update({"../x": {"nbytes": 1, "sha256": ""}}), "../x"),
    ("manifest.json", lambda d: d.update(dtype="fp8"), "fp8"),
    ("engine.json", lambda d: d.update(format=0), "has format 0"),
    ("engine.json", lambda d: d.update(context=0), "context"),
    ("engine.json", lambda d: d.update(context="long"), "context = 'long'"),
    ("engine.json", lambda d: d.update(target="abacus/wood"), "abacus/wood"),
    ("engine.json", lambda d: d.update(components=[]), "components"),
    ("engine.json", lambda d: d["components"].pop(), "components"),
    ("engine.json", lambda d: d["components"][0].update(graph="x.onnx"), "x.onnx"),
    ("engine.json", lambda d: d["files"].clear(), "files"),
    ("engine.json", lambda d: d["edges"].pop(), "edges"),
    ("engine.json", lambda d: d["components"][0]["inputs"].clear(), "ports of encoder.clip"),
    ("engine.json", lambda d: d["model"]["images"]["encoders"].clear(), "images.encoders"),
    ("engine.json", lambda d: d["model"]["encoders"][0]["config"].update(taps=[]), "no model"),
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_an_edited_description_is_refused(
    number: int, bundle: Path, engine: Path, tmp_path: Path
) -> None:
    name, change, reason = ODD[number]
    folder = bundle if name == "manifest.json" else engine
    edit(folder / name, change)
    words = ("build", bundle, tmp_path / "never") if folder == bundle else ("run", engine, *ASK)
    assert reason in refuses(tmp_path, *words, "--quiet")[0]


TARGETS = ["tensorrt@10.16/sm_87", "onnxruntime/riscv64", "onnxruntime@99.0/x86_64"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_for_another_target_is_refused(target: str, engine: Path, tmp_path: Path) -> None:
    edit(engine / "engine.json", lambda d: d.update(target=target))
    for words in (("run", engine, *ASK), ("profile", engine)):
        error, hint = refuses(tmp_path, *words, "--quiet")
        assert "tensorrt" in error if "tensorrt" in target else target in error
        assert "--target cpu" in hint
    error, hint = refuses(tmp_path, "build", tmp_path, tmp_path / "e", "--target", "jetson-nano-9")
    assert "jetson-nano-9" in error
    assert "jetson-orin-nano" in hint


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["lm.onnx", "merger.safetensors", "tokenizer.json"])
def test_an_engine_that_lost_something_is_refused(
    name: str, damage: Callable[[Path], None], engine: Path, tmp_path: Path
) -> None:
    damage(engine / name)
    error, hint = refuses(tmp_path, "run", engine, *ASK)
    assert str(engine) in error
    assert name in error
    assert "edgevlm build" in hint


def test_an_engine_whose_graph_was_changed_is_refused(engine: Path, tmp_path: Path) -> None:
    for name in ("lm.onnx", "tokenizer.json"):
        whole = (engine / name).read_bytes()
        (engine / name).write_bytes(bytes(len(whole)))
        assert name in refuses(tmp_path, "run", engine, *ASK)[0]
        (engine / name).write_bytes(whole)


def test_one_kind_of_folder_is_not_another(ready: Path, tmp_path: Path) -> None:
    error, hint = refuses(tmp_path, "run", ready / "bundle", *ASK)
    assert "is not an engine" in error
    assert "edgevlm build" in hint
    error, hint = refuses(tmp_path, "build", GOLDEN / LM, tmp_path / "e")
    assert "not a bundle" in error
    assert f"edgevlm export {GOLDEN / LM} {GOLDEN / LM}-bundle" in hint
    assert "not an engine" in refuses(tmp_path, "run", IMAGE, *ASK)[0]


def test_the_hint_says_what_a_path_is_and_what_to_type(ready: Path, tmp_path: Path) -> None:
    engine, bundle, checkpoint = ready / "engine-cpu", ready / "bundle", GOLDEN / LM
    for words, expected in (
        (("run", bundle, *ASK), f"edgevlm build {bundle} {bundle}-engine"),
        (("run", checkpoint, *ASK), f"edgevlm build {checkpoint}-bundle {checkpoint}-engine"),
        (("run", ready, *ASK), "there is one in it: "),
        (("run", "What is it?", engine), "edgevlm run ENGINE PROMPT"),
        (("run", tmp_path / "none", *ASK), f"edgevlm build BUNDLE {tmp_path / 'none'}"),
        (("run", IMAGE, *ASK), "edgevlm build BUNDLE ENGINE"),
        (("build", engine, tmp_path / "e"), f"edgevlm inspect {engine}"),
        (("build", ready, tmp_path / "e"), "there is one in it: "),
        (("export", engine, tmp_path / "b"), "this is an engine"),
        (("export", GOLDEN, tmp_path / "b"), "there is one in it: "),
        (("export", tmp_path, tmp_path / "b"), "preset:NAME --random-weights"),
        (("inspect", tmp_path), "config.json"),
        (("batch", engine, "nowhere", tmp_path / "b"), ".jsonl"),
    ):
        assert expected in refuses(tmp_path, *words)[1], words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("exprot", "a", "b"), "edgevlm export --help"),
        (("nonsense",), "edgevlm --help lists the verbs"),
        (("run",), "edgevlm run ENGINE [PROMPT]; edgevlm run --help"),
        (("run", "engine", "What", "is", "it"), "quotes: edgevlm run ENGINE [PROMPT]"),
        (("plan", "preset:llava-1.5-7b"), "edgevlm plan SOURCE --target TARGET;"),
    ],
)
def test_a_mistyped_command_gets_the_right_form(
    words: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    assert expected in refuses(tmp_path, *words, code=2)[1]


# -- where it is written -----------------------------------------------------------------------


def foreign(place: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")


def extension(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_text('{"manifest_version": 3, "name": "a browser extension"}')


def a_file(place: Path) -> None:
    place.write_text("years of work")


def dangling(place: Path) -> None:
    place.symlink_to(place.parent / "gone")


def ours_and_more(place: Path) -> None:
    assert edgevlm("export", GOLDEN / LM, place).code == 0
    (place / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize("make", [foreign, extension, a_file, dangling, ours_and_more])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_not_ours_is_left_alone(
    make: Callable[[Path], None], force: list[str], ready: Path, tmp_path: Path
) -> None:
    make(tmp_path / "out")
    for words in (("export", GOLDEN / LM), ("build", ready / "bundle")):
        error, hint = refuses(tmp_path, *words, tmp_path / "out", *force, "--quiet")
        assert str(tmp_path / "out") in error
        assert "another place" in hint


def test_an_artifact_is_replaced_only_when_asked(bundle: Path, tmp_path: Path) -> None:
    error, hint = refuses(tmp_path, "export", GOLDEN / LM, bundle, "--quiet")
    assert str(bundle) in error
    assert "--force" in hint
    assert edgevlm("export", GOLDEN / LM, bundle, "--dtype", "bf16", "--force").code == 0
    assert json.loads((bundle / "manifest.json").read_text())["dtype"] == "bf16"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_link_to_an_artifact_stays_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert edgevlm("export", GOLDEN / LM, tmp_path / "link", "--force").code == 0
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "link"]


def test_a_place_that_cannot_be_written_is_refused(ready: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/nobody/out"), tmp_path / ("x" * 300)):
        for words in (("export", GOLDEN / LM), ("build", ready / "bundle")):
            assert str(out) in refuses(tmp_path, *words, out, "--quiet")[0]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_source_never_becomes_its_own_output(
    force: list[str], bundle: Path, tmp_path: Path
) -> None:
    source = checkpoint_in(tmp_path)
    assert str(source) in refuses(tmp_path, "export", source, source, *force)[0]
    assert str(tmp_path) in refuses(tmp_path, "export", source, tmp_path, *force)[0]
    for verb in ("export", "build"):
        for out in (bundle, tmp_path / "." / "bundle" / ".." / "bundle"):
            assert "bundle" in refuses(tmp_path, verb, bundle, out, *force)[0]


def test_an_output_within_the_source_leaves_the_source_whole(tmp_path: Path) -> None:
    source = checkpoint_in(tmp_path)
    before = tree(source)
    assert edgevlm("export", source, source / "bundle").code == 0
    assert {name: state for name, state in tree(source).items() if name in before} == before
    assert edgevlm("export", source, source / "bundle", "--force").code == 0


def test_the_slower_of_two_exports_is_refused(bundle: Path, tmp_path: Path) -> None:
    before = tree(bundle)
    with (
        pytest.raises(OutputError, match="exists"),
        writing(tmp_path / "both", force=False) as folder,
    ):
        (folder / "manifest.json").write_text("the slower one")
        shutil.move(bundle, tmp_path / "both")
    assert tree(tmp_path / "both") == before
    assert [path.name for path in tmp_path.iterdir()] == ["both"]


def test_leftovers_of_a_killed_process_are_cleared(bundle: Path, tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{'0' * 16}"
    left.mkdir()
    left.with_name(f"{left.name}.lock").write_text(unfinished._MARK)
    bundle.rename(left.with_name(f"{left.name}-old"))
    error, hint = refuses_after_recovery(tmp_path)
    assert "out exists" in error
    assert "--force" in hint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refuses_after_recovery(work: Path) -> tuple[str, str]:
    ran = edgevlm("export", GOLDEN / LM, work / "out", "--quiet")
    assert ran.code == 1
    error, hint = ran.err.splitlines()
    return error, hint


NAMES = ["two words", "größe 大 🙂", "a'b\"c", "[x]*?", "-dash"]


def test_a_name_that_is_not_unicode_is_refused(ready: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"not-\xff-utf8")
    for words in (("export", GOLDEN / LM), ("build", ready / "bundle")):
        error, hint = refuses(tmp_path, *words, out, "--quiet")
        assert "not-\\udcff-utf8" in error
        assert hint


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_will_do(name: str, tmp_path: Path) -> None:
    work = tmp_path / name
    work.mkdir()
    source = checkpoint_in(work)
    shutil.copy(IMAGE, work / "picture.png")
    assert edgevlm("export", source, work / "bundle").code == 0
    assert edgevlm("build", work / "bundle", work / "engine").code == 0
    ran = edgevlm("run", work / "engine", "What?", "--image", work / "picture.png", "--json")
    assert ran.code == 0
    assert edgevlm("inspect", work / "engine").code == 0
    assert sorted(p.name for p in work.iterdir()) == [
        "bundle", "clip-vit-tiny", "engine", LM, "picture.png",
    ]  # fmt: skip
