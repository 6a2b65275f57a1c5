"""Paths of inodes: asked of a model, of a handle, of the filesystem, and by a bounded search.

An incident goes out at once with the inode, and is completed when a path comes. Health never scans
ahead: reading a whole disk that fails harms it. For the engine, as its ``Locator``:

    locator = Paths()                     # or Paths(model=...), see `Model`
    locator.locate(incident)              # any object with id, fs and object, as Incident has them
    locator.found()                       # [Found]: incident's id, its paths; never waits
    locator.filenos()                     # readable when there may be something
    locator.hung                          # filesystems (MAJOR:MINOR) whose helper does not return

`Locate` below it is for whoever wants more: all hard links, and the reason where there is no path.

REFS      one helper at most for each filesystem; what comes meanwhile waits for it, in order.
LOCKING   none: one owner.
LIFETIME  see HELPER. A helper has a deadline. One that is late is killed; one that the kernel does
          not let die is left there and told as hanging: all questions about its filesystem are
          answered with that, and no other helper is started, until it is gone. `close` kills all,
          and leaves what cannot die (see _helpers).
"""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from fanwise.health._helpers import end
from fanwise.kernel.mounts import mounts
from fanwise.lifetime import Lifetime

SECONDS, ENTRIES = 20.0, 500_000
"""Limits of one search."""

MARGIN = 5.0
"""Seconds that a helper has beyond its search."""

_DYING = 0.5  # seconds that a killed helper has to be gone
_MOST_WAITING = 1000  # questions of one filesystem
Way = Literal["handle", "filesystem", "search"]
_WAYS: tuple[Way, ...] = ("handle", "filesystem", "search")

_CHILD = str(Path(__file__).with_name("_locate_child.py"))

Source = Literal["model", "handle", "filesystem", "search"]

Model = Callable[[str, int, bytes | None], str | None]
"""A names model that knows some paths: device (MAJOR:MINOR), inode, key or None -> path or None."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Where is this inode? ``tag`` comes back with the answer.

    ``device`` is MAJOR:MINOR of the superblock, ``point`` a mount point of it. ``gen`` is the
    inode's generation and ``key`` its file handle's key, None where not known. ``ways`` are tried
    in this order. With ``path`` it is only asked what lies above that. With ``start`` and
    ``length``, bytes of the device, it is asked whose they are, and ``ino`` says nothing.
    """

    tag: str
    device: str
    fstype: str
    point: bytes
    ino: int
    gen: int | None = None
    key: bytes | None = None
    ways: Sequence[Way] = _WAYS
    path: bytes | None = None
    start: int | None = None
    length: int = 512


Above = tuple[tuple[int, int] | None, ...]
"""Device and inode of the directories above a path, the nearest first; None: it does not say."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The paths of an inode; several are its hard links, as far as they were come across.

    ``above`` is what each of them lies below; empty where nobody asked the filesystem.
    Without a path ``source`` is None and ``reason`` says why; with one, why a way before led
    nowhere. ``ambiguous``: btrfs, several subvolumes have an inode of this number, and all are
    told. ``gen`` is the generation, where the filesystem told it. ``hung``: the helper does not
    return, so the filesystem hangs.
    """

    tag: str
    paths: tuple[bytes, ...] = ()
    above: tuple[Above, ...] = ()
    source: Source | None = None
    reason: str | None = None
    ambiguous: bool = False
    gen: int | None = None
    hung: bool = False


class _Said(msgspec.Struct):
    paths: list[str]
    source: Source | None
    reason: str | None
    gen: int | None = None
    ambiguous: bool = False
    above: tuple[Above, ...] = ()


class Helper:
    """One helper process at work on one question."""

    state: str

    def __init__(self, question: Question, argv: list[str], until: float) -> None:
        """Start it. Raises OSError."""
        self.question, self.until = question, until
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",  # not where the host stands: that may be what hangs
        )
        assert self.process.stdout is not None
        self.out = self.process.stdout
        os.set_blocking(self.out.fileno(), False)
        HELPER.start(self)

    def kill(self, until: float) -> None:
        """Kill it: it is late."""
        self.process.kill()
        self.until = until
        HELPER.advance(self, "kill")

    def give_up(self) -> None:
        """Leave it where it is: the kernel does not let it die."""
        self.out.close()
        HELPER.advance(self, "stick")

    def reap(self) -> bool:
        """Take leave of it; False while it is not gone."""
        if self.process.poll() is None:
            return False
        self.out.close()
        HELPER.advance(self, "end")
        return True


