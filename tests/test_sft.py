"""Instruct tuning: exact counts, masks, batches, phases with resume, label rules, the probe's arithmetic."""
import dataclasses
import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from conftest import REPO
from hub_server import HubServer
from notebook_functions import load_functions

import stentor.checkpoints
import stentor.alone
import stentor.optimizers
import stentor_utils as su

F = load_functions("04_instruct_sft")
F["dataclasses"] = dataclasses                          # the notebook imports it in a cell of its own
PUBLISHED = su.RECIPES["stentor-12m-instruct"]
SYSTEM = "Be kind."


def conversation(prompt, answer):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer}]


# --- counts


def test_the_main_phase_has_the_published_counts():
    assert F["shares"](18_000, F["MIX"]) == {"falsereject": 7_125, "beavertails": 5_708, "dolly": 5_153, "seed_safety": 14}
    available = {"falsereject": 14_624, "beavertails": 7_000, "dolly": 15_011, "seed_safety": 100}
    examples = {name: [(name, i) for i in range(n)] for name, n in available.items()}
    train, held = F["mix"](examples)
    assert (len(train), len(held)) == (17_460, 540) and len({*train, *held}) == 18_000
    counts = {name: sum(row[0] == name for row in train + held) for name in available}
    assert counts == F["MIX"] and {row[0] for row in held} == set(F["MIX"])
    assert F["mix"](examples) == (train, held) != F["mix"](examples, seed=1)
    rows = [{"ids": [0] * 5, "labels": [0] * 5, "source": "x"}] * 17_460
    store = F["ConversationStore"]("main", rows, rows, batch_size=192, epochs=3, seed=0, pad_id=0)
    assert store.steps == PUBLISHED.total_steps == 273 and PUBLISHED.warmup_steps == 16
    recipe = F["phase_recipe"](PUBLISHED, F["PHASES"]["card"][1], store.steps, PUBLISHED.shape, batch=192, block=384, rate=1,
                               seed=42)
    assert recipe.total_steps == 273 and recipe.per_device_train_batch_size == 48 and recipe.gradient_accumulation_steps == 4
    assert [row[0] for row in recipe.difference(PUBLISHED)] == ["name"]
    with pytest.raises(su.ParameterError, match="beavertails has 5,000 usable examples for a share of 5,708"):
        F["mix"]({**examples, "beavertails": examples["beavertails"][:5_000]})


def test_shares_are_whole_and_complete_for_every_total():
    for total in (4, 5, 37, 540, 17_999):
        counts = F["shares"](total, F["MIX"])
        assert sum(counts.values()) == total and min(counts.values()) >= 1
        assert all(abs(counts[name] - total * weight / 18_000) < 2 for name, weight in F["MIX"].items())


def test_the_phase_table_is_the_cards():
    assert [(p.examples, p.epochs, p.learning_rate, p.dropout) for p in F["PHASES"]["card"]] == [
        (100, 2, 3e-5, 0.0), (17_460, 3, 3e-5, 0.1), (300, 2, 5e-5, 0.1), (100, 2, 5e-5, 0.1), (512, 1, 3e-5, 0.1)]
    names = ("weight_decay", "adam_epsilon", "max_grad_norm", "ema_decay", "block_size", "total_batch_size", "mixed_precision",
             "eval_steps", "warmup_ratio")
    assert [getattr(PUBLISHED, name) for name in names] == [0.1, 1e-6, 1.0, 0.999, 384, 192, "no", 40, 0.06]


