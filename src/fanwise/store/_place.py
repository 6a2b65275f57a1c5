"""Where a database may live: directories and files that nobody else may change."""

import os
import stat
from pathlib import Path

from fanwise._errors import ForeignFile, NoRoom, StoreMissing

_MAGIC = b"SQLite format 3\0"
_HEADER = 100  # bytes; https://www.sqlite.org/fileformat2.html, 1.3
SIDES = ("-wal", "-shm", "-journal", ".lock")  # what stands beside the file


def prepare(path: Path) -> None:
    """Make the directory (0700) and an empty file (0600), where they are not there yet.

    Raises ForeignFile when what is there belongs to others or may be changed by them, or is no
    regular file; NoRoom when it cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NoRoom(path, f"its directory cannot be made: {error.strerror}") from error
    check_directory(path)
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        check_file(path)
    except OSError as error:
        raise NoRoom(path, f"cannot be made: {error.strerror}") from error
    else:
        os.close(fd)


def check_directory(path: Path) -> None:
    """Refuse a directory in which others could put another file in place of ``path``."""
    there = os.stat(path.parent)
    if there.st_uid not in (0, os.geteuid()):
        raise ForeignFile(path, f"its directory belongs to user {there.st_uid}", "use your own")
    if there.st_mode & 0o022 and not there.st_mode & stat.S_ISVTX:
        raise ForeignFile(path, "others may write to its directory", f"chmod go-w {path.parent}")


def check_file(path: Path) -> None:
    """Refuse a file that is not a regular one of this user, or that others may write.

    Raises StoreMissing when it is not there, ForeignFile for all else.
    """
    for name in (path, *(Path(f"{path}{side}") for side in SIDES)):
        try:
            there = os.stat(name, follow_symlinks=False)
        except FileNotFoundError:
            if name == path:
                raise StoreMissing(path, "there is no database here yet") from None
            continue
        except OSError as error:
            raise ForeignFile(path, f"cannot be looked at: {error.strerror}") from error
        if stat.S_ISLNK(there.st_mode):
            raise ForeignFile(name, "is a symbolic link", "put the file itself there")
        if not stat.S_ISREG(there.st_mode):
            raise ForeignFile(name, "is not a regular file", "remove it, or use another path")
        if there.st_uid not in (0, os.geteuid()):
            raise ForeignFile(name, f"belongs to user {there.st_uid}", "use your own")
        if there.st_mode & 0o022:
            raise ForeignFile(name, "others may write it", f"chmod go-w {name}")


def check_header(path: Path, application_id: int) -> None:
    """Refuse a file that is not SQLite's, or that says to be of another application.

    An empty one is fine, and so is application 0: SQLite must be asked then, because what a
    killed process committed may still stand in the log. Raises ForeignFile.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER)
    except OSError as error:
        raise ForeignFile(path, f"cannot be read: {error.strerror}") from error
    if not head:
        return
    if len(head) < _HEADER or not head.startswith(_MAGIC):
        raise ForeignFile(path, "is not a database", "move it away, or use another path")
    said = int.from_bytes(head[68:72], "big")
    if said not in (0, application_id):
        raise ForeignFile(
            path,
            f"is a database of another kind (application id {said:#010x})",
            "use another path",
        )
