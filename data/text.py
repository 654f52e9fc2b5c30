"""Text files of the usual encodings, in archives or not, as streams of documents: `Documents`."""
import codecs
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

from data.cli import UserError

BLOCK = 1 << 20  # bytes read at a time; no file of text is ever held whole
SAMPLE = 1 << 20  # bytes at the start of a file from which its encoding is recognised
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")
DAMAGE = (
    EOFError, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
    RuntimeError,  # a zip file that is encrypted, or packed in a way that Python lacks
)  # fmt: skip

# --------------------------------------------------------------------------------------------
# Encodings
# --------------------------------------------------------------------------------------------

BOMS = (  # UTF-32's little-endian mark begins with UTF-16's, so it comes first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
COMMON = (  # nearly half of the characters of modern Chinese
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作"
    "里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心本前开但因只从想实"
)


def detect_encoding(head):
    """The encoding of a file that begins with the bytes `head`: the one that its byte order mark
    names, UTF-16 or UTF-32 if there are zero bytes, GB18030, or else UTF-8.

    GB18030 accepts nearly anything, a damaged UTF-8 file included. It is chosen only if no run of
    valid UTF-8 comes before the first bad byte and if what it gives is Chinese.
    """
    for bom, encoding in BOMS:
        if head.startswith(bom):
            return encoding
    if 0 in head[:4096]:
        shares = {encoding: plain_share(decode_start(head[:4096], encoding)) for encoding in WIDE}
        best = max(shares, key=shares.get)
        return best if shares[best] > 0.1 else "utf-8"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < SAMPLE)
    except UnicodeDecodeError as e:
        valid = head[: e.start].decode()
        if sum(not c.isascii() for c in valid) < 8 and is_chinese(decode_start(head, "gb18030")):
            return "gb18030"
    return "utf-8"


def decode_start(head, encoding):
    """The text of the beginning of a file; empty if the bytes are not in this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return ""


def plain_share(text):
    """The share of printable ASCII, kana and common Chinese in a text; 0 for binary data."""
    plain = sum(" " <= c <= "~" or c in "\t\r\n" or "ぁ" <= c <= "ヿ" or c in COMMON for c in text)
    return 0 if "\0" in text else plain / max(len(text), 1)


def is_chinese(text):
    """Whether text decoded as GB18030 is Chinese: other encodings give letters and ideographs, too,
    but rare ones."""
    letters = [c for c in text if c.isalpha() and not c.isascii()]
    return sum(c in COMMON for c in letters) >= max(1, 0.15 * len(letters))


def decode(raw, name, encoding=None):
    """The text of a file's bytes, line ends as \\n, in `encoding` or in the one recognised.
    UserError if it is damaged or in another encoding."""
    return "".join(Documents([], encoding).text(name, partial(io.BytesIO, raw)))


# A token never reaches across these places in any tokenizer we know: after a letter or digit and
# before a space, line end or common punctuation. Text may be cut there and tokenized in pieces.
SAFE_CUT = re.compile(r"(?s:.*)[^\W_](?=[\s,.;:!?，。！？；：、])")


def safe_pieces(blocks):
    """Cut a stream of text so that tokenizing the pieces equals tokenizing the whole."""
    rest = ""
    for block in blocks:
        rest += block
        match = SAFE_CUT.match(rest)
        if match or len(rest) >= 8 * BLOCK:
            cut = match.end() if match else len(rest)
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


# --------------------------------------------------------------------------------------------
# Rows of JSON
# --------------------------------------------------------------------------------------------

TEXT_FIELDS = ("text", "content", "messages", "conversations", "items")
BLANK, REST_OF_LINE = re.compile(r"\s*"), re.compile(r"[ \t\r]*(\n|\Z)")


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
    """(where it is, row) of each JSON value in a stream of text, on one line or on several. A list
    gives its items, unless it is a line of a .jsonl file. A row that is no JSON is a UserError;
    reading goes on at the next line."""
    if not name.lower().removesuffix(".gz").endswith(".jsonl"):
        blocks = ["".join(blocks)]
        if blocks[0].lstrip().startswith("["):
            try:
                rows = json.loads(blocks[0])
            except (ValueError, RecursionError) as e:
                raise UserError(f"{name}: broken JSON ({e})") from e
            yield from ((f"{name}: row {n}", row) for n, row in enumerate(rows, start=1))
            return
    blocks, text, start, line = whole_lines(blocks), "", 0, 1
    decoder = json.JSONDecoder()
    while True:
        begin = BLANK.match(text, start).end()
        line += text.count("\n", start, begin)
        if begin == len(text):
            if not (text := next(blocks, "")):
                return
            start = 0
            continue
        where = f"{name}:{line}"
        try:
            value, start = decoder.raw_decode(text, begin)
            if not REST_OF_LINE.match(text, start):
                raise json.JSONDecodeError("Extra data", text, start)
        except (ValueError, RecursionError) as e:
            if getattr(e, "pos", None) == len(text):  # the value goes on, so double the text
                more = "".join(itertools.islice(blocks, 1 + len(text) // BLOCK))
                if more:
                    text, start = text[begin:] + more, 0
                    continue
            reason = e
            if isinstance(e, json.JSONDecodeError):  # its own line number counts from the block
                error_line = line + text.count("\n", begin, e.pos)
                reason = f"{e.msg}: line {error_line} column {e.colno}"
            value, start = UserError(f"{where}: broken JSON ({reason})"), text.find("\n", begin)
            start = start if start >= 0 else len(text)
        lines = text.count("\n", begin, start)
        line += lines
        if lines and isinstance(value, list):
            yield from ((f"{where}: row {n}", row) for n, row in enumerate(value, start=1))
        else:
            yield where, value


def whole_lines(blocks):
    """A stream of text in blocks that end where lines end."""
    rest = ""
    for block in blocks:
        lines, newline, tail = block.rpartition("\n")
        if newline:
            yield rest + lines + newline
            rest = ""
        rest += tail
    yield rest


# --------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------


class Documents:
    """The documents of a source, in a fixed order, as often as you iterate: (name, text pieces).

    `files` are (name, open) pairs, open() giving a binary stream. Text is only read when the pieces
    are, and never more than a few blocks of it at once. `encodings` maps names to what was
    recognised. A `separator` stands between the documents of a file of text.
    """

    def __init__(self, files, encoding=None, field=None, separator=None):
        self.files, self.field, self.separator = files, field, separator
        self.encoding, self.encodings = encoding, {}

    def encoding_of(self, name, head):
        """The encoding of a file that begins with `head`; one line on stderr if it is not UTF-8."""
        encoding = self.encoding or self.encodings.get(name) or detect_encoding(head)
        expected = {"utf-8", "utf-8-sig", self.encoding}
        if encoding not in expected and encoding not in self.encodings.values():
            print(f"{name}: read as {encoding}; if it is not, save it as UTF-8", file=sys.stderr)
        self.encodings[name] = encoding
        return encoding

    def text(self, name, open_stream):
        """Blocks of one file's text; UserError if it is damaged or not in its encoding."""
        newlines, offset = io.IncrementalNewlineDecoder(None, translate=True), 0
        try:
            with open_stream() as stream:
                head = stream.read(SAMPLE)
                decoder = codecs.getincrementaldecoder(self.encoding_of(name, head))()
                starts = (head[i : i + BLOCK] for i in range(0, len(head), BLOCK))
                for block in itertools.chain(starts, iter(partial(stream.read, BLOCK), b""), [b""]):
                    pending = len(decoder.getstate()[0])  # bytes of a character that was cut
                    yield newlines.decode(decoder.decode(block, final=not block), final=not block)
                    offset += len(block)
        except UnicodeDecodeError as e:
            at = f"byte {e.object[e.start]:#04x} at offset {e.start + offset - pending:,}"
            if self.encoding:
                raise UserError(f"{name}: {at} is not text in {self.encoding}") from e
            raise UserError(
                f"{name}: {at} is not text in UTF-8, UTF-16 or GB18030; save it as UTF-8, or name "
                f"its encoding: --encoding cp1252, shift_jis, euc_jp, big5, euc_kr, cp1251, "
                f"koi8-r, gb18030, ..."
            ) from e
        except LookupError as e:
            raise UserError(f"--encoding {self.encoding}: {e}") from e
        except DAMAGE as e:
            raise UserError(f"{name}: damaged, cut short or encrypted ({e})") from e

    def __iter__(self):
        for name, open_stream in self.files:
            blocks = self.text(name, open_stream)
            if name.lower().removesuffix(".gz").endswith((".jsonl", ".json")):
                for where, row in json_rows(blocks, name):
                    if isinstance(row, UserError):
                        raise row
                    text = row_text(row, self.field, where)
                    blocks = (text[i : i + BLOCK] for i in range(0, len(text), BLOCK))
                    yield where, safe_pieces(blocks)
            elif self.separator:
                yield from ((name, [text]) for text in split_documents(blocks, self.separator))
            else:
                yield name, safe_pieces(blocks)


