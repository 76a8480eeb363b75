"""Builds many small graphs in one process: python -m tests.rtx.many FOLDER, with FOLDER/jobs.json.

jobs.json has a list of worker.py's jobs; results.json gets a result for each, with the log's lines
that name kernels.
"""

from __future__ import annotations

import io
import json
import sys
from importlib import import_module
from pathlib import Path

from edgevlm.engines.backends.tensorrt import worker


def main(folder: Path) -> None:
    jobs = json.loads((folder / "jobs.json").read_text())
    trt = import_module(jobs[0]["module"])
    log = io.StringIO()
    logger = worker._logger(trt, log)
    results = []
    for job in jobs:
        log.seek(0)
        log.truncate()
        result = worker._build(trt, job, logger, folder)
        text = log.getvalue()
        result["log"] = text[text.rfind("VERBOSE Layers:") :] if "VERBOSE Layers:" in text else ""
        result["errors"] += [x for x in text.splitlines() if x.startswith("ERROR")]
        results.append(result)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
