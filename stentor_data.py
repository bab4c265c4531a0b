"""From documents to batches: sources, cleaning, the embedded corpus, and the token store that training reads.

`stentor_utils` imports all of it, so notebooks say `su.prepare_tokens` and never this name.
"""
from __future__ import annotations

import ast
import codecs
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
import unicodedata
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from fsspec.spec import AbstractBufferedFile


# What secrets look like, by kind: the one list that redact, secret_problems, stentor_card.publish and tests/lint.py go by.
# The forms are those that the providers print, shorter ends included, so that a cut token is one still. Where a pattern has
# a group, the group is the secret and the rest is what gives it away.
SECRETS = {
    "a Hugging Face token": r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}",
    "a GitHub token": r"\b(?:gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,})",
    "a GitLab token": r"\bgl(?:pat|oas|dt|rt|rtr|cbt|ptt|ft|imt|agent|soat|ffct|wt)-[\w.-]{16,}",
    "a Kaggle key": r"\bKAGGLE_KEY\W{1,4}([0-9a-f]{32})\b|\\?[\"']key\\?[\"']\s*:\s*\\?[\"']([0-9a-f]{32})\b",
    "a Kaggle token": r"\bKGAT_[\w-]{16,}",
    "a Google key": r"\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{16,}|\b1//0[\w-]{30,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
                  r"|(?i:\baws_?(?:secret_?access_?key|session_?token)\W{1,5})([A-Za-z0-9/+=]{40,})",
    "an OpenAI or Anthropic key": r"\bsk-(?=[\w-]*\d)[\w-]{20,}",
    "a Slack token": r"\b(?:xox[a-z]|xapp)-(?=[\w-]*\d)[\w-]{16,}|\bhooks\.slack\.com/services/[\w/]{16,}",
    "a Weights & Biases key": r"(?i:\bwandb_?(?:api_?)?key\W{1,5})([0-9a-f]{40})\b|\bwandb_v\d_\w{16,}",
    "a password of .netrc": r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+(\S+)",
    "a PyPI token": r"\bpypi-(?=[\w-]*\d)[\w-]{30,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{30,}",
    "a Stripe key": r"\b(?:[prs]k_(?:live|test)_|whsec_)[A-Za-z0-9]{16,}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "a private key": r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
                     r"(?:[\s\S]{0,20000}?-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----|[\sA-Za-z0-9+/=\\]{0,20000})",
    "a password in a URL": r"(?<=://)([^\s:@/'\"]{0,200}:(?!\{|<|\$\{|\$[A-Z_]+@)[^\s/'\"]{1,500}|[^\s@/:'\"]{20,500})@",
    "a token in a header": r"\b(?:Bearer|Basic) +((?=[\w.~+/=-]*\d)[\w.~+/=-]{12,})",
    "a token in a URL": r"[?&][\w-]{0,40}(?i:token|key|secret|password|signature|credential)=(?![{<$])([^&\s'\"]{6,})",
}
_SECRETS = [re.compile(pattern, re.ASCII) for pattern in SECRETS.values()]
# Names of environment variables whose values are secret. TOKENIZER and TOKEN_BUDGET are parameters, not secrets: `make`
# puts what it was given on its command line into the environment too.
_SECRET_NAME = re.compile(r"TOKENS?(?:_|\d|$)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|_PAT$"
                          r"|(?:^|_|API|ACCESS)KEY(?:_|\d|$)", re.IGNORECASE)
_NO_SECRET_NAME = re.compile(r"PATH|FILE|DIR|TOKEN_BUDGET", re.IGNORECASE)


def secret_values() -> dict[str, str]:
    """{name: value} of the environment variables whose names say that their values are secret; short values left out."""
    return {name: value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_NAME.search(name)
            and not _NO_SECRET_NAME.search(name)}


def secret_kinds(content: bytes | str) -> list[str]:
    """The kinds of SECRETS that text, or the bytes of a file, hold.

    Of bytes that are no text, such as weights, the printable stretches are searched: 48 MB took 40 s whole, 1 s so.
    """
    if isinstance(content, bytes):
        try:
            content = content.decode()
        except UnicodeDecodeError:
            content = b"\0".join(re.findall(rb"[\t\n\r -~]{8,}", content)).decode()
    return [kind for kind, pattern in zip(SECRETS, _SECRETS) if pattern.search(content)]


def redact(text: str) -> str:
    """The text without what looks like a token or password, and without the values of such environment variables."""
    for value in secret_values().values():
        text = text.replace(value, "[secret]")

    def hidden(found):
        return next((found[0].replace(part, "[secret]") for part in found.groups() if part), "[secret]")
    for pattern in _SECRETS:
        text = pattern.sub(hidden, text)
    return text


class StentorError(Exception):
    """An error whose message is written for the reader: a notebook shows it, not the stack (IPython asks for it here)."""

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {redact(str(self))}"]


class ParameterError(StentorError, ValueError):
    """Raised before any work starts; the message lists every problem found, one sentence each, and no secret."""

    def __init__(self, problems: list[str]):
        self.problems = [redact(problem) for problem in problems]
        super().__init__("\n".join(self.problems))

    def _render_traceback_(self):
        return ["Parameters refused, nothing was started:"] + [f"  - {problem}" for problem in self.problems]


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a run killed at any instant, sees the old content or the new, never a part.

    A symbolic link stays one: what it names is written. What killed writers of this file left beside it is removed.
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
    """A new file, locked (flock): while its writer lives nobody takes it for a leftover, whatever its process id is."""
    while True:
        file = open(path, "wb")
        with contextlib.suppress(OSError):            # a file system without locks: then nothing is ever removed
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()                                  # removed between our two calls: again


def remove_leftovers(folder, names: str) -> None:
    """Remove the temporaries of `write_atomically` for `names` (a glob) whose writers were killed; never a live one's."""
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
    """Give this process and its children a home folder where there is none that can be written, and say so.

    The hub's cache, matplotlib, numba, IPython, Jupyter and torch's compiler all write below ~. The new one is in
    $STENTOR_CACHE, else in a folder of this user in the temporary one. Only ~/.cache cannot be written: only it moves.
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
    os.environ.setdefault("USER", str(os.getuid()))   # torch's compiler asks for a name, and some have none either
    for place in filter(None, (os.environ.get("STENTOR_CACHE"), _private_folder())):
        new = os.path.join(place, moved.lower())
        with contextlib.suppress(OSError):
            os.makedirs(new, exist_ok=True)
            if _can_write(new):
                os.environ[moved] = new
                print(f"{broken} is no folder that can be written: caches go to {new}", file=sys.stderr)
                return


def _private_folder() -> str | None:
    """A folder of this user alone in the temporary one, the same for all their processes; None where there can be none."""
    with contextlib.suppress(OSError):
        folder = os.path.join(tempfile.gettempdir(), f"stentor-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        if os.lstat(folder).st_uid == os.getuid():
            return folder
        return tempfile.mkdtemp(prefix="stentor-")    # somebody else was there first


find_home()                                           # before huggingface_hub and matplotlib look for theirs


def cache_folder() -> Path:
    """$STENTOR_CACHE, else stentor in $XDG_CACHE_HOME or ~/.cache; it need not be there yet."""
    if given := os.environ.get("STENTOR_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stentor"


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    path: "local:prose" | "local:code" | "local:math" (read from the installed Python), "hf:owner/dataset" (the hub),
    or a file or folder of them: .jsonl or .ndjson, .json (an array, an object or lines), .csv, .tsv, .txt, all of these also
    as .gz, .bz2, .xz, .zst or .lz4; .parquet, .arrow. In a .txt a line <|doc|>, or <|endoftext|> anywhere, stands between
    two documents. Hidden files and folders are not read. `revision` pins a hub dataset; `weight` is relative.
    """
    name: str
    path: str
    weight: float = 1.0
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str | None = "text"                   # None: documents are whole rows, as dicts
    preserve_linebreaks: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Text: cleaning as the cards define it, and the sources. A document stream is resumable: every document comes with the
# cursor {"file": i, "row": j} from which the rest of the stream can be read again.


def clean_text(text: str, preserve_linebreaks: bool = False) -> str:
    """The cards' cleaning: NFKC, then all white space to single spaces; for code the Stentor3 card keeps the lines.

    One deliberate difference: the Stentor3 card writes `text.replace("\\\\r\\\\n", "\\\\n")`, an escaping slip of the page;
    real carriage returns are meant and replaced here.
    """
    text = unicodedata.normalize("NFKC", text)
    if preserve_linebreaks:
        lines = text.replace("\r\n", "\n").replace("\r", "\n").splitlines()
        return "\n".join(line.rstrip() for line in lines).strip()
    return " ".join(text.split())         # the card's two joins in one: split() also splits at every line break


def _python_files(kind: str) -> list[Path]:
    """The installed Python files that the embedded corpus `kind` reads, in a fixed order."""
    paths = sysconfig.get_paths()
    mathematical = {"sympy", "mpmath", "scipy"}
    found = []
    for root in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            if root == Path(paths["stdlib"]) and parts[0] in ("site-packages", "dist-packages"):
                continue
            if "tests" in parts or "test" in parts:
                continue
            if kind == "code" or (parts[0] in mathematical) == (kind == "math"):
                found.append(("/".join(parts), path))
    return [path for _, path in sorted(found)]


