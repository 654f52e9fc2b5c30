"""Fine-tune: from a model that completes text to one that answers.

    python finetune.py --ckpt out/hotel --data hotel            a bot that calls a search tool
    python finetune.py --data sentiment                         label film reviews
    python finetune.py --data my_chats.jsonl --lora_rank 8      a few parameters only
    python finetune.py --data pairs.json                        preference pairs: DPO
    python finetune.py --data hotel --objective grpo --reward slots   drawn answers, rewarded
    python finetune.py --data my_chats.jsonl --show_mask 2      what is learned, token by token

writes a run like train.py's, by the same loop (train.fit), and predictions.jsonl. What the rows are
is recognised from their shape: chats (Alpaca, ShareGPT, OpenAI messages, hotel dialogues), labelled
texts, preference pairs.

The chapters: the recipe, what is minimised, what is measured, objectives, rewards, the model and
its run, the command line. Rows of any shape: data/rows.py; token ids in batches: data/batches.py.
"""

import argparse
import contextlib
import io
import json
import math
import random
import signal
import sys
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial

if __name__ == "__main__":  # no traceback for Ctrl-C during the slow imports; see `run_cli`
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import lora
import model as lm
import train
from data.batches import (
    BucketLoader,
    Prompt,
    Row,
    Turn,
    bucket,
    chat_rows,
    drop_tokens,
    label_row,
    pad,
    preference_rows,
    reward_row,
    row_size,
    show_mask,
)
from data.chat import (
    CHAT_TOKENS,
    THINK,
    get_template,
    label_token,
    labels_of,
    message_text,
)
from data.cli import Parser, UserError, check_limits, run_cli
from data.costs import check_memory
from data.files import write_json
from data.machine import DTYPES, make_runtime
from data.reply import parse
from data.rewards import REWARDS, load_reward, rate
from data.row_files import ROW_SUFFIXES
from data.rows import as_chat, first_words, load_data, report_bad
from data.runner import cut_like, launch, place
from data.runs import newest_run, resumed_settings, run_folder
from data.scores import chat_scores, confusion, macro_f1
from data.sources import ROW_SETS, SOURCES
from data.tokenizer import Tokenizer
from prepare_data import default_name
from sample import Engine, allowed_ids, classify, load

# --------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------

# Added to train.RECIPE. A model has something to lose here: lower rates than from nothing.
RECIPE = train.RECIPE | train.optimizer_rates() | dict(
    objective="auto", best_by="val_loss", split="val", val=0.1, epochs=3.0, batch_tokens=4096,
    loss_on="assistant", augment=0.0, token_dropout=0.0, eval_every=100, eval_rows=64,
    lr=1e-3, embed_lr=3e-3, head_lr=3e-3, muon_lr=0.01, weight_decay=0.0, warmup_steps=20,
    lora_rank=0, lora_alpha=None, lora_dropout=0.0, lora_targets="all",  # alpha: twice the rank
)  # fmt: skip

# Tables are frozen under LoRA unless the base lacks special tokens.
LORA_RECIPE = dict(lr=3e-3)

# --------------------------------------------------------------------------------------------
# What is minimised
# --------------------------------------------------------------------------------------------


def dpo_margin(model, ids, targets, reference):
    """By how much more than the reference does `model` like each answer? (P, 2): log probabilities
    of chosen and rejected, less the reference's, for batches as `DPO.batch` makes them."""
    logps = model(ids, targets, reduction="none").sum(1)  # (2 P,)
    return torch.stack(logps.chunk(2), dim=1) - reference


def preference_loss(rewards):
    """-log sigmoid(reward of chosen - reward of rejected), summed over pairs, of rewards (P, 2).
    Bradley and Terry 1952. With beta times `dpo_margin` for a reward: DPO, Rafailov et al. 2023,
    equation 7."""
    chosen, rejected = rewards.unbind(1)
    return -F.logsigmoid(chosen - rejected).sum()


def grpo_loss(logps, old, reference, advantage, chosen, clip, kl):
    """Group-relative policy optimisation: a token counts by the advantage of its answer,

        -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) + kl (q - log q - 1)

    summed over the ids that were drawn. ratio is the probability of the id over `old`, that under
    which it was drawn; q the reference's over the model's: the mean of q - log q - 1 is their KL
    divergence, and no term of it is negative (Schulman 2020). Shao et al. 2024, equation 3, less
    its division by length and by standard deviation (Liu et al. 2025).

    logps, old, reference: log probabilities (N, T); advantage (N, 1); chosen (N, T) bools: drawn
    ids. Returns (loss, share of ids whose ratio is clipped, mean of the KL term).
    """
    ratio, log_q = (logps - old).exp(), reference - logps
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    divergence = log_q.expm1() - log_q
    clipped = gain < ratio * advantage
    loss = (kl * divergence - gain)[chosen].sum()
    return loss, clipped[chosen].float().mean().item(), divergence[chosen].mean().item()


def distill_loss(model, ids, targets, teacher, share, temperature):
    """share * cross-entropy + (1 - share) * T^2 * KL(teacher || model), both softened by T, summed
    over the targets. Hinton et al. 2015, section 2."""
    keep = targets != -100
    logits = model(ids, targets, reduction="logits").float()  # (N, V)
    with torch.no_grad():
        goal = teacher(ids, targets, reduction="logits").float()
    V, T = min(logits.shape[1], goal.shape[1]), temperature  # spare rows may differ
    ours, theirs = (x[:, :V].div(T).log_softmax(-1) for x in (logits, goal))
    kl = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return share * F.cross_entropy(logits, targets[keep], reduction="sum") + (1 - share) * T**2 * kl


# --------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------


