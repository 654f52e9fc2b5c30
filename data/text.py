"""Text files of the usual encodings, in archives or not, as streams of documents: `Documents`."""

import codecs
import gzip
import io
import itertools
import json
import lzma
import re
import string
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

from data.cli import UserError, explained

BLOCK = 1 << 20  # bytes read at a time; plain text and JSON lines are never held whole
SAMPLE = 1 << 20  # bytes at the start of a file from which its encoding is recognised
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")
DAMAGE = (
    EOFError, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
    RuntimeError,  # a zip file that is encrypted, or packed in a way that Python lacks
)  # fmt: skip

COMMON = (  # four fifths of the characters of modern Chinese texts are among these
    "的一和是个在以可有用能这我为人中们数了要不您于提他你来对如生成据行或使并学时分作到法方它大会地过题定些动下种性理子出物问关将通其更多供助机进解体发上计文力间工需化表算与面最重新信自"
    "量度建应确现加类果程式特帮保之然标常意务而好包因入任实得家同合系高经语户国创息本目年者件名习所点情业字当公等影相主电感比后斯示何设器代具利选例结被开及网美根型小部事无正品变制平决每"
    "持术给位此活全交产该词单项么内图论序外案技还括里组模统但答吗也很想列响从格前别受着输句色安接效说两回都明少期客气社心步区什导请水议够改长码取形容找样尔展处功非天总识构指预密克起增知"
    "质存食服排元减值引强手由让求第视适道素析日随约那造述注测像集员推策金传复流源线智择支调乐整评写率教查就没价节致收己海验观立义车基获她且试三原拉各世资言空准政含考球达记西身运看完次放"
    "科界风未索始市管参站态章至款告许音优司环反做认向见否游直去释场则况战书已络象积布只置简研健治易月维专清德护证话转商快独联"
)
PLAIN = {*string.printable, *COMMON, *map(chr, range(0x3041, 0x3100))}  # the last are kana
REMEDY = (
    "UTF-8, UTF-16 or GB18030; save it as UTF-8, or name its encoding: --encoding cp1252, "
    "shift_jis, euc_jp, big5, euc_kr, cp1251, koi8-r, gb18030, ..."
)


def detect_encoding(head):
    """The encoding of a file that begins with the bytes `head`: the one that its byte order mark
    names, UTF-16 if there are zero bytes, GB18030, or else UTF-8.

    GB18030 accepts nearly anything, so it is chosen only if fewer than 8 valid non-ASCII characters
    come before the first invalid byte and the decoded text has many common Chinese characters.
    """
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if 0 in head[:4096]:
        for encoding in ("utf-16-le", "utf-16-be"):
            text = head[:4096].decode(encoding, "ignore")
            if "\0" not in text and sum(c in PLAIN for c in text) > 0.1 * len(text):
                return encoding
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < SAMPLE)
    except UnicodeDecodeError as e:
        text, valid = head.decode("gb18030", "ignore"), head[: e.start].decode()
        letters = [c for c in text if c.isalpha() and not c.isascii()]
        common = sum(c in COMMON for c in letters)
        if sum(not c.isascii() for c in valid) < 8 and common >= max(1, 0.2 * len(letters)):
            return "gb18030"
    return "utf-8"


def read_text(path, encoding=None):
    """The text of a file, line ends as \\n, in `encoding` or in the one recognised. UserError if it
    is damaged or in another encoding."""
    opener = gzip.open if str(path).lower().endswith(".gz") else open
    return "".join(Documents([], encoding).text(str(path), partial(opener, path, "rb")))


# A token never reaches across these places in any tokenizer we know: after a letter and before a
# space, line end or common punctuation. Text may be cut there and tokenized in pieces.
SAFE_CUT = re.compile(r"(?s:.*)[^\W\d_](?=[\s,.;:!?，。！？；：、])")


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


def split(blocks, separator):
    """The strings between separators in a stream of text."""
    rest = ""
    for block in itertools.chain(blocks, [separator]):
        *strings, rest = (rest + block).split(separator)
        yield from strings


TEXT_FIELDS = ("text", "content", "messages", "conversations", "items")


def row_text(row, field, where):
    """The text of a row of JSON: a string; a dialogue (a list of turns); an object's `field`, by
    default the first of TEXT_FIELDS that it has, or an instruction, its input and output."""
    if isinstance(row, dict) and not field and {"instruction", "output"} <= row.keys():
        with explained(f"{where}: history is not a list of lists"):
            history = sum(row.get("history") or [], [])  # noqa: RUF017 (a text raises)
        texts = [row.get("system"), *history, row["instruction"], row.get("input"), row["output"]]
        row = [{"content": text} for text in texts]
    elif isinstance(row, dict):
        fields = [field] if field else TEXT_FIELDS
        if not (present := [key for key in fields if key in row]):
            keys = f"its keys are {', '.join(row)}"
            raise UserError(f"{where}: no {' or '.join(fields)}; {keys}: name one by --field")
        row = row[present[0]]
    if isinstance(row, list) and all(isinstance(turn, dict) for turn in row):
        row = "\n".join(filter(None, map(turn_text, row)))
    if not isinstance(row, str):
        raise UserError(f"{where} is neither text nor a dialogue but {row!r:.40}")
    # lone surrogates, which JSON can escape, become U+FFFD
    return row.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def turn_text(turn):
    """The text of one turn of a dialogue; calls, arguments and records as JSON."""
    names = ("content", "value", "arguments", "records")
    content = next((turn[name] for name in names if turn.get(name) is not None), "")
    values = [turn.get("reasoning_content"), content, turn.get("tool_calls")]
    values = [v for v in values if v not in (None, "")]
    return "\n".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)