def _docstrings(path: Path) -> list[str]:
    """Docstrings and comment blocks of one Python file."""
    try:
        text = path.read_text(encoding="utf-8")
        if '"""' not in text and "\n# " not in text:   # nothing to find: parsing is most of the cost
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")            # invalid escapes in other people's files
            tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    found = [ast.get_docstring(node) for node in ast.walk(tree)
             if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    comments = re.findall(r"(?:^[ \t]*# .*\n){2,}", text, flags=re.MULTILINE)
    found += [re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE) for block in comments]
    return [doc for doc in found if doc]


def _is_prose(paragraph: str) -> bool:
    """Running text rather than a parameter table, a formula or a doctest: long enough, and nearly all letters."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return len(paragraph) >= 80 and letters >= 0.88 * len(paragraph) and ">>>" not in paragraph


def _extract(kind: str) -> list[str]:
    """All documents of an embedded corpus, in a fixed pseudo-random order (by hash), none twice.

    prose: paragraphs of running English in docstrings, comments, package descriptions and the language reference; a
           paragraph that occurred before is left out, so that no validation paragraph was trained on.
    math:  whole docstrings of sympy, mpmath and scipy.     code: whole source files up to 100 kB.
    """
    files = _python_files(kind)
    if kind == "code":
        documents = [path.read_bytes().decode("utf-8", "replace") for path in files
                     if path.stat().st_size <= 100_000 and hashlib.sha256(str(path.name).encode()
                                                                          + str(path.stat().st_size).encode()).digest()[0] < 64]
    else:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=_fork()) as pool:
            found = list(pool.map(_docstrings, files, chunksize=32))
        if kind == "math":
            documents = ["\n\n".join(strings) for strings in found]
        else:
            descriptions = [path.read_text(encoding="utf-8", errors="replace").partition("\n\n")[2]
                            for path in sorted(Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/METADATA"))]
            from pydoc_data.topics import topics                    # the Python language reference, as text
            found += [[text] for text in descriptions + list(topics.values())]
            documents, seen = [], set()
            for strings in found:
                kept = []
                for paragraph in re.split(r"\n\s*\n", "\n\n".join(strings)):
                    paragraph = " ".join(paragraph.split())
                    if _is_prose(paragraph) and (key := paragraph.lower()) not in seen:
                        seen.add(key)
                        kept.append(paragraph)
                documents.append("\n\n".join(kept))
    unique = {hashlib.sha256(text.encode()).digest(): text for text in documents if len(text) >= 200}
    return [unique[key] for key in sorted(unique)]


def _fork():
    import multiprocessing
    return multiprocessing.get_context("fork")       # workers only read text; spawning would import torch in each


def local_corpus(kind: str) -> Path:
    """The embedded corpus "prose" | "code" | "math" as a .jsonl file, extracted once and kept in the cache folder.

    The name carries a hash of the installed files' names and sizes: another installation is another corpus.
    The cache is `cache_folder()`. Raises ParameterError when the file is not in it and it cannot be written.
    """
    if kind not in ("prose", "code", "math"):
        raise ParameterError([f"local:{kind} is not an embedded corpus; known: local:prose, local:code, local:math."])
    files = _python_files(kind)
    names = "extraction 1\n" + "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    cache = cache_folder()
    path = cache / f"{kind}-{hashlib.sha256(names.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()            # asked before the work, not after it
            lines = "".join(json.dumps({"text": text}) + "\n" for text in _extract(kind))
            write_atomically(path, lines.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise ParameterError([f"local:{kind} is kept in {cache}, which cannot be written ({error.strerror}); set "
                                  "STENTOR_CACHE to a folder that can."]) from None
    return path


class SourceError(StentorError, RuntimeError):
    """A source could not be read on. What the store holds stays, and the same call goes on from there."""


class _Unanswered(Exception):
    """One request to the hub failed: why, how long it asks us to wait, and whether asking again cannot help."""

    def __init__(self, problem: str, wait: int = 0, hopeless: bool = False):
        self.problem, self.wait, self.hopeless = problem, wait, hopeless


FIRST_TRIES = 3             # while the hub has answered nothing at all: after 1 + 2 s there is no network, not a hiccup
CONNECT_SECONDS = 5         # in which the kernel itself asks three times; a slow resolver has asked more than once too
_answered = set()           # the endpoints that this process had an answer from


def _ask(who: str, repo: str, what: str, request, *, tries: int = 8, sleep=time.sleep, deadline: float | None = None):
    """request(), tried again after 1, 2, 4 ... 60 s or as long as the hub asks, when it raises.

    who: "source web"; repo: "hf:owner/name at revision main". Raises SourceError after `tries`, when the next wait would
    pass `deadline` (as time.monotonic()), or after FIRST_TRIES without one answer; ParameterError where asking cannot help.
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
        if failed.hopeless:
            raise ParameterError([f"{who}: the hub gave no {repo.removeprefix('hf:')} ({failed.problem}); check both names, "
                                  "HF_TOKEN, HF_HUB_OFFLINE, and whether its page asks you to accept conditions."]) from None
        if failed.problem[:5] == "HTTP ":
            _answered.add(constants.ENDPOINT)
        elif constants.ENDPOINT not in _answered and (
                attempt >= FIRST_TRIES or ("Connect" in failed.problem and time.monotonic() - began > CONNECT_SECONDS / 2)):
            raise SourceError(f"{who}: {repo} could not be read, because the hub does not answer ({failed.problem}). "
                              f"{NO_NETWORK}") from None
        wait = max(min(2 ** (attempt - 1), 60), failed.wait)
        late = deadline is not None and time.monotonic() + wait > deadline
        if late or attempt == tries:
            hint = "" if failed.problem[:5] == "HTTP " else f" {NO_NETWORK}"
            raise SourceError(f"{who}: {what} of {repo} could not be read: {failed.problem}, try {attempt} of {tries}"
                              f"{f'; {wait:,} s more would pass the deadline' if late else ''}. Nothing written is "
                              f"lost: run the same again and it goes on from there.{hint}") from None
        print(f"{who}: {failed.problem} at {what}; try {attempt + 1} of {tries} in {wait:,} s", flush=True)
        sleep(wait)


NO_NETWORK = ("Is there a network? On Kaggle switch Internet on (notebook > Settings > Internet; it needs a verified phone "
              "number); elsewhere see HF_ENDPOINT and the proxy, or name a local file or folder instead.")


def _as_unanswered(error: Exception) -> _Unanswered:
    """What an exception of an HTTP library or of huggingface_hub means; of its text, which may hold a signed URL, only the
    system's own words are said."""
    seen = []
    while error is not None:                          # huggingface_hub wraps what it met
        if getattr(error, "response", None) is not None:
            return _http_problem(error.response)
        seen.append(error)
        error = error.__cause__ or error.__context__
    names = [type(error).__name__ for error in seen if type(error).__name__ != "LocalEntryNotFoundError"]
    for error in seen:
        if isinstance(error, OSError) and (error.errno == errno.ENOSPC or error.filename):
            raise ParameterError([f"the hub's cache cannot be written ({error.filename or names[0]}: {error.strerror}); set "
                                  "HF_HOME to a folder that can, with room in it."]) from None
    if "OfflineModeIsEnabled" in names:
        return _Unanswered("OfflineModeIsEnabled", hopeless=True)
    why = next((error.strerror for error in seen if isinstance(error, OSError) and error.strerror), None)
    return _Unanswered(": ".join(filter(None, ((names or ["no answer"])[0], why))))


def _http_problem(answer) -> _Unanswered:
    """What an answer of the hub that is no success means."""
    from huggingface_hub import constants
    code, reason = answer.status_code, answer.headers.get("X-Error-Code", "")
    limit = answer.headers.get("RateLimit", "") if code == 429 else ""
    asked = answer.headers.get("Retry-After") or limit.rpartition("t=")[2]
    return _Unanswered(f"HTTP {code} {reason}".strip(), int(asked) if asked.isdigit() else 0,
                       reason in ("RepoNotFound", "RevisionNotFound", "GatedRepo")
                       or (code in (401, 403) and str(answer.url).startswith(constants.ENDPOINT)))


def _hub_get(who: str, repo: str, url: str, what: str, span: tuple[int, int] | None = None, **reading):
    """GET from the hub, as often as `_ask` (`reading`) sees fit; fewer bytes than `span` (first, last) are a failure too.

    No message holds a URL or a header: a redirect's URL is signed, a header carries the token.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session
    url, wanted = url if url.startswith("http") else f"{constants.ENDPOINT}/{url}", {"accept-encoding": "identity"}
    if span:
        wanted["range"] = f"bytes={span[0]}-{span[1]}"

    def request():
        answer = get_session().get(url, headers=build_hf_headers() | wanted, timeout=_timeout())
        if answer.status_code not in (200, 206):
            raise _http_problem(answer)
        if not (len(answer.content) == span[1] - span[0] + 1 if span else answer.json()):
            raise _Unanswered(f"HTTP {answer.status_code}, cut off after {len(answer.content):,} bytes")
        return answer
    return _ask(who, repo, what, request, **reading)


def _timeout():
    """HF_HUB_DOWNLOAD_TIMEOUT, but less for the connection; as the HTTP library that huggingface_hub uses has it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    kind = type(getattr(get_session(), "timeout", None))          # httpx.Timeout or httpx2.Timeout; requests has none
    return kind(seconds, connect=min(seconds, CONNECT_SECONDS)) if kind.__name__ == "Timeout" else seconds


