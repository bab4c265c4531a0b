"""Cleaning of text, and the embedded corpus: documentation and source code installed with Python."""
from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sysconfig
import tempfile
import unicodedata
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from stentor.files import ParameterError, cache_folder, write_atomically
from stentor.prose import running_text


def clean_text(text: str, preserve_linebreaks: bool = False) -> str:
    """The cards' cleaning: NFKC, then all white space to single spaces.

    For code the Stentor3 card keeps the lines. One deliberate difference: that card writes
    `text.replace("\\\\r\\\\n", "\\\\n")`, an escaping slip of the page; real carriage returns are meant
    and replaced here.
    """
    text = unicodedata.normalize("NFKC", text)
    if preserve_linebreaks:
        lines = text.replace("\r\n", "\n").replace("\r", "\n").splitlines()
        return "\n".join(line.rstrip() for line in lines).strip()
    return " ".join(text.split())   # the card's two joins in one: it also splits at line breaks


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
        if '"""' not in text and "\n# " not in text:   # nothing to find; parsing is most of the cost
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


def _paragraphs(path: Path) -> list[str]:
    """The paragraphs of running English in one Python file."""
    return running_text("\n\n".join(_docstrings(path)))


def _extract(kind: str) -> list[str]:
    """All documents of an embedded corpus, in a fixed pseudo-random order (by hash), none twice.

    prose: paragraphs of running English (`stentor.prose`) in docstrings, comments, package
           descriptions and the language reference; one that occurred before is left out, so that no
           validation paragraph was trained on.
    math:  whole docstrings of sympy, mpmath and scipy.
    code:  whole source files up to 100 kB.
    """
    files = _python_files(kind)
    if kind == "code":
        documents = [path.read_bytes().decode("utf-8", "replace") for path in files
                     if path.stat().st_size <= 100_000 and _is_drawn(path)]
    else:
        read = _paragraphs if kind == "prose" else _docstrings
        with ProcessPoolExecutor(os.cpu_count(), mp_context=_fork()) as pool:
            found = list(pool.map(read, files, chunksize=32))
        documents = _prose(found) if kind == "prose" else map("\n\n".join, found)
    unique = {hashlib.sha256(text.encode()).digest(): text
              for text in documents if len(text) >= 200}
    return [unique[key] for key in sorted(unique)]


def _is_drawn(path: Path) -> bool:
    """One file in four, by its name and size."""
    named = path.name.encode() + str(path.stat().st_size).encode()
    return hashlib.sha256(named).digest()[0] < 64


def _prose(found: list[list[str]]) -> list[str]:
    """`found` with the running text of package descriptions and of Python's language reference:
    the paragraphs of each as one document, none twice."""
    from pydoc_data.topics import topics
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/METADATA"))
    descriptions = [path.read_text(encoding="utf-8", errors="replace").partition("\n\n")[2]
                    for path in packages]
    seen, documents = set(), []
    for paragraphs in found + [running_text(text) for text in [*descriptions, *topics.values()]]:
        new = {text.lower(): text for text in reversed(paragraphs) if text.lower() not in seen}
        seen.update(new)
        documents.append("\n\n".join(reversed(new.values())))
    return documents


def _fork():
    import multiprocessing
    return multiprocessing.get_context("fork")   # workers only read text; spawned, each imports torch


def local_corpus(kind: str) -> Path:
    """The embedded corpus "prose" | "code" | "math" as a .jsonl file, extracted once.

    It is kept in `cache_folder()`. The name carries a hash of the installed files' names and sizes:
    another installation is another corpus. Raises ParameterError when the file is not there and cannot
    be written.
    """
    if kind not in ("prose", "code", "math"):
        raise ParameterError([f"local:{kind} is not an embedded corpus; known: local:prose, local:code, "
                              "local:math."])
    files = _python_files(kind)
    names = "extraction 2\n" + "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    cache = cache_folder()
    path = cache / f"{kind}-{hashlib.sha256(names.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()      # asked before the work, not after it
            lines = "".join(json.dumps({"text": text}) + "\n" for text in _extract(kind))
            write_atomically(path, lines.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise ParameterError([f"local:{kind} is kept in {cache}, which cannot be written "
                                  f"({error.strerror}); set STENTOR_CACHE to a folder that can."]) from None
    return path
