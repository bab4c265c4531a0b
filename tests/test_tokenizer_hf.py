"""TokenMonsterTokenizer does what a transformers user expects, here and in a process that has only the saved folder."""
import copy
import functools
import json
import os
import pickle
import random
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import SHARED
from test_tokenmonster import OWN, PROSE, own_vocabulary
from tokenmonster_hf import ACCENTS, COLLAPSE, LEADINGSPACE, LOWERCASE, NFD, QUOTEMARKS, TRIM, UNIXLINES
from tokenmonster_hf import TokenMonsterTokenizer, Vocabulary
from transformers import AddedToken, AutoTokenizer, DataCollatorForLanguageModeling, TextIteratorStreamer

VOCABS = SHARED / "tokenmonster/vocabs"
TEXT = "Hello World, this is\nTHE END of\n\nOur story: naïve café, 日本語 😀 don't.\n\tA b\n"
CHAT = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello, friend."},
        {"role": "user", "content": "Bye"}]


def nfd(text):
    return unicodedata.normalize("NFD", text)


@pytest.fixture(scope="module", params=[0, 1, 2])
def tokenizer(request):
    return TokenMonsterTokenizer.from_vocabulary(OWN[request.param]["python"], model_max_length=512)


def test_the_ids_of_a_published_model():
    if not VOCABS.exists():
        pytest.skip("../shared is not here")
    stentor2 = TokenMonsterTokenizer.from_vocabulary(VOCABS / "english-8000-strict-nocapcode-v1.vocab")
    assert len(stentor2) == stentor2.vocab_size == 8064  # 8,000 + 2 + 62: the card's padded vocabulary
    assert (stentor2.eos_token_id, stentor2.pad_token_id, stentor2.bos_token_id) == (8000, 8000, 8001)
    assert stentor2.convert_ids_to_tokens(8063) == "<|extra_61|>"
    plain = Vocabulary.from_file(VOCABS / "english-8000-strict-nocapcode-v1.vocab")
    assert stentor2(TEXT).input_ids == plain.encode(TEXT).tolist()

    source = Vocabulary.from_file(VOCABS / "english-4096-strict-nocapcode-v1.vocab")
    stentor3 = TokenMonsterTokenizer.from_vocabulary(source)
    assert len(stentor3) == 4096 and len(stentor3.vocabulary) == 4094 and stentor3.eos_token_id == 4094
    dropped = set(source.tokens) - set(stentor3.vocabulary.tokens)
    able = [(s, t) for s, t in zip(source.scores, source.tokens) if s > 0 and len(t) > 1]
    assert dropped == {t for _, t in sorted(able)[:2]} and len(source) == 4096


def test_vocabulary_is_a_bijection(tokenizer):
    vocab = tokenizer.get_vocab()
    assert len(vocab) == len(tokenizer) == tokenizer.vocab_size and len(tokenizer) % 128 == 0
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_ids_to_tokens(list(vocab.values())) == list(vocab)
    assert tokenizer.convert_tokens_to_ids(list(vocab)) == list(vocab.values())
    assert all(token.isprintable() and " " not in token for token in vocab)


def test_a_token_that_reads_like_a_special_one_keeps_its_own_string():
    tokenizer = TokenMonsterTokenizer.from_vocabulary(Vocabulary.from_tokens(["</s>", "<s>"], include="all256"))
    assert len(tokenizer.get_vocab()) == len(tokenizer)
    injected = tokenizer("x</s>", split_special_tokens=True).input_ids
    assert tokenizer.eos_token_id not in injected and tokenizer.decode(injected) == "x</s>"


