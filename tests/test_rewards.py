"""Learning from rewards: what is counted of an answer, GRPO's loss, and whole runs."""

import argparse
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import test_finetune_runs as runs
import torch
from conftest import CHAT, real, turn
from test_finetune_runs import QUICK, in_two_processes, refused, save_base, tune, values, write
from test_train import killed_in_step, losses, metrics

import finetune as ft
import model as lm
import sample
from data.batches import Turn, chat_rows, pad
from data.cli import UserError
from data.facts import FACTS, ask, count_facts, fact_scores, in_order, records_of
from data.rewards import REWARDS, load_reward, rate
from data.rows import load_data

HOTELS = [
    {"name": "松园饭店(南店)", "price": 374.0, "rating": 4.8, "phone": "010-65127788"},
    {"name": "云海大厦", "price": 1005, "rating": 5.0, "phone": "010-60350828, 010-60350829"},
]
ASKED = [turn("user", "找一家500元以下的酒店"), turn("call", "search {}"),
         turn("tool", json.dumps(HOTELS, ensure_ascii=False))]
SAID = turn("assistant", "为您推荐松园饭店(南店)。"), turn("user", "多少钱？")
NAMED = {"name": 1, "right name": 1}


@pytest.mark.parametrize("reply, more, counted", [
    ("好的，祝您入住愉快！", (), {}),
    ("推荐云海大厦和云海大厦。", (), {"name": 2, "right name": 2, "again": 1, "doubled": 1}),
    ("云海大厦的价格是1005.0元。", (), {**NAMED, "price": 1, "right price": 1}),
    ("价格374元的松园饭店(南店)。", (), {**NAMED, "price": 1, "right price": 1}),
    ("没有500元以下的。", (), {}),  # the guest's own number
    ("评分是5分的云海大厦", (), {**NAMED, "rating": 1, "right rating": 1}),
    ("云海大厦的电话是010-60350829。", (), {**NAMED, "phone": 1, "right phone": 1}),
    ("云海大厦的电话是010-603508281。", (), {**NAMED, "phone": 1}),
    ("走5分钟到云海大厦。", (), NAMED),
    ("松园饭店(南店)374元、云海大厦374元", (),
     {"name": 2, "right name": 2, "price": 2, "right price": 1}),
    # without a name it is that of the hotel named last
    ("价格是374元。", SAID, {"price": 1, "right price": 1}),
    ("价格是1005元。", (*SAID, turn("user", "云海大厦呢？")), {"price": 1, "right price": 1}),
])
def test_names_and_numbers_are_counted_and_compared(reply, more, counted):
    assert +count_facts([*ASKED, *more], reply) == Counter(counted, replies=1)


def test_without_a_search_of_hotels_nothing_is_counted():
    assert not count_facts(ASKED[:2], "推荐云海大厦，374元。")
    for result in ("no JSON", "[1]", '{"name": null, "price": 1, "rating": 2}'):
        assert not count_facts([turn("tool", result)], "A null")


def test_people_are_faithful():
    """What the humans of the data said: 556 of their 558 names had been returned."""
    jobs = ft.answer_jobs(load_data(str(real("hotel/dev.jsonl")))[1]["train"])
    scores = fact_scores(jobs, [job.wanted for job in jobs])
    assert scores["names"] > 0.995 and scores["doubled"] < 0.005
    assert min(scores["prices"], scores["phones"], scores["ratings"]) > 0.99


def test_the_hotels_of_a_result_are_named_in_its_order():
    names = ["云海", "云海大厦", "山月"]  # one name begins like another
    rows = [{"name": n, "price": 9, "rating": 5} for n in names]
    told = [turn("user", "找酒店"), turn("tool", json.dumps(rows, ensure_ascii=False))]
    ordered = in_order([*told, turn("assistant", "山月、云海大厦或云海。"), turn("user", "山月？")])
    assert [m["content"] for m in ordered[2:]] == ["云海、云海大厦或山月。", "山月？"]
    for more in ([turn("user", "比")], [turn("tool", "[]")], []):
        said = "山月9元、云海8元" if not more else "山月、云海"
        assert in_order(later := [*told, *more, turn("assistant", said)]) == later


