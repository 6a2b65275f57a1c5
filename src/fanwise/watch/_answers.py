"""Whether a filesystem answers: asked by a process that may wait for ever in our place.

What is behind a network, or a program (FUSE), may not answer, and whoever asks it then waits where
no signal reaches: a thread of ours could never be ended. So before a mount that came by itself is
touched, an exec'ed process asks it, and only when that has ended somebody here does.

REFS      a Question owns its process and a pidfd, which is readable when there is an answer.
LIFETIME  `end` closes and reaps; a process that cannot be killed is left to itself.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from fanwise.names.child import Helpers, spawn

PATIENCE = 1.0  # seconds to wait for an answer, for all that are asked at once

# What asks nobody. Of what is not known here it costs a process to find out.
_LOCAL = {
    "autofs", "bcachefs", "binfmt_misc", "bpf", "btrfs", "cgroup", "cgroup2", "configfs",
    "cpuset", "cramfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "erofs", "exfat", "ext2",
    "ext3", "ext4", "f2fs", "functionfs", "fusectl", "hfs", "hfsplus", "hugetlbfs", "iso9660",
    "jffs2", "jfs", "minix", "mqueue", "msdos", "nilfs2", "nsfs", "ntfs3", "proc", "pstore",
    "ramfs", "resctrl", "romfs", "rpc_pipefs", "securityfs", "selinuxfs", "smackfs", "squashfs",
    "sysfs", "tmpfs", "tracefs", "ubifs", "udf", "vfat", "xfs", "zfs", "zonefs",
}  # fmt: skip

_CODE = "import os, sys; os.statvfs(sys.argv[1]); os.stat(sys.argv[1])"

_stuck: list["subprocess.Popen[bytes]"] = []  # killed, and still waiting


def may_wait(fstype: str) -> bool:
    """Whether a filesystem of this type may have to ask somebody who does not answer."""
    return fstype not in _LOCAL


class Question:
    """Asks a filesystem for its figures. Raises OSError when no process can be started."""

    def __init__(self, path: bytes, helpers: Helpers | None) -> None:
        _stuck[:] = [process for process in _stuck if process.poll() is None]
        command = [sys.executable, "-IBS", "-c", _CODE, os.fsdecode(path)]
        self._owner = os.getpid()
        self._helpers = helpers
        self._process = spawn(command, helpers)
        self.fd = -1
        try:
            self.fd = os.pidfd_open(self._process.pid)
        except OSError:
            self.end()
            raise

    @property
    def answered(self) -> bool:
        """Whether there is an answer, be it an error."""
        return _readable([self.fd], 0)

    def end(self) -> None:
        """Close it, whether there is an answer or not; idempotent."""
        if self._owner != os.getpid():  # forked: the process is the parent's
            self._process.returncode = 0
        elif self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            if self._helpers is None:
                if self._process.poll() is None:
                    _stuck.append(self._process)
            elif self.fd >= 0 and _readable([self.fd], 0.1):
                self._helpers.leave(self._process)
            else:
                self._process.returncode = 0  # never reaped: its number is not to be reused
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def wait(questions: Sequence[Question]) -> None:
    """Wait until all have an answer, but not for longer than PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    for question in questions:
        _readable([question.fd], max(0.0, deadline - time.monotonic()))


def _readable(fds: Sequence[int], seconds: float) -> bool:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