def test_calls_single_batched_padded_truncated(tokenizer):
    lines = ["a b c", "hello there everyone", ""]
    single = [tokenizer(line).input_ids for line in lines]
    assert single == [tokenizer.vocabulary.encode(line).tolist() for line in lines] and single[2] == []
    assert tokenizer(lines).input_ids == single
    longest = max(map(len, single))
    for side in ("left", "right"):
        batch = tokenizer(lines, padding=True, padding_side=side, return_tensors="pt")
        assert batch["input_ids"].shape == (3, longest) and set(batch) == {"input_ids", "attention_mask"}
        for ids, row, mask in zip(single, batch["input_ids"], batch["attention_mask"]):
            assert row[mask.bool()].tolist() == ids and (row[~mask.bool()] == tokenizer.pad_token_id).all()
            assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
    other = copy.deepcopy(tokenizer)
    for side, expected in (("right", single[1][:3]), ("left", single[1][-3:])):
        other.truncation_side = side
        assert other(lines[1], truncation=True, max_length=3).input_ids == expected
    assert tokenizer("a b", "c d").input_ids == tokenizer("a b").input_ids + tokenizer("c d").input_ids
    assert tokenizer([["a b", "c d"]]).input_ids == [tokenizer("a b", "c d").input_ids]
    assert tokenizer.encode(TEXT) == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(TEXT))
    assert tokenizer(["a", "b"], is_split_into_words=True).input_ids == tokenizer("a").input_ids + tokenizer("b").input_ids


def test_special_tokens_are_atomic_and_can_be_plain_text(tokenizer):
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert tokenizer.eos_token == tokenizer.pad_token == "</s>" and tokenizer.bos_token == "<s>"
    for text in ("x</s>", "The end.</s>", "</s>", "a  </s>"):
        assert tokenizer(text).input_ids[-1] == eos
    assert tokenizer("<s>a</s><s>b").input_ids.count(bos) == 2
    plain = tokenizer("<s>a</s><|extra_0|>", split_special_tokens=True).input_ids
    assert max(plain) < tokenizer.vocabulary.n_ids and tokenizer.decode(plain) == "<s>a</s><|extra_0|>"
    ids = tokenizer(f"{TEXT}</s>{TEXT}<|extra_0|>").input_ids
    assert tokenizer.decode(ids) == nfd(f"{TEXT}</s>{TEXT}<|extra_0|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == nfd(TEXT + TEXT)


def test_nothing_is_added_unless_asked(tokenizer):
    assert tokenizer("a b").input_ids == tokenizer("a b", add_special_tokens=False).input_ids
    framed = TokenMonsterTokenizer.from_vocabulary(tokenizer.vocabulary, special_tokens_pattern="bos_eos")
    assert framed("a b").input_ids == [framed.bos_token_id, *tokenizer("a b").input_ids, framed.eos_token_id]
    assert framed("a b", return_special_tokens_mask=True)["special_tokens_mask"][0] == 1


def test_decoding_is_lossless(tokenizer):
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == nfd(TEXT) == tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids))
    assert tokenizer.batch_decode([ids, [], [tokenizer.eos_token_id]]) == [nfd(TEXT), "", "</s>"]
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(TEXT)) == nfd(TEXT)
    for spaced in ("a , b . c 's n't", "  two  spaces  ", " lead", "trail "):
        assert tokenizer.decode(tokenizer(spaced).input_ids) == spaced  # no clean-up of spaces
    assert tokenizer.decode(tokenizer(TEXT).input_ids[0]) == tokenizer.decode([ids[0]])


