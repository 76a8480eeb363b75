"""Rotary angles for every spelling of their settings, against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers as hf
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edgevlm.toolkit import models
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.lms.llama import rotary_tables
from edgevlm.toolkit.strict import Reader

LINEAR = {"rope_type": "linear", "factor": 2.0}
DEFAULT = {"rope_type": "default", "rope_theta": 7.0}
SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "null": {"rope_scaling": None, "rope_theta": 5e5},
    "empty": {"rope_scaling": {}},
    "empty, with a theta": {"rope_scaling": {}, "rope_theta": 5e5},
    "empty parameters": {"rope_parameters": {}, "rope_theta": 5e5},
    "both empty": {"rope_scaling": {}, "rope_parameters": {}},
    "empty beside parameters": {"rope_scaling": {}, "rope_parameters": DEFAULT},
    "beside empty parameters": {"rope_scaling": LINEAR, "rope_parameters": {}},
    "beside other parameters": {"rope_scaling": LINEAR, "rope_parameters": DEFAULT},
    "a theta alone": {"rope_scaling": {"rope_theta": 9.0}},
    "a type alone": {"rope_scaling": {"type": "default"}, "rope_theta": 5e5},
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_angles_are_those_of_transformers(kind: str, name: str) -> None:
    small = {
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 40,
    }
    stated = {**small, **SPELLINGS[name]}
    found = rotary_tables(models.lm(kind).Config.read(Reader(dict(stated), "config.json")))
    theirs: Any = hf.AutoConfig.for_model(kind, **stated)
    frequencies = LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    angles = np.arange(40)[:, None] * frequencies.astype(np.float64)
    for table, function in zip(found, (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(table[:, : angles.shape[1]], function(angles), atol=1e-5)


@pytest.mark.parametrize("value", [[], "", 0, False])
def test_what_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="rope_scaling"):
        models.lm("llama").Config.read(Reader({"rope_scaling": value}, "config.json"))
