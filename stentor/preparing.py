"""Filling a token store: documents read, cleaned, encoded and packed into shards.

A document is its ids + EOS; they are packed end to end without padding, as uint16, one folder a
source. A call that is killed at any instant is gone on from by the next one, to the same bytes.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np

from stentor.files import ParameterError, remove_leftovers, write_atomically
from stentor.formats import is_data, visible_files
from stentor.hub import hub_read
from stentor.recipes import Source
from stentor.sources import clean_documents, pin_revision, source_problems
from stentor.tokenizer import encode_documents, store_problems, tokenizer_sha256, vocabulary_rows


def prepare_tokens(sources, tokenizer, store_dir, *, tokens_per_source: dict[str, int],
                   validation_documents: int, shard_tokens: int = 1 << 24,
                   longest_document: int = 2_000_000, progress=print, after_shard=None, beside=(),
                   **reading) -> Path:
    """Fill a token store: stream, clean, tokenise, append EOS, pack into shards; or go on with it.

    tokens_per_source: {source.name: tokens wanted}; one that ends earlier is in more epochs.
    The first `validation_documents` good documents of each source are its validation text and never
    enter training, nor does a training document that is equal to one of these of any source, or of
    what other folders hold out: `beside`, pairs of (source, its validation documents). Those are
    counted as "also in validation".
    Documents that are null, empty, not a string, invalid UTF-8 or longer than `longest_document`
    characters are skipped and counted. Writes manifest.json (atomically, after each shard):
    tokenizer hash, sources, counts of documents, tokens and UTF-8 bytes of the cleaned text, sha256
    of each shard, and the cursor to go on from. A hub source is read at the commit in its entry's
    `revision`, now and later. `reading`: tries, sleep and deadline of `documents`. after_shard is
    called after each shard, with their number, and may wait.
    Raises ParameterError when the folder holds a store of another tokenizer, sources or revision,
    when the tokenizer's ids do not fit a store, and before anything is written when a source cannot
    be read or has too few documents.
    """
    if problems := store_problems(tokenizer):
        raise ParameterError(problems)
    folder = Path(store_dir)
    _tidy(folder, sources)
    manifest = _open_manifest(folder, sources, tokenizer, validation_documents, shard_tokens)
    store, entries = _Store(folder, manifest, tokenizer, after_shard), manifest["sources"]
    todo = {source.name for source in sources
            if entries[source.name]["filled"] < tokens_per_source[source.name]}
    _check_readable([source for source in sources if source.name in todo], progress)
    sources = [_at_its_commit(source, entries[source.name], source.name not in todo, reading)
               for source in sources]
    cleaning = {"longest_document": longest_document, **reading}
    held_out = {source.name: _held_out(source, entries[source.name], validation_documents, cleaning)
                for source in sources if not entries[source.name]["validation"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in held_out.items():
        store.write_validation(name, texts)
    if todo:
        left_out = store.validation_documents()
        left_out |= _documents_beside(store, beside, cleaning)
    for source in sources:
        if source.name in todo:
            writer = _ShardWriter(store, source, left_out)
            _fill(writer, source, tokens_per_source[source.name], cleaning, progress)
    return folder


def _tidy(folder: Path, sources) -> None:
    """Remove what killed calls left in the store; its folder may be a link, made or not yet."""
    if os.path.islink(folder):
        os.makedirs(os.path.realpath(folder), exist_ok=True)
    path = folder / "manifest.json"
    entries = json.loads(path.read_text())["sources"] if path.exists() else {}
    remove_leftovers(folder, "manifest.json")
    for name in {*entries, *(source.name for source in sources)}:
        for names in ("train-*.bin", "carry-*.bin", "validation.bin"):
            remove_leftovers(folder / name, names)
        # Its writer was killed before it removed the one that the newest replaced.
        for carry in (folder / name).glob("carry-*.bin"):
            if int(carry.stem[6:]) < len(entries.get(name, {"shards": []})["shards"]):
                carry.unlink(missing_ok=True)


def _open_manifest(folder: Path, sources, tokenizer, validation_documents: int,
                   shard_tokens: int) -> dict:
    """The manifest of a store with an entry for each source; nothing is written.

    An entry without a shard is begun anew, and without any a store of anything may be: what a call
    left that came to nothing binds nobody.
    """
    told = [dataclasses.asdict(source) for source in sources]
    fingerprint = {
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "validation_documents": validation_documents, "shard_tokens": shard_tokens,
        "sources": [{key: value for key, value in source.items()
                     if key not in ("weight", "revision")} for source in told]}
    manifest = {"fingerprint": fingerprint, "vocab_size": vocabulary_rows(tokenizer),
                "eos_token_id": tokenizer.eos_token_id, "sources": {}}
    path = folder / "manifest.json"
    there = json.loads(path.read_text()) if path.exists() else manifest
    begun = {name: entry for name, entry in there["sources"].items() if entry["shards"]}
    if begun:
        _refuse_another(folder, there, manifest)
        manifest = there | {"sources": begun}
    for source in sources:
        manifest["sources"].setdefault(source.name, {
            "revision": None, "documents": 0, "tokens": 0, "characters": 0, "bytes": 0,
            "skipped": {}, "shards": [], "validation": None, "cursor": {"file": 0, "row": 0},
            "filled": 0})
    return manifest


def _refuse_another(folder: Path, there: dict, wanted: dict) -> None:
    """Raise ParameterError where the manifest that is there is not the wanted store's."""
    there, wanted = (manifest["fingerprint"] | {"eos_token_id": manifest["eos_token_id"]}
                     for manifest in (there, wanted))
    for key, value in wanted.items():
        if there[key] != value:
            raise ParameterError([
                f"{folder} holds a token store with another {key} "
                f"({str(there[key])[:60]} there, {str(value)[:60]} wanted); "
                "choose another folder or delete it."])


