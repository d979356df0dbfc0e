"""The files under examples/, as docs/extending.md shows them."""

import concurrent.futures
import re
from pathlib import Path

import pytest
from tiny_steps import config

from cooper_jax.data.labelled_completions import load_labelled_completions
from cooper_jax.data.policy_prompts import PromptStyle
from cooper_jax.data.problems import load_problems
from cooper_jax.data.row_reader import read_file_rows
from cooper_jax.launch import command_line
from cooper_jax.model.tokenizer import load_tokenizer_from
from cooper_jax.reward.assistants import Request, UserAssistant
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.rule.worker_process import make_item
from cooper_jax.runtime.device_layouts import lay_out_models
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.user_code import load_object, read_user_code
from cooper_jax.trainer.reward_functions import StepRewards, load_reward_functions
from cooper_jax.trainer.rewards import RewardConfig
from cooper_jax.trainer.setup import load_inputs, read_settings
from cooper_jax.types import Completion, Problem, Verdict

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ROWS, LABELS, JUDGE = (EXAMPLES / f"countdown_{name}.py" for name in ("rows", "labels", "judge"))


def test_the_page_shows_the_examples_own_text():
    page = (EXAMPLES.parent / "docs" / "extending.md").read_text()
    sources = [path.read_text() for path in EXAMPLES.glob("*.py")]
    # A block of one line is a signature.
    blocks = [b.strip() for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "\n" in b.strip()]
    assert len(blocks) >= 3
    for block in blocks:
        assert any(block in source for source in sources), block


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) < 50
    assert f"examples/{path.name}" in (EXAMPLES.parent / "docs" / "extending.md").read_text()


def test_the_format_reward_and_brevity():
    path = EXAMPLES / "format_reward.py"
    names = f"rule,{path}:format_reward,{path}:brevity"
    flags = {"reward.arm": "rule", "reward.functions": names, "reward.function_weights": "1,0.2,0.1"}
    settings = RewardConfig.from_config(config(**flags).reward)
    problem = Problem("Ada has 7 coins . How many coins ?", "20")
    texts = ["7*2=14;14+6=20 #### 20", "clearly #### 20 coins", "#### 20", "20", "14 #### 20 #### 20"]
    completions = [Completion(text, tokens=8) for text in texts[:4]] + [Completion(texts[4], True, 32)]
    functions = load_reward_functions(settings, [problem], PromptStyle("", "", False, ""))
    rewards = StepRewards(functions, [problem])
    rewards.add_group(0, completions, [[1]] * 5)
    found = rewards.collect(None, [Verdict.CORRECT] * 3 + [Verdict.NO_ANSWER, Verdict.CORRECT], completions)
    functions.close()
    assert found.by_name["format_reward"].tolist() == [1, 1, 0, 0, 0]
    assert found.by_name["brevity"].tolist()[:4] == [0.75] * 4 and found.metrics["reward/brevity/none"] == 1
    assert found.total.tolist() == pytest.approx([1.275, 1.275, 1.075, 0.075, 1.0])


def load_rows(name: str, **keys) -> list[Problem]:
    named = dict(
        question_key="question", reference_key="answer", solution_key="solution", tfds_dir="", split=""
    )
    return load_problems(f"{ROWS}:{name}", "jsonl", **named | keys)


def test_countdown_rows_are_solved_by_their_solutions_and_held_out_ones_are_apart():
    train, held_out = load_rows("train_rows"), load_rows("eval_rows")
    assert train == load_rows("train_rows") and len(train) == 8192 and len(held_out) == 512
    assert train[0].columns["numbers"] and train[0].id == "countdown_rows:1"
    judge = load_object(read_user_code(f"{JUDGE}:judge", ""), "")
    for p in (*train[:500], *held_out):
        assert judge(p.reference, p.solution, p.columns["numbers"]), p
        assert not judge(str(int(p.reference) + 1), p.solution, p.columns["numbers"])
        assert re.fullmatch(rf"\d+ \d+ \d+ make {p.reference} :", p.question)
    exercises = [{(*sorted(p.columns["numbers"]), p.reference) for p in part} for part in (train, held_out)]
    assert not exercises[0] & exercises[1]
    assert len({p.question for p in held_out}) == 512 and len(exercises[1]) == 133


