"""The vocabulary argument: the BPE recipe's twin against the TokenMonster one, in bits per byte of the same text.

    python tests/benchmarks/bench_bpe.py [--seeds 42 43 44] [--token_budget 4000000]

Stentor-12M spends 52% of its parameters on a 32k vocabulary, Stentor2-12M 17% on one of 8k. Their CPU twins have as many
parameters as each other, an 8,192-token BPE against a 4,096-token TokenMonster vocabulary. Both are made by 01 and trained by
02 on the same text for as many tokens, several seeds each. A finished run in outputs/vocabularies is not repeated.
Writes outputs/benchmarks/bpe.json and .md.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import stentor.notebooks  # noqa: E402
import stentor_utils as su  # noqa: E402

KINDS = {"BPE": ("bpe", "stentor-12m"), "TokenMonster": ("tokenmonster", "stentor2-12m")}      # folder, recipe


def figures(kind: str, seed: int, token_budget: int) -> dict:
    """What 02 measured on the saved model; trains it first if that has not been done."""
    name, recipe = KINDS[kind]
    run = ROOT / "outputs" / "vocabularies" / f"{name}-{seed}"
    tokenizer = run.with_name(f"{name}-{min_seed}") / "tokenizer"               # made once, for all seeds
    given = {"PROFILE": "cpu", "OUTPUTS": str(run.parent), "RUN": run.name, "RECIPE": recipe}
    if not (tokenizer / "tokenizer_config.json").is_file():
        stentor.notebooks.run_notebooks(["01_tokenizer"], {**given, "VOCABULARY": "bpe" if name == "bpe" else "auto"})
    if not (run / "summary.json").is_file() or json.loads((run / "summary.json").read_text())["stopped"]:
        stentor.notebooks.run_notebooks(["02_pretrain_t4"], {
            **given, "SEED": seed, "TOKENIZER": str(tokenizer), "TOKEN_BUDGET": token_budget, "TORCH_COMPILE": True,
            "OVERRIDES": {"attn_implementation": "eager"}})
    summary = json.loads((run / "summary.json").read_text())
    entries = json.loads((run / "tokens" / "manifest.json").read_text())["sources"].values()
    budget = su.parameter_budget(su.Recipe.from_dict(json.loads((run / "run.json").read_text())["recipe"]).shape)
    return {"parameters": summary["parameters"], "embedding": budget["embedding"] / summary["parameters"],
            "tokens": summary["tokens"], "bits_per_byte": summary["bits_per_byte"],
            "bytes_per_token": sum(e["bytes"] for e in entries) / sum(e["tokens"] for e in entries),
            "bigram": json.loads((run / "baseline.json").read_text())["byte_bigram_bits_per_byte"]}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments.add_argument("--token_budget", type=int, default=4_000_000)
    asked = arguments.parse_args()
    min_seed = min(asked.seeds)
    found = {kind: {seed: figures(kind, seed, asked.token_budget) for seed in sorted(asked.seeds)} for kind in KINDS}
    rows = []
    for kind, runs in found.items():
        first, bits = runs[min_seed], [run["bits_per_byte"] for run in runs.values()]
        rows.append(f"| {kind} | {first['parameters']:,} | {first['embedding']:.0%} | {first['bytes_per_token']:.3f} | "
                    f"{statistics.mean(bits):.4f} | {', '.join(f'{value:.4f}' for value in bits)} |")
    difference = [found["BPE"][seed]["bits_per_byte"] - found["TokenMonster"][seed]["bits_per_byte"] for seed in found["BPE"]]
    error = statistics.stdev(difference) / len(difference) ** 0.5 if len(difference) > 1 else float("nan")
    same = {run["bigram"] for runs in found.values() for run in runs.values()}
    text = "\n".join([
        f"BPE against TokenMonster, {first['tokens']:,} tokens each, the same text and nearly the same number of parameters "
        f"(byte bigram: {', '.join(f'{value:.4f}' for value in sorted(same))}):", "",
        "| vocabulary | parameters | of them embedding | bytes per token | bits per byte, mean | each seed |",
        "|---|---|---|---|---|---|", *rows, "",
        f"BPE less TokenMonster, seed by seed: {statistics.mean(difference):+.4f} bits per byte, standard error {error:.4f} "
        f"({len(difference)} seeds)."]) + "\n"
    out = ROOT / "outputs" / "benchmarks"
    out.mkdir(parents=True, exist_ok=True)
    su.write_atomically(out / "bpe.json", json.dumps(
        {"runs": found, "difference": difference, "standard_error": error}, indent=1))
    su.write_atomically(out / "bpe.md", text)
    print(text)
