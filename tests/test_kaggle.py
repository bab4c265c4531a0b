"""Kaggle: what is attached is found and taken over, and the built notebooks run where nothing else is."""
import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import stentor.bundle
import stentor.kaggle
import stentor.stopping
import stentor.train
import stentor_utils as su
from conftest import REPO
from stentor import bundle, kaggle

NAMES = sorted(path.stem for path in (REPO / "notebooks").glob("*.ipynb"))


# A run that goes on in a second session.

def train(tiny, recipe, run_dir, stop_at=None, monkeypatch=None):
    """The run of `recipe`, its tokenizer and store inside it as 02 has them; stopped by its deadline after a step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for source, name in ((tiny.tokenizer_dir, "tokenizer"), (tiny.store_dir, "tokens")):
        if not (run_dir / name).exists():
            shutil.copytree(source, run_dir / name)
    if stop_at:
        step, steps_done = stentor.train.Run.one_step, []
        monkeypatch.setattr(stentor.train.Run, "one_step", lambda run: steps_done.append(run) or step(run))
        monkeypatch.setattr(stentor.stopping.Stopping, "until_deadline",
                            lambda stop: 1e9 if len(steps_done) < stop_at else -1)
    try:
        return su.train(recipe, su.TokenStore(run_dir / "tokens", recipe), run_dir, tokenizer=tiny.tokenizer,
                        deadline_hours=1 if stop_at else None, say=lambda text: None)
    finally:
        if stop_at:
            monkeypatch.undo()


def mount(run_dir, root, layout="old", slug="stentor-02-pretrain-t4"):
    """A finished session's working folder as a read-only input; its address by either of Kaggle's layouts."""
    place = root / slug if layout == "old" else root / "notebooks" / "alice" / slug
    to = place / "outputs" / run_dir.name
    shutil.copytree(run_dir, to)
    for path in [place, *place.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return to


@pytest.fixture(autouse=True)
def writable_again(tmp_path):
    yield
    for path in [tmp_path, *tmp_path.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The recipe; its run left alone; the same run stopped by the deadline after step 13 of 24."""
    recipe = dataclasses.replace(tiny.recipe, save_total_limit=2)
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stopped = train(tiny, recipe, folder / "first" / "demo", 13, monkeypatch)
    assert (stopped["stopped"], stopped["step"]) == ("deadline", 13)
    train(tiny, recipe, folder / "whole" / "demo")
    return SimpleNamespace(recipe=recipe, whole=folder / "whole" / "demo", stopped=folder / "first" / "demo")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")}


@pytest.mark.parametrize("layout", ["old", "new"])
def test_a_stopped_run_goes_on_in_another_session_bit_for_bit(layout, runs, tiny, tmp_path):
    attached = mount(runs.stopped, tmp_path / "input", layout)
    run_dir, said = tmp_path / "working" / "outputs" / "demo", []
    adopted = kaggle.adopt(run_dir, kaggle.find_inputs(tmp_path / "input"), runs.recipe, said.append)
    assert adopted == kaggle.Adopted(attached, False, 13) and "saved at step 13" in said[0]
    assert su.verify_checkpoint(su.checkpoint_folders(run_dir)[-1]) is None
    assert not list(run_dir.glob(".adopting*")) and os.access(run_dir / "metrics.jsonl", os.W_OK)
    summary = train(tiny, runs.recipe, run_dir)
    assert summary["step"] == 24 and not summary["stopped"]
    for name in ("final/model.safetensors", "best/model.safetensors", "checkpoints/step-00000024/model.safetensors",
                 "checkpoints/step-00000024/optimizer.safetensors", "training_curves.csv"):
        assert (run_dir / name).read_bytes() == (runs.whole / name).read_bytes(), name


