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

from stentor import benchmark
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
    model, tokenizer = benchmark.run.load_scored(str(folder), "float32", torch.device("cpu"))
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


def test_ids_above_65_535_are_scored_as_they_are():
    vocabulary = tm.Vocabulary.from_tokens([], include="ascii")
    entries = vocabulary._entries()
    entries[b"a"][0], entries[b"b"][0] = 66_254, 66_255
    tokenizer = tm.TokenMonsterTokenizer(vocabulary=vocabulary._rebuild(entries, []))
    model = random_model(su.Shape(len(tokenizer), 16, 32, 1, 2, 1, 64), tokenizer).requires_grad_(False)
    lm = benchmark.lm.StentorLM(model, tokenizer)
    assert lm.tok_encode("ab") == [66_254, 66_255] and lm.requests_of([("a", "b")])[0].whole == [66_254, 66_255]
    [(score, _)] = lm.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)])
    expected = model(torch.tensor([[66_254]])).logits[0, -1].log_softmax(-1)[66_255]
    assert score == pytest.approx(float(expected), abs=1e-4)


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
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
    result = benchmark.scoring.evaluate_block(lm, {"local": folder}, limit=limit, seed=7)
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
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
    task = benchmark.scoring.evaluate_block(lm, {"local": folder})["tasks"]["swag/endings"]
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
    assert "ties" not in task and "lm_eval_metrics" not in task       # acc and acc_norm are lm-eval's, to the bit
    assert 0 < wrong.sum() == lost == task["merged"] < wrong.size and task["requests"] == wrong.size
    assert all(sum(lm._encode_pair(c, e), []) == ours.tokenizer.encode(c + e, add_special_tokens=False) for c, es in pairs
               for e in es)


def test_sharing_and_batching_change_nothing(ours, english):
    pairs = [(row["ctx"], [f" {choice}" for choice in row["choices"]]) for row in hellaswag_items(english, 20, seed=3)]
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
    assert lm.share and lm.fast_head
    scores = np.array(lm.loglikelihood(instances(pairs)))
    alone = benchmark.lm.StentorLM(ours.model, ours.tokenizer, tokens_per_batch=1)
    alone.share = alone.fast_head = False
    assert np.allclose(scores, np.array(alone.loglikelihood(instances(pairs))), atol=3e-4)
    shared = [tree for context, endings in pairs
              for tree in benchmark.trees.make_trees(lm.requests_of([(context, ending) for ending in endings]), 512)]
    assert sum(len(tree.branches) > 1 for tree in shared) > 10      # that there was something shared


def test_what_is_asked_twice_is_not_summed_twice(ours, english):
    """Twice in one item, in two items, and across tasks: as BLiMP and real choices have it. Whole texts too."""
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
    a, b, c = english[:3]
    pairs = [("", [a, a, b]), ("", [a, c]), (a, [f" {b}", f" {c}", f" {b}"]), (a, [f" {b}"])]
    expected = [direct(ours.model, ours.tokenizer, context, text) for context, texts in pairs for text in texts]
    found = lm.loglikelihood(instances(pairs))
    assert [score for score, _ in found] == pytest.approx(expected, abs=5e-4)
    rolling = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in (b, a, b)])
    once = [direct(ours.model, ours.tokenizer, "", text) for text in (b, a)]
    assert rolling == pytest.approx([once[0], once[1], once[0]], abs=5e-4)


def test_empty_contexts_continuations_and_greedy(ours, english):
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
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
    short = benchmark.lm.StentorLM(ours.model, ours.tokenizer, max_length=24)
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
    spans = benchmark.trees.windows(request.whole, request.start, 24)
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
    lm = benchmark.lm.StentorLM(model, tokenizer)
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
    lm = benchmark.lm.StentorLM(deaf, ours.tokenizer)
    assert not lm.share and not lm.fast_head
    pairs = [(row["ctx"], [f" {choice}" for choice in row["choices"]]) for row in hellaswag_items(english, 3)]
    expected = benchmark.lm.StentorLM(ours.model, ours.tokenizer).loglikelihood(instances(pairs))
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
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
    tasks = benchmark.scoring.evaluate_block(lm, {"local": folder})["tasks"]
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
        benchmark.tasks.local_tasks(tmp_path / "bad")
    with pytest.raises(su.ParameterError, match="is not a folder with"):
        benchmark.tasks.local_tasks(tmp_path / "nothing")


