"""What tracefs speaks: formats of events, and the sub-buffers that trace_pipe_raw gives.

All is read from text that the running kernel wrote (``events/*/*/format``, ``events/header_page``):
ids and offsets change from boot to boot. Bytes are bounds-checked before they are used; what makes
no sense is a DecodeError. Numbers are in the machine's own byte order.

Fields with kernel addresses come out as plain integers. They are for the privileged reader, to be
turned into symbol and offset there; they must never reach a user, a log or a socket.

Kernel sources: kernel/trace/ring_buffer.c, kernel/trace/trace_events.c.
"""

import re
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fanwise._errors import DecodeError

Buffer = bytes | bytearray | memoryview
Reader = Callable[[Buffer, int, int], tuple[Any, ...]]
"""Takes a buffer, the start and the end of one record; returns the values asked for."""

_LITTLE = sys.byteorder == "little"
_ORDER = "<" if _LITTLE else ">"
_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}

_LENGTH = (1 << 27) - 1  # of a sub-buffer, in its commit word
_MISSED = 1 << 31  # RB_MISSED_EVENTS
_STORED = 1 << 30  # RB_MISSED_STORED: how many follows the data
_PADDING, _EXTEND, _STAMP = 29, 30, 31  # type_len beyond the sizes
_STAMP_BITS = 59  # of an absolute time; the rest is that of the time before
UNKNOWN = -1  # a loss that nobody counted

_FIELD = re.compile(
    r"\s*field:\s*(?P<decl>[^;]+);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);"
    r"\s*signed:(?P<signed>[01]);"
)
_DECL = re.compile(
    r"(?P<loc>__data_loc|__rel_loc)?\s*(?P<type>.*?)\s*(?P<name>\w+)\s*(?:\[(?P<count>[^\]]*)\])?$"
)


class Field(NamedTuple):
    """One field: ``size`` bytes at ``offset`` of a record.

    ``length`` is the number of elements of an array, 1 for a single value. One of 0 bytes is the
    rest of the record. ``dynamic`` is "", "data" (the field says where in the record the value is)
    or "rel" (counted from the field's end). ``text``: an array of char.
    """

    name: str
    offset: int
    size: int
    signed: bool
    length: int
    dynamic: str
    text: bool


class Format(NamedTuple):
    """The format of one event: ``id`` is what a record begins with (u16)."""

    name: str
    id: int
    fields: dict[str, Field]

    def reader(self, names: Sequence[str] = ()) -> Reader:
        """Return a function that reads these fields, by default all, of one record.

        Integers come as int, char arrays as bytes up to the first NUL, other arrays as tuples.
        Raises KeyError for a field that there is not; the function raises DecodeError.
        """
        fields = [self.fields[name] for name in (names or self.fields)]
        codes, least, at = [], 0, 0
        for field in sorted(fields, key=lambda f: f.offset):
            if field.offset < at:
                raise DecodeError(field.offset, f"{self.name}: fields overlap at {field.name}")
            codes.append(f"{field.offset - at}x{_code(field)}")
            at = field.offset + field.size
            least = max(least, at)
        layout = struct.Struct(_ORDER + "".join(codes))
        unpack = layout.unpack_from
        order = sorted(range(len(fields)), key=lambda i: fields[i].offset)
        places = [order.index(i) for i in range(len(fields))]
        special = [
            (i, field)
            for i, field in enumerate(fields)
            if field.dynamic or field.length != 1 or not field.size
        ]
        name = self.name
        straight = places == list(range(len(fields)))

        def read(buffer: Buffer, start: int, end: int) -> tuple[Any, ...]:
            if end - start < least or end > len(buffer):
                raise DecodeError(start, f"{name}: {end - start} bytes, and it has {least}")
            values = unpack(buffer, start)
            if straight and not special:
                return values
            out = [values[i] for i in places]
            for i, field in special:
                out[i] = _value(buffer, start, end, field, out[i])
            return tuple(out)

        return read


