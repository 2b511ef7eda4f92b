"""Rows of text formats (JSON, CSV): each becomes one line of JSON, and a line becomes a document."""

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nanogpt.errors import UserError

LONGEST = 1 << 24  # maximum bytes of a row, which is parsed whole
FIRST = 1000  # lines by which the quoting of a table is recognized
BROKEN = b"\0broken: "  # begins a line that holds the reason why a row cannot be read
BETWEEN = re.compile(r"[\s,]*")  # separators of JSON values
UNPAIRED = re.compile(r'(?:^|\t)"(?![^\t]*"(?:\t|\r?$))')  # a quote that opens a field and does not close it


@dataclass(frozen=True)
class BadRow:
    number: int  # line or row number, from 1
    reason: str


class Pair(str):
    """A prompt and a response, as one text; only the response is trained on."""

    prompt: str
    response: str

    def __new__(cls, prompt: str, response: str) -> "Pair":
        pair = super().__new__(cls, prompt + response)
        pair.prompt, pair.response = prompt, response
        return pair


def keys_of(text_key: str) -> list[str]:
    """Return the fields of `text_key`: one, or prompt and response."""
    return text_key.split("+", 1)


def document(line: bytes, number: int, text_key: str) -> str | BadRow:
    """Return the document in a line of JSON, a Pair for a `text_key` such as prompt+response."""
    if line.startswith(BROKEN):
        return BadRow(number, line.removeprefix(BROKEN).decode("utf-8", "replace"))
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x}"
        return BadRow(number, f"is not UTF-8 ({byte}); if the file has another encoding, set --encoding")
    except (ValueError, RecursionError) as error:
        return BadRow(number, f"is not valid JSON: {error}")
    keys = keys_of(text_key)
    texts = [row] if isinstance(row, str) and text_key == "text" else [_field(row, key) for key in keys]
    return checked(texts, number, keys, _others(row))


def checked(texts: list[Any], number: int, keys: list[str], more: str = "") -> str | BadRow:
    """Return the document of the texts found under `keys`: one, or a prompt and a response."""
    if len(texts) == 2 and texts[1] == "":
        return BadRow(number, f"has an empty `{keys[1]}`; remove the row")
    if not all(isinstance(text, str) for text in texts):
        shown = ", ".join(f'"{key}": "..."' for key in keys)
        return BadRow(number, f"has no string `{'+'.join(keys)}`; each row must be like {{{shown}}}{more}")
    if surrogate := lone_surrogate("".join(texts)):
        return BadRow(number, f"contains {surrogate}, which is not text")
    return Pair(*texts) if len(texts) == 2 else texts[0]


def _field(row: Any, key: str) -> Any:
    """Return row[key], or for a key with dots, such as data.text, the field of an inner row."""
    if isinstance(row, dict) and key not in row and "." in key:
        first, _, rest = key.partition(".")
        return _field(row.get(first), rest)
    return row.get(key) if isinstance(row, dict) else None


def _others(row: Any) -> str:
    names = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
    if {"prompt", "response"} <= set(names):
        return " (or train on responses to prompts with --text_key=prompt+response)"
    if isinstance(row, dict) and {"messages", "conversations"} & set(row):
        return " (for chats see Prompts and responses in docs/finetuning.md)"
    return f" (or set --text_key to one of {', '.join(names[:20])})" if names else ""


def lone_surrogate(text: str) -> str:
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"a lone surrogate, U+{ord(text[error.start]):04X}"
    return ""


# ----------------------------------------------------------------------------- formats, as lines of JSON


def of_json(chunks: Iterable[str]) -> Iterator[bytes]:
    """Yield the elements of a JSON array, or JSON values one after another, as lines.

    Raise UserError, naming the row, if the JSON is not valid or ends within the array.
    """
    decoder, rest, at, number, inside = json.JSONDecoder(), "", 0, 0, False
    for chunk in itertools.chain(chunks, [None]):  # None: the end
        rest, at = rest[at:] + (chunk or ""), 0
        while True:
            at = BETWEEN.match(rest, at).end()  # type: ignore[union-attr]  # matches always
            if at == len(rest):
                break
            if rest[at] == ("]" if inside else "[") and (inside or not number):
                inside, at = not inside, at + 1
                continue
            try:
                _, end = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError) as error:
                if chunk is not None and len(rest) - at < LONGEST:  # may be incomplete
                    break
                reason = getattr(error, "msg", "nested too deeply")
                raise UserError(f"row {number + 1} is not valid JSON: {reason}") from None
            number += 1
            yield rest[at:end].replace("\n", " ").encode("utf-8", "surrogatepass") + b"\n"
            at = end
    if inside:
        raise UserError(f"ends within its JSON array, after row {number:,}; download it again")


