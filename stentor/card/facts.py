"""Values of a model card and where they come from.

Card text is written with marks where values go. A mark remembers file, path and format; the values
are filled in at the end.
"""
from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from stentor.files import ParameterError
from stentor.inference import guide_record
from stentor.published import ALL_RECIPES, card_recipe
from stentor.shapes import Shape

NOT_MEASURED = "not measured"
# What a card can be of: the model's folder in the run's, and where the card's record stands.
SUBJECTS = {"final": ("final", "model_card.json"),
            "instruct": ("instruct/final", "instruct/model_card.json"),
            "growth": ("growth/final", "growth/model_card.json"),
            "export": ("export", "export/model_card.json")}
# Of Facts files that are no files of the run.
PUBLISHED, GUIDE = "published recipe ", "published settings for "
MARK = re.compile(r"FIGUREx(\d+)x")                   # plain letters: YAML must not quote it
# A number and what is glued to it (4.9041, 240,001,024, 12M, v5e-8, 1e-05): any word with a digit
# in it.
NUMBER = re.compile(r"[\w+.,%-]*\d[\w+.,%-]*")


@dataclass(frozen=True)
class Figure:
    """Something in the card that is not our prose: its text, the file it is from, and the place in
    it or the formula."""
    text: str
    file: str
    path: str


class Facts:
    """The files of a run folder, and the figures taken from them in the order in which they were
    asked for.

    `show`, `derive` and the others return a mark to write into the text, or "not measured".
    of: which model of the run the card is of, a key of SUBJECTS; `model` is that model's folder in
    the run's, `config` the one whose config.json describes it (08's formats have final/'s), and
    `record` the file with the card's parameters.
    """

    def __init__(self, run_dir, of: str = "final"):
        if of not in SUBJECTS:
            raise ParameterError([f"of = {of!r}: a card can be of {', '.join(SUBJECTS)}."])
        self.folder, self.files, self.figures = Path(run_dir), {}, []
        self.of, (self.model, self.record) = of, SUBJECTS[of]
        self.config = "final" if of == "export" else self.model

    def read(self, file: str):
        """The parsed .json, .jsonl (list of rows) or .csv (list of dicts of text); None where it
        is not there or broken."""
        if file not in self.files:
            path, content = self.folder / file, None
            try:
                if file.startswith(PUBLISHED):
                    content = ALL_RECIPES[file.removeprefix(PUBLISHED)].to_dict()
                elif file.startswith(GUIDE):
                    content = guide_record(file.removeprefix(GUIDE))
                elif file.endswith(".csv"):
                    with open(path, newline="", encoding="utf-8") as opened:
                        content = list(csv.DictReader(opened))
                elif file.endswith(".jsonl"):
                    lines = path.read_text(encoding="utf-8").splitlines()
                    content = [json.loads(line) for line in lines]
                else:
                    content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, KeyError):
                pass
            self.files[file] = content
        return self.files[file]

    def get(self, file: str, *path):
        """The value at `path` in `file`; None where it is not there, empty, or not a finite
        number."""
        value = self.read(file)
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        strange = isinstance(value, float) and not math.isfinite(value)
        return None if value == "" or strange else value

    def mark(self, text: str, file: str, path: str) -> str:
        self.figures.append(Figure(text, file, path))
        return f"FIGUREx{len(self.figures) - 1}x"

    def show(self, file: str, *path, form=",") -> str:
        """The value at `path`: a number by the format `form`, or through `form` where that is a
        function."""
        value = self.get(file, *path)
        text = None if value is None else write(value, form)
        return NOT_MEASURED if text is None else self.mark(text, file, ".".join(map(str, path)))

    def derive(self, compute, form, formula: str, *inputs) -> str:
        """compute(values of the inputs), each input a (file, *path); "not measured" when one of
        them is missing."""
        values = [self.get(*place) for place in inputs]
        text = None
        if None not in values:
            try:
                text = write(compute(*values), form)
            except (TypeError, ValueError, ZeroDivisionError, KeyError, AttributeError):
                pass                                  # a value that is there but makes no sense
        return NOT_MEASURED if text is None else self.mark(
            text, ", ".join(dict.fromkeys(place[0] for place in inputs)), formula)

    def name(self, file: str, *path) -> str:
        """The last key of `path` itself, such as the name of a source: names hold digits too."""
        return self.mark(cell(path[-1]), file, ".".join(map(str, path)) + " (its name)")


def write(value, form) -> str | None:
    """`value` as text; None where a number is wanted and it is none."""
    if callable(form):
        return form(value)
    try:
        value = float(value) if isinstance(value, str) else value
        return None if isinstance(value, bool) or not math.isfinite(value) else format(value, form)
    except (TypeError, ValueError):
        return None


def cell(value) -> str:
    """Any text as one line that cannot break out of a table cell."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def plain(value) -> str:
    """A hyperparameter as one reads it: 4,000,000; 0.004; prose, code; none."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or "none"
    return cell(value)


def fill(text: str, figures: list[Figure]) -> tuple[str, list[tuple[int, int, Figure]]]:
    """The text with its marks replaced, and (start, end, figure) of each in it."""
    pieces, spans, at, size = [], [], 0, 0
    for found in MARK.finditer(text):
        figure = figures[int(found.group(1))]
        pieces += [text[at:found.start()], figure.text]
        size += found.start() - at
        spans.append((size, size + len(figure.text), figure))
        size, at = size + len(figure.text), found.end()
    return "".join([*pieces, text[at:]]), spans


# What several sections ask for.


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def own_recipe(facts: Facts) -> str | None:
    """The published recipe that the run's recipe comes from, or is a twin of, as the name of a
    file of `Facts`; None for an own one."""
    name = str(facts.get("run.json", "recipe", "name") or "").removesuffix("-cpu")
    return PUBLISHED + card_recipe(name).name if name in ALL_RECIPES else None


def shape_place(facts: Facts) -> tuple:
    """Where the shape of the card's model stands: in the run's recipe, or in the folder's own
    config.json, which 04 and 07 may have made from another model."""
    if facts.of == "final":
        return "run.json", "recipe", "shape"
    return f"{facts.config}/config.json",


def shape_from(values: dict) -> Shape:
    """The Shape in a recipe's or a config.json's values; KeyError or TypeError where there is none."""
    names = {field.name for field in dataclasses.fields(Shape)}
    known = {name: values[name] for name in names if name in values}
    if "rope_parameters" in values:
        known["rope_theta"] = values["rope_parameters"]["rope_theta"]
    if values.get("model_type") == "qwen3":
        known["qk_norm"] = True
    return Shape(**known)


def benchmark_rows(facts: Facts) -> tuple[str | None, list[int]]:
    """(this model's name in benchmark/results.csv, the numbers of its rows)."""
    model = facts.get("benchmark/model_index.json", "model-index", 0, "name")
    rows = facts.read("benchmark/results.csv") or []
    return model, [i for i, row in enumerate(rows) if row.get("model") == model]


def yaml_text(value) -> str:
    """Any text as one quoted line of YAML. JSON is not it: its \\ud83d\\ude00 for an emoji is read
    as two broken halves."""
    import yaml
    return yaml.safe_dump(str(value), default_style='"', allow_unicode=True, width=math.inf).strip()


def fenced(facts: Facts, *place) -> str:
    """A text from a file in a fence longer than any in it."""
    value = str(facts.get(*place))
    fence = "~" * max(3, 1 + max(map(len, re.findall("~+", value)), default=0))
    text = facts.show(*place, form=lambda text: str(text).strip() or "(nothing)")
    return f"{fence}text\n{text}\n{fence}"
