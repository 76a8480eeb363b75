"""The demo's page: held-out scenes with the answers of the engine, in one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO

from edgevlm.training.digits.exam import KINDS, Graded, Scores
from edgevlm.training.digits.scenes import SIDE, Box, Scene, read_box

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2127; background: #fff }
table { border-collapse: collapse } td, th { padding: .2rem 1.2rem .2rem 0; text-align: right }
th:first-child, td:first-child { text-align: left }
.scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.5rem }
.scenes svg { width: 100%; height: auto; display: block } image { image-rendering: pixelated }
ul { list-style: none; margin: .4rem 0; padding: 0; font-size: .85rem } .wrong { color: #b3261e }
.note { color: #5c6670 } .curve { width: 100%; height: 9rem; background: #f5f6f8 }
"""
_TRAINED = """<h1>A vision-language model that learned digits here</h1>
<p>It began with random weights, was trained on this machine, and answers from an engine that needs
no PyTorch. It had seen none of these scenes, and no digit drawn like those in them.</p>"""
_UNTRAINED = """<h1>A vision-language model with random weights</h1>
<p>It was not trained, so that its answers are noise. They come from an engine that needs no
PyTorch; all but the weights is as in a trained model.</p>"""
_RIGHT, _WRONG, _TRUTH = "#57d98a", "#ff6b5e", "#8a97a6"


def page(
    scenes: Sequence[Scene],
    graded: Sequence[Sequence[Graded]],
    scores: Mapping[str, Scores],
    losses: Sequence[tuple[int, float]],
) -> str:
    """The page. graded: what the engine answered about each scene; scores: by engine; losses: of
    logged steps, none of a model that was not trained.
    """
    told = _TRAINED if losses else _UNTRAINED
    curve = f"<h2>Loss while it learned</h2>{_curve(losses)}" if losses else ""
    shown = "".join(_scene(one, answers) for one, answers in zip(scenes, graded, strict=True))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>edgevlm: pictures of digits</title><style>{_STYLE}</style>
{told}
{_table(scores)}
<h2>Scenes it had never seen</h2>
<p class="note">Boxes are the engine's answers to &ldquo;Where is it?&rdquo;: green where they
overlap the digit by half or more, red where not. Dashed: the digit's true box.</p>
<div class="scenes">{shown}</div>
{curve}
</html>
"""


def _table(scores: Mapping[str, Scores]) -> str:
    head = "".join(f"<th>{kind}</th>" for kind in KINDS)
    rows = ""
    for engine, score in scores.items():
        cells = "".join(f"<td>{score.share(kind):.1%}</td>" for kind in KINDS)
        rows += f"<tr><td>{html.escape(engine)}</td>{cells}</tr>"
    return f"<table><tr><th>right answers</th>{head}</tr>{rows}</table>"


def _scene(scene: Scene, answers: Sequence[Graded]) -> str:
    boxes = "".join(_rectangle(digit.box, _TRUTH, dashed=True) for digit in scene.digits)
    lines = ""
    for one in answers:
        box = read_box(one.answer)
        if one.kind == "pointing" and box is not None:
            boxes += _rectangle(box, _RIGHT if one.right else _WRONG)
        told = f"{html.escape(one.question)} <b>{html.escape(one.answer)}</b>"
        correct = "" if one.right else f" <span class='wrong'>not {html.escape(one.truth)}</span>"
        lines += f"<li>{told}{correct}</li>"
    picture = f'<image href="{_data(scene)}" width="{SIDE}" height="{SIDE}"/>'
    return (
        f'<figure style="margin:0"><svg viewBox="0 0 {SIDE} {SIDE}">{picture}{boxes}</svg>'
        f"<ul>{lines}</ul></figure>"
    )


def _rectangle(box: Box, colour: str, *, dashed: bool = False) -> str:
    left, top, right, bottom = (corner * SIDE for corner in box)
    dash = ' stroke-dasharray="1.2 1"' if dashed else ""
    return (
        f'<rect x="{left:.2f}" y="{top:.2f}" width="{max(right - left, 0):.2f}" '
        f'height="{max(bottom - top, 0):.2f}" fill="none" stroke="{colour}" '
        f'stroke-width=".5"{dash}/>'
    )


def _data(scene: Scene) -> str:
    """The scene as a PNG inside a link."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(scene.pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _curve(losses: Sequence[tuple[int, float]]) -> str:
    """Loss over steps as a line, from 0 to its largest value."""
    most, last = max(loss for _, loss in losses), losses[-1][0]
    points = " ".join(
        f"{step / last * 100:.2f},{40 - 38 * loss / most:.2f}" for step, loss in losses
    )
    return (
        '<svg class="curve" viewBox="0 0 100 40" preserveAspectRatio="none"><polyline '
        f'points="{points}" fill="none" stroke="#2f6fdb" stroke-width="1.5" '
        'vector-effect="non-scaling-stroke"/></svg>'
        f'<p class="note">{losses[0][1]:.2f} at step {losses[0][0]}, {losses[-1][1]:.2f} at step '
        f"{last}: the mean of -log(probability) of the right token.</p>"
    )
