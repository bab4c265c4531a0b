"""Sources: which files they are, and the stream of their documents, with a cursor to go on from."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import time
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

from stentor.corpus import clean_text, local_corpus
from stentor.files import ParameterError, SourceError
from stentor.formats import (
    LONGEST_ROW, READABLE, TOO_LONG, BadRow, Fields, format_of, is_data, rows_of, visible_files)
from stentor.hub import HubFile, hub_commit, hub_read
from stentor.recipes import Source


def pin_revision(source: Source, **reading) -> Source:
    """The source with its revision (None: main) resolved to the commit it names now.

    A full commit is left as it is.
    """
    if not source.path.startswith("hf:") or re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        return source
    revision = source.revision or "main"
    commit = hub_commit(f"source {source.name}", f"{source.path} at revision {revision}",
                        f"datasets/{source.path[3:]}", revision, **reading)
    return dataclasses.replace(source, revision=commit)


def source_files(source: Source, **reading) -> dict[str, int]:
    """{path, or name in the hub repository: bytes} of a source's files, in reading order.

    Of a hub dataset those that its card lists for the config and split (YAML: configs, data_files,
    data_dir); if it lists no such config, those with its name in their path ("sample-10BT" is
    sample/10BT/...) and of these the split's. What a card's patterns and names like train-0.parquet
    mean, `datasets` says. Raises ParameterError when there are none, or when a hub dataset has no
    such config or split.
    """
    if not source.path.startswith("hf:"):
        return _local_files(source)
    source, sizes = pin_revision(source, **reading), {}
    page = f"api/datasets/{source.path[3:]}/tree/{source.revision}?recursive=true"
    while page:
        answer = hub_read(source, page, "the list of files", **reading)
        sizes |= {item["path"]: item["size"] for item in answer.json() if item["type"] == "file"}
        page = answer.links.get("next", {}).get("url")
    card = b""
    if "README.md" in sizes:
        card = HubFile(source, "README.md", sizes["README.md"], **reading).read()
    names = sorted(name for name in sizes if is_data(name))
    return {name: sizes[name] for name in _chosen(source, names, card.decode("utf-8", "replace"))}


def _chosen(source: Source, names: list[str], card: str) -> list[str]:
    """Those of a hub dataset's files that are the source's config and split."""
    configs = _card_configs(card)
    config = source.config
    if config in (None, "default"):
        config = "default"
        with contextlib.suppress(ValueError):         # the card has several
            config = configs.get_default_config_name() or config
    if config in configs:
        names = _as_datasets_reads(names, configs[config], source.split)
    else:
        if config != "default" or configs:
            names = _with_name(names, config)
        names = (_as_datasets_reads(names, {}, source.split)
                 or [name for name in names if source.split in re.split("[^a-z]+", name.lower())]
                 or (names if source.split == "train" else []))
    # As `datasets` has it a config is of one kind: notes and tables beside its .parquet or .jsonl
    # are not its documents.
    names = [name for name in names if format_of(name)[0] in ("parquet", "jsonl", "ndjson")] or names
    if not names:
        raise ParameterError([
            f"source {source.name}: {source.path} has no file that can be read for config {config}, "
            f"split {source.split}; its card lists the configs: {', '.join(configs) or 'none'}. "
            f"What can be read: {READABLE}."])
    return names


def _card_configs(card: str):
    """The configs of a dataset card that say where their files are: datasets' MetadataConfigs."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard
    configs = {}
    if card.startswith("---"):
        with contextlib.suppress(Exception):          # one that cannot be read lists nothing
            configs = MetadataConfigs.from_dataset_card_data(DatasetCard(card).data)
    return MetadataConfigs({str(name): config for name, config in configs.items()
                            if config.get("data_files") or config.get("data_dir")})


def _with_name(names: list[str], config: str) -> list[str]:
    """The files in a folder of the config's name, or with its words in their path."""
    wanted, *paths = [f"/{re.sub('[-_./]+', '/', text.lower())}/" for text in (config, *names)]
    return ([name for name in names if f"/{config}/" in f"/{name}"]
            or [name for name, path in zip(names, paths) if wanted in path])


class _Listing(AbstractFileSystem):
    """The names of a dataset's files as a file system, for `datasets` to look its patterns up in.

    No request goes out. Left to ask the hub itself it knew no deadline: at one 429 it slept the 214 s
    that the hub named (huggingface_hub 2.4), or gave up (1.11).
    """
    protocol, cachable = "listing", False

    def __init__(self, names=(), **options):
        super().__init__(**options)
        self.files = {name: {"name": name, "size": 0, "type": "file"} for name in names}

    def info(self, path, **_):
        if (path := self._strip_protocol(path)) not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def find(self, path, **_):                        # glob picks from them
        return {name: about for name, about in self.files.items() if name.startswith(path)}


def _as_datasets_reads(names: list[str], config: dict, split: str) -> list[str]:
    """The files of a split of one of a card's configs; {}: of a dataset whose card lists none."""
    from datasets import DownloadConfig
    from datasets.data_files import get_data_patterns, resolve_pattern, sanitize_patterns
    fsspec.register_implementation("listing", _Listing, clobber=True)
    within = DownloadConfig(storage_options={"listing": {"names": names}})
    base, found = f"listing://{(config.get('data_dir') or '').strip('/')}", set()
    with contextlib.suppress(FileNotFoundError, ValueError):   # nothing there; no name for a split
        listed = config.get("data_files")
        patterns = sanitize_patterns(listed) if listed else get_data_patterns(base, within)
        for pattern in patterns.get(split, ()):
            if "://" in pattern or pattern.startswith("/"):    # another host's files, or this one's
                continue
            pattern = re.sub(r"\*\*(?=[^/])", "**/*", pattern)    # data/**.parquet, as it was once
            with contextlib.suppress(FileNotFoundError):
                found |= set(resolve_pattern(pattern, base, download_config=within))
    return sorted(name.removeprefix("listing://") for name in found)


