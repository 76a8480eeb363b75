"""Fused kernels on a graphics card: right in three number formats, and how fast.

    python -m benchmarks.gpu_kernels [--images 1,8] [--timed fp16] [--interpret]

Each kernel (engines/plugins) gets random inputs of a preset's shapes, other ones at each run, and
is compared with the same ops in float32. Then it is timed against torch as it stands (eager), one
torch.compile of the whole, and a torch.compile of each of the steps that TensorRT's builder makes
a kernel of (unfused). Its share is the time that its bytes or its products would take at the
bandwidth and matrix rate that the card showed first, over the time that it took. `--interpret`
runs the same on a few numbers, without a card, in Triton's interpreter.

Needs torch and Triton for CUDA, and nothing else; any Python from 3.10. Where edgevlm is not
installed, a folder on PYTHONPATH with a link `edgevlm` to the checkout will do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS

if TYPE_CHECKING:
    from edgevlm.engines.plugins.catalogue import Site
    from edgevlm.engines.plugins.work import Work

# Of the largest value: what fp16 and bf16 round to; a merge rounds the normed levels too.
MOST = {"fp32": 2e-5, "fp16": 1.5e-3, "bf16": 1.2e-2}
Step = Callable[..., Any]
Compile = Callable[[Step], Step]


@dataclass(frozen=True)
class Problem:
    """One kernel on given inputs.

    kernel: runs it. whole: the same in torch, of `inputs`. steps: makes that of functions that
    torch.compile has seen one by one.
    """

    site: Site
    work: Work
    kernel: Callable[[], Any]
    whole: Step
    steps: Callable[[Compile], Step]
    inputs: tuple[Any, ...]


# -- the ops in torch, in the builder's steps ------------------------------------------------------


def deform(site: Site, draw: Step, images: int) -> Problem:
    """Deformable attention: softmax, points, and sampling with both sums."""
    import torch
    import torch.nn.functional as F

    from edgevlm.engines.plugins.ms_deform_attn.kernel import run

    at: Any = site.at
    queries, grid = site.sizes[1], (at.height, at.width)
    split = (images, queries, at.num_heads, at.levels, at.num_points)
    each = at.num_heads * at.levels * at.num_points
    value = draw(images, at.levels * at.height * at.width, at.num_heads * at.head_dim)
    offsets, scores = 2 * draw(images, queries, 2 * each), draw(images, queries, each)
    reference = torch.rand(queries, 2, device=value.device)

    def shares(scores: Any) -> Any:
        joint = scores.float().reshape(*split[:3], -1).softmax(-1).reshape(split)
        return joint.permute(0, 2, 3, 1, 4).flatten(0, 2)[:, None]

    def points(offsets: Any, reference: Any) -> Any:
        size = torch.tensor(grid[::-1], device=offsets.device)
        moved = reference[:, None, None, None] + offsets.float().reshape(*split, 2) / size
        return (2 * moved - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

    def sampled(value: Any, at_points: Any, weights: Any) -> Any:
        cells = value.float().reshape(images, at.levels, *grid, at.num_heads, at.head_dim)
        pictures = cells.permute(0, 4, 1, 5, 2, 3).flatten(0, 2)
        weighted = F.grid_sample(pictures, at_points, align_corners=False) * weights
        apart = weighted.sum(-1).reshape(images, at.num_heads, at.levels, at.head_dim, queries)
        return apart.sum(2).permute(0, 3, 1, 2).flatten(2).to(value.dtype)

    def steps(compiled: Compile) -> Step:
        one, two, three = compiled(shares), compiled(points), compiled(sampled)
        return lambda value, offsets, scores, ref: three(value, two(offsets, ref), one(scores))

    inputs = (value, offsets, scores, reference)
    work = at.work(images, queries, name_of(value))
    return Problem(site, work, lambda: run(*inputs, at), steps(lambda f: f), steps, inputs)


def merge(site: Site, draw: Step, images: int) -> Problem:
    """Levels, each a tensor: joined and normed, then one product. The kernel gets them joined."""
    import torch
    import torch.nn.functional as F

    from edgevlm.engines.plugins.layer_merge.kernel import run

    at: Any = site.at
    n, hidden, tokens = at.levels, at.hidden_size, site.sizes[0]
    levels = [draw(images, tokens, hidden) + 2 for _ in range(n)]
    norm = 1 + draw(n, hidden) / 4, draw(n, hidden) / 4
    scale = draw(n)
    linear = draw(n * hidden, at.outputs) / hidden**0.5, draw(n, at.outputs)

    def normed(weight: Any, bias: Any, scale: Any, *levels: Any) -> Any:
        joined: Any = torch.cat(levels, 2)
        joined = joined.unflatten(2, (n, hidden))
        ready = F.layer_norm(joined, (hidden,), eps=at.epsilon) * (weight * scale[:, None])
        return (ready + bias * scale[:, None]).flatten(2)

    def product(ready: Any, weight: Any, bias: Any, scale: Any) -> Any:
        return ready @ weight + (bias * scale[:, None]).sum(0)

    def steps(compiled: Compile) -> Step:
        one, two = compiled(normed), compiled(product)
        return lambda *x: two(one(x[0], x[1], x[2], *x[5:]), x[3], x[4], x[2])

    inputs = (*norm, scale, *linear, *levels)
    work = at.work(images * tokens, name_of(scale))
    return Problem(
        site,
        work,
        lambda: run(torch.cat(levels, 2), *norm, scale, *linear, at),
        steps(lambda f: f),
        steps,
        inputs,
    )


def rotate(site: Site, draw: Step, images: int) -> Problem:
    """Queries, then keys."""
    import torch

    from edgevlm.engines.plugins.rotary.kernel import run

    at: Any = site.at
    tokens = site.sizes[1]
    q, k = (draw(images, tokens, at.num_heads * at.head_dim) for _ in range(2))
    angles = 30 * torch.randn(tokens, at.head_dim // 2, device=q.device)

    def turned(x: Any, angles: Any) -> Any:
        cos, sin = angles.cos(), angles.sin()
        a, b = x.unflatten(2, (at.num_heads, -1)).transpose(1, 2).float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def whole(q: Any, k: Any, angles: Any) -> Any:
        return turned(q, angles), turned(k, angles)

    def apart(compiled: Compile) -> Step:
        one = compiled(turned)
        return lambda q, k, angles: (one(q, angles), one(k, angles))

    work = at.work(images, tokens, name_of(q))
    return Problem(site, work, lambda: run(q, k, angles, at), whole, apart, (q, k, angles))


MAKERS = {"MSDeformAttn": deform, "LayerMerge": merge, "RotaryAttention": rotate}


# -- comparing and timing --------------------------------------------------------------------------


def name_of(tensor: Any) -> str:
    """A tensor's number format by our name."""
    names = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
    return names[str(tensor.dtype)]


