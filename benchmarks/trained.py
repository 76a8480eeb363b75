"""What 8 and 4 bits cost a model whose weights were trained: on text, in answers, in pictures.

SmolLM2-135M-Instruct and DINOv2-small come inside Python packages (190 MB, downloaded the first
time); a random projector joins them to a LLaVA. Its engines in every number format are compared
with the float engine: the language model on windows of this project's documents and on twenty
plain questions, the tower on photographs of scikit-image and on CIFAR-10. Then: which inputs of
the language model's linears have outliers, and what would help.

SmolLM2 is published on a grid of 4 bits, which flatters 4-bit formats: so the same again with half
a step of noise on its linears.

--data: a folder with train.npz and test.npz, see benchmarks/questions.py; without it there is no
linear probe. --work keeps models and figures: what is there is not measured again.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import trained_answers as exact
from benchmarks import trained_models as models
from benchmarks import trained_outliers as outliers
from benchmarks import trained_remedies as remedies
from benchmarks import trained_text as texts
from benchmarks import trained_tower as tower
from benchmarks.common import Bar, Report, parser, workplace
from benchmarks.trained_models import FORMS, NOISE, NOISY, Text
from edgevlm.toolkit.terminal.console import table

PACKAGES = ("edgevlm", "onnxruntime", "numpy")
TOWERS = ("int8", "int8-blocks")  # of the forms
WATCHED = 3  # windows whose inputs are looked at
SHOWN = 4  # of the linears with the largest errors and outliers
RATIOS = ("channel_ratio", "token_ratio", "by_rows", "inputs_by_rows", "by_blocks", "by_tensor")
TITLES = {
    "photos": "tower, photos",
    "cifar10": "tower, CIFAR-10",
    "tower remedies": "rounded in NumPy, photos",
}
Figures = dict[str, Any]


def kept(work: Path, name: str, measure: Callable[[], Figures]) -> Figures:
    """What an earlier run with this folder measured, else what `measure` returns."""
    file = work / "figures" / f"{name}.json"
    if not file.exists():
        print(f"trained: {name}", file=sys.stderr, flush=True)
        found = measure()
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found))
    figures: Figures = json.loads(file.read_text(), parse_float=lambda x: float(f"{float(x):.5g}"))
    return figures


# -- measurements --------------------------------------------------------------------------------


def on_text(work: Path, text: Text, noise: str) -> Figures:
    """The language model in every form, beside that in float."""
    found: Figures = {}
    plain = models.engine(work, "float", noise, text.calibrating)
    reference = texts.Reference(plain.folder, text.windows, work / "reference.npy")
    for name in NOISY if noise else FORMS:
        made = models.engine(work, name, noise, text.calibrating)
        read = texts.as_run if made.engine.prompt_form else texts.at_once
        facts = {"format": made.format, "lm_mb": round(made.lm_mb, 1), "loss": made.loss}
        score = reference.compare(made.folder, read)
        found[name] = {**facts, "share_4_bits": made.share_4_bits, **asdict(score)}
    reference.close()
    return found


def on_remedies(work: Path, text: Text) -> Figures:
    """The language model in NumPy, its layers rounded in several ways."""
    plain = models.engine(work, "float", "", text.calibrating)
    reference = texts.Reference(plain.folder, text.windows, work / "reference.npy")
    model = remedies.LanguageModel(models.bundle(work, ""), text.others)
    found = {
        name: asdict(reference.score(model.log_probabilities(remedy, text.windows)))
        for name, remedy in remedies.REMEDIES.items()
    }
    reference.close()
    return found


def on_tower_remedies(work: Path, photos: Sequence[Any]) -> Figures:
    """The tower in NumPy on half of the photographs, with factors of the others."""
    half = len(photos) // 2
    eye = remedies.Tower(models.bundle(work, ""), photos[:half])
    plain = eye.features(None, photos[half:])
    return {
        name: asdict(tower.nearness(plain, eye.features(remedy, photos[half:])))
        for name, remedy in remedies.IN_TOWER.items()
    }


def on_questions(work: Path, text: Text) -> Figures:
    """Every form's answers."""
    return {
        name: texts.answers(models.engine(work, name, "", text.calibrating).folder)
        for name in FORMS
    }


