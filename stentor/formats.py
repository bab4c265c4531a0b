"""Rows of text files as people's tools write them: one reader for each format, all by blocks.

A reader yields (number of the next row, value) from row `start` on and holds a few megabytes, however
long the file is.
"""
from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from stentor.files import ParameterError
from stentor.hub import HubFile
from stentor.recipes import Source

codecs.register_error("lone_surrogate", lambda error: ("\ud800", error.end))

LONGEST_ROW = 32 << 20     # characters: one line, element, record or document of a .txt
_PACKINGS = ("gz", "bz2", "xz", "zst", "lz4")
_FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "txt", "parquet", "arrow")
READABLE = (f".{', .'.join(_FORMATS[:6])}, these also packed as .{', .'.join(_PACKINGS)}; "
             ".parquet, .arrow")
# datasets.data_files' FILES_TO_IGNORE, and what save_to_disk writes beside its .arrow.
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class BadRow:
    """Stands in a stream for a row that cannot be read; `reason` is what it is counted as."""
    reason: str


TOO_LONG = BadRow(f"longer than {LONGEST_ROW:,} characters")


def format_of(name: str) -> tuple[str, str]:
    """(one of _FORMATS, one of _PACKINGS or "") by the name's endings; ("", "") if it cannot be read."""
    endings = ["", *re.split(r"[/\\]", name.lower())[-1].split(".")[1:]]
    packing = endings.pop() if endings[-1] in _PACKINGS else ""
    if endings[-1] not in _FORMATS or (packing and endings[-1] in ("parquet", "arrow")):
        return "", ""
    return endings[-1], packing


def _is_hidden(name: str) -> bool:
    """.git, .ipynb_checkpoints, ._text.txt, __MACOSX and their like."""
    return any(part.startswith((".", "__")) for part in name.split("/"))


def visible_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*"))
            if p.is_file() and not _is_hidden(p.relative_to(folder).as_posix())]


def is_data(name: str) -> bool:
    beside = name.rpartition("/")[2].lower() in _NOT_DATA
    return bool(format_of(name)[0]) and not _is_hidden(name) and not beside


_NO_TEXT = {b"\x1f\x8b": "is packed by gzip", b"BZh": "is packed by bzip2",
            b"\xfd7zXZ": "is packed by xz", b"\x28\xb5\x2f\xfd": "is packed by zstd",
            b"PK\x03\x04": "is a zip archive", b"PAR1": "is a parquet file",
            b"ARROW1": "is an arrow file",
            b"version https://git-lfs": "is a pointer of Git LFS (fetch the file: git lfs pull)"}


def _unpacked(file, packing: str):
    """An open file as it was before gzip, bzip2, ... packed it."""
    if packing == "gz":
        import gzip
        return gzip.open(file)
    if packing == "bz2":
        import bz2
        return bz2.open(file)
    if packing == "xz":
        import lzma
        return lzma.open(file)
    if packing:
        import pyarrow as pa
        return pa.input_stream(file, compression={"zst": "zstd"}.get(packing, packing))
    return file


def _blocks(file, name: str):
    """The text of an open file, a megabyte at a time, every line end as \\n.

    In the encoding that its first bytes tell.
    """
    block = file.read(1 << 20)
    for magic, what in _NO_TEXT.items():
        if block.startswith(magic):
            raise ParameterError([f"{name} {what}, not what its ending says."])
    decoder = codecs.getincrementaldecoder(json.detect_encoding(block))("lone_surrogate")
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    while block:
        yield decoder.decode(block)
        block = file.read(1 << 20)
    yield decoder.decode(b"", final=True)


def _split(blocks, separator: str):
    """What stands between the separators; nothing behind a last one.

    What is over LONGEST_ROW comes cut, and longer than that. Lines are split at "\n", not by
    str.splitlines, which also splits at the U+2028, U+0085 and form feeds inside a text.
    """
    rest = ""
    for block in blocks:
        searched = max(0, len(rest) - len(separator) + 1)     # one may lie on the border of two blocks
        first, *others = (rest[searched:] + block).split(separator)
        rest = rest[:min(searched, LONGEST_ROW + 1)] + first
        if others:
            yield rest
            rest = others.pop()
            yield from others
    if rest:
        yield rest


def _json(text: str):
    """A JSON value; None for what is none: broken, cut off, or nested deeper than Python goes."""
    if len(text) > LONGEST_ROW:
        return TOO_LONG
    try:
        # Not strict: a bare tab in a string is a tab.
        return json.loads(text.removeprefix("\ufeff"), strict=False)
    except (ValueError, RecursionError):
        return None


