"""The ranks of a run under torchrun: what one of them knows, how they agree, and how all end when one does.

    torchrun --nproc-per-node 8 -m onpo_fast.train …

Every rank runs the same program. Rank 0 owns the run directory and the terminal; the others learn its decisions
through ``World.from_main`` and read what it wrote. Outside torchrun there is a world of one, without a process group.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .console import console
from .device import device_of
from .errors import UserError
from .signals import Stopped

Value = TypeVar("Value")

JOIN_MINUTES = 10  # for all ranks to start, until --rank_timeout is known
POLL_SECONDS = 0.5  # how often a rank looks whether another one has ended
GRACE_SECONDS = 10  # for a rank to end by itself once another one has
REPORT_SECONDS = 3  # for the rank that reports an error: torchrun names the first that ends


class World:
    """The ranks that work on a run together.

    Every method is called by all ranks, in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        continuation: what a message says of how to go on when a rank has died.
        minutes: the longest that a rank waits for another one.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.continuation, self.minutes = "start again with --resume", float(JOIN_MINUTES)
        self.control: dist.ProcessGroup | None = None  # gloo: objects and numbers on the host
        self.mesh: DeviceMesh | None = None  # of the ranks' devices: what the weights of a fit are sharded over

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def set_up(self, device: str, minutes: float) -> None:
        """Gives every rank its device, and sets the time-out of what the ranks do together.

        Args:
            device: the value of --device.
            minutes: the longest that a rank waits for another one.

        Raises:
            UserError: if the ranks of this machine cannot each have such a device.
        """
        if self.size == 1:
            return
        kind = rank_device(device, int(os.environ["LOCAL_RANK"]))
        self.minutes, timeout = minutes, timedelta(minutes=minutes)
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        backend = "nccl" if kind == "cuda" else "gloo"
        self.mesh = DeviceMesh.from_group(dist.new_group(backend=backend, timeout=timeout), kind)

    def from_main(self, function: Callable[..., Value], *arguments: object) -> Value:
        """Calls a function on rank 0 only; all ranks return its result. No rank returns before the function has."""
        if self.size == 1:
            return function(*arguments)
        result = [function(*arguments) if self.is_main else None]
        dist.broadcast_object_list(result, src=0, group=self.control)
        return result[0]

    def gather(self, value: Value) -> list[Value]:
        """Returns the values of all ranks, by rank, on rank 0; [] on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def gather_on_all(self, value: Value) -> list[Value]:
        """Returns the values of all ranks, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def largest(self, value: int) -> int:
        """Returns the largest of the ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces the gradients of weights that every rank has whole, as those of adapters, by their mean."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # of an expert that no token of this rank was sent to
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.mesh.get_group())
            parameter.grad /= self.size

    def share(self, count: int) -> slice:
        """Returns which of ``count`` items are this rank's: consecutive ones, as many as another rank's or one more."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def deal(self, items: Sequence[Value]) -> Sequence[Value]:
        """Returns this rank's items where they are dealt one by one, as micro-batches of similar size are."""
        return items[self.rank :: self.size]


def rank_device(device: str, local_rank: int) -> str:
    """Makes the GPU of a rank its current one, which "cuda" then means, and returns "cuda" or "cpu".

    Raises:
        UserError: if --device names one GPU, or there are fewer GPUs than ranks on this machine.
    """
    if ":" in device:
        raise UserError(f"--device {device}: under torchrun each rank takes a GPU of its own; give auto, cuda or cpu")
    kind = device_of(device).type
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            ranks, gpus = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
            raise UserError(
                f"torchrun started {ranks} ranks here, and there are {gpus} GPUs: give --nproc-per-node {gpus}"
            )
        torch.cuda.set_device(local_rank)
    return kind