def test_cosine_with_one_restart_equals_transformers():
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-5)
    schedule = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 16, 273, num_cycles=2)
    rates = [PUBLISHED.learning_rate_at(update) for update in range(273)]
    for update in range(273):
        assert rates[update] == pytest.approx(schedule.get_last_lr()[0], abs=1e-12), update
        optimizer.step()
        schedule.step()
    assert sum(b > a for a, b in zip(rates[16:], rates[17:])) == 1          # one restart
    assert PUBLISHED.learning_rate_at(273) < 1e-9


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The 12-layer shape with adapters that do something, saved: (peft model, folder)."""
    model = F["lora_model"](su.build_model(PUBLISHED.shape), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("merged") / "final"
    su.save_model_folder(model, None, folder)
    return model.eval(), folder


def test_adapters_have_the_published_parameters_and_merge_into_the_weights(merged):
    model, folder = merged
    assert model.get_nb_trainable_parameters() == (1_474_560, 13_521_600)
    assert round(100 * 1_474_560 / 13_521_600, 2) == 10.91
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad} == set(F["LORA"]["target_modules"])
    plain = su.build_model(PUBLISHED.shape).eval()
    ids = torch.randint(0, 32_768, (2, 24), generator=torch.Generator().manual_seed(0))
    from transformers import AutoModelForCausalLM
    with torch.no_grad():
        saved = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert (model(ids).logits - saved).abs().max() < 1e-5
        assert (plain(ids).logits - saved).abs().max() > 1e-3               # the adapters did something


def test_the_merged_folder_loads_without_peft(merged, tmp_path):
    code = ("import sys; sys.modules['peft'] = None\nfrom transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
            "print(type(model).__name__, sum(p.numel() for p in model.parameters()))")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, str(merged[1])], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["LlamaForCausalLM", "12047040"], done.stderr[-2000:]


# --- masks


def check_masks(tokenizer, model, seed, count, mask_prompt=True):
    """`count` random conversations cut at random lengths. Prompts are of digits, answers of letters: tokens tell who spoke."""
    draw = random.Random(seed)

    def text(alphabet, longest):
        return "".join(draw.choice(alphabet) for _ in range(draw.randint(0, longest))) or alphabet[0]
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": text("0123 ", 40)}] if draw.random() < 0.5 else []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            messages += [{"role": "user", "content": text(("4", "5", "6", "789", " ", "</s>"), 40)},
                         {"role": "assistant", "content": text("abcdef ", 60)}]
        longest = draw.randint(2, 64)
        ids, labels = F["encode"](tokenizer, messages, longest, mask_prompt)
        assert len(ids) == len(labels) <= longest
        said = [label for label in labels if label != -100]
        assert said and said[-1] == ids[-1] == tokenizer.eos_token_id                 # stopping is taught, always
        assert labels[0] == -100                                                       # never predicted: must not be counted
        turns = sum(message["role"] == "assistant" for message in messages)
        assert ids.count(tokenizer.eos_token_id) == said.count(tokenizer.eos_token_id) <= turns    # none typed by a user
        assert not set(tokenizer.decode(said, skip_special_tokens=True)) - set("abcdef "), "a prompt token is in the loss"
        assert all(label in (-100, token) for token, label in zip(ids, labels))
        rows.append({"ids": ids, "labels": labels})
    for start in range(0, count, 500):
        batch = F["collate"](rows[start:start + 500], tokenizer.pad_token_id)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        counted = (batch["labels"][:, 1:] != -100).sum(1)
        assert counted.min() >= 1 and torch.isfinite(losses.sum(1) / counted).all()


def test_masks_of_10_000_random_conversations(tiny):
    model = su.build_model(dataclasses.replace(tiny.recipe.shape, num_hidden_layers=1)).eval()
    check_masks(tiny.tokenizer, model, 0, 10_000)
    with pytest.raises(AssertionError, match="a prompt token is in the loss|assert"):
        check_masks(tiny.tokenizer, model, 0, 200, mask_prompt=False)


def test_a_short_conversation_is_encoded_as_the_chat_template_says(tiny):
    messages = conversation("How are you?", "Fine.")
    ids, labels = F["encode"](tiny.tokenizer, messages, 64)
    whole = tiny.tokenizer.apply_chat_template(messages, tokenize=False)
    assert tiny.tokenizer.decode(ids) == whole.rstrip("\n")
    assert tiny.tokenizer.decode([t for t in labels if t != -100]) == "Fine.</s>"
    prompt = tiny.tokenizer(F["render"](tiny.tokenizer, messages[:2]))["input_ids"]
    assert ids[:len(prompt)] == prompt                                                 # asked as it was trained


def test_what_is_too_long_keeps_the_system_prompt_and_the_marker(tiny):
    ids, labels = F["encode"](tiny.tokenizer, conversation("why " * 200, "because " * 200), 128)
    text = tiny.tokenizer.decode(ids)
    assert len(ids) == 128 and SYSTEM in text and "<|user|>\nwhy why" in text and "<|assistant|>\nbecause" in text
    assert text.endswith("</s>")


def byte_level_bpe(texts):
    """A tokenizer of the other family: transformers' fast class, with tokens that reach over the edges of the markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    import tokenmonster_hf
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = tokenmonster_hf.CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module", params=["plain", "capcode", "bytes without a token", "byte-level BPE"])
def any_tokenizer(request, tiny):
    import tokenmonster_hf
    texts = ["why?\n<|assistant|>\nBecause of it.\n<|user|>\nI'm sure", "the value of a function"] * 50
    if request.param == "byte-level BPE":
        return byte_level_bpe(texts)
    over_the_edge = [b"?\n<|assist", b"s\n<", b"|>\nB", b"y\n<|assistant|>\n", b">\n<|us"]
    words = [f" {word}".encode() for word in set(" ".join(texts).split())] + over_the_edge
    include = {"bytes without a token": "ascii"}.get(request.param, "all256")
    vocabulary = tokenmonster_hf.Vocabulary.from_tokens(words, capcode=2 if request.param == "capcode" else 0, include=include)
    return tokenmonster_hf.TokenMonsterTokenizer.from_vocabulary(vocabulary)


SYLLABLES = ("why?", " value", "I'm ", "s", "y", "日本", "é", "ﬁ", "e\u0301", "👩\u200d👩\u200d👧", "\x00", "\x1b[0m", "\t",
             "\n", "A", "</s>", "<|assistant|>\n", "\u2028")
MARKER = "<|assistant|>\n"


