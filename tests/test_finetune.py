"""finetune.py before and after training: rows of every shape, masks, batches, metrics."""

import argparse
import random
import re

import pytest
import torch
from conftest import ASSISTANT, BYTE, CALL, CHAT, END, TOOL, USER, render_chat, turn
from test_finetune_runs import save_base, some_rows
from test_rows import alpaca, write

import finetune as ft
from data.batches import BucketLoader, Row, chat_rows, label_row, pad, preference_rows, show_mask
from data.cli import UserError
from data.tokenizer import label_token


def test_a_label_is_all_that_a_text_row_learns():
    names = BYTE.with_special([label_token(n) for n in ("neg", "pos")])
    row = label_row("a fine film", "pos", names, 64)
    film = [97, 32, 102, 105, 110, 101, 32, 102, 105, 108, 109]
    assert (row.ids, row.cut) == ([*film, 256, 258], False)
    assert row.mask == [0] * 12 + [1]
    assert row.targets() == [-100] * 11 + [258]
    row = label_row("a fine film", "neg", names, 5)  # the end of a text is kept
    assert (row.ids, row.cut, row.targets()) == ([*b"film", 256, 257], True, [-100] * 4 + [257])


def test_the_mask_of_a_conversation_with_a_tool_call():
    talk = [
        turn("user", "q"),
        turn("call", "f {}"),
        turn("tool", "r"),
        turn("assistant", "ok"),
        turn("user", "m"),
        turn("assistant", "yes"),
        turn("user", "bye"),  # behind the last answer there is nothing to learn
    ]
    drawn = """
        U q E A C f _ { } E T r E A o k E U m E A y e s E
        0 0 0 0 1 1 1 1 1 1 0 0 0 0 1 1 1 0 0 0 0 1 1 1 1   assistant
        0 0 0 0 1 1 1 1 1 1                                 call
    """
    tokens, *masks = drawn.strip().split("\n")
    names = {"U": USER, "A": ASSISTANT, "C": CALL, "T": TOOL, "E": END, "_": 32}
    ids = [names.get(t) or ord(t) for t in tokens.split()]
    for line in masks:
        *mask, loss_on = line.split()
        row, cut = chat_row(talk, CHAT, 99, loss_on)
        assert row.ids == ids[: len(mask)] and not cut
        assert row.mask == [int(m) for m in mask]
    row, _ = chat_row(talk, CHAT, 99)
    after_role = row.ids.index(ASSISTANT)
    assert row.targets()[after_role] == CALL  # the first token of an answer is learned
    assert row.targets()[-4:] == [*b"yes", END]


