"""Kill -9, again and again, and count what is lost: nothing may be.

    python tests/soak.py --runs 50 --kills 4 --report outputs     # `make soak`: outputs/reliability.json and a table
    python tests/soak.py --runs 20 --kills 3 --store FOLDER       # what `make test` starts; prints the counts as JSON

One process imports everything and forks a child for each start of a run, so that a kill costs what training costs and not
five seconds of imports; for that it must never have started a thread (OMP_NUM_THREADS=1 below). Half of the kills come at a
random instant, half at a random instant of a phase drawn by lot: the child shows its phase in shared memory. Where a kill
is due is counted in steps and phases, not in seconds, so it does not matter how fast the machine is; a kill that came too
late because the run had ended all the same is made up for in one more run. The runs have
everything that must survive: loss scaling (fp16), randomness (INT8's stochastic rounding), averaged weights (EMA), several
micro-batches a step, and checkpoints at every evaluation and every 0.1 s.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse            # noqa: E402
import dataclasses         # noqa: E402
import json                # noqa: E402
import mmap                # noqa: E402
import random              # noqa: E402
import shutil              # noqa: E402
import signal              # noqa: E402
import statistics          # noqa: E402
import subprocess          # noqa: E402
import sys                 # noqa: E402
import tempfile            # noqa: E402
import time                # noqa: E402
import traceback           # noqa: E402
from pathlib import Path   # noqa: E402

import numpy as np         # noqa: E402
import torch               # noqa: E402

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
import stentor.engine                                  # noqa: E402
import stentor.learner                                 # noqa: E402
import stentor.train                                   # noqa: E402
import stentor_utils as su                             # noqa: E402

PHASES = ["between", "a step's micro-batches", "evaluation", "saving a checkpoint", "deleting an old one", "saving a model",
          "loading"]
# each function in the module that calls it
WATCHED = [(stentor.engine, "accumulate_gradients", 1), (stentor.engine, "evaluate", 2),
           (stentor.train, "save_checkpoint", 3), (stentor.learner, "save_model_folder", 5),
           (stentor.train, "load_checkpoint", 6)]


def soak_recipe(store_dir, steps: int = 16) -> su.Recipe:
    manifest = json.loads((Path(store_dir) / "manifest.json").read_text())
    sources = tuple(su.Source(**source) for source in manifest["fingerprint"]["sources"])
    return dataclasses.replace(
        su.RECIPES["stentor2-12m"].scaled_to("cpu"), name="soak", sources=sources, token_budget=steps * 8 * 64,
        shape=su.Shape(manifest["vocab_size"], 32, 64, 3, 2, 2, 64), block_size=64, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, eval_steps=4, best_eval_steps=4, logging_steps=3, max_eval_samples=4,
        save_every_minutes=0.1 / 60, mixed_precision="fp16", int8_qat=True, fp32_critical_first=1, ema_decay=0.9,
        source_token_budget=None)


class Board:
    """What a child shows: its phase now, how often it entered each, and the seconds it spent in each."""

    def __init__(self):
        size = 1 + len(PHASES)
        self.memory = np.frombuffer(mmap.mmap(-1, 8 * 2 * size), np.float64)
        self.memory[:] = 0
        self.phase, self.entered, self.seconds = self.memory[:1], self.memory[1:size], self.memory[size:2 * size - 1]

    def watch(self, owner, name: str, phase: int) -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            outer, began = self.phase[0], time.perf_counter()
            self.phase[0] = phase
            self.entered[phase] += 1
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - began
                self.phase[0] = outer
        setattr(owner, name, watched)


def start(recipe, store_dir, run_dir: Path) -> tuple[int, Board]:
    """Fork a child that trains, or goes on with, `run_dir`; its log is appended to log.txt there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    board = Board()
    if pid := os.fork():
        return pid, board
    code = 1
    try:
        log = os.open(run_dir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for module, name, phase in WATCHED:
            board.watch(module, name, phase)
        board.watch(shutil, "rmtree", 4)
        board.entered[0] = 1                          # from here on the parent's clock runs
        su.train(recipe, su.TokenStore(store_dir, recipe), run_dir)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> bool:
    """The child has ended; it is still to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_at_random(draw: random.Random, pid: int, board: Board, steps: float, typical: list[float]) -> tuple[str | None, int]:
    """kill -9 within the next `steps` steps: (the phase it was in, or None if it had ended before; its wait status).

    typical: seconds of each phase, typical[0] of a whole step; how long after a phase or step has begun to strike.
    """
    wanted, nth = draw.choice([0] * 6 + list(range(1, len(PHASES)))), draw.choice([1, 1, 2, 3])
    latest = draw.uniform(0, steps) if not wanted else steps          # when the phase does not come in this session
    while not ended(pid):
        begun = board.entered[0] and (board.entered[1] >= int(latest) or wanted and board.entered[wanted] >= nth)
        if begun:
            break
        time.sleep(0.0002)
    time.sleep(draw.uniform(0, typical[wanted]))
    phase = PHASES[int(board.phase[0])]
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return phase if status == signal.SIGKILL else None, status


def differences(a: Path, b: Path) -> list[str]:
    """Files in which two finished runs differ; clocks apart."""
    newest = su.checkpoint_folders(a)[-1].name
    names = ["final/model.safetensors", "best/model.safetensors", "training_curves.csv",
             *(f"checkpoints/{newest}/{name}.safetensors" for name in ("model", "optimizer", "ema"))]
    found = [name for name in names if not (b / name).exists() or (a / name).read_bytes() != (b / name).read_bytes()]

    def state(folder):
        path = folder / "checkpoints" / newest / "state.json"
        return {**json.loads(path.read_text()), "seconds": 0} if path.exists() else None

    def rows(folder):
        clocks = {"tokens_per_second", "wait_seconds", "elapsed_seconds"}
        return [{k: v for k, v in json.loads(line).items() if k not in clocks}
                for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found + ["state.json"] * (state(a) != state(b)) + ["metrics.jsonl"] * (rows(a) != rows(b))


def soak(folder: Path, store_dir, runs: int, kills: int, seed: int = 0) -> dict:
    """Runs killed `kills` times each and then left to finish, against one left alone; more until runs x kills have struck."""
    recipe, draw, began = soak_recipe(store_dir), random.Random(seed), time.monotonic()
    alone = folder / "alone"
    pid, board = start(recipe, store_dir, alone)
    assert os.waitpid(pid, 0)[1] == 0, (alone / "log.txt").read_text()
    whole, typical = time.monotonic() - began, (board.seconds / np.maximum(1, board.entered[:len(PHASES)])).tolist()
    typical[0] = whole / recipe.total_steps
    counts = {"runs": 0, "kills": 0, "kills_by_phase": dict.fromkeys(PHASES, 0), "differing_files": [],
              "unloadable_resumes": 0, "restarts_from_step_0_although_saved": 0, "left_behind": [],
              "seconds_undisturbed": whole}
    while counts["runs"] < runs or counts["kills"] < runs * kills:
        run_dir, killed = folder / f"run-{counts['runs']}", 0
        counts["runs"] += 1
        assert counts["runs"] <= 10 * runs, f"runs end before they can be killed: {counts}"
        while True:
            saved = bool(su.checkpoint_folders(run_dir))
            logged = len((run_dir / "log.txt").read_text()) if run_dir.exists() else 0
            pid, board = start(recipe, store_dir, run_dir)
            if killed < kills:
                phase, status = kill_at_random(draw, pid, board, recipe.total_steps / (kills + 1), typical)
            else:
                phase, status = None, os.waitpid(pid, 0)[1]
            if phase:
                killed += 1
                counts["kills"] += 1
                counts["kills_by_phase"][phase] += 1
            log = (run_dir / "log.txt").read_text()[logged:]
            if "set aside" in log or "CheckpointError" in log:
                counts["unloadable_resumes"] += 1
                print(log, file=sys.stderr)
            if saved and board.entered[1] and "going on from step" not in log:
                counts["restarts_from_step_0_although_saved"] += 1
            if not phase:
                break
        counts["differing_files"] += [f"{run_dir.name}: exit {status}"] if status else [
            f"{run_dir.name}/{name}" for name in differences(alone, run_dir)]
        counts["left_behind"] += [str(p.relative_to(folder)) for p in run_dir.rglob(".*") if p.name != ".lock"]
        if not counts["differing_files"]:
            shutil.rmtree(run_dir)
    return counts | {"seconds": time.monotonic() - began}


def resume_times(folder: Path, store_dir, steps: int = 200) -> dict[str, float]:
    """Seconds from the start of a new process to the end of its first step, when the run was 10, 50 and 90% through."""
    recipe = dataclasses.replace(soak_recipe(store_dir, steps), logging_steps=1, eval_steps=steps, best_eval_steps=steps,
                                 save_every_minutes=1000)
    run_dir, times = folder / "resumed", {}
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps({"recipe": recipe.to_dict(), "store": str(store_dir),
                                                  "tokenizer": str(Path(store_dir).parent / "tokenizer")}))
    for percent in (10, 50, 90, 100):
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "stentor_utils", "train", str(run_dir / "run.json")], cwd=REPO,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            if line.startswith("step") and "| loss" in line:
                if times.get("last"):
                    times[times.pop("last")] = time.monotonic() - began
                if int(line.split("/")[0].split()[1]) >= steps * percent / 100:
                    process.terminate()
                    break
        process.communicate()
        times["last"] = f"{percent}%"
    times.pop("last")
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", help="a token store; by default one is made")
    parser.add_argument("--report", help="folder for reliability.json and benchmarks/reliability.md")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  imported once, here
    with tempfile.TemporaryDirectory() as folder:
        folder, store_dir = Path(folder), arguments.store
        if not store_dir:
            code = ("import sys; sys.path[:0] = sys.argv[2:]\nfrom pathlib import Path\nfrom conftest import make_tiny\n"
                    "make_tiny(Path(sys.argv[1]))")
            subprocess.run([sys.executable, "-c", code, str(folder), str(REPO), str(REPO / "tests")], check=True)
            store_dir = folder / "tokens"
        counts = soak(folder / "runs", store_dir, arguments.runs, arguments.kills, arguments.seed)
        lost = counts["differing_files"] or counts["unloadable_resumes"] or counts["restarts_from_step_0_although_saved"]
        if arguments.report:
            counts["seconds_to_first_step_after_resume"] = resume_times(folder, store_dir)
            report(Path(arguments.report), counts)
    print(json.dumps(counts))
    return 1 if lost else 0


def report(folder: Path, counts: dict) -> None:
    """outputs/reliability.json, and the table that `make results` puts into docs/results.md."""
    (folder / "benchmarks").mkdir(parents=True, exist_ok=True)
    machine = su.environment()
    su.write_atomically(folder / "reliability.json", json.dumps(
        counts | {"machine": f"{machine['cpu']}, {machine['cpu_count']} cores, torch {torch.__version__}"}, indent=1))
    phases = ", ".join(f"{n} in {phase}" for phase, n in counts["kills_by_phase"].items() if n)
    first = counts["seconds_to_first_step_after_resume"]
    su.write_atomically(folder / "benchmarks" / "reliability.md", "\n".join([
        "Never lose a run (`make soak`):", "", "| | |", "|---|---|",
        f"| runs, kill -9 in them | {counts['runs']}, {counts['kills']}: {phases} |",
        f"| files that differ from a run left alone (weights, optimiser, EMA, state, metrics) | "
        f"{len(counts['differing_files'])} |",
        f"| resumes that found no loadable checkpoint | {counts['unloadable_resumes']} |",
        f"| restarts from step 0 although something was saved | {counts['restarts_from_step_0_although_saved']} |",
        f"| files left behind by kills at the end | {len(counts['left_behind'])} |",
        "| seconds from a new process to its first step, the run at " + ", ".join(first) + " | "
        + ", ".join(f"{seconds:.1f}" for seconds in first.values())
        + f" (median {statistics.median(first.values()):.1f}) |", ""]))


if __name__ == "__main__":
    sys.exit(main())
