"""The Hugging Face hub: one way to ask, to ask again, and to give up in a sentence.

No message holds a URL or a header: a redirect's URL is signed, a header carries the token.
"""
from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from pathlib import Path
from urllib.parse import quote

from fsspec.spec import AbstractBufferedFile

from stentor.files import ParameterError, SourceError, StentorError
from stentor.recipes import Source


class _Unanswered(Exception):
    """One request failed: why, how long the hub asks us to wait, whether asking again cannot help."""

    def __init__(self, problem: str, wait: int = 0, hopeless: bool = False):
        self.problem, self.wait, self.hopeless = problem, wait, hopeless


# While the hub has answered nothing at all: after 1 + 2 s there is no network, not a hiccup.
FIRST_TRIES = 3
# In these the kernel itself asks three times; a slow resolver has asked more than once too.
CONNECT_SECONDS = 5
_answered = set()           # the endpoints that this process had an answer from
NO_NETWORK = ("Is there a network? On Kaggle switch Internet on (notebook > Settings > Internet; it needs "
              "a verified phone number); elsewhere see HF_ENDPOINT and the proxy, or name a local file "
              "or folder instead.")


def _ask(who: str, repo: str, what: str, request, *, tries: int = 8, sleep=time.sleep,
         deadline: float | None = None):
    """request(), tried again after 1, 2, 4 ... 60 s or as long as the hub asks, when it raises.

    who: "source web"; repo: "hf:owner/name at revision main". Raises SourceError after `tries`, when
    the next wait would pass `deadline` (as time.monotonic()), or after FIRST_TRIES without one answer;
    ParameterError where asking cannot help.
    """
    from huggingface_hub import constants
    for attempt in range(1, tries + 1):
        began = time.monotonic()
        try:
            answer = request()
            _answered.add(constants.ENDPOINT)
            return answer
        except Exception as error:
            failed = error if isinstance(error, _Unanswered) else _as_unanswered(error)
        problem = failed.problem
        if failed.hopeless:
            raise ParameterError([
                f"{who}: the hub gave no {repo.removeprefix('hf:')} ({problem}); check both names, "
                "HF_TOKEN, HF_HUB_OFFLINE, and whether its page asks you to accept conditions."
            ]) from None
        if problem[:5] == "HTTP ":
            _answered.add(constants.ENDPOINT)
        elif constants.ENDPOINT not in _answered:
            long = "Connect" in problem and time.monotonic() - began > CONNECT_SECONDS / 2
            if long or attempt >= FIRST_TRIES:
                raise SourceError(f"{who}: {repo} could not be read, because the hub does not answer "
                                  f"({problem}). {NO_NETWORK}") from None
        wait = max(min(2 ** (attempt - 1), 60), failed.wait)
        late = deadline is not None and time.monotonic() + wait > deadline
        if late or attempt == tries:
            past = f"; {wait:,} s more would pass the deadline" if late else ""
            hint = "" if problem[:5] == "HTTP " else f" {NO_NETWORK}"
            raise SourceError(f"{who}: {what} of {repo} could not be read: {problem}, try {attempt} of "
                              f"{tries}{past}. Nothing written is lost: run the same again and it goes "
                              f"on from there.{hint}") from None
        print(f"{who}: {problem} at {what}; try {attempt + 1} of {tries} in {wait:,} s", flush=True)
        sleep(wait)


def _as_unanswered(error: Exception) -> _Unanswered:
    """What an exception of an HTTP library or of huggingface_hub means.

    Of its text, which may hold a signed URL, only the system's own words are said.
    """
    seen = []
    while error is not None:                          # huggingface_hub wraps what it met
        if getattr(error, "response", None) is not None:
            return _http_problem(error.response)
        seen.append(error)
        error = error.__cause__ or error.__context__
    names = [name for name in (type(error).__name__ for error in seen)
             if name != "LocalEntryNotFoundError"]
    for error in seen:
        if isinstance(error, OSError) and (error.errno == errno.ENOSPC or error.filename):
            raise ParameterError([
                f"the hub's cache cannot be written ({error.filename or names[0]}: {error.strerror}); "
                "set HF_HOME to a folder that can, with room in it."]) from None
    if "OfflineModeIsEnabled" in names:
        return _Unanswered("OfflineModeIsEnabled", hopeless=True)
    why = [error.strerror for error in seen if isinstance(error, OSError) and error.strerror]
    return _Unanswered(": ".join([*names, "no answer"][:1] + why[:1]))


