"""Targets: the backend, its version and the architecture of a machine: `tensorrt@10.16/sm_87`."""

from __future__ import annotations

import difflib
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from edgevlm.toolkit import card as card
from edgevlm.toolkit.errors import ConfigError, InputError, TargetMismatch, needing

Version = tuple[int, ...]
BACKENDS = ("onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "reference")
CUDA = "onnxruntime-cuda"
_MOST_THREADS = 4  # per processor
_ERRORS_ONLY = 3  # of the levels of ONNX Runtime's log
CUDA_PACKAGE = "onnxruntime-gpu"
# Cards that have machine code in the wheels of onnxruntime-gpu 1.31.1, which hold no PTX, by the
# processor beside the card. So Orin (87), Thor (110), B200 (100) have none.
CUDA_CARDS: Mapping[str, tuple[str, ...]] = {
    "x86_64": ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"),
    "aarch64": ("sm_89", "sm_90", "sm_120", "sm_121"),
}
_VNNI = {"avx512_vnni", "avx_vnni"}  # flags of processors that add 8-bit products in 32 bits
_NUMBERS = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
# ARM's Linux states numbers for a name: those of Jetson Orin, Xavier and Thor, and of servers
_ARM_CORES: Mapping[str, str] = {
    "0x41 0xd42": "Cortex-A78AE",
    "0x4e 0x004": "NVIDIA Carmel",
    "0x41 0xd83": "Neoverse-V3AE",
    "0x41 0xd08": "Cortex-A72",
    "0x41 0xd0b": "Cortex-A76",
    "0x41 0xd0c": "Neoverse-N1",
    "0x41 0xd40": "Neoverse-V1",
    "0x41 0xd49": "Neoverse-N2",
    "0x41 0xd4f": "Neoverse-V2",
}
# x86, then ARM: asimddp and i8mm are its 8-bit products
_INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True)
class Target:
    """backend: what executes engines; version: its release, () for any; arch: x86_64, sm_87, or
    several of TensorRT-RTX: sm_80+sm_89.
    """

    backend: str
    version: Version
    arch: str

    def __str__(self) -> str:
        at = "@" + ".".join(map(str, self.version)) if self.version else ""
        return f"{self.backend}{at}/{self.arch}"

    @property
    def of_tensorrt(self) -> bool:
        """Whether its engines are plans, of either product."""
        return self.backend.startswith("tensorrt")

    @property
    def on_card(self) -> bool:
        """Whether its engines run on a graphics card."""
        return self.of_tensorrt or self.backend == CUDA

    def holds(self, arch: str) -> bool:
        """Whether `arch` is one of those that the target is for."""
        return arch in self.arch.split("+")


@dataclass(frozen=True)
class Device:
    """A known machine: its target, and the figures that predictions use.

    memory_gb: what the model may use; bandwidth_gb_s and peak tera-operations per second by
    precision, as the vendor states them.
    """

    target: Target
    memory_gb: float
    bandwidth_gb_s: float
    peak_tops: Mapping[str, float]


def _gpu(version: Version, sm: int, memory: float, bandwidth: float, **peak: float) -> Device:
    return Device(Target("tensorrt", version, f"sm_{sm}"), memory, bandwidth, peak)


def _rtx(sm: int, memory: float, bandwidth: float, **peak: float) -> Device:
    return Device(Target("tensorrt-rtx", (1, 7), f"sm_{sm}"), memory, bandwidth, peak)


# Vendor figures, dense; Jetson TensorRT versions are those of the current JetPack for the module.
DEVICES: dict[str, Device] = {
    "jetson-orin-nano": _gpu((10, 3), 87, 8, 102, fp16=17, int8=33),
    "jetson-agx-orin": _gpu((10, 16), 87, 64, 204.8, fp16=85, int8=170),
    "jetson-thor": _gpu((10, 16), 110, 128, 273, fp16=259, int8=517, fp8=517),
    "rtx-laptop": _rtx(89, 8, 256, fp16=29, int8=116, fp8=58),  # RTX 4060 Laptop
    "rtx-4090": _rtx(89, 24, 1008, fp16=165, int8=660, fp8=330),
    "rtx-5090": _rtx(120, 32, 1792, fp16=210, int8=838, fp8=419),
    "l4": _gpu((11, 1), 89, 24, 300, fp16=121, int8=242, fp8=242),
    "a100": _gpu((11, 1), 80, 80, 2039, fp16=312, int8=624),
    "h100": _gpu((11, 1), 90, 80, 3350, fp16=989, int8=1979, fp8=1979),
    "h200": _gpu((11, 1), 90, 141, 4800, fp16=989, int8=1979, fp8=1979),
    "b200": _gpu((11, 1), 100, 180, 8000, fp16=2250, int8=4500, fp8=4500),
}


