r"""Figures of the checks on rewrites: their false alarms, and the rewrites that pass them.

    python tests/measure_giveaways.py false_alarms FILE.jsonl... [--show=K]
    python tests/measure_giveaways.py rewrites FILE.jsonl... --config=FILE.py [--config.FIELD=VALUE...] \
        [--source=gsm8k] [--longest=CHARACTERS] [--positives=N] [--pairs=N] [--digits=visible] \
        [--minutes=M] [--show=K]

The files contain labelled completions.

* `false_alarms`: no completion is a rewrite, so each one that the checks for giveaways and for refusals find is a
  false alarm.  The checks are given no positive, whose phrases they would allow, so the shares are upper bounds.
* `rewrites`: the config's assistant rewrites completions with label 1, as in training with
  `pairs.negatives=('assistant',)` and one pair per prompt.  The output has the number of rewrites that each check
  refuses, by the names of the trainer's metrics, and the probe's AUROC over the accepted ones.
"""

import argparse
import collections
import dataclasses
import math
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

# Run as a file, so the checkout's root is not on the path yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cooper_jax.data import labelled_completions, problems
from cooper_jax.launch import common
from cooper_jax.llm.chat import Failure, Reply
from cooper_jax.model.loading import load_tokenizer
from cooper_jax.reward.assistants import Assistant, Request
from cooper_jax.reward.pairs import giveaway_probe
from cooper_jax.reward.pairs.giveaway_probe import RecentRewrites
from cooper_jax.reward.pairs.giveaways import find_giveaway_phrases
from cooper_jax.reward.pairs.pair_checks import find_text_refusal
from cooper_jax.reward.pairs.pair_slots import PairSlot
from cooper_jax.reward.pairs.pair_task import PairsConfig
from cooper_jax.reward.pairs.rewrites import fill_with_rewrites
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.runtime import compilation_cache
from cooper_jax.runtime.device_layouts import lay_out_models
from cooper_jax.trainer import setup
from cooper_jax.types import Completion, Problem, Triple, Verdict

DEFAULT_PROBE_PAIRS = 256  # the default of log.giveaway_pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("false_alarms", "rewrites"):
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("files", nargs="+", type=Path)
        command.add_argument("--show", type=int, default=0, help="texts to print of each outcome")
    command.add_argument("--config", required=True, help="a config file, or the name of a shipped one")
    command.add_argument("--source", default="", help="rewrite rows of this source only, such as gsm8k")
    command.add_argument(
        "--longest", type=int, default=0, help="most characters of a positive; 0: any number"
    )
    command.add_argument("--positives", type=int, default=500, help="number of completions to rewrite")
    command.add_argument(
        "--digits",
        choices=("hidden", "visible"),
        default="hidden",
        help="visible: the probe also reads the values of numbers; hidden, as in training: their places alone",
    )
    command.add_argument("--pairs", type=int, default=0, help="stop after this number is accepted; 0: never")
    command.add_argument("--minutes", type=float, default=math.inf, help="start no batch after this CPU time")

    # All other flags, such as --config.assistant.kind=local, are the config's, which `common` checks.
    flags, config_flags = parser.parse_known_args()
    triples = []
    for path in flags.files:
        triples += labelled_completions.load_labelled_completions(str(path))
    if flags.command == "rewrites":
        print_rewrites(flags, config_flags, triples)
    elif config_flags:
        parser.error(f"unknown flags {' '.join(config_flags)}")
    else:
        print_false_alarms(triples, flags.show)


# --- false alarms ------------------------------------------------------------------------------------


def find_false_alarm(triple: Triple) -> str:
    """The reason for which a completion would be refused if it were a rewrite; "" if it passes."""
    # Without a positive there is no ratio of lengths either.
    return find_text_refusal("", Completion(triple.completion), math.inf, question=triple.question)


def print_false_alarms(triples: Sequence[Triple], show: int) -> None:
    """Print the share of completions that are refused, by reason, and the phrases that are found most often."""
    alarms: dict[str, list[Triple]] = collections.defaultdict(list)
    for triple in triples:
        alarms[find_false_alarm(triple)].append(triple)
    del alarms[""]
    giveaways = [t for reason, found in alarms.items() if reason.startswith("giveaway_") for t in found]

    wrong_total = sum(t.label == 0 for t in triples)
    print(f"{'pairs/refused_':24} {f'of {len(triples)}':>15} {f'of {wrong_total} wrong':>17}")
    for reason, found in [*sorted(alarms.items()), ("all giveaway_*", giveaways)]:
        wrong = sum(t.label == 0 for t in found)
        print(f"{reason:24} {share(len(found), len(triples)):>15} {share(wrong, wrong_total):>17}")

    # The phrases show the alternatives of the patterns that refuse most.
    phrases: collections.Counter[tuple[str, str]] = collections.Counter()
    for triple in giveaways:
        kind, found = find_giveaway_phrases(triple.completion, "", triple.question)
        phrases.update((kind, phrase) for phrase in found)
    for (kind, phrase), times in phrases.most_common(5 * show):
        print(f"  {times:3} {kind}: {phrase}")


