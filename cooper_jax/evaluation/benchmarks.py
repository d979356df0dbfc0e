"""A policy on benchmarks: samples of each problem, judged by the rule, the reward model, or both side by side.

1. `load` reads the benchmarks: files of published problems, or the synthetic ones.  A fixed part of each may be
   taken, the same in every evaluation; problems whose prompts are too long, or whose questions the judging reward
   model was trained on, are left out and counted.
2. `run` goes through them a chunk of problems at a time: `benchmark.samples` responses each from a `Sampler`
   (the policy's rollout, or recorded ones that are judged anew).  The rule judges responses as they end, beside
   decoding; the reward model scores when the chunk has ended.  A chunk's rows are then written (ledger.py).
3. `summaries.py` makes figures of the rows.

A response's random bits depend on (seed, the benchmark's name, the problem's place in its file, sample, token)
alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from cooper_jax import assembly
from cooper_jax.data import overlap, sources, synthetic
from cooper_jax.data import problems as problem_sets
from cooper_jax.evaluation.ledger import Ledger, Row
from cooper_jax.evaluation.scoring import RewardModel
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.reward.rule import RuleVerifier
from cooper_jax.reward.shared import SharedRule
from cooper_jax.rollout import engine
from cooper_jax.runtime import files, hosts, keys
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings import SetupError, boundary
from cooper_jax.types import Completion, Params, Problem, Triple

SYNTHETIC = "synthetic"  # as a --benchmark: held-out problems of configs/tiny.py, with their oracle
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# Is given problems' places in the chunk and their responses, while others are still sampled.
OnReady = Callable[[int, list[Completion]], None]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Problems of one benchmark, and how many were left out."""

    name: str
    problems: tuple[Problem, ...]
    places: tuple[int, ...]  # of each in its file: they decide its random bits
    prompts: tuple[tuple[int, ...], ...] = ()  # token ids; none where responses are recorded
    asked: int = 0  # problems of the part that was asked for
    too_long: int = 0
    seen: int = 0  # questions that the reward model was trained on, whether left out or not
    excluded: int = 0  # those of them that are left out

    def digest(self) -> str:
        """A hash of what is asked, so that another file of the same name is noticed."""
        text = "\0".join(f"{p.id}\1{p.question}\1{p.reference}" for p in self.problems)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


# --- 1. problems ---------------------------------------------------------------------------------------------


