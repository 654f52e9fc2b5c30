"""SentencePiece's BPE, as in Llama 2, Mistral, Yi, Gemma and ChatGLM: an encoding for Tokenizer in
place of tiktoken's, from the content of a tokenizer.json or from a bare tokenizer.model."""

import heapq
import io
import re
import struct
from collections import defaultdict
from itertools import chain, pairwise

import numpy as np

from data.cli import UserError, explained

SPACE = "\u2581"  # "▁", which stands for a space
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
IN_FRONT = {"type": "Prepend", "prepend": SPACE}
CACHE_LIMIT, LONG = 1 << 18, 100  # words in the cache; a longer word empties it


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

    A space is put in front of a text, and decoding drops it: "Hi 中" is ▁Hi ▁ 中, or if 中 is no
    piece, ▁Hi ▁ <0xE4> <0xB8> <0xAD>. A merge may join any pieces, over spaces, too. But
    the text can be cut into words between two characters that stand side by side in no piece.
    """

    def __init__(self, data, added, words):
        model = data["model"]
        if model.get("ignore_merges") or not model.get("byte_fallback"):
            raise ValueError("model: SentencePiece's BPE is read with byte_fallback and all merges")
        vocab = {piece: i for piece, i in model["vocab"].items() if piece not in added}
        self._mergeable_ranks, self._special_tokens = vocab, added
        self.n_vocab = max(*vocab.values(), *added.values()) + 1
        # A tokenizer.json ranks pairs "a b", a tokenizer.model the piece "ab" that they make
        self.between, scores = "" if "scores" in model else " ", model.get("scores", {})
        self.ranks = {" ".join(pair): n for n, pair in enumerate(model["merges"])}
        if lost := [pair for pair in self.ranks if pair.replace(" ", "") not in vocab]:
            raise ValueError(f"model: the merge {lost[0]!r} makes no token")
        self.ranks |= {piece: -score for piece, score in scores.items()}
        inside = sorted({ord(a) << 32 | ord(b) for piece in vocab for a, b in pairwise(piece)})
        self.inside = np.array([*inside, 1 << 62])
        self.bytes, self.cache = [vocab[f"<0x{b:02X}>"] for b in range(256)], {}
        self.steps, self.scheme = [*steps_of(data, "normalizer")], None
        if unread := [s["type"] for s in self.steps if s["type"] not in ("Prepend", "Replace")]:
            raise ValueError(f"normalizer {unread[0]} can't be read")
        # Words that are found in the normalized text; the others are found before
        late = {t["content"] for t in data["added_tokens"] if t.get("normalized") and self.steps}
        self.early_words = words.keys() - late
        for step in (steps := steps_of(data, "pre_tokenizer")):
            if step["type"] == "Metaspace" and len(steps) == 1 and not step.get("split", True):
                self.scheme = step["prepend_scheme"]
                self.steps += [TO_SPACE, IN_FRONT][: 1 if self.scheme == "never" else 2]
            # Gemma's splits at spaces, of which its normalizer has left none
            elif step.get("pattern") != {"String": " "} or TO_SPACE not in self.steps:
                raise ValueError(f"pre_tokenizer {step['type']} can't be read with this model")
        ends = {s["type"]: s.get("prepend_scheme") for s in steps_of(data, "decoder")}
        self.drops = "Strip" in ends or ends.get("Metaspace", "never") != "never"

        place = "text" if scores else None
        self.normalized = {self.normalize(w, place): i for w, i in words.items() if w in late}
        longest_first = sorted(self.normalized, key=len, reverse=True)
        self.find_late = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        pieces = [*(vocab | added).items(), *self.normalized.items()]
        self.tokens = {i: piece.replace(SPACE, " ").encode() for piece, i in pieces}
        self.tokens |= {i: bytes([b]) for b, i in enumerate(self.bytes)}
        if (unknown := added.get(model.get("unk_token"))) is not None:
            self.tokens[unknown] = "\ufffd".encode()
        self.decode_single_token_bytes = self.tokens.__getitem__  # a KeyError if there is none

    def normalize(self, text, follows=None):
        """The text after the steps of the normalizer; see `encode_to_numpy`."""
        if follows == "text":  # no step joins this letter and what comes after it
            return self.normalize("中" + text).partition("中")[2]
        for step in self.steps:
            if step["type"] == "Replace":
                find = step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])
                text = re.sub(find, step["content"].replace("\\", r"\\"), text)
            elif text:
                there = self.scheme and (text[0] == SPACE or (follows and self.scheme == "first"))
                text = text if there else step["prepend"] + text
        return text

    def encode_to_numpy(self, text, follows=None):
        """The ids of a text. It may be a part: `follows` says what it comes after, "special" (a
        token or a word) or "text". After "text" no space is put in front; see `normalize`."""
        parts = enumerate(self.find_late.split(self.normalize(text, follows)))
        ids = [[self.normalized[p]] if n % 2 else self.encode_part(p) for n, p in parts]
        return np.concatenate(ids).astype(np.uint32)

    def encode_part(self, text):
        """The ids of a normalized text that contains none of `find_late`'s words, as uint32."""
        codes, cache = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64), self.cache
        pairs = codes[:-1] << 32 | codes[1:]
        cuts = np.flatnonzero(self.inside[np.searchsorted(self.inside, pairs)] != pairs) + 1
        border = next(i for i in range(0x10FFFF, 0, -1) if chr(i) not in text)
        words = np.insert(codes, cuts, border).astype("<u4").tobytes().decode("utf-32-le")
        words = words.split(chr(border))
        for word in (unique := {*words}):
            if word not in cache:  # a piece without an id is written as its bytes
                pieces = ((self._mergeable_ranks.get(p), p.encode()) for p in self.merge(word))
                parts = ([self.bytes[b] for b in p] if i is None else [i] for i, p in pieces)
                cache[word] = np.array([*chain(*parts)], dtype=np.uint32).tobytes()
        ids = np.frombuffer(b"".join(map(cache.__getitem__, words)), dtype=np.uint32)
        if len(cache) > CACHE_LIMIT or max(map(len, unique)) > LONG:
            self.cache = {}
        return ids

    def merge(self, word):
        """The pieces of a word: merge the adjacent pair with the lowest rank, the leftmost one if
        several have it, until no pair has a rank."""
        parts, heap, ranks, between = list(word), [], self.ranks, self.between
        after, before = list(range(1, len(word) + 1)), list(range(-1, len(word) - 1))

        def offer(i, j):
            pair = parts[i] + between + parts[j]
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair], i, j, len(pair)))

        for i, j in pairwise(range(len(word))):
            offer(i, j)
        while heap:
            _, i, j, size = heapq.heappop(heap)
            if parts[i] and parts[j] and len(parts[i] + between + parts[j]) == size:
                parts[i], parts[j] = parts[i] + parts[j], ""  # neither was joined since
                k = after[i] = after[j]
                if k < len(word):
                    before[k] = i
                    offer(i, k)
                if before[i] >= 0:
                    offer(before[i], i)
        return filter(None, parts)

    def decode_bytes(self, ids):
        """The bytes of token ids, without the space in front."""
        text = b"".join(map(self.decode_single_token_bytes, ids))
        return text.removeprefix(b" " if self.drops else b"")


KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
FROM_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
# Spaces at both ends of a text, and several in a row, are dropped if the file says so
SPACES = {"Regex": r"(?<![\s\S]) +| +(?![\s\S])| +(?= )"}
TRIM = {"type": "Replace", "pattern": SPACES, "content": ""}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
# Tokens that the code of ChatGLM2 and ChatGLM3 appends to the vocabulary; no file lists them
GLM_TOKENS = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>"


def fields(message):
    """{number: [values]} of a message in protobuf's format: integers, and bytes for the others."""
    stream, found = io.BytesIO(message), defaultdict(list)

    def varint():
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + (varint() << 7)

    while stream.tell() < len(message):
        key = varint()
        value = {1: 8, 5: 4}.get(key & 7) or varint()
        found[key >> 3].append(stream.read(value) if key & 7 else value)
        if key & 7 and len(found[key >> 3][-1]) < value:
            raise IndexError("cut short")
    return found


def read_model(path, config):
    """What a tokenizer.model says, as a tokenizer.json would, but with "scores" of pieces in place
    of merges. `config` is from tokenizer_config.json. UserError if it is no BPE, or damaged."""
    with explained(f"{path} is no model of SentencePiece's, or is damaged"):
        model = fields(path.read_bytes())
        trainer, normalizer = (fields(model[n][0]) for n in (2, 3))
        pieces = []  # (piece, score, type)
        for p in map(fields, model[1]):
            score = struct.unpack("<f", p[2][0])[0] if 2 in p else 0.0
            pieces.append((p[1][0].decode(), score, p[3][0] if 3 in p else NORMAL))
        kind, types = KINDS[trainer.get(3, [1])[0]], {t for *_, t in pieces}
        puts, trims, escapes = (normalizer.get(n, [1])[0] for n in (3, 4, 5))
        suffixes, bos, eos = (trainer.get(n, [m])[0] for n, m in ((24, 0), (41, 1), (42, 2)))
    others = suffixes or not escapes or UNUSED in types or BYTE not in types
    if kind != "BPE" or any(normalizer.get(2, [])) or others:
        what = f"{kind} with {normalizer.get(1, [b'no rules'])[0].decode()}"
        readable = "only BPE with byte tokens and the identity normalizer"
        raise UserError(f"{path} is {what}, which cannot be read, {readable}")
    names = {i: piece for i, (piece, *_) in enumerate(pieces)}
    added = {i: dict(id=i, content=piece, special=t != USER_DEFINED, normalized=t == USER_DEFINED)
             for i, (piece, _, t) in enumerate(pieces) if t in (UNKNOWN, CONTROL, USER_DEFINED)}
    glm = config.get("tokenizer_class") == "ChatGLMTokenizer"
    more = {len(names) + n: {"content": name} for n, name in enumerate(GLM_TOKENS.split() * glm)}
    more |= {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    for i, token in more.items():
        added[i] = added.get(i, {"id": i, "special": True}) | token
        names[i] = token["content"]
    vocab = {name: i for i, name in names.items()}
    ends = {"bos_token": names.get(bos), "eos_token": names.get(eos), "add_bos_token": not glm}
    scores = {p: score for p, score, t in pieces if t == NORMAL and p in vocab}
    unknown = next((p for p, _, t in pieces if t == UNKNOWN), None)
    front = {"type": "Metaspace", "prepend_scheme": "first" if puts else "never", "split": False}
    legacy = config.get("legacy") is not False  # else only the text's start has a space in front
    steps = [TRIM] * trims + ([IN_FRONT] * puts + [TO_SPACE]) * legacy
    back = [FROM_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}] + [STRIP] * puts
    model = {"type": "BPE", "vocab": vocab, "merges": [], "scores": scores, "unk_token": unknown}
    return {
        "config": ends,
        "added_tokens": list(added.values()),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None if legacy else front | {"replacement": SPACE},
        "decoder": {"type": "Sequence", "decoders": back},
        "model": model | {"byte_fallback": True, "fuse_unk": True},
    }


def written_json(data, entries):
    """The content of tokenizer.json with the added tokens `entries`; those that `data` has stay as
    they are. A tokenizer.model's merges are all pairs of pieces that join to a third."""
    known = {t["content"]: t for t in data["added_tokens"]}
    entries = [entry | known.get(entry["content"], {}) for entry in entries]
    model = {key: value for key, value in data["model"].items() if key != "scores"}
    vocab = model["vocab"] = model["vocab"] | {t["content"]: t["id"] for t in entries}
    if scores := data["model"].get("scores"):
        halves = ((p, p[:i], p[i:]) for p in scores for i in range(1, len(p)))
        halves = ((p, a, b) for p, a, b in halves if a in vocab and b in vocab)
        pairs = sorted((-scores[p], vocab[a], vocab[b], a, b) for p, a, b in halves)
        model["merges"] = [pair[3:] for pair in pairs]
        entries = [entry | {"normalized": False} for entry in entries]
    return data | {"added_tokens": entries, "model": model}
