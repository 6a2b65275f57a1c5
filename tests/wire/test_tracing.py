"""The wire format of tracefs: recorded bytes, each form of record, and noise."""

import struct

import pytest
from hypothesis import given, strategies as st

from fanwise._errors import DecodeError
from fanwise.kernel.tracing import (
    UNKNOWN,
    PageHeader,
    parse_format,
    parse_header_page,
    read_page,
    stack_reader,
)
from tests.wire.recorded_trace import PAGE, TOLD

HEADER_PAGE = """\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""
COMMON = """\
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""
NEWTASK = f"""\
name: task_newtask
ID: 205
{COMMON}\
\tfield:pid_t pid;\toffset:8;\tsize:4;\tsigned:1;
\tfield:char comm[16];\toffset:12;\tsize:16;\tsigned:0;
\tfield:u64 clone_flags;\toffset:32;\tsize:8;\tsigned:0;
\tfield:short oom_score_adj;\toffset:40;\tsize:2;\tsigned:1;

print fmt: "field:int nonsense;\\toffset:0;\\tsize:4;", REC->pid
"""
EXEC = f"""\
name: sched_process_exec
ID: 365
{COMMON}\
\tfield:__data_loc char[] filename;\toffset:8;\tsize:4;\tsigned:0;
\tfield:pid_t pid;\toffset:12;\tsize:4;\tsigned:1;
\tfield:pid_t old_pid;\toffset:16;\tsize:4;\tsigned:1;
"""
STACK = f"""\
name: kernel_stack
ID: 4
{COMMON}\
\tfield:int size;\toffset:8;\tsize:4;\tsigned:1;
\tfield:unsigned long caller[8];\toffset:16;\tsize:64;\tsigned:0;
"""
HEADER = parse_header_page(HEADER_PAGE)


def page(body: bytes, when: int = 1000, commit: int | None = None) -> bytes:
    commit = len(body) if commit is None else commit
    return struct.pack("<QQ", when, commit) + body.ljust(HEADER.room, b"\0")


def word(kind: int, delta: int) -> bytes:
    return struct.pack("<I", delta << 5 | kind)


def test_a_recorded_page():
    newtask, exec_ = parse_format(NEWTASK), parse_format(EXEC)
    read_new = newtask.reader(("common_pid", "pid", "comm", "clone_flags"))
    read_exec = exec_.reader(("pid", "old_pid", "filename"))
    found = read_page(PAGE, HEADER)
    assert found.missed == 0
    assert len(found.records) == len(TOLD)
    told = []
    for when, start, end in found.records:
        (number,) = struct.unpack_from("<H", PAGE, start)
        if number == newtask.id:
            told.append((when, "task/task_newtask", *read_new(PAGE, start, end)))
        elif number == exec_.id:
            told.append((when, "sched/sched_process_exec", *read_exec(PAGE, start, end)))
    known = ("task/task_newtask", "sched/sched_process_exec")
    assert told == [record for record in TOLD if record[1] in known]
    assert [record[-1] for record in told if record[1] == known[1]] == [
        b"/bin/sh",
        b"./bin/true",
        b"/bin/sleep",
    ]


def test_header_page():
    assert PageHeader(8, 8, 16, 4080) == HEADER
    assert HEADER.size == 4096
    narrow = HEADER_PAGE.replace("size:8;\tsigned:1", "size:4;\tsigned:1")
    narrow = narrow.replace("offset:16;\tsize:4080", "offset:12;\tsize:4084")
    assert parse_header_page(narrow) == PageHeader(8, 4, 12, 4084)


@pytest.mark.parametrize(
    "text",
    ["", "x", HEADER_PAGE.replace("commit", "comet"), HEADER_PAGE.replace("size:4080", "size:4")],
)
def test_header_pages_that_make_no_sense(text):
    with pytest.raises(DecodeError):
        parse_header_page(text)


def test_fields_have_their_sign_and_size():
    form = parse_format(
        f"name: x\nID: 7\n{COMMON}"
        "\tfield:int a;\toffset:8;\tsize:4;\tsigned:1;\n"
        "\tfield:unsigned int b;\toffset:12;\tsize:4;\tsigned:0;\n"
        "\tfield:void * p;\toffset:16;\tsize:8;\tsigned:0;\n"
        "\tfield:u16 list[3];\toffset:24;\tsize:6;\tsigned:0;\n"
        "\tfield:__rel_loc char[] rel;\toffset:32;\tsize:4;\tsigned:0;\n"
        "\tfield:char rest[];\toffset:36;\tsize:0;\tsigned:0;\n"
    )
    record = struct.pack("<HBBi", 7, 0, 0, -1)
    record += struct.pack("<iIQ3H2xI", -2, 2**32 - 2, 2**64 - 3, 1, 2, 65535, 3 << 16) + b"hi\0"
    names = ("p", "a", "b", "list", "rel", "rest")
    expected = (2**64 - 3, -2, 2**32 - 2, (1, 2, 65535), b"hi", b"hi")
    assert form.reader(names)(record, 0, len(record)) == expected
    assert form.reader(("common_pid",))(record, 0, len(record)) == (-1,)
    with pytest.raises(KeyError):
        form.reader(("nonsense",))


