"""A stranger's path, timed: a new folder, the README's own commands, until the model has answered in the chat.

    python tests/benchmarks/bench_stranger.py [FOLDER]        # a quarter of an hour; FOLDER: a new one, by default temporary

Clones this repository's last commit, gives the commands of the README's first block of them (`make run`, `make demo`) as they
stand there, and reads from the clock of the files when each thing was there to be seen. Writes outputs/benchmarks/stranger.md.
"""
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import stentor_utils as su  # noqa: E402
from stentor.files import duration  # noqa: E402
from stentor.launch import machine  # noqa: E402

QUESTION = "What is the capital of France?"


def commands(readme: str) -> list[str]:
    """The commands of the README's first block of them, without their comments."""
    block = re.search(r"```bash\n(.*?)```", readme, re.S)[1]
    return [line.partition("#")[0].strip() for line in block.splitlines() if line.strip()]


def said_by(demo: subprocess.Popen) -> str:
    """The address that the demo prints."""
    for line in demo.stdout:
        if found := re.search(r"open at (\S+)", line):
            return found[1]
    raise SystemExit(f"`make demo` ended with exit code {demo.wait()} and no address")


def chatted(address: str) -> str:
    """What the first model answers to QUESTION, asked as the page asks."""
    from gradio_client import Client
    conversation, *_ = Client(address, verbose=False).predict(message=QUESTION, api_name="/chat")
    return conversation[-1]["content"][0]["text"]


def walk(folder: Path) -> tuple[dict[str, float], str]:
    """{what was there: seconds from the start, by the clock}, and the answer."""
    began = time.time()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    run, demo = [line for line in commands((folder / "README.md").read_text()) if line in ("make run", "make demo")]
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    how = {"cwd": folder, "env": environment, "text": True}
    subprocess.run(run.split(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    ended, out = time.time(), folder / "outputs" / "demo"
    opened = subprocess.Popen(demo.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **how)
    try:
        address = said_by(opened)
        page, answer = time.time(), chatted(address)
    finally:
        os.killpg(opened.pid, signal.SIGTERM)         # not SIGINT: behind `&` it may be ignored
        opened.wait(30)
    there = {"the packages are installed": (folder / ".venv" / ".installed").stat().st_mtime,
             "a tokenizer": (out / "tokenizer" / "tokenizer_config.json").stat().st_mtime,
             "a trained model has written its first samples": (out / "samples.json").stat().st_mtime,
             "the charts and the model card; `make run` ends": ended,
             "`make demo` has opened the page": page, "the chat has answered": time.time()}
    return {what: when - began for what, when in there.items()}, answer


def main(given: list[str]) -> None:
    folder = Path(given[0]) if given else Path(tempfile.mkdtemp(prefix="stranger-")) / "stentor"
    marks, answer = walk(folder)
    here = machine()
    rows = "\n".join(f"| {what} | {duration(seconds)} |" for what, seconds in marks.items())
    text = (f"A new folder, the README's commands and nothing else; {here['cpu']}, {here['cpu_count']} cores, packages from an "
            f"index nearby:\n\n| after | |\n|---|---|\n{rows}\n")
    (ROOT / "outputs" / "benchmarks").mkdir(parents=True, exist_ok=True)
    su.write_atomically(ROOT / "outputs" / "benchmarks" / "stranger.md", text)
    print(f"{text}\n{QUESTION} {answer}\nin {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
