"""The launchers, run by bash against stand-ins for gcloud, git, sbatch, srun, scontrol and kubectl.

A stand-in notes its words, one JSON line a call, and does what a scenario says.  That of `gcloud` keeps a directory
for each host and runs there what is sent over ssh, so that the hosts' side of launch/tpu_pod.sh runs as well.
"""

import base64
import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted((ROOT / "launch").glob("*.sh"))
SECRETS = {"HF_TOKEN": "hf_s3cret value's", "OPENAI_API_KEY": "sk-0ther$HOME"}
# What shells, YAML and Kubernetes could each take for their own.
TRAIN = [
    "python",
    "launch/train.py",
    "--config=configs/qwen_1p5b.py",
    "--config.run_dir=gs://bucket/a run",
    "--config.data.instruction=a b 'c' \"d\" $HOME $(id) `id` \\n \\boxed{} & ; * é @NAME@ ${HOST}",
    "--config.name=",
]

NOTE = """#!{python} -SE
import json, os, shutil, subprocess, sys, time
from pathlib import Path
words = sys.argv[1:]
here = Path({here!r})
tool = Path(sys.argv[0]).name
scenario = json.loads((here / "scenario.json").read_text())
def note(**more):
    with open(here / "calls.jsonl", "a") as file:
        file.write(json.dumps(dict(tool=tool, argv=words, **more)) + "\\n")
"""

GCLOUD = """
note()
verb = " ".join(w for w in words if w in ("describe", "create", "start", "ssh", "scp", "rsync", "delete"))
hosts = [here / f"host{i}" for i in range(2)]
option = {k: v for k, _, v in (w.partition("=") for w in words if w.startswith("--"))}
chosen = hosts if option.get("--worker") == "all" else [hosts[int(option.get("--worker") or 0)]]
failing = scenario.get("fail", {})
if verb in failing and failing[verb][0] in option.get("--command", "") + " ".join(words):
    print("gcloud says no", file=sys.stderr)
    sys.exit(failing[verb][1])
def environment(host):
    return {"HOME": str(host), "PATH": f"{here}/host_bin:{here}/system"}
def wipe():
    for host in hosts:
        shutil.rmtree(host, ignore_errors=True)
        host.mkdir()
if verb == "describe":
    left = here / "states"
    states = json.loads(left.read_text()) if left.exists() else scenario["states"]
    left.write_text(json.dumps(states[1:] or states))
    if states[0] in ("absent", "denied"):
        sys.exit({"absent": "ERROR: NOT_FOUND: no such thing", "denied": "PERMISSION_DENIED"}[states[0]])
    print(states[0])
elif verb in ("create", "delete"):
    wipe()
elif verb == "scp":
    source, target = [w for w in words[words.index("scp") + 1 :] if not w.startswith("--")]
    if ":" in source:
        shutil.copytree(hosts[0] / source.split(":")[1], Path(target) / Path(source).name)
    else:
        note(mode=oct(os.stat(source).st_mode & 0o777))
        for host in chosen:
            shutil.copy(source, host / target.split(":")[1])
elif verb == "ssh":
    worst = 0
    for host in chosen:
        sent = ["bash", "-c", option["--command"]]
        ran = subprocess.run(sent, cwd=host, env=environment(host), stdout=subprocess.PIPE)
        text = ran.stdout
        if " follow " in option["--command"] and not (here / "broke").exists() and "break" in scenario:
            (here / "broke").touch()
            text, ran.returncode = text[: scenario["break"]], 255
        sys.stdout.buffer.write(text)
        worst = max(worst, ran.returncode)
    sys.stdout.flush()
    sys.exit(worst)
"""

# On a host: `uv` makes an environment whose python is this: it notes what reached it and ends as the scenario says.
UV = """
if words[0] == "venv":
    (Path(words[-1]) / "bin").mkdir(parents=True)
    shutil.copy(here / "host_bin" / "program", Path(words[-1]) / "bin" / "python")
elif not Path("requirements-tpu.txt").is_file():
    sys.exit("no requirements here")
"""
PROGRAM = """
import signal
host = Path.home()
count = here / f"attempt_{host.name}"
attempt = int(count.read_text()) if count.exists() else 0
count.write_text(str(attempt + 1))
note(host=host.name, cwd=os.getcwd(), env={k: os.environ.get(k) for k in ("HF_TOKEN", "OPENAI_API_KEY", "EXTRA")})
print("attempt", attempt, "first line", flush=True)
if scenario.get("runs_until_signalled"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / f"up_{host.name}").touch()
    time.sleep(120)
print("last line", flush=True)
(Path("runs/out")).mkdir(parents=True, exist_ok=True)
(Path("runs/out/metrics.jsonl")).write_text("{}")
codes = scenario.get("codes", [[0, 0]])
sys.exit(codes[min(attempt, len(codes) - 1)][int(host.name[-1])])
"""


