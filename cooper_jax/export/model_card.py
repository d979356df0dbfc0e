"""The model card of an exported model: README.md with the metadata that the Hugging Face hub reads.

    format_card(facts)                  the text
    write_card(directory, text)         README.md in the exported directory

The card says what the model was trained on and how, gives held-out figures with intervals, and names its limits.
All of it comes from the run directory; what the run does not know is said to be unknown.  Paths, relative ones too,
are shown without their folders.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from cooper_jax import __version__
from cooper_jax.data import data_sources
from cooper_jax.export.card_figures import Figure, list_figures
from cooper_jax.export.run_facts import RunFacts, hide_folders
from cooper_jax.runtime.remote_files import write_atomically

FILE = "README.md"
PAPER = "https://arxiv.org/abs/2508.05613"

_ARMS = {
    "rule": "the rule verifier's verdict; there is no reward model",
    "model": "the score of a reward model that is frozen during the steps",
    "cooper": "the score of a reward model that is updated at every step, along with the policy",
}


def write_card(directory: str | Path, text: str) -> None:
    """Write the card into the directory of an exported model."""
    write_atomically(Path(directory) / FILE, text.encode("utf-8", "backslashreplace"))


def format_card(facts: RunFacts, license: str = "", repository: str = "") -> str:
    """Write the card of a model.

    Args:
      license: an identifier of the hub, as in apache-2.0; "": unknown.
      repository: where on the hub the model will be, for the example of its use; "": nowhere.
    """
    figures = list_figures(facts)
    parts = [
        f"---\n{_make_metadata(facts, figures, license)}\n---",
        f"# {facts.config.name}: {_describe_kind(facts)}",
        _introduce(facts),
        "## Use\n\n" + _show_use(facts, repository or "DIRECTORY"),
        "## Training\n\n" + _format_table(_describe_training(facts)),
        "### Data\n\n" + _describe_data(facts),
        "### Settings\n\n" + _list_settings(facts),
        "## Held-out figures\n\n" + _format_figures(facts, figures),
    ]
    if facts.model == "reward":
        parts.append("## Questions that the reward model has seen\n\n" + _describe_seen(facts))
    parts.append("## Limits\n\n" + _list_limits(facts))
    parts.append("## Licence\n\n" + _describe_license(facts, license))
    return "\n\n".join(parts) + "\n"


# --- metadata ------------------------------------------------------------------------------------------


def _make_metadata(facts: RunFacts, figures: list[Figure], license: str) -> str:
    """The YAML block at the head of the card."""
    task = "text-generation" if facts.model == "policy" else "text-classification"
    tags = ["cooper", "jax", "math"]
    tags.append("reward-model" if facts.model == "reward" else "reinforcement-learning")
    results = [
        EvalResult(
            task_type=task,
            dataset_type="held-out",
            dataset_name=figure.data,
            metric_type="accuracy",
            metric_name=figure.name,
            metric_value=round(figure.at_step.value, 4),
            verified=False,
        )
        for figure in figures
        if not math.isnan(figure.at_step.low)  # the others are no accuracies
    ]
    data = ModelCardData(
        # "unknown" is the hub's word for a licence that is not known.
        license=license or "unknown",
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=task,
        base_model=facts.base_id or None,
        datasets=_list_hub_data(facts) or None,
        tags=tags,
        model_name=facts.config.name,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _list_hub_data(facts: RunFacts) -> list[str]:
    """The hub ids of the data sets that the run was trained on."""
    ids = []
    for source in facts.sources.get("data.train", ()):
        if source["commit"]:
            ids.append(data_sources.strip_name(source["source"]).partition(":")[0])
    return list(dict.fromkeys(ids))


# --- text ----------------------------------------------------------------------------------------------


def _describe_kind(facts: RunFacts) -> str:
    kind = "policy" if facts.model == "policy" else "reward model"
    return f"{kind}, adapters" if facts.is_adapter else kind


def _introduce(facts: RunFacts) -> str:
    project = f"cooper-jax {__version__}, an implementation of Cooper ([arXiv 2508.05613]({PAPER})) in JAX"
    if facts.is_reward_training:
        what = f"A reward model, trained on labelled completions with {project}."
    elif facts.model == "policy":
        what = f"A language model, trained by reinforcement learning with {project}."
    else:
        what = f"The reward model of a reinforcement-learning run with {project}."
    if facts.model == "reward":
        what += " It scores whether a response agrees with the reference answer to its question."
    unit = "update" if facts.is_reward_training else "step"
    return f"{what} The weights are those of {unit} {facts.step}. `launch/export.py` wrote this card."


def _show_use(facts: RunFacts, place: str) -> str:
    """An example.  place: a directory or a repository of the hub."""
    if facts.is_adapter:
        auto = "AutoModelForCausalLM" if facts.model == "policy" else "AutoModelForSequenceClassification"
        options = "" if facts.model == "policy" else ", num_labels=1"
        lines = [
            f"from transformers import {auto}",
            "import peft",
            "",
            f'base = {auto}.from_pretrained("{facts.base_id or "BASE"}"{options})',
            f'model = peft.PeftModel.from_pretrained(base, "{place}")',
        ]
    elif facts.model == "policy":
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{place}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        ]
    else:
        lines = [
            "import cooper_jax",
            "",
            f'model = cooper_jax.VerifyRM.load("{place}")',
            "model.score([question], [reference], [completion])  # between 0 and 1",
        ]
    text = "```python\n" + "\n".join(lines) + "\n```"
    if facts.model == "policy" and facts.config.data.instruction:
        text += (
            f"\n\nEach question was followed by this instruction: `{facts.config.data.instruction.strip()}`"
        )
    if facts.model == "reward" and not facts.is_adapter:
        text += (
            "\n\n`AutoModelForSequenceClassification` loads the weights as well (one label, a logit); the input "
            "must then have the form of `cooper_jax/data/prompts.py`, on which the model was trained."
        )
    return text


def _describe_training(facts: RunFacts) -> list[tuple[str, str]]:
    """Rows of (what, value)."""
    cfg = facts.config
    section = cfg[facts.model]
    rows = [("initial weights", facts.base_weights or f"random ({section.arch.family}, from scratch)")]
    if facts.is_reward_training:
        rows += [("updates", str(facts.step)), ("rows per update", str(cfg.train_rm.batch))]
    else:
        rows.append(("reward of the policy", _ARMS[cfg.reward.arm]))
        if cfg.reward.functions:
            rows[-1] = ("reward of the policy", f"functions: {hide_folders(cfg.reward.functions)}")
        if cfg.reward.arm == "cooper":
            rows.append(
                ("recipe of the reward model's update", cfg.reward.recipe or "none: see the settings")
            )
        rows.append(("algorithm of the policy's update", cfg.policy.algorithm or "grpo"))
        rows.append(("steps", f"{facts.step} of {cfg.steps}"))
        batch = f"{cfg.data.prompts_per_step} prompts, {cfg.rollout.group_size} responses to each"
        rows += [("a step", batch), ("longest response", f"{cfg.rollout.max_new_tokens} tokens")]
    if facts.model == "reward" and cfg.reward.get("calibrated", False):
        rows.append(("rewards", "calibrated: calibration.json"))
    rows.append(("seed", str(cfg.seed)))
    if environment := facts.environment:
        devices = ", ".join(f"{count} x {kind}" for kind, count in environment.get("devices", {}).items())
        rows.append(("devices", devices or "unknown"))
        rows.append(("commit", environment.get("commit") or "unknown"))
    return rows


def _describe_data(facts: RunFacts) -> str:
    cfg = facts.config
    if facts.is_reward_training:
        return f"Labelled completions: `{hide_folders(cfg.train_rm.data)}`."
    if not facts.sources:
        if facts.is_synthetic:
            return f"{cfg.data.synthetic_size} synthetic word problems, which the program makes."
        return "The run directory has no record of its sources (data.json): they are unknown."
    lines = ["| flag | source | commit | problems |", "| --- | --- | --- | --: |"]
    for flag, sources in facts.sources.items():
        for source in sources:
            # What has a commit is of the hub, whatever files are here now.
            if source["commit"]:
                name, commit = source["source"], f"`{source['commit'][:12]}`"
            else:
                name, commit = PurePath(source["source"]).name, "a local file"
            lines.append(f"| `{flag}` | `{name}` | {commit} | {source['problems']} |")
    return "\n".join(lines)


def _list_settings(facts: RunFacts) -> str:
    settings = facts.list_settings()
    if not settings:
        return "All settings are those of `configs/base.py` and of the recipe and algorithm above."
    lines = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    return (
        f"What differs from `configs/base.py` and from the recipe and algorithm above:\n\n```\n{lines}\n```"
    )


def _format_figures(facts: RunFacts, figures: list[Figure]) -> str:
    if not figures:
        return "None: the run has no evaluation up to this step."
    lines = [
        f"| | start (step {figures[0].start_step}) | these weights (step {figures[0].step}) |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {figure.name} | {figure.show_start()} | {figure.show_step()} |" for figure in figures]
    notes = ["In brackets: 95 % Wilson intervals, for one run and one set of held-out data."]
    if not facts.is_reward_training and facts.config.eval.samples > 1:
        notes.append(
            f"They count problems, although there were {facts.config.eval.samples} responses to each, which are "
            "not independent; so they are rather too wide than too narrow."
        )
    if figures[0].step < facts.step:
        notes.append(f"The weights are those of step {facts.step}; the last evaluation before it is shown.")
    return "\n".join(lines) + "\n\n" + " ".join(notes)


def _describe_seen(facts: RunFacts) -> str:
    seen = facts.seen
    if seen is None:
        return "Unknown: the run directory has no record of them."
    lines = [
        f"{len(seen.fingerprints)} questions (`seen_questions.json` has hashes of their normalised texts):"
    ]
    lines += [f"- {hide_folders(name)}: {count}" for name, count in sorted(seen.sources.items())]
    if not seen.complete:
        lines.append("\nThe initial weights were trained on further questions, which are not known.")
    return "\n".join(lines)


def _list_limits(facts: RunFacts) -> str:
    cfg = facts.config
    limits = ["Trained on questions with a short reference answer. Nothing else was trained or tested here."]
    if facts.is_synthetic:
        limits.append("The problems are synthetic, of one narrow form: this model serves experiments only.")
    if facts.model == "reward":
        limits.append(
            "A policy that is trained against this model can find wrong responses that it scores high. Update the "
            "model along with the policy, or watch the false positives."
        )
    elif cfg.reward.arm != "rule":
        limits.append(
            "Rewards came from a reward model, which can be hacked: a high reward is no evidence of correct "
            "answers; the held-out accuracy is."
        )
    if cfg.reward.arm == "cooper" and cfg.reward.recipe in ("", "released") and not facts.is_reward_training:
        limits.append(
            "The reward model was updated as in the paper's released code, which a policy hacked on all seeds of a "
            "small experiment (docs/results.md of cooper-jax)."
        )
    limits.append("Accuracy by the rule verifier is a lower bound: it cannot read every correct answer.")
    limits.append("Not examined for harmful or biased output; biases of the initial weights remain.")
    return "\n".join(f"- {limit}" for limit in limits)


def _describe_license(facts: RunFacts, license: str) -> str:
    if license:
        return f"{license}, as stated by whoever exported the model."
    if not facts.base_weights:
        return "Not stated. The model was trained from random weights."
    return (
        f"Not stated, and that of the initial weights ({facts.base_weights}) is unknown to this card. Their "
        "licence applies to these weights as well: look it up before you use or share them."
    )


def _format_table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
