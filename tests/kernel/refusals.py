"""Run as a program by test_fanotify_errors: does one thing in this process, prints how it ended.

Everything is imported before privileges go, because nobody may not be able to read the modules.
"""

import ctypes
import errno
import json
import os
import resource
import struct
import sys

from fanwise._errors import FanwiseError
from fanwise.kernel import fanotify as fan, handles, mounts
from fanwise.kernel.libc import libc

NUMBERS = {
    "x86_64": {"fanotify_init": 300, "fanotify_mark": 301, "name_to_handle_at": 303,
               "open_by_handle_at": 304, "statx": 332},
    "aarch64": {"fanotify_init": 262, "fanotify_mark": 263, "name_to_handle_at": 264,
                "open_by_handle_at": 265, "statx": 291},
}[os.uname().machine]  # fmt: skip
NUMBERS["statmount"] = 457
NUMBERS["listmount"] = 458

CLONE_NEWUSER = 0x1000_0000
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
CAP_AUDIT_WRITE, CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN = 29, 2, 21


# Groups are counted for each user, also those of a namespace, for who made it: whoever takes all
# takes them from everybody else who is that user.
OWN = 60_000 + os.getpid() % 5000


def become_nobody(uid=65534):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def enter_user_namespace(uid=0):
    os.seteuid(uid)
    assert libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0  # or its files in /proc are root's
    if libc.unshare(CLONE_NEWUSER) < 0:
        raise OSError(ctypes.get_errno(), "unshare")
    with open("/proc/self/uid_map", "w") as file:
        file.write(f"0 {uid} 1")


def drop(capability):
    """Remove one effective capability and stay root (capset(2), version 3)."""
    header = struct.pack("=Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("=6I", data.raw))
    words[3 * (capability // 32)] &= ~(1 << capability % 32)
    assert libc.capset(header, struct.pack("=6I", *words)) == 0


def install_filter(calls, code, first_argument=None):
    """A seccomp filter that answers these calls with an errno (with that first argument only)."""
    load, equal, answer = 0x20, 0x15, 0x06
    refuse, allow = 0x0005_0000 | code, 0x7FFF_0000
    program = []
    for call in calls:
        program.append((load, 0, 0, 0))
        if first_argument is None:
            program.append((equal, 0, 1, NUMBERS[call]))
        else:
            program.append((equal, 0, 3, NUMBERS[call]))
            program.append((load, 0, 0, 16))
            program.append((equal, 0, 1, first_argument))
        program.append((answer, 0, 0, refuse))
    program.append((answer, 0, 0, allow))
    code_bytes = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code_bytes))
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, 2, header) == 0


def seize_groups():
    for _ in range(100_000):
        fan.init(fan.FAN_REPORT_FID)


def unlimited():
    fan.init(fan.FAN_REPORT_FID | fan.FAN_UNLIMITED_QUEUE, path="/root/of/watch")


def mark_filesystem():
    fd = fan.init(fan.FAN_REPORT_FID)
    fan.mark(fd, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, fan.FAN_MODIFY, path="/")


def mark_unreadable():
    fd = fan.init(fan.FAN_REPORT_FID)
    fan.mark(fd, fan.FAN_MARK_ADD, fan.FAN_MODIFY, path=sys.argv[2])


def nobody_unlimited():
    become_nobody()
    unlimited()


def nobody_marks_a_filesystem():
    become_nobody()
    mark_filesystem()


def nobody_marks_unreadable():
    become_nobody()
    mark_unreadable()


def nobody_seizes_groups():
    become_nobody(OWN)
    seize_groups()


def seize_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
    seize_groups()


def namespace_root_unlimited():
    enter_user_namespace()
    unlimited()


def namespace_root_marks_a_filesystem():
    enter_user_namespace()
    mark_filesystem()


def namespace_root_seizes_groups():
    enter_user_namespace(OWN)
    seize_groups()


def marks_up_to_a_limit():
    # The limit of a user namespace of one's own: the machine's stays as it is.
    enter_user_namespace()
    with open("/proc/sys/user/max_fanotify_marks", "w") as limit:
        limit.write("3")
    fd = fan.init(fan.FAN_REPORT_FID)
    for name in "abcd":
        path = os.path.join(sys.argv[2], name)
        os.mkdir(path)
        fan.mark(fd, fan.FAN_MARK_ADD, fan.FAN_MODIFY, path=path)


def audit_without_its_capability():
    drop(CAP_AUDIT_WRITE)
    fan.init(fan.FAN_ENABLE_AUDIT)


def filter_init():
    install_filter(["fanotify_init"], errno.EPERM)
    fan.init(fan.FAN_CLASS_NOTIF)


def filter_init_as_if_absent():
    install_filter(["fanotify_init"], errno.ENOSYS)
    fan.init(fan.FAN_CLASS_NOTIF)


def filter_init_of_nobody():
    install_filter(["fanotify_init"], errno.EPERM)
    become_nobody()
    unlimited()


def filter_one_kind_of_group():
    install_filter(["fanotify_init"], errno.EPERM, fan.FAN_CLASS_CONTENT)
    os.close(fan.init(fan.FAN_CLASS_NOTIF))
    fan.init(fan.FAN_CLASS_CONTENT)


def filter_something_else_and_nobody():
    install_filter(["open_by_handle_at"], errno.EPERM)
    become_nobody()
    unlimited()


def filter_mark():
    install_filter(["fanotify_mark"], errno.EPERM)
    mark_filesystem()


def filter_mark_as_if_absent():
    install_filter(["fanotify_mark"], errno.ENOSYS)
    mark_filesystem()


def filter_handles():
    install_filter(["name_to_handle_at"], errno.EPERM)
    handles.name_to_handle("/")


def filter_open_by_handle():
    key, _ = handles.name_to_handle(sys.argv[2])
    install_filter(["open_by_handle_at"], errno.EPERM)
    handles.open_by_handle(os.open(sys.argv[2], os.O_RDONLY), key)


def open_by_handle_without_its_capability():
    key, _ = handles.name_to_handle(sys.argv[2])
    fd = os.open(sys.argv[2], os.O_RDONLY)
    drop(CAP_DAC_READ_SEARCH)
    handles.open_by_handle(fd, key)


def filter_statmount():
    install_filter(["statmount", "listmount"], errno.ENOSYS)
    assert not mounts.can_statmount()
    assert [mount.unique_id for mount in mounts.mounts()].count(None) == len(mounts.mounts()) > 0
    mounts.listmount()


def main():
    try:
        globals()[sys.argv[1]]()
    except FanwiseError as error:
        cause = error.__cause__
        assert isinstance(cause, OSError)
        print(
            json.dumps(
                {
                    "type": type(error).__name__,
                    "errno": errno.errorcode[cause.errno],
                    "reason": error.reason,
                    "remedy": error.remedy,
                    "path": getattr(error, "path", None),
                    "sysctl": getattr(error, "sysctl", None),
                }
            )
        )
    else:
        print(json.dumps({"type": None}))


if __name__ == "__main__":
    main()