def _local_files(source: Source) -> dict[str, int]:
    """source_files of a file, a folder or an embedded corpus."""
    path = local_corpus(source.path[6:]) if source.path.startswith("local:") else Path(source.path)
    if path.is_file():
        if not format_of(path.name)[0]:
            raise ParameterError([f"source {source.name}: {path} cannot be read; what can be: "
                                  f"{READABLE}. Unpack or convert it."])
        return {str(path): path.stat().st_size}
    visible = visible_files(path)
    files = [p for p in visible if is_data(p.name)]
    if not files:
        there = f" (there: {', '.join(p.name for p in visible[:5])})" if visible else ""
        raise ParameterError([
            f"source {source.name}: {source.path} is not a .jsonl, .parquet or .txt file, nor a folder "
            f"with some{there}; nor does it begin with local: or hf:. What can be read: {READABLE}."])
    # The endings that were read first come first: cursors of stores from then count in this order.
    files.sort(key=lambda p: not p.name.endswith((".jsonl", ".jsonl.gz", ".parquet", ".txt")))
    return {str(p): p.stat().st_size for p in files}


def source_problems(source: Source) -> list[str]:
    """What is wrong with a source here, as far as the beginnings of its files tell; [] for the hub's."""
    if source.path.startswith("hf:"):
        return []
    try:
        files = list(source_files(source))
        first = [dataclasses.replace(source, path=name) for name in files
                 if format_of(name)[0] in ("csv", "tsv", "parquet", "arrow")]
        for part in [source, *(first if len(files) > 1 else [])]:
            with contextlib.suppress(SourceError):    # what stands before the damage is read first
                rows = itertools.islice(documents(part), 1000)
                next((value for value, _ in rows if value is not None), None)
    except ParameterError as error:
        return error.problems
    return []


def documents(source: Source, cursor: dict | None = None, *, tries: int = 8, sleep=time.sleep,
              deadline: float | None = None):
    """Stream a source: yields (text or whatever the row holds, cursor of the next row).

    A row that cannot be read is None or BadRow. The cursor is {"file": i, "row": j}: from it the
    rest of the stream can be read again. A hub dataset is read at one commit from first to last; a
    failed request is tried again (see `_ask`), and so is a file that arrives damaged, from the same
    row on: nothing is lost or repeated. Raises SourceError when that does not help.
    """
    reading = {"tries": tries, "sleep": sleep, "deadline": deadline}
    start = {"file": 0, "row": 0}
    hub, failures, cursor = source.path.startswith("hf:"), 0, dict(cursor or start)
    fields = Fields(source, found=cursor != start)
    source = pin_revision(source, **reading)
    files = list(source_files(source, **reading).items())
    while cursor["file"] < len(files):
        name, size = files[cursor["file"]]
        try:
            with HubFile(source, name, size, **reading) if hub else open(name, "rb") as file:
                for row, value in rows_of(file, name, source.text_field, fields, cursor["row"]):
                    cursor, failures = {"file": cursor["file"], "row": row}, 0
                    yield value, cursor
            cursor = {"file": cursor["file"] + 1, "row": 0}
        except ParameterError:
            raise
        except SourceError as error:
            row = cursor["row"]
            raise SourceError(f"{error} It stopped before row {row:,} of {name}.") from None
        except Exception as error:                    # no sound parquet or gzip; the next copy may be
            failures += 1
            problem = (f"source {source.name}: {name} of {source.path} is damaged at or after row "
                       f"{cursor['row']:,} ({type(error).__name__}: {str(error)[:100]})")
            if failures == 3 or not hub:
                raise SourceError(f"{problem}. Nothing written is lost: with a sound file the same call "
                                  "goes on; a dataset without one needs another `revision` and a new "
                                  "folder.") from error
            print(f"{problem}; reading it again ({failures} of 2)", flush=True)
            sleep(2 ** failures)
    if not fields.found and fields.names:
        raise ParameterError([fields.problem()])


def clean_documents(source: Source, cursor: dict | None = None, longest_document: int = 2_000_000,
                    **reading):
    """Stream a source cleaned: yields (text, None, cursor), or (None, why it is skipped, cursor)."""
    for value, cursor in documents(source, cursor, **reading):
        reason, text = None, None
        if isinstance(value, BadRow) and value is not TOO_LONG:
            reason = value.reason
        elif value is TOO_LONG or isinstance(value, str) and len(value) > longest_document:
            reason = f"longer than {min(longest_document, LONGEST_ROW):,} characters"
        elif not isinstance(value, str):
            reason = "null" if value is None else "not a string"
        elif re.search("[\ud800-\udfff]", value):     # what is left of bytes that were not UTF-8
            reason = "invalid UTF-8"
        elif not (text := clean_text(value, source.preserve_linebreaks)):
            reason = "empty"
        yield text, reason, cursor
