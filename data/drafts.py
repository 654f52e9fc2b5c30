"""Drafts: ids that may come next, because they followed the same ids earlier.

A pass over several ids reads the model's weights once, as a pass over one id does. So the ids that
followed the longest earlier match are tried in one pass (prompt lookup, Saxena 2023). Only those
that the model would have drawn are kept, so a draft changes the time that a text takes, not the
text.
"""
from data.chat import common_length

LENGTHS = 0, 1, 3, 7, 15  # possible lengths of a draft
LONGEST = 16  # ids that a match can have
KEPT = 1 << 14  # ids of finished texts that are searched as well
# What drafts add to the time of a pass, relative to one without: a fixed cost, and a cost for each
# drafted id. Measured with 124M parameters on a CPU, see tests/BENCHMARKS.md.
FIXED, EACH = 0.15, 0.06


class Lookup:
    """Finds what followed earlier in a text, after the ids of `before`. They are kept as strings,
    with a character for each id, in which `rfind` is fast."""

    def __init__(self, before, ids):
        self.text, self.match, self.guess = before + to_chars(ids), 0, []

    def search(self, most):
        """Set `guess` to at most `most` ids after the longest match, and `match` to its length.
        Without a match they are empty and 0."""
        text, guess, n = self.text, "", 0
        while n < LONGEST and (at := text.rfind(text[~n:], 0, -1)) >= 0:
            n += 1
            guess = text[at + n :][:most]
        guess = (guess * most)[:most]  # a match near the end gives fewer ids: repeat them
        self.match, self.guess = n, list(map(ord, guess))


class Drafts:
    """The drafts for all texts of an engine, and how often they were right."""

    def __init__(self):
        self.ended, self.counts = "", {}  # counts: {length of a match: (right, wrong), decaying}

    def keep(self, ids):
        """Keep a text that has ended for those to come."""
        self.ended = (self.ended + to_chars(ids))[-KEPT:]

    def make(self, texts, most):
        """Set the `draft` of each Text. All drafts have the same length, at most `most`, for which
        a pass is expected to write the most ids per unit of time."""
        for text in texts:
            text.lookup.search(max(0, min(LENGTHS[-1], text.left - 1)))
        lookups = [text.lookup for text in texts]
        rates = [self.rate(lookup) for lookup in lookups]

        def speed(n):  # 1 + p + p^2 ... ids of each text
            lengths = [min(n, len(lookup.guess)) + 1 for lookup in lookups]
            ids = sum((1 - p**k) / (1 - p) for p, k in zip(rates, lengths))
            return ids / (1 + FIXED * (n > 0) + EACH * n * len(texts))

        n = max((n for n in LENGTHS if n <= most), key=speed)
        for text in texts:
            text.draft = (text.lookup.guess + [0] * n)[:n]  # padded: any id may be tried

    def rate(self, lookup):
        """The share of ids that came as guessed, after matches of the same length."""
        right, wrong = self.counts.get(lookup.match, (0.6, 1.4))
        return min(0.98, right / (right + wrong))

    def learn(self, lookup, new):
        """Update the counts by comparing a guess with the new ids, even if it was not drafted."""
        right, wrong = self.counts.get(lookup.match, (0.6, 1.4))
        n = common_length(lookup.guess, new)
        missed = n < min(len(lookup.guess), len(new))
        self.counts[lookup.match] = 0.97 * right + n, 0.97 * wrong + missed
        lookup.text += to_chars(new)
        lookup.guess = []


def to_chars(ids):
    """A string with a character for each id, which is below 1,114,112."""
    return "".join(map(chr, ids))
