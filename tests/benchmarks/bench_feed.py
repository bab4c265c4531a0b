"""What the data path sustains: documents read, cleaned, tokenised, packed and written, in tokens per second.

    python tests/benchmarks/bench_feed.py [million tokens a source]

One and two worker processes fill stores of the embedded prose, code and mathematics, as training's workers do (start-up not
counted); a batch reader is timed too. From the slowest source follows how many cores would feed 304,000 tokens/s (the
Stentor3 card's rate, published) and 1,000,000. Writes outputs/benchmarks/feed.json and prints it; never fails on a number.
"""
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("STENTOR_VOCABS", str(ROOT.parent / "shared" / "tokenmonster" / "vocabs"))

import stentor.growing  # noqa: E402
import stentor_utils as su  # noqa: E402
import tokenmonster_hf as tm  # noqa: E402

MIX = {"prose": 0.75, "code": 0.15, "math": 0.10}


def fill(kind: str, wanted: int, folder: str, vocabulary: str, results) -> None:
    """One worker: fill a store of `wanted` tokens, report (tokens, seconds, CPU seconds)."""
    tokenizer = tm.TokenMonsterTokenizer.from_vocabulary(tm.Vocabulary.from_file(vocabulary))
    su.encode_documents(tokenizer, ["compiled before the clock starts"] * 2)
    source = su.Source(kind, f"local:{kind}", preserve_linebreaks=kind == "code")
    started, cpu = time.perf_counter(), time.process_time()
    su.prepare_tokens([source], tokenizer, folder, tokens_per_source={kind: wanted}, validation_documents=10,
                      shard_tokens=1 << 18, progress=lambda text: None)
    tokens = json.loads((Path(folder) / "manifest.json").read_text())["sources"][kind]["tokens"]
    results.put((kind, tokens, time.perf_counter() - started, time.process_time() - cpu))


def measure(kinds: list[str], wanted: int, vocabulary: str) -> list[tuple]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=fill, args=(kind, wanted, f"{folder}/{i}", vocabulary, results))
                   for i, kind in enumerate(kinds)]
        for worker in workers:
            worker.start()
        found = [results.get(timeout=300) for _ in workers]
        for worker in workers:
            worker.join()
    return found


def main() -> None:
    wanted = int(float(sys.argv[1] if len(sys.argv) > 1 else 1) * 1e6)
    for kind in MIX:
        su.local_corpus(kind)
    with tempfile.TemporaryDirectory() as folder:
        words = {f" {word}".encode() for text, _, _ in su.clean_documents(su.Source("prose", "local:prose"))
                 if text for word in text[:400].split() if word.isalpha()}
        vocabulary = f"{folder}/words.vocab"
        try:
            vocabulary = str(su.find_vocabulary("english-4096-strict-nocapcode-v1"))
            name = "english-4096-strict-nocapcode-v1"
        except su.ParameterError:
            tm.Vocabulary.from_tokens(sorted(words)[:3800], capcode=0, include="all256").save(vocabulary)
            name = "4,056 words of the prose (the released vocabulary is not at hand; shorter tokens, so more of them)"
        rows = []
        for kind in MIX:
            (_, tokens, wall, cpu), = measure([kind], wanted, vocabulary)
            rows.append({"source": kind, "workers": 1, "tokens": tokens, "tokens_per_second": tokens / wall,
                         "tokens_per_cpu_second": tokens / cpu})
        both = measure(["prose", "prose"], wanted, vocabulary)
        rows.append({"source": "prose", "workers": 2, "tokens": sum(row[1] for row in both),
                     "tokens_per_second": sum(row[1] for row in both) / max(row[2] for row in both),
                     "tokens_per_cpu_second": sum(row[1] for row in both) / sum(row[3] for row in both)})
        # the reader: batches of the production shape out of a full store
        recipe = dataclasses.replace(su.RECIPES["stentor3-20m"], sources=(su.Source("prose", "local:prose"),),
                                     anneal_weights=None, token_budget=4 * 262_144, max_eval_samples=10)
        tokenizer = tm.TokenMonsterTokenizer.from_vocabulary(tm.Vocabulary.from_file(vocabulary))
        stentor.growing.fill_source(recipe, tokenizer, Path(folder) / "tokens", "prose", shard_tokens=1 << 18)
        store = su.GrowingStore(Path(folder) / "tokens", recipe, 1 << 18)
        started = time.perf_counter()
        for step in range(recipe.total_steps):
            store.batch(step)
        reader = recipe.total_tokens / (time.perf_counter() - started)
    cost = sum(share / row["tokens_per_cpu_second"] for share, row in zip(MIX.values(), rows))      # CPU seconds a token
    result = {"vocabulary": name, "cores": os.cpu_count(), "rows": rows, "reader_tokens_per_second": reader,
              "mixture_tokens_per_cpu_second": 1 / cost, "cores_for_304000": 304_000 * cost, "cores_for_1000000": 1e6 * cost,
              "one_worker_a_source_tokens_per_second": min(row["tokens_per_cpu_second"] / share
                                                           for share, row in zip(MIX.values(), rows))}
    folder = ROOT / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "feed.json").write_text(json.dumps(result, indent=1))
    print(f"vocabulary: {name}; {result['cores']} cores")
    for row in rows:
        print(f"{row['source']:6} {row['workers']} worker(s): {row['tokens_per_second']:>11,.0f} tokens/s, "
              f"{row['tokens_per_cpu_second']:>11,.0f} a CPU second")
    print(f"75/15/10 mixture: {1 / cost:,.0f} tokens a CPU second; one worker a source, a core each: "
          f"{result['one_worker_a_source_tokens_per_second']:,.0f} tokens/s")
    print(f"cores for 304,000 tokens/s (card): {result['cores_for_304000']:.2f}; for 1,000,000: "
          f"{result['cores_for_1000000']:.2f}; batches read back: {reader:,.0f} tokens/s")


if __name__ == "__main__":
    main()
