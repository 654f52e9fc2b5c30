"""Tokenizers: all but SentencePiece's are tiktoken encodings and encode at its speed; and a
byte-level BPE trainer."""
import base64
import codecs
import heapq
import itertools
import re
import sys
import unicodedata
from array import array
from collections import Counter, defaultdict
from functools import cached_property, partial

import numpy as np
import regex  # comes with tiktoken, whose split patterns are written for it (\p{L}, \p{Han})
import tiktoken
import tiktoken.load

from data.cli import UserError, explained
from data.download import DATA, MB, fetch
from data.progress import shown
from data.sentencepiece import SentencePiece

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
# For a model that must copy: a value has the same tokens wherever it stands, since each Chinese
# character and each digit is one, and JSON's keys, quotes and brackets are tokens of their own.
#
#   bpe       提供无|烟房|的酒店        ["|无烟房|",| "|SPA|"]
#   bpe-han   提|供|无|烟|房|的|酒|店    ["|无|烟|房|", "|SPA|"]
HAN_PATTERN = "|".join(
    (
        r'[^\p{L}\p{N}\r\n]*"[a-z_]+": [\[{]*"?',  # a key, with what closes the value before it
        r"\p{Han}",
        rf" ?(?:{_LETTER}|_)+",
        r"\p{N}",
        r"\s*[\r\n]+",
        r"[^\p{L}\p{N}\r\n]+",
    )
)
PATTERNS = {"bpe": PATTERN, "bpe-han": HAN_PATTERN}
ANY_CHARACTER = r"(?s:.)"

# tiktoken downloads vocabularies by itself: let it do so through fetch, its mirror and its cache
tiktoken.load.read_file = lambda url: fetch(url).read_bytes()


