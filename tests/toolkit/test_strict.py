"""Configurations to JSON and back, and everything that is refused on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from edgevlm.toolkit import inert_keys, models
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.strict import (
    MOST_JSON_BYTES,
    MOST_NESTED,
    Reader,
    from_plain,
    read_json,
    to_plain,
)
from edgevlm.toolkit.systems import find, presets
from edgevlm.toolkit.vlm.config import from_json, to_json

ARCHITECTURES = [
    *(("encoder", kind) for kind in models.kinds("encoders")),
    *(("merger", kind) for kind in models.kinds("mergers")),
    *(("lm", kind) for kind in models.kinds("lms")),
]


@pytest.mark.parametrize("name", presets())
def test_every_preset_survives_json(name: str) -> None:
    model = find(presets()[name]).PRESETS[name]()
    text = json.dumps(to_json(model))
    assert from_json(json.loads(text), "manifest") == model


@pytest.mark.parametrize(("room", "kind"), ARCHITECTURES)
def test_every_architecture_survives_json(room: str, kind: str) -> None:
    found: Any = getattr(models, room)(kind)
    tiny = found.tiny()
    config = tiny.config if hasattr(tiny, "config") else tiny
    assert is_dataclass(config)
    plain = json.loads(json.dumps(to_plain(config)))
    assert from_plain(found.Config, plain, kind) == config
    with pytest.raises(ConfigError, match="surprise"):
        from_plain(found.Config, plain | {"surprise": 1}, kind)


def test_a_plan_survives_json() -> None:
    plan = PrecisionPlan("int8", (Rule("lm/*", "float"),), {"a/b": 1.5}, "minmax", 3)
    assert from_plain(PrecisionPlan, json.loads(json.dumps(to_plain(plan))), "plan") == plan


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    count: int
    share: float
    flag: bool
    kind: Literal["a", "b", 1]
    inner: Inner | None = None
    axis: int | str = 0
    table: Mapping[str, Inner] = field(default_factory=dict)
    rest: Any = None


GOOD: dict[str, Any] = {"count": 1, "share": 0.5, "flag": True, "kind": "a"}


def test_what_is_left_out_has_its_default() -> None:
    assert from_plain(Outer, GOOD, "x") == Outer(1, 0.5, True, "a")


def test_nested_values_become_what_they_were() -> None:
    value = Outer(1, 2.0, False, "b", Inner((1, 2), ("n",)), "tokens", {"t": Inner((3, 4))}, [1])
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value))), "x") == value


def test_an_int_is_accepted_as_a_float_only() -> None:
    found = from_plain(Outer, GOOD | {"share": 2}, "x")
    assert (found.share, type(found.share)) == (2.0, float)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": True}, r"x\.count = True, expected int"),
        ({"count": 1.0}, r"x\.count"),
        ({"count": "1"}, r"x\.count"),
        ({"count": None}, r"x\.count"),
        ({"share": True}, r"x\.share"),
        ({"share": "0.5"}, r"x\.share"),
        ({"flag": 1}, r"x\.flag"),
        ({"kind": "c"}, r"x\.kind"),
        ({"kind": True}, r"x\.kind"),
        ({"axis": True}, r"x\.axis"),
        ({"axis": 1.5}, r"x\.axis"),
        ({"inner": {"size": [1]}}, r"x\.inner\.size .* 2 values"),
        ({"inner": {"size": [1, "2"]}}, r"x\.inner\.size\[1\]"),
        ({"inner": {"size": [1, 2], "names": "ab"}}, r"x\.inner\.names"),
        ({"inner": {}}, r"x\.inner lacks: size"),
        ({"inner": [1]}, r"x\.inner"),
        ({"table": {"t": 1}}, r"x\.table\.t"),
        ({"table": []}, r"x\.table"),
        ({"extra": 1, "more": 2}, "x has unknown keys: extra, more"),
        ({"count": 10**400}, r"x\.count = 10+, expected a number of at most 64 bits"),
        ({"count": 1 << 63}, r"x\.count"),
        ({"share": 10**400}, r"x\.share = 10+\.\.\., which is too large"),
        ({"share": float("nan")}, r"x\.share = nan, expected a finite number"),
        ({"share": float("-inf")}, r"x\.share"),
        ({"inner": {"size": [1, 2], "names": ["a"] * 300_000}}, "has 300000 values"),
    ],
)
def test_odd_values_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_plain(Outer, GOOD | change, "x")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="x lacks: flag, kind, share"):
        from_plain(Outer, {"count": 1}, "x")


# -- published configurations --------------------------------------------------------------


def test_a_reader_refuses_keys_that_were_not_read() -> None:
    r = Reader({"a": 1, "b": 2, "c": 3, "d": 4, "model_type": "x"}, "config.json", ["d"])
    assert r.take("a", int) == 1
    r.skip("b")
    with pytest.raises(ConfigError, match="config.json has unknown keys: c") as refused:
        r.done()
    assert "--ignore-key c" in refused.value.hint
    assert r.raw("c") == 3
    r.done()


def test_types_are_exact() -> None:
    r = Reader({"yes": True, "one": 1, "half": 0.5, "text": "t", "none": None}, "c")
    assert r.take("one", float) == 1.0
    assert type(r.take("one", float)) is float
    assert r.take("yes", bool) is True
    assert (r.take("none", int, 7), r.take("gone", int, 8)) == (7, 8)
    assert (r.optional("none", int), r.optional("one", int)) == (None, 1)
    assert (r.has("none"), r.given("none"), r.given("gone")) == (False, True, False)
    for key, kind in (("yes", int), ("yes", float), ("half", int), ("text", int), ("one", str)):
        with pytest.raises(ConfigError, match=rf"c: {key} = .*expected {kind.__name__}"):
            r.take(key, kind)
    with pytest.raises(ConfigError, match=r"c: huge = 10+\.\.\., which is too large"):
        Reader({"huge": 10**400}, "c").take("huge", float)
    for key, reason in (("none", "c: none is null"), ("gone", "c lacks the key 'gone'")):
        with pytest.raises(ConfigError, match=reason):
            r.take(key, int)


def test_a_null_size_is_not_a_missing_one() -> None:
    r = Reader({"none": None}, "c")
    assert (r.count("gone", 3), r.positive("gone", 0.5), r.choice("gone", [1], 1)) == (3, 0.5, 1)
    assert (r.count("none", 3, nullable=True), r.choice("none", [1], 1)) == (3, 1)
    for read in (
        lambda: r.count("none", 3),
        lambda: r.positive("none", 0.5),
        lambda: r.choice("none", [1], 1, nullable=False),
    ):
        with pytest.raises(ConfigError, match="c: none is null"):
            read()


def test_a_key_that_changes_numbers_is_never_advised_to_be_ignored() -> None:
    for off in (None, False, 1.0):
        Reader({"embedding_multiplier": off, "quantization_config": None}, "c").done()
    r = Reader({"embedding_multiplier": 12, "other": 1}, "c")
    with pytest.raises(ConfigError, match="embedding_multiplier = 12 changes") as refused:
        r.done()
    assert "--ignore-key" not in refused.value.hint


def test_the_groups_of_inert_keys_do_not_overlap_with_decisive_ones() -> None:
    for name in inert_keys.CLASSES:
        if name not in ("original", "text") and not name.startswith("llava"):
            assert not inert_keys.inert(name) & inert_keys.DECISIVE.keys() - {"sliding_window"}
    assert all(group.reason and group.keys for group in inert_keys.GROUPS.values())
    assert set().union(*inert_keys.CLASSES.values()) | {"bookkeeping", "generation", "dropout"} == (
        set(inert_keys.GROUPS)
    )


def test_choices_are_exact_too() -> None:
    r = Reader({"yes": True, "one": 1, "two": "two", "whole": 1.0}, "c")
    assert r.choice("yes", [True]) is True
    assert r.choice("one", [1, 2]) == 1
    assert r.choice("gone", ["a"], "a") == "a"
    for key, allowed in (("yes", [1]), ("one", [True, False]), ("two", ["one"]), ("gone", ["a"])):
        with pytest.raises(ConfigError, match=f"c.*{key}"):
            r.choice(key, allowed)


def test_objects_within_are_read_alike() -> None:
    r = Reader({"sub": {"a": 1, "b": 2}}, "c", ["b"]).sub("sub")
    assert r.where == "c: sub"
    with pytest.raises(ConfigError, match="c: sub has unknown keys: a"):
        r.done()
    r.take("a", int)
    r.done()


def test_files_that_are_no_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for data, reason in ((b"[1]", "list"), (b"{", "not valid JSON"), (b'{"a": "\xff"}', "valid")):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=reason):
            read_json(path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_json(tmp_path / "missing.json")


def test_what_is_no_file_of_a_description_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="no regular file"):
            read_json(path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(ConfigError, match="expected at most"):
        read_json(tmp_path / "large")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_bounded(opening: str, closing: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    for depth, fits in (
        (MOST_NESTED - 2, True),
        (MOST_NESTED, False),
        (900, False),
        (10**6, False),
    ):
        path.write_text(f'{{"x": {opening * depth}1{closing * depth}}}')
        if fits:
            assert json.dumps(read_json(path))
            continue
        with pytest.raises(ConfigError, match="not valid JSON"):
            read_json(path)


def test_what_we_wrote_has_every_key_once_and_numbers_only(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for text, reason in (('{"a": 1, "a": 2}', "'a' occurs twice"), ('{"a": NaN}', "NaN is no")):
        path.write_text(text)
        assert read_json(path)  # as others read it
        with pytest.raises(ConfigError, match=reason):
            read_json(path, ours=True)


def test_a_model_beyond_all_models_is_refused_before_it_is_listed() -> None:
    plain = to_json(find(presets()["llava-1.5-7b"]).PRESETS["llava-1.5-7b"]())
    for component, key, value in (
        ("lm", "num_layers", 10**7), ("lm", "vocab_size", 10**12), ("merger", "layers", 10**7),
        ("lm", "context", 1 << 62),
    ):  # fmt: skip
        changed = json.loads(json.dumps(plain))
        changed[component]["config"][key] = value
        with pytest.raises(ConfigError, match=rf"{key} = {value}, expected at most"):
            from_json(changed, "m")
    with pytest.raises(ConfigError, match="3000 encoders"):
        from_json({**plain, "encoders": plain["encoders"] * 3000}, "m")
    changed = json.loads(json.dumps(plain))
    changed["encoders"][0]["config"]["taps"] = [10**9]
    with pytest.raises(ConfigError, match="taps = 1000000000"):
        from_json(changed, "m")
