"""The TokenMonster engine: the official goldens with both cores, and invariants on vocabularies made here."""
import base64
import hashlib
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import tokenmonster_hf as tm
from conftest import REPO, SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenmonster_hf import Vocabulary

GOLDEN, VOCABS = SHARED / "tokenmonster/golden", SHARED / "tokenmonster/vocabs"
NAMES = ["code-4096-consistent-v1", "english-1024-clean-v1", "english-4096-strict-nocapcode-v1", "english-8000-consistent-v1",
         "english-8000-strict-nocapcode-v1", "tinystories-2048-strict"]
BACKENDS = ["numba", "python"] if tm.numba else ["python"]
needs_shared = pytest.mark.skipif(not GOLDEN.exists(), reason="../shared is not here")
both = pytest.mark.parametrize("backend", BACKENDS)
PROSE = "\n".join(topics[key] for key in sorted(topics))[:200_000]


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def source_bytes(case):
    """The bytes a golden case speaks of; None when this machine lacks them or has another version of them."""
    if "src" not in case:
        return case["text"].encode() if "text" in case else base64.b64decode(case["b64"])
    source = case["src"]
    if source["kind"] == "file":
        data = Path(source["path"]).read_bytes() if Path(source["path"]).exists() else b""
    else:
        data = topics.get(source["key"], "").encode()
    data = data[source["offset"]:][:source["length"]]
    return data if hashlib.sha256(data).hexdigest() == case["sha256"] else None


def own_vocabulary(capcode=0, backend="auto", size=1000, **more):
    """Words, word pairs and syllables of the Python reference, plus every byte."""
    words = re.findall(r" ?[A-Za-z]+|[0-9]+|[^A-Za-z0-9 ]{2,4}", PROSE)
    count = Counter(words) + Counter(a + b for a, b in zip(words, words[1:])) + Counter(w[:3] for w in words)
    common = [(w, n) for w, n in count.most_common(size) if len(w) > 1]
    probe = Vocabulary.from_tokens([], capcode=capcode, include="all256", backend="python")
    tokens = {}
    for word, n in common:
        token = probe.normalize(word)
        for part in (token, *re.findall(b"[a-z]{2,4}", token)):  # the parts can follow a delete token
            tokens.setdefault(part, n / len(words))
    more = {"include": "all256", **more}
    return Vocabulary.from_tokens(list(tokens), scores=list(tokens.values()), capcode=capcode, backend=backend, **more)


OWN = {capcode: {backend: own_vocabulary(capcode, backend) for backend in BACKENDS} for capcode in (0, 1, 2)}

# Text as it comes, plus what the engine treats specially: case changes, apostrophes, digits, marks, markers, spaces.
TRICKY = list("aAbBzZ0123 '’.,_-\n\t\r\"CDW") + ["é", "É", "e\u0301", "ß", "ſ", "İ", "ﬁ", "Ǆ", "ǅ", "中", "한", "한", "😀", "٣",
          "Ⅷ", "𝐀", "\u034f", "\u0316\u0301", " the", " The", "THE ", "'s", "’S", "  ", "\x14", "\x00"]
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(TRICKY), max_size=60).map("".join),
                  st.integers(0, len(PROSE) - 300).flatmap(lambda i: st.integers(0, 300).map(lambda n: PROSE[i:i + n])))
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


# ---- goldens


@needs_shared
@both
@pytest.mark.parametrize("name", NAMES)
def test_official_ids(name, backend):
    vocabulary, compared = Vocabulary.from_file(VOCABS / f"{name}.vocab", backend=backend), 0
    for case in golden(name)["cases"]:
        data = source_bytes(case)
        if data is None:
            continue
        ids = vocabulary.encode(data)
        assert ids.tolist() == case["ids"], data[:200]
        assert vocabulary.missing(data) == case.get("missing", 0)
        decoded = vocabulary.decode_bytes(ids)
        if "decoded_sha256" in case:
            assert hashlib.sha256(decoded).hexdigest() == case["decoded_sha256"]
        elif "decoded_b64" in case:
            assert decoded == base64.b64decode(case["decoded_b64"])
        else:
            assert decoded == (data if case["decoded"] == "=input" else case["decoded"].encode())
        compared += 1
    assert compared >= 140  # those without a source file


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_file_is_written_back_byte_for_byte(name, tmp_path):
    path = VOCABS / f"{name}.vocab"
    Vocabulary.from_file(path).save(tmp_path / "copy.vocab")
    assert (tmp_path / "copy.vocab").read_bytes() == path.read_bytes()
    assert os.listdir(tmp_path) == ["copy.vocab"]


