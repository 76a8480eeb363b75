"""`edgevlm embed`: what it writes, what it leaves out, and that a killed run goes on."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edgevlm import api, cli
from edgevlm.engines import manifest
from edgevlm.engines.profiling import report as reports
from edgevlm.engines.runtime import embed_files, feature_file, image_list, memory
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.export.write import write_bundle
from edgevlm.toolkit.checkpoints.layouts.source import random_tower
from edgevlm.toolkit.errors import ConfigError, InputError, OutputError, UnsupportedError
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.models.encoders import clip
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.config import ComponentConfig
from edgevlm.toolkit.vlm.presets import clip_pixels
from edgevlm.toolkit.vlm.tower_presets import PRESETS
from edgevlm.toolkit.vlm.towers import TowerConfig
from tests.conftest import ROOT
from tests.engines.runtime.test_runtime_is_light import OTHERS_WORK, edgevlm


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP for this processor."""
    work = tmp_path_factory.mktemp("tower")
    images = ImageRules({"clip": clip_pixels(28)})
    model = TowerConfig(
        "tiny", "clip", ComponentConfig("clip", "clip", clip.tiny()), "class", images
    )
    source = random_tower(model, 0, "tiny")
    write_bundle(source, work / "bundle", made_by="tests", progress=lambda line: None)
    api.build_engine(work / "bundle", work / "engine")
    return work / "engine"


@pytest.fixture
def photos(tmp_path: Path, generator: np.random.Generator) -> Path:
    """Nine pictures in two folders, one of them not a picture, and a text beside them."""
    folder = tmp_path / "photos"
    for number in range(8):
        home = folder / ("b" if number % 2 else "a")
        home.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40, 30 + number, 3), np.uint8)
        Image.fromarray(pixels).save(home / f"{number}.png")
    (folder / "a" / "5.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not an image")
    return folder


def arrays_of(file: Path) -> dict[str, Any]:
    """The arrays of a .npz, which is closed."""
    with np.load(file) as stored:
        return dict(stored)


