"""Text in, token files out: download, decode, tokenize, split.

    python prepare_data.py                                  Python's own standard library
    python prepare_data.py sales --tokenizer cl100k_base    the course's sales textbook
    python prepare_data.py shakespeare                      tiny Shakespeare, by characters
    python prepare_data.py novels/ --tokenizer bpe:4096     a folder, file, glob, archive or URL

writes data/NAME/{train.bin, val.bin, meta.json}. A .bin is nothing but token ids, little-endian
uint16 or uint32; meta.json says how to read them and carries the tokenizer.

The chapters: sources, writing, reading back, the command line. Downloads, encodings and tokenizers
are modules in data/. It does not need torch.
"""

import contextlib
import glob
import itertools
import lzma
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import tiktoken

from data.cli import Parser, UserError, at_least, number, quoted, run_cli
from data.download import DATA, EXTRAS, MB, fetch, is_hub_name, snapshot_download
from data.files import file_sha256, locked, read_json, write_json
from data.hf_tokenizer import find_tokenizer, hub_tokenizer
from data.progress import waiting, watched
from data.sources import SOURCES, Source
from data.text import ARCHIVES, BLOCK, TEXT_SUFFIXES, Documents, choose_texts, file_streams
from data.tokenizer import PATTERNS, UNKNOWN, Tokenizer, learn_bpe

# --------------------------------------------------------------------------------------------
# Sources: text to pretrain on, and sets of rows to fine-tune on
# --------------------------------------------------------------------------------------------


def find_files(source):
    """The files of a SOURCE, downloaded if need be: paths, or (name, open) pairs of data.sources'
    `shards`. UserError if there are none."""
    if source in SOURCES:
        files = SOURCES[source].fetch()["train"]
        return files if isinstance(files, list) else [files]
    if source.startswith(("http://", "https://")):
        return [fetch(source)]
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        paths = [p for p in watched(path.rglob("*"), "listing file") if p.is_file()]
        names = (p.relative_to(path).as_posix() for p in sorted(paths))
        suffixes = tuple(s + z for s in TEXT_SUFFIXES for z in ("", ".gz")) + ARCHIVES
        return [path / name for name in choose_texts(f"folder {source}", names, suffixes)]
    paths = [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).is_file()]
    if not paths:
        what = f"not a file, folder, glob or URL, and not one of {', '.join(SOURCES)}"
        raise UserError(f"source {source!r} is {what}")
    return paths


def default_name(source):
    """data/NAME for a source: its own name without folders and suffixes."""
    path = Path(urlsplit(source).path if "://" in source else source)
    name = re.sub(r"(?i)\.[gx]z$", "", path.name.replace(":", "-"))
    names = (re.sub(r"[*?:/\\\[\]]+", "", n) for n in (Path(name).stem, *path.parts[-2::-1]))
    return next(filter(None, (name.strip(".") for name in names)), "text")


def make_tokenizer(name, documents, total_bytes):
    """The Tokenizer of this name, trained on the documents if its kind is char or bpe. The name is
    one of those that build_parser lists, any other of tiktoken's, or a folder with a meta.json or
    a tokenizer.json or tokenizer.model."""
    if name == "byte":
        return Tokenizer({"kind": "byte"})
    if name == "char":
        chars = set()
        for piece in (piece for _, pieces in documents for piece in pieces):
            chars.update(piece)
        return Tokenizer({"kind": "char", "chars": "".join(sorted(chars - {UNKNOWN}))})
    kind, colon, size = name.partition(":")
    if kind in PATTERNS and colon:
        if not size.isdecimal() or not 257 <= int(size) <= 1_000_000:
            raise UserError(f"tokenizer {name!r}: N must be a size from 257 to 1,000,000")
        tok = Tokenizer(learn_bpe(int(size), documents, total_bytes, PATTERNS[kind]))
        if tok.n_vocab < int(size):
            print(f"{name}: the text has pairs to merge for {tok.n_vocab} tokens only")
        return tok
    if name in tiktoken.list_encoding_names():
        return Tokenizer({"kind": "tiktoken", "name": name})
    if (Path(name) / "meta.json").exists():
        return Tokenizer(read_meta(name)["tokenizer"])
    if find_tokenizer(name):
        return Tokenizer(hub_tokenizer(name))
    if is_hub_name(name):
        folder = snapshot_download(name, files=("config.json", *EXTRAS))
        return Tokenizer(hub_tokenizer(folder))
    names = "byte, char, bpe:N (e.g. bpe:4096), bpe-han:N, gpt2, cl100k_base, o200k_base"
    names += ", a folder prepared before, or a model of the Hub (owner/name)"
    raise UserError(f"tokenizer {name!r} is unknown; choose {names}")


