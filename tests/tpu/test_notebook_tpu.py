"""03_pretrain_tpu executed by papermill on XLA with 8 virtual devices, and what it made looked at."""
import json
import os
import subprocess
import sys

import pytest
from conftest import REPO

pytest.importorskip("torch_xla", reason="torch_xla has an environment of its own: make tpu-test")


def test_the_notebook_runs_on_eight_devices(tiny, tmp_path):
    """A small model on the embedded prose, code and mathematics: 48 steps of 16 x 64 tokens, bf16."""
    overrides = {"block_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 64, "per_device_train_batch_size": 2,
                 "num_processes": 8, "eval_steps": 20, "best_eval_steps": 20, "logging_steps": 4, "max_eval_samples": 10,
                 "mixed_precision": "bf16"}
    done = subprocess.run([
        sys.executable, "-m", "stentor_utils", "run", "03_pretrain_tpu", "-p", "PROFILE=cpu", "XLA=CPU", f"OUTPUTS={tmp_path}",
        "RUN=xla", f"TOKENIZER={tiny.tokenizer_dir}", f"TOKEN_BUDGET={48 * 16 * 64}", f"OVERRIDES={overrides!r}"],
        cwd=REPO, capture_output=True, text=True, env={**os.environ, "PJRT_DEVICE": "CPU"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "xla"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["device"].startswith("xla") and summary["precision"]["autocast"] == "bf16"
    assert summary["compilations"] == 2 and summary["skipped_steps"] == 0 and summary["step"] == 48
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert {row["compilations"] for row in trained} == {2}                    # none after the first line of the log
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.3
    mixture = json.loads((folder / "mixture.json").read_text())["table"]
    for part in ("before the anneal", "anneal"):
        planned, realised = (list(mixture[f"{part}, {kind}"].values()) for kind in ("planned", "realised"))
        assert realised == pytest.approx(planned, abs=0.02)
    assert (folder / "final" / "model.safetensors").exists()
    assert len(json.loads((folder / "samples.json").read_text())["samples"]) == 3
    cells = json.loads((folder / "notebooks" / "03_pretrain_tpu.ipynb").read_text())["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