def _check_readable(sources, progress) -> None:
    """Raise for sources that cannot be read here; say which files of a folder are no data."""
    if problems := [problem for source in sources for problem in source_problems(source)]:
        raise ParameterError(problems)
    for source in sources:
        if not source.path.startswith(("hf:", "local:")):
            visible = visible_files(Path(source.path))
            if others := [path.name for path in visible if not is_data(path.name)]:
                more = f" and {len(others) - 5} more" if len(others) > 5 else ""
                progress(f"source {source.name}: not read in {source.path}: "
                         f"{', '.join(others[:5])}{more}")


def _at_its_commit(source: Source, entry: dict, complete: bool, reading: dict) -> Source:
    """A hub source at the commit that the store's tokens came from so far; others as they are.

    At the beginning it is the commit that the source's revision names now.
    """
    if not source.path.startswith("hf:"):
        return source
    commit, now = entry["revision"], source if complete else pin_revision(source, **reading)
    there = f"source {source.name}: the store holds {source.path} at revision {commit}"
    if commit and source.revision and now.revision != commit and len(now.revision) == 40:
        raise ParameterError([f"{there}, wanted is {now.revision}; set revision to the former to "
                              "go on, or choose another folder."])
    if commit and now.revision != commit and not complete:
        url = f"api/datasets/{source.path[3:]}/revision/{commit}"
        try:
            hub_read(source, url, "the revision", **reading)
        except ParameterError:
            raise ParameterError([f"{there}, which the hub no longer gives; it is at "
                                  f"{now.revision} now. Choose another folder."]) from None
    entry["revision"] = commit or now.revision
    return dataclasses.replace(source, revision=entry["revision"])


