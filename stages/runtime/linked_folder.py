"""A checkpoint folder that shares its files with another one: for stages that add a file and change none."""

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from pipeline.companions import companion_files
from pipeline.headers import weight_files

PUBLISHED = 0o444  # the mode of files in the store; they are never written again
NOT_LINKABLE = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP)  # another file system, or one without such links


def link_checkpoint(source: Path, target: Path, without: Iterable[str] = ()) -> None:
    """Put the checkpoint of `source` (config.json, weights, companions) into `target`, but for the files named in `without`.

    Published files are hard-linked, which takes no room. Any other file is copied, since whoever may write it would by a link
    write into `target`; so is one that the file system cannot link.
    """
    weights = weight_files(source)
    index = source / "model.safetensors.index.json"
    files = [source / "config.json", *weights, *companion_files(source)]
    files += [index] if weights != [source / "model.safetensors"] else []
    for file in files:
        place = target / file.relative_to(source)
        if file.name not in without:
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file.resolve(), place)


def link_or_copy(file: Path, place: Path) -> None:
    if stat.S_IMODE(file.stat().st_mode) == PUBLISHED:
        try:
            os.link(file, place)
            return
        except OSError as error:
            if error.errno not in NOT_LINKABLE:
                raise
    shutil.copyfile(file, place)
