"""The benchmarks' common part: jobs that run in turn, each in a process of its own."""

import operator
import os
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import bench_common
import pytest
import torch
from bench_common import mp, our_step, random_batches, take_turns

import model as lm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_step_that_is_timed_is_that_of_a_run(dtype):
    model = lm.Transformer(lm.preset("tiny", n_layer=1, vocab_size=64))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    our_step(model, random_batches(64, 2, 16), dtype, steps=3)()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_jobs_take_turns_and_one_that_fails_or_dies_ends_the_benchmark(monkeypatch):
    fork = mp.get_context("fork")  # a benchmark's processes are spawned, which takes seconds
    monkeypatch.setattr(bench_common.mp, "get_context", lambda kind: fork)
    good = partial(partial, time.sleep, 0.01), {}  # makes the job
    seconds = take_turns({"a": good, "b": good}, rounds=1)
    assert [len(took) for took in seconds.values()] == [1, 1]  # the first is not counted
    assert all(0.009 < s < 1 for took in seconds.values() for s in took)
    fails, dies = partial(partial, operator.truediv, 1, 0), partial(partial, os._exit, 3)
    for bad, error in ((fails, ZeroDivisionError), (dies, BrokenProcessPool)):
        with pytest.raises(error):
            take_turns({"good": good, "bad": (bad, {})}, rounds=1)
