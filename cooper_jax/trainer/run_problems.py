"""Problems of a run: the training data and the held-out problems, from the sources of the config.

1. `load_problems` reads all sources.  Hub data sets are pinned: the first host finds their commits, all hosts
   read these, and a run that resumes reads those of its record.
2. `choose_held_out` samples from the held-out problems that may be evaluated on.
3. `encode_problems` encodes the prompts and drops problems whose prompts are too long.
4. `record_sources` writes `data.json` into the run directory: sources, files, commits and numbers of rows.
5. `describe_sources` gives one line for each source: rows, dropped ones, duplicates, and references that the
   rule cannot verify.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from cooper_jax.data import data_sources, hub_datasets, mixtures, policy_prompts, synthetic
from cooper_jax.data import problems as problem_sets
from cooper_jax.data.data_config import DataConfig
from cooper_jax.data.mixtures import DataOrder
from cooper_jax.data.problems import ProblemSet
from cooper_jax.model.loading import Directory
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.rule import reference_checks
from cooper_jax.runtime import hosts
from cooper_jax.runtime.checkpoint import list_steps
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.settings.setup_errors import ErrorCollector, SetupError
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.types import Problem

# The record of the sources, in the run directory.
RECORD = "data.json"


@dataclasses.dataclass(frozen=True)
class RunProblems:
    """The problems of a run before any is dropped."""

    train: list[Problem]  # of all sources, one after the other
    held_out: list[Problem]  # all that may be evaluated on; possibly none

    # What was read, by the name of the flag; empty for synthetic problems.
    sets: Mapping[str, list[ProblemSet]] = dataclasses.field(default_factory=dict)
    # Source -> number of its training problems that data.drop_duplicates left out.
    repeated: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EncodedProblems:
    """Problems whose prompts are short enough."""

    problems: list[Problem]
    prompts: list[list[int]]  # token ids
    too_long: Mapping[str, int]  # source -> number of problems dropped, whose prompts are too long


def load_problems(settings: RunSettings, run_dir: Directory | None = None) -> RunProblems:
    """Load the training problems and all problems held out for evaluation.

    run_dir: the run directory, whose record pins the commits of hub data sets; None: the newest commits.

    Raises SetupError with every source that cannot be read.
    """
    data = settings.data

    # Synthetic splits are disjoint by construction.
    if data.is_synthetic:
        return RunProblems(
            synthetic.make_problems(settings.seed, data.synthetic_size, "train"),
            synthetic.make_problems(settings.seed, settings.eval.problems, "eval"),
        )

    errors = ErrorCollector()
    commits: dict[str, str] = {}
    with errors.collect("data"):
        commits = _pin_commits([*data.train_sources, *data.eval_sources], run_dir)
    errors.raise_if_any()

    columns = (data.question_key, data.reference_key, data.solution_key)
    flags = {
        "data.train": (data.train_sources, data.format, data.split),
        "data.eval": (data.eval_sources, data.eval_format, data.eval_split),
    }
    sets: dict[str, list[ProblemSet]] = {flag: [] for flag in flags}
    for flag, (sources, format, split) in flags.items():
        for text in sources:
            with errors.collect(f"{flag}={text}"):
                found: str | data_sources.DataSource = text
                if format != "tfds":
                    found = data_sources.find_source(text, split, commits.get(text, ""))
                sets[flag].append(
                    problem_sets.load_problem_set(
                        found,
                        format,
                        columns,
                        tfds_dir=data.tfds_dir,
                        split=split,
                        reduce_solutions=data.reduce_solutions,
                    )
                )
        with errors.collect(flag):
            data_sources.check_names([s.source for s in sets[flag]])
    errors.raise_if_any()

    train, held_out = (_join(sets[flag]) for flag in flags)
    repeated: Mapping[str, int] = {}
    if data.drop_duplicates:
        # The dict is filled from the end, so it keeps the first of each.
        first = {(p.question, p.reference): p for p in reversed(train)}
        unique = [p for p in train if first[p.question, p.reference] is p]
        repeated = Counter(p.source for p in train) - Counter(p.source for p in unique)
        train = unique
    # Without data.eval, problems of the training data are held out, unless the run never evaluates.
    if not data.eval and settings.eval.every:
        train, held_out = split_off_held_out(train, data.eval_from_train)
    return RunProblems(train, held_out, sets, repeated)


def _join(sets: Sequence[ProblemSet]) -> list[Problem]:
    """The problems of several sets, one after the other."""
    joined: list[Problem] = []
    for problem_set in sets:
        joined += problem_set.problems
    return joined


def _pin_commits(texts: Sequence[str], run_dir: Directory | None) -> dict[str, str]:
    """Find the commits of the hub data sets among the sources: source -> commit, the same on all hosts.

    A run that resumes has recorded them.
    """

    def find_commits() -> bytes:
        recorded = _read_commits(run_dir) if run_dir is not None and list_steps(run_dir) else {}
        commits = {}
        for text in texts:
            hub_id = data_sources.parse_hub_source(text)
            if hub_id is not None:
                commits[text] = recorded.get(text) or hub_datasets.find_commit(hub_id)
        return json.dumps(commits).encode()

    # The hosts may differ in their local files, which take precedence, but not in the flags.
    if not any(data_sources.may_be_hub_source(text) for text in texts):
        return {}
    return json.loads(hosts.broadcast_value("hub commits", find_commits))


def _read_commits(run_dir: Directory) -> dict[str, str]:
    """The commits in a run's record: source -> commit."""
    path = run_dir / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_bytes())
        return {s["source"]: s["commit"] for sources in record.values() for s in sources if s["commit"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}), and it has the commits of the hub data sets that the run reads: "
            "restore it, or start a new run with another --config.run_dir"
        ) from error


