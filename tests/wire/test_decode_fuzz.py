"""Both decoders side by side: the same answer to every question, on good windows and bad ones."""

import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fanwise._errors import DecodeError
from fanwise.kernel import records
from fanwise.kernel.contract import CURRENT, EXCLUDED, FILES, ROOT, SCANNED, TOP
from fanwise.watch._change import KIND_TABLE
from tests.wire import build
from tests.wire.build import DFID, DFID_NAME, FID, NEW_DFID_NAME, OLD_DFID_NAME, fid
from tests.wire.twins import PURE, native_parts

BITS = {
    "access": 0x1, "modify": 0x2, "attrib": 0x4, "close": 0x8, "open": 0x20, "create": 0x100,
    "delete": 0x200, "gone": 0x400, "exec": 0x1000, "rename": 0x10000000, "dir": 0x40000000,
}  # fmt: skip
OVERFLOW = 0x4000
ALL = sum(BITS.values()) & ~(0x400 | 0x40000000)

# Few of everything, so that records collide. The first are directories the tree may know, the last
# no directories; handles of no bytes and of the most bytes are among them.
KEYS = [build.key(number) for number in range(2, 13)] + [bytes(4), b"\2\0\0\0" + bytes(range(128))]
NAMES = [b"a", b"b", b"#12", b"#", b".", b"", b"\xff\xc3", b"n" * 255]

keys = st.sampled_from(KEYS)
dirs = st.sampled_from(KEYS[:6])
names = st.sampled_from(NAMES)
pids = st.sampled_from([1, 1, 1, 2, 3, 0, -1])
masks = st.sets(st.sampled_from(sorted(BITS.values())), min_size=1, max_size=3).map(sum)
flags = st.sampled_from([0, 0, 0, ROOT, EXCLUDED, FILES, CURRENT, ROOT | FILES, TOP, SCANNED])


def of(target):
    # Sometimes there is none, which differs from a handle of no bytes.
    return [] if target is KEYS[-3] else [fid(FID, target)]


def named(mask, directory, name, target, pid):
    return build.event(mask, fid(DFID_NAME, directory, name), *of(target), pid=pid)


def renamed(mask, directory, name, directory2, name2, target, pid):
    return build.event(
        mask | 0x10000000,
        fid(OLD_DFID_NAME, directory, name),
        fid(NEW_DFID_NAME, directory2, name2),
        *of(target),
        pid=pid,
    )


infos = st.one_of(
    st.builds(fid, st.sampled_from([FID, DFID]), keys),
    st.builds(fid, st.sampled_from([DFID_NAME, OLD_DFID_NAME, NEW_DFID_NAME]), keys, names),
    st.builds(build.info, st.integers(0, 14), st.binary(max_size=40)),
    st.just(build.pidfd(-1)),
    st.just(build.error(5)),
)
events = st.one_of(
    st.builds(named, masks, dirs, names, keys, pids),
    st.builds(named, st.sampled_from([0x100, 0x200, 0x300, 0x2, 0x102]), dirs, names, keys, pids),
    st.builds(renamed, st.sampled_from([0, 0, 0, 0x40000000, 2]), dirs, names, dirs, names, keys,
              pids),
    st.builds(lambda m, t, p: build.event(m, fid(FID, t), pid=p),
              st.sampled_from([4, 4, 4, 0x400, 0x404, 2]), keys, pids),
    st.builds(lambda m, d, n, p: build.event(m, fid(DFID_NAME, d, n), pid=p), masks, dirs,
              st.sampled_from([b".", b""]), pids),
    st.builds(lambda m, i, p, h: build.event(m, *i, pid=p, header=h),
              st.one_of(masks, st.just(OVERFLOW), st.integers(0, 2**64 - 1)),
              st.lists(infos, max_size=4), pids, st.sampled_from([24, 24, 28])),
    st.just(build.event(OVERFLOW, pid=0)),
)  # fmt: skip
chunks = st.lists(events, max_size=12).map(b"".join)
windows = st.lists(st.lists(chunks, max_size=4), min_size=1, max_size=3)
places = st.lists(st.tuples(st.integers(-1, 5), names, flags), min_size=1, max_size=7)
acts = st.lists(
    st.tuples(st.sampled_from("nnnnmmpdfgsc"), st.integers(0, 9), st.integers(-1, 9), names, flags),
    max_size=12,
)  # fmt: skip
setups = st.tuples(
    st.booleans(),
    places,
    st.sampled_from([ALL, ALL, 0x10000000, 0x30E, 0]),
    st.sampled_from([(), (), (2,), (1, 3)]),
    st.integers(1, 6),
    st.one_of(st.just({}), st.dictionaries(keys, st.sets(st.builds(bytes.__add__, dirs, names)))),
)