def called(*words: str | Path) -> Any:
    """The JSON of a call that succeeds."""
    done = CliRunner().invoke(cli.app, [*map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_folder_becomes_one_file(engine: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    result = called("embed", engine, photos, "-o", out, "--batch", "3")
    assert (result["images"], result["channels"], result["resumed"]) == (8, 32, 0)
    bad = str(photos / "a/5.jpg")
    assert list(result["bad"]) == [bad]
    assert "is not an image" in result["bad"][bad]
    found = arrays_of(out)
    names = [str(photos / f"{'b' if n % 2 else 'a'}/{n}.png") for n in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert found["files"].tolist() == names
    assert found["embeddings"].dtype == np.float32
    with Embedder.open(engine) as tower:
        alone = np.concatenate([tower.run(tower.pixels(name)[None]) for name in names])
    np.testing.assert_allclose(found["embeddings"], alone, atol=1e-5)
    assert not list(tmp_path.glob(".features*"))
    with pytest.raises(OutputError, match="exists"):
        feature_file.check_output(out, force=False)
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(names[5:2:-1]) + "\n\n")
    result = called("embed", engine, "--input", listed, "-o", out, "--normalize", "--force")
    again = arrays_of(out)
    assert again["files"].tolist() == names[5:2:-1]
    lengths = np.linalg.norm(alone[5:2:-1], axis=1, keepdims=True)
    np.testing.assert_allclose(again["embeddings"], alone[5:2:-1] / lengths, atol=1e-6)
    assert result["normalized"]


def test_a_table_has_the_same_rows(engine: Path, photos: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    called("embed", engine, photos, "-o", tmp_path / "f.parquet")
    called("embed", engine, photos, "-o", tmp_path / "f.npz")
    table, arrays = pq.read_table(tmp_path / "f.parquet"), arrays_of(tmp_path / "f.npz")
    assert table["file"].to_pylist() == arrays["files"].tolist()
    assert np.array_equal(np.asarray(table["embedding"].to_pylist(), np.float32),
                          arrays["embeddings"])  # fmt: skip


def test_embedding_needs_neither_torch_nor_onnx(engine: Path, photos: Path, tmp_path: Path) -> None:
    words = ["embed", str(engine), str(photos), "-o", str(tmp_path / "f.npz"), "--json"]
    without = (*OTHERS_WORK, "pyarrow", "sklearn", "skimage")
    done = edgevlm(*words, without=without)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 8
    words[4] = str(tmp_path / "f.parquet")
    refused = edgevlm(*words, without=without)
    assert refused.returncode == 1
    assert "pip install 'edgevlm[parquet]'" in refused.stderr


def test_a_killed_run_goes_on(engine: Path, photos: Path, tmp_path: Path) -> None:
    """Killed in the middle of a batch's row: what is torn is done again."""
    whole, out = tmp_path / "whole.npz", tmp_path / "features.npz"
    called("embed", engine, photos, "-o", whole, "--batch", "2")
    files = image_list.gather([photos], None)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from edgevlm.engines.runtime import embed_files\n"
        "engine, out, *files = sys.argv[1:]\n"
        "def done(count):\n"
        "    if count >= 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "embed_files.embed_files(Path(engine), files, Path(out), normalize=False, batch=2,"
        " threads=1, done=done)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(engine), str(out), *files], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    kept = tmp_path / ".features.npz.embedding"
    with (kept / "vectors").open("ab") as torn:
        torn.write(b"abc" * 50)
    with (kept / "done").open("a") as torn_line:
        torn_line.write('{"files": 2, "ro')
    result = called("embed", engine, photos, "-o", out, "--batch", "2")
    assert result["resumed"] == 4
    assert list(result["bad"]) == [str(photos / "a/5.jpg")]
    for name in ("embeddings", "files"):
        assert np.array_equal(arrays_of(out)[name], arrays_of(whole)[name])
    assert not kept.exists()


def test_what_was_kept_for_another_request_is_thrown_away(tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    with pytest.raises(KeyError), feature_file.beside(out, 2, "one") as kept:
        kept.add(1, np.ones((1, 2), np.float32), {})
        raise KeyError
    with pytest.raises(KeyError), feature_file.beside(out, 2, "one") as kept:
        assert (kept.read, kept.rows) == (1, 1)
        raise KeyError
    with feature_file.beside(out, 2, "other") as kept:
        assert (kept.read, kept.rows) == (0, 0)
        with (
            pytest.raises(OutputError, match="is being written by another process"),
            feature_file.beside(out, 2, "other"),
        ):
            pass


def test_what_cannot_be_is_refused(engine: Path, ready: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="with a language model") as whole:
        Embedder.open(ready / "engine-cpu")
    assert "edgevlm run" in whole.value.hint
    with pytest.raises(InputError, match="--batch 0 is not from 1"):
        Embedder.open(engine, batch=0)
    with pytest.raises(ConfigError, match=r"ends with none of .npz, .parquet"):
        feature_file.check_output(tmp_path / "f.csv", force=False)
    with pytest.raises(OutputError, match="there is no folder"):
        feature_file.check_output(tmp_path / "none/f.npz", force=False)
    with pytest.raises(InputError, match="no image was given"):
        image_list.gather([], None)
    with pytest.raises(InputError, match="was given twice"):
        image_list.gather([photos, photos / "a/0.png"], None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        image_list.gather([tmp_path / "empty"], None)
    for threads, why in ((-1, "is negative"), (5000, "is far beyond")):
        with pytest.raises(InputError, match=f"--threads {threads} {why}"):
            Embedder.open(engine, threads=threads)
    bad = [str(photos / "a/5.jpg"), str(tmp_path / "missing.png")]
    with pytest.raises(InputError, match="none of 2 images can be read"):
        embed_files.embed_files(
            engine, bad, tmp_path / "f.npz", normalize=False, batch=2, threads=1,
            done=lambda count: None,
        )  # fmt: skip


def test_the_batch_follows_from_the_tower_s_tensors(engine: Path) -> None:
    described = manifest.read(engine)
    assert memory.images_at_a_time(described) == 16

    def of(name: str, target: str = described.target) -> int:
        model = towers.to_json(PRESETS[name])
        return memory.images_at_a_time(replace(described, model=model, target=target))

    sizes = [of(name) for name in ("clip-l14-336", "clip-l14", "clip-b16", "clip-b32")]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[3] == 16
    assert of("clip-l14-336", "tensorrt-rtx@1.7/sm_89") == 8
    assert of("unicom-l14-336") == 1


def test_memory_does_not_grow_with_the_number_of_images(engine: Path, photos: Path) -> None:
    """No more than two batches are decoded ahead of what was asked for."""
    asked: list[int] = []

    def sources() -> Any:
        for number in range(100):
            asked.append(number)
            yield photos / "a/0.png"

    with Embedder.open(engine, batch=2) as tower:
        found = tower.embed(sources())
        for _ in range(5):
            next(found)
        time.sleep(0.05)
        assert max(asked) < 10


def test_a_profile_has_the_tower_s_stages(engine: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    found = called("profile", engine, "--runs", "2", "--layers", "1", "--trace", trace)
    assert list(found["stages"]) == ["image_decode", "preprocess", "encoder.clip"]
    assert [bound["stage"] for bound in found["roofline"]["stages"]] == ["encoder.clip"]
    assert found["images_per_s"] > 0
    assert found["layers"][0]["component"] == "encoder.clip"
    spans = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert [span["name"] for span in spans] == list(found["stages"])
    assert [mark[1] for mark in found["memory_marks"]][:2] == ["opening", "warm-up"]
    assert found["metrics"]["image"]["p50"] == pytest.approx(found["image_ms"], abs=0.01)
    assert found["context"]["versions"]["onnxruntime"]
    assert found["drift"] is None


def test_towers_are_compared_on_paper(engine: Path, tmp_path: Path) -> None:
    """A page, a table for spreadsheets and one for comments, of an engine and one in 8 bits."""
    other = tmp_path / "<int8>"
    api.build_engine(engine.parent / "bundle", other, precision="int8-rows", keep_slower=True)
    files = {name: tmp_path / f"p.{name}" for name in ("html", "csv", "markdown")}
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    found = called("profile", engine, "--runs", "2", "--compare", other, *words)
    (compared,) = found["compared"]
    assert found["drift"]["cosine"] == 1
    assert 0.9 < compared["drift"]["lowest_cosine"] <= compared["drift"]["cosine"] < 1
    assert compared["size_bytes"] < found["size_bytes"]
    page = files["html"].read_text()
    assert "<int8>" not in page
    assert page.count("<svg") >= 8  # for each: waterfall, timeline, roofline, memory; then bars
    assert "images/s" in page
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = {row["metric"] for row in rows if row["engine"] == str(engine)}
    assert {"image", "encoder.clip", "throughput", "peak_rss", "engine_size"} <= metrics
    assert {row["engine"] for row in rows} == {str(engine), str(other)}
    text = files["markdown"].read_text()
    assert "cosine to the first" in text
    assert "&lt;int8>" in text
    # They may be replaced by the next ones.
    reports.check_files(0, reports.Files(files["html"], None, files["csv"], files["markdown"]))
    (tmp_path / "saved.json").write_text(json.dumps(found))
    assert called("inspect", tmp_path / "saved.json")["kind"] == "profile"
    with pytest.raises(OutputError, match="no such report of ours"):
        CliRunner().invoke(
            cli.app, ["profile", str(engine), "--html", str(files["csv"])], catch_exceptions=False
        )


def test_a_dry_run_states_the_time_of_an_image(engine: Path) -> None:
    """Of every card of the target, from its vendor's figures: nothing is measured."""
    there = "--target", "onnxruntime-cuda@1.31.1/sm_89"
    found = called("build", engine.parent / "bundle", engine.parent / "no", "--dry-run", *there)
    assert found["memory"]["cache_bytes"] == 0
    assert found["time"]
    for card in found["time"].values():
        assert card["peak_gflop_s"] > 0
        assert card["prompt_tokens"] == card["inter_token_latency_ms"] == 0
