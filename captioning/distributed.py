"""Several processes that train one model, as `torchrun` starts them: who is who, and what they tell each other.

    torchrun --nproc_per_node=4 flickr_image_caption_with_pytorch_resnet_lstm.py --decoder attention ...

Without `torchrun` there is one process, and every function here returns at once what it was given.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from captioning import distributed
from captioning.dataset import CaptionSet
from captioning.io import UserError, first_line, log
from captioning.layouts import SPLITS
from captioning.runs import run_start_key

T = TypeVar("T")
# How long one process waits for another before it takes it for lost; torchrun notices a process that died at once, but not
# a machine that vanished. Shares of the encoding end at very different times.
PATIENCE, LONG_PATIENCE = datetime.timedelta(minutes=30), datetime.timedelta(hours=24)
SAME_FILES = "Processes on several machines need the same data and weights, and disks that they share"
LAUNCH_FILE = ".torchrun"  # in a run directory: which torchrun began it
_store: Any = None  # of the process group; messages go through it while errors end the processes one by one
_patient: Any = None  # all processes, with the long patience


def rank() -> int:
    """This process's number, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def by_torchrun() -> bool:
    """Whether `torchrun` started this process, be it alone."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int:
    """This process's number on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def local_cores() -> int:
    """Cores for this process: the machine's, shared among its processes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    return max(1, (os.cpu_count() or 1) // local)


def join() -> None:
    """Meet the other processes, if there are any. Only the first goes on saying what happens.

    Gradients go through NCCL on GPUs and Gloo on CPUs, everything else, which is small, through Gloo.
    """
    global _store, _patient
    if not launched() or dist.is_initialized():
        return
    if os.environ.get("OMP_NUM_THREADS") == "1":  # what torchrun sets where nothing else is said
        torch.set_num_threads(local_cores())
    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    shared, number, count = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    _store = fresh_part(shared, number, count)
    backends = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
    dist.init_process_group(backends, store=_store, rank=number, world_size=count, timeout=PATIENCE)
    _patient = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
    if not is_first():
        log.disabled = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as the process lives)
    log.info(f"{count} processes, {local_cores()} of the cores each")


def fresh_part(store: Any, number: int, count: int) -> Any:
    """A part of torchrun's store that only this start of the processes uses.

    After a restart the store still holds what the processes before wrote, their addresses among it, and machines count
    restarts differently. So the first process invents a name and tells it to all others that are alive now.
    """
    if number:
        own = uuid.uuid4().hex
        store.set(f"hello {number}", own)
        name = store.get(f"welcome {own}").decode()  # waits
        store.set(f"here {name} {number}", "")
    else:
        name, missing = uuid.uuid4().hex, set(range(1, count))
        while missing:
            for other in tuple(missing):
                if store.check([f"hello {other}"]):
                    store.set("welcome " + store.get(f"hello {other}").decode(), name)
                if store.check([f"here {name} {other}"]):
                    missing.remove(other)
            time.sleep(0.02)
    return dist.PrefixStore(name, store)


def leave() -> None:
    """Say good-bye, once everybody has come so far."""
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process, of several without taking the interpreter down: threads of Gloo now and then abort that."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, which alone runs it.

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
    dist.broadcast_object_list(answer, src=0, group=_patient)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]  # type: ignore[no-any-return]


def share(items: Sequence[T] | np.ndarray) -> Any:
    """This process's part of a sequence: every `size()`-th."""
    return items[rank() :: size()]


