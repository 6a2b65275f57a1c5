"""Metrics as a file for node_exporter: the old text or the new, never a part of one."""

import os
import tempfile
from pathlib import Path

from fanwise._errors import FanwiseError


def write(path: Path, text: bytes) -> None:
    """Put ``text`` at ``path``, which ends in ``.prom``, readable for everyone.

    Raises FanwiseError; what stood there stays then.
    """
    if path.suffix != ".prom":
        raise FanwiseError(f"{path}: node_exporter reads names that end in .prom only", "rename it")
    try:
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(fd, "wb") as file:
                file.write(text)
                file.flush()
                os.fchmod(fd, 0o644)
                os.fsync(fd)
            os.rename(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise FanwiseError(
            f"{path}: metrics cannot be written: {error.strerror}",
            "name a directory that can be written to",
        ) from error
