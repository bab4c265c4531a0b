"""docs/gallery and outputs/html: pictures of a run that was really made, each from its files.

    python -m stentor_utils gallery outputs/demo docs/gallery outputs/html

Nothing is drawn that the run did not measure: a picture whose file is not there is left out, and
one line says so.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path

from stentor.charts import TINTS, draw_training, panels
from stentor.files import ParameterError, write_atomically
from stentor.tokenizer import load_tokenizer

SENTENCE = ("The history of computing began long before there were machines: "
            "people counted, and wrote down what they had counted.")
# 06's charts, in the order in which the page shows them, and what to look for in each.
CHARTS = {
    "bits_per_byte": "Bits per byte of held-out text, which compares across tokenizers.",
    "health": "Learning rate, gradients and loss scale over the run.",
    "mixture": "Where the tokens of each step came from.",
    "parameters": "Where the parameters sit, beside the published models.",
    "sft": "Instruct tuning: loss by phase.",
    "probe": "What the tuned model answers, by tested labels.",
    "benchmark": "Scores with their intervals; the line is chance.",
    "blimp": "Grammar by phenomenon.",
    "published": "The published curves, redrawn."}
CAPTIONS = {
    "training_curves": "Loss and bits per byte of the run; the dashed line is what counting pairs of "
                       "bytes gives.",
    "segmentation": "A sentence as the run's own tokenizer cuts it: a colour a token.", **CHARTS}


def draw_segmentation(tokenizer, text: str, width: int = 64):
    """The figure of a text with a box for each token, in lines of about `width` characters.

    Tokens that hold a part of a character are joined until they hold it whole.
    """
    pieces, ids = [], []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        ids.append(token)
        piece = tokenizer.decode(ids)
        if "\ufffd" not in piece:
            pieces.append(piece)
            ids = []
    lines, column = [[]], 0
    for piece in pieces:
        if column + len(piece) > width and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((column, piece))
        column += len(piece)
    figure, ax = panels(0.1 * width, 0.36 * len(lines) + 0.35)
    ax.set(xlim=(0, width), ylim=(len(lines), 0), title=f"{len(pieces)} tokens, {len(text)} characters")
    ax.axis("off")
    colour = 0
    for row, line in enumerate(lines):
        for at, piece in line:
            ax.add_patch(_box(at, row, len(piece), TINTS[colour % len(TINTS)]))
            for i, letter in enumerate(piece):
                ax.text(at + i + 0.5, row + 0.5, letter, ha="center", va="center", family="monospace",
                        fontsize=9)
            colour += 1
    return figure


def _box(at: int, row: int, width: int, colour: str):
    from matplotlib.patches import Rectangle
    return Rectangle((at, row + 0.08), width, 0.84, facecolor=colour, edgecolor="white")


def draw_gallery(run_dir, folder) -> list[str]:
    """Write the charts of the run to folder/<name>.png; the names, in the page's order."""
    run_dir, folder = Path(run_dir), Path(folder)
    if not (run_dir / "metrics.jsonl").is_file():
        raise ParameterError([f"{run_dir} has no metrics.jsonl: `make run` makes a run to show."])
    folder.mkdir(parents=True, exist_ok=True)
    yardsticks = {}
    if (run_dir / "baseline.json").is_file():
        bigram = json.loads((run_dir / "baseline.json").read_text())
        yardsticks = {"byte bigram model": bigram["byte_bigram_bits_per_byte"]}
    draw_training(run_dir, yardsticks=yardsticks).savefig(folder / "training_curves.png", dpi=120)
    tokenizer = load_tokenizer(run_dir / "final")
    draw_segmentation(tokenizer, SENTENCE).savefig(folder / "segmentation.png", dpi=120)
    made = ["training_curves", "segmentation"]
    for name in CHARTS:
        (folder / f"{name}.png").unlink(missing_ok=True)       # of an earlier gallery
        if (run_dir / "charts" / f"{name}.png").is_file():
            shutil.copy(run_dir / "charts" / f"{name}.png", folder / f"{name}.png")
            made.append(name)
        else:
            print(f"{name}: left out, {run_dir / 'charts'} has none (06 draws it)")
    return made


def photograph_demo(run_dir, folder) -> None:
    """Screenshots of the demo's tabs in use; one line where they cannot be taken here."""
    from stentor.demo.pictures import take_of_run
    try:
        for path in take_of_run(run_dir, folder):
            print(path)
    except ParameterError as error:
        print(f"the demo's screenshots stay as they are: {error}")


def write_html(run_dir, folder) -> list[Path]:
    """<folder>/<notebook>.html of each executed notebook of the run; their paths.

    Raises ParameterError where nbconvert is not installed, or no notebook was executed.
    """
    try:
        from nbconvert import HTMLExporter
    except ImportError:
        raise ParameterError(["the notebooks' HTML needs nbconvert: pip install nbconvert"]) from None
    executed, written = sorted((Path(run_dir) / "notebooks").glob("*.ipynb")), []
    if not executed:
        raise ParameterError([f"{run_dir}/notebooks holds no executed notebook: `make run` first."])
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in executed:
        page, _ = HTMLExporter().from_filename(str(path))
        written.append(Path(folder) / f"{path.stem}.html")
        write_atomically(written[-1], page)
    return written


def write_page(folder, names: list[str]) -> Path:
    """<folder>/README.md, which shows these pictures and the demo's."""
    folder = Path(folder)
    parts = ["# Gallery", "", "Written by `make gallery` from the files of one run; every picture is "
             "drawn from what that run measured.", ""]
    for name in names:
        parts += [CAPTIONS[name], "", f"![{name.replace('_', ' ')}]({name}.png)", ""]
    for path in sorted(folder.glob("demo-*.png")):
        tab = path.stem.removeprefix("demo-").replace("-", " ")
        parts += [f"The demo: {tab}.", "", f"![demo, {tab}]({path.name})", ""]
    write_atomically(folder / "README.md", "\n".join(parts))
    return folder / "README.md"


def make_gallery(run_dir, folder, html) -> None:
    """The pictures of a run and their page in `folder`, its executed notebooks in `html`."""
    names = draw_gallery(run_dir, folder)
    photograph_demo(run_dir, folder)
    print(write_page(folder, names))
    for path in write_html(run_dir, html):
        print(path)
