"""Files of rows: JSON lists and lines, CSV and TSV with a header, each also as .gz."""

import csv
import io
from pathlib import Path

from data.cli import UserError, quoted
from data.sources import ROW_SETS, SOURCES
from data.text import json_rows, read_text

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
KNOWN = f"{', '.join(ROW_SUFFIXES)} file, .gz too"
PLAIN = "{0} is plain text, not rows: python train.py --ckpt RUN --data {1} learns it"
READERS = {".parquet": "read_parquet", ".feather": "read_feather", ".xlsx": "read_excel"}  # pandas


def is_row_file(name):
    """Whether a file of this name holds rows that `read_rows` reads."""
    return str(name).lower().removesuffix(".gz").endswith(ROW_SUFFIXES)


def read_rows(path, encoding=None):
    """(location, row or UserError about a malformed one) of each row of a file. A row of CSV is a
    dict of strings. `encoding`: see `read_text`. UserError if the file cannot be read."""
    path = Path(path)
    if not path.is_file():
        if str(path) in SOURCES or (path / "meta.json").exists():
            raise UserError(PLAIN.format(path, quoted(path)))
        state = "is a folder" if path.is_dir() else "does not exist"
        sets = ", ".join(ROW_SETS)
        raise UserError(f"{path} {state}: name a {KNOWN}, OWNER/NAME of the Hub, or {sets}")
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    if suffix in READERS:
        file, target = path.as_posix(), path.with_suffix(".jsonl").as_posix()
        code = f"import pandas; pandas.{READERS[suffix]}({file!r}).to_json({target!r}, "
        code += "orient='records', lines=True, force_ascii=False)"
        raise UserError(f'{path} is in {suffix[1:]} format: convert it with python -c "{code}"')
    text = read_text(path, encoding)
    if "\0" in text:
        raise UserError(f"{path} is a binary file, not rows: name a {KNOWN}")
    if suffix not in ROW_SUFFIXES and not text.lstrip().startswith(("{", "[")):
        raise UserError(PLAIN.format(path, quoted(path)))
    if suffix in (".csv", ".tsv"):
        return csv_rows(text, path, suffix)
    return json_rows([text], str(path))


def csv_rows(text, path, suffix):
    """(location, {column: text} or UserError about a malformed row) of each row of CSV after its
    header. The delimiter is the one that the header has most of: Excel writes ; in much of Europe.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may hold a book; the module's limit is 128 KiB
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns, line = None, 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if cells and columns is None:
                columns = [cell.strip() for cell in cells]
            elif cells and len(cells) != len(columns):
                yield where, UserError(f"{where}: {len(cells)} cells for {len(columns)} columns")
            elif cells:  # columns without a name are the row numbers that pandas writes
                yield where, {column: cell for column, cell in zip(columns, cells) if column}
    except csv.Error as e:
        raise UserError(f"{path}:{line}: a quote opens or ends at the wrong place ({e})") from e
