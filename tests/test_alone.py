"""A notebook with nothing beside it: which model, which tokenizer, and what is said where there is none."""
import json
import os
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import stentor.alone
import stentor.kaggle
import stentor.opening
import stentor.vocabulary
import stentor_utils as su
from stentor import alone

TRAINS = "RECIPE RUN OUTPUTS TOKENIZER TOKEN_BUDGET LEARNING_RATE SEED WEIGHTS DEADLINE_HOURS OVERRIDES"


@pytest.fixture(autouse=True)
def nothing_attached(tmp_path, monkeypatch):
    """An empty input folder, no internet, not on Kaggle, and nothing said before."""
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "input"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "STENTOR_VOCABS"):
        monkeypatch.delenv(name, raising=False)
    stentor.kaggle.internet.cache_clear()
    alone._say_once.cache_clear()
    yield
    stentor.kaggle.internet.cache_clear()


def model(folder, when=None):
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text("{}")
    if when:
        os.utime(folder / "final" / "config.json", (when, when))
    return str(folder / "final")


def opened(tmp_path, *checks, names=TRAINS, how=None, **given):
    usual = {"RECIPE": "stentor2-12m", "RUN": "demo", "OUTPUTS": str(tmp_path / "outputs"), "OVERRIDES": {}}
    namespace = {"PROFILE": "cpu", **{name: usual.get(name) for name in names.split()}, **given}
    spec = su.rules(names, PROFILE=["auto", "t4", "cpu"])
    return su.open_run(namespace, spec, *checks, **(how or {}))


def test_the_model_is_the_runs_own_then_the_newest_attached_then_the_published_one(tmp_path, monkeypatch, capsys):
    run, published = tmp_path / "outputs" / "demo", su.published_model("stentor2-12m-repaired")
    assert published == "hf:StentorLabs/Stentor2-12M" and su.published_model("stentor2-30m") is None
    monkeypatch.setattr(alone, "internet", lambda: True)
    assert [su.find_model(run, published=published) for _ in range(2)] == [published] * 2
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and "StentorLabs/Stentor2-12M, the published model" in said and str(run) in said
    older = model(tmp_path / "input" / "a" / "outputs" / "one", 1e9)
    newer = model(tmp_path / "input" / "b" / "outputs" / "two", 2e9)
    assert su.find_model(run, published=published) == newer
    assert newer in capsys.readouterr().out
    os.utime(Path(older) / "config.json", (3e9, 3e9))
    assert su.find_model(run) == older
    capsys.readouterr()
    own = model(run)
    assert su.find_model(run, published=published) == own and su.find_model(run, "owner/name") == "owner/name"
    assert not capsys.readouterr().out                 # what was meant is not announced


def test_every_form_of_a_recipe_has_the_model_of_its_card():
    for name in su.ALL_RECIPES:
        card = su.card_recipe(name).name
        for form in (name, f"{name}-cpu"):
            assert su.published_model(form) == alone.PUBLISHED_MODELS.get(card), form
    assert su.published_model("stentor3-20m-tuned-qk") == "hf:StentorLabs/Stentor3-20M"


def test_without_any_model_one_sentence_says_what_to_attach(tmp_path, monkeypatch):
    run = tmp_path / "outputs" / "demo"
    with pytest.raises(su.ParameterError, match="run 02_pretrain_t4 for RUN = 'demo' first, or name a model.$"):
        su.find_model(run, published="hf:a/b")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(su.ParameterError) as refused:
        opened(tmp_path, names="RUN OUTPUTS BASE", how={"published": "hf:a/b"})
    sentence, = refused.value.problems
    assert sentence.startswith("BASE: there is no model in") and "Add Input > Your Work" in sentence
    assert "internet on" in sentence and sentence.count(". ") == 0 and not (tmp_path / "outputs").exists()
    monkeypatch.setattr(alone, "internet", lambda: True)
    assert opened(tmp_path, names="RUN OUTPUTS BASE", how={"published": "hf:a/b"}).base_dir == Path("hf:a/b")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """OVERRIDES for a recipe that learns 500 rows from Python's own help texts, quickly."""
    monkeypatch.setattr(alone, "EFFORT", {"cpu": (0.2, 1, 1), "t4": (0.2, 1, 1)})
    with open(tmp_path / "topics.jsonl", "w") as file:
        for name in sorted(topics):
            file.write(json.dumps({"text": topics[name]}) + "\n")
    return {"sources": [{"name": "topics", "path": str(tmp_path / "topics.jsonl")}], "vocab_size": 500, "max_eval_samples": 4}


