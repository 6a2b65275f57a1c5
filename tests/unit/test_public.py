"""The public names: all there, all documented, all saying `fanwise`, and cheap to import."""

import ast
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import fanwise

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", fanwise.__all__)
def test_every_public_name_is_documented_and_says_fanwise(name):
    value = getattr(fanwise, name)
    assert value.__module__ == "fanwise"
    assert value.__name__ == name
    assert value.__doc__
    assert value.__doc__.split("\n")[0].endswith((".", ":", ";"))


def test_the_names_are_sorted_and_listed():
    assert fanwise.__all__ == sorted(set(fanwise.__all__))
    assert set(fanwise.__all__) <= set(dir(fanwise))


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "src/fanwise/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test))
    seen = {
        (alias.asname, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(fanwise._HOMES.items())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'wotch'"):
        _ = fanwise.wotch


def test_errors_say_fanwise_before_anybody_names_them():
    text = "import fanwise; fanwise.Lifetime\nfrom fanwise._errors import BusyError as b\nprint(b)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "<class 'fanwise.BusyError'>\n"


def test_a_sub_package_does_not_hide_a_public_name():
    before = fanwise.Lifetime
    fanwise.Lifetime = types.ModuleType("fanwise.Lifetime")  # as the import system does
    assert fanwise.Lifetime is before


def test_importing_fanwise_imports_nothing_heavy():
    heavy = {"msgspec", "click", "anyio", "rich", "asyncio", "typing", "enum", "fanwise._errors"}
    # -S: what the interpreter's own start-up imports says nothing about fanwise.
    path = str(ROOT / "src")
    text = f"import sys; sys.path.insert(0, {path!r}); import fanwise; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", text], capture_output=True, text=True, check=True
    )
    assert not heavy & set(done.stdout.split())


def test_the_version_is_the_package_s():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fanwise.__version__ == project["version"]
