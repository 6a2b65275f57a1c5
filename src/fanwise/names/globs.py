"""Exclusion globs: which names and paths a watch leaves out, with everything below them.

A glob without a slash is matched against a name at any depth; one with a slash against the path
below a root, or against the whole path when it begins with a slash. ``*`` and ``?`` stop at a
slash, ``**`` does not.
"""

import re
from collections.abc import Iterable, Sequence

from fanwise._errors import ConfigError


def translate(glob: str) -> str:
    """Return the pattern of a glob; compiling it raises re.error for one that is not valid."""
    out, at = [], 0
    while at < len(glob):
        if glob.startswith("**/", at):
            out.append("(?:.*/)?")
            at += 3
            continue
        if glob.startswith("**", at):
            out.append(".*")
            at += 2
            continue
        c = glob[at]
        at += 1
        if c == "*":
            out.append("[^/]*")
        elif c == "?":
            out.append("[^/]")
        elif c == "[":
            end = glob.find("]", at + 1)
            if end < 0:
                out.append(re.escape(c))
                continue
            # "[", "&", "~" and "|" mean themselves here; doubled, re would read more into them.
            body = re.sub(r"([\\[&~|])", r"\\\1", glob[at:end])
            out.append(f"[{'^' + body[1:] if body[0] in '!^' else body}]")
            at = end + 1
        else:
            out.append(re.escape(c))
    return "".join(out)


class Globs:
    """The compiled exclusions of one watch; false when there are none.

    Raises ConfigError for an empty glob and one that is not a valid pattern.
    """

    def __init__(self, globs: Iterable[str], roots: Sequence[str]) -> None:
        names, paths = [], []
        self.anchored: list[str] = []  # those with a slash: they depend on where a directory is
        for glob in globs:
            if not glob.strip("/"):
                raise ConfigError("exclude", None, f"not a glob: {glob!r}", "give a name or a path")
            body = glob.rstrip("/")
            try:
                if body.startswith("/"):
                    paths.append(re.compile(translate(body)).pattern)
                    self.anchored.append(glob)
                elif "/" in body:
                    inner = re.compile(translate(body)).pattern
                    paths += [f"{re.escape(root.rstrip('/'))}/{inner}" for root in roots]
                    self.anchored.append(glob)
                else:
                    names.append(re.compile(translate(body)).pattern)
            except re.error as error:
                raise ConfigError("exclude", None, f"not a glob: {glob!r} ({error})") from error
        self._name = re.compile("|".join(names), re.DOTALL) if names else None
        self._path = re.compile("|".join(f"(?:{p})" for p in paths), re.DOTALL) if paths else None

    def __bool__(self) -> bool:
        return self._name is not None or self._path is not None

    def match(self, path: str) -> bool:
        """Say whether this path itself is excluded (not: something above it)."""
        if self._name is not None and self._name.fullmatch(path[path.rfind("/") + 1 :]):
            return True
        return self._path is not None and self._path.fullmatch(path) is not None
