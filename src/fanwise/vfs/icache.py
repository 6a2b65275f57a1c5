"""The inode cache: getting inodes, letting go of them, pages in and out.

LOCKING   counting and hashing are atomic; eviction takes the internal freeze level.
Linux reference: fs/inode.c, mm/filemap.c, mm/page-writeback.c.
"""

from fanwise.lifetime import Until

from . import errseq
from .hooks import Hooks
from .inode import INODE, Inode, Page
from .protocol import Op
from .superblock import FS, Superblock


class Inodes(Hooks):
    """The layer of inodes and pages."""

    def iget(self, sb: Superblock, number: int) -> Op[Inode | None]:
        """Return the inode of a number, referenced; None if there is no such object.

        Waits for one that is being evicted, and looks again.
        """
        while True:
            yield "get inode"
            inode = sb.inodes.get(number)
            if inode is None:
                node = sb.disk.nodes.get(number)
                return None if node is None else Inode(sb, node, self.current)
            if inode.state == "LIVE":
                inode.refs += 1
                return inode
            yield Until("wait for eviction", inode.gone, inode)

    def ihold(self, inode: Inode) -> None:
        """Reference an inode that the caller knows to be referenced."""
        inode.refs += 1

    def iput(self, inode: Inode) -> Op[None]:
        """Let go of an inode; the last one evicts an object without a name."""
        inode.refs -= 1
        if not inode.refs and (not inode.links or inode.sb.state != "ACTIVE"):
            yield from self.evict(inode)

    def evict(self, inode: Inode) -> Op[None]:
        """Evict an inode without references: its pages, its object if it has no name, itself.

        Nobody waits for a frozen filesystem here: what has no name goes when it is thawed.
        """
        sb = inode.sb
        if inode.links:
            INODE.advance(inode, "evict")
            yield "evict"
            self._forget(inode)
            return
        held = self.guard.start_now(sb, FS)
        if held is None:
            sb.deferred.append(inode)
            return
        with held:
            INODE.advance(inode, "evict")
            yield "evict"
            sb.disk.free(inode.node)
            self._forget(inode)

    def evict_deferred(self, sb: Superblock) -> Op[None]:
        """Evict what could not go while the filesystem was frozen."""
        while sb.deferred:
            yield "evict deferred"
            if sb.deferred:
                yield from self.evict(sb.deferred.pop(0))

    def _forget(self, inode: Inode) -> None:
        inode.pages.clear()
        del inode.sb.inodes[inode.number]
        INODE.advance(inode, "free")

    # -- pages --

    def fill(self, inode: Inode, number: int) -> Op[None]:
        """Read a page into the cache. Raises OSError of the device."""
        yield "read page"
        if number not in inode.pages:
            inode.pages[number] = Page(inode.sb.disk.read(inode.node, number))

    def put_bytes(self, inode: Inode, data: bytes, at: int) -> Op[None]:
        """Copy bytes into a file's pages and extend it. The caller holds the inode's lock."""
        size = inode.sb.disk.page
        done = 0
        while done < len(data):
            number, start = divmod(at + done, size)
            part = data[done : done + size - start]
            yield "copy to page"
            page = inode.pages.get(number)
            if page is None:
                if number in inode.node.data and len(part) < size:
                    yield from self.fill(inode, number)
                    continue  # it may be gone again
                page = inode.pages[number] = Page(b"")
            old = page.data
            page.data = old[:start].ljust(start, b"\0") + part + old[start + len(part) :]
            page.dirty = not inode.sb.disk.memory
            done += len(part)
            inode.node.size = max(inode.node.size, at + done)

    def get_bytes(self, inode: Inode, at: int, count: int) -> Op[bytes]:
        """Copy bytes out of a file's pages, no further than its end."""
        size = inode.sb.disk.page
        out = b""
        while len(out) < count and at + len(out) < inode.node.size:
            number, start = divmod(at + len(out), size)
            yield "copy from page"
            page = inode.pages.get(number)
            if page is None and number in inode.node.data:
                yield from self.fill(inode, number)
                continue
            data = b"" if page is None else page.data  # a hole
            here = min(size - start, count - len(out), inode.node.size - at - len(out))
            if here <= 0:
                break  # truncated meanwhile
            out += data[start : start + here].ljust(here, b"\0")
        return out

    def cut(self, inode: Inode, length: int) -> None:
        """Make a file ``length`` bytes long. The caller holds the inode's lock."""
        size = inode.sb.disk.page
        node = inode.node
        last, rest = divmod(length, size)
        for number in [n for n in inode.pages if n > last or (n == last and not rest)]:
            del inode.pages[number]
        for number in [n for n in node.data if n > last or (n == last and not rest)]:
            del node.data[number]
        if rest:
            if last in inode.pages:
                inode.pages[last].data = inode.pages[last].data[:rest]
            if last in node.data:
                node.data[last] = node.data[last][:rest]
        node.size = length

    def write_back(self, inode: Inode) -> Op[None]:
        """Write dirty pages back; one that fails is clean after that, and the error recorded."""
        for number in sorted(inode.pages):
            page = inode.pages.get(number)
            if page is None or not page.dirty:
                continue
            yield "write page back"
            if not page.dirty or inode.pages.get(number) is not page:
                continue  # somebody else did, or it was truncated
            page.dirty = False
            sb = inode.sb
            error = sb.disk.write_error
            if error:
                inode.wb_err = errseq.record(inode.wb_err, error)
                sb.wb_err = errseq.record(sb.wb_err, error)
            else:
                inode.node.data[number] = page.data

    def sync_filesystem(self, sb: Superblock) -> Op[None]:
        """Write every dirty page of a filesystem back."""
        for inode in list(sb.inodes.values()):
            if inode.state == "LIVE" and inode.dirty:
                yield from self.write_back(inode)
