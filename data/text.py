"""Files of any of the usual encodings and containers, as streams of text: `Documents`."""
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import re
import shutil
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

from data.cli import UserError
from data.files import parse_json

# --------------------------------------------------------------------------------------------
# Encodings
# --------------------------------------------------------------------------------------------

BLOCK = 1 << 20  # bytes read at a time; no file is ever held whole
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")
XZ = b"\xfd7zXZ\0"  # how such a file begins
DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
BOMS = (  # UTF-32's little-endian mark begins with UTF-16's, so it comes first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_blocks(stream, encoding):
    """Text of a binary stream, block by block, line ends as \\n. UnicodeDecodeError.start is the
    byte offset in the whole stream."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    while True:
        block = stream.read(BLOCK)
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block cut
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            e.byte, e.start = e.object[e.start], e.start + offset - pending
            raise
        offset += len(block)
        yield newlines.decode(text, final=not block)
        if not block:
            return


def try_encoding(open_stream, encoding):
    """Decode a whole stream: (the UnicodeDecodeError at its first bad byte or None, a Counter of
    the characters beyond ASCII before it, how many of them stand alone beside a Latin letter)."""
    counts, lone, bad = Counter(), 0, None
    try:
        with open_stream() as stream:
            for text in decode_blocks(stream, encoding):
                if not text.isascii():
                    counts.update(BEYOND_ASCII.findall(text))
                    lone += len(LONE.findall(text))
    except UnicodeDecodeError as e:
        bad = e
        counts.update(BEYOND_ASCII.findall(e.object[: e.end - 1].decode(encoding, "ignore")))
    return bad, counts, lone


NO_TEXT = ("Cc", "Cn", "Co", "Cs")  # categories: control, unassigned, private, half a character
BEYOND_ASCII = re.compile(r"[^\0-\x7f]")
LONE = re.compile(  # what an accented letter or a quotation mark and its neighbour become
    r"(?<![^\0-\x7f])[^\0-\x7f](?=[A-Za-z])|(?<=[A-Za-z])[^\0-\x7f](?![^\0-\x7f])"
)
COMMON = (  # nearly half of the characters of modern Chinese
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作"
    "里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心本前开但因只从想实"
)


def looks_chinese(counts, lone):
    """Whether what was decoded as GB18030 is Chinese, from `try_encoding`'s counts. The bytes of
    most encodings can be decoded so, but not to common characters."""
    total = common = late = strange = 0
    for c, n in counts.items():
        if unicodedata.category(c)[0] in "LC":
            total += n
            common += n * (c in COMMON)
            strange += n * (unicodedata.category(c) in NO_TEXT)
            # the lead bytes of about half of Chinese; all those of Korean in EUC-KR are below
            late += n * (b"\xc9" <= c.encode("gb2312", "replace")[:1] <= b"\xd7")
    plausible = common >= 0.15 * total and late >= 0.1 * total
    return plausible and strange <= 0.02 * total and lone <= 0.5 * total


def unmarked_utf(head):
    """The UTF-16 or UTF-32 of a file with zero bytes but without a mark, from its beginning: the
    one that gives the largest share of ASCII, kana and common Chinese; None if none gives text."""
    best = 0.1, ""
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(head)
            no_text = sum(unicodedata.category(c) in NO_TEXT and not c.isspace() for c in text)
            known = sum(c.isascii() or c in COMMON or "\u3040" <= c <= "\u30ff" for c in text)
            if text and no_text <= 0.01 * len(text):
                best = max(best, (known / len(text), encoding))
    return best[1] or None


def detect_encoding(open_stream, name):
    """utf-8(-sig), utf-16(-le, -be), utf-32(-le, -be) or gb18030, by trial; UserError names the
    first bad byte.

    UTF-8 is recognised by its own strictness. GB18030 accepts nearly anything, a damaged UTF-8
    file included. So it is only tried where no run of valid UTF-8 came before the first bad byte
    (eight characters of real GB18030 pass for UTF-8 about once in a million files), and the
    result must look like Chinese.
    """
    with open_stream() as stream:
        head = stream.read(4096)
    with contextlib.suppress(UnicodeDecodeError):
        if len(head) < 4096 and 0 not in head and head.decode() and not head.startswith(BOMS[0][0]):
            return "utf-8"  # most small files need no second look
    for bom, encoding in BOMS:
        if head.startswith(bom):
            return encoding
    if 0 in head and (encoding := unmarked_utf(head)):
        return encoding
    bad, counts, _ = try_encoding(open_stream, "utf-8")
    if bad is None:
        return "utf-8"
    if counts.total() < 8:
        error, counts, lone = try_encoding(open_stream, "gb18030")
        if error is None and looks_chinese(counts, lone):
            return "gb18030"
    if "end of data" in bad.reason:
        raise UserError(f"{name}: ends in the middle of a UTF-8 character, at offset {bad.start:,}")
    raise UserError(
        f"{name}: byte {bad.byte:#04x} at offset {bad.start:,} is not text in UTF-8, UTF-16 or "
        f"GB18030; save it as UTF-8, or name its encoding: --encoding cp1252, shift_jis, euc_jp, "
        f"big5, euc_kr, cp1251, koi8-r, gb18030, ..."
    )


def decode(raw, name, encoding=None):
    """The text of a whole file's bytes, line ends as \\n, in `encoding` or in the one recognised.
    UserError if it is damaged or none of those."""
    return "".join(Documents([], encoding).text(name, partial(io.BytesIO, raw)))


# A token never reaches across these places in any tokenizer we know: after a letter or digit and
# before a space, line end or common punctuation. Text may be cut there and tokenized in pieces.
SAFE_CUT = re.compile(r"[^\W_](?=[\s,.;:!?，。！？；：、])")


def safe_pieces(blocks):
    """Re-cut a stream of text so that tokenizing the pieces equals tokenizing the whole."""
    rest = ""
    for block in blocks:
        rest += block
        for tail in (1000, 65536):  # the last safe place is nearly always close to the end
            cuts = [m.end() for m in SAFE_CUT.finditer(rest, max(0, len(rest) - tail))]
            if cuts:
                break
        if not cuts and len(rest) < 8 * BLOCK:
            continue
        cut = cuts[-1] if cuts else len(rest)
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


# --------------------------------------------------------------------------------------------
# Rows of JSON
# --------------------------------------------------------------------------------------------

TEXT_FIELDS = ("text", "content", "messages", "conversations", "items")


def row_text(row, field, where):
    """The text of a row of JSON: a string; a dialogue (a list of turns); an object's `field`, by
    default the first of TEXT_FIELDS that it has, or an instruction, its input and output."""
    if isinstance(row, dict) and not field and {"instruction", "output"} <= row.keys():
        row = [{"content": row.get(k) or ""} for k in ("instruction", "input", "output")]
    elif isinstance(row, dict):
        wanted = [field] if field else TEXT_FIELDS
        if (key := next((k for k in wanted if k in row), None)) is None:
            keys = f"its keys are {', '.join(row)}"
            raise UserError(f"{where}: no {' or '.join(wanted)}; {keys}: name one by --field")
        row, where = row[key], f"{where}: its {key}"
    if isinstance(row, list) and all(isinstance(turn, dict) for turn in row):
        row = "\n".join(filter(None, map(turn_text, row)))
    if not isinstance(row, str):
        raise UserError(f"{where} is neither text nor a dialogue but {row!r:.40}")
    if re.search("[\ud800-\udfff]", row):  # halves of characters, which JSON can spell
        row = row.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return row


def turn_text(turn):
    """The text of one turn of a dialogue; arguments and records as JSON."""
    text = next((turn[k] for k in ("content", "value", "arguments", "records") if k in turn), "")
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


def json_rows(blocks, name):
    """(where it is, row) of each JSON value in a stream of text: values one after another, on one
    line each or pretty-printed over several; or the items of a list. A row may be a UserError.

    A .jsonl file is read line by line, and a list on a single line of it is one row.
    """
    values = json_values(text_lines(blocks), name)
    if not name.lower().removesuffix(".gz").endswith(".jsonl"):
        text = "".join(blocks)
        try:
            values = [(name, 2, parse_json(text, name))]
        except UserError:
            if text.lstrip().startswith("["):
                raise
            values = json_values(text.split("\n"), name)
    for where, lines, value in values:
        if lines > 1 and isinstance(value, list):
            yield from ((f"{where}: row {n}", row) for n, row in enumerate(value, start=1))
        else:
            yield where, value


def text_lines(blocks):
    """The lines of a stream of text, without their ends."""
    parts = []
    for block in itertools.chain(blocks, ["\n"]):
        start, *lines = block.split("\n")
        parts.append(start)
        for line in lines:
            yield "".join(parts)
            parts = [line]


def json_values(lines, name):
    """(FILE:LINE, number of lines, value or UserError) of each JSON value in lines of text. A value
    that its first line does not complete goes on until its brackets are closed. It was cut short
    if an object on a line of its own comes before that."""
    where, parts, depth = None, [], 0
    for number, line in enumerate(lines, start=1):
        here, text = f"{name}:{number}", line.strip()
        alone = bool(parts) and line[:1] == parts[0][:1] == "{"
        if alone and not isinstance(try_json(line, here), UserError):
            yield where, len(parts), try_json("\n".join(parts), where)
            parts = []
        if text and not parts:
            value, where, depth = try_json(text, here), here, 0
            goes_on = getattr(getattr(value, "__cause__", None), "pos", 0) == len(text)
            if not (goes_on and text[-1] in "[{,:"):
                yield where, 1, value
                continue
        if text or parts:
            parts.append(line)
            depth += brackets(line)
        if parts and depth <= 0:
            yield where, len(parts), try_json("\n".join(parts), where)
            parts = []
    if parts:
        yield where, len(parts), try_json("\n".join(parts), where)


def brackets(line):
    """How many brackets a line of JSON opens and leaves open; those in strings do not count."""
    line = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
    return sum(map(line.count, "[{")) - sum(map(line.count, "]}"))


def try_json(text, where):
    """`parse_json`'s value, or the UserError that it raises."""
    try:
        return parse_json(text, where)
    except UserError as e:
        return e


def json_documents(blocks, field, name):
    """(name, text pieces) of each row of JSON; UserError for the first that is damaged."""
    for where, row in json_rows(blocks, name):
        if isinstance(row, UserError):
            raise row
        text = row_text(row, field, where)
        yield where, safe_pieces(text[i : i + BLOCK] for i in range(0, len(text), BLOCK))


# --------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------


def text_documents(blocks, name, separator=None):
    """(name, text pieces) of a file of text, or of each document in it if a separator is given."""
    if not separator:
        yield name, safe_pieces(blocks)
        return
    rest = ""
    for block in itertools.chain(blocks, [separator]):
        *whole, rest = (rest + block).split(separator)
        for text in whole:
            if text := text.strip("\n"):
                yield name, iter([text])


class Documents:
    """The documents of a source, in a fixed order, as often as you iterate: (name, text pieces).

    `files` are (name, open) pairs, open() giving a binary stream. Text is only read when the pieces
    are, and never more than a few blocks of it at once. `encodings` counts what was recognised.
    A `separator` stands between the documents of a file of text.
    """

    def __init__(self, files, encoding=None, field=None, separator=None):
        self.files, self.field, self.forced, self.separator = files, field, encoding, separator
        self.known = {}  # name -> encoding, found once and kept for the second pass
        self.told = {"utf-8", "utf-8-sig", encoding}

    def encoding_of(self, name, open_stream):
        """The encoding of one file, recognised once; one line on stderr if it is not UTF-8."""
        if name not in self.known:
            found = self.forced or detect_encoding(open_stream, name)
            if found not in self.told:
                self.told.add(found)
                print(f"{name}: read as {found}; if it is not, save it as UTF-8", file=sys.stderr)
            self.known[name] = found
        return self.known[name]

    def text(self, name, open_stream):
        """Blocks of one file's text; UserError if it is damaged or not in its encoding."""
        encoding = self.forced
        try:
            encoding = self.encoding_of(name, open_stream)
            with open_stream() as stream:
                yield from decode_blocks(stream, encoding)
        except (UnicodeDecodeError, LookupError) as e:
            at = f" at byte offset {e.start:,}" if isinstance(e, UnicodeDecodeError) else ""
            raise UserError(f"{name}: cannot be read as {encoding}{at}") from e
        except DAMAGE as e:
            raise UserError(f"{name}: damaged or cut short ({e})") from e
        except (RuntimeError, NotImplementedError) as e:  # zipfile's
            raise UserError(f"{name}: encrypted, or packed in a way that Python lacks ({e})") from e

    def __iter__(self):
        for name, open_stream in self.files:
            blocks = self.text(name, open_stream)
            if name.lower().removesuffix(".gz").endswith((".jsonl", ".json")):
                yield from json_documents(blocks, self.field, name)
            else:
                yield from text_documents(blocks, name, self.separator)


def choose_texts(where, names, suffixes=TEXT_SUFFIXES):
    """The names of texts among a folder's or an archive's files, hidden ones left out. One line on
    stderr counts the others by suffix; UserError if there are no texts."""
    hidden = re.compile(r"(^|/)(__MACOSX/|\.[^/.])")
    names = [name for name in names if not hidden.search(name)]
    chosen = [name for name in names if name.lower().endswith(suffixes)]
    others = Counter(Path(n).suffix.lower() or "without suffix" for n in set(names) - set(chosen))
    about = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common())
    if not chosen:
        others = f"; it has {about}" if about else ""
        raise UserError(f"{where} holds no {', '.join(suffixes)} file{others}")
    if about:
        print(f"{where}: files left out: {about}", file=sys.stderr)
    return chosen


