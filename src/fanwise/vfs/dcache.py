"""The dentry cache: names found, made, removed, moved and forgotten.

LOCKING   who changes what a name leads to holds its directory's lock; hashing and counting are
          atomic, because Linux has a spinlock a dentry for them.
Linux reference: fs/dcache.c.
"""

import errno

from fanwise.notify.mask import DELETE_SELF

from .dentry import DENTRY, Dentry
from .icache import Inodes
from .inode import Inode
from .protocol import Op, fail
from .superblock import Superblock

NAME_MAX = 255


class Dentries(Inodes):
    """The layer of cached names."""

    # -- finding --

    def look(self, parent: Dentry, name: bytes) -> Op[Dentry]:
        """Return the dentry of a name, referenced; a negative one if there is no such name.

        Raises ENOENT below a directory that was removed, and errors of the device.
        """
        yield "look up"
        dentry = self.d_lookup(parent, name)
        if dentry is not None:
            return dentry
        folder = parent.target
        yield from folder.lock.share("lock directory to look up")
        with folder.lock:
            return (yield from self.look_locked(parent, name))

    def d_lookup(self, parent: Dentry, name: bytes) -> Dentry | None:
        """Return a cached name, referenced, without asking the filesystem."""
        dentry = parent.children.get(name)
        if dentry is not None:
            dentry.refs += 1
        return dentry

    def look_locked(self, parent: Dentry, name: bytes) -> Op[Dentry]:
        """As `look`, when the caller holds the directory's lock, shared or not."""
        folder = parent.target
        if folder.dead:
            fail(errno.ENOENT)
        if len(name) > NAME_MAX:
            fail(errno.ENAMETOOLONG)
        dentry = self.d_lookup(parent, name)
        if dentry is not None:
            return dentry
        yield "ask filesystem"
        number = folder.node.entries.get(name)
        inode = None
        if number is not None:
            inode = yield from self.iget(parent.sb, number)
        other = self.d_lookup(parent, name)  # another look-up was faster
        if other is not None:
            if inode is not None:
                yield from self.iput(inode)
            return other
        dentry = Dentry(parent.sb, parent, name)
        parent.children[name] = dentry
        if inode is None:
            DENTRY.advance(dentry, "add negative")
        else:
            self._attach(dentry, inode)
            DENTRY.advance(dentry, "add")
        return dentry

    def instantiate(self, dentry: Dentry, inode: Inode) -> None:
        """Let a negative dentry lead to a new inode, whose reference it takes over."""
        self._attach(dentry, inode)
        if dentry.sb.disk.memory:
            dentry.refs += 1  # a tmpfs has its names nowhere else
        DENTRY.advance(dentry, "make")

    # -- letting go --

    def dget(self, dentry: Dentry) -> None:
        """Reference a dentry that the caller knows to be referenced."""
        dentry.refs += 1

    def dput(self, dentry: Dentry) -> Op[None]:
        """Let go of a dentry. The last one kills it unless it can stay cached."""
        here: Dentry | None = dentry
        while here is not None:
            here.refs -= 1
            if here.refs or self.retained(here):
                return
            here = yield from self.kill(here)

    def retained(self, dentry: Dentry) -> bool:
        """Whether a dentry that nobody references stays cached."""
        if dentry.sb.state != "ACTIVE":
            return False
        return dentry.state == "POSITIVE" or (
            dentry.state == "NEGATIVE" and not dentry.sb.disk.memory
        )

    def kill(self, dentry: Dentry) -> Op[Dentry | None]:
        """Free a dentry without references; its parent, for the caller to let go of."""
        self._unhash(dentry)
        inode = self._detach(dentry)
        DENTRY.advance(dentry, "kill")
        if inode is not None:
            yield from self.let_go(inode)
        return dentry.parent

    def let_go(self, inode: Inode) -> Op[None]:
        """Let go of an inode that a name has left; without names and users it dies here."""
        if not inode.links:
            yield from self.tell_inode(DELETE_SELF, inode)
        yield from self.iput(inode)

    # -- removing and moving; the caller holds the directories' locks --

    def d_delete(self, dentry: Dentry) -> Op[None]:
        """Let a removed name lead nowhere: negative, or unhashed while others use the dentry."""
        yield "d_delete"
        if dentry.refs == 1:
            yield from self.let_go(self.make_negative(dentry))
        else:
            self.d_drop(dentry)

    def make_negative(self, dentry: Dentry) -> Inode:
        """Part a positive dentry from its inode, whose reference is the caller's then."""
        inode = self._detach(dentry)
        assert inode is not None
        DENTRY.advance(dentry, "delete")
        return inode

    def d_drop(self, dentry: Dentry) -> None:
        """Unhash a dentry: no look-up finds it any more."""
        if dentry.state in ("POSITIVE", "NEGATIVE"):
            self._unhash(dentry)
            DENTRY.advance(dentry, "drop")

    def d_move(self, dentry: Dentry, target: Dentry) -> None:
        """Let ``dentry`` take the place of ``target``, which is unhashed and keeps its name."""
        self.d_drop(target)
        self._place(dentry, target.parent, target.name)

    def d_exchange(self, one: Dentry, other: Dentry) -> None:
        """Let two dentries change places."""
        parent, name = one.parent, one.name
        other_parent, other_name = other.parent, other.name
        self._unhash(other)
        self._place(one, other_parent, other_name)
        other.parent = parent
        other.name = name
        assert parent is not None
        assert other_parent is not None
        parent.refs += 1
        other_parent.refs -= 1
        parent.children[name] = other
        DENTRY.advance(other, "move")

    # -- forgetting --

    def cached(self, sb: Superblock) -> list[Dentry]:
        """Return the dentries that a look-up can reach, those further down first."""
        found = [] if sb.root is None else [sb.root]
        for dentry in found:
            found += dentry.children.values()
        return found[::-1]

    def shrink(self, sb: Superblock, below: Dentry | None = None) -> Op[None]:
        """Kill the cached dentries that nobody references, below one or everywhere."""
        for dentry in self.cached(sb):
            if dentry.refs or (below is not None and not dentry.within(below)):
                continue
            yield "shrink dentry"
            if not dentry.refs and dentry.state in ("POSITIVE", "NEGATIVE"):
                parent = yield from self.kill(dentry)
                if parent is not None:
                    yield from self.dput(parent)

    def drop_caches(self, sb: Superblock) -> Op[None]:
        """Forget what can be read again: clean pages, dentries and inodes without references.

        What has to be written back stays, and so do marked inodes.
        """
        yield from sb.umount.share("lock s_umount to drop caches")
        with sb.umount:
            if sb.state == "ACTIVE":
                yield from self._drop_caches(sb)

    def _drop_caches(self, sb: Superblock) -> Op[None]:
        yield "drop pages"
        for inode in sb.inodes.values():
            if not sb.disk.memory and inode.state == "LIVE":
                clean = [number for number, page in inode.pages.items() if not page.dirty]
                for number in clean:
                    del inode.pages[number]
        yield from self.shrink(sb)
        for inode in list(sb.inodes.values()):
            if inode.refs or inode.state != "LIVE" or not inode.links:
                continue
            yield "prune inode"
            if (
                not inode.refs
                and inode.links
                and inode.state == "LIVE"
                and not inode.dirty
                and not self.marked(inode)
            ):
                yield from self.evict(inode)

    def marked(self, inode: Inode) -> bool:
        """Whether a mark keeps an inode cached (one that is not evictable)."""
        return self.notify is not None and self.notify.marked(inode.sb.key, inode.key)

    # -- parts --

    def _attach(self, dentry: Dentry, inode: Inode) -> None:
        dentry.inode = inode
        inode.dentries.append(dentry)

    def _detach(self, dentry: Dentry) -> Inode | None:
        inode, dentry.inode = dentry.inode, None
        if inode is not None:
            inode.dentries.remove(dentry)
        return inode

    def _unhash(self, dentry: Dentry) -> None:
        parent = dentry.parent
        if parent is not None and parent.children.get(dentry.name) is dentry:
            del parent.children[dentry.name]

    def _place(self, dentry: Dentry, parent: Dentry | None, name: bytes) -> None:
        old = dentry.parent
        assert parent is not None
        assert old is not None
        self._unhash(dentry)
        dentry.parent, dentry.name = parent, name
        parent.refs += 1
        old.refs -= 1
        parent.children[name] = dentry
        DENTRY.advance(dentry, "move")
