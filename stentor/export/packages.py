"""The optional packages of the formats: which are here, and the one sentence for those that are not."""
from __future__ import annotations

import importlib.metadata
import importlib.util

from stentor.files import ParameterError

# The versions that the tests ran with. None of them changes torch, transformers or numpy.
PINNED = {"gguf": "0.19.0", "xllamacpp": "2026.10.11549", "onnx": "1.23.2", "onnxscript": "0.7.2",
          "onnxruntime": "1.32.0", "bitsandbytes": "0.50.2", "torchao": "0.18.0"}
# transformers refuses older ones; Kaggle's image has torchao 0.10.
OLDEST = {"torchao": (0, 15), "bitsandbytes": (0, 46, 1)}


def missing(*names: str) -> str | None:
    """One sentence about those of the packages that are not here, or are too old; None: all are."""
    wanted = []
    for name in names:
        if importlib.util.find_spec(name) is None:
            wanted.append((name, "is not installed"))
        elif (found := _version(name)) < OLDEST.get(name, ()):
            wanted.append((name, f"{'.'.join(map(str, found))} is too old"))
    if not wanted:
        return None
    install = " ".join(f"{name}=={PINNED[name]}" for name, _ in wanted)
    said = ", ".join(f"{name} {wrong}" for name, wrong in wanted)
    return f"{said} (pip install {install})"


def require(*names: str) -> None:
    """Raise ParameterError, in that sentence, where a package is missing."""
    if said := missing(*names):
        raise ParameterError([f"{said}."])


def _version(name: str) -> tuple[int, ...]:
    text = importlib.metadata.version(name).split("+")[0]
    return tuple(int(part) for part in text.split(".") if part.isdigit())
