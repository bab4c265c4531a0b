"""The files of a run folder: who writes them and when, what is found again, what is set aside; workers that leave."""
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO
from hub_server import HubServer

import stentor.card.check
import stentor.commands
import stentor.folders
import stentor.launch
import stentor.metrics
import stentor_utils as su


def quiet(text):
    pass


@pytest.fixture(scope="module")
def micro(tiny):
    shape = su.Shape(tiny.recipe.shape.vocab_size, 8, 8, 1, 1, 1, 16)
    return dataclasses.replace(tiny.recipe, name="micro", shape=shape, block_size=16, token_budget=16 * 4 * 16, ema_decay=0.9,
                               per_device_train_batch_size=2, fp32_critical_first=0, eval_steps=4, best_eval_steps=4,
                               logging_steps=2)


def train(tiny, recipe, folder, **more):
    return su.train(recipe, su.TokenStore(tiny.store_dir, recipe), folder, **{"say": quiet, **more})


@pytest.fixture(scope="module")
def launched(tiny, micro, tmp_path_factory):
    """A finished run that `launch` started."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    su.launch(micro, tiny.store_dir, tiny.tokenizer_dir, folder, say=quiet)
    return folder


@pytest.fixture(scope="module")
def trained(tiny, micro, tmp_path_factory):
    """A finished run of this process: gone on with here, it ends in the same bits (another one may have other threads)."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(tiny, micro, folder)
    return folder


@pytest.fixture
def run(launched, tmp_path):
    return Path(shutil.copytree(launched, tmp_path / "run"))


