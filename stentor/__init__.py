"""The house behind stentor_utils; its docstring is the map."""
import os
import warnings

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")       # transformers' too: they fill a papermill log
warnings.filterwarnings("ignore", message="IProgress not found")

from stentor.files import find_home                   # noqa: E402

find_home()                                           # before huggingface_hub and matplotlib look for theirs