def on_exactness(work: Path, text: Text) -> Figures:
    """How exact a model must be for the same answers."""
    plain = models.engine(work, "float", "", text.calibrating)
    found, leads = exact.measured(models.bundle(work, ""), plain.folder)
    return {"forms": {name: asdict(one) for name, one in found.items()}, "leads": leads}


def on_pictures(work: Path, text: Text, pictures: Sequence[Any]) -> Figures:
    """The tower's features of pictures, beside those in float."""
    plain, *others = (
        tower.features(models.engine(work, name, "", text.calibrating).folder, pictures)
        for name in ("float", *TOWERS)
    )
    return {
        name: asdict(tower.nearness(plain, found))
        for name, found in zip(TOWERS, others, strict=True)
    }


def on_classes(work: Path, text: Text, data: Path) -> Figures:
    """A linear classifier that was made on float's features, on those of float and of int8."""
    training, held = tower.cifar(data)
    labels, found = np.asarray(held.labels), {}
    plain = models.engine(work, "float", "", text.calibrating).folder
    classifier = tower.Classifier(
        tower.features(plain, training.files), np.asarray(training.labels)
    )
    before = classifier.classes(tower.features(plain, held.files))
    small = models.engine(work, "int8", "", text.calibrating).folder
    for name, said in (
        ("float", before),
        ("int8", classifier.classes(tower.features(small, held.files))),
    ):
        found[name] = asdict(tower.probe(before, said, labels))
    return found


def on_outliers(work: Path, text: Text) -> Figures:
    """Every linear of the language model's layers and its inputs."""
    found = outliers.of_model(models.bundle(work, ""), text.windows[:WATCHED])
    return {one.path: asdict(one) for one in found}


# -- report --------------------------------------------------------------------------------------


def report(measured: Figures) -> Report:
    """The language model's table, and all bars."""
    columns = ("form", "linears", "LM MB", "loss", "perplexity", "against float", "KL", "top 1")
    result = Report("trained", columns, PACKAGES, measured=dict(measured))
    for noise, part in (("", "text"), (NOISE, "text with noise")):
        for name, f in measured[part].items():
            change = f"{f['growth']:+.2%} +- {f['error']:.2%}" if name != "float" else "-"
            row = (name + noise, f["format"], f["lm_mb"], f["loss"], f"{f['perplexity']:.2f}")
            result.rows.append((*row, change, f"{f['kl']:.4f}", f"{f['same_top_1']:.1%}"))
    plain, noisy = measured["text"], measured["text with noise"]
    result.bars.append(Bar("perplexity's growth, int8", plain["int8"]["growth"], 0.01))
    for what, part in (("", plain), (NOISE, noisy)):
        f = part["int4 calibrated"]
        result.bars.append(Bar(f"perplexity's growth, int4 calibrated{what}", f["growth"], 0.05))
        share = Bar(f"share in 4 bits, calibrated{what}", f["share_4_bits"], 0.7, at_least=True)
        result.bars.append(share)
    same = alike(measured["answers"])
    asked = len(texts.QUESTIONS)
    result.bars.append(Bar(f"answers of {asked} as in float, int8", same["int8"], asked, True))
    for name in ("photos", "cifar10"):
        if name in measured:
            cosine = measured[name]["int8"]["mean"]
            result.bars.append(Bar(f"tower's cosine, int8, {name}", cosine, 0.999, at_least=True))
    if "probe" in measured:
        small, full = (measured["probe"][name]["accuracy"] for name in ("int8", "float"))
        result.bars.append(Bar("accuracy of the probe, change by int8", abs(small - full), 0.005))
    return result