def _json_lines(blocks, pick, start: int):
    for row, line in enumerate(_split(blocks, "\n")):
        if row >= start and line and not line.isspace():
            yield row + 1, pick(_json(line))


_JSON_PARTS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[{]|[\]}]|,', re.DOTALL)


def _json_values(blocks, base: int):
    """The text of each element of an array (base 1), or of each of several objects in a row (base 0).

    Only strings, brackets and commas are looked at: an element that is no JSON does not stop it.
    Raises ValueError where the file ends inside of one, or one is too long.
    """
    text, place, begin, depth = "", 0, 0, 0
    for block in blocks:
        text, place, begin = text[begin:] + block, place - begin, 0
        if len(text) > LONGEST_ROW + len(block):
            raise ValueError(f"a value is {TOO_LONG.reason}")
        while part := _JSON_PARTS.search(text, place):
            if part[0][0] == '"' and not part[1]:     # a string that goes on in the next block
                break
            place, sign = part.end(), part[0]
            ended = depth == base == 1 and sign == ","
            if sign in "[{":
                depth += 1
                if depth == base:
                    begin = place
            elif sign in "]}":
                depth -= 1
                if base and depth == 0 and not text[begin:part.start()].strip():
                    begin = place                     # an empty array
                else:
                    ended = depth == 0
            if ended:
                yield text[begin:part.start() if base else place]
                begin = place
        place = part.start() if part else len(text)
    if depth or text[begin:].strip():
        raise ValueError("the file ends inside a value")


def _json_rows(blocks, pick, start: int):
    """The rows of a .json: an array's elements; an object, or several; or JSON lines, as in many."""
    head = next(blocks)
    begin = head.lstrip()
    blocks = itertools.chain([head], blocks)
    if begin[:1] != "[" and isinstance(_json(begin.partition("\n")[0]), dict):
        yield from _json_lines(blocks, pick, start)
        return
    for row, text in enumerate(_json_values(blocks, int(begin[:1] == "["))):
        if row >= start:
            yield row + 1, pick(_json(text))


