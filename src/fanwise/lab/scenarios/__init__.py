"""The catalogue: one module for each scenario, loaded when it is asked for."""

CATALOGUE: tuple[str, ...] = (
    "error-event",
    "delete-order",
    "freeze",
    "eventfs",
    "note-queue",
    "write-back",
    "group-teardown",
    "evict-read",
)
