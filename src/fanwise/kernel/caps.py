"""What this process may do: effective capabilities, its user namespace, a seccomp filter.

The answers explain a refusal after it happened; nothing is refused because of them.
"""

import os
from typing import NamedTuple

CAP_DAC_READ_SEARCH = 2
CAP_SYS_ADMIN = 21
CAP_AUDIT_WRITE = 29

NAMES = {
    CAP_DAC_READ_SEARCH: "CAP_DAC_READ_SEARCH",
    CAP_SYS_ADMIN: "CAP_SYS_ADMIN",
    CAP_AUDIT_WRITE: "CAP_AUDIT_WRITE",
}

# The inode number of the first user namespace, which the kernel fixes (PROC_USER_INIT_INO in
# include/linux/proc_ns.h). /proc/self/uid_map cannot tell: a child's may be the identity too.
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD

_SECCOMP_MODE_FILTER = 2


class Credentials(NamedTuple):
    """What decides whether the kernel lets a thread do something.

    ``effective`` is the bit set of effective capabilities, ``filtered`` whether a seccomp filter
    is installed, ``initial`` whether the user namespace is the machine's first: only there do
    capabilities count for the whole machine.
    """

    effective: int
    filtered: bool
    initial: bool

    def holds(self, capability: int) -> bool:
        """Whether ``capability`` (a bit number) is effective and counts machine-wide."""
        return self.initial and bool(self.effective >> capability & 1)


def credentials() -> Credentials:
    """Read the calling thread's credentials from /proc (proc_pid_status(5)).

    Without /proc mounted nothing is claimed: no capability, no filter, the first namespace.
    """
    effective, filtered, initial = 0, False, True
    try:
        # thread-self: capabilities and filters belong to a thread, not to the process.
        with open("/proc/thread-self/status", "rb") as status:
            for line in status:
                name, _, value = line.partition(b":")
                if name == b"CapEff":
                    effective = int(value, 16)
                elif name == b"Seccomp":
                    filtered = int(value) == _SECCOMP_MODE_FILTER
        initial = os.stat("/proc/thread-self/ns/user").st_ino == _INITIAL_USER_NAMESPACE
    except OSError:
        pass
    return Credentials(effective, filtered, initial)