def open_tar(path):
    """A tarfile.TarFile of a .tar file or of a temporary copy of a compressed one: in that, every
    step back would begin at the start."""
    with open(path, "rb") as f:
        start = f.read(6)
    unpack = gzip.open if start[:2] == b"\x1f\x8b" else lzma.open if start == XZ else None
    if unpack is None:
        return tarfile.open(path, "r:")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (read later, as the archive is)
    with unpack(path) as packed:
        shutil.copyfileobj(packed, copy)
    copy.seek(0)
    return tarfile.open(fileobj=copy)


def file_streams(path):
    """(name, open) of one file; of each text member for an archive, in its order. Members are
    streamed and never unpacked, so their names cannot write outside; a tar file's links and devices
    are none."""
    name = path.name.lower()
    if name.endswith(ARCHIVES):
        try:
            if name.endswith(".zip"):
                archive = zipfile.ZipFile(path)
                members = {m.filename: m for m in archive.infolist() if not m.is_dir()}
            else:
                archive = open_tar(path)
                members = {m.name: m for m in archive if m.isreg()}
        except DAMAGE as e:
            raise UserError(f"{path}: damaged or not the archive that its name says ({e})") from e
        read = getattr(archive, "extractfile", archive.open)
        return [(f"{path}:{m}", partial(read, members[m])) for m in choose_texts(path, members)]
    return [(str(path), partial(gzip.open if name.endswith(".gz") else open, path, "rb"))]
