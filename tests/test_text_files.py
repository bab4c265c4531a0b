"""Text files as people's tools write them: every document once, whole and alone, or counted and skipped."""
import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO
from hub_server import HubServer

import stentor.formats
import stentor.growing
import stentor_utils as su

TEXTS = [f"Document {i}, said \"{i}\":\nits second line\u2028not a third\u0085nor a fourth\x0cé \U0001f600"
         for i in range(25)]


def through(compression: str, data: bytes) -> bytes:
    """Two frames one after the other, as parallel compressors write them."""
    parts = []
    for part in (data[:len(data) // 2], data[len(data) // 2:]):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, compression) as file:
            file.write(part)
        parts.append(sink.getvalue().to_pybytes())
    return b"".join(parts)


PACK = {"": lambda data: data, ".gz": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]), ".bz2": bz2.compress,
        ".xz": lzma.compress, ".zst": lambda data: through("zstd", data), ".lz4": lambda data: through("lz4", data)}


def written(ending: str, texts=TEXTS) -> bytes:
    """A file of these documents, with a column beside the text where the format has columns."""
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if ending in (".csv", ".tsv"):
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",")
        writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in rows)])
        return file.getvalue().encode()
    if ending in (".parquet", ".arrow"):
        file, table = io.BytesIO(), pa.Table.from_pylist(rows)
        if ending == ".parquet":
            pq.write_table(table, file, row_group_size=7)
        else:
            with pa.ipc.new_stream(pa.PythonFile(file, "w"), table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
                return file.getvalue()
        return file.getvalue()
    return {".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            ".json": json.dumps(rows, indent=2), ".txt": "\n<|doc|>\n".join(texts) + "\n"}[ending].encode()


def read(path, cursor=None, **more):
    """(texts, cursors) of the good documents, (reasons) of the others"""
    source = su.Source("it", str(path), preserve_linebreaks=True, **more)
    texts = list(su.documents(source, cursor))
    return [text for text, _ in texts], [cursor for _, cursor in texts]


def good(path, **more):
    """(documents, {why: rows skipped})"""
    texts, skipped = [], {}
    for text, reason, _ in su.clean_documents(su.Source("it", str(path), **more)):
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            texts.append(text)
    return texts, skipped


ENDINGS = [f"{kind}{packing}" for kind in (".jsonl", ".json", ".csv", ".tsv", ".txt") for packing in PACK] + [
    ".parquet", ".arrow", ".JSONL", ".Txt", ".CSV.GZ", ".Parquet"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_and_packing_goes_on_from_any_row(tmp_path, ending):
    kind, packing = os.path.splitext(f"docs{ending.lower()}")
    kind = ending.lower() if packing not in PACK else f".{kind.split('.')[1]}"
    path = tmp_path / f"docs{ending}"
    path.write_bytes(PACK[packing if packing in PACK else ""](written(kind)))
    texts, cursors = read(path)
    assert texts == TEXTS
    for i in range(24):
        again = read(path, cursors[i])
        assert again == (TEXTS[i + 1:], cursors[i + 1:]), f"from row {i + 1}"
    assert read(path, cursors[24]) == ([], [])


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".txt", ".arrow", ".parquet", ".jsonl.zst"])
def test_the_hub_gives_the_same_as_a_local_file(tmp_path, monkeypatch, kind):
    from huggingface_hub import constants
    ending, packing = (".jsonl", ".zst") if kind.endswith(".zst") else (kind, "")
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        server.commit("owner/web", {
            f"data/train-0{kind}": PACK[packing](written(ending)), "dataset_infos.json": b"{}",
            "data/.hidden-train.jsonl": b'{"text": "hidden"}\n', "README.md": b"# card"})
        source = su.Source("it", "hf:owner/web")
        rows = list(su.documents(source))
        assert [text for text, _ in rows] == TEXTS
        assert [text for text, _ in su.documents(source, rows[11][1])] == TEXTS[12:]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_line_ends_and_byte_order_marks(tmp_path, kind, end, encoding):
    path = tmp_path / f"docs{kind}"
    path.write_bytes(written(kind).decode().replace("\r\n", "\n").replace("\n", end).encode(encoding))
    assert read(path)[0] == TEXTS


def test_files_joined_by_cat_keep_no_mark_in_the_middle(tmp_path):
    for kind in (".jsonl", ".txt"):
        path = tmp_path / f"docs{kind}"
        path.write_bytes(written(kind, TEXTS[:2]).decode().encode("utf-8-sig") + b"<|doc|>\n" * (kind == ".txt")
                         + written(kind, TEXTS[2:4]).decode().encode("utf-8-sig"))
        assert read(path)[0] == TEXTS[:4]


@pytest.mark.parametrize("text, expected", [
    ("<|doc|>\none\n<|doc|>\ntwo\n<|doc|>\n", ["one", "two"]),
    ("<|doc|>\none\n<|doc|>\n<|doc|>\ntwo\n<|doc|>", ["one", "two"]),
    ("one\r\n<|doc|> \r\ntwo\r\n", ["one", "two"]),
    ("one\n<|doc|>\n\n<|doc|>\ntwo", ["one", "", "two"]),
    ("it quotes <|endoftext|> here\n<|doc|>\ntwo <|doc|> inline", ["it quotes <|endoftext|> here", "two <|doc|> inline"]),
    ("one<|endoftext|>two\nlines<|endoftext|>", ["one", "two\nlines"]),
    ("<|endoftext|>\none\n<|endoftext|>\n<|endoftext|>two\n", ["one", "two"]),
    ("only one\n\nwith a paragraph\n", ["only one\n\nwith a paragraph"]),
    ("", [])])
def test_separators_of_a_txt(tmp_path, text, expected):
    path = tmp_path / "docs.txt"
    path.write_bytes(text.encode())
    texts, cursors = read(path)
    assert texts == expected
    for i, cursor in enumerate(cursors):
        assert read(path, cursor)[0] == expected[i + 1:]


def test_separators_far_into_a_txt_and_across_blocks(tmp_path):
    """The first document is longer than what is read at once, and separators lie on every border of two reads."""
    for separator in ("\n<|doc|>\n", "<|endoftext|>", "\r\n<|doc|>\r\n"):
        texts = ["x" * (3 << 20), *(("y" * ((1 << 20) - 8 + i)) for i in range(9)), "end"]
        path = tmp_path / "docs.txt"
        path.write_bytes(separator.join(texts).encode())
        assert read(path)[0] == texts


def test_rows_and_strings_across_blocks(tmp_path):
    texts = ["x" * ((1 << 20) - 40 + i) + '\\"é\U0001f600\n' for i in range(0, 40, 3)]
    for kind in (".jsonl", ".json", ".csv"):
        path = tmp_path / f"docs{kind}"
        path.write_bytes(written(kind, texts))
        assert read(path)[0] == texts


def test_hidden_files_and_folders_are_no_data(tmp_path):
    for name in ("a.jsonl", "b/c.csv", "b/d.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(written(os.path.splitext(name)[1].lower(), [f"in {name}"]))
    for name in ("._a.jsonl", ".git/x.txt", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/a.jsonl", "b/.~lock.csv",
                 "dataset_info.json", "state.json", "README.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("nothing of this")
    assert read(tmp_path)[0] == ["in a.jsonl", "in b/c.csv", "in b/d.TXT"]


GOOD = [{"text": f"good {i}"} for i in range(3)]
ODD = ["[" * 100_000 + "]" * 100_000, "[1, 2]", '"a string"', "7", "null", "{broken", '{"text": ',
       '{"text": {"a": 1}}', '{"text": 7}', '{"other": "x"}', '{"text": "half an emoji \\ud83d"}',
       '{"text": null}', '{"text": ["a"]}']


@pytest.mark.parametrize("odd", ODD, ids=lambda line: line[:12])
def test_one_odd_line_among_good_ones(tmp_path, odd):
    """First, in the middle, and last and cut off: it alone is counted."""
    good_lines = [json.dumps(row) for row in GOOD]
    for at in range(4):
        lines = [*good_lines[:at], odd, *good_lines[at:]]
        path = tmp_path / "docs.jsonl"
        path.write_text("\n".join(lines))
        texts, skipped = good(path)
        assert texts == ["good 0", "good 1", "good 2"] and sum(skipped.values()) == 1, skipped
        as_for_sft = su.Source("it", str(path), text_field=None)
        rows = [row for row, _ in su.documents(as_for_sft)]
        assert [row for row in rows if row in GOOD] == GOOD and len(rows) == 4
        if not odd.startswith(("{broken", '{"text": ')) or odd.endswith("}"):
            (tmp_path / "docs.json").write_text(f"[{', '.join(lines)}]")
            assert good(tmp_path / "docs.json") == (texts, skipped)


def test_what_is_not_quite_json_is_read_right(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "a\tbare tab"}\n\n  \n{"text": "b"}\n\n')
    assert good(path) == (["a bare tab", "b"], {})


@pytest.mark.parametrize("text", [
    '{"text": "a"}\n{"text": "b"}\n', '{\n "text": "a"\n}\n{\n "text": "b"\n}',
    '[]\n[{"text":"a"},{"text":"b"},]', ' [\n{"text": "a"}\n, {"text": "b"}]\n'])
def test_what_is_called_json(tmp_path, text):
    (tmp_path / "docs.json").write_text(text)
    assert read(tmp_path / "docs.json")[0] == ["a", "b"]


def test_a_cut_array_gives_what_stands_before(tmp_path):
    (tmp_path / "docs.json").write_bytes(written(".json")[:-300])
    texts = []
    with pytest.raises(su.SourceError, match="docs.json.*damaged at or after row 2.*ends inside a value"):
        for text, _ in su.documents(su.Source("it", str(tmp_path / "docs.json"))):
            texts.append(text)
    assert texts == TEXTS[:len(texts)] and len(texts) >= 20


@pytest.mark.parametrize("lines, texts, odd", [
    (["id,text", '1,"never closed', "2,b", "3,c"], ['"never closed', "b", "c"], 0),
    (["id,text", '1,"never closed', '2,"b, quoted"', '3,"c"'], ['"never closed', "b, quoted", "c"], 0),
    (["id,text", "1,a,b", "2", "3,c"], ["c"], 2),
    (["id,text,,", "1,a,,", "2,b,,,,", "3,c,,"], ["a", "b", "c"], 0),
    (["id;text", "1;a, b", "2;c"], ["a, b", "c"], 0),
    (["text", "a", "", '"two\nlines"'], ["a", "two lines"], 0),
    (["id,text", '1,"said ""so"""', '2,"a" and more'], ['said "so"', '"a" and more'], 0)])
def test_csv_as_tools_write_it(tmp_path, lines, texts, odd):
    path = tmp_path / "docs.csv"
    path.write_text("\n".join(lines) + "\n")
    found, skipped = good(path)
    assert found == texts and sum(skipped.values()) == odd
    long = "w " * 500_000                              # over the csv module's own limit of 131,072
    path.write_text(f"id,text\n1,{long}\n2,b\n")
    assert good(path)[0] == [long.strip(), "b"]


def test_of_a_tsv_a_quote_may_be_a_quote(tmp_path):
    (tmp_path / "docs.tsv").write_text('text\tid\n"Hello," she said, "you."\t1\n"Open\t2\nb, c\t3\n')
    assert good(tmp_path / "docs.tsv") == (['"Hello," she said, "you."', '"Open', "b, c"], {})


# --- refused at once, with the way out


@pytest.mark.parametrize("name, parts", [
    ("docs.xlsx", ["docs.xlsx cannot be read", ".csv", "convert"]), ("docs.zip", [".zst"]), ("docs.parquet.gz", ["Unpack"]),
    ("docs.tar.gz", ["Unpack"]), ("docs", ["cannot be read"]), ("docs.md", ["cannot be read"])])
def test_what_cannot_be_read_is_refused_before_it_is_opened(tiny, tmp_path, name, parts):
    (tmp_path / name).write_bytes(b"x" * 100)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(su.ParameterError) as caught:
            su.prepare_tokens([tiny.source, su.Source("it", str(path))], tiny.tokenizer,
                              tmp_path / "store", tokens_per_source={"topics": 1000, "it": 1000},
                              validation_documents=2)
        parts = parts if path.is_file() else []
        assert all(part in str(caught.value) for part in ["source it", *parts])
        assert "max_eval_samples" not in str(caught.value) and not (tmp_path / "store").exists()


@pytest.mark.parametrize("data, said", [
    (gzip.compress(b"{}"), "is packed by gzip"), (written(".parquet"), "is a parquet file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull")])
def test_a_file_that_is_not_what_its_ending_says_is_refused(tmp_path, data, said):
    for kind in (".jsonl", ".json", ".csv", ".txt"):
        (tmp_path / f"docs{kind}").write_bytes(data)
        with pytest.raises(su.ParameterError, match=f"docs{kind} .*{said}"):
            read(tmp_path / f"docs{kind}")


def test_what_is_left_unread_in_a_folder_is_said(tiny, tmp_path):
    folder, said = tmp_path / "folder", []
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(written(".jsonl"))
    (folder / "b.jsonl.zip").write_bytes(b"PK")
    su.prepare_tokens([su.Source("it", str(folder))], tiny.tokenizer, tmp_path / "store",
                      tokens_per_source={"it": 10},
                      validation_documents=2, progress=said.append)
    assert said == [f"source it: not read in {folder}: b.jsonl.zip"]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"])
def test_a_missing_text_column_is_named_with_those_that_are_there(tiny, tmp_path, kind):
    path = tmp_path / f"docs{kind}"
    path.write_bytes(written(kind))
    with pytest.raises(su.ParameterError) as caught:
        su.prepare_tokens([tiny.source, su.Source("it", str(path), text_field="body")],
                          tiny.tokenizer, tmp_path / "store",
                          tokens_per_source={"topics": 1000, "it": 1000}, validation_documents=2)
    assert all(part in str(caught.value) for part in ("'body'", "id, text", "docs", "text_field"))
    assert not (tmp_path / "store").exists()
    assert read(path, text_field="id")[0][:2] == ([0, 1] if kind not in (".csv", ".tsv") else ["0", "1"])


def test_all_sources_are_checked_before_the_first_is_read(tiny, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    few = su.Source("few", str(tmp_path / "few.jsonl"))

    def prepare(validation_documents):
        su.prepare_tokens([tiny.source, few], tiny.tokenizer, tmp_path / "store",
                          tokens_per_source={"topics": 99, "few": 99},
                          validation_documents=validation_documents)
    with pytest.raises(su.ParameterError, match="source few.* 2 good documents, skipped: 1 null. Lower max_eval_samples"):
        prepare(2)
    assert not (tmp_path / "store").exists()
    prepare(1)                                         # the advice, followed in the same folder
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["sources"]["few"]["documents"] == 1


# --- validation


def stored(tiny, folder, name):
    """The store's training documents of a source, as text."""
    entry = json.loads((folder / "manifest.json").read_text())["sources"][name]
    data = b"".join((folder / shard["file"]).read_bytes() for shard in entry["shards"])
    ids = [int.from_bytes(data[i:i + 2], "little") for i in range(0, len(data), 2)]
    texts, start = [], 0
    for i, value in enumerate(ids):
        if value == tiny.tokenizer.eos_token_id:
            texts.append(tiny.tokenizer.decode(ids[start:i]))
            start = i + 1
    return texts, entry


def test_no_validation_document_is_trained_on_wherever_it_stands_again(tiny, tmp_path):
    """In the same file, in another file, packed otherwise, in a source before, and after a restart."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jsonl").write_bytes(written(".jsonl", ["held one", "held two", "kept a", "held  one\n", "kept a"]))
    (tmp_path / "one" / "b.txt").write_bytes(written(".txt", ["kept b", "held two", "other's held", "kept c " * 50]))
    (tmp_path / "two.csv").write_bytes(written(".csv", ["other's held", "held two", "kept d", "kept e", "held one"]))
    sources = [su.Source("one", str(tmp_path / "one")), su.Source("two", str(tmp_path / "two.csv"))]

    def prepare(wanted):
        su.prepare_tokens(sources, tiny.tokenizer, tmp_path / "store",
                          tokens_per_source=dict.fromkeys(("one", "two"), wanted),
                          validation_documents=2, shard_tokens=8)
    for wanted in (1, 10_000):
        prepare(wanted)
        texts, entry = stored(tiny, tmp_path / "store", "one")
        assert [text.strip() for text in texts] == ["kept a", "kept a", "kept b", ("kept c " * 50).strip()]
        assert entry["documents"] == 4 and entry["skipped"] == {"also in validation": 3}
        texts, entry = stored(tiny, tmp_path / "store", "two")
        assert texts == ["kept d", "kept e"] and entry["skipped"] == {"also in validation": 1}
        assert entry["bytes"] == 12


def test_workers_keep_each_others_validation_out_too(tiny, tmp_path):
    """The growing store: one folder and one worker a source; the same text stands in two of them."""
    held = [f"held out number {i}" for i in range(4)]
    more = ["words of training text " * 40 for _ in range(20)]
    (tmp_path / "a.jsonl").write_bytes(written(".jsonl", ["a first", *held[:3], *more, *held]))
    (tmp_path / "b.jsonl").write_bytes(written(".jsonl", [*held, "a first", *more]))
    sources = tuple(su.Source(name, str(tmp_path / f"{name}.jsonl"), 0.5) for name in ("a", "b"))
    recipe = dataclasses.replace(tiny.recipe, sources=sources, token_budget=10 ** 6)
    for name in ("a", "b"):
        stentor.growing.fill_source(recipe, tiny.tokenizer, tmp_path / "store", name, shard_tokens=6400)
        texts, entry = stored(tiny, tmp_path / "store" / name, name)
        assert {text.strip() for text in texts} == {more[0].strip()}
        assert entry["documents"] == len(texts) == 20
    assert entry["skipped"] == {"also in validation": 1}


# --- memory


PEAK = """
import sys
import datasets      # 70 MB, once: it says which files of a hub dataset are read
import pyarrow.parquet, stentor_utils as su
def peak():          # not ru_maxrss: that is handed on by the process before the exec
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
for path in sys.argv[1:]:
    characters = sum(len(text) for text, _ in su.documents(su.Source("it", path)))
    print(path, characters, round(peak() - before))
"""


def test_memory_does_not_grow_with_a_file(tmp_path):
    """48 MB in one file, one row group: reading all adds 53 MB; to hold one adds 48, as text 48 more."""
    text = "".join(f"line {i} of a document that is one of many\n" for i in range(100))
    texts = [f"{i} {text}" for i in range((48 << 20) // len(text))]
    for kind in (".txt", ".json", ".csv", ".jsonl"):
        (tmp_path / f"docs{kind}").write_bytes(written(kind, texts))
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress((tmp_path / "docs.jsonl").read_bytes(), 1))
    pq.write_table(pa.table({"text": texts}), tmp_path / "docs.parquet", use_dictionary=False,
                   compression="none")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    with HubServer() as server:
        for kind in ("txt", "parquet"):
            data = (tmp_path / f"docs.{kind}").read_bytes()
            server.commit(f"owner/{kind}", {f"train.{kind}": data})
            paths.append(f"hf:owner/{kind}")
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", PEAK, *paths], cwd=REPO, env=environment,
                              capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        path, characters, peak = line.split()
        assert int(characters) >= sum(map(len, texts)) - len(texts), done.stdout
        assert int(peak) < 90, done.stdout
    assert len(done.stdout.splitlines()) == len(paths)


def test_one_endless_line_or_document_is_skipped_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(stentor.formats, "LONGEST_ROW", 3 << 20)
    many = ["y" * (1 << 19)] * 20                      # one line, longer than any document
    (tmp_path / "docs.txt").write_text("<|endoftext|>".join(["a", "x" * (9 << 20), *many]))
    assert good(tmp_path / "docs.txt") == (["a", *many], {"longer than 2,000,000 characters": 1})
    endless = "x" * (9 << 20)
    for kind in (".jsonl", ".txt"):
        (tmp_path / f"docs{kind}").write_bytes(written(kind, ["a", endless, "b"]))
        texts, skipped = good(tmp_path / f"docs{kind}")
        assert texts == ["a", "b"] and list(skipped.values()) == [1]


def test_a_store_reads_on_in_the_middle_of_every_format(tiny, tmp_path):
    """Stopped after some shards and called again, the store is that of one call."""
    texts = [f"document {i} " + "some words of it " * 40 for i in range(30)]
    for kind in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow"):
        path = tmp_path / f"docs{kind}"
        path.write_bytes(written(kind, texts))
        folders = [tmp_path / f"{kind[1:]}-{i}" for i in range(2)]
        for wanted, folder in ((10 ** 6, folders[0]), (1_500, folders[1]), (10 ** 6, folders[1])):
            su.prepare_tokens([su.Source("it", str(path))], tiny.tokenizer, folder, tokens_per_source={"it": wanted},
                              validation_documents=2, shard_tokens=1500)
        for folder in folders:
            assert stored(tiny, folder, "it")[0] == [text.strip() for text in texts[2:]]


def test_source_is_not_changed_by_being_read(tmp_path):
    """One worker's cursor is another worker's start: streams from the same cursor are equal and independent."""
    path = tmp_path / "docs.json"
    path.write_bytes(written(".json"))
    source = su.Source("it", str(path))
    cursor = list(su.documents(source))[4][1]
    kept = dict(cursor)
    one, two = su.documents(source, cursor), su.documents(dataclasses.replace(source), cursor)
    assert [text for pair in zip(one, two) for text, _ in pair] == [text for text in TEXTS[5:] for _ in range(2)]
    assert cursor == kept
