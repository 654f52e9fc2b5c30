"""sample.Engine: texts that come and go, each equal to itself alone."""

import argparse
import contextlib
import random
import weakref

import pytest
import torch
from test_matmul import ARCHITECTURES, build, fast_copy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
import sample
from data import drafts
from data.cli import UserError
from data.graphs import GraphedSteps
from sample import Engine, Text, draw_uniforms, generate


def requests(n, seed, vocab=300, longest=70):
    """Prompts, some of which begin like others, with settings and a number of new ids each."""
    rng, made = random.Random(seed), []
    for _ in range(n):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, longest))]
        if made and rng.random() < 0.5:  # a conversation goes on, or has the same system turn
            prompt = made[rng.randrange(len(made))][0][: rng.randint(1, 40)] + prompt[:30]
        settings = dict(seed=rng.randrange(1000), temperature=rng.choice([0, 0.7, 1.3]))
        settings |= rng.choice([{}, dict(top_k=7), dict(top_p=0.8), dict(repetition_penalty=1.3)])
        bias = {rng.randrange(vocab): rng.uniform(-9, 9) for _ in range(99)}
        for more in (
            dict(frequency_penalty=0.5, presence_penalty=0.3), dict(logit_bias=bias),
            dict(allowed=torch.arange(vocab) % rng.choice([2, 60]) == 0),
            dict(min_tokens=9, ends=range(vocab // 2)),
        ):
            settings |= more if rng.random() < 0.3 else {}
        made.append((prompt, settings, rng.randint(1, 30)))
    return made


def write_alone(model, jobs):
    steps = (generate(model, [prompt], n, draft=False, **rest) for prompt, rest, n in jobs)
    return [[i for (i,) in each] for each in steps]


def write_together(engine, jobs, rng):
    """The new ids of each job, which are added and now and then abandoned at random moments."""
    waiting, writing, found = list(enumerate(jobs)), {}, {}
    while waiting or writing:
        while waiting and engine.busy < len(engine.texts) and rng.random() < 0.6:
            number, (prompt, settings, count) = waiting.pop(0)
            writing[engine.add(prompt, **settings)] = number, count
        for slot, ids in engine.step().items():
            number, count = writing[slot]
            found[number] = (found.get(number, []) + ids)[:count]
            if len(found[number]) == count:
                engine.remove(slot)
                del writing[slot]
    return [found[n] for n in range(len(jobs))]


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_of_32_texts_is_what_it_is_alone(name, fast):
    model = build(name, context=60)  # prompts of up to 70 ids: some slide
    jobs = requests(32, seed=sum(map(ord, name)))
    alone = write_alone(model, jobs)
    model = fast_copy(model, rows=5) if fast else model
    engine = Engine(model, 5, length=4, chunk=random.Random(name).choice([16, 10**9]))
    assert write_together(engine, jobs, random.Random(1)) == alone
    assert len({tuple(ids) for ids in alone}) > 28


FILTERS = [
    dict(temperature=0), dict(temperature=1.3), dict(top_k=3), dict(top_p=0.7), dict(min_p=0.1),
    dict(repetition_penalty=1.1), dict(frequency_penalty=0.1, presence_penalty=0.1),
    dict(loop_penalty=2.0),
    dict(logit_bias={60: 1.0, 120: -1.0}), dict(min_tokens=20, ends=[0]), dict(ends=[0, 60]),
    dict(temperature=0.8, top=2, echo=True),
]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_drafts_change_no_text_and_save_passes(settings, rows, monkeypatch):
    """Each text outgrows the context several times, has five ids, and always a draft."""
    monkeypatch.setattr(drafts, "FIXED", 0)
    monkeypatch.setattr(drafts, "EACH", 0)
    model, found = build("default", context=40).double(), {}
    settings = settings | dict(allowed=torch.arange(300) % 60 == 0, max_new_tokens=100)
    for draft in False, True:
        engine, passes = Engine(model, rows, draft=draft), 0
        texts = [engine.add([0, 60, 120][row:] * 5, seed=row, **settings) for row in range(rows)]
        while any(text.left for text in texts):
            for text, ids in engine.step().items():
                assert not set(ids[:-1]) & set(settings.get("ends", ()))
                if not text.left:
                    engine.remove(text)
            passes += 1
        found[draft] = [text.ids for text in texts], passes
        found[draft] += tuple(
            ([p for p, _ in text.logprobs], (text.uniforms + draw_uniforms(text.generator, 1))[0])
            for text in texts
        )
    (plain, steps, *scores), (drafted, fewer, *same) = found.values()
    assert drafted == plain and fewer < 0.9 * steps
    for (logps, share), (others, other) in zip(scores, same):
        assert others == pytest.approx(logps) and other == share
    assert not settings.get("top") or len(logps) == len(plain[-1]) - 1


@pytest.mark.parametrize("text, guess, match", [
    ([1, 2, 3, 4, 9, 2, 3], [4, 9, 2, 3, 4], 2),
    ([2, 3, 4, 1, 2, 3, 5, 0, 2, 3], [5, 0, 2, 3, 5], 2),  # the latest of equally long ones
    ([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], [4, 7, 2, 3, 5], 3),  # a longer one comes first
    ([7, 7, 7], [7] * 5, 2),
    ([8, 1, 2, 1, 2], [1, 2, 1, 2, 1], 2),
    ([1, 2, 3], [], 0), ([4], [], 0),
])  # fmt: skip
def test_a_draft_is_what_followed_the_longest_earlier_match(text, guess, match):
    for at in range(len(text)):  # it may be found in a text that has ended
        lookup = drafts.Lookup(drafts.to_chars(text[:at]), text[at:])
        lookup.search(5)
        assert (lookup.guess, lookup.match) == (guess, match)


def test_drafts_are_tried_where_they_are_right_and_only_there():
    ids, tried = [5, 6, 7, 8], {}
    for name, share in ("right", 1), ("wrong", 0):
        maker, lookup, tried[name] = drafts.Drafts(), drafts.Lookup("", ids * 2), []
        text = Text(0, ids * 2, max_new_tokens=100, lookup=lookup)
        for _ in range(30):
            maker.make([text], 100)
            maker.learn(lookup, lookup.guess[: 1 + len(text.draft)] if share else [9])
            lookup.text = drafts.to_chars(ids * 2)
            tried[name].append(len(text.draft))
        maker.make([text] * 64, 100)
        assert not text.draft  # a pass over many texts is busy as it is
    assert tried["right"][0] >= 1 and tried["right"][-1] == 15
    assert sum(tried["wrong"]) <= 3 and not tried["wrong"][-1]


def test_what_is_in_the_cache_is_not_read_again(monkeypatch):
    model, sizes = build("llama"), []
    engine, hidden = Engine(model, 2), model.hidden

    def add(*ids):
        slot = engine.add(ids, temperature=0)
        engine.step()
        return slot

    seen = lambda ids, *more: sizes.append(ids.numel()) or hidden(ids, *more)  # noqa: E731
    monkeypatch.setattr(model, "hidden", seen)
    slot = add(*range(20))
    assert sizes == [20]
    engine.step()
    engine.remove(slot)
    again = add(*slot.ids, 7, 8)  # the conversation goes on
    assert sizes[2:] == [3]  # 21 ids were held, of 24
    other = add(*range(15), 40)  # the same beginning as one being written
    assert sizes[3:] == [2] and engine.held(other) == 16  # copied: only the last ids are run
    engine.remove(other)
    engine.remove(again)
    engine.forget()
    add(*range(20))
    assert sizes[4:] == [20]
    next(generate(model, [list(range(30))] * 4, 5, seeds=[1, 2, 3, 4]))
    assert sizes[5:] == [30, 3]  # samples of one prompt read it once


def test_a_prompt_takes_the_row_of_which_it_has_the_most_then_an_empty_one_then_the_oldest():
    engine = Engine(build("default"), 3)

    def ask(prompt):
        slot = engine.add(prompt, temperature=0)
        engine.step()
        engine.remove(slot)
        return slot

    talk = ask([1, 2, 3, 4, 5, 6, 7])
    ask([1, 2, 9, 9, 9, 9])  # another one with the same system turn
    ask([50] * 5)
    assert sorted(s.ids[0] for s in engine.texts) == [1, 1, 50]
    assert engine.held(engine.add([*talk.ids, 30, 31])) == 7
    assert not any(s.ids[:1] == [60] for s in engine.texts)
    ask([60] * 5)
    assert sorted(s.ids[0] for s in engine.texts) == [1, 50, 60]


def test_a_long_prompt_lets_others_write():
    engine = Engine(build("gpt2"), 3, chunk=8)
    short = engine.add([1, 2], temperature=0)
    engine.step()
    long = engine.add([9] * 30, temperature=0)
    steps = [engine.step() for _ in range(4)]
    assert [set(new) for new in steps] == [{short}, {short}, {short}, {short, long}]


@pytest.mark.parametrize("chunk, most", [(1, 4096), (7, 4096), (10**9, 6)])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_log_probabilities_are_the_models(fast, chunk, most, monkeypatch):
    monkeypatch.setattr(sample, "MAX_READ", most)
    model = build("qwen3")
    prompt = torch.randint(300, (20,)).tolist()
    engine = Engine(fast_copy(model, rows=2) if fast else model, 2, chunk=chunk)
    engine.add([4, 5, 6], temperature=1.0)
    slot = engine.add(prompt, temperature=0.9, top_k=3, seed=3, top=4, echo=True)
    while len(slot.ids) < 25:
        engine.step()
    with torch.no_grad():
        exact = model(torch.tensor([slot.ids]))[0].log_softmax(-1)
    assert len(slot.logprobs) == 24  # of every id but the first
    for row, i, (logp, best) in zip(exact, slot.ids[1:], slot.logprobs):
        assert logp == pytest.approx(row[i].item(), abs=1e-4)
        assert [j for j, _ in best] == row.topk(4).indices.tolist()
        assert [p for _, p in best] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_penalties_are_those_of_the_api():
    logits = torch.zeros(2, 6)
    out = sample.count_penalty(logits, [[1, 1, 4], []], frequency=0.5, presence=0.25)
    assert out.tolist() == [[0, -1.25, 0, 0, -0.75, 0], [0] * 6] and not logits.any()
    # only what was drawn counts: the prompt's ids do not
    logits, settings = torch.tensor([[1.0, 0.5]]), dict(temperature=0, frequency_penalty=2.0)
    for start, i in (2, 0), (1, 1):
        assert sample.next_token(logits, [[0, 0]], [None], settings, [start]) == [i]


@pytest.mark.parametrize("heat", [0, 1.3])
def test_biases_are_added_before_the_filters_and_ends_wait(heat):
    model, V = build("llama"), 300
    bias, even = {i: 3.0 for i in range(0, V, 3)} | {1: 100, 2: -100}, torch.arange(V) % 2 == 0
    filters = dict(temperature=heat, top_k=40, repetition_penalty=1.2)
    engine = Engine(model, 3)
    engine.add([7, 8])
    ends = dict(ends=range(0, V, 4), min_tokens=5)
    slot = engine.add([5, 6], logit_bias=bias, allowed=even, seed=3, top=2, **ends, **filters)
    for _ in range(12):
        engine.step()
    ids, g = [5, 6], torch.Generator().manual_seed(3)
    for _, best in slot.logprobs:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        own = logits.log_softmax(-1).topk(2)
        assert [i for i, _ in best] == own.indices.tolist()  # the model's own, unbiased
        for i, value in bias.items():
            logits[i] += value
        logits[1::2] = -torch.inf
        if len(ids) < 2 + 5:
            logits[::4] = -torch.inf
        ids += sample.next_token(logits[None], [ids], sample.draw_uniforms(g, 1), filters)
    assert slot.ids == ids and {i % 4 for i in ids[2:7]} == {2} and {i % 4 for i in ids[7:]} != {2}


def test_prompts_and_biases_that_cannot_be_are_refused():
    model = build("gpt2")
    engine = Engine(model, 1)
    for bad, bias in ([], {}), ([300], {}), ([-1], {}), ([1], {300: 1}), ([1], {-1: 1}):
        with pytest.raises(UserError, match=r"empty prompt|id -?\d+ .*0 to 299"):
            engine.add(bad, logit_bias=bias)
    for bad in [], [[1], []], [[1], [3, -1]]:
        with pytest.raises(UserError, match=r"empty prompt|id -1"):
            next(generate(model, bad, 5))
    assert engine.busy == 0


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph: runs the recorded operations again, on the same memory, and
    spoils the results of other graphs, whose memory it shares."""

    recorded, all = 0, weakref.WeakSet()

    def __init__(self):
        self.operations = []
        self.all.add(self)

    def pool(self):
        return 0, 1

    def replay(self):
        for graph in self.all:
            graph.operations[-1][-1].fill_(torch.nan)
        for func, args, kwargs, out in self.operations:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(out)):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class FakeCapture(TorchDispatchMode):
    """Stands for torch.cuda.graph; what would wait for the GPU raises, as it does there."""

    def __init__(self, graph, pool=None, capture_error_mode="global"):
        super().__init__()
        self.graph, self.pool = graph, pool
        FakeGraph.recorded += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select"), f"{name} waits"
        out = func(*args, **kwargs or {})
        if name != "add_" or args[0].dtype != torch.long:  # lengths, which lie on the CPU
            self.graph.operations.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        self.graph.operations[-1][-1].fill_(torch.nan)  # recording computes nothing


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on a CPU."""
    stand_ins = dict(CUDAGraph=FakeGraph, graph=FakeCapture, device=contextlib.nullcontext)
    for name, value in (stand_ins | {"recorded": 0}).items():
        monkeypatch.setattr(FakeGraph if name == "recorded" else torch.cuda, name, value)
    return FakeGraph


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graphs_write_the_same(name, graphs):
    model = build(name, context=60)
    jobs = requests(24, seed=sum(map(ord, name)))
    alone = write_alone(model, jobs)
    model.last_logits = GraphedSteps(model.last_logits)
    engine = Engine(model, 5, length=4)
    assert write_together(engine, jobs, random.Random(1)) == alone
    assert 1 < graphs.recorded < 12  # of some 150 steps
    assert write_alone(model, jobs) == alone  # each has a new cache, at an address used before


def test_graphs_end_with_the_adapter_and_with_their_cache(graphs):
    model, prompt, texts = build("qwen3"), [1, 2, 3], {}
    lora.add_lora(model, "attention", rank=4, alpha=40)
    with torch.no_grad():
        model.blocks[0].attention.q.b["default"].normal_()

    def write(name, engine):
        lora.set_adapter(model, name)
        engine.forget()
        return list(generate(model, [prompt], 12, temperature=0, engine=engine))

    for name in None, "default":
        texts[name] = write(name, Engine(model, 1))
    model.last_logits = GraphedSteps(model.last_logits)
    engine, keys = Engine(model, 1, draft=False), weakref.WeakSet()
    keys.add(engine.cache.keys)
    for name in "default", None, "default":
        assert write(name, engine) == texts[name] != texts["default" if name is None else None]
    assert graphs.recorded == 3 and engine.cache.graphs and len(keys) == 1
    engine.cache.grow(engine.cache.room)
    assert not engine.cache.graphs
    del engine
    assert not keys


@pytest.mark.parametrize("device, flag, experts, graphed", [
    ("cuda", False, 0, True), ("cuda", True, 0, False), ("cuda", False, 4, False),
    ("mps", False, 0, False),
])
def test_models_on_nvidias_gpus_write_by_graphs(device, flag, experts, graphed):
    new = argparse.Namespace
    model = new(embed=new(weight=new(device=torch.device(device))), last_logits=None)
    model.config, model.modules = new(experts=experts), list
    sample.fast_model(model, 1, new(dtype="bf16", no_fast=flag))
    assert isinstance(model.last_logits, GraphedSteps) is graphed


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_slots_on_a_gpu(name):
    model = build(name, context=60)
    jobs = [(p, s | {"allowed": None}, n) for p, s, n in requests(16, seed=3)]
    alone = write_alone(model, jobs)
    assert write_together(Engine(model.cuda(), 5), jobs, random.Random(1)) == alone
