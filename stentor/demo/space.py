"""A complete folder for a Hugging Face Space: the demo, what it imports, a run's models."""
from __future__ import annotations

import ast
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stentor.demo.models import Entry, models_of_run
from stentor.files import ParameterError, remove, replace_folder
from stentor.parameters import writable_folder
from stentor.secrets import secret_kinds

HERE = Path(__file__).resolve().parents[2]
START = "stentor/demo/app.py"
# What the house imports there; Gradio comes with the Space, in the version of the README's head.
PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "fsspec", "numpy", "numba",
            "matplotlib")
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.vocab", "*.model", "merges.txt", "vocab.txt")

APP = '''"""The demo of {name}, as a Space. `python app.py` starts it anywhere."""
import os
from pathlib import Path

from stentor.demo.app import open_demo, start

HERE = Path(__file__).resolve().parent
KEPT = Path("/data") if os.access("/data", os.W_OK) else HERE   # the Space's own disk, if any
# With the variable HUB = 1 visitors can also choose the published models and baselines of the hub.
blocks = open_demo(HERE / "models", {name!r}, hub=os.environ.get("HUB") == "1",
                   votes=KEPT / "arena_votes.jsonl")
start(blocks, host=None, wait=True)
'''
README = """---
title: {title!r}
emoji: 📣
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
license: apache-2.0
short_description: Try small language models token by token
---

# {title}

The models of the run `{name}`, in five tabs: Generate, Token Explorer, Temperature Sweep, Arena, Chat.
They run on the Space's CPU. They are small and invent freely: take nothing they say for a fact.

To push it, with your own name and a token that only your machine knows (`hf auth login`):

    hf repos create NAME/SPACE --repo-type space --space-sdk gradio
    hf upload NAME/SPACE . . --repo-type space

`models/` holds plain Hugging Face folders (safetensors and JSON). The tokenizer's code is
`tokenmonster_hf.py` of this folder; no other code is taken from a model's folder.
The arena's votes are kept in `arena_votes.jsonl` on the Space's disk, without what people typed.
"""


def imported(start: str = START) -> list[str]:
    """The house's files that `start` needs, itself included: all that its imports reach."""
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for module in _modules(HERE / name):
            waiting += [path for path in _files_of(module) if path not in found]
    return sorted(found)


def _modules(path: Path) -> set[str]:
    """The modules that a file names in its imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _files_of(module: str) -> list[str]:
    """The house's files of a module's name, with those of the packages that hold it."""
    parts, found = module.split("."), []
    for i in range(1, len(parts) + 1):
        for name in ("/".join(parts[:i]) + ".py", "/".join(parts[:i]) + "/__init__.py"):
            if (HERE / name).is_file():
                found.append(name)
    return found


def requirements() -> str:
    """requirements.txt of the Space, pinned to what is installed here; torch without CUDA."""
    def pinned(package):
        try:
            return f"{package}=={version(package).partition('+')[0]}"
        except PackageNotFoundError:
            return package
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu", *map(pinned, PACKAGES)]
    return "\n".join(lines) + "\n"


def write_space(run_dir, folder=None) -> Path:
    """Write the Space's folder for a run (default: <run>/space), complete or not at all; its path.

    Raises ParameterError for a run without a model, a folder that cannot be written or holds
    something else, and where a file of the models holds what looks like a secret.
    """
    run_dir = Path(os.path.abspath(run_dir))
    folder = Path(os.path.abspath(folder or run_dir / "space"))
    models = models_of_run(run_dir)
    if not models:
        raise ParameterError([f"{run_dir} holds no model to show (no final/config.json): run "
                              "notebook 02 or 03 first."])
    if wrong := writable_folder(folder):
        raise ParameterError([f"{folder} {wrong}."])
    if folder.exists() and any(folder.iterdir()) and not (folder / "app.py").is_file():
        raise ParameterError([f"{folder} holds something that is no Space; name an empty folder."])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        _fill(temporary, run_dir, models)
        if held := _secrets(temporary):
            raise ParameterError(held)
        replace_folder(temporary, folder)
    finally:
        remove(temporary)
    return folder


def _fill(folder: Path, run_dir: Path, models: list[Entry]) -> None:
    name = run_dir.name
    more = [f"stentor/demo/{other}" for other in ("page.css", "explorer.js")]
    for path in [*imported(), *more]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / path, folder / path)
    for entry in models:
        source = Path(entry.where)
        target = folder / "models" / name / source.relative_to(run_dir)
        target.mkdir(parents=True)
        for pattern in MODEL_FILES:
            for path in source.glob(pattern):
                shutil.copyfile(path, target / path.name)
    if any(entry.chat and entry.system for entry in models):
        (folder / "models" / name / "instruct" / "sft_summary.json").write_text(
            _json({"system": next(entry.system for entry in models if entry.chat)}))
    recipe = next((entry.recipe for entry in models if not entry.chat), "")
    (folder / "models" / name / "run.json").write_text(_json({"recipe": {"name": recipe}}))
    title = f"Stentor demo: {name}"
    (folder / "app.py").write_text(APP.format(name=name))
    (folder / "README.md").write_text(README.format(title=title, name=name, gradio=_gradio()),
                                      encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements())
    (folder / ".gitattributes").write_text(
        "*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (folder / ".gitignore").write_text("__pycache__/\narena_votes.jsonl\n.arena_votes.jsonl.lock\n")


def _gradio() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:
        raise ParameterError(["a Space names its Gradio's version, and none is installed: pip "
                              "install gradio"]) from None


def _json(content: dict) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _secrets(folder: Path) -> list[str]:
    return [f"{path.relative_to(folder)} holds what looks like {kind}: nothing was written."
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".safetensors"
            for kind in secret_kinds(path.read_bytes())]
