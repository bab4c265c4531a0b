"""`make lint`'s own rules, over every file of the suite: no pickle, no foreign code, no secret, sound notebooks.

    python tests/lint.py [folder]          # prints what is wrong, one line each; exit code 1 if anything is
"""
import ast
import json
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
from stentor.reporting import BLOCK, block_problems  # noqa: E402
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


# In a page's prose: names (T4, v5e-8, Qwen3, Python 3.11), sizes of models (12M), notebooks (02), and a list's or a
# table's own numbers are no figures.
NAME = re.compile(r"\b(?:Python|Apache) \d[.\d]*|(?<![\w.])\d+[MB]\b|\bT4×2|2×T4|\b[A-Za-z][A-Za-z_]*-?\d\w*(?:-\d+\w*)*|^\s*\d+\.(?= )|"
                  r"^\| \d+ (?=\|)|\b0[1-9]\b", re.M)
PLACEHOLDER = re.compile(r"Not measured yet|\bTODO\b|\bTBD\b|\bFIXME\b|\bXXX\b|lorem ipsum", re.I)


def typed_figures(page: str) -> list[str]:
    """The lines of a page with a figure that no command wrote: outside the blocks, code, links and comments."""
    text = re.sub(r"```.*?```|<!--.*?-->|`[^`\n]*`", " ", BLOCK.sub("", page), flags=re.S)
    text = re.sub(r"\[[^\]]*\]\([^)]*\)|\bhttps?://\S+", " ", text)
    return [line.strip() for line in NAME.sub(" ", text).split("\n") if re.search(r"\d", line)]


def page_problems(path: Path) -> list[str]:
    """What is wrong with README.md or a page of docs/: typed figures, dead links, missing pictures, placeholders."""
    page = path.read_text()
    found = [f"a figure that no command wrote: {line[:80]!r}" for line in typed_figures(page)] + block_problems(page)
    found += [f"a placeholder: {word!r}" for word in sorted(set(PLACEHOLDER.findall(page)))]
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if not re.match(r"[a-z]+:|#", target) and not (path.parent / target.partition("#")[0]).exists():
            found.append(f"a link to {target}, which is not there")
    return found


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
    for path in [folder / "README.md", folder / "CONTRIBUTING.md", *sorted((folder / "docs").glob("*.md"))]:
        found += [f"{path.relative_to(folder)}: {problem}" for problem in page_problems(path)] if path.is_file() else []
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]) if sys.argv[1:] else REPO)
    print("\n".join(wrong) or "nothing unsafe, no secret, notebooks sound")
    sys.exit(bool(wrong))