# --- rewrites ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A request to the assistant, its reply without preface and fences, and the reason of its refusal."""

    request: Request
    reply: Reply
    refusal: str  # "": accepted


class RecordingAssistant:
    """An assistant that remembers its last requests and replies."""

    def __init__(self, assistant: Assistant):
        self._assistant = assistant
        self.overlaps, self.concurrency = assistant.overlaps, assistant.concurrency
        self.last: list[tuple[Request, Reply]] = []

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        replies = self._assistant.rewrite(requests)
        self.last = list(zip(requests, replies, strict=True))
        return replies

    def report_failures(self) -> None:
        self._assistant.report_failures()

    def close(self) -> None:
        self._assistant.close()


def choose_positives(triples: Sequence[Triple], source: str, longest: int, count: int) -> list[Triple]:
    """At most `count` distinct completions with label 1, in a fixed random order.

    Args:
      source: only rows of this source; "": of all.
      longest: most characters of a completion; 0: any number.
    """
    distinct = {(t.question, t.completion): t for t in triples if t.label == 1}.values()
    fitting = [
        t
        for t in distinct
        if (not source or t.source == source) and (not longest or len(t.completion) <= longest)
    ]
    return [fitting[i] for i in problems.fixed_random_order(len(fitting))[:count]]


def rewrite_positives(
    batch: Sequence[Triple],
    assistant: Assistant,
    rule: RuleVerifier,
    cfg: PairsConfig,
    special_tokens: Collection[str],
    seed: int,
    step: int,
) -> tuple[list[PairSlot], list[Attempt]]:
    """One slot for each positive, filled as a training step fills it, and all attempts to fill them.

    A positive that the rule does not find correct stays unused, with the refusal "no_positive".
    """
    slots = [
        PairSlot(
            Problem(t.question, t.reference), "assistant", k=0, row=i, order_row=i, positive=t.completion
        )
        for i, t in enumerate(batch)
    ]
    verdicts = rule.check([(t.reference, t.completion) for t in batch])
    for slot, verdict in zip(slots, verdicts, strict=True):
        if verdict != Verdict.CORRECT:
            slot.row, slot.refusal = None, "no_positive"

    # One try per call, because a slot keeps only the reason of its last refusal.
    recorder = RecordingAssistant(assistant)
    attempts: list[Attempt] = []
    for attempt in range(cfg.tries):
        open_slots = [slot for slot in slots if slot.row is not None and slot.negative is None]
        if not open_slots:
            break
        fill_with_rewrites(
            open_slots,
            recorder,
            rule,
            tries=1,
            length_ratio=cfg.length_ratio,
            special_tokens=special_tokens,
            seed=seed,
            step=step * cfg.tries + attempt,  # each try draws other random bits
        )
        recorder.report_failures()
        for slot, (request, reply) in zip(open_slots, recorder.last, strict=True):
            attempts.append(Attempt(request, reply, "" if slot.negative is not None else slot.refusal))
    return slots, attempts


