"""edgevlm: the function behind `edgevlm profile`, with a clock of the process for one thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from unittest import mock

import onnxruntime
from PIL import Image

from benchmarks.common import Moment, wait_until_quiet
from benchmarks.compare_peers import side
from benchmarks.compare_peers.side import ANSWER, TEXT_TOKENS, Line
from edgevlm import __version__
from edgevlm.engines.profiling.profile import Profile, ProfileRequest, profile_all
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.images.decode import LoadedImage

BEFORE = ("image_decode", "preprocess")  # stages that do not belong to the encoder


def laps(profile: Profile, shares: Sequence[float], clock: str) -> Line:
    """A profile's samples as the other programs' laps; the other clock has none."""
    versions = {"edgevlm": __version__, "onnxruntime": onnxruntime.__version__}
    load = profile.load_ms / 1000
    line = Line(load, load, versions, profile.prompt_tokens, profile.peak_rss_mb)
    stages = {name: values for name, values in profile.samples.items() if name != "decode"}
    encoding = [name for name in stages if name not in (*BEFORE, "prefill")]
    steps = ANSWER - 1
    for run, share in enumerate(shares):
        decode = profile.samples["decode"][run * steps : (run + 1) * steps]
        figures = {
            "first_token": sum(values[run] for values in stages.values()),
            "encoder": sum(stages[name][run] for name in encoding),
            "token": sum(decode) / steps,
        }
        for name, ms in figures.items():
            line.laps.setdefault(name, []).append({clock: ms / 1000, "elsewhere": share})
    return line


def main() -> None:
    """As `side.measure`, which this program has of its own."""
    options = side.arguments()
    picture = options.model.parent / "image.png"
    request = ProfileRequest(
        picture, TEXT_TOKENS, ANSWER, options.runs, warmup=1, threads=options.threads
    )
    since, shares = [Moment.now()], list[float]()

    def between(message: str) -> None:
        if message.startswith("run "):
            shares.append(since[0].share_elsewhere())
        wait_until_quiet(options.patience)
        since[0] = Moment.now()

    clock = "cpu_s" if options.threads == 1 else "wall_s"
    counter = time.process_time if options.threads == 1 else time.perf_counter
    patched = partial(mock.patch, "edgevlm.engines.runtime.clock.time")
    with patched(SimpleNamespace(perf_counter=counter)):
        (profile,) = profile_all([options.model], request, between)
    line = laps(profile, shares, clock)
    with Session.open(options.model, threads=options.threads) as session:
        image = LoadedImage(Image.fromarray(side.image(0)))
        line.features = side.fingerprint(session.encode([image], Clock()).rows)
    line.print()


if __name__ == "__main__":
    main()