SYSTEM = """base64 bash cat chmod cp dirname find git grep gzip hostname mkdir mv pkill rm sed setsid sh sleep tail
tar tee tr wc""".split()


class Stage:
    """A folder with stand-ins on a PATH of its own, and what was called so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        for name in ("bin", "system", "host_bin", "host0", "host1", "home"):
            (folder / name).mkdir()
        for name in SYSTEM:  # and nothing else of this machine: it may have a gcloud that works
            (folder / "system" / name).symlink_to(shutil.which(name))
        self.scenario()

    def tool(self, name: str, body: str, folder: str = "bin") -> None:
        path = self.folder / folder / name
        path.write_text(NOTE.format(python=sys.executable, here=str(self.folder)) + body)
        path.chmod(0o755)

    def scenario(self, **what) -> None:
        (self.folder / "scenario.json").write_text(json.dumps(what))

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.bin}:{self.folder / 'system'}"
        return {"HOME": str(self.folder / "home"), "PATH": path, **SECRETS, **more}

    def run(self, *words: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess:
        ran = subprocess.run(
            words,
            capture_output=True,
            text=True,
            cwd=cwd or self.folder,
            env=self.environment(**more),
            timeout=60,
        )
        self.check_secrets(ran.stdout + ran.stderr)
        return ran

    def calls(self, tool: str = "") -> list[dict]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if tool in ("", call["tool"])]

    def argv(self, *tools: str) -> list[list[str]]:
        """Each call once (a stand-in notes a second line where it has more to say)."""
        return [[c["tool"], *c["argv"]] for c in self.calls() if c["tool"] in tools and "mode" not in c]

    def check_secrets(self, output: str) -> None:
        argv = json.dumps([c["argv"] for c in self.calls()])
        for value in SECRETS.values():
            for form in (
                value,
                shlex.quote(value),
                value.split()[0],
                base64.b64encode(value.encode()).decode(),
            ):
                assert form not in output
                assert form not in argv


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def printed_commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


# --- launch/tpu_pod.sh ---------------------------------------------------------------------------------------


@pytest.fixture
def pod(stage: Stage) -> Stage:
    """A checkout of its own, a commit old, with gcloud and two hosts."""
    stage.checkout = stage.folder / "checkout"
    (stage.checkout / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "tpu_pod.sh", stage.checkout / "launch")
    (stage.checkout / "requirements-tpu.txt").write_text("jax\n")
    git = ["git", "-C", str(stage.checkout), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True, env={"PATH": "/usr/bin:/bin", "HOME": str(stage.folder)})
    stage.tool("gcloud", GCLOUD)
    stage.tool(
        "git",
        f"""
