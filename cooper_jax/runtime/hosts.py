"""One run on several hosts: how its processes meet, what they tell each other, and how they end together.

Every process runs the same program and takes the same decisions (multi-controller).  What one alone knows goes
round by `exchange`, over the coordination service of `jax.distributed`: bytes on the host, from any thread, without
a program on the devices, which two threads could enqueue in different orders.

1. `start` joins the processes, where there are several.
2. `share`, `exchange`, `broadcast`, `fetch`: work divided, results on every process.
3. `look` is called where a step may be given up: it raises `Stopped` on all processes at the same call once one has
   got a SIGTERM, as machines that are about to be taken away send it.
4. `together` wraps a process's main part.  A process that fails says so to the others, and one that is lost falls
   silent: either ends them all, with a message, within `SILENCE` and a few seconds.

Exit codes:  0 done   2 a setup error   75 stopped after a checkpoint   69 another host was lost; after the last two
the same command goes on.  (The first host runs the service: when it is lost, JAX aborts the others at once: 134.)
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

SETUP_ERROR, LOST, STOPPED = 2, 69, 75
BEAT = 2.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one, after which a process is taken for lost
# ms that `exchange` waits: others may compile, or load; those who are lost are found by their silence.
PATIENCE = 24 * 3600 * 1000
KEPT = 256  # calls of `exchange` whose bytes stay in the service
# Beyond our own limit, so that our message and exit code come first.
_HEARTBEAT_TIMEOUT = 90
_PREFIX = "cooper"
_AGAIN = "; start the same command again on all hosts, it resumes by itself"

_counts: Counter[str] = Counter()  # how often `exchange` was called by each name
_own_keys: deque[str] = deque()  # of the last calls
_lock = threading.Lock()
_looks = 0
_heard = [time.monotonic()]  # when the service last answered
_signalled = threading.Event()
_finished = threading.Event()


class Stopped(Exception):
    """A SIGTERM came; all processes raise it at the same call of `look`."""


class HostLost(RuntimeError):
    """Another process does not answer."""


def start_hosts() -> None:
    """Join the other processes of this run; with one process alone only the signal is taken.

    Which others there are is told by JAX_COORDINATOR_ADDRESS (HOST:PORT), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    found by JAX itself on TPU VMs, under SLURM and under Open MPI.  To be called before any device is touched.

    Raises ValueError where some of the three variables are missing.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    options: dict[str, Any] = {"heartbeat_timeout_seconds": _HEARTBEAT_TIMEOUT}
    if given:
        if len(given) < len(names):
            missing = [n for n in names if n not in given]
            raise ValueError(f"{', '.join(given)} is set without {', '.join(missing)}: set all three")
        address, count, index = given.values()
        options |= dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
        # Without this JAX would look for a cluster to learn which devices are this process's: all of this host's.
        options["cluster_detection_method"] = "deactivate"
    elif not _cluster():
        signal.signal(signal.SIGTERM, lambda *_: _signalled.set())
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**options)  # which takes the signal
    if jax.process_count() > 1:
        _heard[0] = time.monotonic()
        for work in (_watch, _watch_the_watch):
            threading.Thread(target=work, daemon=True).start()


def _cluster() -> bool:
    """Whether JAX can find this process's peers by itself."""
    if any(int(os.environ.get(n, 1)) > 1 for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return chips and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


# --- work divided --------------------------------------------------------------------------------------------


def is_primary() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """A line for the user, once."""
    if is_primary():
        print(text, flush=True)


def is_assigned(key: int) -> bool:
    """Whether the item of this number is this process's to work on."""
    return key % jax.process_count() == jax.process_index()


def exchange_bytes(name: str, own: bytes) -> list[bytes]:
    """Every process's bytes, in the order of processes.

    All processes must call it, by the same name; calls of one name meet in their order, calls of different names in
    any.  Raises Lost where the service is gone.
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [own]
    with _lock:
        number = _counts[name]
        _counts[name] += 1
    place = f"{_PREFIX}/exchange/{name}"
    client = _client()
    try:
        client.key_value_set_bytes(f"{place}/{number}/{index}", own)
        others = {i: f"{place}/{number}/{i}" for i in range(count) if i != index}
        got = {i: client.blocking_key_value_get_bytes(key, PATIENCE) for i, key in others.items()}
        with _lock:  # what is so old has been read by all: they have come to later calls
            old = _own_keys.popleft() if len(_own_keys) == KEPT else None
            _own_keys.append(f"{place}/{number}/{index}")
        if old is not None:
            client.key_value_delete(old)
    except jax.errors.JaxRuntimeError as error:
        raise HostLost(f"the coordination service does not answer ({error})") from error
    return [own if i == index else got[i] for i in range(count)]


def exchange_json(name: str, own: Any) -> list[Any]:
    """`exchange` of what JSON holds."""
    return [json.loads(x) for x in exchange_bytes(name, json.dumps(own).encode())]


def broadcast_value(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives on process 0, where alone it is called, on all."""
    return exchange_bytes(name, make() if is_primary() else b"")[0]


def on_primary_first(name: str, work: Callable[[], Any]) -> None:
    """Run `work` on process 0 alone; the others wait for it."""

    def done() -> bytes:
        work()
        return b""

    broadcast_value(name, done)


def fetch_arrays(tree: Any) -> Any:
    """Arrays of the devices -> NumPy arrays, whole, on every process.

    Runs a program where a part lies on another host's devices: to be called by all processes, in one order.
    """
    leaves, treedef = jax.tree.flatten(tree)
    away = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and not _at_hand(x)]
    for i in away:
        leaves[i] = _replicate(leaves[i].sharding.mesh)(leaves[i])
    return jax.tree.unflatten(treedef, jax.device_get(leaves))