def _held_out(source: Source, entry: dict, wanted: int, cleaning: dict) -> list[str]:
    """The first `wanted` good documents of a source.

    The entry's cursor is then behind them, and behind what was skipped. Raises ParameterError when
    no further document follows, for training.
    """
    texts, skipped = [], {}
    for text, reason, cursor in clean_documents(source, **cleaning):
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        elif len(texts) < wanted:
            texts.append(text)
            entry.update(cursor=cursor, skipped=dict(skipped))
        else:
            return texts
    raise ParameterError([_too_few(source, len(texts), wanted, skipped)])


def _documents_beside(store: _Store, beside, cleaning: dict) -> set[bytes]:
    """The validation documents of sources that other folders hold, as this store's ids."""
    found = set()
    for source, wanted in beside:
        with contextlib.suppress(ParameterError):     # the call that fills it says so
            texts = _held_out(source, {}, wanted, cleaning)
            found |= store.documents_of(store.encoded(texts)[0])
    return found


def _too_few(source: Source, documents: int, validation_documents: int, skipped: dict) -> str:
    rows = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    return (f"source {source.name} ({source.path}) gave no training document after its first "
            f"{validation_documents:,} validation documents: it has {documents:,} good documents"
            f"{f', skipped: {rows}' if rows else ''}. Lower max_eval_samples or give it more "
            "documents; in a .txt a line <|doc|>, or <|endoftext|>, separates two.")


