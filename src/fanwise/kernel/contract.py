"""What the native decoder and tree and their Python twins have in common with who uses them.

The same numbers stand in `_decode.c` and `_tree.h`; the tests of both twins compare the answers.
"""

# -- bits of a record's mask --

MODIFY = 0x2
ATTRIB = 0x4
CLOSE_WRITE = 0x8
CREATE = 0x100
DELETE = 0x200
DELETE_SELF = 0x400
Q_OVERFLOW = 0x4000
RENAME = 0x10000000
ONDIR = 0x40000000
NAMED = CREATE | DELETE | RENAME
BOTH = CREATE | DELETE

(
    STOP_NONE,
    STOP_DIR,
    STOP_SELF,
    STOP_UNKNOWN,
    STOP_HASH,
    STOP_BOTH,
    STOP_REPLACED,
    STOP_OVERFLOW,
    STOP_FILES,
    STOP_NAMELESS,
) = range(10)

N_CREATE = 1
N_DELETE = 2
N_BOTH = 4
N_ATTRIB = 8
N_GONE = 16
N_UNKNOWN = 32
N_BORN = 64
N_DIR = 128
N_TWICE = 256  # named again after a deletion, or created while it had a name

# (mask, pid, time, directory key, name, new directory key, new name, target key, victim key)
Record = tuple[
    int,
    int,
    float,
    bytes | None,
    bytes | None,
    bytes | None,
    bytes | None,
    bytes | None,
    bytes | None,
]

# One bit of the mask -> one bit of the index into the table of kinds.
_BITS = (CREATE, 0x2, 0x8, ATTRIB, RENAME, DELETE, 0x20, 0x1, 0x1000)


def kind_index(mask: int) -> int:
    """Place of a mask in the table of 512 kind tuples."""
    return sum(1 << i for i, bit in enumerate(_BITS) if mask & bit)


# -- flags and scopes of a directory in the tree --

ROOT = 1
TOP = 2
EXCLUDED = 4
FILES = 8
CURRENT = 16
ZOMBIE = 32
SCANNED = 64
FREE = 128
# What a caller may set; the other two are the tree's own.
SETTABLE = ROOT | TOP | EXCLUDED | FILES | CURRENT | SCANNED

IN = 1
IN_CURRENT = 2
IN_FILES = 4

# What a drain notes of the directories in records that it discards, and of how many at most.
NOTE_NAMES = 1  # its names, or what they lead to, changed
NOTE_SELF = 2  # it came, went or moved itself
NOTED = 2048

# -- the index --

# What `Index.diff` found of a name.
CREATED = 1
DELETED = 2
MODIFIED = 4
ATTRIBUTES = 8
REPLACED = 16  # another file or type under the name
WAS_DIR = 32  # with REPLACED: what was there was a directory

# An entry of a listing (scan_dirs with names=2), its name behind it: identity (inode and birth
# time, mixed), size, mtime and ctime in ns, flags, length of the name, 0.
LISTED = "=QQqqIHH"
LISTED_DIR = 1
LISTED_HIDDEN = 2  # a mount lies over it, or it cannot be looked at: the name and the type count

# What mark_dirs brings: files too; and what is in directories that have two links.
LIST_FILES, LIST_LEAVES = 1, 2

KEY_MAX = 132
NAME_MAX = 65535
