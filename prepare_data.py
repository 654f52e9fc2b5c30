"""Text in, token files out: download, decode, tokenize, split.

    python prepare_data.py                                  Python's own standard library
    python prepare_data.py sales --tokenizer cl100k_base    the course's sales textbook
    python prepare_data.py shakespeare                      tiny Shakespeare, by characters
    python prepare_data.py novels/ --tokenizer bpe:4096     a folder, file, glob, .zip, .gz or URL

writes data/NAME/{train.bin, val.bin, meta.json}. A .bin is nothing but token ids, little-endian
uint16 or uint32; meta.json says how to read them and carries the tokenizer.

The chapters follow the data: errors, download, decoding of files into documents, tokenizers (with
a byte-level BPE trainer of our own), writing, reading back. No torch here, and no chat or batches.
"""

import argparse
import base64
import codecs
import contextlib
import copy
import difflib
import glob
import gzip
import hashlib
import heapq
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import signal
import sys
import sysconfig
import tarfile
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

if __name__ == "__main__":  # Ctrl-C during the slow imports is no traceback; `console` takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import regex  # comes with tiktoken, whose split patterns are written for it (\p{L}, \p{Han})
import tiktoken
import tiktoken.load

DATA = Path("data")
MB = 1_000_000


class DataError(ValueError):
    """A user's mistake about data: one line that names the thing, the value and the remedy."""


def console(main, *mistakes):
    """Run a script's `main` as a program: a user's mistake (DataError, OSError, or one of
    `mistakes`) becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console of another encoding is no reason to die
    if hasattr(sys.stdin, "reconfigure"):  # there may be none, or a stand-in
        sys.stdin.reconfigure(encoding="utf-8")  # what is piped in is text like any other
    script = Path(sys.argv[0]).name
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts' imports do without
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; keep the interpreter from flushing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (DataError, *mistakes) as e:
        print(f"{script}: {e}", file=sys.stderr)
        code = 2
    except OSError as e:
        what = f"{e.filename}: {e.strerror}" if e.filename else str(e)
        print(f"{script}: {what}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)


# What nanoGPT, transformers and others call our flags.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "learning_rate": "lr",
    "max_iters": "max_steps",
    "block_size": "context",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "warmup_iters": "warmup_steps",
    "gradient_accumulation_steps": "grad_accum",
}


class Parser(argparse.ArgumentParser):
    """argparse where flags may also be written with dashes or called as in ALIASES, never
    abbreviated, and where a mistake ends in one line."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def own_name(self, word):
        """`word`, or if it is a flag under another name, the same under ours."""
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in self._option_string_actions:
            return word
        name = flag[2:].replace("-", "_")
        known = {option[2:].replace("-", "_"): option for option in self._option_string_actions}
        return known.get(ALIASES.get(name, name), known.get(name, flag)) + equals + value

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, of the words by their names here."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self.own_name(word) for word in words], namespace)

    def error(self, message):
        """One line on stderr, exit code 2; with the flag that is most like an unknown one."""
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message = f"unknown argument {unknown[1]}"
            message += f": did you mean {near[0]}?" if near else " (--help lists what there is)"
        self.exit(2, f"{self.prog}: {message}\n")


class StopSignal:
    """Ctrl-C and SIGTERM, remembered until the step is done; a second one stops at once."""

    def __enter__(self):
        self.number, self.old = 0, {}
        with contextlib.suppress(ValueError):  # signals only reach the main thread
            for s in (signal.SIGINT, signal.SIGTERM):
                self.old[s] = signal.signal(s, self.remember)
        return self

    def remember(self, number, frame):
        """The signal handler: note it, and give the next one its usual effect."""
        self.number = number
        self.restore()

    def restore(self):
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def __exit__(self, *_):
        self.restore()


# --------------------------------------------------------------------------------------------
# Download: the one door through which anything from the network comes
# --------------------------------------------------------------------------------------------


class Cut(Exception):
    """The transfer broke in a way that trying again may mend."""


class Refused(DataError):
    """A server's answer that asking again won't change; `status` is its HTTP code."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def resolve_url(url):
    """The address to ask in place of `url`: the Hub's mirror from HF_ENDPOINT, then
    SCRATCHLM_MIRROR=BASE, which serves https://host/path as BASE/host/path."""
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if hub and url.startswith("https://huggingface.co/"):
        url = hub + url.removeprefix("https://huggingface.co")
    mirror = os.environ.get("SCRATCHLM_MIRROR", "").rstrip("/")
    return f"{mirror}/{url.split('://', 1)[1]}" if mirror else url


def download_path(url):
    """Where `url` is kept: data/downloads/host/path, no part of which can leave that folder."""
    u = urlsplit(url)
    host = u.netloc.strip(".") or "unknown"
    parts = [p for p in unquote(u.path).split("/") if p not in ("", ".", "..")] or ["index.html"]
    if u.query:  # another query is another file
        parts[-1] = hashlib.sha1(u.query.encode()).hexdigest()[:8] + "-" + parts[-1]
    safe = [quote(p, safe=" ()[]+,=@") for p in (host, *parts)]
    return DATA.joinpath("downloads", *safe)


def file_sha256(path):
    """The sha256 of a file's bytes, as hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def git_sha1(path):
    """The name that git gives a file's content: the sha1 of its length and bytes, as hex digits."""
    with open(path, "rb") as f:
        start = b"blob %d\0" % os.fstat(f.fileno()).st_size
        return hashlib.file_digest(f, lambda: hashlib.sha1(start)).hexdigest()


def fetch(url, dest=None, sha256=None, tries=4, wait=1.0, token=None):
    """Download `url` to `dest` (default: `download_path`) unless it is there, and return the path.

    Bytes go to a .part file that is renamed only once it is complete and its sha256, if one is
    given, is right. A cut connection is resumed by a Range request, up to `tries` times with
    doubling pauses from `wait` seconds, and by the next call if the server names versions (ETag).
    A `token` is shown to the host of `url` alone. The Hugging Face Hub says what its files' hashes
    are: they are checked, too. DataError tells of an unreachable host, an HTTP error (Refused, if
    it is final), or bytes that are not the wanted ones.
    """
    dest = Path(dest) if dest else download_path(url)
    if dest.exists() and (sha256 is None or file_sha256(dest) == sha256):
        return dest
    import requests  # not above: most runs download nothing, and it takes longer than all the rest

    for attempt in range(tries):
        try:
            part, named = download_part(resolve_url(url), dest, token)
            break
        except (requests.ConnectionError, requests.Timeout, Cut) as e:
            reason = e
            if attempt < tries - 1:
                time.sleep(wait * 2**attempt)
        except DataError:
            raise
        except (requests.RequestException, ValueError) as e:  # redirects in a circle or to no URL
            raise DataError(f"cannot download {resolve_url(url)}: {short(e)}") from e
    else:
        for part in dest.parent.glob(glob.escape(dest.name) + ".once.part"):
            part.unlink()  # no version to compare with: it could never be resumed
        host = urlsplit(resolve_url(url)).netloc
        raise DataError(
            f"cannot download {url}: {host} gave up after {tries} tries ({short(reason)}). Offline "
            f"or behind a firewall? Set SCRATCHLM_MIRROR=BASE to read BASE/host/path instead "
            f"(HF_ENDPOINT for the Hugging Face Hub), or put the file at {dest}"
        )
    for wanted in filter(None, (sha256, named)):
        kind, found = ("sha256", file_sha256) if len(wanted) == 64 else ("git's sha1", git_sha1)
        if (got := found(part)) != wanted:
            part.unlink()
            raise DataError(f"{url} arrived damaged: {kind} {got[:12]}…, wanted {wanted[:12]}…")
    os.replace(part, dest)
    return dest


def short(error):
    """The readable end of a nested requests / urllib3 error, without its object addresses."""
    text = re.sub(r"<[^>]*>:? ?|\(?Caused by |[\w.]*Error\(|[()'\"]", "", str(error))
    return text.strip().split(": ")[-1][:100] or type(error).__name__


def named_hash(answers):
    """The sha256 or git sha1 by which the Hub, in one of its `answers`, names a file's content.

    It stands in X-Linked-ETag, usually of the redirect to the host that holds the bytes. That
    host's own ETag may look like a sha256 and be something else; the Hub's (its answers carry
    X-Repo-Commit) is git's sha1 for a small file. None if nobody names one, as on other servers.
    """
    sha256, sha1 = "[0-9a-f]{64}", "[0-9a-f]{40}"
    tags = [(a.headers.get("X-Linked-ETag", ""), f"{sha256}|{sha1}") for a in answers]
    tags += [(a.headers.get("ETag", ""), sha1) for a in answers if "X-Repo-Commit" in a.headers]
    found = (re.fullmatch(f'(?:W/)?"?({kind})"?', tag) for tag, kind in tags)
    return next((m[1] for m in found if m), None)


def download_part(url, dest, token=None):
    """One attempt at `fetch`: fill dest.VERSION.part, continuing one that is there, and return it
    with the hash that the Hub gives for it, or None."""
    import requests

    ours = re.compile(re.escape(dest.name) + r"\.([0-9a-f]{8}|once)\.part")
    old = next((p for p in dest.parent.glob("*") if ours.fullmatch(p.name)), None)
    have = old.stat().st_size if old and not old.name.endswith(".once.part") else 0
    # identity: with a compressed transfer neither the length nor a Range would mean the file's own
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    # as auth, since a mere header would yield to ~/.netrc; requests drops it on the way elsewhere
    bearer = {"Authorization": f"Bearer {token}"}
    auth = (lambda request: request.headers.update(bearer) or request) if token else None
    with requests.get(url, headers=headers, auth=auth, stream=True, timeout=(10, 60)) as r:
        if r.status_code in (408, 429) or r.status_code >= 500:
            raise Cut(f"HTTP {r.status_code}")
        named = named_hash([*r.history, r])
        version = named or r.headers.get("ETag") or r.headers.get("Last-Modified")
        version = hashlib.sha1(version.encode()).hexdigest()[:8] if version else "once"
        part = dest.with_name(f"{dest.name}.{version}.part")
        offset = re.match(r"bytes (\d+)-", r.headers.get("Content-Range", ""))
        resumed = r.status_code == 206 and part == old and offset and int(offset[1]) == have
        if have and r.status_code in (206, 416) and not resumed:
            old.unlink()  # another version by now, or more than there is: start over
            raise Cut("the file changed on the server")
        if r.status_code not in (200, 206):  # nor is a redirect to nowhere the file
            hint = " (private? or a wrong name?)" if r.status_code in (401, 403, 404) else ""
            what = f"HTTP {r.status_code} {r.reason}{hint}"
            raise Refused(f"cannot download {url}: {what}", r.status_code)
        if old and not resumed:
            old.unlink()
        have = have if resumed else 0
        length = r.headers.get("Content-Length")
        total = have + int(length) if length else None
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if resumed else "wb") as f:
            try:
                for block in progress(r.iter_content(1 << 18), dest.name, have, total):
                    f.write(block)
            except requests.RequestException as e:
                raise Cut(short(e)) from e
    if total is not None and part.stat().st_size != total:
        raise Cut(f"{part.stat().st_size:,} of {total:,} bytes came")
    return part, named


