"""The language model alone in float32: read 608 tokens, then write 64, greedily, one user.

The same shapes run through edgevlm, onnxruntime-genai and transformers, each in a process of its
own, in turn. 576 of our 608 positions hold image features, as they do after an image. A run
counts as undisturbed if other programs used less than 5 % of the processors meanwhile; where
there are three such runs the others are dropped.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.common import (
    QUIET_SHARE,
    Bar,
    Moment,
    Report,
    Spread,
    child,
    edgevlm,
    parser,
    spread,
    version,
    wait_until_quiet,
    workplace,
)

PROMPT, IMAGE, ANSWER = 608, 576, 64
VOCABULARY = 20_000
# Reads the prompt and writes N tokens: seconds until the first, seconds for the others.
Answer = Callable[[int], tuple[float, float]]


# -- in the child ------------------------------------------------------------------------------


def edgevlm_answer(model: Path, threads: int) -> Answer:
    """An engine's language model through the calls of a session's reply."""
    import numpy as np

    from edgevlm.engines import backends, manifest
    from edgevlm.engines.backends import RunnerOptions
    from edgevlm.engines.runtime.sampling import Sampling, sampler
    from edgevlm.engines.runtime.session import Session
    from edgevlm.toolkit.text import prompts
    from edgevlm.toolkit.text.prompts import Prompt

    engine = manifest.read(model)
    record = next(c for c in engine.components if c.name == "lm")
    options = RunnerOptions(engine.context, threads)
    opened = backends.backend(engine.parsed_target()).open(model, record, engine.model, options)
    session = Session(model, engine, {"lm": opened}, 0.0)
    generator = np.random.default_rng(0)
    ids = tuple(generator.integers(0, VOCABULARY, PROMPT - IMAGE).tolist())
    sequence = prompts.assemble(Prompt((ids[:1], ids[1:])), [np.arange(IMAGE)])
    width = session.model.lm.config.hidden_size
    features = generator.standard_normal((IMAGE, width), np.float32)
    state, sample = session.new_state(), sampler(Sampling())

    def answer(count: int) -> tuple[float, float]:
        begin = time.perf_counter()
        token = sample(session.prefill(sequence, features, state))
        first = time.perf_counter()
        for step in range(count - 1):
            token = sample(session.decode(token, sequence.length + step, state))
        return first - begin, time.perf_counter() - first

    return answer


def genai_answer(model: Path, threads: int) -> Answer:
    """onnxruntime-genai's generator; its threads are in the model's own settings."""
    import numpy as np
    import onnxruntime_genai as og

    loaded = og.Model(str(model))
    ids = np.random.default_rng(0).integers(0, VOCABULARY, PROMPT).astype(np.int32)

    def answer(count: int) -> tuple[float, float]:
        search = og.GeneratorParams(loaded)
        length = PROMPT + count
        search.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=1
        )
        generator = og.Generator(loaded, search)
        begin = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        return first - begin, time.perf_counter() - first

    return answer


def transformers_answer(model: Path, threads: int) -> Answer:
    """transformers with PyTorch's fused attention and its cache, called without `generate`."""
    import torch

    transformers: Any = import_module("transformers")
    torch.set_num_threads(threads)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    ids = torch.randint(0, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def answer(count: int) -> tuple[float, float]:
        begin = time.perf_counter()
        out = loaded(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        int(token)
        first = time.perf_counter()
        for _ in range(count - 1):
            out = loaded(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            int(token)
        return first - begin, time.perf_counter() - first

    typed: Answer = answer
    return typed


SIDES: dict[str, Callable[[Path, int], Answer]] = {
    "edgevlm": edgevlm_answer,
    "onnxruntime-genai": genai_answer,
    "transformers": transformers_answer,
}


@dataclass(frozen=True)
class Sample:
    """One answer: seconds to the first token, tokens per second after it, share used by others."""

    prefill_s: float
    tokens_per_s: float
    elsewhere: float


def work(side: str, model: Path, options: Namespace) -> dict[str, Any]:
    """What a child does: load, one short answer to warm up, then the timed ones."""
    before = Moment.now()
    answer = SIDES[side](model, options.threads)
    loaded = {"load_s": time.time() - options.since, "load_elsewhere": before.share_elsewhere()}
    answer(4)
    samples = []
    for _ in range(options.runs):
        wait_until_quiet(options.patience)
        before = Moment.now()
        prefill, decode = answer(ANSWER)
        rate = (ANSWER - 1) / decode
        samples.append(asdict(Sample(prefill, rate, before.share_elsewhere())))
    return loaded | {"samples": samples}


# -- in the parent -----------------------------------------------------------------------------


@dataclass
class Collected:
    """All rounds of one side."""

    samples: list[Sample]
    load: list[tuple[float, float]]
    peak_rss_mb: list[float]

    def summary(self) -> dict[str, Spread]:
        """Spreads by name, over undisturbed runs where there are enough."""
        samples = undisturbed(self.samples, [s.elsewhere for s in self.samples])
        loads = undisturbed(self.load, [elsewhere for _, elsewhere in self.load])
        return {
            "prefill_s": spread([s.prefill_s for s in samples]),
            "tokens_per_s": spread([s.tokens_per_s for s in samples], 2),
            "load_s": spread([seconds for seconds, _ in loads]),
            "peak_rss_mb": spread(self.peak_rss_mb, 0),
            "elsewhere": spread([s.elsewhere for s in samples]),
        }


def undisturbed(items: list[Any], elsewhere: list[float]) -> list[Any]:
    """The items that were measured in quiet if there are three of them, else all."""
    quiet = [i for i, share in zip(items, elsewhere, strict=True) if share < QUIET_SHARE]
    return quiet if len(quiet) >= 3 else items


def prepare(work: Path, threads: int) -> dict[str, Path]:
    """The model of every side that is installed."""
    bundle, checkpoint = work / "bundle-0.5b", work / "checkpoint-0.5b"
    models = {"edgevlm": work / "engine-0.5b"}
    preset = ("preset:llava-qwen2-0.5b", "--random-weights", "--max-context", "2048")
    if not bundle.exists():
        edgevlm("export", *preset, bundle)
    edgevlm("build", bundle, models["edgevlm"])
    if version("transformers"):
        models["transformers"] = checkpoint
        if not checkpoint.exists():
            peers.make("checkpoint", str(checkpoint))
        if version(peers.GENAI_PACKAGE):
            models[peers.GENAI_PACKAGE] = work / f"genai-0.5b-{threads}"
            if not models[peers.GENAI_PACKAGE].exists():
                peers.make("genai", str(checkpoint), str(models[peers.GENAI_PACKAGE]), str(threads))
    return models


def measure(models: dict[str, Path], options: Namespace) -> dict[str, Collected]:
    """Every side in turn, `rounds` times."""
    collected = {side: Collected([], [], []) for side in models}
    for _ in range(options.rounds):
        for side, model in models.items():
            wait_until_quiet(options.patience)
            names = ("runs", "threads", "patience")
            settings = [f"--{name}={getattr(options, name)}" for name in names]
            command = [sys.executable, "-m", "benchmarks.lm_decode", *settings]
            done = child([*command, f"--since={time.time()}", f"--side={side}", f"--model={model}"])
            data = json.loads(done.stdout.splitlines()[-1])
            collected[side].samples += [Sample(**s) for s in data["samples"]]
            collected[side].load.append((data["load_s"], data["load_elsewhere"]))
            collected[side].peak_rss_mb.append(done.peak_rss_mb)
    return collected


def report(collected: dict[str, Collected], options: Namespace) -> Report:
    """Medians, ratios and bars."""
    result = Report(
        "lm_decode",
        ("side", "prefill s", "tokens/s", "load s", "peak MB", "others' share"),
        ("edgevlm", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "numpy"),
    )
    sides = {side: runs.summary() for side, runs in collected.items()}
    for side, spreads in sides.items():
        result.rows.append((side, *spreads.values()))
        result.measured[side] = spreads | {"samples": [asdict(s) for s in collected[side].samples]}
    ours = sides.pop("edgevlm")
    for side, theirs in sides.items():
        ratios = {name: ours[name].median / theirs[name].median for name in list(ours)[:4]}
        result.measured[f"edgevlm / {side}"] = {k: round(v, 3) for k, v in ratios.items()}
        what = f"edgevlm / {side}"
        result.bars.append(Bar(f"prefill seconds, {what}", ratios["prefill_s"], 1.0))
        result.bars.append(Bar(f"decode tokens/s, {what}", ratios["tokens_per_s"], 1.0, True))
    result.measured["threads"] = options.threads
    missing = [side for side in SIDES if side not in collected]
    result.notes = [f"skipped, not installed: {side}" for side in missing]
    return result


def bench(options: Namespace) -> bool:
    """Make the models, measure, report; whether all bars hold."""
    with workplace(options) as folder:
        models = prepare(folder, options.threads)
        return report(measure(models, options), options).finish(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=3, help="processes of each side")
    command_line.add_argument("--runs", type=int, default=2, help="timed answers of each process")
    command_line.add_argument("--threads", type=int, default=2)
    command_line.add_argument(
        "--patience", type=float, default=20.0, help="wait for quiet, seconds"
    )
    child_only = command_line.add_argument_group("used by the benchmark itself")
    child_only.add_argument("--side", choices=list(SIDES))
    child_only.add_argument("--model", type=Path)
    child_only.add_argument("--since", type=float)
    options = command_line.parse_args(arguments)
    if options.side:
        print(json.dumps(work(options.side, options.model, options)))
        return 0
    return 0 if bench(options) else 1


if __name__ == "__main__":
    sys.exit(main())