def _csv_records(lines, delimiter: str):
    """The fields of each record, the header first; None for a record that is unlike the header.

    A quote that opens and is never closed would swallow the records behind it: where the rules are
    broken, only the first line is taken as it stands, and the next one begins a record again.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ROW))
    waiting, taken, width = [], [], None

    def feed():
        while (line := waiting.pop() if waiting else next(lines, None)) is not None:
            taken.append(line)
            yield line + "\n"

    def fitting(fields):
        while width and len(fields) > width and not fields[-1]:
            fields = fields[:-1]                      # commas at the end
        return fields if len(fields) == (width or len(fields)) else None

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            fields = next(reader, None)
            record = fields and fitting(fields)
            broken = fields and not record and len(taken) > 1
        except csv.Error:
            fields, record, broken = taken, None, True
        if broken:
            line, *rest = taken
            waiting += reversed(rest)
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
            for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL):
                with contextlib.suppress(csv.Error, StopIteration):
                    alone = csv.reader([line], delimiter=delimiter, quoting=quoting)
                    record = record or fitting(next(alone))
        if fields is None:
            return
        if fields:                                    # an empty line is no record
            width = width or len(fields)
            yield record


def _csv_rows(blocks, name: str, field: str | None, start: int):
    lines = _split(blocks, "\n")
    first = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if format_of(name)[0] == "tsv" else max(",;\t", key=first.count)
    records = _csv_records(itertools.chain([first], lines), delimiter)
    header = next(records, None) or []
    if field is not None:
        at = _column(name, field, header)
    for row, record in enumerate(records):
        if row >= start:
            value = record and (dict(zip(header, record)) if field is None else record[at])
            yield row + 1, BadRow("unlike the header") if record is None else value


_SEPARATORS = re.compile(r"^[ \t]*<\|doc\|>[ \t]*$|<\|endoftext\|>", re.MULTILINE)


def _between_lines(lines, separator: str):
    """The lines between those that are the separator, joined.

    Nothing where two separators meet or one is first or last.
    """
    size, parts = 0, []
    for line in itertools.chain(lines, [separator]):
        if line.strip(" \t\ufeff") != separator:
            if size <= LONGEST_ROW:
                parts.append(line)
            size += len(line) + 1
        elif parts:
            yield "\n".join(parts)
            size, parts = 0, []


def _txt_documents(blocks, start: int):
    """Documents of a .txt: between two stands a line <|doc|>.

    Or <|endoftext|> anywhere, if no such line is near the first.
    """
    head = ""
    while not _SEPARATORS.search(head) and len(head) <= LONGEST_ROW:
        if (block := next(blocks, None)) is None:
            break
        head += block
    found = {match[0].strip() for match in _SEPARATORS.finditer(head)}
    blocks = itertools.chain([head], blocks)
    if found == {"<|endoftext|>"}:
        texts = filter(None, (text.strip("\n") for text in _split(blocks, "<|endoftext|>")))
    else:
        texts = _between_lines(_split(blocks, "\n"), "<|doc|>")
    for row, text in enumerate(texts):
        if row >= start:
            yield row + 1, TOO_LONG if len(text) > LONGEST_ROW else text.removeprefix("\ufeff")


def _column(name: str, field: str, columns: list[str]) -> int:
    if field not in columns:
        listed = ", ".join(str(column)[:60] for column in columns[:20]) or "none"
        raise ParameterError([f"{name} has no column {field!r}; its columns: {listed}. Set text_field "
                              "to one of them, or take the file out of the source's folder."])
    return columns.index(field)


def _arrow_rows(batches, field: str | None, row: int, start: int):
    """Rows of pyarrow record batches, the first of them row number `row`."""
    for batch in batches:
        values = (batch.to_struct_array() if field is None
                  else batch.column(batch.schema.names.index(field)))
        for i in range(max(0, start - row), len(values)):
            try:
                value = values[i].as_py()
            except UnicodeDecodeError:
                value = BadRow("invalid UTF-8")
            except (ValueError, OverflowError):       # a date that Python does not have
                value = None
            yield row + i + 1, value
        row += len(values)


def _parquet_rows(file, name: str, field: str | None, start: int):
    """A row group may be as large as the file: its pages are read a few at a time, about 4 MB of rows."""
    import pyarrow.parquet as pq
    parquet = pq.ParquetFile(file, buffer_size=4 << 20, pre_buffer=False)
    columns = None if field is None else [field]
    if field is not None:
        _column(name, field, parquet.schema_arrow.names)
    row = 0
    for group in range(parquet.num_row_groups):
        about = parquet.metadata.row_group(group)
        if row + about.num_rows > start:
            chunks = [about.column(i) for i in range(about.num_columns)]
            size = sum(chunk.total_uncompressed_size for chunk in chunks
                       if field in (None, chunk.path_in_schema.partition(".")[0]))
            rows = min(max(1, (4 << 20) * about.num_rows // max(size, 1)), 256)
            batches = parquet.iter_batches(rows, [group], columns, use_threads=False)
            yield from _arrow_rows(batches, field, row, start)
        row += about.num_rows


def _arrow_file_rows(file, name: str, field: str | None, start: int):
    import pyarrow as pa
    magic = file.read(6)
    file.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:                                             # as datasets' save_to_disk writes it
        batches = reader = pa.ipc.open_stream(file)
    if field is not None:
        _column(name, field, reader.schema.names)
    yield from _arrow_rows(batches, field, 0, start)


class Fields:
    """Takes the text field from rows that may each have other fields; if none has it, says which have."""

    def __init__(self, source: Source, found: bool):
        self.source, self.found = source, found or source.text_field is None
        self.names, self.rows = {}, 0

    def pick(self, row):
        field = self.source.text_field
        if field is None or row is None or isinstance(row, BadRow):
            return row
        if isinstance(row, dict) and field in row:
            self.found = True
            return row[field]
        if not self.found:
            there = row if isinstance(row, dict) else [f"none, a row is of type {type(row).__name__}"]
            self.names |= dict.fromkeys(there)
            self.rows += 1
            if self.rows == 1000:
                raise ParameterError([self.problem()])

    def problem(self) -> str:
        listed = ", ".join(name[:60] for name in list(self.names)[:20])
        return (f"source {self.source.name}: no row of {self.source.path} has a field "
                f"{self.source.text_field!r}; the fields there: {listed}. Set text_field to one of them.")


def rows_of(file, name: str, field: str | None, fields: Fields, start: int):
    """(number of the next row, the row's text field or with None its dict) of an open file."""
    kind, packing = format_of(name)
    if kind == "parquet":
        yield from _parquet_rows(file, name, field, start)
        return
    if isinstance(file, HubFile):
        file = io.BufferedReader(file, 4 << 20)
    if kind == "arrow":
        yield from _arrow_file_rows(file, name, field, start)
        return
    blocks = _blocks(_unpacked(file, packing), name)
    if kind == "txt":
        yield from _txt_documents(blocks, start)
    elif kind == "json":
        yield from _json_rows(blocks, fields.pick, start)
    elif kind in ("csv", "tsv"):
        yield from _csv_rows(blocks, name, field, start)
    else:
        yield from _json_lines(blocks, fields.pick, start)