if "archive" in words: note()
sys.exit(subprocess.run([{shutil.which("git")!r}, *words]).returncode)
""",
    )
    stage.tool("uv", UV, "host_bin")
    stage.tool("program", PROGRAM, "host_bin")
    stage.tpu = lambda *words, **more: stage.run(
        "bash", str(stage.checkout / "launch" / "tpu_pod.sh"), *words, **more
    )
    stage.scenario(states=["absent", "ACTIVE"])
    return stage


SLICE = ["--name=cooper", "--zone=us-west4-a", "--project=p", "--type=v5litepod-16", "--poll=0", "--grace=60"]
QUEUED = [*SLICE, "--queued", "--spot"]


def verbs(pod: Stage) -> list[str]:
    """The calls to gcloud: their verb, and of ssh what the hosts are to do."""
    found = []
    for call in pod.argv("gcloud"):
        verb = next(w for w in call if w in ("describe", "create", "start", "ssh", "scp", "rsync", "delete"))
        sent = call[-1]
        found.append(re.findall(r"worker (\w+)", sent)[-1] if verb == "ssh" else verb)
    return found


def test_tpu_pod_runs_what_its_dry_run_prints(pod):
    dry = pod.tpu(*QUEUED, "--down", "--dry-run", "--", *TRAIN)
    assert dry.returncode == 0, dry.stderr
    assert pod.calls() == []
    assert not (pod.folder / "home" / ".local").exists()
    assert "# HF_TOKEN=*** goes into" in dry.stdout

    real = pod.tpu(*QUEUED, "--down", "--", *TRAIN)
    assert real.returncode == 0, real.stderr
    assert printed_commands(dry.stdout) == pod.argv("gcloud", "git")
    assert verbs(pod) == "describe create describe scp install scp start follow collect delete".split()
    assert "last line" in real.stdout
    assert "is billed" not in real.stderr


def test_tpu_pod_hosts_get_the_command_and_the_environment_as_given(pod):
    real = pod.tpu(*QUEUED, "--env=EXTRA", "--", *TRAIN, EXTRA="e x")
    assert real.returncode == 0, real.stderr
    programs = pod.calls("python")
    assert sorted(p["host"] for p in programs) == ["host0", "host1"]
    for program in programs:
        assert program["argv"] == TRAIN[1:]
        assert program["env"] == {**SECRETS, "EXTRA": "e x"}
        assert program["cwd"].endswith("/cooper")
    modes = [c["mode"] for c in pod.calls("gcloud") if "mode" in c]
    assert modes[1] == "0o600"
    leftovers = [p for p in pod.folder.rglob("*") if p.name in ("env", "cooper.env")]
    assert leftovers == []
    assert "cooper is billed until: launch/tpu_pod.sh down --name=cooper" in real.stderr


def test_tpu_pod_waits_in_the_queue(pod):
    pod.scenario(states=["absent", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    up = pod.tpu("up", *QUEUED)
    assert up.returncode == 0, up.stderr
    assert verbs(pod) == ["describe", "create", "describe", "describe", "describe"]
    assert up.stderr.index("WAITING_FOR_RESOURCES; waiting") < up.stderr.index("PROVISIONING; waiting")


def test_tpu_pod_uses_a_slice_that_is_there(pod):
    pod.scenario(states=["READY"])
    assert pod.tpu("up", *SLICE).returncode == 0
    assert verbs(pod) == ["describe"]


def test_tpu_pod_creates_a_preempted_slice_anew(pod):
    pod.scenario(states=["PREEMPTED", "absent", "READY"])
    assert pod.tpu("up", *SLICE, "--spot").returncode == 0
    assert verbs(pod) == ["describe", "delete", "describe", "create", "describe"]


def test_tpu_pod_does_not_create_what_it_may_not_see(pod):
    pod.scenario(states=["denied"])
    up = pod.tpu("up", *SLICE)
    assert up.returncode == 1
    assert "PERMISSION_DENIED" in up.stderr
    assert "asking for the slice's state failed with exit code 1" in up.stderr
    assert verbs(pod) == ["describe"]


def test_tpu_pod_restarts_after_preemption(pod):
    """75, and the slice is gone: deleted, created, installed and started again; then 0, and deleted."""
    pod.scenario(states=["absent", "ACTIVE", "SUSPENDED", "absent", "ACTIVE"], codes=[[75, 75], [0, 0]])
    # "alive" of a single slice asks for the TPU VM, whose states come from the same list.
    real = pod.tpu(*QUEUED, "--restart=3", "--down", "--", *TRAIN)
    assert real.returncode == 0, real.stderr
    attempt = "scp install scp start follow collect".split()
    assert verbs(pod) == [
        *["describe", "create", "describe", *attempt],
        *["describe", "delete", "describe", "create", "describe", *attempt, "delete"],
    ]
    assert "starting again (1 of 3)" in real.stderr
    assert len(pod.calls("python")) == 4


def test_tpu_pod_restarts_on_the_same_slice_where_it_lives(pod):
    pod.scenario(states=["READY"], codes=[[69, 134], [0, 0]])
    real = pod.tpu("all", *SLICE, "--restart=1", "--", *TRAIN)
    assert real.returncode == 0, real.stderr
    assert "create" not in verbs(pod) and "delete" not in verbs(pod)


@pytest.mark.parametrize(
    "codes, expected, says",
    [
        ([2, 2], 2, "a setup error"),
        ([69, 1], 1, "the run failed with exit code 1"),
        ([0, 69], 69, "a host was lost"),
        ([75, 69], 75, "stopped after saving a checkpoint"),
    ],
)
def test_tpu_pod_exit_code_is_the_worst_of_the_hosts(pod, codes, expected, says):
    pod.scenario(states=["READY"], codes=[codes])
    ran = pod.tpu("all", *SLICE, "--", *TRAIN)
    assert ran.returncode == expected, ran.stderr
    assert says in ran.stderr


def test_tpu_pod_setup_errors_are_not_restarted(pod):
    pod.scenario(states=["READY"], codes=[[69, 2], [0, 0]])
    assert pod.tpu("all", *SLICE, "--restart=5", "--", *TRAIN).returncode == 2
    assert len(pod.calls("python")) == 2


@pytest.mark.parametrize(
    "fail, step, last",
    [
        ({"create": ["", 5]}, "creating the slice failed with exit code 5", "create"),
        ({"scp": ["source.tar.gz", 6]}, "copying the checkout failed with exit code 6", "scp"),
        ({"ssh": ["worker install", 7]}, "installing the requirements failed with exit code 7", "install"),
        ({"scp": ["/env", 8]}, "sending the environment failed with exit code 8", "scp"),
        ({"ssh": ["worker start", 9]}, "starting the run failed with exit code 9", "start"),
        (
            {"ssh": ["worker collect", 10]},
            "collecting the hosts' exit codes failed with exit code 10",
            "collect",
        ),
    ],
)
def test_tpu_pod_stops_at_a_step_that_fails(pod, fail, step, last):
    pod.scenario(states=["absent", "READY"], fail=fail)
    ran = pod.tpu(*SLICE, "--restart=2", "--", *TRAIN)
    assert ran.returncode == 1
    assert step in ran.stderr
    assert "is billed until" in ran.stderr
    assert [v for v in verbs(pod) if v != "describe"][-1] == last
    assert not list(pod.folder.glob("home/.local/state/cooper/*/env"))


def test_tpu_pod_connects_again_to_the_log(pod):
    pod.scenario(states=["READY"], **{"break": len("attempt 0 fir")})
    ran = pod.tpu("all", *SLICE, "--", *TRAIN)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.replace("started on", "").count("attempt 0 first line\nlast line\n") == 1
    assert "worker follow 13" in json.dumps(pod.argv("gcloud"))


def test_tpu_pod_lost_slice_is_69(pod):
    pod.scenario(states=["READY", "PREEMPTED"], **{"break": 0})
    ran = pod.tpu("all", *SLICE, "--", *TRAIN)
    assert ran.returncode == 69, ran.stderr
    assert "collect" not in verbs(pod)


def test_tpu_pod_stop_ends_the_run_and_its_restarts(pod):
    pod.scenario(states=["READY"], runs_until_signalled=True)
    script = str(pod.checkout / "launch" / "tpu_pod.sh")
    run = subprocess.Popen(
        ["bash", script, "all", *SLICE, "--restart=5", "--", *TRAIN],
        env=pod.environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not all((pod.folder / f"up_host{i}").exists() for i in range(2)):
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.1)
        again = pod.tpu("run", *SLICE, "--", *TRAIN)
        assert again.returncode == 1
        assert "a run is on; stop it first" in again.stderr
        status = pod.tpu("status", "--name=cooper")
        assert status.stdout.count(": running") == 2
        stop = pod.tpu("stop", "--name=cooper")
        assert stop.returncode == 0
        assert "stopped after saving a checkpoint" in stop.stderr
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 75, errors
    assert "starting again" not in errors
    assert len(pod.calls("python")) == 2
    assert pod.tpu("status", "--name=cooper").stdout.count("ended with exit code 75") == 2


def test_tpu_pod_logs_without_a_run(pod):
    pod.scenario(states=["READY"])
    ran = pod.tpu("logs", *SLICE)
    assert ran.returncode == 1
    assert "there is no run on cooper" in ran.stderr


def test_tpu_pod_logs_shows_a_run_again(pod):
    pod.scenario(states=["READY"], codes=[[0, 3]])
    assert pod.tpu("all", *SLICE, "--", *TRAIN).returncode == 3
    ran = pod.tpu("logs", "--name=cooper", "--worker=1")
    assert ran.returncode == 3
    assert "attempt 0 first line\nlast line\n" in ran.stdout


def test_tpu_pod_remembers_what_up_was_told(pod):
    assert pod.tpu("up", *QUEUED, "--ssh-arg=--internal-ip").returncode == 0
    assert pod.tpu("down", "--name=cooper").returncode == 0
    where = ["--project=p", "--zone=us-west4-a", "--quiet"]
    assert pod.argv("gcloud")[-1] == "gcloud compute tpus queued-resources delete cooper".split() + where + [
        "--force"
    ]
    gone = pod.tpu("down", "--name=cooper")
    assert gone.returncode == 2
    assert "--zone=ZONE is needed" in gone.stderr


def test_tpu_pod_fetches_from_the_bucket_or_the_host(pod):
    pod.scenario(states=["READY"])
    assert pod.tpu("all", *SLICE, "--", "python", "x", "--config.run_dir=runs/out").returncode == 0
    there = pod.folder / "there"
    assert pod.tpu("fetch", "--name=cooper", f"--to={there}").returncode == 0
    assert (there / "out" / "metrics.jsonl").read_text() == "{}"
    assert pod.tpu("fetch", "--name=cooper", "--from=gs://b/run", f"--to={there}").returncode == 0
    assert pod.argv("gcloud")[-1] == ["gcloud", "storage", "rsync", "--recursive", "gs://b/run", str(there)]


def test_tpu_pod_keeps_runs_when_the_code_is_copied_again(pod):
    pod.scenario(states=["READY"])
    words = ["--", "python", "x", "--config.run_dir=runs/out"]
    assert pod.tpu("all", *SLICE, *words).returncode == 0
    (pod.folder / "host0" / "cooper" / "stale.py").touch()
    assert pod.tpu("run", "--name=cooper", "--poll=0", *words).returncode == 0
    assert not (pod.folder / "host0" / "cooper" / "stale.py").exists()
    assert (pod.folder / "host0" / "cooper" / "runs" / "out").is_dir()


def test_tpu_pod_joins_slices(pod):
    dry = pod.tpu(*QUEUED, "--slices=3", "--dry-run", "--", *TRAIN)
    create = next(c for c in printed_commands(dry.stdout) if "create" in c)
    assert {"--node-count=3", "--node-prefix=cooper"} <= set(create)
    start = next(c for c in printed_commands(dry.stdout) if " start " in c[-1])
    assert start[3] == "queued-resources" and {"--node=all", "--worker=all"} <= set(start)


# --- launch/slurm.sh -----------------------------------------------------------------------------------------

SRUN = """
note()
import re, signal
start = next(i for i, w in enumerate(words) if not w.startswith("--"))
tasks = []
for index in range(len(scenario["codes"])):
    variables = {**os.environ, "SLURM_PROCID": str(index)}
    tasks.append(subprocess.Popen(words[start:], env=variables, start_new_session=True))