def test_show_mask_marks_what_is_learned(capsys):
    row, _ = chat_row([turn("user", "q"), turn("assistant", "好\n")], CHAT, 99)
    show_mask([row, row], CHAT, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- row 1: 9 tokens, 5 of them learned ---" and len(lines) == 10
    assert lines[4] == "    3       259 <|assistant|>" and lines[8] == "    7 *      10 \\n"
    assert [line[16:] for line in lines[5:8]] == ["", "", "好"]  # its three bytes


def test_context_cuts_the_rows_of_a_run_and_cannot_be_more_than_the_checkpoint_s(tmp_path, capsys):
    path = tmp_path / "model.pt"
    save_base(path)
    data = write(tmp_path / "x.jsonl", [{"instruction": words(60), "output": "a"}, *alpaca(3)])
    flags = ["--ckpt", str(path), "--data", str(data), "--show_mask", "4"]
    for given, longest in (([], 49), (["--context", "9"], 10)):
        ft.main([*flags, *given])
        shown = map(int, re.findall(r": (\d+) tokens", capsys.readouterr().out))
        assert max(shown) == longest
    for wrong, limit in (("1", "least 2"), ("49", "most the model's 48")):
        with pytest.raises(UserError, match=f"--context {wrong} must be at {limit}"):
            ft.main([*flags, "--context", wrong])


def chat_row(messages, *how):
    """The Row of a conversation, of which our template makes one, and whether it was cut."""
    (row,) = chat_rows({"messages": messages}, *how)
    return row, row.cut


def words(n):
    return "".join(chr(97 + i % 26) for i in range(n))


def test_the_oldest_turns_are_cut_first_and_at_their_borders():
    talk = [turn("system", "s")]
    talk += [t for i in range(4) for t in (turn("user", f"q{i}"), turn("assistant", f"a{i}"))]
    row, cut = chat_row(talk, CHAT, 34)  # 3 of system, then 4 a turn
    assert (row.ids, cut) == (render_chat(talk, CHAT)[0], False)
    row, cut = chat_row(talk, CHAT, 20)
    assert (row.ids, cut) == (render_chat([talk[0], *talk[-4:]], CHAT)[0], True)
    args = argparse.Namespace(context=20, loss_on="assistant")
    split = ft.SFT(args, CHAT).make_split([{"messages": talk}, {"messages": talk[:3]}])
    assert [row.cut for row in split.rows] == [True, False]
    long = [turn("user", words(50)), turn("assistant", "ok")]
    row, cut = chat_row(long, CHAT, 10)  # the end of a question that is too long, and the answer
    assert (row.ids, cut) == (render_chat(long, CHAT)[0][-11:], True) and row.mask[-3:] == [1] * 3
    sides = {"chosen": [turn("assistant", words(50))], "rejected": [turn("assistant", "no")]}
    good, bad = preference_rows({"messages": [turn("user", "q")]} | sides, CHAT, 10)
    assert good.cut and not bad.cut and good.mask == [0] * 4 + [1] * 7
    assert good.ids == [USER, 113, END, ASSISTANT, *words(7).encode()]
    assert bad.ids == [USER, 113, END, ASSISTANT, *b"no", END] and sum(bad.mask) == 3


def test_any_conversation_keeps_a_target_and_the_turns_before_it():
    rng = random.Random(0)
    for _ in range(600):
        roles = rng.choices(["user", "assistant", "call", "tool"], k=rng.randint(1, 7))
        roles += ["assistant"] if not {"assistant", "call"} & set(roles) else []
        roles = ["system", *roles] if rng.random() < 0.3 else roles
        talk = [turn(r, words(rng.choice((1, 3, 8, 30)))) for r in roles]
        context = rng.randint(3, 60)
        row, cut = chat_row(talk, CHAT, context)
        while roles.pop() not in ("assistant", "call"):
            talk.pop()
        first = int(talk[0]["role"] == "system")
        starts = range(first, max(first + 1, len(talk) - 1))
        tails = [render_chat(talk[:first] + talk[k:], CHAT)[0] for k in starts]
        assert len(row.ids) == len(row.mask) <= context + 1
        assert any(t != -100 for t in row.targets())
        for tail in tails:
            if len(tail) <= context + 1:
                assert row.ids == tail and cut == (tail != tails[0])
                break
        else:
            assert cut and any(row.ids == tails[-1][at : at + context + 1] for at in range(300))


def random_rows(count, longest=30, seed=0, low=2):
    rng = random.Random(seed)
    return some_rows([rng.randint(low, longest) for _ in range(count)], seed)


@pytest.mark.parametrize("pairs", [False, True])
def test_an_epoch_of_batches_holds_each_row_once_within_the_budget(pairs):
    rows = random_rows(200)
    rows = list(zip(rows[:100], rows[100:])) if pairs else rows
    batches = BucketLoader(lambda _: rows, 120, seed=5)
    epochs = []
    for epoch in range(3):
        drawn = [batches.get(epoch * batches.per_epoch + i) for i in range(batches.per_epoch)]
        assert sorted(i for chosen, _ in drawn for i in chosen) == list(range(len(rows)))
        for chosen, got in drawn:
            assert [rows[i] for i in chosen] == got
            flat = [r for pair in got for r in pair] if pairs else got
            assert pad(flat)[0].numel() <= 120
        epochs.append([chosen for chosen, _ in drawn])
    assert epochs[0] != epochs[1] != epochs[2]
    again = BucketLoader(lambda _: rows, 120, seed=5)  # in any order, as after a resume
    assert again.get(2 * batches.per_epoch + 3)[0] == epochs[2][3]
    assert again.get(1)[0] == epochs[0][1]
    assert BucketLoader(lambda _: rows, 120, seed=6).get(0)[0] != epochs[0][0]
    assert BucketLoader(lambda _: rows, 1, seed=5).per_epoch == len(rows)  # a larger row is a batch


def test_epochs_that_are_made_anew_have_as_many_batches_as_the_first():
    sizes = [30, 4, 30, 60, 15]
    epochs = [random_rows(40, longest, seed=e, low=3) for e, longest in enumerate(sizes)]
    batches = BucketLoader(epochs.__getitem__, 60, 0)
    native = [BucketLoader([rows].__getitem__, 60, 0).per_epoch for rows in epochs]
    assert native[1] < 7 < native[0] < native[3]
    for epoch, rows in enumerate(epochs):
        n = batches.per_epoch
        drawn = [batches.get(epoch * n + i) for i in range(n)]
        assert all(got == [rows[i] for i in chosen] for chosen, got in drawn)
        seen = {i for chosen, _ in drawn for i in chosen}
        assert len(seen) == 40 or native[epoch] > n
    assert batches.get(n - 1)[0] == BucketLoader(lambda _: epochs[0], 60, 0).get(n - 1)[0]


def test_padding_adds_no_targets():
    rows = [Row([1, 2, 3], [0, 0, 1]), Row([4, 5, 6, 7], [0, 1, 0, 1])]
    ids, targets = pad(rows)
    assert ids.tolist() == [[1, 2, 0], [4, 5, 6]]
    assert targets.tolist() == [[-100, 3, -100], [5, -100, 7]]
    pairs = [(rows[0], rows[1]), (rows[1], rows[0])]
    split = ft.Split([], pairs, reference=torch.tensor([[1, 2], [3, 4]]))
    ids, *_, reference = ft.DPO(None, CHAT).batch(split, [0, 1], pairs)
    assert ids.tolist() == [[1, 2, 0], [4, 5, 6], [4, 5, 6], [1, 2, 0]]  # chosen, then rejected
    assert reference.tolist() == [[1, 2], [3, 4]]


def test_every_answer_but_an_opening_one_is_a_job_and_a_few_are_spread_evenly():
    U, A = turn("user", "q"), turn("assistant", "a")
    talk = [A, U, turn("call", "f {}"), turn("tool", "r"), A, U, A | {"weight": 0}]
    greeting = {"messages": talk}
    jobs = ft.answer_jobs([greeting, {"messages": [U, A]}])
    asked = [(len(job.messages), "tool_calls" in job.wanted) for job in jobs]
    assert asked == [(2, True), (4, False), (1, False)]
    many = [{"messages": [turn("user", str(i)), A]} for i in range(100)]
    for limit in (1, 3, 64, 99, 100, 200):
        asked = [int(job.messages[0]["content"]) for job in ft.answer_jobs(many, limit)]
        assert len(asked) == min(limit, 100) and len(set(asked)) == len(asked)
        assert asked[-1] >= 100 - 100 / len(asked) - 1  # the end is asked, too