def progress(blocks, name, have, total):
    """Pass blocks of bytes through, drawing a line that rewrites itself on a terminal."""
    start, done, shown = time.monotonic(), have, 0.0
    for block in blocks:
        yield block
        done += len(block)
        now = time.monotonic()
        if sys.stderr.isatty() and now - shown > 0.2:
            shown = now
            of = f" of {total / MB:.1f}" if total else ""
            rate = (done - have) / MB / max(now - start, 1e-3)
            print(f"\r{name}  {done / MB:.1f}{of} MB  {rate:.1f} MB/s ", end="", file=sys.stderr)
    print(f"\rdownloaded {name}: {done:,} bytes" + " " * 20, file=sys.stderr)


# --------------------------------------------------------------------------------------------
# Models of the Hugging Face Hub: which files make one, and how to ask for them
# --------------------------------------------------------------------------------------------

MODELS = "https://huggingface.co"
GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # short for openai-community/...
EXTRAS = (  # not all have them
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
INDEX = "model.safetensors.index.json"  # says which file of many holds which tensor
WEIGHTS = (INDEX, "model.safetensors", "pytorch_model.bin")  # the best first


def is_hub_name(name):
    """Does `name` look like a model of the Hub: gpt2, OWNER/NAME, OWNER/NAME@REVISION?"""
    return re.fullmatch(rf"({'|'.join(GPT2_MODELS)}|[\w.-]+/[\w.-]+)(@.*)?", name) is not None


def fetch_hub(name, files=None, check=None):
    """Download a model of the Hugging Face Hub and return its folder, data/hub/OWNER/NAME/REVISION.

    `name` is OWNER/NAME or one of GPT2_MODELS; @ and a branch, tag or commit may follow. What comes
    is config.json, those of EXTRAS that there are, and the first of WEIGHTS that there is (an index
    with all its shards); or else only `files`. What is there is not asked for again, and of a
    whole model nothing is: it works offline, and a branch that has moved on goes unnoticed.
    check(folder) is called before any weights are asked for, and may raise.
    Private and gated models need HF_TOKEN. DataError if one of that fails.
    """
    repo, at, revision = name.partition("@")
    revision = revision if at else "main"
    repo = f"openai-community/{repo}" if repo in GPT2_MODELS else repo
    if not re.fullmatch(r"(\w|\w[\w.-]{0,94}\w)/(\w|\w[\w.-]{0,94}\w)", repo, re.ASCII):
        raise DataError(f"model {name!r} is neither OWNER/NAME nor one of {', '.join(GPT2_MODELS)}")
    if not revision.strip(". "):
        raise DataError(f"revision {revision!r} of {repo} is no branch, tag or commit")
    folder = DATA.joinpath("hub", *repo.split("/"), quote(revision, safe=""))
    if files is not None:
        for file in plain_names(files, f"what is wanted of {repo}"):
            fetch_of_hub(repo, revision, file, folder)
        return folder
    # the weights come last: where they are whole, the server has been asked for all the rest
    whole = ["config.json", *weight_files(folder)]
    if len(whole) > 1 and all((folder / file).exists() for file in whole):
        return folder
    fetch_of_hub(repo, revision, "config.json", folder)
    for file in EXTRAS:
        fetch_of_hub(repo, revision, file, folder, optional=True)
    if check:
        check(folder)
    if not any(fetch_of_hub(repo, revision, file, folder, optional=True) for file in WEIGHTS):
        raise DataError(f"{repo} has no weights that we read, at {revision}: {', '.join(WEIGHTS)}")
    for file in weight_files(folder):
        fetch_of_hub(repo, revision, file, folder)
    return folder


def plain_names(names, where):
    """`names`, sorted; DataError if one is no plain file name and so might leave its folder."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w+((-+|\.)\w+)*", name, re.ASCII):
            raise DataError(f"{where}: {name!r} is no plain file name")
    return sorted(names)


def weight_files(folder):
    """The files that hold the weights in a model's folder: its index's shards, whether they are
    there or not; or the one file; or []. DataError if the index is none or names a strange file."""
    index = folder / INDEX
    if not index.exists():
        return [file for file in WEIGHTS[1:] if (folder / file).exists()][:1]
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{index} has no weight_map of names to files; delete it") from e
    if not shards:
        raise DataError(f"{index} has an empty weight_map; delete it")
    return plain_names(shards, index)


def hub_token(url):
    """HF_TOKEN, if it is set and it is the Hub (or HF_ENDPOINT in its place) that `url` asks."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):  # and don't show it
        raise DataError("HF_TOKEN holds spaces or other characters that no token has")
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/") or MODELS
    return token if resolve_url(url).startswith(f"{hub}/") else None


def fetch_of_hub(repo, revision, file, folder, optional=False):
    """The path of one file of a model, or None if it is `optional` and the Hub has none."""
    url = f"{MODELS}/{repo}/resolve/{quote(revision, safe='')}/{file}"
    token = hub_token(url)
    try:
        return fetch(url, folder / file, token=token)
    except Refused as e:
        if e.status == 404 and optional:
            return None
        if e.status == 404:
            why = f"no such model, revision or file: {repo}, {revision}, {file}"
        elif e.status in (401, 403):  # 401 is also what a wrong name gets without a token
            do = "see that HF_TOKEN is right and yours may read it" if token else "set HF_TOKEN"
            why = f"{repo} is private or gated: accept its licence on {MODELS}/{repo} and {do}"
        else:
            raise
        raise DataError(f"cannot download {url}: HTTP {e.status}: {why}") from e


# --------------------------------------------------------------------------------------------
# Documents: files of any of the usual encodings and containers, as streams of text
# --------------------------------------------------------------------------------------------

BLOCK = 1 << 20  # bytes read at a time; no file is ever held whole
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
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
    """Decode a whole stream: (the UnicodeDecodeError at its first bad byte or None, the number of
    characters beyond ASCII before that)."""
    beyond = 0
    try:
        with open_stream() as stream:
            for text in decode_blocks(stream, encoding):
                beyond += len(text) - len(text.encode("ascii", "ignore"))
        return None, beyond
    except UnicodeDecodeError as e:
        text = e.object[: e.end - 1].decode(encoding, "ignore")
        return e, beyond + len(text) - len(text.encode("ascii", "ignore"))


def detect_encoding(open_stream, name):
    """utf-8(-sig), utf-16(-le, -be) or gb18030, by trial; DataError names the first bad byte.

    UTF-8 is recognised by its own strictness. GB18030 accepts nearly anything, a damaged UTF-8
    file included, so it is only tried where no run of valid UTF-8 came before the first bad byte:
    eight characters of real GB18030 pass for UTF-8 about once in a million files.
    """
    with open_stream() as stream:
        head = stream.read(4096)
    with contextlib.suppress(UnicodeDecodeError):
        if len(head) < 4096 and 0 not in head and head.decode() and not head.startswith(BOMS[0][0]):
            return "utf-8"  # most small files need no second look
    for bom, encoding in BOMS:
        if head.startswith(bom):
            return encoding
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > 0.3 * len(head) > 6 * min(even, odd):  # ASCII: every second byte zero
        return "utf-16-le" if odd > even else "utf-16-be"
    bad, beyond = try_encoding(open_stream, "utf-8")
    if bad is None:
        return "utf-8"
    if beyond < 8 and try_encoding(open_stream, "gb18030")[0] is None:
        return "gb18030"
    if "end of data" in bad.reason:
        raise DataError(f"{name}: ends in the middle of a UTF-8 character, at offset {bad.start:,}")
    raise DataError(
        f"{name}: byte {bad.byte:#04x} at offset {bad.start:,} is not text in "
        f"UTF-8, UTF-16 or GB18030; if you know the encoding, name it: --encoding latin-1"
    )


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
            raise DataError(f"{where}: no {' or '.join(wanted)}; {keys}: name one by --field")
        row, where = row[key], f"{where}: its {key}"
    if isinstance(row, list) and all(isinstance(turn, dict) for turn in row):
        row = "\n".join(filter(None, map(turn_text, row)))
    if not isinstance(row, str):
        raise DataError(f"{where} is neither text nor a dialogue but {row!r:.40}")
    if re.search("[\ud800-\udfff]", row):  # halves of characters, which JSON can spell
        row = row.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return row


def parse_json(text, where):
    """json.loads; DataError if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: broken JSON ({e})") from e


def turn_text(turn):
    """The text of one turn of a dialogue; arguments and records as JSON."""
    text = next((turn[k] for k in ("content", "value", "arguments", "records") if k in turn), "")
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


def json_rows(blocks, name):
    """(where it is, row) of each line of JSON in a stream of text, empty ones skipped; or, but in a
    .jsonl file, of each item of the one list that it holds. A row may be a DataError."""
    if not name.removesuffix(".gz").endswith(".jsonl"):
        blocks = ["".join(blocks)]
        if blocks[0].lstrip().startswith("["):
            for number, row in enumerate(parse_json(blocks.pop(), name), start=1):
                yield f"{name}: row {number}", row
    number, parts = 0, []
    for block in itertools.chain(blocks, ["\n"]):
        start, *lines = block.split("\n")
        parts.append(start)
        for line in lines:
            text, parts, number = "".join(parts), [line], number + 1
            if text.strip():
                try:
                    yield f"{name}:{number}", parse_json(text, f"{name}:{number}")
                except DataError as e:
                    yield f"{name}:{number}", e


def json_documents(blocks, field, name):
    """(name, text pieces) of each row of JSON; DataError for the first that is damaged."""
    for where, row in json_rows(blocks, name):
        if isinstance(row, DataError):
            raise row
        text = row_text(row, field, where)
        yield where, safe_pieces(text[i : i + BLOCK] for i in range(0, len(text), BLOCK))


class Progress:
    """A line on a terminal that rewrites itself, at most twice a second; nothing elsewhere."""

    def __init__(self):
        self.shown, self.width = time.monotonic(), 0

    def __call__(self, text):
        if sys.stderr.isatty() and time.monotonic() - self.shown > 0.5:
            self.shown, self.width = time.monotonic(), len(text)
            print(f"\r{text} ", end="", flush=True, file=sys.stderr)

    def clear(self):
        """Leave an empty line to whatever comes next."""
        if self.width:
            print("\r" + " " * self.width, end="\r", file=sys.stderr)


class Documents:
    """The documents of a source, in a fixed order, as often as you iterate: (name, text pieces).

    `files` are (name, open) pairs, open() giving a binary stream. Text is only read when the pieces
    are, and never more than a few blocks of it at once. `encodings` counts what was recognised.
    """

    def __init__(self, files, encoding=None, field=None):
        self.files, self.field, self.forced = files, field, encoding
        self.known = {}  # name -> encoding, found once and kept for the second pass
        self.told = {"utf-8", encoding}

    def encoding_of(self, name, open_stream):
        """The encoding of one file, recognised once; one line on stderr if it is not UTF-8."""
        if name not in self.known:
            found = self.forced or detect_encoding(open_stream, name)
            if found not in self.told:
                self.told.add(found)
                print(f"{name}: read as {found} (if not, name it by --encoding)", file=sys.stderr)
            self.known[name] = found
        return self.known[name]

    def text(self, name, open_stream):
        """Blocks of one file's text; DataError if it is damaged or not in its encoding."""
        encoding = self.forced
        try:
            encoding = self.encoding_of(name, open_stream)
            with open_stream() as stream:
                yield from decode_blocks(stream, encoding)
        except (UnicodeDecodeError, LookupError) as e:
            at = f" at byte offset {e.start:,}" if isinstance(e, UnicodeDecodeError) else ""
            raise DataError(f"{name}: cannot be read as {encoding}{at}") from e
        except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as e:
            raise DataError(f"{name}: damaged or cut short ({e})") from e
        except (RuntimeError, NotImplementedError) as e:  # zipfile's
            raise DataError(f"{name}: encrypted, or packed in a way that Python lacks ({e})") from e

    def __iter__(self):
        for name, open_stream in self.files:
            blocks = self.text(name, open_stream)
            if name.removesuffix(".gz").endswith((".jsonl", ".json")):
                yield from json_documents(blocks, self.field, name)
            else:
                yield name, safe_pieces(blocks)


def file_streams(path):
    """(name, open) of one file; of each text member for a .zip, in the archive's order."""
    if path.suffix == ".zip":
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as e:
            raise DataError(f"{path}: damaged or no zip file ({e})") from e
        # members are streamed and never unpacked, so their names can't lead anywhere
        members = [m for m in archive.namelist() if m.endswith(TEXT_SUFFIXES)]
        if not members:
            raise DataError(f"{path} holds no {', '.join(TEXT_SUFFIXES)} file")
        return [(f"{path}:{m}", lambda m=m: archive.open(m)) for m in members]
    if path.suffix == ".gz":
        return [(str(path), lambda: gzip.open(path))]
    return [(str(path), lambda: open(path, "rb"))]


def stdlib_files():
    """Python's own source: no packages, no tests, and none of the tables that teach nothing."""
    skip = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts[:-1])]


