"""The benchmarks' common part, and what only a GPU shows."""

import bench_gpu
import pytest
import torch
from bench_common import our_step, random_batches

import model as lm
from data.graphs import GraphedSteps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_step_that_is_timed_is_that_of_a_run(dtype):
    model = lm.Transformer(lm.preset("tiny", n_layer=1, vocab_size=64))
    before = [p.detach().clone() for p in model.parameters()]
    our_step(model, random_batches(64, 2, 16), dtype, steps=3)()
    assert not any(map(torch.equal, model.parameters(), before))


def test_benchmarks_of_a_gpu_write_on_a_cpu_too():
    train, toy = (bench_gpu.make_config(what, what == "write") for what in ("train", "write"))
    assert train.vocab_size == 50304 and not (train.qkv_bias or train.out_bias or train.ff_bias)
    assert bench_gpu.make_writer("ours", toy)() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_graphs_write_what_the_same_operations_write_without_a_graph(dtype, monkeypatch):
    def write():  # tied, the model would repeat one id
        return bench_gpu.writer(lm.preset("gpt2", tied=False), dtype, (), torch.device("cuda"))()

    def without(self, ids, cache, **options):
        cache.graphs = {}
        return call(self, ids, cache, **options)

    by_graphs, call = write(), GraphedSteps.__call__
    monkeypatch.setattr(GraphedSteps, "__call__", without)
    assert write() == by_graphs and len({*by_graphs}) > 9
