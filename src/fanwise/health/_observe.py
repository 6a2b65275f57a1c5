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


class Observation(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a channel saw.

    ``dev`` is the superblock's device, or a block device below it. ``time`` is seconds since the
    epoch, of the kernel where it gives one. ``errno`` is positive, 0 when not told. ``count`` is
    how many errors this one record stands for. ``start`` and ``length`` are bytes of the device,
    ``part`` names a device of several. The rest is as in Incident; None is what is not told.
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

    @property
    def via(self) -> str:
        """The channel and what it saw, such as ``trace.io``: what counts are kept by."""
        return f"{self.channel}.{self.what}"
