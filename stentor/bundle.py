"""`make kaggle`: every notebook with the house inside it, and what a command line pushes to Kaggle.

    python -m stentor.bundle dist/kaggle [--user NAME]
    python -m stentor.bundle --metadata       # after the table, or a notebook's cells, have changed

kaggle/notebooks.json is the one table: accelerator, the notebooks whose output it takes, the data
files that it reads, and what of the house it never imports. Standard library only: it runs before
anything is installed.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote

HERE = Path(__file__).resolve().parents[1]
LARGEST = 1_000_000                    # bytes of a notebook's source that Kaggle takes
FILES = ["stentor_utils.py", "tokenmonster_hf.py", "stentor/**/*.py"]
REPO_ONLY = ["stentor/bundle.py"]
# How Kaggle calls an accelerator: in a notebook's metadata and a link, and in kernel-metadata.json.
ACCELERATORS = {None: ("none", None), "t4": ("nvidiaTeslaT4", "NvidiaTeslaT4"),
                "tpu": ("tpuV5e8", "TpuV5E8")}
BRANCH = "kaggle"                      # of the repository, where links find the built notebooks


def table() -> dict[str, dict]:
    """{notebook: {"accelerator", "after", "files", "without"}}; "with": files that only the notebooks
    which name them import."""
    return json.loads((HERE / "kaggle" / "notebooks.json").read_text())


def project() -> tuple[str, str]:
    """(version, address of the repository or "") as pyproject.toml has them."""
    try:
        found = tomllib.loads((HERE / "pyproject.toml").read_text())
    except FileNotFoundError:
        found = {}
    address = found.get("tool", {}).get("stentor", {}).get("repository", "")
    version = found.get("project", {}).get("version", "without a number")
    return version, address.rstrip("/").removesuffix(".git")


def commit() -> str:
    """The commit that is checked out, and whether files differ from it."""
    def git(*words):
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout
    with contextlib.suppress(FileNotFoundError):      # no git
        if head := git("rev-parse", "--short=12", "HEAD").strip():
            return head + " with changes" * bool(git("status", "--porcelain").strip())
    return "unknown"


def kaggle_metadata(name: str) -> dict:
    """`metadata.kaggle` of a notebook, as Kaggle writes it: its accelerator, internet on."""
    accelerator = table()[name]["accelerator"]
    return {"accelerator": ACCELERATORS[accelerator][0], "dataSources": [],
            "isGpuEnabled": accelerator == "t4", "isInternetEnabled": True, "language": "python",
            "sourceType": "notebook"}


def set_metadata(path) -> None:
    """Give a notebook of the repository Kaggle's metadata; its `functions` cells are collapsed there."""
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    notebook["metadata"]["kaggle"] = kaggle_metadata(Path(path).stem)
    for cell in notebook["cells"]:
        cell["metadata"].pop("_kg_hide-input", None)
        if "functions" in cell["metadata"].get("tags", []):
            cell["metadata"] = {"_kg_hide-input": True, **cell["metadata"]}
    notebook["metadata"] = dict(sorted(notebook["metadata"].items()))
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    Path(path).write_text(text, encoding="utf-8")


# The self-contained notebook.

def carried(name: str) -> list[str]:
    """The files that a notebook needs, as paths from the repository."""
    row, mine = table()[name], table()[name].get("with", [])
    others = {pattern for other in table().values() for pattern in other.get("with", [])}
    left_out = [*REPO_ONLY, *row["without"], *(others - {*mine})]
    without = {path for pattern in left_out for path in HERE.glob(pattern)}
    return [path.relative_to(HERE).as_posix() for pattern in [*FILES, *row["files"]]
            for path in sorted(HERE.glob(pattern)) if path not in without]