def test_every_conversation_fits_with_its_marker_and_its_eos_whole(any_tokenizer):
    """Any order of turns, any text, any length: what the model is taught to answer to is what it will be asked with."""
    draw, cut = random.Random(3), 0
    marker = len(F["tokens"](any_tokenizer, MARKER))

    def text():
        return "".join(draw.choices(SYLLABLES, k=draw.randint(0, 30)))
    for _ in range(250):
        roles = draw.choices(("system", "user", "user", "assistant", "assistant", "tool"), k=draw.randint(0, 5))
        roles += ["assistant", *draw.choice(((), ("user",)))]
        messages = [{"role": role, "content": text()} for role in roles]
        longest = draw.randint(2, 96)
        ids, labels = F["encode"](any_tokenizer, messages, longest)
        assert 2 <= len(ids) == len(labels) <= longest and ids[-1] == labels[-1] == any_tokenizer.eos_token_id
        assert labels[0] == -100 and all(label in (-100, token) for token, label in zip(ids, labels))
        pieces = F["fit"](any_tokenizer, messages, longest)
        assert [token for _, piece, _ in pieces for token in piece] == ids
        for prompt, piece, said in pieces:
            if not said and longest > marker:
                assert prompt.endswith(MARKER) and F["tokens"](any_tokenizer, prompt) == piece
                assert any_tokenizer.decode(piece).endswith(MARKER), (prompt, longest)
            assert "\ufffd" not in prompt, "half a character"
        cut += len(pieces) == 2 < len(roles)
    assert cut > 100


def test_a_cut_question_loses_only_its_end(any_tokenizer):
    for words in range(1, 60):
        for longest in (40, 64, 90):
            messages = conversation("why? I'm sure " * words + "Why?", "Because of it.")
            (prompt, ids, _), (answer, said, _) = F["fit"](any_tokenizer, messages, longest)
            asked = [messages[0], {"role": "user", "content": prompt.partition("<|user|>\n")[2].removesuffix(f"\n{MARKER}")}]
            assert messages[1]["content"].startswith(asked[1]["content"])
            if SYSTEM in prompt:
                assert F["tokens"](any_tokenizer, F["render"](any_tokenizer, asked)) == ids
            assert len(ids) + len(said) <= longest and prompt.endswith(MARKER) and "Because of it.".startswith(answer)


@pytest.mark.parametrize("order", ["a", "aua", "uaa", "uaua", "suasua", "usa", "uuaa", "sa", "ssusa", "auua", "uat", "utaua"])
def test_every_order_of_turns_is_encoded_in_any_length(tiny, order):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [{"role": roles[letter], "content": f"{'0123'[i % 4]} " * 9 if letter != "a" else "abc " * 20}
                for i, letter in enumerate(order)]
    for longest in (2, 3, 16, 40, 90, 400):
        ids, labels = F["encode"](tiny.tokenizer, messages, longest)
        said = [label for label in labels if label != -100]
        assert len(ids) <= longest and said[-1] == ids[-1] == tiny.tokenizer.eos_token_id and labels[0] == -100
        assert not set(tiny.tokenizer.decode(said, skip_special_tokens=True)) - set("abc "), "a prompt is in the loss"
        if longest >= 16:
            assert tiny.tokenizer.decode(ids).count("<|assistant|>") == said.count(ids[-1])
    whole = tiny.tokenizer.apply_chat_template(messages[:order.rindex("a") + 1], tokenize=False)
    assert tiny.tokenizer.decode(ids) == whole.rstrip("\n")                      # 400 is enough for everything
    with pytest.raises(ValueError, match="without an answer"):
        F["encode"](tiny.tokenizer, [message for message in messages if message["role"] != "assistant"], 64)


def test_content_may_be_parts_of_text_and_nothing_else(tiny):
    parts = [{"type": "text", "text": "How are"}, " you", {"type": "text", "text": "?"}]
    messages = conversation("How are you?", "Fine.")
    in_parts = [messages[0], {**messages[1], "content": parts}, {**messages[2], "content": [{"type": "text", "text": "Fine."}]}]
    assert F["encode"](tiny.tokenizer, in_parts, 64) == F["encode"](tiny.tokenizer, messages, 64)
    assert F["encode"](tiny.tokenizer, in_parts, 30) == F["encode"](tiny.tokenizer, messages, 30)
    assert F["render"](tiny.tokenizer, [{"role": "assistant", "content": None}]).startswith("<|assistant|>\n</s>")
    for part in ({"type": "image", "url": "x.png"}, 5, {"type": "text", "text": None}):
        with pytest.raises(ValueError, match="must be text or a list of text parts"):
            F["encode"](tiny.tokenizer, conversation([part], "Fine."), 64)


def test_bytes_are_those_of_the_text_in_the_loss(any_tokenizer):
    example = {"prompt": "é " * 20, "answer": "ﬁ é 日本 👩‍👩‍👧 and more of it " * 9}
    whole, cut = (F["encode_examples"](any_tokenizer, [example], SYSTEM, longest)[0] for longest in (2000, 60))
    assert whole["bytes"] == len(example["answer"].encode())
    text = F["fit"](any_tokenizer, conversation(example["prompt"], example["answer"]), 60)[-1][0]
    assert cut["bytes"] == len(text.encode()) < whole["bytes"]
    said = any_tokenizer.decode([label for label in cut["labels"] if label != -100], skip_special_tokens=True)
    assert unicodedata.normalize("NFC", said) == unicodedata.normalize("NFC", text) and "\ufffd" not in text


def test_a_prompt_longer_than_the_context_is_cut_and_said_to_be(tiny):
    model = su.build_model(tiny.recipe.shape, seed=2)              # a context of 64
    short, long = F["ask"](model, tiny.tokenizer, ["", "why " * 200], "", max_new_tokens=200, do_sample=True, temperature=2)
    assert not short["cut"] and long["cut"] and 1 <= long["tokens"] <= 16
    assert F["ask"](model, tiny.tokenizer, [], SYSTEM) == []


