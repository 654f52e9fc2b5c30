"""The benchmarks' common part."""

import bench_gpu
import pytest
import torch
from bench_common import our_step, random_batches

import model as lm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_step_that_is_timed_is_that_of_a_run(dtype):
    model = lm.Transformer(lm.preset("tiny", n_layer=1, vocab_size=64))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    our_step(model, random_batches(64, 2, 16), dtype, steps=3)()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_benchmarks_of_a_gpu_write_on_a_cpu_too(capsys):
    train, config = (bench_gpu.make_config(what, toy=what == "same") for what in ("train", "same"))
    assert train.vocab_size == 50304 and not (train.qkv_bias or train.out_bias or train.ff_bias)
    bench_gpu.same(config)
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(words) == 6 and len({md5 for dtype, _, md5, *_ in words if dtype == "fp32"}) == 1
    assert bench_gpu.make_writer("ours", config)() > 0