def split_documents(blocks, separator):
    """The documents in a stream of text that are not empty, without line ends around them."""
    rest = ""
    for block in itertools.chain(blocks, [separator]):
        *documents, rest = (rest + block).split(separator)
        yield from filter(None, (text.strip("\n") for text in documents))


def choose_texts(where, names, suffixes=TEXT_SUFFIXES):
    """The names of texts among a folder's or an archive's files, hidden ones left out. One line on
    stderr counts the others by suffix; UserError if there are no texts."""
    hidden = re.compile(r"(^|/)(__MACOSX/|\.[^/.])")
    names = [name for name in names if not hidden.search(name)]
    chosen = [name for name in names if name.lower().endswith(suffixes)]
    others = Counter(Path(n).suffix.lower() or "without suffix" for n in set(names) - set(chosen))
    others = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common())
    if not chosen:
        others = f"; it has {others}" if others else ""
        raise UserError(f"{where} holds no {', '.join(suffixes)} file{others}")
    if others:
        print(f"{where}: files left out: {others}", file=sys.stderr)
    return chosen


def file_streams(path):
    """(name, open) of one file, or of each text member of an archive, in its order. Members are
    streamed and never unpacked, so their names cannot write outside; links and devices are ignored.
    """
    name = path.name.lower()
    if not name.endswith(ARCHIVES):
        return [(str(path), partial(gzip.open if name.endswith(".gz") else open, path, "rb"))]
    try:
        if name.endswith(".zip"):
            archive = zipfile.ZipFile(path)
            members = {m.filename: m for m in archive.infolist() if not m.is_dir()}
            read = archive.open
        else:
            archive = tarfile.open(path)  # noqa: SIM115 (its members are read later)
            members = {m.name: m for m in archive if m.isreg()}
            read = archive.extractfile
    except DAMAGE as e:
        raise UserError(f"{path}: damaged or not the archive that its name says ({e})") from e
    return [(f"{path}:{m}", partial(read, members[m])) for m in choose_texts(path, members)]
