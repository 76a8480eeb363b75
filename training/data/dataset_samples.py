"""Folders and parquet files of Hugging Face's `datasets`, read through that library."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import DataError, needing
from edgevlm.training.data.samples import RawSample, read_item

TRAIN = "train"
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes


class DatasetSamples:
    """A data set of the library, on disk and mapped into memory; images stay encoded.

    name: what the samples are called by, with their index. folder: where relative paths of images
    begin.
    """

    def __init__(self, data: Any, name: str, folder: Path) -> None:
        self._data = _undecoded(data)
        self._name = name
        self._folder = folder

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._data)

    def __getitem__(self, index: int) -> RawSample:
        """The sample at `index`. Raises BrokenSample."""
        name = f"{self._name}[{index}]"
        row: Mapping[str, Any] = self._data[index]
        if isinstance(row.get("id"), (str, int)):
            name = f"{name} id {row['id']}"
        return read_item(row, name, self._folder)


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return any((folder / name).exists() for name in _SAVED)


def open_saved(folder: Path, images: Path) -> DatasetSamples:
    """A folder that save_to_disk wrote; of several splits the one called "train".

    Raises DataError, or MissingExtra if the library is not installed.
    """
    library = _library()
    try:
        data = library.load_from_disk(str(folder))
    except Exception as broken:  # the library raises whatever pyarrow and JSON raise
        raise DataError(f"{folder} cannot be read as a data set: {broken}") from None
    if isinstance(data, dict):
        if TRAIN not in data and len(data) != 1:
            raise DataError(
                f"{folder} has the splits {', '.join(data)}, and none is called {TRAIN!r}",
                hint="give the folder of one of them",
            )
        data = data[TRAIN] if TRAIN in data else next(iter(data.values()))
    return DatasetSamples(data, folder.name, images)


def open_parquet(
    files: Sequence[Path], name: str, images: Path, cache: Path | None = None
) -> DatasetSamples:
    """Parquet files as one data set, in their order.

    The library keeps an uncompressed copy in `cache`, None for its own folder. name, images: as in
    DatasetSamples.

    Raises DataError, or MissingExtra if the library is not installed.
    """
    library = _library()
    try:
        names = [str(file) for file in files]
        data = library.Dataset.from_parquet(names, cache_dir=None if cache is None else str(cache))
    except Exception as broken:  # as above
        reason = broken.__cause__ or broken
        raise DataError(f"{files[0]} cannot be read as parquet: {reason}") from None
    return DatasetSamples(data, name, images)


def _library() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with needing("datasets", "train", purpose="reading this data set"):
        import datasets
    datasets.disable_progress_bars()
    return datasets


def _undecoded(data: Any) -> Any:
    """The same with images as files or bytes, so that one place decodes them and says why not."""
    from datasets import Image

    for column, feature in data.features.items():
        if isinstance(feature, Image):
            data = data.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            data = data.cast_column(column, type(feature)(Image(decode=False)))
    return data