@needs_shared
@both
def test_official_normalisation(backend):
    for case in golden("extra-normalize")["cases"]:
        out = tm._normalize(base64.b64decode(case["in"]), case["flag"], 1)
        if "official_panics" in case:
            assert out == b""  # one white space byte, trimmed
        else:
            assert tm._capcode_encode(out, case["capcode"], backend) == base64.b64decode(case["out"]), case


@needs_shared
@both
def test_official_decoding(backend):
    """Streaming: the official parts, but what decoding in one go gives where the official streams panic, cut characters,
    or (two level-1 markers in a row) disagree with their own batch."""
    alike = total = 0
    for entry in golden("extra-decode")["vocabs"]:
        path = VOCABS / f"{entry['vocab']}.vocab"
        if not path.exists():
            continue
        vocabulary = Vocabulary.from_file(path, backend=backend)
        for case in entry["cases"]:
            decoded, decoder, step = base64.b64decode(case["decoded"]), vocabulary.decoder(), case["chunk"]
            assert vocabulary.decode_bytes(case["ids"]) == decoded
            parts = [decoder.push(case["ids"][i:i + step]) for i in range(0, len(case["ids"]), step)]
            assert "".join(parts) + decoder.flush() == decoded.decode(errors="replace")
            twice = vocabulary.capcode == 1 and b"\x7f\x7f" in b"".join(vocabulary._pieces(case["ids"]))
            if "stream_parts" in case and decoded.isascii() and not twice:
                total += 1
                alike += parts == [base64.b64decode(p).decode() for p in case["stream_parts"]]
    assert alike == total > 50


def parse_yaml(text):
    """The token lists of the goldens, which use a small part of YAML."""
    out, section = {"tokens": [], "special": [], "include": []}, None
    for line in text.splitlines():
        if line.startswith("  - token: "):
            token = json.loads(line[11:])
            is_hex = token.startswith("TokenMonsterHexEncode{")
            out[section].append([bytes.fromhex(token[22:-1]) if is_hex else token.encode(), False, 0.0])
        elif line.startswith("    encoded"):
            out[section][-1][1] = True
        elif line.startswith("    score"):
            out[section][-1][2] = float(line.split(": ")[1])
        else:
            section, _, value = line.partition(":")
            out.setdefault(section, value.strip().strip('"'))
            if section.startswith("include-"):
                out["include"].append({"256": "all256"}.get(section[8:-6], section[8:-6]))
    return out


@needs_shared
@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("capcode", [0, 1, 2])
def test_vocabularies_built_from_token_lists_are_the_official_bytes(capcode, index):
    entry = golden(f"extra-tiny-cap{capcode}")["vocabs"][index]
    listed = parse_yaml(entry["yaml"])
    bits = {"nfd": 1, "lowercase": 2, "accents": 4, "quotemarks": 8, "collapse": 16, "trim": 32}
    setting = {"capcode": capcode, "charset": {"none": 0, "utf-8": 1, "utf-16": 2}[listed["charset"]],
               "normalization": sum(bits[word] for word in listed["normalization"].split())}
    probe = Vocabulary.from_tokens([b"a"], **setting)
    built = Vocabulary.from_tokens(
        [token if encoded else probe.normalize(token) for token, encoded, _ in listed["tokens"]],
        scores=[score for *_, score in listed["tokens"]], special_tokens=[token for token, *_ in listed["special"]],
        unk=listed.get("unk") == "true", include=listed["include"], **setting)
    assert built.to_bytes() == base64.b64decode(entry["vocab_b64"])
    for backend in BACKENDS:
        vocabulary = Vocabulary.from_bytes(built.to_bytes(), backend=backend)
        for case in entry["cases"]:
            data = base64.b64decode(case["in"])
            assert vocabulary.encode(data).tolist() == case["ids"]
            assert vocabulary.missing(data) == case["missing"]
            assert vocabulary.decode_bytes(case["ids"]) == base64.b64decode(case["decoded"])


