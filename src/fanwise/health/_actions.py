"""Carries out what rules say: encoded incidents in, sinks out.

REFS      owns a sink for each action.
LOCKING   one owner calls; `Outcome`s come from the sinks' threads.
LIFETIME  that of its sinks: started by `start`, ended by `close` within one deadline.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from fanwise.health._rules import Action, ExecAction, LogAction, Rules, WebhookAction
from fanwise.kernel.stacking import lives_on
from fanwise.sinks.bucket import Bucket
from fanwise.sinks.log import Log
from fanwise.sinks.program import Program
from fanwise.sinks.sink import Outcome, Sink
from fanwise.sinks.webhook import Webhook


class Actions:
    """The actions of some rules, running; a context manager.

    ``tell`` gets the outcome of every delivery, in a thread of its own. ``withheld`` counts
    records that a log did not get because its file is on what fails.
    """

    def __init__(self, rules: Rules, tell: Callable[[Outcome], None] | None = None) -> None:
        self.rules = rules
        self.withheld = dict.fromkeys(rules.actions, 0)
        self._standing: dict[str, frozenset[str]] = {}
        self._sinks = {name: _sink(name, rules.actions[name], tell) for name in rules.actions}

    def start(self) -> None:
        """Start them all. Raises FanwiseError when one cannot be started; then none runs."""
        try:
            for name, sink in self._sinks.items():
                sink.start()
                action = self.rules.actions[name]
                if isinstance(action, LogAction):
                    # Now, because later a look at the path may wait for the disk that fails.
                    self._standing[name] = lives_on(Path(action.file).parent)
        except BaseException:
            self.close(0.0)
            raise

    def offer(self, record: Mapping[str, Any]) -> list[str]:
        """Give a record to the actions of the rules that it matches; never waits for one.

        Gives the names of the actions that took it.
        """
        names = self.rules.actions_for(record)
        if not names:
            return []
        body = msgspec.json.encode(record)
        return [name for name in names if not self._fails(name, record) and self._give(name, body)]

    def _give(self, name: str, body: bytes) -> bool:
        return self._sinks[name].offer(body)

    # Output never goes to the filesystem that is failing, nor to one on top of it.
    def _fails(self, name: str, record: Mapping[str, Any]) -> bool:
        fs = record.get("fs") or {}
        failing = {fs.get("device"), *(fs.get("devices") or ())}
        if not failing & self._standing.get(name, frozenset()):
            return False
        self.withheld[name] += 1
        return True

    def counts(self) -> dict[str, dict[str, int]]:
        """Return what became of the records of each action, for metrics."""
        out = {}
        for name, sink in self._sinks.items():
            counts = msgspec.structs.asdict(sink.counts())
            out[name] = {
                result: counts[result] for result in ("delivered", "failed", "suppressed")
            } | {"dropped": counts["dropped"], "withheld": self.withheld[name]}
        return out

    def close(self, deadline: float = 5.0) -> list[str]:
        """Deliver what is queued, all within ``deadline`` seconds; idempotent.

        Gives the names of those whose delivery did not stop even then.
        """
        until = time.monotonic() + deadline
        return [
            name
            for name, sink in self._sinks.items()
            if not sink.close(max(0.0, until - time.monotonic()))
        ]

    def __enter__(self) -> "Actions":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _sink(name: str, action: Action, tell: Callable[[Outcome], None] | None) -> Sink:
    common: dict[str, Any] = {
        "bucket": Bucket(action.rate, action.burst),
        "room": action.queue,
        "tell": tell,
    }
    if isinstance(action, ExecAction):
        argv = (action.program, *action.arguments)
        return Program(name, argv, limit=action.limit, **common)
    if isinstance(action, WebhookAction):
        return Webhook(
            name,
            action.url,
            secret=Path(action.secret_file) if action.secret_file else None,
            ca=Path(action.ca_file) if action.ca_file else None,
            connect=action.connect,
            limit=action.limit,
            tries=action.tries,
            backoff=action.backoff,
            **common,
        )
    assert isinstance(action, LogAction)
    return Log(name, Path(action.file), **common)
