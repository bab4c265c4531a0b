"""Vocabularies from the same training text: ours in each mode against byte-level BPE and Unigram of `tokenizers`.

    python tests/benchmarks/bench_vocabulary.py [--megabytes 20] [--sizes 1024 4096 8000] [--capcode 1] [--out table.md]

Prints, for each size, characters per token on held-out documents of the same source (local:prose, its first 150) and on
the textbooks of ../shared/data/openstax when present, the gain over BPE of that size, and the seconds each build took.
Writes outputs/benchmarks/vocabulary.md too.
"""
import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import stentor_utils as su  # noqa: E402
from notebook_functions import load_functions  # noqa: E402

NOTEBOOK = load_functions("01_tokenizer")


def train_unigram(texts, size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False), length=len(texts))
    return tokenizer


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--megabytes", type=float, default=20)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8000])
    arguments.add_argument("--capcode", type=int, nargs="+", default=[1])
    arguments.add_argument("--modes", nargs="+", default=list(NOTEBOOK["MODES"]))
    arguments.add_argument("--without", nargs="*", default=[], help="leave out: unigram")
    arguments.add_argument("--out", type=Path, default=ROOT / "outputs/benchmarks/vocabulary.md")
    given = arguments.parse_args()

    held_out, training = NOTEBOOK["read_source"](su.Source("prose", "local:prose"), su, 150, given.megabytes, 42)
    texts = {"held out": held_out}
    openstax = ROOT.parent / "shared" / "data" / "openstax"
    if openstax.is_dir():
        books = [path.read_text(encoding="utf-8") for path in sorted(openstax.glob("*.txt"))]
        texts["openstax"] = [su.clean_text(part) for book in books for part in book.split("<|doc|>")][::4]
    say(f"training text: {len(training):,} documents, {sum(map(len, training)) / 1e6:.1f} million characters; "
        + ", ".join(f"{name}: {sum(map(len, t)) / 1e6:.2f} million" for name, t in texts.items()))

    builders = {("BPE", ""): NOTEBOOK["train_bpe"]}
    if "unigram" not in given.without:
        builders["Unigram", ""] = train_unigram
    for capcode in given.capcode:
        for mode in given.modes:
            def build(training, size, mode=mode, capcode=capcode):
                return NOTEBOOK["build_vocabulary"](training, size, mode, capcode, progress=lambda line: None)[0]
            builders[mode, capcode] = build

    columns = " | ".join(f"{name}: chars/token | against BPE" for name in texts)
    rows = [f"| size | tokenizer | capcode | {columns} | build s |",
            "|---|---|---|" + "---|---|" * len(texts) + "---|"]
    say("\n".join(rows))
    for size in given.sizes:
        bpe = {}
        for (name, capcode), builder in builders.items():
            began = time.time()
            tokenizer = builder(training, size)
            seconds = time.time() - began
            figures = []
            for kind, documents in texts.items():
                ratio = sum(map(len, documents)) / NOTEBOOK["count_tokens"](tokenizer, documents)
                bpe.setdefault(kind, ratio)  # BPE comes first
                figures.append(f"{ratio:.3f} | {ratio / bpe[kind] - 1:+.1%}")
            rows.append(f"| {size:,} | {name} | {capcode} | " + " | ".join(figures) + f" | {seconds:.0f} |")
            say(rows[-1])
    title = f"Vocabularies built from {given.megabytes:g} MB of local:prose, characters per token on text not seen:\n\n"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(title + "\n".join(rows) + "\n", encoding="utf-8")


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    main()
