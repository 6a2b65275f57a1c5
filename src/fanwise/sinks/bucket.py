"""How often something may happen: a token bucket, without a clock of its own."""


class Bucket:
    """``burst`` at once, and ``rate`` a second in the long run; full at first.

    Times are any clock's seconds that do not go back. Raises ValueError for a rate or a burst
    that never lets anything through.
    """

    __slots__ = ("_tokens", "_when", "burst", "rate")

    def __init__(self, rate: float, burst: int) -> None:
        if rate <= 0 or burst < 1:
            raise ValueError("a rate is more than 0, a burst at least 1")
        self.rate = rate
        self.burst = burst
        self._tokens = float(burst)
        self._when: float | None = None

    def take(self, now: float) -> bool:
        """Say whether it may happen now; then it counts as having happened."""
        self._fill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def wait(self, now: float) -> float:
        """Return the seconds until `take` says yes."""
        self._fill(now)
        return max(0.0, (1 - self._tokens) / self.rate)

    def _fill(self, now: float) -> None:
        if self._when is not None and now > self._when:
            # Rounding must not make a token a hair too small just when it is due.
            grown = self._tokens + (now - self._when) * self.rate + 1e-9
            self._tokens = min(float(self.burst), grown)
        self._when = now if self._when is None else max(now, self._when)
