"""The page of the server in a browser: an image, questions, tokens as they come, stages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgevlm.engines.runtime.embedding import Embedder, normalised
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.work import opened
from tests.engines.serving.conftest import GOLDEN
from tests.engines.serving.served import listening, serving
from tests.engines.serving.webdriver import browsing

IMAGE = GOLDEN / "image.png"


@pytest.mark.slow
def test_a_person_drops_an_image_asks_and_asks_again(session: Session, tmp_path: Path) -> None:
    first = session.answer(Question("What is this?", IMAGE, 20, literal=True)).text
    history = ["What is this?", first]
    second = session.answer(Question("And?", IMAGE, 20, history=history, literal=True)).text
    with serving(session, Limits(slots=2)) as server, browsing() as browser:
        browser.open(server.url)
        browser.wait(
            lambda: browser.run("return document.getElementById('model').textContent") == "tiny"
        )
        browser.type("#file", str(IMAGE))
        browser.wait(
            lambda: browser.run("return document.querySelectorAll('#drop img').length") == 1
        )
        browser.run("document.getElementById('tokens').value = 20")
        answers = []
        for question in ("What is this?", "And?"):
            browser.type("#prompt", question)
            browser.click("#send")
            browser.wait(
                lambda: bool(browser.run("return !document.getElementById('send').disabled"))
            )
            answers.append(
                browser.run(
                    "return [...document.querySelectorAll('.assistant')].at(-1).textContent"
                )
            )
        assert answers == [first, second]
        stages = browser.run(
            "return [...document.querySelectorAll('.bar span')].map(e => e.textContent)"
        )
        assert {"prefill", "decode", "queue"} <= set(stages)
        figures = browser.run("return document.getElementById('figures').textContent")
        assert "20 out" in figures
        assert "0 found in the cache" not in figures
        browser.screenshot(Path(os.environ.get("PAGE_SCREENSHOT") or tmp_path / "page.png"))
        browser.click("#reset")
        browser.run("document.getElementById('prompt').value = 'a b c '.repeat(3000)")
        browser.click("#send")
        browser.wait(lambda: browser.run("return document.querySelectorAll('.error').length") == 1)
        assert "context" in browser.run("return document.querySelector('.error').textContent")
        assert all("400 (Bad Request)" in line for line in browser.errors())


@pytest.mark.slow
def test_a_person_compares_images_with_a_tower(
    tower: Path, photos: list[Path], tmp_path: Path
) -> None:
    with Embedder.open(tower, threads=1, batch=1) as one:
        rows = normalised(
            np.stack([e.vector for e in one.embed(photos[:3]) if e.vector is not None])
        )
    expected = [f"{value:.3f}" for value in (rows @ rows.T).reshape(-1).tolist()]
    with opened(tower, Limits(), threads=1) as work, listening(work) as port, browsing() as browser:
        browser.open(f"http://127.0.0.1:{port}")
        browser.wait(lambda: not browser.run("return document.getElementById('similar').hidden"))
        assert browser.run("return document.getElementById('chat').hidden")
        browser.type("#file", "\n".join(map(str, photos[:3])))
        browser.wait(
            lambda: browser.run("return document.querySelectorAll('#drop img').length") == 3
        )
        browser.click("#embed")
        browser.wait(
            lambda: browser.run("return document.querySelectorAll('#near td').length") == 9
        )
        found = browser.run(
            "return [...document.querySelectorAll('#near td')].map(e => e.textContent)"
        )
        assert found == expected
        took = browser.run("return document.getElementById('took').textContent")
        assert "3 embeddings of 32 channels" in took
        place = os.environ.get("TOWER_PAGE_SCREENSHOT") or tmp_path / "page.png"
        browser.screenshot(Path(place))
        assert browser.errors() == []