@needs_shared
def test_surgery_gives_the_official_bytes():
    done = 0
    for op in golden("extra-modify")["ops"]:
        if op["vocab"] not in NAMES:
            continue
        vocabulary = Vocabulary.from_file(VOCABS / f"{op['vocab']}.vocab")
        for step in op["args"] if isinstance(op["args"], list) else [op["args"]]:
            if "unk" in step:
                vocabulary.enable_unk()
            vocabulary.delete_tokens(step.get("Delete", []))
            vocabulary.add_tokens(step.get("Add", []))
            vocabulary.add_special_tokens(step.get("Special", []))
            vocabulary.resize(step.get("Resize", len(vocabulary)))
            if step.get("Reset"):
                vocabulary.reset_ids()
        if "official_panics" in op:
            assert len(vocabulary) == op["args"]["Resize"]
            continue
        assert hashlib.sha256(vocabulary.to_bytes()).hexdigest() == op["sha256"], op["op"]
        assert (len(vocabulary), vocabulary.n_ids) == (op["size"], op["nrev"])
        loaded = Vocabulary.from_bytes(vocabulary.to_bytes())
        for case in op["cases"]:
            assert loaded.encode(case["text"]).tolist() == case["ids"]
            assert loaded.decode_bytes(case["ids"]) == base64.b64decode(case["decoded"])
        done += 1
    assert done >= 8


# ---- invariants


@quick
@given(text=texts, capcode=st.sampled_from([0, 1, 2]))
def test_both_cores_give_the_same_ids(text, capcode):
    ids = [vocabulary.encode(text).tolist() for vocabulary in OWN[capcode].values()]
    assert all(other == ids[0] for other in ids)
    decoded = {vocabulary.decode_bytes(ids[0]) for vocabulary in OWN[capcode].values()}
    assert len(decoded) == 1


@pytest.mark.parametrize("capcode", [0, 1, 2])
def test_both_cores_agree_on_20000_random_strings(capcode):
    """Words glued, cut, in any case, with marks, markers, digits, other scripts and stray bytes; a third in each level."""
    draw = random.Random(capcode)
    words = PROSE[:30_000].split()
    odd = ["\u0301", "'", "\u2019", "\x7f", " ", "  ", "\n", "D", "C", "W", "\u00c9", "\u01c5", "\u4e2d",
           "\U0001f600", "3", "\u0130", "-"]

    def piece():
        word = draw.choice(words)
        return draw.choice([word, word, word.upper(), word.title(), word[:draw.randrange(1, 9)], draw.choice(odd)])
    texts = [draw.choice(["", " "]).join(piece() for _ in range(draw.randrange(1, 9))).encode()
             + bytes(draw.randrange(256) for _ in range(draw.choice([0, 0, 0, 2]))) for _ in range(6_700)]
    (ids, offsets), *others = [vocabulary.encode_batch(texts) for vocabulary in OWN[capcode].values()]
    for other_ids, other_offsets in others:
        assert np.array_equal(ids, other_ids) and np.array_equal(offsets, other_offsets)


@pytest.mark.parametrize("capcode", [0, 1, 2])
def test_both_cores_give_the_same_ids_for_a_long_text(capcode):
    text = PROSE[:60_000] + PROSE[:20_000].title() + PROSE[:10_000].upper() + PROSE[:10_000].replace(" ", "")
    ids = [vocabulary.encode(text) for vocabulary in OWN[capcode].values()]
    assert all((other == ids[0]).all() for other in ids if len(other) == len(ids[0])) and len({len(i) for i in ids}) == 1


@both
@pytest.mark.parametrize("capcode", [0, 1, 2])
def test_long_texts_are_encoded_in_pieces_to_the_same_ids(capcode, backend, monkeypatch):
    """Pieces of 1 to 997 bytes, cut inside words, runs of capitals, marks and chains of deleted spaces."""
    vocabulary = own_vocabulary(capcode, backend)
    parts = ["the results of THE EXPERIMENT don't", "A1B2 x'S CAPSlock", "caf\u0065\u0301 \u00e9\u0323", "(a(b(c(d", "  \n\t ",
             "\U0001f600", "word" * 30, "\x00\x7f", "\u4e2d\u6587", "self.x=self.y"]
    parts += [PROSE[i:i + 90].replace(" ", "") for i in range(0, 9000, 300)]
    draw = random.Random(capcode)
    text = " ".join(draw.choice(parts) for _ in range(400 if backend == "numba" else 60))
    whole = vocabulary.encode(text)
    for size in (1, 7, 40, 150, 163, 171, 180, 190, 201, 330, 997):
        monkeypatch.setattr(tm, "LONG_TEXT", size)
        assert np.array_equal(vocabulary.encode(text), whole), size

