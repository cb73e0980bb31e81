"""Processes that a launcher started together: one does all the work, others join in parts of it.

The leader is the only one that plans, decides, writes and reports. Where work can be shared it
calls a function, which then runs in all processes at the same time and exchanges tensors through
`Team`. Tensors on a CPU travel by gloo, those on GPUs by NCCL.

Differs: accelerate and DDP wrap the model and its backward pass in every process. Here all
processes share what one would do between two optimizer steps, and add it up: that is the same
whatever took part in a step (LayerDrop leaves blocks out, a process may have no window).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prune_export.errors import PlanError, PruneExportError, StageError

if TYPE_CHECKING:
    import torch

_TO_COME: Final = timedelta(minutes=10)
"""How long processes are waited for that were to be started together."""

_FOR_EVER: Final = timedelta(days=365)
"""Others wait for the leader as long as it does what only it does; who dies closes its socket."""

_GPU_WAIT: Final = timedelta(hours=1)
"""The longest that GPUs wait for one another between two sums: the leader may be saving."""

_BUCKET_BYTES: Final = 1 << 25
_HEADER, _PAYLOAD = 1, 2
_END: Final = -1

_LAUNCHERS_OWN: Final = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Team:
    """The processes of a run: this one's number, how many there are, and how many on this machine.

    Alone there is one, and nothing is exchanged.
    """

    rank: int = 0
    size: int = 1
    here: int = 1
    cpus: Any = None
    gpus: Any = None
    """The groups in which tensors are exchanged, by where they are."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"process {self.rank + 1} of {self.size}"

    def call(self, task: Callable[..., None], *arguments: Any) -> None:
        """Lets all others run `task(team, *arguments)`; the leader goes on with its own part.

        Raises:
            StageError: one of them is gone.
        """
        if self.size > 1:
            with self._together():
                self._tell((task, arguments))

    def follow(self) -> None:
        """Runs what the leader calls, until it is done.

        Raises:
            StageError: the leader, or another, is gone.
        """
        while True:
            with self._together():
                task, arguments = self._tell(None)
            if task is _nothing:
                return
            task(self, *arguments)

    def dismiss(self) -> None:
        """Lets all others end, with nothing more to do."""
        self.call(_nothing)

    def total(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, bit for bit the same in each.

        Raises:
            StageError: another process is gone.
        """
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return
        with self._together():
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                dist.all_reduce(flat, group=self._group(flat))
                parts = torch.split(flat, [tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by the leader's.

        Raises:
            StageError: another process is gone.
        """
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return
        with self._together():
            for tensor in tensors:
                # gloo knows no bool; the view is the same memory.
                sent = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
                dist.broadcast(sent, 0, group=self._group(tensor))

    def told(self, value: Any) -> Any:
        """The leader's value of a small object, in all processes.

        Raises:
            StageError: another process is gone.
        """
        if self.size == 1:
            return value
        with self._together():
            return self._tell(value)

    def send(self, place: Sequence[int], content: bytes) -> None:
        """Sends bytes to the leader, with three numbers that say what they are.

        Raises:
            StageError: the leader is gone.
        """
        import torch
        import torch.distributed as dist

        with self._together():
            header = torch.tensor([*place, len(content)], dtype=torch.int64)
            dist.send(header, 0, self.cpus, _HEADER)
            if content:
                sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                dist.send(sent, 0, self.cpus, _PAYLOAD)

    def end(self) -> None:
        """Tells the leader that this process has sent all."""
        self.send((_END, 0, 0), b"")

    def received(self) -> Iterator[tuple[tuple[int, int, int], bytes]]:
        """What all others send, as it comes, until each has sent all.

        Raises:
            StageError: one of them is gone.
        """
        import torch
        import torch.distributed as dist

        left = self.size - 1
        while left:
            with self._together():
                header = torch.empty(4, dtype=torch.int64)
                sender = dist.recv(header, None, self.cpus, _HEADER)
                first, second, third, size = header.tolist()
                if first == _END:
                    left -= 1
                    continue
                content = torch.empty(size, dtype=torch.uint8)
                dist.recv(content, sender, self.cpus, _PAYLOAD)
            yield (first, second, third), content.numpy().tobytes()

    def _group(self, tensor: torch.Tensor) -> Any:
        return self.gpus if tensor.is_cuda else self.cpus

    def _tell(self, value: Any) -> Any:
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, 0, self.cpus)
        return told[0]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Explains what torch says when another process is not there any more."""
        try:
            yield
        except RuntimeError as error:
            whose = "one of the others" if self.leads else "the first process, or another one,"
            raise StageError(
                self.name,
                f"cannot go on: {whose} ended, as when it is killed for want of memory or a "
                f"machine is lost ({str(error).splitlines()[0]:.120})",
                "look at what it wrote last; give the same command again, also with another "
                "number of processes: what was finished is kept",
            ) from error


ALONE: Final = Team()


def _nothing(team: Team) -> None:
    """Ends `follow`, which never gets to call it."""


def shares(count: int, whole: int, size: int) -> list[range]:
    """Cuts `count` items into `size` runs of whole groups of `whole`, the last perhaps less."""
    groups = -(-count // whole)
    bounds = [min(count, whole * (groups * number // size)) for number in range(size + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


def refuse_absent(team: Team, place: Path) -> None:
    """Refuses to work on a machine that does not have the leader's files.

    Raises:
        StageError: `place` is not there.
    """
    if not place.exists():
        raise StageError(
            team.name,
            f"{place} is not on this machine",
            "use a model and a store that all machines share (`--model`, `--store`)",
        )


@contextmanager
def started_team() -> Iterator[Team]:
    """The processes that torchrun, or whoever sets its variables, started; alone without them.

    A process sees one GPU, by its number on the machine. The variables are taken away: neither
    other libraries nor the processes that verify engines are to take this run for theirs.

    Raises:
        PlanError: a launcher asks for what is not there, such as FSDP.
        StageError: the others did not come.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    _refuse_other_strategies()
    import torch.distributed as dist

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK") or 0)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or size)
    team = Team(rank, size, here)
    _see_one_gpu(local, here)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=_TO_COME)
        cpus = dist.new_group(backend="gloo", timeout=_FOR_EVER)
    except RuntimeError as error:
        raise StageError(
            team.name,
            f"the others did not all come ({str(error).splitlines()[0]:.120})",
            f"start {size}, as WORLD_SIZE says, which reach one another at MASTER_ADDR",
        ) from error
    for name in [*_LAUNCHERS_OWN, *(key for key in os.environ if _is_a_launchers(key))]:
        os.environ.pop(name, None)
    try:
        yield replace(team, cpus=cpus, gpus=_gpu_group())
    finally:
        dist.destroy_process_group()


