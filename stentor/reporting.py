"""Figures in README.md and docs/: each stands in a block that `make results` wrote from named files.

    <!-- figures run | outputs/demo/summary.json, ... | 1a2b3c4d5e6f -->
    ... the table, and a line with its files, machine, commit and date ...
    <!-- end run -->

The last word of the mark is the hash of what stands between: a figure that somebody typed over is found
(`block_problems`, which `make lint` calls). A block whose files are not here, or say the same, stays
as it is, with the commit and the date at which its figures were first written.
"""
from __future__ import annotations

import hashlib
import json
import re
import subprocess
from datetime import date
from pathlib import Path

from stentor.files import ParameterError, duration, write_atomically
from stentor.launch import environment
from stentor.results import bigram_line, draws_like, figures, read_json, spread

BLOCK = re.compile(r"<!-- figures (?P<name>[\w-]+) \| (?P<files>[^|>]*) \| (?P<hash>\w+) -->\n"
                   r"(?P<text>.*?)<!-- end (?P=name) -->", re.S)


def write_results(run_dir, *pages) -> list[str]:
    """Every block of those pages, from what lies in outputs/; the names of those that were written.

    run_dir: the run of `make run`; its folder's folder is outputs/. Raises ParameterError where the
    run has not ended, or a page is not there.
    """
    run_dir = Path(run_dir)
    read_json(run_dir / "summary.json")
    machine, written = environment(), []
    stamp = (f"{machine['cpu']}, {machine['cpu_count']} cores; written at commit {_commit()}, "
             f"{date.today().isoformat()}")
    for page in map(Path, pages):
        if not page.is_file():
            raise ParameterError([f"{page} is not there; name README.md and docs/results.md."])

        def fresh(block):
            made = make_block(block["name"], run_dir)
            if not made or block["text"].startswith(f"{made[0].strip()}\n\n*"):
                return block[0]                       # the commit and date of its figures stay
            text, files = made
            written.append(block["name"])
            return sealed(block["name"], f"{text.strip()}\n\n*{', '.join(files)}; {stamp}.*", files)
        write_atomically(page, BLOCK.sub(fresh, page.read_text()))
    return written


def sealed(name: str, text: str, files: list[str]) -> str:
    """The block of this text, with its files and its hash."""
    text = text.strip() + "\n"
    return f"<!-- figures {name} | {', '.join(files)} | {_hash(text)} -->\n{text}<!-- end {name} -->"


def block_problems(page: str) -> list[str]:
    """One sentence for each block of a page that names no file or was changed by hand."""
    found = []
    for block in BLOCK.finditer(page):
        if not block["files"].strip():
            found.append(f"the block {block['name']} names no file that its figures come from.")
        if _hash(block["text"]) != block["hash"]:
            found.append(f"the block {block['name']} was changed by hand: `make results` writes it.")
    return found


def make_block(name: str, run_dir: Path) -> tuple[str, list[str]] | None:
    """(Markdown, its files) of the block of that name; None where its files are not here."""
    if name.startswith("bench-"):
        path = run_dir.parent / "benchmarks" / f"{name.removeprefix('bench-')}.md"
        return (path.read_text(), [f"outputs/benchmarks/{path.name}"]) if path.is_file() else None
    makers = {"run": _run, "samples": _samples, "six": _six, "minutes": _minutes}
    if name not in makers:
        raise ParameterError([f"the block {name!r} is none of {', '.join(makers)}, bench-<name>."])
    return makers[name](run_dir)


def _run(run_dir: Path):
    rows = figures(run_dir)
    table = "\n".join(["| `make run` | |", "|---|---|",
                       *(f"| {name} | {value} |" for name, value in rows.items())])
    return table, _names(run_dir, "summary.json", "environment.json", "baseline.json",
                         "tokens/manifest.json")


