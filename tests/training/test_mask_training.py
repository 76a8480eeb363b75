"""Training of MLCD-Seg: losses and gradients are the original's; what a sample's masks may be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgevlm import api
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.images import decode, rle, views
from edgevlm.toolkit.images.longest_side import LongestSide
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.training import optimizer, stages, with_sam
from edgevlm.training.data import masks
from edgevlm.training.data.broken import BrokenSample
from edgevlm.training.data.collate import collate
from edgevlm.training.data.prepare import SampleRules, prepare, rules_for
from edgevlm.training.data.sample import Sample
from edgevlm.training.data.samples import ASSISTANT, USER, RawSample
from edgevlm.training.mask_task import MaskTask, mask_loss
from edgevlm.training.setup import mask_rules
from edgevlm.training.vlm import VLM, Batch
from tests.conftest import golden_case
from tests.systems import segmenting
from tests.systems.test_mlcd_golden import Golden
from tests.training.test_original_training import SLOT, split

CASE = "mlcd_seg"
STAGE = stages.find_vlm("mlcd-seg")


class Case:
    """The golden: its model, and its training batch."""

    def __init__(self) -> None:
        self.golden = Golden(golden_case(CASE))
        self.source = systems.load(self.golden.folder, Options())
        self.rules = rules_of(self.source)

    def model(self) -> VLM:
        """The model with what the stage trains."""
        made = VLM(self.source.model).load(self.source.weights)
        optimizer.freeze(made, STAGE)
        return made

    def batch(self) -> Batch:
        """The rows of the golden's batch as the original spliced them."""
        inputs = self.golden.inputs
        given = [inputs["train.masks0"], inputs["train.masks1"], None]
        pictures = [[self.golden.images[0]], [self.golden.images[1]], []]
        samples = []
        for row, (files, own) in enumerate(zip(pictures, given, strict=True)):
            read = inputs["train.attention_mask"][row].astype(bool)
            ids, labels = (inputs[f"train.{part}"][row][read] for part in ("ids", "labels"))
            marked = np.where(ids == SLOT, SLOT, labels)
            shown = [views.prepare(decode.load(f).rgb, self.rules.images, count=1) for f in files]
            stated = None if own is None else [rle.encode(m > 0) for m in own]
            raw = RawSample(f"row {row}", tuple(files), (), stated)
            sample = Sample(raw.name, split(ids), split(marked), tuple(shown), 0)
            samples.append(replace(sample, masks=masks_of(raw, sample, self.rules)))
        return collate(samples, self.rules)


def masks_of(raw: RawSample, sample: Sample, rules: SampleRules) -> masks.SampleMasks:
    """As prepare makes them of a conversation."""
    from edgevlm.training.data.sample import image_tokens, lay_out

    rows = [np.zeros(image_tokens(i, rules.tokens_per_view), np.int64) for i in sample.images]
    ids, places, _ = lay_out(sample.runs, sample.labels, rows, None)
    assert rules.masks is not None
    return masks.of_sample(raw, ids, places, rules.masks)


def rules_of(source: Source) -> SampleRules:
    tokenizer = Tokenizer.from_text(source.tokenizer)
    found = rules_for(source.model, max_length=4096)
    return replace(found, masks=mask_rules(source.model, tokenizer))


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def task(case: Case) -> MaskTask:
    assert case.source.model.segmenter is not None
    return MaskTask("cpu", case.source.model.segmenter.pixels.side)


def test_the_losses_are_the_originals(case: Case) -> None:
    outputs, batch, made = case.golden.outputs, case.batch(), case.model()
    targets = (batch["targets"] != -100).sum()
    with torch.no_grad():
        total = (task(case).loss(made, batch) / targets).item()
        logits, low = made(**task(case)._inputs(batch))
        of_masks = mask_loss(low, batch["mask_targets"], task(case).side).item()
    assert total == pytest.approx(float(outputs["train.loss"]), rel=1e-5)
    assert of_masks == pytest.approx(float(outputs["train.mask_loss"]), rel=1e-5)
    assert total - of_masks == pytest.approx(float(outputs["train.lm_loss"]), rel=1e-5)
    sums = 2 * outputs["train.bce_sums"].sum() + 0.5 * outputs["train.dice_sums"].sum()
    assert of_masks == pytest.approx(float(sums) / len(batch["mask_targets"]), rel=1e-5)


