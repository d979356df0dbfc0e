"""The documentation as a site: its pages and links, the API reference, the workflows, and the check of links."""

import http.server
import importlib.util
import inspect
import re
import threading
import time
from pathlib import Path

import check_links
import pytest
import yaml

import cooper_jax

ROOT = Path(__file__).resolve().parents[1]


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [page for entry in site["nav"] for value in entry.values() for page in list_pages(value)]
    hooks = load_hooks()
    assert sorted(pages) == sorted(
        [file.name for file in (ROOT / "docs").glob("*.md")] + list(hooks.ADDED.values())
    )


def list_pages(value) -> list[str]:
    """The pages of an entry of the navigation."""
    if isinstance(value, str):
        return [value]
    return [page for entry in value for inner in entry.values() for page in list_pages(inner)]


def load_hooks():
    """The module docs/site/hooks.py."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/site/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "source, text, expected",
    [
        ("docs/x.md", "[a](data.md#sources)", "[a](data.md#sources)"),
        ("docs/x.md", "[lora.md](lora.md#x)", "[LoRA](lora.md#x)"),
        ("docs/x.md", "[a](../kernels/README.md#use)", "[a](kernels.md#use)"),
        ("docs/x.md", "[a](../README.md#quick-start)", "[a](quick_start.md)"),
        ("docs/x.md", "see [the file](../launch/gke/tpu.yaml).", "see the file."),
        ("docs/x.md", "[../LICENSE](../LICENSE)", "../LICENSE"),
        ("docs/x.md", "[`launch/gke.sh`](../launch/gke.sh)", "`launch/gke.sh`"),
        ("docs/x.md", "`[a](../LICENSE)` and [b](https://a.b/c)", "`[a](../LICENSE)` and [b](https://a.b/c)"),
        ("docs/x.md", "```\n[a](../LICENSE)\n```", "```\n[a](../LICENSE)\n```"),
        ("CONTRIBUTING.md", "[a](docs/data.md) ![b](docs/report.png)", "[a](data.md) ![b](report.png)"),
        ("kernels/README.md", "[a](../docs/first_run.md#x)", "[a](first_run.md#x)"),
    ],
)
def test_links_are_rewritten_for_the_site(source, text, expected):
    assert load_hooks().rewrite_links(text, source) == expected


def test_links_that_lead_nowhere_are_warnings(caplog):
    hooks = load_hooks()
    hooks.rewrite_links("[a](../nothing.md) [b](../README.md#no-such-page)", "docs/x.md")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert hooks.LOG.name.startswith("mkdocs."), "mkdocs counts its own loggers' warnings"
    assert "| TPU |" in hooks.read_section("Status")


def test_the_api_reference_has_every_public_name():
    page = (ROOT / "docs/api.md").read_text()
    assert sorted(re.findall(r"^::: cooper_jax\.(\w+)$", page, re.M)) == sorted(cooper_jax.__all__)
    for name in cooper_jax.__all__:
        assert inspect.getdoc(getattr(cooper_jax, name)), name


def test_workflows_run_the_parts_of_ci():
    parts = set(re.findall(r"wants ([a-z ]+?)(?:;| &&)", (ROOT / ".ci/run").read_text()))
    parts = {name for names in parts for name in names.split()}
    ran = set()
    for file in sorted((ROOT / ".github/workflows").glob("*.yml")):
        workflow = yaml.safe_load(file.read_text())
        # YAML 1.1 reads the key `on` as True.
        assert {"name", "jobs", True} <= set(workflow), file
        for job in workflow["jobs"].values():
            assert {"runs-on", "steps", "timeout-minutes"} <= set(job), file
            commands = [step["run"] for step in job["steps"] if ".ci/run" in step.get("run", "")]
            chosen = job.get("strategy", {}).get("matrix", {}).get("part", [])
            for command in commands:
                words = command.replace("${{ matrix.part }}", " ".join(chosen)).split()
                assert words[0] == ".ci/run"
                ran |= set(words[1:])
    assert ran == parts


# Why `.ci/run` runs none of a file's slow tests.
COMPILED = "needs an environment of its own and compiles many programs: the part `compile` runs the others"
FURTHER = "cases of some seconds each, beside default tests of the same subject"
NOT_IN_CI = {
    "test_api.py": FURTHER,
    "test_dynamic_sampling.py": FURTHER,
    "test_examples.py": FURTHER,
    "test_families.py": FURTHER,
    "test_filtered_training.py": FURTHER,
    "test_grpo.py": FURTHER,
    "test_judge.py": FURTHER,
    "test_recipes.py": FURTHER,
    "test_report.py": FURTHER,
    "test_reward_stages.py": FURTHER,
    "test_rollout.py": FURTHER,
    "test_row_packing.py": FURTHER,
    "test_row_sampling.py": FURTHER,
    "test_runs.py": FURTHER,
    "test_speed_calibration.py": FURTHER,
    "test_study_report.py": FURTHER,
    "test_tokenizer.py": FURTHER,
    "test_train_refusals.py": FURTHER,
    "test_user_judge.py": FURTHER,
    "test_verification.py": FURTHER,
    "test_weights.py": FURTHER,
    "test_api_examples.py": "a whole run from Python; the same loop is run by test_train.py",
    "test_bench.py": "measurements of two more kinds; a default test runs the command for one",
    "test_bounds.py": "bad values of all fields as a job reads them; a default test asks the table alone",
    "test_damaged_files.py": "configs of all families, three tokenizers; default tests have fewer files",
    "test_evaluation.py": "long forms: two hosts, killed processes, a whole run; default tests have one process",
    "test_few_shapes.py": "five settings of a whole step, each compiled anew; it has no short form",
    "test_notebook.py": "the whole notebook, more than five minutes; default tests check its cells and settings",
    "test_references.py": "further rows' references; a default test takes those of one shift",
    "test_rollout_kernels.py": "long forms: interpreted kernels of whole rollouts; default tests have fewer",
    "compile/test_compiled_attention.py": COMPILED,
    "compile/test_compiled_budgets.py": COMPILED,
    "compile/test_compiled_collectives.py": COMPILED,
    "compile/test_compiled_decode_attention.py": COMPILED,
    "compile/test_compiled_head.py": COMPILED,
    "compile/test_compiled_programs.py": COMPILED,
    "compile/test_compiled_sampling.py": COMPILED,
}


def test_slow_tests_run_in_ci_or_have_a_reason():
    """Each file with slow tests is named in the part `slow` of .ci/run, whole or by some of its tests."""
    tests = ROOT / "tests"
    slow = {
        file.relative_to(tests).as_posix()
        for file in tests.rglob("test_*.py")
        if re.search(r"pytest\.mark\.slow", file.read_text(encoding="utf-8"))
    }
    named = list_slow_files((ROOT / ".ci/run").read_text())
    assert named <= slow, "these have no slow tests"
    assert sorted(slow - named) == sorted(NOT_IN_CI)


def list_slow_files(script: str) -> set[str]:
    """The test files that the part `slow` of a script runs."""
    part = re.search(r"^if wants slow; then\n(.*?)^fi$", script, re.MULTILINE | re.DOTALL)[1]
    commands = re.sub(r"^ *#.*|--deselect +(\"[^\"]*\"|\S+)", "", part, flags=re.MULTILINE)
    found = re.findall(r"tests/test_(?:\{([\w,]+)\}|(\w+))\.py", commands)
    return {f"test_{name}.py" for several, one in found for name in (several or one).split(",")}


# --- links ---------------------------------------------------------------------------------------------------


def test_dead_links_of_a_site_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="a/b.html#c">1</a><a href="a/b.html#d">2</a><a href="no.html">3</a>'
        '<a href="https://example.org">4</a><a href="#top">5</a><a href="#bottom">6</a><img src="i.png">'
        '<script src="https://example.org/s.js"></script>'
    )
    (tmp_path / "a" / "b.html").write_text('<p id="c"></p><a href="../index.html">up</a><a href="..">up</a>')
    assert check_links.check_site(tmp_path) == [
        "index.html: loads https://example.org/s.js",
        "index.html: a/b.html#d: no such anchor",
        "index.html: no.html: no such file",
        "index.html: #bottom: no such anchor",
        "index.html: i.png: no such file",
    ]


class Answers(http.server.BaseHTTPRequestHandler):
    """A server whose path is the status code of the answer; /slow answers after a second."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/slow":
            time.sleep(1)
        self.send_response(int(self.path[1:4]) if self.path != "/slow" else 200)
        if self.path == "/302":
            self.send_header("Location", "/404")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def answers(monkeypatch):
    """The address of a server, and the paths that it was asked for."""
    monkeypatch.setattr(Answers, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", Answers.asked
        finally:
            server.shutdown()
            thread.join()


def test_a_dead_link_is_told_from_a_server_that_cannot_be_reached(answers, monkeypatch):
    waits = []
    monkeypatch.setattr(check_links.time, "sleep", waits.append)
    address, asked = answers
    codes = ("200", "302", "401", "403", "404", "405", "410", "429", "503")
    outcomes = check_links.check_addresses([f"{address}/{code}" for code in codes])
    assert {outcome.url.rpartition("/")[2]: outcome.state for outcome in outcomes} == {
        "200": check_links.OK,
        "302": check_links.DEAD,  # leads to a page that is not there
        "401": check_links.OK,
        "403": check_links.OK,
        "404": check_links.DEAD,
        "405": check_links.OK,
        "410": check_links.DEAD,
        "429": check_links.OK,
        "503": check_links.UNREACHED,
    }
    assert asked.count("/404") == 2 and asked.count("/503") == 3, "only a server's own error may pass"
    assert waits == [1, 2]


def test_a_server_that_is_slow_or_gone_is_not_reached(answers, monkeypatch):
    address, asked = answers
    tried, check = [], check_links.check_address
    monkeypatch.setattr(
        check_links, "check_address", lambda url, *rest: tried.append(url) or check(url, *rest)
    )
    outcome = check(f"{address}/slow", tries=1, timeout=0.2)
    assert outcome.state == check_links.UNREACHED and "timed out" in outcome.reason
    # Port 9 of this machine: nobody listens.  The second page of such a host is not tried.
    first, second = check_links.check_host(["http://127.0.0.1:9/a", "http://127.0.0.1:9/b"], tries=1)
    assert first.state == second.state == check_links.UNREACHED and first.reason == second.reason
    assert (first.url, second.url) == ("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")
    assert tried == ["http://127.0.0.1:9/a"]
    assert check("http://[broken/").state == check_links.DEAD
    assert asked == ["/slow"]


@pytest.mark.parametrize(
    "codes, exit_code, summary",
    [
        (["200", "429"], 0, "2 external links: 2 ok, 0 dead, 0 could not be reached"),
        (["200", "503"], 2, "2 external links: 1 ok, 0 dead, 1 could not be reached"),
        (["404", "503"], 1, "2 external links: 0 ok, 1 dead, 1 could not be reached"),
    ],
)
def test_external_links_are_listed_with_their_outcomes(
    answers, monkeypatch, capsys, codes, exit_code, summary
):
    monkeypatch.setattr(check_links.time, "sleep", lambda _: None)
    links = {f"{answers[0]}/{code}": ["README.md", "docs/data.md"] for code in codes}
    monkeypatch.setattr(check_links, "find_external_links", lambda: links)
    assert check_links.check_external_links() == exit_code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == summary and len(lines) == 3
    assert all(line.endswith("  in README.md, docs/data.md") for line in lines[:-1])


def test_external_links_of_the_documentation_are_collected():
    links = check_links.find_external_links()
    assert "README.md" in links["https://arxiv.org/abs/2508.05613"]
    assert len(links) > 20 and not [url for url in links if "HOST" in url or url.endswith((".", ","))]
