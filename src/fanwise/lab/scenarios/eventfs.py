"""Scenario ``eventfs``: what a cached directory entry may still reach after its object is gone.

REFS, LOCKING and LIFETIME of the kernel's tree are in `_eventfs_kernel`, of fanwise's own in
`_eventfs_numbers`.
"""

from fanwise.lab import Scenario, World

from ._eventfs_kernel import DENTRY, EI, SOURCE, Dentry, Ei, Eventfs, Source, Task
from ._eventfs_numbers import NODE, Numbers

SCENARIO = Scenario(
    "eventfs",
    "What a cached directory entry may still reach",
    """\
The `events` directory of tracefs has thousands of files, and few of them are ever looked at. So
since Linux 6.6 the tree is kept as small records (`eventfs_inode`, here *ei*), and the entries and
inodes that the VFS wants are made when somebody walks there. What an entry leads to can go at any
time: a module is unloaded, a probe is deleted. Behind each file stand callbacks into that module.
Who holds whom, and who looks when, was argued out in the winter after, and mended for years.

**Throw it away early.** If an entry does not outlive its last user, hardly any entry can be stale.
It is safe, once the open is; but the same names are walked again and again by tools, and each walk
builds again what the last one threw away. tracefs therefore keeps these entries when nobody uses
them, and since 2025 says so in its `d_delete`.

**Leave it alone.** A cache is only a cache, so why touch it at a removal? Because the entry is
also the way in: a name that was looked up before leads to the removed object for as long as memory
lasts, and whoever opens it runs into code that may not be there any more.

**Remember where it is.** The first version let the ei point to its entry, to find it at a removal,
and the entry to its ei, without counting either. The shrinker frees the entry between the moment
in which the removal has read the pointer and the moment in which it follows it. A hook that clears
the pointer when the entry dies does not help: it is not ordered against whoever has read it.

**Count, flag, and look at each walk.** The rewrite of January 2024 turned it round: the ei is the
truth; an entry holds a reference to it; a removal sets a flag, and each walk looks at the flag. An
open that races with the removal was taken to be harmless: it would see what had been there. It
does: the walk looked, the removal ran, and then the open calls back. Looking earlier cannot help.

**Look again where it counts.** What holds is to ask once more at the open, under the lock under
which the removal sets the flag, and to take a reference there, so that a later read can ask again.
To ask, the open must touch the source, so the ei holds the source until the last entry is gone.

**Free it late enough.** Two kinds of readers stand on an ei without a reference: a listing, under
SRCU, and a walk that looks at the flag, under RCU. The rewrite waited for the second kind only, a
fix half a year later for the first kind only. The model of the merged design waits for both.

**Number, and hold nothing.** fanwise's own tree is served from user space. There the kernel's
cache knows objects only by number, and a number that is never given twice is as good as a
reference: a stale one misses. What is taken out of the table is found by no new request, the
removal waits for the calls in flight, and it tells the cache afterwards, from a thread of its own,
because the cache may hold a directory's lock while it waits for an answer.
""",
    properties={
        "no-callback-after-removal": "Once a removal has returned, no callback of the removed"
        " object starts, and none is still running.",
        "cached-stays-cached": "What a look-up has built is found by the next one, unless it was"
        " removed or memory was short.",
        "unique-directory-inodes": "No two directories ever have the same inode number, and none"
        " has the number of the files.",
        "loop-free-find": "`find` never meets a directory with the number of one of its ancestors,"
        " and `d_ino` is `st_ino`.",
        "opened-is-read": "Who reads an open file reaches the object that was opened, or none.",
        "name-leads-to-present": "When everything is quiet, a name leads to the object that has it"
        " now.",
    },
    lifetimes=[EI, DENTRY, SOURCE],
)


class DropAtLastUse(Eventfs):
    """As merged, but no entry outlives its last user."""

    def keep(self, dentry: Dentry) -> bool:
        """Keep none."""
        return False


class FreedFlag(Eventfs):
    """As merged, but the open does not look again."""

    def open(self, source: Source) -> Task[bool]:
        """Open what the walk led to."""
        yield "open"
        self.call(source, "open")
        source.refs.get()
        return True


class LeaveAlone(FreedFlag):
    """References, but no flag: what is cached at a removal stays as it is."""

    def dead(self, ei: Ei) -> bool:
        """Find none dead: there is no flag."""
        return False


class Uncounted(Eventfs):
    """The ei points to its entry and the entry to its ei; a removal follows the first."""

    def stale(self, dentry: Dentry) -> bool:
        """Find none stale: nobody looks."""
        return False

    def point(self, ei: Ei, dentry: Dentry) -> None:
        """Remember the entry of a directory."""
        if dentry.parent is self.top:
            ei.dentry = dentry

    def let_go(self, dentry: Dentry) -> None:
        """Forget it; ``d_iput``, which is not ordered against who has read the pointer."""
        if dentry.parent is self.top and not dentry.ei.flagged:
            dentry.ei.dentry = None

    def retire(self, ei: Ei) -> Task[None]:
        """Read the pointer, and follow it."""
        dentry = ei.dentry
        yield "invalidate its entry"
        if dentry is not None:
            self.unhash(dentry)


@SCENARIO.design("drop-at-last-use", "No entry outlives its last user.")
def drop_at_last_use(world: World) -> None:
    DropAtLastUse(world).start()


@SCENARIO.design("leave-alone", "A removal does not touch what is cached.")
def leave_alone(world: World) -> None:
    LeaveAlone(world).start()


@SCENARIO.design(
    "uncounted-pointers", "Objects and entries point to each other without references."
)
def uncounted_pointers(world: World) -> None:
    Uncounted(world).start()


@SCENARIO.design(
    "freed-flag", "A removal sets a flag, entries hold references, each walk looks at the flag."
)
def freed_flag(world: World) -> None:
    FreedFlag(world).start()


@SCENARIO.design(
    "freed-recheck",
    "The same, and the open looks again under the lock and takes its reference there.",
)
def freed_recheck(world: World) -> None:
    Eventfs(world).start()


@SCENARIO.design(
    "serial-numbers",
    "Objects are known by numbers that are never reused; nothing holds them.",
    lifetimes=[NODE, SOURCE],
)
def serial_numbers(world: World) -> None:
    Numbers(world).start()
