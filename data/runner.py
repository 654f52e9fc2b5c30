"""How a model is run while it is trained: as it is, as a bf16 copy, compiled, in DDP, or cut over
several processes, each with a part of every parameter (FSDP, torch's own).

Imports of torch.distributed's parts take a second, so they are where they are needed.
"""
import copy
import gc
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data.cli import UserError, is_out_of_memory
from data.machine import DTYPES, compiles_well


def place(model, args, runtime):
    """Put the model on the device; with --shard cut it over those of all processes."""
    if not args.shard or runtime.world == 1:
        return model.to(runtime.device, torch.float32)
    if runtime.dtype == "fp16":
        raise UserError("--shard is for bf16 and fp32: fp16's loss scaling sees no whole gradient")
    if args.compile:
        raise UserError("--shard does not go together with --compile")
    dtype = None if runtime.dtype == "fp32" else DTYPES[runtime.dtype]
    shard(model, model.blocks, runtime.device, dtype, ("hidden", "last_logits"))
    runtime.sharded = True
    return model


def make_runner(model, task, args, runtime, step=0):
    """(the module to call in place of `model`, the Runtime to call it in, what to call after each
    optimizer step): the model itself or its BF16Copy, perhaps compiled or in DDP.

    On a GPU casting costs little, so there is no copy; DDP would exchange gradients that the copy
    no longer has; and frozen weights are better not held twice. A model that is cut over processes
    is gathered in the runtime's precision (see `place`).
    """
    runner, precision, after_step = model, runtime, lambda: None
    if runtime.sharded:
        return runner, replace(runtime, dtype="fp32"), after_step
    copied = runtime.dtype == "bf16" and runtime.device.type == "cpu" and runtime.world == 1
    if copied and not args.autocast and all(p.requires_grad for p in model.parameters()):
        runner, precision = BF16Copy(model), replace(runtime, dtype="fp32")
        after_step = runner.sync_weights
    if args.compile or (args.compile is None and compiles_well(runtime.device)):
        try_compile(runner, task, precision, step)
    if runtime.world > 1:
        # buffers are only tables of positions
        runner = nn.parallel.DistributedDataParallel(runner, forward_sync_buffers=False)
    return runner, precision, after_step


def try_compile(model, task, runtime, step=0):
    """Compile the blocks of a model (or of the copy in a BF16Copy) for training, tried on a batch
    of that step; if that fails it stays as it is. Not the loss: how many rows have a target is
    known only when it runs, and each number of them would be compiled anew."""
    inner = getattr(model, "low", model)
    plain, compiled = inner.hidden, torch.compile(inner.hidden)

    def hidden(ids, cache=None, *args):
        if cache is not None or not inner.training:
            return plain(ids, cache, *args)
        return compiled(ids, cache, *args)

    inner.hidden = hidden
    try:
        batch = [t.to(runtime.device) for t in task.batches(step)[0]]
        with runtime.autocast():
            task.loss(model, *batch).backward()
    except Exception as e:  # whatever the compiler raised, eager mode still works
        del inner.hidden
        reason = str(e).strip().split("\n")[0][:100]
        print(f"--compile does not work here, going on without ({type(e).__name__}: {reason})")
    finally:
        model.zero_grad(set_to_none=True)


class BF16Copy(nn.Module):
    """A bf16 copy of a model, for forward and backward passes on a CPU.

    Autocast casts every weight in every pass and keeps what flows between layers in float32; here
    all that is bf16, which was 1.2 times as fast at GPT-2's shape. But bf16 has three digits, and a
    step changes a weight by less than that. So the model itself, the master, stays in float32:
    gradients are added up there, the optimizer steps there, and `sync_weights` rounds it into the
    copy. (Mixed Precision Training, Micikevicius et al. 2018, section 3.1.)
    """

    def __init__(self, master):
        super().__init__()
        self.low = copy.deepcopy(master)
        self.masters, self.lows = list(master.parameters()), list(self.low.parameters())
        for p, low in zip(self.masters, self.lows):
            low.data = low.data.bfloat16()
            low.register_post_accumulate_grad_hook(partial(accumulate_grad, p))

    def forward(self, *args, **kwargs):
        return self.low(*args, **kwargs)

    def zero_grad(self, set_to_none=True):
        """Clear the gradients, which are the master's."""
        for p in self.masters:
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()

    def sync_weights(self):
        """Round the master's weights into the copy."""
        with torch.no_grad():
            torch._foreach_copy_(self.lows, self.masters)


