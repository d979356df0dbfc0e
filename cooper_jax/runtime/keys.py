"""Random keys: every draw in the project starts from one table of named streams.

1. `make_key(seed, name, *ids)` returns a typed JAX key, for arrays.
2. `make_generator(seed, name, *ids)` returns a NumPy generator, for choices made on the host.

A key is a pure function of (seed, stream, ids).  It does not depend on the batch, the number of devices, the
process or earlier draws, so a resumed run draws what the uninterrupted one would have drawn.  `ids` go from
coarse to fine (step, prompt position, sample, token).  A caller may also make the key of the coarse ids and
fold the finer ones in under jit: `make_key(s, n, a, b) == fold_in(make_key(s, n, a), b)`.
"""

from __future__ import annotations

import operator

import jax
import numpy as np

# Name -> number, with the ids of each stream.  The numbers decide what every run draws: never change or reuse
# a number, only append.
STREAMS = {
    "rollout": 1,  # ids: step (then position, sample, token, folded in by the engine)
    "shuffle": 2,  # ids: epoch (the data order)
    "pairs": 3,  # ids: step, prompt position (choice of positives)
    "corruption": 4,  # ids: step, prompt position, try (programmatic negatives)
    "assistant": 5,  # ids: step, try (a local assistant's sampling)
    "minibatch": 6,  # ids: step, epoch (division of a step's rows into minibatches)
    "evaluation": 7,  # no ids: every evaluation samples alike (then position, sample, token)
    "synthetic": 9,  # ids: split, index (generated problems)
    # Initial weights, without ids.
    "init_policy": 10,
    "init_reward": 11,
    "init_assistant": 12,
    "init_score_head": 13,
    "mixture": 43,  # ids: number of the order's stream, block (order of weighted sources in a block)
    # Supervised phases before step 1, and training of a reward model alone.
    "supervised_policy": 14,  # ids: epoch (order of the demonstrations)
    "supervised_reward": 15,  # ids: epoch (order of the labelled triples)
    "demonstrations": 16,  # ids: position in that order (answer forms and corrupted steps)
    "triples": 17,  # ids: position in that order (corruptions, swapped references)
    "train_rm": 18,  # ids: epoch (order of batches)
    # Annotation and evaluation.
    "source": 19,  # ids: try (completions that are to be annotated; then problem, sample, token)
    "judge": 20,  # ids: try (verdicts of a language model)
    "benchmark": 21,  # ids: CRC of the data set's name (then problem, sample, token); none: the subset
    "bootstrap": 22,  # no ids: every figure is resampled alike
    "references": 23,  # no ids: choice of the question whose reference replaces a row's own
    "balance": 24,  # ids: two words of a row's id (choice of the annotated rows that are kept)
    # Reward hacks, and the measurement of reward models.
    "attacks": 25,  # ids: attack, row (wording of a reward hack)
    "attack_search": 42,  # no ids: completions, candidates and changes of a search for attacks
    "reward_sets": 40,  # ids: set, row (labelled completions on which a reward model is measured)
    "attacked": 26,  # no ids: choice of the training rows that are shown with a reward hack, and of the hack
    "added_rows": 41,  # ids: kind (choice of the training rows with another reference, and of that reference)
    # Further updates of the reward model.  Its warm-up has two uses: the order of problems by epoch, and
    # rollouts without ids (then position, sample, token).
    "reward_warmup": 27,
    "lessons": 28,  # ids: step, first position (choice of the labelled rollouts to train on)
    "swapped": 29,  # ids: step, row (order in which other references are tried)
    "exchanged": 30,  # ids: step, prompt position (choice of the pairs that are exchanged, as a control)
    # The Python API.
    "sampler": 50,  # no ids (then prompt, sample, token)
}

_WORD = 2**32  # ids and seeds are 32-bit words: fold_in takes no others, and SeedSequence would split them


def _check_arguments(seed: int, name: str, ids: tuple[int, ...]) -> None:
    if name not in STREAMS:
        raise KeyError(f"no random stream is called {name!r}; there are {', '.join(sorted(STREAMS))}")
    for what, value in (("seed", seed), *((f"ids[{i}]", v) for i, v in enumerate(ids))):
        if not 0 <= operator.index(value) < _WORD:
            raise ValueError(f"stream {name!r}: {what} is {value}, and must be from 0 to {_WORD - 1}")


def make_key(seed: int, name: str, *ids: int) -> jax.Array:
    """Make the typed key of a named stream: key<fry>[].

    Raises KeyError for a name that is not in `STREAMS`, TypeError for a seed or an id that is not an integer,
    ValueError for one outside 32 bits.
    """
    _check_arguments(seed, name, ids)
    # The implementation is explicit, so that draws do not change with JAX's default.  The seed is folded in,
    # because key() rejects seeds of 2^31 and above without 64-bit types.
    key = jax.random.key(0, impl="threefry2x32")
    for word in (seed, STREAMS[name], *ids):
        key = jax.random.fold_in(key, np.uint32(word))
    return key


def make_keys(seeds: jax.Array, name: str) -> jax.Array:
    """Make the keys of a named stream without ids for seeds u32[N], under jit: key[N].

    Each is `make_key(seed, name)`.  Raises KeyError for a name that is not in `STREAMS`.
    """
    _check_arguments(0, name, ())

    def make_one(seed: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), seed)
        return jax.random.fold_in(key, np.uint32(STREAMS[name]))

    return jax.vmap(make_one)(seeds)


def make_generator(seed: int, name: str, *ids: int) -> np.random.Generator:
    """Make the NumPy generator of a named stream, independent of the JAX key of the same name.

    Raises the same errors as `make_key`.
    """
    _check_arguments(seed, name, ids)
    # Given a spawn key, NumPy pads the entropy to a fixed width, so that seed and ids stay separate.
    spawn_key = (STREAMS[name], *(operator.index(i) for i in ids))
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(operator.index(seed), spawn_key=spawn_key))
    )
