"""Processes: how a model is cut over them (FSDP2), and how they speak with one voice.

    torchrun --nproc_per_node=8 -- train.py --run=...                                     # one node
    torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -- train.py --run=...

One process is the same program: every function here then does the obvious thing. gloo on CPU, NCCL on GPUs; all of it
is torch.distributed's, nothing is home-made. Next: resume.py.
"""

import os
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from plumbing.config import InputError


def start_processes(cfg):
    """torchrun's processes, or just this one -> the device of this process.

    A process that waits for the others longer than cfg.timeout gives up; torchrun then ends the rest.
    """
    device = pick_device(cfg.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=cfg.timeout)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        elif cfg.dtype != "float32":  # FSDP gives us mixed precision too, and wants a group, be it of one
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def pick_device(name):
    """--device -> torch.device ("": cuda if there is one, else cpu); of several GPUs the one torchrun means for this
    process. Raises InputError if it is not on this machine."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # no such name, no driver, torch without CUDA, too few GPUs
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device={name}: not on this machine, or no device at all ({reason})") from None
    return device


def pick_dtype(name, device):
    """--dtype -> torch.dtype of a model that answers ("": bfloat16 on a GPU, float32 elsewhere)."""
    if name not in ("", "float32", "bfloat16"):
        raise InputError(f"--dtype={name}: must be float32 or bfloat16")
    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))


def end_processes():
    """Threads that still listen when the interpreter is gone can turn a good end into an abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def parallelize(cfg, student, device):
    """Cut each block over the processes with FSDP2, then the rest (embedding, norm, head) as one.

    Float32 shards and optimizer state; blocks compute in cfg.dtype. One float32 process needs none of it.
    """
    for block in student.model.layers:
        block.checkpoint_activations = cfg.checkpoint_activations
        if cfg.compile:
            block.compile()  # before fully_shard, whose hooks would break the graph; parameter names stay
    if world_size() == 1 and cfg.dtype == "float32":
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    # cast_forward_inputs would round RoPE's cos and sin to bfloat16
    policy = MixedPrecisionPolicy(getattr(torch, cfg.dtype), torch.float32, cast_forward_inputs=False)
    for part in [*student.model.layers, student]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for module in student.modules():
        if isinstance(module, FSDPModule):  # plain sums: train_step has divided by the global token count already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def all_reduce(number, device):
    """The sum of a number over all processes, in float64."""
    if not dist.is_initialized():
        return float(number)
    total = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def gather(value):
    """What each process has, as a list in the order of ranks, on every process. Any small Python object."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def in_step(student):
    """In this block each process may call `student` as often as its own work takes.

    A forward pass of a sharded student needs every process. So each pass begins with a word to the others, and who has
    finished takes part in theirs, on one token for nobody, until all have.
    """
    if world_size() == 1:
        yield
        return
    device = next(student.parameters()).device

    def tell(*_):
        all_reduce(1, device)

    hook = student.register_forward_pre_hook(tell, prepend=True)  # before FSDP's own, which already gathers weights
    try:
        yield
    finally:
        hook.remove()
    with torch.no_grad():
        while all_reduce(0, device):
            student(torch.zeros(1, 1, dtype=torch.int64, device=device))


def on_process_0(what):
    """what() of process 0, on every process; if it fails there, all stop with that one message."""
    answer = [None, None]
    if rank() == 0:
        try:
            answer = [what(), None]
        except (InputError, OSError) as error:
            answer = [None, str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        stop(answer[1])
    return answer[0]


def stop(message):
    """End every process, with one line from process 0. All of them must call this."""
    if world_size() == 1:
        raise InputError(message)
    if rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    barrier()  # the first to exit has the others killed: not before the message is out
    raise SystemExit(1)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def grad_norm(student):
    """The norm of all gradients over all processes, as a tensor; of shards it is no partial one."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def exists(path):
    """On process 0's disk."""
    return on_process_0(path.exists)


class Interrupt:
    """Ctrl-C (or SIGTERM) lets the step finish; then the loop saves and stops. A second one stops at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():  # signals belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
