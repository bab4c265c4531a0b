"""Task files as people publish them, read into one form of row."""
from __future__ import annotations

import ast
import codecs
import contextlib
import csv
import io
import json
import re
import string
from pathlib import Path

from stentor.files import ParameterError

TASK_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".arrow", ".feather", ".xlsx")
PASSAGES = ("context", "passage", "article")
QUESTIONS = ("query", "question", "question_stem", "ctx", "context", "prompt", "goal")
LABELS = ("label", "gold", "answer", "answerKey")


class Row(dict):
    """One row of a task file. where: which one, to be said of a fault in it."""
    where = ""


class RowError(ValueError):
    """What is wrong with one row, without its file and number."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, every value as it stands there.

    Text is UTF-8, with or without a byte order mark, or UTF-16 with one; any line ends. Bytes
    that are no UTF-8 are kept as lone surrogates, and refused where a task reads them. Raises
    ParameterError, naming file, line and row.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow.parquet import read_table
            rows = [(None, row) for row in read_table(path).to_pylist()]
        else:
            data = path.read_bytes()
            utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            text = data.decode("utf-16" if utf16 else "utf-8-sig", "surrogateescape")
            if path.suffix.lower() in (".csv", ".tsv"):
                rows = table_rows(text, "," if path.suffix.lower() == ".csv" else "\t")
            else:
                rows = json_rows(text, lines_only=path.suffix.lower() == ".jsonl")
    except (RowError, OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        comma = ", " if isinstance(error, RowError) else " cannot be read: "
        raise ParameterError([f"{path}{comma}{error}"]) from None
    found = []
    for number, (line, row) in enumerate(rows):
        where = f"line {line}, row {number}" if line else f"row {number}"
        if not isinstance(row, dict):
            raise ParameterError([
                f"{path}, {where}: {shortened(row)} is no row of named columns."])
        found.append(Row(row))
        found[-1].where = where
    return found


def table_rows(text: str, delimiter: str) -> list[tuple[int, dict]]:
    """[(line, row)] of a table with a header, as spreadsheets write it."""
    csv.field_size_limit(2**31 - 1)                   # its own limit is 131,072 characters a cell
    lines, rows = io.StringIO(text, newline=""), []
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise RowError(f"line 1: the column name {twice[0]!r} stands there twice.")
        line = reader.line_num + 1
        for cells in reader:
            if any(cells) and len(cells) != len(header):
                raise RowError(f"line {line}, row {len(rows)}: {len(cells)} cells under "
                               f"{len(header)} column names; put a cell that holds the separator in "
                               "quotes.")
            if any(cells):
                rows.append((line, dict(zip(header, cells))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise RowError(f"line {reader.line_num}, row {len(rows)}: {error}.") from None
    return rows


def json_rows(text: str, lines_only: bool) -> list[tuple[int | None, object]]:
    """[(line, row)] of one JSON value a line.

    Without lines, of a list: alone, or the only list of an object.
    """
    if not lines_only:
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None                              # then it may be lines under another name
        if isinstance(whole, dict):
            lists = [value for value in whole.values() if isinstance(value, list)]
            if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
                whole, = lists
        if isinstance(whole, list):
            return [(None, row) for row in whole]
    rows = []
    for line, part in enumerate(io.StringIO(text, newline=None), 1):
        if not part.strip():
            continue
        try:
            rows.append((line, json.loads(part)))
        except (ValueError, RecursionError) as error:
            what = error
            if hasattr(error, "msg"):
                what = f"{error.msg} at its character {error.pos + 1}"
            where = f"line {line}, row {len(rows)}"
            raise RowError(f"{where}: {shortened(part)} is not JSON: {what}.") from None
    return rows


def shortened(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def text_of(value, column: str) -> str:
    """A value that stands for text: a string, or a number as it is written."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} = {shortened(value)} is no text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{column} = {shortened(value)} is not UTF-8 text; save the file as "
                       "UTF-8.") from None
    return value


def structure(value):
    """A list or an object that a table's cell holds as JSON, or as Python prints it.

    Any other value as it is.
    """
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value)
    return value


def question_of(row: dict) -> str:
    """The question of a row, behind the passage that it is asked of if that has its own column."""
    name = next((name for name in QUESTIONS if name in row), None)
    if name is None:
        known = f"{', '.join(QUESTIONS[:-1])} or {QUESTIONS[-1]}"
        raise RowError(f"there is no question; name its column {known}.")
    passages = PASSAGES if name == "question" else ()
    passage = next((column for column in passages if row.get(column)), None)
    return "\n".join(text_of(row[column], column) for column in (passage, name) if column)


def choices_of(row: dict) -> tuple[list[str], list[str]]:
    """(texts of the choices, the names that a label may call them by: [] if the file gives none)."""
    column = next((name for name in ("choices", "endings", "options") if name in row), None)
    found, names = structure(row[column]) if column else None, []
    if isinstance(found, dict):                       # ARC on the hub: {"text": [...], "label": [...]}
        found, names = found.get("text"), found.get("label") or []
    elif isinstance(found, list) and found and all(isinstance(choice, dict) for choice in found):
        names = [choice.get("label") for choice in found]         # ARC's own files
        found = [choice.get("text") for choice in found]
    elif column is None and "sol1" in row:            # PIQA
        column, found = "sol1, sol2", [row["sol1"], row.get("sol2")]
    elif column is None:                              # MMLU's tables: a column a choice
        column, letters = "A, B, C, ...", string.ascii_uppercase
        found = [row[name] for name in letters if row.get(name) not in (None, "")]
    if found == []:
        raise RowError("there are no choices; name their column choices or endings.")
    if not isinstance(found, list):
        raise RowError(f"{column} = {shortened(row.get(column))} is no list of choices.")
    return ([text_of(choice, f"a choice of {column}") for choice in found],
            [str(name).strip() for name in names])


def whole_number(value) -> int | None:
    """The number that a label is, also as "2", 2.0 or "2.0"; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if value == value and abs(value) < 1e9 and value == int(value) else None
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}(\.0+)?", value.strip()):
        return int(float(value))
    return None


def gold_of(label, texts: list[str], names: list[str], counting: str) -> int | None:
    """The index of the choice that a label names; None if it names none.

    counting: "from 0", "from 1" or "as text".
    """
    name = str(label).strip()
    if name in names:
        return names.index(name)
    number = whole_number(label)
    if number is not None:
        index = number - (counting == "from 1")
        if counting == "as text":
            index = texts.index(name) if texts.count(name) == 1 else -1
    elif isinstance(label, str) and re.fullmatch(r"\(?[A-Za-z]\)?[.:]?", name):
        index = string.ascii_uppercase.index(name.strip("().:").upper())
    else:
        index = texts.index(name) if isinstance(label, str) and texts.count(name) == 1 else -1
    return index if 0 <= index < len(texts) else None


def counting_of(column: str, labels: list, choices: list[tuple[list[str], list[str]]]) -> str:
    """How a file's labels name choices, read off all its rows.

    From 0, unless only another way names one in every row.
    """
    numbers = [whole_number(label) for label in labels]
    if column == "answerKey" and 0 not in numbers:    # ARC's way
        return "from 1"
    fits = [way for way in ("from 0", "from 1", "as text")
            if all(gold_of(label, *choice, way) is not None
                   for label, choice in zip(labels, choices))]
    return fits[0] if fits else "from 0"
