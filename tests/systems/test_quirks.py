"""Quirks of the originals: left out by default, reproduced when chosen by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from edgevlm.engines.build.build import Request, build
from edgevlm.engines.runtime.session import Answer, Question, Session
from edgevlm.export.write import write_bundle
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.quirks import QUIRKS
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.target import this_cpu
from tests.pipeline import silent
from tests.systems.test_original_goldens import Golden
from tests.systems.test_same_answer import copied

MLCD = "mlcd_llavanext_e2e"


def opened(checkpoint: Path, work: Path, *quirks: str) -> Session:
    """A session of the checkpoint with these quirks."""
    source = systems.load(checkpoint, Options(quirks=quirks))
    name = "-".join(("bundle", *quirks))
    write_bundle(source, work / name, dtype="fp32", made_by="tests", force=False, progress=silent)
    engine = work / f"engine-{name}"
    build(work / name, engine, Request(this_cpu(), None, False, "tests"), silent)
    return Session.open(engine)


def ask(session: Session, prompt: str, images: list[Path], tokens: int = 12) -> Answer:
    return session.answer(Question(prompt, images, tokens, template="none"))


@pytest.fixture
def llava(tmp_path: Path) -> tuple[Golden, Path]:
    return copied("e2e_llava15", tmp_path)


def test_a_rotated_photograph(llava: tuple[Golden, Path], tmp_path: Path) -> None:
    golden, checkpoint = llava
    plain_file, tagged, upright = (tmp_path / f"{n}.png" for n in ("plain", "tagged", "upright"))
    image = Image.open(golden.image).convert("RGB").crop((0, 0, 70, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # show it rotated by 90 degrees clockwise
    image.save(plain_file)
    image.save(tagged, exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(upright)
    prompt = golden.case["prompt"]
    plain, odd = opened(checkpoint, tmp_path), opened(checkpoint, tmp_path, "ignore-exif")
    answers = [ask(plain, prompt, [f]) for f in (plain_file, tagged, upright)]
    assert answers[1].token_ids == answers[2].token_ids != answers[0].token_ids
    found = ask(odd, prompt, [tagged])
    assert found.token_ids == answers[0].token_ids
    assert found.notes == ("image 1: EXIF orientation ignored",)
    assert answers[1].notes == ("image 1: EXIF orientation applied",)


def test_a_prompt_beyond_the_training_length(llava: tuple[Golden, Path], tmp_path: Path) -> None:
    golden, checkpoint = llava
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    whole = ask(opened(checkpoint, tmp_path), golden.case["prompt"], [golden.image])
    limit = whole.prompt_tokens - 9
    path.write_text(json.dumps(config | {"tokenizer_model_max_length": limit}))
    odd = opened(checkpoint, tmp_path, "cut-prompt")
    found = ask(odd, golden.case["prompt"], [golden.image])
    assert found.prompt_tokens == limit
    assert found.notes == (f"the prompt's {limit + 9} tokens were cut to {limit}",)
    assert found.token_ids != whole.token_ids
    # The prompt's last tokens are text: dropping them by hand must give the same answer.
    ids = golden.inputs["input_ids"].reshape(-1).tolist()[:-9]
    text = _text_of(odd, ids)
    assert ask(odd, text, [golden.image]).token_ids == found.token_ids
    path.write_text(json.dumps({**config, "tokenizer_model_max_length": None}))
    with pytest.raises(ConfigError, match="tokenizer_model_max_length"):
        systems.load(checkpoint, Options(quirks=("cut-prompt",)))


def _text_of(session: Session, ids: list[int]) -> str:
    """A raw prompt whose ids begin as given; checked by encoding it again."""
    from edgevlm.toolkit.text import prompts

    slot = ids.index(-200)
    before, after = (session.tokenizer.decode(run) for run in (ids[:slot], ids[slot + 1 :]))
    text = f"{before}<image>{after}"
    runs = prompts.tokenize(session.model.prompts, session.tokenizer, text).runs
    assert [*runs[0], -200, *runs[1]] == ids
    return text


def test_one_placeholder_more_than_images(tmp_path: Path) -> None:
    from tests.conftest import golden_case

    case = golden_case(MLCD)
    prompt = json.loads((case / "meta.json").read_text())["prompt_two_images"]
    first, second = case / "image0.png", case / "image1.png"
    plain, odd = opened(case, tmp_path), opened(case, tmp_path, "reuse-image")
    with pytest.raises(InputError, match=r"2 image slot\(s\) and 1"):
        ask(plain, prompt, [first])
    again = ask(plain, prompt, [first, first])
    assert ask(odd, prompt, [first]).token_ids == again.token_ids
    assert ask(odd, prompt, [first, second]).token_ids != again.token_ids
    for images in ([], [first, first, first]):
        with pytest.raises(InputError, match="image slot"):
            ask(odd, prompt, images)
    with pytest.raises(InputError, match="3 image slot"):
        ask(odd, "<image>" + prompt, [first])


def test_gammas_that_the_originals_loader_loses(tmp_path: Path) -> None:
    golden, checkpoint = copied("e2e_mmfuser", tmp_path)
    prompt = golden.case["prompt"]
    odd = ask(opened(checkpoint, tmp_path, "renamed-gamma"), prompt, [golden.image])
    assert list(odd.token_ids) != golden.outputs["greedy_ids"].reshape(-1).tolist()[:12]
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({k: t * (0 if "gamma" in k else 1) for k, t in tensors.items()}, file)
    zeroed = ask(opened(checkpoint, tmp_path), prompt, [golden.image])
    assert odd.token_ids == zeroed.token_ids


def test_a_quirk_travels_with_the_bundle(tmp_path: Path) -> None:
    from tests.conftest import golden_case

    opened(golden_case(MLCD), tmp_path, "reuse-image")
    shutil.move(tmp_path / "bundle-reuse-image", tmp_path / "b")
    source = systems.load(tmp_path / "b", Options(quirks=("ignore-exif",)))
    assert source.model.prompts.reuse_last
    assert not source.model.images.upright
    assert source.origin["quirks"] == ["reuse-image", "ignore-exif"]


def test_what_an_original_does_not_do_is_refused(llava: tuple[Golden, Path]) -> None:
    _, checkpoint = llava
    with pytest.raises(ConfigError, match="no quirk 'renamed-gamma'") as caught:
        systems.load(checkpoint, Options(quirks=("renamed-gamma",)))
    assert "mmfuser" in caught.value.hint
    with pytest.raises(ConfigError, match="there is no quirk 'moody'") as caught:
        systems.load(checkpoint, Options(quirks=("moody",)))
    assert all(name in caught.value.hint for name in QUIRKS)
    with pytest.raises(ConfigError, match="--quirk is for checkpoints"):
        systems.preset("llava-qwen2-0.5b", 0, Options(quirks=("ignore-exif",)))