def json_rows(blocks, name):
    """(where it is, row) of each row in a stream of JSON: the items of a list, or values that
    follow each other. In a .jsonl file each line is a row, unless the first line is a bare [
    or {. A line that is not JSON gives a UserError in place of its row."""
    blocks = iter(blocks)
    start = next(blocks, "")
    multiline = re.match(r"\s*[\[{]\s*\n", start)
    if multiline or not name.lower().removesuffix(".gz").endswith(".jsonl"):
        start += "".join(blocks)
        try:
            rows = json_values(start)
        except (ValueError, RecursionError) as e:
            if multiline or start.lstrip().startswith("["):
                raise UserError(f"{name}: broken JSON ({e})") from e
        else:
            yield from ((f"{name}: row {n}", row) for n, row in enumerate(rows, start=1))
            return
    for number, line in enumerate(split(itertools.chain([start], blocks), "\n"), start=1):
        if line.strip():
            where = f"{name}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                row = UserError(f"{where}: broken JSON ({e})".replace("line 1 ", ""))
            yield where, row


def json_values(text):
    """The items of the list that a text holds, or the values that follow each other in it."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    blank, decoder, values, start = re.compile(r"\s*"), json.JSONDecoder(), [], 0
    while (start := blank.match(text, start).end()) < len(text):
        value, start = decoder.raw_decode(text, start)
        values.append(value)
    return values


class Documents:
    """Iterates over (name, text pieces) of a source's documents, each time in the same order.

    `files` are (name, open) pairs, open() giving a binary stream. Text is only read when the pieces
    are, and never more than a few blocks of it at once. `encodings` maps names to encodings. A
    `separator` stands between the documents of a file of text.
    """

    def __init__(self, files, encoding=None, field=None, separator=None):
        self.files, self.field, self.separator = files, field, separator
        self.encoding, self.encodings = encoding, {}

    def text(self, name, open_stream):
        """Blocks of one file's text; UserError if it is damaged or not in its encoding."""
        newlines, offset = io.IncrementalNewlineDecoder(None, translate=True), 0
        try:
            with open_stream() as stream:
                head = stream.read(SAMPLE)
                encoding = self.encoding or detect_encoding(head)
                if encoding not in ("utf-8", "utf-8-sig", self.encoding, *self.encodings.values()):
                    remedy = "if that is wrong, save it as UTF-8"
                    print(f"{name}: read as {encoding}; {remedy}", file=sys.stderr)
                self.encodings[name] = encoding
                "".encode(encoding)  # a LookupError for hex and rot13, which are no text encodings
                decoder = codecs.getincrementaldecoder(encoding)()
                starts = (head[i : i + BLOCK] for i in range(0, len(head), BLOCK))
                for block in itertools.chain(starts, iter(partial(stream.read, BLOCK), b""), [b""]):
                    pending = len(decoder.getstate()[0])  # bytes of a character that was cut
                    yield newlines.decode(decoder.decode(block, final=not block), final=not block)
                    offset += len(block)
        except UnicodeDecodeError as e:
            at = f"byte {e.object[e.start]:#04x} at offset {e.start + offset - pending:,}"
            raise UserError(f"{name}: {at} is not text in {self.encoding or REMEDY}") from e
        except (LookupError, UnicodeError) as e:
            raise UserError(f"{name}: --encoding {self.encoding}: {e}") from e
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
                texts = (text.strip("\n") for text in split(blocks, self.separator))
                yield from ((name, [text]) for text in texts if text)
            else:
                yield name, safe_pieces(blocks)


def choose_texts(where, names, suffixes=TEXT_SUFFIXES):
    """The names of texts among a folder's or an archive's files, hidden ones left out. One line on
    stderr counts the others by suffix; UserError if there are no texts."""
    names = [name for name in names if not re.search(r"(^|/)(__MACOSX/|\.[^/.])", name)]
    chosen = [name for name in names if name.lower().endswith(suffixes)]
    others = Counter(Path(name).suffix.lower() for name in set(names) - set(chosen))
    others = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in others.most_common())
    if not chosen:
        raise UserError(f"{where} holds no {', '.join(suffixes)} file; it has {others or 'none'}")
    if others:
        print(f"{where}: files left out: {others}", file=sys.stderr)
    return chosen


def file_streams(path):
    """(name, open) of one file, or of each text member of an archive, in its order. Members are
    never unpacked, so their names cannot write outside; links and devices are ignored."""
    name = path.name.lower()
    if not name.endswith(ARCHIVES):
        return [(str(path), partial(gzip.open if name.endswith(".gz") else open, path, "rb"))]
    with explained(f"{path}: damaged or not the archive that its name says", *DAMAGE):
        if name.endswith(".zip"):
            archive = zipfile.ZipFile(path)
            members = {m.filename: m for m in archive.infolist() if not m.is_dir()}
            read = archive.open
        else:
            archive = tarfile.open(path)  # noqa: SIM115 (its members are read later)
            members = {m.name: m for m in archive if m.isreg()}
            read = archive.extractfile
    return [(f"{path}:{m}", partial(read, members[m])) for m in choose_texts(path, members)]
