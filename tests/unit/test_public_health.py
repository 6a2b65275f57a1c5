"""The public names of fanwise.health: all there, documented, seen by type checkers, cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fanwise
from fanwise import health

SOURCE = Path(health.__file__)


@pytest.mark.parametrize("name", [name for name in health.__all__ if name != "Told"])
def test_every_name_is_documented(name):
    value = getattr(health, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in (SOURCE.parents[3] / "docs/health-api.md").read_text()


def test_type_checkers_see_the_same_names():
    tree = ast.parse(SOURCE.read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (alias.asname, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(health._HOMES.items())
    assert health.__all__ == sorted(health._HOMES) == dir(health)


def test_it_is_an_attribute_of_fanwise_and_costs_nothing_before():
    text = (
        "import sys, fanwise\n"
        "assert 'fanwise.health' not in sys.modules\n"
        "fanwise.health\n"
        "heavy = {'sqlite3', 'msgspec', 'fanwise.health._engine'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "fanwise.health.Follow"
    )
    subprocess.run([sys.executable, "-c", text], check=True)
    assert fanwise.health is health
    with pytest.raises(AttributeError, match="no attribute 'Folow'"):
        _ = health.Folow