@both
@pytest.mark.parametrize("capcode, text, encoded", [
    (2, "Hello world", "DC hello world"), (2, " Hello", "C hello"), (2, "a HELLO b", "D aW hello b"),
    (2, "HELlo", "DC hDC eDC llo"), (2, "it's IT's", "D it'sC iDC t's"), (2, "it's IT'S", "D it'sW it's"),
    (2, "camelCase2go", "D camelDC caseD 2D go"), (2, "A1B2c", "DC aD 1DC bD 2D c"), (2, "x.Y", "D x.DW y"),
    (1, "Hello world", "\x7f Hello world"), (1, "a.b 3x", "\x7f a.\x7f b 3\x7f x"), (1, "it's", "\x7f it's"),
    (0, "Hello", "Hello")])
def test_capcode_by_example(capcode, text, encoded, backend):
    assert OWN[capcode][backend].normalize(text) == encoded.encode()
    assert tm._capcode_decode(encoded.encode(), capcode, backend, np.zeros(4, np.int64))[0] == text.encode()


@quick
@given(data=st.binary(max_size=80), capcode=st.sampled_from([0, 1, 2]))
def test_any_bytes_come_back(data, capcode):
    data = data.replace(b"\x7f", b"") if capcode == 1 else data  # level 1 has no code for its own marker
    for vocabulary in OWN[capcode].values():
        ids = vocabulary.encode(data)
        lossless = capcode < 2 or not re.search("[ẞϴ]", data.decode(errors="replace"))
        assert not lossless or vocabulary.decode_bytes(ids) == tm._nfd(data)
        assert vocabulary.missing(data) == 0


@quick
@given(text=texts, capcode=st.sampled_from([0, 1, 2]))
def test_decoding_gives_the_nfd_text_and_every_byte_is_accounted_for(text, capcode):
    text = re.sub("[\x7fẞϴ]", "", text)
    vocabulary = OWN[capcode][BACKENDS[0]]
    ids = vocabulary.encode(text)
    expected = text if "\u034f" in text else unicodedata.normalize("NFD", text)
    assert vocabulary.decode(ids) == unicodedata.normalize("NFD", expected)
    lengths = vocabulary.token_byte_lengths(ids)
    assert len(lengths) == len(ids) and (lengths >= 0).all()
    assert lengths.sum() == len(vocabulary.decode_bytes(ids)) == len(unicodedata.normalize("NFD", text).encode())


@quick
@given(text=texts, capcode=st.sampled_from([0, 1, 2]), data=st.data())
def test_streaming_is_decoding(text, capcode, data):
    vocabulary = OWN[capcode][BACKENDS[0]]
    ids = vocabulary.encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    decoder = vocabulary.decoder()
    parts = [decoder.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)])]
    assert "".join(parts) + decoder.flush() == vocabulary.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)  # characters arrive whole
    one_by_one = [decoder.push(int(i)) for i in ids]
    assert "".join(one_by_one) + decoder.flush() == vocabulary.decode(ids)


@quick
@given(ids=st.lists(st.integers(0, 2000), max_size=40), capcode=st.sampled_from([0, 1, 2]))
def test_any_ids_decode_alike_in_one_go_and_streamed(ids, capcode):
    vocabulary = OWN[capcode][BACKENDS[0]]
    decoder = vocabulary.decoder()
    assert "".join([decoder.push([i]) for i in ids]) + decoder.flush() == vocabulary.decode(ids)
    assert vocabulary.token_byte_lengths(ids).sum() == len(vocabulary.decode_bytes(ids))


