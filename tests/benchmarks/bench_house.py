"""What the house costs: import time and training speed of this tree against another commit, by turns.

    python tests/benchmarks/bench_house.py COMMIT [ROUNDS]
"""
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))
from house import tree_of                             # noqa: E402

IMPORT = "import time; began = time.perf_counter(); import stentor_utils; print(time.perf_counter() - began)"
TRAIN = """
import dataclasses, sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests")
from conftest import make_tiny
import stentor_utils as su
with tempfile.TemporaryDirectory() as folder:
    tiny = make_tiny(Path(folder))
    shape = dataclasses.replace(tiny.recipe.shape, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                                num_attention_heads=4, num_key_value_heads=4)
    recipe = dataclasses.replace(tiny.recipe, shape=shape, token_budget=80 * 8 * 64, eval_steps=1000, best_eval_steps=1000)
    store = su.TokenStore(tiny.store_dir, recipe)
    print(su.train(recipe, store, Path(folder) / "run", tokenizer=tiny.tokenizer, say=lambda text: None)["tokens_per_second"])
"""


def measure(tree: Path, code: str) -> float:
    env = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    commit, rounds = sys.argv[1], int((sys.argv[2:] or ["5"])[0])
    with tempfile.TemporaryDirectory() as folder:
        trees = {commit: tree_of(commit, folder), "now": REPO}
        for title, code, unit in (("import stentor_utils", IMPORT, "s"), ("training, 1M parameters", TRAIN, "tokens/s")):
            figures = {name: [] for name in trees}
            for _ in range(rounds):
                for name, tree in trees.items():
                    figures[name].append(measure(tree, code))
            ratios = [new / old for old, new in zip(figures[commit], figures["now"])]
            medians = [f"{name} {statistics.median(values):,.2f} {unit}" for name, values in figures.items()]
            print(f"{title}: {', '.join(medians)}; "
                  f"now / {commit}: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, "
                  f"{rounds} rounds)", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