def alike(answers: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many answers of each form are float's."""
    return {
        name: sum(a == b for a, b in zip(answers["float"], said, strict=True))
        for name, said in answers.items()
    }


def details(measured: Figures) -> list[str]:
    """Tables of what is not the language model's score."""
    same = alike(measured["answers"])
    asked = [(name, n, texts.right(measured["answers"][name])) for name, n in same.items()]
    lines = table((f"{len(texts.QUESTIONS)} questions", "as in float", "right"), asked)
    lines += ["", *texts.changed(measured["answers"])]
    exactness = [
        (name, f"{f['kl']:.5f}", f"{f['tokens']:.1%}", f["same"])
        for name, f in measured["exactness"]["forms"].items()
    ]
    lines += ["", *table(("rounded in NumPy", "KL", "tokens as in float", "answers"), exactness)]
    leads = sorted(measured["exactness"]["leads"])
    lines.append("least leads of a token: " + ", ".join(f"{lead:.3f}" for lead in leads))
    for name in TITLES:
        columns = (TITLES[name], "pictures", "cosine", "least", "rms")
        rows = [
            (form, f["pictures"], f"{f['mean']:.5f}", f"{f['least']:.4f}", f"{f['rms']:.4f}")
            for form, f in measured.get(name, {}).items()
        ]
        lines += ["", *table(columns, rows)]
    probes = [
        (form, f"{f['accuracy']:.1%}", f"{f['same']:.1%}", f"{f['error']:.2%}")
        for form, f in measured.get("probe", {}).items()
    ]
    lines += ["", *table(("probe", "accuracy", "same class", "error of the change"), probes)]
    return [*lines, "", *_outliers(measured["outliers"]), "", *_remedies(measured["remedies"])]


def _remedies(found: Figures) -> list[str]:
    rows = [
        (
            name,
            f"{f['growth']:+.2%} +- {f['error']:.2%}",
            f"{f['kl']:.4f}",
            f"{f['same_top_1']:.1%}",
        )
        for name, f in found.items()
    ]
    return table(("layers rounded in NumPy", "perplexity", "KL", "top 1"), rows)


def _outliers(found: Figures) -> list[str]:
    standing = _standing_out(found)
    return table(("linear", *RATIOS), [(name, *f.values()) for name, f in standing.items()])


def _standing_out(found: Figures) -> Figures:
    """Medians over the layers for each kind of linear; then the linears that stand out."""
    every = [outliers.Linear(**f) for f in found.values()]
    rows: Figures = {}
    for kind, ones in outliers.by_kind(every).items():
        middle = {name: float(np.median([getattr(x, name) for x in ones])) for name in RATIOS}
        rows[f"{kind}, median"] = middle
    by_error = sorted(every, key=lambda one: -one.by_rows)[:SHOWN]
    by_ratio = sorted(every, key=lambda one: -one.channel_ratio)[:SHOWN]
    for one in (*by_error, *by_ratio):
        where = f"{one.path} (channel {one.channel}, token {one.token})"
        rows[where] = {name: getattr(one, name) for name in RATIOS}
    return rows


# -- command line --------------------------------------------------------------------------------


def run(options: Namespace, work: Path) -> int:
    """Everything that was not measured before; 1 if a bar does not hold."""
    text = models.text(work)
    measured: Figures = {
        "packages": models.PACKAGES,
        "text_sha256": text.sha256,
        "side": models.SIDE,
    }
    parts: dict[str, Callable[[], Figures]] = {
        "text": lambda: on_text(work, text, ""),
        "answers": lambda: on_questions(work, text),
        "exactness": lambda: on_exactness(work, text),
        "outliers": lambda: on_outliers(work, text),
        "remedies": lambda: on_remedies(work, text),
        "text with noise": lambda: on_text(work, text, NOISE),
    }
    if photos := tower.photos():
        parts["photos"] = lambda: on_pictures(work, text, photos)
        parts["tower remedies"] = lambda: on_tower_remedies(work, photos)
    if options.data is not None:
        held = tower.cifar(options.data)[1].first(tower.PICTURES)
        parts["cifar10"] = lambda: on_pictures(work, text, held.files)
        parts["probe"] = lambda: on_classes(work, text, options.data)
    measured |= {name: kept(work, name, measure) for name, measure in parts.items()}
    result = report(measured)
    result.measured |= {
        "outliers": _standing_out(measured["outliers"]),
        "calibrations": [models.calibration(work, noise) for noise in ("", NOISE)],
    }
    if not photos:
        result.notes.append("photos: skipped: scikit-image's are not installed")
    if options.data is None:
        result.notes.append("cifar10 and probe: skipped: no pictures were named (--data FOLDER)")
    if not options.json:
        print(*details(measured), "", sep="\n")
    return 0 if result.finish(options) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--data", type=Path, help="a folder with train.npz and test.npz")
    options = command_line.parse_args(arguments)
    with workplace(options) as work:
        if lacking := models.lacks(work):
            print(f"trained: skipped: {lacking}")
            return 0
        return run(options, work)


if __name__ == "__main__":
    sys.exit(main())