HUB = "https://huggingface.co/datasets"
# name -> (address, sha256, default tokenizer)
REMOTE = {
    "sales": (
        f"{HUB}/goendalf666/sales-textbook_for_convincing_and_selling/resolve/main/"
        "sales_textbook.txt",
        "1994f20f5becd3f0b3d7a632e5a68513cc38cf6c9737a9f38243f1b652e962da",
        "cl100k_base",
    ),
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "char",
    ),
}


def find_files(source):
    """The paths behind a SOURCE, fetched if need be; DataError if there are none."""
    if not source.strip():
        raise DataError("the source is empty: name a file, a folder, a URL, stdlib, ...")
    if source == "stdlib":
        return stdlib_files()
    if source in REMOTE:
        url, sha256, _ = REMOTE[source]
        return [fetch(url, sha256=sha256)]
    if source in SETS:
        return [fetch_set(source)["train"]]
    if source.startswith(("http://", "https://")):
        return [fetch(source)]
    path = Path(source)
    if path.is_dir():
        known = tuple(s + z for s in TEXT_SUFFIXES for z in ("", ".gz")) + (".zip",)
        found = watched(path.rglob("*"), "listing file")
        found = [p for p in sorted(found) if p.name.endswith(known) and p.is_file()]
        found = [p for p in found if not any(x.startswith(".") for x in p.relative_to(path).parts)]
        if not found:
            raise DataError(
                f"folder {source} holds no {', '.join(TEXT_SUFFIXES)}, .gz or .zip file"
            )
        return found
    if path.exists() and not path.is_file():
        raise DataError(f"{source} is no regular file: it is read more than once, so save it first")
    if path.exists():
        return [path]
    found = [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).is_file()]
    if not found:
        raise DataError(
            f"source {source!r} is no file, folder, glob or URL, nor one of "
            f"stdlib, {', '.join([*REMOTE, *SETS])}"
        )
    return found


# --------------------------------------------------------------------------------------------
# Tokenizers: all of them tiktoken encodings, so all of them encode at its speed
# --------------------------------------------------------------------------------------------

END = "<|endoftext|>"  # stands between documents
UNKNOWN = "\ufffd"  # what the char tokenizer makes of a character it has never seen

# How our own BPE splits text before merging: no token crosses a border. Like cl100k_base's, but
# - a run of Chinese characters stands alone, so "，" never sticks to the word after it;
# - marks belong to their letters (Hindi, Thai), and line ends to the indentation after them.
_LETTER = r"[^\p{Han}\p{N}\p{P}\p{S}\p{Z}\p{C}]"  # letters and marks, without Han
PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"\p{Han}+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTER}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s*[\r\n]+[ \t]*",
        r"\s+(?!\S)",
        r"\s+",
    )
)
ANY_CHARACTER = r"(?s:.)"

# tiktoken downloads vocabularies by itself: let it do so through fetch, its mirror and its cache
tiktoken.load.read_file = lambda url: fetch(url).read_bytes()


def rebuilt(e, more=None):
    """A tiktoken.Encoding like `e` that shares nothing with it, with `more` special tokens."""
    return tiktoken.Encoding(
        e.name,
        pat_str=e._pat_str,
        mergeable_ranks=e._mergeable_ranks,
        special_tokens=e._special_tokens | (more or {}),
    )


class Tokenizer:
    """A tiktoken.Encoding and the plain-dict `spec` that rebuilds it anywhere.

    spec["kind"] is byte, char (with "chars"), bpe (with "pattern" and base64 "tokens"), tiktoken
    (with "name") or hf (see hub_tokenizer). Files and checkpoints carry the spec, so a model always
    has its tokenizer. `eot` is the id that ends a text, `begin` the one that a Hugging Face model
    wants in front of it, else None; `encode` adds neither.

    >>> t = Tokenizer({"kind": "byte"})
    >>> t.encode("é"), t.decode([195, 169]), t.n_vocab, t.eot
    ([195, 169], 'é', 257, 256)
    """

    def __init__(self, spec):
        self.spec, kind = spec, spec.get("kind")
        pattern = ANY_CHARACTER
        # To add a tokenizer: give it a kind here, and a way to make its spec in make_tokenizer.
        if kind == "tiktoken":
            try:
                self.encoding = tiktoken.get_encoding(spec["name"])
            except ValueError as e:  # tiktoken's own checks: unknown name, wrong hash
                for url in re.findall(r"from (https?://\S+)", str(e)):
                    download_path(url).unlink(missing_ok=True)  # or it would fail for ever
                raise DataError(f"tokenizer {spec['name']}: {e}") from e
        else:
            if kind == "byte":
                tokens = [bytes([b]) for b in range(256)]
            elif kind == "char":
                tokens = [c.encode() for c in spec["chars"] + UNKNOWN]
                self._strange = re.compile(f"[^{re.escape(spec['chars'] + UNKNOWN)}]")
            elif kind in ("bpe", "hf"):  # no token where an added one of Hugging Face's has the id
                tokens = [t if t is None else base64.b64decode(t) for t in spec["tokens"]]
                pattern = spec["pattern"]
            else:
                raise DataError(f"tokenizer kind {kind!r} is unknown to this version")
            if kind == "hf":  # text between two matches is a piece for them, nothing for tiktoken
                pattern = f"{pattern}|(?:(?!{pattern}){ANY_CHARACTER})+"
            self.encoding = tiktoken.Encoding(
                kind,
                pat_str=pattern,
                mergeable_ranks={t: i for i, t in enumerate(tokens) if t is not None},
                special_tokens=dict(spec["added"]) if kind == "hf" else {END: len(tokens)},
            )
        if added := spec.get("special"):  # ids of their own behind all others
            names = enumerate(added, start=self.encoding.n_vocab)
            self.encoding = rebuilt(self.encoding, {name: i for i, name in names})
        self.special = self.encoding._special_tokens  # name -> id
        self.n_vocab = self.encoding.n_vocab  # the largest id + 1
        known = self.encoding._mergeable_ranks
        self._lost = bytes(b for b in range(256) if kind == "hf" and bytes([b]) not in known)
        self.eot = spec["end"] if kind == "hf" else self.encoding.eot_token
        self.begin = spec.get("begin")

    def with_special(self, names):
        """This tokenizer with the special tokens `names` added behind its vocabulary, those that it
        has already left as they are. Text can never spell a special token, only `special` can."""
        new = [n for n in names if n not in self.special]
        if not new:
            return self
        return Tokenizer({**self.spec, "special": [*self.spec.get("special", []), *new]})

    def same_ids(self, other):
        """Whether another tokenizer has the same tokens under the same ids."""
        a, b = self.encoding, other.encoding
        return (a._mergeable_ranks, a._special_tokens) == (b._mergeable_ranks, b._special_tokens)

    @property
    def name(self):
        """What the user calls it, e.g. bpe:2048."""
        kind, size = self.spec["kind"], self.n_vocab - len(self.spec.get("special", []))
        return self.spec.get("name") or {"bpe": f"bpe:{size}"}.get(kind, kind)

    def encode_array(self, text):
        """Token ids of `text` as uint32, special tokens' names read as plain text. Runs without
        Python's lock, so threads help."""
        if self.spec["kind"] == "char":
            text = self._strange.sub(UNKNOWN, text)
        if self.spec.get("nfc"):  # é as one character, however it was typed
            text = unicodedata.normalize("NFC", text)
        if self._lost and len(data := text.encode()) > len(data.translate(None, self._lost)):
            return self._encode_without_lost(text)
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def _encode_without_lost(self, text):
        """Ids where bytes without a token (some models lack those of rare characters, SmolLM2
        does) fall out of each piece before it is merged, as in Hugging Face's. Slow but rare."""
        pieces = (m[0].encode() for m in regex.finditer(self.encoding._pat_str, text))
        kept = filter(None, (piece.translate(None, self._lost) for piece in pieces))
        ids = itertools.chain.from_iterable(map(self.encoding._encode_single_piece, kept))
        return np.fromiter(ids, dtype=np.uint32)

    def for_one_thread(self):
        """The same tokenizer for a thread of its own. Of all that share an encoding, the first to
        use its regular expressions keeps their fast place, and every match of another one makes
        both wait: two threads took longer than one, and with an encoding each half as long."""
        own = copy.copy(self)
        own.encoding = rebuilt(self.encoding)
        return own

    def encode(self, text):
        """Token ids of `text` as a list."""
        return self.encode_array(text).tolist()

    def token_bytes(self, i):
        """The bytes that id `i` stands for; None if no token has this id."""
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return None

    def decode(self, ids):
        """Text of token ids; a broken character shows as U+FFFD."""
        return self.encoding.decode(list(map(int, ids)))

    @cached_property
    def byte_lengths(self):
        """Bytes of text per id, (n_vocab,): what loss is divided by for bits per byte. Special
        tokens count 0, ids that no token has -1."""
        special = set(self.special.values())
        lengths = np.zeros(self.n_vocab, dtype=np.int64)
        for i in range(self.n_vocab):
            token = self.token_bytes(i)
            lengths[i] = -1 if token is None else 0 if i in special else len(token)
        return lengths

    @cached_property
    def fallback(self):
        """Bools, (n_vocab,): tokens that are a piece of a character, or the unknown one."""

        def broken(token):
            try:
                return token is not None and UNKNOWN in token.decode()
            except UnicodeDecodeError:
                return True

        return np.array([broken(self.token_bytes(i)) for i in range(self.n_vocab)])