def hub_folder(name: str, patterns: list[str], who: str, revision: str | None = None, **reading) -> Path:
    """The local folder with those files of a model repository ("hf:owner/name") whose paths match `patterns` (globs).

    They are kept in huggingface_hub's cache; without a network what lies there is used, if a file of the first pattern does.
    `reading`, SourceError and ParameterError: as for `documents`.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging
    disable_progress_bars()
    logging.set_verbosity_error()                     # its warnings hold signed URLs
    name = name.removeprefix("hf:")
    try:
        url = f"api/models/{name}/revision/{quote(revision or 'main', safe='')}"
        commit = _hub_get(who, f"hf:{name}", url, "the revision", **reading).json()["sha"]
    except StentorError:
        for folder in _cached_snapshots(name, revision):
            if any(folder.glob(patterns[0])):
                return folder
        raise
    below = None if "/" in "".join(patterns) else ["*/*"]         # a * also matches folders
    return Path(_ask(who, f"hf:{name}", "the files", lambda: snapshot_download(
        name, revision=commit, allow_patterns=patterns, ignore_patterns=below, endpoint=constants.ENDPOINT), **reading))


def _hub_read(source: Source, url: str, what: str, span: tuple[int, int] | None = None, **reading):
    return _hub_get(f"source {source.name}", f"{source.path} at revision {source.revision}", url, what, span, **reading)


def _cached_snapshots(name: str, revision: str | None) -> list[Path]:
    """The folders of a model repository in huggingface_hub's cache: the newest first, or that of `revision`."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name
    if revision:
        with contextlib.suppress(Exception):
            return [Path(snapshot_download(name, revision=revision, local_files_only=True))]
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    return [] if revision else sorted(folder.glob("*"), key=os.path.getmtime, reverse=True)


class HubFile(AbstractBufferedFile):
    """A file of a pinned hub dataset, read by range requests: only what is asked for is fetched (of parquet: one column)."""

    def __init__(self, source: Source, name: str, size: int, **reading):
        url = f"datasets/{source.path[3:]}/resolve/{source.revision}/{quote(name)}"
        self.get = functools.partial(_hub_read, source, url, name, **reading)
        super().__init__(None, name, size=size, cache_type="none")

    def _fetch_range(self, start, end):
        return self.get((start, min(end, self.size) - 1)).content if start < self.size else b""


def pin_revision(source: Source, **reading) -> Source:
    """The source with its revision (None: main) resolved to the commit it names now; a full commit is left as it is."""
    if not source.path.startswith("hf:") or re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        return source
    source = dataclasses.replace(source, revision=source.revision or "main")
    url = f"api/datasets/{source.path[3:]}/revision/{quote(source.revision, safe='')}"
    return dataclasses.replace(source, revision=_hub_read(source, url, "the revision", **reading).json()["sha"])


def source_files(source: Source, **reading) -> dict[str, int]:
    """{path, or name in the hub repository: bytes} of a source's files, in reading order.

    Of a hub dataset those that its card lists for the config and split (YAML: configs, data_files); if it lists no such
    config, those with its name in their path ("sample-10BT" is sample/10BT/...) and, if any file names it, the split's.
    Raises ParameterError when there are none, or when a hub dataset has no such config or split.
    """
    if not source.path.startswith("hf:"):
        return _local_files(source)
    source, sizes, configs = pin_revision(source, **reading), {}, {}
    page = f"api/datasets/{source.path[3:]}/tree/{source.revision}?recursive=true"
    while page:
        answer = _hub_read(source, page, "the list of files", **reading)
        sizes |= {item["path"]: item["size"] for item in answer.json() if item["type"] == "file"}
        page = answer.links.get("next", {}).get("url")
    if "README.md" in sizes:
        import yaml
        card = HubFile(source, "README.md", sizes["README.md"], **reading).read().decode("utf-8", "replace")
        front = re.match(r"---\s*\n(.*?)\n---", card, re.S)
        with contextlib.suppress(yaml.YAMLError):     # a card that cannot be read lists nothing: the paths decide
            front = yaml.safe_load(front[1]) if front else None
        listed = front.get("configs") if isinstance(front, dict) else None
        for item in listed if isinstance(listed, list) else []:
            if isinstance(item, dict) and item.get("data_files"):
                configs[str(item.get("config_name", "default"))] = item["data_files"]
                if item.get("default"):
                    configs["default"] = item["data_files"]
    names = sorted(name for name in sizes if _is_data(name))
    config = source.config or (next(iter(configs)) if len(configs) == 1 else "default")
    if config in configs:
        globs, tokens = [], {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}     # as `datasets` reads them
        for item in configs[config] if isinstance(configs[config], list) else [configs[config]]:
            item = item if isinstance(item, dict) else {"split": "train", "path": item}
            if item.get("split", "train") == source.split:
                paths = item.get("path") or []
                globs += [paths] if isinstance(paths, str) else paths
        whole = "|".join("".join(tokens.get(t, re.escape(t)) for t in re.split(r"(\*\*/|\*\*|\*|\?)", glob)) for glob in globs)
        names = [name for name in names if re.fullmatch(whole, name)]
    else:
        if config != "default" or configs:
            near = [f"/{re.sub('[-_./]+', '/', text.lower())}/" for text in (config, *names)]
            names = ([name for name in names if f"/{config}/" in f"/{name}"]
                     or [name for name, path in zip(names, near[1:]) if near[0] in path])
        in_split = [name for name in names if source.split in re.split("[^a-z]+", name.lower())]
        names = in_split or (names if source.split == "train" else [])
    # As `datasets` has it a config is of one kind: notes and tables beside its .parquet or .jsonl are not its documents.
    names = [name for name in names if _format(name)[0] in ("parquet", "jsonl", "ndjson")] or names
    if not names:
        raise ParameterError([f"source {source.name}: {source.path} has no file that can be read for config {config}, split "
                              f"{source.split}; its card lists the configs: {', '.join(configs) or 'none'}. "
                              f"What can be read: {_READABLE}."])
    return {name: sizes[name] for name in names}


# How the files are written, and one reader for each way. A reader yields (number of the next row, value) from row `start` on
# and holds a few megabytes, however long the file is.
_LONGEST_ROW = 32 << 20                               # characters: one line, element, record or document of a .txt
_PACKINGS = ("gz", "bz2", "xz", "zst", "lz4")
_FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "txt", "parquet", "arrow")
_READABLE = f".{', .'.join(_FORMATS[:6])}, these also packed as .{', .'.join(_PACKINGS)}; .parquet, .arrow"
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json",    # datasets.data_files'
             "state.json")                            # FILES_TO_IGNORE, and what save_to_disk writes beside its .arrow
# Bytes that are not of the file's encoding become a lone surrogate, and their document is counted as invalid.
codecs.register_error("lone_surrogate", lambda error: ("\ud800", error.end))


@dataclass(frozen=True)
class BadRow:
    """Stands in a stream for a row that cannot be read; `reason` is what it is counted as."""
    reason: str


_TOO_LONG = BadRow(f"longer than {_LONGEST_ROW:,} characters")


def _format(name: str) -> tuple[str, str]:
    """(one of _FORMATS, one of _PACKINGS or "") by the name's endings; ("", "") for what cannot be read."""
    endings = ["", *re.split(r"[/\\]", name.lower())[-1].split(".")[1:]]
    packing = endings.pop() if endings[-1] in _PACKINGS else ""
    if endings[-1] not in _FORMATS or (packing and endings[-1] in ("parquet", "arrow")):
        return "", ""
    return endings[-1], packing


def _is_hidden(name: str) -> bool:
    """.git, .ipynb_checkpoints, ._text.txt, __MACOSX and their like."""
    return any(part.startswith((".", "__")) for part in name.split("/"))


def _is_data(name: str) -> bool:
    return bool(_format(name)[0]) and not _is_hidden(name) and name.rpartition("/")[2].lower() not in _NOT_DATA


def _visible_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(folder).as_posix())]


def _local_files(source: Source) -> dict[str, int]:
    """source_files of a file, a folder or an embedded corpus."""
    path = local_corpus(source.path[6:]) if source.path.startswith("local:") else Path(source.path)
    if path.is_file():
        if not _format(path.name)[0]:
            raise ParameterError([f"source {source.name}: {path} cannot be read; what can be: {_READABLE}. "
                                  "Unpack or convert it."])
        return {str(path): path.stat().st_size}
    visible = _visible_files(path)
    files = [p for p in visible if _is_data(p.name)]
    if not files:
        there = f" (there: {', '.join(p.name for p in visible[:5])})" if visible else ""
        raise ParameterError([f"source {source.name}: {source.path} is not a .jsonl, .parquet or .txt file, nor a folder "
                              f"with some{there}; nor does it begin with local: or hf:. What can be read: {_READABLE}."])
    # The endings that were read first come first: cursors of stores from then count the files in this order.
    files.sort(key=lambda p: not p.name.endswith((".jsonl", ".jsonl.gz", ".parquet", ".txt")))
    return {str(p): p.stat().st_size for p in files}


