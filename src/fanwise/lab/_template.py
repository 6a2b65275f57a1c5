"""The scenario that ``fanwise lab new`` writes: a whole small debate, to be changed."""

TEMPLATE = '''\
"""{title}: who takes the reference, and when.

$ fanwise lab run --file {name}.py
$ fanwise lab show --file {name}.py {slug}/look-then-take
"""

from fanwise.lab import Memory, Mutex, Scenario, World
from fanwise.lifetime import Lifetime

SCENARIO = Scenario(
    "{slug}",
    "{title}",
    """
What was argued, in your own words: what each side wanted, and what went wrong.
""",
    {{
        # slug: one sentence. Properties that primitives check (no-use-after-free, no-deadlock,
        # no-leak, ...) need not be listed.
        "found-or-gone": "Whoever finds the object may use it, and in the end nobody finds it.",
    }},
)


# What lives and dies declares its states; every other transition is an error.
class Thing:
    """The object of the debate."""

    def __init__(self) -> None:
        self.name = "thing"
        self.refs = 1
        THING.start(self)


THING: Lifetime[Thing] = Lifetime(
    "Thing",
    states=("LISTED", "REMOVED"),
    transitions={{"remove": "LISTED -> REMOVED"}},
    invariants={{"a listed thing is referenced": lambda t: t.state != "LISTED" or t.refs > 0}},
)


# The shared state. Plain Python: the explorer tells two states apart by what is in it.
class Table:
    """One place for one thing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.memory = Memory(world)
        self.lock = Mutex(world, "table")
        self.thing = self.memory.alloc(Thing())

    def put(self, thing: Thing) -> None:
        """Let go of a reference; the last one frees."""
        thing.refs -= 1
        if not thing.refs:
            self.memory.free(thing)


# Tasks are generators. Each `yield "name"` is a place where another CPU may come in between; a step
# goes from one yield to the next. Locks and other primitives yield for themselves.
def remove(table: Table):
    """Take the thing out of the table."""
    with (yield from table.lock.lock()):
        thing, table.thing = table.thing, None
        THING.advance(thing, "remove")
        table.put(thing)


def use_unlocked(table: Table):
    """Look, then take a reference: somebody may come in between."""
    yield "look"
    thing = table.thing
    if thing is None:
        return
    yield "take a reference"
    thing.refs += 1
    yield "use"
    table.memory.use(thing)
    table.put(thing)


def use_locked(table: Table):
    """Look and take a reference under the lock."""
    with (yield from table.lock.lock()):
        thing = table.thing
        if thing is None:
            return
        thing.refs += 1
    yield "use"
    table.world.check("found-or-gone", thing.refs > 0, "used without a reference")
    table.put(thing)


@SCENARIO.design("look-then-take", "Look, then take a reference.", lifetimes=[THING])
def look_then_take(world: World) -> None:
    table = Table(world)
    world.task("user", use_unlocked(table))
    world.task("other user", use_unlocked(table))
    world.task("remover", remove(table))


@SCENARIO.design("take-under-lock", "Look and take a reference under the lock.", lifetimes=[THING])
def take_under_lock(world: World) -> None:
    table = Table(world)
    world.task("user", use_locked(table))
    world.task("other user", use_locked(table))
    world.task("remover", remove(table))
    world.at_end("found-or-gone", lambda: table.thing is None)
'''


def template(name: str) -> str:
    """Return the text of a new scenario module; ``name`` is a Python name."""
    slug = name.replace("_", "-")
    return TEMPLATE.format(name=name, slug=slug, title=slug.replace("-", " ").capitalize())
