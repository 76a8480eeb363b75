"""MLCD-Seg against the original code: prompts, tokens, SAM's pixels and features, masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Answer, Question, Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.images import decode, longest_side, preprocess, tiling
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text import prompts
from tests.conftest import golden_case
from tests.pipeline import engine_of
from tests.systems import segmenting
from tests.systems.test_mlcd_golden import Golden, ids_of
from tests.systems.test_original_goldens import near

CASE = "mlcd_seg"
IMAGES = {"one_seg": [0], "two_segs": [1], "two_images": [0, 1], "eval_prompt": [0],
          "eval_prompt2": [1], "no_seg": [0], "ask_whole": [0]}  # fmt: skip


class Opened:
    """A golden folder, and a session of its engine."""

    def __init__(self, golden: Golden, session: Session) -> None:
        self.golden, self.session = golden, session

    def files(self, case: str) -> list[Path]:
        """The pictures of a case."""
        return [self.golden.images[i] for i in IMAGES[case]]

    def text(self, case: str) -> tuple[str, str]:
        """The whole prompt before the answer of a case, and the answer."""
        meta = self.golden.meta
        if case.startswith("eval_prompt"):
            question, answer = meta["conversations"][
                {"eval_prompt": "one_seg"}.get(case, "two_segs")
            ]
            return f"{meta['eval_prompt_text']}### Human: {question}\n### Assistant: ", answer
        question = meta["shown_in_training"][case]
        answer = meta["conversations"][case][1]
        turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{turn}", answer

    def given(self, case: str) -> Answer:
        """The masks of the answer that a case gives."""
        text, answer = self.text(case)
        question = Question(text, self.files(case), template="none", answer=answer)
        return self.session.answer(question)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    golden = Golden(golden_case(CASE))
    quirks = ("one-mask-size",)  # the goldens have it
    work = tmp_path_factory.mktemp(CASE)
    with Session.open(engine_of(golden.folder, work, quirks=quirks)) as session:
        yield Opened(golden, session)


def same_masks(answer: Answer, expected: Array) -> None:
    """Logits to 1e-4, and masks wherever a logit is not next to 0."""
    assert [m.shape for m in answer.logits] == [m.shape for m in expected]
    for found, mask, wanted in zip(answer.logits, answer.masks, expected, strict=True):
        assert np.abs(found - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())
        clear = np.abs(wanted) > 1e-3
        assert np.array_equal(mask[clear], (wanted > 0)[clear])


def test_the_tensors_say_what_sam_is(built: Opened) -> None:
    source = systems.load(built.golden.folder, Options())
    stated = built.golden.meta["sam"]
    assert source.model.system == "mlcd_seg"
    assert source.origin["tower_weights"] == "checkpoint"
    assert source.model.segmenter is not None
    e, d = source.model.segmenter.encoder.config, source.model.segmenter.decoder.config
    found = {
        "image_size": e.image_size, "patch": e.patch_size, "width": e.hidden_size,
        "depth": e.num_layers, "heads": e.num_heads, "global_blocks": list(e.global_blocks),
        "window": e.window, "prompt_width": d.width, "decoder_heads": d.num_heads,
        "decoder_depth": d.num_layers, "decoder_mlp": d.intermediate_size,
    }  # fmt: skip
    assert found == stated


@pytest.mark.parametrize("number", [0, 1])
def test_pixels_are_bit_equal_and_features_near(built: Opened, number: int) -> None:
    golden, session = built.golden, built.session
    image = decode.load(golden.images[number]).rgb
    segmenter, rules = session.model.segmenter, session.model.images
    assert segmenter is not None and rules.tiling is not None  # noqa: PT018
    pixels = longest_side.preprocess(image, segmenter.pixels)
    assert np.array_equal(pixels, golden.inputs[f"image{number}.sam_pixels"])
    inner = segmenter.pixels.inner((image.height, image.width))
    assert list(inner) == golden.inputs[f"image{number}.sam_resized_hw"].tolist()
    (rule,) = rules.encoders.values()
    views = [preprocess.preprocess(v, rule) for v in tiling.cut(image, rules.tiling).images]
    assert np.array_equal(np.stack(views), golden.inputs[f"image{number}.pixel_values_anyres"])

    runner = session._runners["segmenter.encoder"]
    found = runner.run({"pixels": pixels[None]})["features.0"]
    expected = golden.outputs[f"image{number}.sam_features"]
    near(found, expected.reshape(1, expected.shape[1], -1).transpose(0, 2, 1))
    tokens = session.vision.encode([decode.load(golden.images[number])], Clock())
    near(tokens.rows[tokens.indices[0]], golden.outputs[f"image{number}.merged_tokens"])


@pytest.mark.parametrize("case", ["one_seg", "two_segs", "two_images", "eval_prompt",
                                  "eval_prompt2"])  # fmt: skip
def test_masks_of_a_given_answer(built: Opened, case: str) -> None:
    golden, session = built.golden, built.session
    answer = built.given(case)
    text, said = built.text(case)
    found = ids_of(prompts.tokenize(session.model.prompts, session.tokenizer, text + said))
    last = len(found) - found[::-1].index(golden.meta["seg_id"])  # what follows may merge with it
    assert found[:last] == golden.inputs[f"{case}.ids"][:last].tolist()
    assert answer.finish_reason == "given"
    assert list(answer.token_ids) == found[-len(answer.token_ids) :]
    same_masks(answer, golden.outputs[f"{case}.mask_logits"])


def test_the_free_answer_and_its_masks(built: Opened) -> None:
    golden, session = built.golden, built.session
    question = Question(golden.meta["ask_prompt"], built.files("ask_whole"), 24, template="none")
    answer = session.answer(question)
    assert list(answer.token_ids) == golden.outputs["ask.greedy_ids"].tolist()
    assert "[SEG]" in answer.text
    same_masks(answer, golden.outputs["ask_whole.mask_logits"])
    assert answer.timings_ms["total"] > answer.timings_ms["segmenter.encoder"] > 0


def test_no_mask_without_a_token(built: Opened) -> None:
    golden, session = built.golden, built.session
    first = golden.outputs["ask.greedy_ids"].tolist().index(golden.meta["seg_id"])
    question = Question(golden.meta["ask_prompt"], built.files("no_seg"), first, template="none")
    answer = session.answer(question)
    assert (answer.segments, answer.masks, answer.logits) == ((), [], [])
    assert not any(stage.startswith("segmenter.") for stage in answer.timings_ms)
    assert golden.outputs["no_seg.mask_logits"].shape[0] == 0


# -- a random SAM around the golden MLCD, with transformers as the witness ----------------------


class Small:
    """A session of the small checkpoint, with what it was made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = segmenting.sam()  # the same again
        width = self.model.config.vision_config.output_channels
        self.session = Session.open(folder / "engine-cpu")
        hidden_size = self.session.model.lm.config.hidden_size
        self.projection = segmenting.projection(hidden_size, width)
        self.images = [segmenting.MLCD / "image0.png", segmenting.MLCD / "image1.png"]

    def expected(self, image: Path, state: Array) -> Array:
        """transformers' logits for a state of the language model."""
        side = self.model.config.vision_config.image_size
        pixels, inner = segmenting.sam_pixels(image, side)
        with torch.no_grad():
            features = self.model.vision_encoder(pixels[None]).last_hidden_state
            prompt = self.projection(torch.from_numpy(state))[None]
        low = segmenting.masks_of(self.model, prompt, features)[0]
        rgb = decode.load(image).rgb
        found: Array = segmenting.enlarged(low, side, inner, (rgb.height, rgb.width))
        return found


