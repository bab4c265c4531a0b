"""Errors for readers, files that are there whole or not at all, and who owns a folder.

Everything else in the house may import this; it imports only `secrets`.
"""
from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from stentor.secrets import redact


class StentorError(Exception):
    """An error whose message is written for the reader: a notebook shows it, not the stack.

    (IPython asks for it here.)
    """

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {redact(str(self))}"]


class ParameterError(StentorError, ValueError):
    """Raised before any work starts; lists every problem, one sentence each, and no secret."""

    def __init__(self, problems: list[str]):
        self.problems = [redact(problem) for problem in problems]
        super().__init__("\n".join(self.problems))

    def _render_traceback_(self):
        return ["Parameters refused, nothing was started:",
                *(f"  - {problem}" for problem in self.problems)]


class SourceError(StentorError, RuntimeError):
    """A source could not be read on. What the store holds stays; the same call goes on from it."""


class FeedStopped(StentorError, RuntimeError):
    """A worker process ended before it gave what training waits for; the message is its error."""


class CheckpointError(StentorError, RuntimeError):
    """A checkpoint does not belong to this run, or none of those present can be read."""


class TrainingFailed(StentorError, RuntimeError):
    """The training process ended with an error; the message is its last lines."""


def read_object(path: Path) -> dict:
    """The JSON object in a file; {} where there is none, or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    So does a run killed at any instant. A symbolic link stays one: what it names is written. What
    killed writers of this file left beside it is removed.
    """
    path = Path(os.path.realpath(path))
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _open_locked(temporary) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:                              # a full disk, the stop button
        temporary.unlink(missing_ok=True)
        raise


def _open_locked(path: Path):
    """A new file, locked (flock): nobody takes it for a leftover while its writer lives.

    Whatever the writer's process id is.
    """
    while True:
        file = open(path, "wb")
        with contextlib.suppress(OSError):            # without locks nothing is ever removed
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()                                  # removed between our two calls: again


def remove_leftovers(folder, names: str) -> None:
    """Remove the temporaries of `write_atomically` for `names` (a glob) of killed writers.

    Never those of a live one.
    """
    for left in Path(folder).glob(f".{names}.[0-9]*"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _can_write(folder) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def find_home() -> None:
    """Give this process and its children a home where there is none that can be written; say so.

    The hub's cache, matplotlib, numba, IPython, Jupyter and torch's compiler all write below ~. The
    new one is in $STENTOR_CACHE, else in a folder of this user in the temporary one. Only ~/.cache
    cannot be written: only it moves.
    """
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    if not (os.path.isdir(home) and _can_write(home)):
        moved, broken = "HOME", home
    elif os.path.lexists(cache) and not _can_write(cache):
        moved, broken = "XDG_CACHE_HOME", cache
    else:
        return
    token = os.path.join(cache, "huggingface", "token")
    if os.path.isfile(token):                         # a home that can be read keeps its token
        os.environ.setdefault("HF_TOKEN_PATH", token)
    os.environ.setdefault("USER", str(os.getuid()))   # torch's compiler asks, and some have none
    for place in filter(None, (os.environ.get("STENTOR_CACHE"), _private_folder())):
        new = os.path.join(place, moved.lower())
        with contextlib.suppress(OSError):
            os.makedirs(new, exist_ok=True)
            if _can_write(new):
                os.environ[moved] = new
                print(f"{broken} is no folder that can be written: caches go to {new}",
                      file=sys.stderr)
                return


def _private_folder() -> str | None:
    """A folder of this user alone in the temporary one, or None where there can be none.

    The same for all their processes, unless somebody else was there first.
    """
    with contextlib.suppress(OSError):
        folder = os.path.join(tempfile.gettempdir(), f"stentor-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        if os.lstat(folder).st_uid == os.getuid():
            return folder
        return tempfile.mkdtemp(prefix="stentor-")


def cache_folder() -> Path:
    """$STENTOR_CACHE, else stentor in $XDG_CACHE_HOME or ~/.cache; it need not be there yet."""
    if given := os.environ.get("STENTOR_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stentor"


def remove(path: Path) -> None:
    """Remove what may be there: a folder and all in it, a file, a link, but not what it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`, fsynced; readable as the umask says (mkstemp's is 0600)."""
    mode = temporary.stat().st_mode & 0o777           # it was just made: what the umask says
    for path in temporary.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    fsync_folder(folder.parent)
    remove(old)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class RunLock:
    """One process owns a run folder.

    The lock is the kernel's (flock), so it dies with its process, kill -9 included.
    """

    def __init__(self, run_dir):
        self.path = Path(run_dir) / ".lock"
        self.file = open(self.path, "a+")
        self.take(self.file, run_dir)
        self.file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(f"process {os.getpid()} on {platform.node()}, started {started}")
        self.file.flush()

    @staticmethod
    def take(file, run_dir):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another run"
            raise ParameterError([f"{run_dir} is in use by {owner}; wait for it, stop it, or "
                                  "choose another RUN."]) from None

    def release(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):                           # an error's traceback would keep the lock
        self.release()


def duration(seconds: float) -> str:
    """"2h 05m", "3m 20s" or "12s"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