def accumulate_grad(master, low):
    """Add the gradient of `low` to that of its master, in float32, and forget it."""
    if master.grad is None:
        master.grad = low.grad.float()
    else:
        master.grad.add_(low.grad)
    low.grad = None


def launch(fit, report, runtime, out):
    """fit(), after which all processes leave together, and report(its result), if there is one, by
    the first, or by all of a model that is cut over them. UserError with advice if the memory is
    full or another process of the run has ended."""
    try:
        result = fit()
        if result and runtime.sharded:
            dist.barrier()  # best.pt is written
            report(result)
        if runtime.world > 1:
            # free DDP before the process group: a process that exits while DDP still uses gloo's
            # threads is aborted
            dist.barrier()
            gc.collect()
    except RuntimeError as e:
        if is_out_of_memory(e):
            advice = "halve the batch and double --grad_accum, or try --grad_checkpoint"
            if runtime.device.type == "cuda":
                advice += " or PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
            raise UserError(f"out of memory: {advice}") from e
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: this line is to come first
            how = f"--resume {out} goes on from its last checkpoint"
            raise UserError(f"another process of this run has ended: {how}") from e
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if result and runtime.rank == 0 and not runtime.sharded:
        report(result)


# --------------------------------------------------------------------------------------------
# A model in parts
# --------------------------------------------------------------------------------------------


def shard(model, parts, device, dtype, methods=()):
    """Cut the parameters of `parts`, modules that run one after another, and the rest of the model
    over all processes, each parameter by its rows. A part is gathered in `dtype` when it runs and
    let go after it; weights, gradients and moments stay in float32. `methods` are those of the
    model that are called beside forward. (ZeRO stage 3, Rajbhandari et al. 2020.)
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # inputs stay as they are: tables of positions are float32 for a reason
    policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in (*parts, model):  # of a model that is mapped from its file no more is read
        fsdp.fully_shard(module.float(), mesh=mesh, mp_policy=policy)
    for name in methods:
        fsdp.register_fsdp_forward_method(model, name)


def is_cut(tensor):
    """Whether this process has only a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """The whole of a tensor that may be cut; all processes must ask."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def whole_tensors(tensors):
    """{name: the whole of each tensor, in float32 on the CPU}, by the first process; {} by others.
    One is gathered at a time."""
    first, found = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if first:
            found[name] = tensor.float().cpu()
    return found


def whole_state(optimizer):
    """An optimizer's state dict with whole tensors."""
    content = optimizer.state_dict()
    state = {i: {k: whole(v) for k, v in s.items()} for i, s in content["state"].items()}
    return content | {"state": state}


def cut_like(tensor, other):
    """This process's part of a whole tensor, cut as `other` is; the tensor, if that is not."""
    if not is_cut(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def save_parts(path, model, optimizers):
    """Write a folder with weights and the optimizers' moments, each process its part."""
    from torch.distributed import checkpoint

    checkpoint.save(parts_of(model, optimizers), checkpoint_id=path)


def load_parts(path, model, optimizers):
    """Read what `save_parts` has written, perhaps in another number of processes, or in one."""
    from torch.distributed import checkpoint

    if not Path(path).is_dir():
        raise UserError(f"{path}, the weights of this run, is gone")
    state = parts_of(model, optimizers)
    checkpoint.load(state, checkpoint_id=path)
    checkpoint.state_dict.set_state_dict(
        model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"]
    )


def parts_of(model, optimizers):
    """{"model", "optimizers"}: their tensors by the parameters' names."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return dict(zip(("model", "optimizers"), get_state_dict(model, optimizers)))
