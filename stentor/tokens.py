"""A token store as training reads it: the source of each sequence, and the batch of each step."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from stentor.files import ParameterError, write_atomically


def source_names(recipe) -> list[str]:
    """The sources that take part in a run."""
    return [source.name for source in recipe.sources if source.weight > 0 or recipe.anneal_weights]


def plan_sources(recipe) -> np.ndarray:
    """The source of each sequence of a run, as an index into `source_names`.

    (sequences_to_train,), uint8 up to 255 sources. From a golden-ratio sequence, each stretch of
    which holds the weights to within a few sequences.
    """
    names = source_names(recipe)
    n = np.arange(recipe.sequences_to_train)
    point = (n + 0.5) * 0.6180339887498949 % 1.0
    weights = [source.weight for source in recipe.sources if source.name in names]
    plan = np.searchsorted(np.cumsum(weights) / sum(weights), point, side="right")
    plan = plan.astype(np.min_scalar_type(len(names)))
    if recipe.anneal_weights:
        late = n >= len(n) * (1 - recipe.anneal_fraction)
        weights = np.cumsum(recipe.anneal_weights) / sum(recipe.anneal_weights)
        plan[late] = np.searchsorted(weights, point[late], side="right")
    return plan


def refuse_wide_ids(rows: int, recipe) -> None:
    """Raise ParameterError where a store's ids need more rows than the model has."""
    if rows > recipe.shape.vocab_size:
        raise ParameterError([f"the token store has ids up to {rows:,}, the model only "
                              f"vocab_size = {recipe.shape.vocab_size:,}."])


class TokenStore:
    """A token store on disk; `batch(step)` is a pure function of the recipe and the step.

    Every sequence of the run has a number n = 0 .. recipe.sequences_to_train - 1. Its source
    follows from a golden-ratio sequence (each prefix holds the mixture's weights to within a few
    sequences; the anneal's weights over the last `anneal_fraction`), and the k-th sequence of a
    source is block k of an endless series of shuffled epochs over it. So the order depends on
    neither the number of processes nor on what was read before: a resume needs only the step.
    """

    def __init__(self, store_dir, recipe):
        self.folder, self.recipe = Path(store_dir), recipe
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.names, entries = source_names(recipe), self.manifest["sources"]
        if missing := [name for name in self.names if name not in entries]:
            raise ParameterError([
                f"the token store {self.folder} has no source {', '.join(missing)}."])
        refuse_wide_ids(self.manifest["vocab_size"], recipe)
        self.shards = {name: [self.folder / shard["file"] for shard in entries[name]["shards"]]
                       for name in self.names}
        self.starts = {name: np.cumsum([0] + [shard.stat().st_size // 2 for shard in shards])
                       for name, shards in self.shards.items()}
        self.blocks = {name: int(starts[-1]) // recipe.stride
                       for name, starts in self.starts.items()}
        if short := [name for name, blocks in self.blocks.items() if blocks < 1]:
            self._forget(short)
            raise ParameterError([
                f"source {', '.join(short)} has fewer tokens than one block of "
                f"{recipe.block_size}: give it more text, or take it out of the recipe, and "
                "prepare the tokens again."])
        self._plan_rows()

    def _forget(self, names: list[str]) -> None:
        """Take sources out of the manifest: `prepare_tokens` reads them anew, perhaps mended."""
        for name in names:
            del self.manifest["sources"][name]
        with contextlib.suppress(OSError):            # a store that cannot be written
            write_atomically(self.folder / "manifest.json", json.dumps(self.manifest, indent=1))

    def _plan_rows(self) -> None:
        """row_source: the source of each sequence; row_index: its number among its source's."""
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
        read = min(step * self.recipe.total_batch_size, self.recipe.sequences_to_train)
        return read / sum(self.blocks.values())

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The global batch of step `step` (0-based).

        input_ids and labels: int64 (total_batch_size, block_size), one tensor: the model shifts,
        position t predicts t + 1 (the cards' packing). With chunk_eos the last id of each is EOS.
        """
        rows = self.rows(step)
        ids = np.stack([self._block(self.names[source], int(index))
                        for source, index in zip(self.row_source[rows], self.row_index[rows])])
        if self.recipe.chunk_eos:
            ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=self.manifest["eos_token_id"])
        ids = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    @functools.lru_cache(maxsize=16)
    def _order(self, name: str, epoch: int) -> np.ndarray:
        seed = [self.recipe.seed, epoch, *hashlib.sha256(name.encode()).digest()[:4]]
        return np.random.default_rng(seed).permutation(self.blocks[name])

    def _block(self, name: str, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.blocks[name])
        start = int(self._order(name, epoch)[place]) * self.recipe.stride
        return self._read(name, start, start + self.recipe.stride)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        # Read, not mapped: each page fault of a map brings its neighbours, and 700 random rows of
        # 144 MB kept all of it.
        starts = self.starts[name]
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
        parts = []
        for i in range(first, last + 1):
            begin, end = max(start, starts[i]), min(stop, starts[i + 1])
            parts.append(np.fromfile(self.shards[name][i], "<u2", end - begin,
                                     offset=2 * (begin - starts[i])))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def validation(self) -> tuple[np.ndarray, int]:
        """(ids, bytes): the validation tokens of all sources behind one EOS, and their text's size.

        bytes: of the text in UTF-8. Evaluated in windows that overlap by one token, so each token
        is predicted exactly once and the summed loss divided by `bytes` is exact.
        """
        return held_out_text(self.folder, self.manifest, self.names)


def held_out_text(folder, manifest: dict | None = None, names=None) -> tuple[np.ndarray, int]:
    """`TokenStore.validation` of any store, of the sources named; None: of all of them."""
    manifest = manifest or json.loads((Path(folder) / "manifest.json").read_text())
    sources = manifest["sources"]
    entries = [sources[name]["validation"] for name in names or sources]
    ids = [np.fromfile(Path(folder) / entry["file"], "<u2") for entry in entries]
    eos = np.array([manifest["eos_token_id"]], "<u2")
    return np.concatenate([eos, *ids]), sum(entry["bytes"] for entry in entries)