@pytest.fixture
def own(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def content(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


# --- a refused launch writes nothing


def test_a_launch_describes_its_run_and_a_refused_one_leaves_every_byte(tiny, micro, run, tmp_path):
    """Another rate, another seed (recipe), another store and tokenizer (only known when training begins), a run in use."""
    described = json.loads((run / "run.json").read_text())
    assert su.Recipe.from_dict(described["recipe"]) == micro
    assert "packages" in json.loads((run / "environment.json").read_text())
    before = content(run)
    su.prepare_tokens([tiny.source], tiny.tokenizer, tmp_path / "other", tokens_per_source={"topics": 30_000},
                      validation_documents=4, shard_tokens=9_000)
    for recipe, store, says in ((dataclasses.replace(micro, learning_rate=1e-3), tiny.store_dir, "learning_rate is 0.004 in"),
                                (micro, tmp_path / "other", "store is")):
        with pytest.raises(su.TrainingFailed, match=says):
            su.launch(recipe, store, tiny.tokenizer_dir, run, say=quiet)
        assert content(run) == before
    lock = su.RunLock(run)
    with pytest.raises(su.TrainingFailed, match="in use by process"):
        su.launch(micro, tiny.store_dir, tiny.tokenizer_dir, run, say=quiet)
    lock.release()
    assert content(run) == before


def test_check_run_says_it_before_and_writes_nothing(micro, run, tmp_path):
    before = content(run)
    su.check_run(micro, run)
    su.check_run(micro, tmp_path / "not there yet")
    with pytest.raises(su.CheckpointError, match="seed is 42 in the checkpoint, 7 in this run"):
        su.check_run(dataclasses.replace(micro, seed=7), run)
    lock = su.RunLock(run)
    with pytest.raises(su.ParameterError, match=f"in use by process {os.getpid()}"):
        su.check_run(micro, run)
    lock.release()
    assert content(run) == before and not (tmp_path / "not there yet").exists()


def test_a_refused_run_with_workers_starts_none(tiny, micro, run, monkeypatch):
    monkeypatch.setenv("STENTOR_RUN_JSON", json.dumps(json.loads((run / "run.json").read_text()) | {
        "recipe": dataclasses.replace(micro, seed=9).to_dict(), "fill": {"shard_tokens": 2560}}))
    before = content(run)
    with pytest.raises(su.CheckpointError, match="seed is 42 in the checkpoint, 9 in this run"):
        stentor.launch.train_from_file(run / "run.json")
    assert content(run) == before                     # neither logs of workers nor a store


def test_a_card_is_held_against_the_checkpoint(micro, run):
    """What a refused launch of an earlier version left behind: run.json with values that nobody trained with."""
    su.write_model_card(run)
    assert stentor.card.check.check_model_card(run) == []
    described = json.loads((run / "run.json").read_text())
    described["recipe"] = dataclasses.replace(micro, learning_rate=1e-3, seed=5).to_dict()
    (run / "run.json").write_text(json.dumps(described))
    with pytest.raises(su.ParameterError, match="learning_rate is 0.004 in the checkpoint, 0.001 in this run; seed is 42"):
        su.write_model_card(run)
    assert any("run.json is not of the run that was trained" in problem for problem in stentor.card.check.check_model_card(run))


def test_a_card_is_held_against_the_tokenizer_of_the_tokens(tiny, run):
    import tokenmonster_hf as tm
    shutil.copytree(tiny.store_dir, run / "tokens")
    su.write_model_card(run)
    other = tm.TokenMonsterTokenizer.from_vocabulary(tm.Vocabulary.from_tokens([b" the"], capcode=0, include="all256"))
    other.save_pretrained(run / "tokenizer")          # 01 again, in the folder of a finished run
    assert any(problem.startswith("tokenizer/ holds the tokenizer") for problem in stentor.card.check.check_model_card(run))


# --- a run folder that was copied, linked, or begun from a hub name


def test_a_copied_run_goes_on_by_the_command_line(tiny, micro, tmp_path):
    """From a deep folder to another, with a tokenizer and a store elsewhere; then in a world where those are gone."""
    outputs = tmp_path / "a" / "b"
    shutil.copytree(tiny.tokenizer_dir, tmp_path / "words")
    shutil.copytree(tiny.store_dir, tmp_path / "tokens")
    outputs.mkdir(parents=True)
    (outputs / "link").symlink_to(tmp_path / "real")  # run.json must not count its way up from the link
    (tmp_path / "real").mkdir()
    su.launch(micro, tmp_path / "tokens", tmp_path / "words", outputs / "link", say=quiet)
    weights = (tmp_path / "real" / "final" / "model.safetensors").read_bytes()
    copied = tmp_path / "x" / "y" / "z" / "run"
    shutil.copytree(tmp_path / "real", copied)
    stentor.launch.train_from_file(copied / "run.json")
    assert (copied / "final" / "model.safetensors").read_bytes() == weights
    shutil.move(tmp_path / "tokens", copied / "tokens")
    shutil.move(tmp_path / "words", tmp_path / "words-away")
    stentor.launch.train_from_file(copied / "run.json")           # the tokenizer of its own final/
    shutil.rmtree(copied / "tokens")
    with pytest.raises(su.ParameterError, match="names the store .*tokens, and there is none") as caught:
        stentor.launch.train_from_file(copied / "run.json")
    assert "Repo id" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"recipe": {"shape": 3}}', '{"recipe": {}}'])
def test_a_run_json_that_describes_none_is_refused_in_a_sentence(tmp_path, text, capfd):
    (tmp_path / "run.json").write_text(text)
    assert stentor.commands.main(["train", str(tmp_path / "run.json")]) == 2
    said = capfd.readouterr().err
    assert "cannot be read as a run" in said and "Traceback" not in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("words", [
    ["train", "absent.json"], ["fill", "absent.json", "topics"], ["benchmark", "absent.json"],
    ["benchmark", "empty.json"], ["benchmark", "list.json"], ["summary", "absent"],
    ["results", "absent", "README.md"]])
def test_a_command_that_names_nothing_is_refused_in_a_sentence(tmp_path, monkeypatch, words, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "list.json").write_text('{"models": {}, "blocks": [], "dtype": "float32"}')
    assert stentor.commands.main(words) == 2
    said = capfd.readouterr().err
    assert "cannot be read" in said and "Traceback" not in said and said.count("\n") == 1


FROM_THE_HUB = """
import dataclasses, json, sys
from pathlib import Path
import stentor_utils as su
import stentor.benchmark.run, torch
finished, run = map(Path, sys.argv[1:])
recipe = su.Recipe.from_dict(json.loads((finished / "run.json").read_text())["recipe"])
su.launch(recipe, run / "tokens", "hf:me/words", run, say=lambda text: None, fill={"shard_tokens": 2560})
assert json.loads((run / "run.json").read_text())["tokenizer"] == "hf:me/words"
stentor.launch.train_from_file(run / "run.json")
own = su.load_model(finished / "final").state_dict()
cpu, load_scored = torch.device("cpu"), stentor.benchmark.run.load_scored
for model in (su.load_model("hf:me/model"), load_scored("hf:me/model", "float32", cpu)[0]):
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
assert not model.generation_config.do_sample and model.generation_config.repetition_penalty in (None, 1.0)     # the protocol's
for load in (su.load_model, lambda name: load_scored(name, "float32", cpu)):
    try:
        load("hf:me/broken")
        raise SystemExit("weights that are missing were made up")
    except su.ParameterError as error:
        assert "weights are missing" in str(error), error
print(su.tokenizer_sha256(su.load_tokenizer("hf:me/words")))
"""


def test_a_hub_name_is_one_everywhere(tiny, launched, tmp_path):
    """Tokenizer and model from a hub on the loopback: the training process, its worker, a base model, the evaluation."""
    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    model = files(launched / "final")
    with HubServer() as hub:
        hub.commit("me/words", files(tiny.tokenizer_dir))
        hub.commit("me/model", model)
        hub.commit("me/broken", model | {"config.json": model["config.json"].replace(b'layers": 1', b'layers": 2')})
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, "-c", FROM_THE_HUB, launched, tmp_path / "run"], env=env, text=True,
                              capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == su.tokenizer_sha256(tiny.tokenizer)


