"""`optimum-cli edgevlm VERB ...` and `optimum-cli export edgevlm`.

optimum-cli imports every file of this folder when it starts. Both commands run edgevlm's command
line in a process of its own, where torch, which optimum imports, is not loaded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

_DTYPES = ("fp32", "fp16", "bf16")


class EdgevlmCommand(BaseOptimumCLICommand):
    """`optimum-cli edgevlm`: all words behind it are edgevlm's."""

    COMMAND = CommandInfo(
        name="edgevlm", help="Deploy multi-encoder vision-language models: edgevlm's command line."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Called by optimum."""
        what = "a verb of edgevlm and its options; none: a list of them"
        parser.add_argument("words", nargs=argparse.REMAINDER, metavar="VERB ...", help=what)

    def run(self) -> None:
        """Called by optimum."""
        _edgevlm(self.args.words or ["--help"])


class EdgevlmExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export edgevlm`: a bundle, with the options that other exports have."""

    COMMAND = CommandInfo(
        name="edgevlm", help="Export a LLaVA-family model to a bundle of edgevlm."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Called by optimum."""
        parser.add_argument("-m", "--model", required=True, help="a model id or a folder")
        parser.add_argument("output", help="the bundle to write")
        parser.add_argument("--revision", help="of a model id")
        parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; default: fp32")
        parser.add_argument("--max-context", help="positions of the KV cache")
        parser.add_argument("--offline", action="store_true", help="use the cache alone")
        parser.add_argument("--force", action="store_true", help="replace an older bundle")

    def run(self) -> None:
        """Called by optimum."""
        words = ["export", self.args.model, self.args.output]
        for name in ("revision", "dtype", "max_context"):
            if (value := getattr(self.args, name)) is not None:
                words += [f"--{name.replace('_', '-')}", value]
        words += [f"--{name}" for name in ("offline", "force") if getattr(self.args, name)]
        _edgevlm(words)


def _edgevlm(words: Sequence[str]) -> None:
    """Run edgevlm's command line, and end as it ends."""
    sys.exit(subprocess.call([sys.executable, "-m", "edgevlm.cli", *words]))


REGISTER_COMMANDS = [EdgevlmCommand, (EdgevlmExportCommand, ExportCommand)]
