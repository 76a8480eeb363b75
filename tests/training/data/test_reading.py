"""Data sets of every kind give the same raw samples, at any index, and name what they lack."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from edgevlm.toolkit.errors import DataError, MissingExtra
from edgevlm.training.data import json_samples, tar_samples
from edgevlm.training.data.broken import BROKEN_JSON, DAMAGED_SHARD, STRUCTURE, BrokenSample
from edgevlm.training.data.json_samples import JsonSamples
from edgevlm.training.data.samples import RawSample, Samples
from edgevlm.training.data.sources import open_samples
from edgevlm.training.data.tar_samples import Entry, TarSamples
from tests.training.data.files import item, png, write_images, write_lines, write_shards, write_tar


def mapped(path: Path, images: Path | None = None) -> Samples:
    found = open_samples(path, images, path.parent / "cache")
    assert not isinstance(found, TarSamples)
    return found


def turns_of(number: int) -> tuple[tuple[str, str], ...]:
    answer = " ".join(["word"] * number) or "none"
    return (("user", "<image>\nWhat is it?"), ("assistant", answer))


# -- JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_a_json_list_is_read_at_any_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, chunk: int
) -> None:
    monkeypatch.setattr(json_samples, "_CHUNK_BYTES", chunk)
    items = [item(n) for n in range(5)]
    items[2]["conversations"][1]["value"] = 'Größe ] , "\\ \u2028 [{ \U0001f600'
    text = json.dumps(items, indent=indent, ensure_ascii=False)
    (tmp_path / "train.json").write_text(f"\ufeff {text}\n \n", encoding="utf-8")
    found = mapped(tmp_path / "train.json")
    assert len(found) == 5
    assert found[4] == RawSample("train.json[4] id n4", (tmp_path / "4.png",), turns_of(4))
    assert found[2].turns[1] == ("assistant", items[2]["conversations"][1]["value"])


def test_lines_are_read_at_any_index_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [item(1), "", "{broken", item(2), "[1]"])
    found = mapped(path, tmp_path / "images")
    assert len(found) == 4
    assert found[2] == RawSample("a.jsonl[2] id n2", (tmp_path / "images/2.png",), turns_of(2))
    for index, kind in ((1, BROKEN_JSON), (3, STRUCTURE)):
        with pytest.raises(BrokenSample, match=rf"a.jsonl\[{index}\]") as caught:
            found[index]
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('[{"a": 1}, {"a": ]', "byte 17"),
        ('[{"a": 1} {"a": 2}]', "expected a comma"),
        ('[{"a": 1}', "expected a comma or the end"),
        ('[{"a": 1}] x', "something after"),
        ('"text"', "neither a JSON list nor lines"),
        ("", "neither"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_list_that_breaks_off_is_refused_with_its_place(
    tmp_path: Path, text: str, match: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=match):
        mapped(tmp_path / "a.json")


def test_an_empty_list_has_no_samples(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" [ ] ")
    assert len(mapped(tmp_path / "a.json")) == 0


def test_conversations_of_chat_models_and_of_the_cauldron(tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "Q"}]
    items = [
        {"images": ["a.png"], "messages": [{"role": "user", "content": parts},
                                           {"role": "assistant", "content": "A"}]},
        {"images": ["a.png", "b.png"], "texts": [{"user": "Q", "assistant": "A", "source": "x"},
                                                 {"user": "R", "assistant": "B"}]},
        {"conversations": [{"role": "system", "content": None}, {"from": "human", "value": "Q"}]},
        {"image": "", "conversations": []},
    ]  # fmt: skip
    found = mapped(write_lines(tmp_path / "a.jsonl", items))
    first, second, third, fourth = (found[index] for index in range(4))
    assert first.turns == (("user", "<image>\nQ"), ("assistant", "A"))
    assert second.turns[0] == ("user", "<image>\n<image>\nQ")
    assert [role for role, _ in second.turns] == ["user", "assistant"] * 2
    assert len(second.images) == 2
    assert third.turns == (("system", ""), ("user", "Q"))
    assert fourth.images == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"conversations": "text"},
        {"conversations": [{"value": "no role"}]},
        {"conversations": ["text"]},
        {"conversations": [{"from": "human", "value": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        {"image": 3, "conversations": []},
        {"image": "a.png"},
        {"video": "a.mp4", "conversations": []},
    ],
)
def test_another_structure_is_a_broken_sample(tmp_path: Path, wrong: dict[str, Any]) -> None:
    found = mapped(write_lines(tmp_path / "a.jsonl", [wrong]))
    with pytest.raises(BrokenSample) as caught:
        found[0]
    assert caught.value.kind == STRUCTURE


# -- Hugging Face datasets -------------------------------------------------------------------------


def hub_set(folder: Path) -> datasets.Dataset:
    rows = [{k: v for k, v in item(n).items() if k != "image"} for n in range(3)]
    pictures = [{"bytes": png(n), "path": None} for n in range(3)]
    data = datasets.Dataset.from_list(rows).add_column("images", [[p] for p in pictures])
    return data.cast_column("images", datasets.List(datasets.Image()))


def test_saved_data_sets_and_parquet_give_bytes(tmp_path: Path) -> None:
    data = hub_set(tmp_path)
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(
        str(tmp_path / "splits")
    )
    (tmp_path / "parquet").mkdir()
    data.to_parquet(str(tmp_path / "parquet/train-0.parquet"))
    for name in ("saved", "splits", "parquet", "parquet/train-0.parquet"):
        found = mapped(tmp_path / name)
        assert len(found) == 3
        raw = found[2]
        assert raw.images == (png(2),)
        assert raw.turns == turns_of(2)
        assert raw.name == f"{Path(name).name}[2] id n2"


def test_a_column_of_paths_and_a_single_image(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([item(1), item(2)])
    data.save_to_disk(str(tmp_path / "saved"))
    assert mapped(tmp_path / "saved", tmp_path)[1].images == (tmp_path / "2.png",)
    (tmp_path / "2.png").write_bytes(png(2))
    single = data.select([1]).map(lambda row: {"image": str(tmp_path / "2.png")})
    single.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "single"))
    assert mapped(tmp_path / "single")[0].images[0] in (tmp_path / "2.png", png(2))


def test_unclear_and_broken_folders_are_refused(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([item(1)])
    splits = datasets.DatasetDict({"one": data, "two": data})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="splits one, two"):
        open_samples(tmp_path / "splits")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a data set"):
        open_samples(tmp_path / "broken")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="as parquet"):
        open_samples(tmp_path / "a.parquet", cache=tmp_path / "cache")


def test_without_the_library_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_text("{}")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match="datasets") as caught:
        open_samples(tmp_path)
    assert "pip install" in caught.value.hint


# -- shards ----------------------------------------------------------------------------------------


def entries_of(paths: list[Path]) -> list[Entry | BrokenSample]:
    return list(TarSamples(paths).stream(None))


def read_all(paths: list[Path]) -> list[RawSample]:
    found = entries_of(paths)
    assert all(isinstance(entry, Entry) for entry in found)
    return [tar_samples.read(entry) for entry in found if isinstance(entry, Entry)]


def test_shards_of_conversations_captions_and_several_images(tmp_path: Path) -> None:
    talk = json.dumps({"id": 1, "image": "x.jpg", "conversations": item(1)["conversations"]})
    pair = json.dumps(item(2)["conversations"])
    path = write_tar(tmp_path / "a.tar", {
        "dir/1.png": png(1), "dir/1.json": talk,
        "dir/2.0.png": png(2), "dir/2.1.png": png(3), "dir/2.json": pair,
        "3.PNG": png(4), "3.txt": " a caption\n", "3.json": '{"width": 40}',
        "4.json": json.dumps(item(5, text=True)),
    })  # fmt: skip
    one, two, three, four = read_all([path])
    assert one == RawSample("a.tar:dir/1", (png(1),), turns_of(1))
    assert two.images == (png(2), png(3))
    assert three.turns == (("user", "<image>"), ("assistant", "a caption"))
    assert four.images == ()


def test_names_with_braces_and_folders_are_the_same_shards(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "set", 3, 2)
    assert tar_samples.shards(tmp_path / "set") == paths
    assert tar_samples.shards(tmp_path / "set/part-{000..002}.tar") == paths
    opened = open_samples(tmp_path / "set/part-{001..002}.tar")
    assert isinstance(opened, TarSamples)
    assert opened.count() == 4
    assert isinstance(open_samples(tmp_path / "set"), TarSamples)
    with pytest.raises(DataError, match="part-003.tar does not exist"):
        open_samples(tmp_path / "set/part-{000..003}.tar")


@pytest.mark.parametrize("damage", ["cut", "header", "compressed"])
def test_a_damaged_shard_is_named_and_the_others_are_read(tmp_path: Path, damage: str) -> None:
    first, second = write_shards(tmp_path / "set", 2, 3)
    content = first.read_bytes()
    at = content.index(b"0001.png")
    changed = {"cut": content[: at + 700], "compressed": b"\x1f\x8b" + content[2:],
               "header": content[:at] + b"?" * 512 + content[at + 512 :]}  # fmt: skip
    first.write_bytes(changed[damage])
    found = entries_of([first, second])
    faults = [entry for entry in found if isinstance(entry, BrokenSample)]
    assert [fault.kind for fault in faults] == [DAMAGED_SHARD]
    assert faults[0].name == "part-000.tar"
    good = [entry.name for entry in found if isinstance(entry, Entry)]
    assert good[-3:] == [f"part-001.tar:{n:04}" for n in (3, 4, 5)]
    # What a damaged header ends may lack a file, so it is not used.
    assert len(good) == 3 + (damage == "cut")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"1.png": b"x", "1.json": "{"}, BROKEN_JSON),
        ({"1.png": b"x", "1.json": "3"}, STRUCTURE),
        ({"1.png": b"x"}, STRUCTURE),
        ({"1.txt": "caption"}, STRUCTURE),
    ],
)
def test_bad_samples_in_shards_are_named(
    tmp_path: Path, files: dict[str, bytes | str], kind: str
) -> None:
    (entry,) = entries_of([write_tar(tmp_path / "a.tar", files)])
    assert isinstance(entry, Entry)
    with pytest.raises(BrokenSample, match="a.tar:1") as caught:
        tar_samples.read(entry)
    assert caught.value.kind == kind


# -- paths -----------------------------------------------------------------------------------------


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for path, match in (
        (tmp_path / "nothing.json", "does not exist"),
        (tmp_path / "a.csv", "no data set that is read"),
        (tmp_path, "holds no data set"),
    ):
        with pytest.raises(DataError, match=match):
            open_samples(path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match=r"several JSON files \(a.json, b.json\)"):
        open_samples(tmp_path)


def test_a_folder_with_one_json_file_is_that_file(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    write_lines(tmp_path / "a.jsonl", [item(1)])
    found = open_samples(tmp_path)
    assert isinstance(found, JsonSamples)
    assert found[0].images == (tmp_path / "1.png",)
