"""What stands beside the files that are wanted: leftovers of killed writers, links, modes, homes and caches that cannot be
written, and what a refused call has left for the next one."""
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import REPO

import stentor.files
import stentor_utils as su

WRITER = """
import sys
import stentor.files
while True:
    stentor.files.write_atomically(sys.argv[1], bytes(20_000_000))
"""


def temporaries(folder):
    return sorted(path.name for path in folder.rglob(".*"))


def test_what_a_killed_writer_left_goes_at_the_next_write_and_a_live_ones_stays(tmp_path):
    for _ in range(20):                               # until a kill falls into a write: most do
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "big.bin")], cwd=REPO)
        while not temporaries(tmp_path):
            assert process.poll() is None, "the writer did not begin"
            time.sleep(0.001)
        process.kill()
        process.wait()
        if left := temporaries(tmp_path):
            break
    assert left == [f".big.bin.{process.pid}"]
    (tmp_path / ".other.bin.77").write_bytes(b"x")    # nobody's of this name
    with stentor.files._open_locked(tmp_path / ".big.bin.1"):       # what another process is writing
        su.write_atomically(tmp_path / "big.bin", b"new")
        assert temporaries(tmp_path) == [".big.bin.1", ".other.bin.77"]
    su.write_atomically(tmp_path / "big.bin", b"newer")
    assert temporaries(tmp_path) == [".other.bin.77"] and (tmp_path / "big.bin").read_bytes() == b"newer"


def test_a_vocabulary_is_saved_through_a_link_and_keeps_no_leftover(tiny, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "my.vocab").symlink_to("there/my.vocab")
    for number in (1, 2):
        (tmp_path / "there" / f"my.vocab.{number}.tmp").write_bytes(b"half")
    with open(tmp_path / "there" / "my.vocab.2.tmp", "ab") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        tiny.tokenizer.vocabulary.save(tmp_path / "my.vocab")
    assert (tmp_path / "my.vocab").is_symlink()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["my.vocab", "my.vocab.2.tmp"]
    assert (tmp_path / "there" / "my.vocab").read_bytes() == tiny.tokenizer.vocabulary.to_bytes()


KINDS = (".manifest.json.{}", "topics/.train-00000.bin.{}", "topics/.train-00009.bin.{}",
         "topics/.carry-00001.bin.{}", "topics/.validation.bin.{}")


def prepare(tiny, folder, source=None, wanted=60_000, **settings):
    return su.prepare_tokens([source or tiny.source], tiny.tokenizer, folder,
                             tokens_per_source={"topics": wanted}, shard_tokens=20_000,
                             validation_documents=settings.pop("validation_documents", 4),
                             progress=lambda text: None, **settings)


@pytest.mark.parametrize("finished", [True, False])
def test_a_store_keeps_no_leftover_of_its_own(tiny, tmp_path, finished):
    prepare(tiny, tmp_path, wanted=25_000)
    for kind in KINDS:
        (tmp_path / kind.format(4321)).write_bytes(bytes(100))
    (tmp_path / "topics" / "carry-00000.bin").write_bytes(bytes(100))     # killed before it was removed
    (tmp_path / "topics" / ".note.4321").write_text("mine")
    live = open(tmp_path / "topics" / ".train-00001.bin.5432", "wb")
    fcntl.flock(live, fcntl.LOCK_EX)
    prepare(tiny, tmp_path, wanted=25_000 if finished else 60_000)
    assert temporaries(tmp_path) == [".note.4321", ".train-00001.bin.5432"]
    live.close()
    prepare(tiny, tmp_path, wanted=25_000 if finished else 60_000)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["sources"]["topics"]
    named = {shard["file"] for shard in manifest["shards"]} | {
        manifest["validation"]["file"], f"topics/carry-{len(manifest['shards']):05d}.bin",
        "topics/.note.4321", "manifest.json"}
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert there == named
    su.TokenStore(tmp_path, tiny.recipe).batch(0)