def _http_problem(answer) -> _Unanswered:
    """What an answer of the hub that is no success means."""
    from huggingface_hub import constants
    code, reason = answer.status_code, answer.headers.get("X-Error-Code", "")
    limit = answer.headers.get("RateLimit", "") if code == 429 else ""
    asked = answer.headers.get("Retry-After") or limit.rpartition("t=")[2]
    return _Unanswered(f"HTTP {code} {reason}".strip(), int(asked) if asked.isdigit() else 0,
                       reason in ("RepoNotFound", "RevisionNotFound", "GatedRepo")
                       or (code in (401, 403) and str(answer.url).startswith(constants.ENDPOINT)))


def _hub_get(who: str, repo: str, url: str, what: str, span: tuple[int, int] | None = None,
             **reading):
    """GET from the hub, as often as `_ask` (`reading`) sees fit.

    Fewer bytes than `span` (first, last) are a failure too.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session
    url = url if url.startswith("http") else f"{constants.ENDPOINT}/{url}"
    wanted = {"accept-encoding": "identity"}
    if span:
        wanted["range"] = f"bytes={span[0]}-{span[1]}"

    def request():
        answer = get_session().get(url, headers=build_hf_headers() | wanted, timeout=_timeout())
        if answer.status_code not in (200, 206):
            raise _http_problem(answer)
        received = len(answer.content)
        if not (received == span[1] - span[0] + 1 if span else answer.json()):
            raise _Unanswered(f"HTTP {answer.status_code}, cut off after {received:,} bytes")
        return answer
    return _ask(who, repo, what, request, **reading)


def hub_commit(who: str, repo: str, page: str, revision: str, **reading) -> str:
    """The commit that a revision names now; page: "models/owner/name" or "datasets/owner/name"."""
    url = f"api/{page}/revision/{quote(revision, safe='')}"
    return _hub_get(who, repo, url, "the revision", **reading).json()["sha"]


def _timeout():
    """HF_HUB_DOWNLOAD_TIMEOUT, but less for the connection, as the hub's HTTP library has it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    kind = type(getattr(get_session(), "timeout", None))    # of httpx or httpx2; requests has none
    if kind.__name__ != "Timeout":
        return seconds
    return kind(seconds, connect=min(seconds, CONNECT_SECONDS))


def hub_folder(name: str, patterns: list[str], who: str, revision: str | None = None,
               **reading) -> Path:
    """The local folder with those files of a model repository whose paths match `patterns` (globs).

    name: "hf:owner/name". They are kept in huggingface_hub's cache; without a network what lies there is
    used, if a file of the first pattern does. `reading`, SourceError, ParameterError: as for `documents`.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging
    disable_progress_bars()
    logging.set_verbosity_error()                     # its warnings hold signed URLs
    name = name.removeprefix("hf:")
    try:
        commit = hub_commit(who, f"hf:{name}", f"models/{name}", revision or "main", **reading)
    except StentorError:
        for folder in _cached_snapshots(name, revision):
            if any(folder.glob(patterns[0])):
                return folder
        raise
    below = None if "/" in "".join(patterns) else ["*/*"]         # a * also matches folders
    return Path(_ask(who, f"hf:{name}", "the files", lambda: snapshot_download(
        name, revision=commit, allow_patterns=patterns, ignore_patterns=below,
        endpoint=constants.ENDPOINT), **reading))


def _cached_snapshots(name: str, revision: str | None) -> list[Path]:
    """The folders of a model repository in the hub's cache: newest first, or that of `revision`."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name
    if revision:
        with contextlib.suppress(Exception):
            return [Path(snapshot_download(name, revision=revision, local_files_only=True))]
        return []
    repo = repo_folder_name(repo_id=name, repo_type="model")
    folder = Path(constants.HF_HUB_CACHE) / repo / "snapshots"
    return sorted(folder.glob("*"), key=os.path.getmtime, reverse=True)


def hub_read(source: Source, url: str, what: str, span: tuple[int, int] | None = None, **reading):
    """_hub_get for a dataset, named as its source is."""
    repo = f"{source.path} at revision {source.revision}"
    return _hub_get(f"source {source.name}", repo, url, what, span, **reading)


class HubFile(AbstractBufferedFile):
    """A file of a pinned hub dataset: only what is asked for is fetched (of parquet: one column).

    Not huggingface_hub's own HfFileSystemFile: of a body cut short it handed on 10,000 of 20,000 bytes
    as if they were all; one 429 had it sleep the 214 s that the hub named, past any deadline; a 403's
    text held the signed URL (1.11 and 2.4), and at a cut connection 1.11 gave up.
    """

    def __init__(self, source: Source, name: str, size: int, **reading):
        url = f"datasets/{source.path[3:]}/resolve/{source.revision}/{quote(name)}"
        self.get = functools.partial(hub_read, source, url, name, **reading)
        super().__init__(None, name, size=size, cache_type="none")

    def _fetch_range(self, start, end):
        return self.get((start, min(end, self.size) - 1)).content if start < self.size else b""


def is_hub_name(path) -> bool:
    return str(path).startswith("hf:")
