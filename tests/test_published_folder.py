"""A saved folder in the hands of somebody who has transformers, torch and the folder: every
default is right for them.

Equal to our own helper: default generate, greedy, pipeline, chat, streaming, assisted generation,
prompt lookup, save again, load again. Speed is counted, not timed: the tokens of each forward
pass.
"""
import copy
import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import stentor_utils as su

PROMPTS = ["The value of the", "A class is"]
USER = """
import json, sys, warnings
sys.modules["numba"] = None
folder, again = sys.argv[1:]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer, pipeline
assert not [name for name in sys.modules if name.startswith("stentor") or name == "peft"]
found = {}
def use(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    sizes, found = [], {"prompts": {}}
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    for prompt in json.loads(sys.stdin.read() if not prompts else json.dumps(prompts)):
        prompts.append(prompt)
    for prompt in prompts[:2]:
        inputs = tokenizer(prompt, return_tensors="pt")
        n = inputs["input_ids"].shape[1]
        def text(out):
            return tokenizer.decode(out[0, n:].tolist(), skip_special_tokens=True)
        torch.manual_seed(42)
        by_default = text(model.generate(**inputs, max_new_tokens=12))
        sizes.clear()
        greedy = text(model.generate(**inputs, max_new_tokens=12, do_sample=False))
        assert sizes[0] == n and set(sizes[1:]) <= {1}, sizes             # the prefix is computed once
        lookup = text(model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3))
        assisted = text(model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=model))
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=streamer)
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        piped = pipe(prompt, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
        found["prompts"][prompt] = dict(by_default=by_default, greedy=greedy, lookup=lookup, assisted=assisted,
                                        streamed="".join(streamer), piped=piped)
    whole = model.generate(**inputs)                  # nothing said: to the end of the text or of the context
    found["whole"] = whole.shape[1] == model.config.max_position_embeddings or int(whole[0, -1]) == tokenizer.eos_token_id
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True,
                                             return_tensors="pt", return_dict=True)
        out = model.generate(**chat, max_new_tokens=5, do_sample=False)
        found["chat"] = tokenizer.decode(out[0].tolist())
    found["logits"] = model(inputs["input_ids"]).logits[0, -1].tolist()
    config = GenerationConfig.from_pretrained(folder).to_dict()
    found["generation"] = {key: value for key, value in config.items() if key != "transformers_version"}
    found["ids"] = [[getattr(holder, f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
                    for holder in (model.config, model.generation_config, tokenizer)]
    found["model_max_length"] = tokenizer.model_max_length
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    return found
prompts = []
first = use(folder)
second = use(again)
assert first == second, (first, second)
print(json.dumps(first))
"""


