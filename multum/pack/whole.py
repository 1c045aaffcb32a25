"""A file that appears under its name only when it is whole and on the disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import FileError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A new file to write to; until the block has ended without an error, a file of that name stays as it is.

    Raises ``FileError`` when there is no such folder, no right to write, or no room.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}.", "a folder that exists and can be written") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise FileError(f"{path} could not be written: {error.strerror or error}.", do="free space or change the place.") from error
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
