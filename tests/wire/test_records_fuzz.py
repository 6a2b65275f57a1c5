from hypothesis import given, strategies as st

from fanwise._errors import DecodeError
from fanwise.kernel import records
from fanwise.kernel.records import Fid, FsError, MountId, Pidfd, Range, Record
from tests.wire import build

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
S32 = st.integers(-(2**31), 2**31 - 1)
FSIDS = st.binary(min_size=8, max_size=8)
KEYS = st.binary(min_size=4, max_size=132)
NAMES = st.binary(max_size=255).map(lambda name: name.replace(b"\0", b"?"))
NAMED = st.sampled_from([records.DFID_NAME, records.OLD_DFID_NAME, records.NEW_DFID_NAME])


# Each strategy gives the bytes of an information record and what they mean (None: skipped).
INFOS = st.one_of(
    st.builds(
        lambda kind, key, fsid: (build.fid(kind, key, None, fsid), Fid(kind, fsid, key, None)),
        st.sampled_from([records.FID, records.DFID]),
        KEYS,
        FSIDS,
    ),
    st.builds(
        lambda kind, key, name, fsid: (
            build.fid(kind, key, name, fsid),
            Fid(kind, fsid, key, name),
        ),
        NAMED,
        KEYS,
        NAMES,
        FSIDS,
    ),
    S32.map(lambda fd: (build.pidfd(fd), Pidfd(fd))),
    st.builds(lambda code, n: (build.error(code, n), FsError(code, n)), S32, U32),
    st.builds(lambda at, n: (build.range_(at, n), Range(at, n)), U64, U64),
    U64.map(lambda unique_id: (build.mount(unique_id), MountId(unique_id))),
    st.builds(
        lambda kind, body: (build.info(kind, body), None),
        st.sampled_from([0, 8, 9, 11, 13, 255]),
        st.binary(max_size=40),
    ),
)


def _event(mask, infos, pid, fd, header):
    data = build.event(mask, *(raw for raw, _ in infos), pid=pid, fd=fd, header=header)
    return data, Record(mask, pid, fd, tuple(means for _, means in infos if means is not None))


EVENTS = st.builds(
    _event, U64, st.lists(INFOS, max_size=4), S32, S32, st.sampled_from([24, 28, 40])
)
ROWS = st.lists(EVENTS, max_size=5)


def joined(row):
    return b"".join(raw for raw, _ in row)


def decoded(data, offset=0):
    """The records, or None for a DecodeError; nothing else may come out."""
    try:
        return records.decode(data, offset)
    except DecodeError:
        return None


@given(ROWS)
def test_what_is_built_is_decoded(row):
    data, meant = joined(row), [record for _, record in row]
    assert records.decode(data) == meant
    assert records.decode(bytearray(data)) == meant
    assert records.decode(memoryview(b"xyz" + data)[3:]) == meant
    assert records.decode(b"xyz" + data, 3) == meant


@given(st.binary(max_size=400), st.integers(-5, 405))
def test_any_bytes(data, offset):
    decoded(data, offset)


@given(ROWS, st.data())
def test_a_cut_buffer_is_the_events_before_the_cut_or_an_error(row, data):
    whole = joined(row)
    cut = data.draw(st.integers(0, len(whole)))
    ends, at = {0: 0}, 0
    for n, (raw, _) in enumerate(row, 1):
        at += len(raw)
        ends[at] = n
    got = decoded(whole[:cut])
    if cut in ends:
        assert got == [record for _, record in row[: ends[cut]]]
    else:
        assert got is None


@given(ROWS.filter(bool), st.data())
def test_changed_bytes(row, data):
    mutable = bytearray(joined(row))
    for _ in range(data.draw(st.integers(1, 4))):
        mutable[data.draw(st.integers(0, len(mutable) - 1))] = data.draw(st.integers(0, 255))
    got = decoded(mutable)
    if got is not None:
        # No byte of a result comes from outside of the buffer.
        assert all(len(i.key) + len(i.name or b"") <= len(mutable)
                   for r in got for i in r.infos if isinstance(i, Fid))  # fmt: skip