# --------------------------------------------------------------------------------------------
# Writing: encode, append, split, describe
# --------------------------------------------------------------------------------------------

FORMAT = 1
MANY = 10  # from this number of documents on, whole documents are held out
XZ_LIMIT = 16 * MB  # xz compresses texts of at most this many bytes, too (7 s on two cores)


def token_dtype(n_vocab):
    """Two bytes a token if every id fits, else four, as for a vocabulary of 100k."""
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def write_tokens(documents, held_out, tokenizer, paths, hold_out, max_tokens=None):
    """Write the documents' tokens to the two `paths`, those of train and val, end-of-text between
    them: every `hold_out`-th document to val, and the documents `held_out`; at most `max_tokens` to
    train if that is given. Returns how many documents and characters there are."""
    stats, size, dtype = Counter(), Counter(), token_dtype(tokenizer.n_vocab)
    limit = int(max_tokens or 2**62)
    with open(paths["train"], "wb") as train, open(paths["val"], "wb") as val:
        files = {"train": train, "val": val}
        for texts, every in (documents, hold_out), (held_out, 1):
            for n, (_, pieces) in enumerate(watched(texts, "encoding: document"), start=1):
                split, follows = "val" if every and n % every == 0 else "train", None
                for piece in filter(None, pieces):
                    ids = tokenizer.encode_array(piece, follows)
                    if not follows and size[split]:
                        ids = np.concatenate([[tokenizer.eos_id], ids])
                    if split == "train" and size["train"] + len(ids) > limit:
                        ids = ids[: limit - size["train"]]
                        piece = tokenizer.decode(ids[ids != tokenizer.eos_id])
                    files[split].write(ids.astype(dtype))
                    size[split] += len(ids)
                    stats["documents"] += not follows
                    stats["characters"] += len(piece)
                    follows = "text"
                    if split == "train" and size["train"] >= limit:
                        break
                if every != 1 and size["train"] >= limit:
                    break
    return stats


def split_tail(paths, dtype, fraction):
    """Move the last `fraction` of the tokens of train to val."""
    tokens = np.memmap(paths["train"], dtype)
    end = int(len(tokens) * (1 - fraction))
    tokens[end:].tofile(paths["val"])
    del tokens  # Windows cuts no file that is mapped
    os.truncate(paths["train"], end * dtype.itemsize)


def count_ids(path, tokenizer):
    """How often each id occurs in a file of tokens, (n_vocab,)."""
    counts = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            ids = np.frombuffer(block, token_dtype(tokenizer.n_vocab))
            counts += np.bincount(ids, minlength=tokenizer.n_vocab)
    return counts


def xz_bits_per_byte(paths, tokenizer):
    """Bits per byte that `xz -9e` with a dictionary of 64 MiB needs for the text of the second .bin
    given that of the first, the training text: the size of both minus the size of the first."""
    texts, dtype = [], token_dtype(tokenizer.n_vocab)
    for ids in (np.fromfile(path, dtype) for path in paths):
        texts.append(tokenizer.encoding.decode_bytes(ids[tokenizer.byte_lengths[ids] > 0].tolist()))
    options = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}
    with ThreadPoolExecutor() as pool, waiting("compressing the text with xz, to compare"):
        compress = partial(lzma.compress, filters=[options])
        first, both = map(len, pool.map(compress, (texts[0], b"".join(texts))))
    return 8 * (both - first) / len(texts[1])


