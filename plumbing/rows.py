"""A file of rows: jsonl, the same compressed, one JSON array, or parquet -> one dict after the other.

    for number, where, row in read_rows("traces.jsonl.gz"):
        ...

The kind of a file is read from its first bytes, not from its name. What json would let pass in
silence (NaN, a key that stands twice) is refused, with the file and the line.

Next: plumbing/tally.py.
"""

import gzip
import json
import zlib

from plumbing.config import InputError


def read_rows(path):
    """A file's rows: (number from 1, "file, line n", dict), one after the other."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        yield from read_parquet(path)
        return
    try:
        with gzip.open(path) if start[:2] == b"\x1f\x8b" else open(path, "rb") as file:
            if first_character(file) == b"[":
                yield from read_array(file.read(), path)
            else:
                yield from read_lines(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: a damaged gzip file ({error})") from None


def first_character(file):
    """The first byte that is neither blank nor part of a byte order mark; the file is then read
    from its start.
    """
    start = file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    return start


def read_lines(file, path):
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if line.strip():
            where = f"{path}, line {number}"
            yield number, where, as_row(parse_json(line.strip(), where), where)


def read_array(text, path):
    rows = parse_json(text.removeprefix(b"\xef\xbb\xbf"), path)
    for number, row in enumerate(rows, 1):
        where = f"{path}, item {number}"
        yield number, where, as_row(row, where)


def read_parquet(path):
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            f"{path}: a parquet file; pip install pyarrow, or write it as jsonl "
            '(datasets.load_dataset("parquet", '
            'data_files=...)["train"].to_json(...))'
        ) from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: a damaged parquet file ({error})") from None


def as_row(value, where):
    if not isinstance(value, dict):
        raise InputError(f"{where}: not an object but {type(value).__name__}")
    return value


def parse_json(text, where):
    """Bytes -> a JSON value.

    Raises InputError for NaN and double keys as well, which json would let pass.
    """

    def no_key_twice(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} stands there twice")
        return found

    try:
        value = json.loads(
            text.decode("utf-8"), parse_constant=float, object_pairs_hook=no_key_twice
        )
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error})") from None
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: half of a character, a lone surrogate ({error.reason})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    return value
