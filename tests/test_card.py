"""The model card: every number has a file, and the check notices when one has not; publishing shows and scans what goes."""
import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import REPO

import stentor.card.check
import stentor.card.facts
import stentor.card.limitations
import stentor.card.template
import stentor.publish
import stentor_utils as su

TOKEN = "hf_" + "aB3" * 11 + "x"                       # the form of a token; belongs to nobody


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run folder as 01 and 02 leave it, by the real training loop."""
    run_dir = tmp_path_factory.mktemp("runs") / "demo"
    recipe = dataclasses.replace(tiny.recipe, name="stentor2-12m-cpu")
    su.train(recipe, su.TokenStore(tiny.store_dir, recipe), run_dir, tokenizer=tiny.tokenizer, say=lambda text: None)
    (run_dir / "run.json").write_text(json.dumps({"recipe": recipe.to_dict(), "store": "tokens", "tokenizer": "tokenizer"}))
    (run_dir / "environment.json").write_text(json.dumps(su.environment()))
    shutil.copytree(tiny.store_dir, run_dir / "tokens")
    (run_dir / "baseline.json").write_text('{"byte_bigram_bits_per_byte": 3.7684398}')
    (run_dir / "samples.json").write_text(json.dumps({"settings": su.GENERATION, "seed": 7, "samples": [
        {"prompt": "Call 911 | now", "text": "in 1984 ~~~ there were 12 | <b>"}]}))
    (run_dir / "benchmark").mkdir()
    (run_dir / "benchmark" / "model_index.json").write_text('{"model-index": [{"name": "demo", "results": []}]}')
    (run_dir / "benchmark" / "results.csv").write_text(
        "task,model,metric,score,low,high,chance,rank,n\n"
        "arc_easy,demo,acc_norm,0.31234,0.2915,0.3338,0.25,1–2,2376.0\n"
        "arc_easy,pythia-70m,acc_norm,0.35,0.33,0.37,0.25,1–2,2376.0\n"
        "gsm8k,demo,exact_match,0.01,0.002,0.02,,,1319.0\n")
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of it with its card written."""
    shutil.copytree(trained, tmp_path / "demo")
    su.write_model_card(tmp_path / "demo")
    return tmp_path / "demo"


def value_at(run_dir, figure):
    """The value a figure of model_card.json points to, read by other code than the card's; None for a derived one."""
    if not (run_dir / figure["file"]).is_file() or not figure["file"].endswith(".json"):
        return None
    value = json.loads((run_dir / figure["file"]).read_text())
    for key in figure["path"].split("."):
        if isinstance(value, list) and key.isdigit():
            key = int(key)
        elif not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def test_a_fresh_card_passes_and_its_numbers_are_those_of_the_files(run_dir):
    assert stentor.card.check.check_model_card(run_dir) == []
    card = (run_dir / "final" / "README.md").read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    for text in (f"| perplexity | {summary['perplexity']:,.2f} |", f"{summary['parameters']:,} parameters",
                 f"| bits per byte | {summary['bits_per_byte']:.4f} |", "Not selected:",
                 "| arc_easy | acc_norm | 2,376 | **this model** | 0.3123 [",
                 "| **learning_rate** | 0.004 | 0.0008 |", "Call 911 \\| now", "in 1984 ~~~ there were 12"):
        assert text in card, text
    figures = json.loads((run_dir / "model_card.json").read_text())["figures"]
    compared = 0
    for figure in figures:
        value = value_at(run_dir, figure)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and re.fullmatch(r"[\d,.]+%?", figure["text"]):
            shown = figure["text"].replace(",", "")
            digits = len(shown.rstrip("%").partition(".")[2])
            shown, unit = (float(shown.rstrip("%")) / 100, 100) if shown.endswith("%") else (float(shown), 1)
            assert abs(shown - value) <= 0.50001 * 10**-digits / unit or shown == float(f"{value:g}"), figure
            compared += 1
    assert compared > 60, "most figures are single values of files"


