"""How each program is installed, and what it makes of the checkpoint."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.common import EDGEVLM, ROOT
from benchmarks.compare_peers.place import Place, Setting, Unavailable, size

TORCH = "torch==2.13.0"  # first and alone: the only one whose build for processors is found
TRANSFORMERS = "transformers==5.23.0"
LLAMA = "0.3.36"
CONTEXT = "1024"
OWN = ("toolkit", "export", "engines", "training", "calibration")
OURS = ("float32", "int8", "int8-rows", "int4")
RUNTIME = (
    "numpy tokenizers pillow safetensors typer rich jinja2 onnxruntime"  # pyproject.toml
).split()
# OpenVINO: name of a row, format of the weights, properties.
OPENVINO: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("int8, group 128", "int8", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}),
    (
        "int4, group 128, f32 hint",
        "int4",
        {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128", "INFERENCE_PRECISION_HINT": "f32"},
    ),
    ("fp16, default", "fp16", {}),
    ("fp16, f32 hint", "fp16", {"INFERENCE_PRECISION_HINT": "f32"}),
)
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF "
    "-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_SERVER=ON"
).split()
LLAMA_FORMS = {"Q8_0": "f16", "Q4_0": "f16", "f32": "f32"}  # and the projector's format


@dataclass(frozen=True)
class Program:
    """prepare: install and convert. installed_mb: of what a user needs to run it."""

    name: str
    prepare: Callable[[Place], list[Setting]]
    installed_mb: Callable[[Place], float]


# -- the checkpoint ------------------------------------------------------------------------------


def checkpoint(place: Place) -> Path:
    """The folder of the checkpoint, its language model, prompt and image; needs transformers."""
    steps = ([TORCH], [TORCH, TRANSFORMERS, "pillow", "numpy", "sentencepiece", "protobuf"])
    place.install("transformers", *steps)
    python = place.python("transformers")

    def make(out: Path) -> None:
        place.run([python, "-m", "benchmarks.compare_peers.make_model", out])
        for item in list(out.iterdir()):
            target = place.models / item.name
            shutil.rmtree(target, ignore_errors=True)
            item.rename(target)

    place.once(place.models / "made", make)
    return place.models / "checkpoint"


# -- ours ----------------------------------------------------------------------------------------


def edgevlm(place: Place, forms: Sequence[str] = OURS) -> list[Setting]:
    """A bundle of the checkpoint, and engines of it; again when our sources have changed."""
    key, source = sources(), checkpoint(place)
    words = {name: ("--precision", name, "--accept-loss", "1") for name in OURS[1:]}

    def export(out: Path) -> None:
        place.run([*EDGEVLM, "export", source, out, "--max-context", CONTEXT, "--quiet"])

    def build(bundle: Path, name: str, out: Path) -> None:
        place.run([*EDGEVLM, "build", bundle, out, *words.get(name, ()), "--quiet"])

    bundle = place.once(place.models / "edgevlm-bundle", export, key)
    rows = []
    for name in forms:
        make = partial(build, bundle, name)
        engine = place.once(place.models / f"edgevlm-{name}", make, key)
        rows.append(Setting(name, "edgevlm_side", engine))
    return rows


def sources() -> str:
    """A hash of what decides about a bundle and an engine."""
    found = hashlib.sha256()
    for folder in ("toolkit", "export", "engines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def our_size(place: Place) -> float:
    """The packages that running an engine needs, and our own sources."""
    own = sum(size(p) for name in OWN for p in (ROOT / name).rglob("*.py"))
    return place.installed_mb("edgevlm", RUNTIME) + own / 1e6


# -- the others ----------------------------------------------------------------------------------


def transformers(place: Place) -> list[Setting]:
    """The checkpoint as it is."""
    source = checkpoint(place)
    return [
        Setting(
            f"{dtype}, {attention}",
            "transformers_side",
            source,
            {"dtype": dtype, "attention": attention},
        )
        for dtype in ("float32", "bfloat16")
        for attention in ("sdpa", "eager")
    ]


def install_openvino(place: Place) -> None:
    """OpenVINO with what exports to it and compresses weights."""
    packages = ["openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", TORCH, "pillow"]
    place.install("openvino", [TORCH], packages, without=("torchvision",))


def openvino(place: Place) -> list[Setting]:
    """optimum-intel's export, in the form of each row."""
    source = checkpoint(place)
    install_openvino(place)
    older = place.once(place.models / "checkpoint-older", partial(old_names, place, source))

    def export(weights: str, out: Path) -> None:
        tool = place.tool("openvino", "optimum-cli")
        what = ["--task", "image-text-to-text", "--weight-format", weights]
        place.run([tool, "export", "openvino", "--model", older, *what, out])
        shutil.copy(source / "preprocessor_config.json", out)  # without it images are wrong

    rows = []
    for name, weights, properties in OPENVINO:
        folder = place.models / f"openvino-{weights}"
        model = place.once(folder, partial(export, weights))
        rows.append(Setting(name, "openvino_side", model, dict(properties)))
    return rows


def old_names(place: Place, source: Path, out: Path) -> None:
    """The tensor names that transformers 5.5 reads: it takes new values for any others."""
    code = (
        "import sys, safetensors.torch as s; source, out = sys.argv[1:];"
        "old = {(k.replace('vision_tower.', 'vision_tower.vision_model.')"
        " if 'vision_tower.' in k and 'vision_model' not in k else k): v"
        " for k, v in s.load_file(source).items()};"
        "s.save_file(old, out, metadata={'format': 'pt'})"
    )
    shutil.copytree(source, out)
    name = "model.safetensors"
    place.run([place.python("transformers"), "-c", code, source / name, out / name])