def parse(text: str) -> Target:
    """A target from its text form, a device's name, "cpu", "cuda", or "reference".

    Raises ConfigError with the nearest known names, and TargetMismatch for "cuda" where there is no
    card to ask.
    """
    if text in ("cpu", "onnxruntime"):
        return this_cpu()
    if text == "cuda":
        return _card_here()
    if text == "reference":
        return Target("reference", (), machine())
    if text in DEVICES:
        return DEVICES[text].target
    form = re.fullmatch(r"([a-z-]+)(?:@([^/]*))?/(.+)", text)
    if form and form[1] in BACKENDS:
        version, arch = form[2], "+".join(map(_architecture, form[3].split("+")))
        if version is None:
            return Target(form[1], (), arch)
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
            raise ConfigError(f"{version!r} in the target {text!r} is not a version")
        return Target(form[1], tuple(map(int, version.split("."))), arch)
    known = ["cpu", "cuda", "reference", *DEVICES]
    close = difflib.get_close_matches(text, known, 3) or known
    raise ConfigError(
        f"there is no target {text!r}",
        hint=f"known: {', '.join(close)}; or BACKEND@VERSION/ARCH such as tensorrt@10.16/sm_87",
    )


def _architecture(name: str) -> str:
    """An architecture, or that of a device: sm_89 for rtx-4090."""
    return DEVICES[name].target.arch if name in DEVICES else name


def machine() -> str:
    """This machine's processor architecture under its usual name."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What this machine's processor calls itself; some share a name, see processor_kind."""
    info = _cpuinfo(cpuinfo)
    part = " ".join(info.get(key, "") for key in ("CPU implementer", "CPU part"))
    own = info.get("model name") or _ARM_CORES.get(part)
    return own or platform.processor() or platform.machine()


def processor_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name, family and model of this processor, and which 8-bit products it has."""
    info = _cpuinfo(cpuinfo)
    numbers = [info[key] for key in _NUMBERS if key in info]
    name = processor_name(cpuinfo)
    return " ".join([name, "/".join(numbers), f"saturates={saturates_int8()}"])


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of this processor that decide how fast engines are; () where they cannot be read."""
    info = _cpuinfo(cpuinfo)
    flags = set(f"{info.get('flags', '')} {info.get('Features', '')}".split())  # x86; ARM
    return tuple(name for name in _INSTRUCTION_SETS if name in flags)


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The fields of the first processor, empty where the system has no such file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def load_onnxruntime(
    package: str = "onnxruntime", extra: str = "cpu", purpose: str = "running on this processor"
) -> Any:
    """The module onnxruntime; nothing else imports it. It reports to nobody, and prints nothing.

    Its official builds send events to Microsoft unless ORT_DISABLE_TELEMETRY is set before they
    start; they begin with a store in the user's cache folder and a look-up of the receiving host
    (onnxruntime/Privacy.md). A value that the user has set stays. Raises MissingExtra, naming
    `package` and `extra`.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    first = "onnxruntime" not in sys.modules
    with needing(package, extra, purpose=purpose):
        import onnxruntime  # waits for another thread that is just importing it
    if first:
        onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    return onnxruntime


def this_cpu() -> Target:
    """ONNX Runtime on this machine's processor; the version is () when it is not installed."""
    return Target("onnxruntime", installed("onnxruntime"), machine())


def this_card() -> Target:
    """ONNX Runtime on this machine's card; no version without onnxruntime-gpu, and "no-device" for
    an architecture without a card.
    """
    return Target(CUDA, installed(CUDA_PACKAGE), card.architecture() or card.NO_DEVICE)


def _card_here() -> Target:
    """This machine's card, which "cuda" stands for."""
    here = this_card()
    if here.arch == card.NO_DEVICE:
        raise TargetMismatch(
            "cuda stands for this machine's NVIDIA card, and there is none that its driver knows",
            hint="run the command on the machine that has the card; or name the target in full, "
            f"such as {CUDA}@1.31.1/sm_89, for --explain and export --for",
        )
    return here