if scenario.get("runs_until_signalled"):
    while not all((here / f"up_{i}").exists() for i in range(len(tasks))): time.sleep(0.05)
    for task in tasks: os.killpg(task.pid, signal.SIGTERM)  # every process of every task, as SLURM does
codes = [task.wait() for task in tasks]
sys.exit(max(c if c >= 0 else 128 - c for c in codes))
"""
TASK = """
import signal
note(cwd=os.getcwd(), env={k: os.environ.get(k) for k in ("HF_TOKEN", "OPENAI_API_KEY")})
index = int(os.environ["SLURM_PROCID"])
code = scenario["codes"][index]
if scenario.get("runs_until_signalled"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    (here / f"up_{index}").touch()
    time.sleep(120)
sys.exit(code)
"""


@pytest.fixture
def slurm(stage: Stage) -> Stage:
    stage.tool(
        "sbatch",
        """
note(stdin=sys.stdin.read())
sys.exit(scenario.get("sbatch", 0))
""",
    )
    stage.tool("srun", SRUN)
    stage.tool("scontrol", "note()")
    venv = stage.folder / "venv" / "bin"
    venv.mkdir(parents=True)
    stage.tool("python", TASK, "venv/bin")
    options = [f"--venv={venv.parent}", f"--logs={stage.folder / 'logs'}"]
    stage.slurm = lambda *words: stage.run("bash", str(ROOT / "launch" / "slurm.sh"), *options, *words)
    return stage


def submitted(slurm: Stage, *words: str) -> dict:
    ran = slurm.slurm(*words, "--", *TRAIN)
    assert ran.returncode == 0, ran.stderr
    return slurm.calls("sbatch")[-1]


def test_slurm_submits_what_its_dry_run_prints(slurm):
    words = [
        "--nodes=2",
        "--gpus=4",
        "--time=1:00:00",
        "--partition=gpu",
        "--cpus=8",
        "--sbatch-arg=--account=a b",
    ]
    dry = slurm.slurm(*words, "--dry-run", "--", *TRAIN)
    assert dry.returncode == 0, dry.stderr
    assert slurm.calls() == []
    by_hand = slurm.run("bash", "-c", dry.stdout)
    assert by_hand.returncode == 0, by_hand.stderr
    real = submitted(slurm, *words)
    assert slurm.calls("sbatch")[0] == real
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--gres=gpu:4"} <= set(real["argv"])
    assert {"--signal=TERM@300", "--requeue", "--export=ALL", "--account=a b"} <= set(real["argv"])


@pytest.mark.parametrize(
    "codes, restarts, expected, requeued",
    [
        ([0, 0], 0, 0, False),
        ([75, 75], 0, 75, True),
        ([69, 75], 0, 75, True),
        ([134, 69], 3, 134, True),
        ([75, 75], 20, 75, False),  # as often as --restarts allows
        ([2, 69], 0, 2, False),
        ([69, 1], 0, 1, False),
    ],
)
def test_slurm_requeues_what_can_go_on(slurm, codes, restarts, expected, requeued):
    slurm.scenario(codes=codes)
    script = submitted(slurm, "--gpus=2")["stdin"]
    job = slurm.run("bash", "-c", script, SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(restarts))
    assert job.returncode == expected, job.stdout + job.stderr
    assert slurm.argv("scontrol") == ([["scontrol", "requeue", "17"]] if requeued else [])
    tasks = slurm.calls("python")
    assert len(tasks) == 2
    for task in tasks:
        assert task["argv"] == TRAIN[1:]
        assert task["cwd"] == str(ROOT)
        assert task["env"] == SECRETS
    assert list((slurm.folder / "logs").iterdir()) == []


def test_slurm_does_not_requeue_where_nothing_ran(slurm):
    slurm.scenario(codes=[])
    slurm.tool("srun", "sys.exit(1)")
    job = slurm.run("bash", "-c", submitted(slurm)["stdin"], SLURM_JOB_ID="17")
    assert job.returncode == 1
    assert slurm.argv("scontrol") == []


def test_slurm_tasks_outlive_the_warning(slurm):
    slurm.scenario(codes=[75, 75], runs_until_signalled=True)
    job = slurm.run("bash", "-c", submitted(slurm)["stdin"], SLURM_JOB_ID="17")
    assert job.returncode == 75, job.stdout + job.stderr
    assert slurm.argv("scontrol") == [["scontrol", "requeue", "17"]]


def test_slurm_says_when_submitting_fails(slurm):
    slurm.scenario(sbatch=4)
    ran = slurm.slurm("--", *TRAIN)
    assert ran.returncode == 1
    assert "submitting the job failed with exit code 4" in ran.stderr


# --- launch/gke.sh -------------------------------------------------------------------------------------------


@pytest.fixture
def gke(stage: Stage) -> Stage:
    stage.tool(
        "kubectl",
        """
note(stdin="" if words[-1] != "-" else sys.stdin.read())
sys.exit(scenario.get(words[0], 0))
""",
    )
    stage.gke = lambda *words, **more: stage.run("bash", str(ROOT / "launch" / "gke.sh"), *words, **more)
    return stage


TPU_NODES = [
    "--name=cooper",
    "--image=region-docker.pkg.dev/p/r/cooper:1",
    "--machine=ct5lp-hightpu-4t",
    "--topology=4x4",
]
GPU_NODES = ["--name=cooper", "--image=cooper", "--gpu=nvidia-h100-80gb", "--gpus=8", "--nodes=2"]


def job_of(manifest: str) -> tuple[dict, dict, dict]:
    """The JobSet, its only job's spec, its only container."""
    jobset = yaml.safe_load(manifest)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return jobset, job, container


@pytest.mark.parametrize("nodes", [TPU_NODES, GPU_NODES], ids=["tpu", "gpu"])
def test_gke_applies_what_its_dry_run_prints(gke, nodes):
    dry = gke.gke(*nodes, "--spot", "--context=c", "--dry-run", "--", *TRAIN)
    assert dry.returncode == 0, dry.stderr
    assert gke.calls() == []
    assert dry.stdout.count(": '***'\n") == 2
    real = gke.gke(*nodes, "--spot", "--context=c", "--", *TRAIN)
    assert real.returncode == 0, real.stderr
    secret, jobset = gke.calls("kubectl")
    by_hand = gke.run("bash", "-c", dry.stdout)  # the printed text is a script
    assert by_hand.returncode == 0
    assert gke.calls("kubectl")[3] == jobset
    assert gke.calls("kubectl")[2]["argv"] == secret["argv"]
    data = yaml.safe_load(secret["stdin"])
    assert {k: base64.b64decode(v).decode() for k, v in data["data"].items()} == SECRETS
    assert data["metadata"]["name"] == "cooper-env"


@pytest.mark.parametrize("nodes", [TPU_NODES, GPU_NODES], ids=["tpu", "gpu"])
def test_gke_command_and_restarts(gke, nodes):
    assert gke.gke(*nodes, "--restarts=7", "--grace=120", "--", *TRAIN, "two\nlines").returncode == 0
    jobset, job, container = job_of(gke.calls("kubectl")[-1]["stdin"])
    # Kubernetes reads $$ as $, and would expand $(NAME): no single $ may be left.
    assert all("$" not in word.replace("$$", "") for word in container["command"])
    assert [word.replace("$$", "$") for word in container["command"]] == [*TRAIN, "two\nlines"]
    assert container["envFrom"] == [{"secretRef": {"name": "cooper-env", "optional": True}}]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {69, 75} <= set(rule["onExitCodes"]["values"]) and 2 not in rule["onExitCodes"]["values"]
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] == 120
    assert not any("spot" in key for key in pod["nodeSelector"])


