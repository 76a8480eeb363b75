"""From a source on the command line, a path or a Hugging Face model id, to a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgevlm.toolkit.errors import CheckpointError, needing

_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
FILES = (".pt", ".pth", ".bin", ".safetensors")
_WEIGHTS = ("*.safetensors", "*.bin")


def locate(source: str, *, revision: str | None, offline: bool) -> Path:
    """The folder that `source` means. A local folder wins; `offline` never touches the network.

    Raises CheckpointError if there is neither folder nor (cached) model of that name.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not is_model_id(source):
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{source} {kind}, and it is not a model id (ORGANISATION/NAME)",
            hint="give a checkpoint folder, a model id, or preset:NAME --random-weights",
        )
    return _from_hub(source, revision, offline or os.environ.get("HF_HUB_OFFLINE") == "1")


def locate_model(source: str, *, revision: str | None, offline: bool) -> Path:
    """The same, or a weight file: towers by themselves are published as one."""
    file = Path(source)
    if file.is_file() and file.suffix in FILES:
        return file
    return locate(source, revision=revision, offline=offline)


def is_model_id(text: str) -> bool:
    """Whether a text has the form ORGANISATION/NAME."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not text.startswith((".", "/"))


def locate_part(name: str, *, offline: bool) -> Path:
    """The folder of a tower, a language model or a base: a local one, or that of a model id.

    Raises CheckpointError if there is none.
    """
    if Path(name).exists() or not is_model_id(name):
        return locate(name, revision=None, offline=offline)
    return locate_tower(name, offline=offline)


def name_of(folder: Path) -> str:
    """What the model in a folder is called; in the hub's cache the folder's name is a revision."""
    cached = origin_in_cache(folder)
    return folder.resolve().name if cached is None else cached[0].split("/")[-1]


def locate_tower(name: str, *, offline: bool) -> Path:
    """The folder of the model `name` with its weights: from the local cache, or downloaded.

    What is in the cache is taken as it is, because several systems ask for a tower in turn.
    Raises CheckpointError if it is not there and cannot be fetched.
    """
    try:
        folder = _from_hub(name, None, True)
    except CheckpointError:
        if offline:
            raise
        return locate(name, revision=None, offline=False)
    if (folder / "config.json").exists() and any(any(folder.glob(glob)) for glob in _WEIGHTS):
        return folder
    if offline:
        raise CheckpointError(
            f"{name} is in the local cache without its weights ({folder})",
            hint="without --offline they are downloaded",
        )
    return locate(name, revision=None, offline=False)


def origin_in_cache(folder: Path) -> tuple[str, str] | None:
    """Model id and revision of a folder of the hub's cache, models--ORG--NAME/snapshots/REVISION.

    None for any other folder.
    """
    *_, model, snapshots, revision = ("", "", "", *folder.resolve().parts)
    parts = model.split("--")
    if snapshots != "snapshots" or parts[0] != "models" or len(parts) < 2:
        return None
    return "/".join(parts[1:]), revision


def _from_hub(name: str, revision: str | None, offline: bool) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with needing("huggingface_hub", "export", purpose=f"fetching {name}"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE
    try:
        folder = snapshot_download(
            name, revision=revision, local_files_only=offline, allow_patterns=_PATTERNS
        )
    except (
        Exception
    ) as refused:  # the package raises many kinds of errors; the reason is in the text
        where = "is not in the local cache" if offline else "could not be fetched"
        reason = (str(refused).strip() or type(refused).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name} {where} ({HF_HUB_CACHE}): {reason}",
            hint="without --offline it is downloaded" if offline else "check the name and network",
        ) from None
    return Path(folder)
