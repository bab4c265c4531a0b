"""Documents from the hub: whatever the network does, the same ones in the same order, or a clear stop.

All from one commit. Everything runs against hub_server.HubServer on the loopback; that it speaks the
hub's protocol is checked with the hub's own client. Waiting is injected, so that no test sleeps.
"""
import base64
import dataclasses
import gzip
import io
import json
import os
import random
import subprocess
import sys
import time

import pytest
from conftest import REPO
from hub_server import HubServer

import stentor.growing
import stentor.hub
import stentor.sources
import stentor_utils as su

TOKEN = "hf_" + "canaryCanaryCanary"        # in two halves, or tests/lint.py would find it
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")


def point_to(url: str, monkeypatch) -> None:
    """As HF_ENDPOINT does before the import."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants
    with HubServer() as server:
        point_to(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # A busy machine is no fault: tests count the retries.
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 60)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def shard(ending: str, texts: list, wide: int = 20_000, rows: int = 7) -> bytes:
    """One file of a dataset, rows of {"text": ...}.

    In parquet also a column of `wide` bytes that nobody asked for.
    """
    if ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        column = pa.array([t.encode() if isinstance(t, str) else t for t in texts], pa.binary())
        table = pa.table({"embedding": [random.Random(i).randbytes(wide) for i in range(len(texts))],
                          "text": column.view(pa.string())})             # bad UTF-8 stays bad
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=rows)
        return file.getvalue()
    values = [b'"' + t + b'"' if isinstance(t, bytes) else json.dumps(t).encode() for t in texts]
    lines = b"".join(b'{"text": %s}\n' % value for value in values)
    return gzip.compress(lines, 1, mtime=0) if ending.endswith(".gz") else lines


def dataset(ending: str, shards: int = 3, rows: int = 15) -> tuple[dict[str, bytes], list[str]]:
    texts = [f"document {i}: {noise(i, 600)}" for i in range(shards * rows)]
    files = {f"data/train-{i:05d}-of-{shards:05d}{ending}": shard(ending, texts[i * rows:(i + 1) * rows])
             for i in range(shards)}
    return files, texts


def noise(seed: int, size: int) -> str:
    """Text that gzip cannot make small."""
    return base64.b64encode(random.Random(seed).randbytes(size)).decode()


def source(**more) -> su.Source:
    return su.Source("web", "hf:owner/web", **more)


def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def stream(source, cursor=None, **reading):
    """(texts, cursors, seconds waited)"""
    naps = []
    rows = list(su.documents(source, cursor, **{"sleep": naps.append, **reading}))
    return [text for text, _ in rows], [cursor for _, cursor in rows], naps


@pytest.mark.parametrize("ending", ENDINGS)
def test_faults_neither_lose_nor_repeat_a_document(hub, ending, monkeypatch):
    files, texts = dataset(ending)
    hub.commit("owner/web", files | {"README.md": b"---\nlicense: mit\n---\n"})
    hub.page_size = 2
    clean, cursors, naps = stream(source())
    assert clean == texts and naps == []
    requests = len(hub.log)
    kinds = [429, 500, "cut", "short", 503, "garble", 404]
    if ending == ".jsonl":                             # a damaged line is no damaged file: who could tell
        kinds.remove("garble")
    for first in range(3):
        start = len(hub.log)
        hub.faults = {start + n: kinds[n % len(kinds)] for n in range(first + 1, 6 * requests, 3)}
        again, same_cursors, naps = stream(source())
        assert again == texts and same_cursors == cursors, f"faults from request {first + 1} on"
        assert len(naps) > requests / 4
    start = len(hub.log)
    hub.faults = {start + requests // 2: "stall", start + requests: "stall"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    again, _, naps = stream(source())
    assert again == texts and naps


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_stream_goes_on_from_any_cursor(hub, ending):
    files, texts = dataset(ending)
    commit = hub.commit("owner/web", files)
    _, cursors, _ = stream(source(revision=commit))
    for i in [0, 6, 7, 13, 14, 15, 28, 29, 30, 43, 44]:
        hub.faults = {len(hub.log) + 4: 500, len(hub.log) + 6: "cut"}
        assert stream(source(revision=commit), cursors[i])[0] == texts[i + 1:]


@pytest.mark.parametrize("ending", (".jsonl", ".jsonl.gz"))
def test_a_large_file_is_read_in_ranges_and_goes_on_in_its_middle(hub, ending):
    texts = [noise(i, 75_000) for i in range(60)]       # 6 MB, gzip 4.6 MB
    hub.commit("owner/web", {f"big{ending}": shard(ending, texts)})
    _, cursors, _ = stream(source())
    bodies = [sent for _, path, _, sent in hub.log if path.startswith("/cdn/")]
    assert len(bodies) == 2 and max(bodies) == 4 << 20
    hub.faults = {len(hub.log) + 6: "cut"}    # second range: revision, tree, 2 for the first, redirect
    again, same_cursors, naps = stream(source())
    assert again == texts and same_cursors == cursors and naps == [1]
    assert stream(source(), cursors[50])[0] == texts[51:]


def test_of_parquet_only_the_text_column_is_fetched(hub):
    files, texts = dataset(".parquet", shards=2, rows=70)
    hub.commit("owner/web", files)
    assert stream(source())[0] == texts
    # The embeddings (20 kB a row) are not fetched.
    assert hub.bodies() < 0.2 * sum(map(len, files.values()))


def test_ten_resumes_give_the_same_store(hub, tiny, tmp_path):
    """An outage cuts every call off, meanwhile the dataset changes; the store is an undisturbed one's."""
    from pydoc_data.topics import topics
    whole = [f"{name} {round} {topics[name]}" for round in range(26) for name in sorted(topics)]   # 12 MB
    random.Random(0).shuffle(whole)
    hub.commit("owner/web", {f"train-{i}.parquet": shard(".parquet", whole[i::4], wide=1, rows=20)
                             for i in range(4)})

    def prepare(folder, **reading):
        su.prepare_tokens([source()], tiny.tokenizer, folder, tokens_per_source={"web": 10 ** 9},
                          validation_documents=4, shard_tokens=300_000, progress=lambda line: None,
                          **reading)
        return manifest(folder)
    one = prepare(tmp_path / "one")
    resumes, cursors = 0, set()
    while True:
        # About 1.4 MB further: a flush (1 MB) and what follows it is lost.
        hub.faults = {len(hub.log) + 34: 503}
        try:
            two = prepare(tmp_path / "two", tries=1)
            break
        except su.SourceError as error:
            resumes += 1
            assert "HTTP 503" in str(error) and resumes < 100
            if resumes == 3:
                hub.commit("owner/web", dataset(".parquet")[0])
            cursors.add(json.dumps(manifest(tmp_path / "two")["sources"]["web"]["cursor"]))
    assert resumes >= 10 and len(cursors) >= 8, (resumes, cursors)
    assert one == two and one["sources"]["web"]["documents"] == len(whole) - 4
    written = [{path.name: path.read_bytes() for path in (tmp_path / folder / "web").iterdir()}
               for folder in ("one", "two")]
    assert written[0] == written[1]