def print_rewrites(flags: argparse.Namespace, config_flags: list[str], triples: Sequence[Triple]) -> None:
    """Let the config's assistant rewrite positives, and print the outcomes and the probe's AUROC."""
    compilation_cache.enable_compilation_cache()
    common.parse_flags(["measure_giveaways.py", f"--config={flags.config}", *config_flags])
    with common.run_job("measuring"):
        cfg = common.read_config()
        # The completions bring their own problems, so the config's file of problems is not read.
        cfg.data.train, cfg.data.format = str(flags.files[0]), "jsonl"
        settings = setup.read_settings(cfg)
        if settings.assistant is None:
            common.exit_with_error(
                "this config asks no assistant: --config.pairs.negatives=\"('assistant',)\""
            )
        positives = choose_positives(triples, flags.source, flags.longest, flags.positives)
        if not positives:
            common.exit_with_error(f"no positives with --source={flags.source} --longest={flags.longest}")

        # The control tokens are those of the models that a run of this config has.
        run_dir, layouts = Path(settings.run_dir or f"runs/{settings.name}"), lay_out_models(settings.mesh)
        sources = {"policy": settings.policy_model, "reward": settings.reward_model}
        loaded = [load_tokenizer(source, name, run_dir) for name, source in sources.items()]
        special_tokens = setup.collect_control_texts(settings, loaded, run_dir)

        assistant = setup.build_assistant(
            cfg, settings.assistant, settings.rewrite, layouts["assistant"], run_dir
        )
        slots: list[PairSlot] = []
        attempts: list[Attempt] = []
        size = settings.data.prompts_per_step
        with RuleVerifier(settings.rule) as rule:
            rule.check_ready()
            for first in range(0, len(positives), size):
                # The CPU time of all threads; unlike the time of day it does not count other processes.
                if time.process_time() > 60 * flags.minutes:
                    break
                batch = positives[first : first + size]
                filled, tried = rewrite_positives(
                    batch, assistant, rule, settings.pairs, special_tokens, settings.seed, first // size
                )
                slots += filled
                attempts += tried
                accepted = sum(slot.negative is not None for slot in slots)
                done = f"{len(slots)} positives, {len(attempts)} requests, {accepted} accepted"
                print(f"{time.process_time() / 60:6.1f} CPU minutes: {done}", flush=True)
                if 0 < flags.pairs <= accepted:
                    break
        assistant.close()

    print(f"assistant.kind={cfg.assistant.kind}, assistant.prompt={cfg.assistant.prompt}")
    print_outcomes(slots, attempts)
    print_probe(slots, digits_visible=flags.digits == "visible")
    print_samples(attempts, flags.show)


def print_outcomes(slots: Sequence[PairSlot], attempts: Sequence[Attempt]) -> None:
    """Print how many requests and how many positives end with each outcome."""
    # A positive counts with the reason of its last refusal, as in the trainer's metrics.
    by_request = collections.Counter(a.refusal for a in attempts)
    by_positive = collections.Counter(slot.refusal for slot in slots if slot.negative is None)
    print(f"{'':38} {'requests':>15} {'positives':>15}")
    accepted = sum(slot.negative is not None for slot in slots)
    rows = [("accepted", by_request[""], accepted)]
    for reason in sorted({*by_request, *by_positive} - {""}):
        rows.append((f"pairs/refused_{reason}", by_request[reason], by_positive[reason]))
    for name, requests, positives in [*rows, ("all", len(attempts), len(slots))]:
        print(f"{name:38} {share(requests, len(attempts)):>15} {share(positives, len(slots)):>15}")


def print_probe(slots: Sequence[PairSlot], digits_visible: bool = False) -> None:
    """Print the probe's AUROC over the accepted rewrites, and its time at the default number of pairs.

    digits_visible: print also the AUROC of a probe that reads the values of numbers.
    """
    pairs = [slot.to_pair() for slot in slots]
    recent = RecentRewrites().append(pairs, len(pairs))
    metrics = giveaway_probe.measure_giveaways(recent)
    auroc = metrics["pairs/giveaway_auroc"]
    print(f"pairs/giveaway_auroc={auroc:.3f}, pairs/giveaway_pairs={len(recent.rewrites)}")
    if math.isnan(auroc):
        print(f"no AUROC: the probe needs {giveaway_probe.MIN_MEASURED} pairs or more")

    if digits_visible:
        visible = giveaway_probe.compute_probe_auroc(recent.rewrites, digits_visible=True)
        print(f"AUROC with digits visible: {visible:.3f}")

    # The CPU time of all threads together is about the time on one core.
    if len(recent.rewrites) >= DEFAULT_PROBE_PAIRS:
        start = time.process_time()
        giveaway_probe.compute_probe_auroc(recent.rewrites[-DEFAULT_PROBE_PAIRS:])
        print(f"probe on {DEFAULT_PROBE_PAIRS} pairs: {time.process_time() - start:.2f} s of CPU time")


def print_samples(attempts: Sequence[Attempt], show: int) -> None:
    """Print the first `show` attempts of each outcome, with the phrases of giveaways."""
    shown: collections.Counter[str] = collections.Counter()
    for attempt in sorted(attempts, key=lambda a: a.refusal):
        shown[attempt.refusal] += 1
        if shown[attempt.refusal] > show:
            continue
        request, reply = attempt.request, attempt.reply
        print(f"\n--- {attempt.refusal or 'accepted'}")
        print(f"[reference] {request.problem.reference}\n[positive] {request.positive}")
        if isinstance(reply, Failure):
            continue
        print(f"[rewrite] {reply.text}")
        _, phrases = find_giveaway_phrases(reply.text, request.positive, request.problem.question)
        if phrases:
            print(f"[phrases] {sorted(phrases)}")


def share(part: int, whole: int) -> str:
    """A number and its share, such as "43 (0.94 %)"."""
    return f"{part} ({100 * part / whole:.2f} %)" if whole else "-"


if __name__ == "__main__":
    main()