def test_a_tuned_run_is_held_against_the_published_recipe(tiny, tmp_path):
    """Its architecture, its parameters with QK-norm's, and its optimiser beside the card's."""
    recipe = dataclasses.replace(tiny.tuned, name="stentor2-12m-tuned-qk-cpu", token_budget=2 * 8 * 64)
    folder = tmp_path / "run"
    su.train(recipe, su.TokenStore(tiny.store_dir, recipe), folder, tokenizer=tiny.tokenizer, say=lambda text: None)
    (folder / "run.json").write_text(json.dumps({"recipe": recipe.to_dict(), "store": "tokens", "tokenizer": "tokenizer"}))
    card = su.write_model_card(folder).read_text()
    assert stentor.card.check.check_model_card(folder) == []
    for text in ("`Qwen3ForCausalLM`, input and output",
                 "| norms | 3 × 2 × 32 + 32 + 3 × 2 × 16 | 320 |", f"| **sum** | | **{su.count_parameters(recipe.shape):,}** |",
                 f"| **learning_rate** | {recipe.learning_rate:g} | 0.0008 |", "| **optimizer** | muon | none |",
                 "| **shape.qk_norm** | yes | no |"):
        assert text in card, text


def test_the_sums_in_the_card_are_right(run_dir):
    """Derived figures, computed here again."""
    figures = {figure["path"]: figure["text"] for figure in json.loads((run_dir / "model_card.json").read_text())["figures"]}
    summary = json.loads((run_dir / "summary.json").read_text())
    watts = 10 * os.cpu_count()
    assert float(figures["watts × seconds / 3,600,000"]) == pytest.approx(watts * summary["seconds"] / 3.6e6, rel=0.01)
    parts = [int(figures[f"parameter_budget(shape)[{part}]"].replace(",", ""))
             for part in ("embedding", "attention", "ffn", "norms")]
    assert sum(parts) == summary["parameters"] == int(figures["sum of the parts"].replace(",", ""))
    gain = figures["byte_bigram_bits_per_byte - bits_per_byte"]
    assert float(gain) == pytest.approx(3.7684398 - summary["bits_per_byte"], abs=6e-5)


def test_every_single_number_is_guarded(run_dir):
    """Each number of the card, changed in turn, is noticed; so is one typed in, and one left out."""
    path = run_dir / "final" / "README.md"
    card = path.read_text()
    numbers = list(stentor.card.facts.NUMBER.finditer(card))
    assert len(numbers) > 150
    for number in numbers[::12]:
        digit = re.search(r"\d", number.group()).start() + number.start()
        path.write_text(card[:digit] + str((int(card[digit]) + 1) % 10) + card[digit + 1:])
        found = stentor.card.check.check_model_card(run_dir)
        assert found and any(number.group() in problem for problem in found), number.group()
    path.write_text(card.replace("read the samples", "and scores 97.3 of 100 on everything"))
    problems = stentor.card.check.check_model_card(run_dir)
    assert len(problems) == 2 and all("no file accounts for it" in problem for problem in problems), problems
    assert stentor.card.check.check_model_card(run_dir, allow=("97.3", "100")) == []
    loss = f"{json.loads((run_dir / 'summary.json').read_text())['eval_loss']:.4f}"
    path.write_text(card.replace(f"| loss, nats per token | {loss} |", "| loss, nats per token | low |"))
    assert [p for p in stentor.card.check.check_model_card(run_dir) if f"{loss} in summary.json: eval_loss is missing" in p]
    path.write_text(card.replace("read the samples", "do read the samples"))
    assert stentor.card.check.check_model_card(run_dir) == [], "prose may be edited"


@pytest.mark.parametrize("file", ["summary.json", "run.json", "environment.json", "metrics.jsonl", "tokens/manifest.json",
                                  "baseline.json", "samples.json", "benchmark/results.csv", "final/model.safetensors"])