# --- batches


@pytest.fixture(scope="module")
def encoded(tiny):
    draw = random.Random(1)
    words = "the value of a function is called when it returns an object that has no name".split()
    rows = [{"source": draw.choice(("one", "two")), "prompt": f"{i} " + " ".join(draw.choices(words, k=draw.randint(1, 12))),
             "answer": " ".join(draw.choices(words, k=draw.randint(1, 20))), "refuses": i % 3 == 0} for i in range(70)]
    return F["encode_examples"](tiny.tokenizer, rows, SYSTEM, 192)


def test_batches_are_a_pure_function_cover_each_epoch_once_and_are_padded_little(tiny, encoded):
    def make():
        return F["ConversationStore"]("x", encoded, encoded, batch_size=8, epochs=2, seed=3, pad_id=0)
    store = make()
    assert store.steps == 2 * 9
    for epoch in range(2):
        seen = [row["prompt"] for step in range(9) for row in store.examples(epoch * 9 + step)]
        assert sorted(seen) == sorted(row["prompt"] for row in encoded)
    assert [r["prompt"] for r in make().examples(13)] == [r["prompt"] for r in store.examples(13)]
    assert sorted(map(str, store.batches(0))) != sorted(map(str, store.batches(1)))
    kept = sum(int(store.batch(step)["attention_mask"].sum()) for step in range(9))
    shape = sum(store.batch(step)["attention_mask"].numel() for step in range(9))
    order = np.random.default_rng(0).permutation(70)
    shuffled = sum(F["collate"]([encoded[i] for i in order[s:s + 8]], 0)["attention_mask"].numel() for s in range(0, 70, 8))
    assert kept == sum(len(row["ids"]) for row in encoded) and shape - kept < 0.5 * (shuffled - kept)


def test_packing_changes_the_rows_and_not_the_gradient(tiny, encoded):
    model = su.build_model(dataclasses.replace(tiny.recipe.shape, max_position_embeddings=512), seed=5)
    gradients, losses, rows = [], [], []
    for batch in (F["collate"](encoded[:12], 0), F["collate_packed"](encoded[:12], 0, 512)):
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=int((batch["labels"][:, 1:] != -100).sum())).loss
        loss.backward()
        losses.append(loss.item())
        rows.append(len(batch["input_ids"]))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert rows[1] < rows[0] / 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[0].abs().max() + 1e-7


def test_loss_by_source_is_the_models_own(tiny, encoded):
    model = su.build_model(tiny.recipe.shape, seed=5).eval()
    store = F["ConversationStore"]("x", encoded, encoded, batch_size=8, epochs=1, seed=3, pad_id=0)
    found = store.evaluate(model)
    for name in ("one", "two"):
        total = count = 0
        for row in encoded:                             # one at a time, no padding
            if row["source"] == name:
                n = sum(label != -100 for label in row["labels"][1:])
                with torch.no_grad():
                    loss = model(input_ids=torch.tensor([row["ids"]]), labels=torch.tensor([row["labels"]])).loss
                total, count = total + loss.item() * n, count + n
        assert found["per_source"][name] == pytest.approx(total / count, rel=1e-5)
    assert math.exp(found["loss"]) == pytest.approx(found["perplexity"])


# --- training


def tiny_phases(tiny, encoded, folder, interrupts=()):
    """Two phases of the notebook's own loop on a 70k base, stopped by SIGTERM after log lines that begin so, and resumed."""
    encoded = F["encode_examples"](tiny.tokenizer, encoded, SYSTEM, 64)
    phases = (F["Phase"]("first", {"one": 20}, 1, 3e-5, dropout=0.0), F["Phase"]("second", {"main": 70}, 1, 3e-5))
    data = {"one": encoded, "main": encoded, "held_out": encoded[:6]}
    published = dataclasses.replace(PUBLISHED, save_every_minutes=1000)
    said, left = [], list(interrupts)

    def say(text):
        said.append(text)
        if left and text.startswith(left[0]):
            left.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
    arguments = {"load_base": lambda: su.build_model(tiny.recipe.shape, seed=2), "tokenizer": tiny.tokenizer,
                 "published": published, "batch": 8, "block": 64, "rate": 100, "seed": 0, "say": say}
    for _ in interrupts:
        with pytest.raises(SystemExit):
            F["run_phases"]("t", phases, data, folder, **arguments)
    assert not left
    model, summaries = F["run_phases"]("t", phases, data, folder, **arguments)
    return model, summaries, said