def of_csv(chunks: Iterable[str], text_key: str, tabs: bool) -> Iterator[bytes]:
    """Yield the rows of a table with a first line of names, as lines of JSON with the fields of `text_key`.

    Separators are `tabs`, that of Excel's line `sep=;` before the names, or that of comma, semicolon, tab and
    bar which is most frequent in the first line. Raise UserError if there is no such column, or for quotes
    that do not match, naming the row.
    """
    lines = _lines(chunks)
    head = list(itertools.islice(lines, FIRST))
    separator = "\t" if tabs else max(",;\t|", key="".join(head[:1]).count)
    if given := re.fullmatch(r"sep=(.)\n", "".join(head[:1])):
        separator, head = given[1], head[1:]
    tabs = separator == "\t"
    # Many tables with tabs have no quoting: a quote at the start of a field is a character there. The sign is
    # a field that begins with a quote and does not end with one, if every line is a row of its own.
    row_per_line = tabs and "\t" in head[0] and len({line.count("\t") for line in head}) == 1
    if row_per_line:
        quoted = not any(map(UNPAIRED.search, head))
    else:
        opened, closed = (len(re.findall(q, "".join(head), re.M)) for q in (r'(?:^|\t)"', r'"(?:\t|$)'))
        quoted = not tabs or _is_regular(head, separator) or opened == closed
    spaced = not tabs and _is_spaced(head, separator)
    before_quotes = spaced and re.search(f'{re.escape(separator)} +"', "".join(head)) is not None
    csv.field_size_limit(LONGEST)
    reader = csv.reader(
        itertools.chain(head, lines),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        skipinitialspace=before_quotes,  # else more than the one blank would be taken away
        strict=True,
    )
    number = 0
    try:
        names = [name.strip() for name in next(reader, [])]
        keys = keys_of(text_key)
        if missing := [key for key in keys if names.count(key) != 1]:
            problem = "two columns" if missing[0] in names else "no column"
            raise UserError(
                f"has {problem} `{missing[0]}`; its first line, which must name the columns, is: "
                f"{', '.join(names)[:200]}; choose one with --text_key=NAME"
            )
        places = {key: names.index(key) for key in keys}
        for row in reader:
            number += 1
            if spaced and not before_quotes:
                row = row[:1] + [value.removeprefix(" ") for value in row[1:]]
            if row_per_line and any("\n" in value for value in row):
                raise UserError(
                    f"row {number} would span several lines because of a quote at the start of a field, "
                    "unlike the rows before it; convert the file to JSON lines"
                )
            if len(row) > 1 and [value.strip() for value in row] == names:
                yield BROKEN + b"repeats the names of the first line\n"
            elif row and len(row) != len(names):
                yield BROKEN + f"has {len(row)} fields, and the first line {len(names)} names\n".encode()
            else:
                fields = {key: row[place] for key, place in places.items()} if row else None
                yield (json.dumps(fields, ensure_ascii=False).encode("utf-8") if row else b"") + b"\n"
    except csv.Error as error:
        raise UserError(
            f"row {number + 1} (line {reader.line_num}) is not valid CSV: {error}; "
            "a quote within quotes is written twice"
        ) from None


def _is_regular(head: list[str], separator: str) -> bool:
    """Return whether the first lines of a table, read with quotes, have rows of equal length."""
    reader = csv.reader(head, delimiter=separator, strict=True)
    try:
        return len({len(row) for row in reader if row}) == 1
    except csv.Error:  # FIRST lines may end within a row
        return len(head) == FIRST == reader.line_num


def _is_spaced(head: list[str], separator: str) -> bool:
    """Return whether a space after a separator belongs to it: after each, or before a quote."""
    between = re.escape(separator)
    fields = re.findall(rf'({between}|\n|^)("[^"]*(?:""[^"]*)*"|[^{between}\n]*)', "".join(head))
    later = [field for before, field in fields if before == separator and field]
    of_all = separator in head[0] and all(field[0] == " " for field in later)
    return of_all or any(re.match(' +"', field) for field in later)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from (line + "\n" for line in whole)
        if len(rest) > LONGEST:
            raise UserError(f"has a line longer than {LONGEST:,} characters; it is not a table of rows")
    if rest:
        yield rest