class Subject:
    """One decoder and its tree, driven as the resolver drives it; all answers are noted."""

    def __init__(self, parts, setup, todo, blind=False):
        recursive, where, want, ignored, self.limit, gone = setup
        self.log, self.todo, self.turn = [], todo, 0
        self.gone = {key: set(names) for key, names in gone.items()}
        self.tree = parts.Tree(recursive)
        self.tree.put(KEYS[0], -1, b"/m", TOP)
        for number, (parent, name, flag) in enumerate(where):
            parent = min(parent, len(self.tree) - 1)
            self.tree.put(KEYS[number % 5], parent, name, flag)
        self.decoder = parts.Decoder(
            self.tree, lambda *a: a, KIND_TABLE, want, "8:1", ignored, self.gone, blind
        )

    def note(self, call, *args):
        try:
            told = call(*args)
        except (DecodeError, KeyError, IndexError, ValueError) as error:
            told = type(error), error.args, getattr(error, "offset", None)
        self.log.append((call.__name__, told))
        return told

    def ask(self):
        """Every question that changes nothing."""
        d = self.decoder
        for call in (d.suspects, d.doubts, d.unknown, d.dir_records, d.record, d.peek):
            self.note(call)
        self.note(d.records_in, set(KEYS[:4]))
        self.note(d.name_records, None)
        self.note(d.name_records, set(KEYS[3:8]))
        for key in KEYS:
            self.note(d.notes, key)
        self.log.append((d.pending, d.records, {k: set(v) for k, v in self.gone.items()}))

    def look(self):
        """The whole tree."""
        for at in range(12):
            self.note(self.tree.info, at)
            self.note(self.tree.resolve, at)
        self.log.append((len(self.tree), self.tree.ids()))

    def act(self):
        """What an owner may do at a stop, to the tree and to the names that are gone."""
        if not self.todo:
            return
        what, a, b, name, flag = self.todo[self.turn % len(self.todo)]
        self.turn += 1
        if what == "m":
            self.note(self.tree.move, a, b, name)
        elif what == "p":
            self.note(self.tree.put, KEYS[a], b, name, flag)
        elif what == "d":
            self.note(self.tree.drop, a)
        elif what == "f":
            self.note(self.tree.flag, a, flag, ROOT)
        elif what == "g":
            self.gone.setdefault(KEYS[a], set()).add(KEYS[max(b, 0)] + name)
        elif what == "s":
            self.note(self.tree.sweep)
        elif what == "c":
            self.note(self.decoder.finish)

    def window(self, data):
        """Take in chunks, decode all of them, end the window."""
        for number, chunk in enumerate(data):
            self.note(self.decoder.add, chunk, float(number))
        self.ask()
        self.consume()
        self.ask()
        self.note(self.decoder.finish)
        self.look()
        if self.turn % 2:
            self.note(self.tree.sweep)

    def consume(self):
        while True:
            _, stop = self.note(self.decoder.decode, self.limit)
            if stop:
                self.note(self.decoder.record)
                self.note(self.decoder.peek)
                self.act()
                self.decoder.advance()
            elif not self.decoder.pending:
                return


def same(native, setup, todo, play):
    for blind in (False, True):
        logs = []
        for parts in (native, PURE):
            subject = Subject(parts, setup, todo, blind)
            play(subject)
            logs.append(subject.log)
        for one, other in zip(*logs, strict=False):
            assert one == other
        assert len(logs[0]) == len(logs[1])