def test_only_two_letters_are_lost_to_capcode():
    upper = [cp for cp in range(0x110000) if unicodedata.category(chr(cp)) == "Lu"]
    lost = {chr(cp) for cp in upper if tm._simple_upper(tm._simple_lower(cp)) != cp}
    assert {c for c in lost if unicodedata.normalize("NFD", c) == c} == {"ẞ", "ϴ"}


def test_stream_safe_normalisation_breaks_long_runs_of_marks():
    marks = "\u0301" * 31
    assert tm._nfd(f"a{marks}".encode()).decode() == "a" + "\u0301" * 30 + "\u034f\u0301"
    assert tm._nfd(("é" + "\u0301" * 30).encode()).decode() == "e" + "\u0301" * 30 + "\u034f\u0301"
    assert tm._nfd(("中" * 200).encode()).decode() == "中" * 200


@both
def test_batches_are_single_calls_in_a_row(backend):
    vocabulary = OWN[2][backend]
    lines = [PROSE[i:i + i % 190] for i in range(0, 20_000, 131)] + ["", "\0", "caf\u00e9", "x"]
    ids, offsets = vocabulary.encode_batch(lines)
    assert ids.dtype == np.uint16 and offsets.dtype == np.int64 and len(offsets) == len(lines) + 1
    for line, a, b in zip(lines, offsets, offsets[1:]):
        assert ids[a:b].tolist() == vocabulary.encode(line).tolist()
    empty, zero = vocabulary.encode_batch([])
    assert len(empty) == 0 and zero.tolist() == [0]


def test_worker_processes_give_the_same_batch():
    vocabulary = OWN[1][BACKENDS[0]]
    lines = [*PROSE.split("\n")[:300], "", "é"]
    one, two = vocabulary.encode_batch(lines), vocabulary.encode_batch(lines, num_proc=2)
    assert (one[0] == two[0]).all() and (one[1] == two[1]).all() and two[0].dtype == one[0].dtype