def test_a_finished_run_is_taken_as_finished(runs, tiny, tmp_path):
    attached = mount(runs.whole, tmp_path / "input")
    run_dir = tmp_path / "outputs" / "other-name"
    adopted = kaggle.adopt(run_dir, [tmp_path / "input"], runs.recipe, print)
    assert adopted == kaggle.Adopted(attached, True, 24) and kaggle.is_finished(run_dir)
    assert files(run_dir / "final") == files(runs.whole / "final")
    trained = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stentor.train.Run, "one_step", lambda run: trained.append(run))
        assert train(tiny, runs.recipe, run_dir)["step"] == 24 and not trained
    bare = mount(runs.whole, tmp_path / "bare")        # without what is large, it is finished all the same
    for name in ("checkpoints", "tokens"):
        bare.chmod(0o755)
        shutil.rmtree(bare / name)
    assert kaggle.adopt(tmp_path / "second" / "demo", [tmp_path / "bare"], None, print).finished


def test_inputs_are_found_in_both_layouts_and_at_any_depth_once(tmp_path, monkeypatch):
    for folder in ("stentor-utils/stentor", "datasets/bob/texts/a/b", "notebooks/alice/stentor-01/outputs/demo/tokenizer",
                   "models/ann/llama/pytorch/1b/1/final"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "stentor-01").symlink_to(tmp_path / "notebooks/alice/stentor-01")      # mounted at both addresses
    (tmp_path / "datasets/bob/texts/a/loop").symlink_to(tmp_path / "datasets/bob/texts")
    (tmp_path / "notebooks/alice/stentor-01/outputs/demo/tokenizer/tokenizer.json").write_text("{}")
    (tmp_path / "models/ann/llama/pytorch/1b/1/final/config.json").write_text("{}")
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path))
    found = {str(path.relative_to(tmp_path)) for path in kaggle.find_inputs()}
    assert found == {"stentor-utils", "datasets/bob/texts", "notebooks/alice/stentor-01", "models/ann/llama"}
    assert {run.name for run in kaggle.find_runs(kaggle.find_inputs())} == {"1", "demo"}
    assert kaggle.newest_run("tokenizer").name == "demo" and kaggle.newest_run("final").name == "1"
    assert kaggle.newest_run(["final", "tokenizer"]) is None
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "nowhere"))
    assert kaggle.find_inputs() == [] and kaggle.newest_run("final") is None
    assert kaggle.adopt(tmp_path / "outputs" / "demo") == kaggle.Adopted(None, False, -1)
    assert not (tmp_path / "outputs").exists()         # nothing to take, nothing made


def test_the_newest_run_is_the_last_written_of_the_recipe(runs, tmp_path):
    old, new = mount(runs.stopped, tmp_path, slug="a"), mount(runs.whole, tmp_path, slug="b")
    for run, when in ((old, 2e9), (new, 1e9)):
        for path in run.rglob("*"):
            os.utime(path, (when, when))
    assert kaggle.newest_run("checkpoints", runs.recipe, [tmp_path]) == old
    assert kaggle.newest_run("final", None, [tmp_path]) == new
    for path in old.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert kaggle.newest_run("checkpoints", None, [tmp_path]) == new      # one time for all: the furthest
    assert kaggle.newest_run("final", dataclasses.replace(runs.recipe, seed=7), [tmp_path]) is None


def test_a_run_of_another_recipe_is_refused_by_name(runs, tmp_path):
    attached = mount(runs.stopped, tmp_path / "input")
    other = dataclasses.replace(runs.recipe, seed=7)
    with pytest.raises(su.CheckpointError, match="seed is 42 in the checkpoint, 7 in this run") as refused:
        kaggle.adopt(tmp_path / "outputs" / "demo", [tmp_path / "input"], other)
    assert str(attached) in str(refused.value) and not (tmp_path / "outputs").exists()
    said = []
    assert not kaggle.adopt(tmp_path / "outputs" / "mine", [tmp_path / "input"], other, said.append).run
    assert len(said) == 1 and str(attached) in said[0] and "seed is 42" in said[0]
    mount(runs.whole, tmp_path / "input", "new")       # beside it one that fits: the other is only named
    assert kaggle.adopt(tmp_path / "outputs" / "demo", [tmp_path / "input"], runs.recipe, said.append).finished