def gather(mine: list[T]) -> list[T]:
    """Everybody's `share` put together again, in every process."""
    if size() == 1:
        return mine
    parts: list[list[T]] = everybodys(mine)
    return [parts[place % size()][place // size()] for place in range(sum(map(len, parts)))]


def everybodys(value: T) -> list[T]:
    """One value of each process, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def total(*numbers: float) -> list[float]:
    """The sums of these numbers over the processes, in float64."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def largest(*numbers: float) -> list[float]:
    """Of each of these numbers the largest that a process has."""
    return _reduced(numbers, dist.ReduceOp.MAX)


def _reduced(numbers: Sequence[float], operation: Any) -> list[float]:
    if size() == 1:
        return [float(number) for number in numbers]
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, operation)
    return values.tolist()


def wait_for_all() -> None:
    """Go on when everybody has come here."""
    if size() > 1:
        dist.barrier(group=_patient)


def deal(weights: np.ndarray, shares: int) -> np.ndarray:
    """Share things out so that their weights are balanced: by falling weight, to and fro over the shares.

    Args:
        weights: (n,) of each thing.

    Returns:
        (n,) to which of the shares each goes; the same in every process.
    """
    turn = np.arange(len(weights))
    there, back = turn % shares, shares - 1 - turn % shares
    owner = np.empty(len(weights), dtype=np.int64)
    owner[np.argsort(-weights, kind="stable")] = np.where(turn // shares % 2, back, there)
    return owner


def check_agreement(facts: dict[str, Any], advice: str) -> None:
    """Make sure that all processes mean the same.

    Args:
        facts: plain values by what they are called.

    Raises:
        UserError: they differ; the message names the first thing in which they do, with its values by rank.
    """
    all_facts = everybodys(facts)
    for name in facts:
        values = [each.get(name) for each in all_facts]
        if any(value != values[0] for value in values):
            other = next(number for number, value in enumerate(values) if value != values[0])
            raise UserError(
                f"the processes disagree: {name} is {values[0]!r} in rank 0 and {values[other]!r} in rank {other}. {advice}"
            )


def fingerprint(*parts: np.ndarray | list[str]) -> str:
    """A short hash of arrays and lists of words, to compare between processes."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part.tobytes() if isinstance(part, np.ndarray) else "\n".join(part).encode(), crc)
    return f"{crc:08x}"


def launch_name() -> str:
    """What tells this `torchrun` from others, over its restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def remember_launch(directory: Path) -> None:
    """Note in a run directory which `torchrun` began it, for `interrupted_run` after a restart."""
    if by_torchrun():
        (directory / LAUNCH_FILE).write_text(launch_name(), encoding="utf-8")


def interrupted_run(folder: Path) -> Path | None:
    """The run below `folder` that this `torchrun` began before it restarted its processes, if it got that far."""
    (restarts,) = largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))  # each machine counts its own

    def find() -> Path | None:
        notes = list(folder.rglob(LAUNCH_FILE)) if folder.is_dir() and by_torchrun() else []
        ours = [note for note in notes if note.read_text(encoding="utf-8") == launch_name()]
        if not restarts:  # names come again: what has this one's is an earlier torchrun's
            for note in ours:
                note.unlink()
            return None
        return max(
            (note.parent for note in ours if (note.parent / "last.pt").is_file()), key=run_start_key, default=None
        )

    return from_first(find)


def agree_on_flags(flags: dict[str, Any], checkpoint: dict[str, Any] | None = None) -> None:
    """Make sure that all processes were started alike, and from the same checkpoint.

    Raises:
        UserError: they were not.
    """
    facts = {"PyTorch": torch.__version__, **{f"--{name}": str(value) for name, value in flags.items()}}
    if checkpoint:
        facts["the checkpoint's epoch and step"] = f"{checkpoint['epoch']}, {checkpoint['progress']['step']}"
    check_agreement(facts, "Start every process with the same command and files, on the same PyTorch")


def agree_on_data(data: CaptionSet) -> None:
    """Make sure that all processes read the same.

    Raises:
        UserError: they did not.
    """
    words, ids, offsets = data.tokens
    splits = [data.splits[split] for split in SPLITS]
    facts = {
        "the number of captioned images": len(data.names),
        "the hash of the captions and the split": fingerprint(
            data.names, words, ids, offsets, data.first_caption, *splits
        ),
        "the folder of the images": str(data.image_dir.resolve()),
    }
    check_agreement(facts, SAME_FILES)


def agree_on_encoder(weights_hash: str) -> None:
    """Make sure that all processes found the same weights of the encoder.

    Raises:
        UserError: they did not.
    """
    check_agreement({"the hash of the encoder's weights": weights_hash}, SAME_FILES)


def agree_on_directory(directory: Path, file: str) -> None:
    """Make sure that all processes see what the first wrote into the run directory.

    Raises:
        UserError: one does not.
    """
    wait_for_all()
    if not (directory / file).is_file():
        raise UserError(f"rank {rank()} does not see {directory / file}, which rank 0 wrote: {SAME_FILES}")


def with_one_voice(command: Callable[[], int]) -> int:
    """Run a command; what several processes have to complain of alike, one of them says."""
    try:
        return command()
    except UserError as error:
        if is_first():
            first_to_say(str(error))
            raise
        time.sleep(1)  # mostly the first has found the same; torchrun then ends this process
        if not first_to_say(str(error)):
            return 2
        raise UserError(f"rank {rank()}: {error}") from error
    except KeyboardInterrupt:
        if is_first():
            raise
        return 130
    except RuntimeError as error:
        if size() == 1 or not any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
            raise
        print(f"rank {rank()} has lost another process ({first_line(error)}) and ends", file=sys.stderr)
        return 1


def first_to_say(message: str) -> bool:
    """Whether no other process has said this yet."""
    if _store is None:
        return True
    try:
        return int(_store.add(f"said {zlib.crc32(message.encode())}", 1)) == 1
    except RuntimeError:  # the store has ended with whoever kept it
        return True


def pick_device(name: str) -> torch.device:
    """`auto` is the fastest device at hand.

    Raises:
        UserError: the named device is not there.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    has["mps"] &= distributed.size() == 1  # for which torch.distributed has no backend
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise UserError(f"--device {name}: this PyTorch sees no such device here; use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    if distributed.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"rank {distributed.rank()} finds no GPU for itself, this machine has {torch.cuda.device_count()}: "
            "torchrun's --nproc_per_node is at most that"
        )
    torch.cuda.set_device(distributed.local_rank())
    return torch.device(name, distributed.local_rank())