def test_pickles_copies_and_threads():
    vocabulary = OWN[2][BACKENDS[0]]
    expected = vocabulary.encode(PROSE[:20_000]).tolist()
    copied = pickle.loads(pickle.dumps(vocabulary))
    assert copied.encode(PROSE[:20_000]).tolist() == expected and copied.to_bytes() == vocabulary.to_bytes()
    results = []
    threads = [threading.Thread(target=lambda: results.append(copied.encode(PROSE[:20_000]).tolist())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_missing_bytes_are_counted_and_become_unk_where_there_is_one():
    vocabulary = Vocabulary.from_tokens([b"a", b"b", b"cd"])
    assert vocabulary.encode("cdxa中").tolist() == [2, 0] and vocabulary.missing("cdxa中") == 4
    vocabulary.enable_unk()
    assert vocabulary.encode("cdxa中").tolist() == [2, 3, 0, 3, 3, 3] and vocabulary.decode([2, 3, 0]) == "cda"
    with pytest.raises(ValueError, match="Every byte has a token"):
        OWN[0][BACKENDS[0]].enable_unk()


def test_ids_past_65535_need_32_bits():
    tokens = [bytes([a, b, c]) for a in range(48, 90) for b in range(48, 90) for c in range(48, 90)][:66_000]
    vocabulary = Vocabulary.from_tokens(tokens, include="all256")
    ids = vocabulary.encode(tokens[-1] + tokens[0])
    assert ids.dtype == np.uint32 and ids.tolist() == [256 + len(tokens) - 1, 256]


def test_surgery_keeps_the_file_valid_and_the_other_ids():
    vocabulary = own_vocabulary(0)
    before, size = {t: i for i, t in enumerate(vocabulary.tokens)}, len(vocabulary)
    vocabulary.resize(size - 100)
    kept = {t: i for i, t in enumerate(vocabulary.tokens) if t}
    assert len(vocabulary) == len(kept) == size - 100 and all(before[t] == i for t, i in kept.items())
    dropped = set(before) - set(kept)
    scores = own_vocabulary(0).scores
    assert max(scores[before[t]] for t in dropped) <= min(scores[i] for t, i in kept.items() if len(t) > 1)
    vocabulary.resize(size)
    assert {t: i for i, t in enumerate(vocabulary.tokens)} == before
    vocabulary.resize(size - 50).reset_ids().add_special_tokens(["<eos>"]).add_tokens(["Zebra crossing"])
    again = Vocabulary.from_bytes(vocabulary.to_bytes())
    assert again.n_ids == len(again) == size - 48
    for text in ("Zebra crossing", "a Zebra crossing the STREET"):
        assert again.decode(again.encode(text)) == text
    with pytest.raises(ValueError, match="cannot be resized to 10"):
        vocabulary.resize(10)
    with pytest.raises(ValueError, match="no token b'nonesuch'"):
        vocabulary.delete_tokens(["nonesuch"])


@pytest.mark.parametrize("bad, message", [({"include": "latin"}, "latin"), ({"scores": [1.0, 2.0]}, "2 scores for 1 tokens"),
                                          ({"capcode": 3}, "capcode 3"), ({"scores": [-1.0]}, "score -1.0"),
                                          ({"scores": [float("nan")]}, "score nan"),
                                          ({"special_tokens": ["x" * 41]}, "41 bytes")])
def test_bad_arguments_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_tokens([b"ab"], **bad)


# ---- damaged files


def survives(data):
    """Refused with one sentence, or a vocabulary that works."""
    for backend in BACKENDS:
        try:
            vocabulary = Vocabulary.from_bytes(data, backend=backend)
        except ValueError as error:
            assert "damaged" in str(error) and "\n" not in str(error)
            continue
        try:
            vocabulary.decode(vocabulary.encode("The cat's 3 hats,\n\tand THE DOG. é"))
        except ValueError as error:
            assert "damaged" in str(error)


def test_truncated_files_are_refused():
    data = own_vocabulary(2, size=120).to_bytes()
    for length in [*range(40), *range(40, len(data), 97), len(data) - 1]:
        with pytest.raises(ValueError, match="damaged"):
            Vocabulary.from_bytes(data[:length])
    for foreign in (data + b"\0", b"", b"\x89PNG" + data, b"{}" * 400, b"\xff" * 4000, bytes(4000)):
        with pytest.raises(ValueError, match="damaged"):
            Vocabulary.from_bytes(foreign)


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "x.vocab").write_bytes(b"not a vocabulary")
    with pytest.raises(ValueError, match=r"x\.vocab: This is not a TokenMonster vocabulary, or a damaged one: 16 bytes"):
        Vocabulary.from_file(tmp_path / "x.vocab")


@settings(quick, max_examples=120)
@given(flips=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 7)), min_size=1, max_size=3))
def test_flipped_bits_never_crash(flips):
    data = bytearray(SMALL)
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    survives(bytes(data))


@settings(quick, max_examples=60)
@given(offset=st.sampled_from([0, 1, 3, 4, 5, 8, 11, 14, 17, 20, 23]), value=st.integers(0, 0xFFFFFF))
def test_absurd_headers_never_crash(offset, value):
    survives(SMALL[:offset] + struct.pack("<I", value)[:1 if offset in (0, 1, 3, 4, 23) else 3]
             + SMALL[offset + (1 if offset in (0, 1, 3, 4, 23) else 3):])


SMALL = own_vocabulary(2, size=120).to_bytes()


# ---- other machines


SCRIPT = """
import sys
if sys.argv[1] == "no-numba":
    sys.modules["numba"] = sys.modules["transformers"] = None
import tokenmonster_hf as tm
assert (tm.numba is None) == (sys.argv[1] == "no-numba")
v = tm.Vocabulary.from_file(sys.argv[2])
print(v.backend, v.encode(open(sys.argv[3], encoding="utf-8").read()).tolist())
"""


@pytest.mark.parametrize("case", ["no-numba", "no-cache"])
def test_same_ids_without_numba_and_without_a_folder_for_its_cache(case, tmp_path):
    if case == "no-cache" and not tm.numba:
        pytest.skip("numba is not installed")
    vocabulary, text = own_vocabulary(0), PROSE[:3000]
    vocabulary.save(tmp_path / "v.vocab")
    (tmp_path / "text").write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    if case == "no-cache":
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / "text" / "impossible")
    out = subprocess.run([sys.executable, "-c", SCRIPT, case, tmp_path / "v.vocab", tmp_path / "text"], env=environment,
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    backend = "python" if case == "no-numba" else "numba"
    assert out.stdout.strip() == f"{backend} {vocabulary.encode(text).tolist()}"
