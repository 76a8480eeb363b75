"""`edgevlm embed` in int8 beside transformers and torch in bfloat16: CLIP-L/14-336, photographs.

A random CLIPVisionModel is saved once; both read that folder. Photographs are JPEG files of 640 x
480, crops of scikit-image's pictures. Each program is a process of its own, both in turn; opening
is not counted. Ours is the work of the command itself, decoding ahead in threads; the other one
opens files, preprocesses with the processor that transformers saves, and runs batches of --batch
without gradients. Wall time is the program's own; CPU seconds, of the whole process less those
before its first image, are what other work on a machine changes least (take --threads 1 for them).
Takes 5 GB of disk.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Bar,
    Report,
    child,
    edgevlm,
    parser,
    spread,
    wait_until_quiet,
    workplace,
)

OURS, THEIRS = "edgevlm embed, int8", "transformers, bfloat16"
BAR = 1.5


def photographs(folder: Path, count: int) -> None:
    """`count` JPEG files of 640 x 480."""
    import numpy as np
    from PIL import Image
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    names = ("astronaut", "chelsea", "coffee", "rocket")
    pictures = [Image.fromarray(getattr(data, name)()) for name in names]
    draws = np.random.default_rng(0)
    for number in range(count):
        file = folder / f"{number:05d}.jpg"
        if file.exists():
            continue
        picture = pictures[number % len(pictures)]
        width = int(draws.integers(200, min(picture.width, picture.height * 4 // 3)))
        left = int(draws.integers(0, picture.width - width + 1))
        top = int(draws.integers(0, picture.height - width * 3 // 4 + 1))
        box = (left, top, left + width, top + width * 3 // 4)
        picture.crop(box).resize((640, 480), Image.Resampling.BICUBIC).save(file, quality=90)


def checkpoint(folder: Path) -> None:
    """A random CLIPVisionModel with the sizes of CLIP-L/14-336, and its processor."""
    import torch
    import transformers

    hf: Any = transformers
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
             "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes)).save_pretrained(folder)
    edge = {"height": 336, "width": 336}
    processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=edge)
    processor.save_pretrained(folder)


def theirs(model: Path, photos: Path, batch: int, threads: int, out: Path) -> dict[str, float]:
    """Embeddings by transformers; what it took."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    hf: Any = transformers
    torch.set_num_threads(threads)
    tower = hf.CLIPVisionModel.from_pretrained(model, dtype=torch.bfloat16).eval()
    processor = hf.CLIPImageProcessorPil.from_pretrained(model)
    files = sorted(photos.glob("*.jpg"))
    started, used, rows = time.perf_counter(), time.process_time(), []
    with torch.inference_mode():
        for start in range(0, len(files), batch):
            images = [Image.open(file).convert("RGB") for file in files[start : start + batch]]
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            rows.append(tower(pixel_values=pixels.bfloat16()).pooler_output.float().numpy())
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    np.savez(out, embeddings=np.concatenate(rows))
    return {"seconds": seconds, "cpu_s": cpu}


def ours(engine: Path, photos: Path, batch: int, threads: int, out: Path) -> dict[str, float]:
    """The command's own work, called as the command line calls it, to see its CPU seconds."""
    from edgevlm.engines.runtime import embed_files, image_list

    used: list[float] = []
    result = embed_files.embed_files(
        engine, image_list.gather([photos], None), out, normalize=False, batch=batch,
        threads=threads, done=lambda count: used.append(time.process_time()),
    )  # fmt: skip
    return {"seconds": result.seconds, "cpu_s": used[-1] - used[0]}


def prepared(work: Path, count: int) -> dict[str, Path]:
    """What each program reads."""
    model, photos = work / "clip-l-336", work / f"photos-{count}"
    photographs(photos, count)
    if not (model / "preprocessor_config.json").exists():
        child([sys.executable, "-m", "benchmarks.embed", "--make", str(model)])
    if not (work / "embed-engine").exists():
        edgevlm("export", model, work / "embed-bundle", "--force")
        edgevlm("build", work / "embed-bundle", work / "embed-engine", "--precision", "int8")
    return {OURS: work / "embed-engine", THEIRS: model, "photos": photos}


def agreement(work: Path) -> float:
    """The lowest cosine between embeddings of the two programs."""
    import numpy as np

    found = [np.load(work / f"{name}.npz")["embeddings"] for name in ("ours", "theirs")]
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in found)
    return float((a * b).sum(1).min())


def measure(options: Namespace, work: Path) -> Report:
    """Both programs in turn, `--rounds` times."""
    places = prepared(work, options.images)
    found: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for _ in range(options.rounds):
        for name, side, out in ((OURS, "ours", "ours"), (THEIRS, "theirs", "theirs")):
            file = work / f"{out}.npz"
            file.unlink(missing_ok=True)
            words = [side, str(places[name]), str(places["photos"]), str(file)]
            settings = ["--batch", str(options.batch), "--threads", str(options.threads)]
            wait_until_quiet(5)
            command = [sys.executable, "-m", "benchmarks.embed", *settings, "--side", *words]
            found[name].append(json.loads(child(command).stdout))
    report = Report("embed", ("program", "images/s", "CPU s an image"), ("torch", "transformers"))
    count, rates, costs = options.images, {}, {}
    for name, runs in found.items():
        rates[name] = spread([count / run["seconds"] for run in runs])
        costs[name] = spread([run["cpu_s"] / count for run in runs])
        report.rows.append((name, str(rates[name]), str(costs[name])))
        report.measured[name] = {"images_per_s": rates[name], "cpu_s_per_image": costs[name]}
    report.notes.append(
        f"{count} images, batches of {options.batch}, {options.threads} threads; "
        f"lowest cosine between the two: {agreement(work):.5f}"
    )
    report.bars.append(Bar("images/s of ours to theirs", rates[OURS].median / rates[THEIRS].median,
                           BAR, at_least=True))  # fmt: skip
    report.bars.append(Bar("CPU s of theirs to ours", costs[THEIRS].median / costs[OURS].median,
                           BAR, at_least=True))  # fmt: skip
    return report


def main() -> None:
    """The command line; exits with 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--images", type=int, default=1000)
    command_line.add_argument("--rounds", type=int, default=1)
    command_line.add_argument("--batch", type=int, default=8)
    command_line.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    command_line.add_argument("--make", type=Path, help="write the random checkpoint there")
    command_line.add_argument("--side", nargs=4, help="one program: NAME FOLDER PHOTOS OUT")
    options = command_line.parse_args()
    if options.make is not None:
        checkpoint(options.make)
    elif options.side is not None:
        name, *paths = options.side
        folder, photos, out = map(Path, paths)
        run = ours if name == "ours" else theirs
        print(json.dumps(run(folder, photos, options.batch, options.threads, out)))
    else:
        with workplace(options) as work:
            sys.exit(0 if measure(options, work).finish(options) else 1)


if __name__ == "__main__":
    main()
