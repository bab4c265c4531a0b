"""`pip install .` gives a program elsewhere the helper and the tokenizer, and the command line."""
import json
import os
import shutil
import subprocess
import sys

from conftest import REPO


def test_the_installed_package_works_where_the_repository_is_not(tmp_path):
    source = tmp_path / "source"                      # pip builds in place: not in the repository
    shutil.copytree(REPO / "stentor", source / "stentor")
    for name in ("pyproject.toml", "README.md", "LICENSE", "stentor_utils.py", "tokenmonster_hf.py"):
        shutil.copy(REPO / name, source)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                    "--target", str(tmp_path / "site"), str(source)], check=True)
    code = ("import json, stentor_utils as su, tokenmonster_hf\n"
            "from stentor.session import find_outputs\n"
            "print(json.dumps([su.__file__, tokenmonster_hf.__file__, su.charts.__name__, str(find_outputs('mine'))]))")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(str(tmp_path / "site")) == 2, done.stderr
    assert json.loads(done.stdout)[-1] == str(tmp_path / "mine")         # not among the installed packages
    listed = subprocess.run([sys.executable, "-m", "stentor_utils", "recipes"], cwd=tmp_path, env=env, capture_output=True,
                            text=True)
    assert listed.returncode == 0 and "12,047,040" in listed.stdout, listed.stderr
