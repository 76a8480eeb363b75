"""Floors of the fused ops, and what their kernels take of a card.

    python -m edgevlm.engines.plugins [--dtype fp16] [--cards sm_87,sm_90] [--json]

Without cards nothing is compiled, and no Triton is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from edgevlm.engines.plugins.catalogue import SITES, Site
from edgevlm.engines.plugins.compile import PTX_ISA, assembled
from edgevlm.engines.plugins.work import BYTES
from edgevlm.toolkit.errors import ToolkitError

_MEGA = 1e6


def main(arguments: Sequence[str]) -> int:
    """Print the report; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m edgevlm.engines.plugins")
    parser.add_argument("--dtype", choices=BYTES, default="fp16")
    parser.add_argument("--cards", default="", help="capabilities to compile for: sm_87,sm_90")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    cards = [int(card.removeprefix("sm_")) for card in asked.cards.split(",") if card]
    unknown = [f"sm_{card}" for card in cards if card not in PTX_ISA]
    if unknown:
        parser.error(f"{', '.join(unknown)}: known are {', '.join(f'sm_{c}' for c in PTX_ISA)}")
    try:
        rows = [report(site, asked.dtype, cards) for site in SITES]
    except ToolkitError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    print(json.dumps(rows, indent=1) if asked.json else table(rows))
    return 0


def report(site: Site, dtype: str, cards: Sequence[int]) -> dict[str, Any]:
    """A call's work, and for each card its kernel's registers, spills and shared memory."""
    work = site.work(dtype)
    found: dict[str, Any] = {"site": site.name, "op": site.op, "dtype": dtype, **asdict(work)}
    found["cards"] = {f"sm_{sm}": _usage(site, dtype, sm) for sm in cards}
    return found


def _usage(site: Site, dtype: str, sm: int) -> dict[str, int]:
    made = site.compiled(dtype, sm)
    ptx = {"ptx_bytes": len(made.ptx), "threads": made.threads, "shared_bytes": made.shared_bytes}
    return asdict(assembled(made.ptx)) | ptx


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The report as text: megabytes and kernels of the floor, the plugin and the body."""
    lines = [f"{'':26}{'floor':>9}{'plugin':>18}{'body':>18}{'GFLOP':>8}"]
    for row in rows:
        parts = [f"{row['site']:26}{row['floor_bytes'] / _MEGA:>6.1f} MB"]
        for name in ("plugin", "body"):
            moved, kernels = row[f"{name}_bytes"] / _MEGA, row[f"{name}_kernels"]
            parts.append(f"{moved:>7.1f} MB in {kernels:>2}  ")
        lines.append("".join(parts) + f"{row['flops'] / 1e9:>6.2f}")
        for card, used in row["cards"].items():
            lines.append(
                f"  {card}: {used['registers']} registers, {used['spilled_bytes']} bytes spilled, "
                f"{used['shared_bytes']} shared, {used['threads']} threads"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
