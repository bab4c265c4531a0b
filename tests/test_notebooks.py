"""Every notebook is executed by papermill with its CPU parameters, as `make run` does, and what it made is looked at."""
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys

import pytest
import stentor.notebooks
from conftest import REPO

import stentor_utils as su
from stentor.reporting import MAKE_RUN

CHAIN = list(MAKE_RUN)
CANARIES = {name: f"canary-{name}-Canary7Canary7" for name in ("HF_TOKEN", "KAGGLE_KEY", "WANDB_API_KEY", "AWS_SECRET_KEY")}


RECIPE = su.find_recipe("stentor2-12m-tuned-qk", "cpu", {"token_budget": 1_000_000})       # of the chain: 02's default
SIZE, STEPS = su.count_parameters(RECIPE.shape), RECIPE.total_steps


def run(*parameters, notebooks=CHAIN, **env):
    return subprocess.run([sys.executable, "-m", "stentor_utils", "run", *notebooks, "-p", "PROFILE=cpu", *parameters],
                          cwd=REPO, env={**os.environ, **env}, capture_output=True, text=True)


def make_chain(outputs):
    """`make run` with a smaller token budget: (run folder, what the terminal showed). The fixture `chain`, in conftest.py."""
    done = run(f"OUTPUTS={outputs}", "RUN=chain", "TOKEN_BUDGET=1000000", "SEEDS=[0]", "CONTINUATIONS=8",
               **CANARIES)
    assert not any(canary in done.stdout + done.stderr for canary in CANARIES.values())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return outputs / "chain", done.stdout


def test_the_terminal_shows_progress_and_a_summary(chain):
    folder, shown = chain
    assert len(re.findall(rf"step +\d+/{STEPS} \| loss [\d.]+ \| lr [\d.e+-]+ \| [\d,]+ tokens/s \| .* left", shown)) >= 9
    tail = shown[shown.rindex(f"{RECIPE.name}:"):]
    for part in ("parameters", "tokens seen", "tokens/s", "eval loss", "perplexity", "bits per byte", ">>>", "charts", "model"):
        assert part in tail, part
    assert tail.count(">>>") == 3


def test_the_model_learned_and_beats_the_bigram(chain):
    folder, _ = chain
    summary = json.loads((folder / "summary.json").read_text())
    bigram = json.loads((folder / "baseline.json").read_text())["byte_bigram_bits_per_byte"]
    losses = [row["loss"] for row in map(json.loads, open(folder / "metrics.jsonl")) if row["kind"] == "train"]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 1
    assert summary["bits_per_byte"] < bigram - 1      # after 1M tokens; a full `make run` ends about 2 below
    assert summary["parameters"] == SIZE == 1_377_920 and summary["tokens"] == RECIPE.total_tokens


