"""Which kind of data set a path is."""

from __future__ import annotations

from pathlib import Path

from edgevlm.toolkit.errors import DataError
from edgevlm.training.data import dataset_samples, tar_samples
from edgevlm.training.data.json_samples import JsonSamples
from edgevlm.training.data.samples import Samples
from edgevlm.training.data.tar_samples import TarSamples

_JSON = (".json", ".jsonl")
_KINDS = (
    "a .json or .jsonl file, a folder of the library datasets, .parquet files, or .tar shards "
    "(part-{000..099}.tar)"
)


def open_samples(
    path: Path, images: Path | None = None, cache: Path | None = None
) -> Samples | TarSamples:
    """The data set at `path`; images: where relative image paths begin, else beside the data set.

    cache: where the library `datasets` keeps its copy of parquet files; None for its own folder.
    Raises DataError if there is none or it cannot be read, MissingExtra if a package is missing.
    """
    if path.suffix == ".tar":
        return TarSamples(tar_samples.shards(path))
    if not path.exists():
        raise DataError(f"{path} does not exist", hint=f"a data set is {_KINDS}")
    beside = images or (path if path.is_dir() else path.parent)
    if path.suffix in _JSON:
        return JsonSamples(path, beside)
    if path.suffix == ".parquet":
        return dataset_samples.open_parquet([path], path.name, beside, cache)
    if path.is_dir():
        return _open_folder(path, beside, cache)
    raise DataError(f"{path} is no data set that is read", hint=f"a data set is {_KINDS}")


def _open_folder(folder: Path, images: Path, cache: Path | None) -> Samples | TarSamples:
    if dataset_samples.is_saved(folder):
        return dataset_samples.open_saved(folder, images)
    if any(folder.glob("*.tar")):
        return TarSamples(tar_samples.shards(folder))
    if files := sorted(folder.rglob("*.parquet")):
        return dataset_samples.open_parquet(files, folder.name, images, cache)
    found = sorted(file for file in folder.iterdir() if file.suffix in _JSON)
    if len(found) == 1:
        return JsonSamples(found[0], images)
    named = ", ".join(file.name for file in found[:5])
    raise DataError(
        f"{folder} holds {f'several JSON files ({named})' if found else 'no data set'}",
        hint="give one of the files" if found else f"a data set is {_KINDS}",
    )