def check_windows(native, setup, todo, data):
    def play(subject):
        for each in data:
            subject.window(each)

    same(native, setup, todo, play)


def check_refused(native, setup, good, bad):
    """A chunk in the midst of a window: taken by both or refused by both; then it left no trace."""

    def play(subject):
        subject.note(subject.decoder.add, good, 1.0)
        subject.ask()
        asked = list(subject.log)
        told = subject.note(subject.decoder.add, bad, 2.0)
        again = len(subject.log)
        subject.ask()
        if not isinstance(told, int):
            assert subject.log[again:] == asked[1:]
        subject.consume()
        subject.ask()
        subject.note(subject.decoder.finish)

    same(native, setup, [], play)


def steps(decoder, data, time, limit):
    """What `plain` does, by the other methods."""
    decoder.add(data, time)
    if decoder.unknown() or decoder.suspects():
        return None
    rows, stop = decoder.decode(limit)
    return rows, stop, None if stop or decoder.pending else decoder.finish()


def at_once(decoder, data, time, limit):
    return decoder.plain(data, time, limit)


def check_plain(native, setup, todo, data):
    """Whole windows at once, by both twins and by steps: the same answers, the same window left.

    Some begin while one is open, as no owner does.
    """
    logs = []
    for parts, how in ((PURE, steps), (PURE, at_once), (native, steps), (native, at_once)):
        subject = Subject(parts, setup, todo)
        play_plain(subject, how, data)
        logs.append(subject.log)
    for log in logs[1:]:
        for one, other in zip(logs[0], log, strict=False):
            assert one == other
        assert len(logs[0]) == len(log)


def play_plain(subject, how, data):
    def plain(*args):
        return how(subject.decoder, *args)

    for number, (chunk, leave) in enumerate(data):
        subject.note(plain, chunk, float(number), subject.limit)
        subject.ask()
        if not leave:
            subject.consume()
            subject.note(subject.decoder.finish)
            subject.look()


def check_agrees_with_records(bad):
    """The decoder of single records refuses the same, and short records of other kinds as well."""
    decoder = PURE.Decoder(PURE.Tree(), tuple, KIND_TABLE, 0, "8:1", (), {})
    try:
        count = decoder.add(bad, 1.0)
    except DecodeError:
        with pytest.raises(DecodeError):
            records.decode(bad)
        return
    try:
        decoded = len(records.decode(bad))
    except DecodeError as error:
        decoded = error.reason
    assert decoded == count or str(decoded).startswith("information record of")


def mutations(draw_from):
    @st.composite
    def mutated(draw):
        data = bytearray(draw(draw_from))
        for _ in range(draw(st.integers(0, 3))):
            if data:
                at = draw(st.integers(0, len(data) - 1))
                data[at] = draw(st.sampled_from([0, 1, 2, 3, 4, 12, 24, 127, 128, 132, 255]))
        if draw(st.booleans()):
            del data[draw(st.integers(0, len(data))) :]
        if draw(st.booleans()):
            del data[: draw(st.integers(0, len(data)))]
        return bytes(data)

    return mutated()


hostile = st.one_of(
    st.binary(max_size=200),
    mutations(chunks),
    st.lists(infos, max_size=3).map(b"".join).flatmap(
        lambda body: st.builds(
            lambda length, header: build.event(2, body, length=length, header=header),
            st.integers(0, 300) | st.integers(2**32 - 64, 2**32 - 1),
            st.integers(0, 70),
        )
    ),
)  # fmt: skip

WINDOWS = {"setup": setups, "todo": acts, "data": windows}
REFUSED = {"setup": setups, "good": chunks, "bad": hostile}