def test_questions_are_answered_by_what_was_returned():
    unknown = {"name": "{北}饭店", "price": -1, "rating": 4.1, "phone": ""}
    told = [*ASKED, turn("assistant", "推荐云海大厦。")]
    told.append(turn("tool", json.dumps([unknown], ensure_ascii=False)))
    seen = Counter()
    for seed in range(300):
        question, answer = ask(told, random.Random(seed))
        counts = count_facts([*told, question], answer["content"])
        question, answer = question["content"], answer["content"]
        assert all(counts[f] == counts[f"right {f}"] for f in FACTS) and counts["name"]
        assert question != "查到了哪些酒店？" or answer == "{北}饭店。"  # the last result's
        assert question != "电话号码给我一下。" or "云海大厦" in answer  # named last
        seen |= counts | Counter([question, answer])
    every = "、".join([*records_of(ASKED), "{北}饭店"]) + "。"
    asked = ("查到了哪些酒店？", "一共查到了哪些酒店？", "它们的评分？", "电话号码给我一下。")
    known = "{北}饭店的价格暂时未知。", "{北}饭店的评分是4.1分。"
    assert all(seen[once] for once in (*FACTS, every, *asked, *known))
    assert ask(ASKED[:2], random.Random(0)) == []


TRUTH = turn("assistant", "推荐云海大厦。")
CALL = turn("call", 'search {"facilities": ["泳池", "SPA"], "type": "经济型"}')


@pytest.mark.parametrize("name, answer, wanted, value", [
    ("slots", turn("call", 'search {"facilities": ["SPA"], "type": "豪华型"}'), CALL, 0.4),
    ("slots", turn("call", "search {"), CALL, 0.0),
    ("slots", turn("call", "search {}"), turn("call", "search {}"), 1.0),
    ("slots", CALL, TRUTH, None),
    ("exact", turn("assistant", " yes\n"), turn("assistant", "yes"), 1.0),
    ("label", turn("assistant", "Positive, I think"), turn("assistant", "positive"), 1.0),
    ("label", turn("assistant", "10"), turn("assistant", "1"), 0.0),
    ("length", turn("assistant", "abc"), turn("assistant", "abcd"), 0.75),
    ("faithful", CALL, CALL, None),
])
def test_rewards_by_hand(name, answer, wanted, value):
    assert REWARDS[name](ASKED, answer, wanted) == pytest.approx(value)


def test_silence_and_repetition_earn_less_than_the_truth():
    def earned(text):
        return REWARDS["faithful"](ASKED, turn("assistant", text), TRUTH)

    assert 1 == earned(TRUTH["content"]) > earned("推荐云海大厦和云海大厦。") > 0
    assert earned("推荐松园饭店(南店)。") > max(earned("推荐北京好梦酒店。"), earned("好的。"))


def test_of_several_rewards_the_first_that_is_for_a_turn_counts():
    asked, turns = (ASKED[:1], ASKED[:1], ASKED, ASKED[:1]), (CALL, TRUTH, TRUTH, TRUTH)
    answers = [(Turn(*job), a) for *job, a in zip(asked, (CALL, CALL, TRUTH, TRUTH), turns)]
    assert ft.load_rewards("slots,faithful", "cpu")(answers) == [1.0, 0.0, 1.0, None]


def write_reward(path, value):
    Path(path).write_text(f"def reward(messages, answer, wanted):\n    return {value}\n")


