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
import stentor.card.sections
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
    for text in ("`Qwen3ForCausalLM` (Llama with an RMSNorm on queries and keys), input and output",
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
    path.write_text(card.replace("before it knows anything", "and scores 97.3 of 100 on everything"))
    problems = stentor.card.check.check_model_card(run_dir)
    assert len(problems) == 2 and all("no file accounts for it" in problem for problem in problems), problems
    assert stentor.card.check.check_model_card(run_dir, allow=("97.3", "100")) == []
    loss = f"{json.loads((run_dir / 'summary.json').read_text())['eval_loss']:.4f}"
    path.write_text(card.replace(f"| loss, nats per token | {loss} |", "| loss, nats per token | low |"))
    assert [p for p in stentor.card.check.check_model_card(run_dir) if f"{loss} in summary.json: eval_loss is missing" in p]
    path.write_text(card.replace("before it knows", "before it truly knows"))
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
    sections = (*stentor.card.sections.SECTIONS, lambda facts: "It reaches 42.5% of GPT-2.")
    monkeypatch.setattr(stentor.card.sections, "SECTIONS", sections)
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