def train_bpe(counts, size):
    """Byte-pair encoding (Sennrich et al. 2016) over bytes: up to `size` tokens, in merge order.

    `counts` maps pieces (bytes) to how often they occur. Starting from the 256 bytes, the most
    frequent adjacent pair becomes a token, until there are enough or no pair occurs twice; among
    equals the pair of the smallest ids. Only the pieces that hold the pair are touched.

    >>> [t.decode() for t in train_bpe({b"low": 5, b"lower": 2, b"newer": 6}, 260)[256:]]
    ['er', 'lo', 'low', 'ew']
    """
    tokens = [bytes([b]) for b in range(256)]
    words = [(list(piece), n) for piece, n in counts.items()]
    total, where = Counter(), defaultdict(set)  # pair -> occurrences, pair -> words with it
    for w, (word, n) in enumerate(words):
        for pair in itertools.pairwise(word):
            total[pair] += n
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in total.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < size:
        n, pair = heapq.heappop(heap)
        if -n != total[pair]:  # the count has changed since: put it back at its place
            if total[pair] > 0:
                heapq.heappush(heap, (-total[pair], pair))
            continue
        if -n < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        grown = set()
        for w in where.pop(pair):
            word, n = words[w]
            shorter = merge(word, pair, new)
            for p in itertools.pairwise(word):
                total[p] -= n
            for p in itertools.pairwise(shorter):
                total[p] += n
                if new in p:
                    where[p].add(w)
                    grown.add(p)
            words[w] = shorter, n
        del total[pair]
        for p in grown:
            heapq.heappush(heap, (-total[p], p))
    return tokens


def merge(word, pair, new):
    """`word` (a list of ids) with each `pair` in it replaced by `new`, from the left."""
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


BPE_SAMPLE = 64 * MB  # characters to count at most; more text does not move a small vocabulary


