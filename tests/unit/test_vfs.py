"""The public names of fanwise.vfs: documented, and cheap for who does not use them."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fanwise import vfs
from fanwise.vfs import Disk, RwSem, Vfs, finish
from fanwise.vfs.errseq import SEEN, advance, check, record, sample

PAGE = Path(__file__).parents[2] / "docs/vfs.md"


@pytest.mark.parametrize("name", [name for name in vfs.__all__ if name != "Op"])
def test_every_name_is_documented(name):
    value = getattr(vfs, name)
    assert value.__name__ == name
    assert value.__doc__.split("\n")[0].endswith((".", ":", ";"))


def test_the_operations_of_the_page_are_generators_and_documented():
    table = PAGE.read_text().partition("## Operations")[2].partition("\n\nAn operation")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) > 25
    for name in names:
        operation = getattr(Vfs, name)
        assert inspect.isgeneratorfunction(operation), name
        assert operation.__doc__, name


def test_importing_fanwise_does_not_import_it():
    text = "import sys, fanwise; fanwise.Lifetime; print('fanwise.vfs' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_step_that_waits_for_ever_is_a_deadlock_for_finish():
    it = Vfs()
    sb = it.superblock("fs", Disk({"f": b""}))
    it.mount_root(sb)
    finish(it.freeze(sb))
    with pytest.raises(OSError, match="deadlock"):
        finish(it.unlink("/f"))
    finish(it.thaw(sb))
    finish(it.unlink("/f"))


def test_error_sequences():
    value = record(0, 5)
    assert sample(value) == 0  # nobody saw it: who opens now is told, too
    assert check(value, 0) == 5
    assert record(value, 5) == value  # nobody saw the first one
    code, seen = advance(value, 0)
    assert (code, seen) == (5, value | SEEN)
    assert sample(seen) == seen
    assert advance(seen, seen) == (0, seen)
    again = record(seen, 5)
    assert again != seen
    assert check(again, seen) == 5
    assert record(0xFFFF_F005, 28) == 28 + 0x0  # the counter wraps


def test_a_writer_that_waits_keeps_new_readers_out():
    who = ["reader"]
    lock = RwSem("lock", lambda: who[0])
    finish(lock.share("read"))
    writer, other = lock.take("write"), lock.share("read too")
    waits, comes = next(writer), next(other)
    assert (waits.ready(), waits.on.holders, comes.ready()) == (False, ["reader"], False)
    lock.release()
    assert waits.ready()
    assert not comes.ready()
    who[0] = "writer"
    assert next(writer, "has it") == "has it"
    assert not comes.ready()
    lock.release()
    assert comes.ready()


def test_who_is_abandoned_keeps_its_locks():
    who = ["task"]
    it = Vfs(current=lambda: who[0])
    sb = it.superblock("fs", Disk({"f": b""}))
    it.mount_root(sb)
    unlink = it.unlink("/f")
    while next(unlink) != "remove name":
        pass
    who[0] = "another"
    unlink.close()
    assert sb.root.target.lock.holders == ["task"]
    assert sb.freeze.levels["write"].holders == ["task"]
