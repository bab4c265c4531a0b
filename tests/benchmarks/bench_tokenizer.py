"""Tokenizer throughput on about 20 MB of text: numba core, Python core, 2 KB calls, batches, two processes.

    python tests/benchmarks/bench_tokenizer.py [megabytes]

Writes outputs/benchmarks/tokenizer.md, prints it, and never fails on a number. Text: ../shared/data/openstax when present,
else the documentation of the installed packages. Variants run in turn, so that a busy machine slows all of them; the best
of three rounds counts.
"""
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import tokenmonster_hf as tm  # noqa: E402

SHARED = ROOT.parent / "shared"
NAMES = ["english-8000-strict-nocapcode-v1", "english-8000-consistent-v1", "english-4096-strict-nocapcode-v1"]


def gather(megabytes):
    """(where from, text)."""
    size, parts = int(megabytes * 1e6), []
    folder, pattern = SHARED / "data/openstax", "*.txt"
    if not folder.exists():
        folder, pattern = Path(sysconfig.get_paths()["purelib"]), "**/*.py"
    for path in sorted(folder.glob(pattern)):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, parts)) > size:
            break
    text = "".join(parts)
    return folder.name, (text * (size // len(text) + 1))[:size]


def vocabularies(text):
    """{name: bytes of the .vocab file}: released ones, or one of frequent words where they are not here."""
    paths = [SHARED / f"tokenmonster/vocabs/{name}.vocab" for name in NAMES]
    if all(path.exists() for path in paths):
        return {path.stem: path.read_bytes() for path in paths}
    from collections import Counter
    words = Counter(" " + word for word in text[:2_000_000].split()).most_common(7000)
    own = tm.Vocabulary.from_tokens([w for w, _ in words], scores=[n for _, n in words], include="all256")
    return {"7,000 frequent words": own.to_bytes()}


def main():
    source, text = gather(float(sys.argv[1]) if len(sys.argv) > 1 else 20)
    size, part = len(text.encode()), text[:200_000]
    calls = [text[i:i + 2048] for i in range(0, len(text), 2048)]
    few = calls[: len(calls) // 5]
    rows = [f"Tokenizer throughput on {size / 1e6:.1f} MB of {source} ({len(calls):,} pieces of 2 KB), one core unless said:\n",
            "| vocabulary | variant | MB/s, wall clock | MB/s of CPU time | times the Python core |", "|---|---|---|---|---|"]
    for name, data in vocabularies(text).items():
        slow, variants = tm.Vocabulary.from_bytes(data, backend="python"), {}
        if tm.numba:
            fast = tm.Vocabulary.from_bytes(data, backend="numba")
            normalized = fast.normalize(text)
            variants = {
                "numba, one call": (size, lambda: fast.encode(text)),
                "  of that, the walk": (size, lambda: fast._encode([normalized])),
                "  of that, normalising": (size, lambda: fast.normalize(text)),
                "numba, 2 KB calls": (size // 5, lambda: [fast.encode(piece) for piece in few]),
                "numba, one batch": (size, lambda: fast.encode_batch(calls)),
                "numba, batch, 2 processes": (size, lambda: fast.encode_batch(calls, num_proc=2)),
            }
        variants["python, one call"] = (len(part.encode()), lambda: slow.encode(part))
        best = {}
        for _, run in variants.values():
            run()  # compile, fill the caches
        for _ in range(3):
            for label, (amount, run) in variants.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                old = best.get(label, (0, 0))
                best[label] = (max(old[0], amount / wall / 1e6), max(old[1], amount / cpu / 1e6))
        for label, (wall, cpu) in best.items():
            shown = f"{cpu:.1f}" if "processes" not in label else ""
            rows.append(f"| {name} | {label.strip()} | {wall:.1f} | {shown} | {wall / best['python, one call'][0]:.0f} |")
    out = ROOT / "outputs/benchmarks/tokenizer.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(rows) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