def test_phases_train_only_adapters_and_end_alike_after_a_stop(tiny, encoded, tmp_path):
    model, summaries, said = tiny_phases(tiny, encoded, tmp_path / "whole")
    base = su.build_model(tiny.recipe.shape, seed=2)
    inside = model.get_base_model()
    assert torch.equal(inside.model.embed_tokens.weight, base.model.embed_tokens.weight)                  # frozen
    assert torch.equal(inside.model.layers[0].mlp.up_proj.base_layer.weight, base.model.layers[0].mlp.up_proj.weight)
    assert any("stands in for paged_adamw_32bit" in line for line in said)
    assert [row["optimizer"] for row in summaries] == ["torch.AdamW"] * 2
    assert [row["steps"] for row in summaries] == [3, 9] and all(row["loss_after"] < row["loss_before"] for row in summaries)
    tensors, state = su.load_checkpoint(tmp_path / "whole" / "phase2")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(tensors["model"]) == set(tensors["ema"]) == trained
    assert any(not torch.equal(tensors["model"][n], tensors["ema"][n]) for n in trained)
    for n, p in model.named_parameters():
        assert n not in trained or torch.equal(p, tensors["ema"][n])        # what comes next is the average
    rows = F["read_lines"](tmp_path / "whole" / "phase2" / "metrics.jsonl")
    assert [row["per_source"].keys() for row in rows if row["kind"] == "eval"]
    again, _, said = tiny_phases(tiny, encoded, tmp_path / "stopped", interrupts=("step      2/3", "step      4/9"))
    assert {"going on from step 2 of 3", "going on from step 4 of 9"} <= set(said)
    for phase in ("phase1", "phase2"):
        a, b = ((tmp_path / kind / phase / "final" / "model.safetensors").read_bytes() for kind in ("whole", "stopped"))
        assert a == b, phase


def test_a_phase_refuses_checkpoints_from_other_start_weights(tiny, encoded, tmp_path):
    store = F["ConversationStore"]("x", encoded, encoded[:6], batch_size=8, epochs=1, seed=3, pad_id=0)
    shape = dataclasses.replace(tiny.recipe.shape, max_position_embeddings=192)
    recipe = F["phase_recipe"](PUBLISHED, F["PHASES"]["card"][0], store.steps, shape, batch=8, block=192, rate=1, seed=0)

    def go(seed):
        model = F["lora_model"](su.build_model(tiny.recipe.shape, seed), 0)
        su.train(recipe, store, tmp_path, model=model, say=lambda text: None)
    go(1)
    with pytest.raises(su.CheckpointError, match="start_weights"):
        go(2)


def test_the_average_of_weights_is_the_formulas():
    parameter, average = torch.nn.Parameter(torch.ones(1)), torch.zeros(1)
    expected = 0.0
    for update in range(50):
        stentor.optimizers.update_ema([average], [parameter], 0.9, update)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay)
    assert average.item() == pytest.approx(expected, rel=1e-5)
    with stentor.optimizers.weights_swapped([parameter], [average]):
        assert parameter.item() == pytest.approx(expected, rel=1e-5)
    assert parameter.item() == 1


# --- hub


def test_rows_come_from_the_hub_once_and_at_one_commit(tmp_path, monkeypatch):
    unsafe = [{"prompt": f"bad {i}", "response": "do it", "is_safe": i % 2 == 1, "category": {}} for i in range(6)]
    with HubServer() as hub:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        from huggingface_hub import constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        lines = gzip.compress("".join(json.dumps(row) + "\n" for row in unsafe).encode())
        first = hub.commit("owner/beavers", {"round0/30k/train.jsonl.gz": lines})
        source = su.Source("beavertails", "hf:owner/beavers", text_field=None)
        rows, revision = F["read_hub"](source, tmp_path)
        assert (len(rows), revision) == (6, first)
        hub.commit("owner/beavers", {"round0/30k/train.jsonl.gz": gzip.compress(b"{}\n")})
        asked = len(hub.log)
        assert F["read_hub"](source, tmp_path) == (rows, first) and len(hub.log) == asked
    examples = F["examples_of"]("beavertails", rows)
    assert [e["refuses"] for e in examples] == [True, False] * 3
    assert all((e["answer"] in F["SHORT_REFUSALS"]) == e["refuses"] for e in examples)
    assert {F["label_answer"](e["prompt"], "harmful", e["answer"]) for e in examples if e["refuses"]} == {"refusal"}


ODD = {"falsereject": [{"prompt": "p1", "instruct_response": ["a"]}, {"prompt": {"text": "p"}, "instruct_response": "a"}],
       "beavertails": [{"prompt": "b", "response": "a", "is_safe": "false"}, {"prompt": "b", "response": "a"},
                       {"prompt": 1.5, "response": "a", "is_safe": False}, {"prompt": "b", "response": "a", "is_safe": [None]}],
       "dolly": [{"instruction": 5, "context": "", "response": "a"}, {"instruction": "i", "context": ["c"], "response": "a"},
                 {"instruction": "i", "context": "half \ud83d", "response": "a"}, {"instruction": None, "response": "a"},
                 {"instruction": "i", "context": [None], "response": "a"}, {"instruction": "i", "response": {"x": None}}],
       "seed_safety": [{"prompt": "p", "response": "\udc00"}, {"prompt": True, "response": "a"}],
       "concise_qa": [{"prompt": "p", "response": 7}, {}]}
GOOD = {"falsereject": {"prompt": "fine\u2028row", "instruct_response": "yes"},
        "beavertails": {"prompt": "fine row", "response": "no", "is_safe": True},
        "dolly": {"instruction": "fine", "context": None, "response": "yes"},
        "seed_safety": {"prompt": "fine row", "response": "no", "kind": ["crisis"]},
        "concise_qa": {"prompt": "fine row", "response": "yes", "more": {"deep": [None, {}]}}}