# --- checkpoints/ as people and disks leave it


def with_state(folder: Path, **changes) -> None:
    """state.json changed, and its hash with it; None takes a key away."""
    state = json.loads((folder / "state.json").read_text()) | changes
    data = json.dumps({key: value for key, value in state.items() if value is not None}).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("changes", [
    {"step": "16"}, {"step": -1}, {"step": 16.0}, {"step": None}, {"step": 10**30}, {"step": True}, {"step": [16]},
    {"step": 8}, {"updates": "x"}, {"updates": 99}, {"skipped_steps": -3}, {"metrics_lines": -1}, {"metrics_lines": "9"},
    {"window": [0, 1]}, {"scaler": 3}, {"best_eval_loss": "low"}, {"rollbacks": None}, {"seconds": -5}, {"good_step": 1.5}],
    ids=json.dumps)
def test_a_state_that_makes_no_sense_is_set_aside(tiny, micro, own, changes):
    weights, said = (own / "final" / "model.safetensors").read_bytes(), []
    newest = su.checkpoint_folders(own)[-1]
    with_state(newest, **changes)
    assert su.verify_checkpoint(newest).startswith("state.json: ")
    train(tiny, micro, own, say=said.append)
    assert [line[:34] for line in said if "set aside" in line] == ["checkpoint step-00000016 set aside"], said
    assert "\n" not in said[0] and (own / "final" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["step-00000099", "step-00000011", "step-99999999"])
def test_a_folder_whose_name_and_state_disagree_is_not_the_newest_for_good(tiny, micro, own, name):
    newest, said = su.checkpoint_folders(own)[-1], []
    weights = (own / "final" / "model.safetensors").read_bytes()
    newest.rename(newest.with_name(name))
    if name == "step-99999999":                       # and where they agree: no run of 16 steps has such a one
        with_state(newest.with_name(name), step=99999999)
    train(tiny, micro, own, say=said.append)
    assert sum("set aside" in line for line in said) == (name != "step-00000011"), said      # 11: not the newest
    assert (own / "final" / "model.safetensors").read_bytes() == weights
    assert su.checkpoint_folders(own)[-1].name == "step-00000016"


@pytest.mark.parametrize("stray", ["a file", "a link to nothing", "a link to a file", "a link to a checkpoint", "half a save"])
def test_strays_among_the_checkpoints_make_no_later_save_warn(tiny, micro, own, tmp_path, stray):
    """A user's `mv` to a larger disk and `ln -s`, or a file of that name; then a run goes on and saves and prunes."""
    place, said = own / "checkpoints", []
    oldest, newest = su.checkpoint_folders(own)
    if stray == "a file":
        (place / "step-00000020").write_text("notes")
        (place / "step-00000002").write_text("notes")
    if stray == "a link to nothing":
        (place / "step-00000014").symlink_to(tmp_path / "nowhere")
    if stray == "a link to a file":
        (place / "step-00000014").symlink_to(own / "metrics.jsonl")
    if stray == "a link to a checkpoint":
        newest.rename(tmp_path / "moved")
        newest.symlink_to(tmp_path / "moved")
    if stray == "half a save":
        (place / ".step-00000020").write_text("")
        (place / ".old-step-00000012").symlink_to(tmp_path)
    longer = dataclasses.replace(micro, save_every_minutes=1e-9)
    shutil.rmtree(oldest)
    if stray != "a link to a checkpoint":             # so that there is something to train and to save
        shutil.rmtree(newest)
        with pytest.raises(su.CheckpointError) if stray.startswith("a ") else quiet_block():
            train(tiny, longer, own, say=said.append)
        assert not stray.startswith("a ") or any("set aside: it is not a folder" in line for line in said)
        for path in place.glob("bad-*"):              # as the sentence says
            path.unlink()
    train(tiny, longer, own, say=said.append)
    assert not [line for line in said if "WARNING" in line], said
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    if stray == "a link to a checkpoint":
        assert (tmp_path / "moved" / "state.json").is_file()
        state = su.load_checkpoint(own)[1]
        for step in (17, 18, 19):                     # pruned: the link goes, what it points to stays
            su.save_checkpoint(own, step, {"model": {}}, {key: value for key, value in state.items() if key == "x"})
        assert (tmp_path / "moved" / "state.json").is_file() and not newest.is_symlink()


