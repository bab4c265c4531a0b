"""Parameters before any work: rules for values and items, run names, folders, secrets, the session's clock, the tokenizer."""
import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO

import stentor.card.facts
import stentor.commands
import stentor.launch
import stentor.notebooks
import stentor.opening
import stentor.parameters
import stentor.publish
import stentor.results
import stentor.secrets
import stentor.session
import stentor.tokenizer
import stentor_utils as su
import torch


def settled(value, rule):
    """What a parameter is after its check; a refusal as text."""
    namespace = {"A": value}
    try:
        su.check_notebook_parameters(namespace, {"A": rule})
    except su.ParameterError as error:
        return str(error)
    return namespace["A"]


@pytest.mark.parametrize("given, becomes", [
    (1e3, 1000), (1.0, 1), (np.float64(8), 8), (np.int32(7), 7), (2**40, 2**40), (1.5, None), (10**400, None),
    pytest.param(10**5000, None, id="5,000 digits"), (math.inf, None), (-math.inf, None), (math.nan, None),
    (True, None), ("1e6", None), (1e300, None), ([1], None), (None, None)])
def test_a_whole_number_is_made_int_or_refused(given, becomes):
    found = settled(given, su.number(1, integer=True))
    assert (type(found), found) == (int, becomes) if becomes else found.startswith("A = ") and len(found) < 400, found
    recipe = dataclasses.replace(su.RECIPES["stentor2-12m"], token_budget=given)
    shape = dataclasses.replace(recipe.shape, hidden_size=given)
    if becomes:
        assert type(recipe.token_budget) is int and type(shape.hidden_size) is int
    else:
        assert [p for p in recipe.problems() if p.startswith("token_budget = ")] and shape.problems()


def test_fractional_steps_cannot_come_back_through_overrides_or_run_json():
    recipe = su.find_recipe("stentor2-12m", "cpu", {"token_budget": 1e6, "num_processes": 1.0, "vocab_size": 4096.0,
                                                    "seed": 1e3, "max_train_steps": 20.0})
    again = su.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict() | {"eval_steps": 5e1, "anneal_weights": [1]})))
    for value in (recipe.total_steps, recipe.schedule_steps, recipe.sequences_to_train, recipe.seed, again.eval_steps,
                  recipe.shape.vocab_size, su.count_parameters(recipe.shape)):
        assert type(value) is int
    assert again.anneal_weights == (1,)
    for broken in ({"shape": 3}, {}, recipe.to_dict() | {"unheard_of": 1}, {"shape": {}}):
        with pytest.raises(su.ParameterError, match="not a recipe that can be read"):
            su.Recipe.from_dict(broken)