def prepare(
    source=("stdlib",), tokenizer=None, name=None, val_fraction=0.1, encoding=None, field=None,
    max_tokens=None,
):  # fmt: skip
    """SOURCE, or several of them -> data/NAME/{train.bin, val.bin, meta.json}; returns the folder.

    A named source may have its own validation text. Otherwise every tenth document is held out (one
    in 1 / val_fraction), or, of fewer than ten documents, the last val_fraction of the tokens.
    Files appear under their names only when all is done.
    """
    if name and (Path(name).name != name or name in (".", "..")):
        raise UserError(f"--name {name!r} must be one plain name: it becomes {DATA}/NAME")
    start = time.monotonic()
    sources = [source] if isinstance(source, str) else source
    files = [file for s in sources for file in find_files(s)]
    first = SOURCES.get(sources[0], Source(None))
    settings = dict(tokenizer=tokenizer, encoding=encoding, field=field, max_tokens=max_tokens)
    settings |= {"val_fraction": val_fraction if val_fraction != 0.1 else None}
    tokenizer = tokenizer or first.tokenizer
    source = " ".join(sources)
    shards = any(isinstance(file, tuple) for file in files)
    if shards and max_tokens is None:
        command = f"prepare_data.py {' '.join(map(quoted, sources))} --max_tokens 1e8"
        raise UserError(f"{source} has no end: say how much of it by --max_tokens, as {command}")
    streams = [s for f in files for s in ([f] if isinstance(f, tuple) else file_streams(f))]
    fetched = [SOURCES[s].fetch() for s in sources if s in SOURCES and not SOURCES[s].rows]
    read = partial(Documents, encoding=encoding, field=field, separator=first.separator)
    documents = read(streams)
    held_out = read([stream for t in fetched if "val" in t for stream in file_streams(t["val"])])
    many = not held_out.files and len(list(itertools.islice(documents, MANY))) == MANY
    hold_out = round(1 / val_fraction) if many else None

    # A tokenizer learns from the first shard only. A char vocabulary needs the characters of the
    # held-out documents, too, but merges learned from them would flatter the model.
    learn_from = watched(read(streams[:1]) if shards else documents, "reading document")
    total_bytes = 0 if shards else sum(file.stat().st_size for file in files)
    if tokenizer == "char":
        learn_from = itertools.chain(learn_from, held_out)
    elif hold_out:
        learn_from = (d for n, d in enumerate(learn_from, start=1) if n % hold_out)
    tok = make_tokenizer(tokenizer, learn_from, total_bytes)
    folder = DATA / (name or default_name(sources[0]))
    paths = {split: folder / f"{split}.tmp" for split in ("train", "val")}
    with locked(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stats = write_tokens(documents, held_out, tok, paths, hold_out, max_tokens)
            if not os.path.getsize(paths["val"]) and os.path.getsize(paths["train"]):
                split_tail(paths, token_dtype(tok.n_vocab), val_fraction)
            meta = describe(paths, source, tok) | stats
            meta["encodings"] = dict(Counter(documents.encodings.values()))
            meta["settings"] = {k: v for k, v in settings.items() if v is not None}
            for path in paths.values():  # until all is written the hashes in meta.json differ
                os.replace(path, path.with_suffix(".bin"))
            write_json(folder / "meta.json", meta)
        finally:
            for path in paths.values():
                path.unlink(missing_ok=True)
        print(summary(folder, meta, tok, time.monotonic() - start))
    return folder


def describe(paths, source, tokenizer):
    """What meta.json says of the complete files of train and val. UserError if one is empty."""
    counts = {split: count_ids(path, tokenizer) for split, path in paths.items()}
    total = counts["train"] + counts["val"]
    if not all(map(np.any, counts.values())):
        raise UserError(f"{source}: {total.sum()} tokens of text are too few to split")
    sizes = {split: int(n @ tokenizer.byte_lengths) for split, n in counts.items()}
    enough = sizes["val"] >= 1000 and sum(sizes.values()) <= XZ_LIMIT
    splits = {
        split: {"tokens": int(n.sum()), "bytes": sizes[split], "sha256": file_sha256(paths[split])}
        for split, n in counts.items()
    }
    return {
        "format": FORMAT,
        "source": source,
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.n_vocab,
        "dtype": token_dtype(tokenizer.n_vocab).str,
        "largest_id": int(total.nonzero()[0][-1]),
        "splits": splits,
        "fallback_tokens": int(total @ tokenizer.fallback),
        "xz_after_training_text": xz_bits_per_byte(paths.values(), tokenizer) if enough else None,
    }


def summary(folder, meta, tokenizer, seconds):
    """The lines to print when a text is ready."""
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    tokens, n_bytes = train["tokens"] + val["tokens"], train["bytes"] + val["bytes"]
    encodings = ", ".join(f"{n} {name}" for name, n in meta["encodings"].items())
    lines = [
        f"{folder}: {meta['documents']:,} documents (files: {encodings}), {meta['characters']:,} "
        f"characters, {n_bytes:,} bytes",
        f"  {tokens:,} tokens of {tokenizer.name} ({train['tokens']:,} train, {val['tokens']:,} "
        f"val), {n_bytes / tokens:.2f} bytes per token",
        f"  {meta['fallback_tokens'] / tokens:.2%} unknown or byte-fallback tokens",
    ]
    if xz := meta["xz_after_training_text"]:
        lines.append(f"  xz -9e takes {xz:.3f} bits per byte of val after the text of train")
    excerpt = tokenizer.decode(read_tokens(folder, "val")[:60])
    return "\n".join([*lines, f"  val begins: {excerpt!r}", f"  ready in {seconds:.1f} s"])


# --------------------------------------------------------------------------------------------
# Reading back: meta.json is checked against the files
# --------------------------------------------------------------------------------------------

HASH_LIMIT = 1000 * MB  # larger files are checked by size alone: hashing them takes a minute


def read_meta(folder):
    """meta.json of a prepared folder; UserError if it is missing or of another format."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: prepare the text first (python prepare_data.py)")
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} is of another version: prepare the text again")
    return meta


def read_tokens(folder, split):
    """The ids of one split, mapped from disk; UserError if they are not what meta.json says."""
    meta, path = read_meta(folder), Path(folder) / f"{split}.bin"
    dtype, expected = np.dtype(meta["dtype"]), meta["splits"][split]
    size = path.stat().st_size if path.exists() else 0
    intact = size == expected["tokens"] * dtype.itemsize
    if not intact or (size <= HASH_LIMIT and file_sha256(path) != expected["sha256"]):
        raise UserError(f"{path} is damaged or missing: prepare the text again")
    return np.memmap(path, dtype=dtype, mode="r")


def find_data(source, resuming=False):
    """The prepared folder that --data means. The text is prepared first if it has not been, or if
    the file has changed since, but never for a run that is resumed."""
    file, named, settings = Path(source), (Path(source), DATA / source), {}
    for folder in (*named, DATA / default_name(source)):
        meta = folder / "meta.json"
        if not meta.exists() or (folder not in named and read_meta(folder)["source"] != source):
            continue
        if resuming or not file.is_file() or file.stat().st_mtime <= meta.stat().st_mtime:
            return folder
        settings = read_meta(folder).get("settings", {})
    if resuming:
        raise UserError(f"{source}, the text of this run, is gone: prepare it again")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"prepare the text before several processes: {command(source, {})}")
    find_files(source)  # a UserError if there are none comes first
    print(f"preparing {source} first ({command(source, settings)})")
    return prepare(source, **settings)


def command(source, settings):
    """The command that prepares a source with the settings {flag without dashes: value}."""
    source = quoted(source) if Path(source).exists() else source  # perhaps several
    flags = (f" --{name} {quoted(value)}" for name, value in settings.items())
    return f"python prepare_data.py {source}{''.join(flags)}"


def data_hashes(meta):
    """The hashes that identify a prepared text: {split: sha256}."""
    return {split: values["sha256"] for split, values in meta["splits"].items()}


def other_tokenizer(folder, wanted):
    """What to tell a user whose checkpoint has the Tokenizer `wanted`, not that of a prepared
    folder: the command that prepares the text again, with a folder that has it if there is one."""
    meta, learned = read_meta(folder), wanted.spec["kind"] in ("char", "bpe")
    old, name = Tokenizer(meta["tokenizer"]).name, wanted.name
    for path in DATA.glob("*/meta.json") if learned else ():
        with contextlib.suppress(UserError):  # of another version
            if Tokenizer(read_meta(path.parent)["tokenizer"]).same_ids(wanted):
                name = path.parent
    settings = meta.get("settings", {}) | {"tokenizer": name, "name": folder.name}
    settings.pop("max_tokens", None)  # which the checkpoint's text may not have had
    both = f"the checkpoint's tokenizer is {wanted.name}, that of {folder} {old}"
    return f"{both} (or has other tokens): {command(meta['source'], settings)} prepares it again"


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


# fmt: off (one line a flag)
def build_parser():
    p = Parser(
        description="Turn text into token files: data/NAME/{train.bin, val.bin, meta.json}.")
    add = p.add_argument
    add("source", nargs="*", default=("stdlib",),
        help="stdlib (default), sales, shakespeare, tinystories, fineweb-edu, c4, c4-zh, or files, "
        "folders, globs, http(s) URLs; fineweb-edu and c4 need --max_tokens")
    add("--tokenizer",
        help="byte, char, bpe:N, bpe-han:N (each Chinese character a token), gpt2, cl100k_base, "
        "o200k_base, a prepared folder, or a model's folder or name on the Hub (default: bpe:2048 "
        "for stdlib, cl100k_base for sales, char for shakespeare, else bpe:4096)")
    add("--name", help="write to data/NAME (default: the first source's own name)")
    add("--val_fraction", type=number(float, "above 0 and at most 0.5", lambda v: 0 < v <= 0.5),
        default=0.1, help="share held out, about (default 0.1)")
    add("--encoding", help="of the files (default: UTF-8, UTF-16 or GB18030 recognised)")
    add("--field", help="of .jsonl objects that holds the text (default: text, else content)")
    add("--max_tokens", type=at_least(1, float),
        help="stop at this number of training tokens, 1e8 for example")
    return p


# fmt: on


def main(argv=None):
    prepare(**vars(build_parser().parse_args(argv)))


if __name__ == "__main__":
    run_cli(main)