def test_a_changed_or_missing_input_is_noticed(run_dir, file):
    path = run_dir / file
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    assert f"{file} has changed since the card was written." in stentor.card.check.check_model_card(run_dir)
    path.unlink()
    assert f"{file} is gone since the card was written." in stentor.card.check.check_model_card(run_dir)
    path.write_bytes(content)
    assert stentor.card.check.check_model_card(run_dir) == []


def test_a_record_changed_together_with_the_card_is_noticed(run_dir):
    """model_card.json and README.md agree with each other, the hash too, but the files say something else."""
    loss = f"{json.loads((run_dir / 'summary.json').read_text())['eval_loss']:.4f}"
    for path in (run_dir / "final" / "README.md", run_dir / "model_card.json"):
        path.write_text(path.read_text().replace(loss, "1.2345"))
    problems = stentor.card.check.check_model_card(run_dir)
    assert any("1.2345 in the card" in problem and "summary.json: eval_loss" in problem for problem in problems), problems
    (run_dir / "model_card.json").unlink()
    assert "model_card.json cannot be read" in stentor.card.check.check_model_card(run_dir)[0]


def test_a_number_typed_into_our_own_prose_is_refused(run_dir, monkeypatch):
    sections = {"final": (*stentor.card.template.SECTIONS["final"], lambda facts: "It reaches 42.5% of GPT-2.")}
    monkeypatch.setattr(stentor.card.template, "SECTIONS", sections)
    stentor.card.check.write_model_card(run_dir)
    problems = stentor.card.check.check_model_card(run_dir)
    assert [problem.split()[0] for problem in problems] == ["42.5%", "GPT-2."]


def test_what_has_no_file_stands_as_not_measured(run_dir):
    kept = {"summary.json", "final"}
    for path in run_dir.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    card = su.write_model_card(run_dir).read_text()
    assert stentor.card.check.check_model_card(run_dir) == []
    for text in ("| bits per byte of a byte bigram model, same text | not measured |", "Benchmark scores: not measured.",
                 "Hyperparameters: not measured.", "| layers | not measured |", "| energy, estimated | not measured kWh |",
                 "Sampled outputs: not measured.", "Tokens per source: not measured."):
        assert text in card, text
    (run_dir / "summary.json").write_text('{"eval_loss": NaN, "perplexity": "high", "parameters": null}')
    card = su.write_model_card(run_dir).read_text()
    assert stentor.card.check.check_model_card(run_dir) == []
    assert "| perplexity | not measured |" in card and "nan" not in card.lower()


def test_the_instruct_version_and_its_probe_are_in_the_card(run_dir):
    from test_charts import write_scores
    shutil.rmtree(run_dir / "benchmark")
    write_scores(run_dir)
    card = su.write_model_card(run_dir).read_text()
    assert stentor.card.check.check_model_card(run_dir) == []
    phases = json.loads((run_dir / "instruct/sft_summary.json").read_text())["phases"]
    main = next(phase for phase in phases[3:] if phase["phase"] == "main")          # of the delivered recipe, "better"
    assert re.search(rf"\| main \| 9 \| 4 \| [\d.]+ \| {main['loss_after']:.4f} \|", card)
    assert "| benign helped | 25.0% [10.0%, 40.0%] | 50.0% [35.0%, 65.0%] |" in card and "sampled" not in card
    path = run_dir / "instruct/probe.json"
    path.write_text(path.read_text().replace("0.625", "0.626"))
    assert any("62.6%" in problem for problem in stentor.card.check.check_model_card(run_dir))