def test_the_model_folder_loads_through_auto_classes(chain, tmp_path):
    folder, _ = chain
    code = ("import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
            "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
            "x = t('The function returns', return_tensors='pt')\n"
            "print(repr(t.decode(m.generate(**x, max_new_tokens=8, do_sample=False)[0])), len(t), m.config.vocab_size)\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, str(folder / "final")], cwd=tmp_path, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The function returns" in done.stdout and "4096 4096" in done.stdout


def test_instruct_tuning_made_a_model_that_stops_and_a_probe_with_a_label_for_every_answer(chain):
    folder, shown = chain[0] / "instruct", chain[1]
    summary = json.loads((folder / "sft_summary.json").read_text())
    # rank 32 on 4 layers: four projections h x h and three h x 3h, with h = 128
    assert summary["parameters"] == SIZE and summary["trainable_parameters"] == 4 * 32 * (4 * 2 * 128 + 3 * 4 * 128)
    assert summary["merge_error"] < 1e-4 and len(summary["phases"]) == 10
    assert {row["recipe"] for row in summary["phases"]} == {"card", "better"}
    # A base of 1M tokens (loss 6.8) moves little: of ten phases one was seen to rise by 0.02. In `make run` all thirty fall.
    falls = [row["loss_before"] - row["loss_after"] for row in summary["phases"]]
    assert min(falls) > -0.1 and sum(fall > 0 for fall in falls) >= 8 and sum(falls) > 0.3, falls
    assert all(fall > 0 for row, fall in zip(summary["phases"], falls) if row["phase"] == "main"), falls
    assert summary["stopping"]["card"]["low"] > summary["stopping"]["base"]["high"]     # stops by itself, far from chance
    probe = json.loads((folder / "probe.json").read_text())
    labels = {"refusal", "silent", "fake_refusal", "help", "degenerate", "unsafe_compliance"}
    for name in ("base", "card-0", "better-0"):
        answers = probe["models"][name]["answers"]
        assert len(answers) == 2 * (35 + 160) and {row["label"] for row in answers} <= labels
        first = probe["models"][name]["scores"]["35 prompts, greedy"]
        assert first["harmful refused"]["n"] == 18 and first["benign helped"]["n"] == 17
    assert set(probe["comparison"]) >= {"over-refusal", "harmful refused"} and ("power" in shown or "told apart" in shown)
    assert (folder / "final" / "model.safetensors").stat().st_size == (chain[0] / "final" / "model.safetensors").stat().st_size
    assert len(list(folder.glob("sft_metrics-*-phase*.jsonl"))) == 10 and (folder / "labels.png").stat().st_size > 5_000


def test_the_instruct_model_chats_where_there_is_only_transformers(chain, tmp_path):
    code = ("import sys; sys.modules['peft'] = None\nfrom transformers import pipeline\n"
            "chat = pipeline('text-generation', model=sys.argv[1], trust_remote_code=True)\n"
            "said = chat([{'role': 'user', 'content': 'What is the capital of France?'}], max_new_tokens=8)\n"
            "settings, tokenizer = chat.model.generation_config, chat.tokenizer\n"
            "assert settings.eos_token_id == settings.pad_token_id == tokenizer.eos_token_id\n"
            "print(settings.use_cache, settings.temperature, settings.top_p, said[0]['generated_text'][-1]['role'])")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, str(chain[0] / "instruct" / "final")], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.stdout.split() == ["True", "1.1", "0.6", "assistant"], done.stderr[-2000:]      # 04's GENERATION


