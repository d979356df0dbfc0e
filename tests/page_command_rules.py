"""How each fenced command of the pages is run here, or why it is not: the table of run_page_commands.py.

A command takes the first rule whose pattern it has; a command without a rule, a rule without a command and a
placeholder that nobody replaces are errors (test_page_commands.py).  `append` has the small settings of long
commands.  The files that `needs` names are made by page_fixtures.py.
"""

from __future__ import annotations

from page_commands import Rule

# --- small settings ------------------------------------------------------------------------------------------

# One step of four responses; the supervised phases of a few updates.
STUDY = (
    "--config.steps=1 --config.supervised.policy_steps=4 --config.supervised.reward_steps=4 --config.eval.every=1 "
    "--config.eval.problems=8 --config.data.prompts_per_step=2 --config.rollout.group_size=2"
)
TINY = f"{STUDY} --config.eval.reward_rows=8 --config.data.synthetic_size=64 --config.reward.warmup_updates=0"
# In place of SmolLM2 or a reader's own model.
POLICY = "--config.policy.weights=models/policy"
SCORER = "--config.reward.weights=models/scorer"
SMALL_BENCHMARK = (
    "--config.benchmark.problems=2 --config.benchmark.samples=1 --config.benchmark.chunk=2 "
    "--config.benchmark.max_new_tokens=8"
)
BENCH = "--reps=1 --config.data.prompts_per_step=2 --config.rollout.group_size=2"
TRAIN_RM = (
    f"{SCORER} --config.train_rm.batch=16 --config.train_rm.epochs=1 --config.train_rm.other_references=0"
)

ZONE = "--zone=us-west4-a --dry-run"

# A server that runs beside a command; all processes of a command end with it.
BESIDE = "> server.txt 2>&1 & until grep -q 'ready: ' server.txt; do kill -0 $!; sleep 0.2; done;"
SERVE_RUN = f"python launch/serve.py --run_dir=runs/tiny --config.serve.port=18473 {BESIDE}"
SERVE_SCORER = (
    "export COOPER_API_KEY=of-this-test; "
    "python launch/serve.py --config.reward.weights=models/scorer --config.reward.max_tokens=256 "
    f"--config.serve.port=18474 {BESIDE}"
)

# --- reasons ---------------------------------------------------------------------------------------------------

NETWORK = "needs a network"
CLOUD = "needs an account of a cloud, and changes what is in it"
ACCELERATOR = "needs a GPU or a TPU, and real weights or data"
COMPILER = "needs XLA's TPU or GPU compiler in an environment of its own, and minutes: tests/compile"
CHECK = "takes minutes: tests/test_check_device.py runs it"
TESTS = "is a part of the tests, or all of them: .ci/run"
FLAGS = "is no command: flags to add to one; tests/test_docs.py checks their names"
VIEWER = "opens another library's viewer, or sends to its server"
HOURS = "takes hours: the README's study runs here, with small settings"
EXCERPT = "is an excerpt of a file in examples/, which has tests of its own"

