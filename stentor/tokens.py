"""The token store: uint16 shards on disk, one folder a source, and the batches read from it.

A document is its ids + EOS; they are packed end to end without padding.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from stentor.files import ParameterError, remove_leftovers, write_atomically
from stentor.formats import _is_data, _visible_files
from stentor.hub import _hub_read
from stentor.recipes import Source
from stentor.sources import clean_documents, pin_revision, source_problems
from stentor.tokenizer import encode_documents, store_problems, tokenizer_sha256, vocabulary_rows


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
