"""Scores of towers: as the originals compute them, by hand, and over folders of images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import api
from edgevlm.engines.evaluation import knn, labelled, probe, retrieval
from edgevlm.export.write import write_bundle
from edgevlm.toolkit.checkpoints.layouts.source import random_tower
from edgevlm.toolkit.errors import ConfigError, DataError, InputError
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.models.encoders import clip
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm.config import ComponentConfig
from edgevlm.toolkit.vlm.presets import clip_pixels
from edgevlm.toolkit.vlm.towers import TowerConfig


@pytest.mark.parametrize("golden", ["unicom_vit"], indirect=True)
def test_retrieval_is_scored_as_by_the_original(golden: Path) -> None:
    i, o = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    features, labels = i["retrieval.features"], i["retrieval.labels"]
    channels = int(i["retrieval.num_feat"])
    second = retrieval.nearest(features, features, 2)[:, 1]
    assert np.array_equal(second, o["retrieval.one_set_nearest"])
    gallery = [i[f"retrieval.{name}"] for name in
               ("query", "query_labels", "gallery", "gallery_labels")]  # fmt: skip
    for count, name in ((None, ""), (channels, "_num_feat")):
        one = retrieval.recall_in_one_set(features, labels, count)
        assert one == pytest.approx(float(o[f"retrieval.one_set{name}"]), abs=1e-9)
        two = retrieval.recall_in_gallery(gallery[0], gallery[1], gallery[2], gallery[3], count)
        assert two == pytest.approx(float(o[f"retrieval.query_gallery{name}"]), abs=1e-9)
    ids = [str(name) for name in i["landmarks.gallery_ids"]]
    right = [set(str(text).split()) for text in i["landmarks.solutions"]]
    found = retrieval.mean_average_precision(
        i["landmarks.query"], i["landmarks.gallery"], ids, right
    )
    assert found == pytest.approx(float(o["landmarks.map100"]), abs=1e-12)


@pytest.mark.parametrize("golden", ["unicom_vit"], indirect=True)
def test_neighbours_vote_as_in_the_original(golden: Path) -> None:
    i, o = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    ks = tuple(int(k) for k in i["knn.ks"])
    given = i["knn.train"], i["knn.train_labels"], i["knn.test"]
    votes = knn.votes(*given, ks, float(i["knn.temperature"]))
    top = knn.accuracies(votes, i["knn.test_labels"])
    for k in ks:
        np.testing.assert_allclose(votes[k], o[f"knn.scores_{k}"], atol=1e-5)
        assert top[k] == pytest.approx(float(o[f"knn.top1_{k}"]), abs=1e-9)


POINTS = np.asarray([[1, 0], [2, 0.2], [0, 1], [0.1, 3], [-1, 0.1]], np.float32)


def test_recall_by_hand() -> None:
    """The pictures lie in directions 0, 6, 90, 88 and 174 degrees."""
    assert retrieval.nearest(POINTS, POINTS, 2).tolist() == [[0, 1], [1, 0], [2, 3], [3, 2], [4, 2]]
    labels = np.asarray([0, 0, 1, 1, 0])
    assert retrieval.recall_in_one_set(POINTS, labels) == 80.0
    doubled = np.concatenate([POINTS, POINTS[:1]])  # of two equal ones either may come first
    near = retrieval.nearest(doubled, doubled, 2)
    assert {*near[0].tolist()} == {*near[5].tolist()} == {0, 5}
    queries = np.asarray([[3, 0.1], [0, 9]], np.float32)
    gallery = retrieval.recall_in_gallery(queries, np.asarray([0, 0]), POINTS, labels)
    assert gallery == 50.0
    with pytest.raises(InputError, match="1 embeddings have no 2 nearest"):
        retrieval.nearest(POINTS[:1], POINTS[:1], 2)


def test_average_precision_by_hand() -> None:
    """A repeated id is no hit, and takes a rank."""
    assert retrieval.average_precision(["a", "x", "b"], {"a", "b"}) == (1 + 2 / 3) / 2
    assert retrieval.average_precision(["a", "a", "b"], {"a", "b"}) == (1 + 2 / 3) / 2
    assert retrieval.average_precision(["x", "y"], {"a"}) == 0
    many = {str(n) for n in range(300)}
    assert retrieval.average_precision([str(n) for n in range(300)], many) == 1
    lengths_count = retrieval.ranked(np.asarray([[1, 0]], np.float32), POINTS, 2)
    assert lengths_count.tolist() == [[1, 0]]  # 2 > 1: not divided by their length


def test_votes_are_shares_of_the_largest_k() -> None:
    train = np.asarray([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    found = knn.votes(train, np.asarray([0, 1, 1]), np.asarray([[2, 0]], np.float32), (1, 3), 1.0)
    weights = np.exp([1, 0.8, 0]) / np.exp([1, 0.8, 0]).sum()
    np.testing.assert_allclose(found[1], [[weights[0], 0]], atol=1e-6)
    np.testing.assert_allclose(found[3], [[weights[0], weights[1:].sum()]], atol=1e-6)
    with pytest.raises(InputError, match="3 training images have no 4 nearest"):
        knn.votes(train, np.asarray([0, 1, 1]), train, (4,))


def separable(generator: np.random.Generator, count: int) -> tuple[Array, Array]:
    labels = np.arange(count) % 3
    centres = np.eye(3, 8, dtype=np.float32) * 4
    return centres[labels] + generator.standard_normal((count, 8)).astype(np.float32), labels


def test_a_probe_is_scikit_learn_s(generator: np.random.Generator) -> None:
    from sklearn.linear_model import LogisticRegression

    train, test = separable(generator, 60), separable(generator, 30)
    expected = LogisticRegression(C=0.601, max_iter=1000, random_state=0).fit(*train).score(*test)
    assert probe.accuracy(*train, *test) == pytest.approx(expected)
    assert expected > 0.9


COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220))


def coloured(folder: Path, each: int, generator: np.random.Generator) -> None:
    """Noisy pictures, a folder for each colour."""
    for number, colour in enumerate(COLOURS):
        home = folder / f"colour-{number}"
        home.mkdir(parents=True)
        for i in range(each):
            pixels = generator.normal(colour, 12, (30, 34, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(home / f"{i}.png")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, whose random embeddings tell colours apart."""
    work = tmp_path_factory.mktemp("tower")
    images = ImageRules({"clip": clip_pixels(28)})
    config = ComponentConfig("clip", "clip", clip.tiny())
    source = random_tower(TowerConfig("tiny", "clip", config, "class", images), 0, "tiny")
    write_bundle(source, work / "bundle", made_by="tests", progress=lambda line: None)
    api.build_engine(work / "bundle", work / "engine")
    return work / "engine"


