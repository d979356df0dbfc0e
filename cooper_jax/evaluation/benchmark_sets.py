"""Benchmarks: the problems that a policy is measured on.

1. `find_benchmarks` lists the files of the given files and folders; `load_benchmarks` reads them and makes
   the synthetic problems.
2. `sample_part` may choose a fixed part, the same in every evaluation.
3. Problems with too long prompts, or with questions from the reward model's training data, are left out and
   counted.
4. `split_chunks` splits the problems into chunks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cooper_jax.data import data_sources, policy_prompts, row_reader, seen_questions, synthetic
from cooper_jax.data import problems as problem_sets
from cooper_jax.data.policy_prompts import PromptStyle
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.runtime import remote_files
from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Problem

SYNTHETIC = "synthetic"  # a value of --benchmark: held-out problems of configs/tiny.py, with their oracle
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Value of judged_by -> (by the rule, by the reward model).
JUDGED_BY = {"rule": (True, False), "model": (False, True), "both": (True, True)}


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of an evaluation: the config's section `benchmark`."""

    # Sampling.
    samples: int  # responses per problem
    temperature: float
    top_p: float
    max_new_tokens: int
    chunk: int  # problems that are sampled together; results are stored after each chunk

    # Problems.
    problems: int  # size of the fixed part of each benchmark; 0: all
    max_prompt_tokens: int  # problems with longer prompts are left out
    exclude_seen: bool  # leave out questions from the reward model's training data

    # Judging and figures.
    judged_by: str  # rule, model or both
    bootstrap: int  # resamples behind each 95 % interval

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, "benchmark")
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> BenchmarkConfig:
        """Read the section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "benchmark")

    @property
    def by_rule(self) -> bool:
        """True if the rule verifier judges responses."""
        return JUDGED_BY[self.judged_by][0]

    @property
    def by_model(self) -> bool:
        """True if the reward model judges responses."""
        return JUDGED_BY[self.judged_by][1]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Problems of one benchmark, and the numbers of those left out."""

    name: str

    # Problems that are measured.
    problems: tuple[Problem, ...]
    places: tuple[int, ...]  # each problem's index in its file, which seeds its sampling
    prompts: tuple[tuple[int, ...], ...] = ()  # token ids; empty for recorded responses

    # Counts.
    asked: int = 0  # problems of the chosen part
    too_long: int = 0  # problems left out for their prompt's length
    seen: int = 0  # problems with questions from the reward model's training data, left out or not
    excluded: int = 0  # those among the seen problems that are left out

    def digest(self) -> str:
        """Hash the problems, to detect another file of the same name."""
        text = "\0".join(f"{p.id}\1{p.question}\1{p.reference}" for p in self.problems)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def find_benchmarks(given: Sequence[str]) -> list[str]:
    """List the benchmark files; a folder contributes the published benchmarks among its *_test files.

    given: files, addresses, folders, hub data sets, or SYNTHETIC.

    Raises SetupError for a place that does not exist, a folder without benchmarks, and two files of one name.
    """
    benchmark_files: list[str] = []
    for place in given:
        # Folders are listed on local disks only.
        if place == SYNTHETIC or remote_files.is_remote(place) or data_sources.parse_hub_source(place):
            benchmark_files.append(place)
            continue
        path = Path(place).expanduser()
        with setup_errors("--benchmark"):
            if not path.exists():
                raise FileNotFoundError(f"{place}: there is no such file or folder")
        benchmark_files += _list_test_files(place) if path.is_dir() else [place]

    # Names identify benchmarks in the results, and seed their sampling.
    names = [get_benchmark_name(place) for place in benchmark_files]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SetupError(f"--benchmark: two files are called {repeated[0]!r}: rename one, or leave it out")
    return benchmark_files


def _list_test_files(folder: str) -> list[str]:
    """List the recognised benchmarks in a folder.  Raises SetupError if there are none."""
    files = sorted(p for p in Path(folder).expanduser().iterdir() if p.name.endswith(SUFFIXES))
    named_test = [str(p) for p in files if get_benchmark_name(p.name).endswith("_test")]
    tests = [path for path in named_test if _is_published(path)]
    if not tests:
        raise SetupError(
            f"--benchmark={folder}: no file called *_test.jsonl (or .jsonl.gz, .parquet) in it contains a "
            "published benchmark"
        )
    return tests


def get_benchmark_name(place: str) -> str:
    """Get a file's name without folder and suffix."""
    name = place.rstrip("/").rsplit("/", 1)[-1]
    for suffix in (*SUFFIXES, ".json"):
        name = name.removesuffix(suffix)
    return name


def _is_published(path: str) -> bool:
    """True if the file's first row has the format of a published benchmark."""
    try:
        _, _, row = next(iter(row_reader.read_file_rows(path)))
        return problem_sets.choose_format(row, "", "") != "jsonl"
    except (ValueError, StopIteration):
        return False