def test_a_tokenizer_made_for_another_recipe_is_named_and_left(runs, tiny, tmp_path):
    run = tmp_path / "work" / "demo"
    shutil.copytree(tiny.tokenizer_dir, run / "tokenizer")
    (run / "tokenizer" / "report.json").write_text(json.dumps({"vocabulary": "english-8000-strict-v1", "vocab_size": 8064}))
    mount(run, tmp_path / "input")
    said = []
    assert not kaggle.adopt(tmp_path / "outputs" / "demo", [tmp_path / "input"], runs.recipe, said.append).run
    assert "its tokenizer is english-8000-strict-v1 of 8064 rows" in said[0]
    made = {"vocabulary": runs.recipe.tokenizer, "vocab_size": runs.recipe.shape.vocab_size}
    (run / "tokenizer" / "report.json").write_text(json.dumps(made))
    mount(run, tmp_path / "right")
    assert kaggle.adopt(tmp_path / "outputs" / "demo", [tmp_path / "right"], runs.recipe, said.append).step == -1
    assert files(tmp_path / "outputs" / "demo") == files(run)


def test_nothing_newer_is_overwritten(runs, tiny, tmp_path):
    mount(runs.stopped, tmp_path / "input")
    run_dir = tmp_path / "outputs" / "demo"
    shutil.copytree(runs.whole, run_dir)
    before, said = files(run_dir), []
    assert not kaggle.adopt(run_dir, [tmp_path / "input"], runs.recipe, said.append).run
    assert files(run_dir) == before and "as far as the attached" in said[0]
    (run_dir / "metrics.jsonl").write_text("mine\n")   # as far: still its own
    mount(runs.whole, tmp_path / "same")
    assert not kaggle.adopt(run_dir, [tmp_path / "same"], runs.recipe, said.append).run
    assert (run_dir / "metrics.jsonl").read_text() == "mine\n"
    shutil.rmtree(run_dir)                             # where only a part is wanted, that part decides
    for _ in range(2):
        done = kaggle.adopt(run_dir, [tmp_path / "same"], None, said.append, leave=("tokens", "checkpoints"))
        assert done.finished and (done.run is None) == (run_dir / "mine").exists()
        (run_dir / "mine").write_text("")
    assert not {"tokens", "checkpoints"} & {path.name for path in run_dir.iterdir()}
    shutil.rmtree(run_dir)                             # another tokenizer here, made in this session
    shutil.copytree(tiny.tokenizer_dir, run_dir / "tokenizer")
    vocabulary = run_dir / "tokenizer" / "tokenmonster.vocab"
    vocabulary.write_bytes(vocabulary.read_bytes() + b"x")
    with pytest.raises(su.CheckpointError, match="another tokenizer"):
        kaggle.adopt(run_dir, [tmp_path / "input"], runs.recipe)
    assert vocabulary.read_bytes().endswith(b"x") and not (run_dir / "tokens").exists()


def test_an_older_state_is_replaced_by_the_whole_of_the_further_run(runs, tmp_path):
    run_dir = tmp_path / "outputs" / "demo"
    shutil.copytree(runs.stopped, run_dir)
    (run_dir / "charts").mkdir()
    (run_dir / "charts" / "mine.png").write_bytes(b"mine")
    mount(runs.whole, tmp_path / "input")
    assert kaggle.adopt(run_dir, [tmp_path / "input"], runs.recipe).finished
    assert (run_dir / "charts" / "mine.png").read_bytes() == b"mine"
    for name in ("metrics.jsonl", "summary.json", "final/model.safetensors"):
        assert (run_dir / name).read_bytes() == (runs.whole / name).read_bytes()


def test_a_damaged_checkpoint_is_left_out_by_name(runs, tmp_path):
    attached, said = mount(runs.stopped, tmp_path / "input"), []
    saved = su.checkpoint_folders(attached)
    assert len(saved) >= 2
    path = saved[-1] / "model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    adopted = kaggle.adopt(tmp_path / "outputs" / "demo", [tmp_path / "input"], runs.recipe, said.append)
    assert adopted.step == int(saved[-2].name[5:]) and f"{saved[-1]} is left out: model.safetensors" in said[0]
    for path in attached.glob("checkpoints/*/optimizer.safetensors"):
        path.chmod(0o644)
        path.write_bytes(b"")
    assert not kaggle.adopt(tmp_path / "second" / "demo", [tmp_path / "input"], runs.recipe, said.append).run


