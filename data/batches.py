"""Examples as rows of token ids with a mask of what is learned, and rows as padded batches."""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

from data.chat import Template, label_token

# --------------------------------------------------------------------------------------------
# Examples -> token rows
# --------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Token ids and, for each of them, whether it is to be learned (a target)."""

    ids: list
    mask: list

    def targets(self):
        """The ids to predict after each of ids[:-1]; -100 is none."""
        return [i if m else -100 for i, m in zip(self.ids[1:], self.mask[1:])]


def chat_row(messages, tokenizer, context, loss_on="assistant"):
    """(Row, cut) of a conversation; `cut` says that it was too long.

    Nothing behind the last target is kept, since nothing can be learned from it. What is longer
    than context + 1 ids loses its oldest turns, never the system's; a question and answer that are
    too long by themselves lose the end.
    """
    template = Template(tokenizer)
    turns = template.turns(messages)
    for n, (role, ids, _) in enumerate(turns):
        if loss_on == "all":
            turns[n] = role, ids, [1] * len(ids)
        elif (loss_on == "call" and role != "call") or (loss_on == "last" and n < len(turns) - 1):
            turns[n] = role, ids, [0] * len(ids)
    while turns and not any(turns[-1][2]):
        turns.pop()
    room, cut = context + 1 - len(template.start), False
    while sum(len(ids) for _, ids, _ in turns) > room:
        cut = True
        oldest = 1 if turns[0][0] == "system" else 0
        if len(turns) <= oldest + 2:
            break
        turns.pop(oldest)
    ids = [i for _, part, _ in turns for i in part]
    mask = [m for _, _, part in turns for m in part]
    # a question that leaves no room for its answer loses its beginning: its end takes half the row,
    # or more where the answer is short
    first = mask.index(1) if 1 in mask else 0
    start = max(0, min(first - room // 2, len(ids) - room)) if first >= room else 0
    ids, mask = ids[start : start + room], mask[start : start + room]
    return Row(template.start + ids, [0] * len(template.start) + mask), cut


def label_row(text, label, tokenizer, context, loss_on="assistant"):
    """(Row, cut): the course's form. Only the label is learned, or with `all` the text, too.

    a fine film <|endoftext|> <|label:pos|>
    0 0    0    0             1
    """
    ids = tokenizer.encode(text)
    cut = len(ids) > context - 1
    ids = [*ids[-(context - 1) :], tokenizer.eos_id]
    mask = [int(loss_on == "all")] * len(ids)
    if label is None:
        return Row(ids, mask), cut
    return Row([*ids, tokenizer.special[label_token(label)]], [*mask, 1]), cut


def pair_rows(example, tokenizer, context):
    """((chosen Row, rejected Row), cut) of a preference pair: one prompt, two endings, of which
    alone anything is learned."""
    rows, cuts = [], []
    for which in ("chosen", "rejected"):
        ending = {"role": "assistant", "content": example[which]}
        row, cut = chat_row([*example["messages"], ending], tokenizer, context, "last")
        rows.append(row)
        cuts.append(cut)
    return tuple(rows), any(cuts)


def reward_row(row, token):
    """The Row whose one place with a target is the last id of `row`: there the logit of `token` is
    the reward."""
    return Row([*row.ids, token], [0] * len(row.ids) + [1])


@dataclass
class Prompt(Row):
    """A conversation up to a turn of the assistant's, as ids, that turn in the data, and how many
    ids the answers to it may take."""

    messages: list
    wanted: dict
    room: int


def show_mask(rows, tokenizer, count):
    """Print rows token by token: what is learned in green, the rest grey (plain in a file: a * in
    front of what is learned), with ids."""
    color = sys.stdout.isatty()
    flat = [r for row in rows for r in (row if isinstance(row, tuple) else (row,))]
    for number, row in enumerate(flat[:count], start=1):
        print(f"--- row {number}: {len(row.ids)} tokens, {sum(row.mask)} of them learned ---")
        for at, (i, m) in enumerate(zip(row.ids, row.mask)):
            text = repr(tokenizer.decode([i]))[1:-1]
            if color:
                print(f"\033[{'32' if m else '90'}m{text}\033[0m", end="")
            else:
                print(f"{at:5} {'*' if m else ' '} {i:7} {text}")
        if color:
            print(f"\nids {row.ids}")


# --------------------------------------------------------------------------------------------
# Rows -> batches: a pure function of (seed, number)
# --------------------------------------------------------------------------------------------


def pad(rows):
    """(ids, targets), both (B, T), of rows; short ones are filled with id 0 and -100 behind."""
    T = max(len(r.ids) for r in rows) - 1
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full((len(rows), T), -100)
    for b, r in enumerate(rows):
        ids[b, : len(r.ids) - 1] = torch.tensor(r.ids[:-1])
        targets[b, : len(r.ids) - 1] = torch.tensor(r.targets())
    return ids, targets


def size_of(row):
    """(tokens of the longest sequence, sequences) of a Row or a tuple of Rows; one sequence is a
    Prompt with its answers."""
    if isinstance(row, Prompt):
        return len(row.ids) - 1 + row.room, 1
    rows = row if isinstance(row, tuple) else (row,)
    return max(len(r.ids) for r in rows) - 1, len(rows)


def bucket(order, rows, batch_tokens):
    """Lists of row numbers, about one length in each, of at most `batch_tokens` padded tokens."""
    batches = []
    for i in sorted(order, key=lambda i: size_of(rows[i])[0]):  # keeps the order of equal lengths
        if not batches or (len(batches[-1]) + 1) * math.prod(size_of(rows[i])) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


class BucketLoader:
    """All rows of an epoch, in batches of similar lengths, in another order each epoch.

    A batch holds at most `batch_tokens` padded tokens (or one row); padding adds 1 to 3 % to the
    hotel dialogues. Batch n of the whole run is always the same, so resuming needs only the step.
    `epoch_rows(epoch)`, if given, makes each epoch's rows anew (augmentation); the batches of any
    epoch are as many as those of epoch 0.
    """

    def __init__(self, rows, batch_tokens, seed, epoch_rows=None):
        self.batch_tokens, self.seed = batch_tokens, seed
        self.epoch_rows = epoch_rows or (lambda epoch: rows)
        self.begin(0)
        self.per_epoch = len(self.batches)

    def begin(self, epoch):
        """Make the rows and batches of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        self.epoch, self.rows = epoch, self.epoch_rows(epoch)
        order = rng.permutation(len(self.rows)).tolist()
        self.batches = bucket(order, self.rows, self.batch_tokens)
        rng.shuffle(self.batches)

    def get(self, number):
        """(row numbers, rows) of batch `number` of the run."""
        epoch, at = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self.begin(epoch)
        # rows made anew may give more batches or fewer: some are left out then, or come again
        chosen = self.batches[at % len(self.batches)]
        return chosen, [self.rows[i] for i in chosen]


def drop_tokens(ids, share, end, rng):
    """ids with a random `share` of them replaced by `end`: a model that sees few texts must not
    rely on any single word of them."""
    gone = torch.from_numpy(rng.random(ids.shape) < share)
    return torch.where(gone, end, ids)
