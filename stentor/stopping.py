"""What ends a session of training before the run is done: a signal, or the session's deadline."""
from __future__ import annotations

import contextlib
import math
import signal
import time

from stentor.files import duration


class CutShort(BaseException):
    """A signal came during an evaluation, or while the next batch was waited for."""


class Stopping:
    """The clock of one session, the signals it was sent, whether there is time for what is next.

    The session begins with this object. deadline_hours: its length; None: it has no end.
    """

    def __init__(self, engine, deadline_hours: float | None):
        self.engine, self.deadline_hours = engine, deadline_hours
        self.began = time.monotonic()
        self.reason = None                            # "SIGTERM", "SIGINT" or "deadline"
        self.signals, self.can_be_cut = [], False
        self.slowest = {"save": 1.0, "evaluation": 0.0, "step": 0.0}      # seconds

    def elapsed(self) -> float:
        """Seconds of this session."""
        return time.monotonic() - self.began

    def until_deadline(self) -> float:
        """Seconds left of this session."""
        return self.deadline_hours * 3600 - self.elapsed() if self.deadline_hours else math.inf

    def took(self, what: str, seconds: float) -> None:
        """A "save", "evaluation" or "step" took that long."""
        self.slowest[what] = max(self.slowest[what], seconds)

    @contextlib.contextmanager
    def noticing_signals(self):
        """Inside the block SIGTERM and SIGINT only leave a note; on every process: torchrun passes
        SIGTERM to all."""
        kinds = signal.SIGTERM, signal.SIGINT
        handlers = {kind: signal.signal(kind, self._on_signal) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in handlers.items():
                signal.signal(kind, handler)

    def _on_signal(self, received, frame):
        self.signals.append(received)
        if self.can_be_cut:
            self.can_be_cut = False
            raise CutShort

    @contextlib.contextmanager
    def cut_short_by_a_signal(self):
        """Inside the block a signal need not wait: no step is in flight.

        Several processes wait: they could not leave together.
        """
        self.can_be_cut = self.engine.world_size == 1
        try:
            yield
        except Exception as error:                    # C code may make another error of what a
            if self.signals:                          # handler raises: np.fromfile made a SystemError
                raise CutShort from error             # of it in 2 of 72 runs
            raise
        finally:
            self.can_be_cut = False

    def preflight(self, done: int, left: int, say) -> None:
        """After a few steps of a session: what a step takes, and whether the rest fits.

        done: steps of this session; left: steps of the run.
        """
        if done not in (2, 5):
            return
        self.engine.wait()
        if done == 2:                                 # what is compiled is compiled by now
            self.warm = time.monotonic()
            return
        a_step, until = (time.monotonic() - self.warm) / 3, self.until_deadline()
        say(f"preflight: {a_step:.2f} s a step, {self.engine.memory()}; "
            f"about {duration(left * a_step)} to go")
        if self.deadline_hours:
            fits = ("the run fits" if left * a_step < until else
                    "the run will be saved then; run it again to go on")
            say(f"the session's deadline is in {duration(until)}: {fits}")

    def must_stop(self, before: str | None = None) -> bool:
        """Whether to stop now, the same on every process.

        before: a "step" or an "evaluation" that may be as slow as the slowest so far, and then a
        save three times as slow.
        """
        spare = self.until_deadline() - self.slowest.get(before, 0.0) - 3 * self.slowest["save"]
        self.reason = self.reason or self._reason_now(spare)
        return bool(self.reason)

    def _reason_now(self, seconds_to_spare: float) -> str | None:
        code = int(self.signals[0]) if self.signals else -1 if seconds_to_spare < 0 else 0
        if self.engine.world_size > 1:                # what process 0 says
            code = int(self.engine.sum(code if self.engine.rank == 0 else 0)[0])
        if code > 0:
            return signal.Signals(code).name
        return "deadline" if code else None