@contextmanager
def joined() -> Iterator[World]:
    """The world of the processes that torchrun started, or a world of one outside torchrun.

    An error on one rank, or its death, ends all of them: the first to know prints, the others are silent.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield World()
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=JOIN_MINUTES)))
    world = World(rank, size)
    watch = _Watch(world, dist.PrefixStore("watch", store.clone()))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=JOIN_MINUTES))
    console.quiet = not world.is_main
    watch.start()
    try:
        yield world
    except BaseException as error:
        cause = error
        if isinstance(error, RuntimeError) and "timed out" in str(error).lower():  # gloo has no type of its own for it
            waited = f"rank {rank} has waited for another for {world.minutes:g} minutes (--rank_timeout)"
            error = UserError(f"{waited}; {world.continuation}")
        watch.end(error)  # returns if this rank is the one to say it
        if error is cause:
            raise
        raise error from cause
    watch.leave()
    dist.destroy_process_group()


class _Watch(threading.Thread):
    """Ends this process soon after another rank has ended: a collective would wait for it until the time-out.

    Ranks tell each other through torchrun's store, which lives as long as torchrun; a rank that was killed is found by
    those of the same machine, by its process number.
    """

    def __init__(self, world: World, store: dist.Store) -> None:
        super().__init__(name="watch the other ranks", daemon=True)
        self.world, self.store = world, store
        self.left = threading.Event()
        machine = os.environ["GROUP_RANK"]
        store.set(f"rank {world.rank}", f"{machine} {os.getpid()}")
        others = {rank: store.get(f"rank {rank}").decode().split() for rank in range(world.size) if rank != world.rank}
        self.neighbours = {rank: int(process) for rank, (its, process) in others.items() if its == machine}

    def run(self) -> None:
        while not self.left.wait(POLL_SECONDS):
            if (status := self.ended()) is not None:
                time.sleep(GRACE_SECONDS)  # it may be ending by itself, with a state on its way to the disk
                if not self.left.is_set():
                    _exit(status)

    def ended(self) -> int | None:
        """Returns the exit status of a rank that has ended before its time; None if there is none."""
        try:
            # processes before the store, where a rank that ends as it should has already said so
            dead = [rank for rank, process in self.neighbours.items() if not _is_alive(process)]
            if self.store.check(["ended"]):
                return int(self.store.get("ended"))
            for rank in dead:
                if not self.store.check([f"left {rank}"]):
                    if self.claim(1):
                        message = f"rank {rank} (process {self.neighbours[rank]}) has died; {self.world.continuation}"
                        print(f"error: {message}", file=sys.stderr, flush=True)
                    return 1
        except RuntimeError:
            if os.environ["LOCAL_RANK"] == "0":  # without the store, ranks cannot choose the one that prints
                message = f"torchrun has ended on the first machine; {self.world.continuation}"
                print(f"error: {message}", file=sys.stderr, flush=True)
            return 1
        return None

    def claim(self, status: int) -> bool:
        """Returns whether this rank is the first to say that all end, with this exit status."""
        first = self.store.add("claims", 1) == 1
        if first:
            self.store.set("ended", str(status))
        return first

    def end(self, error: BaseException) -> None:
        """Ends this process, if another rank has ended before; else returns, and the error is this rank's to report."""
        status = _status(error)
        expected = isinstance(error, (Stopped, SystemExit))  # any other may be the loss of a connection
        deadline = time.monotonic() + (0 if expected else 4 * POLL_SECONDS)
        while (other := self.ended()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)
        if other is not None or not self.claim(status):
            _exit(status if other is None else other)
        self.left.set()
        console.quiet = False
        # a thread of a process group may keep a process from ending
        last = threading.Timer(REPORT_SECONDS, _exit, [status])
        last.daemon = True
        last.start()

    def leave(self) -> None:
        """Tells the others that this rank has ended as it should, once all of them have come so far."""
        self.store.set(f"left {self.world.rank}", "")
        self.world.from_main(lambda: None)
        self.left.set()


def _is_alive(process: int) -> bool:
    """Whether a process of this machine exists and, as far as /proc is there to say so, is no zombie."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not os.path.exists("/proc/self/stat")


def _status(error: BaseException) -> int:
    """Returns the exit status that an error ends a command with."""
    if isinstance(error, Stopped):
        return error.exit_status
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, (UserError, OSError)) else 1


def _exit(status: int) -> None:
    """Ends the process at once, without waiting for threads that wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
