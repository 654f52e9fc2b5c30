"""Words as vectors: arithmetic in the embedding table."""
import unicodedata
from pathlib import Path

import regex
import torch

from data.cli import UserError
from data.download import is_hub_name, snapshot_download
from data.files import read_json
from data.hf_weights import hf_tensors


class WordPiece:
    """BERT's tokens, the lines of its vocab.txt. A word is split into the longest token that it
    begins with and the longest that continue it, marked ##: play ##ing. 国 and 王 are words."""

    def __init__(self, path):
        self.tokens = path.read_text(encoding="utf-8").split("\n")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.byte_lengths = [len(t) * (t[:1] != "[") for t in self.tokens]  # not [CLS] and [SEP]

    def encode(self, text):
        """The ids of a text; none if it has a word that the tokens do not spell."""
        ids = []
        if "A" not in self.ids:  # an uncased vocabulary has no accents either
            text = regex.sub(r"\p{Mn}", "", unicodedata.normalize("NFD", text.lower()))
        for word in regex.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+|[^\w\s]|_", text):
            while word:
                ends = range(len(word), 2 * word.startswith("##"), -1)
                start = next((word[:end] for end in ends if word[:end] in self.ids), None)
                if start is None:
                    return []
                ids.append(self.ids[start])
                word = "##" + word[len(start) :] if len(start) < len(word) else ""
        return ids

    def decode(self, ids):
        """The tokens of ids as they are in the file."""
        return " ".join(self.tokens[i] for i in ids)


def bert_words(ckpt):
    """(WordPiece, embedding table) of a BERT, read without the rest of it; None for other models.
    `ckpt` is a folder or a name of the Hub."""
    online = is_hub_name(ckpt)
    folder = snapshot_download(ckpt, files=["config.json"]) if online else Path(ckpt)
    config = folder / "config.json"
    if not config.exists() or read_json(config).get("model_type") != "bert":
        return None
    if online:
        snapshot_download(ckpt, files=["vocab.txt"])
        snapshot_download(ckpt)
    tensors = hf_tensors(folder)
    name = next(name for name in tensors if name.endswith("embeddings.word_embeddings.weight"))
    return WordPiece(folder / "vocab.txt"), tensors[name][name]


def word_vector(word, tokenizer, table):
    """(embedding, ids) of a word: of its single token, preferably the one with a space before it,
    as in running text; else the mean of its tokens."""
    spellings = [tokenizer.encode(" " + word), tokenizer.encode(word)]
    ids = next((ids for ids in spellings if len(ids) == 1), spellings[1])
    if not ids or max(ids) >= len(table):
        raise UserError(f"--analogy: {word!r} is not in the model's vocabulary")
    return table[ids].float().mean(0), ids


def analogy(expression, tokenizer, table, choices=(), n=10):
    """[(text, cosine)], nearest first, for an expression such as "king - man + woman".

    table (V, C) is the embedding table. Candidates are `choices`, or all tokens but those of the
    expression. Mikolov et al. 2013: directions between words carry meaning.
    """
    if not regex.fullmatch(r"\s*[^\s+-]+(\s+[+-]\s+[^\s+-]+)*\s*", expression):
        raise UserError(f"--analogy {expression!r} must be words with ' + ' or ' - ' between them")
    terms = expression.split()
    goal, used, candidates = torch.zeros(table.shape[1]), set(), list(choices)
    for sign, word in zip(["+", *terms[1::2]], terms[::2]):
        vector, ids = word_vector(word, tokenizer, table)
        goal = goal - vector if sign == "-" else goal + vector
        used.update(ids)
    if choices:
        vectors = torch.stack([word_vector(word, tokenizer, table)[0] for word in choices])
    else:
        lengths = tokenizer.byte_lengths[: len(table)]
        ids = [i for i, length in enumerate(lengths) if length > 0 and i not in used]
        candidates, vectors = [tokenizer.decode([i]) for i in ids], table[ids].float()
    best = torch.cosine_similarity(vectors, goal, dim=-1).topk(min(n, len(candidates)))
    return [(candidates[i], c) for c, i in zip(best.values.tolist(), best.indices.tolist())]
