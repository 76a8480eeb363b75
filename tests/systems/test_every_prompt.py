"""Every prompt that can be asked for is its witness's: text and ids, one and two turns, images.

The originals' templates: goldens/conversations.json has what their conversation classes and their
tokenizer_image_token gave. Hugging Face's layouts: the processor class of the installed
transformers, with the chat template of a published checkpoint of that layout and language model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.layouts.tokenizer_files import read_tokenizer
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.text import prompts, templates
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.text.sentencepiece_text import SentencePieceRules
from edgevlm.toolkit.text.tokenizer import Tokenizer
from tests.conftest import HERE
from tests.systems import joined
from tests.systems.chat_templates import CHAT
from tests.systems.test_chat_templates import TOKENIZERS, messages, picture
from tests.systems.test_huggingface import CLIP, LLAMA, clip_processor
from tests.systems.test_huggingface_next import PINPOINTS, processor

# A published template writes '<\\s>', which transformers reads with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
hf: Any = joined.hf

GOLDEN = json.loads((HERE / "goldens/conversations.json").read_text())
TURNS: list[list[str]] = GOLDEN["turns"]
FOLDERS = {
    "llama": HERE / "goldens/e2e_llava15/llava-v1.5-tiny",
    "qwen2": HERE / "goldens/mlcd_llavanext_e2e",
}
OWN = {"mlcd_chat"}  # a script of token lists, not a conversation class: test_mlcd_golden.py


def cases() -> Iterator[tuple[str, list[str | None], dict[str, list[list[int] | None]]]]:
    """Each name with its prompts (one turn, with an image, two turns, with an image) and ids."""
    for entry in GOLDEN["conversations"]:
        for name in entry["names"]:
            yield name, entry["prompts"], entry["ids"]


CASES = {name: (texts, ids) for name, texts, ids in cases()}
RENDERED = [name for name in CASES if name not in templates.ELSEWHERE]


def test_every_name_of_the_originals_is_known() -> None:
    assert set(CASES) == (set(templates.TEMPLATES) - OWN) | set(templates.ELSEWHERE)


@pytest.mark.parametrize("name", RENDERED)
def test_texts_are_those_of_the_originals(name: str) -> None:
    rules = PromptRules(name, "pieces", (2,))
    wanted = iter(CASES[name][0])
    for turns in TURNS:
        for images in (0, 1):
            expected = next(wanted)
            if expected is None:  # the original fails with a TypeError
                with pytest.raises(InputError, match=f"{name}' is for captions"):
                    prompts.render(rules, turns, images, "auto")
                continue
            assert prompts.render(rules, turns, images, "auto").text == expected


# -- ids of the originals ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, SentencePieceRules | None]:
    """A golden's tokenizer as the original layouts read it."""
    text, rules = read_tokenizer(FOLDERS[request.param], slow=True)
    return request.param, Tokenizer.from_text(text, rules), rules


@pytest.mark.parametrize("name", [name for name in RENDERED if CASES[name][1]])
def test_ids_are_those_of_the_originals(
    name: str, tokenizer: tuple[str, Tokenizer, SentencePieceRules | None]
) -> None:
    """-200 stands for an image, as in tokenizer_image_token."""
    kind, opened, pieces = tokenizer
    rules = PromptRules(name, "pieces", (2,), sentencepiece=pieces)
    for turns, expected in zip(TURNS, CASES[name][1][kind], strict=True):
        if expected is not None:
            rendered = prompts.render(rules, turns, 1, "auto")
            first, second = prompts.tokenize(rules, opened, rendered).runs
            assert [*first, -200, *second] == expected


# -- Hugging Face's layouts ----------------------------------------------------------------------

# language model -> tokenizer, and published chat templates of checkpoints with it
SPEAKERS = {
    "llama": ("llama", ["llava-hf, vicuna", "the 34b's ChatML"]),
    "llama, the third": ("llama-3", ["Llama-3 with parts", "Llama-3's own"]),
    "mistral": ("llama", ["LLaVA-NeXT's with Mistral", "Mistral's own"]),
    "qwen2": ("bytes", ["OneVision's", "Qwen's own, contents printed"]),
}
STEMS = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}


def save(folder: Path, layout: str, speaker: str, template: str) -> Any:
    """A checkpoint with random weights; returns what speaks for it in transformers."""
    kind, special = TOKENIZERS[SPEAKERS[speaker][0]]
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=kind(), **special)
    text = LLAMA | {"vocab_size": len(fast), "hidden_size": 32, "intermediate_size": 16}
    vision = hf.SiglipVisionConfig if layout == "llava_onevision" else hf.CLIPVisionConfig
    config = getattr(hf, f"{STEMS[layout]}Config")(
        text_config=hf.AutoConfig.for_model(speaker.split(",")[0], **text),
        vision_config=vision(**CLIP),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        **({} if layout == "llava" else {"image_grid_pinpoints": PINPOINTS}),
    )
    getattr(hf, f"{STEMS[layout]}ForConditionalGeneration")(config).save_pretrained(folder)
    if layout == "llava_onevision":  # its processor needs torchvision, and adds nothing to a text
        fast.chat_template = template
        processor(True).save_pretrained(folder)
        fast.save_pretrained(folder)
        return hf.AutoTokenizer.from_pretrained(folder)
    getattr(hf, f"{STEMS[layout]}Processor")(
        image_processor=clip_processor(56) if layout == "llava" else processor(False),
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return hf.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("layout", STEMS)
@pytest.mark.parametrize("speaker", SPEAKERS)
def test_every_layout_and_language_model(layout: str, speaker: str, tmp_path: Path) -> None:
    for number, name in enumerate(SPEAKERS[speaker][1]):
        template, lists = CHAT[name]
        folder = tmp_path / str(number)
        witness = save(folder, layout, speaker, template)
        source = systems.load(folder, Options())
        opened = Tokenizer.from_text(source.tokenizer)
        rules = source.model.prompts
        assert (source.model.system, source.model.lm.kind) == (
            "llava" if layout == "llava" else "llava_next", speaker.split(",")[0]
        )  # fmt: skip
        for turns in TURNS:
            for images in (0, 1):
                asked = messages(turns, images, lists=lists)
                text = witness.apply_chat_template(
                    asked, tokenize=False, add_generation_prompt=True
                )
                rendered = prompts.render(rules, turns, images, "auto")
                assert rendered.text == text, name
                found = prompts.tokenize(rules, opened, rendered).runs
                assert [list(run) for run in found] == ids_of(witness, text, images), name


def ids_of(witness: Any, text: str, images: int) -> list[list[int]]:
    """The ids that transformers gives to the model, cut at the run of image tokens."""
    tokens = getattr(witness, "tokenizer", witness)
    shown = {"images": [picture()]} if images and tokens is not witness else {}
    twice = tokens.bos_token is not None and text.startswith(tokens.bos_token)
    found = witness(text=[text], add_special_tokens=not twice, **shown)["input_ids"][0]
    image = tokens.convert_tokens_to_ids("<image>")
    runs: list[list[int]] = [[]]
    for before, number in zip([None, *found], found, strict=False):
        if number != image:
            runs[-1].append(number)
        elif before != number:
            runs.append([])
    return runs