class PageHeader(NamedTuple):
    """Where a sub-buffer has its time, its commit word and its data, and how much data fits."""

    commit: int
    commit_size: int
    data: int
    room: int

    @property
    def size(self) -> int:
        """Bytes of a whole sub-buffer: what one read of trace_pipe_raw gives."""
        return self.data + self.room


class Page(NamedTuple):
    """What one sub-buffer holds: (time, start, end) of each record, times as the clock counts.

    ``missed``: records that were lost before it; 0 for none, UNKNOWN when not counted.
    """

    records: list[tuple[int, int, int]]
    missed: int


def parse_format(text: str) -> Format:
    """Parse the text of a ``format`` file. Raises DecodeError."""
    name = re.search(r"^name:[ \t]*(\S+)[ \t]*$", text, re.MULTILINE)
    number = re.search(r"^ID:[ \t]*([0-9]{1,9})[ \t]*$", text, re.MULTILINE)
    if name is None or number is None:
        raise DecodeError(0, "a format without a name or an ID")
    head = text.partition("\nprint fmt:")[0]
    fields: dict[str, Field] = {}
    for line in head.splitlines():
        if "field:" not in line:
            continue
        field = _parse_field(line)
        fields[field.name] = field
    kind = fields.get("common_type")
    if kind is None or (kind.offset, kind.size) != (0, 2):
        raise DecodeError(0, f"{name[1]}: no common_type at its start")
    return Format(name[1], int(number[1]), fields)


def parse_header_page(text: str) -> PageHeader:
    """Parse the text of ``events/header_page``. Raises DecodeError."""
    fields = {
        field.name: field
        for field in (_parse_field(line) for line in text.splitlines() if "field:" in line)
    }
    try:
        commit, data = fields["commit"], fields["data"]
    except KeyError as error:
        raise DecodeError(0, f"header_page without {error}") from None
    if commit.size not in (4, 8) or commit.offset + commit.size > data.offset or data.offset < 12:
        raise DecodeError(0, "header_page with fields that overlap")
    if not 8 <= data.size <= _LENGTH:
        raise DecodeError(0, f"header_page with {data.size} bytes of data")
    return PageHeader(commit.offset, commit.size, data.offset, data.size)


def read_page(page: Buffer, header: PageHeader) -> Page:
    """Find the records of one sub-buffer. Raises DecodeError."""
    if len(page) < header.data:
        raise DecodeError(0, f"a sub-buffer of {len(page)} bytes")
    (when,) = struct.unpack_from("=Q", page, 0)
    (commit,) = struct.unpack_from("=Q" if header.commit_size == 8 else "=I", page, header.commit)
    end = header.data + (commit & _LENGTH)
    if end > len(page) or end > header.size:
        raise DecodeError(header.commit, f"{commit & _LENGTH} bytes of data in {len(page)}")
    missed = 0
    if commit & _MISSED:
        missed = UNKNOWN
        if commit & _STORED:
            width = header.commit_size  # it is an unsigned long, as the commit word
            if end + width > len(page):
                raise DecodeError(end, "no room for the number of lost records")
            (missed,) = struct.unpack_from("=Q" if width == 8 else "=I", page, end)
    records = []
    words = struct.Struct("=I").unpack_from
    at = header.data
    while end - at >= 4:
        (word,) = words(page, at)
        kind, delta = (word & 31, word >> 5) if _LITTLE else (word >> 27, word & (1 << 27) - 1)
        if 0 < kind < _PADDING:
            start, past = at + 4, at + 4 + kind * 4
            if past > end:
                raise DecodeError(at, "a record longer than its sub-buffer")
            when += delta
            records.append((when, start, past))
            at = past
            continue
        if kind == _PADDING and not delta:
            break  # the rest was not used
        if end - at < 8:
            raise DecodeError(at, "a record that is cut off")
        (more,) = words(page, at + 4)
        if kind == 0:
            past = at + 4 + (more + 3 & ~3)
            if more < 4 or past > end:
                raise DecodeError(at, f"a record of {more} bytes")
            when += delta
            records.append((when, at + 8, at + 4 + more))
            at = past
        elif kind == _PADDING:  # a record that was discarded; its time counts for those behind it
            if more < 4 or at + 4 + more > end:
                raise DecodeError(at, f"padding of {more} bytes")
            when += delta
            at += 4 + more
        elif kind == _EXTEND:
            when += delta + (more << 27)
            at += 8
        else:
            stamp = delta + (more << 27) & (1 << _STAMP_BITS) - 1
            # Its upper bits are those of the time before, with a carry (rb_fix_abs_ts).
            high = when >> _STAMP_BITS << _STAMP_BITS
            when = (
                high | stamp
                if high | stamp >= when or not high
                else (high | stamp) + (1 << _STAMP_BITS)
            )
            at += 8
        when &= (1 << 64) - 1
    return Page(records, missed)


