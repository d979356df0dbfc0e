"""Starts a command several times on this machine, as the processes of one run, to test several hosts.

    python launch/local_hosts.py -n 2 -- python launch/train.py --config=configs/tiny.py
    python launch/local_hosts.py -n 2 --devices=4 -- python launch/train.py --config=configs/tiny.py

Each process gets JAX_COORDINATOR_ADDRESS (on the loopback interface), JAX_NUM_PROCESSES and JAX_PROCESS_ID,
which launch/train.py reads.  Output lines are prefixed with the number of their process.  SIGTERM and SIGINT
are forwarded to all processes.  The script ends when all processes have ended; its exit code is that of the
first process that failed, or 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

# Seconds for the other processes to notice that one failed and to exit by themselves.
GRACE = 90.0


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them; returns the exit code."""
    options = parse_arguments(argv)
    # Binding to port 0 finds a free port.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    processes = []
    for i in range(options.n):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(options.n),
            "JAX_PROCESS_ID": str(i),
            "PYTHONUNBUFFERED": "1",
        }
        # Virtual devices exist on the CPU only.
        if options.devices:
            flags = os.environ.get("XLA_FLAGS", "")
            environment |= {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={options.devices}".strip(),
            }
        process = subprocess.Popen(
            options.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        processes.append(process)

    return wait_for_processes(processes)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line: n, devices and command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=2, help="number of processes")
    parser.add_argument(
        "--devices", type=int, default=0, help="virtual CPU devices of each process; 0: the machine's devices"
    )
    parser.add_argument("command", nargs="+", help="the command to run, after --")
    options = parser.parse_args(argv)
    if options.n < 1 or options.devices < 0:
        parser.error(
            f"-n {options.n} --devices {options.devices}: -n must be at least 1 and --devices at least 0"
        )
    return options


def wait_for_processes(processes: list[subprocess.Popen[bytes]]) -> int:
    """Relay output lines and signals until all processes have ended; returns the exit code.

    SIGKILL ends the processes that are still running GRACE seconds after one failed.
    """
    readers = [
        threading.Thread(target=relay_lines, args=(i, process), daemon=True)
        for i, process in enumerate(processes)
    ]
    for thread in readers:
        thread.start()

    def forward_signal(number: int, _frame: object) -> None:
        send_signal(processes, number)

    # Each process decides by itself what a signal means: a run saves a checkpoint and exits.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward_signal)

    # One thread per process waits for it, so that the first failure is noticed at once.
    ended = threading.Semaphore(0)
    exit_codes: list[int] = []  # of the processes that failed, the first one first

    def watch_process(process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if code:
            # Popen gives -N for a process ended by signal N; a shell's exit code for it is 128 + N.
            exit_codes.append(128 - code if code < 0 else code)
        ended.release()

    for process in processes:
        threading.Thread(target=watch_process, args=(process,), daemon=True).start()

    # Without a failure the processes may run for any time; after one the others wait for it in collectives.
    running = len(processes)
    while running:
        if ended.acquire(timeout=GRACE if exit_codes else None):
            running -= 1
        else:
            print(f"{running} processes did not end {GRACE:.0f} s after one failed: killed", file=sys.stderr)
            send_signal(processes, signal.SIGKILL)

    # A child of a process may still have its pipe open, so the wait for the last lines has a limit.
    for thread in readers:
        thread.join(timeout=5)
    return exit_codes[0] if exit_codes else 0


def send_signal(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to the processes that are still running."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def relay_lines(index: int, process: subprocess.Popen[bytes]) -> None:
    """Copy a process's output to ours, each line prefixed with `index`.

    process: started with stdout=PIPE.
    """
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(f"[{index}] ".encode() + line)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
