"""data/scores.py beside the textbook's numbers."""

import numpy as np
import pytest
from conftest import turn

from data.batches import Turn
from data.scores import bleu4, chat_scores, confusion, macro_f1, slot_counts


@pytest.mark.parametrize("prediction, reference, bleu", [
    ("", "abc", 0),
    ("xyz", "abc", 0),
    ("一家酒店", "一家酒店", 1),
    ("abdc", "dcab", (2 / 3 / 4 / 4) ** 0.25),  # 4/4, 2/3, then 0/2 -> 1/4, 0/1 -> 1/4
    # 2/2, 1/1, then no n-gram: 1/2, 1/4; two characters for four: exp(1 - 2)
    ("ab", "abcd", (1 / 8) ** 0.25 * np.exp(-1)),
])
def test_bleu_by_hand(prediction, reference, bleu):
    assert bleu4(prediction, reference) == pytest.approx(bleu)


@pytest.mark.parametrize("predicted, reference, counts", [
    ({"a": 500}, {"a": 500.0}, (1, 1, 1)),
    ({"f": ["x", "y"]}, {"f": ["y", "z", "x"]}, (2, 2, 3)),
    ({"f": ["x", "x"]}, {"f": ["x"]}, (1, 2, 1)),
    ({"a": 1, "b": 2}, {"a": 3}, (0, 2, 1)),
    ({"a": "1"}, {"a": 1}, (0, 1, 1)),
    ({"a": {"k": 1, "l": 2.0}}, {"a": {"l": 2, "k": 1}}, (1, 1, 1)),
    (None, {"a": 1, "f": ["x", "y"]}, (0, 0, 3)),
])
def test_slots_are_counted_value_by_value(predicted, reference, counts):
    predicted = None if predicted is None else [predicted]
    assert slot_counts(predicted, [reference]) == counts


def test_chat_scores_of_four_answers():
    a, bot = turn("call", 'f {"a": 1}'), turn("assistant", "一家酒店")
    most = turn("call", 'f {"a": 1.0, "b": ["y", "z"]}')
    wanted_got = [
        (turn("call", 'f {"a": 1, "b": ["x", "y"]}'), most),  # 2 right of 3, 3 wanted
        (a, turn("call", 'f {"a": ')),  # no JSON
        (a, turn("assistant", "hm")),  # no call
        (bot, bot),
        (turn("assistant", "ok"), turn("call", "ok")),  # no answer
    ]
    scores = chat_scores([Turn([], wanted) for wanted, _ in wanted_got], [g for _, g in wanted_got])
    known = dict(slot_p=2 / 3, slot_r=2 / 5, slot_f1=0.5, valid_json=1 / 3, bleu4=0.5)
    assert scores == pytest.approx(known)
    assert chat_scores([], []) == {}
    none = turn("call", "f {}")
    scores = chat_scores([Turn([], none)] * 4, [none, none, none, turn("call", "f {")])
    assert scores == dict.fromkeys(("slot_p", "slot_r", "slot_f1", "valid_json"), 0.75)


def test_confusion_and_macro_f1_by_hand():
    wanted, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    table = confusion(np.array(predicted), np.array(wanted), 4)
    assert table.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # class 0: precision 2/4, recall 2/3; class 1: 1/2, 1/2; class 2: 0; class 3 never occurs: 0
    f1 = [2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3), 0.5, 0.0, 0.0]
    assert macro_f1(table) == pytest.approx(np.mean(f1))
    assert macro_f1(np.diag([3, 2])) == 1.0