@pytest.fixture(scope="module")
def small(with_masks: Path) -> Iterator[Small]:
    made = Small(with_masks)
    yield made
    made.session.close()


def states(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """Every state that the session takes from its language model, from now on."""
    seen: list[Array] = []
    true = session.state_at

    def watched(*given: Any) -> Array:
        seen.append(true(*given))
        return seen[-1]

    monkeypatch.setattr(session, "state_at", watched)
    return seen


def test_several_images_get_the_tokens_in_turn(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = states(small.session, monkeypatch)
    question = Question("<image>\n<image>\nWhere?", small.images, answer="[SEG], [SEG] and [SEG]")
    answer = small.session.answer(question)
    assert answer.segments is not None
    assert [mask.image for mask in answer.segments] == [0, 0, 1]  # image after image
    order = [(0, 0), (0, 2), (1, 1)]  # image, token
    for (image, token), found in zip(order, answer.logits, strict=True):
        near(found, small.expected(small.images[image], seen[token]))


def test_the_state_is_that_at_the_token_however_it_was_reached(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given after the prompt, or generated: the same prefix has the same state."""
    seen = states(small.session, monkeypatch)
    free = small.session.answer(Question("Where?", small.images[:1], 40))
    if "[SEG]" not in free.text:
        pytest.skip("this random model does not say [SEG]")
    upto = free.text[: free.text.index("[SEG]") + len("[SEG]")]
    small.session.answer(Question("Where?", small.images[:1], answer=upto))
    near(seen[0], seen[-1])


def test_tokens_of_the_conversation_before_bring_no_mask(small: Small) -> None:
    history = ("[SEG]?", "It is [SEG].")
    question = Question("And [SEG]?", small.images[:1], history=history, answer="[SEG]")
    assert len(small.session.answer(question).masks) == 1


def test_masks_are_asked_for_without_an_image(small: Small) -> None:
    answer = small.session.answer(Question("Where?", answer="[SEG]"))
    assert answer.masks == []
    assert "there is no image" in " ".join(answer.notes)


def test_a_full_context_leaves_the_last_mask_out(small: Small, tmp_path: Path) -> None:
    from edgevlm.engines.build.build import Request, build
    from edgevlm.toolkit.target import this_cpu
    from tests.pipeline import silent

    session = small.session
    question = Question("Where?", small.images[:1], 60)
    free = session.answer(question)
    seg = session.segmentation
    assert seg is not None
    if seg.token not in free.token_ids:
        pytest.skip("this random model does not say [SEG]")
    needed = free.prompt_tokens + free.token_ids.index(seg.token)
    bundle = small.folder / "bundle"
    request = Request(this_cpu(), needed, False, "tests")
    build(bundle, tmp_path / "engine", request, silent)
    with Session.open(tmp_path / "engine") as short:
        answer = short.answer(question)
        assert answer.token_ids[-1] == seg.token
        assert answer.masks == []
        assert "the last mask is left out" in " ".join(answer.notes)


def test_a_tower_without_its_folder_is_read_from_its_tensors(tmp_path: Path) -> None:
    """The golden's heads have 16 channels, not CLIP's 64: then the folder is asked for."""
    folder = golden_case(CASE)
    copy = tmp_path / "mlcd-seg"
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (copy / path.name).symlink_to(path)
    with pytest.raises(Exception, match="how many heads") as caught:
        systems.load(copy, Options())
    assert "--vision-tower" in getattr(caught.value, "hint", "")
    tower = folder / json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    source = systems.load(copy, Options(vision_tower=tower))
    assert source.origin["tower_weights"] == "checkpoint"
