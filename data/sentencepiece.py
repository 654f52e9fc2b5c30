"""SentencePiece's BPE, as in Llama 2, Mistral, Yi, Gemma and ChatGLM: an encoding for Tokenizer in
place of tiktoken's, from the content of a tokenizer.json or from a bare tokenizer.model."""

import heapq
import re
import struct
import unicodedata
from collections import defaultdict
from itertools import pairwise

import numpy as np

from data.cli import UserError

SPACE = "\u2581"  # "▁", which stands for a space
CACHE_LIMIT = 1 << 18  # words whose ids are kept
ID_LIMIT = 1_000_000  # no vocabulary is as large


def is_sentencepiece(data):
    """Whether the content of a tokenizer.json is of SentencePiece's kind."""
    steps = data.get("normalizer"), data.get("pre_tokenizer")
    return bool(data["model"].get("byte_fallback")) or SPACE in str(steps)


def steps_of(data, kind):
    """The steps of a tokenizer.json's "normalizer", "pre_tokenizer" or "decoder" as a list."""
    step = data.get(kind) or {"type": "Sequence"}
    return step.get(kind.replace("_", "") + "s", []) if step["type"] == "Sequence" else [step]


class SentencePiece:
    """A BPE of SentencePiece's, with those methods of a tiktoken.Encoding that Tokenizer calls.

    `data` is the content of a tokenizer.json, or what `read_model` makes of a tokenizer.model;
    `added` are its added tokens, name -> id, and `words` those of them that text is searched for.

    A space is put in front of a text, and decoding drops it: "Hi 中" is ▁Hi ▁ 中, or if that has no
    piece of its own ▁Hi ▁ <0xE4> <0xB8> <0xAD>. Merges may join any pieces of a text, over spaces,
    too. But they never join two words between which it has two characters that stand side by side
    in no piece: so it is cut there, and the ids of words that come again are looked up.
    """

    def __init__(self, data, added, words):
        model = data["model"]
        if model.get("type", "BPE") != "BPE" or model.get("ignore_merges"):
            raise ValueError(f"model {model.get('type')}: only BPE without ignore_merges is read")
        vocab = {piece: i for piece, i in model["vocab"].items() if piece not in added}
        ids = {*vocab.values(), *added.values()}
        if len(ids) < len(vocab) + len(added) or not 0 <= min(ids) <= max(ids) < ID_LIMIT:
            raise ValueError(f"token ids are repeated, or not from 0 to {ID_LIMIT:,}")
        self._mergeable_ranks, self._special_tokens, self.n_vocab = vocab, added, max(ids) + 1
        # A tokenizer.json ranks pairs of pieces, a tokenizer.model the pieces that pairs make
        self.by_piece, self.unused = "scores" in model, model.get("unused", ())
        self.between = "" if self.by_piece else " "
        self.ranks = {pair: n for n, pair in enumerate(model.get("merges", ()))}
        if lost := [pair for pair in self.ranks if pair.replace(" ", "") not in vocab]:
            raise ValueError(f"model: the merge {lost[0]!r} makes no token")
        self.ranks |= {piece: -score for piece, score in model.get("scores", {}).items()}
        self.unknown, self.fuses = (vocab | added).get(model.get("unk_token")), model["fuse_unk"]
        names = [f"<0x{b:02X}>" for b in range(256)] if model.get("byte_fallback") else [None]
        self.bytes = [vocab.get(name) for name in names]
        self.tokens = {i: p.replace(SPACE, " ").encode() for p, i in (vocab | added).items()}
        self.tokens |= {i: bytes([b]) for b, i in enumerate(self.bytes)}
        self.tokens |= {self.unknown: "\ufffd".encode()}
        self.tokens.pop(None, None)
        self.steps, self.cache = steps_of(data, "normalizer"), {}
        self.inside = {piece[i : i + 2] for piece in vocab for i in range(len(piece) - 1)}
        self.read_spaces(data)
        # Some words are found in the text as it was, others in the normalized text
        late = {t["content"] for t in data["added_tokens"] if t.get("normalized") or self.by_piece}
        self.late = {word: i for word, i in words.items() if word in late}
        change = self.normalize if not self.by_piece else lambda word: word.replace(" ", SPACE)
        self.normalized = {change(word): i for word, i in self.late.items()}
        self.tokens |= {i: w.replace(SPACE, " ").encode() for w, i in self.normalized.items()}
        longest_first = sorted(self.normalized, key=len, reverse=True)
        self.find_late = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def read_spaces(self, data):
        """Where a space is put in front of what, and whether decoding drops it. ValueError if a
        step of the tokenizer.json is not known."""
        self.scheme = None
        for step in self.steps:
            if step["type"] not in ("Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD"):
                raise ValueError(f"normalizer {step['type']} can't be read")
        for step in (steps := steps_of(data, "pre_tokenizer")):
            if step["type"] == "Metaspace" and len(steps) == 1:
                old = "always" if step.get("add_prefix_space", True) else "never"
                self.scheme = step.get("prepend_scheme", old)
                if step.get("split", True):
                    self.inside = {pair for pair in self.inside if pair[1] != SPACE}
            # Gemma's splits at spaces, of which its normalizer has left none
            elif step.get("pattern") != {"String": " "} or SPACE not in str(self.steps):
                raise ValueError(f"pre_tokenizer {step['type']} can't be read with this model")
        ends = {s["type"]: s for s in steps_of(data, "decoder")}
        self.drops = ends.get("Metaspace", {"prepend_scheme": "never"})
        self.drops = self.drops.get("prepend_scheme") != "never" or "Strip" in ends

    def normalize(self, text, follows=None):
        """The text after the steps of the normalizer; see `encode_to_numpy`."""
        if follows == "text":  # no step joins this letter and what follows it
            return self.normalize("中" + text).partition("中")[2]
        for step in self.steps:
            if step["type"] == "Prepend":
                text = text and step["prepend"] + text
            elif step["type"] == "Replace":
                find = step["pattern"]
                find = find.get("Regex") or re.escape(find["String"])
                text = re.sub(find, lambda _: step["content"], text)
            else:
                text = unicodedata.normalize(step["type"], text)
        return text

    def encode_to_numpy(self, text, follows=None):
        """The ids of a text. It may be a part: `follows` says what it comes after, a "special"
        token or a word, or other "text". Then no space is put in front."""
        ids = []
        for n, part in enumerate(self.find_late.split(self.normalize(text, follows))):
            if n % 2:
                ids.append(self.normalized[part])
                continue
            if self.scheme and part:
                part, follows = part.replace(" ", SPACE), "special" if n else follows
                first = follows is None and self.scheme == "first"
                puts = first or (follows != "text" and self.scheme == "always")
                part = SPACE + part if puts and part[0] != SPACE else part
            ids += self.encode_part(part)
        return np.array(ids, dtype=np.uint32)

    def encode_part(self, text):
        """The ids of a normalized text without words, as a list."""
        ids, inside, cache = [], self.inside, self.cache
        cuts = [i for i in range(1, len(text)) if text[i - 1 : i + 1] not in inside]
        for start, end in pairwise([0, *cuts, len(text)]):
            word = text[start:end]
            found = cache.get(word)
            if found is None:
                found = [i for piece in self.merge(word) for i in self.piece_ids(piece)]
                if len(cache) < CACHE_LIMIT and len(word) < 100:
                    cache[word] = found
            ids += found
        if self.fuses and self.unknown in ids:  # of several in a row the last one remains
            ids = [i for i, after in pairwise([*ids, None]) if i != self.unknown or i != after]
        return ids

    def piece_ids(self, piece):
        """The ids of a piece: its own, those of its bytes, or that of the unknown one."""
        if piece in self.unused:  # it only serves to make longer ones
            return [i for part in self.merge(piece, piece) for i in self.piece_ids(part)]
        ids = [self._mergeable_ranks.get(piece)]
        if None in ids and None not in self.bytes:
            ids = [self.bytes[b] for b in piece.encode()]
        return [i for i in ([self.unknown] if None in ids else ids) if i is not None]

    def merge(self, word, without=None):
        """The pieces of a word: of the pairs side by side the one of the lowest rank is joined, the
        leftmost of equals, until there is none. `without` is a piece that is not to be made."""
        parts, heap, ranks, between = list(word), [], self.ranks, self.between
        after, before = list(range(1, len(word) + 1)), list(range(-1, len(word) - 1))

        def offer(i, j):
            pair = parts[i] + between + parts[j]
            if pair in ranks and pair != without:
                heapq.heappush(heap, (ranks[pair], i, j, len(pair)))

        for i, j in pairwise(range(len(word))):
            offer(i, j)
        while heap:
            _, i, j, size = heapq.heappop(heap)
            stale = len(parts[i] + between + parts[j]) != size
            if stale or not parts[i] or not parts[j]:  # joined to another since
                continue
            parts[i], parts[j] = parts[i] + parts[j], ""
            k = after[i] = after[j]
            if k < len(word):
                before[k] = i
                offer(i, k)
            if before[i] >= 0:
                offer(before[i], i)
        return filter(None, parts)

    def decode_single_token_bytes(self, i):
        """The bytes that id `i` stands for; KeyError if no token has it."""
        return self.tokens[i]

    def decode_bytes(self, ids):
        """The bytes of token ids, without the space in front."""
        return b"".join(map(self.tokens.get, ids)).removeprefix(b" " if self.drops else b"")

    def decode(self, ids):
        """The text of token ids; a broken character shows as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
# What the code of ChatGLM2 and ChatGLM3 puts behind the vocabulary; no file of theirs says so
GLM_TOKENS = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>"


def fields(message):
    """{number: [values]} of a message in protobuf's format: integers, and bytes for the others."""
    found, at = defaultdict(list), 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value

    while at < len(message):
        key = varint()
        value = {1: 8, 5: 4}.get(key & 7) or varint()
        if key & 7:  # it was the length
            at, value = at + value, message[at : at + value]
        found[key >> 3].append(value)
    if at > len(message):
        raise IndexError("cut short")
    return found