def _at_hand(x: jax.Array) -> bool:
    return x.is_fully_addressable or x.is_fully_replicated


@functools.cache
def _replicate(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


# --- how a run ends ------------------------------------------------------------------------------------------


def raise_if_stopping() -> None:
    """Raise `Stopped`, on all processes at the same call, after one of them got a SIGTERM.

    All must call it equally often: between a step's stages, between segments of a rollout.
    """
    global _looks
    _looks += 1
    if _client() is None:
        stopped = _signalled.is_set()
    else:
        stopped = multihost_utils.reached_preemption_sync_point(_looks)
    if stopped:
        raise Stopped


@contextlib.contextmanager
def run_as_one() -> Iterator[None]:
    """This process's main part: an error that ends it ends the others as well.

    With several processes it does not return where one failed, for the devices of the others would not answer.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _end(error)
    _last_word("done")


def _end(error: BaseException) -> None:
    """Report what ended this process, and leave without waiting for anybody."""
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    if code == STOPPED:  # all stop at the same place, and wait for each other
        _last_word("done")
        raise error
    if isinstance(error, jax.errors.JaxRuntimeError | HostLost):
        # Likely another host's end, seen by a collective first: those who watch know more.
        print(f"process {jax.process_index()}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        time.sleep(SILENCE + 3 * BEAT)
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    with contextlib.suppress(Exception):
        _last_word(f"failed {code}")
        if is_primary():  # the service ends with it: let the others read that first
            time.sleep(3 * BEAT)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def _watch() -> None:
    """Show signs of life, and look for the others': runs in a thread of its own."""
    last = {i: ("", time.monotonic()) for i in range(jax.process_count())}  # what each said, and since when
    number = 0
    while not _finished.wait(BEAT):
        number += 1
        try:
            with _lock:
                if _finished.is_set():
                    return
                _beat(str(number))
            found = _client().key_value_dir_get(f"{_PREFIX}/beat/")
        except Exception as error:  # whatever the service raises: without it nobody can go on
            _leave(LOST, f"the first host does not answer ({str(error).splitlines()[0]}){_AGAIN}")
        now = _heard[0] = time.monotonic()
        for key, said in found:
            i = int(key.rsplit("/", 1)[1])
            last[i] = last[i] if last[i][0] == said else (said, now)
        for i, (said, since) in last.items():
            if said.startswith("failed"):
                code = int(said.split()[1])
                why = "ended with a setup error" if code == SETUP_ERROR else f"failed with exit code {code}"
                _leave(code if code == SETUP_ERROR else LOST, f"process {i} {why}: see its own messages")
            if said != "done" and now - since > SILENCE:
                _leave(
                    LOST,
                    f"process {i} has shown no sign of life for {SILENCE:.0f} s: its host is lost{_AGAIN}",
                )


def _watch_the_watch() -> None:
    """A first host that falls silent leaves `_watch` waiting for the service: somebody must look at the clock."""
    while not _finished.wait(BEAT):
        if time.monotonic() - _heard[0] > SILENCE:
            _leave(LOST, f"the first host does not answer for {SILENCE:.0f} s{_AGAIN}")


def _leave(code: int, why: str) -> None:
    if _finished.is_set():
        return
    print(f"process {jax.process_index()} stops: {why}", file=sys.stderr, flush=True)
    os._exit(code)


def _last_word(state: str) -> None:
    with _lock:
        _finished.set()
        _beat(state)


def _beat(state: str) -> None:
    client = _client()
    if client is not None:
        client.key_value_set(f"{_PREFIX}/beat/{jax.process_index()}", state, allow_overwrite=True)


def _client():
    """The coordination service's client; JAX has no public name for it.  None with one process."""
    from jax._src import distributed

    return distributed.global_state.client