def record_sources(problems: RunProblems, run_dir: Directory) -> None:
    """Write the record of a run's sources; the first host writes, and synthetic problems have none."""
    if not problems.sets or not hosts.is_primary():
        return
    record = {}
    for flag, sets in problems.sets.items():
        record[flag] = [
            {
                "source": s.source.text,
                "name": s.source.name,
                "commit": s.source.revision,
                "files": [file.display_name for file in s.source.files],
                "rows": len(s.problems) + s.unanswered,
                "problems": len(s.problems),
            }
            for s in sets
        ]
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / RECORD, json.dumps(record, indent=1).encode() + b"\n")


def split_off_held_out(train: list[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """Split off `count` problems for evaluation: (remaining problems, held-out ones), in the file's order.

    The choice depends on the number of problems alone, so runs with other seeds are evaluated on the same
    problems.  All copies of a held-out question leave the training set.  Raises SetupError if no problem
    would be left to train on.
    """
    if not count:
        return train, []
    if count >= len(train):
        raise SetupError(
            f"data.eval_from_train={count}: the training file has {len(train)} problems, and some must be "
            "left to train on; hold out fewer, or name an evaluation file with --config.data.eval=FILE"
        )

    held_out = sorted(problem_sets.fixed_random_order(len(train))[:count])
    held_out_questions = {train[i].question for i in held_out}
    remaining = [problem for problem in train if problem.question not in held_out_questions]
    return remaining, [train[i] for i in held_out]


def choose_held_out(
    eligible: Sequence[Problem], all_problems: Sequence[Problem], count: int, shares: Sequence[int] = ()
) -> list[Problem]:
    """Sample at most `count` problems to evaluate on, in the file's order.

    Args:
      eligible: the problems of `all_problems` that may be evaluated on.
      all_problems: those of the file, or of the part of the training file that is held out.
      shares: of each source in `count`; (): the sources are sampled as one.  A source with fewer problems
        than its share is used whole.
    """
    if shares:
        chosen: list[Problem] = []
        names = list(dict.fromkeys(p.source for p in all_problems))
        for name, part in zip(names, mixtures.apportion(count, shares), strict=True):
            eligible_part, whole = ([p for p in ps if p.source == name] for ps in (eligible, all_problems))
            chosen += choose_held_out(eligible_part, whole, part)
        return chosen
    if len(eligible) <= count:
        return list(eligible)

    # Problems are taken in a fixed random order of the whole file, as in benchmarks.  Two runs that exclude
    # different problems therefore share most of their samples.
    index_in_file = {problem: index for index, problem in enumerate(all_problems)}
    fixed_order = problem_sets.fixed_random_order(len(all_problems))
    rank_of_index = {index: rank for rank, index in enumerate(fixed_order)}
    chosen = sorted(eligible, key=lambda p: rank_of_index[index_in_file[p]])[:count]
    return sorted(chosen, key=lambda p: index_in_file[p])


def encode_problems(data: DataConfig, tokenizer: Tokenizer, problems: Sequence[Problem]) -> EncodedProblems:
    """Encode the policy's prompts, and drop problems whose prompts exceed `data.max_prompt_tokens`.

    Raises ValueError if none is left, and if the chat template rejects a prompt.
    """
    if not problems:
        return EncodedProblems([], [], {})
    style = data.prompt_style

    def encode(problem: Problem) -> list[int]:
        try:
            return policy_prompts.encode_policy_prompt(tokenizer, problem, style)
        except ValueError as error:
            raise ValueError(f"{problem.id}: {error}") from error

    kept, prompts, _ = problem_sets.drop_long_prompts(problems, encode, data.max_prompt_tokens)
    too_long = Counter(p.source for p in problems) - Counter(p.source for p in kept)
    return EncodedProblems(kept, prompts, too_long)


def make_data_order(data: DataConfig, train: Sequence[Problem]) -> DataOrder:
    """Make the order of the training problems that were not dropped.

    Raises SetupError if a weighted source has none left.
    """
    shares = data.train_shares
    if not shares:
        return DataOrder((len(train),))
    names = list(dict.fromkeys(p.source for p in train))
    if len(names) < len(shares):
        raise SetupError(
            f"data.train={data.train}: only {', '.join(names)} have problems left to train on, and there are "
            f"weights for {len(shares)} sources: leave the others out"
        )
    return DataOrder(tuple(sum(p.source == name for p in train) for name in names), shares)


def describe_sources(
    problems: RunProblems,
    train: EncodedProblems,
    held_out: EncodedProblems,
    limit: int,
    *,
    verified: bool = True,
) -> list[str]:
    """One line for each source that was read, and one for synthetic training problems.

    Args:
      limit: data.max_prompt_tokens.
      verified: the rule verifier judges responses.  With a judge of the user's own, references may have another
        form than the rule's.
    """
    if not problems.sets and not verified:
        return []
    if not problems.sets:
        return list(filter(None, [reference_checks.describe_references("data.train", problems.train)]))
    lines = []
    for flag, encoded in (("data.train", train), ("data.eval", held_out)):
        for problem_set in problems.sets[flag]:
            used = [p for p in encoded.problems if p.source == problem_set.source.name]
            rows = len(problem_set.problems) + problem_set.unanswered
            line = f"{flag}={problem_set.source.text}: {rows} rows"
            if problem_set.source.revision:
                line += f" at commit {problem_set.source.revision[:8]}"
            if problem_set.unanswered:
                line += f", {problem_set.unanswered} dropped: no final answer"
            if (repeated := problems.repeated.get(problem_set.source.name)) and flag == "data.train":
                line += f", {repeated} dropped: duplicates"
            if too_long := encoded.too_long.get(problem_set.source.name):
                line += f", {too_long} dropped: prompts longer than {limit} tokens"
            lines.append(
                f"{line}; {len(used)} used, {reference_checks.describe_problems(used, verified=verified)}"
            )
    return lines