def test_token_byte_lengths_and_corpus_batches(tokenizer):
    ids = tokenizer(f"{TEXT}</s>").input_ids
    assert tokenizer.token_byte_lengths(ids).sum() == len(nfd(TEXT).encode()) and tokenizer.token_byte_lengths(ids)[-1] == 0
    ids, offsets = tokenizer.encode_batch([TEXT, "x</s>"])
    assert ids.dtype == np.uint16 and tokenizer.decode(ids[offsets[1]:]) == "x</s>" and ids.max() < tokenizer.eos_token_id


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nHi there\n<|assistant|>\n"  # the card's form
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|user|>\nHi there\n<|assistant|>\nHello, friend.</s>\n<|user|>\nBye\n"
    ids = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert ids == tokenizer(text).input_ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_mask_covers_what_the_assistant_said(tokenizer, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = side
    single = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, m in zip(single["input_ids"], single["assistant_masks"]) if m]
    assert said[-1] == tokenizer.eos_token_id and tokenizer.decode(said).strip("\n") == "Hello, friend.</s>"
    batch = tokenizer.apply_chat_template([CHAT, CHAT[:2]], return_dict=True, return_assistant_tokens_mask=True, padding=True,
                                          return_tensors="pt", add_generation_prompt=True)
    assert batch["assistant_masks"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    for row, mask in zip(batch["input_ids"], batch["assistant_masks"]):
        assert row[mask.bool()].tolist() == said
    cut = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True, truncation=True,
                                        max_length=len(single["input_ids"]) - 4)
    part = slice(4, None) if side == "left" else slice(None, -4)
    assert cut["assistant_masks"] == single["assistant_masks"][part] and cut["input_ids"] == single["input_ids"][part]


# Two who never use the same letters, so that whose a token is can be read off it.
WHO = {"user": "abcdefghijklm", "assistant": "nopqrstuvwxyz"}
MARKERS = ("", "\x7f", "CDW")  # by capcode level
BARE = ("{% for m in messages %}{% if m['role'] == 'assistant' %}|{% generation %}{{ m['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% else %}<{{ m['content'] }}>{% endif %}{{ '\\n' }}{% endfor %}")


def letters_only(capcode, normalization, unk, include):
    """A small vocabulary: letters and pieces of words; accents, emoji and capitals have no token unless included."""
    draw, letters = random.Random(capcode), "".join(WHO.values())
    tokens = [*letters, " ", "\n", "<", ">", "|", ">\n", "\n<", *MARKERS[capcode], *(m + " " for m in MARKERS[capcode])]
    tokens += [draw.choice(["", " ", "\n"]) + "".join(draw.choices(letters, k=draw.randint(1, 4))) for _ in range(200)]
    return Vocabulary.from_tokens(tokens, capcode=capcode, normalization=normalization, unk=unk, include=include)


def turn(draw, role, capitals):
    words = ["".join(draw.choices(WHO[role], k=draw.randint(1, 5))) + draw.choice(["", "", *"é😀\u0301ẞ“"])
             for _ in range(draw.randint(0, 5))]
    words = [draw.choice([str.lower, str.lower, str.upper, str.title])(word) for word in words]
    first = draw.choice(WHO[role] + (WHO[role].upper() if capitals else ""))
    return {"role": role, "content": first + draw.choice([" ", "  ", "\r\n", "\n", ""]).join(words)}


def whose(tokenizer, ids):
    """The mask read off the tokens: an answer goes from its first letter, markers in front of it included, to its EOS."""
    markers = MARKERS[tokenizer.vocabulary.capcode] + " "
    names = [name.decode("utf-8", "ignore").strip(markers).lower() for name in tokenizer.vocabulary.tokens]
    mask, start = [], 0
    for end in [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]:
        first = next(i for i in range(start, end) if set(names[ids[i]]) & set(WHO["assistant"]))
        while first > start and not names[ids[first - 1]]:
            first -= 1
        mask += [0] * (first - start) + [1] * (end + 1 - first)
        start = end + 1
    return mask + [0] * (len(ids) - start)


@pytest.mark.parametrize("unk", [False, True])
@pytest.mark.parametrize("normalization", [0, NFD, NFD | COLLAPSE | UNIXLINES, NFD | TRIM, ACCENTS | LOWERCASE,
                                           LEADINGSPACE | QUOTEMARKS])