VERDICTS = {
    "8-3=5 5+2=7": "correct", "3-2=1 8-1=7": "correct", " 8-3=5  5+2=7\n": "correct",
    "8-3=5": "wrong", "5+2=7": "wrong", "8-3=5 8+2=7": "wrong", "8-3=5 2+2=4": "wrong", "8-3=6 6+1=7": "wrong",
    "8-2=6 6-3=3": "wrong", "8-3=5 5+2=7 7*1=7": "wrong", "8 - 3 = 5 5 + 2 = 7": "wrong", "8-3=5;5+2=7": "wrong",
    "8+2=10 10-3=7": "wrong",  # a result of two digits
    "7": "wrong", "": "wrong", "8-3=5 5+2=7 #": "wrong", "\u0668-3=5 5+2=7": "wrong", "(" * 5000: "wrong",
    "__import__('os').getpid()": "wrong", "8-3=5 " * 5000: "wrong",
}  # fmt: skip


def test_the_countdown_judge_follows_the_steps():
    problem = Problem("8 2 3 make 7 :", "7", columns={"numbers": [2, 3, 8]})
    rule = RuleConfig(workers=1, timeout=5.0, step_budget=60.0, memory_mb=1024, judge=f"{JUDGE}:judge")
    with RuleVerifier(rule) as verifier:
        found = verifier.check([make_item(problem, text) for text in VERDICTS])
    assert {text: verdict.value for text, verdict in zip(VERDICTS, found, strict=True)} == VERDICTS


@pytest.mark.slow
def test_labelled_rows_have_both_classes_and_the_judges_labels():
    judge = load_object(read_user_code(f"{JUDGE}:judge", ""), "")
    triples = load_labelled_completions(f"{LABELS}:labelled_rows")[:1000]
    assert sum(t.label for t in triples) == len(triples) / 2
    for t in triples:
        numbers = [int(word) for word in t.question.split(" make ")[0].split()]
        assert judge(t.reference, t.completion, numbers) == bool(t.label), t
    # Half of the problems have two numbers; a policy's mistake ends with the target.
    assert sum(t.question.count(" ") == 4 for t in triples) == len(triples) / 2
    wrong = [t for t in triples if not t.label]
    assert 0.3 < sum(t.completion.endswith(t.reference) for t in wrong) / len(wrong) < 0.9


def test_the_rewriter_makes_one_step_false():
    rewriter = UserAssistant(read_user_code(f"{EXAMPLES / 'rewriter.py'}:Rewriter", "assistant.kind"), 60.0)
    problem = Problem("8 7 3 make 4 :", "4", columns={"numbers": [3, 8, 7]})
    positive = "8-7=1 1+3=4"
    requests = [Request(problem, positive, (0, 1, row, 0)) for row in range(40)] + [
        Request(problem, "none", (0, 1, 0, 0))
    ]
    first, again = rewriter.rewrite(requests), rewriter.rewrite(requests)
    rewriter.close()
    assert first == again and first[-1].reason == "nothing to change"
    texts = {reply.text for reply in first[:-1]}
    judge = load_object(read_user_code(f"{JUDGE}:judge", ""), "")
    assert len(texts) > 20 and not any(judge("4", text, [3, 8, 7]) for text in texts)
    for text in texts:
        assert sum(a != b for a, b in zip(text, positive, strict=True)) == 1


def test_the_countdown_config_is_valid():
    cfg = command_line.load_config(str(EXAMPLES / "countdown.py"))
    for arm in ("rule", "cooper"):
        cfg.reward.arm = arm
        cfg.reward.recipe = "" if arm == "rule" else cfg.reward.recipe
        assert read_settings(cfg).rule.judge.endswith("countdown_judge.py:judge")


def test_models_from_scratch_read_the_tasks_own_text(tmp_path):
    cfg = command_line.load_config(str(EXAMPLES / "countdown.py"))
    settings = read_settings(cfg)
    load_inputs(settings, lay_out_models(settings.mesh), tmp_path)
    tokenizer = load_tokenizer_from(str(tmp_path / "tokenizer_640.model"))
    assert len(tokenizer.encode(" make")) == 1 < len(tokenizer.encode(" coins"))

    # Without the data no tokenizer is trained, which the next start would take for the task's.
    cfg.data.train = str(tmp_path / "none.jsonl")
    settings = read_settings(cfg)
    with pytest.raises(SetupError, match="there is no such file") as error:
        load_inputs(settings, lay_out_models(settings.mesh), tmp_path / "other")
    assert len(error.value.messages) == 1 and not (tmp_path / "other").exists()


