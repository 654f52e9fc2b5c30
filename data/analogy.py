"""Words as vectors: arithmetic in the embedding table."""
import re

import torch

from data.cli import UserError


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
    terms = re.findall(r"([+-]?)\s*([^\s+-]+)", expression)
    if not terms:
        raise UserError(f"--analogy {expression!r} must be words with + and - between them")
    goal, used, candidates = torch.zeros(table.shape[1]), set(), list(choices)
    for sign, word in terms:
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