def build_notebook(path, out) -> int:
    """Write the notebook at `path` to `out` with all that it imports and reads inside; its bytes.

    Each file is a collapsed cell that writes it beside the notebook (%%writefile, or `_write_rows`),
    ahead of the cell that imports stentor_utils. Raises ValueError where that is more than Kaggle takes.
    """
    path, out = Path(path), Path(out)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    files = carried(path.stem)
    cells = notebook["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])      # one text: a list of lines takes more bytes
    place = next(i for i, cell in enumerate(cells) if cell.get("id") == "bootstrap")
    if place and cells[place - 1]["cell_type"] == "markdown":
        place -= 1
    version, address = project()
    cells[0]["source"] += (
        f"\n\n*Self-contained: built by `make kaggle` from version {version}, commit {commit()}"
        + (f", of {address}" if address else "") + ". Nothing needs to be attached.*")
    about = (f"## The helper\n\nThe next {len(files) + 1} cells write what this notebook imports and "
             "reads beside it, as it stands in the repository: open one to read it.")
    notebook["cells"] = [*cells[:place], _cell("helper-about", about, "markdown"),
                         _cell("helper-folders", _folders_source(files) + ROWS),
                         *(_writing(name) for name in files), *cells[place:]]
    notebook["metadata"] = {**notebook["metadata"], "kaggle": kaggle_metadata(path.stem)}
    data = json.dumps(notebook, indent=1, ensure_ascii=False).encode()
    if len(data) > LARGEST:
        raise ValueError(f"{out.name} would have {len(data):,} bytes, Kaggle takes {LARGEST:,}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(data + b"\n")
    return len(data) + 1


def _cell(name: str, source: str, kind: str = "code") -> dict:
    cell = {"cell_type": kind, "id": name, "metadata": {}, "source": source}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": [],
                 "metadata": {"_kg_hide-input": True, "_kg_hide-output": True}}
    return cell


def _folders_source(files: list[str]) -> str:
    """Code that makes the folders of these files; it leaves no variable behind."""
    folders = sorted({str(Path(name).parent) for name in files} - {"."})
    return f"import os\n\nfor _folder in {folders!r}:\n    os.makedirs(_folder, exist_ok=True)"


# In the notebook: rows of text with tabs between, as the .jsonl file that they are from. (A quote mark
# of JSON takes two bytes inside a notebook, which is JSON itself: 04 would be 100 kB larger.)
ROWS = """


def _write_rows(name, text):
    import json
    keys, *rows = [line.split("\\t") for line in text.strip("\\n").split("\\n")]
    with open(name, "w", encoding="utf-8") as file:
        for row in rows:
            values = {key.rstrip("="): json.loads(value) if key[-1] == "=" else value
                      for key, value in zip(keys, row)}  # a key with = is no text
            file.write(json.dumps(values, ensure_ascii=False) + "\\n")
"""


def _rows_source(name: str, text: str) -> str | None:
    """A cell that writes this .jsonl file by `_write_rows`; None where its rows are not so plain."""
    rows = [json.loads(line) for line in text.splitlines()]
    longest = max(rows, key=len)
    plain = {key: all(isinstance(row.get(key, ""), str) for row in rows) for key in longest}
    lines = ["\t".join(key + "=" * (not plain[key]) for key in longest)]
    lines += ["\t".join(value if plain.get(key) else json.dumps(value, ensure_ascii=False)
                        for key, value in row.items()) for row in rows]
    if any(list(row) != list(longest)[:len(row)] for row in rows):
        return None
    if any("\\" in line or "'''" in line or line.count("\t") >= len(longest) for line in lines):
        return None
    if len(lines) != len("\n".join(lines).splitlines()) or text != "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in rows):
        return None
    return f"_write_rows({name!r}, r'''\n" + "\n".join(lines) + "\n''')"


def _writing(name: str) -> dict:
    """The cell that writes a file."""
    text = (HERE / name).read_text(encoding="utf-8")
    if not text.endswith("\n") or text[0].isspace() or "\r" in text:
        raise ValueError(f"{name}: %%writefile keeps a text that begins with no space and ends with "
                         "a line's end")
    rows = _rows_source(name, text) if name.endswith(".jsonl") else None
    return _cell("write-" + re.sub(r"\W|_", "-", name)[-58:],
                 rows or f"%%writefile {name}\n{text[:-1]}")


# Links.

def open_link(name: str, address: str) -> str:
    """The address that opens a built notebook in Kaggle's editor, with its accelerator."""
    source = quote(f"{address}/blob/{BRANCH}/{name}.ipynb", safe=":/")
    accelerator = ACCELERATORS[table()[name]["accelerator"]][0]
    return (f"https://www.kaggle.com/notebooks/welcome?src={source}"
            + f"&accelerator={accelerator}" * (accelerator != "none"))


def how_to_open(name: str, address: str | None = None) -> str:
    """One line of Markdown for the README: a link, or, without an address, how to import the file."""
    address = project()[1] if address is None else address
    if address:
        return f"[open {name} on Kaggle]({open_link(name, address)})"
    return (f"`make kaggle`, then on kaggle.com Create > New Notebook > File > Import Notebook > "
            f"`dist/kaggle/{name}.ipynb`")


# For a command line.

def slug(name: str) -> str:
    """Kaggle's name of a notebook; it must be its title in lower case with dashes."""
    return "stentor-" + name.replace("_", "-")


def kernel_metadata(name: str, user: str) -> dict:
    """kernel-metadata.json: the short notebook, the dataset with the helper, the outputs it takes."""
    row = table()[name]
    shape = ACCELERATORS[row["accelerator"]][1]
    return {"id": f"{user}/{slug(name)}", "title": slug(name).replace("-", " ").title(),
            "code_file": f"{name}.ipynb", "language": "python", "kernel_type": "notebook",
            "is_private": True, "enable_gpu": row["accelerator"] == "t4",
            "enable_tpu": row["accelerator"] == "tpu", "enable_internet": True,
            **({"machine_shape": shape} if shape else {}),
            "dataset_sources": [f"{user}/stentor-utils"], "competition_sources": [],
            "kernel_sources": [f"{user}/{slug(other)}" for other in row["after"]],
            "model_sources": []}


def stage(user: str, out) -> list[str]:
    """Write dataset/ and kernels/NN_name/ below `out`; the commands that push them, in order.

    Folders of the dataset are uploaded as archives, which Kaggle unpacks: the CLI's default leaves
    them out.
    """
    out = Path(out)
    dataset = out / "dataset"
    shutil.rmtree(dataset, ignore_errors=True)
    names = {name: None for notebook in table() for name in carried(notebook)}
    for name in names:
        (dataset / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / name, dataset / name)
    _write_json(dataset / "dataset-metadata.json", {
        "id": f"{user}/stentor-utils", "title": "Stentor utils",
        "licenses": [{"name": "apache-2.0"}]})
    for name in table():
        folder = out / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb")
        _write_json(folder / "kernel-metadata.json", kernel_metadata(name, user))
    return [f"kaggle datasets create -p {dataset} --dir-mode zip",
            f"kaggle datasets version -p {dataset} --dir-mode zip -m 'update'    # from then on",
            *(f"kaggle kernels push -p {out / 'kernels' / name}" for name in table())]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("dist/kaggle"))
    parser.add_argument("--user", help="your name on Kaggle: also stage a dataset and kernels")
    parser.add_argument("--metadata", action="store_true", help="only set that of notebooks/")
    arguments = parser.parse_args(argv)
    if arguments.user and not re.fullmatch("[a-z0-9-]+", arguments.user):
        parser.error(f"USER = {arguments.user!r} is no name on Kaggle: small letters, digits, dashes")
    for name in table():
        source, path = HERE / "notebooks" / f"{name}.ipynb", arguments.out / f"{name}.ipynb"
        if arguments.metadata:
            set_metadata(source)
        else:
            print(f"{path}  {build_notebook(source, path):,} bytes")
    if not arguments.metadata:
        print_ways(arguments.out, arguments.user)
    return 0


def print_ways(out: Path, user: str | None) -> None:
    """How to open what was built, and the commands for what was staged."""
    address = project()[1]
    if address:
        print(f"\nLinks, once these files stand on the branch {BRANCH!r} of {address}:")
        print("\n".join("  " + open_link(name, address) for name in table()))
    else:
        print("\nNo repository in pyproject.toml's [tool.stentor], so no links: on kaggle.com Create > New Notebook > File "
              "> Import Notebook, and one of these files.")
    if user:
        print("\nFrom a command line, each once the one above it has run:")
        print("\n".join("  " + line for line in stage(user, out / user)))


if __name__ == "__main__":
    sys.exit(main())