# --- rows from a function ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def rows():\n    yield {'a': 1}\n    raise KeyError('b')\n",
            r"mine.py:rows: after 1 rows: KeyError: 'b' \(line 3\)",
        ),
        ("def rows():\n    return [{'a': 1}, 2]\n", "TypeError: row 2 is int"),
        ("def rows():\n    return 3\n", "'int' object is not iterable"),
        ("def rows(seed):\n    return []\n", "missing 1 required positional argument: 'seed'"),
    ],
)
def test_a_function_that_makes_no_rows_is_refused(tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        list(read_file_rows(f"{tmp_path}/mine.py:rows"))
    assert "\n" not in str(error.value)


def test_numpy_values_of_a_functions_rows_become_plain_ones(tmp_path):
    """A judge's process gets columns as JSON, in which an array would be text."""
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    n, m = np.array([[1, 2]]), {'x': [np.float32(0.5)]}\n"
        "    yield {'question': 'q', 'answer': np.int64(4), 'n': n, 'm': m}\n"
    )
    [(_, _, row)] = read_file_rows(f"{tmp_path}/mine.py:rows")
    assert row == {"question": "q", "answer": 4, "n": [[1, 2]], "m": {"x": [0.5]}}
    assert type(row["answer"]) is int and type(row["n"][0]) is list


def test_an_assistant_that_fails_masks_its_pairs(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "class A:\n"
        "    def rewrite(self, requests):\n"
        "        text = requests[0].positive\n"
        "        if text == 'raise': raise OSError('down')\n"
        "        if text == 'hang': time.sleep(3)\n"
        "        if text == 'few': return []\n"
        "        return [None, 3, ' ', 'x'][:len(requests)]\n"
        "class B:\n    pass\n"
        "class C:\n    def __init__(self, url): pass\n"
    )
    assistant = UserAssistant(read_user_code(f"{tmp_path}/mine.py:A", "assistant.kind"), 0.5)

    def ask(text, count=4):
        replies = assistant.rewrite([Request(Problem("q", "1"), text, (0, 0, n, 0)) for n in range(count)])
        return [getattr(reply, "reason", None) or reply.text for reply in replies]

    assert ask("fine") == ["nothing to change", "malformed", "empty", "x"]
    assert ask("raise") == ["exception"] * 4 and ask("few") == ["malformed"] * 4
    assert ask("hang", 1) == ["timeout"] and assistant.rewrite([]) == []
    assert capsys.readouterr().err.count("warning: assistant.kind='mine.py:A' failed") == 1
    for name, words in (("B", "no method rewrite"), ("C", "made without arguments, and takes url")):
        with pytest.raises(ValueError, match=words):
            UserAssistant(read_user_code(f"{tmp_path}/mine.py:{name}", "assistant.kind"), 1.0)


@pytest.mark.parametrize("concurrency", [None, 2])
def test_an_assistant_is_called_by_no_more_threads_than_it_allows(tmp_path, concurrency):
    """Also when the rewrites of two steps overlap."""
    (tmp_path / "mine.py").write_text(
        "import threading, time\n"
        "calls = []\n"
        "class A:\n"
        f"    concurrency = {concurrency}\n"
        "    now = most = 0\n"
        "    lock = threading.Lock()\n"
        "    def rewrite(self, requests):\n"
        "        with self.lock:\n"
        "            A.now += 1\n"
        "            A.most = max(A.most, A.now)\n"
        "        time.sleep(0.05)\n"
        "        with self.lock:\n"
        "            A.now -= 1\n"
        "        return [f'most {A.most}' for _ in requests]\n"
    )
    assistant = UserAssistant(read_user_code(f"{tmp_path}/mine.py:A", "assistant.kind"), 20.0)
    assert assistant.concurrency == concurrency
    request = Request(Problem("q", "1"), "text", (0, 0, 0, 0))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: assistant.rewrite([request]), range(8)))
    assert max(reply.text for (reply,) in replies) == f"most {concurrency or 1}"


@pytest.mark.parametrize("value", ["0", "'many'", "True"])
def test_a_concurrency_that_is_no_number_of_threads_is_refused(tmp_path, value):
    (tmp_path / "mine.py").write_text(f"class A:\n    concurrency = {value}\n    def rewrite(self, r): ...\n")
    with pytest.raises(ValueError, match="its concurrency is .*; give the number of threads"):
        UserAssistant(read_user_code(f"{tmp_path}/mine.py:A", "assistant.kind"), 20.0)
