"""The benchmarks' common part: jobs that run in turn, each in a process of its own."""

import os
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
import torch
from bench_common import our_step, random_batches, take_turns

import model as lm


def make(fail=None, then=None):
    if fail:
        fail()
    return then or (lambda: time.sleep(0.01))


def wrong():
    raise ValueError("this work is broken")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_step_that_is_timed_is_that_of_a_run(dtype):
    model = lm.Transformer(lm.preset("tiny", n_layer=1, vocab_size=64))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    our_step(model, random_batches(64, 2, 16), dtype, steps=3)()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_works_take_turns_in_processes_of_their_own():
    seconds = take_turns({"a": (make, {}), "b": (make, {})}, rounds=2)
    assert [len(took) for took in seconds.values()] == [2, 2]
    assert all(0.009 < s < 1 for took in seconds.values() for s in took)


@pytest.mark.parametrize(
    "settings, error",
    [({"fail": wrong}, ValueError), ({"then": partial(os._exit, 3)}, BrokenProcessPool)],
)
def test_a_worker_that_dies_ends_the_benchmark_with_its_error(settings, error):
    with pytest.raises(error):
        take_turns({"good": (make, {}), "bad": (make, settings)}, rounds=1)
