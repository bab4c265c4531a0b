"""The demo without a browser: which models, what they write and how sure they are, votes, a Space."""
import ast
import json
import math
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import REPO

import stentor_utils as su
import tokenmonster_hf
from stentor import conversation
from stentor.demo import arena, generating, models, presets

SETTINGS = generating.settings_of(0.9, 0.9, 1.1, 24)


def gpt2_folder(folder):
    """Somebody else's model: an untrained GPT-2 of 33k parameters with a byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models as bpe, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    made = Tokenizer(bpe.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(["the function returns a list of names"] * 50, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_embd=32, n_layer=2, n_head=2,
                                       eos_token_id=0, bos_token_id=0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(tiny, tmp_path_factory):
    """A run of two small models, base and tuned, and a baseline beside it: (outputs, baseline)."""
    folder = tmp_path_factory.mktemp("demo")
    for seed, name in ((1, "final"), (2, "instruct/final")):
        model = su.build_model(tiny.recipe.shape, seed, eos_token_id=tiny.tokenizer.eos_token_id)
        su.save_model_folder(model, tiny.tokenizer, folder / "outputs" / "run" / name)
    run = folder / "outputs" / "run"
    (run / "run.json").write_text(json.dumps({"recipe": {"name": "stentor3-20m-cpu"}}))
    (run / "instruct" / "sft_summary.json").write_text(json.dumps({"system": "Be kind."}))
    (folder / "outputs" / "notes").mkdir()
    return folder / "outputs", gpt2_folder(folder / "gpt2")


@pytest.fixture(scope="module")
def opened(outputs):
    made = models.Models(models.find_models(outputs[0], [str(outputs[1])], hub=False))
    yield made
    made.close()


def load(opened, name):
    return opened.submit(opened.load, name).result()


def last(stream):
    return list(stream)[-1]


# --- which models


def test_every_model_of_the_runs_is_found_and_nothing_is_loaded(outputs, opened):
    base, tuned, other = opened.entries.values()
    assert (base.name, tuned.name, other.name) == ("run", "run, instruct", "gpt2")
    assert base.recipe == "stentor3-20m" and tuned.chat and tuned.system == "Be kind." and other.baseline
    assert base.parameters == tuned.parameters == su.load_model(base.where).num_parameters()
    assert opened.chat_default() == "run, instruct"
    assert models.Models([base]).in_memory() == {}


def test_models_stay_within_the_limit_and_one_that_never_fits_is_refused_in_a_sentence(opened):
    size = 4 * opened.entries["run"].parameters
    small = models.Models(list(opened.entries.values()), limit=int(1.5 * size))
    for name in ("run", "run, instruct", "run"):
        load(small, name)
        assert list(small.in_memory()) == [name] and sum(small.in_memory().values()) <= small.limit
    none = models.Models(list(opened.entries.values()), limit=size // 2)
    with pytest.raises(su.ParameterError, match="run needs .* GB, and the demo may hold"):
        load(none, "run")
    with pytest.raises(su.ParameterError, match="no model 'other' here"):
        load(none, "other")
    with pytest.raises(su.ParameterError, match="no model to try"):
        models.Models([])
    small.close(), none.close()


def test_foreign_code_and_pickles_are_refused_by_the_demo_too(tmp_path, outputs):
    import shutil
    for name, spoil in (("code", lambda f: (f / "config.json").write_text(json.dumps(
            json.loads((f / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))),
            ("pickle", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"))):
        shutil.copytree(outputs[1], tmp_path / name)
        spoil(tmp_path / name)
        opened = models.Models(models.find_models(tmp_path / "none", [str(tmp_path / name)], hub=False))
        with pytest.raises(su.ParameterError, match="auto_map|never opened"):
            load(opened, name)
        opened.close()


def test_the_hub_is_offered_only_where_it_answers(monkeypatch):
    assert models.hub_answers() is False               # HF_HUB_OFFLINE
    names = [entry.name for entry in models.hub_models()]
    assert "StentorLabs/Stentor3-20M" in names and "openai-community/gpt2" in names and len(names) == len(set(names))
    sizes = {entry.recipe: entry.parameters for entry in models.hub_models() if not entry.baseline}
    assert sizes["stentor3-20m"] == 20_324_160 and sizes["portimbria-150m"] == 151_026_432
    assert all(entry.where.startswith("hf:") for entry in models.hub_models())


# --- what they write


@pytest.mark.parametrize("name", ["run", "gpt2"])
def test_a_streamed_text_grows_to_that_of_generate(opened, name):
    loaded = load(opened, name)
    settings = {**SETTINGS, "temperature": 2.0, "top_p": 1.0, "max_new_tokens": 40}      # bytes of all kinds
    for seed, prompt in enumerate(["", "The function", "naïve café 😀 漢字 ", "a</s><|endoftext|>b"]):
        parts = [text.text for text in generating.stream(opened, name, prompt, settings, seed, threading.Event())]
        for part in parts[:-1]:
            assert parts[-1].startswith(part)
        ids = torch.tensor([generating.prompt_ids(loaded, prompt)])
        room = {**settings, "max_new_tokens": min(40, loaded.context - ids.shape[1])}
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **room,
                                        pad_token_id=loaded.tokenizer.eos_token_id)[0, ids.shape[1]:].tolist()
        assert parts[-1] == loaded.tokenizer.decode(out, skip_special_tokens=True)


def test_su_generate_says_the_same(opened):
    loaded = load(opened, "run")
    text = last(generating.stream(opened, "run", "The function", SETTINGS, 7, threading.Event()))
    assert su.generate(loaded.model, loaded.tokenizer, ["The function"], seed=7, **SETTINGS) == [text.text]


@pytest.mark.parametrize("capcode", [0, 2])
def test_words_are_whole_whatever_the_tokens(capcode):
    words = sorted({f" {word}".encode() for word in "the function returns a list of names in the other one".split()})
    vocabulary = tokenmonster_hf.Vocabulary.from_tokens(words, capcode=capcode, include="all256")
    tokenizer = tokenmonster_hf.TokenMonsterTokenizer.from_vocabulary(vocabulary)
    draw = random.Random(0)
    for text in ("The OTHER one, naïve 😀!", "漢字かな", "ΑΒΓ Names"):
        ids = tokenizer(text)["input_ids"]
        for row in (ids, [draw.randrange(len(tokenizer)) for _ in range(60)]):
            stream = generating.Words(tokenizer)
            said = "".join(stream.push(token) for token in row)
            assert "\ufffd" not in said or row is not ids
            whole = tokenizer.decode(row, skip_special_tokens=True)
            assert (said + stream.flush()).replace("\n", "") == whole.replace("\n", "")


def test_special_tokens_that_are_typed_stay_text(opened):
    for name in ("run", "gpt2"):
        loaded = load(opened, name)
        for special in loaded.tokenizer.all_special_tokens:
            ids = generating.prompt_ids(loaded, f"a{special}b")
            assert not set(ids) & set(loaded.tokenizer.all_special_ids)
            assert loaded.tokenizer.decode(ids) == f"a{special}b"


def test_prompts_that_do_not_fit_are_refused_and_the_length_follows_the_room(opened):
    loaded = load(opened, "run")                       # its context: 64
    with pytest.raises(su.ParameterError, match=r"has \d+ tokens, and run holds 64"):
        last(generating.stream(opened, "run", "word " * 100, SETTINGS, 0, threading.Event()))
    with pytest.raises(su.ParameterError, match="has 300,000 characters"):
        last(generating.stream(opened, "run", "word. " * 50_000, SETTINGS, 0, threading.Event()))
    ids = generating.prompt_ids(loaded, "The function")
    settings = {**SETTINGS, "max_new_tokens": 500}
    text = last(generating.stream(opened, "run", "The function", settings, 0, threading.Event()))
    assert text.tokens <= 64 - len(ids) and f"room for {64 - len(ids)} of 500" in text.note
    assert generating.prompt_ids(loaded, "") == [loaded.tokenizer.eos_token_id]
    assert generating.prompt_ids(loaded, "half \ud83d emoji")
    for wrong in (dict(temperature=-1), dict(top_p=0), dict(max_new_tokens=0), dict(repetition_penalty=math.nan)):
        given = dict(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=5) | wrong
        with pytest.raises(su.ParameterError, match=next(iter(wrong))):
            generating.settings_of(**given)


def test_a_reader_who_stops_or_goes_away_frees_the_model(opened):
    settings, stop = {**SETTINGS, "max_new_tokens": 60}, threading.Event()
    loaded = load(opened, "run")
    forward, seen = loaded.model.forward, []

    def slow(*arguments, **named):
        seen.append(1)
        time.sleep(0.2)
        return forward(*arguments, **named)
    loaded.model.forward = slow
    try:
        stream = generating.stream(opened, "run", "The", settings, 0, stop)
        next(stream)
        stop.set()
        assert last(stream).ended == "stopped" and len(seen) < 10
        stream = generating.stream(opened, "run", "The", settings, 0, threading.Event())
        next(stream)
        del stream                                     # a closed page
        opened.submit(lambda: None).result()
        assert len(seen) < 20
    finally:
        loaded.model.forward = forward


def test_twenty_at_once_get_what_each_would_have_got_alone(opened):
    alone = {seed: last(generating.stream(opened, "run", f"The {seed}", SETTINGS, seed, threading.Event())).text
             for seed in range(20)}
    found = {}

    def ask(seed):
        found[seed] = last(generating.stream(opened, "run", f"The {seed}", SETTINGS, seed, threading.Event())).text
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone and len(set(found.values())) > 10


def test_stop_and_files_are_each_pages_own(opened, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    from types import SimpleNamespace

    from stentor.demo.tab import Demo
    demo, one, two = Demo(opened, tmp_path / "votes"), SimpleNamespace(session_hash="1"), SimpleNamespace(session_hash="2")
    mine, theirs, other = demo.begin(one, "chat"), demo.begin(two, "chat"), demo.begin(one, "sweep")
    demo.stop(one, "chat")
    assert mine.is_set() and not theirs.is_set() and not other.is_set()
    folder = demo.private(one)
    assert folder == demo.private(one) != demo.private(two) and folder.is_dir()
    demo.leave(one)                                    # a closed page
    assert other.is_set() and not theirs.is_set() and not folder.exists() and demo.private(two).is_dir()


# --- how sure they are


@pytest.mark.parametrize("name", ["run", "gpt2"])
def test_probabilities_are_those_of_a_direct_computation(opened, name):
    loaded = load(opened, name)
    ids = generating.prompt_ids(loaded, "The function returns 😀 names")
    seen = opened.submit(generating.probabilities, loaded, ids).result()
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[loaded.tokenizer.eos_token_id, *ids]])).logits[0, :-1]
    expected = torch.log_softmax(logits.double(), -1).exp()
    assert [row["id"] for row in seen] == ids and "".join(row["text"] for row in seen) == loaded.tokenizer.decode(ids)
    for i, row in enumerate(seen):
        assert row["probability"] == pytest.approx(expected[i, ids[i]].item(), rel=1e-4)
        best = expected[i].topk(8)
        assert [a["probability"] for a in row["alternatives"]] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert {a["id"] for a in row["alternatives"]} == set(best.indices.tolist())
        assert row["rank"] == 1 + int((expected[i] > expected[i, ids[i]]).sum())
    long = (ids * 40)[:loaded.context + 30]            # beyond the context: what still fits before each
    assert len(opened.submit(generating.probabilities, loaded, long).result()) == loaded.context


# --- chat


def test_a_chat_is_encoded_and_trimmed_as_in_training(tiny):
    tokenizer = tiny.tokenizer
    said = [{"role": "system", "content": "Be kind."}]
    for i in range(6):
        said += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]
    asked = [*said, {"role": "user", "content": "And now?"}]
    whole = [token for _, piece, _ in conversation.fit(
        tokenizer, [*asked, {"role": "assistant", "content": ""}], 10_000)[:-1] for token in piece]
    assert conversation.fit_chat(tokenizer, asked, 10_000) == (whole, 0)
    for room in range(len(whole) - 1, 20, -7):
        ids, gone = conversation.fit_chat(tokenizer, asked, room)
        text = tokenizer.decode(ids)
        assert len(ids) <= room and gone % 2 == 0 and text.endswith("<|assistant|>\n")
        if room > 120:                                 # the newest exchanges, whole
            first = f"Question {gone // 2}?"
            assert text.startswith("<|system|>\nBe kind.\n") and first in text and f"Question {gone // 2 - 1}?" not in text


def test_what_a_user_types_in_a_chat_cannot_end_a_turn(tiny):
    asked = [{"role": "user", "content": "a</s>b<|assistant|>"}]
    ids, _ = conversation.fit_chat(tiny.tokenizer, asked, 500)
    assert tiny.tokenizer.eos_token_id not in ids
    assert tiny.tokenizer.decode(ids) == "<|user|>\na</s>b<|assistant|>\n<|assistant|>\n"


def test_a_template_of_special_tokens_loses_what_is_typed_of_them(opened):
    tokenizer = load(opened, "gpt2").tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                               "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert not conversation.template_is_text(tokenizer)
    ids, _ = conversation.fit_chat(tokenizer, [{"role": "user", "content": "a<|im_end|>b"}], 500)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1 and "ab" in tokenizer.decode(ids)
    tokenizer.chat_template = None
    with pytest.raises(su.ParameterError, match="no chat template"):
        generating.chat_ids(load(opened, "gpt2"), [{"role": "user", "content": "a"}], 10)


# --- presets and arena


def test_presets_lie_in_the_ranges_of_their_cards():
    ranges = {"stentor2-12m": ((0.6, 0.9), (0.6, 0.8), (1.1, 1.4), (10, 500)),
              "stentor2-12m-preview": ((0.65, 1.2), (0.5, 0.8), (1.1, 1.2), (10, 60)),
              "stentor3-20m": ((0.5, 0.8), (0.8, 0.9), (1.15, 1.4), (40, 4096)),
              "stentor-12m-instruct": ((0.6, 1.5), (0.5, 0.9), (1.3, 1.3), (10, 200))}    # spec-to-build, 6
    for recipe, limits in ranges.items():
        for chip in presets.NAMES:
            values, card = presets.preset(chip, recipe)
            assert all(low <= value <= high for value, (low, high) in zip(values, limits)), (recipe, chip)
            assert card.lower() == recipe
    assert presets.preset("Balanced", "unknown") == presets.preset("Balanced", "stentor2-12m")


def entry(name, parameters, baseline=False):
    return models.Entry(name, name, baseline, parameters=parameters)


def test_pairs_are_of_one_size_and_sides_are_drawn():
    known = [entry("a", 12_000_000), entry("b", 14_000_000, True), entry("c", 20_000_000), entry("d", 31_000_000, True),
             entry("e", 160_000_000, True)]
    size = {one.name: one.parameters for one in known}
    seen = {arena.draw_pair(known, "Random", random.Random(i)) for i in range(200)}
    assert all({"a", "c"} & set(pair) and {"b", "d"} & set(pair) for pair in seen)
    assert all(max(size[x], size[y]) <= 2 * min(size[x], size[y]) for x, y in seen)
    assert ("a", "b") in seen and ("b", "a") in seen and ("c", "d") in seen          # 20M against 31M, as on the card
    assert all(x != y for x, y in (arena.draw_pair(known, "Blind", random.Random(i)) for i in range(200)))
    with pytest.raises(su.ParameterError, match="needs two models"):
        arena.draw_pair(known[:1], "Blind", random.Random(0))
    with pytest.raises(su.ParameterError, match="no baseline"):
        arena.draw_pair([known[0], known[2]], "Random", random.Random(0))


def test_votes_of_many_writers_are_all_kept(tmp_path):
    path = tmp_path / "votes.jsonl"

    def write(number):
        for i in range(10):
            arena.add_vote(path, f"{number}-{i}", "b", "tie", "Blind")
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    votes = arena.read_votes(path)
    assert len({vote["a"] for vote in votes}) == len(votes) == 30
    path.write_text(path.read_text()[:-20])            # a line that a full disk cut
    arena.add_vote(path, "x", "y", "A is better", "Show")
    assert len(arena.read_votes(path)) == 30 and arena.read_votes(path)[-1]["a"] == "x"
    assert set(json.loads(path.read_text().splitlines()[0])) == {"time", "a", "b", "vote", "mode"}
    assert arena.read_votes(tmp_path / "none") == []
    with pytest.raises(su.ParameterError, match="vote = 'both good'"):
        arena.add_vote(path, "x", "y", "both good", "Show")


def simulated(strengths, n, seed):
    draw, votes, names = np.random.default_rng(seed), [], list(strengths)
    for _ in range(n):
        a, b = draw.choice(len(names), 2, replace=False)
        odds = 1 / (1 + 10 ** ((strengths[names[b]] - strengths[names[a]]) / 400))
        votes.append({"a": names[a], "b": names[b], "vote": "A is better" if draw.random() < odds else "B is better"})
    return votes


def test_ratings_find_the_strengths_and_their_intervals_hold_them():
    strengths = {"a": 1150, "b": 1000, "c": 850}
    inside = []
    for seed in range(60):
        table = {row["name"]: row for row in arena.rate(simulated(strengths, 300, seed))}
        inside += [table[name]["low"] <= true <= table[name]["high"] for name, true in strengths.items()]
    assert 0.90 <= np.mean(inside) <= 0.99             # of 95% intervals, 180 of them
    table = arena.rate(simulated(strengths, 20_000, 1))
    assert [row["name"] for row in table] == ["a", "b", "c"]
    assert [row["rating"] for row in table] == pytest.approx([1150, 1000, 850], abs=15)
    assert sum(row["rating"] for row in table) == pytest.approx(3000)
    one, = arena.rate([{"a": "x", "b": "y", "vote": "A is better"}])[:1]
    assert one["name"] == "x" and one["low"] < 1000 < one["high"]       # one vote settles nothing
    assert one["share_low"] == pytest.approx(su.statistics.wilson(1, 1)[0])
    assert all(row["rating"] == pytest.approx(1000) for row in arena.rate([{"a": "x", "b": "y", "vote": "both bad"}] * 9))
    assert arena.rate([]) == []


# --- a Space


@pytest.fixture(scope="module")
def space(outputs, tmp_path_factory):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    folder = tmp_path_factory.mktemp("space") / "here"
    done = subprocess.run([sys.executable, "-m", "stentor_utils", "space", outputs[0] / "run", folder], cwd=REPO,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_space_is_complete_and_holds_no_path_of_this_machine(space):
    import yaml
    head = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "gradio" and head["app_file"] == "app.py" and re.fullmatch(r"6\.\d+\.\d+", head["sdk_version"])
    assert len(head["short_description"]) <= 60 and "license" in head
    wanted = (space / "requirements.txt").read_text()
    assert "torch==" in wanted and "+cpu" not in wanted and "safetensors filter=lfs" in (space / ".gitattributes").read_text()
    for path in space.rglob("*"):
        if path.is_file() and path.suffix not in (".safetensors", ".vocab"):
            text = path.read_text()
            assert str(REPO) not in text and "/work/" not in text and "/root/" not in text, path
    assert not list(space.rglob("checkpoints")) and not list(space.rglob("__pycache__"))
    needed = {name.split(".")[0] for path in space.rglob("*.py") for node in ast.parse(path.read_text()).body
              if isinstance(node, (ast.Import, ast.ImportFrom))
              for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])}
    needed -= {*sys.stdlib_module_names, "stentor", "tokenmonster_hf", "gradio"}
    assert needed <= set(re.findall(r"^(\w+)==", wanted, re.M)), needed


def test_a_space_needs_a_run_and_leaves_other_folders_alone(outputs, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    from stentor.demo.space import write_space
    with pytest.raises(su.ParameterError, match="holds no model to show"):
        write_space(outputs[0] / "notes")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(su.ParameterError, match="no Space; name an empty folder"):
        write_space(outputs[0] / "run", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_space_runs_alone(space, tmp_path):
    """Where there is no repository: its own files answer."""
    import shutil
    shutil.copytree(space, tmp_path / "alone")
    port = free_port()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    with open(tmp_path / "log", "w") as log:
        app = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path / "alone", env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                assert app.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        from gradio_client import Client
        client = Client(f"http://127.0.0.1:{port}/", verbose=False)
        shown = client.predict("run", "The function", 0, 1, 1, 8, 1, 1, api_name="/generate")[0]
        assert "8 tokens in" in shown and "The function" in shown
    finally:
        app.terminate()
        app.wait()
    assert not any(str(REPO) in str(path) for path in (tmp_path / "alone").rglob("*"))


# --- notebook 09


def test_09_tries_every_tab_opens_the_page_and_ends(outputs, tmp_path):
    """Executed as `make run` does it: nothing waits for a person, and every picture has its text."""
    import shutil

    from test_notebooks import run
    pytest.importorskip("gradio", reason="Gradio is not installed")
    shutil.copytree(outputs[0], tmp_path / "outputs")
    done = run(f"OUTPUTS={tmp_path / 'outputs'}", "RUN=run", "MAX_NEW_TOKENS=12", "STAY_OPEN=False", "PROMPT=The function",
               f"BASELINES=['{outputs[1]}']", notebooks=["09_demo"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "the page is closed" in done.stdout and "most surprising" in done.stdout and "And of Italy?" in done.stdout
    cells = json.loads((tmp_path / "outputs/run/notebooks/09_demo.ipynb").read_text())["cells"]
    shown = {cell["id"]: "".join("".join(output.get("data", {}).get("text/html", "")) for output in cell.get("outputs", []))
             for cell in cells}
    assert shown["generate"].count("The function") == 1 and shown["sweep"].count("<article") == 3
    assert shown["sure"].count("data-facts") >= 3 and shown["arena"].count("<article") == 2 and "No votes yet" in shown["arena"]
    assert "tokens/s" in shown["ask"] and not (tmp_path / "outputs" / "arena_votes.jsonl").exists()


@pytest.mark.parametrize("given, expected", [
    (["PORT=0", "MEMORY_GB=-1", "HUBB=1"], ["PORT = 0 must be at least 1", "MEMORY_GB = -1", "did you mean HUB?"]),
    (["RUN=other", "HUB=False"], ["RUN = 'other' has no model", "which holds run, run, instruct"]),
    (["OUTPUTS=/nowhere", "HUB=False"], ["there is no model to try"]),
])
def test_make_demo_refuses_what_is_wrong_in_a_sentence(outputs, given, expected, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    from stentor.commands import main
    given = given if given[0].startswith("OUTPUTS") else [f"OUTPUTS={outputs[0]}", *given]
    assert main(["demo", "-p", *given]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in expected), said


def test_a_seed_is_a_number_or_its_text_and_empty_is_a_new_one():
    from stentor.demo.tab import seed_of
    assert [seed_of(seed) for seed in (7, 7.0, "7", " 7 ", "0")] == [7, 7, 7, 7, 0]
    assert len({seed_of(empty) for empty in (None, "", "  ") for _ in range(5)}) == 15
    for wrong in ("seven", "1.5", "-1", "1e400", "nan"):
        with pytest.raises(su.ParameterError, match="Seed = "):
            seed_of(wrong)