def test_a_yaml_folder_is_lm_evals_own(ours, english, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", hellaswag_items(english, 4))
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "mine.yaml").write_text(json.dumps({          # JSON is YAML
        "task": "swag_yaml", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{ctx}}", "doc_to_choice": "choices", "doc_to_target": "label"}))
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
    yaml = benchmark.scoring.evaluate_block(lm, {"local": tmp_path / "yaml"})["tasks"]["swag_yaml"]
    plain = write_jsonl(tmp_path / "plain" / "x.jsonl", hellaswag_items(english, 4))
    tasks = benchmark.scoring.evaluate_block(lm, {"local": plain})["tasks"]
    assert yaml["loglikelihoods"] == tasks["plain/x"]["loglikelihoods"]


def read(path):
    return benchmark.kinds.task_config(benchmark.rows.read_rows(path), path)


PUBLISHED_ROWS = {                                    # a row as it is published -> the right choice
    "hellaswag": [({"ind": 24, "activity_label": "Roofs", "ctx_a": "A man is on a roof.", "ctx": "A man is on a roof. he",
                    "endings": ["a", "b", "c", "d"], "label": "3", "split_type": "indomain"}, "d")],
    "arc on the hub": [({"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]},
                         "answerKey": "B"}, "b"),
                       ({"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
                         "answerKey": "3"}, "c")],
    "arc's own": [({"id": "x", "answerKey": "1", "question": {
        "stem": "Which?", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]}}, "a")],
    "answerKey without names": [({"question": "q", "choices": ["a", "b", "c", "d"], "answerKey": "1"}, "a"),
                                ({"question": "q", "choices": ["a", "b", "c", "d"], "answerKey": "2"}, "b")],
    "openbookqa": [({"question_stem": "The sun", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}, "b")],
    "piqa": [({"goal": "Open a jar", "sol1": "twist", "sol2": "eat", "label": 1}, "eat")],
    "race": [({"article": "It rained.", "question": "q", "options": ["a", "b"], "answer": "B"}, "b")],
    "mmlu": [({"question": "q", "subject": "s", "choices": ["0", "4", "2", "6"], "answer": 1}, "4")],
    "mmlu's table": [({"prompt": "q", "A": "1", "B": "2", "C": "3", "D": "4", "E": "", "answer": "C"}, "3")],
    "from 1": [({"query": "q", "choices": ["a", "b"], "label": 1}, "a"),
               ({"query": "q", "choices": ["a", "b"], "label": 2}, "b")],
    "a letter and an index": [({"query": "q", "choices": ["a", "b"], "gold": "(b)"}, "b"),
                              ({"query": "q", "choices": ["a", "b"], "gold": 0}, "a")],
    "numbers": [({"query": 12, "choices": [3, 4.5], "label": 1.0}, "4.5")],
    "rows unlike the first": [({"query": "q", "choices": ["a", "b"], "label": "0", "note": 1}, "a"),
                              ({"label": "1", "choices": ["a", "b", "c"], "query": "r", "note": [{}], "more": "x"}, "b")],
    "the choice itself": [({"query": "q", "choices": ["3", "4", "9"], "label": "9"}, "9"),
                          ({"query": "q", "choices": ["7", "8", "9"], "label": "7"}, "7")],
}


@pytest.mark.parametrize("kind", PUBLISHED_ROWS)
def test_published_files_are_read_in_every_format(kind, tmp_path):
    import csv

    from pyarrow import Table
    from pyarrow.parquet import write_table
    rows = [row for row, _ in PUBLISHED_ROWS[kind]]
    expected = [right for _, right in PUBLISHED_ROWS[kind]]
    write_jsonl(tmp_path / "x.jsonl", rows)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows))
    (tmp_path / "array.JSON").write_text(json.dumps({"version": 1, "data": rows}, indent=2))
    columns = sorted(set().union(*rows))
    for name, delimiter, encoding in (("x.csv", ",", "utf-8-sig"), ("x.tsv", "\t", "utf-16")):
        with open(tmp_path / name, "w", newline="", encoding=encoding) as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(columns)
            for row in rows:
                writer.writerow([json.dumps(v) if isinstance(v, (list, dict)) else v for v in map(row.get, columns)])
    names = ["x.jsonl", "bom.jsonl", "array.JSON", "x.csv", "x.tsv"]
    if kind not in ("a letter and an index", "rows unlike the first", "numbers"):        # parquet has one type a column
        write_table(Table.from_pylist(rows), tmp_path / "x.parquet")
        names.append("x.parquet")
    for name in names:
        config, docs = read(tmp_path / name)
        assert [doc["choices"][doc["gold"]] for doc in docs] == expected, name
        assert config["metadata"]["headline"] == ("acc_norm" if {"endings", "answerKey", "sol1"} & set(columns) else None)


def test_what_looks_like_structure_is_text(ours, tmp_path):
    """lm-eval evaluates what a template gives; a question of digits it takes for an index, and scores without it."""
    questions = ["[1, 2, 3]", "42", "{{ 7 * 7 }}", "[not a list", '{"a": 1}']
    choices = ["[1]", "12", "{{x}}"]
    folder = write_jsonl(tmp_path / "t" / "choice.jsonl", [{"question": q, "choices": choices, "label": 1} for q in questions])
    write_jsonl(folder / "text.jsonl", [{"text": q} for q in questions])
    write_jsonl(folder / "pairs.jsonl", [{"sentence_good": "[1, 2]", "sentence_bad": "'"}])
    write_jsonl(folder / ".hidden.jsonl", [{"nothing": 1}])
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
    tasks = benchmark.scoring.evaluate_block(lm, {"local": folder})["tasks"]
    expected = [[direct(ours.model, ours.tokenizer, q, f" {c}") for c in choices] for q in questions]
    assert np.allclose(tasks["t/choice"]["loglikelihoods"], expected, atol=5e-4)
    assert set(tasks) == {"t/choice", "t/text", "t/pairs"}
    nats = -sum(direct(ours.model, ours.tokenizer, "", q) for q in questions)
    assert tasks["t/text"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(map(len, questions)), rel=1e-4)
    pair = [direct(ours.model, ours.tokenizer, "", text) for text in ("[1, 2]", "'")]
    assert tasks["t/pairs"]["loglikelihoods"][0] == pytest.approx(pair, abs=5e-4)