class Tokenizer:
    """A tiktoken.Encoding and the plain-dict `spec` that rebuilds it anywhere.

    spec["kind"] is byte, char (with "chars"), bpe (with "pattern" and base64 "tokens"), tiktoken
    (with "name"), hf or spm (see data/hf_tokenizer.py). Files and checkpoints carry the spec, so a
    model always has its tokenizer. `eos_id` ends a text; `bos_id` is what a Hugging Face model
    wants in front of it, else None; `encode` adds neither.

    >>> t = Tokenizer({"kind": "byte"})
    >>> t.encode("é"), t.decode([195, 169]), t.n_vocab, t.eos_id
    ([195, 169], 'é', 257, 256)
    """

    def __init__(self, spec):
        self.spec, kind, pattern = spec, spec.get("kind"), ANY_CHARACTER
        # To add a tokenizer: a kind here, and its spec in prepare_data.make_tokenizer.
        if kind == "byte":
            tokens = [bytes([b]) for b in range(256)]
        elif kind == "char":
            tokens = [c.encode() for c in spec["chars"] + UNKNOWN]
            self._unknown = re.compile(f"[^{re.escape(spec['chars'] + UNKNOWN)}]")
        elif kind in ("bpe", "hf"):  # None: the id belongs to an added token
            tokens = [t if t is None else base64.b64decode(t) for t in spec["tokens"]]
            pattern = spec["pattern"]
        elif kind not in ("tiktoken", "spm"):
            raise UserError(f"tokenizer kind {kind!r} is unknown to this version")
        if kind == "tiktoken":
            remedy = f"delete {DATA / 'downloads'} to download it again"
            with explained(f"tokenizer {spec['name']} cannot be read: {remedy}"):
                base = tiktoken.get_encoding(spec["name"])
            pattern, ranks, added = base._pat_str, base._mergeable_ranks, base._special_tokens
        elif kind == "spm":
            ranks, added = spec["data"]["model"]["vocab"], dict(spec["added"])
        else:
            ranks = {t: i for i, t in enumerate(tokens) if t is not None}
            added = dict(spec["added"]) if kind == "hf" else {END: len(tokens)}
        if kind == "hf":  # text between matches is a piece there, but dropped by tiktoken
            pattern = f"{pattern}|(?:(?!{pattern}){ANY_CHARACTER})+"
        special, words = spec.get("special", []), spec.get("words", {})
        new = [name for name in special if name not in words]  # their ids follow all others
        added = added | dict(zip(new, itertools.count(max(*ranks.values(), *added.values()) + 1)))
        # Words are ordinary text, except tags such as <think> that a chat template writes
        tags = {w for w in words if w[0] in "<[" and w in str(spec.get("chat_template"))}
        self.words = {w: i for w, i in words.items() if w not in {*special, *tags}}
        self.special = {name: i for name, i in added.items() if name not in self.words}
        if kind == "spm":
            self.encoding = SentencePiece(spec["data"], added, self.words)
            words = self.encoding.early_words
        else:
            options = {"mergeable_ranks": ranks, "special_tokens": added}
            self.encoding, words = tiktoken.Encoding(kind, pat_str=pattern, **options), self.words
        longest_first = sorted(words, key=len, reverse=True)
        self._words = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.n_vocab = self.encoding.n_vocab  # the largest id + 1
        self._no_token = bytes(b for b in range(256) if kind == "hf" and bytes([b]) not in ranks)
        self.eos_id = spec["end"] if kind in ("hf", "spm") else self.encoding.eot_token
        self.bos_id = spec.get("begin")

    def with_special(self, names):
        """This tokenizer with the special tokens `names` added behind its vocabulary, except those
        that it has. Text can never spell a special token, only `special` can."""
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
        han = "-han" if self.spec.get("pattern") == HAN_PATTERN else ""
        return self.spec.get("name") or {"bpe": f"bpe{han}:{size}"}.get(kind, kind)

    def encode_array(self, text, follows=None):
        """Token ids of `text` as uint32; names of special tokens are plain text in it. If it is a
        part of a document, `follows` says what it comes after, a "special" token or "text", since
        SentencePiece puts a space in front of a document."""
        if self.spec["kind"] == "char":
            text = self._unknown.sub(UNKNOWN, text)
        if self.spec.get("nfc"):  # é is one character, however it was typed
            text = unicodedata.normalize("NFC", text)
        parts = self._words.split(text)  # texts and words alternate
        ids = []
        for i, part in enumerate(parts):
            ids.append([self.words[part]] if i % 2 else self._encode_text(part, follows))
            follows = "special"
        return np.concatenate(ids).astype(np.uint32)

    def _encode_text(self, text, follows):
        """The ids of a text that contains none of `words`, as uint32."""
        if self.spec["kind"] == "spm":
            return self.encoding.encode_to_numpy(text, follows)
        if self._no_token and set(self._no_token) & set(text.encode()):
            return self._encode_by_piece(text)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeError:
            raise
        except ValueError:  # its regex gives up within about a million blanks
            return self._encode_by_piece(text)

    def _encode_by_piece(self, text):
        """The same ids by Python's regex, which is slow but has no limit. Bytes without a token
        (SmolLM2 lacks those of rare characters) are dropped from each piece, as in Hugging Face's.
        """
        pieces = (m[0].encode() for m in regex.finditer(self.encoding._pat_str, text))
        kept = filter(None, (piece.translate(None, self._no_token) for piece in pieces))
        ids = itertools.chain.from_iterable(map(self.encoding._encode_single_piece, kept))
        return np.fromiter(ids, dtype=np.uint32)

    def encode(self, text, follows=None):
        """`encode_array` as a list."""
        return self.encode_array(text, follows).tolist()

    def encode_parts(self, parts, follows=None):
        """The token ids of `parts`, in which texts and names of special tokens alternate."""
        ids = []
        for n, part in enumerate(parts):
            ids += [self.special[part]] if n % 2 else self.encode(part, follows)
            follows = "special"
        return ids

    def token_bytes(self, i):
        """The bytes that id `i` stands for; None if no token has this id."""
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return None

    def decode(self, ids):
        """Text of token ids; a broken character shows as U+FFFD."""
        return self.encoding.decode_bytes(list(map(int, ids))).decode(errors="replace")

    def texts(self, ids):
        """The text of each id. A character that spans several tokens is in the last one's text."""
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        return [decoder.decode(self.token_bytes(i) or b"") for i in ids]

    @cached_property
    def byte_lengths(self):
        """The number of bytes of each id's text, (n_vocab,), by which losses are divided to get
        bits per byte. 0 for special tokens, -1 for ids that no token has."""
        tokens = map(self.token_bytes, range(self.n_vocab))
        lengths = np.array([-1 if token is None else len(token) for token in tokens])
        lengths[list(self.special.values())] = 0
        return lengths

    @cached_property
    def fallback(self):
        """Whether each token is a part of a character or the unknown one: bools, (n_vocab,)."""
        tokens = (self.token_bytes(i) or b"" for i in range(self.n_vocab))
        return np.array([UNKNOWN in token.decode(errors="replace") for token in tokens])


REWARD_TOKEN = "<|reward|>"  # its logit after an answer is the answer's reward