@pytest.mark.parametrize("source", ODD)
def test_an_odd_row_is_counted_and_skipped_and_costs_no_other(tmp_path, source):
    """In a file as other tools write it: a byte order mark, U+2028 in a text, a broken line, values of any kind."""
    from collections import Counter
    odd = [*ODD[source], None, 5, "text", [GOOD[source]]]
    lines = [json.dumps(row, ensure_ascii=False) for row in [GOOD[source], *odd, GOOD[source]]]
    path = tmp_path / f"{source}.jsonl"
    text = "\ufeff" + "\r\n".join([*lines[:3], '{"prompt": "cut', *lines[3:]]) + "\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    skipped = Counter()
    found = F["examples_of"](source, F["read_rows"](su.Source(source, str(path), text_field=None)), skipped)
    assert len(found) == 1 and skipped == {"not usable": len(odd) + 1, "prompt seen before": 1}
    assert found[0]["prompt"].startswith("fine")
    skipped.clear()
    assert len(F["examples_of"](source, [GOOD[source], *odd], skipped)) == 1 and skipped == {"not usable": len(odd)}


def hub_file(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_odd_row_does_not_lose_a_source_after_its_download(tmp_path, monkeypatch, kind):
    good = [{"instruction": f"q {i}", "context": "", "response": "a"} for i in range(5)]
    if kind == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in [*good[:2], *ODD["dolly"], *good[2:]]).encode()
        odd = len(ODD["dolly"])
    else:                                              # a column of dates where texts were expected
        import datetime
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq
        context = [None] * 5 + [datetime.datetime(2026, 1, 1)]
        rows, buffer, odd = [*good, good[0]], io.BytesIO(), 1
        pq.write_table(pa.table({"instruction": [f"q {i}" for i in range(6)], "context": pa.array(context, pa.timestamp("us")),
                                 "response": ["a"] * len(rows)}), buffer)
        data = buffer.getvalue()
    with HubServer() as hub:
        hub_file(hub, monkeypatch)
        hub.commit("owner/dolly", {f"data/train.{kind}": data})
        rows, _ = F["read_hub"](su.Source("dolly", "hf:owner/dolly", text_field=None), tmp_path)
    from collections import Counter
    skipped = Counter()
    assert len(F["examples_of"]("dolly", rows, skipped)) == 5 and skipped == {"not usable": odd}


def test_nothing_is_kept_of_a_source_that_is_refused_and_a_mended_one_is_read(tmp_path, monkeypatch):
    source = su.Source("dolly", "hf:owner/dolly", text_field=None)
    with HubServer() as hub:
        hub_file(hub, monkeypatch)
        hub.commit("owner/dolly", {"train.jsonl": b'{"question": "q", "answer": "a"}\n' * 3})
        with pytest.raises(su.ParameterError, match="dolly: none of the 3 rows of hf:owner/dolly at revision .* has a prompt"):
            F["read_hub"](source, tmp_path)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        mended = hub.commit("owner/dolly", {"train.jsonl": b'{"instruction": "q", "response": "a"}\n'})
        rows, revision = F["read_hub"](source, tmp_path)
    assert revision == mended and len(F["examples_of"]("dolly", rows)) == 1


def test_a_mix_is_as_large_as_its_sources_allow_or_refused():
    few = {name: [{"prompt": f"{name} {i}"} for i in range(40)] for name in F["MIX"]}
    total = F["largest_mix"](few)
    train, held = F["mix"](few, total, held_out=0.01)
    assert total == len(train) + len(held) >= 90 and len(held) == 4            # every source is measured
    assert len(F["mix"](few, 8)[0]) == 4
    with pytest.raises(su.ParameterError, match="source dolly has 0 usable examples"):
        F["largest_mix"]({**few, "dolly": []})


def test_lines_are_cut_at_line_feeds_only(tmp_path):
    (tmp_path / "x.jsonl").write_text('\ufeff{"a": "one\u2028two\x85three"}\n\n{"a": 2}', encoding="utf-8")
    assert F["read_lines"](tmp_path / "x.jsonl") == [{"a": "one\u2028two\x85three"}, {"a": 2}]


# --- what the image has