@pytest.mark.parametrize(
    "machine, topology, accelerator, hosts, chips",
    [
        ("ct5lp-hightpu-4t", "4x4", "tpu-v5-lite-podslice", 4, 4),
        ("ct5lp-hightpu-8t", "2x4", "tpu-v5-lite-podslice", 1, 8),
        ("ct6e-standard-4t", "8x8", "tpu-v6e-slice", 16, 4),
        ("ct5p-hightpu-4t", "2x2x4", "tpu-v5p-slice", 4, 4),
        ("ct4p-hightpu-4t", "2x2x2", "tpu-v4-podslice", 2, 4),
    ],
)
def test_gke_hosts_follow_from_the_topology(gke, machine, topology, accelerator, hosts, chips):
    words = [
        "--name=c",
        "--image=i",
        f"--machine={machine}",
        f"--topology={topology}",
        "--slices=2",
        "--spot",
    ]
    assert gke.gke(*words, "--", "python", "x").returncode == 0
    jobset, job, container = job_of(gke.calls("kubectl")[-1]["stdin"])
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
        "cloud.google.com/gke-spot": "true",
    }
    assert "cloud.google.com/gke-spot" in [t["key"] for t in pod["tolerations"]]


def test_gke_gpu_processes_are_told_of_each_other(gke):
    assert gke.gke(*GPU_NODES, "--", "python", "x").returncode == 0
    jobset, job, container = job_of(gke.calls("kubectl")[-1]["stdin"])
    variables = {v["name"]: v for v in container["env"]}
    # A pod's address in a JobSet: JOBSET-REPLICATEDJOB-JOB-POD.JOBSET
    group = jobset["spec"]["replicatedJobs"][0]["name"]
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == f"cooper-{group}-0-0.cooper:8476"
    assert variables["JAX_NUM_PROCESSES"]["value"] == "2"
    assert "job-completion-index" in variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