def _unpacked(file, packing: str):
    """An open file as it was before gzip, bzip2, ... packed it."""
    if packing == "gz":
        import gzip
        return gzip.open(file)
    if packing == "bz2":
        import bz2
        return bz2.open(file)
    if packing == "xz":
        import lzma
        return lzma.open(file)
    if packing:
        import pyarrow as pa
        return pa.input_stream(file, compression={"zst": "zstd"}.get(packing, packing))
    return file


_NO_TEXT = {b"\x1f\x8b": "is packed by gzip", b"BZh": "is packed by bzip2", b"\xfd7zXZ": "is packed by xz",
            b"\x28\xb5\x2f\xfd": "is packed by zstd", b"PK\x03\x04": "is a zip archive", b"PAR1": "is a parquet file",
            b"ARROW1": "is an arrow file", b"version https://git-lfs": "is a pointer of Git LFS (fetch the file: git lfs pull)"}


def _blocks(file, name: str):
    """The text of an open file, a megabyte at a time: in the encoding that its first bytes tell, every line end as \\n."""
    block = file.read(1 << 20)
    for magic, what in _NO_TEXT.items():
        if block.startswith(magic):
            raise ParameterError([f"{name} {what}, not what its ending says."])
    decoder = codecs.getincrementaldecoder(json.detect_encoding(block))("lone_surrogate")
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    while block:
        yield decoder.decode(block)
        block = file.read(1 << 20)
    yield decoder.decode(b"", final=True)


def _split(blocks, separator: str):
    """What stands between the separators; nothing behind a last one. What is over _LONGEST_ROW comes cut, and longer than that.

    Lines are split at "\n". Not by str.splitlines, which also splits at the U+2028, U+0085 and form feeds inside a text.
    """
    rest = ""
    for block in blocks:
        searched = max(0, len(rest) - len(separator) + 1)                # a separator may lie on the border of two blocks
        first, *others = (rest[searched:] + block).split(separator)
        rest = rest[:min(searched, _LONGEST_ROW + 1)] + first
        if others:
            yield rest
            rest = others.pop()
            yield from others
    if rest:
        yield rest


def _json(text: str):
    """A JSON value; None for what is none: broken, cut off, or nested deeper than Python goes."""
    if len(text) > _LONGEST_ROW:
        return _TOO_LONG
    try:
        return json.loads(text.removeprefix("\ufeff"), strict=False)      # not strict: a bare tab in a string is a tab
    except (ValueError, RecursionError):
        return None


def _json_lines(blocks, pick, start: int):
    for row, line in enumerate(_split(blocks, "\n")):
        if row >= start and line and not line.isspace():
            yield row + 1, pick(_json(line))


_JSON_PARTS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[{]|[\]}]|,', re.DOTALL)


def _json_values(blocks, base: int):
    """The text of each element of an array (base 1), or of each of several objects one after the other (base 0).

    Only strings, brackets and commas are looked at: an element that is no JSON does not stop it. Raises ValueError where the
    file ends inside of one, or one is too long.
    """
    text, place, begin, depth = "", 0, 0, 0
    for block in blocks:
        text, place, begin = text[begin:] + block, place - begin, 0
        if len(text) > _LONGEST_ROW + len(block):
            raise ValueError(f"a value is {_TOO_LONG.reason}")
        while part := _JSON_PARTS.search(text, place):
            if part[0][0] == '"' and not part[1]:     # a string that goes on in the next block
                break
            place, sign = part.end(), part[0]
            ended = depth == base == 1 and sign == ","
            if sign in "[{":
                depth += 1
                if depth == base:
                    begin = place
            elif sign in "]}":
                depth -= 1
                if base and depth == 0 and not text[begin:part.start()].strip():
                    begin = place                     # an empty array
                else:
                    ended = depth == 0
            if ended:
                yield text[begin:part.start() if base else place]
                begin = place
        place = part.start() if part else len(text)
    if depth or text[begin:].strip():
        raise ValueError("the file ends inside a value")


def _json_rows(blocks, pick, start: int):
    """The rows of a .json: an array's elements; an object, or several; or JSON lines, which many files of the name hold."""
    head = next(blocks)
    begin = head.lstrip()
    blocks = itertools.chain([head], blocks)
    if begin[:1] != "[" and isinstance(_json(begin.partition("\n")[0]), dict):
        yield from _json_lines(blocks, pick, start)
        return
    for row, text in enumerate(_json_values(blocks, int(begin[:1] == "["))):
        if row >= start:
            yield row + 1, pick(_json(text))


def _csv_records(lines, delimiter: str):
    """The fields of each record, the header first; None for a record that is unlike the header.

    A quote that opens and is never closed would swallow the records behind it: where the rules are broken, only the first
    line is taken as it stands, and the next one begins a record again.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_ROW))
    waiting, taken, width = [], [], None

    def feed():
        while (line := waiting.pop() if waiting else next(lines, None)) is not None:
            taken.append(line)
            yield line + "\n"

    def fitting(fields):
        while width and len(fields) > width and not fields[-1]:
            fields = fields[:-1]                      # commas at the end
        return fields if len(fields) == (width or len(fields)) else None

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            fields = next(reader, None)
            record = fields and fitting(fields)
            broken = fields and not record and len(taken) > 1
        except csv.Error:
            fields, record, broken = taken, None, True
        if broken:
            line, *rest = taken
            waiting += reversed(rest)
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
            for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL):
                with contextlib.suppress(csv.Error, StopIteration):
                    record = record or fitting(next(csv.reader([line], delimiter=delimiter, quoting=quoting)))
        if fields is None:
            return
        if fields:                                    # an empty line is no record
            width = width or len(fields)
            yield record


def _csv_rows(blocks, name: str, field: str | None, start: int):
    lines = _split(blocks, "\n")
    first = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if _format(name)[0] == "tsv" else max(",;\t", key=first.count)
    records = _csv_records(itertools.chain([first], lines), delimiter)
    header = next(records, None) or []
    if field is not None:
        at = _column(name, field, header)
    for row, record in enumerate(records):
        if row >= start:
            value = record and (dict(zip(header, record)) if field is None else record[at])
            yield row + 1, BadRow("unlike the header") if record is None else value


_SEPARATORS = re.compile(r"^[ \t]*<\|doc\|>[ \t]*$|<\|endoftext\|>", re.MULTILINE)


def _between_lines(lines, separator: str):
    """The lines between those that are the separator, joined; nothing where two separators meet or one is first or last."""
    size, parts = 0, []
    for line in itertools.chain(lines, [separator]):
        if line.strip(" \t\ufeff") != separator:
            if size <= _LONGEST_ROW:
                parts.append(line)
            size += len(line) + 1
        elif parts:
            yield "\n".join(parts)
            size, parts = 0, []


def _txt_documents(blocks, start: int):
    """Documents of a .txt: a line <|doc|> stands between two, or <|endoftext|> anywhere if no such line is near the first."""
    head = ""
    while not _SEPARATORS.search(head) and len(head) <= _LONGEST_ROW and (block := next(blocks, None)) is not None:
        head += block
    found, blocks = {match[0].strip() for match in _SEPARATORS.finditer(head)}, itertools.chain([head], blocks)
    if found == {"<|endoftext|>"}:
        texts = filter(None, (text.strip("\n") for text in _split(blocks, "<|endoftext|>")))
    else:
        texts = _between_lines(_split(blocks, "\n"), "<|doc|>")
    for row, text in enumerate(texts):
        if row >= start:
            yield row + 1, _TOO_LONG if len(text) > _LONGEST_ROW else text.removeprefix("\ufeff")


def _column(name: str, field: str, columns: list[str]) -> int:
    if field not in columns:
        listed = ", ".join(str(column)[:60] for column in columns[:20]) or "none"
        raise ParameterError([f"{name} has no column {field!r}; its columns: {listed}. Set text_field to one of them, or "
                              "take the file out of the source's folder."])
    return columns.index(field)


def _arrow_rows(batches, field: str | None, row: int, start: int):
    """Rows of pyarrow record batches, the first of them row number `row`."""
    for batch in batches:
        values = batch.to_struct_array() if field is None else batch.column(batch.schema.names.index(field))
        for i in range(max(0, start - row), len(values)):
            try:
                value = values[i].as_py()
            except UnicodeDecodeError:
                value = BadRow("invalid UTF-8")
            except (ValueError, OverflowError):       # a date that Python does not have
                value = None
            yield row + i + 1, value
        row += len(values)


def _parquet_rows(file, name: str, field: str | None, start: int):
    """A row group may be as large as the file: its pages are read a few at a time, and as many rows as make about 4 MB."""
    import pyarrow.parquet as pq
    parquet = pq.ParquetFile(file, buffer_size=4 << 20, pre_buffer=False)
    if field is not None:
        _column(name, field, parquet.schema_arrow.names)
    row = 0
    for group in range(parquet.num_row_groups):
        about = parquet.metadata.row_group(group)
        if row + about.num_rows > start:
            chunks = [about.column(i) for i in range(about.num_columns)]
            size = sum(chunk.total_uncompressed_size for chunk in chunks
                       if field in (None, chunk.path_in_schema.partition(".")[0]))
            rows = min(max(1, (4 << 20) * about.num_rows // max(size, 1)), 256)
            batches = parquet.iter_batches(rows, [group], field if field is None else [field], use_threads=False)
            yield from _arrow_rows(batches, field, row, start)
        row += about.num_rows


def _arrow_file_rows(file, name: str, field: str | None, start: int):
    import pyarrow as pa
    magic = file.read(6)
    file.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:                                             # as datasets' save_to_disk writes it
        batches = reader = pa.ipc.open_stream(file)
    if field is not None:
        _column(name, field, reader.schema.names)
    yield from _arrow_rows(batches, field, 0, start)


class _Fields:
    """Takes the text field from rows that may each have other fields, and knows what stands there if none has it."""

    def __init__(self, source: Source, found: bool):
        self.source, self.found, self.names, self.rows = source, found or source.text_field is None, {}, 0

    def pick(self, row):
        field = self.source.text_field
        if field is None or row is None or isinstance(row, BadRow):
            return row
        if isinstance(row, dict) and field in row:
            self.found = True
            return row[field]
        if not self.found:
            self.names |= dict.fromkeys(row if isinstance(row, dict) else [f"none, a row is of type {type(row).__name__}"])
            self.rows += 1
            if self.rows == 1000:
                raise ParameterError([self.problem()])

    def problem(self) -> str:
        listed = ", ".join(name[:60] for name in list(self.names)[:20])
        return (f"source {self.source.name}: no row of {self.source.path} has a field {self.source.text_field!r}; the fields "
                f"there: {listed}. Set text_field to one of them.")


def _rows(file, name: str, field: str | None, fields: _Fields, start: int):
    """(number of the next row, the text field of the row or with None the dict) of an open file from row `start` on."""
    kind, packing = _format(name)
    if kind == "parquet":
        yield from _parquet_rows(file, name, field, start)
        return
    if isinstance(file, HubFile):
        file = io.BufferedReader(file, 4 << 20)
    if kind == "arrow":
        yield from _arrow_file_rows(file, name, field, start)
        return
    blocks = _blocks(_unpacked(file, packing), name)
    if kind == "txt":
        yield from _txt_documents(blocks, start)
    elif kind == "json":
        yield from _json_rows(blocks, fields.pick, start)
    elif kind in ("csv", "tsv"):
        yield from _csv_rows(blocks, name, field, start)
    else:
        yield from _json_lines(blocks, fields.pick, start)


def source_problems(source: Source) -> list[str]:
    """What is wrong with a source on this machine, as far as the beginnings of its files tell; [] for the hub's."""
    if source.path.startswith("hf:"):
        return []
    try:
        files = list(source_files(source))
        first = [dataclasses.replace(source, path=name) for name in files
                 if _format(name)[0] in ("csv", "tsv", "parquet", "arrow")]
        for part in [source, *(first if len(files) > 1 else [])]:
            with contextlib.suppress(SourceError):    # damaged: what stands before the damage is read first
                next((value for value, _ in itertools.islice(documents(part), 1000) if value is not None), None)
    except ParameterError as error:
        return error.problems
    return []