def test_winogrande_scores_one_continuation_behind_two_contexts(ours, tmp_path):
    rows = [{"sentence": "Sarah was a better surgeon than Maria so _ got the easier cases.", "option1": "Sarah",
             "option2": "Maria", "answer": answer} for answer in ("2", 1)]
    folder = write_jsonl(tmp_path / "w" / "wino.jsonl", rows)
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer)
    task = benchmark.scoring.evaluate_block(lm, {"local": folder})["tasks"]["w/wino"]
    expected = [direct(ours.model, ours.tokenizer, f"Sarah was a better surgeon than Maria so {name}", " got the easier cases.")
                for name in ("Sarah", "Maria")]
    assert task["loglikelihoods"][0] == task["loglikelihoods"][1] == pytest.approx(expected, abs=5e-4)
    assert task["items"]["acc,none"] == [float(expected[1] > expected[0]), float(expected[0] > expected[1])]
    assert task["chance"] == 0.5


GOOD = {"query": "q", "choices": ["x", "y"], "label": 0}


@pytest.mark.parametrize("bad, said", [
    *(({**GOOD, "label": label}, "label = ") for label in (-1, "-1", "", " ", None, 2, "C", "maybe", True, 0.5, [0])),
    ({"query": "q", "choices": ["x", "y"]}, "label = None"), ({**GOOD, "query": None}, "query = None is no text"),
    ({**GOOD, "query": "caf\udce9"}, "not UTF-8"), ({**GOOD, "query": ["q"]}, "query = "),
    ({**GOOD, "choices": ["x", ""]}, "is no text"), ({**GOOD, "choices": ["x", None]}, "is no text"),
    ({**GOOD, "choices": "x, y"}, "is no list"), ({**GOOD, "choices": ["x"]}, "takes two"),
    ({"query": "q", "label": 0}, "there are no choices"), (["x"], "no row of named columns")])
def test_a_row_that_cannot_be_scored_is_named(bad, said, ours, tmp_path):
    folder = write_jsonl(tmp_path / "t" / "x.jsonl", [GOOD, bad])
    with pytest.raises(su.ParameterError, match=rf"x\.jsonl, line 2, row 1: .*{re.escape(said)}"):
        benchmark.tasks.local_tasks(folder)
    assert len(benchmark.tasks.local_problems(folder)) == 1


@pytest.mark.parametrize("name, data, said", [
    ("x.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3, row 1: .* is not JSON"),
    ("x.jsonl", b"[" * 100_000, "line 1, row 0: .* is not JSON"),
    ("x.jsonl", '{"text": "a"}\n{"text": "café"}'.encode("latin-1"), "line 2, row 1: .* is not UTF-8"),
    ("x.csv", b"text,n\na,1\nb\n", "line 3, row 1: 1 cells under 2"), ("x.csv", b"text,n\na,1,2\n", "line 2, row 0: 3 cells"),
    ("x.csv", b'text,n\n"a,1\n', "line 2, row 0"), ("x.csv", b"text,text\na,b\n", "twice"), ("x.csv", b"text\n", "no rows"),
    ("x.json", b"{}", "is no task"), ("x.parquet", b"PAR1", "cannot be read"),
    ("x.jsonl", b'{"question": "q", "answer": "Paris"}', "row 0: answer = .* no number"),
    ("x.jsonl", b'{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}', "row 0: sentence = .* no blank"),
    ("x.jsonl", b'{"sentence": "a _ b", "option1": "a", "option2": "b", "answer": ""}', "row 0: answer = '' is not 1 or 2"),
    ("x.jsonl", b'{"question": "2+2", "choices": [3, 4, 5, 6], "answer": 4}', "row 0: answer = 4 may be"),
    ("x.jsonl", b'{"sentence_good": "a"}', "is no task"), ("x.jsonl", b"", "has no rows")])