def test_cut_contexts_ties_and_unchecked_items_are_in_the_card(run_dir):
    (run_dir / "benchmark" / "results.csv").write_text(
        "task,model,metric,score,low,high,chance,rank,n,requests,truncated,ties\n"
        "mmlu,demo,acc,0.25,0.21,0.3,0.25,,200.0,800.0,288.0,0.0\nblimp,peer,acc,0.6,0.5,0.7,0.5,,67000.0,,,1234.0\n")
    (run_dir / "benchmark" / "contamination.json").write_text(json.dumps({"ngram": 13, "tasks": {
        "mmlu": {"items": 200, "items_checked": 150, "contaminated": 3, "short_checked": 40, "short_found": 2}}}))
    card = su.write_model_card(run_dir).read_text()
    assert stentor.card.check.check_model_card(run_dir) == []
    assert "mmlu of demo: 288 of 800 requests were longer than the model" in card
    assert "blimp of peer: in 1,234 of 67,000 items the best choices tie" in card and "mmlu of demo: in" not in card
    assert "2 stand in it whole; 10 are too short to be checked" in card


def test_an_own_recipe_is_held_against_nothing(run_dir):
    path = run_dir / "run.json"
    run = json.loads(path.read_text())
    for name, recipe in (("mine", run["recipe"]), ("stentor2-12m", {**run["recipe"], "a_new_field": 3})):
        path.write_text(json.dumps({**run, "recipe": {**recipe, "name": name}}))
        card = su.write_model_card(run_dir).read_text()
        assert stentor.card.check.check_model_card(run_dir) == []
        assert "There is no published recipe of this name" in card and "| learning_rate | 0.004 | no published figure |" in card


def test_metadata_parses_and_the_folder_still_loads(run_dir):
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM
    data = ModelCard.load(run_dir / "final" / "README.md").data
    summary = json.loads((run_dir / "summary.json").read_text())
    scores = {(result.dataset_name, result.metric_type): result for result in data.eval_results}
    assert data.license == "apache-2.0" and data.library_name == "transformers" and data.model_name == "demo"
    assert scores["held-out documents of the training sources", "perplexity"].metric_value == round(summary["perplexity"], 4)
    arc = scores["arc_easy", "acc_norm"]
    assert arc.metric_value == 0.3123 and arc.metric_args == {"low": 0.2915, "high": 0.3338, "n": 2376}
    assert AutoModelForCausalLM.from_pretrained(run_dir / "final").num_parameters() == summary["parameters"]


def test_limitations_are_measured_on_held_out_text(run_dir, tiny):
    starts = stentor.card.limitations.held_out_starts(run_dir, 3, 5)
    text = json.loads((tiny.folder / "topics.jsonl").read_text().splitlines()[0])["text"]
    assert len(starts) == 3 and text.startswith(tiny.tokenizer.decode(starts[0])[:12].strip("\x7f "))
    found = stentor.card.limitations.measure_limitations(run_dir, count=4, max_new_tokens=12)
    assert found["n"] == len(found["texts"]) == 4
    assert found["stopped"]["low"] <= found["stopped"]["share"] <= found["stopped"]["high"]
    problems = stentor.card.check.check_model_card(run_dir)
    assert problems, "a file that has come since makes the card out of date"
    assert "4 continuations of 16 held-out tokens" in su.write_model_card(run_dir).read_text()
    assert stentor.card.check.check_model_card(run_dir) == []


