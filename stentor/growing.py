"""A token store that worker processes fill while training reads it.

One folder and one worker process a source. Sequences are shuffled within a shard instead of the
whole source, so the order is known before the text is.
"""
from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from stentor.files import FeedStopped, ParameterError, SourceError, write_atomically
from stentor.preparing import prepare_tokens
from stentor.tokens import TokenStore, plan_sources, refuse_wide_ids, source_names


def planned_shards(recipe, shard_tokens: int) -> dict[str, int]:
    """{source: shards its sequences fill}, from the recipe alone."""
    if shard_tokens % recipe.block_size:
        raise ParameterError([f"shard_tokens = {shard_tokens:,} must be a multiple of block_size = "
                              f"{recipe.block_size}."])
    names = source_names(recipe)
    rows = np.bincount(plan_sources(recipe), minlength=len(names))
    return {name: -(-int(n) * recipe.block_size // shard_tokens) for name, n in zip(names, rows)}


def fill_source(recipe, tokenizer, store_dir, name: str, *, shard_tokens: int,
                ahead_shards: int | None = None) -> None:
    """Fill store_dir/<name>, a token store of that source alone; what one worker process does.

    It stays at most `ahead_shards` shards ahead of the one that training reads (None: it need not
    wait), goes on where an earlier call stopped, and leaves when its parent process is gone: a
    killed run leaves no worker behind.
    """
    folder, parent = Path(store_dir) / name, os.getppid()
    source = next(source for source in recipe.sources if source.name == name)
    wanted = planned_shards(recipe, shard_tokens)[name] * shard_tokens
    folder.mkdir(parents=True, exist_ok=True)

    def wait_for_the_reader(shards: int) -> None:
        while (ahead_shards and os.getppid() == parent
               and shards > shard_being_read(folder) + ahead_shards):
            time.sleep(0.2)
        if os.getppid() != parent:
            raise SystemExit(0)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)       # a killed run's worker may be in its last shard
        prepare_tokens([source], tokenizer, folder, tokens_per_source={name: wanted},
                       validation_documents=recipe.max_eval_samples, shard_tokens=shard_tokens,
                       beside=[(_as_filled(other, store_dir), recipe.max_eval_samples)
                               for other in recipe.sources
                               if other.name in set(source_names(recipe)) - {name}],
                       after_shard=wait_for_the_reader, progress=lambda text: None)


def _as_filled(source, store_dir):
    """A source at the commit that its own folder was begun with, whatever its revision is now."""
    path = Path(store_dir) / source.name / "manifest.json"
    entries = json.loads(path.read_text())["sources"] if path.exists() else {}
    commit = entries.get(source.name, {}).get("revision")
    return dataclasses.replace(source, revision=commit) if commit else source


def shard_being_read(folder) -> int:
    """The number of the shard of a source that training has come to."""
    path = Path(folder) / "reading"
    return int(path.read_text()) if path.exists() else 0


class GrowingStore(TokenStore):
    """A TokenStore over folders that workers still fill; `batch` waits for the shards it needs.

    Sequence k of a source lies in shard k // blocks_per_shard, shuffled within it: a pure function
    of (seed, step) however full the store is. A source that ends early is read again, in another
    order. Only whole shards are read before the end is known. failed(): what is wrong with the
    workers, or None; asked while waiting.
    """

    def __init__(self, store_dir, recipe, shard_tokens: int, *, rolling: bool = False,
                 failed=lambda: None):
        self.folder, self.recipe, self.shard_tokens = Path(store_dir), recipe, shard_tokens
        self.rolling, self.failed = rolling, failed
        self.planned = planned_shards(recipe, shard_tokens)
        self.names = list(self.planned)
        self.per_shard = shard_tokens // recipe.stride
        self.entries, self.reading = {}, {}
        self._plan_rows()
        for name in self.names:
            self._wait_for(name, 0)
        manifests = [self._manifest(name) for name in self.names]
        refuse_wide_ids(max(manifest["vocab_size"] for manifest in manifests), recipe)
        self.manifest = {"eos_token_id": manifests[0]["eos_token_id"], "sources": {
            name: self._seen_from_here(name, manifest["sources"][name])
            for name, manifest in zip(self.names, manifests)}}

    @staticmethod
    def _seen_from_here(name: str, entry: dict) -> dict:
        """The entry of a source as `validation` and a run's fingerprint want it.

        The first shard stands for the store: the rest follows from it, the source and its commit.
        """
        validation = {**entry["validation"], "file": f"{name}/{entry['validation']['file']}"}
        return {**entry, "shards": entry["shards"][:1], "validation": validation}

    def _manifest(self, name: str) -> dict:
        """What the worker of a source has written; no source at all before it has."""
        path = self.folder / name / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else {"sources": {}}

    def _wait_for(self, name: str, number: int) -> tuple[int, int, Path]:
        """(epoch, number, file) of the shard that `number`, counted over epochs, stands for.

        Waits until it is written.
        """
        while not (found := self._shard(name, number)):
            self.entries[name] = self._manifest(name)["sources"].get(name)
            if found := self._shard(name, number):
                break
            if problem := self.failed():
                raise FeedStopped(problem)
            time.sleep(0.05)
        return found

    def _shard(self, name: str, number: int) -> tuple[int, int, Path] | None:
        """`_wait_for` where the entry that is known says it already."""
        if not (entry := self.entries.get(name)):
            return None
        ended = entry["filled"] > 0
        usable = [shard for shard in entry["shards"] if shard["tokens"] == self.shard_tokens]
        if ended and not usable:
            usable = entry["shards"]                  # a short corpus is one short shard
        if number < len(usable) or (ended and usable):
            epoch, number = divmod(number, len(usable))
            return epoch, number, self.folder / name / usable[number]["file"]

    def _block(self, name: str, index: int) -> np.ndarray:
        number = index // self.per_shard
        if number > self.reading.get(name, -1):       # the worker of this source may go on
            self.reading[name] = number
            write_atomically(self.folder / name / "reading", str(number))
        epoch, number, path = self._wait_for(name, number)
        if not path.exists():
            raise SourceError(f"source {name} ended after {self.entries[name]['tokens']:,} tokens, "
                              "and its first shards are gone (rolling): lower token_budget or its "
                              "weight, or keep the shards.")
        tokens = np.memmap(path, dtype="<u2", mode="r")
        blocks = len(tokens) // self.recipe.stride
        place = self._shuffled(name, epoch, number, blocks)[index % self.per_shard % blocks]
        start = int(place) * self.recipe.stride
        return tokens[start:start + self.recipe.stride]

    @functools.lru_cache(maxsize=64)
    def _shuffled(self, name: str, epoch: int, number: int, blocks: int) -> np.ndarray:
        seed = [self.recipe.seed, epoch, number, *hashlib.sha256(name.encode()).digest()[:4]]
        return np.random.default_rng(seed).permutation(blocks)

    def epoch(self, step: int) -> float:
        """The part of the planned sequences that `step` steps have read."""
        return min(step * self.recipe.total_batch_size / self.recipe.sequences_to_train, 1.0)

    def release(self, step: int) -> None:
        """Training will not go back before `step`.

        With `rolling` the shards that only earlier steps read are deleted.
        """
        row = min(step * self.recipe.total_batch_size, len(self.row_source) - 1)
        for i, name in enumerate(self.names if self.rolling else ()):
            read = int(np.count_nonzero(self.row_source[:row] == i))
            for old in range(read // self.per_shard):
                (self.folder / name / name / f"train-{old:05d}.bin").unlink(missing_ok=True)
