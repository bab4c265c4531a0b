"""Long work is watched, not scrolled: in a notebook that a person runs, one bar, one curve and the
last lines of the log, in one place; everywhere else plain lines.

    with watching() as say: ...      say("step 20/977 | ... | 3m 2s left"), line by line
"""
from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import re
import time
from collections import deque
from pathlib import Path

from stentor.files import duration

LINES = 8                  # of the log, below the curve
SECONDS = 0.5              # between two updates: a browser need not be told more often
PICTURE_SECONDS = 10       # between two drawings, and 30 times what one took: 3% of one core
RUNNERS = re.compile(rb"papermill|nbconvert")
STEP = re.compile(r"step\s+([\d,]+)/([\d,]+) \|")                 # Run.log_line
PART = re.compile(r"\s*([\d,]+) of ([\d,]+) ")                    # the benchmark's batches
LEFT = re.compile(r"([\d.]+ ?[smhd][\w. ]*) left")


def is_watched() -> bool:
    """Whether this is a kernel that a person looks at.

    STENTOR_PROGRESS = "live" or "log" decides where it is set (our own runner sets "log"). Else not
    in a terminal, not in Kaggle's "Save & Run All" (KAGGLE_KERNEL_RUN_TYPE = Batch), and not where
    papermill or nbconvert started the kernel: they leave no other sign than their own command line.
    """
    wanted = os.environ.get("STENTOR_PROGRESS")
    if wanted in ("live", "log"):
        return wanted == "live"
    try:
        from IPython import get_ipython
        shell = get_ipython()
    except ImportError:
        return False
    if shell is None or not hasattr(shell, "kernel"):
        return False
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "Interactive") != "Interactive":
        return False
    with contextlib.suppress(OSError):
        return not RUNNERS.search(Path(f"/proc/{os.getppid()}/cmdline").read_bytes())
    return True


@contextlib.contextmanager
def watching(*, picture=None, rounds: int | None = None, log=None):
    """Gives the function that takes each line of a log.

    picture: a function that draws a figure of how it goes, or None for none yet. rounds: how many
    lines that say "characters per token" there will be at most, where lines do not say so
    themselves. log: a file that gets every line, where they are not printed.
    """
    if not is_watched():
        yield lambda text: print(text, flush=True)
        return
    watch = Watch(picture, rounds, log)
    try:
        yield watch
    finally:
        watch.end()


class Watch:
    """One output of a cell, rewritten in place."""

    def __init__(self, picture=None, rounds: int | None = None, log=None):
        from IPython.display import HTML, display
        self.picture, self.rounds, self.log = picture, rounds, log
        self.lines, self.done, self.total, self.left = deque(maxlen=LINES), 0, rounds, None
        self.began, self.shown, self.drawn, self.image = time.monotonic(), 0.0, 0.0, ""
        self.place = display(HTML(self.page()), display_id=True)

    def __call__(self, text: str) -> None:
        self.lines.append(text)
        if self.log:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        self.read(text)
        if time.monotonic() - self.shown > SECONDS:
            self.show()

    def read(self, text: str) -> None:
        """How far the work is, as this line has it."""
        if found := STEP.search(text) or PART.match(text):
            self.done, self.total = (int(number.replace(",", "")) for number in found.groups())
            left = LEFT.search(text)
            self.left = left.group(1) if left else None
        elif self.rounds and "characters per token" in text:
            self.done = min(self.done + 1, self.rounds)
            each = (time.monotonic() - self.began) / self.done
            self.left = f"at most {duration(each * (self.rounds - self.done))}"

    def show(self, last: bool = False) -> None:
        from IPython.display import HTML
        if self.picture and (last or time.monotonic() > self.drawn):
            self.draw()
        self.shown = time.monotonic()
        self.place.update(HTML(self.page(last)))

    def draw(self) -> None:
        """The curve as it is by now; that it cannot be drawn stops no work."""
        began = time.monotonic()
        with contextlib.suppress(Exception):          # a file half-written, no figures yet
            if (figure := self.picture()) is not None:
                image = io.BytesIO()
                figure.savefig(image, format="png", dpi=96)
                self.image = base64.b64encode(image.getvalue()).decode()
        took = time.monotonic() - began
        self.drawn = time.monotonic() + max(PICTURE_SECONDS, 30 * took)

    def page(self, last: bool = False) -> str:
        """The bar, the curve, the lines; nothing of a line is taken as HTML."""
        spent = duration(time.monotonic() - self.began)
        bar, said = "", spent
        if self.total:
            bar = f'<progress value="{self.done}" max="{self.total}" style="width:60%"></progress>'
            said = f"{self.done:,} of {self.total:,}; {spent}"
        if self.left and not last:
            said += f", {html.escape(self.left)} left"
        image = f'<div><img src="data:image/png;base64,{self.image}"></div>' if self.image else ""
        lines = html.escape("\n".join(self.lines))
        return f"<div>{bar} {said}</div>{image}<pre>{lines}</pre>"

    def end(self) -> None:
        self.show(last=True)
