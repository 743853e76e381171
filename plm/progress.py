"""Progress of long work that is no training: rate and time left."""

import sys
import time

from tqdm import tqdm


class Progress:
    """A bar with rate and time left on a terminal, else a line every `PERIOD` seconds."""

    PERIOD = 10.0

    def __init__(self, label: str, total: int, *, unit: str, enabled: bool):
        self.label, self.total, self.unit, self.n = label, total, unit, 0
        self.started = self.printed = time.monotonic()
        terminal = sys.stderr.isatty()
        self.lines = enabled and not terminal
        self.bar = tqdm(
            total=total, desc=label, unit=unit, unit_scale=True, disable=not (enabled and terminal), file=sys.stderr
        )

    def add(self, n: int) -> None:
        self.n += n
        self.bar.update(n)
        now = time.monotonic()
        if self.lines and now - self.printed > self.PERIOD:
            self.printed = now
            self._line(now)

    def _line(self, now: float) -> None:
        total = max(self.total, self.n)
        meter = tqdm.format_meter(
            self.n, total, now - self.started, prefix=self.label, unit=self.unit, unit_scale=True, ncols=0
        )
        print(meter, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.lines and self.printed != self.started:
            self._line(time.monotonic())
        self.bar.close()