@pytest.mark.parametrize("recipe, kind", [("stentor2-12m", "build"), ("stentor-12m", "bpe")])
def test_a_run_without_a_tokenizer_gets_one_that_is_kept(recipe, kind, small, tmp_path, capsys):
    run = opened(tmp_path, RECIPE=recipe, OVERRIDES=small)
    own = tmp_path / "outputs" / "demo" / "tokenizer"
    assert run.tokenizer_dir == own and not (tmp_path / "outputs").exists()        # checked, made, nothing written
    assert su.vocabulary_rows(run.tokenizer) == run.recipe.shape.vocab_size == 500
    assert f"there is no {own}; one is built" in capsys.readouterr().out
    run.keep_tokenizer()
    report = json.loads((own / "report.json").read_text())
    assert (report["vocabulary"], report["vocab_size"]) == (kind, 500)
    again = opened(tmp_path, RECIPE=recipe, OVERRIDES=small)
    assert su.tokenizer_sha256(again.tokenizer) == su.tokenizer_sha256(run.tokenizer) and again.report is None
    other = opened(tmp_path, RECIPE=recipe, OVERRIDES=small, RUN="other")           # as one that 01 made for this recipe
    assert su.tokenizer_sha256(other.tokenizer) == su.tokenizer_sha256(run.tokenizer)
    text = "The with statement is used to wrap the execution of a block."
    assert run.tokenizer.decode(run.tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_a_tokenizer_is_built_as_01_does_it_and_not_from_held_out_text(small, monkeypatch):
    learnt = []

    def build(texts, size, **how):
        learnt.append((texts, size, how))
        return stentor.vocabulary.build_vocabulary(texts, size, **how)
    monkeypatch.setattr(alone, "build_vocabulary", build)
    recipe = su.find_recipe("stentor2-12m", "cpu", small)
    tokenizer, report = su.build_tokenizer(recipe)
    (texts, size, how), = learnt
    held_out = su.read_source(recipe.sources[0], 4, 0, 42)[0]
    assert size == 498 and len(held_out) == 4 and not set(held_out) & set(texts)
    assert report["training_documents"] == len(texts) >= 10 and how["seconds"] == 1
    assert 0.2e6 <= report["training_characters"] < 0.6e6


def test_nothing_is_built_before_all_is_right(small, tmp_path, monkeypatch):
    monkeypatch.setattr(stentor.opening, "build_tokenizer", lambda *_: pytest.fail("built"))

    def wrong(profile):
        yield "something else is wrong."
    with pytest.raises(su.ParameterError, match="something else is wrong"):
        opened(tmp_path, wrong, OVERRIDES=small)
    with pytest.raises(su.ParameterError, match="SEED = -1"):
        opened(tmp_path, OVERRIDES=small, SEED=-1)


def test_a_released_vocabulary_is_fetched_or_one_is_built_where_the_text_is_here(small, tiny, tmp_path, monkeypatch, capsys):
    with pytest.raises(su.ParameterError, match="switch internet on"):              # text and vocabulary are both far away
        opened(tmp_path, PROFILE="t4")
    here = {key: value for key, value in small.items() if key != "vocab_size"}
    here |= {"vocab_size": 500, "source_token_budget": 100_000}
    run = opened(tmp_path, PROFILE="t4", OVERRIDES=here)
    assert run.report["vocabulary"] == "build" and "one is built" in capsys.readouterr().out
    (tmp_path / "vocabs").mkdir()
    name = su.RECIPES["stentor2-12m"].tokenizer
    (tmp_path / "vocabs" / f"{name}.vocab").write_bytes((tiny.tokenizer_dir / "tokenmonster.vocab").read_bytes())
    monkeypatch.setenv("STENTOR_VOCABS", str(tmp_path / "vocabs"))
    run = opened(tmp_path, PROFILE="t4")
    assert run.report is None and f"taken is {name}" in capsys.readouterr().out
    assert run.tokenizer_dir == tmp_path / "outputs" / "demo" / "tokenizer" and not (tmp_path / "outputs").exists()


def test_internet_switched_off_is_one_sentence_before_any_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(su.ParameterError) as refused:
        opened(tmp_path, PROFILE="t4", TOKENIZER=str(tiny.tokenizer_dir), OVERRIDES={
            "vocab_size": len(tiny.tokenizer), "tokenizer": "build"})
    sentence, = refused.value.problems
    assert "the text (hf:epfml/FineWeb-HQ, hf:StentorLabs/StenCore) comes from the hub" in sentence
    assert "Settings > Internet" in sentence and not (tmp_path / "outputs").exists()
    monkeypatch.setattr(alone, "internet", lambda: True)
    assert su.offline_problem("BLOCKS") is None
    monkeypatch.setattr(alone, "internet", lambda: False)
    assert "BLOCKS comes from the hub" in su.offline_problem("BLOCKS")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert su.offline_problem("BLOCKS") is None         # elsewhere a cache or a mirror may have it


def test_a_disk_without_room_is_said_before_any_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(stentor.kaggle.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**7))
    with pytest.raises(su.ParameterError, match=r"will write .* GB \(token store .*lower source_token_budget") as refused:
        opened(tmp_path, TOKENIZER=str(tiny.tokenizer_dir))
    assert len(refused.value.problems) == 1 and not (tmp_path / "outputs").exists()
    recipe = su.RECIPES["stentor3-20m"]                 # its 8.5 billion tokens fill Kaggle's 20 GB, a rolling store does not
    monkeypatch.setattr(stentor.kaggle.shutil, "disk_usage", lambda path: SimpleNamespace(free=15 * 10**9))
    run = SimpleNamespace(recipe=recipe, dir=tmp_path / "demo", profile="tpu")
    for rolling, fits in ((None, True), (True, True), (False, False)):
        assert (stentor.opening._surroundings(run, {"ROLLING": rolling}) == []) is fits


