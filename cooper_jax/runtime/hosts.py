"""One run on several hosts: joining processes, exchanging host data, and ending together.

Every process runs the same program and takes the same decisions (multi-controller).  Data that only one
process has is shared by `exchange_bytes` over the coordination service of `jax.distributed`.  It works from
any thread, because it runs no device program (two threads could enqueue these in different orders on
different hosts, which deadlocks).

1. `start_hosts` joins the processes, if there are several.
2. `is_assigned` divides work; `exchange_bytes`, `broadcast_value` and `fetch_arrays` give results to all
   processes.
3. `raise_if_stopping` is called where a step may be abandoned.  After one process received a SIGTERM (sent to
   machines that are about to be preempted), it raises `Stopped` on all processes at the same call.
4. `run_as_one` wraps a process's main part.  A process that fails reports it to the others; a lost process
   stops sending heartbeats.  Both end all processes, with a message, within SILENCE_LIMIT and a few seconds.

Exit codes:  0 done   2 setup error   69 another host was lost   70 a fault that no restart mends   75 stopped
after a checkpoint   130 ended at once by Ctrl-C.  After 69 and 75 the same command resumes the run.  The first
host runs the coordination service: if it is lost, JAX itself aborts the others at once, with 134.
"""

from __future__ import annotations

import atexit
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from cooper_jax.runtime import interrupts
from cooper_jax.runtime.console import CONSOLE

SETUP_ERROR, LOST, FAULT, STOPPED = 2, 69, 70, 75  # exit codes

# Heartbeats of this module.
HEARTBEAT_INTERVAL = 2.0  # seconds
SILENCE_LIMIT = 40.0  # seconds without a heartbeat, after which a process counts as lost
# Longer than SILENCE_LIMIT, so that this module's message and exit code come before JAX's.
_JAX_HEARTBEAT_TIMEOUT = 90  # seconds

# A day, because others may be compiling or loading weights.  Lost processes are detected by their heartbeats.
EXCHANGE_TIMEOUT_MS = 24 * 3600 * 1000
KEPT_EXCHANGES = 256  # messages of this process that stay in the service before the oldest is deleted

_KEY_PREFIX = "cooper"  # of the keys in the coordination service
_RESTART_HINT = "; start the same command again on all hosts, it resumes by itself"

# State of this process's exchanges and checks.  Several threads exchange: `_lock` guards the first two.
_exchange_counts: Counter[str] = Counter()  # calls of `exchange_bytes` by name
_own_keys: deque[str] = deque()  # keys of this process's latest messages
_lock = threading.Lock()
_stop_checks = 0  # calls of `raise_if_stopping`
_last_answer = [time.monotonic()]  # time of the coordination service's last answer

_sigterm_received = threading.Event()  # with one process only: otherwise JAX handles the signal
_thread = threading.local()  # `ignores_stop`: True within `ignore_stop`
_finished = threading.Event()  # the main part has ended: watching threads must not end the process any more


class Stopped(Exception):
    """A SIGTERM was received; all processes raise this at the same call of `raise_if_stopping`."""


class RunFault(Exception):
    """A fault that no restart mends.  The message names the step, what is wrong, and what to do.

    All processes raise it at the same call, or one alone with `of_this_host`: then the others end because it does.
    """

    def __init__(self, message: str, of_this_host: bool = False):
        super().__init__(message)
        self.of_this_host = of_this_host


class HostLost(RuntimeError):
    """Another process does not answer."""


