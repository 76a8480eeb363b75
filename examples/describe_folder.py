"""Ask one question about every picture of a folder, and list the answers.

python -m examples.describe_folder engine PHOTOS job "What is in the image?"

Stop it and start it again as you like: finished parts of the job are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.steps import run


def rows(job: Path) -> Iterator[dict[str, Any]]:
    """Every row of a finished job, in the order of its requests."""
    for part in sorted((job / "parts").glob("part-*.jsonl")):
        yield from map(json.loads, part.read_text().splitlines())


def main() -> None:
    """Run the job on the command line, then print a line for each picture."""
    if len(sys.argv) != 5:
        sys.exit('python -m examples.describe_folder ENGINE FOLDER JOB "QUESTION"')
    engine, folder, job, question = sys.argv[1:]
    given = [Path(path).absolute() for path in (engine, folder, job)]
    run("batch", *given, "--prompt", question, "--max-tokens", 64, "--part", 16)
    for row in rows(Path(job)):
        print(f"{Path(row['id']).name}: {row['error'] or row['text'].strip()}")


if __name__ == "__main__":
    main()
