"""The public names of fanwise.lab: all there, all documented."""

import subprocess
import sys
from pathlib import Path

import pytest

import fanwise
from fanwise import lab

PAGE = Path(__file__).parents[2] / "docs/lab.md"
DATA = {"BOUND", "STANDARD"}


@pytest.mark.parametrize("name", lab.__all__)
def test_every_name_is_documented(name):
    value = getattr(lab, name)
    if name not in DATA:
        assert value.__doc__
        assert value.__doc__.split("\n")[0].endswith((".", ":", ";"))
    assert f"`{name}" in PAGE.read_text()


def test_every_standard_property_is_on_the_page():
    text = PAGE.read_text()
    assert [prop for prop in lab.STANDARD if f"`{prop}`" not in text] == []


def test_it_is_an_attribute_of_fanwise_and_costs_nothing_before():
    text = "import sys, fanwise\nassert 'fanwise.lab' not in sys.modules\nfanwise.lab.explore"
    subprocess.run([sys.executable, "-c", text], check=True)
    assert fanwise.lab is lab