def learn_bpe(size, documents, total_bytes):
    """The spec of a BPE of `size` ids, end-of-text included, trained on the documents.

    Of more text than BPE_SAMPLE every k-th piece is counted, so that all of it has its say.
    """
    if not 257 <= size <= 1_000_000:
        raise DataError(f"tokenizer bpe:{size}: a size from 257 to 1,000,000, please")
    split, counts = regex.compile(PATTERN), Counter()
    every = -(-total_bytes // BPE_SAMPLE) or 1
    pieces = (piece for _, pieces in documents for piece in pieces)
    for piece in itertools.islice(pieces, 0, None, every):
        counts.update(split.findall(piece))
    tokens = train_bpe({piece.encode(): n for piece, n in counts.items()}, size - 1)
    encoded = [base64.b64encode(t).decode() for t in tokens]
    return {"kind": "bpe", "pattern": PATTERN, "tokens": encoded}


def make_tokenizer(name, documents, total_bytes):
    """The Tokenizer that the user calls `name`, trained on the documents where it needs to be.

    byte | char | bpe:N | gpt2 | cl100k_base | o200k_base | any of tiktoken's | a prepared folder
    whose tokenizer is to be used again | a folder with a tokenizer.json | a model of the Hub.
    """
    if name == "byte":
        return Tokenizer({"kind": "byte"})
    if name == "char":
        chars = set()
        for piece in (piece for _, pieces in documents for piece in pieces):
            chars.update(piece)
        return Tokenizer({"kind": "char", "chars": "".join(sorted(chars - {UNKNOWN}))})
    if name.startswith("bpe:"):
        if not name[4:].isdecimal():
            raise DataError(f"tokenizer {name!r}: bpe:N wants a number, e.g. bpe:4096")
        return Tokenizer(learn_bpe(int(name[4:]), documents, total_bytes))
    if name in tiktoken.list_encoding_names():
        return Tokenizer({"kind": "tiktoken", "name": name})
    if (Path(name) / "meta.json").exists():
        return Tokenizer(read_meta(name)["tokenizer"])
    if (Path(name) / "tokenizer.json").exists():
        return Tokenizer(hub_tokenizer(name))
    if is_hub_name(name):
        return Tokenizer(hub_tokenizer(fetch_hub(name, files=("config.json", "tokenizer.json"))))
    raise DataError(
        f"tokenizer {name!r} is unknown; choose byte, char, bpe:N (e.g. bpe:4096), gpt2, "
        f"cl100k_base, o200k_base, a folder prepared before, or a model of the Hub (owner/name)"
    )


# --------------------------------------------------------------------------------------------
# Chat: the one template for training, evaluation and talking
# --------------------------------------------------------------------------------------------

# Each turn is a role token, text, and <|end|>. A tool call is a turn of the assistant, too: whether
# it speaks or calls is the first thing it decides.
ROLES = {
    "system": ("<|system|>",),
    "user": ("<|user|>",),
    "assistant": ("<|assistant|>",),
    "call": ("<|assistant|>", "<|call|>"),  # content: name {"argument": value, ...}
    "tool": ("<|tool|>",),  # what a call returned
}
TURN_END = "<|end|>"
CHAT_TOKENS = (*dict.fromkeys(name for names in ROLES.values() for name in names), TURN_END)


class Template:
    """How a tokenizer's family writes a conversation: ours, ChatML (Qwen) or Llama 3's.

        ours      <|user|>hi<|end|><|assistant|>hello<|end|>
        chatml    <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n
        llama3    <|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>...

    start   ids before the first turn
    begin   ids that open the assistant's turn
    end     the id that closes a turn
    call    the id with which a call begins, None if the family has no such token
    spoken  the special tokens that an answer may hold

    DataError if the tokenizer has the special tokens of none of them.
    """

    def __init__(self, tokenizer):
        self.tokenizer, special = tokenizer, tokenizer.special
        kinds = {"ours": CHAT_TOKENS, "chatml": ("<|im_start|>", "<|im_end|>")}
        kinds["llama3"] = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        self.kind = next((k for k, names in kinds.items() if set(names) <= set(special)), None)
        if self.kind is None:
            raise DataError(f"the tokenizer {tokenizer.name} has no special tokens for a chat")
        ends = {"ours": TURN_END, "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
        self.end = special[ends[self.kind]]
        self.call = special.get({"ours": "<|call|>", "chatml": "<tool_call>"}.get(self.kind))
        self.start = [tokenizer.begin] if self.kind == "llama3" and tokenizer.begin else []
        self.begin = self.opening("assistant")
        names = ("<|call|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
        self.spoken = [self.end, *(special[name] for name in names if name in special)]

    def opening(self, role):
        """The ids that say who speaks."""
        special, encode = self.tokenizer.special, self.tokenizer.encode
        if self.kind == "ours":
            return [special[ROLES[role][0]]]
        if self.kind == "chatml":
            return [special["<|im_start|>"], *encode({"tool": "user"}.get(role, role) + "\n")]
        role = {"tool": "ipython"}.get(role, role)
        names = special["<|start_header_id|>"], special["<|end_header_id|>"]
        return [names[0], *encode(role), names[1], *encode("\n\n")]

    def turns(self, messages):
        """[(role, ids, mask)] of a conversation's turns, mask 1 where the assistant's own words are
        to be learned. The system message may have "tools", a list of JSON schemas: they stand where
        the family puts them. In ChatML calls in a row are one turn, and so are their results."""
        if self.kind == "llama3":
            messages = llama3_tools([m | {"content": m["content"].strip()} for m in messages])
        merged = []
        for m in messages:
            if self.kind == "chatml" and m["role"] in ("call", "tool"):
                if merged and merged[-1]["role"] == m["role"]:
                    merged[-1]["content"].append(m["content"])
                    continue
                m = m | {"content": [m["content"]]}
            merged.append(m)
        return [(m["role"], *self.turn(m)) for m in merged]

    def turn(self, message):
        """(ids, mask) of one message, as `turns` has it."""
        encode, said, tools = self.tokenizer.encode, message["content"], message.get("tools")
        role = "assistant" if message["role"] == "call" else message["role"]
        behind = encode("\n") if self.kind == "chatml" else []
        if message["role"] == "call":
            own = self.call_ids(said)
        elif message["role"] == "tool" and self.kind == "chatml":
            own = self.tagged("tool_response", said)
        elif tools and self.kind == "chatml":
            told = "".join(f"\n{json.dumps(t, ensure_ascii=False)}" for t in tools)
            text = (said + "\n\n" if said else "") + CHATML_TOOLS[0] + told + CHATML_TOOLS[1]
            marks = [n for n in ("<tool_call>", "</tool_call>") if n in self.tokenizer.special]
            parts = re.split(f"({'|'.join(marks)})", text) if marks else [text]
            own = [[self.tokenizer.special[p]] if p in marks else encode(p) for p in parts]
            own = list(itertools.chain.from_iterable(own))
        elif tools:
            own = encode("\n".join(filter(None, (said, json.dumps(tools, ensure_ascii=False)))))
        else:
            own = encode(said)
        before, own = self.opening(role), [*own, self.end]
        learned = int(role == "assistant")
        return before + own + behind, [0] * len(before) + [learned] * len(own) + [0] * len(behind)

    def tagged(self, tag, texts):
        """The ids of each text between <tag> and </tag>, which are tokens in some vocabularies."""
        encode, special = self.tokenizer.encode, self.tokenizer.special
        if f"<{tag}>" not in special:
            return encode("\n".join(f"<{tag}>\n{text}\n</{tag}>" for text in texts))
        ids = []
        for text in texts:
            ids += encode("\n") if ids else []
            ids += [special[f"<{tag}>"], *encode(f"\n{text}\n"), special[f"</{tag}>"]]
        return ids

    def call_ids(self, content):
        """The ids of a call, whose content is as `call_text` writes it (in ChatML of several)."""
        if self.kind == "ours":
            return [self.call, *self.tokenizer.encode(content)]
        if self.kind == "llama3":
            return self.tokenizer.encode(json_call(content, "parameters"))
        return self.tagged("tool_call", [json_call(c, "arguments") for c in content])

    def is_call(self, ids):
        """Whether generated ids are a call: ours begins with its token, elsewhere words, or a
        thought, may come before it."""
        return self.call in (ids[:1] if self.kind == "ours" else ids)

    def parse(self, ids):
        """The message that generated ids mean: {"role": "assistant" or "call", "content"}, without
        the thought before it."""
        special, decode = self.tokenizer.special, self.tokenizer.decode
        if (end := special.get("</think>")) in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
        elif special.get("<think>", -1) in ids:  # it never came to an end
            ids = []
        hidden = set(special.values())
        text = decode([i for i in ids if i not in hidden])
        if self.kind == "ours":
            return {"role": "call" if self.is_call(ids) else "assistant", "content": text}
        text = text.lstrip("\n") if end is not None else text
        called = ids[ids.index(self.call) :] if self.is_call(ids) else ids
        inner = decode([i for i in called if i not in hidden]).strip()
        inner = inner.removeprefix("<tool_call>").removesuffix("</tool_call>")
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            call = json.loads(inner)
            arguments = call.get("arguments", call.get("parameters"))
            if isinstance(call.get("name"), str) and isinstance(arguments, dict):
                return {"role": "call", "content": call_text(call["name"], arguments)}
        return {"role": "assistant", "content": text}


# How Qwen's template tells a model of its tools: what comes before and after the schemas.
CHATML_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call>",
)
# And Llama 3.1's: the system turn begins with the first, the user's first turn with the second.
LLAMA3_TOOLS = (
    "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n",
)


def llama3_tools(messages):
    """The messages with the tools of the first one written out, as Llama 3.1's template does."""
    if not (messages and messages[0].get("tools")):
        return messages
    system, *rest = messages
    schemas = (json.dumps(t, ensure_ascii=False, indent=4) + "\n\n" for t in system["tools"])
    told, given = LLAMA3_TOOLS[0], LLAMA3_TOOLS[1] + "".join(schemas)
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if first is None:
        told += given
    else:
        rest[first] = rest[first] | {"content": given + rest[first]["content"]}
    return [{"role": "system", "content": told + system["content"]}, *rest]


def json_call(content, key):
    """A call's content as a JSON object, its arguments under `key`."""
    name, _, arguments = content.partition(" ")
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


def render_chat(messages, tokenizer, add_generation_prompt=False):
    """(ids, mask) of a conversation, mask 1 where the assistant's own words are to be learned.

    `messages` are {"role", "content"} dicts, roles as in ROLES, the system's perhaps with "tools";
    how they are written follows from the tokenizer's special tokens (see Template). With
    `add_generation_prompt` the row ends where an answer begins, a prefix of the row with it.

        <|user|> hi <|end|> <|assistant|> hello <|end|>
        0        0  0       0             1     1
    """
    template = Template(tokenizer)
    ids, mask = list(template.start), [0] * len(template.start)
    for _, more, learned in template.turns(messages):
        ids, mask = ids + more, mask + learned
    if add_generation_prompt:
        ids, mask = ids + template.begin, mask + [0] * len(template.begin)
    return ids, mask


def label_token(label):
    """The special token that stands for a label of a classifier."""
    return f"<|label:{label}|>"


def call_text(name, arguments):
    """The content of a call turn: the tool's name and its arguments as JSON on one line."""
    return f"{name} {json.dumps(arguments, ensure_ascii=False)}"


def parse_call(content):
    """(name, arguments) of a call turn; ValueError if it is not a name and a JSON object."""
    name, _, arguments = content.strip().partition(" ")
    try:
        arguments = json.loads(arguments)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the arguments are no JSON ({e})") from e
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no JSON object")
    return name, arguments


# --------------------------------------------------------------------------------------------
# Hugging Face's tokenizers in and out: tokenizer.json and its neighbours
# --------------------------------------------------------------------------------------------

# tokenizer.json spells the bytes of a token as characters, the way GPT-2 did: the printable ones of
# Latin-1 stand for themselves, the others for the characters from U+0100 on (a space is Ġ).
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = sorted(set(range(256)) - set(_PRINTABLE))
BYTE_CHARS = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
CHAR_BYTES = {c: b for b, c in BYTE_CHARS.items()}

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit alone, and GPT-2's pattern on the stretches between: blanks before a digit are the end
# of their stretch, so all of them are one piece, where GPT-2 keeps the last for the word behind it.
DIGITS_PATTERN = r"\p{N}|" + GPT2_PATTERN.replace(r"| ?\p{N}+", "").replace(
    r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)"
)
MOST_LOST = 64  # bytes without a token at most: SmolLM2 lacks some 20, those of rare characters
ID_LIMIT = 1_000_000  # no vocabulary is as large; a larger id is a damaged file


def spell(token):
    """The characters that tokenizer.json writes for the bytes of a token: b" é" is "ĠÃ©"."""
    return "".join(map(BYTE_CHARS.__getitem__, token))


def unspell(text):
    """The bytes of a token of tokenizer.json; ValueError if it is not spelled in GPT-2's way."""
    try:
        return bytes(map(CHAR_BYTES.__getitem__, text))
    except KeyError as e:
        raise ValueError(f"model: token {text!r} is not byte-level, {e} spells no byte") from e


def bpe_parts(token, ranks):
    """The last pieces of `token` before byte-pair encoding makes it one: two, if it ever does.

    These two are the only pair that it is ever made of, in any text: merges of lower rank inside
    it come first, and one across its border would leave no whole token here.

    >>> bpe_parts(b"low", {b"l": 0, b"o": 1, b"w": 2, b"lo": 3, b"low": 4})
    [b'lo', b'w']
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, ID_LIMIT) for a, b in itertools.pairwise(parts)]
        best = min(joined)
        if best == ID_LIMIT:
            break
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def read_json(path):
    """The object that a JSON file holds; DataError if it holds none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is no JSON ({e})") from e
    if not isinstance(data, dict):
        raise DataError(f"{path} holds no JSON object")
    return data


def hub_pattern(pre):
    """The split pattern of a pre_tokenizer; ValueError if it is none of the three that we know."""
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds, first, last = [s["type"] for s in steps], steps[0], steps[-1]
    own = last.get("use_regex", True)
    plain = kinds[-1] == "ByteLevel" and last.get("add_prefix_space") is False
    if plain and own and kinds == ["ByteLevel"]:
        return GPT2_PATTERN
    if plain and own and kinds == ["Digits", "ByteLevel"] and first["individual_digits"] is True:
        return DIGITS_PATTERN
    split = plain and not own and kinds == ["Split", "ByteLevel"]
    if not split or first["behavior"] != "Isolated" or first.get("invert"):
        raise ValueError(
            f"pre_tokenizer {' + '.join(kinds)}, with its settings, is none of ByteLevel, Digits + "
            f"ByteLevel and Split + ByteLevel, without add_prefix_space"
        )
    pattern = first["pattern"].get("Regex", "")
    # Their regular expressions are Ruby's, tiktoken's are Rust's: these mean something else there.
    bare = re.sub(r"\\[pP]\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]", "", pattern)
    if re.search(r"[$^]|\}\+|\(\?[a-z-]*[msx]", bare) or regex.fullmatch(pattern, ""):
        raise ValueError(f"pre_tokenizer: its pattern {pattern!r} splits otherwise in tiktoken")
    return pattern


def hub_tokens(model, added):
    """Bytes -> id of a byte-level BPE model of tokenizer.json, `added` (name -> id) left out.

    ValueError if it is another kind of model, or one that tiktoken, which merges any two tokens
    that join to a third, those of the lowest id first, would read otherwise.
    """
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"model {model['type']}: only byte-level BPE can be read")
    if model.get("byte_fallback"):
        raise ValueError(
            "model: byte_fallback is SentencePiece's (Llama 2, TinyLlama, Mistral 7B); only "
            "byte-level BPE can be read"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"model: {key} {model[key]!r}: only byte-level BPE can be read")
    vocab = model["vocab"]
    ranks = {unspell(text): i for text, i in vocab.items() if text not in added}
    ids = [*ranks.values(), *added.values()]
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < ID_LIMIT]:
        raise ValueError(f"{bad[0]!r} is no token id")
    twice = [i for i, n in Counter(ids).items() if n > 1]
    twice += [i for name, i in added.items() if vocab.get(name, i) != i]
    if twice:
        raise ValueError(f"model and added_tokens disagree about id {twice[0]}")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing and (len(missing) > MOST_LOST or model.get("unk_token") is not None):
        raise ValueError(f"model: {len(missing)} bytes have no token, 0x{missing[0]:02X} first")
    check_merges(model["merges"], ranks, model.get("ignore_merges"))
    return ranks


def check_merges(merges, ranks, ignore_merges):
    """ValueError unless merging by id is what the `merges` of tokenizer.json say."""
    pairs, last = set(), 0
    for merge in merges:
        pair = tuple(map(unspell, merge.split(" ") if isinstance(merge, str) else merge))
        new = ranks.get(b"".join(pair))
        if len(pair) != 2 or new is None or not ranks.keys() >= set(pair):
            raise ValueError(f"merge {merge!r} does not make a token of two others")
        if new < last:
            raise ValueError(
                f"merge {merge!r} makes id {new} after id {last}; tiktoken merges by id, so the "
                f"ids must rise along the merges"
            )
        pairs.add(pair)
        last = new
    for token, i in ranks.items():
        parts = bpe_parts(token, ranks)  # more than two: reached only as a whole piece, if at all
        listed = tuple(parts) in pairs if len(parts) == 2 else len(parts) == 1 or ignore_merges
        if not listed:
            raise ValueError(f"token {spell(token)!r} (id {i}) is made by none of the merges")


def hub_begin(post, added):
    """The id that a post_processor puts in front of a text, or None; ValueError if not known."""
    steps = post["processors"] if post and post["type"] == "Sequence" else [post] if post else []
    begin = []
    for step in steps:
        if step["type"] == "TemplateProcessing":
            front = itertools.takewhile(lambda part: "SpecialToken" in part, step["single"])
            names = [part["SpecialToken"]["id"] for part in front]
            begin += [i for name in names for i in step["special_tokens"][name]["ids"]]
        elif step["type"] != "ByteLevel":  # that one moves offsets, no ids
            raise ValueError(f"post_processor {step['type']} can't be read")
    if len(begin) > 1 or not set(begin) <= set(added.values()):
        raise ValueError(f"post_processor: ids {begin} in front are not one added token's")
    return begin[0] if begin else None


def hub_end(folder, added):
    """The id of the end-of-text token that the files beside tokenizer.json name, or None.

    Configurations often carry a default eos_token_id that is no special token of theirs: such a
    one is passed over, or any text with that token in it would end there.
    """
    for name in ("generation_config.json", "config.json"):
        if (path := folder / name).exists():
            ids = read_json(path).get("eos_token_id")
            first = (ids or [None])[0] if isinstance(ids, list) else ids
            if first is not None and type(first) is not int:
                raise DataError(f"{path}: eos_token_id {ids!r} is no token id")
            if first in added.values():
                return first
    if (path := folder / "tokenizer_config.json").exists():
        name = read_json(path).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and not isinstance(name, str):
            raise DataError(f"{path}: eos_token {name!r} is no name of a token")
        if name in added:
            return added[name]
    return added.get(END)


