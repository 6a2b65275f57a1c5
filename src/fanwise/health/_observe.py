"""One record of any channel, in the one form that is correlated."""

from typing import Literal

import msgspec

from fanwise.health._incident import Scope, State, TrippedBy

Dev = tuple[int, int]
Channel = Literal["fserror", "trace", "counters", "mounts", "kmsg", "probe"]
What = Literal[
    "error",  # ext4's metadata errors, and from Linux 7.0 on those of others
    "sick",  # xfs found a structure of an inode, a group or the filesystem broken
    "buffer",  # xfs: a metadata block failed to be read, to be verified or to be written
    "writeback",  # data, or a device's metadata, did not reach the disk
    "told",  # a program was told of a write-back error by fsync or syncfs
    "io",  # the block layer failed a request
    "stats",  # btrfs counted
    "shutdown",  # a filesystem was stopped
    "state",  # a mount shows that it is not as it should be
    "hung",  # a filesystem did not answer
    "warning",
]


class Check(msgspec.Struct, frozen=True, gc=False):
    """When an ext4 was checked last, and what tells whether it was checked since another reading.

    ``at`` is in seconds since the epoch, and no finer; ``mounts`` how often it was mounted writable
    since then. ``life`` is this life of its superblock, from mount to unmount (the inode number of
    its directory in sysfs: it has another one in each life), 0 where not known. ``writable`` says
    that it is mounted so, and is counted.
    """

    at: int
    mounts: int
    life: int = 0
    writable: bool = False


class Observation(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a channel saw.

    ``dev`` is the superblock's device, or a block device below it. ``time`` is seconds since the
    epoch, of the kernel where it gives one. ``errno`` is positive, 0 when not told. ``count`` is
    how many errors this one record stands for. ``start`` and ``length`` are bytes of the device,
    ``part`` names a device of several. ``life`` is which life of its superblock it was read in, see
    `Check`, 0 where not known. The rest is as in Incident; None is what is not told.
    """

    channel: Channel
    what: What
    dev: Dev
    time: float
    scope: Scope = "fs"
    errno: int = 0
    count: int = 1
    ino: int | None = None
    gen: int | None = None
    group: int | None = None
    start: int | None = None
    length: int | None = None
    part: str | None = None
    function: str | None = None
    line: int | None = None
    symbol: str | None = None
    operation: str | None = None
    state: State | None = None
    process: TrippedBy | None = None
    text: str | None = None
    life: int = 0

    @property
    def via(self) -> str:
        """The channel and what it saw, such as ``trace.io``: what counts are kept by."""
        return f"{self.channel}.{self.what}"
