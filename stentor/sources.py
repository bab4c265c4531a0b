"""Sources: which files they are, and the stream of their documents, cleaned, with a cursor to go on from."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import time
from pathlib import Path
from urllib.parse import quote

from stentor.corpus import clean_text, local_corpus
from stentor.files import ParameterError, SourceError
from stentor.formats import BadRow, _Fields, _READABLE, _format, _is_data, _rows, _visible_files
from stentor.hub import HubFile, _hub_read
from stentor.recipes import Source


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