def hub_name(folder):
    """OWNER/NAME of a folder that `fetch_hub` made, or else the folder's own name."""
    parts = Path(folder).resolve().parts
    return "/".join(parts[-3:-1] if parts[-4:-3] == ("hub",) else parts[-1:])


def hub_template(folder):
    """The chat template in Jinja that a model's folder brings, or None. We render by `render_chat`,
    but an export hands it on."""
    if (path := folder / "chat_template.jinja").exists():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    return template if isinstance(template, str) else None  # a few models have a list of them


def hub_tokenizer(folder):
    """The spec, of kind hf, of the tokenizer in a Hugging Face model's folder.

    Reads tokenizer.json and, for the end-of-text token, generation_config.json, config.json and
    tokenizer_config.json where they exist. The spec holds "pattern", "nfc", "tokens" (base64, a
    token's place is its id), "added" (name -> id), "end" and "begin" (ids, begin may be None), and
    for whoever exports it again "name" and "chat_template".
    Added tokens are special tokens here, so text never spells one. DataError if a file is missing
    or damaged, or if the tokenizer is no byte-level BPE that tiktoken encodes alike.
    """
    path = Path(folder) / "tokenizer.json"
    data = read_json(path)
    try:
        added = {t["content"]: t["id"] for t in data.get("added_tokens") or []}
        for name in added:
            if not name.strip():
                raise ValueError(f"added_tokens: {name!r} is text like any other, not a mark in it")
        ranks = hub_tokens(data["model"], added)
        if (normalizer := data.get("normalizer") or {"type": None})["type"] not in (None, "NFC"):
            raise ValueError(f"normalizer {normalizer['type']} can't be read, only NFC")
        pattern = hub_pattern(data.get("pre_tokenizer") or {"type": "none"})
        begin = hub_begin(data.get("post_processor"), added)
        end = hub_end(path.parent, added)
        if end is None:
            end = added[END] = max(*ranks.values(), *added.values()) + 1
        tokens = [None] * (max(ranks.values()) + 1)
        for token, i in ranks.items():
            tokens[i] = base64.b64encode(token).decode()
        spec = {"kind": "hf", "pattern": pattern, "nfc": normalizer["type"] == "NFC"}
        spec |= {"tokens": tokens, "added": added, "end": end, "begin": begin}
        spec |= {"name": hub_name(path.parent), "chat_template": hub_template(path.parent)}
        Tokenizer(spec)  # tiktoken has not seen the pattern yet
    except DataError:
        raise
    except KeyError as e:
        raise DataError(f"{path}: {e} is missing") from e
    except (ValueError, regex.error) as e:
        raise DataError(f"{path}: {' '.join(str(e).splitlines())}") from e
    except (TypeError, AttributeError, IndexError) as e:
        raise DataError(f"{path} is damaged ({e})") from e
    return spec


def ruby_pattern(pattern):
    """A split pattern of tiktoken's for Ruby's regular expressions, which Hugging Face uses: there
    $ ends a line, {1,3}+ repeats, and s is no flag."""
    pattern = pattern.replace(ANY_CHARACTER, r"[\s\S]").replace("$", r"(?![\s\S])")
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)


def tokenizer_json(tokenizer):
    """The content of tokenizer.json for a Tokenizer: transformers reads the same ids out of it.

    Merges are found again from the ids (a second or two for 100,000 tokens). One thing differs
    there: text that spells a special token becomes it. DataError if an ordinary token is spelled
    like a special one: tokenizer.json could not tell them apart.
    """
    ranks = dict(sorted(tokenizer.encoding._mergeable_ranks.items(), key=lambda item: item[1]))
    kind, special = tokenizer.spec["kind"], sorted(tokenizer.special.items(), key=lambda s: s[1])
    own = kind == "hf"  # its pattern came from there
    pattern = tokenizer.spec["pattern"] if own else ruby_pattern(tokenizer.encoding._pat_str)
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    split |= {"behavior": "Isolated", "invert": False}
    if kind == "char":
        vocab = {token.decode(): i for token, i in ranks.items()}
        model = {"type": "WordLevel", "unk_token": UNKNOWN}
        pre, decoder = split, {"type": "Fuse"}
    else:
        vocab = {spell(token): i for token, i in ranks.items()}
        halves = (bpe_parts(token, ranks) for token in ranks)
        merges = [[spell(pair[0]), spell(pair[1])] for pair in halves if len(pair) == 2]
        # tiktoken, too, takes a piece that is a token as it is, before any merge
        model = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": True}
        model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
        model |= {"fuse_unk": False, "byte_fallback": False, "merges": merges}
        bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        bytes_ |= {"use_regex": False}
        pre, decoder = {"type": "Sequence", "pretokenizers": [split, bytes_]}, bytes_
    if clash := vocab.keys() & dict(special).keys():
        raise DataError(f"special token {min(clash)!r} is spelled like an ordinary one")
    model["vocab"] = vocab | dict(special)  # there they keep their ids, whatever gaps lie between
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": n, **flags, "special": True} for n, i in special],
        "normalizer": {"type": "NFC"} if tokenizer.spec.get("nfc") else None,
        "pre_tokenizer": pre,
        "post_processor": begin_template(tokenizer),
        "decoder": decoder,
        "model": model,
    }


def begin_template(tokenizer):
    """The post_processor that puts `tokenizer.begin` in front of a text; None without one."""
    names = {i: name for name, i in tokenizer.special.items()}
    if (name := names.get(tokenizer.begin)) is None:
        return None
    front = {"SpecialToken": {"id": name, "type_id": 0}}
    text, other = ({"Sequence": {"id": n, "type_id": t}} for n, t in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [front, text],
        "pair": [front, text, other],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.begin], "tokens": [name]}},
    }


def jinja(*lines):
    """A template of lines, none of whose ends or indentations are part of it."""
    return "".join(line.strip() for line in lines)


_OPENINGS = json.dumps({role: "".join(names) for role, names in ROLES.items()})
CHAT_TEMPLATES = {  # render_chat in Jinja, by the kind of a Template; calls as OpenAI has them
    "ours": jinja(
        "{% set openings = " + _OPENINGS + " %}",
        "{% if tools and messages[0].role != 'system' %}",
        "  {{ openings.system + tools | tojson + '<|end|>' }}",
        "{% endif %}",
        "{% for m in messages %}",
        "  {% for c in m.tool_calls or [] %}",
        "    {{ openings.call + c.function.name + ' ' }}",
        "    {{ c.function.arguments | tojson + '<|end|>' }}",
        "  {% else %}",
        "    {{ openings[m.role] + m.content }}",
        "    {% if tools and loop.first and m.role == 'system' %}",
        "      {{ ('\\n' if m.content else '') + tools | tojson }}",
        "    {% endif %}",
        "    {{ '<|end|>' }}",
        "  {% endfor %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}{{ openings.assistant }}{% endif %}",
    ),
    "chatml": jinja(
        "{% set has_system = messages[0].role == 'system' %}",
        "{% if tools %}",
        "  {{ '<|im_start|>system\\n' }}",
        "  {% if has_system and messages[0].content %}",
        "    {{ messages[0].content + '\\n\\n' }}",
        "  {% endif %}",
        "  {{ " + json.dumps(CHATML_TOOLS[0]) + " }}",
        "  {% for t in tools %}{{ '\\n' + t | tojson }}{% endfor %}",
        "  {{ " + json.dumps(CHATML_TOOLS[1]) + " + '<|im_end|>\\n' }}",
        "{% endif %}",
        "{% for m in messages %}",
        "  {% if m.role == 'tool' %}",
        "    {{ '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}",
        "    {{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}",
        "    {{ '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' }}",
        "  {% elif m.tool_calls %}",
        "    {{ '<|im_start|>assistant' }}",
        "    {% for c in m.tool_calls %}",
        "      {{ '\\n<tool_call>\\n{\"name\": ' + c.function.name | tojson }}",
        "      {{ ', \"arguments\": ' + c.function.arguments | tojson + '}\\n</tool_call>' }}",
        "    {% endfor %}",
        "    {{ '<|im_end|>\\n' }}",
        "  {% elif not (tools and loop.first and has_system) %}",
        "    {% set said = m.content %}",
        "    {% if m.role == 'assistant' %}",
        "      {% set said = said.split('</think>')[-1].lstrip('\\n') %}",
        "    {% endif %}",
        "    {{ '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}",
        "  {% endif %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "llama3": jinja(
        "{{ bos_token }}",
        "{% set end, ns = '<|end_header_id|>\\n\\n', namespace(given=not tools) %}",
        "{% if tools %}",
        "  {{ '<|start_header_id|>system' + end + " + json.dumps(LLAMA3_TOOLS[0]) + " }}",
        "  {% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}",
        "  {{ '<|eot_id|>' }}",
        "{% endif %}",
        "{% for m in messages %}",
        "  {% set role = 'ipython' if m.role == 'tool' else m.role %}",
        "  {% for c in m.tool_calls or [] %}",
        "    {{ '<|start_header_id|>assistant' + end + '{\"name\": ' + c.function.name | tojson }}",
        "    {{ ', \"parameters\": ' + c.function.arguments | tojson + '}<|eot_id|>' }}",
        "  {% else %}",
        "    {% if not (tools and loop.first and m.role == 'system') %}",
        "      {{ '<|start_header_id|>' + role + end }}",
        "      {% if m.role == 'user' and not ns.given %}",
        "        {{ " + json.dumps(LLAMA3_TOOLS[1]) + " }}",
        "        {% for t in tools %}{{ t | tojson(indent=4) + '\\n\\n' }}{% endfor %}",
        "        {% set ns.given = true %}",
        "      {% endif %}",
        "      {{ m.content | trim + '<|eot_id|>' }}",
        "    {% endif %}",
        "  {% endfor %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant' + end }}{% endif %}",
    ),
}


