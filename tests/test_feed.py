"""The store that workers fill while training reads it, and the mixture that comes out."""
import dataclasses
import json
import time

import numpy as np
import pytest

import stentor.checkpoints
import stentor.growing
import stentor.launch
import stentor_utils as su

WEB_CODE_MATH = {"web": 0.75, "code": 0.15, "math": 0.10}


@pytest.fixture(scope="module")
def mixed(tiny):
    """A run of 300 steps x 8 sequences x 64 tokens, from shards of 2,560 tokens."""
    sources = tuple(dataclasses.replace(tiny.source, name=name, weight=weight)
                    for name, weight in WEB_CODE_MATH.items())
    return dataclasses.replace(tiny.recipe, sources=sources, anneal_weights=(0.5, 0.3, 0.2),
                               token_budget=300 * 8 * 64)


def fill(recipe, tiny, folder, shard_tokens=2560):
    for name in stentor.growing.planned_shards(recipe, shard_tokens):
        stentor.growing.fill_source(recipe, tiny.tokenizer, folder, name, shard_tokens=shard_tokens)
    return su.GrowingStore(folder, recipe, shard_tokens)


def test_every_planned_block_is_read_once_and_from_its_source(mixed, tiny, tmp_path):
    store = fill(mixed, tiny, tmp_path)
    batches = np.concatenate([store.batch(step)["input_ids"].numpy()
                              for step in range(mixed.total_steps)])
    for i, name in enumerate(store.names):
        rows = batches[store.row_source == i]
        folder = tmp_path / name
        shards = json.loads((folder / "manifest.json").read_text())["sources"][name]["shards"]
        text = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in shards])
        blocks = text[:len(text) // 64 * 64].reshape(-1, 64)
        whole = len(rows) // 40 * 40                  # 40 blocks a shard: all of each but the last
        assert sorted(map(bytes, rows[:whole].astype("<u2"))) == sorted(map(bytes, blocks[:whole]))
        assert not np.array_equal(rows[:40], blocks[:40])          # shuffled within a shard


def test_the_order_does_not_depend_on_how_full_the_store_is(mixed, tiny, tmp_path):
    """Read with workers still at it, in processes of their own, then again from the full store."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps({
        "recipe": mixed.to_dict(), "store": "tokens", "tokenizer": str(tiny.tokenizer_dir),
        "fill": {"shard_tokens": 2560}}))
    with stentor.launch.fill_while_training(run_dir / "run.json", mixed, 2560) as failed:
        store = su.GrowingStore(run_dir / "tokens", mixed, 2560, failed=failed)
        growing = [store.batch(step)["input_ids"] for step in range(mixed.total_steps)]
    full = fill(mixed, tiny, tmp_path / "full")
    for step, batch in enumerate(growing):
        assert (full.batch(step)["input_ids"] == batch).all(), step
    recipe = dataclasses.replace(mixed, eval_steps=7)
    mine, theirs = (stentor.checkpoints.run_fingerprint(recipe, one) for one in (store, full))
    assert mine == theirs                             # so a run may go on with either
    (ids, size), (full_ids, full_size) = store.validation(), full.validation()
    assert (ids == full_ids).all() and size == full_size


def test_realised_mixture_is_the_plan_within_half_a_percent(mixed, tiny, tmp_path):
    """Over every batch of a whole small run, before and in the anneal, as metrics.jsonl logs it."""
    store = fill(mixed, tiny, tmp_path)
    steps = np.array([[store.mixture(step)[name] for name in store.names]
                      for step in range(mixed.total_steps)])
    start = int(mixed.total_steps * 0.85)
    assert np.abs(steps[:start].mean(0) - [0.75, 0.15, 0.10]).max() < 0.005, steps[:start].mean(0)
    assert np.abs(steps[start:].mean(0) - [0.50, 0.30, 0.20]).max() < 0.005, steps[start:].mean(0)
    plan = 0.85 * np.array([0.75, 0.15, 0.10]) + 0.15 * np.array([0.5, 0.3, 0.2])
    assert np.abs(steps.mean(0) - plan).max() < 0.005


def test_rolling_deletes_what_no_checkpoint_needs_and_goes_on(mixed, tiny, tmp_path):
    fill(mixed, tiny, tmp_path)
    store = su.GrowingStore(tmp_path, mixed, 2560, rolling=True)
    expected = [store.batch(step)["input_ids"] for step in range(mixed.total_steps)]
    before = len(list(tmp_path.glob("*/*/train-*.bin")))
    store.release(200)
    left = len(list(tmp_path.glob("*/*/train-*.bin")))
    read = [np.count_nonzero(store.row_source[:200 * 8] == i) // 40       # 40 blocks a shard
            for i in range(3)]
    assert before - left == sum(read) > 30
    assert not (tmp_path / "web" / "web" / "train-00000.bin").exists()
    again = su.GrowingStore(tmp_path, mixed, 2560, rolling=True)
    for step in range(200, mixed.total_steps):
        assert (again.batch(step)["input_ids"] == expected[step]).all()
    with pytest.raises(su.SourceError, match="its first shards are gone"):
        again.batch(0)


def test_a_short_source_is_read_again_in_another_order(mixed, tiny, tmp_path):
    longer = dataclasses.replace(mixed, token_budget=4000 * 8 * 64)       # more than there is
    store = fill(longer, tiny, tmp_path)
    entry = json.loads((tmp_path / "web" / "manifest.json").read_text())["sources"]["web"]
    shards = sum(shard["tokens"] == 2560 for shard in entry["shards"])
    assert shards < store.planned["web"]
    first, second = ([store._block("web", epoch * shards * 40 + i) for i in range(40)]
                     for epoch in (0, 1))
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))
    assert not np.array_equal(first, second)


def test_a_worker_stays_ahead_and_not_more(mixed, tiny, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({
        "recipe": mixed.to_dict(), "store": "tokens", "tokenizer": str(tiny.tokenizer_dir),
        "fill": {"shard_tokens": 2560, "ahead_shards": 2}}))

    def written():
        shards = (tmp_path / "tokens").glob("web/web/train-*.bin")
        return sorted(path.stat().st_mtime for path in shards)
    with stentor.launch.fill_while_training(tmp_path / "run.json", mixed, 2560) as failed:
        store = su.GrowingStore(tmp_path / "tokens", mixed, 2560, failed=failed)

        def wait_for(shards):
            while len(written()) < shards:
                assert failed() is None
                time.sleep(0.05)
        wait_for(3)
        first, _, third = written()[:3]
        time.sleep(max(0.5, 10 * (third - first)))    # enough for many more, on any machine
        assert len(written()) == 3
        for step in range(150):                       # reading on lets it go on
            store.batch(step)
        wait_for(14)


def test_a_failed_worker_stops_the_reader_with_its_error(mixed, tiny, tmp_path):
    missing = dataclasses.replace(mixed.sources[0], path="/no/such/file.jsonl")
    gone = dataclasses.replace(mixed, sources=(missing, *mixed.sources[1:]))
    (tmp_path / "run.json").write_text(json.dumps({
        "recipe": gone.to_dict(), "store": "tokens", "tokenizer": str(tiny.tokenizer_dir),
        "fill": {"shard_tokens": 2560}}))
    with stentor.launch.fill_while_training(tmp_path / "run.json", gone, 2560) as failed:
        said = "source web ended with exit code 2: source web: /no/such/file.jsonl is not"
        with pytest.raises(su.FeedStopped, match=said):
            su.GrowingStore(tmp_path / "tokens", gone, 2560, failed=failed)


def test_training_on_a_growing_store_and_going_on(tiny, mixed, tmp_path):
    """Stopped by its deadline and started again: the model of one call on a full store.

    And the waiting time is in the log.
    """
    def quiet(text):
        pass
    recipe = dataclasses.replace(mixed, token_budget=24 * 8 * 64)
    full = fill(recipe, tiny, tmp_path / "tokens", 1280)
    whole = su.train(recipe, full, tmp_path / "a", say=quiet)

    def launch(**more):
        return su.launch(recipe, tmp_path / "b" / "tokens", tiny.tokenizer_dir, tmp_path / "b",
                         fill={"shard_tokens": 1280, "rolling": True}, say=quiet, **more)
    assert launch(deadline_hours=1e-6)["stopped"] == "deadline"
    again = launch()
    # another process, another memory layout: sums may round otherwise (2e-5 was seen); another
    # order of rows gives 1e-3
    assert again["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)
    log = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, log) if row["kind"] == "train"]
    assert all(row["wait_seconds"] >= 0 and set(row["mixture"]) == set(WEB_CODE_MATH)
               for row in rows)
