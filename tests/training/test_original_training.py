"""One step on the goldens' training batches: loss and gradients are those of the original code."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.images import decode, views
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data.collate import collate
from edgevlm.training.data.prepare import SampleRules, prepare, rules_for
from edgevlm.training.data.sample import Sample
from edgevlm.training.data.samples import ASSISTANT, USER, RawSample
from edgevlm.training.vlm import VLM, Batch, token_loss
from tests.training.data.models import LLAVA, MLCD, Golden, golden

SLOT = -200
EVERY = (*LLAVA, MLCD)


@lru_cache(maxsize=4)
def source_of(name: str) -> Source:
    case = golden(name)
    return systems.load(case.folder / case.case.get("checkpoint", "."), Options())


def model_of(name: str, **options: Any) -> VLM:
    """The golden's model, its tower frozen as in the original's LLaVA stages."""
    source = source_of(name)
    model = VLM(source.model, **options).load(source.weights)
    for parameter_name, parameter in model.named_parameters():
        frozen = name != MLCD and parameter_name.startswith("encoder.")
        parameter.requires_grad_(not frozen)
    return model


def loss_of(model: VLM, batch: Batch) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "targets"}
    targets = batch["targets"]
    loss: torch.Tensor = token_loss(model(**inputs), targets) / (targets != -100).sum()
    return loss


def split(ids: Array) -> tuple[tuple[int, ...], ...]:
    """Ids between image slots."""
    runs: list[list[int]] = [[]]
    for number in ids.tolist():
        if number == SLOT:
            runs.append([])
        else:
            runs[-1].append(number)
    return tuple(map(tuple, runs))


def stored_sample(case: Golden, rules: SampleRules, row: int, images: list[Path]) -> Sample:
    """A row of the golden's batch as the original spliced it, its padding left out."""
    prefix = "train." if "train.input_ids" in case.inputs else "train_"
    read = case.inputs[f"{prefix}attention_mask"][row]
    ids, labels = (case.inputs[prefix + part][row][read] for part in ("input_ids", "labels"))
    marked = np.where(ids == SLOT, SLOT, labels)
    prepared = [views.prepare(decode.load(f).rgb, rules.images, count=1) for f in images]
    return Sample(f"row {row}", split(ids), split(marked), tuple(prepared), 0)


def stored_batch(name: str) -> Batch:
    case = golden(name)
    rules = rules_for(case.model, max_length=4096)
    files = sorted(case.folder.glob("image*.png"))
    per_row = [[files[0]], [files[1]]] if name == MLCD else [[files[0]], []]
    return collate([stored_sample(case, rules, i, f) for i, f in enumerate(per_row)], rules)


@pytest.mark.parametrize("name", EVERY)
def test_the_loss_is_the_originals(name: str) -> None:
    case = golden(name)
    expected = float(case.outputs["train.loss" if name == MLCD else "train_loss"])
    with torch.no_grad():
        found = loss_of(model_of(name), stored_batch(name)).item()
    assert found == pytest.approx(expected, rel=1e-5)


def originals_names(name: str) -> dict[str, tuple[str, Any]]:
    """For each of our parameters that is made from one tensor: that tensor, and how."""
    found = {}
    for component, weights in source_of(name).weights.items():
        for key, recipe in getattr(weights, "table", {}).items():
            if len(recipe.sources) == 1:
                found[f"{component}.{key}"] = (recipe.sources[0], recipe.make)
    return found


@pytest.mark.parametrize("name", LLAVA)
def test_norms_of_the_gradients_are_the_originals(name: str) -> None:
    model = model_of(name)
    torch.autograd.backward(loss_of(model, stored_batch(name)))
    norms = {
        originals_names(name)[ours][0]: parameter.grad.norm().item()
        for ours, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    expected = golden(name).case["train_grad_norms"]
    assert len(expected) >= 15
    for theirs, norm in expected.items():
        assert norms[theirs] == pytest.approx(norm, rel=1e-3), theirs


def test_gradients_of_mlcd_are_the_originals_its_tower_included() -> None:
    model = model_of(MLCD)
    torch.autograd.backward(loss_of(model, stored_batch(MLCD)))
    stored = {k: v for k, v in golden(MLCD).outputs.items() if k.startswith("train.grad.")}
    found = 0
    for ours, (theirs, make) in originals_names(MLCD).items():
        expected = stored.get(f"train.grad.{theirs}")
        if expected is None:
            continue
        gradient = model.get_parameter(ours).grad
        assert gradient is not None
        np.testing.assert_allclose(
            gradient.numpy(), make(expected), rtol=1e-3, atol=1e-3 * np.abs(expected).max()
        )
        found += 1
    assert found == len(stored) == 6


@pytest.mark.parametrize("name", LLAVA)
def test_conversations_become_the_same_loss(name: str) -> None:
    """From text and picture, through the masks, to the loss; and the captions of pre-training."""
    case = golden(name)
    picture = case.folder / "image.png"
    roles = {"human": USER, "gpt": ASSISTANT}

    def raw(number: int, turns: list[dict[str, str]]) -> RawSample:
        texts = tuple((roles[turn["from"]], turn["value"]) for turn in turns)
        shown = any("<image>" in text for _, text in texts)
        return RawSample(str(number), (picture,) * shown, texts)

    model = model_of(name)
    for key, template in (("train", "auto"), ("plain", "plain")):
        rules = rules_for(case.model, template, max_length=2048)
        stated = case.case["train_conversations" if key == "train" else "plain_conversation"]
        dialogues = stated if key == "train" else [stated]
        samples = [prepare(raw(i, d), rules, case.tokenizer) for i, d in enumerate(dialogues)]
        with torch.no_grad():
            found = loss_of(model, collate(samples, rules)).item()
        assert found == pytest.approx(float(case.outputs[f"{key}_loss"]), rel=1e-5), key


@pytest.mark.parametrize("name", EVERY)
def test_recomputed_layers_give_the_same_gradients(name: str) -> None:
    plain, again = model_of(name), model_of(name, recompute=True)
    batch = stored_batch(name)
    for model in (plain, again):
        torch.autograd.backward(loss_of(model, batch))
    for (ours, kept), (_, made) in zip(
        plain.named_parameters(), again.named_parameters(), strict=True
    ):
        assert (kept.grad is None) == (made.grad is None), ours
        if kept.grad is not None and made.grad is not None:
            assert torch.equal(kept.grad, made.grad), ours


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize("name", ["e2e_llava15", MLCD])
def test_compiled_layers_equal_eager_ones(name: str) -> None:
    torch.compiler.reset()
    eager, compiled = model_of(name), model_of(name)
    compiled.compile_layers()
    batch = stored_batch(name)
    losses = [loss_of(model, batch) for model in (eager, compiled)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        torch.autograd.backward(loss)
    for (ours, a), (_, b) in zip(
        eager.named_parameters(), compiled.named_parameters(), strict=True
    ):
        if a.grad is not None and b.grad is not None:
            scale = a.grad.abs().max().item()
            assert (a.grad - b.grad).abs().max().item() <= 1e-4 * scale, ours
