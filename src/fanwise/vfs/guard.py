"""Freeze protection: who takes which level when, who may freeze, and what is asked before.

This is Linux's way since 6.8 (hooks outside of protection), with what it left inside: the open that
truncates. Another design is a subclass; each method is one decision of the debate.

REFS      none: a guard has no state of its own, the levels are the superblock's.
LOCKING   protection is outermost, before every lock of directories and inodes. The freezer shuts a
          level before it waits for those who are in, so who comes later waits for the thaw, also
          when the freezer itself waits.
Linux reference: fs/super.c (freeze_super, thaw_super), include/linux/fs.h (sb_start_write),
fs/read_write.c, fs/open.c, fs/namei.c (do_open).
"""

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fanwise.lifetime import Until

from .file import File
from .locks import Held
from .protocol import Op, T, fail
from .superblock import FREEZE, FS, LEVELS, PAGEFAULT, USER, WRITE, Superblock

if TYPE_CHECKING:
    from .vfs import Vfs

WRITING = "write"
SENDING = "sendfile"
TRUNCATING = "truncate"
TRUNCATING_OPEN = "truncating open"
"""What `Guard.guarded` is asked about."""


class Guard:
    """``hook-outside``: Linux's. ``inside`` is where a hook runs under protection all the same."""

    vfs: "Vfs"  # set by the Vfs that it is given to
    levels: Sequence[str] = LEVELS
    inside: frozenset[str] = frozenset({TRUNCATING_OPEN})

    # -- writers --

    def start(self, sb: Superblock, level: str) -> Op[Held]:
        """Take a level, waiting while it is shut; what the caller leaves when it is done.

        A design that does not wait raises OSError; one that takes none returns `locks.NOTHING`.
        """
        lock = sb.freeze.levels[level]
        if sb.freezable:
            yield from lock.start(f"start {level}")
        else:
            lock.start_now()
        return lock

    def start_now(self, sb: Superblock, level: str) -> Held | None:
        """Take a level without waiting; None while it is shut."""
        lock = sb.freeze.levels[level]
        return lock if lock.start_now() else None

    def guarded(
        self,
        sb: Superblock,
        what: str,
        hook: Callable[[], Op[None]],
        work: Callable[[], Op[T]],
    ) -> Op[T]:
        """Run ``hook()``, which may wait for a verdict, and ``work()`` under protection."""
        if what not in self.inside:
            yield from hook()
        held = yield from self.start(sb, WRITE)
        with held:
            if what in self.inside:
                yield from hook()
            return (yield from work())

    def silent(self, file: File) -> bool:
        """Whether nobody is asked about an access through ``file``; it may raise OSError, too."""
        return file.silent

    # -- freezers --

    def freeze(self, sb: Superblock, by: str) -> Op[None]:
        """Freeze for a holder of kind ``by`` (USER or KERNEL).

        Raises EOPNOTSUPP for a filesystem that cannot, EBUSY when such a holder has frozen it, and
        EINVAL for one that is not mounted.
        """
        if not sb.freezable:
            fail(errno.EOPNOTSUPP)
        freeze = sb.freeze
        yield from self.settle(sb)
        with sb.umount:
            if sb.state != "ACTIVE":
                fail(errno.EINVAL)
            if freeze.state == "FROZEN":
                if not self.may_freeze(sb, by):
                    fail(errno.EBUSY)
                freeze.by[by] = freeze.by.get(by, 0) + 1
                FREEZE.advance(freeze, "freeze again")
                return
            if not self.may_freeze(sb, by):
                fail(errno.EBUSY)
            sb.active += 1
            FREEZE.advance(freeze, "begin")
            if not sb.read_only:
                freeze.levels[WRITE].shut()
        if not sb.read_only:
            # s_umount is not held here: sb_start_write comes before it in the order of locks.
            yield from freeze.levels[WRITE].drain("wait for writers")
        yield from sb.umount.take("lock s_umount to freeze")
        with sb.umount:
            if not sb.read_only:
                yield from self.shut_rest(sb)
            freeze.by[by] = 1
            FREEZE.advance(freeze, "finish")

    def shut_rest(self, sb: Superblock) -> Op[None]:
        """Shut the levels after the first, one after the other, and write everything back."""
        for name in list(sb.freeze.levels)[1:]:
            if name == FS:
                yield from self.vfs.sync_filesystem(sb)
            yield f"shut {name}"
            sb.freeze.levels[name].shut()
            yield from sb.freeze.levels[name].drain(f"wait for {name}")

    def may_freeze(self, sb: Superblock, by: str) -> bool:
        """Whether a holder of this kind may freeze now; user space may once."""
        return by != USER or not sb.freeze.by.get(by)

    def thaw(self, sb: Superblock, by: str) -> Op[None]:
        """Thaw for a holder; the last one lets the writers in.

        Raises EINVAL when such a holder has not frozen it.
        """
        freeze = sb.freeze
        yield from sb.umount.take("lock s_umount to thaw")
        with sb.umount:
            if freeze.state != "FROZEN" or not freeze.by.get(by):
                fail(errno.EINVAL)
            yield "thaw"
            freeze.by[by] -= 1
            if any(freeze.by.values()):
                FREEZE.advance(freeze, "thaw one")
                return
            freeze.by.clear()
            for level in freeze.levels.values():
                level.unshut()
            FREEZE.advance(freeze, "thaw")
        yield from self.vfs.evict_deferred(sb)
        yield from self.vfs.deactivate(sb)

    def settle(self, sb: Superblock) -> Op[None]:
        """Take s_umount when no freeze is under way."""
        while True:
            yield from sb.umount.take("lock s_umount")
            if sb.freeze.settled():
                return
            sb.umount.release()
            yield Until(
                "wait for the other freezer", sb.freeze.settled, sb.freeze.levels[WRITE].gate
            )


__all__ = ["FS", "PAGEFAULT", "WRITE", "Guard"]