def test_a_dry_run_lists_exactly_what_would_go_and_finds_secrets(run_dir, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    final = run_dir / "final"
    (final / ".cache").mkdir()
    (final / ".cache" / "x.json").write_text("{}")
    (final / "optimizer.pt").write_bytes(b"x")
    (final / "link.json").symlink_to("/etc/hostname")
    lines = stentor.publish.publish(run_dir, "me/demo")
    listed = {line.split()[0] for line in lines if line.startswith("  ") and "left out" not in line}
    assert listed == {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()} - {
        ".cache/x.json", "optimizer.pt", "link.json"}
    assert sum("left out" in line for line in lines) == 3 and lines[-1] == "nothing was uploaded: a dry run"
    assert not any(line.startswith("wrong") for line in lines)
    for content, kind in ((TOKEN, "a Hugging Face token"), (TOKEN, "the token itself"),
                          ("correct-horse-battery", "$MY_API_KEY"), ("-----BEGIN RSA " + "PRIVATE KEY-----", "a private key"),
                          ('"key": "' + "0f" * 16 + '"', "a Kaggle key")):
        (final / "notes.txt").write_text(f"remember {content}\n")
        said = "\n".join(stentor.publish.publish(run_dir, "me/demo"))
        assert f"wrong: a secret would be uploaded: notes.txt: {'the value of ' * kind.startswith('$')}{kind}" in said
        assert content not in said, "the report must not repeat the secret"
        with pytest.raises(su.ParameterError, match="a secret would be uploaded"):
            stentor.publish.publish(run_dir, "me/demo", dry_run=False, endpoint="http://127.0.0.1:9")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files needs."""
    private, requests, files = True, [], {}

    def log_message(self, *_):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append((self.command, self.path, self.headers.get("Authorization")))
        found, here = {}, f"http://127.0.0.1:{self.server.server_port}/me/demo"
        if self.path == "/api/repos/create":
            found = {"url": here}
            self.requests[-1] += (json.loads(body),)
        elif "/preupload/" in self.path:
            found = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                               for file in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{here}/commit/" + "0" * 40}
        elif self.path.startswith("/api/models/me/demo"):
            found = {"id": "me/demo", "private": self.private, "sha": "0" * 40, "siblings": [], "tags": []}
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer


@pytest.mark.parametrize("private", [True, False])
def test_upload_goes_to_a_private_repository_only(run_dir, private):
    """Over the loopback, in a process of its own: this one is offline."""
    class Server(Hub):
        requests, files = [], {}
    Server.private = private
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    code = ("import sys, stentor.publish\n"
            "print('\\n'.join(stentor.publish.publish(sys.argv[1], 'me/demo', dry_run=False, endpoint=sys.argv[2])))")
    env = {**os.environ, "HF_TOKEN": TOKEN, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code, str(run_dir), endpoint], cwd=REPO, env=env, capture_output=True,
                          text=True)
    server.shutdown()
    create = next(request for request in Server.requests if request[1] == "/api/repos/create")
    assert create[3].get("visibility") == "private" or create[3].get("private") is True      # huggingface_hub 2 or 1
    assert create[2] == f"Bearer {TOKEN}"
    assert TOKEN not in done.stdout + done.stderr
    if private:
        assert done.returncode == 0, done.stderr[-1500:]
        final = run_dir / "final"
        assert Server.files == {path.relative_to(final).as_posix(): path.read_bytes()
                                for path in final.rglob("*") if path.is_file()}
    else:
        assert done.returncode != 0 and "exists and is public" in done.stderr and not Server.files


def test_no_model_no_card(tmp_path):
    with pytest.raises(su.ParameterError, match="train a model there first"):
        su.write_model_card(tmp_path)
    assert stentor.card.check.check_model_card(tmp_path)[0].startswith("final/README.md or model_card.json cannot be read")
    assert Path(stentor.card.__file__).parents[2] == REPO


def write_made(run_dir, of):
    """The run's model as 04, 07 or 08 would leave it, with their files about it."""
    summary = json.loads((run_dir / "summary.json").read_text())
    recipe = json.loads((run_dir / "run.json").read_text())["recipe"]
    share = {"hits": 3, "n": 12, **su.statistics.proportion(3, 12)}
    folder = run_dir / of
    if of == "instruct":
        phases = [{"recipe": "better", "seed": seed, "phase": "main", "number": 1, "examples": 9, "steps": 4,
                   "seconds": 30.5, "loss_before": 5.1, "loss_after": 4.9} for seed in (0, 1)]
        metrics = "".join(json.dumps({"kind": "eval", "step": step, "loss": loss}) + "\n"
                          for step, loss in ((0, 5.1), (4, 4.9)))
        scores = {"35 prompts, greedy": {"benign helped": share, "degenerate": share, "stops by itself": share}}
        answers = [{"decoding": "greedy", "kind": kind, "prompt": f"Why {n}?", "label": "help", "answer": f"Because {n} | it."}
                   for n, kind in enumerate(("harmful", "benign"), 7)]
        folder.mkdir()
        (folder / "sft_summary.json").write_text(json.dumps({
            "base": "/home/me/base", "deliver": "better", "seeds": [0, 1], "profile": "cpu", "system": "Be kind to all 5.",
            "phases": phases, "parameters": summary["parameters"], "trainable_parameters": 1234, "examples": 93,
            "stopping": {"base": share}}))
        (folder / "sft_metrics-better-phase1.jsonl").write_text(metrics)
        (folder / "probe.json").write_text(json.dumps({"models": {
            name: {"scores": scores, "answers": answers} for name in ("base", "better-0")}}))
    elif of == "growth":
        folder.mkdir()
        texts = [{"after": n, "text of stage 1": 2.5 - n / 8, "text of stage 2": 2.75 - n / 8} for n in range(3)]
        (folder / "curriculum.json").write_text(json.dumps({
            "stages": [recipe, recipe], "summaries": [summary, summary], "bits_per_byte": texts}))
        (folder / "payoff.json").write_text(json.dumps({"verdict": {"sentence": "grown reached it at 61% | no."}}))
        (folder / "master_test.json").write_text(json.dumps({"summary": [
            {"category": category, "model": "base 1", "on topic": share} for category in ("all", "maths")]}))
        (folder / "stage1").mkdir()
        shutil.copy(run_dir / "environment.json", folder / "stage1")
    else:
        folder.mkdir()
        (folder / "export.json").write_text(json.dumps({"source": "final", "formats": [
            {"format": "gguf q8_0", "file": "model-q8_0.gguf", "bytes": 1_234_567, "loss": 4.5678},
            {"format": "onnx", "file": "onnx/model.onnx", "bytes": 7_654_321}]}))
        (folder / "model-q8_0.gguf").write_bytes(b"GGUF")
        return folder
    shutil.copytree(run_dir / "final", folder / "final")
    return folder / "final"


@pytest.mark.parametrize("of", ["instruct", "growth", "export"])
def test_what_was_made_of_a_model_has_a_card_and_a_dry_run_of_its_own(run_dir, of):
    from huggingface_hub import ModelCard
    before = (run_dir / "final" / "README.md").read_bytes()
    folder = write_made(run_dir, of)
    assert of in su.described_models(run_dir)
    path = su.write_model_card(run_dir, of=of, base_model="me/base 1", authors=("A. 2",))
    assert path == folder / "README.md" and (run_dir / "final" / "README.md").read_bytes() == before
    assert su.check_model_card(run_dir, of=of) == []
    card, data = path.read_text(), ModelCard.load(path).data.to_dict()
    assert data["base_model"] == "me/base 1" and data["model_card_authors"] == ["A. 2"] and "stentor" in data["tags"]
    summary = json.loads((run_dir / "summary.json").read_text())
    for text in {"instruct": ["| main | 9 | 4 |", "in `base`:", "Why 8?", "Because 8 | it.", "25.0% [", "1,234 trainable",
                              "| training time | 30s |"],
                 "growth": [f"{2 * summary['tokens']:,} tokens more", "| 2 | 2.2500 | 2.5000 |", "61% \\| no.",
                            "| base 1 | 25.0% ["],
                 "export": ["| gguf q8_0 | model-q8_0.gguf | 1,234,567 | 4.5678 |",
                            "| onnx | onnx/model.onnx | 7,654,321 |"]}[of]:
        assert text in card, text
    assert "repetition_penalty=" not in card, "the samples are of final/: their settings are not this model's"
    for number in list(stentor.card.facts.NUMBER.finditer(card))[::9]:
        digit = re.search(r"\d", number.group()).start() + number.start()
        path.write_text(card[:digit] + str((int(card[digit]) + 1) % 10) + card[digit + 1:])
        assert any(number.group() in problem for problem in su.check_model_card(run_dir, of=of)), number.group()
    path.write_text(card)
    lines = su.publish(run_dir, "me/made", of=of)
    assert not [line for line in lines if line.startswith("wrong")] and any("README.md" in line for line in lines)
    assert any(name in " ".join(lines) for name in ("model.safetensors", "model-q8_0.gguf"))
    with pytest.raises(su.ParameterError, match="a card can be of"):
        su.write_model_card(run_dir, of="finals")


NEW_SECTIONS = ("Recommended settings", "Memory to run it", "Hardware, time, energy", "Comparable models")


def test_a_changed_number_is_noticed_in_each_new_section(run_dir):
    path = run_dir / "final" / "README.md"
    card = path.read_text()
    for title in NEW_SECTIONS:
        start = card.index(f"## {title}")
        for number in list(stentor.card.facts.NUMBER.finditer(card, start, card.index("\n## ", start)))[:3]:
            digit = re.search(r"\d", number.group()).start() + number.start()
            path.write_text(card[:digit] + str((int(card[digit]) + 1) % 10) + card[digit + 1:])
            assert any(number.group() in problem for problem in su.check_model_card(run_dir)), (title, number.group())
    for title in ("Intended uses", "Out of scope", "Risks and ethics"):
        start = card.index(f"## {title}")
        section = card[start:card.index("\n## ", start)]
        assert len(section) > 300 and not stentor.card.facts.NUMBER.search(section), "written text, no figure typed"


def test_memory_is_what_the_published_models_really_take():
    """The true values of the cards' claims (spec to build, part 4), MB; and a model's own tensors."""
    for name, precision, true in (("stentor2-12m-preview", "fp32", 49.2), ("stentor2-12m-preview", "fp16 or bf16", 24.6),
                                  ("stentor3-20m", "fp32", 81.3), ("stentor3-20m", "fp16 or bf16", 40.6),
                                  ("stentor3-20m", "8-bit", 22.9), ("stentor3-20m", "4-bit", 15.2),
                                  ("stentor-12m", "8-bit", 18.3), ("stentor-12m", "4-bit", 15.8)):
        assert su.weight_bytes(su.RECIPES[name].shape, precision) / 1e6 == pytest.approx(true, abs=0.07), (name, precision)
    shape = su.RECIPES["stentor3-20m"].scaled_to("cpu").shape
    model = su.build_model(shape)
    tensors = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    assert sum(tensors.values()) == su.weight_bytes(shape, "fp32")
    assert su.kv_cache_bytes(su.RECIPES["stentor3-20m"].shape, 4096, 4) / 1e6 == pytest.approx(25.2, abs=0.05)


def test_the_card_praises_no_more_than_was_measured(run_dir):
    """Noise is called noise, and a model worse than counting bytes is said to have learned nothing."""
    opening = (run_dir / "final" / "README.md").read_text().split("## ")[0]
    assert "What its own texts are like was not measured" in opening and "fluent" not in opening
    share = {"share": 0.75, "low": 0.5, "high": 0.9}
    (run_dir / "limitations.json").write_text(json.dumps({"n": 4, "repetitive": share, "replacement": share}))
    (run_dir / "baseline.json").write_text('{"byte_bigram_bits_per_byte": 0.5}')
    opening = su.write_model_card(run_dir).read_text().split("## ")[0]
    assert "Most of what it writes is noise." in opening and "learned next to nothing" in opening
    assert su.check_model_card(run_dir) == []


def test_energy_and_carbon_are_estimates_with_their_assumptions_printed(run_dir):
    su.write_model_card(run_dir, watts=140, grams_per_kwh=500)
    card = (run_dir / "final" / "README.md").read_text()
    seconds = json.loads((run_dir / "summary.json").read_text())["seconds"]
    grams = float(re.search(r"carbon dioxide equivalent, estimated \| (\S+) g", card).group(1))
    assert grams == pytest.approx(140 * seconds / 3.6e6 * 500, rel=0.01)
    assert "no meter's reading" in card and "assumed\n500 g for a kWh (as given)" in card
    assert "143 g for a kWh (what the Stentor-12M-Instruct card's 8 g" in su.write_model_card(run_dir).read_text()