@pytest.mark.parametrize("capcode", [0, 1, 2])
def test_the_mask_is_exact_where_bytes_vanish_or_have_no_token(capcode, normalization, unk):
    draw = random.Random(normalization)
    for include in ("", "ascii", "all256"):
        if unk and include == "all256":
            continue  # nothing is unknown
        tokenizer = TokenMonsterTokenizer(vocabulary=letters_only(capcode, normalization, unk, include), pad_to_multiple=8)
        for _ in range(8):
            chat = [turn(draw, draw.choice(list(WHO)), capcode == 2) for _ in range(draw.randint(1, 5))]
            out = tokenizer.apply_chat_template(chat, chat_template=BARE, return_assistant_tokens_mask=True)
            assert out["assistant_masks"] == whose(tokenizer, out["input_ids"]), (include, chat)


def test_the_mask_goes_by_the_tokens_that_were_made(tokenizer):
    mask = functools.partial(tokenizer.apply_chat_template, CHAT, return_dict=True, return_assistant_tokens_mask=True)
    split = mask(tokenizer_kwargs={"split_special_tokens": True})  # EOS as the four letters that it reads like
    said = [i for i, m in zip(split["input_ids"], split["assistant_masks"]) if m]
    assert tokenizer.decode(said).strip("\n") == "Hello, friend.</s>" and tokenizer.eos_token_id not in said
    stripping = copy.deepcopy(tokenizer)
    stripping.add_tokens(AddedToken("<|user|>", rstrip=True, lstrip=True, special=True))
    out = stripping.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, m in zip(out["input_ids"], out["assistant_masks"]) if m]
    assert stripping.decode(said).strip("\n") == "Hello, friend.</s>" and said[-1] == tokenizer.eos_token_id
    assert len(out["input_ids"]) == len(out["assistant_masks"]) and out["input_ids"].count(len(tokenizer)) == 2
    with pytest.raises(ValueError, match="continue_final_message"):
        mask(continue_final_message=True)


def test_a_capital_behind_the_prompt_s_space_brings_its_marker():
    tokens = ["a", "b", ":", " ", "W", "D", "</", "s", ">"]
    tokenizer = TokenMonsterTokenizer(vocabulary=Vocabulary.from_tokens(tokens, capcode=2))
    template = "{% for m in messages %}a: {% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    out = tokenizer.apply_chat_template([{"role": "assistant", "content": "B"}], chat_template=template,
                                        return_assistant_tokens_mask=True)
    names = [tokenizer.vocabulary.tokens[i] for i in out["input_ids"]]
    assert names[-4:] == [b":", b"W", b" ", b"b"] and out["assistant_masks"][-4:] == [0, 1, 0, 1]


@pytest.mark.parametrize("chat, text", [
    ([{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "a"}], "<|assistant|>\nHi</s>\n<|user|>\na\n"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}],
     "<|user|>\na\n<|assistant|>\nb</s>\n<|assistant|>\nc</s>\n"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, " b"]},
      {"role": "assistant", "content": [{"type": "text", "text": "c"}]}], "<|user|>\na b\n<|assistant|>\nc</s>\n"),
    ([{"role": "user", "content": []}, {"role": "assistant", "content": None}], "<|user|>\n\n<|assistant|>\n</s>\n"),
])
def test_conversations_in_every_order_and_form(tokenizer, chat, text):
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert out["input_ids"] == tokenizer(text).input_ids
    answers = sum(message["role"] == "assistant" for message in chat)
    assert sum(i == tokenizer.eos_token_id and m for i, m in zip(out["input_ids"], out["assistant_masks"])) == answers


@pytest.mark.parametrize("content", [[{"type": "image", "url": "a.png"}], 3, [["a"]], [None]])
def test_content_that_is_no_text_is_refused(tokenizer, content):
    with pytest.raises(Exception, match="must be text, or a list of text parts"):
        tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def test_streamed_text_arrives_in_whole_characters(tokenizer):
    ids = [*tokenizer(TEXT).input_ids, tokenizer.eos_token_id]
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    for i in ids:
        streamer.put(torch.tensor([i]))
    streamer.end()
    parts = list(streamer)
    assert "".join(parts) == nfd(TEXT) and len([p for p in parts if p]) > 10
    assert not any("\ufffd" in part for part in parts)