def difference(problem: Problem) -> float:
    """The largest difference to the same in float32, as a share of the largest value."""
    found, expected = problem.kernel(), problem.whole(*(x.float() for x in problem.inputs))
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def timed_ms(run: Callable[[], Any], interpreted: bool) -> float:
    """The median over a tenth of a second, the cache emptied before each; one call interpreted."""
    if interpreted:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return float(do_bench(run, warmup=25, rep=100, return_mode="median"))


def times(problem: Problem, interpreted: bool) -> dict[str, float]:
    """Milliseconds of the kernel and of its three rivals."""
    import torch

    def compiled(step: Step) -> Step:
        return step if interpreted else torch.compile(step, dynamic=False)

    rivals = {"eager": problem.whole, "compiled": compiled(problem.whole)}
    rivals["unfused"] = problem.steps(compiled)
    found = {"kernel": timed_ms(problem.kernel, interpreted)}
    for name, rival in rivals.items():
        found[name] = timed_ms(lambda rival=rival: rival(*problem.inputs), interpreted)  # type: ignore[misc]
        torch.compiler.reset()
    return found


def limits(interpreted: bool) -> dict[str, float]:
    """Bytes a second that a copy moves, and operations a second of a product in fp16."""
    if interpreted:
        return {"bytes_s": 1e9, "flops_s": 1e9}
    import torch

    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = timed_ms(lambda: target.copy_(source), False)
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    multiplied = timed_ms(lambda: a @ b, False)
    return {"bytes_s": 2 * (1 << 28) / copied * 1e3, "flops_s": 2 * 8192**3 / multiplied * 1e3}


def measure(
    site: Site, images: int, asked: argparse.Namespace, card: dict[str, float]
) -> dict[str, Any]:
    """One line of the result: differences in all formats, times in one."""
    import torch

    formats = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

    def problem(dtype: str) -> Problem:
        device = "cpu" if asked.interpret else "cuda"

        def draw(*shape: int) -> Any:
            return torch.randn(shape, device=device).to(formats[dtype])

        return MAKERS[site.op](site, draw, images)

    row: dict[str, Any] = {"site": site.name, "images": images, "dtype": asked.timed}
    row["differences"] = {dtype: difference(problem(dtype)) for dtype in formats}
    timed = problem(asked.timed)
    row["ms"] = times(timed, asked.interpret)
    row["floor_ms"] = 1e3 * timed.work.floor_s(card["bytes_s"], card["flops_s"])
    row["share"] = row["floor_ms"] / row["ms"]["kernel"]
    row["right"] = all(row["differences"][d] < MOST[d] for d in formats)
    return row


def sites(interpreted: bool) -> Sequence[Site]:
    """The presets' calls; small ones for the interpreter."""
    from edgevlm.engines.plugins import catalogue

    if not interpreted:
        return catalogue.SITES
    return catalogue.SMALL[::2]


def main(arguments: Sequence[str]) -> int:
    """Measure, print and keep; 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels")
    parser.add_argument("--images", default="1,8")
    parser.add_argument("--timed", default="fp16", choices=MOST)
    parser.add_argument("--interpret", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # kernels read it when they are imported
    import torch
    import triton

    seed = random.SystemRandom().randrange(1 << 31)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    card = limits(asked.interpret)
    device = "the interpreter" if asked.interpret else torch.cuda.get_device_name()
    rows = []
    for site in sites(asked.interpret):
        for images in map(int, asked.images.split(",")):
            rows.append(measure(site, images, asked, card))
            print(json.dumps(rows[-1]), flush=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    about = {"device": device, "date": time.strftime("%Y-%m-%d"), "seed": seed}
    result = {**about, "versions": versions, "measured": card, "rows": rows}
    print(json.dumps(result))
    if not asked.interpret:
        (RESULTS / "gpu_kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
