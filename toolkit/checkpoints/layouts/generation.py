"""generation_config.json, and where no such file is, the same settings of config.json.

Every key is applied, shown, known to change no token, or refused by name. Source: transformers'
GenerationConfig and the processors that `generate` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import Reader, read_json
from edgevlm.toolkit.vlm import language_models
from edgevlm.toolkit.vlm.generation import GenerationRules

FILE = "generation_config.json"

# Keys that change no token of one greedy or sampled answer: ids that frame a text, caches, what
# `generate` returns, and settings of beams and of drafting models, which change no single answer.
_WITHOUT_EFFECT = """
    _from_model_config _commit_hash transformers_version pad_token_id bos_token_id
    decoder_start_token_id use_cache cache_implementation cache_config max_cache_len
    return_legacy_cache output_attentions output_hidden_states output_scores output_logits
    return_dict_in_generate early_stopping length_penalty renormalize_logits low_memory
    is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size compile_config
    disable_compile prefill_chunk_size continuous_batching_config speculation_type use_mtp
""".split()
# Keys that change tokens, with the values under which they do not; null is one of them.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "watermarking_config": (),
    "dola_layers": (),
    "max_time": (),
}
# Settings for drawing tokens, and the values that leave the distribution as it is.
_SAMPLING: Mapping[str, tuple[float, ...]] = {
    "temperature": (1.0,),
    "top_k": (50, 0),  # 50 is the default that older versions write into every file
    "top_p": (1.0,),
    "min_p": (),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
_OWN = """
    repetition_penalty no_repeat_ngram_size bad_words_ids min_length min_new_tokens
    suppress_tokens begin_suppress_tokens stop_strings do_sample max_length max_new_tokens
""".split()
_OLD_MAX_LENGTH = 20  # older versions write this default into every config.json


def read_rules(
    folder: Path,
    config: Mapping[str, Any],
    vocab: int,
    ignore: tuple[str, ...] = (),
    text: Mapping[str, Any] | None = None,
) -> GenerationRules:
    """The rules of a checkpoint folder, over `vocab` ids.

    As in transformers, config.json counts only without generation_config.json; there, what
    `config` does not set may be set by `text`, its text_config. Raises ConfigError naming a key
    that is unknown, has an odd value or is not implemented.
    """
    path = folder / FILE
    if path.exists():
        stated = read_json(path)
        known = {key: value for key, value in stated.items() if not _unset(key, value)}
        r = Reader(known, str(path), ignore)
        r.skip("eos_token_id", *_WITHOUT_EFFECT)
    else:
        r = Reader(_legacy(config, text or {}), str(folder / "config.json"))
    for key, allowed in _NEUTRAL.items():
        _refuse(r, key, allowed)
    rules = GenerationRules(
        repetition_penalty=r.positive("repetition_penalty", 1.0),
        no_repeat_ngram_size=r.count("no_repeat_ngram_size", 0, least=0),
        bad_words_ids=_words(r, vocab),
        min_length=r.count("min_length", 0, least=0),
        min_new_tokens=r.count("min_new_tokens", least=0) if r.has("min_new_tokens") else None,
        suppress_tokens=_ids(r, "suppress_tokens"),
        begin_suppress_tokens=_ids(r, "begin_suppress_tokens"),
        stop_strings=_stops(r),
        do_sample=r.take("do_sample", bool, False),
        sampling=_sampling(r),
        max_length=r.count("max_length") if r.has("max_length") else None,
        max_new_tokens=r.count("max_new_tokens") if r.has("max_new_tokens") else None,
    )
    r.done()
    return rules


def _unset(key: str, value: Any) -> bool:
    """Whether a key stands for its default: transformers writes null for what is not set."""
    return value is None and key in _OWN


def _legacy(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that config.json has among its own keys."""
    known = [*_OWN, *_NEUTRAL, *_SAMPLING]
    found = {key: text.get(key) if config.get(key) is None else config[key] for key in known}
    if found["max_length"] == _OLD_MAX_LENGTH:
        found["max_length"] = None
    return {key: value for key, value in found.items() if value is not None}


def _refuse(r: Reader, key: str, allowed: tuple[Any, ...]) -> None:
    value = r.raw(key)
    if value is not None and not any(value == one for one in allowed):
        raise ConfigError(
            f"{r.where}: {key} = {value!r:.80} is not implemented",
            hint=f"it changes which tokens are chosen; a copy of the file without {key} is read, "
            "and its answers differ from those of transformers",
        )


def _ids(r: Reader, key: str) -> tuple[int, ...]:
    ids = r.take(key, list, [])
    if not all(type(number) is int for number in ids):
        raise ConfigError(f"{r.where}: {key} = {ids!r:.80}, expected a list of ids")
    return tuple(number for number in ids if number >= 0)  # -1 stands for none in some files


def _words(r: Reader, vocab: int) -> tuple[tuple[int, ...], ...]:
    words = r.take("bad_words_ids", list, [])
    for word in words:
        valid = isinstance(word, list) and word
        if not valid or not all(type(number) is int and 0 <= number < vocab for number in word):
            raise ConfigError(
                f"{r.where}: bad_words_ids has {word!r:.80}, expected lists of ids from 0 to "
                f"{vocab - 1}"
            )
    return tuple(tuple(word) for word in words)


def _stops(r: Reader) -> tuple[str, ...]:
    raw = r.raw("stop_strings")
    texts = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"{r.where}: stop_strings = {raw!r:.80}, expected a list of texts")
    return tuple(texts)


def _sampling(r: Reader) -> dict[str, float]:
    """The settings for drawing tokens that change the distribution."""
    found = {}
    for key, neutral in _SAMPLING.items():
        if not r.has(key):
            r.skip(key)
            continue
        value = r.take(key, float)
        if value not in neutral:
            found[key] = value
    return found


def read_eos(
    folder: Path,
    config: Mapping[str, Any],
    kind: str,
    tokenizer: str,
    text: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Ids that end an answer, from the first that names any: generation_config.json, config.json,
    `text` (its text_config), the default of the class of language model `kind`, and eos_token of
    tokenizer_config.json, an id of `tokenizer`, the text of a tokenizer.json.

    An empty tuple if none does; a list stays a list.
    """
    path, own = folder / FILE, folder / "config.json"
    generation = read_json(path) if path.exists() else {}
    for where, data in ((path, generation), (own, config), (own, text or {})):
        if data.get("eos_token_id") is not None:
            return _checked_eos(where, data["eos_token_id"])
    innermost = config if text is None else text
    default = language_models.row(kind).default_eos
    if default is not None and "eos_token_id" not in innermost:
        return (default,)
    return _tokenizer_eos(folder, tokenizer)


def _checked_eos(where: Path, stated: Any) -> tuple[int, ...]:
    ids = stated if isinstance(stated, list) else [stated]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise ConfigError(f"{where}: eos_token_id = {stated!r}, expected an id or a list of ids")
    return tuple(ids)


def _tokenizer_eos(folder: Path, tokenizer: str) -> tuple[int, ...]:
    import tokenizers

    settings = folder / "tokenizer_config.json"
    token = read_json(settings).get("eos_token") if settings.exists() else None
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        return ()
    number = tokenizers.Tokenizer.from_str(tokenizer).token_to_id(token)
    return () if number is None else (number,)
