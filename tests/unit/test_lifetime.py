import pytest

from fanwise import Lifetime, LifetimeError


def mark_lifetime(**changes):
    return Lifetime(
        "Mark",
        **{
            "states": ("ATTACHED", "DETACHED", "FREED"),
            "transitions": {
                "detach": "ATTACHED -> DETACHED",
                "free": "ATTACHED, DETACHED -> FREED",
            },
            "invariants": {
                "a freed mark has no readers": lambda m: m.state != "FREED" or not m.readers
            },
        }
        | changes,
    )


MARK = mark_lifetime()


class Mark:
    __slots__ = ("readers", "state")

    def __init__(self, life=MARK):
        self.readers = 0
        life.start(self)


def test_declared_transitions_are_followed():
    mark = Mark()
    assert mark.state == "ATTACHED"
    MARK.advance(mark, "detach")
    assert mark.state == "DETACHED"
    MARK.advance(mark, "free")
    assert mark.state == "FREED"
    assert MARK.allowed("FREED") == []


@pytest.mark.parametrize(
    ("way", "transition", "message"),
    [
        (["detach"], "detach", "Mark: no transition 'detach' from DETACHED; allowed: free"),
        ([], "fly", "Mark: no transition 'fly' from ATTACHED; allowed: detach, free"),
        (["free"], "free", "from FREED; allowed: none, this state is final"),
    ],
)
def test_an_undeclared_transition_is_refused(way, transition, message):
    mark = Mark()
    for step in way:
        MARK.advance(mark, step)
    before = mark.state
    with pytest.raises(LifetimeError, match=message):
        MARK.advance(mark, transition)
    assert mark.state == before


def test_a_broken_invariant_is_told():
    mark = Mark()
    mark.readers = 1
    MARK.advance(mark, "detach")
    with pytest.raises(
        LifetimeError, match=r"after 'free', in FREED, .* a freed mark has no readers"
    ):
        MARK.advance(mark, "free")


def test_invariants_hold_from_the_start():
    never = mark_lifetime(invariants={"never": lambda m: False})
    with pytest.raises(LifetimeError, match=r"after 'start', in ATTACHED, .* never"):
        Mark(never)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": ("ATTACHED", "DETACHED", "FREED", "LOST")}, "no transition leads to LOST"),
        ({"transitions": {"detach": "ATTACHED -> GONE"}}, "names no state: 'GONE'"),
        ({"transitions": {"detach": "HERE -> FREED"}}, "names no state: 'HERE'"),
        ({"transitions": {"detach": "ATTACHED"}}, "is not 'FROM -> TO'"),
    ],
)
def test_a_wrong_declaration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mark_lifetime(**changes)


def test_markdown():
    assert MARK.render_markdown() == (
        "| transition | from | to |\n"
        "|---|---|---|\n"
        "| detach | ATTACHED | DETACHED |\n"
        "| free | ATTACHED, DETACHED | FREED |\n"
        "\n"
        "- a freed mark has no readers\n"
    )


def test_mermaid():
    assert MARK.render_mermaid() == (
        "stateDiagram-v2\n"
        "    [*] --> ATTACHED\n"
        "    ATTACHED --> DETACHED: detach\n"
        "    ATTACHED --> FREED: free\n"
        "    DETACHED --> FREED: free\n"
        "    FREED --> [*]\n"
    )
