"""What a file is that holds no JSON, so that its refusal can name it.

Invariant: answers for any bytes; no text of the file is shown.
"""

import re

_MAGIC = [
    (b"\x1f\x8b", "gzip: unpack it (gunzip -c FILE | tandem enqueue -)"),
    (b"\x28\xb5\x2f\xfd", "zstd: unpack it (zstd -dc FILE | tandem enqueue -)"),
    (b"PK\x03\x04", "a ZIP archive, or a document in one (.xlsx, .docx): unpack it, or export JSON Lines"),
    (b"PAR1", "Parquet: export it as JSON Lines, for example with the library datasets, to_json"),
    (b"ARROW1", "Arrow: export it as JSON Lines, for example with the library datasets, to_json"),
    (b"\xff\xff\xff\xff", "Arrow: export it as JSON Lines, for example with the library datasets, to_json"),
    (b"SQLite format 3", "an SQLite database: export the table as JSON Lines"),
    (b"%PDF", "a PDF"),
    (b"\xff\xfe", "text in UTF-16: convert it to UTF-8"),
    (b"\xfe\xff", "text in UTF-16: convert it to UTF-8"),
]
_COLUMN = re.compile(r' *"?[A-Za-z_][A-Za-z0-9_. -]{0,39}"? *')
"""A name in a header line."""


def like(start: bytes) -> str | None:
    """What a file that begins so looks like; None where it may be JSON that is wrong in a place, or is empty."""
    for magic, says in _MAGIC:
        if start.startswith(magic):
            return says
    if b"\0" in start[:4096]:
        return "binary data, or text that is not UTF-8"
    text = start.decode("utf-8-sig", errors="replace").strip()
    if text.startswith(("{'", "[{'")):
        return "Python's own way to print a dict: write JSON (json.dumps)"
    if not text or text[0] in "{[":
        return None
    if text.startswith("<"):
        return "XML or HTML"
    first, *more = text.splitlines()
    for separator, name in ((",", "CSV"), ("\t", "TSV"), (";", "CSV with semicolons")):
        names = first.split(separator)
        if len(names) > 1 and all(map(_COLUMN.fullmatch, names)) and (not more or separator in more[0]):
            return f"a {name} ({len(names)} columns): convert it to one JSON object a row"
    return "plain text"
