"""data/machine.py: devices, precision and processes of other machines."""

import argparse
import itertools
import subprocess
import sys
from functools import partial
from unittest.mock import Mock, call

import pytest
import torch
from conftest import ROOT

from data import machine
from data.cli import UserError
from data.machine import Runtime, choose_device, make_runtime, native_dtype
from data.runs import step_line

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("native, dtype", [(False, "fp16"), (True, "bf16")])
def test_bf16_that_is_only_emulated_is_not_taken(native, dtype, monkeypatch):
    bf16 = lambda including_emulation=True: including_emulation or native  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", bf16)
    assert native_dtype(CUDA) == dtype
    assert native_dtype(CPU) == native_dtype(torch.device("mps")) == "fp32"


def test_each_process_takes_its_own_gpu_and_says_if_there_is_none(monkeypatch):
    asked, current = [], Mock()

    def zeros(size, device):
        asked.append(str(device))
        if device.index and device.index > 1:
            raise RuntimeError("CUDA error: invalid device ordinal. More")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "set_device", current)
    for rank, wanted in (("0", None), ("1", "cuda"), ("1", "auto")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert choose_device(wanted) == torch.device("cuda", int(rank))
    assert choose_device("cuda:0").index == 0
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"--device cuda:2 cannot be used .* ordinal$"):
        choose_device()
    assert asked == ["cuda:0", "cuda:1", "cuda:1", "cuda:0", "cuda:2"]  # no context on another
    assert [str(call.args[0]) for call in current.mock_calls] == asked[:4]


@pytest.mark.parametrize("kind, pinned", [("cpu", False), ("cuda", True), ("mps", False)])
def test_only_copies_from_pinned_memory_are_not_waited_for(kind, pinned, monkeypatch):
    """On MPS such a copy of other memory may read what Python has freed by then."""
    t, device = torch.zeros(2), torch.device(kind)
    to, monkey = Mock(), monkeypatch.setattr
    monkey(torch.Tensor, "pin_memory", lambda t: Mock(to=partial(to, "pinned")))
    monkey(torch.Tensor, "to", partial(to, "plain"))
    (moved, number), _ = Runtime(device).upload([(t, 3), t])
    assert moved is to.return_value and number == 3
    assert to.mock_calls == [call("pinned" if pinned else "plain", device, non_blocking=pinned)] * 2


def test_apples_gpu_is_for_one_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda size, device: None)
    assert choose_device().type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device().type == "cpu"


def test_a_run_from_another_kind_of_device_chooses_its_precision_anew(monkeypatch):
    monkeypatch.setattr(machine, "measure_peak", lambda *_: 1.0)
    assert make_runtime("cpu", "bf16", previous="cuda").dtype == "fp32"
    assert make_runtime("cpu", "bf16", previous="cpu").dtype == "bf16"
    assert make_runtime("cpu", "bf16").dtype == "bf16"


def test_of_batches_that_do_not_divide_each_counts_once():
    batches = list("abcde")
    for world, sharded in itertools.product((1, 2, 3, 8), (False, True)):
        ranks = [list(Runtime(CPU, rank=r, world=world, sharded=sharded).share(batches))
                 for r in range(world)]
        assert sorted(batch for rank in ranks for batch, counts in rank if counts) == batches
        if sharded:  # all take part in as many
            assert len({len(rank) for rank in ranks}) == 1


def test_the_line_of_a_step_says_why_mfu_is_over_100_and_its_eta_is_never_negative():
    row = dict(step=3, loss=1.0, lr=1.0, grad_norm=1.0, tok_s=5, mfu=2.0, seconds=9.0)
    limits = argparse.Namespace(max_steps=None)
    line = step_line(row, {}, limits, done=1.2)  # the last step went on beyond the time limit
    assert "mfu 200% (the machine was busier" in line and line.endswith("eta 0:00")
    assert "mfu 100%  eta 0:09" in step_line(row | {"mfu": 1.0}, {}, limits, done=0.5)


@pytest.mark.parametrize("faster", [False, True])
def test_products_by_onednn_are_float32_and_end_with_the_block(faster, monkeypatch):
    monkeypatch.setattr(machine, "onednn_is_faster", lambda: faster)
    a, b = torch.randn(2, 300, 300)
    with machine.fast_products(), machine.fast_products():  # in one another
        assert torch.get_float32_matmul_precision() == ("medium" if faster else "highest")
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.undo()
    measured = machine.onednn_is_faster()
    assert measured is machine.onednn_is_faster() and isinstance(measured, bool)
    with machine.fast_products():  # would be 1e-2 off if it were rounded to bf16
        assert (a @ b - a.double() @ b.double()).abs().max() < 1e-3


def test_products_of_many_shapes_do_not_fill_the_memory():
    code = """if True:
        import resource, torch
        from data.machine import choose_device
        choose_device("cpu")
        torch.set_float32_matmul_precision("medium")  # oneDNN, where the CPU has bf16
        x, weight = torch.randn(1500, 64), torch.randn(256, 64)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for rows in range(500, 1500):
            torch.nn.functional.linear(x[:rows], weight)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    grown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(grown.stdout) < 400, grown.stderr  # MB; over 600 with the caches' own sizes