def read_model(path, config):
    """What a tokenizer.model says, as a tokenizer.json would, but with "scores" of pieces in place
    of merges. `config` is from tokenizer_config.json. UserError if it is no BPE, or damaged."""
    try:
        model = fields(path.read_bytes())
        trainer, normalizer = (fields((model.get(n) or [b""])[0]) for n in (2, 3))
        pieces = []  # (piece, score, type)
        for p in map(fields, model[1]):
            score = struct.unpack("<f", p[2][0])[0] if 2 in p else 0.0
            pieces.append((p[1][0].decode(), score, p[3][0] if 3 in p else NORMAL))
        kind, has = KINDS[trainer.get(3, [1])[0]], lambda n: bool(normalizer.get(n, [1])[0])
        bos, eos = (trainer.get(n, [n - 40])[0] for n in (41, 42))
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as e:
        raise UserError(f"{path} is no model of SentencePiece's, or is damaged") from e
    if kind != "BPE" or trainer.get(24, [0])[0] or not has(5) or any(normalizer.get(2, [])):
        name = normalizer.get(1, [b""])[0].decode()
        raise UserError(f"{path}: {kind} with the normalizer {name}: only BPE with identity is read")
    vocab, added = {}, {}
    for i, (piece, _, kind) in enumerate(pieces):
        vocab[piece] = i
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            added[i] = {"id": i, "content": piece, "special": kind != USER_DEFINED}
    glm = config.get("tokenizer_class") == "ChatGLMTokenizer"
    more = {len(pieces) + n: {"content": name} for n, name in enumerate(GLM_TOKENS.split() * glm)}
    more |= {int(i): t for i, t in config.get("added_tokens_decoder", {}).items()}
    for i, token in more.items():
        if i < len(pieces):
            del vocab[pieces[i][0]]
        added[i] = added.get(i, {"id": i, "special": True}) | token
        vocab[token["content"]] = i
    names = {i: token["content"] for i, token in added.items()}
    begin = names.get(bos) if config.get("add_bos_token", not glm) else None
    single = [{"SpecialToken": {"id": begin}}] if begin else []
    edges = {"Regex": r"(?<![\s\S]) +| +(?![\s\S])"}
    steps = [replace(edges, ""), replace({"Regex": " +"}, " ")] if has(4) else []
    steps += [{"type": "Prepend", "prepend": SPACE}] if has(3) else []
    back = [replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has(3) else []
    steps.append(replace({"String": " "}, SPACE))
    by_type = {t: [p for p, _, kind in pieces if kind == t] for t in (UNKNOWN, UNUSED, BYTE)}
    model = {"type": "BPE", "vocab": vocab, "unk_token": by_type[UNKNOWN][0], "fuse_unk": True}
    model |= {"byte_fallback": bool(by_type[BYTE]), "merges": [], "unused": by_type[UNUSED]}
    model["scores"] = {p: s for p, s, kind in pieces if p in vocab and kind in (NORMAL, UNUSED)}
    return {
        "config": {"bos_token": names.get(bos), "eos_token": names.get(eos)},
        "added_tokens": list(added.values()),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": back},
        "model": model,
        "post_processor": {
            "type": "TemplateProcessing", "single": single,
            "special_tokens": {begin: {"id": begin, "ids": [bos]}},
        },
    }  # fmt: skip


def replace(pattern, content):
    """A step of a normalizer or decoder."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def written_json(data, entries):
    """The content of tokenizer.json with the added tokens `entries`; those that `data` has stay as
    they are. A tokenizer.model's merges are all pairs of pieces that join to a third."""
    known = {t["content"]: t for t in data["added_tokens"]}
    entries = [entry | known.get(entry["content"], {}) for entry in entries]
    model = {k: v for k, v in data["model"].items() if k not in ("scores", "unused")}
    vocab = model["vocab"] = model["vocab"] | {t["content"]: t["id"] for t in entries}
    if scores := data["model"].get("scores"):
        halves = ((p, p[:i], p[i:]) for p in scores for i in range(1, len(p)))
        pairs = [(-scores[p], vocab[a], vocab[b], a, b) for p, a, b in halves if {a, b} <= vocab.keys()]
        model["merges"] = [[a, b] for *_, a, b in sorted(pairs)]
        entries = [entry | {"normalized": False} for entry in entries]
    return data | {"added_tokens": entries, "model": model}