def test_a_reward_of_ones_own_and_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "mine.py"
    said, asked = turn("assistant", "four"), [dict(m) for m in ASKED]
    write_reward(path, "messages[0].clear() or len(answer) + (answer == wanted)")
    assert rate(load_reward(str(path)), asked, said, said) == 5.0 and asked == ASKED
    for value, problem in (("float('nan')", "nan"), ("1 / 0", "Zero")):
        write_reward(path, value)
        with pytest.raises(UserError, match=f"(?s){problem}.*four.*|four.*{problem}"):
            rate(load_reward(str(path)), ASKED, said, turn("assistant", "other"))
    for file, text in (("mine.py", "x = 1\n"), ("mine.py", "syntax error\n"), ("none.py", None)):
        if text:
            path.write_text(text)
        with pytest.raises(UserError, match=file):
            load_reward(str(tmp_path / file))


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_loss_and_its_gradient_are_the_papers(kl):
    torch.manual_seed(0)
    logps = (-2 * torch.rand(9, 4, dtype=torch.float64)).requires_grad_()
    old, reference = (logps.detach() + 0.4 * torch.randn(2, 9, 4, dtype=torch.float64)).unbind()
    advantage = torch.randn(9, 1, dtype=torch.float64)
    chosen = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4, 4, 1, 2, 3])[:, None]
    places = lm.target_places(torch.where(chosen, 0, -100))
    loss, clipped, divergence = ft.grpo_loss(logps, old, reference, advantage, places, 0.2, kl)
    wanted = 0.0
    for n, t in chosen.nonzero().tolist():
        ratio, a = torch.exp(logps[n, t] - old[n, t]), advantage[n, 0]
        q = torch.exp(reference[n, t] - logps[n, t])
        gain = min(ratio * a, min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2)) * a)
        wanted = wanted - gain + kl * (q - 1 - torch.log(q))
    ours, theirs = (torch.autograd.grad(x, logps)[0] for x in (loss, wanted))
    assert torch.allclose(loss, wanted) and torch.allclose(ours, theirs)
    assert 0 < clipped < 1 and divergence > 0 and not ours[~chosen].any()