def _parse_field(line: str) -> Field:
    match = _FIELD.match(line)
    decl = match and _DECL.match(match["decl"].strip())
    if not match or not decl:
        raise DecodeError(0, f"not a field: {line.strip()[:80]!r}")
    offset, size = int(match["offset"]), int(match["size"])
    kind, array = decl["type"], decl["count"]
    dynamic = {"__data_loc": "data", "__rel_loc": "rel"}.get(decl["loc"] or "", "")
    if kind.endswith("[]"):  # as it stands in "__data_loc char[] name"
        kind, array = kind[:-2].strip(), ""
    text = kind.split()[-1:] == ["char"] and array is not None
    if offset + size > 1 << 20:
        raise DecodeError(0, f"field {decl['name']} of {size} bytes at {offset}")
    if dynamic:
        if size != 4:
            raise DecodeError(0, f"field {decl['name']}: a place of {size} bytes")
        return Field(decl["name"], offset, 4, False, 1, dynamic, text)
    count = 1
    if array is not None and size:
        # The count may be a macro's name: sizes tell. Elements other than char are told by type.
        count = int(array) if array.isdigit() and int(array) else (size if text else 1)
    if size and (count > size or size % count):
        raise DecodeError(0, f"field {decl['name']}: {count} elements in {size} bytes")
    signed = match["signed"] == "1"
    return Field(decl["name"], offset, size, signed, count, "", text)


def _code(field: Field) -> str:
    if field.dynamic:
        return "I"
    if field.text:
        return f"{field.size}s"
    code = _CODES.get(field.size // field.length)
    if code is None:
        return f"{field.size}s"
    code = code if field.signed else code.upper()
    return code if field.length == 1 else f"{field.size}s"


def _value(buffer: Buffer, start: int, end: int, field: Field, raw: Any) -> Any:
    if field.dynamic:
        place, length = raw & 0xFFFF, raw >> 16
        place += start + (field.offset + 4 if field.dynamic == "rel" else 0)
        if place + length > end:
            raise DecodeError(place, f"{field.name}: {length} bytes beyond the record's end")
        data = bytes(buffer[place : place + length])
        return data.partition(b"\0")[0] if field.text else data
    if not field.size:  # the rest of the record
        raw = bytes(buffer[start + field.offset : end])
    if field.text:
        return raw.partition(b"\0")[0]
    if not field.size:
        return raw
    width = field.size // field.length
    code = _CODES.get(width)
    if code is None:
        return raw
    code = code if field.signed else code.upper()
    return struct.unpack(f"{_ORDER}{field.length}{code}", raw)


def stack_reader(form: Format) -> Reader:
    """Return a function that reads a record of ``ftrace/kernel_stack``: ((address, ...),).

    The format declares eight callers and a record has as many as it says.
    """
    depth, caller = form.fields["size"], form.fields["caller"]
    width = caller.size // caller.length if caller.length > 1 else struct.calcsize("=Q")
    code = _CODES.get(width, "q").upper()
    read_depth = form.reader((depth.name,))

    def read(buffer: Buffer, start: int, end: int) -> tuple[Any, ...]:
        (count,) = read_depth(buffer, start, end)
        at = start + caller.offset
        if count < 0 or at + count * width > end:
            raise DecodeError(start, f"a stack of {count} callers in {end - start} bytes")
        return (struct.unpack_from(f"{_ORDER}{count}{code}", buffer, at),)

    return read
