"""What 05_benchmark runs: lm-eval's tasks and metrics, scored by a model class that fits us.

rows -> tasks -> trees -> lm (the model class) -> scoring (one block) -> run (every model on every
block, in a process of its own); contamination beside it.
"""
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")            # read when tqdm is imported; its bars fill a log

from stentor.benchmark.run import EvaluationFailed, launch, model_problem       # noqa: E402, F401
from stentor.benchmark.tasks import BLOCKS, PEERS, local_blocks, local_problems  # noqa: E402, F401