def test_charts_samples_and_executed_notebooks_are_there(chain):
    folder, _ = chain
    for name in ("loss", "perplexity", "bits_per_byte", "parameters"):
        assert (folder / "charts" / f"{name}.png").stat().st_size > 5_000
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert len(samples) == 3 and all(sample["text"].strip() for sample in samples)
    for name in CHAIN:
        cells = json.loads((folder / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")


def test_a_picture_is_there_before_the_long_work_begins(chain):
    folder, _ = chain
    long_work = {"01_tokenizer": "get", "02_pretrain_t4": "train", "04_instruct_sft": "run", "05_benchmark": "run"}
    for name, work in long_work.items():
        cells = json.loads((folder / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        drawn = [cell["id"] for cell in cells if any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))]
        ids = [cell["id"] for cell in cells]
        assert ids.index(drawn[0]) < ids.index(work), (name, drawn)


def test_the_benchmark_has_a_table_intervals_and_a_chart(chain):
    folder, shown = chain
    benchmark = folder / "benchmark"
    result = json.loads((benchmark / "chain" / "minimal_pairs.json").read_text())
    assert len(result["tasks"]) >= 12 and all(task["n"] >= 50 for task in result["tasks"].values())
    items = [item for task in result["tasks"].values() for item in task["items"]["acc,none"]]
    lines = (benchmark / "results.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| written minimal pairs"))
    assert f"{sum(items) / len(items):.4f} [" in row and f"{len(items):,}" in row and "0.5000" in row
    assert row in shown                               # the very table, on the terminal
    assert len((benchmark / "results.csv").read_text().splitlines()) >= 3          # a header, chain, untrained
    entry, = json.loads((benchmark / "model_index.json").read_text())["model-index"]
    low, high = entry["results"][0]["metrics"][0]["confidence_interval_95"]
    assert low < entry["results"][0]["metrics"][0]["value"] < high
    found = json.loads((benchmark / "contamination.json").read_text())["tasks"]
    assert sum(task["items"] for task in found.values()) == len(items)
    assert (benchmark / "benchmark.png").stat().st_size > 5_000


def test_no_secret_of_the_environment_is_in_what_was_made(chain):
    """Executed notebooks, logs, metrics, model folders, charts: every byte that the chain wrote."""
    files = [path for path in chain[0].rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        data = path.read_bytes()
        assert not any(canary.encode() in data for canary in CANARIES.values()), path


def test_the_model_card_is_there_and_every_number_in_it_has_a_file(chain):
    import stentor.card.check
    import stentor.notebooks
    folder, _ = chain
    assert stentor.card.check.check_model_card(folder) == []
    card = (folder / "final" / "README.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    for text in (f"| perplexity | {summary['perplexity']:,.2f} |", f"{SIZE:,} parameters", "Qwen3ForCausalLM",
                 "8 continuations of 16 held-out tokens",
                 "![loss](charts/loss.png)", f"| **learning_rate** | {RECIPE.learning_rate:g} | 0.0008 |",
                 "| **optimizer** | muon |"):
        assert text in card, text
    assert (folder / "final/charts/loss.png").read_bytes() == (folder / "charts/loss.png").read_bytes()
    executed = (folder / "notebooks" / "06_charts.ipynb").read_text()
    assert "PUBLISH_TO is None: nothing is uploaded" in executed
    assert "Benchmark scores: not measured." not in card and "sft is left out" not in executed      # 04 and 05 ran before


def test_running_again_keeps_the_finished_model(chain):
    """The same parameters again: nothing is trained twice, the weights stay."""
    folder, _ = chain
    before = (folder / "final" / "model.safetensors").read_bytes()
    done = run(f"OUTPUTS={folder.parent}", "RUN=chain", "TOKEN_BUDGET=1000000", notebooks=["02_pretrain_t4"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"going on from step {STEPS} of {STEPS}" in done.stdout
    assert (folder / "final" / "model.safetensors").read_bytes() == before


def test_a_refused_tuning_leaves_what_an_earlier_one_delivered(chain):
    """Another learning rate for phases that are done: refused by the checkpoint, before anything of instruct/ is written."""
    def delivered():
        files = [path for path in (chain[0] / "instruct").rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    before = delivered()
    done = run(f"OUTPUTS={chain[0].parent}", "RUN=chain", "SEEDS=[0]", "RATE=7", notebooks=["04_instruct_sft"])
    assert done.returncode == 1 and "learning_rate is" in done.stderr, done.stderr[-2000:]
    assert len(before) > 15 and delivered() == before


@pytest.fixture(scope="module")
def tpu_run(chain):
    """03 with its CPU twin on the CPU engine, with the chain's tokenizer; XLA with 8 virtual devices: make tpu-test."""
    folder, _ = chain
    done = run(f"OUTPUTS={folder.parent}", "RUN=tpu", f"TOKENIZER={folder / 'tokenizer'}", "TOKEN_BUDGET=200000",
               "OVERRIDES={'max_eval_samples': 20, 'torch_compile': False}", notebooks=["03_pretrain_tpu"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder.parent / "tpu", done.stdout


def test_the_tpu_notebook_keeps_its_mixture_and_learns(tpu_run):
    folder, shown = tpu_run
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5 and all(map(math.isfinite, losses))
    mixture = json.loads((folder / "mixture.json").read_text())
    table = mixture["table"]
    for part, planned in (("before the anneal", (0.75, 0.15, 0.10)), ("anneal", (0.50, 0.30, 0.20))):
        assert list(table[f"{part}, planned"].values()) == pytest.approx(planned)
        assert list(table[f"{part}, realised"].values()) == pytest.approx(planned, abs=0.02)      # 117 sequences in the anneal
    assert len(mixture["wait_seconds"]) == len(losses) and "predicted feed" in shown and "304,000" in shown
    summary = json.loads((folder / "summary.json").read_text())
    recipe = su.find_recipe("stentor3-20m-tuned-qk", "cpu", {"token_budget": 200_000})
    assert summary["recipe"] == recipe.name and summary["optimizer"] == "stentor.MuonAdamW"
    assert summary["tokens"] == recipe.total_tokens and (folder / "final" / "model.safetensors").exists()
    su.write_model_card(folder)                        # as 06 does
    assert su.check_model_card(folder) == []


@pytest.fixture(scope="module")
def growth(tmp_path_factory):
    """07 in an empty folder: no base, so a small one is trained first. (run folder/growth, what the terminal showed)."""
    outputs = tmp_path_factory.mktemp("growth")
    done = run(f"OUTPUTS={outputs}", "RUN=grown", "TOKEN_BUDGET=10000", "TRIAL_TOKENS=6000", "SEEDS=[42]", "FRAGMENTS=1",
               "OVERRIDES={'max_eval_samples': 1}", notebooks=["07_growth"], **CANARIES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not any(canary in done.stdout + done.stderr for canary in CANARIES.values())
    return outputs / "grown" / "growth", done.stdout


def test_07_keeps_the_function_and_trains_three_stages_from_it(growth):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, shown = growth
    base = AutoModelForCausalLM.from_pretrained(folder / "trial" / "base-42" / "final")
    grown = AutoModelForCausalLM.from_pretrained(folder / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    ids = tokenizer("The function returns a list of names.", return_tensors="pt").input_ids
    with torch.no_grad():
        before, after = base(ids).logits, grown(ids).logits
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    assert grown.config.hidden_size == 2 * base.config.hidden_size
    assert grown.config.num_hidden_layers > base.config.num_hidden_layers
    final = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert final.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5
    assert not torch.equal(final.lm_head.weight, grown.lm_head.weight)
    curriculum = json.loads((folder / "curriculum.json").read_text())
    assert [stage["sources"][0]["path"] for stage in curriculum["stages"]] == ["local:prose", "local:code", "local:math"]
    assert all(stage["chunk_eos"] for stage in curriculum["stages"]) and len(curriculum["bits_per_byte"]) == 4
    tokens = [summary["tokens"] for summary in curriculum["summaries"]]
    assert all(tokens) and all(summary["stopped"] is None for summary in curriculum["summaries"])
    assert "1,536 fewer" in shown and "26.1% of them copied" in shown


def test_07_says_whether_growing_pays_and_logs_the_master_test(growth):
    folder, shown = growth
    payoff = json.loads((folder / "payoff.json").read_text())
    assert set(payoff["runs"]) == {"base", "grown 60%", "grown 100%", "copied", "scratch"} and payoff["machine"]["cpu_count"]
    assert payoff["verdict"]["sentence"] in shown
    assert su.check_model_card(folder.parent, of="growth") == []
    log = json.loads((folder / "master_test.json").read_text())["log"]
    assert len(log) == 2 * 10 and {row["model"] for row in log} == {"base", "grown and trained"}
    assert all({"prompt", "text", "temperature", "max_new_tokens", "degenerate"} <= set(row) for row in log)
    executed = (folder.parent / "notebooks" / "07_growth.ipynb").read_text()
    assert "plausible but imprecise" in executed and "growing pay" in executed        # the card's words; the last table
    for name in ("matrices", "forgetting", "payoff"):
        assert (folder / "charts" / f"{name}.png").stat().st_size > 5_000


def test_08_writes_formats_that_say_the_same_and_their_card(chain):
    folder, _ = chain
    wanted = ["fp16", "int8-dynamic", "gguf-f32", "gguf-q8_0"]
    done = run(f"OUTPUTS={folder.parent}", "RUN=chain", f"FORMATS={wanted}", "CONTINUATIONS=10", "NEW_TOKENS=12", "WINDOWS=12",
               notebooks=["08_export"], **CANARIES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not any(canary in done.stdout + done.stderr for canary in CANARIES.values())
    export = json.loads((folder / "export" / "export.json").read_text())
    rows = {row["format"]: row for row in export["formats"]}
    assert set(rows) | set(export["skipped"]) == {"fp32", *wanted}
    for name in {"fp32", "gguf-f32"} & set(rows):
        assert rows[name]["greedy_equal"] == rows[name]["greedy_of"] == 10 and abs(rows[name]["loss_difference"]) < 1e-4
    assert 15.9 < rows["fp16"]["bits_per_weight"] < 16.3 and rows["fp32"]["bits_per_byte"] > 1
    for row in rows.values():
        assert row["loss_low"] <= row["loss_difference"] <= row["loss_high"] and row["tokens_per_cpu_second"] > 0
    card = (folder / "export" / "README.md").read_text()
    assert f"{rows['fp16']['bytes']:,}" in card and su.check_model_card(folder, of="export") == []
    if "gguf-q8_0" in rows:                           # the program beside the file, as its reader starts it
        ran = subprocess.run([sys.executable, "generate.py"], cwd=folder / "export" / "gguf", capture_output=True, text=True)
        assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr[-2000:]
        assert "must be fed ids" in (folder / "notebooks" / "08_export.ipynb").read_text()


@pytest.mark.parametrize("notebook, given, expected", [
    ("08_export", ["MODEL={folder}", "FORMATS=['gguf-q5']", "WINDOWS=1"],
     ["is neither a model folder", "'gguf-q5' is none of", "WINDOWS = 1 must be"]),
    ("07_growth", ["MODEL={folder}", "OVERRIDES={'sources': []}", "SEEDS=[]"],
     ["is not a model", "OVERRIDES: 'sources'", "SEEDS = []"]),
    ("03_pretrain_tpu", ["WEIGHTS=[1, 2]", "XLA=CPU", "TOKENIZER={folder}"],
     ["WEIGHTS has 2 shares", "needs torch_xla", "TOKENIZER"]),
    ("05_benchmark", ["LOCAL_TASKS=['{folder}/tasks.jsonl', None]", "PEERS={'untrained': ''}", "MODEL=/no/such/model"],
     ["tasks.jsonl, line 2, row 1: answer = ''", "LOCAL_TASKS: None is no path", "PEERS['untrained'] = ''",
      "its name is taken"]),
    ("02_pretrain_t4", ["TOKENBUDGET=5"], ["TOKENBUDGET is not a parameter", "did you mean TOKEN_BUDGET?"]),
    ("02_pretrain_t4", ["RECIPE=stentor2-12n", "TOKEN_BUDGET=-5"], ["did you mean stentor2-12m?", "TOKEN_BUDGET = -5"]),
    ("02_pretrain_t4", ["OVERRIDES={'num_attention_heads': 3}"], ["num_attention_heads = 3", "num_key_value_heads = 2"]),
    ("02_pretrain_t4", ["RUN=../evil"], ["RUN = '../evil' must be a plain name"]),
    ("02_pretrain_t4", ["OUTPUTS=/proc/nowhere"], ["OUTPUTS = '/proc/nowhere' is not a folder that can be written to"]),
    ("01_tokenizer", ["VOCABULARY={folder}/cut.vocab"], ["cut.vocab"]),
    ("01_tokenizer", ["VOCABULARY={folder}/other.vocab"], ["other.vocab"]),
    ("05_benchmark", ["BLOCKS=['arcs']", "LOCAL_TASKS=['nosuchfolder']", "MODEL=/no/such/model"],
     ["BLOCKS: 'arcs' is none of", "LOCAL_TASKS: 'nosuchfolder' is not a folder", "MODEL = '/no/such/model' is not a model"]),
    ("04_instruct_sft", ["SEEDS=[0, -1]", "PROMPTS=['hello', None]", "RECIPES=[['card']]", "BATCH=1.5",
                         "GENERATION={'temprature': 2, 'max_new_tokens': 1.5}"],
     ["SEEDS = [0, -1] has -1", "PROMPTS = ['hello', None] has None", "RECIPES = [['card']] has ['card']",
      "BATCH = 1.5 must be", "'temprature'"]),
    ("04_instruct_sft", ["BATCH=50", "DELIVER=card", "RECIPES=['better']"],
     ["BATCH = 50 must be at most 48 or a multiple of it", "DELIVER = 'card' is not among", "there is no model in"]),
    ("06_charts", ["RUN=nosuchrun"], ["nosuchrun"]),
    ("06_charts", ["PUBLISH_TO=somewhere"], ["PUBLISH_TO = 'somewhere' must be None"]),
])
def test_bad_parameters_get_clear_sentences_before_work_starts(notebook, given, expected, tiny, tmp_path):
    vocabulary = (tiny.tokenizer_dir / "tokenmonster.vocab").read_bytes()
    (tmp_path / "cut.vocab").write_bytes(vocabulary[:len(vocabulary) // 2])
    (tmp_path / "other.vocab").write_bytes(b"PK\x03\x04 this is a zip file, say" * 20)
    (tmp_path / "tasks.jsonl").write_text("".join(
        json.dumps({"question": "q", "choices": ["a", "b"], "answer": answer}) + "\n" for answer in ("A", "")))
    given = [value.replace("{folder}", str(tmp_path)) for value in given]
    if not any(value.startswith("OUTPUTS=") for value in given):
        given.append(f"OUTPUTS={tmp_path}")
    done = run(*given, notebooks=[notebook])
    assert done.returncode == 2, done.stdout + done.stderr
    for part in expected:
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "=== 0" not in done.stdout.partition(notebook)[2]
    assert len(done.stderr.splitlines()) < 15, done.stderr


def test_05_says_in_one_sentence_that_nothing_could_be_scored(tiny, tmp_path):
    import stentor_utils as su
    model = su.build_model(tiny.recipe.shape, eos_token_id=tiny.tokenizer.eos_token_id)
    su.save_model_folder(model, tiny.tokenizer, tmp_path / "demo" / "final")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "task.yaml").write_text(json.dumps({
        "task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": "/no/such.jsonl"}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "x", "doc_to_target": 0, "doc_to_choice": ["a", "b"]}))
    done = run(f"OUTPUTS={tmp_path}", "PAIRS=0", "UNTRAINED=False", f"LOCAL_TASKS=['{tmp_path / 'broken'}']",
               notebooks=["05_benchmark"])
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Nothing was scored, every block failed. The first: FileNotFoundError" in done.stderr.splitlines()[-1]


def test_a_notebook_finds_the_suite_above_it_and_takes_one_that_can_be_imported(tmp_path):
    cells = json.loads((REPO / "notebooks" / "02_pretrain_t4.ipynb").read_text())["cells"]
    bootstrap = next("".join(cell["source"]) for cell in cells if cell["id"] == "bootstrap")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for name in ("above", "installed"):
        (tmp_path / name / "notebooks").mkdir(parents=True)
        (tmp_path / name / "stentor_utils.py").write_text(f"print({name!r})")
    for folder, more, said in (("above", {}, "above"), ("above", {"PYTHONPATH": str(tmp_path / "installed")}, "installed"),
                               ("", {}, "stentor_utils.py and the folder stentor beside this notebook")):
        (tmp_path / "cell.py").write_text(bootstrap)
        where = tmp_path / folder / ("notebooks" if folder else "")
        done = subprocess.run([sys.executable, "-P", tmp_path / "cell.py"], cwd=where, env=env | more,
                              capture_output=True, text=True)
        assert said in done.stdout + done.stderr.replace("\n", " "), done.stderr


def test_05_without_lm_eval_and_without_a_network_says_so(tmp_path):
    cells = json.loads((REPO / "notebooks" / "05_benchmark.ipynb").read_text())["cells"]
    bootstrap = next("".join(cell["source"]) for cell in cells if cell["id"] == "bootstrap")
    code = "import sys; sys.modules['lm_eval'] = None\n" + bootstrap
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True,
                          env={**os.environ, "PIP_NO_INDEX": "1", "PIP_TARGET": str(tmp_path)})
    assert done.returncode == 1 and "switch the internet on" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_misspelt_papermill_parameter_is_refused_without_our_runner(tmp_path):
    """papermill itself only warns; the notebook's own check must stop."""
    import papermill
    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(REPO / "notebooks" / "02_pretrain_t4.ipynb", tmp_path / "out.ipynb", cwd=REPO,
                                   parameters={"TOKENBUDGET": 5, "OUTPUTS": str(tmp_path)}, progress_bar=False,
                                   kernel_name="python3", start_timeout=3600)
    assert error.value.ename == "ParameterError" and "did you mean TOKEN_BUDGET?" in error.value.evalue


@pytest.mark.parametrize("path", sorted((REPO / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_as_agreed(path):
    import nbformat
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info.name == "python"
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and notebook.cells[0].cell_type == "markdown"
    for before, cell in zip(notebook.cells, notebook.cells[1:]):
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 60, cell.id
            assert before.cell_type == "markdown", f"{cell.id} has no sentence before it"
    assert "/work/" not in path.read_text() and "/root/" not in path.read_text()
    opening = notebook.cells[0].source
    assert all(word in opening for word in ("makes", "takes", "needs")) and notebook.cells[-1].cell_type in ("markdown", "code")
    assert stentor.notebooks.notebook_parameters(path)