def test_charts_need_no_run_but_a_misspelt_one_is_refused(tmp_path, capsys):
    reads, given = su.rules("OUTPUTS", RUN=su.run_names), {"OUTPUTS": str(tmp_path), "RUN": "demo"}
    run = su.open_run(dict(given), reads, makes=None, without_runs=given["RUN"])
    assert (run.names, run.dirs) == ([], []) and "what is published is taken alone" in capsys.readouterr().out
    (tmp_path / "published" / "charts").mkdir(parents=True)                         # as 06 leaves it
    assert su.open_run(dict(given), reads, makes=None, without_runs=given["RUN"]).names == []
    with pytest.raises(su.ParameterError, match="is not in"):
        su.open_run(dict(given), reads, makes=None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("")
    with pytest.raises(su.ParameterError, match="which holds other"):
        su.open_run(dict(given), reads, makes=None, without_runs=given["RUN"])


def test_the_image_is_held_as_it_is():
    held = dict(line.split("==") for line in alone._image())
    assert held["torch"].split("+")[0] == su.environment()["packages"]["torch"].split("+")[0] and len(held) > 30


def test_the_addresses_are_those_of_recipes_and_their_tokenizers():
    assert set(alone.PUBLISHED_MODELS) <= set(su.RECIPES)
    for name, address in alone.PUBLISHED_MODELS.items():
        if su.RECIPES[name].tokenizer.startswith("hf:") and not name.endswith("-instruct"):
            assert su.RECIPES[name].tokenizer == address