@dataclasses.dataclass
class _Store:
    """A store that is written to: its folder, its manifest and its tokenizer."""
    folder: Path
    manifest: dict
    tokenizer: object
    after_shard: object                               # called with the number of shards, or None

    def save_manifest(self) -> None:
        write_atomically(self.folder / "manifest.json", json.dumps(self.manifest, indent=1))

    def write_ids(self, source: str, file: str, ids: np.ndarray) -> dict:
        """Write a file of ids; returns its entry in the manifest."""
        (self.folder / source).mkdir(exist_ok=True)
        data = ids.astype("<u2").tobytes()
        write_atomically(self.folder / source / file, data)
        return {"file": f"{source}/{file}", "tokens": len(ids),
                "sha256": hashlib.sha256(data).hexdigest()}

    def write_validation(self, source: str, texts: list[str]) -> None:
        written = self.write_ids(source, "validation.bin", self.encoded(texts)[0])
        self.manifest["sources"][source]["validation"] = written | {
            "documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}

    def encoded(self, texts: list[str], left_out=frozenset()) -> tuple[np.ndarray, list[str]]:
        """(ids with EOS after each document, texts) without those whose ids are in `left_out`."""
        ids, offsets = encode_documents(self.tokenizer, texts)
        ids = ids.astype("<u2", copy=False)
        data, bounds = ids.tobytes(), (2 * offsets).tolist()
        keep = np.array([data[start:end] not in left_out
                         for start, end in itertools.pairwise(bounds)], bool)
        if not keep.all():
            texts, lengths = list(itertools.compress(texts, keep)), np.diff(offsets)
            ids = ids[np.repeat(keep, lengths)]
            offsets = np.concatenate([[0], np.cumsum(lengths[keep])])
        return np.insert(ids, offsets[1:], self.tokenizer.eos_token_id), texts

    def documents_of(self, ids: np.ndarray) -> set[bytes]:
        """The documents of a run of ids, each as the bytes of its ids without EOS."""
        ends = np.flatnonzero(ids == self.tokenizer.eos_token_id) + 1
        return {document.tobytes()[:-2] for document in np.split(ids, ends)[:-1]}

    def validation_documents(self) -> set[bytes]:
        """`documents_of` the validation text of every source."""
        files = [entry["validation"]["file"] for entry in self.manifest["sources"].values()]
        return set().union(*(self.documents_of(np.fromfile(self.folder / file, "<u2"))
                             for file in files))


class _ShardWriter:
    """Packs the documents of one source into its shards; the manifest is true after each one.

    A shard is cut in the middle of a document: what is over goes to the next one, and into a file
    for a restart. One file for each number of shards: a kill between it and the manifest must leave
    the one that the old manifest needs.
    """

    def __init__(self, store: _Store, source: Source, left_out: set[bytes]):
        self.store, self.source, self.left_out = store, source, left_out
        self.entry = store.manifest["sources"][source.name]
        self.shard_tokens = store.manifest["fingerprint"]["shard_tokens"]
        self.cursor = self.entry["cursor"]
        self.counts = {key: self.entry[key] for key in ("documents", "characters", "bytes")}
        self.texts, self.characters = [], 0           # read, not yet tokens
        begun = len(self.entry["shards"])
        self.pending = np.fromfile(self._carry(begun), "<u2") if begun else np.array([], "<u2")

    def _carry(self, shards: int) -> Path:
        return self.store.folder / self.source.name / f"carry-{shards:05d}.bin"

    @property
    def tokens(self) -> int:
        """Tokens of the shards and of what is over."""
        return self.entry["tokens"] + len(self.pending)

    def skip(self, reason: str, rows: int = 1) -> None:
        if rows:
            self.entry["skipped"][reason] = self.entry["skipped"].get(reason, 0) + rows

    def add(self, text: str | None, reason: str | None, cursor: dict) -> None:
        """A row of `clean_documents`."""
        self.cursor = cursor
        if reason:
            self.skip(reason)
        else:
            self.texts.append(text)
            self.characters += len(text)

    def pack(self, *, last: bool = False) -> None:
        """Encode what was added and write the shards that it fills; with `last` all of it."""
        if self.texts:
            self._encode()
        while len(self.pending) >= self.shard_tokens or (last and len(self.pending)):
            self._write_shard()

    def _encode(self) -> None:
        ids, kept = self.store.encoded(self.texts, self.left_out)
        self.pending = np.concatenate([self.pending, ids])
        self.skip("also in validation", len(self.texts) - len(kept))
        self.counts["documents"] += len(kept)
        self.counts["characters"] += sum(map(len, kept))
        self.counts["bytes"] += sum(len(text.encode()) for text in kept)
        self.texts, self.characters = [], 0

    def _write_shard(self) -> None:
        entry, shards = self.entry, len(self.entry["shards"])
        ids, self.pending = np.split(self.pending, [self.shard_tokens])
        entry["shards"].append(
            self.store.write_ids(self.source.name, f"train-{shards:05d}.bin", ids))
        write_atomically(self._carry(shards + 1), self.pending.tobytes())
        entry.update(tokens=entry["tokens"] + len(ids), cursor=self.cursor, **self.counts)
        self.store.save_manifest()
        self._carry(shards).unlink(missing_ok=True)
        if self.store.after_shard:
            self.store.after_shard(shards + 1)

    def finish(self, wanted: int) -> None:
        """Say that the source is full; ParameterError where it gave no training document at all."""
        if not self.entry["tokens"]:                  # the store stays as it is: more may come
            held = self.entry["validation"]["documents"]
            raise ParameterError([_too_few(self.source, held, held, self.entry["skipped"])])
        self.entry["filled"] = wanted                 # only now: a kill before comes back here
        self.store.save_manifest()


def _fill(writer: _ShardWriter, source: Source, wanted: int, cleaning: dict, progress) -> None:
    """Read a source until its shards hold `wanted` tokens, or to its end."""
    started = said = time.time()
    # After a kill between the last shards all that is wanted may be there: then nothing is read.
    rows = clean_documents(source, writer.cursor, **cleaning) if writer.tokens < wanted else ()
    for row in rows:
        writer.add(*row)
        if writer.characters <= 1 << 20:              # about 1 MB at a time: memory stays flat
            continue
        writer.pack()
        if time.time() - said > 5:
            said = time.time()
            progress(f"{source.name}: {writer.tokens:,} of {wanted:,} tokens "
                     f"({writer.tokens / (said - started):,.0f} tokens/s)")
        if writer.tokens >= wanted:
            break
    writer.pack(last=True)
    writer.finish(wanted)