def joined(team: Team) -> int:
    """Follows the leader; the status to exit with: not 0 where the leader did not come to its end.

    What goes wrong here is said in one line, as the leader says the rest.
    """
    try:
        team.follow()
    except PruneExportError as error:
        sys.stderr.write(f"{team.name}: {error.where}: {error.problem}\n")
        return 1
    return 0


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups neighbours of one kind, so that few and large sums are formed."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not alike or size + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _refuse_other_strategies() -> None:
    """Refuses what a launcher was configured for; the first process says it, the others end."""
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    problem: tuple[str, str] | None = None
    if lacking:
        problem = (
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {lacking[0]} is not set",
            "start with torchrun, which sets both; or unset WORLD_SIZE to be alone",
        )
    for variable, what in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(variable, "").lower() in ("true", "1"):
            problem = (
                f"is configured for {what}, which shards a model: here each process holds the "
                "whole model in training (data parallel)",
                "launch with `--multi_gpu` or by torchrun; `plan --devices` says whether it fits",
            )
    if problem and os.environ["RANK"] != "0":
        raise SystemExit(2)
    if problem:
        raise PlanError("the launcher", *problem)


def _see_one_gpu(local: int, here: int) -> None:
    """Makes this process's GPU the only one that it sees, before CUDA is asked for any."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else [str(number) for number in range(here)]
    if seen != "" and local < len(devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]


def _gpu_group() -> Any:
    import torch
    import torch.distributed as dist

    return dist.new_group(backend="nccl", timeout=_GPU_WAIT) if torch.cuda.is_available() else None


def _is_a_launchers(name: str) -> bool:
    return name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
