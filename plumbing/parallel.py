"""Processes: how a model is cut over them (FSDP2), how they agree, how they are asked to stop.

    torchrun --nproc_per_node=8 -- train.py --run=...                       # one node
    torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d \\
             --rdzv_endpoint=HOST:29500 -- train.py --run=...               # eight nodes

With one process the same program runs, and every function here does the obvious thing. gloo on
CPUs, NCCL on GPUs. Collective: a function that all processes must call. Next: plumbing/resume.py.
"""

import os
import signal
import sys
import threading
import time
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
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=cfg.timeout)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        elif cfg.dtype != "float32":
            # FSDP also does the mixed precision, and needs a process group, even of size one
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            dist.init_process_group(backend, timeout=timeout, **alone)
    return device


def pick_device(name):
    """--device -> torch.device; "": cuda if there is one, else cpu.

    Of several GPUs the one that torchrun assigns to this process. Raises InputError if it is not on
    this machine.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        # no such name, no driver, torch without CUDA, too few GPUs
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--device={name}: not on this machine, or no device at all ({reason})"
        ) from None
    return device


def pick_dtype(name, device):
    """--dtype -> torch.dtype of a model that answers ("": bfloat16 on a GPU, float32 elsewhere)."""
    if name not in ("", "float32", "bfloat16"):
        raise InputError(f"--dtype={name}: must be float32 or bfloat16")
    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))


def end_processes():
    """Leave the process group: threads still listening at exit can crash the interpreter."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def sharing_processes():
    """Under torchrun the processes share the answers; each has a whole model of its own."""
    begun = "RANK" in os.environ and not dist.is_initialized()
    if begun:
        # they only exchange texts at the end; the first to finish waits for the longest answer
        dist.init_process_group("gloo", timeout=timedelta(days=2))
    yield
    if begun:
        end_processes()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


# -------------------------------------------------------------------------------------------------
# A student over several processes, and compiled


def parallelize(cfg, student, device):
    """Cut each block over the processes with FSDP2, then the rest (embedding, norm, head) as one.

    Float32 shards and optimizer state; blocks compute in cfg.dtype. One float32 process needs none
    of it.
    """
    for block in student.model.layers:
        block.checkpoint_activations = cfg.checkpoint_activations
    if cfg.compile:
        compile_blocks(student)
    if world_size() == 1 and cfg.dtype == "float32":
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    # cast_forward_inputs would round RoPE's cos and sin to bfloat16
    dtype = getattr(torch, cfg.dtype)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for part in [*student.model.layers, student]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            # plain sums: train_step has divided by the global token count already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(student):
    """Each process keeps its shards only: a forward pass without a backward one leaves some gathered."""
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Compiler:
    """torch.compile's backend for the blocks, which counts what it compiled and what then runs."""

    def __init__(self):
        self.seconds = 0.0  # spent in compiling
        self.calls = 0  # of compiled code
        self.inductor = torch._dynamo.lookup_backend("inductor")

    def __call__(self, graph, inputs):
        tick = time.time()
        code = self.inductor(graph, inputs)
        self.seconds += time.time() - tick

        def run(*given):
            self.calls += 1
            return code(*given)

        return run


def compile_blocks(student):
    """torch.compile each block: `block.ran_compiled` then says whether its last pass was compiled.

    torch falls back to eager code without an error once a block was compiled for too many kinds of
    input (torch._dynamo.config.recompile_limit). So it is counted, not assumed.
    """
    student.compiler = compiler = Compiler()

    def counted(block, forward):
        def call(*inputs):
            before = compiler.calls
            out = forward(*inputs)
            block.ran_compiled = compiler.calls > before
            return out

        return call

    for block in student.model.layers:
        # the forward alone: FSDP's hooks, which run around it, would break the graph
        compiled = torch.compile(block.forward, backend=compiler)
        block.forward = counted(block, compiled)
        block.ran_compiled = False


def compiled_blocks(student):
    """How many blocks ran compiled code in their last forward pass."""
    return sum(getattr(block, "ran_compiled", False) for block in student.model.layers)


def eager():
    """In this block nothing is compiled: for sampling, whose caches grow with every token.

    Each length would be compiled anew, until torch gives up compiling the blocks altogether.
    """
    return torch.compiler.set_stance("force_eager")


# -------------------------------------------------------------------------------------------------
# Agreeing


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

    A forward pass of a sharded student needs every process. So each pass is announced by an
    all-reduce, and processes that have finished join with a dummy token until all have.
    """
    # eval.py gives each process a whole model of its own
    if world_size() == 1 or not isinstance(student, FSDPModule):
        yield
        return
    device = next(student.parameters()).device

    def announce(*_):
        all_reduce(1, device)

    # before FSDP's own hook, which gathers weights
    hook = student.register_forward_pre_hook(announce, prepend=True)
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
    """The norm of all gradients over all processes, as a tensor."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def exists(path):
    """On process 0's disk."""
    return on_process_0(path.exists)


# -------------------------------------------------------------------------------------------------
# Asked to stop


class Interrupted(Exception):
    """Raised by a forward pass, in all processes at once, when a signal has asked to stop."""


class Interrupt:
    """`with Interrupt() as interrupt:` signals no longer end the process; they ask it to stop.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP all ask to save and stop. Schedulers send theirs more than
    once (Slurm to every process, torchrun to its workers, again), so only a second Ctrl-C, at least
    half a second after the first, raises KeyboardInterrupt. A worker whose torchrun has died is
    asked to stop, too.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self):
        self.signalled = False
        self.ctrl_c = None  # when the first one came
        self.before = {}  # {signal: its handler before}
        self.parent = os.getppid()

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # signals belong to the main thread
        for number in self.SIGNALS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                self.before[number] = before
                signal.signal(number, self.handle)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGINT:
            if self.ctrl_c is not None and now - self.ctrl_c > 0.5:
                raise KeyboardInterrupt
            self.ctrl_c = self.ctrl_c or now
        if not self.signalled:
            name = signal.Signals(number).name
            tell(f"\n{name}: saving, then stopping; Ctrl-C once more stops at once\n")
        self.signalled = True

    def asked(self):
        """Has this process been asked to stop?"""
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        return self.signalled or (under_torchrun and os.getppid() != self.parent)

    def asked_anywhere(self, device):
        """Has any process been asked to stop? The same answer on all of them. Collective."""
        return all_reduce(self.asked(), device) > 0

    @contextmanager
    def heard(self, student):
        """In this block a forward pass of `student` raises Interrupted if any process was asked.

        All processes must make the same number of passes, as FSDP asks of them anyway.
        """
        device = next(student.parameters()).device

        def ask(*_):
            if self.asked_anywhere(device):
                raise Interrupted

        # before FSDP's own hook, which gathers weights
        hook = student.register_forward_pre_hook(ask, prepend=True)
        try:
            yield
        finally:
            hook.remove()


def tell(text):
    """To stderr from a signal handler, where print could be in the middle of printing."""
    try:
        os.write(2, text.encode())
    except OSError:
        pass  # the terminal is gone: that is what SIGHUP says