def in_a_process_with_only_transformers(folder, tmp_path, prompts=PROMPTS):
    (tmp_path / "user.py").write_text(USER)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "user.py", str(folder), str(tmp_path / "again")],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        input=json.dumps(prompts),
        env=env | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def as_our_helper_says(folder, found):
    model, tokenizer = su.load_model(folder), su.load_tokenizer(folder)
    for prompt in PROMPTS:
        said = found["prompts"][prompt]
        ours = {key: su.generate(model, tokenizer, [prompt], max_new_tokens=12, **settings)[0]
                for key, settings in (("by_default", {}), ("greedy", {"do_sample": False}))}
        assert said["by_default"] == ours["by_default"]
        assert {said[key] for key in ("greedy", "lookup", "assisted", "streamed", "piped")} == {
            ours["greedy"]
        }, said
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert found["ids"] == [ids] * 3
    assert found["generation"]["use_cache"] is True and found["whole"]
    assert (
        found["generation"]["max_length"]
        == found["model_max_length"]
        == model.config.max_position_embeddings)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run with everything that is for training only: eager attention, checkpointed layers,
    averages, INT8, FP32 layers."""
    recipe = dataclasses.replace(tiny.recipe, token_budget=8 * 8 * 64, attn_implementation="eager", ema_decay=0.9,
                                 gradient_checkpointing=True, int8_qat=True, fp32_softmax=True)
    folder = tmp_path_factory.mktemp("trained")
    su.train(
        recipe,
        su.TokenStore(tiny.store_dir, recipe),
        folder,
        tokenizer=su.load_tokenizer(tiny.tokenizer_dir),
        say=lambda text: None)
    return folder


def test_final_is_right_for_its_users(trained, tmp_path):
    found = in_a_process_with_only_transformers(trained / "final", tmp_path)
    as_our_helper_says(trained / "final", found)
    for key, value in su.GENERATION.items():          # what the card recommends
        assert found["generation"][key] == value
    for name in ("config.json", "generation_config.json"):
        said = [json.loads((trained / folder / name).read_text()) for folder in ("best", "final")]
        assert said[0] == said[1] and said[0]["use_cache"] is True
    config = json.loads((trained / "final" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in config if "attn" in key or "checkpoint" in key], config


def test_a_merged_fine_tune_is_right_too_and_recommends_its_own_sampling(trained, tmp_path):
    from peft import LoraConfig, get_peft_model
    tokenizer = su.load_tokenizer(trained / "final")
    torch.manual_seed(0)
    model = get_peft_model(
        su.load_model(trained / "final"),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.config.use_cache = model.generation_config.use_cache = False        # as a trainer sets it
    own = {"do_sample": True, "temperature": 1.1, "top_p": 0.6, "repetition_penalty": 1.3}
    su.save_model_folder(model, tokenizer, tmp_path / "instruct", own)
    assert model.config.use_cache is False            # the model in hand is as it was
    found = json.loads((tmp_path / "instruct" / "generation_config.json").read_text())
    assert found["use_cache"] is True and {key: found[key] for key in own} == own
    ids = torch.tensor([[1, 2, 3]])
    saved = su.load_model(tmp_path / "instruct")
    assert torch.allclose(saved(ids).logits, model.eval()(ids).logits, atol=1e-4)


def test_an_old_folder_without_a_cache_is_healed_in_hand_and_when_saved_again(trained, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(trained / "final", old)
    for name in ("config.json", "generation_config.json"):
        path = old / name
        values = json.loads(path.read_text())
        path.write_text(
            json.dumps(
                {key: value for key, value in values.items() if key not in su.GENERATION}
                | {"use_cache": False, "pad_token_id": None}))
    model = su.load_model(old)
    assert model.config.use_cache and model.generation_config.use_cache
    su.save_model_folder(model, su.load_tokenizer(old), tmp_path / "new", su.GENERATION)
    as_our_helper_says(
        tmp_path / "new", in_a_process_with_only_transformers(tmp_path / "new", tmp_path))


def test_training_keeps_no_cache_although_the_folder_says_so(tiny):
    """The memory of keys and values, layer by layer, which the config no longer forbids: no call
    of the loop asks for it."""
    model, asked = su.build_model(tiny.recipe.shape), []
    su.use_chunked_loss(model)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["use_cache"]), with_kwargs=True)
    ids = torch.tensor([[1, 2, 3]])
    model.train()(input_ids=ids, labels=ids)
    su.evaluate(model, ids[0].numpy(), 3, block_size=2, batch_size=1)
    assert asked == [False, False] and model.config.use_cache is True


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_file_modes_follow_the_umask(tiny, tmp_path, umask):
    """Also of files that came with other modes (a library's mkstemp: 0600; a read-only input:
    0444)."""
    class Tokenizer:                                  # what a library may do while it saves
        def __init__(self, own):
            self.own = own

        def __getattr__(self, name):
            return getattr(self.own, name)

        def __len__(self):
            return len(self.own)

        def save_pretrained(self, folder):
            self.own.save_pretrained(folder)
            (folder / "tokenmonster.vocab").chmod(0o600)
            (folder / "tokenmonster_hf.py").chmod(0o444)
    before = os.umask(umask)
    try:
        su.save_model_folder(
            su.build_model(tiny.recipe.shape), Tokenizer(tiny.tokenizer), tmp_path / "final")
        su.save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(1)}}, {})
        su.write_atomically(tmp_path / "summary.json", "{}")
    finally:
        os.umask(before)
    for path in (path for path in tmp_path.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, (path, oct(path.stat().st_mode))


# --- what is read is what was saved


def rewritten(source, folder, change, config=(), shards=1):
    """A copy of a model folder with its tensors through `change`, in one file or several."""
    folder.mkdir()
    values = json.loads((source / "config.json").read_text()) | dict(config)
    (folder / "config.json").write_text(json.dumps(values))
    tensors = change(load_file(source / "model.safetensors"))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    place = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(place.values()):
        save_file(
            {key: tensors[key] for key in tensors if place[key] == name},
            folder / name,
            metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def old_names(tensors):
    return {
        key.replace("proj.weight", "proj.weight_master"): value for key, value in tensors.items()}


def with_stale(tensors):
    return old_names(tensors) | {
        key: torch.zeros_like(value) for key, value in tensors.items() if "proj" in key}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("change", [copy.copy, old_names, with_stale])
def test_every_weight_is_the_files_also_under_its_old_name(trained, tmp_path, change, shards, capfd):
    folder = rewritten(trained / "final", tmp_path / "model", change, shards=shards)
    found = su.load_model(folder).state_dict()
    for key, value in load_file(trained / "final" / "model.safetensors").items():
        assert torch.equal(found[key], value), key
    assert "MISSING" not in "".join(capfd.readouterr())


def test_load_stentor2_reads_the_previews_names_as_its_card_does(trained, tmp_path):
    """The card's helper: (model, tokenizer); transformers alone leaves X.weight_master out and the layer random."""
    folder = shutil.copytree(trained / "final", tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    save_file(with_stale(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = su.load_stentor2(folder, dtype=torch.float32)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in tensors.items())
    assert tokenizer.decode(tokenizer("The value")["input_ids"]).strip() == "The value"


def without(*words):
    return lambda tensors: {
        key: value for key, value in tensors.items() if not all(word in key for word in words)}


WRONG = {
    "a layer is missing": (without("layers.1."), {}, "missing .model.layers.1.input_layernorm.weight and 8 more"),
    "one weight is missing": (without("layers.1.", "q_proj"), {}, "missing .model.layers.1.self_attn.q_proj.weight."),
    "config.json asks for more layers": (copy.copy, {"num_hidden_layers": 5}, "missing"),
    "and for fewer": (copy.copy, {"num_hidden_layers": 2}, "left over"),
    "an old name of no layer": (lambda t: old_names(t) | {"x.weight_master": torch.ones(1)}, {}, "left over .x.weight."),
    "somebody's prefix": (lambda t: {f"module.{k}": v for k, v in t.items()}, {}, "missing"),
    "an extra key": (lambda t: t | {"model.extra": torch.ones(1)}, {}, "left over .model.extra."),
    "another shape": (lambda t: t | {"model.norm.weight": torch.ones(3)}, {}, r"norm.weight is \[3\] in the file and \[32\]"),
    "another vocabulary": (copy.copy, {"vocab_size": 2048}, "embed_tokens.weight is .* in the file"),
    "untied, without lm_head": (copy.copy, {"tie_word_embeddings": False}, "missing .lm_head.weight."),
    "tied, with another lm_head": (lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, {}, "two different"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_not_the_models_are_refused_in_a_sentence(trained, tmp_path, what, shards, capfd):
    change, config, says = WRONG[what]
    folder = rewritten(trained / "final", tmp_path / "model", change, config, shards)
    with pytest.raises(su.ParameterError, match=says) as caught:
        su.load_model(folder)
    assert len(caught.value.problems) == 1 and len(str(caught.value)) < 400
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_an_lm_head_saved_beside_the_embedding_it_is_tied_to(trained, tmp_path):
    """Some libraries write both: equal, so nothing is lost."""
    folder = rewritten(trained / "final", tmp_path / "model",
                       lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    model = su.load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tokenizer_of_more_tokens_than_rows_is_refused(tiny, tmp_path):
    small = su.build_model(dataclasses.replace(tiny.recipe.shape, vocab_size=64))
    for call in (lambda: su.save_model_folder(small, tiny.tokenizer, tmp_path / "final"),
                 lambda: su.generate(small, tiny.tokenizer, ["x"])):
        with pytest.raises(su.ParameterError, match="the model has only vocab_size = 64"):
            call()
    assert not list(tmp_path.iterdir())


# --- prompts, links


def test_prompts_are_checked_and_an_empty_one_continues_from_eos(tiny):
    model = su.build_model(tiny.recipe.shape, eos_token_id=tiny.tokenizer.eos_token_id)
    for bad, says in (([None], r"prompts\[0\] = None"), (["x", 3], r"prompts\[1\] = 3"), ("text", "list of texts"),
                      ([["x"]], r"prompts\[0\] = \['x'\]")):
        with pytest.raises(su.ParameterError, match=says):
            su.generate(model, tiny.tokenizer, bad)
    empty = su.generate(model, tiny.tokenizer, ["", "x"], max_new_tokens=8, do_sample=False)
    ids = torch.tensor([[tiny.tokenizer.eos_token_id]])
    out = model.eval().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_length=9,
        **{**su.GENERATION, "do_sample": False})
    assert (
        empty[0] == tiny.tokenizer.decode(out[0, 1:].tolist(), skip_special_tokens=True)
        and len(empty) == 2)


@pytest.mark.parametrize("what", ["the folder", "its parent", "nothing yet"])
def test_a_link_stays_a_link_and_its_target_is_replaced(tiny, tmp_path, what):
    target, link = tmp_path / "disk" / "model", tmp_path / "run" / "final"
    link.parent.mkdir()
    (tmp_path / "disk").mkdir()
    if what == "its parent":
        link.parent.rmdir()
        link.parent.symlink_to(tmp_path / "disk")
        target = tmp_path / "disk" / "final"
    else:
        link.symlink_to(target)
    if what != "nothing yet":
        target.mkdir()
        (target / "left.txt").write_text("of another model")
    for seed in (1, 2, 3):
        su.save_model_folder(su.build_model(tiny.recipe.shape, seed=seed), tiny.tokenizer, link)
        assert os.path.realpath(link) == str(target) and link.parent.joinpath(
            "final"
        ).is_symlink() == (what != "its parent")
        assert torch.equal(
            su.load_model(link).lm_head.weight,
            su.build_model(tiny.recipe.shape, seed=seed).lm_head.weight)
    assert {path.name for path in target.parent.iterdir()} == {target.name} and not (
        target / "left.txt"
    ).exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"final"}


def test_what_an_earlier_version_left_of_a_link_is_no_obstacle(tiny, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".final.old").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "final").mkdir()
    su.save_model_folder(su.build_model(tiny.recipe.shape), None, tmp_path / "final")
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "final"}


def test_a_file_that_is_a_link_is_written_through(tmp_path):
    (tmp_path / "summary.json").symlink_to(tmp_path / "real.json")
    for text in ("1", "2"):
        su.write_atomically(tmp_path / "summary.json", text)
    assert (tmp_path / "summary.json").is_symlink() and (tmp_path / "real.json").read_text() == "2"
