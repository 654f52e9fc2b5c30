"""Words as vectors: arithmetic in the embedding table."""
import re

import torch

from data.cli import UserError


def word_vector(word, tokenizer, table):
    """(embedding, ids) of a word: of its single token, best with a space before it as words have in
    running text, else the mean of its tokens."""
    ways = [tokenizer.encode(" " + word), tokenizer.encode(word)]
    ids = next((w for w in ways if len(w) == 1), ways[1])
    if not ids or max(ids) >= len(table):
        raise UserError(f"--analogy: the model knows no {word!r}")
    return table[ids].float().mean(0), ids


def analogy(expression, tokenizer, table, choices=(), n=10):
    """[(text, cosine)], nearest first, for an expression such as "king - man + woman".

    table (V, C) is the embedding table. Candidates are `choices`, or all tokens but those of the
    expression. Mikolov et al. 2013: directions between words carry meaning.
    """
    parts = re.findall(r"([+-]?)\s*([^\s+-]+)", expression)
    if not parts:
        raise UserError(f"--analogy {expression!r}: words with + and - between them, please")
    goal, used = torch.zeros(table.shape[1]), set()
    for sign, word in parts:
        vector, ids = word_vector(word, tokenizer, table)
        goal = goal - vector if sign == "-" else goal + vector
        used.update(ids)
    if choices:
        names, vectors = list(choices), [word_vector(c, tokenizer, table)[0] for c in choices]
        near = torch.cosine_similarity(torch.stack(vectors), goal, dim=-1)
    else:
        known = [
            i for i in range(min(tokenizer.n_vocab, len(table))) if tokenizer.byte_lengths[i] > 0
        ]
        known = [i for i in known if i not in used]
        names = [tokenizer.decode([i]) for i in known]
        near = torch.cosine_similarity(table[known].float(), goal, dim=-1)
    best = near.topk(min(n, len(names)))
    return [(names[i], s) for s, i in zip(best.values.tolist(), best.indices.tolist())]