def test_the_gradients_are_the_originals(case: Case) -> None:
    made, batch = case.model(), case.batch()
    targets = (batch["targets"] != -100).sum()
    torch.autograd.backward(task(case).loss(made, batch) / targets)
    stored = {k.removeprefix("train.grad."): v for k, v in case.golden.outputs.items()
              if k.startswith("train.grad.")}  # fmt: skip
    seg, compared = case.golden.meta["seg_id"], 0
    for component, weights in case.source.weights.items():
        for key, recipe in getattr(weights, "table", {}).items():
            source = recipe.sources[0]
            rows = f"{source}[seg]" in stored
            expected = stored.get(f"{source}[seg]" if rows else source)
            if expected is None or "position" in key:
                continue
            gradient = made.get_parameter(f"{component}.{key}").grad
            assert gradient is not None, key
            found = gradient.numpy()
            if rows:
                found = found[seg] if key == "embed.weight" else found[:, seg]
            wanted = expected if rows else recipe.make(expected)
            limit = 1e-3 * np.abs(wanted).max()
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=limit, err_msg=source)
            compared += 1
    assert compared == len(stored) >= 15


def test_the_stage_trains_what_the_original_does_at_its_rates(case: Case) -> None:
    made = case.model()
    rates = {name: STAGE.rate_of(name) for name, p in made.named_parameters() if p.requires_grad}
    assert not any(name.startswith("segmenter.encoder.") for name in rates)
    assert "segmenter.decoder.position" not in rates
    assert {r for n, r in rates.items() if n.startswith("segmenter.decoder.proj")} == {3e-4}
    others = [n for n in rates if n.startswith("segmenter.decoder.") and ".projection." not in n]
    assert {rates[name] for name in others} == {8e-4}
    assert {"segmenter.decoder.no_mask", "segmenter.decoder.mask_tokens"} <= set(others)
    assert {r for n, r in rates.items() if n.startswith("encoder.")} == {2e-6}
    assert {r for n, r in rates.items() if n.startswith(("lm.", "merger."))} == {2e-5}


# -- masks of a sample --------------------------------------------------------------------------

RULES = masks.MaskRules(9, LongestSide(16))


def picture(folder: Path, name: str, width: int, height: int) -> Path:
    from PIL import Image

    path = folder / f"{name}.png"
    Image.new("RGB", (width, height), (9, 80, 200)).save(path)
    return path


def square(height: int, width: int, side: int) -> dict[str, Any]:
    mask = np.zeros((height, width), bool)
    mask[:side, :side] = True
    return rle.encode(mask)


def test_images_get_the_tokens_in_turn_and_masks_are_in_their_order(tmp_path: Path) -> None:
    files = (picture(tmp_path, "a", 8, 6), picture(tmp_path, "b", 6, 6))
    stated = [square(6, 8, side) for side in (1, 2, 3)]
    raw = RawSample("x", files, (), stated)
    ids, rows = np.array([5, 9, 9, 7, 9, 9]), np.array([-1, 0, -1, -1, -1, -1])
    found = masks.of_sample(raw, ids, rows, RULES)
    assert [(m.image, m.place) for m in found.masks] == [(0, 2), (0, 5), (1, 4)]
    assert [int(m.target.sum()) for m in found.masks] == [1, 4, 9]
    assert [m.inner for m in found.masks] == [(12, 16), (12, 16), (16, 16)]
    assert [p.shape for p in found.pixels] == [(3, 16, 16)] * 2
    fewer = masks.of_sample(raw, ids[:5], rows[:5], RULES)
    assert [m.place for m in fewer.masks] == [2, 4]  # a mask beyond the tokens is left out


