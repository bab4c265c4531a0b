"""Stages, one after the other: the card's figures held against each other, its chunks, and what each stage forgets."""
import dataclasses
import json

import numpy as np
import pytest
import stentor_utils as su
import torch

BIG = su.CURRICULA["stentor-big"]


def test_the_cards_accounting_does_not_agree_with_itself():
    """Tokens printed against steps x batch x 512: neither reading of the batch mends it (spec, section 1)."""
    rows = su.curriculum.accounting(BIG)
    assert [row["tokens"] for row in rows] == [279_000_000, 1_030_000_000, 1_020_000_000]
    assert [row["steps_for_tokens"] for row in rows] == [4_257, 15_717, 10_376]
    assert [round(row["steps_x_batch"] / 1e6, 1) for row in rows] == [622.6, 426.0, 704.9]
    assert [round(row["per_gpu"] / 1e6) for row in rows] == [623, 852, 1_410]
    total = sum(row["tokens"] for row in rows)
    assert round(total / 1e9, 2) == 2.33 and round(100 * total / BIG[0].published["optimal_tokens"]) == 81
    assert su.curriculum.parameters_apart(BIG[0]) == 1_536 and su.count_parameters(BIG[0].shape) == 142_637_568


def test_stentor_big_has_what_its_card_says_and_nothing_of_another_card():
    for recipe, rate, batch, tokens in zip(BIG, (2e-4, 2e-4, 1.5e-4), (128, 128, 192), (279, 1_030, 1_020)):
        assert (recipe.learning_rate, recipe.total_batch_size, recipe.token_budget) == (rate, batch, tokens * 1_000_000)
        assert (recipe.weight_decay, recipe.max_grad_norm, recipe.warmup_ratio, recipe.lr_scheduler_type) == (
            0.01, 1.0, 0.05, "cosine")
        assert recipe.mixed_precision == "bf16" and recipe.gradient_checkpointing and recipe.chunk_eos
        assert (recipe.block_size, recipe.stride) == (512, 511)
        # not in the card: torch's own AdamW, and none of the other cards' precision techniques
        assert (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_epsilon) == (0.9, 0.999, 1e-8)
        assert not (recipe.fp32_norms or recipe.fp32_critical_layers or recipe.fp32_softmax or recipe.int8_qat)
        assert {"adam_beta1", "adam_beta2", "sources.config"} <= set(recipe.unpublished)
        assert "block_size" not in recipe.unpublished and recipe.problems() == []
        assert su.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert su.larger_shape(su.RECIPES["stentor-30m"].shape) == BIG[0].shape
    assert su.RECIPES["stentor-big"] is BIG[0]