RULES = (
    # --- what needs something that is not here ---
    Rule(r"^(pip install|python3?(\.12)? -m venv|\.venv\S*/bin/)", skip=NETWORK + ": it installs libraries"),
    Rule(r"^jupyter lab", skip="opens a browser: tests/test_notebook.py executes the notebook"),
    Rule(r"\.venv\S*/bin/(python|mkdocs) ", skip="needs the environment of the line before it: .ci/run"),
    Rule(r"^(curl -LO|git clone)", skip=NETWORK),
    Rule(r"^git worktree", skip="needs an old commit of the repository's history"),
    Rule(r"\.\./before/", skip="needs the working tree of the line before it"),
    Rule(r"^(gcloud|docker|xpk|\[ -f ~/\.ssh|eval \"\$\(ssh-agent)", skip=CLOUD),
    Rule(r"^--config", skip=FLAGS),
    Rule(r"^(tensorboard|wandb|trackio|mlflow) ", skip=VIEWER),
    Rule(
        r"--push=",
        skip=NETWORK + ": it uploads to the hub; tests/test_model_card.py and test_api.py read the card",
    ),
    Rule(r"^python -m verl", skip="needs verl and GPUs"),
    Rule(
        r"^curl http.*/v1/score",
        replace=((r"^curl", f"{SERVE_SCORER} curl --fail-with-body"), (r":8001", ":18474")),
        needs=("models",),
    ),
    Rule(r"launch/compile\.py", skip=COMPILER),
    Rule(r"launch/check_device\.py", skip=CHECK),
    # --- clusters: the launchers print what they would do ---
    Rule(r"tpu_pod\.sh .*--dry-run", replace=((r"BUCKET", "bucket"),), short=True),
    Rule(r"tpu_pod\.sh --name.* -- .*BUCKET", replace=((r" -- ", " --dry-run -- "), (r"BUCKET", "bucket"))),
    Rule(r"tpu_pod\.sh up", replace=((r"$", " --dry-run"),)),
    # A dry run of `up` remembers no options, so the zone is said again.
    Rule(r"tpu_pod\.sh (run|fetch)", replace=((r"=cooper", f"=cooper {ZONE}"), (r"BUCKET", "bucket"))),
    Rule(r"tpu_pod\.sh", replace=((r"=cooper", f"=cooper {ZONE}"),)),
    Rule(
        r"gke\.sh .* -- ", replace=((r" -- ", " --dry-run -- "), (r"BUCKET", "bucket"), (r"=IMAGE", "=image"))
    ),
    Rule(r"gke\.sh", replace=((r"$", " --dry-run"),)),
    Rule(r"slurm\.sh", replace=((r" -- ", " --dry-run -- "), (r"=LAB", "=lab"), (r"HOST", "host"))),
    # --- tests and checks ---
    Rule(r"^python -m pytest tests/test_recipes\.py", short=True),
    Rule(r"^(python -m pytest|ruff check)", skip=TESTS),
    Rule(r"check_links\.py --external", exits=(0, 2)),  # 2: nothing is dead, but there is no network
    Rule(r"reference_pages\.py --write", short=True),
    Rule(
        r"step_page\.py --write",
        skip="takes minutes: tests/test_docs.py renders such a page of a smaller step",
    ),
    Rule(r"measure_hacking_guard\.py (evaluate|records)", short=True),
    Rule(r"measure_hacking_guard\.py", skip="needs a study of hours: tests/test_measure_hacking_guard.py"),
    Rule(
        r"measure_serving\.py",
        skip="takes minutes, and measures: tests/test_serving_clients.py runs it in small",
    ),
    Rule(
        r"measure_terminal\.py",
        append="--config.eval.problems=8 --config.eval.reward_rows=8 --config.steps=1",
    ),
    # --- serving ---
    Rule(r"serve\.py --run_dir=runs/tiny", append="--config.serve.port=0", needs=("run",), until="ready: "),
    Rule(
        r"serve\.py --config\.reward\.weights=VERIFYRM_DIR",
        replace=((r"VERIFYRM_DIR", "models/scorer"), (r"port=8001", "port=0")),
        append="--config.reward.max_tokens=256",
        needs=("models",),
        until="ready: ",
    ),
    Rule(r"serve\.py .*Qwen", skip=NETWORK + ": it downloads a model"),
    # --- studies ---
    Rule(r"study\.py .*--report --from=", short=True),
    Rule(r"study\.py .*--report", skip="needs the study of the command before it, which takes hours"),
    Rule(r"^python launch/study\.py .*--arms=frozen,robust --jobs=2$", page="README.md", append=STUDY),
    Rule(r"study\.py .*--arms=frozen,robust --jobs=2$", skip="is the README's study"),
    Rule(r"study\.py", skip=HOURS),
    # --- what needs an accelerator ---
    Rule(r"configs/(qwen|llama|gsm8k_0p5b|verifyrm_1p5b)|^\$B |runs/qwen_1p5b_lora", skip=ACCELERATOR),
    Rule(
        r"annotate\.py .*(HOST|url=\.\.\.)",
        skip="needs two servers of language models: tests/test_annotation.py starts them",
    ),
    # --- the miniature ---
    Rule(r"train\.py --config=tiny --help", short=True),
    Rule(r"train\.py --config=configs/tiny\.py$", page="README.md", append=TINY, short=True),
    Rule(r"local_hosts\.py", append=f"{TINY} --config.run_dir=runs/hosts"),
    Rule(r"train\.py .*log\.to=tensorboard,wandb,trackio,mlflow", append=TINY),
    Rule(r"train\.py .*start_from=runs/tiny", append=TINY, needs=("run",)),
    Rule(r"train\.py .*configs/tiny\.py", append=TINY),
    Rule(
        r"train\.py --config=examples/countdown\.py",
        append="--config.steps=1 --config.supervised.policy_steps=4 --config.supervised.reward_steps=4 "
        "--config.eval.every=0 --config.data.prompts_per_step=2 --config.rollout.group_size=2",
    ),
    Rule(r"compare_rollouts\.py", append="--config.data.prompts_per_step=2 --config.rollout.group_size=4"),
    Rule(r"bench\.py rollout --config=configs/tiny\.py", append=BENCH, short=True),
    Rule(r"report\.py runs/tiny", needs=("run",), short=True),
    Rule(r"^cooper-jax report runs/tiny", needs=("run",)),
    Rule(r"^cooper-jax --help", short=True),
    Rule(
        r"report\.py runs/rule runs/frozen runs/robust",
        replace=((r"^", "for run in rule frozen robust; do cp -r runs/tiny runs/$run; done; "),),
        needs=("run",),
    ),
    Rule(
        r"report\.py runs/(dynamics|study)",
        skip="needs a study, a training and an evaluation: tests/test_report.py",
    ),
    Rule(r"export\.py --run_dir=runs/tiny", needs=("run",)),
    Rule(
        r"evaluate\.py --run_dir=runs/tiny",
        append="--config.benchmark.problems=4 --config.benchmark.samples=1 --config.benchmark.chunk=4",
        needs=("run",),
    ),
    # --- real weights, in small: models of 8 layers x 16 stand for SmolLM2 ---
    Rule(
        r"train\.py --config=configs/smollm2_135m\.py .*exact",
        append=f"{POLICY} --config.data.prompts_per_step=2 --config.rollout.group_size=2 --config.steps=1 "
        "--config.data.max_prompt_tokens=256",
        needs=("models", "data"),
    ),
    Rule(
        r"train\.py --config=configs/smollm2_135m\.py",
        append=f"{POLICY} {SCORER} --config.assistant.weights=models/policy --config.steps=1 "
        "--config.data.prompts_per_step=2 --config.rollout.group_size=2 --config.supervised.reward_steps=2 "
        "--config.data.max_prompt_tokens=256",
        needs=("models", "data"),
    ),
    Rule(r"bench\.py train --config=configs/smollm2_135m\.py", append=f"{POLICY} {BENCH}", needs=("models",)),
    Rule(
        r"annotate\.py --config=configs/smollm2_135m\.py",
        append="--config.source.weights=models/policy --config.judge.weights=models/policy "
        "--config.annotate.problems=2 --config.source.max_new_tokens=8 --config.judge.max_new_tokens=8",
        needs=("models", "data"),
    ),
    Rule(
        r"evaluate\.py --config=configs/smollm2_135m\.py --benchmark=FOLDER",
        replace=((r"FOLDER", "benchmarks"),),
        append=f"{POLICY} {SMALL_BENCHMARK}",
        needs=("models", "data"),
    ),
    Rule(
        r"evaluate\.py --config=configs/smollm2_135m\.py",
        append=f"{POLICY} {SMALL_BENCHMARK}",
        needs=("models", "data"),
    ),
    Rule(
        r"measure_giveaways\.py false_alarms",
        needs=("data",),
    ),
    Rule(
        r"measure_giveaways\.py rewrites .*assistant\.kind=corrupt",
        append="--positives=4 --config.policy.weights=models/policy",
        needs=("models", "data"),
    ),
    Rule(r"measure_giveaways\.py rewrites", skip="takes hours, and needs SmolLM2's rewrites"),
    Rule(r"^awk ", needs=("data",), short=True),
    Rule(r"train_rm\.py", append=TRAIN_RM, needs=("models", "data")),
    Rule(
        r"evaluate\.py .*BEFORE --compare=AFTER",
        replace=((r"BEFORE", "models/scorer"), (r"AFTER", "runs/verifyrm_attacked/best")),
        append="--config.benchmark.problems=2",
        needs=("models", "data"),
    ),
    Rule(
        r"evaluate\.py --run_dir=runs/cooper",
        replace=((r"runs/cooper", "runs/tiny"), (r"--compare=180", "--compare=1")),
        append="--config.benchmark.problems=2",
        needs=("run", "data"),
    ),
    Rule(
        r"evaluate\.py .*--attacks=",
        append="--config.benchmark.problems=2",
        needs=("models", "data"),
    ),
    Rule(r"evaluate\.py", append=SCORER, needs=("models", "data")),
    Rule(r"^python - <<'EOF'\nimport json\nused", needs=("data",)),
    Rule(r"^python -c \"import jax", short=True),
    # --- Python programs ---
    Rule(r"Scores answers with a trained", run="python {file} models/scorer", needs=("models",)),
    Rule(r"Samples answers to a question", run="python {file} models/policy", needs=("models",)),
    Rule(
        r"Trains a tiny policy and its reward model",
        run="python {file}",
        replace=((r'"steps": 8', '"steps": 1'), (r'_steps": 300', '_steps": 4')),
    ),
    Rule(
        r"^def write\(run, step, metrics\)",
        run=f"python launch/train.py --config=configs/tiny.py {TINY} --config.run_dir=runs/write "
        "--config.log.to={file}:write && test -s runs/write/accuracy.csv",
    ),
    Rule(
        r"^class Notebook:",
        run=f"python launch/train.py --config=configs/tiny.py {TINY} --config.run_dir=runs/notes "
        "--config.log.to={file}:Notebook && test -s runs/notes/notes.txt",
    ),
    Rule(r"^(def format_reward|class Rewriter|def judge\(reference)", skip=EXCERPT, run="-"),
    Rule(r"^def judge\(question, reference, completion, \*\*columns\)", skip="is a signature", run="-"),
    Rule(
        r"peft\.PeftModel",
        skip=NETWORK + " and the adapter of a run on an accelerator; tests/test_lora.py",
        run="-",
    ),
    Rule(
        r"openai\.OpenAI",
        run=f"{SERVE_RUN} python {{file}}",
        replace=(
            (r"^client", "import openai\nclient"),
            (r":8000", ":18473"),
            (r"\Z", "assert len(reply.choices) == 4 and reply.choices[0].logprobs\n"),
        ),
        needs=("run",),
    ),
    Rule(r"GRPOTrainer\(", skip="is an excerpt: tests/test_serving_clients.py runs TRL with it", run="-"),
)
