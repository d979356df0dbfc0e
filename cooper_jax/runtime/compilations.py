"""Says on the console which program JAX is compiling, from JAX's own events.

JAX reports the begin and the end of tracing a function, of lowering it, and of compiling the program or reading it
from the compilation cache.  A function that is traced within another one is part of it.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import jax.monitoring

from cooper_jax.runtime.console import Console

# JAX's events, and what they are called here.
_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "tracing",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
_BACKEND = "/jax/core/compile/backend_compile_duration"

_watched: list[Console] = []
_depth = threading.local()


def watch_compilations(console: Console) -> None:
    """Show compilations on a console from here on; a second call has no effect."""
    if _watched:
        return
    _watched.append(console)
    jax.monitoring.register_scalar_listener(_begin)
    jax.monitoring.register_event_duration_secs_listener(_end)


def _begin(event: str, value: float, **details: Any) -> None:
    if event not in _EVENTS:
        return
    _depth.value = getattr(_depth, "value", 0) + 1
    if _depth.value == 1:
        name = str(details.get("fun_name", ""))
        # The name of a program is jit(name), with the partitioning's name before it in some versions.
        if match := re.search(r"\(([^()]+)\)", name):
            name = match[1]
        _watched[0].begin_compilation(f"{_EVENTS[event]} {name.strip('<>')}")


def _end(event: str, duration_secs: float, **details: Any) -> None:
    # An event of this kind can only end without its begin if it began before this module listened.
    if event not in _EVENTS or not getattr(_depth, "value", 0):
        return
    _depth.value -= 1
    if _depth.value == 0:
        _watched[0].end_compilation(is_program=event == _BACKEND)