@pytest.mark.parametrize(
    "verb, step",
    [("apply", "creating the secret"), ("create", "creating the JobSet")],
    ids=["secret", "jobset"],
)
def test_gke_stops_at_a_step_that_fails(gke, verb, step):
    gke.scenario(**{verb: 3})
    ran = gke.gke(*TPU_NODES, "--", *TRAIN)
    assert ran.returncode == 1
    assert f"gke: {step} failed with exit code 3" in ran.stderr
    assert gke.argv("kubectl")[-1][1] == verb


def test_gke_down_deletes_both(gke):
    dry = gke.gke("down", "--name=cooper", "--dry-run")
    assert gke.gke("down", "--name=cooper").returncode == 0
    assert printed_commands(dry.stdout) == gke.argv("kubectl")
    assert [call[2:4] for call in gke.argv("kubectl")] == [["jobset", "cooper"], ["secret", "cooper-env"]]


# --- all of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["tpu_pod.sh"], "no subcommand and no option"),
        (["tpu_pod.sh", "fly"], "fly: not a subcommand"),
        (["tpu_pod.sh", "--zone=z"], "--name=NAME is needed"),
        (["tpu_pod.sh", "--name=A b", "--zone=z"], "--name=NAME is needed"),
        (["tpu_pod.sh", "--name=c", "--type=v5litepod-16", "--", "x"], "--zone=ZONE is needed"),
        (["tpu_pod.sh", "--name=c", "--zone=z", "--", "x"], "--type=TYPE is needed"),
        (["tpu_pod.sh", *SLICE], "the command is missing"),
        (["tpu_pod.sh", "up", *SLICE, "--", "x"], "up takes no command"),
        (["tpu_pod.sh", *SLICE, "--hosts=4", "--", "x"], "unknown option --hosts"),
        (["tpu_pod.sh", *SLICE, "--restart=many", "--", "x"], "--restart takes a whole number, not 'many'"),
        (["tpu_pod.sh", *SLICE, "--slices=2", "--", "x"], "--slices needs --queued"),
        (
            ["tpu_pod.sh", *SLICE, "--env=HF_TOKEN=x", "--", "x"],
            "--env takes a variable's name, and no value",
        ),
        (
            ["tpu_pod.sh", *SLICE, "--down", "--", "x", "--config.run_dir=runs/x"],
            "--down deletes the hosts' disks",
        ),
        (["tpu_pod.sh", *SLICE, "--", "x"], "gcloud is not on PATH"),
        (["tpu_pod.sh", "fetch", "--name=c", "--zone=z", "--dry-run"], "--from is needed"),
        (["slurm.sh"], "the command is missing"),
        (["slurm.sh", "--nodes=0", "--", "x"], "--nodes takes a whole number"),
        (["slurm.sh", "--node=2", "--", "x"], "unknown option --node"),
        (["slurm.sh", "--venv=/nowhere", "--", "x"], "holds no bin/python"),
        (["slurm.sh", "--", "x"], "sbatch is not on PATH"),
        (["gke.sh"], "no subcommand and no option"),
        (["gke.sh", "--image=i", "--", "x"], "--name=NAME is needed"),
        (["gke.sh", "--name=c", "--image=i", "--", "x"], "--machine=TYPE with --topology=AxB"),
        (
            ["gke.sh", *TPU_NODES[:3], "--topology=4", "--dry-run", "--", "x"],
            "--topology=AxB or AxBxC is needed",
        ),
        (["gke.sh", *TPU_NODES[:3], "--topology=1x3", "--dry-run", "--", "x"], "has 3 chips"),
        (["gke.sh", *TPU_NODES, "--gpu=g", "--", "x"], "exclude each other"),
        (
            ["gke.sh", *TPU_NODES[:2], "--machine=n1-4t", "--topology=2x2", "--dry-run", "--", "x"],
            "not a TPU machine",
        ),
        (["gke.sh", "--name=c", "--image=a b", "--", "x"], "holds characters that no such name has"),
        (["gke.sh", "down", "--name=c", "--", "x"], "down takes no command"),
        (["gke.sh", *TPU_NODES, "--", "x"], "kubectl is not on PATH"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_options_give_one_line(stage, words, says):
    ran = stage.run("bash", str(ROOT / "launch" / words[0]), *words[1:])
    assert ran.returncode == 2
    assert says in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda p: p.name)
