"""The benchmarks' common part: works that take turns, each in a process of its own."""

import os
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
from bench_common import take_turns


def make(fail=None, then=None):
    if fail:
        fail()
    return then or (lambda: time.sleep(0.01))


def wrong():
    raise ValueError("this work is broken")


def test_works_take_turns_in_processes_of_their_own():
    seconds = take_turns({"a": (make, {}), "b": (make, {})}, rounds=2)
    assert [len(took) for took in seconds.values()] == [2, 2]
    assert all(0.009 < s < 1 for took in seconds.values() for s in took)


@pytest.mark.parametrize("when", ["fail", "then"])
@pytest.mark.parametrize(
    "how, error", [(wrong, ValueError), (partial(os._exit, 3), BrokenProcessPool)]
)
def test_a_worker_that_dies_ends_the_benchmark_with_its_error(how, error, when):
    start = time.monotonic()
    with pytest.raises(error):
        take_turns({"good": (make, {}), "bad": (make, {when: how})}, rounds=1)
    assert time.monotonic() - start < 60
