"""Which conversation template a checkpoint was trained with, and what its files say about it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgevlm.toolkit.checkpoints import hub, partial
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import read_json
from edgevlm.toolkit.vlm import language_models

_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What a tokenizer's class takes for tokens that tokenizer_config.json does not name.
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_QWEN = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_OF_CLASS = {"LlamaTokenizer": _LLAMA, "CodeLlamaTokenizer": _LLAMA, "Qwen2Tokenizer": _QWEN}
# Words in names of folders and base models, as the originals' programs look for them and in their
# order. Those programs take "v1" for llava_v1; the models of that name were trained with
# vicuna_v1, which the originals' evaluation names, too.
_BY_NAME = (
    (r"llama-?3(?!\d)", "llava_llama_3"),
    (r"llama-2(?!\d)", "llava_llama_2"),
    (r"mistral", "mistral_instruct"),
    (r"v1\.6-34b", "chatml_direct"),
    (r"v1|vicuna", "vicuna_v1"),
    (r"v0$", "llava_v0"),
)


@dataclass(frozen=True)
class Conversation:
    """How a checkpoint's prompts are made.

    template: a name of templates.py. chat_template: Jinja text that has precedence over it.
    special_tokens: bos_token and the like, for the chat template. why: where this was found.
    """

    template: str
    why: str
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """One line for the manifest."""
        name = self.template if self.chat_template is None else "the checkpoint's chat template"
        return f"{name} ({self.why})"


def original(
    folder: Path,
    config: Mapping[str, Any],
    kind: str,
    tokenizer: str,
    stated: str | None = None,
    *,
    base: Path | None = None,
) -> Conversation:
    """The originals' template: by the tokenizer's tokens, then the language model, then by names.

    MistralOrca's name goes first: its ChatML has words of its own.

    kind: the language model's file; tokenizer: the text of a tokenizer.json; stated: a template
    that config.json names; base: the base model of a folder that holds a part.
    """
    if stated is not None:
        return Conversation(stated, "config.json names it")
    names = _names(folder, config, base)
    for where, name in names.items():
        if kind == "mistral" and "orca" in name.lower():
            return Conversation("mistral_orca", f"'orca' in {where}")
    tokens = _tokens(tokenizer)
    if {"<|begin_of_text|>", "<|eot_id|>"} <= tokens:
        return Conversation("llava_llama_3", "the tokenizer has <|eot_id|>")
    if "<|im_start|>" in tokens and kind in ("llama", "mistral"):
        name = "mistral_direct" if kind == "mistral" else "chatml_direct"
        return Conversation(name, f"a {kind} model whose tokenizer has <|im_start|>")
    row = language_models.row(kind)
    if kind != "llama":
        return Conversation(row.template, f"usual for {kind}")
    for where, name in names.items():
        for words, template in _BY_NAME:
            if word := re.search(words, name.lower()):
                return Conversation(template, f"{word[0]!r} in {where}")
    return Conversation(row.template, f"usual for {kind}; neither tokens nor names decide")


def _names(folder: Path, config: Mapping[str, Any], base: Path | None) -> dict[str, str]:
    """What a model is called, by where that stands; the originals' programs ask the first only."""
    found = {
        "the folder's name": hub.name_of(folder),
        "_name_or_path in config.json": config.get("_name_or_path"),
    }
    if base is not None:
        stated = _json(folder / partial.ADAPTER).get("base_model_name_or_path")
        found[f"base_model_name_or_path in {partial.ADAPTER}"] = stated
        found["the base's name"] = hub.name_of(base)
        found["_name_or_path of the base"] = _json(base / "config.json").get("_name_or_path")
    return {where: str(name or "") for where, name in found.items()}


def huggingface(
    folder: Path,
    config: Mapping[str, Any],
    kind: str,
    tokenizer: str,
    *,
    base: Path | None = None,
) -> Conversation:
    """The chat template of the checkpoint, or of its base; without one, as for the originals."""
    named = original(folder, config, kind, tokenizer, base=base)
    folder = base or folder
    found = _chat_template(folder)
    if found is None:
        return Conversation(named.template, f"no chat template in the folder; {named.why}")
    text, file = found
    return Conversation(named.template, file, text, _special_tokens(folder))


def _tokens(tokenizer: str) -> set[str]:
    """The added tokens and the vocabulary of a tokenizer.json."""
    data = json.loads(tokenizer)
    vocab = data.get("model", {}).get("vocab", {})
    names = vocab if isinstance(vocab, dict) else [entry[0] for entry in vocab]
    return {token["content"] for token in data.get("added_tokens", [])} | set(names)


def _chat_template(folder: Path) -> tuple[str, str] | None:
    """The chat template and the file that has it, in transformers' order of precedence."""
    for name in ("processor_config.json", "chat_template.json"):
        text = _text(_json(folder / name).get("chat_template"), folder / name)
        if text is not None:
            return text, name
    raw = folder / "chat_template.jinja"
    if raw.exists():
        return _read(raw), raw.name
    name = "tokenizer_config.json"
    text = _text(_json(folder / name).get("chat_template"), folder / name)
    return None if text is None else (text, name)


def _text(value: Any, file: Path) -> str | None:
    """A chat template: one text, or several by name, of which "default" is taken."""
    if isinstance(value, list) and all(
        isinstance(item, dict) and {"name", "template"} <= set(item) for item in value
    ):
        value = {str(item["name"]): item["template"] for item in value}
    if isinstance(value, dict):
        if "default" not in value:
            raise ConfigError(
                f"{file} has the chat templates {', '.join(map(str, value))} and none called "
                "'default'",
                hint="name the one to use 'default'",
            )
        value = value["default"]
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{file}: chat_template = {value!r:.80}, expected a text")
    return value


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and the like, as transformers gives them to a chat template."""
    config = _json(folder / "tokenizer_config.json")
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    older = {} if "added_tokens_decoder" in config else _json(folder / "special_tokens_map.json")
    known: dict[str, Any] = {**_OF_CLASS.get(kind, {}), **config, **older}
    names = [f"{name}_token" for name in _NAMED_TOKENS]
    found = {name: known[name] for name in names if known.get(name)}
    return {n: str(t["content"] if isinstance(t, dict) else t) for n, t in found.items()}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as odd:
        raise ConfigError(f"{path} cannot be read: {odd}") from None