def test_each_sequence_is_the_next_tokens_of_the_text_and_an_eos(tiny):
    """chunk_eos: block_size - 1 tokens; the sequences of an epoch are the store, nothing twice, nothing left out."""
    packed = su.TokenStore(tiny.store_dir, tiny.recipe)
    recipe = dataclasses.replace(tiny.recipe, chunk_eos=True)
    store = su.TokenStore(tiny.store_dir, recipe)
    assert store.blocks["topics"] == packed.starts["topics"][-1] // 63
    steps = -(-store.blocks["topics"] // recipe.total_batch_size)
    store = su.TokenStore(tiny.store_dir, dataclasses.replace(recipe, token_budget=steps * recipe.tokens_per_step))
    rows = torch.cat([store.batch(step)["input_ids"] for step in range(steps)])[:store.blocks["topics"]]
    assert rows.shape[1] == 64 and (rows[:, -1] == tiny.tokenizer.eos_token_id).all()
    whole = np.concatenate([np.fromfile(path, "<u2") for path in store.shards["topics"]]).astype(np.int64)
    chunks = whole[:63 * store.blocks["topics"]].reshape(-1, 63)
    assert sorted(map(tuple, rows[:, :-1].tolist())) == sorted(map(tuple, chunks.tolist()))
    assert su.Recipe(**{**recipe.__dict__, "block_size": 1}).problems() == [
        "block_size = 1 has no room for text beside the EOS of chunk_eos = True."]


def test_a_growing_store_chunks_as_a_full_one_does(tiny, tmp_path):
    recipe = dataclasses.replace(tiny.recipe, chunk_eos=True)
    from stentor.growing import fill_source
    fill_source(recipe, tiny.tokenizer, tmp_path, "topics", shard_tokens=6400)
    store = su.GrowingStore(tmp_path, recipe, 6400)
    rows = torch.cat([store.batch(step)["input_ids"] for step in range(12)])      # 96 of the 101 of the first shard
    first = np.fromfile(tmp_path / "topics" / "topics" / "train-00000.bin", "<u2").astype(np.int64)
    chunks = set(map(tuple, first[:63 * 101].reshape(-1, 63).tolist()))
    assert (rows[:, -1] == tiny.tokenizer.eos_token_id).all() and len(rows) == 96
    assert len(set(map(tuple, rows[:, :-1].tolist())) & chunks) == 96


def test_the_small_twin_keeps_the_cards_proportions(tmp_path):
    shape = su.Shape(500, 32, 64, 3, 2, 2, 64)
    stages = su.curriculum.local_stages(BIG, shape, tokens=232_900, rate=2e-3)
    assert [recipe.sources[0].path for recipe in stages] == ["local:prose", "local:code", "local:math"]
    assert [recipe.token_budget for recipe in stages] == [27_900, 103_000, 102_000]
    assert [recipe.learning_rate for recipe in stages] == pytest.approx([2e-3, 2e-3, 1.5e-3])
    assert [recipe.total_batch_size for recipe in stages] == [8, 8, 12]
    assert all(recipe.chunk_eos and recipe.shape == shape and recipe.problems() == [] for recipe in stages)
    assert su.curriculum.local_stages(BIG, shape, tokens=1000, textbooks=tmp_path)[2].sources[1].path == str(tmp_path)


@pytest.fixture(scope="module")
def three_stages(tiny, tmp_path_factory):
    """Three stages on three texts, each in a process of its own: (folder, stages, summaries, the small model)."""
    from pydoc_data.topics import topics
    folder, words = tmp_path_factory.mktemp("growth"), sorted(topics)
    parts = {"one": [topics[name] for name in words[:25]], "two": [topics[name].upper() for name in words[25:50]],
             "three": [topics[name][::-1] for name in words[50:]]}
    stages = []
    for name, texts in parts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        stages.append(dataclasses.replace(
            tiny.recipe, name=name, sources=(su.Source(name, str(path)),), chunk_eos=True, learning_rate=4e-3,
            token_budget=12 * 8 * 64, eval_steps=6, best_eval_steps=6,
            shape=su.Shape(len(tiny.tokenizer), 64, 96, 3, 4, 4, 64)))
    small = su.build_model(su.Shape(len(tiny.tokenizer), 32, 48, 2, 2, 2, 64), eos_token_id=tiny.tokenizer.eos_token_id)
    grown = su.grow_model(small, stages[0].shape)
    stages = [dataclasses.replace(stage, shape=su.shape_of(grown)) for stage in stages]
    su.save_model_folder(grown, tiny.tokenizer, folder / "grown")
    su.curriculum.prepare_stages(stages, tiny.tokenizer, folder)
    summaries = su.curriculum.run_stages(stages, folder / "grown", tiny.tokenizer_dir, folder, say=lambda text: None)
    su.curriculum.write_curriculum(folder, stages, summaries)
    return folder, stages, summaries, small


def test_every_stage_goes_on_from_the_one_before_and_measures_every_text(three_stages, tiny):
    folder, stages, summaries, small = three_stages
    rows = su.curriculum.forgetting(folder, 3)
    assert [row["after"] for row in rows] == [0, 1, 2, 3] and all(len(row) == 4 for row in rows)
    logs = [[row for row in su.charts.read_metrics(folder / f"stage{n}" / "metrics.jsonl") if row["kind"] == "eval"]
            for n in (1, 2, 3)]
    for before, after in zip(logs, logs[1:]):         # a stage begins as good as the one before ended
        for text in before[-1]["texts"]:
            assert after[0]["texts"][text]["loss"] == pytest.approx(before[-1]["texts"][text]["loss"], rel=1e-5)
    for number, row in enumerate(rows[1:], 1):        # and learns its own text
        assert row[f"text of stage {number}"] < rows[number - 1][f"text of stage {number}"] - 0.05
    own = logs[1][-1]
    assert own["texts"]["text of stage 2"]["loss"] == pytest.approx(own["loss"], rel=1e-9)
    written = json.loads((folder / "curriculum.json").read_text())
    assert written["bits_per_byte"] == rows and [s["tokens"] for s in written["summaries"]] == [12 * 8 * 64] * 3


def test_the_first_stage_begins_with_the_function_of_the_small_model(three_stages, tiny):
    folder, stages, _, small = three_stages
    first = json.loads((folder / "stage1" / "metrics.jsonl").read_text().splitlines()[0])
    store = su.TokenStore(folder / "stage1" / "tokens", stages[0])
    found = su.evaluate(small, *store.validation(), block_size=64, batch_size=8)
    assert first["step"] == 0 and first["loss"] == pytest.approx(found["loss"], rel=1e-5)
    run = json.loads((folder / "stage2" / "run.json").read_text())
    assert run["start"] == "../stage1/final" and set(run["texts"]) == {f"text of stage {n}" for n in (1, 2, 3)}


def test_no_stage_trains_on_what_another_holds_out(tiny, tmp_path):
    """Each stage's text has what the other holds out behind its own held-out documents; the stages hold out 6 and 2."""
    from pydoc_data.topics import topics
    texts = [topics[name] for name in sorted(topics)[:20]]
    order = {"one": texts, "two": texts[10:] + texts[:10]}
    stages = []
    for (name, documents), held_out in zip(order.items(), (6, 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        stages.append(dataclasses.replace(tiny.recipe, name=name, sources=(su.Source(name, str(tmp_path / f"{name}.jsonl")),),
                                          max_eval_samples=held_out, token_budget=200_000))
    stores = su.curriculum.prepare_stages(stages, tiny.tokenizer, tmp_path, progress=lambda text: None)
    held, trained = {}, {}
    for name, folder in zip(order, stores):
        manifest = json.loads((folder / "manifest.json").read_text())
        entry, eos = manifest["sources"][name], manifest["eos_token_id"]

        def documents_of(files):
            ids = np.concatenate([np.fromfile(folder / file["file"], "<u2") for file in files])
            return {part.tobytes() for part in np.split(ids, np.flatnonzero(ids == eos) + 1) if len(part) > 1}
        held[name], trained[name] = documents_of([entry["validation"]]), documents_of(entry["shards"])
    assert (len(held["one"]), len(held["two"])) == (6, 2)
    for mine in trained.values():                     # all the rest, and nothing that is held out
        assert len(mine) == 20 - 8 and not mine & (held["one"] | held["two"])


def test_stages_of_another_curriculum_are_refused_before_any_is_begun(three_stages, tiny):
    folder, stages, *_ = three_stages
    said, before = [], (folder / "stage3" / "final" / "model.safetensors").read_bytes()
    other = [stages[0], dataclasses.replace(stages[1], learning_rate=1e-3), stages[2]]
    with pytest.raises(su.CheckpointError, match="learning_rate"):
        su.curriculum.run_stages(other, folder / "grown", tiny.tokenizer_dir, folder, say=said.append)
    assert not said and (folder / "stage3" / "final" / "model.safetensors").read_bytes() == before


def test_a_start_goes_with_neither_xla_nor_a_growing_store(tiny, tmp_path):
    for more in ({"xla": "CPU"}, {"fill": {"shard_tokens": 640}}):
        with pytest.raises(su.ParameterError, match="neither xla nor fill"):
            su.launch(tiny.recipe, tiny.store_dir, tiny.tokenizer_dir, tmp_path / "run", start=tmp_path, **more)
    assert not (tmp_path / "run").exists()
