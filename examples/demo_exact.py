"""Every step on a model of one megabyte, and its answer is the original code's, token for token.

python -m examples.demo_exact [OUT]     writes into OUT, by default demo-exact-out/
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from examples.steps import ROOT, command, output, run, say, title

CASE = Path("tests/goldens/e2e_llava15")
CHECKPOINT, IMAGE = CASE / "llava-v1.5-tiny", CASE / "image.png"


def main() -> int:
    """Run the six steps; 1 if the answer is not the original code's."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-exact-out")
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    bundle, engine = out / "bundle", out / "engine"
    introduce()
    step_export(bundle)
    step_build(bundle, engine)
    agrees = step_original_image(engine)
    step_photograph(engine, out)
    step_8_bits(bundle, out)
    step_profile(engine, out)
    farewell(engine, out)
    return 0 if agrees else 1


def introduce() -> None:
    """Explain what the demo does, and what its answers mean."""
    say(
        "edgevlm takes a vision-language model from its training checkpoint to an engine that "
        "runs without PyTorch. This demo takes every step with a LLaVA-1.5 of 0.3 million "
        "parameters in its original checkpoint layout."
    )
    say(
        "Its weights are RANDOM, so its answers are gibberish. What can be checked is that they "
        "are exactly the gibberish of the original LLaVA code, whose answer with the same weights "
        "is stored with them."
    )


def step_export(bundle: Path) -> None:
    """Checkpoint -> bundle."""
    title(1, "export: read the checkpoint, write a bundle")
    run("export", CHECKPOINT, bundle, "--force")
    say(
        f"{bundle} holds one ONNX graph per component, the weights as safetensors, the tokenizer, "
        "and small inputs with the answers of a NumPy reference (the goldens)."
    )


def step_build(bundle: Path, engine: Path) -> None:
    """Bundle -> engine, with the interesting part of the lowering table."""
    title(2, "build: compile the bundle for this machine's processor")
    lines = output("build", bundle, engine, "--force", "--explain").splitlines()
    kept = [line for line in lines if "  keep  " in line]
    print("\n".join(line for line in lines if line not in kept))
    print(f"(not shown: {len(kept)} kinds of standard ops that are kept)")
    say(
        "Ops for which this target has faster ones were swapped. Then the goldens were replayed: "
        "an engine that differs from the reference is refused, not written."
    )


def step_original_image(engine: Path) -> bool:
    """The golden's question and image; True if the tokens are the original code's."""
    title(3, "run: the same question that the original LLaVA code was asked")
    answer, expected, equal = ask_as_the_original(engine)
    print(f"answer           {answer['text']!r}")
    print(f"its tokens       {answer['token_ids']}")
    print(f"the original's   {expected}")
    agrees = bool(answer["token_ids"] == expected)
    say(
        f"{equal} of {len(expected)} tokens are equal"
        + ("." if agrees else ": THIS IS A DEFECT. Please report it.")
        + f" The prompt took {answer['prompt_tokens']} tokens, "
        f"{answer['image_tokens']} of them made from the image."
    )
    return agrees


def ask_as_the_original(engine: Path) -> tuple[dict[str, Any], list[int], int]:
    """The output of `run` for the golden's question, the original's tokens, and how many agree."""
    question = json.loads((ROOT / CASE / "case.json").read_text())["question"]
    expected = [int(i) for i in np.load(ROOT / CASE / "outputs.npz")["greedy_ids"]]
    words = ["run", engine, question, "--image", IMAGE, "--max-tokens", len(expected), "--json"]
    answer: dict[str, Any] = json.loads(output(*words))
    equal = sum(a == b for a, b in zip(answer["token_ids"], expected, strict=False))
    return answer, expected, equal


def step_8_bits(bundle: Path, out: Path) -> None:
    """The same bundle with weights in 8 bits."""
    title(5, "build again with weights in 8 bits")
    engine = out / "engine-int8"
    made = json.loads(
        output("build", bundle, engine, "--precision", "int8", "--keep-slower", "--force", "--json")
    )
    sizes = [
        sum(f["nbytes"] for name, f in files.items() if name.endswith(".safetensors"))
        for files in (
            json.loads((ROOT / bundle / "manifest.json").read_text())["files"],
            made["files"],
        )
    ]
    print(f"weights          {sizes[0] / 1e6:.2f} MB in float32, {sizes[1] / 1e6:.2f} MB now")
    kernels, losses = (
        max(made["build"][name].values()) for name in ("kernel_differences", "precision_losses")
    )
    print(f"differences      {losses:.1%} (rms) from the float model; kernels alone {kernels:.1%},")
    print("                 because they round their inputs to 8 bits too")
    answer, expected, _ = ask_as_the_original(engine)
    pairs = zip(answer["token_ids"], expected, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected))
    say(
        f"The first {same} of {len(expected)} tokens are still the original's"
        + (
            "."
            if same == len(expected)
            else "; then two tokens were almost equally likely, as "
            "is common with random weights, and another token leads to another text."
        )
        + " Convolutions, norms and positions stay in float; --precision int4 is smaller still."
    )


def step_photograph(engine: Path, out: Path) -> None:
    """A photograph of an ordinary size."""
    title(4, "run: a real photograph")
    photo = photograph(out)
    run("run", engine, "What animal is this?", "--image", photo, "--max-tokens", 24)
    say(
        "Gibberish again. The photograph (a cat) was padded to a square and scaled exactly as the "
        "original does it. With trained weights the commands are the same."
    )


def step_profile(engine: Path, out: Path) -> None:
    """Show where the time goes."""
    title(6, "profile: where each millisecond goes")
    page = out / "profile.html"
    run("profile", engine, "--image", out / "chelsea.png", "--html", page, "--quiet")
    say(
        "The floor is the shortest time that this machine's measured arithmetic and memory rate "
        "allow for a stage; reached is floor over measured. A model this small is all overhead; "
        f"floors matter for real ones. {page} shows the same as a page."
    )


def farewell(engine: Path, out: Path) -> None:
    """Suggest what to do next."""
    title(7, "what to try next")
    ask = command("run", engine, "What do you see?", "--image", "YOUR.jpg", "--json")
    shape = command("export", "preset:llava-qwen2-0.5b", out / "half", "--random-weights")
    print(f"your own image         {ask}")
    print(f"your own checkpoint    {command('export', 'CHECKPOINT_FOLDER', 'BUNDLE')}")
    print(f"a real size (3.1 GB)   {shape}")
    print(f"what this machine has  {command('doctor')}")
    print("every verb and option  docs/cli.md")
    print("the test suite         make test")


# -- helpers -----------------------------------------------------------------------------------


def photograph(out: Path) -> Path:
    """Chelsea the cat, by Stéfan van der Walt (CC0), copied from scikit-image's package."""
    package = find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        sys.exit("the photograph comes with scikit-image: use `make demo-exact`, or pip install it")
    source = Path(package.submodule_search_locations[0]) / "data/chelsea.png"
    shutil.copyfile(source, ROOT / out / source.name)
    return out / source.name


if __name__ == "__main__":
    sys.exit(main())