def _samples(run_dir: Path):
    """Three continuations as they are, the first ones: chosen by nobody."""
    if not (run_dir / "samples.json").is_file():
        return None
    samples = read_json(run_dir / "samples.json")["samples"][:3]
    lines = [f"> **{sample['prompt']}** {' '.join(sample['text'].split())}" for sample in samples]
    return "\n>\n".join(line.replace("<", "&lt;") for line in lines), _names(run_dir, "samples.json")


def _six(run_dir: Path):
    """What matters, a row each; "not measured" where its file is not in outputs/."""
    summary, draws = read_json(run_dir / "summary.json"), draws_like(run_dir)
    bigram = bigram_line(run_dir / "baseline.json", draws)
    rows = [(f"bits per byte of held-out text, {summary['parameters']:,} parameters after "
             f"{summary['tokens']:,} tokens in {duration(summary['seconds'])}",
             f"{spread(draws, 'bits_per_byte')}; a byte bigram model {bigram}")]
    files = _names(run_dir, "summary.json", "baseline.json")
    for name, title, read in OTHER_FIGURES:
        path, figure = run_dir.parent / name.format(run=run_dir.name), None
        if path.is_file():
            files.append(f"outputs/{path.relative_to(run_dir.parent)}")
            figure = read(read_json(path))
        rows.append((title, figure or "not measured"))
    table = ["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)]
    return "\n".join(table), list(dict.fromkeys(files))


def _speedrun_share(found: dict) -> str | None:
    rows = [row for row in found["ratios"] if row["width"] == found["width"]]
    return rows and spread(rows, "share", 3)


def _speedrun_time(found: dict) -> str | None:
    rows = [row for row in found["times"]
            if row["width"] == found["width"] and row["who"] == "trainer"]
    return rows and spread(rows, "share", 3)


def _kills(found: dict) -> str:
    return f"{len(found['differing_files'])} after {found['kills']} kills in {found['runs']} runs"


def _same_tokens(found: dict) -> str | None:
    """Of the formats that compute in FP32 elsewhere, and so claim to be exact."""
    return ", ".join(f"{row['format']} {row['greedy_equal']} of {row['greedy_of']}"
                     for row in found["formats"] if row["format"] in ("gguf-f32", "onnx")) or None


# (file of outputs/, what it is a figure of, how it is read): the rows of `_six` after the first.
OTHER_FIGURES = (
    ("speedrun.json", "tokens until the loss that the card's recipe ends with, of the card's",
     _speedrun_share),
    ("speedrun.json", "time until then, of the card's recipe in `transformers.Trainer`",
     _speedrun_time),
    ("reliability.json", "files that differ after kills, of runs left alone", _kills),
    ("{run}/growth/payoff.json", "growing a small model against from scratch",
     lambda found: found["verdict"]["sentence"]),
    ("{run}/export/export.json",
     "prompts whose greedy continuation is transformers', token for token", _same_tokens))


# What the Makefile's `run` runs.
MAKE_RUN = "01_tokenizer", "02_pretrain_t4", "04_instruct_sft", "05_benchmark", "06_charts"


def _minutes(run_dir: Path):
    """How long each notebook took in its last run, by papermill's own clock, and `make run`'s
    together."""
    paths = sorted((run_dir / "notebooks").glob("*.ipynb"))
    clock = {path: json.loads(path.read_text())["metadata"].get("papermill", {}).get("duration")
             for path in paths}
    seconds = {path.stem: value for path, value in clock.items() if value}
    if not seconds:
        return None
    rows = [["", *(name[:2] for name in seconds)], ["---"] * (len(seconds) + 1),
            ["on this CPU", *map(duration, seconds.values())]]
    together = [seconds[name] for name in MAKE_RUN if name in seconds]
    said = (f"`make run` ({', '.join(name[:2] for name in MAKE_RUN)}) together: "
            f"{duration(sum(together))}.") if len(together) == len(MAKE_RUN) else ""
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{said}"
    return text, _names(run_dir, "notebooks/*.ipynb")


def _names(run_dir: Path, *files: str) -> list[str]:
    return [f"outputs/{run_dir.name}/{file}" for file in files]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                          cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"