def test_tokens_can_be_added_and_are_saved(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<tool>"]) == 1 and tokenizer.add_special_tokens({"sep_token": "<sep>"}) == 1
    ids = tokenizer("a <tool> b<sep>").input_ids
    assert len(tokenizer) == size + 2 and ids.count(size) == 1 and ids[-1] == size + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a <tool> b"
    tokenizer.save_pretrained(tmp_path)
    again = TokenMonsterTokenizer.from_pretrained(tmp_path)
    assert len(again) == size + 2 and again("a <tool> b<sep>").input_ids == ids


def rows_of(tokenizer):
    """Everything that must not move: strings by id, and what each role is."""
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(tokenizer))) and len(tokenizer) % 128 == 0
    assert tokenizer.convert_ids_to_tokens(list(vocab.values())) == list(vocab)
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("eos", "bos", "pad", "unk")}
    return vocab, roles, tokenizer.special_tokens_map, sorted(tokenizer.added_tokens_decoder)


NAMES = ["</s>", "<s>", "<|extra_1|>", "the", "\u0120the", "<|unused_3|>", "<unk>", "<|endoftext|>"]


@pytest.mark.parametrize("unk", [False, True])
@pytest.mark.parametrize("eos", NAMES)
@pytest.mark.parametrize("bos", ["<s>", "</s>", "<|extra_0|>", "the"])
def test_no_clash_of_names_at_construction_moves_a_row(eos, bos, unk, tmp_path):
    tokens = ["the", " the", "</s>", "<s>", "<|extra_1|>", "<|unused_3|>", "<unk>"]
    vocabulary = Vocabulary.from_tokens(tokens, include="ascii", unk=unk).delete_tokens(["b"])
    tokenizer = TokenMonsterTokenizer(vocabulary=vocabulary, eos_token=eos, bos_token=bos)
    n = vocabulary.n_ids
    rows = rows_of(tokenizer)
    assert (tokenizer.eos_token, tokenizer.bos_token) == (eos, bos) and min(tokenizer.eos_token_id, tokenizer.bos_token_id) >= n
    assert tokenizer.convert_ids_to_tokens([n + 2, n + 3]) == ["<|extra_0|>", "<|extra_1|>"]
    plain = tokenizer("the </s><s> end", split_special_tokens=True).input_ids
    assert plain == vocabulary.encode("the </s><s> end").tolist() and max(plain) < n
    for folder in (tmp_path / "one", tmp_path / "two"):
        tokenizer.save_pretrained(folder)
        tokenizer = TokenMonsterTokenizer.from_pretrained(folder)
        assert rows_of(tokenizer) == rows


@pytest.mark.parametrize("change", [
    lambda t: setattr(t, "eos_token", "<|extra_1|>"), lambda t: setattr(t, "eos_token", t.bos_token),
    lambda t: setattr(t, "bos_token_id", t.eos_token_id), lambda t: setattr(t, "pad_token", "<|extra_0|>"),
    lambda t: setattr(t, "eos_token", "t"), lambda t: setattr(t, "pad_token_id", 40),
    lambda t: t.add_special_tokens({"eos_token": "<|extra_1|>", "pad_token": "<|extra_1|>"}),
    lambda t: t.add_special_tokens({"additional_special_tokens": ["<|extra_3|>", "</s>"]}),
    lambda t: t.add_tokens(["</s>", "<|extra_0|>", "</s>", "t"]),
    lambda t: t.add_tokens(AddedToken("<|extra_2|>", rstrip=True)),
    lambda t: (setattr(t, "eos_token", "<|extra_1|>"), setattr(t, "bos_token", "</s>"), setattr(t, "pad_token", "<s>")),
], ids=range(11))
def test_no_change_of_roles_moves_a_row(change, tmp_path):
    tokenizer = TokenMonsterTokenizer.from_vocabulary(OWN[1]["python"])
    strings = tokenizer.get_vocab()
    change(tokenizer)
    rows, text = rows_of(tokenizer), f"{TEXT}t<|extra_1|></s> <|extra_2|> t"
    ids = tokenizer(text).input_ids
    shown, spoken = tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)
    assert rows[0] == strings
    for folder in (tmp_path / "one", tmp_path / "two"):
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert rows_of(tokenizer) == rows and tokenizer(text).input_ids == ids
        assert (tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)) == (shown, spoken)