def longest_answer(context):
    """How many ids an answer has at most."""
    return min(160, context // 2)


def answer_jobs(examples, limit=None, calls_only=False):
    """The Turns that are to be answered in chats, or `limit` of them evenly spread."""
    jobs = [
        Turn(e["messages"][:i], m, e.get("tools"))
        for e in examples
        for i, m in enumerate(e["messages"])
        if m["role"] == "assistant" and i and (m.get("tool_calls") or not calls_only)
    ]
    if not limit or limit >= len(jobs):
        return jobs
    return [jobs[i * len(jobs) // limit] for i in range(limit)]


def write(model, tokenizer, prompts, slots=48, seeds=None, **settings):
    """The turn that the model writes after each of the prompts, as lists of ids; prompt i draws
    with seeds[i]. Texts that end make room for the next ones."""
    template, allowed = get_template(tokenizer), allowed_ids(model, tokenizer, chat=True)
    max_tokens = longest_answer(model.config.context)
    said, waiting, writing = [[] for _ in prompts], deque(range(len(prompts))), {}
    engine = Engine(model, min(slots, len(prompts)), 256)
    while waiting or writing:
        while waiting and engine.busy < len(engine.slots):
            i = waiting.popleft()
            how = settings | {"seed": seeds[i]} if seeds else settings
            writing[engine.add(prompts[i], allowed=allowed, **how)] = i
        for slot, i in engine.step().items():
            ids = said[writing[slot]]
            ids.append(i)
            if i in template.ends or len(ids) == max_tokens:
                engine.remove(slot)
                del writing[slot]
    return said


def answer(model, tokenizer, jobs):
    """The model's greedy turn for each of `answer_jobs`, in their order."""
    room = model.config.context - longest_answer(model.config.context)
    template = get_template(tokenizer)
    prompts = [template.fit_prompt(job.messages, job.tools, room) for job in jobs]
    ids = write(model, tokenizer, prompts, temperature=0.0)
    return [parse(said, template) for said in ids]


# --------------------------------------------------------------------------------------------
# Objectives: what is learned from rows, and how that is measured
# --------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Examples, what an objective made of them, and how many of these rows it had to cut."""

    examples: list
    rows: list
    cut: int = 0
    prompts: list = field(default_factory=list)  # what GRPO learns from, see `GRPO.make_split`
    reference: torch.Tensor | None = None  # what DPO starts from, see `DPO.start`


class SFT:
    """Chats: the assistant's words are learned. The other objectives change what they must.

    To add an objective: a class like these and its name in OBJECTIVES. `args`, `tokenizer`,
    `runtime` (a Runtime, from `start` on) and `labels` are there for it.
    """

    kinds, what, figure = ("chat",), "conversations", "slot_f1"  # figure: what --best_by may name
    curves, unit = train.Task.curves, train.Task.unit  # of loss.svg
    recipe = {}  # what differs from RECIPE
    settings = {}  # flags of its own: {name: (default, what --help says)}

    @classmethod
    def defaults(cls):
        """What differs from RECIPE, and what is missing there."""
        return {name: value for name, (value, _) in cls.settings.items()} | cls.recipe

    @staticmethod
    def special_tokens(tokenizer, labels):
        """The special tokens that it needs: those of our chat template, if the tokenizer brings
        none."""
        return list(CHAT_TOKENS) if get_template(tokenizer) is None else []

    def __init__(self, args, tokenizer, labels=()):
        self.args, self.tokenizer, self.labels, self.runtime = args, tokenizer, labels, None

    def rows(self, example):
        """([Row or tuple of Rows], whether one was too long) of an example."""
        return chat_rows(example, self.tokenizer, self.args.context, self.args.loss_on)

    def make_split(self, examples):
        """The Split of examples. Rows without a target, which cannot be learned, are left out, and
        those that the chat template refuses."""
        split, bad = Split([], []), []
        for example in examples:
            try:
                rows, cut = self.rows(example)
            except ValueError as e:
                bad.append(f"{shorten(first_words(example), 60)!r}: {e}")
                continue
            split.examples.append(example)
            split.cut += cut
            for row in rows:
                if all(any(r.mask[1:]) for r in (row if isinstance(row, tuple) else (row,))):
                    split.rows.append(row)
        if bad:
            report_bad(bad, len(examples), self.args.data)
        told = any("tools" in e for e in split.examples)
        if told and not get_template(self.tokenizer).supports_tools:
            print("[the chat template has no place for tools: they are left out]", file=sys.stderr)
        if not split.rows:
            loss_on = self.args.loss_on
            raise UserError(f"no row has a target for --loss_on {loss_on}: nothing to learn")
        return split

    def start(self, model, splits, saved):
        """Called before the first step with {name: Split}, and the content of the last.pt to resume
        or None. Returns what checkpoints keep beside the rest."""
        return {}

    def loader_rows(self, split):
        """What a BucketLoader gives to `batch`: rows."""
        return split.rows

    def batch(self, split, numbers, rows, number=0):
        """The tensors of batch `number` of the run: `rows`, with these numbers in the Split."""
        ids, targets = pad(rows)
        return ids, targets, (targets.flatten() != -100).nonzero()[:, 0]

    def loss(self, model, ids, targets, places):
        """The summed loss of a batch."""
        return model(ids, targets, places=places)

    def count(self, ids, targets, places):
        """What the sum is divided by, in the end."""
        return len(places)

    def evaluate(self, model, split, final=True):
        """Loss a target, and how the answers to some of the questions score, which only rank 0
        writes; `report` answers them all in the end."""
        loss, count = 0.0, 0
        batches = bucket(range(len(split.rows)), split.rows, self.args.batch_tokens)
        for numbers, counts in self.runtime.share(batches):
            batch = self.runtime.upload(pad([split.rows[i] for i in numbers]))
            loss += counts * float(model(*batch))
            count += counts * int((batch[1] != -100).sum())
        loss, count = self.runtime.total(loss, count)
        alone = self.runtime.rank > 0 and not self.runtime.sharded
        if final or not self.args.eval_rows or alone:
            return {"val_loss": loss / count}
        jobs = self.jobs(split, self.args.eval_rows)
        return {"val_loss": loss / count} | self.scores(jobs, answer(model, self.tokenizer, jobs))

    def jobs(self, split, limit=None):
        """The `answer_jobs` of a Split: of the turns that are learned."""
        return answer_jobs(split.examples, limit, self.args.loss_on == "call")

    def scores(self, jobs, turns):
        """The figures of answers to jobs, and what the data set adds to them."""
        source = SOURCES.get(self.args.data)
        added = source.scores(jobs, turns) if source and source.scores else {}
        return chat_scores(jobs, turns) | added

    def report(self, model, split):
        """(figures over all of a Split, rows for predictions.jsonl), a few answers printed."""
        jobs = self.jobs(split)
        turns, rows = answer(model, self.tokenizer, jobs), []
        for job, got in zip(jobs, turns):
            asked = message_text(job.messages[-1])
            rows.append({"prompt": asked, "reference": job.wanted, "prediction": got})
        for row in rows[:: max(1, len(rows) // 4)][:4]:
            print(f"  asked      {shorten(row['prompt'])}")
            print(f"  reference  {shorten(message_text(row['reference']))}")
            print(f"  answered   {shorten(message_text(row['prediction']))}\n")
        return self.scores(jobs, turns), rows

    def metrics(self):
        """What metrics.jsonl has of the steps since the last call beside loss and rates."""
        return {}


class Classify(SFT):
    """Labelled texts: a token for the label after the end of the text."""

    kinds, what, figure = ("label",), "labelled texts", "accuracy"
    recipe = dict(best_by="accuracy")  # its loss turns up while it still gets better

    @staticmethod
    def special_tokens(tokenizer, labels):
        """One a label."""
        return [label_token(name) for name in labels]

    def rows(self, example):
        """([Row], whether it was too long) of a text and its label."""
        context, loss_on = self.args.context, self.args.loss_on
        row, cut = label_row(
            example["text"], example["label"], self.tokenizer, context, loss_on
        )
        return [row], cut

    def logps(self, model, split):
        """(log probabilities of the labels (N, L), the right ones (N,))."""
        t, context = self.tokenizer, model.config.context
        prompts = [label_row(e["text"], None, t, context)[0].ids for e in split.examples]
        goals = [t.special[label_token(name)] for name in self.labels]
        wanted = torch.tensor([self.labels.index(e["label"]) for e in split.examples])
        return classify(model, prompts, goals), wanted

    def label_scores(self, logps, wanted):
        """Loss and accuracy over the label tokens alone, F1, and the confusion matrix."""
        table = confusion(logps.argmax(1).numpy(), wanted.numpy(), len(self.labels))
        accuracy = float((logps.argmax(1) == wanted).float().mean())
        loss = float(F.nll_loss(logps, wanted))
        return {"val_loss": loss, "accuracy": accuracy, "f1": macro_f1(table)}, table

    def evaluate(self, model, split, final=True):
        """As `label_scores`."""
        return self.label_scores(*self.logps(model, split))[0]

    def report(self, model, split):
        """(figures, rows for predictions.jsonl); the confusion matrix is printed."""
        logps, wanted = self.logps(model, split)
        scores, table = self.label_scores(logps, wanted)
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

    kinds, what, figure = ("prefer",), "preference pairs", "reward_accuracy"
    recipe = dict(lr=1e-4, embed_lr=1e-4, head_lr=1e-4, epochs=1.0)
    settings = {"dpo_beta": (0.1, "how tightly DPO holds on to the reference")}

    def rows(self, example):
        """([(chosen Row, rejected Row)], whether one was too long) of a pair."""
        pair, cut = preference_rows(example, self.tokenizer, self.args.context)
        return [pair], cut

    def start(self, model, splits, saved):
        """The log probabilities of all answers under the reference, computed once."""
        known = saved and saved["reference"]
        if not known:
            with lm.evaluating(model), self.runtime.autocast(), lora.disable_adapter(model):
                logps = partial(dpo_margin, model)  # no split has a reference yet
                known = {name: self.over_pairs(split, logps) for name, split in splits.items()}
        for name, split in splits.items():
            split.reference = known[name]
        return {"reference": known}

    def batch(self, split, numbers, rows, number=0):
        """(ids, targets, reference): the chosen rows, then the rejected ones, and (P, 2) log
        probabilities under the reference model."""
        reference = split.reference
        known = torch.zeros(len(rows), 2) if reference is None else reference[numbers]
        return *pad([chosen for chosen, _ in rows] + [rejected for _, rejected in rows]), known

    def rewards(self, model, ids, targets, reference):
        """(P, 2): beta times what the model gives to chosen and rejected more than before."""
        return self.args.dpo_beta * dpo_margin(model, ids, targets, reference)

    def loss(self, model, ids, targets, reference):
        """`preference_loss` of a batch."""
        return preference_loss(self.rewards(model, ids, targets, reference))

    def count(self, ids, targets, reference):
        """Pairs."""
        return len(reference)

    def over_pairs(self, split, measure):
        """Apply measure(ids, targets, reference) -> (P, 2) to all pairs, in batches: (N, 2)."""
        out = torch.zeros(len(split.rows), 2)
        for numbers in bucket(range(len(split.rows)), split.rows, self.args.batch_tokens):
            batch = self.batch(split, numbers, [split.rows[i] for i in numbers])
            out[numbers] = measure(*(t.to(self.runtime.device) for t in batch)).cpu()
        return out

    def evaluate(self, model, split, final=True):
        """The loss; rewards of chosen and rejected answers, how often the first is the larger, and
        by how much."""
        rewards = self.over_pairs(split, partial(self.rewards, model))
        good, bad = rewards.unbind(1)
        return {
            "val_loss": float(preference_loss(rewards)) / len(rewards),
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

    def loss(self, model, ids, targets, places):
        """`distill_loss` of a batch."""
        share, temperature = self.args.distill_lambda, self.args.distill_temperature
        return distill_loss(model, ids, targets, self.teacher, share, temperature)


class DistillLabels(Distill, Classify):
    """The same for labelled texts."""


# --------------------------------------------------------------------------------------------
# Rewards: from choices to a number, and from numbers to better answers
# --------------------------------------------------------------------------------------------

REWARD_TOKEN = "<|reward|>"  # its logit after an answer is the answer's reward


class RewardModel(DPO):
    """Preference pairs: a scalar head learns to give the chosen answer more than the rejected one
    (Ouyang et al. 2022, equation 1). The head is that of one more token."""

    settings = {}

    @staticmethod
    def special_tokens(tokenizer, labels):
        """The special tokens of our chat template if needed, and REWARD_TOKEN."""
        return [*SFT.special_tokens(tokenizer, labels), REWARD_TOKEN]

    def rows(self, example):
        """([(chosen Row, rejected Row)], whether one was too long) of a pair."""
        pair, cut = preference_rows(example, self.tokenizer, self.args.context - 1)
        token = self.tokenizer.special[REWARD_TOKEN]
        return [tuple(reward_row(row, token) for row in pair)], cut

    def start(self, model, splits, saved):
        """There is no reference."""
        return {}

    def rewards(self, model, ids, targets, reference):
        """(P, 2): the rewards of chosen and rejected."""
        token = self.tokenizer.special[REWARD_TOKEN]
        logits = model(ids, targets, reduction="logits")[:, token].float()
        return torch.stack(logits.chunk(2), dim=1)


def load_rewards(source, device):
    """The function of --reward, from a list of (messages, answer, wanted) to a list of floats: that
    of `load_reward`, or a reward model's."""
    if all(name in REWARDS or name.endswith(".py") for name in source.split(",")):
        reward = load_reward(source)
        return lambda answers: [rate(reward, *a) for a in answers]
    try:
        model, tokenizer, where = load(source, device, "fp32")
    except UserError as e:
        raise UserError(f"--reward {source} is none of {', '.join(REWARDS)}: {e}") from e
    if REWARD_TOKEN not in tokenizer.special:
        raise UserError(f"{where} is no reward model: --objective reward makes one")
    token, context = tokenizer.special[REWARD_TOKEN], model.config.context
    device = model.head.weight.device

    @torch.no_grad()
    def rewards(answers):
        talks = [({"messages": [*m, a]}, len(m)) for m, a, _ in answers]
        rows = [chat_rows(talk, tokenizer, context - 1, first=n)[0][-1] for talk, n in talks]
        rows, found = [reward_row(row, token) for row in rows], torch.zeros(len(rows))
        for numbers in bucket(range(len(rows)), rows, 4096):
            ids, targets = (t.to(device) for t in pad([rows[i] for i in numbers]))
            with torch.autocast(device.type, enabled=False):
                found[numbers] = model(ids, targets, reduction="logits")[:, token].cpu()
        return found.tolist()

    return rewards


class SharedPrompt(lm.KVCache):
    """Keys and values of a prompt, with their gradients, for all rows that go on from it."""

    def __init__(self, model):
        super().__init__(model, batch=0)
        self.ids, self.lengths = self.ids.new_empty(1, 0), torch.zeros(1, dtype=torch.long)
        self.kept = {}

    def begin(self, ids):
        """As `KVCache.begin`."""
        start = self.ids.shape[1]
        self.ids = torch.cat([self.ids.expand(len(ids), -1), ids], dim=1)
        return lm.Step(slice(start, start + ids.shape[1]))

    def update(self, i, step, *new):
        """As `KVCache.update`."""
        if not step.positions.start:
            self.kept[i] = new
            return new
        old = (t.expand(len(new[0]), -1, -1, -1) for t in self.kept[i])
        return [torch.cat(pair, dim=2) for pair in zip(old, new)]

    def past(self, step):
        """As `KVCache.past`."""
        return self.ids


def group_logps(runner, model, ids, targets, lengths, allowed=None):
    """Log probabilities (N, T) of targets among the `allowed` ids, answers to prompts of these
    lengths, in batches as `GRPO.batch` makes them: each prompt is computed once. `runner`: see
    train.make_runner."""
    found = []
    for row, goal, n in zip(ids, targets.chunk(len(ids)), lengths.tolist()):
        shared, prompt, T = SharedPrompt(model), row[None, :n], most_targets(goal)
        runner(prompt, torch.full_like(prompt, -100), shared, reduction="none")
        answers = row[n : n + len(goal) * T].view(-1, T)
        goals = goal[:, :T].contiguous()
        logps = runner(answers, goals, shared, reduction="none", allowed=allowed)
        found.append(F.pad(logps, (0, goal.shape[1] - T)))
    return torch.cat(found)


def most_targets(targets):
    """How many targets the row with the most has."""
    return int((targets != -100).sum(1).max())


class GRPO(SFT):
    """Answers are drawn, each gets a reward, and becomes likelier or less likely by how much that
    is above the mean of its group, the answers to the same prompt (Shao et al. 2024)."""

    kinds, what, figure = ("chat", "prefer", "label"), "examples", "val_reward"
    recipe = dict(best_by="val_reward", lr=1e-4, embed_lr=1e-4, head_lr=1e-4, muon_lr=1e-3)
    recipe |= dict(epochs=1.0, batch_tokens=8192, grad_accum=4, eval_every=20, log_every=5)
    curves = (("drawn", "reward"), ("greedy, validation", "val_reward"))
    unit = "reward"
    settings = {
        "samples": (8, "answers drawn to each prompt"),
        "updates": (1, "optimizer steps with the same answers"),
        "clip": (0.2, "how far from 1 a ratio of probabilities may move them"),
        "kl": (0.0, "weight of the divergence from the model at the start"),
    }

    def __init__(self, *args):
        super().__init__(*args)
        self.rewards = load_rewards(self.args.reward, self.args.device)
        self.seen = defaultdict(list)  # figures of each micro-batch since the last line
        self.drawn = {}  # {number: batch}: what later updates learn from once more

    def make_split(self, examples):
        """The Split of examples, all of them chats now, with the Prompts that the reward is for."""
        split, context = super().make_split([as_chat(e) for e in examples]), self.args.context
        jobs = self.jobs(split)
        rewards = self.rewards([(job.messages, job.wanted, job.wanted) for job in jobs])
        template = get_template(self.tokenizer)
        for job, reward in zip(jobs, rewards):
            if reward is not None:
                most = context - longest_answer(context)
                ids = template.fit_prompt(job.messages, job.tools, most)
                room = self.args.samples * longest_answer(context)
                split.prompts.append(Prompt(ids, [0] * len(ids), job, room))
        if not split.prompts:
            raise UserError(f"--reward {self.args.reward} is None for all of these turns")
        return split

    def start(self, model, splits, saved):
        """Load the reference: the weights at the start; of adapters it is the base itself. What was
        drawn for the updates to come is rank 0's: other ranks draw anew after a resume."""
        self.model, self.reference = model, None
        # Under the probabilities of all ids, what is never drawn is never held back, and grows.
        self.allowed = allowed_ids(model, self.tokenizer, chat=True)
        if self.args.kl and not lora.adapted(model):
            base = lm.load_checkpoint(self.args.ckpt)
            self.reference, known = lm.model_from_checkpoint(base), Tokenizer(base["tokenizer"])
            self.reference.grow_vocabulary(model.config.vocab_size, known.n_vocab)
            self.reference.to(self.runtime.device)
        self.drawn = saved["drawn"] if saved else {}
        return {"drawn": self.drawn}

    def loader_rows(self, split):
        """The prompts."""
        return split.prompts

    def batch(self, split, numbers, rows, number=0):
        """Draw answers to the prompts in `rows`. Of groups whose rewards differ, others teach
        nothing: (ids, a row a group: the prompt but for its last id, then the answers, each after
        that id and as long as the longest; targets (N, T), a row an answer; lengths of the prompts;
        advantage (N, 1); log probabilities when they were drawn and of the reference (N, T)), and
        how many were drawn."""
        a = self.args
        if number in self.drawn:
            return self.drawn[number]
        prompts = [p for p in rows for _ in range(a.samples)]
        seeds = np.random.default_rng((a.seed, 2, number)).integers(2**62, size=len(prompts))
        with lm.evaluating(self.model) as model, self.runtime.autocast():
            ids = write(model, self.tokenizer, [p.ids for p in prompts], seeds=seeds.tolist())
        template, jobs = get_template(self.tokenizer), [p.turn for p in prompts]
        turns = [parse(said, template) for said in ids]
        rewards = self.rewards([(j.messages, turn, j.wanted) for j, turn in zip(jobs, turns)])
        if None in rewards:
            asked = message_text(jobs[rewards.index(None)].messages[-1])
            raise UserError(f"the reward of an answer to {asked!r:.80} is None")
        rewards = torch.tensor(rewards).view(-1, a.samples)  # (groups, samples)
        spread = rewards.std(1)
        self.seen["reward"] += rewards.flatten().tolist()
        self.seen["reward_std"] += spread.tolist()
        self.seen["equal_groups"] += (spread < 1e-6).tolist()
        self.seen["answer_tokens"] += map(len, ids)
        keep = (spread >= 1e-6) | bool(a.kl)
        keep[0] |= not keep.any()  # a batch has one group at least
        advantage = (rewards - rewards.mean(1, keepdim=True))[keep].view(-1, 1)
        answers = [Row([p.ids[-1], *new], [0] + [1] * len(new)) for p, new in zip(prompts, ids)]
        groups = [t.view(len(rows), a.samples, -1)[keep] for t in pad(answers)]
        heads = [torch.tensor(p.ids[:-1]) for p, kept in zip(rows, keep) if kept]
        ends = [i[:, : most_targets(t)].flatten() for i, t in zip(*groups)]
        texts = [torch.cat(both) for both in zip(heads, ends)]
        ids, targets = nn.utils.rnn.pad_sequence(texts, batch_first=True), groups[1].flatten(0, 1)
        lengths = torch.tensor([len(head) for head in heads])
        known = self.known_logps(ids, targets, lengths)
        batch = ids, targets, lengths, advantage, *known, torch.tensor(len(prompts))
        if a.updates > 1:
            if number % a.grad_accum == 0:  # the first of new ones
                self.drawn.clear()
            self.drawn[number] = batch
        return batch

    def known_logps(self, *batch):
        """`group_logps` under the model as it is, and under the reference; zeros where they are not
        needed."""
        batch, none = [t.to(self.runtime.device) for t in batch], torch.zeros(batch[1].shape)

        def logps(model):
            with lm.evaluating(model), self.runtime.autocast():
                return group_logps(model, model, *batch, self.allowed).cpu()

        old = logps(self.model) if self.args.updates > 1 else none
        if not self.args.kl:
            return old, none
        if self.reference:
            return old, logps(self.reference)
        with lora.disable_adapter(self.model):
            return old, logps(self.model)

    def loss(self, model, ids, targets, lengths, advantage, old, reference, drawn):
        """`grpo_loss` of a batch."""
        a, chosen = self.args, targets != -100
        logps = group_logps(model, self.model, ids, targets, lengths, self.allowed)
        old = old if a.updates > 1 else logps.detach()
        reference = reference if a.kl else logps.detach()
        loss, clipped, kl = grpo_loss(logps, old, reference, advantage, chosen, a.clip, a.kl)
        self.seen["clipped"].append(clipped)
        self.seen["kl"].append(kl)
        self.seen["entropy"].append(-float(logps.detach()[chosen].mean()))
        return loss

    def count(self, ids, targets, lengths, advantage, old, reference, drawn):
        """Answers."""
        return int(drawn)

    def scores(self, jobs, turns):
        """The scores of a chat, and the mean reward of the turns that have one."""
        answers = [(job.messages, turn, job.wanted) for job, turn in zip(jobs, turns)]
        rewards = [r for r in self.rewards(answers) if r is not None]
        mean = {"val_reward": sum(rewards) / len(rewards)} if rewards else {}
        return mean | super().scores(jobs, turns)

    def metrics(self):
        """Means of what was seen: the reward of drawn answers, its standard deviation in a group,
        the share of groups in which all are equal, the length of answers; of the ids learned from
        the share of clipped ratios, the divergence from the reference, and the mean of -log p."""
        names = ["reward", "reward_std", "equal_groups", "answer_tokens"]
        names += ["clipped", "kl", "entropy"]
        flat = self.runtime.total(*(f(self.seen[k]) for f in (sum, len) for k in names))
        self.seen.clear()
        return {k: s / n for k, s, n in zip(names, flat, flat[len(names) :]) if n}


# The first class of a name that takes rows of the data's kind is used; without --objective the
# first of all.
OBJECTIVES = {
    "sft": [SFT],
    "classify": [Classify],
    "dpo": [DPO],
    "distill": [Distill, DistillLabels],
    "reward": [RewardModel],
    "grpo": [GRPO],
}
OWN_FLAGS = {k: v for some in OBJECTIVES.values() for c in some for k, v in c.settings.items()}


# --------------------------------------------------------------------------------------------
# The model and its run
# --------------------------------------------------------------------------------------------


def resolve(args):
    """Fill in what the user left out; reads the data, whose kind decides on the objective. Returns
    (args, the objective's class, content of the last.pt to resume or None, {split: examples},
    {split: sha256})."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    fixed = {"ckpt", "objective", "optimizer", "seed", "loss_on", "teacher", "quantize"}
    fixed |= {"val", "context", "batch_tokens", "augment", "best_by"}  # what they decided stands
    fixed |= {"reward", "samples", "updates", "kl"}
    fixed |= {k for k in vars(args) if k.startswith("lora_")}
    content, settings = None, {}
    if args.resume is not None:
        settings, content = resumed_settings(args, given, fixed, lm.load_checkpoint)
    elif "data" not in given:
        raise UserError(f"--data is missing: a file, or one of {', '.join(ROW_SETS)}")
    else:
        settings = given if "ckpt" in given else given | {"ckpt": str(newest_run())}
    val = settings.get("val", RECIPE["val"])
    how = {k: settings.get(k) for k in ("rows", "max_rows", "encoding")}
    kind, parts, hashes = load_data(settings["data"], settings.get("val_data"), val, **how)
    if content is not None and content["data"] != hashes:
        raise UserError(f"{settings['data']} is not the data that the run began with")
    name, objective = choose_objective(settings.get("objective"), kind, settings["data"])
    if content is None:
        mode = LORA_RECIPE if given.get("lora_rank") else {}
        settings = RECIPE | mode | objective.defaults() | settings | {"objective": name}
    args = argparse.Namespace(**{k: settings.get(k) for k in vars(args)})
    check_limits(settings)
    check_settings(args, objective, kind, given)
    return args, objective, content, parts, hashes


def choose_objective(name, kind, data):
    """(its name, its class) of --objective, or of what rows of that kind suit."""
    names = [name] if name else OBJECTIVES
    found = [(n, c) for n in names for c in OBJECTIVES[n] if kind in c.kinds]
    if not found:
        raise UserError(f"--objective {name} does not suit {data}, rows of {kind}")
    return found[0]


def check_settings(args, objective, kind, given):
    """UserError for settings that do not go together; `given` are those of the command line."""
    if (args.objective == "distill") != bool(args.teacher):
        raise UserError("--teacher CKPT and --objective distill belong together")
    if args.quantize and not args.lora_rank:
        raise UserError("--quantize freezes the base: add --lora_rank 8, so that something learns")
    if args.best_by not in ("val_loss", "last", objective.figure):
        raise UserError(
            f"--best_by {args.best_by} is not measured with --objective {args.objective}: "
            f"{objective.figure} is"
        )
    if args.best_by == objective.figure and "chat" in objective.kinds and not args.eval_rows:
        raise UserError(f"--best_by {args.best_by} needs --eval_rows")
    if (args.objective == "grpo") != bool(args.reward):
        names = ", ".join(REWARDS)
        raise UserError(f"--objective grpo and --reward belong together: {names}, a file, a --ckpt")
    for name in OWN_FLAGS:
        if name in given and name not in objective.settings:
            raise UserError(f"--{name} is not for --objective {args.objective}")
    if args.augment and not (args.data in SOURCES and SOURCES[args.data].augment):
        names = ", ".join(name for name, source in SOURCES.items() if source.augment)
        raise UserError(f"--augment is for --data {names}")
    if args.shard and args.objective == "grpo":
        raise UserError("--shard does not go together with --objective grpo")
    if args.token_dropout and args.objective in ("dpo", "grpo"):
        raise UserError(f"--token_dropout does not go together with --objective {args.objective}")


def check_parts(args, parts):
    """The labels of the training rows, sorted; none for other kinds. UserError if another split has
    one that these lack, there is no --split of that name, or --best_by cannot be measured."""
    args.split = "val" if args.split == "dev" else args.split
    if args.split not in parts:
        raise UserError(f"{args.data} has no split {args.split!r}; it has {', '.join(parts)}")
    calls = any(m.get("tool_calls") for e in parts["val"] for m in e.get("messages", ()))
    if args.best_by == "slot_f1" and not calls:
        raise UserError("--best_by slot_f1 is not measured on chats without calls")
    labels = sorted({e["label"] for e in parts["train"] if "label" in e})
    if strange := {e["label"] for p in parts.values() for e in p if "label" in e} - set(labels):
        raise UserError(f"label {min(strange)!r} is not among the training rows' labels")
    return labels


def special_tokens(objective, labels, parts):
    """A function of a tokenizer: the special tokens that an objective and its rows need. Those that
    enclose a thought are needed where rows have thoughts and our template writes them."""
    messages = (m for examples in parts.values() for e in examples for m in e.get("messages", ()))
    thoughts = any(m.get("reasoning_content") for m in messages)

    def needed(tokenizer):
        template, names = get_template(tokenizer), objective.special_tokens(tokenizer, labels)
        ours = template.ours if template else CHAT_TOKENS[0] in names
        return [*names, *(THINK if thoughts and ours else ())]

    return needed


def augmented(examples, objective, args):
    """A function of an epoch: its rows, as the data set's `augment` changes the examples."""
    augment = SOURCES[args.data].augment

    def epoch_rows(epoch):
        rng = random.Random(f"{args.seed} {epoch}")
        new = augment(examples, args.augment, rng)
        return objective.loader_rows(objective.make_split(new))

    return epoch_rows


def build_model(args, base, content, special_tokens, runtime):
    """(model, tokenizer, what an adapter's file says about itself or None): the model of the
    checkpoint `base` with the tokens of special_tokens(tokenizer), as `content` (of a resumed run)
    left it."""
    lora_on = args.lora_rank > 0
    if "adapter" in base:
        raise UserError(f"{args.ckpt} is an adapter: merge it first (python lora.py merge)")
    if "tokenizer" not in base:
        raise UserError(f"{args.ckpt} carries no tokenizer")
    if args.dropout is not None:
        base = base | {"config": {**base["config"], "dropout": args.dropout}}
    bare = Tokenizer(base["tokenizer"])
    tokenizer = bare.with_special(special_tokens(bare))
    about = None
    if content and lora_on:
        model, about = lora.load_adapted(base, {"default": content}, args.ckpt), content["adapter"]
    else:  # what is quantized or cut is read layer by layer
        mapped = args.quantize or args.shard
        dtype = None if mapped else torch.float32
        model = lm.model_from_checkpoint(base, dtype=dtype, where=args.ckpt)
    if not content:  # a resumed run has trained its new and spare rows: they stay as they are
        model.grow_vocabulary(lm.padded_vocab(tokenizer.n_vocab), bare.n_vocab)
    if lora_on and not content:
        settings = dict(targets=args.lora_targets, rank=args.lora_rank, dropout=args.lora_dropout)
        settings["alpha"] = args.lora_alpha or 2 * args.lora_rank
        if args.quantize:
            lora.quantize(model, args.quantize, device=runtime.device)
        # special tokens that the base has never seen are rows of its tables: these must learn
        tables = [] if tokenizer is bare else ["embed", "value_embed", "head"]
        settings["modules_to_save"] = tables
        lora.add_lora(model, **settings)
        mark = None if runtime.rank else lora.fingerprint(base["model"])  # one process reads it
        mark = runtime.of_first(mark)
        about = settings | dict(quantize=args.quantize, base=args.ckpt, base_sha256=mark)
        about |= dict(base_vocab=bare.n_vocab)
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
        ids, *rest = objective.batch(split, numbers, rows, number)
        if args.token_dropout:
            rng = np.random.default_rng((args.seed, 1, number))
            ids = drop_tokens(ids, args.token_dropout, objective.tokenizer.eos_id, rng)
        return ids, *rest

    def step_batches(step):
        draw = step // (args.updates or 1)  # the same samples for several steps
        first = (draw * runtime.world + runtime.rank) * args.grad_accum
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
        metrics=objective.metrics,
        curves=objective.curves,
        unit=objective.unit,
    )


def write_report(objective, model, split, out):
    """Print the figures of a model in evaluation mode on a Split, and return them;
    predictions.jsonl in folder `out`."""
    scores, rows = objective.report(model, split)
    out.mkdir(parents=True, exist_ok=True)
    if rows and objective.runtime.rank == 0:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (out / "predictions.jsonl").write_text(text, encoding="utf-8")
    print("  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in scores.items()))
    return scores


def shorten(text, width=160):
    """`text` on one line, at most `width` characters of it."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def evaluate_only(args):
    """--eval_only: load, measure one split, or all of a file that was named for it, write
    predictions to --out."""
    if args.data is None:
        raise UserError(f"--data is missing: a file, or one of {', '.join(ROW_SETS)}")
    given = {k: v for k, v in vars(args).items() if v is not None}
    check_limits(given)
    val, all_rows = given.get("val", RECIPE["val"]), "val" not in given
    how = args.rows, args.max_rows, args.encoding, all_rows
    kind, parts, _ = load_data(args.data, args.val_data, val, *how)
    kind_of = choose_objective(args.objective, kind, args.data)[1]
    settings = RECIPE | kind_of.defaults() | given
    args = argparse.Namespace(**{k: settings.get(k) for k in vars(args)})
    check_settings(args, kind_of, kind, given)
    runtime = make_runtime(args.device, args.dtype)
    model, tokenizer, where = load(args.ckpt, args.device, runtime.dtype)
    train.settle_context(args, model)
    labels = check_parts(args, parts)
    wanted = special_tokens(kind_of, labels, parts)(tokenizer)
    if missing := [n for n in wanted if n not in tokenizer.special]:
        raise UserError(f"{where} does not know {missing[0]}: fine-tune it on such rows first")
    all_rows = parts["val"] is parts["train"]
    labels = labels_of(tokenizer) if labels and all_rows else labels  # these rows may lack some
    run = where.parent if where.suffix == ".pt" else where
    out = run_folder(args, None, f"{run.name}-eval", runtime)
    objective = kind_of(args, tokenizer, labels)
    objective.runtime, split = runtime, objective.make_split(parts[args.split])
    if kind_of is DPO and not lora.adapted(model):
        raise UserError(
            f"pairs are measured against the model before DPO, which {where} does not bring along: "
            f"see its metrics.jsonl, or train with --lora_rank"
        )
    if isinstance(objective, DPO):
        objective.start(model, {args.split: split}, None)
    held = args.val_data if args.split == "val" else None
    of = f"{'all rows' if all_rows or held else args.split} of {held or args.data}"
    print(f"measuring {len(split.examples):,} {objective.what}: {of}")
    with lm.evaluating(model):
        write_report(objective, model, split, out)
    if (out / "predictions.jsonl").exists():
        print(f"{out}/predictions.jsonl")


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.eval_only:
        return evaluate_only(args)
    shown = args.show_mask
    args, kind_of, content, parts, hashes = resolve(args)
    labels = check_parts(args, parts)
    special = special_tokens(kind_of, labels, parts)
    base = content if content and not args.lora_rank else lm.load_checkpoint(args.ckpt)
    was, wide = (content or {}).get("device"), base["config"]["d_model"] >= 512
    runtime = make_runtime(args.device, args.dtype, wide, was)
    torch.manual_seed(args.seed)
    model, tokenizer, about = build_model(args, base, content, special, runtime)
    train.settle_context(args, model)
    objective = kind_of(args, tokenizer, labels)
    objective.runtime, split = runtime, objective.make_split(parts["train"])
    if shown:
        show_mask(split.rows, tokenizer, shown)
        return None
    args.dtype = runtime.dtype
    place(model, args, runtime)
    if about and not runtime.sharded:
        lora.hold_frozen(model, DTYPES[runtime.dtype])
    check_memory(model, args.batch_tokens, runtime)
    epoch_rows = None
    if args.augment:
        epoch_rows = augmented(parts["train"], objective, args)
    loader = BucketLoader(objective.loader_rows(split), args.batch_tokens, args.seed, epoch_rows)
    if args.max_steps is None and args.max_minutes is None:
        per_step = args.grad_accum * runtime.world
        steps = math.ceil(args.epochs * loader.per_epoch / per_step)
        args.max_steps = max(1, steps) * (args.updates or 1)
    val = objective.make_split(parts["val"])
    extra = {"tokenizer": tokenizer.spec, "data": hashes}
    extra |= {"adapter": about} if about else {}
    extra |= objective.start(model, {"train": split, "val": val}, content)
    task = make_task(args, objective, split, val, loader, extra)
    if about:
        task.weights = lora.adapter_state
    out = run_folder(args, content, f"{default_name(args.data)}-ft", runtime)
    if runtime.rank == 0:
        print("\n".join(header(model, args, objective, split, val, loader, out)))

    def report(result):
        with contextlib.redirect_stdout(sys.stdout if runtime.rank == 0 else io.StringIO()):
            report_best(model, args, objective, {"train": split, "val": val}, parts, out)

    fit = partial(train.fit, model, task, args, runtime, out, content)
    launch(fit, report, runtime, out)
    return None


def header(model, args, objective, split, val, loader, out):
    """The lines before the first step: what is learned, then those of any run."""
    rows = loader.rows
    sizes = [row_size(row) for row in rows]
    longest, tokens = max(length for length, _ in sizes), sum(map(math.prod, sizes))
    lines = [
        f"{out}: {args.objective} from {args.ckpt} on {args.data}: {len(split.examples):,} "
        f"{objective.what} to learn, {len(val.examples):,} to measure; {len(rows):,} rows of at "
        f"most {longest:,} tokens, {split.cut:,} of them cut; {loader.per_epoch:,} batches an epoch"
    ]
    about = tokens, args.batch_tokens, tokens / len(rows)
    lines += train.header(model, args, objective.runtime, *about)
    if split.cut > len(split.rows) / 10:
        lines.append("many rows are cut: a longer --context, or a base that has one, keeps more")
    return lines


def report_best(model, args, objective, splits, parts, out):
    """The closing report, with the best weights of the run, on --split."""
    best = lm.load_checkpoint(out / "best.pt")
    if "adapter" in best:
        lora.load_adapter(model, best)
    else:
        own = model.state_dict()
        lm.load_weights(model, {k: cut_like(v, own[k]) for k, v in best["model"].items()})
    # pairs have none but the training and validation rows, whose reference is known
    split = splits.get(args.split) or objective.make_split(parts[args.split])
    print(f"{out}/best.pt, step {best['step']}, on {args.split}:")
    with lm.evaluating(model), objective.runtime.autocast():
        scores = write_report(objective, model, split, out)
    if objective.runtime.rank == 0:
        write_json(out / "scores.json", {args.split: scores})


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
    add("--data", help=f"a {', '.join(ROW_SUFFIXES)} file, .gz too, one of {', '.join(ROW_SETS)}, "
        "or of the Hub OWNER/NAME, OWNER/NAME:CONFIG, OWNER/NAME:FILE")
    add("--val_data", help="rows to measure on (default: the set's own, or --val)")
    add("--val", type=float, help="else the share of conversations held out (default 0.1)")
    add("--objective", choices=tuple(OBJECTIVES), help="default: what the rows suit")
    add("--out", help="folder of the run (default: out/DATA-ft, or with --eval_only out/CKPT-eval, "
        "numbered if taken)")
    train.add_machine(add)
    add("--eval_only", action="store_true", default=None, help="measure --ckpt on --split, or "
        "on all of a file without --val; train nothing")
    add("--split", help="to report on at the end: val (default; dev), test, train")
    figures = dict.fromkeys(c.figure for classes in OBJECTIVES.values() for c in classes)
    add("--best_by", choices=("val_loss", *figures, "last"),
        help="which evaluation makes best.pt (default val_loss; accuracy for labels)")
    add("--eval_rows", type=int,
        help="answers to generate at an evaluation, 0 is none (default 64; the last one: all)")
    add("--show_mask", type=int, metavar="N", help="print N rows token by token, train nothing")
    add = p.add_argument_group("rows").add_argument
    add("--rows", metavar="START:STOP", help="this part of the training rows, as 1000:5001")
    add("--max_rows", type=int, help="the first rows of each split only (default: all)")
    add("--encoding", help="of the files (default: UTF-8, UTF-16 or GB18030 recognised)")
    add("--loss_on", choices=("assistant", "call", "all"),
        help="learn the assistant's turns (default), its tool calls only, or every token")
    add("--augment", type=float, help="hotel dialogues: the chance that a value is exchanged "
        "everywhere in one, and that a question is added (default 0)")
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
    add("--reward", help=f"what grpo learns from: {', '.join(REWARDS)}, a .py file with a function "
        "reward(messages, answer, wanted), or a run of --objective reward; slots,faithful is both")
    for name, (value, text) in OWN_FLAGS.items():
        add(f"--{name}", type=type(value), help=f"{text} (default {value:g})")
    add = train.add_optimization(p)
    add("--epochs", type=float, help="passes over the rows, without the two below (default 3)")
    add("--max_steps", type=int, help="instead of --epochs")
    add("--max_minutes", type=float, help="of training, evaluation not counted")
    return p


if __name__ == "__main__":
    run_cli(main)
