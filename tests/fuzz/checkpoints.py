"""Checkpoints: configurations, tokenizers and weights, read as `export --dry-run` does."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from random import Random
from typing import Any

from edgevlm import api
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ToolkitError
from edgevlm.toolkit.terminal import summary
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.tokenizer import Tokenizer
from tests.fuzz.frame import Changed, Place, laid_out, refused
from tests.fuzz.mutations import changed_bytes, changed_json
from tests.refusals import GOLDEN, LM, TOWER

_WEIGHTS = f"{LM}/model.safetensors"
_INDEX = f"{LM}/model.safetensors.index.json"
_CONFIG, _TOKENS = f"{LM}/config.json", f"{LM}/tokenizer.json"
_JSON = (
    _CONFIG, f"{LM}/generation_config.json", f"{LM}/tokenizer_config.json", _TOKENS,
    f"{TOWER}/config.json", f"{TOWER}/preprocessor_config.json",
)  # fmt: skip


_SETTINGS = f"{LM}/tokenizer_config.json"
_CONVERSATIONS = (["Hello"], ["a" * 60 + "x" * 60 + "!", "Hi", "\u202e é 🙂"])
_TEMPLATES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('\x1b[2J' * 999) }}",
    "{% for",
)


class Checkpoints:
    """The tiny LLaVA-1.5 and its tower, with files that are changed; prompts are made with them."""

    name = "checkpoints"
    share = 2

    def __init__(self, place: Place) -> None:
        self._place = place
        self._base = GOLDEN
        self._json = {name: json.loads((GOLDEN / name).read_text()) for name in _JSON}
        self._weights = (GOLDEN / _WEIGHTS).read_bytes()

    def seeds(self) -> Mapping[str, Changed]:
        """The checkpoint as it is, with other files of its kind, and past findings."""
        config, tokens = self._json[_CONFIG], self._json[_TOKENS]
        names = sorted(_header(self._weights))
        found: dict[str, dict[str, bytes | None]] = {
            "whole": {},
            "tokenizer.json alone": {f"{LM}/tokenizer.model": None},
            "index": {_INDEX: _index(dict.fromkeys(names, "model.safetensors"))},
        }
        for number, odd in enumerate(({"type": "Unheard"}, 3, None, {"type": "BPE", "vocab": {}})):
            found[f"tokenizer model {number}"] = _tokenizer(tokens, model=odd)
        patterns = ("(a+)+$", "(a|a)*b", "(", "a{1,99999999}", "\\p{Nothing}")
        for pattern in patterns:
            cut = {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
            found[f"pattern {pattern}"] = _tokenizer(tokens, pre_tokenizer=cut)
        settings = self._json[_SETTINGS]
        for number, text in enumerate(_TEMPLATES):
            changed = json.dumps(settings | {"chat_template": text}).encode()
            found[f"template {number}"] = {_SETTINGS: changed}
        for name in ("../elsewhere/x.safetensors", "/dev/zero", "/etc/passwd", "..", "", "a\0b"):
            found[f"shard at {name!a}"] = {_INDEX: _index({names[0]: name}), _WEIGHTS: None}
        for key, value in (
            ("num_hidden_layers", 10**7), ("num_hidden_layers", 2**62), ("hidden_size", 10**400),
            ("mm_projector_type", "mlp9999999999x_gelu"), ("mm_projector_type", "mlp٣x_gelu"),
            ("vocab_size", 2**63), ("mm_vision_tower", "/dev/zero"), ("mm_vision_tower", "a\0b"),
            ("model_type", "\x1b[2J\x1b]0;title\x07"), ("model_type", "x" * 5000),
            ("hidden_act", "\ud800"),
        ):  # fmt: skip
            found[f"{key} {value!a:.40}"] = {_CONFIG: json.dumps(config | {key: value}).encode()}
        found["pointer"] = {_WEIGHTS: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}
        found["header of the end"] = {_WEIGHTS: struct.pack("<Q", 2**64 - 1) + self._weights[8:]}
        return {name: Changed(files) for name, files in found.items()}

    def mutate(self, rng: Random, seed: Changed) -> Changed:
        """One file more changed: its JSON, its bytes, or the header of the weights."""
        files = dict(seed.files)
        kind = rng.randrange(10)
        if kind < 6:
            name = rng.choice(_JSON)
            if name == _TOKENS:
                files[f"{LM}/tokenizer.model"] = None  # which counts before
            files[name] = changed_json(rng, self._json[name]).encode(errors="surrogatepass")
        elif kind == 6:
            name = rng.choice((*_JSON, f"{LM}/tokenizer.model"))
            files[name] = changed_bytes(rng, (GOLDEN / name).read_bytes())
        elif kind == 7:
            header = changed_json(rng, _header(self._weights)).encode()
            (length,) = struct.unpack("<Q", self._weights[:8])
            files[_WEIGHTS] = struct.pack("<Q", len(header)) + header + self._weights[8 + length :]
        else:
            files[_WEIGHTS] = changed_bytes(rng, self._weights)
        return Changed(files)

    def check(self, case: Changed) -> str:
        """The checkpoint is refused, or what would be exported is told, and it takes prompts."""
        with laid_out(self._base, case, self._place.work) as folder:
            try:
                source = systems.load(folder / LM, Options(offline=True))
                summary.planned_bundle(source, "fp32", self._place.work / "bundle")
                api.lint(source, "fp32", None)
                rules, rows = source.model.prompts, source.model.lm.config.vocab_size
                tokenizer = Tokenizer.from_text(source.tokenizer, rules.sentencepiece, rows)
                for turns in _CONVERSATIONS:
                    rendered = prompts.render(rules, turns, 1, "auto")
                    for ids in prompts.tokenize(rules, tokenizer, rendered).runs:
                        tokenizer.decode(ids)
            except ToolkitError as error:
                return refused(error)
        return "read"


def _header(weights: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", weights[:8])
    header: dict[str, Any] = json.loads(weights[8 : 8 + length])
    return header


def _index(shards: Mapping[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": dict(shards)}).encode()


def _tokenizer(tokens: dict[str, Any], **changes: Any) -> dict[str, bytes | None]:
    return {f"{LM}/tokenizer.model": None, _TOKENS: json.dumps(tokens | changes).encode()}