def load_benchmarks(
    cfg: ConfigDict,
    settings: BenchmarkConfig,
    places: Sequence[str],
    tokenizer: Tokenizer,
    seen: frozenset[str] = frozenset(),
) -> list[Benchmark]:
    """Load the benchmarks with their prompts.

    Args:
      cfg: the whole config, of which `data`, `seed` and `eval` are read.
      settings: its section `benchmark`.
      places: files or SYNTHETIC, from `find_benchmarks`.
      tokenizer: the policy's.
      seen: fingerprints of the questions in the reward model's training data.

    Raises SetupError, naming file, line and field.
    """
    loaded = []
    for place in places:
        with setup_errors(f"--benchmark={place}"):
            loaded.append(_load_benchmark(cfg, settings, place, tokenizer, seen))
    return loaded


def _load_benchmark(
    cfg: ConfigDict, settings: BenchmarkConfig, place: str, tokenizer: Tokenizer, seen: frozenset[str]
) -> Benchmark:
    """Load one benchmark.  Raises ValueError if no problem is left."""
    # The part is chosen before any problem is left out, so it is the same for every policy and reward model.
    problems = _read_problems(cfg, settings, place)
    chosen = sample_part(len(problems), settings.problems)
    kept, known = _split_by_seen(chosen, problems, seen)
    remaining = kept if settings.exclude_seen else chosen

    # Prompts are never truncated: a problem without its end would be another problem.
    style = PromptStyle.from_config(cfg.data)
    policy_prompts.check_thinking(tokenizer, style)
    prompts: dict[int, list[int]] = {}  # by the problem's index
    for i in remaining:
        prompts[i] = policy_prompts.encode_policy_prompt(tokenizer, problems[i], style)
    fitting = [i for i in remaining if len(prompts[i]) <= settings.max_prompt_tokens]
    if not fitting:
        raise ValueError(
            f"no problem is left of {len(chosen)}: {len(chosen) - len(remaining)} were seen by the reward "
            f"model, {len(remaining)} prompts have more than {settings.max_prompt_tokens} tokens "
            "(--config.benchmark.max_prompt_tokens)"
        )
    return Benchmark(
        name=get_benchmark_name(place),
        problems=tuple(problems[i] for i in fitting),
        places=tuple(fitting),
        prompts=tuple(tuple(prompts[i]) for i in fitting),
        asked=len(chosen),
        too_long=len(remaining) - len(fitting),
        seen=len(known),
        excluded=len(chosen) - len(remaining),
    )


def _read_problems(cfg: ConfigDict, settings: BenchmarkConfig, place: str) -> list[Problem]:
    """Read a file's problems, or make the synthetic ones."""
    if place == SYNTHETIC:
        return synthetic.make_problems(cfg.seed, settings.problems or cfg.eval.problems, "eval")
    columns = {name: cfg.data[name] for name in problem_sets.COLUMN_FIELDS}
    return problem_sets.load_problems(place, "auto", split=cfg.data.eval_split, **columns)


def sample_part(size: int, count: int) -> list[int]:
    """Choose a fixed part of `count` of `size` rows; returns ascending indices.  A count of 0 chooses all.

    The part depends on `size` and `count` alone (problems.fixed_random_order), not on the config's seed, so
    that evaluations with different seeds measure the same problems.
    """
    if not count or count >= size:
        return list(range(size))
    return sorted(problem_sets.fixed_random_order(size)[:count])


def _split_by_seen(
    indices: Sequence[int], problems: Sequence[Problem], seen: frozenset[str]
) -> tuple[list[int], list[int]]:
    """Split indices of problems into (not seen, seen)."""
    return seen_questions.split_by_seen(indices, seen, question=lambda i: problems[i].question)


def drop_seen_problems(benchmark: Benchmark, seen: frozenset[str], exclude: bool) -> Benchmark:
    """Count the recorded problems in the reward model's training data, and leave them out if `exclude`.

    seen: fingerprints of the questions in that data.

    Raises ValueError if no problem is left.
    """
    all_indices = list(range(len(benchmark.problems)))
    kept, known = _split_by_seen(all_indices, benchmark.problems, seen)
    kept = kept if exclude else all_indices
    if not kept:
        raise ValueError(f"{benchmark.name}: the reward model was trained on all {len(known)} questions")
    return dataclasses.replace(
        benchmark,
        problems=tuple(benchmark.problems[i] for i in kept),
        places=tuple(benchmark.places[i] for i in kept),
        seen=len(known),
        excluded=len(benchmark.problems) - len(kept),
    )


def split_chunks(benchmarks: Sequence[Benchmark], size: int) -> Iterator[tuple[Benchmark, range]]:
    """Split each benchmark, in order, into ranges of at most `size` problems, as equal as possible.

    Ranges of equal length share a compiled decoding program.
    """
    for benchmark in benchmarks:
        problems = len(benchmark.problems)
        # Part i begins at i * problems // parts, so the lengths of two parts differ by at most one.
        parts = -(-problems // size)
        for i in range(parts):
            yield benchmark, range(i * problems // parts, (i + 1) * problems // parts)
