"""``fanwise doctor``: what can be watched and heard of here, tried and not guessed."""

import os
from typing import Literal

import click
import msgspec

from fanwise import Capabilities, Exit, Feature, NotWatchable, capabilities
from fanwise.cli._output import Output
from fanwise.cli._plain import visible
from fanwise.health import Channel, channels

_SAID = {
    "target_fid": "records that name the object itself",
    "unlimited_queue": "unlimited kernel queue",
    "handles": "file handles",
    "open_by_handle": "opening by handle",
    "filesystem_mark": "mark on the whole filesystem",
    "rename": "renames with both names",
}

_HEALTH = {
    "fs_error_mark": "errors by fanotify",
    "tracefs": "error tracepoints",
    "counters": "error counters",
    "kmsg": "the kernel's log",
    "xfs_health_monitor": "XFS health monitor",
}


class Unreachable(
    msgspec.Struct, frozen=True, tag="unreachable", tag_field="type", forbid_unknown_fields=True
):
    """A path that was named and cannot be looked at."""

    path: str
    reason: str
    remedy: str | None


class Place(msgspec.Struct, frozen=True, tag="place", tag_field="type"):
    """A path and what can be done with it. ``health`` are the channels of its errors."""

    capabilities: Capabilities
    health: dict[str, Channel]


class Report(msgspec.Struct, frozen=True):
    """What ``fanwise doctor --json`` prints."""

    v: Literal[1]
    kernel: str
    uid: int
    paths: tuple[Place | Unreachable, ...]


@click.command()
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of that object, nothing else.")
def command(paths: tuple[str, ...], as_json: bool, schema: bool) -> int:
    """Say what this kernel, this user and the filesystem of each PATH (/) can do.

    Everything is tried and nothing is guessed; what was tried does not stay. The status is 1 when a
    PATH that was given cannot be watched.
    """
    output = Output()
    if schema:
        output.write(msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Report))) + b"\n")
        return Exit.OK
    places: list[Place | Unreachable] = []
    for path in paths or ("/",):
        try:
            places.append(Place(capabilities(path), channels(path)))
        except NotWatchable as error:
            places.append(Unreachable(path, error.reason, error.remedy))
    if as_json:
        report = Report(1, os.uname().release, os.geteuid(), tuple(places))
        output.write(msgspec.json.encode(report) + b"\n")
    else:
        output.write(_text(places).encode())
    fine = all(isinstance(place, Place) and place.capabilities.rung for place in places)
    return Exit.NO if paths and not fine else Exit.OK


def _text(places: list[Place | Unreachable]) -> str:
    lines = [f"kernel   {os.uname().release}"]
    known = next((p.capabilities for p in places if isinstance(p, Place)), None)
    known = known or capabilities("/")
    held = " and ".join(known.capabilities) or "neither CAP_SYS_ADMIN nor CAP_DAC_READ_SEARCH"
    space = "" if known.initial_namespace else ", in a user namespace"
    seccomp = "a seccomp filter" if known.seccomp else "no seccomp filter"
    lines.append(f"user     uid {os.geteuid()} with {held}{space}; {seccomp}")
    why = f", because {known.decoder_reason}" if known.decoder_reason else ""
    lines.append(f"decoder  {known.decoder}{why}")
    limits = ", ".join(f"{name} = {value}" for name, value in known.limits.items())
    lines.append(f"limits   {limits or 'not readable'}")
    for place in places:
        lines.append("")
        if isinstance(place, Unreachable):
            lines.append(f"{visible(place.path)}: cannot be watched: {_why(place)}")
            continue
        found = place.capabilities
        verdict = f"can be watched ({found.rung})"
        if not found.rung:
            verdict = f"cannot be watched: {_why(found)}"
        lines.append(f"{visible(found.path)} on {found.fstype}: {verdict}")
        for name, feature in found.features.items():
            mark = {True: "yes", False: "no ", None: "?  "}[feature.works]
            why = "" if feature.works else f": {_why(feature)}"
            lines.append(f"  {mark}  {_SAID[name]}{why}")
        for name, refusal in found.refused.items():
            lines.append(f"  not by {name}: {_why(refusal)}")
        if found.guarantees:
            lines.append(f"  what {found.rung} keeps:")
        lines += [f"    {name}: {text}" for name, text in found.guarantees.items()]
        for name, channel in place.health.items():
            mark = {True: "yes", False: "no ", None: "-  "}[channel.works]
            why = f": {visible(channel.reason)}" if channel.reason else ""
            lines.append(f"  {mark}  health: {_HEALTH[name]}{why}")
    return "".join(f"{line}\n" for line in lines)


def _why(of: Unreachable | Capabilities | Feature) -> str:
    text = visible(of.reason or "")
    return f"{text}; {visible(of.remedy)}" if of.remedy else text
