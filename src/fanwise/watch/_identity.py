"""identity: the name of an object that outlives its paths."""

import os

from fanwise._errors import FilesystemRefuses
from fanwise.kernel import handles
from fanwise.kernel.mounts import mount_of


def identity(path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int) -> str:
    """Return the identity of a file or directory, as `Change.identity` carries it.

    A string such as ``"7:0/1/0b0000001a2b3c4d"``: the superblock's device from mountinfo, the
    handle's type, the handle. Equal strings are the same object, and no other object gets it, for
    as long as that superblock is mounted: key a cache by it. A new file with a reused inode number
    has another one. A symbolic link is not followed; an integer is a descriptor.

    Where handles cannot be opened (proc, FUSE, an overlay with default options) it is as long as
    the kernel keeps the inode.

    Raises NoSuchRoot, FilesystemRefuses (no file handles), OSError.
    """
    if isinstance(path, int):
        return _of(path)
    # One descriptor for both questions: a second look-up may lead to something else.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _of(fd)
    except FilesystemRefuses as error:
        raise FilesystemRefuses(path, error.reason, error.remedy) from error
    finally:
        os.close(fd)


def _of(fd: int) -> str:
    # One that only identifies will do: it is what records hold, on an overlay too.
    key, _ = handles.identify(b"", fd, empty=True)
    return handles.identity(mount_of(fd).dev, key)
