"""Loads what a notebook defines, so that tests call the very code that readers see."""
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []


def load_functions(notebook_name: str) -> dict:
    """Namespace after running the cells of notebooks/<notebook_name>.ipynb that are tagged `functions`, and no other.

    The cells see `su` (stentor_utils), `np`, `json` and `Path`, which a notebook's first cells would have imported.
    """
    import stentor_utils

    path = ROOT / "notebooks" / f"{notebook_name.removesuffix('.ipynb')}.ipynb"
    namespace = {"__name__": path.stem, "su": stentor_utils, "np": np, "json": json, "Path": Path}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "functions" in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), namespace)
    return namespace
