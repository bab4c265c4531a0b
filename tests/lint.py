"""`make lint`'s own rules, over every file of the suite: no pickle, no foreign code, no secret, sound notebooks; pages
whose figures nobody typed (tests/pages.py).

    python tests/lint.py [folder]          # prints what is wrong, one line each; exit code 1 if anything is
"""
import ast
import json
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
from pages import page_problems  # noqa: E402
from stentor.secrets import secret_kinds  # noqa: E402

TEXT = {".py", ".ipynb", ".md", ".txt", ".json", ".toml", ".yml", ".yaml", ".jsonl", ".sh", ""}
# Modules that run code from the data they load. Tests make payloads with pickle, and load what they have pickled themselves.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "yaml.load", "eval", "exec"}


def sources(path: Path):
    """(name, Python source) of a .py file, or of each code cell; IPython's own lines left out."""
    if path.suffix == ".py":
        yield path.name, path.read_text()
    else:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                text = "".join(cell["source"])
                yield f"{path.name}:{cell.get('id')}", re.sub(r"^(\s*)[%!].*$", r"\1pass", text, flags=re.M)


def unsafe(text: str, name: str, is_test: bool = False) -> list[str]:
    """What in a Python source could run code that came as data."""
    found = []
    for node in ast.walk(ast.parse(text)):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        found += [f"imports {module}" for module in imported if module.split(".")[0] in UNSAFE_MODULES and not is_test]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in UNSAFE_CALLS and not (is_test and called in ("exec", "eval")):
                found.append(f"calls {called}")
            if called.split(".")[-1] in ("loads", "load") and called.split(".")[0] in UNSAFE_MODULES and not is_test:
                found.append(f"calls {called}")
            if given.get("allow_pickle") == "True":
                found.append(f"{called}(allow_pickle=True)")
            # our own tokenizer, from the folder that the suite itself wrote, is all that may bring its code
            if given.get("trust_remote_code", "False") != "False" and not (is_test and "Tokenizer" in called):
                found.append(f"{called}(trust_remote_code={given['trust_remote_code']})")
    return [f"{name}: {problem}" for problem in found]


def problems(folder: Path = REPO) -> list[str]:
    """Everything wrong in the suite that stands in `folder`."""
    import nbformat
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or path.suffix not in TEXT or any(p.startswith(".") or p in ("outputs", "dist", "__pycache__")
                                                                for p in parts[:-1]) or path.stat().st_size > 5_000_000:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        name = "/".join(parts)
        found += [f"{name}: holds what looks like {kind}" for kind in secret_kinds(text)]
        if path.suffix in (".py", ".ipynb"):
            for cell, source in sources(path):
                found += unsafe(source, cell, is_test=parts[0] == "tests")
        if path.suffix == ".ipynb":
            try:
                nbformat.validate(nbformat.reads(text, as_version=4))
            except nbformat.ValidationError as error:
                found.append(f"{name}: {str(error).splitlines()[0]}")
    return found


if __name__ == "__main__":
    where = Path(sys.argv[1]) if sys.argv[1:] else REPO
    wrong = problems(where)
    if (where / "docs" / "results.md").is_file():         # where figures stand in blocks
        wrong += page_problems(where)
    print("\n".join(wrong) or "nothing unsafe, no secret, notebooks sound, no figure typed")
    sys.exit(bool(wrong))
