"""The launcher's variables, and a store of this attempt alone.

    torchrun --nproc-per-node 4 -m relora pretrain CONFIG

sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in every process, as do Slurm's and
other launchers with a line of shell. Under torchrun the store at that address outlives a failed attempt: with
`--max-restarts` the processes of the next attempt would read the addresses of dead ones and hang. So rank 0 of every
attempt opens a store of its own and the launcher's store only says where it is.
"""

import functools
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from relora.errors import RunStopped, UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

JOIN_SECONDS = 300
"""Longest wait for the other processes of a launch to appear."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_STORE_SECONDS = 60
"""Longest wait for an answer of the store."""
_CONNECT_SECONDS = 2.0


@dataclass(frozen=True)
class Place:
    """The place of this process among those of a launch."""

    rank: int
    world: int
    local_rank: int
    """Number of the process among those of its machine."""
    local_world: int
    """Number of the processes of its machine."""
    address: str
    port: int
    is_agent_store: bool = False
    """Whether the launcher itself holds the store at `address`, for all attempts."""
    attempt: str = "0"
    """Number of the attempt, as far as the launcher counts them."""


def place_of(variables: Mapping[str, str]) -> Place | None:
    """Read the launcher's variables; None where they speak of no other process.

    Raises:
        UserError: one of them is missing, or no number, or they contradict one another.
    """
    if variables.get("WORLD_SIZE", "1") == "1":
        return None
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not variables.get(name)]:
        given = next(name for name in ("WORLD_SIZE", "RANK") if variables.get(name))
        raise UserError(
            f"{missing[0]}: not set, although {given}={variables[given]} says that there are several processes; start "
            "them by `torchrun --nproc-per-node N -m relora ...`, or unset WORLD_SIZE to train in one"
        )
    rank, world, port = (_number(variables, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world:
        raise UserError(f"RANK: {rank} of WORLD_SIZE={world} processes does not exist; they count from 0")
    local_rank = _number(variables, "LOCAL_RANK", rank)
    return Place(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=_number(variables, "LOCAL_WORLD_SIZE", world),
        address=variables["MASTER_ADDR"],
        port=port,
        is_agent_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=variables.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def is_spoken_for(variables: Mapping[str, str]) -> bool:
    """Whether there is a rank 0 to say what is wrong with the variables: they name another rank, one that exists."""
    rank, world = variables.get("RANK", ""), variables.get("WORLD_SIZE", "")
    are_counts = all(text.isascii() and text.isdigit() for text in (rank, world))
    return are_counts and 0 < int(rank) < int(world)


def leave_launcher() -> None:
    """Forget the launcher: this process, and those that it starts, are alone from here on."""
    for name in VARIABLES:
        os.environ.pop(name, None)


@functools.cache
def open_store(place: Place) -> "TCPStore":
    """Open the store of this attempt: rank 0 holds it, and the others find it through the launcher's. It is kept open.

    Raises:
        RunStopped: the store was not found in `JOIN_SECONDS`.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    seconds = timedelta(seconds=_STORE_SECONDS)
    if not place.is_agent_store:
        try:
            return TCPStore(
                place.address,
                place.port,
                None,
                place.rank == 0,
                timedelta(seconds=JOIN_SECONDS if place.rank else _STORE_SECONDS),
                wait_for_workers=False,
            )
        except RuntimeError:
            raise RunStopped(
                f"rank {place.rank}: nothing answers at MASTER_ADDR:MASTER_PORT ({place.address}:{place.port}); rank 0 "
                "opens that port, which has to be free there and reachable from here"
            ) from None
    launchers = TCPStore(place.address, place.port, None, False, timedelta(seconds=JOIN_SECONDS))
    key = f"relora/store/{place.attempt}"
    if place.rank == 0:
        own = TCPStore("127.0.0.1", 0, None, True, seconds, wait_for_workers=False)
        token = secrets.token_hex(8)
        own.set("token", token)
        launchers.set(key, json.dumps([[place.address, socket.gethostname(), "127.0.0.1"], own.port, token]))
        return own
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        if launchers.check([key]):
            hosts, port, token = json.loads(launchers.get(key))
            for host in hosts:
                if (found := _open_found(str(host), int(port), str(token))) is not None:
                    return found
        time.sleep(0.1)
    raise RunStopped(f"rank {place.rank}: rank 0 did not open its store within {JOIN_SECONDS} seconds")


def _open_found(host: str, port: int, token: str) -> "TCPStore | None":
    """Connect to a store of rank 0; None if nothing answers there, or what answers is not the store with this token.

    An address may be left over from an attempt whose processes are dead, so nothing is expected of it.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
        store = TCPStore(host, port, None, False, timedelta(seconds=_STORE_SECONDS))
        return store if store.check(["token"]) and store.get("token").decode() == token else None
    except (OSError, RuntimeError):
        return None


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read a variable as a count; `UserError` if it is none."""
    text = variables.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}: {text!r} is not a whole number; start the processes by torchrun")
    return int(text)