def tokenizer_config(tokenizer):
    """The content of tokenizer_config.json beside tokenizer_json's: the class for transformers, the
    end-of-text token and, if the tokenizer can chat, the template that it came with, or else
    render_chat as one."""
    names = {i: name for name, i in tokenizer.special.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[tokenizer.eot],
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.begin is not None:
        config["bos_token"] = names[tokenizer.begin]
    with contextlib.suppress(DataError):
        kind = Template(tokenizer).kind
        config["chat_template"] = tokenizer.spec.get("chat_template") or CHAT_TEMPLATES[kind]
    return config


def generation_config(tokenizer):
    """The content of generation_config.json: all ids that end what a model says."""
    ends = {tokenizer.eot, tokenizer.special.get(END, tokenizer.eot)}
    with contextlib.suppress(DataError):
        ends.add(Template(tokenizer).end)
    return {"eos_token_id": sorted(ends) if len(ends) > 1 else tokenizer.eot}


# --------------------------------------------------------------------------------------------
# Sets to fine-tune on, and the hotels that some of them talk about
# --------------------------------------------------------------------------------------------

_LAB = "https://raw.githubusercontent.com/agiclass/fine-tuning-lab/main/data"
_CROSSWOZ = "https://raw.githubusercontent.com/thu-coai/CrossWOZ/master/data/crosswoz/database"
_REVIEWS = "https://www.cs.cornell.edu/people/pabo/movie-review-data/rt-polaritydata.tar.gz"
# To add a set: {split: address}, or a function in fetch_set that writes its files.
SETS = {
    "sentiment": {s: _REVIEWS for s in ("train", "val", "test")},
    "hotel": {s: f"{_LAB}/{s}.full.jsonl" for s in ("train", "dev", "test")},
    "hotel-synthetic": {s: "" for s in ("train", "dev", "test")},
    "alpaca-zh": {"train": f"{HUB}/shibing624/alpaca-zh/resolve/main/alpaca_gpt4_data_zh.json"},
    "sharegpt": {
        "train": f"{HUB}/openchat/openchat_sharegpt4_dataset/resolve/main/sharegpt_gpt4.json"
    },
}
HOTEL_DB = DATA / "hotel" / "hotel_db.json"  # the public one, once fetched
OWN_HOTELS = Path(__file__).parent / "data" / "hotels.json"  # a small one of our own invention


def fetch_set(name):
    """{split: path} of a named set, fetched or generated if it is not there yet."""
    if name == "hotel":
        fetch(f"{_CROSSWOZ}/hotel_db.json", HOTEL_DB)
    folder = DATA / name
    paths = {split: folder / f"{split}.jsonl" for split in SETS[name]}
    if all(p.exists() for p in paths.values()):
        return paths
    if name == "sentiment":
        rows = split_reviews(fetch(_REVIEWS))
    elif name == "hotel":
        rows = {split: join_dialogues(fetch(url)) for split, url in SETS[name].items()}
    elif name == "hotel-synthetic":
        rows = {"train": 3000, "dev": 300, "test": 300}
        rows = {s: synthetic_dialogues(n, s) for s, n in rows.items()}
    else:
        return {split: fetch(url) for split, url in SETS[name].items()}
    folder.mkdir(parents=True, exist_ok=True)
    for split, path in paths.items():
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows[split])
        path.with_suffix(".tmp").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)
    return paths


def split_reviews(archive):
    """{split: [{"text", "label"}]} of Pang and Lee's film review sentences (2005): the first 80 %
    of each class, the next 10 and the last 10, as the Hugging Face set cuts them."""
    rows = {"train": [], "val": [], "test": []}
    try:
        with tarfile.open(archive) as tar:
            for label in ("pos", "neg"):
                text = tar.extractfile(f"rt-polaritydata/rt-polarity.{label}").read()
                lines = text.decode("latin-1").strip("\n").split("\n")
                ends = round(0.8 * len(lines)), round(0.9 * len(lines))
                for i, line in enumerate(lines):
                    split = "train" if i < ends[0] else "val" if i < ends[1] else "test"
                    rows[split].append({"text": line.strip(), "label": label})
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as e:
        raise DataError(f"{archive}: damaged, or not the archive of reviews ({e})") from e
    return rows


def drop_continued(rows, key=lambda turns: turns):
    """The rows without those that the next one only continues: their turns, key(row), begin its."""
    following = [key(row) for row in rows[1:]] + [[]]

    def continued(turns, longer):
        return len(longer) > len(turns) and longer[: len(turns)] == turns

    return [row for row, longer in zip(rows, following) if not continued(key(row), longer)]


def join_dialogues(path):
    """The dialogues, as lists of turns, of a file whose rows are {"context": the turns so far,
    "response": the next one}, both JSON in strings."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        turns = [[*json.loads(r["context"]), json.loads(r["response"])] for r in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} holds no rows of context and response ({e!r})") from e
    return drop_continued(turns)


HOTEL_KEYS = {  # CrossWOZ's fields and what the dialogues call them
    "名称": "name",
    "酒店类型": "type",
    "地址": "address",
    "地铁": "subway",
    "电话": "phone",
    "酒店设施": "facilities",
    "价格": "price",
    "评分": "rating",
}


def read_hotels(path=None):
    """A hotel database as a list of records: CrossWOZ's [[name, {...}], ...] or one of records as
    they are. Default: the public one if it has been fetched, else our own small one."""
    path = Path(path or (HOTEL_DB if HOTEL_DB.exists() else OWN_HOTELS))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if rows and isinstance(rows[0], list):
            rows = [{new: row[old] for old, new in HOTEL_KEYS.items()} for _, row in rows]
        return [r | {"facilities": [f.strip() for f in r["facilities"] if f.strip()]} for r in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is no hotel database ({e!r})") from e


def search_hotels(
    hotels,
    name: str | None = None,
    type: str | None = None,
    facilities: list | None = None,
    price_range_lower: float | None = None,
    price_range_upper: float | None = None,
    rating_range_lower: float | None = None,
    rating_range_upper: float | None = None,
):
    """The hotels (records of `read_hotels`) that fit all that is given, the best rated first, two
    at most: a record takes 150 tokens, and a small model's context is short. Guests name facilities
    in their own words, so these are compared by their characters.
    """

    def within(value, low, high):
        if low is None and high is None:
            return True
        return value is not None and (low or 0) <= value <= (math.inf if high is None else high)

    def offers(hotel, wanted):
        return any(
            wanted in has or has in wanted or len(set(wanted) & set(has)) >= 0.7 * len(set(wanted))
            for has in hotel["facilities"]
        )

    found = [
        h
        for h in hotels
        if (not name or name in h["name"] or h["name"] in name)
        and (not type or h["type"] == type)
        and within(h["price"], price_range_lower, price_range_upper)
        and within(h["rating"], rating_range_lower, rating_range_upper)
        and all(offers(h, f) for f in facilities or [])
    ]
    return sorted(found, key=lambda h: -(h["rating"] or 0))[:2]


_WAYS = {  # how a guest may ask for each argument
    "type": ("{}的酒店", "{}酒店", "一家{}的"),
    "facilities": ("能提供{}", "有{}", "带{}的", "提供{}服务"),
    "price": ("价格在{0}-{1}元", "{0}到{1}元之间", "预算{0}-{1}元"),
    "rating": ("评分{}分以上", "评分在{}分以上的", "评分不低于{}分"),
}
_OPENINGS = ("你好，帮我找个酒店，", "我想订酒店，", "请推荐一家酒店，", "您好，我要住酒店，")
_QUESTIONS = (
    ("phone", ("这家酒店的电话是多少？", "电话号码给我一下。"), "{name}的电话是{phone}。"),
    ("address", ("这家酒店在哪里？", "地址是什么？"), "{name}的地址是{address}。"),
    ("price", ("一晚多少钱？", "价格是多少？"), "{name}的价格是{price}元。"),
    ("rating", ("评分怎么样？", "这家的评分是多少？"), "{name}的评分是{rating}分。"),
)


def synthetic_dialogues(count, seed):
    """`count` invented hotel dialogues, each a list of turns with the public set's schema and exact
    arguments: the same ones for the same seed, on any machine."""
    hotels, rng = read_hotels(OWN_HOTELS), random.Random(f"hotel-synthetic {seed}")
    rows = []
    while len(rows) < count:
        wish = rng.choice(hotels)  # so that something is found
        arguments, words = {}, []
        for key in rng.sample(sorted(_WAYS), rng.randint(1, 3)):
            way = rng.choice(_WAYS[key])
            if key == "price":
                low = int(wish["price"] // 100 * 100)
                arguments |= {"price_range_lower": low, "price_range_upper": low + 100}
                words.append(way.format(low, low + 100))
            elif key == "rating":
                low = rng.choice((4, 4.5)) if wish["rating"] >= 4.5 else 4
                arguments["rating_range_lower"] = low
                words.append(way.format(low))
            elif key == "facilities":
                chosen = rng.sample(wish["facilities"], rng.randint(1, 2))
                arguments[key] = chosen
                words.append(way.format("和".join(chosen)))
            else:
                arguments[key] = wish[key]
                words.append(way.format(wish[key]))
        records = search_hotels(hotels, **arguments)
        names = "、".join(r["name"] for r in records) or "没有找到"
        reply = f"为您推荐{names}。" if records else "抱歉，没有符合要求的酒店。"
        turns = [
            {"role": "user", "content": rng.choice(_OPENINGS) + "，".join(words) + "。"},
            {"role": "search", "arguments": arguments},
            {"role": "return", "records": records},
            {"role": "assistant", "content": reply},
        ]
        if len(records) == 1 and rng.random() < 0.7:
            _, asks, answer = rng.choice(_QUESTIONS)
            turns.append({"role": "user", "content": rng.choice(asks)})
            turns.append({"role": "assistant", "content": answer.format(**records[0])})
        rows.append(turns)
    return rows


# --------------------------------------------------------------------------------------------
# Writing: encode on all cores, append, split, describe
# --------------------------------------------------------------------------------------------

FORMAT = 1
MANY = 10  # documents from which on whole documents are held out
XZ_LIMIT = 4 * MB  # bytes of validation text up to which xz is asked, too (a few seconds)


def token_dtype(n_vocab):
    """Two bytes a token where every id fits them; 100k vocabularies need four."""
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def watched(items, what):
    """Pass items through, with their number on a line of the terminal."""
    progress = Progress()
    for number, item in enumerate(items, start=1):
        progress(f"{what} {number:,}")
        yield item
    progress.clear()


def labelled_pieces(documents, hold_out, progress):
    """(split, first piece of its document?, text); every `hold_out`-th document goes to val."""
    for number, (_, pieces) in enumerate(documents, start=1):
        split = "val" if hold_out and number % hold_out == 0 else "train"
        first = True
        for piece in pieces:
            if piece:
                yield split, first, piece
                first = False
        if not first:
            progress["documents"] += 1


def batched(pieces):
    """Lists of labelled pieces of about a block each: small documents share one job."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[2])
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def parallel_map(work, jobs, workers):
    """work(job) for each job, in order, on threads, a few ahead and no more (bounded memory)."""
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        for job in jobs:
            ahead.append(pool.submit(work, job))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def write_tokens(documents, tokenizer, folder, hold_out, workers):
    """Append the documents' tokens to folder/{train,val}.tmp, end-of-text between them.

    Returns ({split: tokens}, stats); stats counts documents, characters and fallback tokens.
    """
    stats, size = Counter(), Counter()
    dtype = token_dtype(tokenizer.n_vocab)
    end = np.array([tokenizer.eot], dtype=dtype)

    own = threading.local()

    def encode(batch):
        if not hasattr(own, "tokenizer"):
            own.tokenizer = tokenizer.for_one_thread()
        ids = [own.tokenizer.encode_array(text) for _, _, text in batch]
        return [(split, first, len(text), i) for (split, first, text), i in zip(batch, ids)]

    with open(folder / "train.tmp", "wb") as train, open(folder / "val.tmp", "wb") as val:
        out, start, progress = {"train": train, "val": val}, time.monotonic(), Progress()
        jobs = batched(labelled_pieces(documents, hold_out, stats))
        for done in parallel_map(encode, jobs, workers):
            for split, first, characters, ids in done:
                if first and size[split]:
                    out[split].write(end)
                    size[split] += 1
                out[split].write(ids.astype(dtype))
                size[split] += len(ids)
                stats["characters"] += characters
                stats["fallback"] += int(tokenizer.fallback[ids].sum())
            rate = stats["characters"] / MB / max(time.monotonic() - start, 1e-3)
            read = f"{stats['documents']:,} documents, {stats['characters'] / MB:.0f} M characters"
            progress(f"encoding: {read}, {rate:.1f} M/s")
    progress.clear()
    return size, stats


