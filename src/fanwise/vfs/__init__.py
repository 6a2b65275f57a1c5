"""An in-memory VFS with Linux's hooks: what the lab's scenarios run on, checked against Linux.

Operations are generators that yield each step's name; see `protocol`. Layers, each a module on top
of the one before: hooks, icache, dcache, namespace, namei, files, vfs.
"""

from .deleting import Deleting as Deleting
from .dentry import Dentry as Dentry
from .disk import Disk as Disk
from .file import File as File
from .guard import Guard as Guard
from .inode import Inode as Inode
from .locks import Level as Level, Mutex as Mutex, RwSem as RwSem
from .mount import Mount as Mount, Path as Path
from .protocol import Op as Op, finish as finish
from .superblock import Superblock as Superblock
from .vfs import Vfs as Vfs