def test_help_lists_every_option(stage, script):
    ran = stage.run("bash", str(script), "--help")
    assert ran.returncode == 0
    options = set(re.findall(r"^    (?:\| )?(--[a-z-]+)=?\*?\)", script.read_text(), flags=re.MULTILINE))
    assert len(options) > 8
    assert [o for o in options if o not in ran.stdout] == []


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda p: p.name)
def test_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    ran = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_commands_of_the_documentation_are_understood(stage):
    """Every launcher's command in docs/clusters.md, as a dry run."""
    text = (ROOT / "docs" / "clusters.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    commands = [
        shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith("launch/")
    ]
    assert {Path(c[0]).name for c in commands} == {script.name for script in LAUNCHERS}
    for command in commands:
        at = command.index("--") if "--" in command else len(command)
        command[at:at] = ["--dry-run"]
        if Path(command[0]).name == "tpu_pod.sh":
            command[at:at] = ["--zone=us-west4-a"]  # which `up` would have remembered
        ran = stage.run("bash", *command, cwd=ROOT)
        assert ran.returncode == 0, (command, ran.stderr)


def test_containerfile_copies_what_is_there():
    lines = (ROOT / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    of = lambda name: [rest for step, rest in steps if step == name]  # noqa: E731
    assert {step for step, _ in steps} <= {
        "FROM",
        "ARG",
        "ENV",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "ENTRYPOINT",
        "CMD",
    }
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    copied = [source for rest in of("COPY") for source in rest.split()[:-1]]
    assert {"launch", "cooper_jax", "kernels", "configs", "requirements.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        kept = True
        for pattern in ignored:  # the last that matches decides
            if fnmatch.fnmatch(source, pattern.lstrip("!")):
                kept = pattern.startswith("!")
        assert kept, f"{source} is left out by .dockerignore"
    assert of("ARG") == ["ACCELERATOR=tpu", "RUN_AS=cooper"]
    (pip,) = [rest for rest in of("RUN") if "pip install" in rest]
    assert "--no-cache-dir" in pip and "requirements-${ACCELERATOR}.txt" in pip
    for accelerator in ("tpu", "cuda"):
        assert f"requirements-{accelerator}.txt" in copied
    assert of("USER") == ["${RUN_AS}"]
    assert "PYTHONUNBUFFERED=1" in of("ENV")[0]
    assert json.loads(of("ENTRYPOINT")[0]) == ["python"]
    script, *rest = json.loads(of("CMD")[0])
    assert (ROOT / script).is_file() and rest == ["--help"]