def installed(package: str) -> Version:
    """A package's version without importing it; () when it is absent."""
    for name in (package, f"{package}-gpu"):
        try:
            return release(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return ()


def release(text: str) -> Version:
    """The leading numbers of a version: "1.31.1+cu13" -> (1, 31, 1)."""
    numbers = []
    for number in text.split("+")[0].split("."):
        if not number.isdigit():
            break
        numbers.append(int(number))
    return tuple(numbers)


def check_runs_here(built: Target, here: Target, rebuild: str) -> None:
    """Raise TargetMismatch unless an engine built for `built` can run on `here`.

    ONNX Runtime runs graphs made for its own or an older release, on a card those for an older one
    too; TensorRT its own release only. `rebuild` is the command that makes an engine for this
    machine.
    """
    reasons = []
    if built.backend != here.backend:
        reasons.append(f"backend {built.backend}, here {here.backend}")
    if built.backend == here.backend == CUDA:
        reasons += _on_this_card(built, here)
    elif not built.holds(here.arch):
        reasons.append(f"architecture {built.arch}, here {here.arch}")
    older = built.version[:2] > here.version[:2] and bool(here.version)
    if built.backend in ("onnxruntime", CUDA) and older:
        reasons.append(f"release {_text(built.version)}, here the older {_text(here.version)}")
    if built.of_tensorrt and here.version[: len(built.version)] != built.version:
        reasons.append(f"release {_text(built.version)}, here {_text(here.version) or 'none'}")
    if reasons:
        raise TargetMismatch(
            f"the engine was built for {built}; this machine is {here} ({'; '.join(reasons)})",
            hint=f"build it here: {rebuild}",
        )


def _on_this_card(built: Target, here: Target) -> list[str]:
    """Why ONNX Runtime cannot run an engine on this machine's card."""
    reasons = []
    if not here.version:
        reasons.append(f"{CUDA_PACKAGE} is not installed: pip install 'edgevlm[gpu]'")
    if here.arch == card.NO_DEVICE:
        return [*reasons, "there is no NVIDIA card, or no driver"]
    known = CUDA_CARDS.get(machine(), ())
    if here.arch not in known:
        reasons.append(f"{CUDA_PACKAGE} has no kernels for {here.arch} on {machine()}")
    elif _capability(built.arch) > _capability(here.arch):
        reasons.append(f"architecture {built.arch}, here the older {here.arch}")
    return reasons


def _capability(arch: str) -> int:
    """Compute capability of a card: 89 of sm_89; 0 of what is none."""
    number = arch.removeprefix("sm_")
    return int(number) if number.isdigit() else 0


def has_fp8(arch: str) -> bool:
    """Whether all cards of sm_80+sm_89 multiply FP8 (E4M3): Ada, Hopper, Blackwell and newer."""
    return all(_capability(part) >= 89 for part in arch.split("+"))


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def threads_here() -> int:
    """Processors this process may use: its affinity, within its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    quota = processor_quota()
    return processors if quota is None else max(1, min(processors, math.ceil(quota)))


def asked_threads(threads: int) -> int:
    """The threads of --threads, 0 being one per processor. Raises InputError for absurd ones."""
    cores = threads_here()
    if threads < 0:
        raise InputError(f"--threads {threads} is negative", hint="0 takes all there are")
    if threads > _MOST_THREADS * cores:
        raise InputError(
            f"--threads {threads} is far beyond the {cores} processor(s) that this process may use",
            hint=f"at most {_MOST_THREADS * cores} are accepted; 0 takes one per processor",
        )
    return threads or cores


def note_on_threads(threads: int) -> str:
    """A note where --threads asks for more threads than run at once here; else empty."""
    cores = threads_here()
    if not cores < threads <= _MOST_THREADS * cores:
        return ""
    return (
        f"--threads {threads} is more than the {cores} processor(s) that this process may use: "
        "they will wait for one another"
    )


def processor_quota(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Processors' worth of time that this process's cgroups grant it, None where none limits it.

    The smallest limit from the process's own group up to the root holds. Version 2 has "cpu.max"
    with "QUOTA PERIOD", version 1 a file for each.
    """
    quotas = [_quota_of(folder) for folder in _groups(root, membership)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(root: Path, membership: Path) -> list[Path]:
    """The folders of the process's groups for processors and of all groups above them."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        lines = []
    folders = [root, root / "cpu"]
    for _, controllers, path in (line for line in lines if len(line) == 3):
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        for top in {"", controllers, "cpu"} if controllers else {""}:
            group = PurePosixPath(path.lstrip("/"))
            folders += [root / top / level for level in (group, *group.parents)]
    return folders


def _quota_of(folder: Path) -> float | None:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((folder / name).read_text() for name in files).split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:  # version 1 has -1 for none
            return quota / period
    return None


def saturates_int8(arch: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether 8-bit products of U8 by S8 may saturate on this processor: x86 without VNNI.

    AVX2 adds pairs of such products in 16 bits, which 2 * 255 * 127 exceeds; VNNI adds in 32.
    True where an x86 processor's flags cannot be read.
    """
    if (arch or machine()) != "x86_64":
        return False
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return not flags or not all(known & _VNNI for known in flags)