def split_tail(folder, size, dtype, fraction):
    """Move the last `fraction` of train.tmp's tokens to val.tmp (few documents: no whole ones)."""
    keep = int(size["train"] * (1 - fraction))
    with open(folder / "train.tmp", "r+b") as train, open(folder / "val.tmp", "wb") as val:
        train.seek(keep * dtype.itemsize)
        while block := train.read(BLOCK):
            val.write(block)
        train.truncate(keep * dtype.itemsize)
    size["val"], size["train"] = size["train"] - keep, keep


def text_bytes(path, tokenizer):
    """Bytes of text that the tokens of a .bin stand for, and the largest id in it."""
    total = largest = 0
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            ids = np.frombuffer(block, dtype=token_dtype(tokenizer.n_vocab))
            total += int(tokenizer.byte_lengths[ids].sum())
            largest = max(largest, int(ids.max()))
    return total, largest


def xz_bits_per_byte(path, tokenizer):
    """Bits per byte that `xz -9e` needs for the text of a .bin: what a model should beat."""
    ids = np.fromfile(path, dtype=token_dtype(tokenizer.n_vocab))
    text = tokenizer.encoding.decode_bytes(ids[tokenizer.byte_lengths[ids] > 0].tolist())
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def default_workers():
    """A thread a core; more than eight would only hold more text in memory."""
    return min(8, os.cpu_count() or 1)


def default_tokenizer(source):
    """stdlib and your own text train a BPE; the course's sources use the course's tokenizers."""
    if source in REMOTE:
        return REMOTE[source][2]
    return "bpe:2048" if source == "stdlib" else "bpe:4096"


def default_name(source):
    """data/NAME for a source: its own name without folders and suffixes."""
    path = Path(urlsplit(source).path if "://" in source else source)
    stem = re.sub(r"[*?\[\]]+", "", Path(path.name.removesuffix(".gz")).stem)
    return stem.strip(".") or path.parent.name or "text"


def check_settings(name, val_fraction, encoding, workers):
    """DataError for a setting of `prepare` that makes no sense."""
    if not 0 < val_fraction <= 0.5:
        raise DataError(f"--val_fraction {val_fraction} must be above 0 and at most 0.5")
    if workers is not None and workers < 1:
        raise DataError(f"--workers {workers} must be at least 1")
    try:
        "".encode(encoding or "utf-8")
    except LookupError as e:
        raise DataError(f"--encoding {encoding}: {e}") from e
    if name and (Path(name).name != name or name in (".", "..")):
        raise DataError(f"--name {name!r} must be one plain name: it becomes {DATA}/NAME")


def prepare(
    source=("stdlib",),
    tokenizer=None,
    name=None,
    val_fraction=0.1,
    encoding=None,
    field=None,
    workers=None,
):
    """SOURCE, or several of them -> data/NAME/{train.bin, val.bin, meta.json}; returns the folder.

    With ten documents or more every tenth (1 / val_fraction) is held out whole; else the last
    val_fraction of the tokens. Files appear under their names only when all is done.
    """
    check_settings(name, val_fraction, encoding, workers)
    start = time.monotonic()
    sources = [source] if isinstance(source, str) else source
    paths = [path for s in sources for path in find_files(s)]
    source, first = " ".join(sources), sources[0]
    total_bytes = sum(p.stat().st_size for p in paths)
    documents = Documents([f for p in paths for f in file_streams(p)], encoding, field)
    many = len(list(itertools.islice(documents, MANY))) == MANY
    hold_out = round(1 / val_fraction) if many else None
    # a char vocabulary needs every character; merges need no held-out text
    learn_from = watched(documents, "reading document")
    if hold_out and (tokenizer or "bpe").startswith("bpe"):
        learn_from = (d for n, d in enumerate(learn_from, start=1) if n % hold_out)
    tok = make_tokenizer(tokenizer or default_tokenizer(first), learn_from, total_bytes)
    folder = DATA / (name or default_name(first))
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(tok.n_vocab)
    try:
        size, stats = write_tokens(documents, tok, folder, hold_out, workers or default_workers())
        if not size["val"]:
            split_tail(folder, size, dtype, val_fraction)
        if not (size["train"] and size["val"]):
            found = size["train"] + size["val"]
            raise DataError(f"{source}: {found} tokens of text are too few to split")
        meta = describe(folder, source, tok, size, stats, documents)
        with contextlib.suppress(DataError):  # there may be none, or a damaged one
            if (old := read_meta(folder)["source"]) != source:
                print(f"{folder} held {old!r} before; it is replaced")
        (folder / "meta.json").unlink(missing_ok=True)  # no moment with a meta of other files
        for split in ("train", "val"):
            os.replace(folder / f"{split}.tmp", folder / f"{split}.bin")
        (folder / "meta.tmp").write_text(json.dumps(meta), encoding="utf-8")
        os.replace(folder / "meta.tmp", folder / "meta.json")
    except OSError as e:  # a full disk's does not say where
        raise OSError(e.errno, e.strerror, e.filename or str(folder)) from e
    finally:
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    print(summary(folder, meta, tok, time.monotonic() - start))
    return folder


def describe(folder, source, tokenizer, size, stats, documents):
    """The content of meta.json; the .tmp files are complete."""
    splits, largest = {}, 0
    for split in ("train", "val"):
        path = folder / f"{split}.tmp"
        n_bytes, top = text_bytes(path, tokenizer)
        largest = max(largest, top)
        splits[split] = {"tokens": size[split], "bytes": n_bytes, "sha256": file_sha256(path)}
    xz = None
    if 1000 <= splits["val"]["bytes"] <= XZ_LIMIT:  # of less text xz's header is a good part
        xz = xz_bits_per_byte(folder / "val.tmp", tokenizer)
    return {
        "format": FORMAT,
        "source": source,
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.n_vocab,
        "dtype": token_dtype(tokenizer.n_vocab).str,
        "largest_id": largest,
        "splits": splits,
        "documents": stats["documents"],
        "characters": stats["characters"],
        "fallback_tokens": stats["fallback"],
        "encodings": dict(Counter(documents.known.values())),
        "xz_bits_per_byte": xz,
    }


def summary(folder, meta, tokenizer, seconds):
    """What the user sees when a corpus is ready."""
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    tokens, n_bytes = train["tokens"] + val["tokens"], train["bytes"] + val["bytes"]
    encodings = ", ".join(f"{n} {name}" for name, n in meta["encodings"].items())
    excerpt = tokenizer.decode(read_tokens(folder, "val")[:60])
    lines = [
        f"{folder}: {meta['documents']:,} documents ({encodings}), {meta['characters']:,} "
        f"characters, {n_bytes:,} bytes",
        f"  {tokens:,} tokens of {tokenizer.name} ({train['tokens']:,} train, {val['tokens']:,} "
        f"val), {n_bytes / tokens:.2f} bytes per token",
        f"  {meta['fallback_tokens'] / tokens:.2%} unknown or byte-fallback tokens",
    ]
    if meta["xz_bits_per_byte"]:
        lines.append(f"  xz -9e takes {meta['xz_bits_per_byte']:.3f} bits per byte of val")
    return "\n".join([*lines, f"  val begins: {excerpt!r}", f"  ready in {seconds:.1f} s"])


# --------------------------------------------------------------------------------------------
# Reading back: nothing of meta.json is taken on trust
# --------------------------------------------------------------------------------------------

HASH_LIMIT = 1000 * MB  # larger files are checked by size alone: hashing them takes a minute


def read_meta(folder):
    """meta.json of a prepared folder; DataError if it is missing, damaged or of another format."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: prepare the text first (python prepare_data.py)")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, dtype = meta["format"], token_dtype(meta["vocab_size"]).str
        same = meta["dtype"] == dtype and meta["largest_id"] < meta["vocab_size"]
        complete = all(
            {"tokens", "bytes", "sha256"} <= set(meta["splits"][s]) for s in ("train", "val")
        )
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged ({e}); prepare the text again") from e
    if version != FORMAT:
        raise DataError(f"{path} has format {version}, this version reads {FORMAT}: prepare again")
    if not (same and complete):
        raise DataError(f"{path} contradicts itself; prepare the text again")
    return meta


def read_tokens(folder, split):
    """The ids of one split, mapped from disk; DataError if they are not what meta.json says."""
    meta, path = read_meta(folder), Path(folder) / f"{split}.bin"
    dtype, wanted = np.dtype(meta["dtype"]), meta["splits"][split]
    if not path.exists():
        raise DataError(f"{path} does not exist; prepare the text again")
    size = path.stat().st_size
    if size != wanted["tokens"] * dtype.itemsize:
        raise DataError(
            f"{path} has {size:,} bytes, meta.json says {wanted['tokens']:,} tokens of "
            f"{dtype.itemsize}; prepare the text again"
        )
    if size <= HASH_LIMIT and file_sha256(path) != wanted["sha256"]:
        raise DataError(f"{path} is damaged (its sha256 is another); prepare the text again")
    return np.memmap(path, dtype=dtype, mode="r")


# fmt: off (one line a flag)
def build_parser():
    p = Parser(
        description="Turn text into token files: data/NAME/{train.bin, val.bin, meta.json}.")
    add = p.add_argument
    add("source", nargs="*", default=("stdlib",),
        help="stdlib (default), sales, shakespeare, or files, folders, globs, http(s) URLs")
    add("--tokenizer",
        help="byte, char, bpe:N, gpt2, cl100k_base, o200k_base, a prepared folder, or a model's "
        "folder or name on the Hub (default: bpe:2048 for stdlib, cl100k_base for sales, char for "
        "shakespeare, else bpe:4096)")
    add("--name", help="write to data/NAME (default: the first source's own name)")
    add("--val_fraction", type=float, default=0.1, help="share held out, about (default 0.1)")
    add("--encoding", help="of the files (default: UTF-8, UTF-16 or GB18030 recognised)")
    add("--field", help="of .jsonl objects that holds the text (default: text, else content)")
    add("--workers", type=int, help="encoding threads (default: one a core, at most 8)")
    return p
# fmt: on


def main(argv=None):
    prepare(**vars(build_parser().parse_args(argv)))


if __name__ == "__main__":
    console(main)