def start_hosts() -> None:
    """Join the other processes of this run; a process without peers only installs its signal handlers.

    JAX_COORDINATOR_ADDRESS (HOST:PORT), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the processes; without
    them JAX finds the others on TPU VMs, under SLURM and under Open MPI.  Must be called before any device is
    used.

    Raises ValueError if only some of the three variables are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    options: dict[str, Any] = {"heartbeat_timeout_seconds": _JAX_HEARTBEAT_TIMEOUT}
    if given:
        if len(given) < len(names):
            missing = [n for n in names if n not in given]
            raise ValueError(f"{', '.join(given)} is set without {', '.join(missing)}: set all three")
        address, count, index = given.values()
        options |= dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
        # This process uses all its local devices.  Without this, JAX would search for a cluster to learn
        # that.
        options["cluster_detection_method"] = "deactivate"
    elif not _can_find_peers():
        # Handlers that set a flag: the run stops at the next `raise_if_stopping`, after a checkpoint.
        signal.signal(signal.SIGTERM, lambda *_: _sigterm_received.set())
        # A process in the background of a script ignores Ctrl-C, and goes on doing so.
        if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, interrupts.end_now):
            signal.signal(signal.SIGINT, _stop_at_interrupt)
        return

    # Of several processes, one that Ctrl-C ends tells the others (run_as_one).
    if signal.getsignal(signal.SIGINT) is interrupts.end_now:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Gloo serves CPU devices only; accelerators have their own collectives.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    CONSOLE.begin_stage("waiting for the other hosts")
    jax.distributed.initialize(**options)  # installs JAX's own SIGTERM handler
    CONSOLE.end_stage()
    if not is_primary():
        CONSOLE.silence()
    if jax.process_count() > 1:
        _last_answer[0] = time.monotonic()
        threads = [threading.Thread(target=target, daemon=True) for target in (_watch_peers, _watch_service)]
        for thread in threads:
            thread.start()
        atexit.register(_end_watching, threads)  # after JAX's own, so it is called before


def _stop_at_interrupt(number: int, frame: Any) -> None:
    """Stop as after a SIGTERM; the second Ctrl-C ends the process at once."""
    _sigterm_received.set()
    signal.signal(signal.SIGINT, interrupts.end_now)
    # os.write may be called in a signal handler; print may not, if the signal came within another print.
    os.write(2, b"\nstopping where the work can be taken up again; Ctrl-C again ends at once\n")


def _can_find_peers() -> bool:
    """Tell whether JAX can find this process's peers without the environment variables."""
    # SLURM and Open MPI set the number of processes.
    if any(int(os.environ.get(n, 1)) > 1 for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True

    # On a TPU VM the metadata server knows the peers.  The chips are found by their device files, because
    # asking JAX for its devices would initialise it.
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return chips and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


# --- dividing work and sharing results -----------------------------------------------------------------


def is_primary() -> bool:
    """Tell whether this is process 0, which writes files and prints messages."""
    return jax.process_index() == 0


def print_once(text: str, always: bool = False) -> None:
    """Print a line for the user on process 0 alone.

    always: even with --quiet, since it is a warning or a result.
    """
    if is_primary():
        CONSOLE.print_line(text, always=always)


def is_assigned(key: int) -> bool:
    """Tell whether the work item with this number belongs to this process."""
    return key % jax.process_count() == jax.process_index()


def exchange_bytes(name: str, own: bytes) -> list[bytes]:
    """Return every process's bytes, ordered by process index.

    All processes must call it with the same name.  Calls of one name are matched in their order; calls of
    different names may come in any order.  Raises HostLost if the coordination service does not answer.
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [own]

    # Number the calls of each name, so that every exchange has keys of its own.
    with _lock:
        number = _exchange_counts[name]
        _exchange_counts[name] += 1
    prefix = f"{_KEY_PREFIX}/exchange/{name}/{number}"
    client = _get_client()

    try:
        client.key_value_set_bytes(f"{prefix}/{index}", own)
        received = {
            i: client.blocking_key_value_get_bytes(f"{prefix}/{i}", EXCHANGE_TIMEOUT_MS)
            for i in range(count)
            if i != index
        }

        # Delete old messages, which would fill the service's memory.  All processes have read a message this
        # old: they have answered later calls.
        with _lock:
            oldest = _own_keys.popleft() if len(_own_keys) == KEPT_EXCHANGES else None
            _own_keys.append(f"{prefix}/{index}")
        if oldest is not None:
            client.key_value_delete(oldest)
    except jax.errors.JaxRuntimeError as error:
        raise HostLost(f"the coordination service does not answer ({error})") from error
    return [own if i == index else received[i] for i in range(count)]


def exchange_json(name: str, own: Any) -> list[Any]:
    """Return every process's JSON value, ordered by process index; see `exchange_bytes`."""
    return [json.loads(x) for x in exchange_bytes(name, json.dumps(own).encode())]


def broadcast_value(name: str, make: Callable[[], bytes]) -> bytes:
    """Return the bytes that `make` returns on process 0; the other processes do not call it."""
    return exchange_bytes(name, make() if is_primary() else b"")[0]


def on_primary_first(name: str, work: Callable[[], Any]) -> None:
    """Run `work` on process 0 alone, while the others wait for it."""

    def run() -> bytes:
        work()
        return b""

    broadcast_value(name, run)


def fetch_arrays(tree: Any) -> Any:
    """Copy device arrays to NumPy arrays: the global arrays, on every process.

    Runs an all-gather for arrays with shards on other hosts, so all processes must call it, in the same
    order.
    """
    # Replicate arrays with remote shards on the devices, one at a time; then one copy to the host for all.
    leaves, treedef = jax.tree.flatten(tree)
    for i, x in enumerate(leaves):
        if isinstance(x, jax.Array) and not _is_local(x):
            assert isinstance(x.sharding, NamedSharding), f"an array over several hosts has {x.sharding}"
            leaves[i] = _make_replicate(x.sharding.mesh)(x)
    return jax.tree.unflatten(treedef, jax.device_get(leaves))


def _is_local(x: jax.Array) -> bool:
    """Tell whether this process can read the whole array."""
    return x.is_fully_addressable or x.is_fully_replicated


@functools.cache
def _make_replicate(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    """Make an all-gather onto every device of the mesh; cached, so that it compiles once per shape."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


# --- ending a run --------------------------------------------------------------------------------------


def raise_if_stopping() -> None:
    """Raise `Stopped`, on all processes at the same call, after one of them received a SIGTERM.

    All processes must call it equally often: between the stages of a step, between segments of a rollout.
    """
    # The number of the call is what the processes agree on: the first one at which all know of the SIGTERM.
    global _stop_checks
    _stop_checks += 1
    if _get_client() is None:
        stopping = _sigterm_received.is_set()
    else:
        stopping = multihost_utils.reached_preemption_sync_point(_stop_checks)
    if stopping:
        raise Stopped


def raise_if_stopping_alone() -> None:
    """Raise `Stopped` after a SIGTERM in a run of one process; several processes agree in `raise_if_stopping`.

    For waits within a stage, which the processes do not enter equally often.
    """
    if _get_client() is None and _sigterm_received.is_set() and not getattr(_thread, "ignores_stop", False):
        raise Stopped


@contextlib.contextmanager
def ignore_stop() -> Iterator[None]:
    """In this context `raise_if_stopping_alone` does not raise in this thread.

    For the completion of a step that has updated the policy already: only a complete step can be saved.
    """
    before = getattr(_thread, "ignores_stop", False)
    _thread.ignores_stop = True
    try:
        yield
    finally:
        _thread.ignores_stop = before


@contextlib.contextmanager
def catch_sigterm() -> Iterator[None]:
    """In this context a SIGTERM makes `raise_if_stopping` raise; for one process that lives on afterwards.

    Python allows handlers of signals in the main thread alone, so that elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _sigterm_received.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _sigterm_received.clear()


@contextlib.contextmanager
def run_as_one() -> Iterator[None]:
    """Wrap this process's main part: an error that ends it ends the other processes, too.

    With several processes, an error does not propagate to the caller: the process exits, because the other
    processes' devices would never answer.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _exit_after_error(error)
    _send_final_state("done")


def _exit_after_error(error: BaseException) -> None:
    """Report the error that ended this process, and exit without waiting for the other processes."""
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    if code in (STOPPED, FAULT):
        # Raised at the same call on all processes, so each ends normally.
        _send_final_state("done")
        raise error

    if isinstance(error, jax.errors.JaxRuntimeError | HostLost):
        # Probably a collective failed because another host has ended.  Wait until the watching threads have
        # found out which host it was: they exit with the better message.
        print(f"process {jax.process_index()}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        time.sleep(SILENCE_LIMIT + 3 * HEARTBEAT_INTERVAL)

    # os._exit below prints nothing, so print the traceback here.
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    with contextlib.suppress(Exception):
        _send_final_state(f"failed {code}")
        if is_primary():
            # The service ends with this process: let the others read the state first.
            time.sleep(3 * HEARTBEAT_INTERVAL)
    sys.stderr.flush()
    sys.stdout.flush()

    # sys.exit would run jax.distributed's shutdown, which waits for the other processes.
    os._exit(code)


def _watch_peers() -> None:
    """Send heartbeats and watch those of the other processes; runs in a thread of its own."""
    # Process -> its last state, and the time at which the state last changed.
    last = {i: ("", time.monotonic()) for i in range(jax.process_count())}
    beat = 0
    while not _finished.wait(HEARTBEAT_INTERVAL):
        beat += 1
        try:
            # Under the lock, so that no heartbeat overwrites the final state.
            with _lock:
                if _finished.is_set():
                    return
                _send_state(str(beat))
            states = _get_client().key_value_dir_get(f"{_KEY_PREFIX}/beat/")
        except Exception as error:  # any error of the service: no process can continue without it
            _exit_now(LOST, f"the first host does not answer ({str(error).splitlines()[0]}){_RESTART_HINT}")
            return  # the main part has finished meanwhile

        now = _last_answer[0] = time.monotonic()
        # A heartbeat is a state that has changed; clocks of different hosts are never compared.
        for key, state in states:
            i = int(key.rsplit("/", 1)[1])
            if last[i][0] != state:
                last[i] = (state, now)

        # A failure that was reported, or silence.
        for i, (state, since) in last.items():
            if state.startswith("failed"):
                code = int(state.split()[1])
                if code == SETUP_ERROR:
                    _exit_now(code, f"process {i} ended with a setup error: see its own messages")
                _exit_now(LOST, f"process {i} failed with exit code {code}: see its own messages")
            if state != "done" and now - since > SILENCE_LIMIT:
                reason = f"process {i} has sent no heartbeat for {SILENCE_LIMIT:.0f} s: its host is lost"
                _exit_now(LOST, reason + _RESTART_HINT)


def _watch_service() -> None:
    """Watch the coordination service: if its host hangs, `_watch_peers` blocks and cannot notice."""
    while not _finished.wait(HEARTBEAT_INTERVAL):
        if time.monotonic() - _last_answer[0] > SILENCE_LIMIT:
            _exit_now(LOST, f"the first host does not answer for {SILENCE_LIMIT:.0f} s{_RESTART_HINT}")


def _end_watching(threads: Sequence[threading.Thread]) -> None:
    """Wait until the watching threads have ended.

    One that returns from a call of the coordination service while the interpreter shuts down aborts the process.
    """
    _finished.set()
    for thread in threads:
        thread.join(3 * HEARTBEAT_INTERVAL)  # a service that hangs holds nobody up for longer


def _exit_now(code: int, reason: str) -> None:
    """Exit the process from a watching thread, unless its main part has already finished."""
    if _finished.is_set():
        return
    print(f"process {jax.process_index()} stops: {reason}", file=sys.stderr, flush=True)
    os._exit(code)


def _send_final_state(state: str) -> None:
    """Publish "done" or "failed CODE", and end this process's heartbeats."""
    with _lock:
        _finished.set()
        _send_state(state)


def _send_state(state: str) -> None:
    client = _get_client()
    if client is not None:
        client.key_value_set(f"{_KEY_PREFIX}/beat/{jax.process_index()}", state, allow_overwrite=True)


def _get_client() -> Any:
    """Return the coordination service's client; None with one process."""
    # JAX has no public name for it.
    from jax._src import distributed

    return distributed.global_state.client