def test_a_sample_without_segmentation_has_no_mask(tmp_path: Path) -> None:
    raw = RawSample("x", (picture(tmp_path, "a", 8, 6),), ())
    assert masks.of_sample(raw, np.array([9]), np.array([-1]), RULES) == masks.SampleMasks()


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ([], "1 tokens of masks, 0 in segmentation"),
        ("text", "expected a list"),
        ([[1.0, 2.0, 3.0, 4.0]], "1.0 is no object"),
        ([{"size": [6, 8], "counts": [3, 4]}], "have 7 pixels"),
        ([{"size": [6], "counts": [6]}], "expected [height, width]"),
        ([{"size": [2, 2], "counts": "\x00"}], "is not COCO's text"),
        ([square(8, 6, 1)], "a mask of (8, 6) for an image of (6, 8)"),
    ],
)
def test_masks_that_do_not_fit_are_broken(stated: Any, reason: str, tmp_path: Path) -> None:
    raw = RawSample("x", (picture(tmp_path, "a", 8, 6),), (), stated)
    with pytest.raises(BrokenSample) as caught:
        masks.of_sample(raw, np.array([9]), np.array([-1]), RULES)
    assert caught.value.kind == "masks that do not fit the answer or its image"
    assert reason in caught.value.reason


def test_a_conversation_brings_its_masks_and_the_cut_takes_them(
    with_masks: Path, tmp_path: Path
) -> None:
    source = systems.load(with_masks / "mlcd-seg", Options())
    rules, tokenizer = rules_of(source), Tokenizer.from_text(source.tokenizer)
    file = picture(tmp_path, "a", 8, 6)
    turns = ((USER, "<image>\nWhere?"), (ASSISTANT, "It is [SEG], or [SEG]."))
    raw = RawSample("x", (file,), turns, [square(6, 8, 1), square(6, 8, 2)])
    whole = prepare(raw, rules, tokenizer)
    assert len(whole.masks.masks) == 2
    last = whole.masks.masks[-1].place
    cut = prepare(raw, replace(rules, max_length=last), tokenizer)
    assert [m.place for m in cut.masks.masks] == [whole.masks.masks[0].place]
    batch = collate([whole, cut], rules)
    assert batch["mask_states"].tolist() == [
        [0, batch["score"].shape[1] - 2], [0, batch["score"].shape[1] - 1],
        [1, batch["mask_states"][2, 1].item()],
    ]  # fmt: skip
    places = [int(batch["score"][row, column]) for row, column in batch["mask_states"].tolist()]
    assert places == [m.place for s in (whole, cut) for m in s.masks.masks]
    assert batch["ids"][0, places[0]] == tokenizer.id_of("[SEG]")


def seg_data(folder: Path, size: int = 6) -> Path:
    """Questions whose answers have a mask, and one of text alone."""
    folder.mkdir()
    items: list[dict[str, Any]] = []
    for number in range(size):
        picture(folder, str(number), 20 + number, 16)
        answer = {"from": "gpt", "value": "It is [SEG]."}
        items.append(
            {"image": f"{number}.png", "segmentation": [square(16, 20 + number, 5 + number)],
             "conversations": [{"from": "human", "value": "<image>\nWhere?"}, answer]}
        )  # fmt: skip
    text = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    items.append({"conversations": text})
    (folder / "seg.json").write_text(json.dumps(items))
    return folder / "seg.json"


