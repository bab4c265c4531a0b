"""The one runner of our own processes: what is shown, what is kept, what the stop button does."""
import os
import signal
import sys
import time

import pytest

from stentor.process import PROCESS_ENVIRONMENT, own_command, own_environment, run_process

TOKEN = "hf_" + "x" * 30


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_the_log_is_shown_without_secrets_and_its_end_is_kept():
    said = []
    ended = run_process(python(f"""
import sys
for i in range(80): print(i)
print("[rank1]: ValueError: https://u:{TOKEN}@host/x", file=sys.stderr)
print("no Error here", *"ab", sep="\\n")
sys.exit(3)
"""), dict(os.environ), say=said.append)
    assert ended.code == 3 and len(said) == 84 and "".join(ended.tail).split("\n")[:-1] == said[-60:]
    assert list(ended.errors) == ["[rank1]: ValueError: https://[secret]@host/x\n"]
    assert TOKEN not in "".join(said)


@pytest.mark.parametrize("patience", [60, 0])
def test_the_stop_button_lets_a_process_save_or_kills_it_with_its_children(tmp_path, patience):
    code = f"""
import os, pathlib, signal, subprocess, sys, time
here = pathlib.Path({str(tmp_path)!r})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid)
try:
    time.sleep(600)
except KeyboardInterrupt:
    (here / "saved").touch()
    child.wait()
"""
    pids = []

    def stop(line):
        pids.append(int(line))
        time.sleep(0.3)                               # until it sleeps
        raise KeyboardInterrupt
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_process(python(code), dict(os.environ), patience=patience, say=stop)
    assert (tmp_path / "saved").exists() == bool(patience) and time.monotonic() - began < 30
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:                # the child is another process's to reap
        try:
            os.kill(pids[0], signal.SIG_DFL)
            state = open(f"/proc/{pids[0]}/stat").read().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


def test_the_environment_and_the_command(monkeypatch):
    for name in PROCESS_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("STENTOR_DEADLINE", "1")
    env = own_environment({"OMP_NUM_THREADS": "1", "A_DEFAULT": "1"}, STENTOR_DEADLINE=None, SET="x")
    assert env["GOMP_SPINCOUNT"] == "7" and env["OMP_NUM_THREADS"] == "3"      # a user's own win
    assert env["MALLOC_MMAP_MAX_"] == "0" and env["A_DEFAULT"] == "1" and env["SET"] == "x"
    assert "STENTOR_DEADLINE" not in env
    assert own_command("train", "run.json") == [
        sys.executable, "-m", "stentor_utils", "train", "run.json"]
    several = own_command("train", "run.json", num_processes=2, restarts=1)
    assert several[1:3] == ["-m", "torch.distributed.run"]
    assert several[-4:] == ["--module", "stentor_utils", "train", "run.json"]
    assert several[several.index("--max-restarts") + 1] == "1"