def quiet_block():
    import contextlib
    return contextlib.nullcontext()


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tiny, micro, tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(su.CheckpointError, match="checkpoints is not a folder: move it away"):
        train(tiny, micro, tmp_path)


@pytest.mark.parametrize("damage", ["cut inside a row", "rows missing", "a row of something else", "gone", "not text"])
def test_a_damaged_metrics_file_is_said_and_the_run_goes_on(tiny, micro, own, damage):
    path, said = own / "metrics.jsonl", []
    lines = path.read_text().splitlines()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut inside a row": "\n".join(lines)[:-20].encode(), "rows missing": "\n".join(lines[:-3]).encode(),
                          "a row of something else": "\n".join(["[1]", '{"kind": "eval", "step": 4}', *lines[2:]]).encode(),
                          "not text": b"\xff\xfe" + "\n".join(lines).encode()}[damage])
    lost = {"cut inside a row": 1, "rows missing": 3, "a row of something else": 2, "gone": len(lines), "not text": 1}[damage]
    damaged = path.read_bytes() if path.exists() else None
    train(tiny, micro, own, say=said.append)
    assert any(f"{lost} of the {len(lines)} rows that the checkpoint counts are broken or gone" in line for line in said), said
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [row for row in map(stentor.metrics.Metrics.row_of, lines) if row in rows] and len(rows) == len(lines) - lost
    aside = list(own.glob("bad-metrics-*"))
    assert [file.read_bytes() for file in aside] == [damaged] * (damage != "gone")
    said.clear()
    train(tiny, micro, own, say=said.append)          # and it says so once
    assert not [line for line in said if "metrics" in line]


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(tiny, micro, tmp_path, monkeypatch):
    """The order of fsync and rename, as the calls come: a power cut between them leaves rows without checkpoint, never the
    other way round."""
    fsync, save, calls = os.fsync, su.save_checkpoint, []

    def noted(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def saved(run_dir, step, tensors, state, keep):
        rows = len((tmp_path / "metrics.jsonl").read_text().splitlines())
        assert rows == state["metrics_lines"] and calls[-1] == "metrics.jsonl", calls[-3:]
        return save(run_dir, step, tensors, state, keep)
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(stentor.train, "save_checkpoint", saved)
    train(tiny, micro, tmp_path)


# --- a worker does not outlive its trainer


@pytest.mark.parametrize("when", ["while it imports", "while it waits"])
def test_a_worker_leaves_with_its_trainer(tiny, micro, tmp_path, when):
    """kill -9 of the trainer, at once or when the worker has filled what it may: the worker is gone. No instant is timed: the
    worker is stopped (SIGSTOP) until its trainer is dead, or waited for by what it wrote."""
    run = {"recipe": micro.to_dict(), "store": "tokens", "tokenizer": str(tiny.tokenizer_dir),
           "fill": {"shard_tokens": 2560, "ahead_shards": 1}}
    recipe = dataclasses.replace(micro, token_budget=4000 * 16)
    (tmp_path / "run.json").write_text(json.dumps(run | {"recipe": recipe.to_dict()}))
    (tmp_path / "trainer.py").write_text(f"""
import subprocess, sys, time, os
worker = subprocess.Popen([sys.executable, "-m", "stentor_utils", "fill", {str(tmp_path / "run.json")!r}, "topics",
                           str(os.getpid())])
print(worker.pid, flush=True)
time.sleep(1000)
""")
    trainer = subprocess.Popen([sys.executable, str(tmp_path / "trainer.py")], stdout=subprocess.PIPE, text=True, cwd=REPO)
    worker = int(trainer.stdout.readline())
    if when == "while it imports":
        os.kill(worker, signal.SIGSTOP)
    else:
        while not (tmp_path / "tokens" / "topics" / "topics" / "train-00000.bin").exists():
            assert trainer.poll() is None and Path(f"/proc/{worker}").exists()
            time.sleep(0.05)
    trainer.kill()
    trainer.wait()
    if when == "while it imports":
        os.kill(worker, signal.SIGCONT)
    limit = time.monotonic() + 300                    # a worker that stays would wait for ever
    while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < limit, "the worker is still there"
        time.sleep(0.05)
    if when == "while it imports":
        assert not (tmp_path / "tokens").exists()
