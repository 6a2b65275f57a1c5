"""What a database holds: its application id, and the steps that lead to its newest version."""

from collections.abc import Sequence

import msgspec


class Migration(msgspec.Struct, frozen=True):
    """One step from a version to the next: a name, and statements that run in one transaction."""

    name: str
    statements: tuple[str, ...]


class Schema:
    """A kind of database.

    ``application_id`` (32 bits, not 0) tells it from all others; ``migrations`` are in order, and
    the version of a database is how many of them it has been through. A migration that was
    released is never changed. Raises ValueError for a schema that breaks these rules.
    """

    __slots__ = ("application_id", "migrations", "name")

    def __init__(self, name: str, application_id: int, migrations: Sequence[Migration]) -> None:
        if not 0 < application_id < 1 << 31:
            raise ValueError(f"{name}: an application id has 31 bits and is not 0")
        names = [migration.name for migration in migrations]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{name}: migrations have different names, and there is at least one")
        self.name = name
        self.application_id = application_id
        self.migrations = tuple(migrations)

    @property
    def version(self) -> int:
        """The newest version."""
        return len(self.migrations)
