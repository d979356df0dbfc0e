"""Matrix products x w in the form that XLA:CPU runs fast; on other platforms they are plain products.

`matmul_plain` is for training.  Two of its forms differ from a plain `x @ w`:

1. jax writes the gradient of w as (g^T x)^T.  For it, XLA:CPU copies g transposed, element by element, which
   takes as long as the product.  x^T g needs no copy.  A whole GRPO update on one core (4 layers of width
   256, float32) takes 2.6 s instead of 3.1 s.  On other platforms a transpose is a layout, and both forms
   are the same.
2. XLA:CPU needs half as long for a bfloat16 product with a float32 result, rounded afterwards, as for one
   with a bfloat16 result.  A forward and backward pass (8 layers of width 576, 2,048 tokens) takes 4.2 CPU
   seconds instead of 5.6.

`matmul_cpu` is for the few rows of a decode step.  XLA:CPU gives a dot to YNNPACK, which packs the weights
again at every call; for a few dozen rows that is more work than the product.  A convolution of width 1 is
lowered to the same dot at a later stage and goes to Eigen, which packs them faster.  Measured on one core
with all matrices of a decode step of width 256 in float32: 101 instead of 79 GFLOP/s at 64 rows, 82 instead
of 66 at 32 rows, 50 instead of 39 at 8 rows.

With PANEL_ROWS rows or fewer, packing takes longer than reading the weights, whichever library does it.
`to_panels` stores a matrix as panels of PANEL columns; a product with each panel is small enough for YNNPACK to
be bound by the memory's bandwidth.  All products of a decode step of 31 million parameters, whose weights
are read in 4 ms of CPU time: 5.2 instead of 11.5 ms with 2 rows, 7.2 instead of 13.8 with 6, 11.1 instead of
16.9 with 12, 19.9 instead of 22.3 with 24; with 32 rows 27.2 instead of 25.2.

N rows   D width of x   F width of the result   P panels
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PANEL = 64  # columns of a panel: at 4 to 24 rows 32 took up to 1.3 times as long, 128 up to 1.7 times
PANEL_ROWS = 24  # rows up to which panels are faster


@jax.custom_vjp
def matmul_plain(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply x [..., D] with w [D, F] -> [..., F]."""
    return _contract(x, w, x.ndim - 1, 0)


def _contract(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Multiply two arrays over one axis of each, in the dtype of the first."""

    def multiply(a, b, dtype=None):
        numbers = (((axis_a,), (axis_b,)), ((), ()))
        return jax.lax.dot_general(a, b, numbers, preferred_element_type=dtype)

    if a.dtype != jnp.bfloat16 or b.dtype != jnp.bfloat16:
        return multiply(a, b)

    # Chosen when the program is lowered for a platform, so that one traced function serves them all.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: multiply(a, b, jnp.float32).astype(jnp.bfloat16), default=multiply
    )


def _backward(saved, g):
    """Compute dx = g w^T and dw = x^T g, the latter without a transposed copy of g."""
    x, w = saved
    dx = _contract(g, w, g.ndim - 1, 1)

    # One row axis, [N, D] and [N, F]: a contraction over two would make XLA copy them into one.
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return dx, _contract(x, g, 0, 0)


matmul_plain.defvjp(lambda x, w: (matmul_plain(x, w), (x, w)), _backward)


def matmul_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply x [N, D] with w [D, F] -> [N, F] on one CPU device; other dtypes than float32: `matmul_plain`.

    w may also be in panels [P, D, PANEL] (`to_panels`).  Not for a mesh, where the operands of a convolution would
    be all-gathered.
    """
    if w.ndim == 3:
        # The rows are repeated for each panel, and the results of the panels put side by side: little beside w.
        rows = jnp.broadcast_to(x[None], (w.shape[0], *x.shape))
        out = jax.lax.dot_general(rows, w, (((2,), (1,)), ((0,), (0,))))  # [P, N, PANEL]
        return out.swapaxes(0, 1).reshape(x.shape[0], -1)
    if x.dtype != jnp.float32:
        return matmul_plain(x, w)

    # N images of one pixel: N = batch, W = 1 pixel, C = channels of the input (D) and the output (F).
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x[:, None], w[None], (1,), "VALID", dimension_numbers=numbers)[:, 0]


def to_panels(w: jax.Array) -> jax.Array:
    """Store matrices [.., D, F] as panels [.., P, D, PANEL] for `matmul_cpu`; F must be a multiple of PANEL."""
    return w.reshape(*w.shape[:-1], -1, PANEL).swapaxes(-3, -2)
