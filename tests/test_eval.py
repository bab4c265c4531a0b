"""Scores are what plain PyTorch says they are, a killed run ends the same, and statistics are the textbook's."""
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, SHARED
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from notebook_functions import load_functions

import stentor_eval as se
import stentor_utils as su
import tokenmonster_hf as tm

PUBLISHED = json.loads((REPO / "data" / "published_benchmarks.json").read_text())


@pytest.fixture(scope="module")
def notebook():
    return SimpleNamespace(**load_functions("05_benchmark"))


@pytest.fixture(scope="module")
def english():
    """Sentences of Python's own documentation, always there."""
    from pydoc_data.topics import topics
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    return [sentence for sentence in text.split(". ") if 60 < len(sentence) < 300 and sentence.isascii()]


@pytest.fixture(scope="module")
def ours(english, tmp_path_factory):
    """A model with our tokenizer, whose tokens span words; weights large enough that every token matters."""
    words = Counter(f" {word}".encode() for line in english for word in line.split() if word.isalpha())
    pairs = Counter(f" {a} {b}".encode() for line in english for a, b in zip(line.split(), line.split()[1:])
                    if a.isalpha() and b.isalpha())
    tokens = [token for token, _ in words.most_common(500)] + [token for token, _ in pairs.most_common(500)]
    tokenizer = tm.TokenMonsterTokenizer.from_vocabulary(tm.Vocabulary.from_tokens(tokens, capcode=0, include="all256"))
    folder = tmp_path_factory.mktemp("ours") / "model"
    su.save_model_folder(random_model(su.Shape(len(tokenizer), 32, 64, 2, 2, 1, 512), tokenizer), tokenizer, folder)
    model, tokenizer = se.load_model(str(folder), "float32", torch.device("cpu"))
    return SimpleNamespace(model=model, tokenizer=tokenizer, folder=folder)


def random_model(shape, tokenizer, seed=1):
    model = su.build_model(shape, eos_token_id=tokenizer.eos_token_id).eval()
    torch.manual_seed(seed)
    su.initialize_weights(model, std=0.3)
    return model