def test_waits_double_up_to_a_minute_then_one_clear_sentence(hub):
    files, texts = dataset(".parquet")
    hub.commit("owner/web", files)
    last, naps, read = max(files), [], []
    hub.broken = {last: 503}
    with pytest.raises(su.SourceError) as caught:
        for text, _ in su.documents(source(), sleep=naps.append):
            read.append(text)
    assert naps == [1, 2, 4, 8, 16, 32, 60] and read == texts[:30]
    message = str(caught.value)
    for part in ("source web", "hf:owner/web", last, "HTTP 503", "8 of 8", "row 0 of", "Nothing written is lost",
                 "run the same"):
        assert part in message, (part, message)
    hub.broken = {}


def test_the_hub_says_how_long_to_wait(hub):
    files, texts = dataset(".jsonl")
    hub.commit("owner/web", files)
    hub.faults = {2: 429}
    assert stream(source())[2] == [7]                                    # Retry-After: 7
    hub.headers[429] = {"RateLimit": '"resolvers";r=0;t=213',
                        "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}
    hub.faults = {len(hub.log) + 4: 429}
    assert stream(source())[2] == [213]
    hub.faults = {len(hub.log) + 4: 429}
    with pytest.raises(su.SourceError, match="213 s more would pass the deadline"):
        stream(source(), deadline=time.monotonic() + 200)
    hub.faults = {len(hub.log) + 4: 429}
    assert stream(source(), deadline=time.monotonic() + 400)[0] == texts


@pytest.mark.parametrize("ending, fault", [
    (".parquet", "garble"), (".jsonl.gz", "garble"), (".jsonl.gz", "tail"), (".parquet", "tail"),
    (".jsonl", 404)])
def test_a_shard_that_stays_bad_stops_the_stream_and_is_named(hub, ending, fault):
    files, texts = dataset(ending)
    bad = sorted(files)[1]
    if fault == "tail":                                 # the upload itself was cut short
        files[bad] = files[bad][:len(files[bad]) * 2 // 3]
    else:
        hub.broken = {bad: fault}
    hub.commit("owner/web", files)
    read = []
    with pytest.raises(su.SourceError) as caught:
        for text, _ in su.documents(source(), sleep=lambda seconds: None):
            read.append(text)
    assert all(part in str(caught.value) for part in (bad, "row", "source web"))
    # What came before the damage is delivered, in order, once.
    assert read == texts[:len(read)] and len(read) >= 15
    assert ("HTTP 404" if fault == 404 else "damaged at or after row") in str(caught.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_null_rows_and_bad_utf8_are_counted_not_fatal(hub, tiny, tmp_path, ending):
    rows = ["first good document", None, b"caf\xe9 \xff\xfe", "second good document", None, "  "]
    rows += [f"good {i}" for i in range(20)]
    hub.commit("owner/web", {f"train{ending}": shard(ending, rows)})
    su.prepare_tokens([source()], tiny.tokenizer, tmp_path, tokens_per_source={"web": 10 ** 6},
                      validation_documents=1)
    entry = manifest(tmp_path)["sources"]["web"]
    assert entry["skipped"] == {"null": 2, "invalid UTF-8": 1, "empty": 1}
    assert entry["documents"] == 21


# --- the revision


def test_the_revision_is_resolved_once_recorded_and_kept(hub, tiny, tmp_path):
    files, texts = dataset(".jsonl")
    first = hub.commit("owner/web", files)

    def prepare(wanted, **more):
        su.prepare_tokens([source(**more)], tiny.tokenizer, tmp_path / "store",
                          tokens_per_source={"web": wanted}, validation_documents=2, shard_tokens=3000,
                          sleep=lambda seconds: None, tries=2)
        return manifest(tmp_path / "store")["sources"]["web"]
    assert prepare(10)["revision"] == first
    others, _ = dataset(".jsonl", shards=4, rows=11)
    second = hub.commit("owner/web", others)             # main moves on
    start = len(hub.log)
    assert prepare(10)["revision"] == first and len(hub.log) == start    # complete: no request
    entry = prepare(10 ** 6)
    assert entry["revision"] == first and entry["documents"] == len(texts) - 2
    assert not [path for _, path, _, _ in hub.log[start:] if second in path]
    assert prepare(10 ** 7, revision=first)["revision"] == first
    with pytest.raises(su.ParameterError) as caught:
        prepare(10 ** 8, revision=second)
    assert first in str(caught.value) and second in str(caught.value)
    with pytest.raises(su.ParameterError) as caught:
        prepare(10 ** 8, revision="main")
    assert first in str(caught.value) and second in str(caught.value)
    hub.forget("owner/web", first)
    with pytest.raises(su.ParameterError) as caught:
        prepare(10 ** 8)
    assert all(part in str(caught.value) for part in (first, second, "no longer"))


def test_what_is_held_out_beside_a_source_is_of_the_commit_it_was_begun_with(hub, tiny, tmp_path):
    """The growing store fills a folder for each source; main of one moves on between two."""
    held, text = tiny.recipe.max_eval_samples, "words of training text " * 40
    now, later = ([f"{when} held out {i}" for i in range(held)] for when in ("now", "later"))
    first = hub.commit("owner/web", {"a.jsonl": shard(".jsonl", [*now, *[text] * 9])})
    code = [*(f"code {i}" for i in range(held)), *now, *later, text]
    hub.commit("owner/code", {"a.jsonl": shard(".jsonl", code)})
    recipe = dataclasses.replace(tiny.recipe, token_budget=10 ** 6, sources=(
        source(weight=0.5), su.Source("code", "hf:owner/code", 0.5)))

    def fill(name):
        stentor.growing.fill_source(recipe, tiny.tokenizer, tmp_path, name, shard_tokens=6400)
        return manifest(tmp_path / name)["sources"][name]
    assert fill("web")["revision"] == first
    second = hub.commit("owner/web", {"a.jsonl": shard(".jsonl", [*later, *[text] * 9])})
    entry = fill("code")
    assert entry["skipped"] == {"also in validation": held} and entry["documents"] == held + 1
    assert not [path for _, path, _, _ in hub.log if second in path]


def test_a_stream_stays_at_its_commit_when_main_moves(hub):
    files, texts = dataset(".parquet")
    first = hub.commit("owner/web", files)
    rows = su.documents(source())
    read = [next(rows)[0] for _ in range(20)]
    second = hub.commit("owner/web", dataset(".parquet", rows=9)[0])
    read += [text for text, _ in rows]
    assert read == texts and first != second
    assert len(stream(source(revision=first))[0]) == 45
    assert len(stream(source(revision="main"))[0]) == 27


def test_what_cannot_be_helped_is_said_at_once(hub, monkeypatch):
    hub.commit("owner/web", dataset(".jsonl")[0])
    nothing = dataclasses.replace(source(), path="hf:owner/nothing")
    for asked, parts in ((source(revision="v9"), ("v9", "RevisionNotFound")),
                         (nothing, ("owner/nothing", "HTTP 401"))):
        with pytest.raises(su.ParameterError) as caught:
            stream(asked, sleep=lambda seconds: pytest.fail("waited for what cannot come"))
        assert all(part in str(caught.value) for part in ("source web", "HF_TOKEN", *parts))
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(su.ParameterError, match="OfflineModeIsEnabled.*HF_HUB_OFFLINE"):
        stream(source(), sleep=lambda seconds: pytest.fail("waited for what cannot come"))


# --- which files


def card(*configs) -> bytes:
    """A README with a dataset card's YAML front matter: (config, split, path or paths, default)"""
    import yaml
    listed = [{"config_name": config, "data_files": [{"split": split, "path": paths}] if split else paths}
              | ({"default": True} if more else {}) for config, split, paths, *more in configs]
    front = f"license: odc-by\nconfigs:\n{yaml.safe_dump(listed)}\n"
    return f"---\n{front}---\n# A dataset\n---\nconfigs: no\n".encode()


FINEWEB_EDU = ["data/CC-MAIN-2024-10/train-00000-of-00020.parquet",
               "data/CC-MAIN-2024-10/train-00001-of-00020.parquet",
               "sample/100BT/000_00000.parquet",
               "sample/10BT/000_00000.parquet", "sample/10BT/013_00000.parquet"]
FINEWEB_HQ = ["data/CC-MAIN-2024-46/000_00000.parquet", "data/CC-MAIN-2024-51/000_00000.parquet",
              "data/CC-MAIN-2024-51/001_00000.parquet"]
SMOLLM = ["cosmopedia-v2/train-00000-of-00104.parquet",
          "cosmopedia-v2/train-00103-of-00104.parquet",
          "fineweb-edu-dedup/train-00000-of-00234.parquet",
          "python-edu/train-00000-of-00002.parquet"]
MATHS = ("finemath-3plus", "finemath-4plus", "infiwebmath-3plus", "infiwebmath-4plus")
FINEMATH = [f"{name}/train-0000{i}-of-00064.parquet" for name in MATHS for i in (0, 1)]
STACK = ["data/C++/train-00000.parquet", "data/C/train-00000.parquet", "data/Python/train-00000.parquet",
         "data/Python/train-00001.parquet"]
SPLITS = ["data/test-00000.parquet", "data/train-00000.parquet", "data/validation-00000.parquet"]
CARDS = {
    "fineweb-edu": (FINEWEB_EDU, card(("default", "train", "data/*/*"),
                                      ("sample-10BT", "train", "sample/10BT/*"),
                                      ("sample-100BT", "train", "sample/100BT/*"))),
    "fineweb-hq": (FINEWEB_HQ, card(("default", "train", "data/*/*"),
                                    ("CC-MAIN-2024-51", "train", "data/CC-MAIN-2024-51/*"))),
    "smollm-corpus": (SMOLLM, card(*[(name, "train", f"{name}/train-*") for name in
                                     ("cosmopedia-v2", "fineweb-edu-dedup", "python-edu")])),
    "finemath": (FINEMATH, card(*[(name, "train", f"{name}/train-*") for name in MATHS])),
    "stack": (STACK, card(*[(name, "train", [f"data/{name}/*.parquet"])
                            for name in ("C", "C++", "Python")])),
    "splits": (SPLITS, card(("default", "train", "data/train-*"),
                            ("default-test", "test", "data/test-*"))),
    "other names": (["x/a.jsonl", "y/deep/er/b.jsonl.gz", "y/deep/c.csv"],
                    card(("first", None, "x/a.jsonl"), ("second", "train", ["y/**"], "default"))),
}


@pytest.mark.parametrize("name, config, expected, by_path", [
    ("fineweb-edu", "sample-10BT", FINEWEB_EDU[3:], True),
    ("fineweb-edu", "CC-MAIN-2024-10", FINEWEB_EDU[:2], True),     # not in the card: by its folder
    ("fineweb-edu", None, FINEWEB_EDU[:2], False),                 # the card's default
    ("fineweb-hq", "CC-MAIN-2024-51", FINEWEB_HQ[1:], True),
    ("fineweb-hq", None, FINEWEB_HQ, True),
    ("smollm-corpus", "cosmopedia-v2", SMOLLM[:2], True),
    ("finemath", "finemath-4plus", FINEMATH[2:4], True),
    ("stack", "Python", STACK[2:], True),
    ("stack", "C", STACK[1:2], True),
    ("splits", None, SPLITS[1:2], True),
    ("other names", None, ["y/deep/er/b.jsonl.gz"], False),
    ("other names", "first", ["x/a.jsonl"], False)])
def test_config_and_split_choose_the_files(hub, name, config, expected, by_path):
    names, readme = CARDS[name]
    hub.page_size = 3
    files = {path: b"x" * (i + 1) for i, path in enumerate(names)}
    files |= {"data/notes.txt": b"", ".gitattributes": b""}
    hub.commit("owner/web", files | {"README.md": readme})
    found = stentor.sources.source_files(source(config=config))
    assert found == {path: len(files[path]) for path in expected}
    hub.commit("owner/web", files | {"README.md": b"no front matter"})
    if by_path:
        assert list(stentor.sources.source_files(source(config=config))) == expected
    hub.commit("owner/web", files)
    if by_path:
        assert list(stentor.sources.source_files(source(config=config))) == expected


def test_a_missing_config_or_split_is_named(hub):
    listed = "cosmopedia-v2, fineweb-edu-dedup, python-edu"
    for name, more, parts in (("smollm-corpus", {"config": "cosmopedia-v3"}, ("config cosmopedia-v3", listed)),
                              ("smollm-corpus", {}, ("config default", listed)),
                              ("splits", {"split": "dev"}, ("split dev",))):
        names, readme = CARDS[name]
        hub.commit("owner/web", {path: b"x" for path in names} | {"README.md": readme})
        with pytest.raises(su.ParameterError) as caught:
            stentor.sources.source_files(source(**more))
        assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("front", [b"configs: no", b"configs:", b"- a list", b"a: [broken", b"just text",
                                   b"configs:\n- config_name: x\n- 7\n- config_name: y\n  data_files:"])
def test_a_card_that_says_nothing_of_use_leaves_it_to_the_paths(hub, front):
    hub.commit("owner/web", {"data/train-0.jsonl": b"x", "data/test-0.jsonl": b"x",
                             "README.md": b"---\n" + front + b"\n---\n"})
    assert list(stentor.sources.source_files(source())) == ["data/train-0.jsonl"]


DIRS = ["README.md", "en/data/train-0.jsonl", "en/data/test-0.jsonl", "en/more.jsonl", "fr/a.jsonl",
        "fr/b/c.jsonl", "fr/.hidden/d.jsonl", "train.jsonl"]


@pytest.mark.parametrize("config, split, expected", [
    ({"data_dir": "en"}, "test", ["en/data/test-0.jsonl"]),
    ({"data_dir": "en/"}, "train", ["en/data/train-0.jsonl"]),
    ({"data_dir": "fr"}, "train", ["fr/a.jsonl", "fr/b/c.jsonl"]),       # no file there names a split
    ({"data_dir": "fr"}, "test", None),
    ({"data_dir": "de"}, "train", None),
    ({"data_dir": "en", "data_files": "more.jsonl"}, "train", ["en/more.jsonl"]),
    ({"data_dir": "en", "data_files": [{"split": "test", "path": ["more.jsonl", "data/test-*"]}]},
     "test", ["en/data/test-0.jsonl", "en/more.jsonl"]),
    ({"data_files": "en/**.jsonl"}, "train",
     ["en/data/test-0.jsonl", "en/data/train-0.jsonl", "en/more.jsonl"]),
    ({"data_files": "fr/[a-c].jsonl"}, "train", ["fr/a.jsonl"]),
    ({"data_files": ["fr/*", "fr/*.jsonl", "nothing/*"]}, "train", ["fr/a.jsonl"]),
    ({"data_files": ["hf://datasets/owner/other/a.jsonl", "/etc/*", "https://127.0.0.1/x.jsonl"]},
     "train", None)])
def test_a_cards_folders_and_patterns_are_read_as_datasets_does(hub, config, split, expected):
    import yaml
    listed = [{"config_name": "x", **config}, {"config_name": "y", "data_files": "train.jsonl"}]
    readme = f"---\n{yaml.safe_dump({'configs': listed})}---\n".encode()
    hub.commit("owner/web", dict.fromkeys(DIRS, b"x") | {"README.md": readme})
    asked = source(config="x", split=split)
    if expected is None:
        with pytest.raises(su.ParameterError, match=f"config x, split {split}; .* configs: x, y"):
            stentor.sources.source_files(asked)
    else:
        assert list(stentor.sources.source_files(asked)) == expected
    assert all("/owner/web/" in path for _, path, _, _ in hub.log)


# --- the token


def test_the_token_goes_to_the_hub_only_and_is_never_said(hub, tmp_path, tiny, capfd):
    import traceback
    files, _ = dataset(".parquet")
    hub.commit("owner/web", files | {"README.md": b""})
    hub.faults = {2: 500, 5: 403, 9: "cut"}
    said = []
    for folder, asked, tries in (("a", source(), 8), ("b", source(revision="v9"), 8),
                                 ("c", source(), 1)):
        try:
            su.prepare_tokens([asked], tiny.tokenizer, tmp_path / folder,
                              tokens_per_source={"web": 10 ** 6}, validation_documents=1,
                              sleep=lambda seconds: None, tries=tries)
        except (su.ParameterError, su.SourceError) as error:
            said.append("".join(traceback.format_exception(error)))
        hub.broken = {max(files): 500}
    assert len(said) == 2
    kept = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    everything = "".join([*said, *capfd.readouterr(), *kept])
    assert "trying" not in everything and "try 2 of 8" in everything and "HTTP 500" in everything
    assert TOKEN not in everything and "signed-canary" not in everything
    for _, path, authorization, _ in hub.log:
        assert authorization == (None if "/cdn/" in path else f"Bearer {TOKEN}")


# --- no network, and names of models, tokenizers and vocabularies


def everything_that_asks(tiny, folder, **reading) -> dict:
    """Each way in which the suite asks the hub for something, as functions without arguments."""
    def store():
        su.prepare_tokens([source()], tiny.tokenizer, folder / "store", tokens_per_source={"web": 10},
                          validation_documents=1, **reading)
    return {"the commit": lambda: su.pin_revision(source(), **reading),
            "the files": lambda: stentor.sources.source_files(source(revision="0" * 40), **reading),
            "the documents": lambda: list(su.documents(source(), **reading)), "the store": store,
            "a vocabulary": lambda: su.find_vocabulary("english-1024-strict-nocapcode-v1", **reading),
            "a tokenizer": lambda: su.load_tokenizer("hf:owner/web", **reading),
            "a tokenizer without hf:": lambda: su.load_tokenizer("owner/web", **reading),
            "a model": lambda: su.load_model("hf:owner/web")}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(stentor.hub, "_answered", set())


def free_port() -> int:
    import socket
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "http://no-such-host.invalid"])
def test_without_a_network_every_path_says_so_in_one_sentence_within_seconds(
        hub, empty_cache, tiny, tmp_path, monkeypatch, capfd, address):
    point_to(address.format(free_port()), monkeypatch)
    naps = []
    monkeypatch.setattr(stentor.hub.time, "sleep", naps.append)    # load_model hands no other on
    for name, ask in everything_that_asks(tiny, tmp_path, sleep=naps.append).items():
        naps.clear()
        with pytest.raises((su.SourceError, su.ParameterError), match="switch Internet on") as caught:
            ask()
        assert sum(naps) <= 5, (name, naps)
        said = str(caught.value)
        assert "On Kaggle" in said and "ConnectError" in said and "\n" not in said, (name, said)
        assert caught.value.__suppress_context__ and caught.value.__cause__ is None, name
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_hub_that_answers_after_one_refused_connection_is_asked_again(
        empty_cache, hub, tiny, monkeypatch):
    """huggingface_hub 1.11 closes its client at a refused connection, and goes on with that."""
    wanted = {f"vocabs/{VOCABULARY}.vocab": tiny.tokenizer.vocabulary.to_bytes()}
    port, late = free_port(), []
    point_to(f"http://127.0.0.1:{port}", monkeypatch)

    def begin(seconds):
        if not late:
            late.append(HubServer(port=port).__enter__())
            late[0].commit("alasdairforsythe/tokenmonster", wanted)
    try:
        path = su.find_vocabulary(VOCABULARY, sleep=begin)
        assert path.read_bytes() == wanted[f"vocabs/{VOCABULARY}.vocab"] and len(late) == 1
    finally:
        late[0].__exit__()


VOCABULARY = "english-1024-strict-nocapcode-v1"


@pytest.mark.parametrize("fault", [503, 429, "cut", "silence", 404])
def test_a_hiccup_does_not_cost_a_vocabulary(hub, empty_cache, tiny, fault):
    data = tiny.tokenizer.vocabulary.to_bytes()
    hub.commit("alasdairforsythe/tokenmonster", {f"vocabs/{VOCABULARY}.vocab": data, "README.md": b""})
    hub.faults, naps = {1: fault}, []
    assert su.find_vocabulary(VOCABULARY, sleep=naps.append).read_bytes() == data and len(naps) == 1
    with pytest.raises(su.ParameterError, match="not among the released ones"):
        su.find_vocabulary("english-999-strict-v1")


def test_a_hub_name_is_a_hub_name_for_tokenizers_and_models(hub, empty_cache, tiny, tmp_path,
                                                            monkeypatch):
    """One of ours and one of transformers' own; and again without a network, from the cache."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    model = su.build_model(tiny.recipe.shape, seed=3)
    su.save_model_folder(model, tiny.tokenizer, tmp_path / "ours")
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        hub.commit(f"owner/{name}", files | {"onnx/model.safetensors": b"x"})
    for again in (False, True):
        assert su.load_tokenizer("hf:owner/ours").encode("the end") == tiny.tokenizer.encode("the end")
        assert su.load_tokenizer("owner/ours").encode("the end") == tiny.tokenizer.encode("the end")
        kind = type(su.load_tokenizer("hf:owner/theirs")).__name__
        assert kind.startswith(("PreTrainedTokenizerFast", "TokenizersBackend"))
        loaded = su.load_model("hf:owner/ours").state_dict()
        assert all((loaded[name] == weight).all() for name, weight in model.state_dict().items())
        point_to(f"http://127.0.0.1:{free_port()}", monkeypatch)
        monkeypatch.setattr(stentor.hub.time, "sleep", lambda seconds: None)
    assert not [path for _, path, _, _ in hub.log if "onnx" in path]


def test_a_name_that_the_hub_does_not_give_is_refused_at_once(hub, empty_cache, tiny, tmp_path):
    hub.commit("owner/web", {"config.json": b"{}"})
    for fault, part in ((401, "HTTP 401"), (403, "HTTP 403")):
        hub.faults = dict.fromkeys(range(1, 1000), fault)
        asking = everything_that_asks(tiny, tmp_path, sleep=lambda s: pytest.fail("waited"))
        for name, ask in asking.items():
            with pytest.raises(su.ParameterError, match="HF_TOKEN") as caught:
                ask()
            assert part in str(caught.value), (name, str(caught.value))
    for path in ("no/such/folder", "/no/such", "hf:a/b/c"):
        for load in (su.load_tokenizer, su.load_model):
            with pytest.raises(su.ParameterError, match="is not there|no such folder"):
                load(path)


def test_a_cache_that_cannot_be_written_is_named(hub, empty_cache, tiny, tmp_path, monkeypatch):
    from huggingface_hub import constants
    hub.commit("alasdairforsythe/tokenmonster",
               {f"vocabs/{VOCABULARY}.vocab": tiny.tokenizer.vocabulary.to_bytes()})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(su.ParameterError, match="cache cannot be written.*HF_HOME"):
        su.find_vocabulary(VOCABULARY, sleep=lambda s: pytest.fail("waited"))


def test_notebooks_show_the_sentence_and_no_stack(capsys):
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    for kind in (su.SourceError, su.FeedStopped, su.CheckpointError, su.TrainingFailed,
                 su.TrainingDiverged):
        shell.user_ns["error"] = kind("source web: nothing to read; token=abcdef123456789")
        shell.run_cell("raise error")
        said = "".join(capsys.readouterr())
        assert f"{kind.__name__}: source web: nothing to read" in said, said
        assert "Traceback" not in said and "raise error" not in said, said


FRESH = """
import json, os, sys
import stentor_utils as su
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
api, name = HfApi(), "data/train-00001-of-00003.jsonl.gz"
commit = api.dataset_info("owner/web").sha
assert api.dataset_info("owner/web", revision="main").sha == commit
with HfFileSystem().open(f"datasets/owner/web/{name}", revision=commit, block_size=1000) as file:
    file.seek(5000)
    part = file.read(3000).hex()
there = hf_hub_download("owner/web", name, repo_type="dataset", cache_dir=sys.argv[1])
whole = open(there, "rb").read().hex()
texts = [text for text, _ in su.documents(su.Source("web", "hf:owner/web"))]
names = sorted(api.list_repo_files("owner/web", repo_type="dataset"))
print(json.dumps([commit, names, part, whole, texts]))
"""


def test_a_fresh_process_and_the_hubs_own_client(tmp_path):
    """No patching: HF_ENDPOINT alone points a new process to the server.

    huggingface_hub's own client reads from it too, so it is the hub's protocol that the other tests speak.
    """
    files, texts = dataset(".jsonl.gz")
    with HubServer(page_size=2) as server:
        commit = server.commit("owner/web", files | {"README.md": b"# card"})
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], cwd=REPO, env=environment,
                              capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sha, names, part, whole, read = json.loads(done.stdout.splitlines()[-1])
    file = files["data/train-00001-of-00003.jsonl.gz"]
    assert sha == commit and names == sorted([*files, "README.md"])
    assert bytes.fromhex(part) == file[5000:8000] and bytes.fromhex(whole) == file
    assert read == texts and TOKEN not in done.stdout + done.stderr