HELPER: Lifetime[Helper] = Lifetime(
    "Helper",
    states=("ASKED", "KILLED", "STUCK", "ENDED"),
    transitions={
        "kill": "ASKED -> KILLED",
        "stick": "KILLED -> STUCK",
        "end": "ASKED, KILLED, STUCK -> ENDED",
    },
    invariants={
        "what has ended was reaped": lambda h: (
            h.state != "ENDED" or h.process.returncode is not None
        ),
        "who is listened to has a descriptor": lambda h: h.state != "ASKED" or not h.out.closed,
    },
)


class Locate:
    """Asks helpers for paths; a context manager. Nothing here ever waits for a disk."""

    def __init__(
        self,
        *,
        model: Model | None = None,
        seconds: float = SECONDS,
        entries: int = ENTRIES,
        margin: float = MARGIN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._clock = model, clock
        self._seconds, self._entries, self._margin = seconds, entries, margin
        self._waiting: dict[str, deque[Question]] = {}
        self._helpers: dict[str, Helper] = {}
        self._answers: list[Answer] = []
        self._closed = False

    def submit(self, question: Question) -> None:
        """Ask; the answer comes with `results`, at once where the model or nobody can tell."""
        if self._model is not None and question.path is None and question.start is None:
            path = self._model(question.device, question.ino, question.key)
            if path is not None:
                self._answers.append(
                    Answer(tag=question.tag, paths=(os.fsencode(path),), source="model")
                )
                return
        helper = self._helpers.get(question.device)
        waiting = self._waiting.setdefault(question.device, deque())
        if helper is not None and helper.state == "STUCK" and not helper.reap():
            self._refuse(question, "the filesystem hangs: a helper does not return", True)
        elif len(waiting) >= _MOST_WAITING:
            self._refuse(question, f"{_MOST_WAITING} others wait for the same filesystem")
        else:
            waiting.append(question)
            self._next(question.device)

    def results(self) -> list[Answer]:
        """Return the answers that came since the last call. Call it also when `until` is over."""
        now = self._clock()
        for device, helper in list(self._helpers.items()):
            if helper.state == "ASKED":
                self._hear(device, helper, now)
            elif helper.reap():
                if helper.until:  # it died of the kill, in time
                    self._late(helper.question)
                del self._helpers[device]
            elif helper.state == "KILLED" and now >= helper.until:
                helper.give_up()
                helper.until = 0.0
                why = "the filesystem hangs: the helper does not return, and cannot be ended"
                self._refuse(helper.question, why, True)
                for question in self._waiting.pop(device, ()):
                    self._refuse(question, why, True)
            self._next(device)
        answers, self._answers = self._answers, []
        return answers

    def filenos(self) -> list[int]:
        """Return descriptors that are readable when an answer came."""
        return [h.out.fileno() for h in self._helpers.values() if h.state == "ASKED"]

    @property
    def until(self) -> float | None:
        """When a helper is late, by the clock; None while none is at work."""
        times = [helper.until for helper in self._helpers.values() if helper.until]
        return min(times, default=None)

    @property
    def hung(self) -> list[str]:
        """The devices of filesystems that hang."""
        return [device for device, helper in self._helpers.items() if helper.state == "STUCK"]

    def close(self) -> None:
        """End the helpers; idempotent. Does not wait for one that the kernel holds."""
        self._closed = True
        for helper in self._helpers.values():
            helper.process.kill()
            helper.out.close()
        for helper in self._helpers.values():
            end(helper.process)
            HELPER.advance(helper, "end")
        self._helpers = {}
        self._waiting = {}

    def __enter__(self) -> "Locate":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next(self, device: str) -> None:
        waiting = self._waiting.get(device)
        helper = self._helpers.get(device)
        if helper is not None and helper.state == "ENDED":
            del self._helpers[device]
        while waiting and device not in self._helpers and not self._closed:
            question = waiting.popleft()
            asked: dict[str, Any] = {
                "device": question.device,
                "fstype": question.fstype,
                "point": question.point.hex(),
                "ino": question.ino,
                "gen": question.gen,
                "key": question.key.hex() if question.key else None,
                "path": question.path.hex() if question.path else None,
                "start": question.start,
                "length": question.length,
                "ways": list(question.ways),
                "seconds": self._seconds,
                "entries": self._entries,
            }
            argv = [sys.executable, "-BIS", _CHILD, msgspec.json.encode(asked).decode()]
            try:
                until = self._clock() + self._seconds + self._margin
                self._helpers[device] = Helper(question, argv, until)
            except OSError as error:
                self._refuse(question, f"the helper process does not start: {error.strerror}")

    def _hear(self, device: str, helper: Helper, now: float) -> None:
        data = helper.out.read()
        if data is None:  # nothing yet
            if now >= helper.until:
                helper.kill(now + _DYING)
            return
        if not data and helper.process.poll() is None and now < helper.until:
            return  # it is ending
        tag = helper.question.tag
        try:
            said = msgspec.json.decode(data, type=_Said)
            paths = tuple(bytes.fromhex(path) for path in said.paths)
        except (msgspec.MsgspecError, ValueError):
            self._refuse(helper.question, "the helper ended without an answer")
        else:
            self._answers.append(
                Answer(
                    tag=tag,
                    paths=paths,
                    above=said.above,
                    source=said.source,
                    reason=said.reason,
                    ambiguous=said.ambiguous,
                    gen=said.gen,
                )
            )
        helper.process.wait()  # its output is complete: it is ending
        helper.reap()
        del self._helpers[device]

    def _late(self, question: Question) -> None:
        self._refuse(question, f"no answer within {self._seconds + self._margin:g} seconds")

    def _refuse(self, question: Question, reason: str, hung: bool = False) -> None:
        self._answers.append(Answer(tag=question.tag, reason=reason, hung=hung))


class _Filesystem(Protocol):
    @property
    def device(self) -> str: ...
    @property
    def fstype(self) -> str | None: ...
    @property
    def mounts(self) -> tuple[str, ...]: ...


class _Object(Protocol):
    @property
    def ino(self) -> int | None: ...
    @property
    def gen(self) -> int | None: ...
    @property
    def start(self) -> int | None: ...
    @property
    def length(self) -> int | None: ...


class Incident(Protocol):
    """What of an incident is needed to look for its path."""

    @property
    def id(self) -> str: ...
    @property
    def fs(self) -> _Filesystem: ...
    @property
    def object(self) -> _Object: ...
    @property
    def state(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def operation(self) -> str | None: ...


class Found(NamedTuple):
    """The paths of an incident's inode, as `Answer` has them."""

    incident: str
    paths: tuple[str, ...]
    source: str
    ambiguous: bool = False


class Paths:
    """The paths of incidents: what the engine calls its locator. Arguments as of `Locate`."""

    def __init__(self, **limits: Any) -> None:
        self._locate = Locate(**limits)
        self._tried: set[str] = set()
        self.reasons: dict[str, str] = {}  # incident -> why it has no path

    def locate(self, incident: Incident) -> None:
        """Begin to look for the path of its inode, or of whose data was not read, once."""
        ino, fs = incident.object.ino, incident.fs
        start, length = None, 512
        if ino is None and (incident.scope, incident.operation) == ("device", "block read"):
            ino, start = 0, incident.object.start
            length = incident.object.length or length
            if start is None or fs.fstype != "xfs":  # of these nobody else tells
                return
        if ino is None or not fs.mounts or fs.fstype is None or incident.id in self._tried:
            return
        if incident.state in ("shutdown", "hung"):  # whoever asks it gets an error, or nothing
            return
        self._tried.add(incident.id)
        self._locate.submit(
            Question(
                tag=incident.id,
                device=fs.device,
                fstype=fs.fstype,
                point=_point(fs),
                ino=ino,
                start=start,
                length=length,
                gen=incident.object.gen or None,  # 0: ext4 could not read the inode
                # Opening a broken inode, by whatever way, raises the error once more: only names.
                ways=_WAYS if fs.fstype == "btrfs" else ("search",),
            )
        )

    def found(self) -> list[Found]:
        """Return what was found since."""
        found = []
        for answer in self._locate.results():
            if answer.paths and answer.source is not None:
                paths = tuple(os.fsdecode(path) for path in answer.paths)
                found.append(Found(answer.tag, paths, answer.source, answer.ambiguous))
            elif answer.reason is not None:
                self.reasons[answer.tag] = answer.reason
        return found

    def filenos(self) -> list[int]:
        """Return descriptors that are readable when something may be found."""
        return self._locate.filenos()

    @property
    def hung(self) -> list[str]:
        """The devices of filesystems that hang."""
        return self._locate.hung

    def close(self) -> None:
        """Give up."""
        self._locate.close()


# As the kernel has it: an incident tells the mount points as JSON can carry them.
def _point(fs: _Filesystem) -> bytes:
    there = [mount for mount in mounts() if "{}:{}".format(*mount.dev) == fs.device]
    there.sort(key=lambda mount: mount.root != b"/")
    return there[0].mount_point if there else os.fsencode(fs.mounts[0])
