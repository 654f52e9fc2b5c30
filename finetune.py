"""Fine-tune: from a model that completes text to one that answers.

    python finetune.py --ckpt out/hotel --data hotel            a bot that calls a search tool
    python finetune.py --data sentiment                         label film reviews
    python finetune.py --data my_chats.jsonl --lora_rank 8      a few parameters only
    python finetune.py --data pairs.json                        preference pairs: DPO
    python finetune.py --data my_chats.jsonl --show_mask 2      what is learned, token by token

writes a run like train.py's, by the same loop (train.fit), and predictions.jsonl. What the rows are
is recognised from their shape: chats (Alpaca, ShareGPT, OpenAI messages, hotel dialogues), labelled
texts, preference pairs.

The chapters: the recipe, examples -> token rows, rows -> batches, what is minimised, what is
measured, objectives, the model and its run, the command line. Rows of any shape: data/rows.py.
"""

import argparse
import json
import math
import random
import signal
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial

if __name__ == "__main__":  # no traceback for Ctrl-C during the slow imports; see `run_cli`
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F

import lora
import model as lm
import train
from data.chat import (
    CHAT_TOKENS,
    Template,
    chat_prompt,
    find_template,
    label_token,
)
from data.cli import Parser, UserError, check_limits, run_cli
from data.hotel import substitute, tidy_calls, values_by_key
from data.machine import make_runtime
from data.rows import load_data
from data.runs import newest_run, run_folder
from data.scores import chat_scores, confusion, macro_f1
from data.sources import ROW_SETS
from data.tokenizer import Tokenizer
from prepare_data import default_name
from sample import Engine, allowed_ids, classify, load

# --------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------

# Added to train.RECIPE. A model has something to lose here: lower rates than from nothing.
RECIPE = train.RECIPE | train.optimizer_rates() | dict(
    objective="auto",
    best_by="val_loss",
    epochs=3.0,
    val=0.1,
    split="val",
    loss_on="assistant",
    batch_tokens=4096,
    lr=1e-3,
    embed_lr=3e-3,
    head_lr=3e-3,
    muon_lr=0.01,
    weight_decay=0.0,
    warmup_steps=20,
    eval_every=100,
    eval_rows=64,
    augment=0.0,
    token_dropout=0.0,
    lora_rank=0,
    lora_alpha=None,  # twice the rank
    lora_dropout=0.0,
    lora_targets="all",
)

# Tables are frozen under LoRA (new special tokens apart), so only the one rate counts.
LORA_RECIPE = dict(lr=3e-3)

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
    """(tokens of the longest sequence, sequences) of a Row or a tuple of Rows."""
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
    epoch are as many as the first one's.
    """

    def __init__(self, rows, batch_tokens, seed, epoch_rows=None):
        self.rows, self.batch_tokens, self.seed = rows, batch_tokens, seed
        self.epoch_rows, self.epoch = epoch_rows, None
        self.per_epoch = len(bucket(range(len(rows)), rows, batch_tokens))

    def get(self, number):
        """(row numbers, rows) of batch `number` of the run."""
        epoch, at = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.now = self.epoch_rows(epoch) if self.epoch_rows else self.rows
            order = rng.permutation(len(self.now)).tolist()
            self.batches = bucket(order, self.now, self.batch_tokens)
            rng.shuffle(self.batches)
            self.epoch = epoch
        # rows made anew may give more batches or fewer: some are left out then, or come again
        chosen = self.batches[at % len(self.batches)]
        return chosen, [self.now[i] for i in chosen]


def augmented(examples, objective, share, seed):
    """epoch -> rows of that epoch: `share` of the values exchanged anew (hotel.substitute)."""
    pool = values_by_key(examples)

    def epoch_rows(epoch):
        rng = random.Random(f"{seed} {epoch}")
        fresh = [substitute(e, pool, share, rng) for e in examples]
        return objective.make_split([tidy_calls(e) for e in fresh]).rows

    return epoch_rows


# --------------------------------------------------------------------------------------------
# What is minimised
# --------------------------------------------------------------------------------------------


def drop_tokens(ids, share, end, rng):
    """ids with a random `share` of them replaced by `end`: a model that sees few texts must not
    rely on any single word of them."""
    gone = torch.from_numpy(rng.random(ids.shape) < share)
    return torch.where(gone, end, ids)


def dpo_margin(model, ids, targets, reference):
    """By how much more than the reference does `model` like each answer? (P, 2): log probabilities
    of chosen and rejected, less the reference's, for batches as `DPO.batch` makes them."""
    logps = model(ids, targets, reduction="none").sum(1)  # (2 P,)
    return torch.stack(logps.chunk(2), dim=1) - reference