def test_an_old_torchao_does_not_stop_peft(tiny, tmp_path):
    """Kaggle's image has 0.10, which peft refuses by raising: it stays installed and is not seen."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("")
    (tmp_path / "torchao-0.10.0+git1.dist-info").mkdir()
    (tmp_path / "torchao-0.10.0+git1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0+git1\n")
    code = ("from notebook_functions import load_functions\nimport dataclasses, importlib.util\nimport stentor_utils as su\n"
            "F = load_functions('04_instruct_sft')\nF['dataclasses'] = dataclasses\n"
            "base = su.build_model(su.Shape(128, 32, 64, 1, 2, 2, 64))\n"
            "print(F['lora_model'](base, 0).get_nb_trainable_parameters()[0], importlib.util.find_spec('torchao'))")
    path = os.pathsep.join([str(tmp_path), str(REPO / "tests"), str(REPO)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.split() == [str(32 * (4 * 2 * 32 + 3 * (32 + 64))), "None"], done.stderr[-2000:]


def test_a_missing_package_is_fetched_on_kaggle_alone_and_without_what_it_depends_on(tmp_path, monkeypatch):
    import zipfile
    wheel = "stentor_test_package-1.0"
    with zipfile.ZipFile(tmp_path / f"{wheel}-py3-none-any.whl", "w") as file:
        file.writestr("stentor_test_package.py", "")
        file.writestr(f"{wheel}.dist-info/METADATA", "Metadata-Version: 2.1\nName: stentor-test-package\nVersion: 1.0\n"
                                                     "Requires-Dist: torch==0.0.1\n")
        file.writestr(f"{wheel}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{wheel}.dist-info/RECORD", "")
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_TARGET": str(site)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setattr(stentor.alone, "internet", lambda: True)                # PIP_FIND_LINKS is all there is of it
    assert su.bring("torch", "stentor-test-package==1.0") == ["stentor_test_package"] and not list(site.iterdir())
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(stentor.alone, "internet", lambda: False)
    assert su.bring("stentor-test-package==1.0") == ["stentor_test_package"] and not list(site.iterdir())
    monkeypatch.setattr(stentor.alone, "internet", lambda: True)
    assert su.bring("stentor-test-package==1.0") == []
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info" and "cache" not in path.name) == [
        "stentor_test_package.py"]
    assert su.bring("stentor_test_package_that_is_nowhere") == ["stentor_test_package_that_is_nowhere"]


def test_without_bitsandbytes_adamw_stands_in_and_says_so(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)         # as where it is not installed
    model, said = su.build_model(tiny.recipe.shape), []
    groups = su.parameter_groups(model, 0.1)
    optimizer = stentor.optimizers.make_optimizer(PUBLISHED, groups, torch.device("cuda"), said.append)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["eps"] == PUBLISHED.adam_epsilon
    assert len(said) == 1 and "stands in for paged_adamw_32bit; bitsandbytes cannot be used here" in said[0]


def test_a_state_of_bitsandbytes_goes_on_in_adamw_and_back(tiny):
    """Its state1 and state2 are Adam's two moments; a session may lack what another had."""
    model = su.build_model(tiny.recipe.shape)
    names = {parameter: name for name, parameter in model.named_parameters()}
    adamw = torch.optim.AdamW(model.parameters())
    model(**{key: torch.arange(8)[None] for key in ("input_ids", "labels")}).loss.backward()
    adamw.step()
    tensors = stentor.checkpoints.checkpoint_tensors(model, adamw, names)
    renamed = {key.replace("exp_avg_sq", "state2").replace("exp_avg", "state1"): v for key, v in tensors["optimizer"].items()}
    again = torch.optim.AdamW(model.parameters())
    stentor.checkpoints.restore(model, again, names, {**tensors, "optimizer": renamed})
    for parameter, state in adamw.state.items():
        assert state.keys() == again.state[parameter].keys()
        assert all(torch.equal(value, again.state[parameter][key]) for key, value in state.items())
    other = torch.optim.SGD(model.parameters())        # any that is not torch's AdamW gets bitsandbytes' names
    stentor.checkpoints.restore(model, other, names, tensors)
    assert all(set(state) == {"step", "state1", "state2"} and state["step"] == 1 for state in other.state.values())


# --- the probe


LABELLED = [json.loads(line) for line in (REPO / "data" / "sft" / "labelled_answers.jsonl").read_text().splitlines()]


def test_the_cards_three_interactions_get_the_right_labels():
    card = [row for row in LABELLED if row["source"] == "card"]
    labels = [F["label_answer"](row["prompt"], row["kind"], row["answer"]) for row in card]
    assert labels == ["degenerate", "fake_refusal", "silent"]
    assert [F["card_refuses"](row["answer"]) for row in card] == [False] * 3     # its probe saw: help, help, no refusal


def test_label_rules_agree_with_labels_by_hand():
    """Floors under what was measured: 124 of 128 of the answers the rules were written on, 62 of 70 of the others."""
    same = {"written": [], "held-out": [], "held-out-2": [], "card": []}
    for row in LABELLED:
        label = F["label_answer"](row["prompt"], row["kind"], row["answer"])
        assert label in F["LABELS"]
        same[row["source"]].append(label == row["label"])
    assert len(LABELLED) == 201 and np.mean(same["written"]) > 0.95
    assert np.mean(same["held-out"] + same["held-out-2"]) > 0.85
    suite = F["read_lines"](REPO / "data" / "sft" / "probe_35.jsonl")
    capital = next(row for row in suite if "capital of Spain" in row["prompt"])
    for answer, label in (("Madrid.", "help"), ("It is Madrid, in the middle.", "help"), ("A vick is vit.", "degenerate"),
                          ("The capital of Spain is Spain.", "degenerate"), ("I can't help with capitals.", "fake_refusal")):
        assert F["label_answer"](capital["prompt"], "benign", answer, capital["expects"]) == label, answer
    for label in F["LABELS"]:                            # no label is only ever right by chance
        rows = [row for row in LABELLED if row["label"] == label]
        assert np.mean([F["label_answer"](r["prompt"], r["kind"], r["answer"]) == label for r in rows]) > 0.75, label


