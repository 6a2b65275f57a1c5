"""Each room imports only from rooms to its left; rooms between commas do not import each other."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "fanwise"

ARROWS = """
_errors < lifetime, config < kernel < notify < sources, names, store, hold, sinks, metrics
 < watch, health, tier, eventfs < compat, vfs, daemon < lab < cli"""
LEVEL = {
    room.strip(): level
    for level, rooms in enumerate(ARROWS.split("<"))
    for room in rooms.split(",")
}
# The public names themselves may be used by the one room that is a user: the command line.
PUBLIC_USER = "cli"


def imported(tree, package):
    """Yield (line, dotted name) for all that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")])
            yield from ((node.lineno, f"{base}.{alias.name}".strip(".")) for alias in node.names)


def wrong_imports(text, path):
    """Return what the module at `path`, relative to the package, imports against the arrows."""
    room = path.parts[0].removesuffix(".py")
    assert room in LEVEL, f"{path}: this room is not in DESIGN's list"
    package = ["fanwise", *path.parts[:-1]]
    wrong = []
    for line, name in imported(ast.parse(text), [part for part in package if part]):
        top, *rest = name.rstrip(".").split(".")
        if top != "fanwise" or (rest and rest[0] == room):
            continue
        other = rest[0] if rest else ""
        if other in LEVEL:
            allowed = LEVEL[other] < LEVEL[room]
            # The command line uses the public API only.
            allowed = allowed and not (
                room == PUBLIC_USER and any(part.startswith("_") for part in rest)
            )
        else:
            allowed = room == PUBLIC_USER
        if not allowed:
            wrong.append(f"{path}:{line}: {name}")
    return wrong


def test_the_source_follows_the_arrows():
    wrong = []
    for path in sorted([*SOURCE.rglob("*.py"), *SOURCE.rglob("*.pyi")]):
        relative = path.relative_to(SOURCE)
        if relative != Path("__init__.py"):  # holds the public names of every room
            wrong += wrong_imports(path.read_text(), relative)
    assert wrong == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("watch/_x.py", "import fanwise.health"),
        ("watch/_x.py", "from fanwise.tier import _y"),
        ("names/_x.py", "from fanwise.sources._z import a"),
        ("kernel/_x.py", "def f():\n    from fanwise.notify import mask"),
        ("kernel/_x.py", "from fanwise import notify"),
        ("kernel/_x.py", "from ..notify import mask"),
        ("kernel/_x.py", "from fanwise import ClosedError"),
        ("kernel/_x.py", "import fanwise"),
        ("cli/_x.py", "from fanwise.watch._watch import watch"),
    ],
)
def test_a_wrong_import_is_found(path, text):
    assert len(wrong_imports(text, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("watch/_x.py", "from fanwise.kernel import layout\nimport os"),
        ("watch/_x.py", "from . import _y\nfrom ._y import z\nfrom fanwise.watch._y import z"),
        ("config.py", "from fanwise._errors import ConfigError"),
        ("cli/_x.py", "from fanwise import Exit, config"),
    ],
)
def test_a_right_import_is_not(path, text):
    assert wrong_imports(text, Path(path)) == []