def logprob(model, tokens, start):
    """Plain PyTorch: sum of log P(token) over tokens[start:], one forward pass over one row."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, tokens[i]].item() for i in range(start, len(tokens)))


def direct(model, tokenizer, context, continuation):
    """log P(whole) - log P(context), each text encoded once; behind EOS where there is no context."""
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)
    if not context:
        return logprob(model, [tokenizer.eos_token_id] + encode(continuation), 1)
    eos = [tokenizer.eos_token_id]                    # only the first token's probability depends on it, and it cancels
    whole, alone = encode(context + continuation), encode(context)
    if whole[0] != alone[0]:
        return logprob(model, eos + whole, 1) - logprob(model, eos + alone, 1)
    return logprob(model, whole, 1) - logprob(model, alone, 1)


def instances(pairs):
    """Each (context, continuations) as the requests of one item."""
    return [Instance("loglikelihood", {}, (context, continuation), i, metadata=("t", number, 1))
            for number, (context, continuations) in enumerate(pairs) for i, continuation in enumerate(continuations)]


def hellaswag_items(english, count, seed=0):
    """A sentence cut at a random word, and four endings: its own and three of other sentences."""
    random = np.random.default_rng(seed)
    items = []
    for i in range(count):
        words = english[i % len(english)].split()
        cut = int(random.integers(3, len(words) - 3))
        endings = [" ".join(words[cut:])]
        for j in random.integers(0, len(english), 3):
            other = english[j].split()
            endings.append(" ".join(other[int(random.integers(1, len(other) - 2)):]))
        label = int(random.integers(0, 4))
        endings[0], endings[label] = endings[label], endings[0]
        items.append({"ctx": " ".join(words[:cut]), "choices": endings, "label": label})
    return items


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


# ------------------------------------------------------------------------------------------------------------- scores

@pytest.mark.parametrize("which", ["written", "blimp"])
def test_minimal_pairs_equal_plain_pytorch_to_the_item(which, ours, tmp_path):
    if which == "blimp":
        folder, limit, sets = SHARED / "data" / "blimp", 2, 67
        if not folder.is_dir():
            pytest.skip("needs ../shared/data/blimp")
    else:
        folder, limit, sets = tmp_path / "pairs", 5, 30
        subprocess.run([sys.executable, str(REPO / "data/minimal_pairs.py"), str(folder), "--pairs", "10"], check=True)
    lm = se.StentorLM(ours.model, ours.tokenizer)
    result = se.evaluate_block(lm, {"local": folder}, limit=limit, seed=7)
    assert len(result["tasks"]) == sets
    for name, task in result["tasks"].items():
        rows = [json.loads(line) for line in open(folder / f"{name.partition('/')[2]}.jsonl")]
        assert task["n"] == limit and task["chance"] == 0.5 and len(set(task["doc_ids"])) == limit
        for doc, scores, right in zip(task["doc_ids"], task["loglikelihoods"], task["items"]["acc,none"]):
            expected = [direct(ours.model, ours.tokenizer, "", rows[doc][key]) for key in ("sentence_good", "sentence_bad")]
            assert scores == pytest.approx(expected, abs=2e-4)
            assert right == (expected[0] > expected[1])


def test_hellaswag_shaped_items_with_tokens_across_the_join(ours, english, tmp_path):
    folder = write_jsonl(tmp_path / "swag" / "endings.jsonl", hellaswag_items(english, 60))
    lm = se.StentorLM(ours.model, ours.tokenizer)
    task = se.evaluate_block(lm, {"local": folder})["tasks"]["swag/endings"]
    rows = [json.loads(line) for line in open(folder / "endings.jsonl")]
    pairs = [(row["ctx"], [f" {choice}" for choice in row["choices"]]) for row in rows]
    expected = [[direct(ours.model, ours.tokenizer, context, ending) for ending in endings] for context, endings in pairs]
    assert np.allclose(task["loglikelihoods"], expected, atol=5e-4)
    best = [int(np.argmax(scores)) for scores in expected]
    assert task["items"]["acc,none"] == [float(b == row["label"]) for b, row in zip(best, rows)]
    gold = [scores[row["label"]] for scores, row in zip(expected, rows)]
    text_bytes = sum(len(row["choices"][row["label"]]) + 1 for row in rows)
    assert task["bits_per_byte"] == pytest.approx(-sum(gold) / math.log(2) / text_bytes, rel=1e-6)
    # lm-eval's own split, on the same model
    stock = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=1)
    theirs = np.array([score for score, _ in stock.loglikelihood(instances(pairs), disable_tqdm=True)]).reshape(-1, 4)
    wrong = np.abs(theirs - np.array(expected)) > 1e-3
    lost = sum(stock._encode_pair(context, ending)[0] + stock._encode_pair(context, ending)[1]
               != ours.tokenizer.encode(context + ending, add_special_tokens=False)
               for context, endings in pairs for ending in endings)
    print(f"lm-eval's split: {wrong.sum()} of {wrong.size} log-likelihoods differ, {lost} token sequences damaged")
    assert 0 < wrong.sum() == lost == task["merged"] < wrong.size and task["requests"] == wrong.size
    assert all(sum(lm._encode_pair(c, e), []) == ours.tokenizer.encode(c + e, add_special_tokens=False) for c, es in pairs
               for e in es)


def test_sharing_and_batching_change_nothing(ours, english):
    pairs = [(row["ctx"], [f" {choice}" for choice in row["choices"]]) for row in hellaswag_items(english, 20, seed=3)]
    lm = se.StentorLM(ours.model, ours.tokenizer)
    assert lm.share and lm.fast_head
    scores = np.array(lm.loglikelihood(instances(pairs)))
    alone = se.StentorLM(ours.model, ours.tokenizer, tokens_per_batch=1)
    alone.share = alone.fast_head = False
    assert np.allclose(scores, np.array(alone.loglikelihood(instances(pairs))), atol=3e-4)
    shared = [tree for context, endings in pairs
              for tree in se.make_trees(lm.requests_of([(context, ending) for ending in endings]), 512)]
    assert sum(len(tree.branches) > 1 for tree in shared) > 10      # that there was something shared


def test_what_is_asked_twice_is_not_summed_twice(ours, english):
    """Twice in one item, in two items, and across tasks: as BLiMP and real choices have it. Whole texts too."""
    lm = se.StentorLM(ours.model, ours.tokenizer)
    a, b, c = english[:3]
    pairs = [("", [a, a, b]), ("", [a, c]), (a, [f" {b}", f" {c}", f" {b}"]), (a, [f" {b}"])]
    expected = [direct(ours.model, ours.tokenizer, context, text) for context, texts in pairs for text in texts]
    found = lm.loglikelihood(instances(pairs))
    assert [score for score, _ in found] == pytest.approx(expected, abs=5e-4)
    rolling = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in (b, a, b)])
    once = [direct(ours.model, ours.tokenizer, "", text) for text in (b, a)]
    assert rolling == pytest.approx([once[0], once[1], once[0]], abs=5e-4)


def test_empty_contexts_continuations_and_greedy(ours, english):
    lm = se.StentorLM(ours.model, ours.tokenizer)
    text = english[0]
    pairs = [("", [text, " x"]), (text, [""]), (text + "  ", [""]), (" ", [text]), ("a", ["b"])]
    scores = [score for score, _ in lm.loglikelihood(instances(pairs))]
    tokens = ours.tokenizer.encode(text, add_special_tokens=False)
    eos = [ours.tokenizer.eos_token_id]
    assert scores[0] == pytest.approx(logprob(ours.model, eos + tokens, 1), abs=3e-4)
    assert scores[2] == 0.0 and lm.counts["t"]["empty"] == 1
    spaces = ours.tokenizer.encode(text + "  ", add_special_tokens=False)     # trailing spaces count to the continuation
    assert scores[3] == pytest.approx(logprob(ours.model, spaces, 1) - logprob(ours.model, tokens, 1), abs=3e-4)
    with torch.no_grad():
        likeliest = ours.tokenizer.decode([int(ours.model(torch.tensor([tokens])).logits[0, -1].argmax())])
    whole = ours.tokenizer.encode(text + likeliest, add_special_tokens=False)
    (_, greedy), (_, other) = lm.loglikelihood(instances([(text, [likeliest, " zzz"])]))
    assert greedy == (whole[:-1] == tokens) and not other


def test_texts_longer_than_the_model(ours, english):
    """Contexts lose their left as in lm-eval; long texts are rolled over as in lm-eval; joins stay right."""
    short = se.StentorLM(ours.model, ours.tokenizer, max_length=24)
    stock = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=1, max_length=24,
                 prefix_token_id=ours.tokenizer.eos_token_id)
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in [english[0], " ".join(english[:5]), "a"]]
    assert short.loglikelihood_rolling(texts) == pytest.approx(stock.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3)
    pairs = [(" ".join(english[i:i + 3]), [f" {word}" for word in ("zebra", "returns", "the object")]) for i in range(8)]
    clean = [(c, [e]) for c, es in pairs for e in es if not short.requests_of([(c, e)])[0].merged]
    assert len(clean) > 8
    mine = [score for score, _ in short.loglikelihood(instances(clean))]
    assert mine == pytest.approx([s for s, _ in stock.loglikelihood(instances(clean), disable_tqdm=True)], abs=1e-3)
    assert short.counts["t"]["truncated"] == len(clean)
    long = " " + " ".join(english[5:9])               # longer than the window itself: all of it is predicted, once
    request = short.requests_of([("If", long)])[0]
    spans = se.windows(request.whole, request.start, 24)
    assert [i for _, first, end in spans for i in range(first, end)] == list(range(request.start, len(request.whole)))
    assert all(first - begin >= 1 and end - 1 - begin <= 24 for begin, first, end in spans)
    total = sum(logprob(ours.model, request.whole[begin:end], first - begin) for begin, first, end in spans)
    assert short.loglikelihood(instances([("If", [long])]))[0][0] == pytest.approx(total, abs=2e-3)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_peers_of_other_architectures_equal_lm_eval(kind, english):
    """A byte-level BPE never merges across a space before a word: there lm-eval's scores are right, and ours the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(english, trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>",
                                        pad_token="<|endoftext|>")
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=256, n_embd=32, n_layer=2, n_head=2,
                                           initializer_range=0.3)).eval()
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                 intermediate_size=64, max_position_embeddings=256,
                                                 initializer_range=0.3)).eval()
    pairs = [(row["ctx"], [f" {choice}" for choice in row["choices"]]) for row in hellaswag_items(english, 12, seed=5)]
    pairs.append(("", [english[0], english[1]]))
    lm = se.StentorLM(model, tokenizer)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    mine, theirs = lm.loglikelihood(instances(pairs)), stock.loglikelihood(instances(pairs), disable_tqdm=True)
    assert np.allclose(mine, theirs, atol=1e-3) and lm.share and lm.fast_head and lm.counts["t"]["merged"] == 0