def test_a_run_lowers_the_loss_and_is_written_back_in_the_published_layout(
    with_masks: Path, tmp_path: Path
) -> None:
    folder = with_masks / "mlcd-seg"
    data, out = seg_data(tmp_path / "data"), tmp_path / "trained"
    result = api.train(
        "mlcd-seg", str(folder), out, data=[str(data)], eval_data=[str(data)], batch=7,
        micro_batch=7, steps=8, log_every=1, schedule="constant", warmup=0.0,
        original=tmp_path / "original",
    )  # fmt: skip
    assert result.first_loss is not None and result.last_loss is not None  # noqa: PT018
    assert math.isfinite(result.last_loss)
    assert result.last_loss < result.first_loss
    assert trained.is_trained(out)
    ours, theirs = (systems.load(path, Options()) for path in (out, tmp_path / "original"))
    assert ours.model.segmenter == theirs.model.segmenter is not None
    before = systems.load(folder, Options())
    changed = "segmenter.decoder", "projection.0.weight"
    kept = "segmenter.encoder", "layers.0.mlp.up.weight"
    for (component, key), same in ((changed, False), (kept, True)):
        weight = before.weights[component][key]
        for source in (ours, theirs):
            assert np.array_equal(source.weights[component][key], weight) is same


@pytest.mark.parametrize("end", ["safetensors", "pth"])
def test_training_begins_with_mlcd_and_the_file_of_sam(end: str, tmp_path: Path) -> None:
    tensors = segmenting.original_names(segmenting.sam())
    file = tmp_path / f"sam.{end}"
    save: Any = save_file if end == "safetensors" else torch.save
    save(tensors, file)
    plain = clip_mlcd(tmp_path)
    source = with_sam.begun(plain, str(file), 3)
    old, new = plain.model.lm.config.vocab_size, source.model.lm.config.vocab_size
    assert (source.model.system, new) == ("mlcd_seg", old + 1)
    assert Tokenizer.from_text(source.tokenizer).id_of("[SEG]") == old
    made = VLM(source.model).load(source.weights)
    for key, axis in (("embed.weight", 0), ("head.weight", 1)):
        whole = made.get_parameter(f"lm.{key}").detach().numpy()
        assert np.array_equal(np.take(whole, range(old), axis), plain.weights["lm"][key])
        assert 0 < np.abs(np.take(whole, old, axis)).max() < 0.2
    weight = made.get_parameter("segmenter.encoder.layers.0.mlp.up.weight").detach()
    assert torch.equal(weight, tensors["image_encoder.blocks.0.mlp.lin1.weight"].T)
    again = with_sam.begun(plain, str(file), 3)
    key = "projection.0.weight"
    drawn = [s.weights["segmenter.decoder"][key] for s in (source, again)]
    assert np.array_equal(*drawn)
    assert np.abs(drawn[0]).max() <= 1 / math.sqrt(source.model.lm.config.hidden_size)


def clip_mlcd(work: Path) -> Source:
    """MLCD with a CLIP-class tower: the golden MLCD-Seg without SAM."""
    whole = systems.load(golden_case(CASE), Options())
    model = replace(whole.model, system="mlcd", segmenter=None)
    rows = replace(model.lm.config, vocab_size=model.lm.config.vocab_size - 1)
    weights = dict(whole.weights)
    lm = dict(weights["lm"])
    lm["embed.weight"], lm["head.weight"] = lm["embed.weight"][:-1], lm["head.weight"][:, :-1]
    data = json.loads(whole.tokenizer)
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "[SEG]"]
    model = replace(model, lm=replace(model.lm, config=rows))
    return replace(whole, model=model, weights={**weights, "lm": lm}, tokenizer=json.dumps(data))


def test_a_file_that_is_not_sams_is_refused(tmp_path: Path) -> None:
    tensors = segmenting.original_names(segmenting.sam())
    plain = clip_mlcd(tmp_path)
    save_file({**tensors, "adapter.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="adapter.weight"):
        with_sam.begun(plain, str(tmp_path / "more.safetensors"), 0)
    with pytest.raises(ConfigError, match="has SAM already"):
        with_sam.begun(systems.load(golden_case(CASE), Options()), "any", 0)
    with pytest.raises(ConfigError, match="expected mlcd with a CLIP-class tower"):
        with_sam.begun(systems.load(segmenting.MLCD, Options()), "any", 0)