def test_a_role_of_a_new_name_is_refused_and_one_added_gets_a_row(tmp_path):
    tokenizer = TokenMonsterTokenizer.from_vocabulary(OWN[0]["python"])
    size = len(tokenizer)
    with pytest.raises(ValueError, match="pad_token = '<pad>' is no token .*add_special_tokens"):
        tokenizer.pad_token = "<pad>"
    with pytest.raises(ValueError, match=f"eos_token_id = {size} is no token"):
        tokenizer.eos_token_id = size
    assert tokenizer.pad_token == "</s>" and len(tokenizer) == size
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 1 == 1 + tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == size and len(tokenizer) == size + 1
    tokenizer.save_pretrained(tmp_path)
    again = TokenMonsterTokenizer.from_pretrained(tmp_path)
    assert again.pad_token_id == size and again.get_vocab() == tokenizer.get_vocab()
    larger = TokenMonsterTokenizer.from_pretrained(tmp_path, vocab_size=size + 128, eos_token="<|extra_0|>")
    assert sorted(larger.get_vocab().values()) == list(range(size + 128)) and larger.pad_token_id == size
    assert larger.eos_token_id == tokenizer.convert_tokens_to_ids("<|extra_0|>")


def test_a_special_token_of_the_vocabulary_is_skipped_when_asked():
    tokenizer = TokenMonsterTokenizer(vocabulary=Vocabulary.from_tokens(["end"], include="ascii"))
    tokenizer.eos_token = "end"
    ids = tokenizer("the end").input_ids
    assert ids[-1] == tokenizer.eos_token_id < tokenizer.vocabulary.n_ids
    assert tokenizer.decode(ids) == "the end" and tokenizer.decode(ids, skip_special_tokens=True) == "the "


def test_transformers_collator_keeps_eos_in_the_loss_with_a_padding_token_of_its_own(tmp_path):
    tokenizer = TokenMonsterTokenizer.from_vocabulary(OWN[1]["python"])
    rows = [{"input_ids": tokenizer(text + "</s>").input_ids} for text in ("One.", "Two and more.")]
    def in_the_loss(tokenizer):
        labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
        assert (labels == -100).any()  # the shorter row is padded
        return int((labels == tokenizer.eos_token_id).sum())
    assert in_the_loss(tokenizer) == 0  # what a user meets, and the reason for the line below
    tokenizer.pad_token = "<|extra_0|>"
    assert in_the_loss(tokenizer) == 2
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert in_the_loss(again) == 2 and again.pad_token_id == tokenizer.pad_token_id != again.eos_token_id
    assert again.eos_token == "</s>" and again.get_vocab() == tokenizer.get_vocab()


def test_a_batch_is_padded_where_generate_does_not_go_on():
    tokenizer = TokenMonsterTokenizer.from_vocabulary(OWN[0]["python"])
    assert tokenizer(["a b c", "a"], padding=True)["attention_mask"][1][-1] == 1


