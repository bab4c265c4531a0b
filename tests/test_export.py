"""Every format says what the model says: written, loaded by what a user has, and asked the same."""
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import stentor_utils as su
from stentor import export
from stentor.export.gguf_file import KINDS, rope_pairs
from stentor.export.runners import Transformers

GOLDEN = ["Hello world", "  two  spaces\n\nand\ttabs ", "it's we'll I'd 'S", "naïve café Ångström ﬁ",
          "日本語のテキスト", "αβγ ДЖ 12345 3.14", "def f(x):\n    return x ** 2  # squared",
          "emoji 👩‍👩‍👧 🎉 done", "MiXeD CaSe, PUNCT!?…", "a\u00a0b\u2003c\u200bd", ""]


def needs(*packages):
    said = export.missing(*packages)
    return pytest.mark.skipif(said is not None, reason=str(said))


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Folders, random but sharp. llama: grouped heads, TokenMonster, tied; qwen3: QK-norm, BPE, untied; wide: 256 wide."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    rows = len(tiny.tokenizer)
    bpe = bpe_tokenizer(tiny)
    shapes = {"llama": (su.Shape(rows, 64, 128, 2, 4, 2, 128, rope_theta=50_000.0), tiny.tokenizer),
              "qwen3": (su.Shape(su.vocabulary_rows(bpe), 64, 96, 2, 4, 2, 128, qk_norm=True, tie_word_embeddings=False), bpe),
              "wide": (su.Shape(rows, 256, 512, 1, 4, 4, 128), tiny.tokenizer)}
    for name, (shape, tokenizer) in shapes.items():
        model = su.build_model(shape, seed=3, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
        with torch.no_grad():                         # sharp and uneven: a wrong rotation or norm then shows
            for key, weight in model.named_parameters():
                weight.mul_(4) if weight.ndim > 1 else weight.add_(0.2 * torch.randn(weight.shape))
        su.save_model_folder(model, tokenizer, folder / name)
        made[name] = folder / name
    return SimpleNamespace(**made, folder=folder)


def bpe_tokenizer(tiny):
    from stentor.vocabulary import train_bpe
    from transformers import PreTrainedTokenizerFast
    texts = [json.loads(line)["text"] for line in open(tiny.folder / "topics.jsonl")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts, 600), eos_token="</s>", bos_token="<s>",
                                        pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def onnx_dir(models):
    export.write_onnx(models.qwen3, models.folder / "onnx-qwen3")
    return models.folder / "onnx-qwen3"


def prompts_of(folder, n=50, length=6):
    generator = np.random.default_rng(1)
    return generator.integers(0, 500, (n, length)).tolist()


def assert_same(runner, folder, tolerance=2e-4):
    """50 greedy continuations equal to transformers', and the log probabilities of one text within `tolerance`."""
    reference = Transformers(su.load_model(folder))
    prompts = prompts_of(folder)
    assert [runner.greedy(ids, 16) for ids in prompts] == [reference.greedy(ids, 16) for ids in prompts]
    text = [token for ids in prompts[:4] for token in ids]
    wanted = reference.log_probabilities(text)
    assert np.abs(runner.log_probabilities(text) - wanted).max() < tolerance
    assert np.abs(runner.losses(text) - reference.losses(text)).max() < tolerance
    assert len({tuple(reference.greedy(ids, 16)) for ids in prompts}) > 25      # not one loop for all


@needs("gguf", "xllamacpp")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_llama_cpp_continues_an_fp32_gguf_token_for_token(models, name, tmp_path):
    folder = getattr(models, name)
    made = export.write_gguf(folder, tmp_path / "m.gguf", "f32")
    assert made["types"] == {"F32": sum(1 for _ in su.load_model(folder).named_parameters())} and not made["fallback"]
    runner = export.LlamaCpp(tmp_path / "m.gguf", context=128, threads=1)
    assert_same(runner, folder)
    runner.close()


def test_rope_pairs_is_what_llama_cpp_turns_together():
    """Dimension i of transformers' head, turned with i + head_dim / 2, is 2i there, turned with 2i + 1."""
    rows = np.arange(2 * 8, dtype=np.float32).reshape(16, 1)
    assert rope_pairs(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@needs("gguf", "xllamacpp")
def test_a_bpe_gguf_tokenises_in_llama_cpp_as_here(models, tiny, tmp_path):
    tokenizer = su.load_tokenizer(models.qwen3)
    assert export.why_not_gpt2(tokenizer) is None
    assert export.write_gguf(models.qwen3, tmp_path / "m.gguf", "f16")["tokenizer"] is None
    runner = export.LlamaCpp(tmp_path / "m.gguf", context=128, threads=1)
    texts = GOLDEN + [json.loads(line)["text"][:400] for line in open(tiny.folder / "topics.jsonl")][:30]
    for text in texts:
        assert runner.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text
    runner.close()


@needs("gguf", "xllamacpp")
def test_a_tokenmonster_gguf_refuses_text_and_the_lines_beside_it_feed_ids(models, tmp_path):
    written = export.write_format("gguf-f32", models.llama, tmp_path)
    assert "must be fed ids" in written.note
    runner = export.LlamaCpp(written.path, context=128, threads=1)
    for text in filter(None, GOLDEN):
        assert runner.tokenize(text) == [], text      # no token at all, never a near-match
    runner.close()
    program = export.FIVE_LINES.format(file=written.path.name, prompt="The function")
    program = program.replace('"n_predict": 50', '"n_predict": 5, "temperature": 0')
    done = subprocess.run([sys.executable, "-c", program], cwd=written.path.parent, capture_output=True, text=True)
    tokenizer = su.load_tokenizer(models.llama)
    reference = Transformers(su.load_model(models.llama))
    ids = tokenizer("The function", add_special_tokens=False)["input_ids"]
    assert done.stdout.rstrip("\n") == tokenizer.decode(reference.greedy(ids, 5)).rstrip("\n"), done.stderr[-2000:]


def test_the_longest_match_is_not_tokenmonster(tiny):
    """Why no kind of llama.cpp is used for it: its nearest one cuts real text otherwise."""
    texts = [json.loads(line)["text"][:300] for line in open(tiny.folder / "topics.jsonl")][:20]
    import tokenmonster_hf as tm
    words = sorted({word.encode() for text in texts for word in text.split()})[:300]
    vocabulary = tm.Vocabulary.from_tokens([b" " + word for word in words] + words, capcode=1, include="all256")
    equal, n = export.longest_match_share(tm.TokenMonsterTokenizer.from_vocabulary(vocabulary), texts)
    assert n == 20 and equal < n
    assert "TokenMonster" in export.why_not_gpt2(tiny.tokenizer)


@needs("gguf")
def test_what_a_gguf_says_about_the_model(models, tmp_path):
    import gguf
    for name in ("llama", "qwen3"):
        folder = getattr(models, name)
        export.write_gguf(folder, tmp_path / "m.gguf", "q8_0")
        config, tokenizer = su.load_model(folder).config, su.load_tokenizer(folder)
        reader = gguf.GGUFReader(tmp_path / "m.gguf")
        said = {key: field.contents() for key, field in reader.fields.items()}
        for key, value in {"rope.freq_base": config.rope_parameters["rope_theta"], "attention.head_count": 4,
                           "attention.head_count_kv": 2, "context_length": 128, "block_count": 2,
                           "vocab_size": config.vocab_size,
                           "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "attention.key_length": 16}.items():
            assert said[f"{name}.{key}"] == pytest.approx(value), key
        assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
        assert said["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
        assert said["tokenizer.chat_template"] == tokenizer.chat_template and said["tokenizer.ggml.add_bos_token"] is False
        assert len(said["tokenizer.ggml.tokens"]) == config.vocab_size == len(set(said["tokenizer.ggml.tokens"]))
        names = {tensor.name for tensor in reader.tensors}
        assert ("output.weight" in names) is not config.tie_word_embeddings      # a tied head is there once
        assert ("blk.0.attn_q_norm.weight" in names) == (name == "qwen3")
        assert ("stentor.tokenizer" in said) == (name == "llama")
        assert ("Feed token ids" in said.get("general.description", "")) == (name == "llama")


@needs("gguf")
@pytest.mark.parametrize("kind, bits, error", [("q8_0", 8.5, 0.012), ("q4_0", 4.5, 0.11), ("q6_k", 6.5625, 0.03),
                                               ("q4_k", 4.5, 0.1)])
def test_quantised_blocks_decode_to_the_weights(kind, bits, error):
    import gguf
    from stentor.export.gguf_file import encode
    name = kind.upper()
    rows = np.random.default_rng(0).normal(0, 0.02, (32, 512)).astype(np.float32)
    rows[3], rows[5] = 0, np.abs(rows[5])
    data = encode(rows, name)
    again = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert data.nbytes * 8 / rows.size == bits and not again[3].any()
    assert np.sqrt(np.mean((again - rows) ** 2)) / rows.std() < error


@needs("gguf", "xllamacpp")
def test_k_quants_where_the_width_allows_and_said_where_not(models, tmp_path):
    made = {}
    for kind in KINDS:
        made[kind] = export.write_gguf(models.wide, tmp_path / f"{kind}.gguf", kind)
        runner = export.LlamaCpp(tmp_path / f"{kind}.gguf", context=128, threads=1)
        reference = Transformers(su.load_model(models.wide))
        text = prompts_of(models.wide, 1, 24)[0]
        made[kind]["off"] = float(np.abs(runner.losses(text) - reference.losses(text)).mean())
        runner.close()
    assert made["q4_k"]["types"] == {"Q4_K": 7, "Q6_K": 1, "F32": 3} and not made["q4_k"]["fallback"]
    sizes = [made[kind]["bytes"] for kind in ("f32", "f16", "q8_0", "q6_k", "q4_k")]
    assert sizes == sorted(sizes, reverse=True)
    assert made["f32"]["off"] < 1e-4 and made["f16"]["off"] < 0.02 and made["q8_0"]["off"] < 0.2
    assert made["q8_0"]["off"] < made["q4_k"]["off"] < 3 and made["q6_k"]["off"] < made["q4_k"]["off"]
    narrow = export.write_gguf(models.llama, tmp_path / "narrow.gguf", "q4_k")        # 64 wide
    assert len(narrow["fallback"]) == 2 * 7 + 1 and narrow["types"] == {"Q8_0": 15, "F32": 5}
    assert "no multiple of the block" in export.write_format("gguf-q4_k", models.llama, tmp_path).note


@needs("onnx", "onnxscript", "onnxruntime")
def test_onnx_continues_token_for_token_with_its_cache(models, onnx_dir):
    model = export.OnnxModel(onnx_dir / "model.onnx", threads=1)
    assert_same(model, models.qwen3)
    text = prompts_of(models.qwen3, 1, 20)[0]         # in two parts: the cache holds what came before
    whole, _ = model.step(text, model.empty_cache())
    first, cache = model.step(text[:13], model.empty_cache())
    second, cache = model.step(text[13:], cache)
    assert np.abs(np.concatenate([first, second]) - whole).max() < 1e-4
    assert cache["past.1.key"].shape == (1, 2, 20, 16)
    small = export.OnnxModel(onnx_dir / "model.int8.onnx", threads=1)
    assert np.abs(small.log_probabilities(text) - model.log_probabilities(text)).mean() < 0.5
    assert (onnx_dir / "model.int8.onnx").stat().st_size < 0.6 * (onnx_dir / "model.onnx").stat().st_size


@needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
@pytest.mark.parametrize("capcode", [0, 1, 2, "bpe"])
def test_the_browsers_decoder_makes_the_same_text(models, tiny, onnx_dir, tmp_path, capcode):
    import tokenmonster_hf as tm
    from stentor.export.onnx_files import page_data
    if capcode == "bpe":
        tokenizer = su.load_tokenizer(models.qwen3)
    else:
        words = [b" the", b" function", b"hello", b" x", b"C", b"W", b"D"] if capcode != 1 else [b" the", b" function"]
        vocabulary = tm.Vocabulary.from_tokens(words, capcode=capcode, include="all256")
        tokenizer = tm.TokenMonsterTokenizer.from_vocabulary(vocabulary)
    model = SimpleNamespace(config=dataclasses.replace(Config(), vocab_size=su.vocabulary_rows(tokenizer)))
    (tmp_path / "decode.mjs").write_text((onnx_dir / "decode.js").read_text())
    texts = GOLDEN + ["HELLO World, don't SHOUT it's O'NEIL 3RD ÉCOLE straße"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    (tmp_path / "in.json").write_text(json.dumps({"model": page_data(model, tokenizer), "ids": ids}))
    program = ('import {decode} from "./decode.mjs"; import fs from "fs"; const d = JSON.parse(fs.readFileSync("in.json"));'
               'console.log(JSON.stringify(d.ids.map((ids) => decode(d.model, ids))))')
    done = subprocess.run(["node", "--input-type=module", "-e", program], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout or "null") == [tokenizer.decode(row) for row in ids], done.stderr


@dataclasses.dataclass
class Config:
    vocab_size: int = 0
    num_hidden_layers: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 2
    max_position_embeddings: int = 8


def test_quantised_folders_load_in_one_line_and_stay_tied(models, tmp_path):
    """All in one process that knows nothing of us: importing transformers takes longer than the rest."""
    forms = [form for form in ("fp16", "bf16", "int8-torchao", "int8-bnb", "nf4-bnb", "fp4-bnb") if not export.skipped(form)]
    written = {form: export.write_format(form, models.llama, tmp_path) for form in forms}
    code = ("import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "for folder in sys.argv[1:]:\n"
            "    m = AutoModelForCausalLM.from_pretrained(folder)\n"
            "    t = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
            "    x = t('The function', return_tensors='pt')\n"
            "    said = t.decode(m.generate(**x, max_new_tokens=4)[0])\n"
            "    print(len(said) > 12, m.get_input_embeddings().weight is m.lm_head.weight)")
    done = subprocess.run([sys.executable, "-c", code, *(str(made.path) for made in written.values())], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"] * len(forms), done.stderr[-2000:]
    full, text = su.load_model(models.llama), prompts_of(None, 1, 40)[0]
    loss = float(Transformers(full).losses(text).mean())
    for form, made in written.items():
        mine = float(Transformers(su.load_model(made.path)).losses(text).mean())
        assert math.isfinite(mine) and abs(mine - loss) < 0.6, form
        assert made.bytes < 0.51 * sum(weight.numel() * 4 for weight in full.parameters()) + 20_000, form
    if "nf4-bnb" in forms and not torch.cuda.is_available():
        with pytest.raises(su.ParameterError, match="a layer here is 96 wide"):      # it was written, and failed when used
            export.write_format("nf4-bnb", models.qwen3, tmp_path)


def test_dynamic_int8_keeps_the_head_tied_and_the_cards_way_costs_a_second_table(models):
    full = su.load_model(models.wide)
    small, cards = export.load_dynamic_int8(models.wide), export.load_dynamic_int8(models.wide, head=True)
    table = full.get_input_embeddings().weight
    assert small.lm_head.weight is small.get_input_embeddings().weight and callable(cards.lm_head.weight)
    assert export.bytes_held(cards) - export.bytes_held(small) == table.numel() + 4
    text = prompts_of(None, 1, 40)[0]
    assert np.abs(Transformers(small).losses(text) - Transformers(full).losses(text)).mean() < 0.5


def test_the_claims_calculated_sizes_are_those_of_files(models, tmp_path):
    from stentor.export.claims import format_bytes
    shape = su.shape_of(su.load_model(models.wide))
    for form in ("fp32", "fp16", "int8-dynamic", "int8-dynamic-head", "int8-bnb", "nf4-bnb"):
        if not export.skipped(form):
            written = export.write_format(form, models.wide, tmp_path)
            assert written.bytes == pytest.approx(format_bytes(shape, form), rel=0.02), form
    table = export.claims_table()
    row = table[table["published"] == "dynamic INT8, -75%"].iloc[0]
    assert row["MB, calculated"] == pytest.approx(20.7, abs=0.1)      # measured of the card's model, spec-to-build
    assert table["MB, calculated"].tolist()[:2] == [49.2, 24.6]


def test_a_process_a_format_measures_it_and_the_comparison_is_right(models, tiny, tmp_path):
    asked = export.held_out(tmp_path, tiny.tokenizer, prompts=4, windows=6, window_tokens=20)
    assert all(ids[0] == tiny.tokenizer.eos_token_id and len(ids) == 21 for ids in asked.windows)
    assert asked.bytes == sum(len(tiny.tokenizer.decode(ids[1:]).encode()) for ids in asked.windows)
    found = {}
    for form, folder in (("fp32", models.llama), ("fp16", models.llama)):
        written = export.write_format(form, folder, tmp_path)
        found[form] = export.measure_format(form, written.path, asked, tmp_path / "measured", context=128, new_tokens=5,
                                            threads=1)
    reference = Transformers(su.load_model(models.llama))
    assert found["fp32"]["greedy"] == [reference.greedy(ids, 5) for ids in asked.prompts]
    assert found["fp32"]["nats"] == pytest.approx([float(reference.losses(ids).sum()) for ids in asked.windows], rel=1e-5)
    row = export.compare(found["fp32"], found["fp16"], asked, tmp_path / "measured")
    assert row["loss_low"] <= row["loss_difference"] <= row["loss_high"] and 0 < row["largest_difference"] < 0.5
    assert row["bits_per_byte"] == pytest.approx(sum(found["fp16"]["nats"]) / math.log(2) / asked.bytes)
    assert 1e5 < row["memory_bytes"] < 1e9 and row["tokens_per_cpu_second"] > 0
    with pytest.raises(export.MeasuringFailed, match="onnx could not be measured"):
        export.measure_format("onnx", tmp_path / "nothing.onnx", asked, tmp_path / "measured", context=128, new_tokens=5)
    with pytest.raises(su.ParameterError, match="need 41 positions, the model has 16"):
        export.measure_format("fp32", models.llama, asked, tmp_path / "measured", context=16)


def test_the_memory_of_a_cpu_model_is_not_the_gpus(tmp_path, monkeypatch):
    """A machine with a GPU that this format does not use: its memory was 0 there."""
    from stentor.export import worker
    runner = SimpleNamespace(greedy=lambda ids, n: [1] * n, losses=lambda ids: np.ones(len(ids) - 1, np.float32),
                             log_probabilities=lambda ids: np.ones((len(ids), 4), np.float32), close=lambda: None)
    for name, said in {"is_available": True, "reset_peak_memory_stats": None, "max_memory_allocated": 7}.items():
        monkeypatch.setattr(torch.cuda, name, lambda said=said: said)
    monkeypatch.setattr(worker, "load_runtime", lambda form: None)
    monkeypatch.setattr(worker, "open_runner", lambda *path, **how: runner)
    monkeypatch.setattr(worker, "resident", lambda: 1000)
    spec = {"form": "onnx", "path": "", "prompts": [[1, 2]], "new_tokens": 3, "windows": [[1, 2, 3]], "kept": 1,
            "context": 8, "threads": 1, "out": str(tmp_path / "onnx.json")}
    assert worker.measure(spec)["speed"]["memory_bytes"] > 1e6
    runner.on_gpu = True
    assert worker.measure(spec)["speed"]["memory_bytes"] == 7


def test_what_cannot_be_made_is_one_sentence(models, tmp_path, monkeypatch):
    import importlib.util
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    assert export.skipped("gguf-f32").startswith("gguf is not installed (pip install gguf==")
    with pytest.raises(su.ParameterError, match="gguf is not installed") as error:
        export.write_format("gguf-f32", models.llama, tmp_path)
    assert len(error.value.problems) == 1 and not (tmp_path / "gguf").exists()
    assert "is none of" in export.skipped("gguf-q5")
    if not torch.cuda.is_available() and not export.missing("torchao"):
        assert export.skipped("int4-torchao") == "int4-torchao has kernels for CUDA only, and there is no GPU here"
