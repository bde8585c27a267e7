"""A shard set through WebDataset, sequentially and without an index: for inspection, and to judge what was written.

Training does not pass through here: the exact order needs random access, and a loader process that imports WebDataset
imports torch with it (a second and 200 MB each).
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.tars import TarReader
from swin_scale.errors import DataError
from swin_scale.shards import IMAGE_EXTENSIONS, local_directory


def open_stream(directory: str | os.PathLike[str]) -> Iterator[tuple[str, bytes, int]]:
    """Yield (key, image bytes, label or -1) of every sample of the ``*.tar`` files in `directory`, in name order.

    Files are opened here, so no name is ever taken for a URL or a command, and members are never decoded: WebDataset's
    default decoder would unpickle some. Raises DataError for a tar that is damaged, or that claims more than it holds:
    WebDataset would read a sparse member of 10 GB into memory.
    """
    from webdataset import tariterators

    for path in sorted(local_directory(directory, "shard directory").glob("*.tar")):
        _refuse_hostile(path)
        with open(path, "rb") as file:
            members = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            try:
                for sample in tariterators.group_by_keys(members):
                    image = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
                    if image is None:
                        expected = ", ".join(IMAGE_EXTENSIONS)
                        raise DataError(f"{path}: sample {sample['__key__']} holds none of {expected}")
                    yield sample["__key__"], image, int(sample.get("cls", b"-1"))
            except (ValueError, tarfile.TarError) as error:
                raise DataError(f"{path}: {error}; check it with `swin-scale shards verify`") from error


def _refuse_hostile(path: Path) -> None:
    with TarReader(path) as tar:
        for _ in tar.members():
            continue