def warn_unknown(tokenizer, ids, what):
    """Say on stderr how many of the `ids` of `what` are characters that a char tokenizer lacks."""
    ids = list(ids) if tokenizer.spec["kind"] == "char" else []
    if n := int(tokenizer.fallback[ids].sum()):
        share = f"{n:,} of {len(ids):,} tokens ({n / len(ids):.0%})"
        print(f"[{what}: {share} are characters that the model does not know]", file=sys.stderr)


def label_token(label):
    """The special token that stands for a label of a classifier."""
    return f"<|label:{label}|>"


def labels_of(tokenizer):
    """The labels that a classifier's tokenizer knows; none for other models."""
    begin, end = label_token("\0").split("\0")
    return [n[len(begin) : -len(end)] for n in tokenizer.special if n.startswith(begin)]


# --------------------------------------------------------------------------------------------
# Byte-pair encoding
# --------------------------------------------------------------------------------------------


def train_bpe(counts, size):
    """Byte-pair encoding (Sennrich et al. 2016) over bytes: up to `size` tokens, in merge order.

    `counts` maps pieces (bytes) to how often they occur. Starting from the 256 bytes, the most
    frequent adjacent pair becomes a token, until there are enough or no pair occurs twice; among
    equals the pair of the smallest ids. A merge visits only the places of its pair, so that pieces
    may be long, as those of text without blanks are.

    >>> [t.decode() for t in train_bpe({b"low": 5, b"lower": 2, b"newer": 6}, 260)[256:]]
    ['er', 'lo', 'low', 'ew']
    """
    tokens = [bytes([b]) for b in range(256)]
    # the ids of all pieces, a -1 around each; `left` and `right` are neighbours, merged ids skipped
    ids, weights = array("i", [-1]), array("i", [0])
    for piece, n in counts.items():
        ids.extend((*piece, -1))
        weights.extend([n] * (len(piece) + 1))
    left, right = array("i", range(-1, len(ids) - 1)), array("i", range(1, len(ids) + 1))
    total, where = Counter(), defaultdict(partial(array, "i"))  # pair -> occurrences, their places
    for i, pair in enumerate(itertools.pairwise(ids)):
        if -1 not in pair:
            total[pair] += weights[i]
            where[pair].append(i)
    heap = [(-n, pair) for pair, n in total.items()]
    heapq.heapify(heap)
    with shown("learning merges: token", lambda: len(tokens), size):
        while heap and len(tokens) < size:
            n, pair = heapq.heappop(heap)
            if -n != total[pair]:  # the count has changed since: put it back at its place
                if total[pair] > 0:
                    heapq.heappush(heap, (-total[pair], pair))
                continue
            if -n < 2:
                break
            (a, b), new, changed = pair, len(tokens), set()
            tokens.append(tokens[a] + tokens[b])
            for i in where.pop(pair):  # from left to right: of aaa the first two are merged
                j, before = right[i], left[i]
                if (ids[i], ids[j]) != pair:  # another merge has taken one of them since
                    continue
                n, after = weights[i], right[j]
                ids[i], ids[j], right[i], left[after] = new, -1, after, i
                on_left = (ids[before], a), (ids[before], new), before
                on_right = (b, ids[after]), (new, ids[after]), i
                for old, created, place in (on_left, on_right):
                    if -1 not in created:
                        total[old] -= n
                        total[created] += n
                        where[created].append(place)
                        changed.add(created)
            del total[pair]
            for p in changed:
                heapq.heappush(heap, (-total[p], p))
    return tokens


BPE_SAMPLE = 64 * MB  # characters to count at most; more text does not move a small vocabulary


def learn_bpe(size, documents, total_bytes, pattern=PATTERN):
    """The spec of a BPE of `size` ids, end-of-text included, trained on the documents. No merge
    crosses the border of a match of `pattern`.

    Of more text than BPE_SAMPLE every k-th piece is counted, so that the sample covers all of it.
    """
    split, counts = regex.compile(pattern), Counter()
    every = -(-total_bytes // BPE_SAMPLE) | 1  # odd: a short document has a long piece and its end
    pieces = (piece for _, pieces in documents for piece in pieces)
    for piece in itertools.islice(pieces, 0, None, every):
        counts.update(split.findall(piece))
    tokens = train_bpe({piece.encode(): n for piece, n in counts.items()}, size - 1)
    encoded = [base64.b64encode(t).decode() for t in tokens]
    return {"kind": "bpe", "pattern": pattern, "tokens": encoded}
