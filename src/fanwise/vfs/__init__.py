"""An in-memory VFS with Linux's hooks: what the lab's scenarios run on, checked against Linux.

Operations are generators that yield each step's name; see `protocol`. Layers, each a module on top
of the one before: hooks, icache, dcache, namespace, namei, files, vfs.
"""

from .deleting import Deleting
from .dentry import Dentry
from .disk import Disk
from .file import File
from .guard import Guard
from .inode import Inode
from .locks import Level, Mutex, RwSem
from .mount import Mount, Path
from .protocol import Op, finish
from .superblock import Superblock
from .vfs import Vfs

__all__ = [
    "Deleting",
    "Dentry",
    "Disk",
    "File",
    "Guard",
    "Inode",
    "Level",
    "Mount",
    "Mutex",
    "Op",
    "Path",
    "RwSem",
    "Superblock",
    "Vfs",
    "finish",
]
