"""The lines for people."""

from fanwise import Change, Process
from fanwise.cli._plain import text


def line(process: Process) -> str:
    change = Change(
        ("created", "deleted"), "/d/f", None, False, 7, None, 0.0, "exact",
        exists=False, process=process,
    )  # fmt: skip
    return text(change).partition("/d/f")[2]


def test_what_became_of_the_name_is_not_said_of_the_process() -> None:
    seen = Process("git", "/usr/bin/git", "root", None, "seen")
    assert line(seen) == "  (gone)  by /usr/bin/git as root"
    assert line(Process(None, None, None, None, "gone")) == "  (gone)  by ? (not known)"