def test_links_in_an_attached_run_are_not_followed(runs, tmp_path):
    run = tmp_path / "work" / "demo"
    shutil.copytree(runs.stopped, run)
    (tmp_path / "token").write_text("private")
    (run / "notes.txt").symlink_to(tmp_path / "token")
    (run / "charts").symlink_to(tmp_path)
    kaggle.adopt(tmp_path / "outputs" / "demo", [tmp_path / "work"], runs.recipe)
    assert not {"notes.txt", "charts"} & {path.name for path in (tmp_path / "outputs" / "demo").iterdir()}


KILLED = """
import json, os, shutil, sys
from pathlib import Path
from stentor import checkpoints, kaggle
from stentor.recipes import Recipe
run_dir, older, attached, recipe = *map(Path, sys.argv[1:4]), Recipe.from_dict(json.loads(sys.argv[4]))

def adopt(calls):
    left = [calls]
    def counted(call):
        def wrapped(*given, **more):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*given, **more)
        return wrapped
    shutil.copyfile, os.replace, os.rename = counted(shutil.copyfile), counted(os.replace), counted(os.rename)
    kaggle.adopt(run_dir, [attached], recipe, lambda text: None)
    os._exit(0)

def in_a_child(calls):
    if not (child := os.fork()):
        try:
            adopt(calls)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name[0] != "."}

wanted, kills, calls, code = files(next(attached.rglob("demo"))), 0, 0, 9
while code == 9:
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(older, run_dir)
    for stop in (calls, calls // 2, calls, 10**6):     # killed three times, and then left alone
        code = in_a_child(stop)
        kills += code == 9
        assert code in (0, 9), code
        for folder in checkpoints.checkpoint_folders(run_dir):
            assert checkpoints.verify_checkpoint(folder) is None, (calls, folder)
    there = files(run_dir)
    assert code == 0 and wanted.items() <= there.items(), (calls, [n for n in wanted if there.get(n) != wanted[n]])
    assert not list(run_dir.glob(".adopting*")), calls
    code = 9 if calls < int(sys.argv[5]) else 0
    calls += 3
print(kills)
"""


def test_killed_at_any_instant_the_same_call_goes_on(runs, tmp_path):
    """In a child that dies (os._exit) before its n-th copy or rename, for every third n."""
    mount(runs.stopped, tmp_path / "input")
    older = tmp_path / "older"                         # something to replace: the run's first checkpoint
    shutil.copytree(runs.stopped, older)
    for folder in su.checkpoint_folders(older)[1:]:
        shutil.rmtree(folder)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "outputs" / "demo"), str(older),
                           str(tmp_path / "input"), json.dumps(runs.recipe.to_dict()), "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 30


# Room, network, the end of a session.