def test_a_run_json_with_bad_values_is_refused_in_a_sentence(tiny, tmp_path):
    recipe = tiny.recipe.to_dict() | {"token_budget": 1.5}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "store": str(tiny.store_dir),
                                                   "tokenizer": str(tiny.tokenizer_dir)}))
    with pytest.raises(su.ParameterError, match=r"token_budget = 1\.5 must be a whole number above 0"):
        stentor.launch.train_from_file(tmp_path / "run.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


@pytest.mark.parametrize("override, said", [
    ({"sources": [{"name": "a", "path": "p", "colour": 1}]}, "'colour' is not a field of a source"),
    ({"sources": [{"name": "a"}]}, "has no path"), ({"sources": "local:prose"}, "must be a list of sources"),
    ({"sources": [3]}, "must be a list of sources"), ({"sources": 3}, "must be a list of sources"),
    ({"sources": []}, "sources is empty"),
    ({"sources": [{"name": "a", "path": "p"}] * 2}, "'a' is the name of two sources"),
    ({"sources": [{"name": "../a", "path": "p"}]}, "must be a plain name"),
    ({"sources": [{"name": "a", "path": "p", "weight": "1"}]}, "weights of the sources"),
    ({"anneal_weights": 0.5}, "must be a list of weights"), ({"anneal_weights": ["x"]}, "0 or more, and not all 0"),
    ({"anneal_weights": [0]}, "not all 0"), ({"optimizer": "sgd"}, "must be one of None, paged"), ({3: 4}, "3 is not a field"),
    ({"token_budget": 10**15}, "can plan at most"), ({"hidden_size": 10**400}, "must be a positive whole number"),
    ({"fp32_norms": 1}, "must be True or False"), ({"tokenizer": 5}, "tokenizer = 5 must be text"),
    ({"learning_rate": "8e-4"}, "must be a number above 0")])
def test_items_of_overrides_are_checked(override, said):
    recipe = {"anneal_weights": "stentor3-20m"}.get(next(iter(override)), "stentor2-12m")
    if said == "0 or more, and not all 0":
        override = {"anneal_weights": ["x", 1, 1]}
    if said == "not all 0":
        override = {"anneal_weights": [0, 0, 0]}
    with pytest.raises(su.ParameterError) as error:
        su.find_recipe(recipe, "cpu", override)
    assert said in str(error.value) and len(str(error.value)) < 1000, error.value


@pytest.mark.parametrize("value, rule, becomes", [
    ([0.0, 1], su.items(su.number(0, integer=True)), [0, 1]), ((1, 2), su.items(su.number(0, integer=True)), [1, 2]),
    ([0, 0.0], su.items(su.number(0, integer=True)), "holds 0.0 twice"), ([], su.items(str), "must not be empty"),
    ([True], su.items(su.number(0, integer=True)), "has True in place 1, which must be a whole number"),
    ("abc", su.items(su.string()), "must be a list"), (None, su.items(su.string(), optional=True), None),
    (["", "a", "a"], su.items(su.string(empty=True), repeated=True), ["", "a", "a"]),
    ([None], su.items(su.string(empty=True)), "has None in place 1, which must be text"),
    (["a\0"], su.items(su.string()), "NUL"), (["\ud83d"], su.items(su.string()), "UTF-8"),
    (["card", "x"], su.items(["card", "better"]), "place 2, which must be one of card, better"),
    (True, [0, 1, 2], "must be one of 0, 1, 2"), (1.0, {0, 1, 2}, 1), (1, [None, True, False], "must be one of"),
    (True, (int, type(None)), "must be of type int"), ({"top_k": 5.0}, su.generation_settings, {"top_k": 5}),
    ({"heat": 1}, su.generation_settings, "has 'heat'"), ({"temperature": 0}, su.generation_settings, "at least"),
    ({"max_new_tokens": True}, su.generation_settings, "must be a whole number")])
def test_items_of_lists_are_checked(value, rule, becomes):
    found = settled(value, rule)
    assert becomes in found if isinstance(becomes, str) else (type(found), found) == (type(becomes), becomes), found


@pytest.mark.parametrize("name", ["..", ".", "a/../b", "a/b", "/abs", "demo ", " demo", "demo\n", "", "a\0b", "x" * 101,
                                  "é" * 60, ".hidden", "nul", "CON.txt", "lpt1", "benchmarks", "a.", "-x", 3, None, "é"])
def test_a_run_name_that_is_no_plain_folder_is_refused(name):
    assert su.run_name(name)
    assert not su.run_name("demo-2.seed_42") and not su.run_name("2024") and not su.run_name("nullable")


def test_a_check_of_a_folder_creates_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert su.writable_folder(tmp_path / "a" / "b" / "c") is None and su.writable_folder(tmp_path) is None
    for bad in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("n" * 300), "/proc/nowhere", "a\0b",
                tmp_path / "dangling"):
        assert "is not a folder that can be written to" in su.writable_folder(bad), bad
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("notebook", ["01_tokenizer", "02_pretrain_t4", "03_pretrain_tpu", "06_charts"])
def test_a_refused_notebook_leaves_nothing_behind(notebook, tmp_path):
    wrong = {"01_tokenizer": "SEED=-1", "06_charts": "WATTS=-1"}.get(notebook, "SEED=1.5")
    done = subprocess.run([sys.executable, "-m", "stentor_utils", "run", notebook, "-p", "PROFILE=cpu", "RUN=refused",
                           f"OUTPUTS={tmp_path}", wrong], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and wrong.replace("=", " = ") in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run, said", [("empty", "holds no run"), ("..", "plain name"), ("gone", "is not in")])
def test_charts_are_drawn_of_runs_only(run, said, tmp_path):
    (tmp_path / "empty" / "notebooks").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "metrics.jsonl").write_text("")
    done = subprocess.run([sys.executable, "-m", "stentor_utils", "run", "06_charts", "-p", f"RUN={run}",
                           f"OUTPUTS={tmp_path}"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) < 6, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "metrics.jsonl", "notebooks", "there"]


# --- the session