def test_text_outside_of_the_fields_is_no_field():
    assert list(parse_format(NEWTASK).fields)[4:] == ["pid", "comm", "clone_flags", "oom_score_adj"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name: x\nID: 1\nformat:\n",
        NEWTASK.replace("ID: 205", "ID: x"),
        NEWTASK.replace("field:pid_t pid;", "field:;"),
        NEWTASK.replace("comm[16]", "comm[17]"),
        EXEC.replace("offset:8;\tsize:4", "offset:8;\tsize:8"),
        EXEC.replace("offset:12", "offset:10"),
    ],
)
def test_formats_that_make_no_sense(text):
    with pytest.raises(DecodeError):
        parse_format(text).reader()


def test_a_place_beyond_the_record():
    read = parse_format(EXEC).reader(("filename",))
    record = struct.pack("<HBBiIii", 365, 0, 0, 1, 5 << 16 | 20, 1, 1) + b"/bin\0"
    assert read(record, 0, len(record)) == (b"/bin",)
    for place in (6 << 16 | 20, 5 << 16 | 21, 0xFFFFFFFF):
        bad = record[:8] + struct.pack("<I", place) + record[12:]
        with pytest.raises(DecodeError):
            read(bad, 0, len(bad))
    with pytest.raises(DecodeError):
        read(record, 0, 11)


def test_each_form_of_record():
    body = word(2, 5) + b"12345678"  # a length in the type
    body += word(0, 7) + struct.pack("<I", 4 + 5) + b"abcde".ljust(8, b"\0")  # in a word
    body += word(30, 3) + struct.pack("<I", 2)  # a longer time
    body += word(29, 1) + struct.pack("<I", 4 + 4) + b"gone"  # discarded
    body += word(1, 0) + b"wxyz"
    body += word(31, 100) + struct.pack("<I", 1 << 20)  # an absolute time
    body += word(1, 1) + b"last"
    body += word(29, 0) + b"the rest is not used"
    data = page(body)
    found = read_page(data, HEADER)
    assert [(when, data[start:end]) for when, start, end in found.records] == [
        (1005, b"12345678"),
        (1012, b"abcde"),
        (1012 + 3 + (2 << 27) + 1, b"wxyz"),
        (100 + (1 << 47) + 1, b"last"),
    ]


def test_an_absolute_time_has_59_bits():
    body = word(31, 5) + struct.pack("<I", 0) + word(1, 0) + b"last"
    for base, expected in (
        (1 << 60 | 3, 1 << 60 | 5),
        (1 << 60 | 9, (1 << 60) + (1 << 59) + 5),  # it went round meanwhile
    ):
        ((when, _, _),) = read_page(page(body, base), HEADER).records
        assert when == expected


def test_losses():
    body = word(1, 0) + b"last"
    assert read_page(page(body), HEADER).missed == 0
    assert read_page(page(body, commit=8 | 1 << 31), HEADER).missed == UNKNOWN
    told = page(body + struct.pack("<Q", 19584), commit=8 | 3 << 30)
    assert read_page(told, HEADER).missed == 19584
    full = page(word(29, 0), commit=4080 | 3 << 30)
    with pytest.raises(DecodeError):
        read_page(full, HEADER)


@pytest.mark.parametrize(
    ("body", "commit"),
    [
        (b"", 4081),
        (word(28, 1), 4),
        (word(0, 1), 4),
        (word(0, 1) + struct.pack("<I", 3), 8),
        (word(0, 1) + struct.pack("<I", 2**32 - 1), 16),
        (word(29, 1) + struct.pack("<I", 100), 16),
        (word(30, 1), 4),
    ],
)
def test_pages_that_make_no_sense(body, commit):
    with pytest.raises(DecodeError):
        read_page(page(body, commit=commit), HEADER)


def test_a_stack_has_as_many_callers_as_it_says():
    read = stack_reader(parse_format(STACK))
    callers = (2**64 - 1, 5, *range(10))
    record = struct.pack("<HBBiii", 4, 0, 0, 1, 12, 0) + struct.pack("<12Q", *callers)
    assert read(record, 0, len(record)) == (callers,)
    for depth in (13, -1):
        bad = record[:8] + struct.pack("<i", depth) + record[12:]
        with pytest.raises(DecodeError):
            read(bad, 0, len(bad))


READERS = [parse_format(NEWTASK).reader(), parse_format(EXEC).reader()]
READERS.append(stack_reader(parse_format(STACK)))


def read_all(data: bytes) -> None:
    try:
        found = read_page(data, HEADER)
    except DecodeError:
        return
    for when, start, end in found.records:
        assert 0 <= when < 1 << 64
        assert HEADER.data <= start <= end <= len(data)
        for read in READERS:
            try:
                read(data, start, end)
            except DecodeError:
                continue


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_noise(body, commit, when):
    read_all(page(body, when, commit))
    read_all(page(body, when))
    read_all(body)


@given(st.lists(st.tuples(st.integers(0, len(PAGE) - 1), st.integers(0, 255)), max_size=8))
def test_a_recorded_page_with_noise(flips):
    data = bytearray(PAGE)
    for at, byte in flips:
        data[at] = byte
    read_all(bytes(data))


@given(st.text(max_size=200), st.integers(0, len(EXEC)))
def test_formats_with_noise(noise, at):
    try:
        parse_format(EXEC[:at] + noise + EXEC[at:]).reader()
    except DecodeError:
        return