def documents(source: Source, cursor: dict | None = None, *, tries: int = 8, sleep=time.sleep, deadline: float | None = None):
    """Stream a source: yields (text or whatever the row holds, cursor of the next row); None or BadRow for an unreadable row.

    A hub dataset is read at one commit from first to last; a failed request is tried again (see `_hub_get`), and so is a
    file that arrives damaged, from the same row on: nothing is lost or repeated. Raises SourceError when that does not help.
    """
    reading = {"tries": tries, "sleep": sleep, "deadline": deadline}
    start = {"file": 0, "row": 0}
    hub, failures, cursor = source.path.startswith("hf:"), 0, dict(cursor or start)
    fields = _Fields(source, found=cursor != start)
    source = pin_revision(source, **reading)
    files = list(source_files(source, **reading).items())
    while cursor["file"] < len(files):
        name, size = files[cursor["file"]]
        try:
            with HubFile(source, name, size, **reading) if hub else open(name, "rb") as file:
                for row, value in _rows(file, name, source.text_field, fields, cursor["row"]):
                    cursor, failures = {"file": cursor["file"], "row": row}, 0
                    yield value, cursor
            cursor = {"file": cursor["file"] + 1, "row": 0}
        except ParameterError:
            raise
        except SourceError as error:
            raise SourceError(f"{error} It stopped before row {cursor['row']:,} of {name}.") from None
        except Exception as error:                    # no sound parquet or gzip arrived; the next copy may be
            failures += 1
            problem = (f"source {source.name}: {name} of {source.path} is damaged at or after row {cursor['row']:,} "
                       f"({type(error).__name__}: {str(error)[:100]})")
            if failures == 3 or not hub:
                raise SourceError(f"{problem}. Nothing written is lost: with a sound file the same call goes on; a dataset "
                                  "without one needs another `revision` and a new folder.") from error
            print(f"{problem}; reading it again ({failures} of 2)", flush=True)
            sleep(2 ** failures)
    if not fields.found and fields.names:
        raise ParameterError([fields.problem()])


def clean_documents(source: Source, cursor: dict | None = None, longest_document: int = 2_000_000, **reading):
    """Stream a source cleaned: yields (text, None, cursor), or (None, why the row is skipped, cursor)."""
    for value, cursor in documents(source, cursor, **reading):
        reason, text = None, None
        if isinstance(value, BadRow):
            reason = value.reason
        elif not isinstance(value, str):
            reason = "null" if value is None else "not a string"
        elif len(value) > longest_document:
            reason = f"longer than {longest_document:,} characters"
        elif re.search("[\ud800-\udfff]", value):     # what is left of bytes that were not UTF-8
            reason = "invalid UTF-8"
        elif not (text := clean_text(value, source.preserve_linebreaks)):
            reason = "empty"
        yield text, reason, cursor


# ---------------------------------------------------------------------------------------------------------------------
# Token store: uint16 shards on disk, one folder a source. Document = ids + EOS, packed end to end without padding.
STORE_ROWS = 1 << 16                                  # ids that fit


def load_tokenizer(path, **reading):
    """A tokenizer from a folder or a hub name ("hf:owner/name", or owner/name where no folder is called so).

    Only our own tokenizer class is built from this repository's code; for anything else transformers' own classes are
    used, never code from the folder (no trust_remote_code). Raises ParameterError where there is neither, or no network.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not re.fullmatch(r"(hf:)?[\w.-]+(/[\w.-]+)?", str(path)):
            raise ParameterError([f"tokenizer {str(path)!r} is not there."])
        try:
            folder = hub_folder(str(path), TOKENIZER_FILES, f"tokenizer {str(path)!r} (no folder here)", **reading)
        except SourceError as error:
            raise ParameterError([str(error)]) from None
    if (folder / "tokenmonster.vocab").is_file():
        from tokenmonster_hf import TokenMonsterTokenizer
        return TokenMonsterTokenizer.from_pretrained(str(folder))
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


TOKENIZER_FILES = ["*token*", "*.json", "*.jinja", "*.txt", "*.model", "*.vocab", "*.tiktoken"]


def tokenizer_problem(path) -> str | None:
    """What is wrong with `path` as a tokenizer folder, found without loading transformers; None for a hub name."""
    folder = Path(path)
    if str(path).startswith("hf:"):
        return None
    if not folder.is_dir():
        return "is not there"
    if not any((folder / name).is_file() for name in ("tokenmonster.vocab", "tokenizer.json")):
        return "holds neither tokenmonster.vocab nor tokenizer.json"
    try:
        rows = _rows_of_folder(folder)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        return f"is damaged ({error})"
    if rows > STORE_ROWS:
        return f"has {_too_wide(rows)}"


def _rows_of_folder(folder: Path) -> int:
    """What `vocabulary_rows` would say of the tokenizer in a folder."""
    def read(name):
        return json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
    config, fast = read("tokenizer_config.json"), read("tokenizer.json")
    vocab = fast.get("model", {}).get("vocab", {})      # {token: id}, or a list of (token, score)
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
    ids += [token["id"] for token in fast.get("added_tokens", [])] + [int(i) for i in config.get("added_tokens_decoder", {})]
    if (folder / "tokenmonster.vocab").is_file():
        from tokenmonster_hf import Vocabulary
        ids += [Vocabulary.from_file(folder / "tokenmonster.vocab").n_ids - 1, config.get("vocab_size", 0) - 1]
    return 1 + max(ids)


def vocabulary_rows(tokenizer) -> int:
    """Rows that a model's embedding needs for a tokenizer's ids: the highest + 1. (len() counts them, holes left out.)"""
    return 1 + max(tokenizer.get_vocab().values())


def _too_wide(rows: int) -> str:
    return (f"ids up to {rows - 1:,}, but a token store keeps 16 bits of each ({STORE_ROWS - 1:,} at most): take a tokenizer "
            f"of at most {STORE_ROWS:,} ids, or build one with 01_tokenizer")


def store_problems(tokenizer) -> list[str]:
    """Why a token store cannot hold what this tokenizer gives, one sentence each."""
    wrong = []
    if (rows := vocabulary_rows(tokenizer)) > STORE_ROWS:
        wrong.append(f"the tokenizer has {_too_wide(rows)}.")
    if tokenizer.eos_token_id is None:
        wrong.append("the tokenizer has no EOS to stand behind each document: set its eos_token to one of its tokens.")
    return wrong


def find_vocabulary(name: str, **reading) -> Path:
    """A released TokenMonster vocabulary by name ("english-8000-strict-nocapcode-v1"), or a path to a .vocab file.

    Looked for as a path, then in the folders of $STENTOR_VOCABS, then on the hub (alasdairforsythe/tokenmonster).
    Raises ParameterError when it is nowhere; `reading` as for `documents`.
    """
    folders = [Path(folder) for folder in os.environ.get("STENTOR_VOCABS", "").split(os.pathsep) if folder]
    for path in (Path(name), *(folder / f"{name}.vocab" for folder in folders)):
        if path.is_file():
            return path
    if name.endswith(".vocab") or "/" in name or not re.fullmatch(r"[a-z]+-\d+-[a-z0-9-]+", name):
        raise ParameterError([f"vocabulary {name!r} is neither a .vocab file nor the name of a released vocabulary "
                              "(such as english-8000-strict-nocapcode-v1)."])
    try:
        path = hub_folder("hf:alasdairforsythe/tokenmonster", [f"vocabs/{name}.vocab"], f"vocabulary {name!r}", **reading
                          ) / "vocabs" / f"{name}.vocab"
    except StentorError as error:
        raise ParameterError([f"{error} Or give a .vocab file, or build one (VOCABULARY = 'build')."]) from None
    if not path.is_file():
        raise ParameterError([f"vocabulary {name!r} is not among the released ones (hf:alasdairforsythe/tokenmonster); give "
                              "a .vocab file instead, or build one (VOCABULARY = 'build')."])
    return path


def tokenizer_sha256(tokenizer) -> str:
    """What identifies a tokenizer: a hash of its vocabulary file and size. A store made with another one is refused."""
    backend = getattr(tokenizer, "vocabulary", None)
    data = backend.to_bytes() if backend is not None else tokenizer.backend_tokenizer.to_str().encode()
    return hashlib.sha256(data + str(len(tokenizer)).encode()).hexdigest()


def encode_documents(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, unsigned and as wide as they need; offsets int64 of len(texts) + 1): no EOS added, and special tokens in the
    text taken as plain text."""
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.array([i for row in rows for i in row], dtype=np.uint32), offsets


