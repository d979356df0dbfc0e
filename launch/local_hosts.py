"""Starts a command several times on this machine, as the processes of one run: several hosts in small.

    python launch/local_hosts.py -n 2 -- python launch/train.py --config=configs/tiny.py
    python launch/local_hosts.py -n 2 --devices=4 -- python launch/train.py --config=configs/tiny.py

Each process gets JAX_COORDINATOR_ADDRESS (on the loopback), JAX_NUM_PROCESSES and JAX_PROCESS_ID, the three that
launch/train.py reads; lines come out with the process's number in front.  SIGTERM and SIGINT go on to all.  The
exit code is that of the first process that failed, when all have ended; 0 if none did.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

GRACE = 90.0  # seconds that the others have, after one failed, to notice and to end by themselves


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
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
        if options.devices:
            flags = os.environ.get("XLA_FLAGS", "")
            environment |= {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={options.devices}".strip(),
            }
        processes.append(
            subprocess.Popen(
                options.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    return wait_for_processes(processes)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=2, help="processes")
    parser.add_argument(
        "--devices", type=int, default=0, help="virtual CPU devices each; 0: those of the machine"
    )
    parser.add_argument("command", nargs="+", help="what to run, after --")
    options = parser.parse_args(argv)
    if options.n < 1 or options.devices < 0:
        parser.error(
            f"-n {options.n} --devices {options.devices}: at least one process, and no fewer devices than 0"
        )
    return options


def wait_for_processes(processes: list[subprocess.Popen]) -> int:
    """Pass lines and signals on until all have ended."""
    readers = [
        threading.Thread(target=relay_lines, args=(i, p), daemon=True) for i, p in enumerate(processes)
    ]
    for thread in readers:
        thread.start()

    def forward(number, _):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    ended = threading.Semaphore(0)
    failed: list[int] = []

    def watch(process):
        code = process.wait()
        if code:
            failed.append(128 - code if code < 0 else code)  # as a shell tells of a signal
        ended.release()

    for process in processes:
        threading.Thread(target=watch, args=(process,), daemon=True).start()
    left = len(processes)
    while left:
        if ended.acquire(timeout=GRACE if failed else None):
            left -= 1
        else:
            print(f"{left} processes did not end {GRACE:.0f} s after one failed: killed", file=sys.stderr)
            forward(signal.SIGKILL, None)
    for thread in readers:
        thread.join(timeout=5)
    return failed[0] if failed else 0


def relay_lines(index: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stdout.buffer.write(f"[{index}] ".encode() + line)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