def genai(place: Place) -> list[Setting]:
    """onnxruntime-genai's builder on the language model, logits of the last position alone."""
    checkpoint(place)
    packages = ["onnxruntime-genai==0.18.0", TRANSFORMERS, "onnx", "onnx-ir", TORCH]
    place.install("onnxruntime-genai", [TORCH], packages)
    name = "int4, block 32, language model alone"

    def build(out: Path) -> None:
        python = place.python("onnxruntime-genai")
        builder: list[str | Path] = [
            python,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            place.models / "lm",
        ]
        where: list[str | Path] = ["-o", out, "-p", "int4", "-e", "cpu", "-c", place.work / "cache"]
        options = ["accuracy_level=4", "block_size=32", "prune_lm_head=true"]
        place.run([*builder, *where, "--extra_options", *options])

    return [Setting(name, "genai_side", place.once(place.models / "genai-int4", build))]


# -- llama.cpp -----------------------------------------------------------------------------------


def llama(place: Place, forms: Sequence[str] = tuple(LLAMA_FORMS)) -> list[Setting]:
    """Built from the sources that llama-cpp-python carries; three forms of the language model."""
    source = checkpoint(place)
    home, declarations = built(place)
    here = {"PYTHONPATH": str(declarations)}
    module = "benchmarks.compare_peers.make_gguf"
    upstream = declarations / "vendor" / "llama.cpp"
    path = str(upstream / "gguf-py")

    def projector(kind: str, out: Path) -> None:
        python = place.python("transformers")
        place.run([python, "-m", module, "projector", source, out, kind], {"PYTHONPATH": path})

    def whole(out: Path) -> None:
        python, lm = place.python("transformers"), place.models / "lm"
        place.run([python, "-m", module, "lm", upstream, lm, out], {"PYTHONPATH": path})

    def full() -> Path:
        return place.once(place.models / "lm-f32.gguf", whole)

    def quantize(kind: str, out: Path) -> None:
        place.run([home, "-m", module, "quantize", full(), out, kind], here)

    rows = []
    for kind in forms:
        eyes = LLAMA_FORMS[kind]
        file = place.models / f"projector-{eyes}.gguf"
        vision = place.once(file, partial(projector, eyes))
        model = place.models / f"lm-{kind}.gguf"
        model = full() if kind == "f32" else place.once(model, partial(quantize, kind))
        words = {"projector": str(vision), "version": LLAMA}
        files = (model, vision)
        rows.append(Setting(f"{kind} + {eyes}", "llama_side", model, words, here, files))
    return rows


def built(place: Place) -> tuple[Path, Path]:
    """The interpreter, and the folder of the declarations, in which the libraries are."""
    packages = ["numpy", "pillow", "typing_extensions", "diskcache", "jinja2"]
    cmake = [] if shutil.which("cmake") else ["cmake", "ninja"]
    place.install("llama.cpp", [*packages, *cmake])
    home, folder = place.python("llama.cpp"), place.work / "llama.cpp"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise Unavailable("no C++ compiler to build it with")

    def unpack(out: Path) -> None:
        what = ["--no-deps", "--no-binary", ":all:"]
        place.run(
            [home, "-m", "pip", "download", "-q", *what, f"llama-cpp-python=={LLAMA}", "-d", out]
        )
        with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
            archive.extractall(out, filter="data")

    place.once(folder / "sdist", unpack)
    declarations = folder / "sdist" / f"llama_cpp_python-{LLAMA}"

    def build(out: Path) -> None:
        out.symlink_to(_compiled(place, declarations, "mtmd"))

    place.once(declarations / "llama_cpp" / "lib", build)
    return home, declarations


def llama_server(place: Place) -> Path:
    """llama.cpp's server, from the same sources, without its page."""
    _, declarations = built(place)

    def build(out: Path) -> None:
        out.symlink_to(_compiled(place, declarations, "llama-server") / "llama-server")

    return place.once(place.work / "llama.cpp" / "llama-server", build)


def _compiled(place: Place, declarations: Path, target: str) -> Path:
    """The folder of what was compiled, with `target` in it."""
    tool = shutil.which("cmake") or str(place.tool("llama.cpp", "cmake"))
    compiled = place.work / "llama.cpp" / "build"
    source = (declarations / "vendor" / "llama.cpp").resolve()
    place.run([tool, "-S", source, "-B", compiled, *CMAKE])
    place.run([tool, "--build", compiled, "-j1", "--target", target], limit_s=4 * 3600)
    return compiled / "bin"


def llama_size(place: Place) -> float:
    """The libraries, each once: their other names are links."""
    found = [
        path
        for name in ("ggml", "llama", "mtmd")
        for path in (place.work / "llama.cpp" / "build" / "bin").glob(f"lib{name}*.so.*")
        if not path.is_symlink() and "quantize" not in path.name
    ]
    return sum(map(size, found)) / 1e6


def packaged(program: str, *packages: str) -> Callable[[Place], float]:
    """The size of a program that is a package."""
    return lambda place: place.installed_mb(program, packages)


PROGRAMS = (
    Program("edgevlm", edgevlm, our_size),
    Program("openvino", openvino, packaged("openvino", "openvino-genai")),
    Program("llama.cpp", llama, llama_size),
    Program("onnxruntime-genai", genai, packaged("onnxruntime-genai", "onnxruntime-genai")),
    Program("transformers", transformers, packaged("transformers", "transformers", "torch")),
)
