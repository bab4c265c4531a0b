"""Text cleaning, sources, and the token store.

Nothing lost, nothing twice, the order a pure function of the step.
"""
import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

import stentor.preparing
import stentor.tokenizer
import stentor_utils as su


def test_clean_text_as_the_cards_define_it():
    raw = "  \ufb01rst  line\r\n\r\n\tsecond\u00a0line\x0c\n  x\u00b2 \uff21 "
    assert su.clean_text(raw) == "first line second line x2 A"
    assert su.clean_text("def f():   \r\n    return 1\r\n\n\n", True) == "def f():\n    return 1"

    def card(text):                                   # the card's own lines
        import unicodedata
        text = unicodedata.normalize("NFKC", text)
        text = " ".join([line.strip() for line in text.splitlines() if line.strip()])
        return " ".join(text.split())
    samples = ["a\x1cb", "a\x85b\u2028c", " \u3000 ", "", "x\x0b\x0cy", "tab\there", raw]
    assert [su.clean_text(s) for s in samples] == [card(s) for s in samples]


def read(store_dir, name, manifest):
    shards = manifest["sources"][name]["shards"]
    return np.concatenate([np.fromfile(store_dir / shard["file"], "<u2") for shard in shards])


def test_store_holds_every_training_document_once_in_order(tiny):
    manifest = json.loads((tiny.store_dir / "manifest.json").read_text())
    entry = manifest["sources"]["topics"]
    texts = [su.clean_text(value) for value, _ in su.documents(tiny.source)]
    texts = [text for text in texts if text]
    eos = tiny.tokenizer.eos_token_id

    def ids(texts):
        alone = [tiny.tokenizer.encode_batch([text])[0].tolist() for text in texts]
        return [i for document in alone for i in [*document, eos]]
    trained = texts[4:4 + entry["documents"]]
    assert read(tiny.store_dir, "topics", manifest).tolist() == ids(trained)
    assert entry["bytes"] == sum(len(text.encode()) for text in trained)
    held_out, size = su.TokenStore(tiny.store_dir, tiny.recipe).validation()
    assert held_out.tolist() == [eos, *ids(texts[:4])]
    assert size == sum(len(text.encode()) for text in texts[:4])


def test_an_interrupted_store_goes_on_to_the_same_bytes(tiny, tmp_path):
    """Stop after the first, second, ... shard, then go on: the shards must be those of one call."""
    class Stop(Exception):
        pass

    def prepare(folder):
        return su.prepare_tokens([tiny.source], tiny.tokenizer, folder, validation_documents=4,
                                 tokens_per_source={"topics": 90_000}, shard_tokens=9_000)
    whole = prepare(tmp_path / "whole")
    original, resumed = su.write_atomically, tmp_path / "resumed"
    for allowed in (1, 5, 6, 8, 7, 30):               # writes until the "kill", around manifests
        left = [allowed]

        def dying(path, data, left=left):
            if left[0] == 0:
                raise Stop
            left[0] -= 1
            original(path, data)
        stentor.preparing.write_atomically = dying
        try:
            with pytest.raises(Stop):
                prepare(resumed)
        finally:
            stentor.preparing.write_atomically = original
    prepare(resumed)
    a, b = (json.loads((folder / "manifest.json").read_text()) for folder in (whole, resumed))
    assert a["sources"]["topics"]["validation"] == b["sources"]["topics"]["validation"]
    assert a["sources"] == b["sources"] and a["sources"]["topics"]["tokens"] > 90_000
    assert np.array_equal(read(whole, "topics", a), read(resumed, "topics", b))


def test_bad_documents_are_counted_and_skipped(tiny, tmp_path):
    rows = [{"text": "fine document number one"}, {"text": None}, {"text": 7}, {"text": "  \n "},
            {"text": "x" * 3000}, {}, {"text": "lone \ud800 surrogate"},
            {"text": "another fine document"}, *({"text": f"good {i}"} for i in range(9))]
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, "{broken")
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    source = su.Source("bad", str(tmp_path / "bad.jsonl"))
    su.prepare_tokens([source], tiny.tokenizer, tmp_path / "store", tokens_per_source={"bad": 1000},
                      validation_documents=1, longest_document=1000)
    entry = json.loads((tmp_path / "store" / "manifest.json").read_text())["sources"]["bad"]
    assert entry["skipped"] == {"null": 3, "not a string": 1, "empty": 1,
                                "longer than 1,000 characters": 1, "invalid UTF-8": 1}
    assert entry["documents"] == 10