def test_room_is_compared_with_the_disk_and_with_what_kaggle_keeps(runs, tmp_path, monkeypatch):
    recipe = su.RECIPES["stentor2-12m"]
    needs = kaggle.bytes_to_write(recipe)
    assert needs["token store"] == 2 * 240_000_000 and needs["checkpoints"] == 4 * 3 * 4 * 12_294_400
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kaggle.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    wrong = kaggle.room_problem(recipe, tmp_path / "outputs" / "demo")
    assert "1.2 GB (token store 0.48 GB, checkpoints 0.59 GB, models 0.15 GB)" in wrong and "1.0 GB free" in wrong
    assert kaggle.room_problem(recipe, tmp_path, store_tokens=1000) is None and not (tmp_path / "outputs").exists()
    monkeypatch.setattr(kaggle.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**13))
    assert kaggle.room_problem(recipe, tmp_path) is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert kaggle.room_problem(recipe, tmp_path) is None
    assert "20 GB that Kaggle keeps" in kaggle.room_problem(recipe, tmp_path, store_tokens=10**10)
    (tmp_path / "demo").mkdir()
    with open(tmp_path / "demo" / "store", "wb") as file:
        file.truncate(10 * 10**9)                      # written already: it counts once
    assert kaggle.room_problem(recipe, tmp_path / "demo", store_tokens=9 * 10**9) is None
    assert kaggle.room_problem(recipe, tmp_path / "other", store_tokens=9 * 10**9)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_copied(runs, tmp_path, monkeypatch):
    attached = mount(runs.stopped, tmp_path / "input")
    monkeypatch.setattr(kaggle.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(su.ParameterError, match="GB free") as refused:
        kaggle.adopt(tmp_path / "outputs" / "demo", [tmp_path / "input"], runs.recipe)
    assert str(attached) in str(refused.value) and not list((tmp_path / "outputs" / "demo").iterdir())


def test_the_internet_switch_is_known_within_seconds(monkeypatch):
    from huggingface_hub import utils
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kaggle.internet.cache_clear()
    assert kaggle.internet() is False
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for answer, known in ((lambda: 1, True), (lambda: 1 / 0, False), (lambda: time.sleep(30), False)):
        kaggle.internet.cache_clear()
        monkeypatch.setattr(utils, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: answer()))
        began = time.monotonic()
        assert kaggle.internet(0.5) is known and time.monotonic() - began < 5
    kaggle.internet.cache_clear()


def test_a_stopped_run_says_the_two_clicks_on_kaggle_alone(monkeypatch):
    summary = {"step": 1300, "steps": 2400, "stopped": "deadline"}
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert kaggle.how_to_go_on(summary) == ("Stopped at step 1,300 of 2,400 (deadline), saved. Run this notebook again to "
                                            "go on.")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    said = kaggle.how_to_go_on(summary)
    assert "Save Version" in said and "Add Input" in said
    with pytest.raises(SystemExit, match="Save Version"):
        kaggle.stop_here(said)


