"""What a filesystem stores, and what lives on when nothing of it is cached.

A disk with ``memory`` is a tmpfs: what is in the caches is all there is, so names pin their
dentries, and nothing is written back.

Metadata is written through, file content is written back.
"""

from collections.abc import Mapping
from typing import TypeAlias

from .protocol import fail

FILE = "file"
DIR = "dir"

Tree: TypeAlias = Mapping[str, "bytes | Tree"]
"""What a new disk holds: content of files, and directories as mappings."""

PAGE = 4096
ROOT = 1


class Node:
    """One object as it is stored: a file with ``data`` by page, or a directory with ``entries``."""

    __slots__ = ("data", "entries", "generation", "kind", "mode", "nlink", "number", "size")

    def __init__(self, number: int, generation: int, kind: str, mode: int) -> None:
        self.number = number
        self.generation = generation
        self.kind = kind
        self.mode = mode
        self.nlink = 0
        self.size = 0
        self.entries: dict[bytes, int] = {}
        self.data: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"<Node {self.number}.{self.generation} {self.kind} nlink {self.nlink}>"


class Disk:
    """The stored objects by number; a number is used again, with another generation.

    ``page`` is the size of a page in bytes. ``write_error`` and ``read_error`` are the errno with
    which the device fails from now on, 0 for none.
    """

    __slots__ = ("generation", "memory", "nodes", "page", "read_error", "write_error")

    def __init__(self, tree: Tree | None = None, page: int = PAGE, memory: bool = False) -> None:
        self.page = page
        self.memory = memory
        self.nodes: dict[int, Node] = {}
        self.generation = 0
        self.write_error = self.read_error = 0
        root = self.make(DIR, 0o755)
        root.nlink = 2
        if tree:
            self._fill(root, tree)

    def make(self, kind: str, mode: int) -> Node:
        """Make an object with no name yet, with the smallest number that is free."""
        number = ROOT
        while number in self.nodes:
            number += 1
        self.generation += 1
        node = self.nodes[number] = Node(number, self.generation, kind, mode)
        return node

    def enter(self, folder: Node, name: bytes, node: Node) -> None:
        """Give an object a name."""
        folder.entries[name] = node.number
        if node.kind == DIR:
            folder.nlink += 1
            node.nlink = 2
        else:
            node.nlink += 1

    def remove(self, folder: Node, name: bytes) -> None:
        """Take a name from an object."""
        node = self.nodes[folder.entries.pop(name)]
        if node.kind == DIR:
            folder.nlink -= 1
            node.nlink = 0
        else:
            node.nlink -= 1

    def move(self, old: Node, name: bytes, new: Node, new_name: bytes) -> None:
        """Give an object another name, which no object has."""
        number = new.entries[new_name] = old.entries.pop(name)
        if self.nodes[number].kind == DIR:
            old.nlink -= 1
            new.nlink += 1

    def exchange(self, old: Node, name: bytes, new: Node, new_name: bytes) -> None:
        """Let two names change what they lead to."""
        one, other = old.entries[name], new.entries[new_name]
        old.entries[name], new.entries[new_name] = other, one
        change = (self.nodes[other].kind == DIR) - (self.nodes[one].kind == DIR)
        old.nlink += change
        new.nlink -= change

    def free(self, node: Node) -> None:
        """Forget an object that has no name and no user."""
        del self.nodes[node.number]

    def read(self, node: Node, number: int) -> bytes:
        """Return a page. Raises OSError with the device's error."""
        if self.read_error:
            fail(self.read_error)
        return node.data.get(number, b"")

    def _fill(self, folder: Node, tree: Tree) -> None:
        for name, content in tree.items():
            if isinstance(content, bytes):
                node = self.make(FILE, 0o644)
                node.size = len(content)
                for start in range(0, len(content), self.page):
                    node.data[start // self.page] = content[start : start + self.page]
            else:
                node = self.make(DIR, 0o755)
                self._fill(node, content)
            self.enter(folder, name.encode(), node)
            if node.kind == DIR:
                node.nlink += sum(self.nodes[n].kind == DIR for n in node.entries.values())
