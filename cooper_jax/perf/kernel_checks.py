"""Checks of the kernels on the device at hand: each form against a float64 computation of its own on the host.

`list_kernel_checks` lists the checks for a platform's forms.  Each check runs its operation on the device, in
one form, on fixed random inputs, and measures how far the results are from the float64 ones (kernel_oracles.py).
The plain form is measured on the same inputs, so that a wrong kernel can be told from a device that computes plain
programs wrongly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cooper_jax.kernels import attention, platform
from cooper_jax.perf import kernel_oracles
from cooper_jax.perf.kernel_oracles import KernelSize, Measure

# What replaces a wrong kernel.
PLAIN_ROLLOUT = "--config.rollout.kernels=xla"
PLAIN_ATTENTION = (
    "--config.policy.dtype=float32 --config.reward.dtype=float32 --config.rollout.dtype=float32 "
    "(cuDNN is not used in float32)"
)
NO_FLAG = "no flag replaces it"
# Limits of the errors, absolute for values of about 1.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
GRADIENT_LIMITS = {"float32": 1e-3, "bfloat16": 3e-2}  # of the norm of the difference, relative


@dataclasses.dataclass(frozen=True)
class KernelCheck:
    """One operation in one form."""

    name: str
    form: str  # the form that is checked: tpu, triton, cudnn, splash, xla or an interpreted one
    limit: float
    fallback: str
    # Draws the inputs and computes what is expected.  It is part of the check: it, too, may fail.
    prepare: Callable[[], Measure]

    @property
    def plain(self) -> str | None:
        """The form that it is compared with; None: it is the plain one itself."""
        return None if self.form == "xla" else "xla"


@dataclasses.dataclass(frozen=True)
class KernelResult:
    """The outcome of a check."""

    name: str
    form: str
    ok: bool
    error: float
    limit: float
    plain_error: float | None
    seconds: float | None
    plain_seconds: float | None
    advice: str  # what to do if it is not ok; "" if it is


def run_kernel_check(check: KernelCheck) -> KernelResult:
    """Run a check's form, and the plain form on the same inputs."""
    measure = check.prepare()
    measured = measure(check.form)
    plain = None if check.plain is None else measure(check.plain)
    # A comparison with NaN is False.
    ok = measured.error <= check.limit
    advice = ""
    if not ok:
        advice = f"{check.name} is wrong in the form {check.form}: {check.fallback}"
        if plain is not None and not plain.error <= check.limit:
            advice = (
                f"{check.name} is wrong in the form {check.form} and in the plain one: nothing replaces it"
            )
    return KernelResult(
        name=check.name,
        form=check.form,
        ok=ok,
        error=measured.error,
        limit=check.limit,
        plain_error=None if plain is None else plain.error,
        seconds=measured.seconds,
        plain_seconds=None if plain is None else plain.seconds,
        advice=advice,
    )


def choose_forms() -> tuple[str, ...]:
    """The form of our kernels to check on the default backend: its own, or on a CPU an interpreted one."""
    native = platform.default_implementation()
    return ("triton_interpret",) if native == "xla" and jax.default_backend() == "cpu" else (native,)


def list_kernel_checks(forms: Sequence[str], size: KernelSize, seed: int = 0) -> list[KernelCheck]:
    """List the checks of our kernels in these forms, then those of attention and products on this platform."""
    checks = []

    def add(name: str, form: str, limit: float, fallback: str, prepare: Callable[..., Measure], *arguments):
        bound = functools.partial(prepare, size, *arguments, seed)
        checks.append(KernelCheck(name, form, limit, fallback, bound))

    # Queries and products of decode attention are in bfloat16, whatever the cache is.
    rounding, gradients = LIMITS[size.dtype], GRADIENT_LIMITS[size.dtype]
    decode_variants = kernel_oracles.DECODE_VARIANTS[: 3 if size.all_variants else 2]
    for form in forms:
        for name, dtype, window in decode_variants:
            prepare = kernel_oracles.prepare_decode_attention
            add(f"decode_attention {name}", form, LIMITS["bfloat16"], PLAIN_ROLLOUT, prepare, dtype, window)
        for mode, options in kernel_oracles.SAMPLING_MODES.items():
            add(
                f"sample_logits, {mode}",
                form,
                LIMITS["float32"],
                PLAIN_ROLLOUT,
                kernel_oracles.prepare_sampling,
                options,
            )
        add("head_sample", form, rounding, PLAIN_ROLLOUT, kernel_oracles.prepare_head_sample)
        add("head_logprobs with gradients", form, gradients, NO_FLAG, kernel_oracles.prepare_head_logprobs)

    native = attention.default_implementation(jnp.dtype(size.dtype), kernel_oracles.HEAD_DIM)
    fallback = PLAIN_ATTENTION if native == "cudnn" else NO_FLAG
    for variant in ("full", "window", "packed") if size.all_variants else ("packed",):
        name = f"causal_attention with gradients, {variant}"
        add(name, native, gradients, fallback, kernel_oracles.prepare_causal_attention, variant)
    add("matmul with gradients", "xla", gradients, NO_FLAG, kernel_oracles.prepare_matmul)
    return checks