def test_one_session_clock_for_every_notebook(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert su.session_end(None, "t4") is None and su.hours_left(None) is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    start = stentor.parameters.session_start()
    settled(1, int)                                   # checking again begins no new session
    assert stentor.parameters.session_start() == start
    assert su.session_end(None, "t4") == start + 11.5 * 3600 and su.session_end(None, "tpu") == start + 8.5 * 3600
    assert su.session_end(2, "tpu") == start + 7200
    now = time.monotonic()
    monkeypatch.setattr(stentor.parameters.time, "time", lambda: 0)       # a clock that somebody set back
    left = su.hours_left(now + 3600)
    assert 0.9 < left <= 1 and su.hours_left(now - 3600) > 0
    for path in (REPO / "notebooks").glob("*.ipynb"):
        assert "open_run(globals(), SPEC" in path.read_text() and "session_end(" not in path.read_text(), path


def test_a_training_process_that_starts_late_has_less_time(tiny, tmp_path, monkeypatch):
    """The deadline is an instant, not hours from wherever a process begins: a restarted worker has no new session."""
    monkeypatch.setenv("STENTOR_DEADLINE", str(time.monotonic() - 1))
    (tmp_path / "run.json").write_text(json.dumps({
        "recipe": tiny.recipe.to_dict(), "store": str(tiny.store_dir), "tokenizer": str(tiny.tokenizer_dir),
        "deadline_hours": 10}))
    assert stentor.launch.train_from_file(tmp_path / "run.json")["stopped"] == "deadline"


# --- the tokenizer and its recipe


def test_a_tokenizer_that_does_not_belong_is_refused_or_said(tiny):
    recipe, said = su.RECIPES["stentor2-12m"], []
    with pytest.raises(su.ParameterError) as error:
        su.fit_to_tokenizer(recipe, tiny.tokenizer)
    size = len(tiny.tokenizer)
    other = su.count_parameters(dataclasses.replace(recipe.shape, vocab_size=size))
    for part in (f"{size:,} tokens", "8,064", f"{other:,}", "12,294,400", "PROFILE = 't4'", f"'vocab_size': {size}"):
        assert part in str(error.value), error.value
    on_purpose = su.find_recipe("stentor2-12m", "t4", {"vocab_size": size, "tokenizer": "build"})
    assert su.fit_to_tokenizer(on_purpose, tiny.tokenizer, said.append) == on_purpose and not said
    twin = recipe.scaled_to("cpu")
    assert su.fit_to_tokenizer(twin, tiny.tokenizer, said.append).shape.vocab_size == size
    assert len(said) == 1 and "1,377,408" in said[0]
    bpe = dataclasses.replace(su.RECIPES["stentor-12m"], shape=dataclasses.replace(recipe.shape, vocab_size=size))
    assert "TokenMonster" in stentor.tokenizer.tokenizer_misfit(bpe, tiny.tokenizer)

    class Large:
        eos_token_id = 0

        def get_vocab(self):
            return {"the last": 66_255}
    with pytest.raises(su.ParameterError, match="ids up to 66,255, but a token store keeps 16 bits"):
        su.fit_to_tokenizer(twin, Large(), said.append)


def test_a_run_finds_its_tokenizer(tiny, tmp_path, monkeypatch, capsys):
    """Named; the run's own; another run's that 01 made for this recipe; the released one that the recipe names."""
    recipe = dataclasses.replace(su.RECIPES["stentor3-20m"].scaled_to("cpu"))
    with pytest.raises(su.ParameterError, match=r"run 01_tokenizer first \(RUN = 'tpu', RECIPE = 'stentor3-20m'\)"):
        su.open_tokenizer(None, recipe, tmp_path / "tpu")
    for run, size in (("demo", 4096), ("other", 2048)):
        tiny.tokenizer.save_pretrained(tmp_path / run / "tokenizer")
        (tmp_path / run / "tokenizer" / "report.json").write_text(json.dumps({"vocabulary": "build", "vocab_size": size}))
    where, tokenizer = su.open_tokenizer(None, recipe, tmp_path / "tpu")      # kept there by the notebook, once checked
    assert where == tmp_path / "tpu" / "tokenizer" and not where.exists() and len(tokenizer) == len(tiny.tokenizer)
    assert f"taken is {tmp_path / 'demo' / 'tokenizer'}" in capsys.readouterr().out
    assert su.open_tokenizer(str(tmp_path / "other" / "tokenizer"), recipe, tmp_path / "tpu")[0].endswith("other/tokenizer")
    monkeypatch.delenv("STENTOR_VOCABS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(su.ParameterError, match="switch internet on"):          # the tests are offline
        su.open_tokenizer(None, su.RECIPES["stentor3-50m"], tmp_path / "tpu")
    # a real recipe: the released vocabulary, which is not there yet as a folder
    (tmp_path / "vocabs").mkdir()
    name = su.RECIPES["stentor3-20m"].tokenizer
    (tmp_path / "vocabs" / f"{name}.vocab").write_bytes((tiny.tokenizer_dir / "tokenmonster.vocab").read_bytes())
    monkeypatch.setenv("STENTOR_VOCABS", str(tmp_path / "vocabs"))
    where, tokenizer = su.open_tokenizer(None, su.RECIPES["stentor3-20m"], tmp_path / "tpu")
    assert where == tmp_path / "tpu" / "tokenizer" and not (tmp_path / "tpu").exists()
    assert su.fit_to_tokenizer(su.RECIPES["stentor3-20m"], tokenizer).difference(su.RECIPES["stentor3-20m"]) == []
    su.save_tokenizer(tokenizer, where)
    assert len(su.open_tokenizer(None, su.RECIPES["stentor3-20m"], tmp_path / "tpu")[1]) == 4096
    assert [path.name for path in (tmp_path / "tpu").iterdir()] == ["tokenizer"]


def test_the_cpu_twin_is_said_once(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    stentor.session.say_cpu_twin.cache_clear()
    assert [su.find_profile("auto") for _ in range(2)] == ["cpu", "cpu"]
    shown = capsys.readouterr().out
    assert shown.count("CPU twin") == 1 and "PROFILE = 't4'" in shown and len(shown.splitlines()) == 1
    assert su.find_profile("cpu") == "cpu" and not capsys.readouterr().out


# --- a run is opened


TRAINS = "RECIPE RUN OUTPUTS TOKENIZER TOKEN_BUDGET LEARNING_RATE SEED WEIGHTS DEADLINE_HOURS OVERRIDES"


def opened(tmp_path, *checks, names=TRAINS, makes="", **given):
    """`open_run` of a notebook that trains, with the CPU twin of a recipe and `given`."""
    usual = {"RECIPE": "stentor2-12m", "RUN": "demo", "OUTPUTS": str(tmp_path / "outputs"), "OVERRIDES": {}}
    namespace = {"PROFILE": "cpu", **{name: usual.get(name) for name in names.split()}, **given}
    return su.open_run(namespace, su.rules(names, PROFILE=["auto", "t4", "cpu"]), *checks, makes=makes), namespace


def test_opening_a_run_says_all_that_is_wrong_and_creates_nothing(tiny, tmp_path):
    def seen(LEARNING_RATE, profile):
        yield f"at {LEARNING_RATE} on {profile}."

    def left_out(SEED):
        raise AssertionError("asked of a parameter that is wrong already")
    with pytest.raises(su.ParameterError) as error:
        opened(tmp_path, seen, left_out, OUTPUTS="/proc/nowhere", SEED=-1, TOKENIZER="/no/such", WEIGHTS=[1, 2], TOKENBUDGET=5)
    said = ["TOKENBUDGET is not", "SEED = -1", "OUTPUTS = '/proc/nowhere'", "WEIGHTS has 2 shares", "TOKENIZER = '/no/such'",
            "at None on cpu."]
    assert len(error.value.problems) == len(said), error.value.problems
    assert all(part in problem for part, problem in zip(said, error.value.problems)), error.value.problems
    for wrong, part in (({"RECIPE": "stentor2-12n"}, "did you mean stentor2-12m"), ({"PROFILE": "gpu"}, "PROFILE = 'gpu'"),
                        ({"RUN": "../x"}, "plain name"), ({"OVERRIDES": {"block_sise": 3}}, "did you mean block_size?"),
                        ({"OUTPUTS": 3}, "OUTPUTS = 3 must be text")):
        with pytest.raises(su.ParameterError, match=part) as error:
            opened(tmp_path, TOKENIZER=str(tiny.tokenizer_dir), **wrong)
        assert len(error.value.problems) == 1, error.value.problems
    assert list(tmp_path.iterdir()) == []


def test_an_open_run_has_what_the_notebook_needs(tiny, tmp_path, monkeypatch):
    run, namespace = opened(tmp_path, TOKENIZER=str(tiny.tokenizer_dir), TOKEN_BUDGET=1e6, SEED=7, WEIGHTS=[2],
                            OVERRIDES={"eval_steps": 5}, DEADLINE_HOURS=2)
    assert run.profile == "cpu" and run.dir == tmp_path / "outputs" / "demo" and run.names == ["demo"]
    recipe = run.recipe
    assert (recipe.token_budget, recipe.seed, recipe.eval_steps, recipe.sources[0].weight) == (1_000_000, 7, 5, 2)
    assert recipe.shape.vocab_size == len(tiny.tokenizer) and run.published == su.RECIPES["stentor2-12m"]
    assert type(namespace["TOKEN_BUDGET"]) is int and run.deadline == stentor.parameters.session_start() + 7200
    assert 0 < run.hours_left() <= 2
    run.keep_tokenizer()                              # a folder that was named stays where it is
    assert not run.dir.exists()
    given = {}
    monkeypatch.setattr(stentor.opening, "launch", lambda *where, **how: given.update(how, where=where) or {
        "step": 1200, "steps": 2400, "stopped": "deadline"})
    with pytest.raises(SystemExit, match=r"Stopped at step 1,200 of .* \(deadline\), saved. Run this notebook again to go on"):
        run.train("tokens", num_processes=2)
    assert given["where"] == (recipe, "tokens", str(tiny.tokenizer_dir), run.dir) and given["num_processes"] == 2
    assert 0 < given["deadline_hours"] <= 2


def test_a_notebook_opens_its_run_a_second_time(tiny, tmp_path):
    """With another value, from the check cell on: what the first pass made is no unknown parameter."""
    run, namespace = opened(tmp_path, TOKENIZER=str(tiny.tokenizer_dir))
    namespace |= {"run": run, "recipe": run.recipe, "SEED": 3}
    again = su.open_run(namespace, su.rules(TRAINS, PROFILE=["auto", "t4", "cpu"]))
    assert again.recipe.seed == 3 and again.dir == run.dir


def test_another_recipe_and_other_hardware_are_refused_at_once(tiny, tmp_path, monkeypatch):
    def check_run(recipe, run_dir):
        raise su.CheckpointError(f"{run_dir} holds checkpoints of another run")
    monkeypatch.setattr(stentor.opening, "check_run", check_run)
    with pytest.raises(su.ParameterError, match="demo holds checkpoints of another run"):
        opened(tmp_path, TOKENIZER=str(tiny.tokenizer_dir))
    monkeypatch.setattr(stentor.opening, "find_profile", lambda profile: "tpu")
    with pytest.raises(su.ParameterError, match="'auto' found a TPU: 03_pretrain_tpu is for it; or set PROFILE = 'cpu'"):
        opened(tmp_path, PROFILE="auto")


def test_a_base_model_or_the_runs_to_read_must_be_there(tmp_path):
    with pytest.raises(su.ParameterError, match="BASE: there is no model in .*demo/final; run 02_pretrain_t4 for RUN = 'demo'"):
        opened(tmp_path, names="RUN OUTPUTS BASE")
    assert opened(tmp_path, names="RUN OUTPUTS BASE", BASE="owner/model")[0].base_dir == Path("owner/model")
    outputs = tmp_path / "outputs"
    for name in ("one", "two", "empty"):
        (outputs / name).mkdir(parents=True)
        (outputs / name / "metrics.jsonl").write_text("") if name != "empty" else None
    reads, given = su.rules("OUTPUTS", RUN=su.run_names), {"OUTPUTS": str(outputs)}
    run = su.open_run(given | {"RUN": "one, two"}, reads, makes=None)
    assert run.dirs == [outputs / "one", outputs / "two"] and run.names == ["one", "two"]
    for names, said in (("one,three", "which holds one, two"), ("empty", "holds no run"), ("one,one", "'one' is none"),
                        ("..", "'..' is none"), (3, "must be the name of a run folder")):
        with pytest.raises(su.ParameterError, match=said):
            su.open_run(given | {"RUN": names}, reads, makes=None)


@pytest.mark.parametrize("path", sorted((REPO / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebooks_spec_names_its_parameters_and_no_other(path, monkeypatch):
    specs, needed = [], set()

    def open_run(namespace, spec, *checks, **how):
        specs.append(spec)
        needed.update(*(inspect.signature(check).parameters for check in checks))
    monkeypatch.setattr(su, "open_run", open_run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code" and not specs:
            try:
                exec("".join(cell["source"]), namespace)
            except AttributeError:                    # of the None that the stub gave for the run
                assert specs
    assert specs[0].keys() == stentor.notebooks.notebook_parameters(path).keys()
    assert needed <= specs[0].keys() | vars(stentor.opening.OpenRun()).keys()        # or a check is never asked


# --- the command line


@pytest.mark.parametrize("typed, kind, optional, value", [
    ("0,1", "list[int]", True, [0, 1]), ("0", "list[int]", True, [0]), ("(0, 1)", "list[int]", True, [0, 1]),
    ("None", "list[int]", True, None), ("[1", "list[int]", True, "[1"), ("2024", "str", False, "2024"),
    ("None", "str", False, "None"), ("None", "str", True, None), ("True", "str", True, "True"), ("007", "str", False, "007"),
    ("1e6", "int", True, 1e6), ("1e400", "int", True, "1e400"), ("1" * 5000, "int", True, "1" * 5000), ("", "int", True, ""),
    ("2024", "list[str]", False, ["2024"]), ("Hello, world", "list[str]", False, ["Hello, world"]),
    ("card,better", "list[str]", False, ["card", "better"]), ("true", "bool", True, True), ("yes", "bool", True, "yes"),
    ("{'a': (1, {'b': (2,)})}", "dict", False, {"a": [1, {"b": [2]}]}), ('{"a": null}', "dict", False, {"a": None}),
    ("Don't \"x\" $HOME #1 \\n", "str", True, "Don't \"x\" $HOME #1 \\n")])
def test_a_value_arrives_as_it_was_typed(typed, kind, optional, value):
    found = stentor.notebooks.read_value(typed, kind, optional)
    assert (type(found), found) == (type(value), value)


def test_make_passes_on_what_was_typed(tmp_path):
    """Quotes, $, #, backslashes, line breaks, unbalanced brackets: through make and the shell to the argument list."""
    (tmp_path / "Makefile").write_text((REPO / "Makefile").read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "requirements-cpu.txt").write_text("")
    (tmp_path / ".venv" / ".installed").write_text("")
    stub = tmp_path / ".venv" / "bin" / "python"      # shows its arguments; what receives them is tested above
    stub.write_text(f"#!{sys.executable}\nimport json, os, sys\n"
                    "print(json.dumps([sys.argv[1:], [name for name in os.environ if name in ('SYSTEM', 'TOKEN_BUDGET')]]))\n")
    stub.chmod(0o755)
    given = ["SYSTEM=Don't \"do\" $HOME $(5 ${X $$ # x \\n `a` é🙂 a,b % ;|&", "PROMPTS=['a\nb']", "RUN=007",
             "TOKEN_BUDGET=1e6", "SEEDS=0,1", "OVERRIDES={'a': (1, 2)}"]
    done = subprocess.run(["make", "-s", "run", *given], cwd=tmp_path, capture_output=True, text=True)
    arguments, exported = json.loads(done.stdout)
    assert sorted(arguments[arguments.index("PROFILE=cpu") + 1:]) == sorted(given) and not exported, done.stderr
    done = subprocess.run(["make", "-s", "run-seeds", "SEEDS=7 8", "RUN=x"], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)[0] == ["-m", "stentor_utils", "seeds", "7 8", "-p", "RUN=x"]


@pytest.mark.parametrize("path", sorted((REPO / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_parameter_has_a_type_and_papermill_brings_it_unchanged(path):
    import nbformat
    from papermill.translators import PythonTranslator
    kinds, defaults = stentor.notebooks.parameter_kinds(path), stentor.notebooks.notebook_parameters(path)
    assert kinds.keys() == defaults.keys() and "NoneType" not in kinds.values()
    typed = {"str": "Don't \"$x\" \\ 🙂 007", "int": "1e3", "bool": "true", "float": "0.5", "dict": "{'a': (1,)}"}
    given = {name: stentor.notebooks.read_value(typed.get(kind, "a,b"), kind, False) for name, kind in kinds.items()}
    namespace = {}
    exec(PythonTranslator.codify(given), namespace)
    assert {name: namespace[name] for name in given} == given
    cell = next(c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", []))
    assert {p.name for p in PythonTranslator.inspect(cell)} >= set(kinds) - {"PROMPTS", "GENERATION", "OVERRIDES"}


# --- draws


def make_run(folder, seed, loss, **more):
    recipe = su.RECIPES["stentor2-12m"].scaled_to("cpu")
    folder.mkdir(parents=True)
    recipe = dataclasses.replace(recipe, seed=seed, **more)
    (folder / "run.json").write_text(json.dumps({"recipe": recipe.to_dict(), "tokenizer": "tokenizer"}))
    (folder / "summary.json").write_text(json.dumps({
        "recipe": recipe.name, "eval_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2, "seconds": 9,
        "tokens_per_second": 1.0, "parameters": 3, "tokens": 5}))


def test_results_are_a_spread_over_the_runs_that_differ_in_seed_or_machine_only(tmp_path, capsys):
    make_run(tmp_path / "demo", 42, 3.4)
    stentor.commands.print_summary(tmp_path / "demo")
    shown = capsys.readouterr().out
    assert "1.7000 (one draw)" in shown and "make run-seeds SEEDS=" in shown and "That is one draw" in shown
    make_run(tmp_path / "demo-seed43", 43, 3.0)
    make_run(tmp_path / "other-machine", 42, 3.8, mixed_precision="no", num_processes=1)
    make_run(tmp_path / "a-copy", 42, 3.4)
    make_run(tmp_path / "another-recipe", 44, 1.0, learning_rate=1e-3)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "summary.json").write_text('{"stopped": "deadline"}')
    stentor.commands.print_summary(tmp_path / "demo")
    shown = capsys.readouterr().out
    assert "1.7000 (1.5000 to 1.9000, n = 3)" in shown and "one draw" not in shown
    assert all(part in shown for part in ("seed 42 (demo) 1.7000", "seed 43 (demo-seed43) 1.5000", "(other-machine) 1.9000"))


def test_more_seeds_are_asked_of_an_ended_run_only(tmp_path):
    for given, said in (({"RUN": "none", "OUTPUTS": str(tmp_path)}, "has not ended in"),
                        ({"LEARNING_RATE": "1"}, "is RUN's own"), ({"RUN": "../x"}, "must be a plain name")):
        with pytest.raises(su.ParameterError, match=said):
            stentor.results.run_seeds([42], given)
    for words, said in ((["1,1"], "twice"), (["x"], "whole number"), ([""], "whole number")):
        with pytest.raises(su.ParameterError, match=said):
            stentor.commands.read_seeds(words)
    assert stentor.commands.read_seeds(["42", "43,44", "1e1"]) == [42, 43, 44, 10]
    assert list(tmp_path.iterdir()) == []


# --- runs that are only read


def test_a_run_that_cannot_be_written_to_is_copied_beside(tmp_path, monkeypatch):
    source = tmp_path / "input" / "demo"
    for name in ("run.json", "final/config.json", "final/model.safetensors", "tokens/train.bin"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    assert su.writable_run(source) == source
    monkeypatch.setattr(stentor.session, "writable_folder", lambda path: "is read-only" if Path(path) == source else None)
    monkeypatch.setattr(stentor.session, "find_outputs", lambda outputs: tmp_path / "work" / outputs)
    for file in source.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    said = []
    copy = su.writable_run(source, said.append)
    assert copy.name == "demo" and copy.is_relative_to(tmp_path / "work") and str(copy) in said[0]
    (copy / "final" / "README.md").write_text("a card")
    (copy / "run.json").write_text("changed")
    assert os.access(copy / "final" / "config.json", os.W_OK) and (copy / "final" / "config.json").stat().st_mode & 0o200
    assert (copy / "tokens").is_symlink() and (copy / "tokens" / "train.bin").read_text() == "{}"
    assert (source / "run.json").read_text() == "{}" and not (source / "final" / "README.md").exists()
    assert su.writable_run(source, said.append) == copy and (copy / "final" / "README.md").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert su.run_problem(tmp_path / "gone") == "is not a folder"
    for name in ("notebooks", "tokenizer", "charts"):
        (tmp_path / name).mkdir()
    assert "holds no run" in su.run_problem(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert su.run_problem(tmp_path) is None


# --- secrets: one list for redact, parameters, publishing and lint

PART = "aB3dE5gH7jK9mN1pQ3sT5vW7xY9zA1cD3eF5"          # made up; each stands here in two pieces, or lint would find it
HEX = "0f" * 16
SAMPLES = {
    "Hugging Face": "hf_" + PART[:34], "Hugging Face organisation": "api_org_" + PART[:34],
    "GitHub classic": "ghp_" + PART, "GitHub fine-grained": "github_" + f"pat_11ABCDEFG0{PART}_{PART}",
    "GitHub app": "ghs_" + PART, "GitHub OAuth": "gho_" + PART,
    "GitLab": "glpat-" + PART[:20], "GitLab, routable": "glpat-" + PART + ".01.0z1abcdef",
    "Kaggle": "KGAT_" + HEX, "kaggle.json": '{"username":"me",' + f'"key":"{HEX}"}}',
    "Google API": "AIza" + PART[:35], "Google OAuth": "ya29." + PART,
    "Google service account": json.dumps({"private_key": "-----BEGIN " + f"PRIVATE KEY-----\n{PART}\n-----END "
                                          "PRIVATE KEY-----"}),
    "AWS": "AKIA" + "ABCD2345EFGH6789", "AWS temporary": "ASIA" + "ABCD2345EFGH6789",
    "AWS secret": "aws_secret_access_key" + f" = {PART}abcd",
    "OpenAI": "sk-" + PART, "OpenAI project": "sk-" + f"proj-{PART}_-x",
    "Anthropic": "sk-" + f"ant-api03-{PART}-{PART}",
    "Slack": "xoxb-" + f"123456789012-123-{PART}", "Slack app": "xapp-" + f"1-A0-{PART}",
    "W&B in .netrc": "machine api.wandb.ai\n  login user\n" + f"  password {'0af1' * 10}",
    "W&B": "WANDB_" + f"API_KEY={'0af1' * 10}",
    "PyPI": "pypi-" + f"AgEIcHlwaS5vcmc{PART}", "npm": "npm_" + PART, "Stripe": "sk_" + f"live_{PART[:24]}",
    "JWT": "eyJhbGciOiJIUzI1NiJ9." + f"eyJzdWIiOiIxMjM0NTY3ODkwIn0.{PART}",
    "PEM": "-----BEGIN " + f"RSA PRIVATE KEY-----\n{PART}\n{PART}\n-----END " "RSA PRIVATE KEY-----",
    "PEM, cut": "-----BEGIN " + f"OPENSSH PRIVATE KEY-----\n{PART}\n{PART}", "URL": "https://me:" + f"p@ss{PART}@host/x",
    "signed URL": "https://cdn/x?" + f"X-Amz-Signature={PART}", "header": "Authorization: " + f"Bearer {PART}"}


@pytest.mark.parametrize("kind", SAMPLES)
def test_each_kind_of_secret_is_known_everywhere(kind, tmp_path):
    secret = SAMPLES[kind]
    shown = stentor.secrets.redact(f"before {secret} after")
    assert "[secret]" in shown and PART[:12] not in shown and "0af1" not in shown and "0f0f" not in shown
    assert "ABCD2345" not in shown and shown.startswith("before ")
    assert stentor.secrets.secret_problems(SYSTEM=f"say {secret}")
    assert secret not in str(stentor.secrets.secret_problems(SYSTEM=secret))
    (tmp_path / "text.md").write_text(f"# é🙂\n{secret}\n")
    (tmp_path / "weights.safetensors").write_bytes(b"\xff\xfe\x00" + secret.encode() + b"\x00\xff")
    found = stentor.publish.find_secrets(sorted(tmp_path.iterdir()))
    assert {line.partition(":")[0] for line in found} == {"text.md", "weights.safetensors"} and PART[:12] not in str(found)
    import lint
    assert any("text.md" in line for line in lint.problems(tmp_path))


@pytest.mark.parametrize("text", [
    "hf_hub_download_and_something_long", "ssh://git@github.com/me/x", "task-oriented-dialogue-systems-in-2024-version-two",
    "a sk-learn-like-thing-that-is-long", "https://huggingface.co/a@b", "8401fe609d288129cc684a9b3be6a93e41cfe678",
    "Bearer certificates of deposit", "https://x.y/?token_budget=5&key=1", '"eos_token": "<|endoftext|>"', "http://a:80/x@y"])
def test_what_is_no_secret_is_left(text):
    assert stentor.secrets.redact(text) == text and not stentor.secrets.secret_kinds(text)
    assert not stentor.secrets.secret_problems(A=text)


def test_parameters_in_the_environment_are_no_secrets(monkeypatch):
    monkeypatch.setenv("TOKEN_BUDGET", "10000000")
    monkeypatch.setenv("TOKENIZER", "outputs/demo/tokenizer")
    monkeypatch.setenv("DB_PASSWORD", "correct horse battery")
    assert not stentor.secrets.secret_problems(TOKEN_BUDGET=10_000_000, TOKENIZER="outputs/demo/tokenizer")
    assert stentor.secrets.redact("it is correct horse battery") == "it is [secret]"


@pytest.mark.parametrize("text", ["a 🙂: 'x' \"y\" # z", "\x07bell", "line\nbreak\r\x85\u2028", "null",
                                  "1e3", "- a: b", "\\", "---", ""])
def test_any_text_in_a_cards_front_matter_is_read_back(text):
    from huggingface_hub import ModelCard
    card = f"---\nlicense: mit\nmodel_name: {stentor.card.facts.yaml_text(text)}\n---\n# x\n"
    assert ModelCard(card).data.to_dict()["model_name"] == text
