"""The problems that a policy is measured on: which files, which part of them, and what is left out.

1. `find` turns files and folders into files; `load` reads them, and the synthetic problems.
2. A fixed part may be taken, the same in every evaluation (`part`).
3. Problems whose prompts are too long, or whose questions the judging reward model was trained on, are left out and
   counted.
4. `chunks` cuts the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cooper_jax.data import problems as problem_sets
from cooper_jax.data import prompts as prompt_texts
from cooper_jax.data import row_reader, seen_questions, synthetic
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.runtime import remote_files
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Problem

SYNTHETIC = "synthetic"  # as a --benchmark: held-out problems of configs/tiny.py, with their oracle
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


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


def find_benchmarks(given: Sequence[str]) -> list[str]:
    """Files, and the recognised benchmarks among a folder's *_test files, in the order of their names.

    Raises SetupError for a folder without any, and for two of one name.
    """
    found: list[str] = []
    for place in given:
        with setup_errors("--benchmark"):
            if (
                place != SYNTHETIC
                and not remote_files.is_remote(place)
                and not Path(place).expanduser().exists()
            ):
                raise FileNotFoundError(f"{place}: there is no such file or folder")
        if place == SYNTHETIC or remote_files.is_remote(place) or not Path(place).expanduser().is_dir():
            found.append(place)
            continue
        inside = sorted(p for p in Path(place).expanduser().iterdir() if p.name.endswith(SUFFIXES))
        tests = [str(p) for p in inside if benchmark_name(p.name).endswith("_test") and _published(str(p))]
        if not tests:
            raise SetupError(
                f"--benchmark={place}: no file called *_test.jsonl (or .jsonl.gz, .parquet) in it holds a "
                "published benchmark"
            )
        found += tests
    names = [benchmark_name(p) for p in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise SetupError(f"--benchmark: two files are called {twice[0]!r}: rename one, or leave it out")
    return found


def benchmark_name(place: str) -> str:
    name = place.rstrip("/").rsplit("/", 1)[-1]
    for suffix in (*SUFFIXES, ".json"):
        name = name.removesuffix(suffix)
    return name


def _published(path: str) -> bool:
    try:
        _, _, row = next(iter(row_reader.read_file_rows(path)))
        return problem_sets.recognise_format(row, "", "") != "jsonl"
    except (ValueError, StopIteration):
        return False


def load_benchmarks(
    cfg: ConfigDict, places: Sequence[str], tokenizer: Tokenizer, seen: frozenset[str] = frozenset()
) -> list[Benchmark]:
    """The benchmarks with their prompts.  seen: fingerprints of the questions that the reward model saw.

    Raises SetupError, naming file, line and field.
    """
    section, out = cfg.benchmark, []
    for place in places:
        with setup_errors(f"--benchmark={place}"):
            problems = _read(cfg, place)
            chosen = sample_part(len(problems), section.problems)
            kept, known = _split(chosen, problems, seen)
            taken = kept if section.exclude_seen else chosen
            prompts = {
                i: prompt_texts.encode_policy_prompt(
                    tokenizer, problems[i].question, cfg.data.instruction, cfg.data.chat
                )
                for i in taken
            }
            fit = [i for i in taken if len(prompts[i]) <= section.max_prompt_tokens]
            if not fit:
                raise ValueError(
                    f"no problem is left of {len(chosen)}: {len(chosen) - len(taken)} were seen by the reward "
                    f"model, {len(taken)} prompts have more than {section.max_prompt_tokens} tokens "
                    "(--config.benchmark.max_prompt_tokens)"
                )
        out.append(
            Benchmark(
                name=benchmark_name(place),
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
        return synthetic.make_problems(cfg.seed, cfg.benchmark.problems or cfg.eval.problems, "eval")
    d = cfg.data
    columns = {name: d[name] for name in ("question_key", "reference_key", "solution_key", "tfds_dir")}
    return problem_sets.load_problems(place, "auto", split="", **columns)


def sample_part(size: int, count: int) -> list[int]:
    """Places, ascending, of a fixed part of `count` of `size` problems (`keyed_order`); 0 is all."""
    if not count or count >= size:
        return list(range(size))
    return sorted(problem_sets.keyed_order(size)[:count])


def _split(
    chosen: Sequence[int], problems: Sequence[Problem], seen: frozenset[str]
) -> tuple[list[int], list[int]]:
    return seen_questions.split_by_seen(chosen, seen, question=lambda i: problems[i].question)


def drop_seen_problems(benchmark: Benchmark, seen: frozenset[str], exclude: bool) -> Benchmark:
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


def cut_chunks(benchmarks: Sequence[Benchmark], size: int) -> Iterator[tuple[Benchmark, range]]:
    """The work in its order: each benchmark in ranges of at most `size` problems, as even as can be.

    Ranges of one size are decoded by one program.
    """
    for benchmark in benchmarks:
        problems = len(benchmark.problems)
        parts = -(-problems // size)
        for i in range(parts):
            yield benchmark, range(i * problems // parts, (i + 1) * problems // parts)
