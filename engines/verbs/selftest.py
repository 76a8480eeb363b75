"""The verb `edgevlm selftest`: its flags, and what is printed of a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from edgevlm.toolkit.terminal.flags import Debug, Json, Quiet


def verb(run: Callable[..., None]) -> Callable[..., None]:
    """The function that typer makes the verb from; run: called with all flags by name."""

    def selftest(
        engine: Annotated[
            Optional[Path], typer.Argument(help="An engine: replay and time its goldens.")
        ] = None,
        plugins: Annotated[
            Optional[str],
            typer.Option(help="Fused plugins to try on this card: all, or NAME,..."),
        ] = None,
        small: Annotated[
            bool, typer.Option("--small", help="Plugins on small shapes, for a quick answer.")
        ] = False,
        report: Annotated[
            Optional[Path],
            typer.Option(help="The report's file; default: edgevlm-selftest-DATE.json here."),
        ] = None,
        as_json: Json = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Try fused plugins or an engine on this machine, and write one report to send."""
        given = dict(locals())
        for name in ("run", "debug"):
            given.pop(name, None)
        run(**given)

    return selftest


def tried(
    engine: Path | None,
    plugins: str | None,
    small: bool,
    report: Path | None,
    made_by: str,
    record: Any,
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], list[str]]:
    """Try what was asked for and write the report; its data and lines.

    record: of build.selftest. Raises ConfigError where nothing was asked for, AccuracyError after
    the report is written where something is not right.
    """
    from edgevlm.engines.build import selftest
    from edgevlm.engines.build.plugins import named
    from edgevlm.engines.plugins.catalogue import FOLDERS
    from edgevlm.toolkit.errors import AccuracyError, ConfigError

    if engine is None and plugins is None:
        raise ConfigError(
            "selftest has nothing to try", hint="give an engine, or --plugins all, or both"
        )
    found: dict[str, Any] = {}
    if plugins is not None:
        names = tuple(FOLDERS) if plugins == "all" else named(plugins)
        found |= selftest.of_plugins(names, record, progress, small=small)
    if engine is not None:
        found |= selftest.of_engine(engine, progress)
    file = report or Path(f"edgevlm-selftest-{datetime.now():%Y%m%d-%H%M%S}.json")
    data = selftest.report(made_by, found)
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    wrong = _wrong(data)
    if wrong:
        raise AccuracyError(
            f"not right here: {'; '.join(wrong)}", hint=f"please report it with {file}"
        )
    return data, [*_lines(data), f"report: {file}"]


def _wrong(data: dict[str, Any]) -> list[str]:
    """What differs from the reference, or could not be built or run."""
    found = [
        f"plugin of {row['site']}: {row['plugin'].get('error', 'differs from the reference')}"
        for row in data.get("plugins", [])
        if not row["plugin"]["right"]
    ]
    kernels = data.get("kernels", {}).get("rows", [])
    found += [f"kernel of {r['site']} in {r['dtype']}" for r in kernels if not r["right"]]
    components = data.get("engine", {}).get("components", [])
    found += [f"{row['name']}: {row['error']}" for row in components if "error" in row]
    return found


def _lines(data: dict[str, Any]) -> list[str]:
    """The same for people."""
    from edgevlm.toolkit.terminal.console import table

    lines = []
    rows = [
        (row["site"], *(_time(row[kind]) for kind in ("plugin", "body")), _gain(row["gain"]))
        for row in data.get("plugins", [])
    ]
    if rows:
        lines += [*table(("call", "plugin", "body", "saved"), rows), ""]
    parts = [
        (row["name"], f"{row['open_ms']:.0f} ms", _calls(row["calls"]), _difference(row))
        for row in data.get("engine", {}).get("components", [])
    ]
    if parts:
        lines += [*table(("component", "opened in", "a call", "difference"), parts), ""]
    return lines


def _time(found: dict[str, Any]) -> str:
    return f"{found['ms']:.3f} ms" if "ms" in found else f"failed: {found['error'][:60]}"


def _gain(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.0%}"


def _calls(calls: list[dict[str, Any]]) -> str:
    return ", ".join(f"{call['ms']:.2f}" for call in calls) + " ms"


def _difference(row: dict[str, Any]) -> str:
    return "not compared" if row["difference"] is None else f"{row['difference']:.1e}"