def test_a_saved_version_that_stops_does_not_fail(tmp_path, monkeypatch):
    import nbformat
    import papermill
    cells = ["import stentor.kaggle\nstentor.kaggle.stop_here('Stopped.')", "raise ValueError('not reached')", "%bad magic"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    nbformat.write(notebook, tmp_path / "a.ipynb")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    done = papermill.execute_notebook(tmp_path / "a.ipynb", tmp_path / "b.ipynb", progress_bar=False)
    assert "Stopped. The cells below are skipped." in done.cells[0].outputs[0].text and not done.cells[1].outputs


# The built notebooks.

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    assert bundle.main([str(folder), "--user", "alice"]) == 0
    return folder


def alone(tmp_path, **more):
    """The environment of a Kaggle session: the repo not importable, KAGGLE_* set, inputs under tmp_path/input."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "STENTOR_DEADLINE")}
    return env | {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_DATA_PROXY_TOKEN": "x", "KAGGLE_INPUT": str(tmp_path / "input"),
                  "HF_HUB_OFFLINE": "1", **more}


def test_the_table_has_every_notebook_and_each_carries_its_metadata():
    assert sorted(bundle.table()) == NAMES
    for name in NAMES:
        notebook = json.loads((REPO / "notebooks" / f"{name}.ipynb").read_text())
        assert notebook["metadata"]["kaggle"] == bundle.kaggle_metadata(name), "run: python -m stentor.bundle --metadata"
        for cell in notebook["cells"]:
            hidden = "functions" in cell["metadata"].get("tags", [])
            assert cell["metadata"].get("_kg_hide-input", False) == hidden, cell["id"]
    assert bundle.kaggle_metadata("03_pretrain_tpu")["accelerator"] == "tpuV5e8"


WRITES = """
import json, sys
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.loads(Path(sys.argv[1]).read_text())["cells"]:
    if cell["id"].startswith(("helper-", "write-")) and cell["cell_type"] == "code":
        shell.run_cell(cell["source"]).raise_error()
assert not [name for name in shell.user_ns if name in ("folder", "path", "name")]
"""
IMPORTS = """
import stentor_utils, tokenmonster_hf, stentor.commands
assert all(Path(m.__file__).is_relative_to(Path.cwd()) for m in (stentor_utils, tokenmonster_hf, stentor.commands))
"""


@pytest.mark.parametrize("name", NAMES)
def test_what_a_built_notebook_carries_imports_nothing_that_it_does_not_carry(name):
    """But inside functions, where an import is of something that this notebook never asks for."""
    carried = set(bundle.carried(name))
    for path in (path for path in carried if path.endswith(".py")):
        for node in ast.parse((REPO / path).read_text()).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            for module in modules:
                if module.split(".")[0] in ("stentor", "stentor_utils", "tokenmonster_hf"):
                    file = module.replace(".", "/")
                    assert {f"{file}.py", f"{file}/__init__.py"} & carried, (path, module)
    assert ("stentor/xla.py" in carried) == ("tpu" in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_built_notebook_writes_the_house_byte_for_byte_and_imports_it(name, built, tmp_path):
    notebook = built / f"{name}.ipynb"
    imports = {"02_pretrain_t4": IMPORTS, "05_benchmark": IMPORTS + "\nstentor_utils.benchmark"}.get(name, "")     # 5 s each
    done = subprocess.run([sys.executable, "-c", WRITES + imports, str(notebook)], cwd=tmp_path,
                          env=alone(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for path in bundle.carried(name):
        assert (tmp_path / path).read_bytes() == (REPO / path).read_bytes(), path
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert written == set(bundle.carried(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_built_notebook_is_the_same_notebook_small_enough_and_says_where_it_is_from(name, built):
    import nbformat
    path = built / f"{name}.ipynb"
    assert path.stat().st_size < 1_000_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    own = json.loads((REPO / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    kept = [cell for cell in notebook.cells if not cell.id.startswith(("helper-", "write-"))]
    assert [cell.id for cell in kept] == [cell["id"] for cell in own]
    assert [cell.source for cell in kept[1:]] == ["".join(cell["source"]) for cell in own[1:]]
    assert re.search(r"version .*, commit [0-9a-f]{12}|commit unknown", notebook.cells[0].source)
    order = [cell.id for cell in notebook.cells]
    assert order.index("parameters") < order.index("helper-about") < order.index("bootstrap")
    for cell in notebook.cells:
        if cell.id.startswith("write-"):
            assert cell.metadata["_kg_hide-input"] and cell.source.startswith(("%%writefile ", "_write_rows("))
    assert notebook.metadata.kaggle == bundle.kaggle_metadata(name)


def test_what_few_notebooks_import_is_in_those_alone():
    """Or every notebook carries what 07 calls, and 04 grows beyond what Kaggle takes."""
    rows = bundle.table()
    patterns = {pattern for row in rows.values() for pattern in row.get("with", [])}
    assert {"stentor/payoff.py", "stentor/demo/*", "stentor/card/*.py"} <= patterns
    for pattern in patterns:
        files = {path.relative_to(REPO).as_posix() for path in REPO.glob(pattern) if path.suffix == ".py"}
        assert files, pattern
        for name in NAMES:
            assert files & set(bundle.carried(name)) == (files if pattern in rows[name].get("with", []) else set()), name


def test_too_large_a_notebook_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "LARGEST", 100_000)
    with pytest.raises(ValueError, match="Kaggle takes 100,000"):
        bundle.build_notebook(REPO / "notebooks" / "02_pretrain_t4.ipynb", tmp_path / "a.ipynb")
    assert not list(tmp_path.iterdir())


def test_kernels_are_chained_and_the_dataset_is_whole(built):
    kernels = {path.parent.name: json.loads(path.read_text()) for path in built.glob("alice/kernels/*/kernel-metadata.json")}
    assert sorted(kernels) == NAMES
    shapes = {"01_tokenizer": None, "02_pretrain_t4": "NvidiaTeslaT4", "03_pretrain_tpu": "TpuV5E8",
              "04_instruct_sft": "NvidiaTeslaT4", "05_benchmark": "NvidiaTeslaT4", "06_charts": None}
    for name, kernel in kernels.items():
        assert kernel["id"] == "alice/" + kernel["title"].lower().replace(" ", "-")       # or Kaggle makes another
        assert (built / "alice" / "kernels" / name / kernel["code_file"]).is_file()
        assert kernel["is_private"] is True and kernel["enable_internet"] is True
        assert kernel["dataset_sources"] == ["alice/stentor-utils"]
        assert set(kernel["kernel_sources"]) <= {other["id"] for other in kernels.values()} - {kernel["id"]}
        if name in shapes:
            assert kernel.get("machine_shape") == shapes[name]
            assert (kernel["enable_gpu"], kernel["enable_tpu"]) == ("Tesla" in str(shapes[name]), "Tpu" in str(shapes[name]))
    assert kernels["02_pretrain_t4"]["kernel_sources"] == ["alice/stentor-01-tokenizer"]
    dataset = built / "alice" / "dataset"
    assert json.loads((dataset / "dataset-metadata.json").read_text())["id"] == "alice/stentor-utils"
    for name in NAMES:
        for path in bundle.carried(name):
            assert (dataset / path).read_bytes() == (REPO / path).read_bytes()


def test_make_kaggle_prints_the_commands_with_their_folder_mode(built, capsys):
    for command in bundle.stage("alice", built / "alice")[:2]:
        assert "--dir-mode zip" in command
    bundle.print_ways(built, None)
    assert "Import Notebook" in capsys.readouterr().out or bundle.project()[1]
    for given, user in (((), ""), (("USER=alice",), " --user 'alice'")):
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(["make", "-n", "kaggle", *given], cwd=REPO, capture_output=True, text=True,
                              env={**outside, "USER": "root"})     # `make test` is a make around this one
        assert done.stdout.strip().endswith("-m stentor.bundle dist/kaggle" + user)


def test_links_are_made_from_the_address_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "project", lambda: ("1.0", "https://github.com/me/stentor"))
    assert bundle.how_to_open("03_pretrain_tpu") == (
        "[open 03_pretrain_tpu on Kaggle](https://www.kaggle.com/notebooks/welcome?src=https://github.com/me/stentor/blob/"
        "kaggle/03_pretrain_tpu.ipynb&accelerator=tpuV5e8)")
    assert "accelerator" not in bundle.how_to_open("01_tokenizer")
    assert "Import Notebook" in bundle.how_to_open("01_tokenizer", "")


# Executed as Kaggle does: an empty working folder, inputs read-only, the repo not importable, nothing edited.

def execute(built, name, working, tmp_path, env=(), **parameters):
    """The executed notebook; raises what it raised."""
    working.mkdir(parents=True)
    code = ("import json, sys, papermill\n"
            "papermill.execute_notebook(sys.argv[1], sys.argv[2], cwd=sys.argv[3], progress_bar=False, kernel_name='python3',"
            " parameters=json.loads(sys.argv[4]), start_timeout=600, iopub_timeout=600)")
    done = subprocess.run([sys.executable, "-c", code, str(built / f"{name}.ipynb"), str(tmp_path / f"{working.name}.ipynb"),
                           str(working), json.dumps(parameters)], cwd=working,
                          env=alone(tmp_path, **dict(env)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / f"{working.name}.ipynb").read_text())


def test_the_built_01_runs_alone(built, tmp_path):
    working = tmp_path / "working"
    execute(built, "01_tokenizer", working, tmp_path, PROFILE="cpu", VOCABULARY="bpe", VOCAB_SIZE=600, SAMPLE_MB=0.1,
            TIME_BUDGET_SECONDS=1)
    assert (working / "outputs" / "demo" / "tokenizer" / "tokenizer.json").is_file()


SLOW = pytest.mark.skipif(not os.environ.get("STENTOR_SLOW"), reason="minutes: STENTOR_SLOW=1")
SMALL = {"01_tokenizer": {"SAMPLE_MB": 1, "TIME_BUDGET_SECONDS": 10}, "02_pretrain_t4": {"TOKEN_BUDGET": 300_000},
         "03_pretrain_tpu": {"TOKEN_BUDGET": 300_000}, "04_instruct_sft": {"SEEDS": [0], "LIMIT": 32},
         "05_benchmark": {"PAIRS": 20}, "06_charts": {"CONTINUATIONS": 4},
         "07_growth": {"TOKEN_BUDGET": 10_000, "TRIAL_TOKENS": 6_000, "SEEDS": [42], "FRAGMENTS": 1},
         "08_export": {"FORMATS": ["fp16", "onnx"], "CONTINUATIONS": 4, "NEW_TOKENS": 8, "WINDOWS": 4, "INSTALL": False},
         "09_demo": {"MAX_NEW_TOKENS": 8, "STAY_OPEN": False}}


@SLOW
@pytest.mark.parametrize("chain", [["01_tokenizer", "02_pretrain_t4", "04_instruct_sft", "05_benchmark", "06_charts"],
                                   ["01_tokenizer", "03_pretrain_tpu"]], ids=["t4", "tpu"])
def test_the_built_notebooks_pass_their_outputs_on(chain, built, tmp_path):
    for name in chain:
        working = tmp_path / "sessions" / name
        execute(built, name, working, tmp_path, PROFILE="cpu", **SMALL[name])
        for run in (working / "outputs").iterdir():
            mount(run, tmp_path / "input", "new", slug=bundle.slug(name))
    last = tmp_path / "sessions" / chain[-1] / "outputs"
    assert list(last.glob("*/final/config.json"))


NEED_A_MODEL = ("04_instruct_sft", "05_benchmark", "08_export", "09_demo")


@SLOW
@pytest.mark.parametrize("name", sorted({*NAMES} - {*NEED_A_MODEL}))
def test_each_built_notebook_runs_with_nothing_attached(name, built, tmp_path):
    done = execute(built, name, tmp_path / "working", tmp_path, PROFILE="cpu", **SMALL.get(name, {}))
    said = shown(done)
    outputs = tmp_path / "working" / "outputs"
    if "pretrain" in name:
        run, = outputs.iterdir()
        assert "one is built from the recipe's text" in said and (run / "final" / "config.json").is_file()
        assert json.loads((run / "tokenizer" / "report.json").read_text())["vocab_size"] == 4096
    if name == "06_charts":
        assert "what is published is taken alone" in said
        assert (outputs / "published" / "charts" / "published.png").stat().st_size > 5_000


def shown(notebook):
    """All that a notebook printed."""
    return "".join("".join(output.get("text", "")) for cell in notebook["cells"] for output in cell.get("outputs", []))


@pytest.mark.parametrize("name", NEED_A_MODEL)
def test_without_a_model_and_without_internet_a_notebook_says_what_to_attach(name, built, tmp_path):
    with pytest.raises(AssertionError, match="there is no model in .*attach the output of .*Add Input > Your Work"):
        execute(built, name, tmp_path / "working", tmp_path, PROFILE="cpu")
    assert not (tmp_path / "working" / "outputs").exists()


@SLOW
@pytest.mark.parametrize("name", NEED_A_MODEL[:3])
def test_without_a_model_the_published_one_is_taken(name, built, tiny, tmp_path):
    """From a loopback hub, at the address that the card prints."""
    from hub_server import HubServer
    shape = dataclasses.replace(tiny.recipe.shape, max_position_embeddings=256)
    su.save_model_folder(su.build_model(shape), tiny.tokenizer, tmp_path / "model")
    content = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with HubServer() as hub:
        for repo in ("StentorLabs/Stentor-12M", "StentorLabs/Stentor2-12M"):
            hub.commit(repo, content)
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        done = execute(built, name, tmp_path / "working", tmp_path, env, PROFILE="cpu", **SMALL[name])
    repo = "StentorLabs/Stentor-12M" if name == "04_instruct_sft" else "StentorLabs/Stentor2-12M"
    assert f"taken is {repo}, the published model" in shown(done)
    made = {"04_instruct_sft": "instruct/final/config.json", "05_benchmark": "benchmark/results.csv",
            "08_export": "export/export.json"}[name]
    assert (tmp_path / "working" / "outputs" / "demo" / made).is_file()
