"""Records of a fanotify group to events of `fanwise.notify`.

The group must report FID, DIR_FID, NAME and TARGET_FID, and one superblock. Who calls has the model
of directories, and keeps it as of the record: a directory that a rename replaced has no place in it
any more when its own last records come, and so its former parent is not told of them, as in Linux.
"""

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator

from fanwise.kernel.records import DFID, FID, NEW_DFID_NAME, Fid, FsError, Record
from fanwise.notify.event import OBJECT, UNPLACED, ErrorEvent, Event
from fanwise.notify.mask import FS_ERROR, MOVED_FROM, MOVED_TO, ONDIR, Q_OVERFLOW, RENAME

Above = Callable[[bytes], tuple[bytes, ...]]
"""The handles of the directories above a directory, nearest first; empty for one not known."""


def to_events(records: Iterable[Record], fs: Hashable, above: Above) -> Iterator[Event]:
    """Make the events of records, one at a time, so that ``above`` can follow what each one tells.

    A record RENAME gives RENAME, MOVED_FROM and MOVED_TO, which is what Linux sends: the source's
    mask needs RENAME alone. Nothing that Linux sent apart can be told apart when it merged in the
    source; a source that is drained at once merges little.
    """
    for record in records:
        mask = record.mask
        if mask & FS_ERROR:
            yield _error(record, fs, above)
            continue
        key = folder = name = folder2 = name2 = None
        for info in record.infos:
            if type(info) is Fid:
                if info.type == FID:
                    key = info.key
                elif info.type == NEW_DFID_NAME:
                    folder2, name2 = info.key, info.name
                else:
                    folder, name = info.key, info.name
                    if info.type == DFID or name == b".":
                        key, folder, name = folder, None, None
        if mask & Q_OVERFLOW:
            yield Event(Q_OVERFLOW, fs)
            continue
        if folder is not None:
            ancestors = above(folder)
        else:
            ancestors = above(key) if mask & ONDIR and key is not None else ()
        if not mask & RENAME:
            yield Event(mask, fs, key, folder, name, None, None, record.pid, ancestors)
            continue
        ancestors2 = above(folder2) if folder2 is not None else ()
        ondir, pid = mask & ONDIR, record.pid
        yield Event(mask, fs, key, folder, name, folder2, name2, pid, ancestors, ancestors2)
        yield Event(MOVED_FROM | ondir, fs, key, folder, name, None, None, pid, ancestors)
        yield Event(MOVED_TO | ondir, fs, key, folder2, name2, None, None, pid, ancestors2)


_NO_OBJECT = (0xFF).to_bytes(4, sys.byteorder)  # a handle of type FILEID_INVALID, without bytes


# Which directory a file is in is not in the record. A directory can be found by what is above it.
def _error(record: Record, fs: Hashable, above: Above) -> ErrorEvent:
    key, error, count = None, 0, 1
    for info in record.infos:
        if type(info) is Fid and info.key != _NO_OBJECT:
            key = info.key
        elif type(info) is FsError:
            error, count = info
    ancestors = above(key) if key is not None else ()
    return ErrorEvent(
        FS_ERROR,
        fs,
        key,
        pid=record.pid,
        ancestors=ancestors,
        count=count,
        error=error,
        scope=OBJECT if ancestors or key is None else UNPLACED,
    )
