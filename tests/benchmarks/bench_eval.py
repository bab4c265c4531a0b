"""Items a second against lm-eval's command line with its defaults, and all of BLiMP against plain PyTorch.

    python tests/benchmarks/bench_eval.py [rounds]

Three tasks in lm-eval's own YAML form (HellaSwag-shaped, ARC-shaped, minimal pairs), made of Python's documentation, whole
processes by turns: ours, theirs, ours, theirs. Model: outputs/demo/final, else the CPU twin's shape with random weights.
The command line is told our prefix token (EOS), so that the same is computed. Writes outputs/benchmarks/eval.json and .md.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
os.environ["TQDM_DISABLE"] = "1"                      # read when tqdm is imported
THEIRS = {**os.environ, "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("GOMP_SPINCOUNT", "2000")       # as `launch` starts ours; before torch is imported

import numpy as np                                    # noqa: E402
import torch                                          # noqa: E402
from test_eval import hellaswag_items, write_jsonl    # noqa: E402

from stentor import benchmark                         # noqa: E402
import stentor_utils as su                            # noqa: E402

SHARED = Path(os.environ.get("STENTOR_SHARED", REPO.parent / "shared"))


def a_model(folder: Path) -> Path:
    final = REPO / "outputs" / "demo" / "final"
    if (final / "config.json").is_file():
        return final
    import tokenmonster_hf as tm
    words = sorted({f" {word}".encode() for line in sentences() for word in line.split() if word.isalpha()})
    tokenizer = tm.TokenMonsterTokenizer.from_vocabulary(tm.Vocabulary.from_tokens(words[:3000], capcode=0, include="all256"))
    shape = su.RECIPES["stentor2-12m"].scaled_to("cpu").shape
    import dataclasses
    model = su.build_model(dataclasses.replace(shape, vocab_size=len(tokenizer)), eos_token_id=tokenizer.eos_token_id)
    su.save_model_folder(model, tokenizer, folder / "model")
    return folder / "model"


def sentences() -> list[str]:
    from pydoc_data.topics import topics
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    return [sentence for sentence in text.split(". ") if 60 < len(sentence) < 300 and sentence.isascii()]


def make_tasks(folder: Path, items: int) -> Path:
    lines = sentences()
    swag = [{**item, "ctx": f"{lines[-1 - i % 100]}. {item['ctx']}"} for i, item in enumerate(hellaswag_items(lines, items))]
    arc = [{"ctx": f"Question: {lines[i % len(lines)]}?\nAnswer:", "choices": [
        " ".join(lines[(i * 7 + k) % len(lines)].split()[:4]) for k in range(4)], "label": i % 4} for i in range(items)]
    pairs = [{"ctx": "", "choices": [line, " ".join(line.split()[::-1])], "label": 0} for line in lines[:items]]
    out = folder / "yaml"
    for name, rows in (("swag", swag), ("arc", arc), ("pairs", pairs)):
        write_jsonl(folder / "data" / f"{name}.jsonl", rows)
        out.mkdir(exist_ok=True)
        (out / f"{name}.yaml").write_text(json.dumps({
            "task": f"bench_{name}", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data" / f"{name}.jsonl")}}, "doc_to_text": "{{ctx}}",
            "doc_to_choice": "choices", "doc_to_target": "label", "metadata": {"version": 1.0}}))
    return out


def run_ours(model: Path, yaml: Path, folder: Path) -> dict:
    config = {"models": {"m": str(model)}, "blocks": {"b": {"title": "b", "local": str(yaml)}}, "dtype": "float32"}
    benchmark.run.launch(config, folder, say=lambda text: None)
    tasks = json.loads((folder / "m" / "b.json").read_text())["tasks"]
    return {name: np.array(task["loglikelihoods"]) for name, task in tasks.items()} | {
        "merged": sum(task["merged"] for task in tasks.values())}


def run_theirs(model: Path, yaml: Path, folder: Path, eos: int) -> dict:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--include_path", str(yaml),
               "--model_args", f"pretrained={model},trust_remote_code=True,prefix_token_id={eos}",
               "--tasks", "bench_swag,bench_arc,bench_pairs", "--output_path", str(folder), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, env=THEIRS)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    out = {}
    for path in folder.rglob("samples_*.jsonl"):
        rows = sorted((json.loads(line) for line in open(path)), key=lambda row: row["doc_id"])
        out[path.name.split("samples_")[1].rsplit("_", 1)[0]] = np.array(
            [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows])
    return out


def speed(rounds: int, items: int = 250) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = a_model(folder)
        yaml = make_tasks(folder, items)
        tokenizer = su.load_tokenizer(model)
        seconds = {"ours": [], "theirs": []}
        for number in range(rounds):
            for who in ("ours", "theirs"):
                began = time.monotonic()
                if who == "ours":
                    mine = run_ours(model, yaml, folder / f"ours{number}")
                else:
                    theirs = run_theirs(model, yaml, folder / f"theirs{number}", tokenizer.eos_token_id)
                seconds[who].append(time.monotonic() - began)
                print(f"round {number + 1}: {who} {seconds[who][-1]:.1f} s", flush=True)
        differ = {name: int((np.abs(mine[name] - theirs[name]) > 1e-3).sum()) for name in theirs}
        total = {name: mine[name].size for name in theirs}
        n = sum(len(mine[name]) for name in theirs)
        return {"items": n, "seconds": seconds, "requests": total, "differ": differ, "merged": mine["merged"],
                "ratio": statistics.median(t / o for t, o in zip(seconds["theirs"], seconds["ours"])),
                "items_per_second": {who: n / statistics.median(values) for who, values in seconds.items()}}


def blimp() -> dict | None:
    """All 67,000 pairs: ours against plain forward passes over sentences of equal length, without padding or sharing."""
    if not (SHARED / "data" / "blimp").is_dir():
        return None
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = benchmark.run.load_scored(str(a_model(Path(folder))), "float32", torch.device("cpu"))
    began = time.monotonic()
    result = benchmark.scoring.evaluate_block(benchmark.lm.StentorLM(model, tokenizer), {"local": SHARED / "data" / "blimp"})
    seconds = time.monotonic() - began
    texts, mine = [], []
    for name, task in result["tasks"].items():
        docs = [json.loads(line) for line in open(SHARED / "data" / "blimp" / f"{name.partition('/')[2]}.jsonl")]
        for doc, scores in zip(task["doc_ids"], task["loglikelihoods"]):
            texts += [docs[doc]["sentence_good"], docs[doc]["sentence_bad"]]
            mine += scores
    ids, offsets = su.encode_documents(tokenizer, texts)
    rows = [[tokenizer.eos_token_id, *ids[a:b].tolist()] for a, b in zip(offsets, offsets[1:])]
    direct = np.zeros(len(rows))
    lengths = np.array([len(row) for row in rows])
    with torch.inference_mode():
        for length in np.unique(lengths):
            for part in np.array_split(where := np.flatnonzero(lengths == length), -(-len(where) // 64)):
                ids = torch.tensor([rows[i] for i in part])
                logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
                direct[part] = logprobs.double().sum(1).numpy()
    mine = np.array(mine)
    right, right_direct = (values[0::2] > values[1::2] for values in (mine, direct))
    return {"pairs": len(right), "seconds": seconds, "pairs_per_second": len(right) / seconds,
            "accuracy": float(right.mean()), "largest_difference": float(np.abs(mine - direct).max()),
            "decisions_that_differ": int((right != right_direct).sum())}


def write(report: dict) -> None:
    s, b = report["speed"], report["blimp"]
    lines = [f"Benchmark speed on {s['items']:,} multiple-choice items, whole processes by turns:", "",
             "| | items/s | log-likelihoods that differ |", "|---|---|---|",
             f"| `python -m lm_eval` with its defaults | {s['items_per_second']['theirs']:.1f} | |",
             f"| 05_benchmark | {s['items_per_second']['ours']:.1f} ({s['ratio']:.1f}x) | {sum(s['differ'].values())} of "
             f"{sum(s['requests'].values()):,}; {s['merged']} of them have tokens across the join |"]
    if b:
        lines += ["", f"BLiMP, all {b['pairs']:,} pairs: accuracy {b['accuracy']:.4f} in {b['seconds']:.0f} s; against "
                  f"plain PyTorch the largest difference is {b['largest_difference']:.1e} nats, and "
                  f"{b['decisions_that_differ']} decisions differ."]
    out = REPO / "outputs" / "benchmarks"
    out.mkdir(parents=True, exist_ok=True)
    su.write_atomically(out / "eval.json", json.dumps(report, indent=1))
    su.write_atomically(out / "eval.md", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def main() -> None:
    report = {"speed": speed(int(sys.argv[1]) if len(sys.argv) > 1 else 2), "blimp": None}
    write(report)                                     # BLiMP takes minutes
    write({**report, "blimp": blimp()})


if __name__ == "__main__":
    main()