def test_links_are_written_through_and_modes_follow_the_umask(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    for name, target in (("absolute", tmp_path / "there" / "file"), ("relative", "there/file"), ("chain", "relative"),
                         ("dangling", "there/new")):
        (tmp_path / name).symlink_to(target)
        su.write_atomically(tmp_path / name, f"through {name}")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "there" / ("new" if name == "dangling" else "file")).read_text() == f"through {name}"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["file", "new"]
    old = os.umask(0o027)
    try:
        su.write_atomically(tmp_path / "private", b"x")
        assert (tmp_path / "private").stat().st_mode & 0o777 == 0o640
        os.umask(0o002)
        su.write_atomically(tmp_path / "group", b"x")
        assert (tmp_path / "group").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(old)


@pytest.mark.parametrize("made", [True, False])
def test_a_store_may_be_a_link(tiny, tmp_path, made):
    target = tmp_path / "disk" / "tokens"
    if made:
        (target / "real").mkdir(parents=True)
        (target / "topics").symlink_to("real")        # and so may a source's folder be
    (tmp_path / "tokens").symlink_to(target)
    prepare(tiny, tmp_path / "tokens")
    assert (tmp_path / "tokens").is_symlink() and (target / "topics").is_symlink() == made
    assert (target / "topics" / "train-00000.bin").read_bytes() == (
        tiny.store_dir / "topics" / "train-00000.bin").read_bytes()
    su.TokenStore(tmp_path / "tokens", tiny.recipe).batch(0)


def test_a_source_that_was_too_short_is_read_again_when_it_was_mended(tiny, tmp_path):
    """Refused by the store: what the refused call wrote must not keep the mended file out."""
    path = tmp_path / "docs.jsonl"
    texts = [*(f"document {i}" for i in range(4)), "short"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = su.Source("topics", str(path))
    for _ in range(2):
        with pytest.raises(su.ParameterError, match="fewer tokens than one block of 64: give it more text"):
            su.TokenStore(prepare(tiny, tmp_path / "store", source), tiny.recipe)
    path.write_bytes((tiny.folder / "topics.jsonl").read_bytes())
    su.TokenStore(prepare(tiny, tmp_path / "store", source), tiny.recipe)
    for name in ("train-00000.bin", "validation.bin"):
        written = (tmp_path / "store" / "topics" / name).read_bytes()
        assert written == (tiny.store_dir / "topics" / name).read_bytes()


HOMES = """
import json, os, sys, tempfile
import stentor.files
import matplotlib, numba
from huggingface_hub import constants
from jupyter_core.paths import jupyter_runtime_dir
import tokenmonster_hf as tm
v = tm.Vocabulary.from_tokens([b" the"], capcode=0, include="all256")
assert v.decode(v.encode(" the end")) == " the end"
for folder in (constants.HF_HOME, jupyter_runtime_dir(), matplotlib.get_cachedir(),
               stentor.files.cache_folder()):
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    print(folder)
"""


@pytest.mark.parametrize("home, cache", [
    ("a file", True), ("missing", False), ("read-only", False), ("cache is a file", True)])
def test_without_a_home_every_cache_has_a_place(tmp_path, home, cache):
    place = tmp_path / "tmp"
    place.mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".cache").write_text("")
    homes = {"a file": tmp_path / "file", "missing": tmp_path / "nowhere", "read-only": "/proc/sys",
             "cache is a file": tmp_path / "home"}
    unset = ("XDG_CACHE_HOME", "HF_HOME", "STENTOR_CACHE", "MPLCONFIGDIR", "HF_TOKEN_PATH", "USER", "LOGNAME")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    env |= {"TMPDIR": str(place), "HOME": str(homes[home])}
    if cache:
        env["STENTOR_CACHE"] = str(place / "given")
    done = subprocess.run([sys.executable, "-c", HOMES], cwd=REPO, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    folders = done.stdout.split()
    assert len(folders) == 4 and all(folder.startswith(str(tmp_path)) for folder in folders), folders
    assert done.stderr.count("is no folder that can be written: caches go to") == 1
    assert not (tmp_path / "nowhere").exists()
    if cache:
        assert folders[3] == str(place / "given") and folders[0].startswith(str(place / "given"))


def test_a_cache_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STENTOR_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(stentor.corpus, "_extract", lambda kind: pytest.fail("worked first"))
    with pytest.raises(su.ParameterError, match="which cannot be written.*set STENTOR_CACHE"):
        su.local_corpus("math")