def find(given: Sequence[str]) -> list[str]:
    """Files, and the recognised benchmarks among a folder's *_test files, in the order of their names.

    Raises SetupError for a folder without any, and for two of one name.
    """
    found: list[str] = []
    for place in given:
        if place == SYNTHETIC or files.is_remote(place) or not Path(place).expanduser().is_dir():
            found.append(place)
            continue
        inside = sorted(p for p in Path(place).expanduser().iterdir() if p.name.endswith(SUFFIXES))
        tests = [str(p) for p in inside if name_of(p.name).endswith("_test") and _published(str(p))]
        if not tests:
            raise SetupError(
                f"--benchmark={place}: no file called *_test.jsonl (or .jsonl.gz, .parquet) in it holds a "
                "published benchmark"
            )
        found += tests
    names = [name_of(p) for p in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise SetupError(f"--benchmark: two files are called {twice[0]!r}: rename one, or leave it out")
    return found


def name_of(place: str) -> str:
    name = place.rstrip("/").rsplit("/", 1)[-1]
    for suffix in (*SUFFIXES, ".json"):
        name = name.removesuffix(suffix)
    return name


def _published(path: str) -> bool:
    try:
        _, _, row = next(iter(sources.file_rows(path)))
        return problem_sets.recognise(row, "", "") != "jsonl"
    except (ValueError, StopIteration):
        return False


def load(
    cfg: ConfigDict, places: Sequence[str], tokenizer: Tokenizer, seen: frozenset[str] = frozenset()
) -> list[Benchmark]:
    """The benchmarks with their prompts.  seen: fingerprints of the questions that the reward model saw.

    Raises SetupError, naming file, line and field.
    """
    section, out = cfg.benchmark, []
    for place in places:
        with boundary(f"--benchmark={place}"):
            problems = _read(cfg, place)
            chosen = part(len(problems), section.problems)
            kept, known = _split(chosen, problems, seen)
            taken = kept if section.exclude_seen else chosen
            prompts = {i: assembly.policy_prompt(cfg, tokenizer, problems[i]) for i in taken}
            fit = [i for i in taken if len(prompts[i]) <= section.max_prompt_tokens]
            if not fit:
                raise ValueError(
                    f"no problem is left of {len(chosen)}: {len(chosen) - len(taken)} were seen by the reward "
                    f"model, {len(taken)} prompts have more than {section.max_prompt_tokens} tokens "
                    "(--config.benchmark.max_prompt_tokens)"
                )
        out.append(
            Benchmark(
                name=name_of(place),
                problems=tuple(problems[i] for i in fit),
                places=tuple(fit),
                prompts=tuple(tuple(prompts[i]) for i in fit),
                asked=len(chosen),
                too_long=len(taken) - len(fit),
                seen=len(known),
                excluded=len(chosen) - len(taken),
            )
        )
    return out


def _read(cfg: ConfigDict, place: str) -> list[Problem]:
    if place == SYNTHETIC:
        return synthetic.problems(cfg.seed, cfg.benchmark.problems or cfg.eval.problems, "eval")
    d = cfg.data
    columns = {name: d[name] for name in ("question_key", "reference_key", "solution_key", "tfds_dir")}
    return problem_sets.load(place, "auto", split="", **columns)


def part(size: int, count: int) -> list[int]:
    """Places, ascending, of a fixed part of `count` of `size` problems; 0 is all.

    The first of an order that no setting changes: two evaluations of one file ask the same, and fewer are among
    more.
    """
    if not count or count >= size:
        return list(range(size))
    words = keys.numpy_stream(0, "benchmark").bit_generator.random_raw(size)
    return sorted(np.argsort(words, kind="stable")[:count].tolist())


def _split(
    chosen: Sequence[int], problems: Sequence[Problem], seen: frozenset[str]
) -> tuple[list[int], list[int]]:
    return overlap.split(chosen, seen, question=lambda i: problems[i].question)


# --- 2. responses --------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """Where responses come from."""

    samples: int  # of each problem

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None: ...


class PolicySampler:
    """The rollout engine, at the benchmark section's own temperature, top-p and length."""

    def __init__(self, cfg: ConfigDict, layout: Layout, model: assembly.Model, params: Params):
        section, r = cfg.benchmark, cfg.rollout
        self.samples = section.samples
        self._cfg, self._layout, self._model, self._params = cfg, layout, model, params
        with boundary("benchmark"):
            self._spec = engine.SamplingSpec(
                temperature=section.temperature,
                top_k=0,
                top_p=section.top_p,
                max_new_tokens=section.max_new_tokens,
                group_size=section.samples,
                eos_ids=model.tokenizer.eos_ids,
                segment=r.segment,
                dtype=r.dtype,
                kv_dtype=r.kv_dtype,
            )

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        spec, tokenizer = self._spec, self._model.tokenizer

        def on_groups(places: list[int], rows) -> None:
            responses = engine.completions(rows, tokenizer.decode, spec.eos_ids)
            for i, place in enumerate(places):
                on_ready(place, responses[i * self.samples : (i + 1) * self.samples])

        key = keys.stream(self._cfg.seed, "benchmark", zlib.crc32(benchmark.name.encode()))
        with boundary("rollout"):
            engine.generate(
                self._params, self._model.config, self._layout,
                benchmark.prompts[chunk.start : chunk.stop], benchmark.places[chunk.start : chunk.stop],
                key, spec, on_groups=on_groups, **assembly.rollout_options(self._cfg),
            )  # fmt: skip


class RecordedSampler:
    """The responses of an items file, to be judged anew."""

    def __init__(self, rows: Sequence[Row], samples: int):
        self.samples = samples
        self._found: dict[tuple[str, str], list[Completion]] = {}
        for row in rows:
            said = Completion(row["completion"], row["truncated"], row["tokens"])
            self._found.setdefault((row["benchmark"], row["id"]), []).append(said)

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        for place, i in enumerate(chunk):
            on_ready(place, self._found[benchmark.name, benchmark.problems[i].id])


def recorded(path: str) -> tuple[list[Benchmark], RecordedSampler]:
    """An items file's problems and responses.  Raises ValueError naming file, line and field."""
    needed = {
        "benchmark": str, "id": str, "place": int, "question": str, "reference": str, "subject": str, "level": str,
        "sample": int, "completion": str, "truncated": bool, "tokens": int,
    }  # fmt: skip
    rows, problems, counts = [], {}, {}
    for where, _, row in sources.file_rows(path):
        for name, kind in needed.items():
            if not isinstance(sources.field(row, name), kind):
                raise ValueError(f"{where}: field {name!r} is {row[name]!r}: must be {kind.__name__}")
        key = row["benchmark"], row["id"]
        problems.setdefault(key, (row["place"], Problem(row["question"], row["reference"], "", row["id"],
                                                        row["subject"], row["level"])))  # fmt: skip
        if row["sample"] != counts.get(key, 0):
            raise ValueError(
                f"{where}: sample {row['sample']} of {row['id']} comes as its {counts.get(key, 0)}."
            )
        counts[key] = counts.get(key, 0) + 1
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: there is no row in it")
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{path}: problems have from {min(counts.values())} to {max(counts.values())} samples"
        )
    names = dict.fromkeys(name for name, _ in problems)
    benchmarks = []
    for name in names:
        places, own = zip(*(found for (n, _), found in problems.items() if n == name), strict=True)
        benchmarks.append(Benchmark(name, own, places, asked=len(own)))
    return benchmarks, RecordedSampler(rows, next(iter(counts.values())))


