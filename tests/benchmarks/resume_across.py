"""A run that another commit began is finished by this tree, to the same bits as that commit finishes it.

    python tests/benchmarks/resume_across.py COMMIT
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))
from house import tree_of                             # noqa: E402

# Both halves use only names that every version has. A run is stopped by SIGTERM after step 12 of 24.
BEGIN = """
import json, os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, "tests")
from conftest import make_tiny
import stentor_utils as su
tiny = make_tiny(folder)
(folder / "recipe.json").write_text(json.dumps(tiny.recipe.to_dict()))
store = su.TokenStore(tiny.store_dir, tiny.recipe)
su.train(tiny.recipe, store, folder / "whole", tokenizer=tiny.tokenizer)
def say(text):
    print(text, flush=True)
    if text.startswith("step     12/"):
        os.kill(os.getpid(), signal.SIGTERM)
su.train(tiny.recipe, store, folder / "halves", tokenizer=tiny.tokenizer, say=say)
"""
GO_ON = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
import stentor_utils as su
recipe = su.Recipe.from_dict(json.loads((folder / "recipe.json").read_text()))
su.train(recipe, su.TokenStore(folder / "tokens", recipe), folder / "halves", tokenizer=su.load_tokenizer(folder / "tokenizer"))
"""


def run(tree: Path, script: str, folder: Path) -> int:
    env = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", script, str(folder)], cwd=tree, env=env).returncode


def hashes(run_dir: Path) -> dict[str, str]:
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    files = [run_dir / "final" / "model.safetensors", *sorted(newest.glob("*.safetensors"))]
    return {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        begun = run(tree_of(sys.argv[1], old), BEGIN, folder)
        assert begun == 143, f"{sys.argv[1]} ended with exit code {begun}, not with 143 (SIGTERM, saved)"
        stopped_at = json.loads((folder / "halves" / "summary.json").read_text())["step"]
        ended = run(REPO, GO_ON, folder)
        assert ended == 0, f"this tree ended with exit code {ended}"
        whole, halves = hashes(folder / "whole"), hashes(folder / "halves")
    differ = [name for name in whole if whole[name] != halves.get(name)]
    print(f"stopped by {sys.argv[1]} at step {stopped_at}, finished here: {len(whole) - len(differ)} of {len(whole)} files "
          f"equal bit for bit{': ' + ', '.join(differ) + ' differ' if differ else ''}")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