def test_a_file_that_cannot_be_read_is_named(name, data, said, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(su.ParameterError, match=f"{re.escape(name)}.*{said}"):
        read(tmp_path / name)


def test_cells_longer_than_the_csv_modules_limit(tmp_path):
    (tmp_path / "x.csv").write_text(f"text\n{'long ' * 40_000}\n")
    assert len(read(tmp_path / "x.csv")[1][0]["text"]) == 200_000


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_benchmarks_as_they_are_shared():
    assert benchmark.tasks.local_problems(SHARED / "data" / "gsm8k") == []
    config, docs = read(SHARED / "data" / "gsm8k" / "test.jsonl")
    assert len(docs) == 1319 and config["output_type"] == "generate_until"
    assert "is no task" in benchmark.tasks.local_problems(SHARED / "data" / "dolly")[0]


@pytest.mark.parametrize("label", [-1, 4])
def test_an_unlabelled_split_of_a_yaml_task_is_refused(label, ours, english, tmp_path):
    rows = hellaswag_items(english, 3)
    rows[1]["label"] = label
    write_jsonl(tmp_path / "data.jsonl", rows)
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "mine.yaml").write_text(json.dumps({
        "task": "unlabelled", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{ctx}}", "doc_to_choice": "choices", "doc_to_target": "label"}))
    with pytest.raises(su.ParameterError, match=f"unlabelled, item 1: its target {label} is no right answer"):
        benchmark.scoring.evaluate_block(benchmark.lm.StentorLM(ours.model, ours.tokenizer), {"local": tmp_path / "yaml"})


def test_ties_share_the_point_and_are_counted(ours, english, notebook, tmp_path):
    a, b, c = english[:3]
    folder = write_jsonl(tmp_path / "t" / "pairs.jsonl", [{"sentence_good": a, "sentence_bad": a}] * 3
                         + [{"sentence_good": a, "sentence_bad": b}, {"sentence_good": b, "sentence_bad": a}])
    write_jsonl(folder / "choice.jsonl", [{"query": a, "choices": [b, b, b, b], "label": 2},
                                          {"query": a, "choices": [c, "x", c], "label": 2}])
    task = benchmark.scoring.evaluate_block(benchmark.lm.StentorLM(ours.model, ours.tokenizer), {"local": folder})["tasks"]
    pairs, choice = task["t/pairs"], task["t/choice"]
    assert pairs["items"]["acc,none"][:3] == [0.5] * 3 and sum(pairs["items"]["acc,none"][3:]) == 1
    assert pairs["metrics"]["acc,none"] == 0.5 and pairs["ties"] == {"acc,none": 3}
    assert pairs["lm_eval_metrics"]["acc,none"] == 0.8            # lm-eval takes the first, the good one
    best = [np.array(lls) / 1 for lls in choice["loglikelihoods"]]
    expected = [0.25, 0.5 if best[1][0] > best[1][1] else 0.0]
    assert choice["items"]["acc,none"] == expected and choice["lm_eval_metrics"]["acc,none"] == 0.0
    rows = notebook.result_rows({"m": {"t": {"tasks": task, "groups": {}, "title": "t"}}}, PUBLISHED["peers"])
    row = next(row for row in rows if row["task"] == "t/pairs")
    assert (row["score"], row["ties"], row["lm_eval"], row["chance"]) == (0.5, 3, 0.8, 0.5)
    assert (row["low"], row["high"]) == su.statistics.wilson(2.5, 5)
    assert any("3 of 5 items" in said and "0.8000" in said for said in notebook.remarks(rows, {}))


def test_texts_of_the_same_tokens_tie():
    """Words that a tokenizer does not know are one token to it: whatever batch they fall into, the model cannot choose."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "the": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    lm = benchmark.lm.StentorLM(random_model(su.Shape(4, 32, 64, 2, 2, 1, 512), tokenizer), tokenizer)
    pairs = [("", ["the cat", "the dog"]), ("", ["the dog a"]), ("", ["the mouse"])]
    keys = [request.key for request in lm.requests_of([(c, text) for c, texts in pairs for text in texts])]
    assert keys[0] == keys[1] == keys[3] != keys[2]


def test_a_model_that_knows_nothing_scores_chance(ours, tmp_path):
    """All logits alike: sentences of as many tokens tie, and so does every item of equal words."""
    import copy
    blank = copy.deepcopy(ours.model)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    tokens = [ours.tokenizer.decode([i]) for i in range(300, 340)]
    rows = [{"sentence_good": "zq" + a, "sentence_bad": "zq" + b} for a, b in zip(tokens, tokens[1:])]
    task = benchmark.scoring.evaluate_block(benchmark.lm.StentorLM(blank, ours.tokenizer), {
        "local": write_jsonl(tmp_path / "t" / "pairs.jsonl", rows)})["tasks"]["t/pairs"]
    assert task["metrics"]["acc,none"] == 0.5 and task["ties"]["acc,none"] == len(rows) == 39
    assert task["lm_eval_metrics"]["acc,none"] == 1.0
    with torch.no_grad():
        blank.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="t/pairs, item 0: the model's log-likelihood is not a number"):
        benchmark.scoring.evaluate_block(benchmark.lm.StentorLM(blank, ours.tokenizer), {"local": tmp_path / "t"})


def test_generation_from_nothing_and_for_longer_than_the_model(ours, english):
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer, max_length=32)

    def ask(context, **options):
        request = Instance("generate_until", {}, (context, {"until": [], **options}), 0, metadata=("g", 0, 1))
        return lm.generate_until([request])[0]

    for context in ("", None):
        tokens = ours.model.generate(torch.tensor([[ours.tokenizer.eos_token_id]]), max_new_tokens=5, do_sample=False)[0, 1:]
        assert ask(context, max_gen_toks=5) == ours.tokenizer.decode(tokens, skip_special_tokens=True)
    assert lm.counts["g"] == {"requests": 1, "truncated": 0}
    whole = ask(english[0], max_gen_toks=10_000)
    assert whole == ask(english[0], max_gen_toks=16) == ask(english[0], max_new_tokens=16, until=["", "\x00"]) != ""
    assert lm.counts["g"] == {"requests": 1, "truncated": 1} and len(lm.encode([english[0]])[0]) > 16
    mixed = [Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 5}), i, metadata=("g", i, 1))
             for i, text in enumerate(["", english[1][:20]])]
    assert lm.generate_until(mixed) == [ask("", max_gen_toks=5), ask(english[1][:20], max_gen_toks=5)]
    nothing = lm.loglikelihood(instances([(None, [english[0]]), ("", [english[0]])]))
    assert nothing[0] == nothing[1] and lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0)]) == [0.0]


def test_the_cards_blocks_name_tasks_that_this_lm_eval_has():
    manager = benchmark.tasks.task_manager()
    names = {name for _, tasks, _ in benchmark.tasks.BLOCKS.values() for name in tasks}
    assert names <= set(manager.all_tasks)
    columns = {(column["task"], column["num_fewshot"]) for column in PUBLISHED["peers"]["columns"]}
    assert columns == {(name, shots) for _, tasks, shots in benchmark.tasks.BLOCKS.values() for name in tasks} - {("blimp", 0)}
    assert {f"mmlu_{group}" for group in ("humanities", "other", "social_sciences", "stem")} <= set(manager.all_tasks)


# ------------------------------------------------------------------------------------------------------ cache, resume

def test_the_cache_serves_the_same_model_and_no_other(ours, english, tmp_path):
    folder = write_jsonl(tmp_path / "t" / "a.jsonl", hellaswag_items(english, 5))
    cache = benchmark.lm.Cache(tmp_path / "cache.sqlite")
    lm = benchmark.lm.StentorLM(ours.model, ours.tokenizer, cache=cache)
    first = benchmark.scoring.evaluate_block(lm, {"local": folder})
    lm.score = None                                   # calling it would fail: everything must come from the cache
    again = benchmark.scoring.evaluate_block(lm, {"local": folder})
    assert again["tasks"] == first["tasks"] and again["key"] == first["key"]
    import copy
    changed = copy.deepcopy(ours.model)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    other = benchmark.lm.StentorLM(changed, ours.tokenizer, cache=cache)
    result = benchmark.scoring.evaluate_block(other, {"local": folder})
    assert result["key"] != first["key"] and result["tasks"]["t/a"]["loglikelihoods"] != first["tasks"]["t/a"]["loglikelihoods"]
    base = benchmark.lm.model_fingerprint(ours.model, ours.tokenizer)
    assert base != benchmark.lm.model_fingerprint(copy.deepcopy(ours.model).bfloat16(), ours.tokenizer)
    theta = copy.deepcopy(ours.model)
    theta.config.rms_norm_eps = 1e-3
    assert base != benchmark.lm.model_fingerprint(theta, ours.tokenizer)
    resized = tm.TokenMonsterTokenizer.from_vocabulary(ours.tokenizer.vocabulary, vocab_size=len(ours.tokenizer) + 128)
    assert base != benchmark.lm.model_fingerprint(ours.model, resized)
    loaded, _ = benchmark.run.load_scored(str(ours.folder), "float32", torch.device("cpu"))
    assert base == benchmark.lm.model_fingerprint(loaded, ours.tokenizer)
    rows = hellaswag_items(english, 5)                # another right answer to the same prompts: another key, and score
    rows[0]["label"] = (rows[0]["label"] + 1) % 4
    write_jsonl(folder / "a.jsonl", rows)
    assert benchmark.scoring.evaluate_block(lm, {"local": folder})["key"] != first["key"]


KILLS = """
import json, os, random, sqlite3, sys
from pathlib import Path
import torch
from stentor import benchmark
import datasets, lm_eval.evaluator, lm_eval.api.task
sys.path.append("tests")
import kill_here
torch.set_num_threads(1)                              # no thread pool, so that forking is safe
config = json.loads(sys.argv[2])
benchmark.run.load_scored(config["models"]["m"], "float32", torch.device("cpu"))      # all imports, once, for every child
def answers(folder):
    try:
        with sqlite3.connect(f"file:{folder}/cache.sqlite?mode=ro", uri=True, timeout=5) as c:
            return c.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    except sqlite3.Error:
        return 0
def child(folder, goal=None, calls=0):
    "Score to the end, or until so many calls after that many answers are kept; the exit status."
    pid = os.fork()
    if pid == 0:
        put = benchmark.lm.Cache.put
        def put_and_die(cache, new):
            put(cache, new)
            if answers(folder) >= goal:
                benchmark.lm.Cache.put = put
                kill_here.after(calls)
        if goal:
            benchmark.lm.Cache.put = put_and_die
        benchmark.run.run(config, folder, say=lambda text: print(folder.name, "|", text, flush=True))
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
    write_jsonl(tmp_path / "unlabelled" / "x.jsonl", [{"query": "q", "choices": ["a", "b"], "label": ""}])
    config = {"models": {"m": str(ours.folder)}, "dtype": "float32", "tokens_per_batch": 512, "blocks": {
        name: {"title": name, "local": str(tmp_path / name)} for name in ("unlabelled", "one")}}
    said = []
    benchmark.run.launch(config, tmp_path / "two", num_processes=2, say=lambda text: (said.append(text), print(text)))
    two = json.loads((tmp_path / "two" / "m" / "one.json").read_text())
    (tmp_path / "single").mkdir()
    benchmark.run.run(config, tmp_path / "single", say=said.append)
    one = json.loads((tmp_path / "single" / "m" / "one.json").read_text())
    assert one["key"] == two["key"]
    assert any("unlabelled | failed" in line for line in said)        # refused by both, and the next block scored
    assert np.allclose(one["tasks"]["one/swag"]["loglikelihoods"], two["tasks"]["one/swag"]["loglikelihoods"], atol=1e-4)
    assert one["tasks"]["one/sums"]["items"] == two["tasks"]["one/sums"]["items"]


def test_a_failing_block_does_not_cost_the_others(ours, english, tmp_path):
    write_jsonl(tmp_path / "good" / "a.jsonl", hellaswag_items(english, 3))
    write_jsonl(tmp_path / "bad" / "a.jsonl", [{"nothing": 1}])
    secret = "hf_" + "x" * 30
    config = {"models": {"m": str(ours.folder), "peer": f"{tmp_path}/{secret}"}, "dtype": "float32",
              "blocks": {name: {"title": name, "local": str(tmp_path / name)} for name in ("bad", "good")}}
    (tmp_path / "bad" / "b.jsonl.gz").write_bytes(b"")
    assert "b.jsonl.gz cannot be read" in benchmark.tasks.local_problems(tmp_path / "bad")[1]
    (tmp_path / "out").mkdir()
    said = []
    summary = benchmark.run.run(config, tmp_path / "out", say=said.append)
    blocks, error = summary["models"]["m"]["blocks"], summary["models"]["peer"]["error"]
    assert "[secret]" in error and secret not in error and secret not in "".join(said)
    assert any(line.startswith("peer | not loaded: ") for line in said)
    assert blocks["bad"]["status"] == "failed" and "columns are nothing" in blocks["bad"]["error"]
    assert blocks["good"]["status"] == "ok" and json.loads((tmp_path / "out/run_summary.json").read_text()) == summary


# ------------------------------------------------------------------------------------------------------ contamination

def test_items_from_the_training_text_are_found_and_others_not(tiny):
    texts = [text for text, reason, _ in su.clean_documents(tiny.source) if not reason]
    trained = benchmark.contamination.words_of(texts[5])                   # the first four are held out
    assert len(trained) > 60
    items = {"copied": [[" ".join(trained[i:i + 20]).upper() + "!"] for i in (0, 9, 30)],     # case and signs do not matter
             "inside": [["something else before it " + " ".join(trained[20:33])], ["x " * 20 + " ".join(trained[20:32])]],
             "short": [[" ".join(trained[40:46])], ["zyx wvu tsr qpo nml kji"], ["too short"]],
             # The end of one document, the beginning of the next one.
             "across": [[" ".join(trained[-7:] + benchmark.contamination.words_of(texts[6])[:7])]],
             "fresh": [[" ".join(reversed(trained[:20]))], ["colourless green ideas sleep furiously " * 4]]}
    found = benchmark.contamination.contamination(items, tiny.store_dir, tiny.tokenizer)
    assert found["copied"] == {"items": 3, "items_checked": 3, "contaminated": 3, "short_checked": 0, "short_found": 0}
    assert found["inside"]["contaminated"] == 1       # thirteen words in a row are, twelve are not
    assert found["short"] == {"items": 3, "items_checked": 0, "contaminated": 0, "short_checked": 2, "short_found": 1}
    assert found["fresh"]["contaminated"] == found["across"]["contaminated"] == 0


FORMS = {"as it is": "{q} {a}", "shouted": "{q} {a}", "header": "Question: {q}\nAnswer: {a}",
         "bold header": "**Q:** {q}\n\n**A:** {a}", "exam": "{q}\n(A) {w}\n(B) {a}\nAnswer: B", "line breaks": "{q}\n\n{a}",
         "punctuation": "({q})... \u201c{a}\u201d!"}


@pytest.mark.parametrize("form", FORMS)
def test_planted_items_of_every_kind_are_found(form, ours, tiny, tmp_path):
    """What counts as checked must be found, however it was written down; what is too short must not count as checked."""
    r = np.random.default_rng(3)

    def words(count):
        syllables = [a + b for a, b in zip(r.choice(list("bcdfglmnprstv"), 3 * count), r.choice(list("aeiou"), 3 * count))]
        return " ".join("".join(syllables[i:i + 3]) for i in range(0, 3 * count, 3))

    def items(lengths):                               # (question, right, much longer wrong choice)
        return [(words(q), words(a), words(30)) for q, a in lengths]

    sizes = [(3, 3), (6, 2), (10, 1), (20, 4), (4, 12)]
    kinds = {name: items(sizes) for name in ("choice", "endings", "sums", "blank", "pairs", "text")}
    folder = tmp_path / "t"
    for name, rows in {
            "choice": [{"question": q, "choices": [w, a], "label": 1} for q, a, w in kinds["choice"]],
            "endings": [{"ctx": q, "endings": [w, a], "label": "1"} for q, a, w in kinds["endings"]],
            "sums": [{"question": q, "answer": f"{a} #### 7"} for q, a, w in kinds["sums"]],
            "blank": [{"sentence": f"{q} _ {a}", "option1": "xan", "option2": w, "answer": "1"} for q, a, w in kinds["blank"]],
            "pairs": [{"sentence_good": f"{q} {a}", "sentence_bad": w} for q, a, w in kinds["pairs"]],
            "text": [{"text": f"{q} {a}"} for q, a, w in kinds["text"]]}.items():
        write_jsonl(folder / f"{name}.jsonl", rows + [{key: value if key in ("label", "answer") and name != "sums" else
                                                       ["no", "ay"] if isinstance(value, list) else
                                                       "_ be" if key == "sentence" else "ay" if name != "sums" else
                                                       "#### 7" for key, value in rows[0].items()}])
    planted = []
    for name, rows in kinds.items():
        for q, a, w in rows:
            whole = name in ("blank", "pairs", "text")            # no question and answer apart
            text = f"{q} xan {a}" if name == "blank" else f"{q} {a}" if whole else (
                FORMS["as it is" if (form, name) == ("exam", "sums") else form].format(
                    q=q, a=f"{a} #### 7" if name == "sums" else a, w=w))
            planted.append({"text": f"{words(9)}. {text.upper() if form == 'shouted' else text} {words(9)}"})
    held_out = [{"text": words(30)} for _ in range(4)]
    write_jsonl(tmp_path / "planted.jsonl", held_out + planted)
    source = su.Source("planted", str(tmp_path / "planted.jsonl"))
    store = su.prepare_tokens([source], tiny.tokenizer, tmp_path / "tokens", tokens_per_source={"planted": 10**6},
                              validation_documents=4, shard_tokens=20_000, progress=lambda text: None)
    texts = {task.config.task: [] for task in benchmark.tasks.local_tasks(folder)}
    for task in benchmark.tasks.local_tasks(folder):
        task.build_all_requests(rank=0, world_size=1)
        texts[task.config.task] = benchmark.tasks.item_texts(task)
    found = benchmark.contamination.contamination(texts, store, tiny.tokenizer)
    assert len(found) == 6
    for name, counts in found.items():
        assert counts["items"] == len(sizes) + 1 and counts["items_checked"] + counts["short_checked"] == len(sizes), name
        assert counts["contaminated"] == counts["items_checked"] >= 2 and counts["short_found"] == counts["short_checked"], name
    fresh = {name: [[f"{words(8)} {words(8)}", words(8)], [words(7)]] for name in found}
    assert not any(row["contaminated"] or row["short_found"]
                   for row in benchmark.contamination.contamination(fresh, store, tiny.tokenizer).values())


def test_words_are_what_is_left_without_case_and_signs():
    text = "**Q**: \u201cDON\u2019T\u201d pay $1,000.50 for a well-known Stra\u00dfe!\n\nAnswer: 3/4"
    assert benchmark.contamination.words_of(text) == [
        "dont", "pay", "100050", "for", "a", "wellknown", "strasse", "3", "4"]
    text = "Janet's 16 eggs (3.5 a day), a half-price STRASSE"
    assert benchmark.contamination.words_of(re.sub(r"[^\w\s]", "", text).lower()) == benchmark.contamination.words_of(text)
    assert benchmark.contamination.words_of("one\n\x00\ntwo") == ["one", "\x00", "two"]


def test_words_that_items_share_are_evidence_of_none(tiny):
    """A question that several items ask, or a prompt's own words, stand in the store: no item does."""
    trained = benchmark.contamination.words_of([text for text, reason, _ in su.clean_documents(tiny.source) if not reason][5])
    shared, prompt = " ".join(trained[:7]), " ".join(trained[10:30])
    items = [[f"{shared} zyx{i} wvu{i}", f"{prompt} {shared} zyx{i}", shared] for i in range(3)]
    found = benchmark.contamination.contamination({"t": items}, tiny.store_dir, tiny.tokenizer)["t"]
    assert found["short_checked"] == 3 and found["short_found"] == 0
    alone = [[f"{shared} zyx wvu", shared], ["a question that is its own and no other's"]]
    assert benchmark.contamination.contamination({"t": alone}, tiny.store_dir, tiny.tokenizer)["t"]["short_found"] == 1


@pytest.mark.parametrize("chunk", [500, 1 << 20])
def test_the_store_is_read_whole_and_cut_between_documents(tiny, chunk):
    manifest = json.loads((Path(tiny.store_dir) / "manifest.json").read_text())
    shards = [np.fromfile(Path(tiny.store_dir) / shard["file"], "<u2") for shard in manifest["sources"]["topics"]["shards"]]
    parts = np.split(np.concatenate(shards), np.flatnonzero(np.concatenate(shards) == manifest["eos_token_id"]) + 1)
    documents = [tiny.tokenizer.vocabulary.decode(part[part != manifest["eos_token_id"]].astype(np.int64)) for part in parts]
    read = "\x00".join(benchmark.contamination.store_texts(tiny.store_dir, tiny.tokenizer, chunk))
    assert [" ".join(text.split()) for text in read.split("\x00") if text.strip()] == [
        " ".join(text.split()) for text in documents if text.strip()]
    assert len(shards) > 1


# --------------------------------------------------------------------------------------------------------- statistics

def test_intervals_and_paired_tests_are_the_textbooks(notebook):
    assert notebook.interval([1, 0, 0.5, 0, 1]) == su.statistics.wilson(2.5, 5)      # ties share their point
    random = np.random.default_rng(0)
    items = random.normal(0.4, 0.1, 400)
    low, high = notebook.interval(items)
    error = su.statistics.standard_error(items)
    assert low == pytest.approx(items.mean() - 1.96 * error, abs=error / 4)
    assert high == pytest.approx(items.mean() + 1.96 * error, abs=error / 4)
    # McNemar's exact test: 10 items against 2 that only the other has right; n does not matter
    a, b = np.array([1] * 10 + [0] * 2 + [1] * 50), np.array([0] * 10 + [1] * 2 + [1] * 50)
    assert notebook.paired_p(a, b) == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert notebook.paired_p(a, a) == 1.0
    shifted = items + random.normal(0.01, 0.02, 400)  # far inside the intervals, but paired: told apart
    assert notebook.interval(shifted)[0] < items.mean() and notebook.paired_p(items, shifted) < 0.001
    assert notebook.paired_p(items, items + random.normal(0, 0.02, 400)) > 0.01


def test_ranks_tie_under_the_null(notebook):
    random = np.random.default_rng(1)
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
    assert notebook.average_over_random(two, published)["stderr"] == pytest.approx(su.statistics.standard_error(items))
    one = {"a": {"task": "hellaswag", "num_fewshot": 0, "items": items}, "b": two[0]}
    assert notebook.average_over_random(one, published)["stderr"] == pytest.approx(su.statistics.standard_error(items) / 2**0.5)
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
    summary = benchmark.run.run(config, tmp_path / "out", say=lambda text: None)
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


def test_folders_of_one_name_are_told_apart(tmp_path, notebook, ours, english):
    for name, seed in (("a", 0), ("b", 1)):
        write_jsonl(tmp_path / name / "dev" / "x.jsonl", hellaswag_items(english, 6, seed))
    write_jsonl(tmp_path / "a" / "dev" / "text.jsonl", [{"text": text} for text in english[:5]])
    (tmp_path / "a" / "dev" / "text.csv").write_text("text\nanother\n")
    places = [tmp_path / "a" / "dev", str(tmp_path / "b" / "dev"), tmp_path / "a" / "dev" / "x.jsonl", tmp_path / "a" / "dev"]
    blocks = benchmark.tasks.local_blocks(places)
    assert [block["name"] for block in blocks.values()] == ["a/dev", "b/dev", "x.jsonl"] and len(blocks) == 3
    assert list(benchmark.tasks.local_blocks(places[:1])) == ["local_dev"]
    (tmp_path / "out").mkdir()
    config = {"models": {"m": str(ours.folder)}, "dtype": "float32", "blocks": blocks}
    summary = benchmark.run.run(config, tmp_path / "out", say=lambda text: None)
    results = notebook.load_blocks(tmp_path / "out", summary)
    rows = {row["task"]: row for row in notebook.result_rows(results, PUBLISHED["peers"])}
    assert set(rows) == {"a/dev/x", "b/dev/x", "a/dev/text.csv", "a/dev/text.jsonl", "x.jsonl"}
    assert rows["a/dev/x"]["score"] == rows["x.jsonl"]["score"]
    text = results["m"]["local_a_dev"]["tasks"]["a/dev/text.jsonl"]
    row = rows["a/dev/text.jsonl"]
    assert row["score"] == pytest.approx(text["bits_per_byte"], rel=1e-9) and row["metric"] == "bits_per_byte" and row["n"] == 5
    assert row["low"] < row["score"] < row["high"] and row["chance"] is None


def block_of(name, title, **task):
    task = {"items": {"acc,none": [1.0, 0.0], "acc_norm,none": [0.0, 0.0]}, "n": 2, "chance": 0.25, "num_fewshot": 0,
            "version": "local", "metrics": {"acc,none": 0.5, "acc_norm,none": 0.0}, **task}
    return {"tasks": {name: task}, "groups": {}, "title": title}


def test_tables_show_cut_contexts_the_right_metric_and_tasks_of_one_name(notebook):
    blocks = {"one": block_of("dev/x", "one", truncated=288, requests=800),
              "two": block_of("dev/x", "two", headline="acc_norm"), "three": block_of("mine/hellaswag_val", "three"),
              "four": block_of("mine/ARC-Challenge-Dev", "four"),
              "five": block_of("odd", "five", items={"f1,none": [[0, 1]]}, metrics={"f1,none": 0.5})}
    results = {"m": blocks, "n": {"two": blocks["two"]}}
    rows = notebook.result_rows(results, PUBLISHED["peers"])
    assert [(row["task"], row["model"], row["metric"]) for row in rows] == [
        ("dev/x [one]", "m", "acc"), ("dev/x [two]", "m", "acc_norm"), ("dev/x [two]", "n", "acc_norm"),
        ("mine/hellaswag_val", "m", "acc_norm"), ("mine/ARC-Challenge-Dev", "m", "acc_norm")]
    assert (rows[0]["truncated"], rows[0]["requests"]) == (288, 800)
    said = notebook.remarks(rows, results)
    assert any("288 of 800" in line for line in said) and any(line.startswith("odd, m: not in the table") for line in said)


def test_less_bits_per_byte_is_the_better_rank(notebook):
    random = np.random.default_rng(0)
    good = [[-float(n), 40] for n in random.normal(60, 3, 50)]
    results = {name: {"b": block_of("t/text", "b", items={"bits_per_byte,none": [[n * factor, size] for n, size in good]}, n=50,
                                    chance=None, metrics={"bits_per_byte,none": 0.0})}
               for name, factor in (("worse", 1.3), ("better", 1.0))}
    rows = {row["model"]: row for row in notebook.result_rows(results, PUBLISHED["peers"])}
    assert (rows["better"]["rank"], rows["worse"]["rank"]) == ("1", "2") and rows["better"]["score"] < rows["worse"]["score"]
    expected = -sum(n for n, _ in good) / math.log(2) / (40 * 50)
    assert rows["better"]["score"] == pytest.approx(expected)


def test_the_formats_stand_in_the_notebook():
    cells = json.loads((REPO / "notebooks" / "05_benchmark.ipynb").read_text())["cells"]
    about = next("".join(cell["source"]) for cell in cells if cell["id"] == "suite-about")
    columns = {name for tells, _, _ in benchmark.kinds.KINDS.values() for names in tells for name in names}
    rows = benchmark.rows
    for name in {*columns, *rows.QUESTIONS, *rows.PASSAGES, *rows.LABELS, *rows.TASK_FILES}:
        assert f"`{name}`" in about, name