def test_a_store_of_another_tokenizer_is_refused(tiny, tmp_path):
    import tokenmonster_hf as tm
    other = tm.TokenMonsterTokenizer.from_vocabulary(
        tm.Vocabulary.from_tokens([b" the"], capcode=0, include="all256"))
    with pytest.raises(su.ParameterError, match="another tokenizer_sha256"):
        su.prepare_tokens([tiny.source], other, tiny.store_dir, tokens_per_source={"topics": 1},
                          validation_documents=4, shard_tokens=20_000)


def wide_tokenizer(kind, highest):
    """A tokenizer with a hole in its ids: its tokens a and b have the two highest."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import tokenmonster_hf as tm
    if kind == "ours":
        vocabulary = tm.Vocabulary.from_tokens([], include="ascii")
        entries = vocabulary._entries()
        entries[b"a"][0], entries[b"b"][0] = highest - 1, highest
        rebuilt = vocabulary._rebuild(entries, [])
        return tm.TokenMonsterTokenizer(vocabulary=rebuilt, pad_to_multiple=1)
    ids = {"</s>": 0, "[UNK]": 1, "a": highest - 1, "b": highest}
    fast = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")


@pytest.mark.parametrize("kind", ["ours", "fast"])
@pytest.mark.parametrize("highest", [66_255, 65_530])
def test_no_id_is_narrowed(kind, highest, tmp_path):
    tokenizer = wide_tokenizer(kind, highest)
    ids, offsets = su.encode_documents(tokenizer, ["ab", "b"])
    assert ids.tolist() == [highest - 1, highest, highest] and offsets.tolist() == [0, 2, 3]
    path, store, folder = tmp_path / "ab.jsonl", tmp_path / "tokens", tmp_path / "tokenizer"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abab", "ba" * 500)))
    source = su.Source("ab", str(path))
    arguments = dict(tokens_per_source={"ab": 900}, validation_documents=1, shard_tokens=2000)
    tokenizer.save_pretrained(folder)
    rows = highest + (3 if kind == "ours" else 1)      # ours has EOS and BOS behind the vocabulary
    assert su.vocabulary_rows(tokenizer) == rows
    if highest < 1 << 16:
        assert su.tokenizer_problem(folder) is None
        su.prepare_tokens([source], tokenizer, store, **arguments)
        assert set(np.fromfile(store / "ab" / "train-00000.bin", "<u2").tolist()) == {
            highest - 1, highest, tokenizer.eos_token_id}
        assert json.loads((store / "manifest.json").read_text())["vocab_size"] == rows
        return
    said = f"ids up to {rows - 1:,}, but a token store keeps 16 bits"
    with pytest.raises(su.ParameterError, match=said) as refused:
        su.prepare_tokens([source], tokenizer, store, **arguments)
    assert len(refused.value.problems) == 1 and not store.exists()
    assert f"ids up to {rows - 1:,}" in su.tokenizer_problem(folder)


def test_a_store_knows_the_eos_it_was_made_with(tiny):
    other = su.load_tokenizer(tiny.tokenizer_dir)
    other.eos_token = "<|extra_1|>"                    # the same vocabulary, so the same hash
    with pytest.raises(su.ParameterError, match="another eos_token_id"):
        su.prepare_tokens([tiny.source], other, tiny.store_dir, shard_tokens=20_000,
                          tokens_per_source={"topics": 60_000}, validation_documents=4)
    with pytest.raises(su.ParameterError, match="end in the id"):
        su.train(tiny.recipe, su.TokenStore(tiny.store_dir, tiny.recipe), tiny.folder / "other-eos",
                 tokenizer=other)
    no_end = wide_tokenizer("fast", 100)
    no_end.eos_token = None
    assert "no EOS" in stentor.tokenizer.store_problems(no_end)[0]


@pytest.mark.parametrize("text", [
    "{", "[]", '{"model": {"vocab": 3}}', '{"added_tokens": [{"content": "a"}]}', "{}"])
def test_a_damaged_tokenizer_folder_is_said_so(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    assert "is damaged" in su.tokenizer_problem(tmp_path)


def test_as_many_sources_as_one_likes(tiny):
    sources = tuple(su.Source(f"s{i}", "x.txt") for i in range(300))
    recipe = dataclasses.replace(tiny.recipe, sources=sources, token_budget=10**6)
    assert set(su.plan_sources(recipe)) == set(range(300))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet", ".txt"])
def test_sources_read_from_any_row(tmp_path, ending):
    texts = [f"document {i}\nwith lines" for i in range(25)]
    path = tmp_path / f"docs{ending}"
    if ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.table({"text": texts, "other": list(range(25))}), path, row_group_size=7)
    elif ending == ".txt":
        path.write_text("\n<|doc|>\n".join(texts))
    else:
        import gzip
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(data) if ending == ".jsonl.gz" else data)
    source = su.Source("docs", str(path))
    rows = list(su.documents(source))
    assert [text for text, _ in rows] == texts
    for i in (0, 6, 7, 20, 24):
        assert [text for text, _ in su.documents(source, rows[i][1])] == texts[i + 1:]


def test_batches_are_a_pure_function_of_the_step(tiny):
    store, again = (su.TokenStore(tiny.store_dir, tiny.recipe) for _ in range(2))
    forward = [store.batch(step)["input_ids"] for step in range(tiny.recipe.total_steps)]
    for step in reversed(range(tiny.recipe.total_steps)):
        assert (again.batch(step)["input_ids"] == forward[step]).all()
    other = dataclasses.replace(tiny.recipe, per_device_train_batch_size=2,
                                gradient_accumulation_steps=2, num_processes=2)
    assert (su.TokenStore(tiny.store_dir, other).batch(3)["input_ids"] == forward[3]).all()
    reseeded = su.TokenStore(tiny.store_dir, dataclasses.replace(tiny.recipe, seed=7))
    assert (reseeded.batch(3)["input_ids"] != forward[3]).any()


def test_each_epoch_sees_every_block_once(tiny):
    store = su.TokenStore(tiny.store_dir, dataclasses.replace(tiny.recipe, token_budget=300_000))
    blocks = store.blocks["topics"]
    orders = [Counter(int(store._order("topics", epoch)[i]) for i in range(blocks))
              for epoch in range(2)]
    assert all(order == Counter(range(blocks)) for order in orders)
    assert not np.array_equal(store._order("topics", 0), store._order("topics", 1))
    size = store.recipe.total_batch_size
    assert store.epoch(100) == 100 * size / blocks > 0.1


def test_mixture_and_anneal_follow_the_weights(tiny, tmp_path):
    sources = tuple(dataclasses.replace(tiny.source, name=name, weight=weight)
                    for name, weight in (("web", 0.75), ("code", 0.15), ("math", 0.10)))
    recipe = dataclasses.replace(tiny.recipe, sources=sources, anneal_weights=(0.5, 0.3, 0.2),
                                 token_budget=64 * 20_000)
    su.prepare_tokens(sources, tiny.tokenizer, tmp_path / "s", validation_documents=2,
                      tokens_per_source=dict.fromkeys(("web", "code", "math"), 9_000))
    store = su.TokenStore(tmp_path / "s", recipe)
    n = len(store.row_source)
    late = int(n * 0.85)
    for part, weights in ((slice(late), (0.75, 0.15, 0.10)), (slice(late, n), (0.5, 0.3, 0.2))):
        realised = np.bincount(store.row_source[part], minlength=3) / len(store.row_source[part])
        assert np.abs(realised - weights).max() < 0.005, realised
    assert sum(store.mixture(0).values()) == pytest.approx(1)


@pytest.mark.parametrize("kind, least", [("prose", 5e6), ("math", 2e6)])
def test_embedded_corpus_is_real_unique_and_ordered(kind, least):
    texts = [json.loads(line)["text"] for line in open(su.local_corpus(kind))]
    assert sum(map(len, texts)) > least and len(set(texts)) == len(texts)
    assert su.local_corpus(kind) == su.local_corpus(kind)
    if kind == "prose":
        paragraphs = [p.lower() for text in texts for p in text.split("\n\n")]
        assert len(set(paragraphs)) == len(paragraphs)    # none was both trained on and validated
        assert " the " in " ".join(texts[:50])


def test_unknown_sources_are_refused():
    for path, part in (("local:poetry", "not an embedded corpus"),
                       ("no/such/folder", "is not a .jsonl")):
        with pytest.raises(su.ParameterError, match=part):
            list(su.documents(su.Source("x", path)))
