"""Scenarios: a debate, its designs, and the properties that they are judged by."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fanwise._errors import Exit, FanwiseError
from fanwise.lifetime import Lifetime, Steps

from ._world import STANDARD, World

Build = Callable[[World], None]


class NoSuchDesign(FanwiseError):
    """No scenario or no design has this name; the remedy lists those that there are."""

    exit_status: Exit = Exit.USAGE


class Design:
    """One design of a scenario: how its model is built, and the lifetimes that it declares."""

    __slots__ = ("build", "lifetimes", "scenario", "slug", "title")

    def __init__(
        self,
        scenario: "Scenario",
        slug: str,
        title: str,
        build: Build,
        lifetimes: Sequence[Lifetime[Any] | Steps],
    ) -> None:
        self.scenario = scenario
        self.slug = slug
        self.title = title
        self.build = build
        self.lifetimes = tuple(lifetimes)

    @property
    def name(self) -> str:
        """``SCENARIO/DESIGN``."""
        return f"{self.scenario.slug}/{self.slug}"

    def sentence(self, prop: str) -> str:
        """Return the sentence of a property. Raises KeyError for one that is not declared."""
        return self.scenario.properties.get(prop) or STANDARD[prop]

    def __repr__(self) -> str:
        return f"<Design {self.name}>"


class Scenario:
    """A debate: its slug, its title, what was argued (Markdown), and its properties by slug.

    Designs are added by the decorator `design`, in order. ``lifetimes`` are declared by each design
    that names no others.
    """

    __slots__ = ("designs", "lifetimes", "properties", "slug", "text", "title")

    def __init__(
        self,
        slug: str,
        title: str,
        text: str,
        properties: Mapping[str, str],
        lifetimes: Sequence[Lifetime[Any] | Steps] = (),
    ) -> None:
        self.slug = slug
        self.title = title
        self.text = text
        self.properties = dict(properties)
        self.lifetimes = tuple(lifetimes)
        self.designs: dict[str, Design] = {}

    def design(
        self, slug: str, title: str, *, lifetimes: Sequence[Lifetime[Any] | Steps] | None = None
    ) -> Callable[[Build], Build]:
        """Add a design; decorates the function that builds its model in a `World`.

        Raises ValueError when the slug is taken.
        """

        def add(build: Build) -> Build:
            if slug in self.designs:
                raise ValueError(f"{self.slug} has a design {slug!r} already")
            declared = self.lifetimes if lifetimes is None else lifetimes
            self.designs[slug] = Design(self, slug, title, build, declared)
            return build

        return add

    def __getitem__(self, slug: str) -> Design:
        if slug not in self.designs:
            raise NoSuchDesign(
                f"scenario {self.slug} has no design {slug!r}",
                f"there are {', '.join(self.designs)}",
            )
        return self.designs[slug]

    def __repr__(self) -> str:
        return f"<Scenario {self.slug}: {', '.join(self.designs)}>"


def names() -> tuple[str, ...]:
    """Return the slugs of all scenarios of the catalogue, in its order."""
    from .scenarios import CATALOGUE

    return CATALOGUE


def load(slug: str) -> Scenario:
    """Return a scenario of the catalogue. Raises NoSuchDesign."""
    if slug not in names():
        raise NoSuchDesign(f"no scenario is called {slug!r}", f"there are {', '.join(names())}")
    module = importlib.import_module(f"fanwise.lab.scenarios.{slug.replace('-', '_')}")
    found: Scenario = module.SCENARIO
    return found


def load_file(path: Path) -> Scenario:
    """Return the ``SCENARIO`` of a Python file, which is run.

    Raises NoSuchDesign when there is no such file or no scenario in it, and what running it raises.
    """
    spec = importlib.util.spec_from_file_location(f"fanwise_scenario_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise NoSuchDesign(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = getattr(module, "SCENARIO", None)
    if not isinstance(found, Scenario):
        raise NoSuchDesign(f"{path} defines no SCENARIO")
    return found


def find(name: str) -> list[Design]:
    """Return the designs that ``SCENARIO`` or ``SCENARIO/DESIGN`` names. Raises NoSuchDesign."""
    slug, slash, design = name.partition("/")
    scenario = load(slug)
    return [scenario[design]] if slash else list(scenario.designs.values())