known = st.just(KEYS[0])
few = st.sampled_from(KEYS[6:9])
quiet = st.one_of(
    st.builds(named, st.sampled_from([0x100, 0x200, 2, 8, 0xA]), known, names, few, pids),
    st.builds(renamed, st.just(0), known, names, known, names, few, pids),
    st.builds(lambda m, t, p: build.event(m, fid(FID, t), pid=p), st.sampled_from([4, 4, 0x400]),
              few, pids),
)  # fmt: skip
simple = st.lists(quiet, min_size=1, max_size=9).map(b"".join)  # most of these need no look
rooted = setups.map(lambda s: (s[0], [(-1, b"/m", TOP | ROOT), *s[1]], ALL, *s[3:]))
PLAIN = {
    "setup": st.one_of(rooted, rooted, setups),
    "todo": acts,
    "data": st.lists(
        st.tuples(
            st.one_of(simple, simple, simple, chunks, hostile),
            st.sampled_from([False, False, True]),
        ),
        min_size=1,
        max_size=5,
    ),
}


def run(examples, check, strategies, *args):
    """Run a check on so many examples."""

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(**strategies)
    def body(**drawn):
        check(*args, **drawn)

    body()


def storm(native, seed, chunk_count=6, chunk_size=400):
    """Many records at once, drawn without hypothesis: large windows that merge and collide."""
    rng = random.Random(seed)
    many = KEYS + [build.key(number) for number in range(100, 160)]

    def event():
        mask = sum(rng.sample(sorted(BITS.values()), rng.choice([1, 1, 1, 2, 3])))
        pid = rng.choice([1, 1, 2, 3])
        kind = rng.randrange(10)
        if kind < 5:
            return named(mask, rng.choice(KEYS[:6]), rng.choice(NAMES), rng.choice(many), pid)
        if kind < 7:
            mask = rng.choice([0, 0, 0, 0x40000000])
            return renamed(mask, rng.choice(KEYS[:6]), rng.choice(NAMES), rng.choice(KEYS[:6]),
                           rng.choice(NAMES), rng.choice(many), pid)  # fmt: skip
        if kind < 9:
            return build.event(rng.choice([4, 4, 0x400]), fid(FID, rng.choice(many)), pid=pid)
        return build.event(mask, fid(DFID_NAME, rng.choice(KEYS[:6]), b"."), pid=pid)

    setup = (
        rng.random() < 0.8,
        [(rng.randint(0, 4), rng.choice(NAMES), rng.choice([0, 0, ROOT, FILES, CURRENT]))
         for _ in range(6)],
        rng.choice([ALL, ALL, 0x10000302]), rng.choice([(), (3,)]), rng.choice([1, 7, 100]), {},
    )  # fmt: skip
    todo = [
        (rng.choice("nnnnmpdfgs"), rng.randint(0, 9), rng.randint(-1, 9), rng.choice(NAMES),
         rng.choice([0, ROOT, FILES, CURRENT, EXCLUDED]))
        for _ in range(50)
    ]  # fmt: skip
    data = [
        [b"".join(event() for _ in range(rng.randint(0, chunk_size))) for _ in range(chunk_count)]
        for _ in range(2)
    ]
    check_windows(native, setup, todo, data)


def test_windows(cannot_run):
    run(400, check_windows, WINDOWS, native_parts(cannot_run))


def test_hostile_chunks(cannot_run):
    run(500, check_refused, REFUSED, native_parts(cannot_run))


def test_a_window_at_once(cannot_run):
    run(400, check_plain, PLAIN, native_parts(cannot_run))


def test_one_rule_for_what_is_malformed():
    run(500, check_agrees_with_records, {"bad": hostile})


@pytest.mark.parametrize("seed", range(6))
def test_storms(cannot_run, seed):
    storm(native_parts(cannot_run), seed)


def test_every_cut_of_a_chunk(cannot_run):
    whole = named(2, KEYS[0], b"name", KEYS[7], 1) + renamed(
        0, KEYS[0], b"a", KEYS[1], b"b", KEYS[7], 1
    )
    setup = (True, [(0, b"a", ROOT)], ALL, (), 5, {})
    for cut in range(len(whole) + 1):
        check_refused(native_parts(cannot_run), setup, whole, whole[:cut])
        check_agrees_with_records(whole[:cut])
    for at in range(len(whole)):
        for value in (0, 1, 3, 4, 25, 128, 255):
            bad = whole[:at] + bytes([value]) + whole[at + 1 :]
            check_refused(native_parts(cannot_run), setup, b"", bad)
            check_agrees_with_records(bad)