def test_save_and_load_twice_changes_nothing(tmp_path):
    tokenizer = TokenMonsterTokenizer.from_vocabulary(OWN[2]["python"], model_max_length=512)
    tokenizer.save_pretrained(tmp_path / "one")
    names = {"tokenmonster.vocab", "tokenmonster_hf.py", "tokenizer_config.json", "special_tokens_map.json",
             "chat_template.jinja"}
    assert set(os.listdir(tmp_path / "one")) == names
    once = AutoTokenizer.from_pretrained(tmp_path / "one", trust_remote_code=True)
    once.save_pretrained(tmp_path / "two")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    twice = AutoTokenizer.from_pretrained(tmp_path / "two", trust_remote_code=True)
    for other in (once, twice):
        assert other.get_vocab() == tokenizer.get_vocab() and other.model_max_length == 512
        assert other(TEXT).input_ids == tokenizer(TEXT).input_ids and other.chat_template == tokenizer.chat_template
    options = TokenMonsterTokenizer.from_vocabulary(tokenizer.vocabulary, special_tokens_pattern="eos", padding_side="left",
                                                    vocab_size=2048)
    options.save_pretrained(tmp_path / "three")
    options = AutoTokenizer.from_pretrained(tmp_path / "three", trust_remote_code=True)
    assert (options.special_tokens_pattern, options.padding_side, len(options)) == ("eos", "left", 2048)
    assert options("a").input_ids[-1] == options.eos_token_id


SCRIPT = """
import json, pickle, sys
if sys.argv[2] == "no-numba":
    sys.modules["numba"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any("stentor" in name for name in sys.modules)
ids = tokenizer(json.loads(sys.argv[3])).input_ids
assert pickle.loads(pickle.dumps(tokenizer))(json.loads(sys.argv[3])).input_ids == ids
print(json.dumps([tokenizer.vocabulary.backend, ids, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.get_vocab()]))
"""


@pytest.mark.parametrize("numba", ["no-numba", "with"])
def test_the_folder_is_all_that_another_process_needs(numba, tmp_path):
    tokenizer = TokenMonsterTokenizer.from_vocabulary(own_vocabulary(2))
    tokenizer.eos_token, tokenizer.pad_token = "<|extra_1|>", "<|extra_0|>"
    tokenizer.save_pretrained(tmp_path / "model")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    out = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "model", numba, json.dumps(TEXT)], env=environment,
                         cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    backend, ids, eos, pad, vocab = json.loads(out.stdout.splitlines()[-1])
    assert (eos, pad, vocab) == (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.get_vocab()) and pad < eos
    assert ids == tokenizer(TEXT).input_ids and (numba == "with" or backend == "python")


def test_pickles_copies_threads(tokenizer):
    lines = [PROSE[i:i + 400] for i in range(0, 40_000, 400)]
    expected = tokenizer(lines).input_ids
    assert pickle.loads(pickle.dumps(tokenizer))(lines).input_ids == expected
    assert copy.deepcopy(tokenizer)(lines).input_ids == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda line: tokenizer(line).input_ids, lines)) == expected


def test_datasets_map_in_two_processes(tokenizer):
    datasets = pytest.importorskip("datasets")
    lines = [PROSE[i:i + 200] for i in range(0, 8000, 200)]
    mapped = datasets.Dataset.from_dict({"text": lines}).map(lambda row: tokenizer(row["text"]), num_proc=2)
    assert mapped["input_ids"][:] == tokenizer(lines).input_ids


def test_bad_construction_is_refused_in_a_sentence():
    vocabulary = own_vocabulary(0, size=200)
    with pytest.raises(ValueError, match="either vocab_file"):
        TokenMonsterTokenizer()
    with pytest.raises(ValueError, match=f"no room for {len(vocabulary)} tokens"):
        TokenMonsterTokenizer(vocabulary=vocabulary, vocab_size=len(vocabulary) + 1)
    with pytest.raises(ValueError, match="cannot be resized to 98"):
        TokenMonsterTokenizer.from_vocabulary(vocabulary, vocab_size=100)