def dpo_loss(model, ids, targets, reference, beta):
    """-log sigmoid(beta * (gain of chosen - gain of rejected)), summed over pairs. Rafailov et al.
    2023, equation 7."""
    chosen, rejected = dpo_margin(model, ids, targets, reference).unbind(1)
    return -F.logsigmoid(beta * (chosen - rejected)).sum()


def distill_loss(model, ids, targets, teacher, share, temperature):
    """share * cross-entropy + (1 - share) * T^2 * KL(teacher || model), both softened by T, summed
    over the targets. Hinton et al. 2015, section 2."""
    keep = targets != -100
    logits = model(ids)[keep].float()  # (N, V)
    with torch.no_grad():
        goal = teacher(ids)[keep].float()
    V, T = min(logits.shape[1], goal.shape[1]), temperature  # spare rows may differ
    ours, theirs = (x[:, :V].div(T).log_softmax(-1) for x in (logits, goal))
    kl = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return share * F.cross_entropy(logits, targets[keep], reduction="sum") + (1 - share) * T**2 * kl


# --------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------


def answer_jobs(examples, limit=None):
    """[(messages before, the turn to be answered)] of chats, or `limit` of them evenly spread."""
    jobs = [
        (e["messages"][:i], m)
        for e in examples
        for i, m in enumerate(e["messages"])
        if m["role"] in ("assistant", "call") and i
    ]
    if not limit or limit >= len(jobs):
        return jobs
    return [jobs[i * len(jobs) // limit] for i in range(limit)]


def answer(model, tokenizer, jobs, max_tokens=160, batch=48):
    """The model's greedy turn for each of `answer_jobs`, in their order."""
    max_tokens = min(max_tokens, model.config.context // 2)
    room = model.config.context - max_tokens
    prompts = [chat_prompt(before, tokenizer, room) for before, _ in jobs]
    template, allowed = Template(tokenizer), allowed_ids(model, tokenizer, chat=True)
    said, waiting, writing = [[] for _ in jobs], deque(range(len(jobs))), {}
    engine = Engine(model, min(batch, len(jobs)), 256)
    while waiting or writing:
        while waiting and engine.busy < len(engine.slots):
            slot = engine.add(prompts[waiting[0]], temperature=0.0, allowed=allowed)
            writing[slot] = waiting.popleft()
        for slot, i in engine.step().items():
            ids = said[writing[slot]]
            ids.append(i)
            if i == template.end or len(ids) == max_tokens:
                engine.remove(slot)
                del writing[slot]
    return [template.parse(ids) for ids in said]


# --------------------------------------------------------------------------------------------
# Objectives: what is learned from rows, and how that is measured
# --------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Examples, what an objective made of them, and how many of these rows it had to cut."""

    examples: list
    rows: list
    cut: int = 0
    reference: torch.Tensor | None = None  # what DPO starts from, see `DPO.start`


class SFT:
    """Chats: the assistant's words are learned. The other objectives change what they must.

    To add an objective: a class like these and its name in OBJECTIVES. `args`, `tokenizer`,
    `runtime` (a Runtime, from `start` on) and `labels` are there for it.
    """

    kind, what, figure = "chat", "conversations", "slot_f1"  # figure: what --best_by may name
    recipe = {}  # what differs from RECIPE
    settings = {}  # flags of its own: {name: (default, what --help says)}

    @classmethod
    def defaults(cls):
        """What differs from RECIPE, and what is missing there."""
        return {name: value for name, (value, _) in cls.settings.items()} | cls.recipe

    def __init__(self, args, tokenizer, labels=()):
        self.args, self.tokenizer, self.labels, self.runtime = args, tokenizer, labels, None

    def row(self, example):
        """(Row or tuple of Rows, whether it was too long) of an example."""
        context, loss_on = self.args.context, self.args.loss_on
        return chat_row(example["messages"], self.tokenizer, context, loss_on)

    def make_split(self, examples):
        """The Split of examples. Rows without a target, which cannot be learned, are left out."""
        split = Split(examples, [])
        for row, cut in map(self.row, examples):
            if all(any(r.mask[1:]) for r in (row if isinstance(row, tuple) else (row,))):
                split.rows.append(row)
                split.cut += cut
        if not split.rows:
            loss_on = self.args.loss_on
            raise UserError(f"no row has a target for --loss_on {loss_on}: nothing to learn")
        return split

    def start(self, model, splits, saved):
        """Called before the first step with {name: Split}, and the content of the last.pt to resume
        or None. Returns what checkpoints keep beside the rest."""
        return {}

    def batch(self, split, numbers, rows):
        """The tensors of one batch: `rows`, which have these numbers in the Split."""
        return pad(rows)

    def loss(self, model, ids, targets):
        """The summed loss of a batch."""
        return model(ids, targets)

    def count(self, ids, targets):
        """What the sum is divided by, in the end."""
        return int((targets != -100).sum())

    def evaluate(self, model, split, final=True):
        """Loss a target, and how the answers to some of the questions score, which only rank 0
        writes; `report` answers them all in the end."""
        loss, count = 0.0, 0
        batches = bucket(range(len(split.rows)), split.rows, self.args.batch_tokens)
        for numbers in batches[self.runtime.rank :: self.runtime.world]:
            ids, targets = pad([split.rows[i] for i in numbers])
            loss += float(model(ids.to(self.runtime.device), targets.to(self.runtime.device)))
            count += int((targets != -100).sum())
        loss, count = self.runtime.total(loss, count)
        if final or not self.args.eval_rows or self.runtime.rank > 0:
            return {"val_loss": loss / count}
        jobs = answer_jobs(split.examples, self.args.eval_rows)
        return {"val_loss": loss / count} | chat_scores(jobs, answer(model, self.tokenizer, jobs))

    def report(self, model, split):
        """(figures over all of a Split, rows for predictions.jsonl), a few answers printed."""
        jobs = answer_jobs(split.examples)
        turns, rows = answer(model, self.tokenizer, jobs), []
        for (before, wanted), got in zip(jobs, turns):
            asked = before[-1]["content"]
            rows.append({"prompt": asked, "reference": wanted, "prediction": got})
        for row in rows[:: max(1, len(rows) // 4)][:4]:
            print(f"  asked      {shorten(row['prompt'])}")
            print(f"  reference  {shorten(row['reference']['content'])}")
            print(f"  answered   {shorten(row['prediction']['content'])}\n")
        return chat_scores(jobs, turns), rows


class Classify(SFT):
    """Labelled texts: a token for the label after the end of the text."""

    kind, what, figure = "label", "labelled texts", "accuracy"
    recipe = dict(best_by="accuracy")  # its loss turns up while it still gets better

    def row(self, example):
        """(Row, whether it was too long) of a text and its label."""
        context, loss_on = self.args.context, self.args.loss_on
        return label_row(example["text"], example["label"], self.tokenizer, context, loss_on)

    def logps(self, model, split):
        """(log probabilities of the labels (N, L), the right ones (N,))."""
        t, context = self.tokenizer, model.config.context
        prompts = [label_row(e["text"], None, t, context)[0].ids for e in split.examples]
        goals = [t.special[label_token(name)] for name in self.labels]
        wanted = torch.tensor([self.labels.index(e["label"]) for e in split.examples])
        return classify(model, prompts, goals), wanted

    def scores(self, logps, wanted):
        """Loss and accuracy over the label tokens alone, F1, and the confusion matrix."""
        table = confusion(logps.argmax(1).numpy(), wanted.numpy(), len(self.labels))
        accuracy = float((logps.argmax(1) == wanted).float().mean())
        loss = float(F.nll_loss(logps, wanted))
        return {"val_loss": loss, "accuracy": accuracy, "f1": macro_f1(table)}, table

    def evaluate(self, model, split, final=True):
        """As `scores`."""
        return self.scores(*self.logps(model, split))[0]

    def report(self, model, split):
        """(figures, rows for predictions.jsonl); the confusion matrix is printed."""
        logps, wanted = self.logps(model, split)
        scores, table = self.scores(logps, wanted)
        print("rows: the right label, columns: the predicted one")
        names = [shorten(name, 11) for name in self.labels]
        print(" " * 12 + "".join(f"{name:>12}" for name in names))
        for name, counts in zip(names, table):
            print(f"{name:>12}" + "".join(f"{n:12}" for n in counts))
        rows = []
        for e, p in zip(split.examples, logps.exp().tolist()):
            best = self.labels[p.index(max(p))]
            rows.append({"text": e["text"], "reference": e["label"], "prediction": best, "p": p})
        return scores, rows


class DPO(SFT):
    """Preference pairs (Rafailov et al. 2023): what people chose becomes likelier than what they
    rejected, relative to the reference, which is the model as it was."""

    kind, what, figure = "prefer", "preference pairs", "reward_accuracy"
    recipe = dict(lr=1e-4, embed_lr=1e-4, head_lr=1e-4, epochs=1.0)
    settings = {"dpo_beta": (0.1, "how tightly DPO holds on to the reference")}

    def row(self, example):
        """((chosen Row, rejected Row), whether one was too long) of a pair."""
        return pair_rows(example, self.tokenizer, self.args.context)

    def start(self, model, splits, saved):
        """The log probabilities of all answers under the reference, computed once."""
        known = saved and saved["reference"]
        if not known:
            with lm.evaluating(model), self.runtime.autocast(), lora.disable_adapter(model):
                known = {name: self.gains(model, split) for name, split in splits.items()}
        for name, split in splits.items():
            split.reference = known[name]
        return {"reference": known}

    def batch(self, split, numbers, rows):
        """(ids, targets, reference): the chosen rows, then the rejected ones, and (P, 2) log
        probabilities under the reference model."""
        reference = split.reference
        known = torch.zeros(len(rows), 2) if reference is None else reference[numbers]
        return *pad([chosen for chosen, _ in rows] + [rejected for _, rejected in rows]), known

    def loss(self, model, ids, targets, reference):
        """`dpo_loss` of a batch."""
        return dpo_loss(model, ids, targets, reference, self.args.dpo_beta)

    def count(self, ids, targets, reference):
        """Pairs."""
        return len(reference)

    def gains(self, model, split):
        """`dpo_margin` of all pairs, (N, 2); without a reference the log probabilities as such."""
        out = torch.zeros(len(split.rows), 2)
        for numbers in bucket(range(len(split.rows)), split.rows, self.args.batch_tokens):
            batch = self.batch(split, numbers, [split.rows[i] for i in numbers])
            out[numbers] = dpo_margin(model, *(t.to(self.runtime.device) for t in batch)).cpu()
        return out

    def evaluate(self, model, split, final=True):
        """DPO's loss; rewards (beta times the gain) of chosen and rejected answers, how often the
        first is the larger, and by how much."""
        good, bad = (self.args.dpo_beta * self.gains(model, split)).unbind(1)
        return {
            "val_loss": float(-F.logsigmoid(good - bad).mean()),
            "reward_accuracy": float((good > bad).float().mean()),
            "reward_chosen": float(good.mean()),
            "reward_rejected": float(bad.mean()),
            "reward_margin": float((good - bad).mean()),
        }

    def report(self, model, split):
        """(figures, no rows)."""
        with self.runtime.autocast():
            return self.evaluate(model, split), []


class Distill(SFT):
    """Chats again, learned from a teacher's probabilities as well (Hinton et al. 2015)."""

    settings = {
        "distill_lambda": (0.5, "share of the cross-entropy"),
        "distill_temperature": (2.0, "softens teacher and model"),
    }

    def start(self, model, splits, saved):
        """Load the teacher."""
        name, device = self.args.teacher, str(self.runtime.device)
        self.teacher, tokenizer, _ = load(name, device, "fp32")
        if tokenizer.spec != self.tokenizer.spec:
            raise UserError(
                f"--teacher {name} has other tokens, or special tokens, than the model: fine-tune "
                f"it on such rows first"
            )
        return {}

    def loss(self, model, ids, targets):
        """`distill_loss` of a batch."""
        share, temperature = self.args.distill_lambda, self.args.distill_temperature
        return distill_loss(model, ids, targets, self.teacher, share, temperature)


class DistillLabels(Distill, Classify):
    """The same for labelled texts."""


# The first class of a name that takes rows of the data's kind is used; without --objective the
# first of all.
OBJECTIVES = {
    "sft": [SFT],
    "classify": [Classify],
    "dpo": [DPO],
    "distill": [Distill, DistillLabels],
}


# --------------------------------------------------------------------------------------------
# The model and its run
# --------------------------------------------------------------------------------------------


def resolve(args):
    """Fill in what the user left out; reads the data, whose kind decides on the objective. Returns
    (args, the objective's class, content of the last.pt to resume or None, {split: examples},
    {split: sha256})."""
    given = {k: v for k, v in vars(args).items() if v is not None and v is not False}
    fixed = {"ckpt", "objective", "optimizer", "seed", "loss_on", "teacher", "quantize"}
    fixed |= {"val", "context", "batch_tokens", "augment", "best_by"}  # what they decided stands
    fixed |= {k for k in vars(args) if k.startswith("lora_")}
    content, settings = None, {}
    if args.resume is not None:
        settings, content = train.resumed_settings(args, given, fixed)
    elif "data" not in given:
        raise UserError(f"--data is missing: a file, or one of {', '.join(ROW_SETS)}")
    else:
        settings = given if "ckpt" in given else given | {"ckpt": str(newest_run())}
    val = settings.get("val", RECIPE["val"])
    kind, parts, hashes = load_data(settings["data"], settings.get("val_data"), val)
    if content is not None and content["data"] != hashes:
        raise UserError(f"{settings['data']} is not the data that the run began with")
    name, objective = choose_objective(settings.get("objective"), kind, settings["data"])
    if content is None:
        mode = LORA_RECIPE if given.get("lora_rank") else {}
        settings = RECIPE | mode | objective.defaults() | settings | {"objective": name}
    args = argparse.Namespace(**{k: settings.get(k) for k in vars(args)})
    check_limits(settings)
    check_settings(args, objective)
    return args, objective, content, parts, hashes


def choose_objective(name, kind, data):
    """(its name, its class) of --objective, or of what rows of that kind suit."""
    names = [name] if name else OBJECTIVES
    found = [(n, c) for n in names for c in OBJECTIVES[n] if c.kind == kind]
    if not found:
        raise UserError(f"--objective {name} does not suit {data}, rows of {kind}")
    return found[0]


def check_settings(args, objective):
    """UserError for settings that do not go together."""
    if (args.objective == "distill") != bool(args.teacher):
        raise UserError("--teacher CKPT and --objective distill belong together")
    if args.quantize and not args.lora_rank:
        raise UserError("--quantize freezes the base: add --lora_rank 8, so that something learns")
    if args.best_by not in ("val_loss", "last", objective.figure):
        what = f"rows of {objective.kind}: {objective.figure} is"
        raise UserError(f"--best_by {args.best_by} is not measured on {what}")
    if args.augment and objective.kind != "chat":
        raise UserError("--augment is for chats with tool calls")
    if args.token_dropout and args.objective == "dpo":
        raise UserError("--token_dropout does not go together with --objective dpo")


def check_parts(args, kind, parts):
    """The labels of the training rows, sorted; none for other kinds. UserError if another split has
    one that these lack, there is no --split of that name, or --best_by cannot be measured."""
    args.split = "val" if args.split == "dev" else args.split
    if args.split not in parts:
        raise UserError(f"{args.data} has no split {args.split!r}; it has {', '.join(parts)}")
    roles = {m["role"] for e in parts["val"] for m in e.get("messages", ())}
    if args.best_by == "slot_f1" and "call" not in roles:
        raise UserError("--best_by slot_f1 is not measured on chats without calls")
    if kind != "label":
        return []
    labels = sorted({e["label"] for e in parts["train"]})
    if strange := {e["label"] for p in parts.values() for e in p} - set(labels):
        raise UserError(f"label {min(strange)!r} is not among the training rows' labels")
    return labels


def special_tokens(tokenizer, labels):
    """The special tokens that these rows need: one a label, or for chats those of our template if
    the tokenizer has no family's."""
    if labels:
        return [label_token(name) for name in labels]
    return CHAT_TOKENS if find_template(tokenizer) is None else []


def build_model(args, content, labels):
    """(model, tokenizer, what an adapter's file says about itself or None): the checkpoint's model
    with the special tokens it needs, as `content` (of a resumed run) left it."""
    lora_on = args.lora_rank > 0
    base = content if content and not lora_on else lm.load_checkpoint(args.ckpt)
    if "adapter" in base:
        raise UserError(f"{args.ckpt} is an adapter: merge it first (python lora.py merge)")
    if "tokenizer" not in base:
        raise UserError(f"{args.ckpt} carries no tokenizer")
    if args.dropout is not None:
        base = base | {"config": {**base["config"], "dropout": args.dropout}}
    bare = Tokenizer(base["tokenizer"])
    tokenizer = bare.with_special(special_tokens(bare, labels))
    about = None
    if content and lora_on:
        model, about = lora.load_adapted(base, {"default": content}, args.ckpt), content["adapter"]
    else:
        model = lm.model_from_checkpoint(base)
    if not content:  # a resumed run has trained its new and spare rows: they stay as they are
        model.grow_vocabulary(-(-tokenizer.n_vocab // 64) * 64, bare.n_vocab)
    if lora_on and not content:
        settings = dict(targets=args.lora_targets, rank=args.lora_rank, dropout=args.lora_dropout)
        settings["alpha"] = args.lora_alpha or 2 * args.lora_rank
        if args.quantize:
            lora.quantize(model, args.quantize)
        lora.add_lora(model, **settings)
        # special tokens that the base has never seen are rows of its tables: these must learn
        own = dict(model.named_parameters())
        tables = [t for t in ("embed.weight", "head.weight") if t in own and tokenizer is not bare]
        mark = lora.fingerprint(base["model"])
        about = settings | dict(quantize=args.quantize, base=args.ckpt, base_sha256=mark)
        about |= dict(tables=tables, first_row=bare.n_vocab)
    if about:
        lora.train_new_embeddings(model, about["tables"], about["first_row"])
    model.grad_checkpoint = bool(args.grad_checkpoint)
    return model, tokenizer, about


def evaluate(objective, model, split, final):
    """`objective.evaluate` of a model in any mode; on all ranks what rank 0 has found."""
    with lm.evaluating(model), objective.runtime.autocast():
        return objective.runtime.of_first(objective.evaluate(model, split, final))


def make_task(args, objective, split, val, loader, extra):
    """The `train.Task` of an objective: batches of the training Split by a BucketLoader."""
    runtime = objective.runtime

    def get(number):
        numbers, rows = loader.get(number)
        ids, *rest = objective.batch(split, numbers, rows)
        if args.token_dropout:
            rng = np.random.default_rng((args.seed, 1, number))
            ids = drop_tokens(ids, args.token_dropout, objective.tokenizer.eos_id, rng)
        return ids, *rest

    def step_batches(step):
        first = (step * runtime.world + runtime.rank) * args.grad_accum
        return [get(first + i) for i in range(args.grad_accum)]

    def score(row):  # the least is the best
        if args.best_by == "last":
            return -row["step"]
        if args.best_by not in row:
            figures = ", ".join(row)
            raise UserError(f"--best_by {args.best_by}: the evaluation only gives {figures}")
        return row["val_loss"] if args.best_by == "val_loss" else -row[args.best_by]

    return train.Task(
        batches=step_batches,
        evaluate=lambda model, final: evaluate(objective, model, val, final),
        extra=extra,
        loss=objective.loss,
        count=objective.count,
        score=score,
    )


def write_report(objective, model, split, out):
    """Print the figures of a model in evaluation mode on a Split, and return them;
    predictions.jsonl in folder `out`."""
    scores, rows = objective.report(model, split)
    out.mkdir(parents=True, exist_ok=True)
    if rows:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (out / "predictions.jsonl").write_text(text, encoding="utf-8")
    print("  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in scores.items()))
    return scores


def shorten(text, width=160):
    """`text` on one line, at most `width` characters of it."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def evaluate_only(args):
    """--eval_only: load, measure one split, write predictions to --out."""
    if args.data is None:
        raise UserError(f"--data is missing: a file, or one of {', '.join(ROW_SETS)}")
    given = {k: v for k, v in vars(args).items() if v is not None}
    check_limits(given)
    kind, parts, _ = load_data(args.data, args.val_data, given.get("val", RECIPE["val"]))
    kind_of = choose_objective(None, kind, args.data)[1]
    settings = RECIPE | kind_of.defaults() | given
    args = argparse.Namespace(**{k: settings.get(k) for k in vars(args)})
    runtime = make_runtime(args.device, args.dtype)
    model, tokenizer, where = load(args.ckpt, args.device, runtime.dtype)
    train.settle_context(args, model)
    labels = check_parts(args, kind, parts)
    wanted = special_tokens(tokenizer, labels)
    if missing := [n for n in wanted if n not in tokenizer.special]:
        raise UserError(f"{where} does not know {missing[0]}: fine-tune it on such rows first")
    run = where.parent if where.suffix == ".pt" else where
    out = run_folder(args, None, f"{run.name}-eval", runtime)
    objective = kind_of(args, tokenizer, labels)
    objective.runtime, split = runtime, objective.make_split(parts[args.split])
    if kind == "prefer" and not lora.adapted(model):
        raise UserError(
            f"pairs are measured against the model before DPO, which {where} does not bring along: "
            f"see its metrics.jsonl, or train with --lora_rank"
        )
    objective.start(model, {args.split: split}, None)
    with lm.evaluating(model):
        write_report(objective, model, split, out)
    if kind != "prefer":
        print(f"{out}/predictions.jsonl")


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.eval_only:
        return evaluate_only(args)
    shown = args.show_mask
    args, kind_of, content, parts, hashes = resolve(args)
    labels = check_parts(args, kind_of.kind, parts)
    torch.manual_seed(args.seed)
    model, tokenizer, about = build_model(args, content, labels)
    train.settle_context(args, model)
    objective = kind_of(args, tokenizer, labels)
    split = objective.make_split(parts["train"])
    if shown:
        show_mask(split.rows, tokenizer, shown)
        return None
    objective.runtime = runtime = make_runtime(
        args.device, args.dtype, wide=model.config.d_model >= 512
    )
    args.dtype = runtime.dtype
    model.to(runtime.device)
    train.check_memory(model, args.batch_tokens, runtime)
    epoch_rows = None
    if args.augment:
        epoch_rows = augmented(parts["train"], objective, args.augment, args.seed)
    loader = BucketLoader(split.rows, args.batch_tokens, args.seed, epoch_rows)
    if args.max_steps is None and args.max_minutes is None:
        per_step = args.grad_accum * runtime.world
        args.max_steps = max(1, math.ceil(args.epochs * loader.per_epoch / per_step))
    val = objective.make_split(parts["val"])
    extra = {"tokenizer": tokenizer.spec, "data": hashes}
    extra |= {"adapter": about} if about else {}
    extra |= objective.start(model, {"train": split, "val": val}, content)
    task = make_task(args, objective, split, val, loader, extra)
    if about:
        task.weights = partial(lora.adapter_state, about=about)
    out = run_folder(args, content, f"{default_name(args.data)}-ft", runtime)
    if runtime.rank == 0:
        print("\n".join(header(model, args, objective, split, val, loader, out)))
    train.launch(model, task, args, runtime, out, content)
    if runtime.rank == 0:
        report_best(model, args, objective, {"train": split, "val": val}, parts, out)
    return None


def header(model, args, objective, split, val, loader, out):
    """The lines before the first step: what is learned, then those of any run."""
    rows, sizes = split.rows, [size_of(row) for row in split.rows]
    longest, tokens = max(length for length, _ in sizes), sum(map(math.prod, sizes))
    lines = [
        f"{out}: {args.objective} from {args.ckpt} on {args.data}: {len(split.examples):,} "
        f"{objective.what} to learn, {len(val.examples):,} to measure; {len(rows):,} rows of at "
        f"most {longest:,} tokens, {split.cut:,} of them cut; {loader.per_epoch:,} batches an epoch"
    ]
    about = tokens, args.batch_tokens, tokens / len(rows)
    lines += train.header(model, args, objective.runtime, *about)
    if split.cut > len(rows) / 10:
        lines.append("many rows are cut: a longer --context, or a base that has one, keeps more")
    return lines


def report_best(model, args, objective, splits, parts, out):
    """The closing report, with the best weights of the run, on --split."""
    best = lm.load_checkpoint(out / "best.pt")
    if "adapter" in best:
        lora.load_adapter(model, best)
    else:
        lm.load_weights(model, best["model"])
    # pairs have none but the training and validation rows, whose reference is known
    split = splits.get(args.split) or objective.make_split(parts[args.split])
    print(f"{out}/best.pt, step {best['step']}, on {args.split}:")
    with lm.evaluating(model):
        scores = write_report(objective, model, split, out)
    (out / "scores.json").write_text(json.dumps({args.split: scores}), encoding="utf-8")


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


# fmt: off (one line a flag)
def build_parser():
    p = Parser(
        description="Fine-tune a checkpoint. Defaults are the recipe's (finetune.RECIPE), or with "
        "--resume the run's own.")
    add = p.add_argument_group("the run").add_argument
    add("--ckpt", help=f"the model to start from: {lm.WHAT_CKPT} (default: the newest run)")
    add("--data", help=f"a .json or .jsonl file, .gz too, or one of {', '.join(ROW_SETS)}")
    add("--val_data", help="rows to measure on (default: the set's own, or --val)")
    add("--val", type=float, help="else the share of conversations held out (default 0.1)")
    add("--objective", choices=tuple(OBJECTIVES), help="default: what the rows suit")
    add("--out", help="folder of the run (default: out/DATA-ft, or with --eval_only out/CKPT-eval, "
        "numbered if taken)")
    train.add_machine(add)
    add("--eval_only", action="store_true", default=None, help="measure --ckpt, train nothing")
    add("--split", help="to report on at the end: val (default; dev), test, train")
    figures = dict.fromkeys(c.figure for classes in OBJECTIVES.values() for c in classes)
    add("--best_by", choices=("val_loss", *figures, "last"),
        help="which evaluation makes best.pt (default val_loss; accuracy for labels)")
    add("--eval_rows", type=int,
        help="answers to generate at an evaluation, 0 is none (default 64; the last one: all)")
    add("--show_mask", type=int, metavar="N", help="print N rows token by token, train nothing")
    add = p.add_argument_group("rows").add_argument
    add("--loss_on", choices=("assistant", "call", "all"),
        help="learn the assistant's turns (default), its tool calls only, or every token")
    add("--augment", type=float, help="chance that a called value becomes another everywhere (0)")
    add("--token_dropout", type=float, help="chance that a token is hidden from the model (0)")
    add("--dropout", type=float, help="of the model (default: the checkpoint's)")
    add("--batch_tokens", type=int, help="tokens a micro-batch at most, padding included (4096)")
    add("--context", type=int, help="rows are cut to it (default and most: the checkpoint's)")
    add = p.add_argument_group("few parameters, little memory").add_argument
    add("--lora_rank", type=int, help="adapters of this rank, all else frozen (default 0: none)")
    add("--lora_alpha", type=float, help="adapters count alpha / rank times (default 2 x rank)")
    add("--lora_dropout", type=float, help="in front of the adapters (default 0)")
    add("--lora_targets", help="attention, mlp, all (default), or names of layers with commas")
    add("--quantize", choices=("int8", "nf4"), help="the frozen base, with --lora_rank")
    add = p.add_argument_group("objectives").add_argument
    add("--teacher", help="checkpoint that distill learns from")
    own = {k: v for classes in OBJECTIVES.values() for c in classes for k, v in c.settings.items()}
    for name, (value, text) in own.items():
        add(f"--{name}", type=type(value), help=f"{text} (default {value:g})")
    add = train.add_optimization(p)
    add("--epochs", type=float, help="passes over the rows, without the two below (default 3)")
    add("--max_steps", type=int, help="instead of --epochs")
    add("--max_minutes", type=float, help="of training, evaluation not counted")
    return p


if __name__ == "__main__":
    run_cli(main)