@pytest.mark.parametrize("changes, recompute", [
    (runs.TABLES, False), (dict(position="learned"), True), (dict(tied=True, window=3), False),
])
def test_a_prompt_computed_once_gives_the_same_log_probabilities_and_gradients(changes, recompute):
    model = runs.small_model(n_layer=2, **changes).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    model.grad_checkpoint = recompute
    prompts, answers = torch.randint(9, (2, 6)), torch.randint(9, (2, 3, 4))
    lengths = [5, 3]  # of the prompts without their last ids
    targets, rows = answers.clone(), []
    targets[0, 1, 2:] = targets[1, :, 3:] = targets[1, 2, 1:] = -100  # shorter answers
    weight = torch.rand(6, 4, dtype=torch.float64)
    wanted = torch.zeros(6, 4, dtype=torch.float64)
    for i, (g, s) in enumerate(itertools.product(range(2), range(3))):
        n = lengths[g]
        whole = torch.cat([prompts[g, : n + 1], answers[g, s]])[None]
        goal = torch.cat([torch.full((n,), -100), targets[g, s]])[None]
        wanted[i] = model(whole[:, :-1], goal, output="log_probs")[0, n:]
    for g, n in enumerate(lengths):
        longest = 4 - g  # no answer of the second group has four
        inputs = torch.cat([prompts[g, n].expand(3, 1), answers[g, :, : longest - 1]], dim=1)
        rows.append(torch.cat([prompts[g, :n], inputs.flatten()]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    groups = [(n, 4 - g, lm.target_places(targets[g, :, : 4 - g])) for g, n in enumerate(lengths)]
    batch = ids, targets.view(6, 4), groups
    found = ft.group_logps(model, model, *batch)
    grads = [torch.autograd.grad((x * weight).sum(), model.parameters()) for x in (found, wanted)]
    assert torch.allclose(found, wanted) and all(map(torch.allclose, *grads))


LETTERS, TOLD = "abc", [{"type": "function", "function": {"name": "f"}}]
GRPO = ["--data", "letters.jsonl", "--val_data", "val.jsonl", *QUICK]
GRPO += ["--objective", "grpo", "--eval_rows", "4"]
EXACT = [*GRPO, "--reward", "exact"]
rewarded = pytest.mark.parametrize("reward", [["--reward", "exact"], ["--env", "env.py"]])


def say(asked, answer):
    return [turn("user", f"say {asked}"), turn("assistant", answer)]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model that answers any question with a random letter."""
    folder = tmp_path_factory.mktemp("talker")
    os.chdir(folder)
    ours = dict(norm_weight=False, activation="relu2", qk_norm=True, embed_norm=True)
    save_base(Path("base.pt"), d_model=64, n_layer=2, init="zero_out", value_embed=True, **ours)
    write("any.jsonl", [say(a, b) for a, b in itertools.product(LETTERS, LETTERS)])
    flags = "--data any.jsonl --val_data any.jsonl --epochs 60 --lr 3e-3 --eval_rows 0"
    tune(*flags.split(), ckpt="base.pt", out="talker")
    return folder / "talker" / "best.pt"


# A guest says two letters, the second one after a note. The reward is the share that was repeated.
ENV = """
import random

class Env:
    def __init__(self, examples):
        self.letters = sorted({e["messages"][1]["content"] for e in examples})

    def reset(self, seed):
        self.asked = random.Random(seed).choices(self.letters, k=2)
        return [{"role": "user", "content": f"say {self.asked[0]}"}]

    def step(self, message):
        if not self.asked[1:]:
            return [], True
        self.said = [message["content"], self.asked.pop()]
        asked = f"say {self.said[1]}"
        return [{"role": role, "content": asked} for role in ("tool", "user")], False

    def reward(self, messages):
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        return sum(a == b for a, b in zip(said, [*self.asked, self.said[1]])) / 2
"""


@pytest.fixture
def room(tmp_path, monkeypatch, talker):
    """A folder with that model, and rows in which the right letter is the one asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.machine.measure_peak", lambda *_: 1e11)
    Path("out/base").mkdir(parents=True)
    Path("out/base/best.pt").write_bytes(talker.read_bytes())
    write("letters.jsonl", [say(a, a) for a in LETTERS for _ in range(8)])
    write("val.jsonl", [say(a, a) for a in LETTERS])
    Path("env.py").write_text(ENV)
    return tmp_path


@pytest.mark.parametrize("reward", ["--reward", "--env"])
def test_what_is_rewarded_becomes_likelier(room, reward):
    """Its probability is compared, not what happens to be sampled in the end."""
    write_reward("b.py", "answer == 'b'")
    if reward == "--env":
        Path("b.py").write_text(ENV.replace("a == b for", "a == 'b' for"))
    flags = "--data val.jsonl --samples 32 --updates 2 --kl 0.05 --lr 2e-3 --embed_lr 2e-3"
    flags += " --head_lr 2e-3 --schedule constant --batch_tokens 8192 --grad_accum 1"
    out = tune(*GRPO, reward, "b.py", *flags.split(), "--max_steps", "20")

    def probability(ckpt):
        model, tokenizer, _ = sample.load(ckpt, dtype="fp32")
        rows = [chat_rows({"messages": say(a, "b")}, tokenizer, 48)[0] for a in LETTERS]
        with torch.no_grad():
            return model(*pad(rows), output="log_probs").sum(1).exp().mean().item()

    before, after = map(probability, ("out/base", out / "last.pt"))
    assert after > before + 0.2


def test_what_a_run_writes(room):
    out = tune(*EXACT, "--updates", "2", "--kl", "0.1", "--max_steps", "4", "--eval_every", "2")
    for r in [r for r in metrics(out) if "reward" in r]:
        assert 0 <= r["reward"] <= 1 and 0 <= r["equal_groups"] <= 1 and r["answer_tokens"] >= 1
        assert r["reward_std"] >= 0 and 0 <= r["clipped"] <= 1 and r["entropy"] > 1 / 9
    kl = values(out, "kl")
    assert len(kl) == 4 and kl[0] == 0 < kl[-1]
    assert "greedy, validation" in (out / "loss.svg").read_text()
    assert {"val_reward", "bleu4"} <= set(json.loads((out / "scores.json").read_text())["val"])


def test_a_reward_for_calls_leaves_the_other_turns_alone(room):
    write("tools.jsonl", [runs.tool_chat(a, n) for n, a in enumerate(LETTERS * 2)])
    flags = ["--data", "tools.jsonl", "--val_data", "tools.jsonl", "--objective", "grpo", *QUICK]
    out = tune(*flags, "--reward", "slots", "--eval_rows", "5", "--max_steps", "2")
    assert values(out, "val_reward") and values(out, "bleu4")
    write_reward("never.py", "1 if answer is wanted else None")
    with pytest.raises(UserError, match="is None"):
        tune(*flags, "--reward", "never.py", "--best_by", "last", out="out/never")
    write("told.jsonl", [runs.tool_chat(a, 1) | {"tools": TOLD} for a in LETTERS])
    write_reward("long.py", "sum(map(ord, answer))")
    tune("--eval_only", *flags[4:], "--reward", "long.py", "--pairs", "p", "--data", "told.jsonl")
    assert all(json.loads(r)["tools"] == TOLD for r in Path("p").read_text().splitlines())


@rewarded
def test_the_probabilities_in_the_loss_are_those_that_were_drawn_from(room, monkeypatch, reward):
    """An id that is never drawn has none: else nothing would hold it back, and it would grow."""
    drawn, learned, accept, loss = [], [], sample.accept, ft.grpo_loss

    def taken(text, rows):
        ids = accept(text, rows)
        if text.settings != {"temperature": 0.0}:  # answers that are measured are greedy
            drawn.extend(row.log_softmax(-1)[i].item() for i, (_, row) in zip(ids, rows))
        return ids

    def watched(logps, *rest):
        learned.extend(logps.flatten()[rest[3]].tolist())
        return loss(logps, *rest)

    monkeypatch.setattr(sample, "accept", taken)
    monkeypatch.setattr(ft, "grpo_loss", watched)
    flags = "--lr 1e-12 --embed_lr 1e-12 --head_lr 1e-12 --updates 2 --max_steps 2"
    tune(*GRPO, *reward, *flags.split(), "--kl", "1")  # no group is left out
    assert sorted(learned) == pytest.approx(sorted(drawn * 2), abs=1e-4)


def test_the_reference_is_the_model_at_the_start(room):
    """With equal rewards only the divergence moves the weights, and nothing does at the start."""
    write_reward("flat.py", "1")
    flags = [*GRPO, "--reward", "flat.py", "--max_steps", "2", "--kl", "1"]
    for name, more in (("adapter", ["--lora_rank", "4"]), ("full", [])):
        out = tune(*flags, *more, out=f"out/{name}")
        assert values(out, "kl") == [0, 0] and values(out, "equal_groups") == [1, 1]
        assert max(map(abs, losses(out))) < 1e-6
    save_base(Path("out/plain/best.pt"), d_model=32)  # without the tokens of a chat
    assert values(tune(*flags, ckpt="out/plain", out="out/kl"), "kl")[0] == 0


@rewarded
def test_killed_and_resumed_equals_straight_through_bitwise(room, reward):
    flags = [*GRPO, *reward, "--updates", "4", "--kl", "0.1", "--dropout", "0.1",
             "--max_steps", "10", "--eval_every", "3"]
    tune(*flags, out="out/straight")
    with killed_in_step(8):
        tune(*flags, out="out/killed")
    assert runs.content("out/killed/last.pt")["step"] == 6  # between updates with the same answers
    ft.main(["--resume", "out/killed"])
    for key in ("loss", "reward", "kl", "clipped", "val_reward", "val_loss"):
        assert values("out/killed", key) == values("out/straight", key)
    assert runs.same_weights("killed", "straight")


@pytest.mark.slow
@rewarded
def test_two_processes_give_the_rewards_and_losses_of_one(room, reward):
    flags = [*GRPO, *reward, "--max_steps", "6", "--eval_every", "3", "--grad_accum"]
    tune(*flags, "4", out="out/one")
    in_two_processes(*flags, "2")
    for key in ("loss", "reward", "equal_groups", "entropy", "val_reward"):
        assert values("out/two", key) == pytest.approx(values("out/one", key), abs=1e-5)


def test_a_reward_model_prefers_what_was_chosen_and_rewards_it(room):
    write_reward("a.py", "answer == 'a'")
    flags = ["--reward", "a.py", "--split", "train", "--pairs", "pairs.jsonl"]
    tune("--eval_only", *GRPO, *flags)
    rows = map(json.loads, Path("pairs.jsonl").read_text().splitlines())
    said = {tuple(row[side][0]["content"] for side in ("chosen", "rejected")) for row in rows}
    assert said <= {("a", "b"), ("a", "c")}
    pairs = ["--data", "pairs.jsonl", "--val_data", "pairs.jsonl", *QUICK, "--lr", "3e-3"]
    tune(*pairs, "--objective", "reward", "--lora_rank", "4", "--max_steps", "150", out="out/judge")
    scores = json.loads(Path("out/judge/scores.json").read_text())["val"]
    assert scores["reward_accuracy"] == 1 and scores["reward_margin"] > 1
    tune("--eval_only", *pairs[:2], ckpt="out/judge", out="out/judged")
    out = tune(*pairs, "--objective", "grpo", "--reward", "out/judge", "--eval_rows", "4",
               "--epochs", "1", "--batch_tokens", "2048", out="out/better")
    rewards = values(out, "val_reward")
    assert rewards[-1] > rewards[0] - 1e-6 and rewards[-1] > values(out, "reward")[0]
    (judge, tokenizer, _), talk = sample.load("out/judge", dtype="fp32"), say("a", "b")
    (row,) = chat_rows({"messages": talk, "tools": TOLD}, tokenizer, 47)
    wanted = judge(torch.tensor([row.ids]))[0, -1, tokenizer.special[ft.REWARD_TOKEN]].item()
    [reward] = ft.load_rewards("out/judge", "cpu")([(Turn(talk[:1], None, TOLD), talk[1])])
    assert reward == pytest.approx(wanted, abs=1e-5)


def test_the_reward_of_a_pair_is_the_bradley_terry_loss():
    torch.manual_seed(0)
    tokenizer, model = CHAT.with_special([ft.REWARD_TOKEN]), runs.small_model().double()
    objective = ft.RewardModel(argparse.Namespace(context=48, loss_on="assistant"), tokenizer)
    good, bad = [turn("assistant", "good")], [turn("assistant", "bad one")]
    pairs = [{"messages": [turn("user", "q")], "chosen": a, "rejected": b}
             for a, b in ((good, bad), (bad, good))]
    rows = [objective.rows(p)[0] for p in pairs]
    token, total = tokenizer.special[ft.REWARD_TOKEN], 0.0
    for chosen, rejected in rows:
        scores = [model(torch.tensor([r.ids[:-1]]))[0, -1, token] for r in (chosen, rejected)]
        total = total + torch.log(1 + torch.exp(scores[1] - scores[0]))
    batch = objective.batch(ft.Split(pairs, rows), [0, 1], rows)
    assert objective.loss(model, *batch).item() == pytest.approx(total.item(), abs=1e-6)
    assert objective.count(*batch) == 2


@pytest.mark.parametrize("flags, named", [
    (["--objective", "grpo"], "needs either --env or --reward (slots"),
    ([*GRPO, "--reward", "nothing"], "nothing"),
    ([*GRPO, "--reward", "out/base"], "not a reward model"),
    ([*EXACT, "--token_dropout", "0.1"], "--token_dropout"), ([*EXACT, "--pairs", "p"], "--pairs"),
    (["--kl", "0.1"], "--kl is not for --objective sft"),
    ([*GRPO, "--reward", "slots"], "slots"),
    ([*EXACT, "--env", "env.py"], "--env"), ([*GRPO, "--env", "none.py"], "none.py"),
    ([*GRPO, "--env", "my_env.py"], "reset(seed) of --env fails (ZeroDivisionError"),
    ([*GRPO, "--env", "no.py"], "step(message) of --env fails, or returns no (new messages, done)"),
    ([*GRPO, "--env", "inf.py"], "reward(messages) of --env returns inf, not a finite number"),
])
def test_a_users_mistake_is_one_line_that_names_it(room, flags, named):
    mistakes = dict(my_env=("k=2", "k=1 / 0"), no=("], F", "] and F"), inf=("/ 2", "+ 1e999"))
    for name, mistake in mistakes.items():
        Path(f"{name}.py").write_text(ENV.replace(*mistake))
    flags = ["--ckpt", "out/base", "--data", "letters.jsonl", *flags, "--max_steps", "1"]
    assert named in refused(*flags)
