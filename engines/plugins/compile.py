"""Triton kernels as PTX, on any machine: what TensorRT stores in an engine for its card.

The assembler comes with Triton, so registers and spills are known without a card.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import BuildError, UnsupportedError, needing

# The newest PTX that the oldest driver with support for the card reads: CUDA 12.6 (JetPack 6) reads
# 8.5, CUDA 12.8 reads 8.7 and is the first for 100 and 120, CUDA 13.0 reads 9.0 and is Thor's.
PTX_ISA: Mapping[int, int] = {80: 85, 86: 85, 87: 85, 89: 85, 90: 85, 100: 87, 110: 90, 120: 87}
# More would need an attribute of the function, which only who launches it can set.
MOST_SHARED_BYTES = 48 * 1024
_ELEMENTS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
_DTYPES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill (?:stores|loads)")


@dataclass(frozen=True)
class Launch:
    """How one kernel is compiled.

    pointers, scalars, results: names of its parameters in order: inputs, int32 numbers, outputs;
    formats: of the pointers that are not in the op's own, "fp32". constants: what is compiled in.
    warps, stages: of 32 threads; of loads under way at once.
    """

    pointers: tuple[str, ...]
    scalars: tuple[str, ...]
    results: tuple[str, ...]
    constants: Mapping[str, Any]
    formats: Mapping[str, str]
    warps: int
    stages: int = 2

    def signature(self, dtype: str) -> dict[str, str]:
        """Triton's types of all parameters."""
        pointer = {n: _ELEMENTS[self.formats.get(n, dtype)] for n in self.pointers}
        results = {n: _ELEMENTS[self.formats.get(n, dtype)] for n in self.results}
        scalars = dict.fromkeys(self.scalars, "i32")
        return pointer | scalars | results | dict.fromkeys(self.constants, "constexpr")


@dataclass(frozen=True)
class Compiled:
    """PTX whose parameters are exactly the kernel's own. threads: of a block; shared: bytes."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Usage:
    """What its assembler says that a kernel takes: registers of a thread, bytes spilled."""

    registers: int
    spilled_bytes: int


def compiled(kernel: Any, launch: Launch, dtype: str, sm: int) -> Compiled:
    """A Triton kernel for compute capability `sm`.

    Raises MissingExtra without Triton, UnsupportedError for another card, and BuildError if the
    kernel wants what TensorRT cannot give: memory of its own, more than one launch, much shared
    memory.
    """
    if sm not in PTX_ISA:
        known = ", ".join(f"sm_{card}" for card in PTX_ISA)
        raise UnsupportedError(
            f"there are no fused kernels for sm_{sm}", hint=f"there are for {known}"
        )
    with needing("triton", "kernels", purpose="compiling fused kernels"):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    signature = launch.signature(dtype)
    # Tensors between layers start at multiples of 256 bytes, which wide loads need.
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "ptx_version": PTX_ISA[sm],
        "enable_fp_fusion": True,
    }
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # else PTX names files of this machine
        made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    data = made.metadata
    scratch = data.global_scratch_size + getattr(data, "profile_scratch_size", 0)
    if scratch or data.num_ctas != 1 or data.shared > MOST_SHARED_BYTES:
        raise BuildError(
            f"{data.name} for sm_{sm} needs {scratch} bytes of its own, {data.num_ctas} blocks at "
            f"once and {data.shared} bytes of shared memory, which a plugin cannot have"
        )
    count = len(signature) - len(launch.constants)
    ptx = without_scratch(made.asm["ptx"], data.name, count)
    return Compiled(data.name, ptx, 32 * data.num_warps, data.shared)


def launched(
    kernel: Any,
    launch: Callable[[str], Launch],
    programs: Callable[[str], int],
    arguments: Sequence[Any],
) -> Any:
    """Run a kernel on torch tensors, in order of its parameters, as a plugin's would be: its last.

    launch and programs get the number format, that of the first argument.
    """
    dtype = _DTYPES[str(arguments[0].dtype)]
    how = launch(dtype)
    grid = (programs(dtype),)
    kernel[grid](*arguments, **how.constants, num_warps=how.warps, num_stages=how.stages)
    return arguments[-1]


def without_scratch(ptx: str, name: str, count: int) -> str:
    """PTX with the first `count` parameters alone: Triton adds pointers to scratch memory.

    Raises BuildError if the kernel uses what would be taken away.
    """
    entry = re.search(rf"(\.entry\s+{re.escape(name)}\s*\()([^)]*?)(\s*\))", ptx)
    if entry is None:
        raise BuildError(f"the PTX has no kernel {name}")
    parameters = [part.strip() for part in entry[2].split(",")]
    rest = ptx[entry.end() :]
    used = [p.split()[-1] for p in parameters[count:] if re.search(rf"\b{p.split()[-1]}\b", rest)]
    if used:
        raise BuildError(f"{name} uses {', '.join(used)}, which TensorRT would not pass")
    kept = ",\n\t".join(parameters[:count])
    return f"{ptx[: entry.start(2)]}\n\t{kept}{ptx[entry.start(3) :]}"


def assembled(ptx: str) -> Usage:
    """What the assembler that comes with Triton says of PTX.

    Raises BuildError with the assembler's words if it refuses it.
    """
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    arch = re.search(r"\.target\s+(\w+)", ptx)
    if arch is None:
        raise BuildError("the PTX names no target")
    newer = int(re.findall(r"\d+", arch[1])[0]) >= 90
    tool = folder / ("ptxas-blackwell" if newer else "ptxas")
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "kernel.ptx")
        file.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={arch[1]}", str(file), "-o", f"{file}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"ptxas refuses the kernel: {done.stderr[:300]}")
    used = _USED.search(done.stderr)
    return Usage(int(used[1]) if used else 0, sum(map(int, _SPILLED.findall(done.stderr))))