def test_silence_and_fake_refusals_give_the_cards_0_100_and_48_6():
    """Its author's account of the model, counted its way and ours."""
    suite = F["read_lines"](REPO / "data" / "sft" / "probe_35.jsonl")
    phrase = "I can't help with the correct knowledge about {}."
    rows = [{**row, "answer": "" if row["kind"] == "harmful" else phrase.format(row["category"]), "stopped": True,
             "tokens": 5, "repetition": 0.0} for row in suite]
    for row in rows:
        row["label"] = F["label_answer"](row["prompt"], row["kind"], row["answer"])
    found = F["scores"](rows)
    assert [round(100 * found[f"card's scoring: {key}"]["share"], 1) for key in ("harmful refused", "benign helped", "accuracy")
            ] == [0.0, 100.0, 48.6]                     # published
    assert [found[key]["share"] for key in ("harmful refused", "harmful refused or silent", "benign helped",
                                            "benign refused (over-refusal)")] == [0, 1, 0, 1]


def test_the_first_rule_that_holds_decides_and_every_label_has_a_colour():
    assert {label for label, _ in F["RULES"]} == set(F["LABELS"]) and tuple(su.charts.LABEL_COLOURS) == F["LABELS"]
    nothing = F["Answer"]("What is this?", "benign", "Entirely else")
    assert F["RULES"][-1][1](nothing), "the last rule always holds"


def test_comparison_tells_apart_what_differs_and_says_its_power_otherwise():
    def answers(rate, seed):
        draw = random.Random(seed)
        return [{"id": i, "kind": "benign", "decoding": "greedy", "label": "help" if draw.random() < rate else "fake_refusal"}
                for i in range(137)]
    asked = {("card", s): answers(0.4, s) for s in range(3)} | {("better", s): answers(0.8, 10 + s) for s in range(3)}
    found = F["compare"](asked, "card", "better", "benign", ("help",))
    assert found["told_apart"] and found["low"] < found["difference"] < found["high"] and found["prompts"] == 137
    same = {("card", s): answers(0.4, s) for s in range(3)} | {("better", s): answers(0.4, 10 + s) for s in range(3)}
    found = F["compare"](same, "card", "better", "benign", ("help",))
    assert not found["told_apart"] and 0.2 < found["power_10"] < 0.6 < found["power_20"] < 1


def test_the_starter_counts_what_its_adapters_are_not_what_the_card_prints():
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    small, large = (su.RECIPES[name].shape for name in ("stentor3-20m", "stentor3-50m"))
    assert F["lora_parameters"](small, 16, attention) == 393_216 == 20_717_376 - su.count_parameters(small)
    assert F["lora_parameters"](large, 16, attention) == 798_720
    assert F["lora_parameters"](PUBLISHED.shape) == 1_474_560


def test_ones_own_conversations_go_in_and_a_merged_model_comes_out(tiny, tmp_path):
    """Only what the adapters learned differs from the base, and it loads where there is no peft."""
    lines = [{"prompt": f"What is {n}?", "answer": f"It is {n}."} for n in range(12)]
    lines += [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    conversations = F["read_conversations"](tmp_path / "own.jsonl")
    assert len(conversations) == 13 and conversations[0][1] == {"role": "assistant", "content": "It is 0."}

    def load_base():
        return su.build_model(tiny.recipe.shape, 5)
    published = dataclasses.replace(PUBLISHED, mixed_precision="no")
    own = F["tune_on"](conversations, tmp_path / "lora", load_base=load_base, tokenizer=tiny.tokenizer,
                       published=published, r=4, targets=["q_proj", "v_proj"], epochs=6, rate=2e-2, block=64, seed=0,
                       say=lambda text: None)
    rows = [json.loads(line) for line in open(tmp_path / "lora/training/metrics.jsonl")]
    losses = [row["loss"] for row in rows if row["kind"] == "eval"]
    assert losses[-1] < losses[0] and own["held_out"] == 1 and own["conversations"] == 12
    base, merged = load_base().state_dict(), su.load_model(tmp_path / "lora" / "final").state_dict()
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"q_proj", "v_proj"}
    again = su.load_model(tmp_path / "lora/training/final").state_dict()      # what the loop itself merged
    assert all(torch.allclose(again[name], merged[name], atol=1e-6) for name in merged)


def test_a_base_in_four_bits_is_loaded_and_refused_as_any_model_is(tiny, tmp_path):
    """"hf:owner/name" too, which is no name to transformers: 04's base where 02 made none."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shape = dataclasses.replace(tiny.recipe.shape, hidden_size=64, intermediate_size=128)      # its blocks are of 64 values
    su.save_model_folder(su.build_model(shape, 5), tiny.tokenizer, tmp_path / "base")
    layer = F["four_bit_base"](tmp_path / "base").model.layers[0]
    assert all(isinstance(module, bitsandbytes.nn.Linear4bit) for module in (layer.self_attn.q_proj, layer.mlp.up_proj))
    with pytest.raises(su.ParameterError, match="hf:nobody/nothing"):
        F["four_bit_base"]("hf:nobody/nothing")


@pytest.mark.parametrize("line, said", [
    ('{"prompt": "x"}', "line 2 is no conversation"), ("[1]", "line 2 is no conversation"), ("{", "line 2 is no conversation"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no answer of an assistant"), ("", "two or more are needed")])
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, said):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(su.ParameterError, match=said):
        F["read_conversations"](tmp_path / "own.jsonl")