def test_a_model_that_ignores_our_mask_is_scored_the_plain_way(ours, english):
    class Deaf(type(ours.model)):
        def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids, **kwargs)

        base_model = property(lambda self: self.model.layers)         # and has no base model to speak of

    import copy
    deaf = copy.deepcopy(ours.model)
    deaf.__class__ = Deaf
    lm = se.StentorLM(deaf, ours.tokenizer)
    assert not lm.share and not lm.fast_head
    pairs = [(row["ctx"], [f" {choice}" for choice in row["choices"]]) for row in hellaswag_items(english, 3)]
    expected = se.StentorLM(ours.model, ours.tokenizer).loglikelihood(instances(pairs))
    assert np.allclose(lm.loglikelihood(instances(pairs)), expected, atol=1e-3)


# -------------------------------------------------------------------------------------------------------- local tasks

def test_four_kinds_of_local_files(ours, english, tmp_path):
    items = hellaswag_items(english, 6)
    folder = write_jsonl(tmp_path / "mine" / "choice.jsonl", [
        {"question": i["ctx"], "choices": i["choices"], "answer": "ABCD"[i["label"]]} for i in items])
    with open(folder / "table.csv", "w", newline="") as file:
        import csv
        writer = csv.DictWriter(file, ["query", "choices", "gold"])
        writer.writeheader()
        writer.writerows({"query": i["ctx"], "choices": json.dumps(i["choices"]), "gold": i["label"]} for i in items)
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in english[:5]])
    write_jsonl(folder / "sums.jsonl", [{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}] * 2)
    lm = se.StentorLM(ours.model, ours.tokenizer)
    tasks = se.evaluate_block(lm, {"local": folder})["tasks"]
    assert set(tasks) == {"mine/choice", "mine/table", "mine/text", "mine/sums"}
    assert tasks["mine/choice"]["loglikelihoods"] == tasks["mine/table"]["loglikelihoods"]
    assert tasks["mine/choice"]["items"] == tasks["mine/table"]["items"] and tasks["mine/choice"]["chance"] == 0.25
    eos = [ours.tokenizer.eos_token_id]
    nats = -sum(logprob(ours.model, eos + ours.tokenizer.encode(t, add_special_tokens=False), 1) for t in english[:5])
    bits = nats / math.log(2) / sum(map(len, english[:5]))
    assert tasks["mine/text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert tasks["mine/text"]["metrics"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)       # lm-eval's own sum
    assert set(tasks["mine/sums"]["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    write_jsonl(tmp_path / "bad" / "x.jsonl", [{"question": "q", "choices": ["a"], "answer": 3}])
    with pytest.raises(su.ParameterError, match="row 0: answer = 3 does not name one of the choices"):
        se.local_tasks(tmp_path / "bad")
    with pytest.raises(su.ParameterError, match="is not a folder with"):
        se.local_tasks(tmp_path / "nothing")


def test_a_yaml_folder_is_lm_evals_own(ours, english, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", hellaswag_items(english, 4))
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "mine.yaml").write_text(json.dumps({          # JSON is YAML
        "task": "swag_yaml", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{ctx}}", "doc_to_choice": "choices", "doc_to_target": "label"}))
    lm = se.StentorLM(ours.model, ours.tokenizer)
    yaml = se.evaluate_block(lm, {"local": tmp_path / "yaml"})["tasks"]["swag_yaml"]
    plain = write_jsonl(tmp_path / "plain" / "x.jsonl", hellaswag_items(english, 4))
    assert yaml["loglikelihoods"] == se.evaluate_block(lm, {"local": plain})["tasks"]["plain/x"]["loglikelihoods"]


def test_the_cards_blocks_name_tasks_that_this_lm_eval_has():
    manager = se.task_manager()
    names = {name for _, tasks, _ in se.BLOCKS.values() for name in tasks}
    assert names <= set(manager.all_tasks)
    columns = {(column["task"], column["num_fewshot"]) for column in PUBLISHED["peers"]["columns"]}
    assert columns == {(name, shots) for _, tasks, shots in se.BLOCKS.values() for name in tasks} - {("blimp", 0)}
    assert {f"mmlu_{group}" for group in ("humanities", "other", "social_sciences", "stem")} <= set(manager.all_tasks)


# ------------------------------------------------------------------------------------------------------ cache, resume

def test_the_cache_serves_the_same_model_and_no_other(ours, english, tmp_path):
    folder = write_jsonl(tmp_path / "t" / "a.jsonl", hellaswag_items(english, 5))
    cache = se.Cache(tmp_path / "cache.sqlite")
    lm = se.StentorLM(ours.model, ours.tokenizer, cache=cache)
    first = se.evaluate_block(lm, {"local": folder})
    lm.score = None                                   # calling it would fail: everything must come from the cache
    again = se.evaluate_block(lm, {"local": folder})
    assert again["tasks"] == first["tasks"] and again["key"] == first["key"]
    import copy
    changed = copy.deepcopy(ours.model)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    other = se.StentorLM(changed, ours.tokenizer, cache=cache)
    result = se.evaluate_block(other, {"local": folder})
    assert result["key"] != first["key"] and result["tasks"]["t/a"]["loglikelihoods"] != first["tasks"]["t/a"]["loglikelihoods"]
    base = se.model_fingerprint(ours.model, ours.tokenizer)
    assert base != se.model_fingerprint(copy.deepcopy(ours.model).bfloat16(), ours.tokenizer)
    theta = copy.deepcopy(ours.model)
    theta.config.rms_norm_eps = 1e-3
    assert base != se.model_fingerprint(theta, ours.tokenizer)
    resized = tm.TokenMonsterTokenizer.from_vocabulary(ours.tokenizer.vocabulary, vocab_size=len(ours.tokenizer) + 128)
    assert base != se.model_fingerprint(ours.model, resized)
    assert base == se.model_fingerprint(se.load_model(str(ours.folder), "float32", torch.device("cpu"))[0], ours.tokenizer)
    rows = hellaswag_items(english, 5)                # another right answer to the same prompts: another key, and score
    rows[0]["label"] = (rows[0]["label"] + 1) % 4
    write_jsonl(folder / "a.jsonl", rows)
    assert se.evaluate_block(lm, {"local": folder})["key"] != first["key"]


KILLS = """
import json, os, random, sys
from pathlib import Path
import torch
import datasets, lm_eval.evaluator, lm_eval.api.task
import stentor_eval as se
sys.path.append("tests")
import kill_here
torch.set_num_threads(1)                              # no thread pool, so that forking is safe
config = json.loads(sys.argv[2])
se.load_model(config["models"]["m"], "float32", torch.device("cpu"))      # all imports, once, for every child
def answers(folder):
    try:
        with se.sqlite3.connect(f"file:{folder}/cache.sqlite?mode=ro", uri=True, timeout=5) as c:
            return c.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    except se.sqlite3.Error:
        return 0
def child(folder, goal=None, calls=0):
    "Score to the end, or until so many calls after that many answers are kept; the exit status."
    pid = os.fork()
    if pid == 0:
        put = se.Cache.put
        def put_and_die(cache, new):
            put(cache, new)
            if answers(folder) >= goal:
                se.Cache.put = put
                kill_here.after(calls)
        if goal:
            se.Cache.put = put_and_die
        se.run(config, folder, say=lambda text: print(folder.name, "|", text, flush=True))
        os._exit(0)
    return os.waitpid(pid, 0)[1]
whole, killed = Path(sys.argv[1]) / "whole", Path(sys.argv[1]) / "killed"
whole.mkdir(), killed.mkdir()
assert child(whole) == 0
draw = random.Random(0)
for kill in range(10):
    left = answers(whole) - answers(killed)
    status = child(killed, answers(killed) + max(1, left // (11 - kill)), draw.randrange(5000))
    assert status == kill_here.signal.SIGKILL, status
    print("killed at", answers(killed), "of", answers(whole), [p.name for p in (killed / "m").glob("*.json")], flush=True)
assert child(killed) == 0
"""


def test_kill_9_ten_times_and_the_results_are_the_same(ours, english, tmp_path):
    write_jsonl(tmp_path / "one" / "swag.jsonl", hellaswag_items(english, 100))
    write_jsonl(tmp_path / "two" / "pairs.jsonl", [
        {"sentence_good": a, "sentence_bad": b} for a, b in zip(english[:200], english[200:400])])
    blocks = {name: {"title": name, "local": str(tmp_path / name)} for name in ("one", "two")}
    config = {"models": {"m": str(ours.folder)}, "blocks": blocks, "seed": 1, "dtype": "float32", "tokens_per_batch": 512}
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path), json.dumps(config)], capture_output=True, text=True,
                          cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert len(set(re.findall(r"killed at (\d+) of", done.stdout))) == 10          # each at another point
    lines = [line for line in done.stdout.splitlines() if line.startswith("killed |")]
    ends = [line.split("|")[2].strip() for line in lines if "items in" in line]
    assert len(ends) == len(set(ends)) and ends[-1] == "two"       # no block was scored to its end twice ...
    assert any("one | 100 items were already done" in line for line in lines)      # ... and a finished one not repeated
    results = [{name: json.loads((tmp_path / folder / "m" / f"{name}.json").read_text()) for name in blocks}
               for folder in ("whole", "killed")]
    for block in [block for result in results for block in result.values()]:
        assert block.pop("seconds") >= 0
    assert results[0] == results[1]                   # every log-likelihood, to the last bit


def test_two_processes_give_the_scores_of_one(ours, english, tmp_path):
    folder = write_jsonl(tmp_path / "one" / "swag.jsonl", hellaswag_items(english, 40))
    write_jsonl(folder / "sums.jsonl", [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)])
    config = {"models": {"m": str(ours.folder)}, "blocks": {"one": {"title": "one", "local": str(folder)}},
              "dtype": "float32", "tokens_per_batch": 512}
    said = []
    se.launch(config, tmp_path / "two", num_processes=2, say=lambda text: (said.append(text), print(text)))
    two = json.loads((tmp_path / "two" / "m" / "one.json").read_text())
    (tmp_path / "single").mkdir()
    se.run(config, tmp_path / "single", say=said.append)
    one = json.loads((tmp_path / "single" / "m" / "one.json").read_text())
    assert one["key"] == two["key"]
    assert np.allclose(one["tasks"]["one/swag"]["loglikelihoods"], two["tasks"]["one/swag"]["loglikelihoods"], atol=1e-4)
    assert one["tasks"]["one/sums"]["items"] == two["tasks"]["one/sums"]["items"]


def test_a_failing_block_does_not_cost_the_others(ours, english, tmp_path):
    write_jsonl(tmp_path / "good" / "a.jsonl", hellaswag_items(english, 3))
    write_jsonl(tmp_path / "bad" / "a.jsonl", [{"nothing": 1}])
    config = {"models": {"m": str(ours.folder)}, "dtype": "float32", "blocks": {
        name: {"title": name, "local": str(tmp_path / name)} for name in ("bad", "good")}}
    (tmp_path / "out").mkdir()
    summary = se.run(config, tmp_path / "out", say=lambda text: None)
    blocks = summary["models"]["m"]["blocks"]
    assert blocks["bad"]["status"] == "failed" and "columns are nothing" in blocks["bad"]["error"]
    assert blocks["good"]["status"] == "ok" and json.loads((tmp_path / "out/run_summary.json").read_text()) == summary


# ------------------------------------------------------------------------------------------------------ contamination

def test_items_from_the_training_text_are_found_and_others_not(tiny):
    texts = [text for text, reason, _ in su.clean_documents(tiny.source) if not reason]
    trained = se.words_of(texts[5])                   # the first four are held out
    assert len(trained) > 60
    items = {"copied": [[" ".join(trained[i:i + 20]).upper() + "!"] for i in (0, 9, 30)],     # case and signs do not matter
             "inside": [["something else before it " + " ".join(trained[20:33])], ["x " * 20 + " ".join(trained[20:32])]],
             "short": [[" ".join(trained[40:46])], ["zyx wvu tsr qpo nml kji"], ["too short"]],
             "across": [[" ".join(trained[-7:] + se.words_of(texts[6])[:7])]],      # the end of one document, the next one
             "fresh": [[" ".join(reversed(trained[:20]))], ["colourless green ideas sleep furiously " * 4]]}
    found = se.contamination(items, tiny.store_dir, tiny.tokenizer)
    assert found["copied"] == {"items": 3, "items_checked": 3, "contaminated": 3, "short_checked": 0, "short_found": 0}
    assert found["inside"]["contaminated"] == 1       # thirteen words in a row are, twelve are not
    assert found["short"] == {"items": 3, "items_checked": 0, "contaminated": 0, "short_checked": 2, "short_found": 1}
    assert found["fresh"]["contaminated"] == found["across"]["contaminated"] == 0


@pytest.mark.parametrize("chunk", [500, 1 << 20])
def test_the_store_is_read_whole_and_cut_between_documents(tiny, chunk):
    manifest = json.loads((Path(tiny.store_dir) / "manifest.json").read_text())
    shards = [np.fromfile(Path(tiny.store_dir) / shard["file"], "<u2") for shard in manifest["sources"]["topics"]["shards"]]
    parts = np.split(np.concatenate(shards), np.flatnonzero(np.concatenate(shards) == manifest["eos_token_id"]) + 1)
    documents = [tiny.tokenizer.vocabulary.decode(part[part != manifest["eos_token_id"]].astype(np.int64)) for part in parts]
    read = "\x00".join(se.store_texts(tiny.store_dir, tiny.tokenizer, chunk))
    assert [" ".join(text.split()) for text in read.split("\x00") if text.strip()] == [
        " ".join(text.split()) for text in documents if text.strip()]
    assert len(shards) > 1


# --------------------------------------------------------------------------------------------------------- statistics

def test_intervals_and_paired_tests_are_the_textbooks(notebook):
    from scipy.stats import binomtest
    for right, n in ((0, 10), (5, 50), (130, 500), (67, 67)):
        expected = binomtest(right, n).proportion_ci(method="wilson")
        assert notebook.wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
    random = np.random.default_rng(0)
    items = random.normal(0.4, 0.1, 400)
    low, high = notebook.interval(items)
    error = notebook.standard_error(items)
    assert error == pytest.approx(items.std(ddof=1) / 20)
    assert low == pytest.approx(items.mean() - 1.96 * error, abs=error / 4)
    assert high == pytest.approx(items.mean() + 1.96 * error, abs=error / 4)
    # McNemar's exact test: 10 items against 2 that only the other has right; n does not matter
    a, b = np.array([1] * 10 + [0] * 2 + [1] * 50), np.array([0] * 10 + [1] * 2 + [1] * 50)
    assert notebook.paired_p(a, b) == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert notebook.paired_p(a, a) == 1.0
    shifted = items + random.normal(0.01, 0.02, 400)  # far inside the intervals, but paired: told apart
    assert notebook.interval(shifted)[0] < items.mean() and notebook.paired_p(items, shifted) < 0.001
    assert notebook.paired_p(items, items + random.normal(0, 0.02, 400)) > 0.01


def test_wilsons_interval_covers_and_ranks_tie_under_the_null(notebook):
    random = np.random.default_rng(1)
    covered = sum(low <= 0.26 <= high for low, high in (notebook.wilson(k, 500) for k in random.binomial(500, 0.26, 2000)))
    assert 0.93 < covered / 2000 < 0.97
    told_apart = 0
    for _ in range(100):                              # four models that guess: all tie, but for 5% of tables at most
        place = notebook.ranks({name: random.integers(0, 2, 200).astype(float) for name in "abcd"})
        told_apart += any(rank != (1, 4) for rank in place.values())
    assert told_apart <= 10
    good = random.integers(0, 2, 500).astype(float)
    place = notebook.ranks({"weak": good * (random.random(500) < 0.5), "good": good, "twin": good.copy()})
    assert place == {"weak": (3, 3), "good": (1, 2), "twin": (1, 2)}


def test_the_published_averages_are_recomputed_to_four_decimals(notebook):
    rows = notebook.published_averages(PUBLISHED["peers"])
    differ = {model: recomputed for model, printed, recomputed in rows if printed != recomputed}
    # Design 2.1 names the last two. Pythia-31M's own columns sum to 0.1094, so 0.0109 to four decimals, not 0.0110.
    assert differ == {"Pythia-31M": "0.0109", "Pythia-70M": "0.0126", "Portimbria-150M": "0.0143"} and len(rows) == 7


def test_average_over_random_of_items_has_the_right_value_and_error(notebook):
    random = np.random.default_rng(2)
    published = PUBLISHED["peers"]
    for row in published["models"]:
        columns = {}
        for i, (column, score) in enumerate(zip(published["columns"], row["scores"])):
            items = np.zeros(10_000)
            items[random.permutation(10_000)[:round(float(score) * 10_000)]] = 1
            columns[str(i)] = {"task": column["task"], "num_fewshot": column["num_fewshot"], "items": items}
        average = notebook.average_over_random(columns, published)
        expected = float(dict((m, r) for m, _, r in notebook.published_averages(published))[row["model"]])
        assert average["columns"] == 10 and average["value"] == pytest.approx(expected, abs=5.1e-5)
    assert average["low"] < average["value"] < average["high"]
    # Both GSM8K columns are the same items: fully dependent, so their errors add up rather than in squares.
    items = (random.random(500) < 0.3).astype(float)
    two = {s: {"task": "gsm8k", "num_fewshot": s, "items": items} for s in (0, 5)}
    assert notebook.average_over_random(two, published)["stderr"] == pytest.approx(notebook.standard_error(items))
    one = {"a": {"task": "hellaswag", "num_fewshot": 0, "items": items}, "b": two[0]}
    assert notebook.average_over_random(one, published)["stderr"] == pytest.approx(notebook.standard_error(items) / 2**0.5)
    assert notebook.average_over_random({"x": {"task": "blimp", "num_fewshot": 0, "items": items}}, published) is None


def test_bands_are_the_cards(notebook):
    assert [notebook.band(s) for s in (1.0, 0.85, 0.845, 0.844, 0.56, 0.555, 0.554, 0.55, 0.0)] == [
        "strong", "strong", "strong", "moderate", "moderate", "moderate", "weak", "weak", "weak"]
    card = {band["band"]: band["sets"] for band in PUBLISHED["blimp"]["bands"]}
    # No card prints the 67 scores; so the edges of each band, and what lies between, as often as the card counts.
    edges = {"strong": (0.85, 0.999), "moderate": (0.56, 0.84), "weak": (0.05, 0.55)}
    scores = {f"{name}{i}": score for name, count in card.items() for i, score in enumerate(np.linspace(*edges[name], count))}
    assert notebook.count_bands(scores) == card == {"strong": 20, "moderate": 29, "weak": 18} and len(scores) == 67


def test_tables_and_model_index_say_what_the_items_say(notebook, ours, english, tmp_path):
    write_jsonl(tmp_path / "swag" / "a.jsonl", hellaswag_items(english, 30))
    tokenizer = ours.tokenizer
    su.save_model_folder(random_model(su.Shape(len(tokenizer), 32, 64, 2, 2, 1, 512), tokenizer, seed=9), tokenizer,
                         tmp_path / "other")
    config = {"models": {"m": str(ours.folder), "other": str(tmp_path / "other")}, "dtype": "float32",
              "blocks": {"swag": {"title": "swag", "local": str(tmp_path / "swag")}}}
    (tmp_path / "out").mkdir()
    summary = se.run(config, tmp_path / "out", say=lambda text: None)
    results = notebook.load_blocks(tmp_path / "out", summary)
    rows = notebook.result_rows(results, PUBLISHED["peers"])
    task = results["m"]["swag"]["tasks"]["swag/a"]
    row = next(row for row in rows if row["model"] == "m")
    assert row["score"] == task["metrics"]["acc,none"] == np.mean(task["items"]["acc,none"])
    assert row["low"] < row["score"] < row["high"] and row["n"] == 30 and row["chance"] == 0.25 and row["merged"] > 0
    assert notebook.markdown_table(rows).count("\n") == 2 and "rank 1–2" in notebook.markdown_table(rows)
    (entry,) = notebook.model_index(rows, "m", summary["models"]["m"]["blocks"]["swag"]["lm_eval"])
    assert entry["results"][0]["metrics"][0]["value"] == round(row["score"], 4)
    from huggingface_hub.repocard_data import model_index_to_eval_results
    _, parsed = model_index_to_eval_results([entry])  # the hub's own reader takes it
    assert parsed[0].metric_value == round(row["score"], 4) and parsed[0].dataset_name == "swag/a"
