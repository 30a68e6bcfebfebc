"""Several processes that train one model: who is who, and what they tell each other. Knows nothing of captions.

    torchrun --nproc_per_node=4 flickr_image_caption_with_pytorch_resnet_lstm.py --decoder attention ...

Without `torchrun` there is one process, and every function returns at once what it was given.
"""

from __future__ import annotations

import datetime
import functools
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from captioning.io import Terminated, UserError, first_line, log

T = TypeVar("T")
P = ParamSpec("P")
# How long one process waits for another: longer than the processes' shares of the encoding end apart. torchrun notices
# at once that a process died, and TCP after some minutes that a machine vanished.
PATIENCE = datetime.timedelta(hours=6)
SAME_COMMAND = "Start every process with the same command and files, on the same PyTorch"
SAME_FILES = "Processes on several machines need the same data and weights, and disks that they share"


def rank() -> int:
    """Return this process's number, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Tell whether this process is the one that writes files and prints."""
    return rank() == 0


def launched() -> bool:
    """Tell whether `torchrun` or a cluster's launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Return this process's number on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def local_cores() -> int:
    """Return the number of cores for this process: the machine's, divided among its processes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    return max(1, (os.cpu_count() or 1) // local)


def join() -> None:
    """Connect to the other processes, if there are any. Only the first prints from here on.

    Gradients go through NCCL on GPUs and Gloo on CPUs, everything else, which is small, through Gloo.

    Raises:
        UserError: torchrun has started this process anew after another one was lost.
    """
    if not launched() or dist.is_initialized():
        return
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        if os.environ["RANK"] != "0":
            time.sleep(60)  # the first says why; torchrun then ends this process
            end(2)
        raise UserError(
            "torchrun lost a process and has started all anew, which begins no second run: continue the one that it "
            "named as its run directory with --resume RUN, and start torchrun without --max_restarts"
        )
    if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default for several processes
        torch.set_num_threads(local_cores())
    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", timeout=PATIENCE)
    if not is_first():
        log.disabled = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as the process lives)
    if size() > 1:
        log.info(f"{size()} processes, {local_cores()} of the cores each")


def leave() -> None:
    """Disconnect, once all processes are done."""
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process with an exit code; without taking the interpreter down where Gloo's threads may abort that."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def from_first(make: Callable[[], T]) -> T:
    """Return in every process what `make` returns in the first, which alone runs it.

    Raises:
        UserError: `make` raised it there; then in every process.
    """
    if size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if is_first():
        try:
            answer[0] = make()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]  # type: ignore[no-any-return]


def shard(items: Sequence[T] | np.ndarray) -> Any:
    """Return this process's part of a sequence: every `size()`-th item."""
    return items[rank() :: size()]


def gather(mine: list[T]) -> list[T]:
    """Undo `shard`: return the parts of all processes in the sequence's order, in every process."""
    parts = all_gather(mine)
    return [parts[place % size()][place // size()] for place in range(sum(map(len, parts)))]


def all_gather(value: T) -> list[T]:
    """Return one value of each process, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def total(*numbers: float) -> list[float]:
    """Return the sums of these numbers over the processes, in float64."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def largest(*numbers: float) -> list[float]:
    """Return the largest that a process has of each of these numbers."""
    return _reduced(numbers, dist.ReduceOp.MAX)


def _reduced(numbers: Sequence[float], operation: Any) -> list[float]:
    if size() == 1:
        return [float(number) for number in numbers]
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, operation)
    return values.tolist()


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if size() > 1:
        dist.barrier()


def balance_by_weight(weights: np.ndarray, parts: int) -> np.ndarray:
    """Assign items to parts of about equal weight: by falling weight, to parts 0, 1, ..., 1, 0, 0, 1, ...

    Args:
        weights: (n,) of the items.

    Returns:
        int64 (n,) the part of each item; the same in every process.
    """
    turn = np.arange(len(weights))
    forward, backward = turn % parts, parts - 1 - turn % parts
    owner = np.empty(len(weights), dtype=np.int64)
    owner[np.argsort(-weights, kind="stable")] = np.where(turn // parts % 2, backward, forward)
    return owner


def check_agreement(facts: Mapping[str, Any], advice: str) -> None:
    """Make sure that all processes have the same facts.

    Args:
        facts: plain values by name, of the same names in every process.
        advice: the last sentence of the message.

    Raises:
        UserError: they differ; the message names the first fact that does, with two values and their ranks.
    """
    all_facts = all_gather(dict(facts))
    for name, value in all_facts[0].items():
        for number, others in enumerate(all_facts):
            if others.get(name) != value:
                raise UserError(
                    f"the processes disagree on {name}: {value!r} in rank 0, {others.get(name)!r} in rank {number}. {advice}"
                )


def check_file(path: Path) -> None:
    """Make sure that every process sees a file that the first one has written.

    Raises:
        UserError: one does not.
    """
    wait_for_all()
    check_agreement({f"whether {path} exists": path.is_file()}, SAME_FILES)


def one_error(command: Callable[P, int]) -> Callable[P, int]:
    """Decorate a command: an error or a signal that several processes meet alike is raised in one of them.

    The others return its exit code.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            if not is_first():
                time.sleep(1)  # the first has mostly found the same, and torchrun then ends this process
            if not claim_message(str(error)):
                return 2
            if is_first():
                raise
            raise UserError(f"rank {rank()}: {error}") from error
        except (KeyboardInterrupt, Terminated) as stop:
            if is_first():
                raise
            return 128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)
        except RuntimeError as error:
            if size() == 1 or not any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
                raise
            print(f"rank {rank()} has lost another process ({first_line(error)}) and ends", file=sys.stderr)
            return 1

    return wrapped


def claim_message(message: str) -> bool:
    """Tell whether no other process has claimed this message yet."""
    if not dist.is_initialized():
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(f"message {zlib.crc32(message.encode())}", 1)) == 1
    except RuntimeError:  # the process that kept the store has ended
        return True


def device_name(device: torch.device) -> str:
    """Return what a run ran on, e.g. `cpu, PyTorch 2.14.1`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, PyTorch {torch.__version__}"


def pick_device(name: str) -> torch.device:
    """Return the device of that name, this process's GPU of several; `auto` is the fastest one available.

    Raises:
        UserError: PyTorch sees no such device.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    has["mps"] &= size() == 1  # for which torch.distributed has no backend
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise UserError(f"--device {name}: this PyTorch sees no such device here; use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank()} finds no GPU for itself, this machine has {torch.cuda.device_count()}: "
            "torchrun's --nproc_per_node is at most that"
        )
    torch.cuda.set_device(local_rank())
    return torch.device(name, local_rank())