def asked(engine: Path, data: Path, **more: Any) -> Any:
    """A request as the tasks read it."""
    plain = {"threads": 1, "limit": None, "progress": lambda line: None}
    return SimpleNamespace(engine=engine, data=data, **{**plain, **more})


def test_tasks_read_a_folder_for_each_class(
    engine: Path, tmp_path: Path, generator: np.random.Generator
) -> None:
    for name in ("query", "gallery", "train", "test"):
        coloured(tmp_path / name, 4, generator)
    (tmp_path / "query/colour-0/9.png").write_bytes(b"none")
    one = retrieval.run(asked(engine, tmp_path / "train"))
    assert one.values == {"recall_at_1": 100.0, "images": 12, "classes": 3}
    two = retrieval.run(asked(engine, tmp_path, channels=20))
    assert two.values["recall_at_1"] == 100.0
    assert two.values["map_at_100"] > 0.3
    assert two.settings == {"channels": 20}
    assert len(two.failed) == 1
    assert "is not an image" in two.failed[0]
    voted = knn.run(asked(engine, tmp_path))
    assert voted.values["top1_k10"] == 1.0
    assert voted.settings == {"k": [10], "temperature": 0.07}
    assert probe.run(asked(engine, tmp_path)).values["top1"] == 1.0
    assert retrieval.run(asked(engine, tmp_path / "train", limit=5)).values["images"] == 5
    with pytest.raises(ConfigError, match="--channels 33 is not from 1 to 32"):
        retrieval.run(asked(engine, tmp_path, channels=33))


def test_folders_that_are_no_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks test and train") as both:
        labelled.sets_in(tmp_path, ("train", "test"), both=True)
    assert "a folder for each class" in both.value.hint
    (tmp_path / "query").mkdir()
    with pytest.raises(DataError, match="lacks gallery"):
        labelled.sets_in(tmp_path, ("query", "gallery"))
    with pytest.raises(DataError, match="holds no folders"):
        labelled.sets_in(tmp_path / "query", ("a", "b"))
    (tmp_path / "query/cat").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        labelled.sets_in(tmp_path / "query", ("a", "b"))