def _in_a_tidy_store(prepare):
    """Decorator: what killed calls left in the store is removed first; a store folder may be a link, made or not yet."""
    @functools.wraps(prepare)
    def tidied(sources, tokenizer, store_dir, **settings):
        if os.path.islink(store_dir):
            os.makedirs(os.path.realpath(store_dir), exist_ok=True)
        folder, path = Path(store_dir), Path(store_dir) / "manifest.json"
        entries = json.loads(path.read_text())["sources"] if path.exists() else {}
        remove_leftovers(folder, "manifest.json")
        for name in {*entries, *(source.name for source in sources)}:
            for names in ("train-*.bin", "carry-*.bin", "validation.bin"):
                remove_leftovers(folder / name, names)
            for carry in (folder / name).glob("carry-*.bin"):      # killed before the one that it replaced was removed
                if int(carry.stem[6:]) < len(entries.get(name, {"shards": []})["shards"]):
                    carry.unlink(missing_ok=True)
        return prepare(sources, tokenizer, store_dir, **settings)
    return tidied


@_in_a_tidy_store
def prepare_tokens(sources, tokenizer, store_dir, *, tokens_per_source: dict[str, int], validation_documents: int,
                   shard_tokens: int = 1 << 24, longest_document: int = 2_000_000, progress=print, after_shard=None,
                   beside=(), **reading) -> Path:
    """Fill a token store: stream, clean, tokenise, append EOS, pack into shards; go on where an earlier call stopped.

    tokens_per_source: {source.name: tokens wanted}; a source that ends earlier is used whole (and for more epochs).
    The first `validation_documents` good documents of each source are its validation text and never enter training, nor does
    a training document that is equal to one of these of any source, or of the sources `beside` this store, which other
    folders hold (counted as "also in validation").
    Documents that are null, empty, not a string, invalid UTF-8 or longer than `longest_document` characters are skipped
    and counted. Writes manifest.json (atomically, after each shard): tokenizer hash, sources, counts of documents,
    tokens and UTF-8 bytes of the cleaned text, sha256 of each shard, and the cursor to go on from. A hub source is read at
    the commit in its entry's `revision`, now and in every later call. `reading`: tries, sleep and deadline of `documents`.
    after_shard(number of shards) is called after each one and may wait.
    Raises ParameterError when the folder holds a store of another tokenizer, other sources or another revision, when the
    tokenizer's ids do not fit a store (`store_problems`), and before anything is written when a source cannot be read or has
    too few documents.
    """
    if problems := store_problems(tokenizer):
        raise ParameterError(problems)
    store_dir = Path(store_dir)
    manifest_path = store_dir / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {"sources": {}}
    fingerprint = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "validation_documents": validation_documents,
                   "shard_tokens": shard_tokens,
                   "sources": [{k: v for k, v in dataclasses.asdict(s).items() if k not in ("weight", "revision")}
                               for s in sources]}
    begun = {name: entry for name, entry in manifest["sources"].items() if entry["shards"]}
    if begun:                                         # else: what a call left that came to nothing binds nobody
        there = manifest["fingerprint"] | {"eos_token_id": manifest["eos_token_id"]}
        for key, value in (fingerprint | {"eos_token_id": tokenizer.eos_token_id}).items():
            if there[key] != value:
                raise ParameterError([f"{store_dir} holds a token store with another {key} "
                                      f"({str(there[key])[:60]} there, {str(value)[:60]} wanted); "
                                      "choose another folder or delete it."])
    else:
        manifest = {"fingerprint": fingerprint, "vocab_size": vocabulary_rows(tokenizer),
                    "eos_token_id": tokenizer.eos_token_id,
                    "sources": {}}
    entries = [begun.get(source.name) or {
        "revision": None, "documents": 0, "tokens": 0, "characters": 0, "bytes": 0, "skipped": {}, "shards": [],
        "validation": None, "cursor": {"file": 0, "row": 0}, "filled": 0} for source in sources]
    todo = [(source, entry) for source, entry in zip(sources, entries) if entry["filled"] < tokens_per_source[source.name]]
    if problems := [problem for source, _ in todo for problem in source_problems(source)]:
        raise ParameterError(problems)
    for source, _ in todo:
        if not source.path.startswith(("hf:", "local:")):
            if others := [p.name for p in _visible_files(Path(source.path)) if not _is_data(p.name)]:
                progress(f"source {source.name}: not read in {source.path}: {', '.join(others[:5])}"
                         + f" and {len(others) - 5} more" * (len(others) > 5))
    at = [_at_its_commit(source, entry, entry["filled"] >= tokens_per_source[source.name], reading)
          if source.path.startswith("hf:") else source for source, entry in zip(sources, entries)]
    held_out = [None if entry["validation"] else
                _held_out(source, entry, validation_documents, {"longest_document": longest_document, **reading})
                for source, entry in zip(at, entries)]
    store_dir.mkdir(parents=True, exist_ok=True)
    for source, entry, texts in zip(at, entries, held_out):
        manifest["sources"][source.name] = entry
        if texts is not None:
            entry["validation"] = _write_ids(store_dir, source, "validation.bin", _encoded(tokenizer, texts)) | {
                "documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
    left_out = set()
    for entry in entries if todo else ():
        left_out |= _documents_of(np.fromfile(store_dir / entry["validation"]["file"], "<u2"), tokenizer.eos_token_id)
    for source in beside if todo else ():
        with contextlib.suppress(ParameterError):     # the call that fills it says so
            texts = _held_out(source, {}, validation_documents, {"longest_document": longest_document, **reading})
            left_out |= _documents_of(_encoded(tokenizer, texts), tokenizer.eos_token_id)
    for source, entry in zip(at, entries):
        _fill(source, tokenizer, store_dir, manifest, entry, tokens_per_source[source.name], left_out, shard_tokens,
              longest_document, progress, reading, after_shard)
    return store_dir


def _held_out(source: Source, entry: dict, wanted: int, reading: dict) -> list[str]:
    """The first `wanted` good documents of a source. The entry's cursor stands behind them, and behind what was skipped.

    Raises ParameterError when no further one follows, for training.
    """
    texts, skipped = [], {}
    for text, reason, cursor in clean_documents(source, **reading):
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        elif len(texts) < wanted:
            texts.append(text)
            entry.update(cursor=cursor, skipped=dict(skipped))
        else:
            return texts
    raise ParameterError([_too_few(source, len(texts), wanted, skipped)])


def _too_few(source: Source, documents: int, validation_documents: int, skipped: dict) -> str:
    rows = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    return (f"source {source.name} ({source.path}) gave no training document after its first {validation_documents:,} "
            f"validation documents: it has {documents:,} good documents{f', skipped: {rows}' if rows else ''}. Lower "
            "max_eval_samples or give it more documents; in a .txt a line <|doc|>, or <|endoftext|>, separates two.")


def _encoded(tokenizer, texts: list[str], left_out=frozenset()) -> np.ndarray:
    """ids with EOS after each document; those whose ids are in `left_out` are taken out of `texts` too."""
    ids, offsets = encode_documents(tokenizer, texts)
    ids = ids.astype("<u2", copy=False)
    data, bounds = ids.tobytes(), (2 * offsets).tolist()
    keep = np.array([data[start:end] not in left_out for start, end in itertools.pairwise(bounds)], bool)
    if not keep.all():
        texts[:] = itertools.compress(texts, keep)
        lengths = np.diff(offsets)
        ids, offsets = ids[np.repeat(keep, lengths)], np.concatenate([[0], np.cumsum(lengths[keep])])
    return np.insert(ids, offsets[1:], tokenizer.eos_token_id)


def _documents_of(ids: np.ndarray, eos: int) -> set[bytes]:
    """The documents of a run of ids, each as the bytes of its ids without EOS."""
    return {document.tobytes()[:-2] for document in np.split(ids, np.flatnonzero(ids == eos) + 1)[:-1]}


def _write_ids(store_dir: Path, source: Source, name: str, ids: np.ndarray) -> dict:
    (store_dir / source.name).mkdir(exist_ok=True)
    data = ids.astype("<u2").tobytes()
    write_atomically(store_dir / source.name / name, data)
    return {"file": f"{source.name}/{name}", "tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()}


def _at_its_commit(source: Source, entry: dict, complete: bool, reading: dict) -> Source:
    """A hub source at the commit the store's tokens came from so far; at the beginning, at the one its revision names now."""
    commit, now = entry["revision"], source if complete else pin_revision(source, **reading)
    if commit and source.revision and now.revision != commit and len(now.revision) == 40:
        raise ParameterError([f"source {source.name}: the store holds {source.path} at revision {commit}, wanted is "
                              f"{now.revision}; set revision to the former to go on, or choose another folder."])
    if commit and now.revision != commit and not complete:
        try:
            _hub_read(source, f"api/datasets/{source.path[3:]}/revision/{commit}", "the revision", **reading)
        except ParameterError:
            raise ParameterError([f"source {source.name}: the store holds {source.path} at revision {commit}, which the hub no "
                                  f"longer gives; it is at {now.revision} now. Choose another folder."]) from None
    entry["revision"] = commit or now.revision
    return dataclasses.replace(source, revision=entry["revision"])


def _fill(source, tokenizer, store_dir, manifest, entry, wanted, left_out, shard_tokens, longest, progress, reading,
          after_shard=None):
    if entry["filled"] >= wanted:
        return
    folder = store_dir / source.name
    # A shard is cut in the middle of a document: what is over goes to the next one, and into a file for a restart. One file
    # for each number of shards: a kill between it and the manifest must leave the one that the old manifest needs.
    carry = str(folder / "carry-{:05d}.bin").format
    pending = np.fromfile(carry(len(entry["shards"])), "<u2") if entry["shards"] else np.array([], "<u2")
    texts, started, said = [], time.time(), time.time()
    cursor = entry["cursor"]
    counts = {key: entry[key] for key in ("documents", "characters", "bytes")}

    def skip(reason: str, rows: int):
        if rows:
            entry["skipped"][reason] = entry["skipped"].get(reason, 0) + rows

    def flush(last: bool):
        nonlocal pending, texts
        if texts:
            read = len(texts)
            pending = np.concatenate([pending, _encoded(tokenizer, texts, left_out)])
            skip("also in validation", read - len(texts))
            counts["documents"] += len(texts)
            counts["characters"] += sum(map(len, texts))
            counts["bytes"] += sum(len(text.encode()) for text in texts)
            texts = []
        while len(pending) >= shard_tokens or (last and len(pending)):
            entry["shards"].append(_write_ids(store_dir, source, f"train-{len(entry['shards']):05d}.bin",
                                              pending[:shard_tokens]))
            entry["tokens"] += len(pending[:shard_tokens])
            pending = pending[shard_tokens:]
            write_atomically(carry(len(entry["shards"])), pending.tobytes())
            entry.update(cursor=cursor, **counts)
            write_atomically(store_dir / "manifest.json", json.dumps(manifest, indent=1))
            Path(carry(len(entry["shards"]) - 1)).unlink(missing_ok=True)
            if after_shard:
                after_shard(len(entry["shards"]))

    # After a kill between the last shards everything wanted may already be in `pending`: then nothing more is read.
    stream = clean_documents(source, cursor, longest, **reading) if entry["tokens"] + len(pending) < wanted else ()
    characters = 0
    for text, reason, cursor in stream:
        if reason:
            skip(reason, 1)
            continue
        texts.append(text)
        characters += len(text)
        if characters > 1 << 20:                      # about 1 MB at a time: memory stays flat in the size of the corpus
            flush(last=False)
            characters = 0
            if time.time() - said > 5:
                said = time.time()
                done = entry["tokens"] + len(pending)
                progress(f"{source.name}: {done:,} of {wanted:,} tokens ({done / (said - started):,.0f} tokens/s)")
            if entry["tokens"] + len(pending) >= wanted:
                break
    flush(last=True)
    if not entry["tokens"]:                           # nothing more is written: with other documents the call goes on
        held = entry["validation"]["documents"]
        raise ParameterError([_too_few(source, held, held, entry["skipped"])])
    entry["filled"] = wanted                          # only now: a kill before this line must come back here
    write_atomically(store_dir / "manifest.json", json.dumps(manifest, indent=1))


def source_names(recipe) -> list[str]:
    """The sources that take part in a run."""
    return [source.name for source in recipe.sources if source.weight > 0 or recipe.anneal_weights]


def plan_sources(recipe) -> np.ndarray:
    """The source of each sequence of a run, as an index into `source_names`: (sequences_to_train,), uint8 up to 255.

    From a golden-ratio sequence, each stretch of which holds the weights to within a few sequences.
    """
    names = source_names(recipe)
    n = np.arange(recipe.sequences_to_train)
    point = (n + 0.5) * 0.6180339887498949 % 1.0
    weights = [source.weight for source in recipe.sources if source.name in names]
    plan = np.searchsorted(np.cumsum(weights) / sum(weights), point, side="right").astype(np.min_scalar_type(len(names)))
    if recipe.anneal_weights:
        late = n >= len(n) * (1 - recipe.anneal_fraction)
        weights = np.cumsum(recipe.anneal_weights) / sum(recipe.anneal_weights)
        plan[late] = np.searchsorted(weights, point[late], side="right")
    return plan


class TokenStore:
    """A token store on disk; `batch(step)` is a pure function of the recipe and the step.

    Every sequence of the run has a number n = 0 .. recipe.sequences_to_train - 1. Its source follows from a golden-ratio
    sequence (each prefix holds the mixture's weights to within a few sequences; the anneal's weights over the last
    `anneal_fraction`), and the k-th sequence of a source is block k of an endless series of shuffled epochs over it.
    So the order depends on neither the number of processes nor on what was read before: a resume needs only the step.
    """

    def __init__(self, store_dir, recipe):
        self.folder, self.recipe = Path(store_dir), recipe
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.names = source_names(recipe)
        if missing := [name for name in self.names if name not in self.manifest["sources"]]:
            raise ParameterError([f"the token store {self.folder} has no source {', '.join(missing)}."])
        if self.manifest["vocab_size"] > recipe.shape.vocab_size:
            raise ParameterError([f"the token store has ids up to {self.manifest['vocab_size']:,}, the model only "
                                  f"vocab_size = {recipe.shape.vocab_size:,}."])
        self.shards = {name: [self.folder / shard["file"] for shard in self.manifest["sources"][name]["shards"]]
                       for name in self.names}
        self.starts = {name: np.cumsum([0] + [shard.stat().st_size // 2 for shard in shards])
                       for name, shards in self.shards.items()}
        self.blocks = {name: int(starts[-1]) // recipe.block_size for name, starts in self.starts.items()}
        if short := [name for name, blocks in self.blocks.items() if blocks < 1]:
            self._forget(short)
            raise ParameterError([f"source {', '.join(short)} has fewer tokens than one block of {recipe.block_size}: give it "
                                  "more text, or take it out of the recipe, and prepare the tokens again."])
        self._plan_rows()

    def _forget(self, names: list[str]) -> None:
        """Take sources out of the manifest, so that `prepare_tokens` reads them anew: they may have been mended by then."""
        for name in names:
            del self.manifest["sources"][name]
        with contextlib.suppress(OSError):            # a store that cannot be written
            write_atomically(self.folder / "manifest.json", json.dumps(self.manifest, indent=1))

    def _plan_rows(self) -> None:
        """row_source: the source of each sequence of the run; row_index: its number among those of its source."""
        self.row_source = plan_sources(self.recipe)
        self.row_index = np.empty(len(self.row_source), np.int64)
        for i in range(len(self.names)):
            mine = self.row_source == i
            self.row_index[mine] = np.arange(mine.sum())

    def mixture(self, step: int) -> dict[str, float]:
        """The realised share of each source in step `step` (0-based)."""
        rows = self.row_source[self.rows(step)]
        return {name: float(np.mean(rows == i)) for i, name in enumerate(self.names)}

    def rows(self, step: int) -> slice:
        size = self.recipe.total_batch_size
        return slice(step * size, min((step + 1) * size, self.recipe.sequences_to_train))

    def epoch(self, step: int) -> float:
        """Passes over the tokens of the store after `step` steps."""
        return min(step * self.recipe.total_batch_size, self.recipe.sequences_to_train) / sum(self.blocks.values())

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The global batch of step `step` (0-based): input_ids and labels, int64 (total_batch_size, block_size)."""
        rows = self.rows(step)
        ids = np.stack([self._block(self.names[source], int(index))
                        for source, index in zip(self.row_source[rows], self.row_index[rows])])
        ids = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": ids, "labels": ids}      # the model shifts: position t predicts t + 1 (the cards' packing)

    @functools.lru_cache(maxsize=16)
    def _order(self, name: str, epoch: int) -> np.ndarray:
        seed = [self.recipe.seed, epoch, *hashlib.sha256(name.encode()).digest()[:4]]
        return np.random.default_rng(seed).permutation(self.blocks[name])

    def _block(self, name: str, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.blocks[name])
        start = int(self._order(name, epoch)[place]) * self.recipe.block_size
        return self._read(name, start, start + self.recipe.block_size)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        # Read, not mapped: each page fault of a map brings its neighbours, and 700 random rows of 144 MB kept all of it.
        first, last = np.searchsorted(self.starts[name], [start, stop - 1], side="right") - 1
        parts = []
        for i in range(first, last + 1):
            begin, end = max(start, self.starts[name][i]), min(stop, self.starts[name][i + 1])
            parts.append(np.fromfile(self.shards[name][i], "<u2", end - begin, offset=2 * (begin - self.starts[name][i])))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def validation(self) -> tuple[np.ndarray, int]:
        """(ids, bytes): the validation tokens of all sources behind one EOS, and the UTF-8 bytes of their text.

        Evaluated in windows that overlap by one token, so each token is predicted exactly once and the summed loss
        divided by `bytes` is exact.
        """
        entries = [self.manifest["sources"][name]["validation"] for name in self.names]
        ids = [np.fromfile(self.folder / entry["file"], "<u2") for entry in entries]
        eos = np.array([self.manifest["eos_token_id"]], "<u2")
        return np.concatenate([eos, *ids]), sum(entry["bytes"] for entry in entries)


# ---------------------------------------------------------------------------------------------------------------------
# The store that is filled while training reads it: one folder and one worker process a source. Sequences are shuffled
# within a shard instead of the whole source, so the order is known before the text is.


def planned_shards(recipe, shard_tokens: int) -> dict[str, int]:
    """{source: shards its sequences fill}, from the recipe alone."""
    if shard_tokens % recipe.block_size:
        raise ParameterError([f"shard_tokens = {shard_tokens:,} must be a multiple of block_size = {recipe.block_size}."])
    names = source_names(recipe)
    rows = np.bincount(plan_sources(recipe), minlength=len(names))
    return {name: -(-int(n) * recipe.block_size // shard_tokens) for name, n in zip(names, rows)}


def fill_source(recipe, tokenizer, store_dir, name: str, *, shard_tokens: int, ahead_shards: int | None = None) -> None:
    """Fill store_dir/<name>, a token store of that source alone; what one worker process does.

    It stays at most `ahead_shards` shards ahead of the one that training reads (None: it need not wait), goes on where an
    earlier call stopped, and leaves when its parent process is gone: a killed run leaves no worker behind.
    """
    import fcntl
    folder, parent = Path(store_dir) / name, os.getppid()
    source = next(source for source in recipe.sources if source.name == name)
    wanted = planned_shards(recipe, shard_tokens)[name] * shard_tokens
    folder.mkdir(parents=True, exist_ok=True)

    def wait_for_the_reader(shards: int) -> None:
        while os.getppid() == parent and ahead_shards and shards > shard_being_read(folder) + ahead_shards:
            time.sleep(0.2)
        if os.getppid() != parent:
            raise SystemExit(0)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)              # a worker of a killed run may be in its last shard
        prepare_tokens([source], tokenizer, folder, tokens_per_source={name: wanted}, shard_tokens=shard_tokens,
                       validation_documents=recipe.max_eval_samples, after_shard=wait_for_the_reader,
                       beside=[other for other in recipe.sources if other.name in set(source_names(recipe)) - {name}],
                       progress=lambda text: None)


def shard_being_read(folder) -> int:
    """The number of the shard of a source that training has come to."""
    path = Path(folder) / "reading"
    return int(path.read_text()) if path.exists() else 0


class FeedStopped(StentorError, RuntimeError):
    """A worker process ended before it gave what training waits for; the message is its error."""


class GrowingStore(TokenStore):
    """A TokenStore over folders that workers still fill; `batch` waits for the shards it needs.

    Sequence k of a source lies in shard k // blocks_per_shard, shuffled within it: a pure function of (seed, step) however
    full the store is. A source that ends early is read again, in another order. Only whole shards are read before the end
    is known. failed(): what is wrong with the workers, or None; asked while waiting.
    """

    def __init__(self, store_dir, recipe, shard_tokens: int, *, rolling: bool = False, failed=lambda: None):
        self.folder, self.recipe, self.shard_tokens, self.rolling, self.failed = (
            Path(store_dir), recipe, shard_tokens, rolling, failed)
        self.planned = planned_shards(recipe, shard_tokens)
        self.names = list(self.planned)
        self.per_shard = shard_tokens // recipe.block_size
        self.entries, self.reading = {}, {}
        self._plan_rows()
        for name in self.names:
            self._wait_for(name, 0)
        manifests = {name: json.loads((self.folder / name / "manifest.json").read_text()) for name in self.names}
        if (size := max(m["vocab_size"] for m in manifests.values())) > recipe.shape.vocab_size:
            raise ParameterError([f"the token store has ids up to {size:,}, the model only vocab_size = "
                                  f"{recipe.shape.vocab_size:,}."])
        # The first shard stands for the store in a run's fingerprint: the rest follows from it, the source and its commit.
        self.manifest = {"eos_token_id": next(iter(manifests.values()))["eos_token_id"], "sources": {
            name: {**m["sources"][name], "shards": m["sources"][name]["shards"][:1]} for name, m in manifests.items()}}

    def _read_entry(self, name: str) -> dict | None:
        path = self.folder / name / "manifest.json"
        if path.exists():
            self.entries[name] = json.loads(path.read_text())["sources"].get(name)
        return self.entries.get(name)

    def _wait_for(self, name: str, number: int) -> tuple[int, int, Path]:
        """(epoch, number, file) of the shard that `number`, counted over epochs, stands for; waits until it is written."""
        while True:
            entry = self.entries.get(name)
            for _ in range(2):                        # what is known, then what is on disk
                if entry:
                    whole = [shard for shard in entry["shards"] if shard["tokens"] == self.shard_tokens]
                    ended = entry["filled"] > 0
                    usable = whole or (entry["shards"] if ended else [])     # a short corpus is one short shard
                    if number < len(usable) or (ended and usable):
                        epoch, number = divmod(number, len(usable))
                        return epoch, number, self.folder / name / usable[number]["file"]
                entry = self._read_entry(name)
            if problem := self.failed():
                raise FeedStopped(problem)
            time.sleep(0.05)

    def _block(self, name: str, index: int) -> np.ndarray:
        number = index // self.per_shard
        if number > self.reading.get(name, -1):       # the worker of this source may go on
            self.reading[name] = number
            write_atomically(self.folder / name / "reading", str(number))
        epoch, number, path = self._wait_for(name, number)
        if not path.exists():
            raise SourceError(f"source {name} ended after {self.entries[name]['tokens']:,} tokens, and its first shards are "
                              "gone (rolling): lower token_budget or its weight, or keep the shards.")
        tokens = np.memmap(path, dtype="<u2", mode="r")
        blocks = len(tokens) // self.recipe.block_size
        start = int(self._shuffled(name, epoch, number, blocks)[index % self.per_shard % blocks]) * self.recipe.block_size
        return tokens[start:start + self.recipe.block_size]

    @functools.lru_cache(maxsize=64)
    def _shuffled(self, name: str, epoch: int, number: int, blocks: int) -> np.ndarray:
        seed = [self.recipe.seed, epoch, number, *hashlib.sha256(name.encode()).digest()[:4]]
        return np.random.default_rng(seed).permutation(blocks)

    def epoch(self, step: int) -> float:
        """The part of the planned sequences that `step` steps have read."""
        return min(step * self.recipe.total_batch_size / self.recipe.sequences_to_train, 1.0)

    def validation(self) -> tuple[np.ndarray, int]:
        entries = [self.manifest["sources"][name]["validation"] for name in self.names]
        ids = [np.fromfile(self.folder / name / entry["file"], "<u2") for name, entry in zip(self.names, entries)]
        eos = np.array([self.manifest["eos_token_id"]], "<u2")
        return np.concatenate([eos, *ids]), sum(entry["bytes"] for entry in entries)

    def release(self, step: int) -> None:
        """Training will not go back before `step`; with `rolling` the shards that only earlier steps read are deleted."""
        row = min(step * self.recipe.total_batch_size, len(self.row_source) - 1)
        for i, name in enumerate(self.names if self.rolling else ()):
            for old in range(int(np.count_nonzero(self.row_source[:row] == i)) // self.per_shard):
                (self.folder / name / name / f"train-{old:05d}.bin").unlink(missing_ok=True)
