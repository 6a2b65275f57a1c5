"""The catalogue: one module for each scenario, loaded when it is asked for."""

CATALOGUE: tuple[str, ...] = (
    "error-event",
    "note-queue",
    "write-back",
    "eventfs",
    "evict-read",
    "group-teardown",
)