def without_seen(benchmark: Benchmark, seen: frozenset[str], exclude: bool) -> Benchmark:
    """Recorded problems without those that the reward model saw.  Raises ValueError where none is left."""
    kept, known = _split(range(len(benchmark.problems)), benchmark.problems, seen)
    kept = kept if exclude else list(range(len(benchmark.problems)))
    if not kept:
        raise ValueError(f"{benchmark.name}: the reward model was trained on all {len(known)} questions")
    return dataclasses.replace(
        benchmark,
        problems=tuple(benchmark.problems[i] for i in kept),
        places=tuple(benchmark.places[i] for i in kept),
        seen=len(known),
        excluded=len(benchmark.problems) - len(kept),
    )


# --- 3. judged and written -----------------------------------------------------------------------------------


def chunks(benchmarks: Sequence[Benchmark], size: int) -> Iterator[tuple[Benchmark, range]]:
    """The work in its order: each benchmark in ranges of at most `size` problems, as even as can be.

    Ranges of one size are decoded by one program.
    """
    for benchmark in benchmarks:
        problems = len(benchmark.problems)
        parts = -(-problems // size)
        for i in range(parts):
            yield benchmark, range(i * problems // parts, (i + 1) * problems // parts)


def run(
    benchmarks: Sequence[Benchmark],
    sampler: Sampler,
    rule: RuleVerifier | SharedRule | None,
    reward: RewardModel | None,
    ledger: Ledger,
    chunk: int,
    tell: Callable[[str], Any],
) -> None:
    """All that the ledger does not hold yet.  rule, reward: the judges; at least one.

    Raises hosts.Stopped after a SIGTERM: what is written stays, and the chunk under way is lost.
    """
    work = list(chunks(benchmarks, chunk))
    began, first = time.perf_counter(), ledger.done
    for number, (benchmark, places) in enumerate(work):
        if number < first:
            continue
        hosts.look()
        start = time.perf_counter()
        rows = _judged(benchmark, places, sampler, rule, reward)
        ledger.append(rows, time.perf_counter() - start)
        pace = (time.perf_counter() - began) / (number + 1 - first)
        left = round(pace * (len(work) - number - 1))
        tell(
            f"{benchmark.name} {places.stop}/{len(benchmark.problems)} problems  {_in_short(rows)}"
            f"  {sum(r['tokens'] for r in rows) / (time.perf_counter() - start):.0f} tokens/s"
            f"  ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )


def _judged(benchmark: Benchmark, places: range, sampler: Sampler, rule, reward) -> list[Row]:
    """A chunk's rows, problem by problem."""
    problems = [benchmark.problems[i] for i in places]
    responses: dict[int, list[Completion]] = {}

    def on_ready(place: int, completions: list[Completion]) -> None:
        responses[place] = completions
        if rule is not None:  # while others are decoded; the verifier remembers its verdicts
            rule.submit([(problems[place].reference, c.text) for c in completions])

    sampler(benchmark, places, on_ready)
    flat = [
        (problems[n], responses[n][s], n, s) for n in range(len(problems)) for s in range(sampler.samples)
    ]
    pending = None if rule is None else rule.submit([(p.reference, c.text) for p, c, _, _ in flat])
    rewards = (
        None
        if reward is None
        else reward.rewards([Triple(p.question, p.reference, c.text) for p, c, _, _ in flat])
    )
    verdicts = None if pending is None else pending.result()
    rows = []
    for i, (problem, completion, n, sample) in enumerate(flat):
        row: Row = {
            "benchmark": benchmark.name,
            "id": problem.id,
            "place": benchmark.places[places[n]],
            "subject": problem.subject,
            "level": problem.level,
            "question": problem.question,
            "reference": problem.reference,
            "sample": sample,
            "completion": completion.text,
            "tokens": completion.tokens,
            "truncated": completion.truncated,
        }
        if verdicts is not None:
            row["rule"] = verdicts[i].value
        if rewards is not None:
            row["reward"] = round(float(rewards[i]), 6)
        if benchmark.name == SYNTHETIC:
            row["oracle"] = synthetic.oracle(problem, completion.text)
        rows.append(row)
    return rows


def _in_short(rows: Sequence[Row]) -> str:
    parts = []
    if "rule" in rows[0]:
        parts.append(f"rule {np.mean([r['rule'] == 'correct' for r in rows]):.1%}")
    if "reward" in rows[0]:
        parts.append(f"reward model {np.mean([r['reward'] > 0.5 for r in rows]):.1%}")
    return "  ".join([*parts, f"truncated {np.mean([r['truncated'] for r in rows]):.1%}"])
