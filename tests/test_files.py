"""What lies elsewhere: fetched whole, uploaded whole, and a run that lives there goes on from there.

The store is one of objects, as gs:// is: nothing is appended to, directories are what names have in common, and
cannot be renamed; an object appears when it is whole.
"""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem
from orbax.checkpoint._src.path import gcs_utils
from tiny_models import config as model_config
from tiny_models import one_device, random_params

from cooper_jax.configs import base
from cooper_jax.data import labelled_completions, problems
from cooper_jax.model import tokenizer, weight_export, weights
from cooper_jax.runtime import checkpoint, remote_files
from cooper_jax.runtime import metrics as m
from cooper_jax.runtime.checkpoint import Checkpoints, abstract_like, list_steps
from cooper_jax.runtime.run_directory import RunDirectory, check_shared, run_path


class Bucket(AbstractFileSystem):
    """Objects, kept in a local folder.  `done` lists what was asked of it; `fails` holds names that break."""

    protocol = ("gs", "gcs")
    cachable = False
    root: Path
    done: list[tuple[str, str]]
    fails: dict[str, Exception]
    slow: threading.Event | None  # an upload waits for it

    @classmethod
    def disk(cls, path: str) -> Path:
        return cls.root / cls._strip_protocol(path)

    def _note(self, what: str, path: str) -> None:
        self.done.append((what, path))
        for name, error in self.fails.items():
            if path.endswith(name):
                raise error

    def info(self, path, **kwargs):
        place, path = self.disk(path), self._strip_protocol(path)
        if place.is_file():
            stat = place.stat()
            return {
                "name": path,
                "size": stat.st_size,
                "type": "file",
                "etag": f"{stat.st_ino}-{stat.st_mtime_ns}",
            }
        if any(p.is_file() for p in place.rglob("*")):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **kwargs):
        if self.info(path)["type"] == "file":
            found = [self.info(path)]
        else:
            names = [f"{self._strip_protocol(path)}/{p.name}" for p in sorted(self.disk(path).iterdir())]
            found = [self.info(n) for n in names if self.exists(n)]
        return found if detail else [x["name"] for x in found]

    def _open(self, path, mode="rb", **kwargs):
        assert mode in ("rb", "wb"), f"objects cannot be opened with {mode}"
        self._note("read" if mode == "rb" else "write", path)
        place = self.disk(path)
        if mode == "rb":
            return open(place, "rb")
        assert not place.is_dir(), f"{path} is both a name and a prefix"
        new = open(self.root / f".new-{threading.get_ident()}", "wb")
        close = new.close

        def appear():
            if not new.closed:
                close()
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(new.name, place)

        new.close = appear
        return _Closing(new)

    def put_file(self, lpath, rpath, **kwargs):
        if self.slow is not None:
            assert self.slow.wait(30)
        self._note("put", rpath)
        with self.open(rpath, "wb") as out:
            out.write(Path(lpath).read_bytes())

    def get_file(self, rpath, lpath, **kwargs):
        self._note("get", rpath)
        shutil.copyfile(self.disk(rpath), lpath)

    def cp_file(self, path1, path2, **kwargs):
        self.disk(path2).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.disk(path1), self.disk(path2))

    def rm_file(self, path):
        self._note("remove", path)
        if not self.disk(path).is_file():
            raise FileNotFoundError(path)
        self.disk(path).unlink()

    def rm(self, path, recursive=False, maxdepth=None):
        for name in self.find(path) if recursive else [self._strip_protocol(path)]:
            self.rm_file(name)

    def mkdir(self, path, **kwargs):
        pass

    makedirs = mkdir

    def mv(self, *args, **kwargs):
        raise NotImplementedError("a store of objects renames nothing")

    rename = move = mv


class _Closing:
    """A file whose `with` calls the close that was put on it."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs:// is this store, for fsspec, epath, Orbax and TensorStore; the cache is a folder of its own."""
    Bucket.root, Bucket.done, Bucket.fails, Bucket.slow = tmp_path / "bucket", [], {}, None
    Bucket.root.mkdir()
    for scheme in Bucket.protocol:
        monkeypatch.setitem(_registry, scheme, Bucket)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    monkeypatch.setattr(
        gcs_utils, "get_kvstore_for_gcs", lambda path: {"driver": "file", "path": str(Bucket.disk(path))}
    )
    monkeypatch.setenv("COOPER_CACHE", str(tmp_path / "cache"))
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield Bucket
    backend.fsspec_backend._get_filesystem.cache_clear()


def put(name: str, text: str | bytes) -> str:
    """Lay an object down; returns its address."""
    place = Bucket.root / name
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(place.name + ".new")  # another inode: another version
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    new.replace(place)
    return f"gs://{name}"


def gets() -> int:
    return sum(what == "get" for what, _ in Bucket.done)


# --- fetching --------------------------------------------------------------------------------------------


def test_a_local_path_is_itself(tmp_path):
    assert remote_files.fetch_local(tmp_path / "x") == tmp_path / "x"
    assert remote_files.fetch_local("~/x") == Path.home() / "x"
    assert remote_files.to_path("x") == Path.cwd() / "x"
    assert [remote_files.is_remote(p) for p in ("gs://a/b", "hf://a", "/a/b", "a:b", "package:x/y", Path("a"))] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_a_file_is_fetched_once_a_version(bucket):
    source = put("b/data/rows.jsonl", "one\n")
    first = remote_files.fetch_local(source)
    assert first.name == "rows.jsonl" and first.read_text() == "one\n"
    assert remote_files.fetch_local(source) == first and gets() == 1
    put("b/data/rows.jsonl", "two\n")  # of the same size
    second = remote_files.fetch_local(source)
    assert second.read_text() == "two\n" and first.read_text() == "one\n" and gets() == 2
    put("b/other/rows.jsonl", "two\n")
    assert remote_files.fetch_local("gs://b/other/rows.jsonl") != second


def test_what_tells_no_version_is_fetched_each_time(bucket, monkeypatch):
    source = put("b/x", "one")
    info = Bucket.info
    monkeypatch.setattr(Bucket, "info", lambda self, path: {**info(self, path), "etag": None})
    assert remote_files.fetch_local(source).read_text() == "one"
    put("b/x", "two")
    assert remote_files.fetch_local(source).read_text() == "two"
    assert len([p for p in remote_files.cache_dir().iterdir() if p.is_dir()]) == 1


def test_of_a_directory_what_is_wanted_is_fetched(bucket):
    for name in ("config.json", "a.safetensors", "sub/b.safetensors", "pytorch_model.bin"):
        put(f"b/model/{name}", name)
    place = remote_files.fetch_local("gs://b/model/", ("*.safetensors", "*.json"))
    assert place.name == "model"
    found = {str(p.relative_to(place)): p.read_text() for p in place.rglob("*") if p.is_file()}
    assert found == {n: n for n in ("config.json", "a.safetensors", "sub/b.safetensors")}
    assert remote_files.fetch_local("gs://b/model", ("*.json", "*.safetensors")) == place and gets() == 3
    with pytest.raises(
        FileNotFoundError, match=r"gs://b/model: there is no file in it, or none called \*\.txt"
    ):
        remote_files.fetch_local("gs://b/model", ("*.txt",))


def test_a_fetch_is_whole_or_not_at_all(bucket, monkeypatch):
    for name in ("a", "b"):
        put(f"b/model/{name}", name)
    bucket.fails["model/b"] = ConnectionResetError("by peer")
    with pytest.raises(OSError, match=r"gs://b/model cannot be reached \(ConnectionResetError: by peer\)"):
        remote_files.fetch_local("gs://b/model")
    assert [p for p in remote_files.cache_dir().iterdir() if p.is_dir() and not p.name.endswith(".new")] == []
    bucket.fails.clear()
    whole = Bucket.get_file

    def torn(self, remote, local):
        whole(self, remote, local)
        os.truncate(local, 0 if remote.endswith("b") else 1)

    monkeypatch.setattr(Bucket, "get_file", torn)
    with pytest.raises(OSError, match="gs://b/model: b came as 0 of 1 bytes"):
        remote_files.fetch_local("gs://b/model")
    monkeypatch.setattr(Bucket, "get_file", whole)
    assert sorted(p.name for p in remote_files.fetch_local("gs://b/model").iterdir()) == ["a", "b"]
    assert not list(remote_files.cache_dir().glob("*.new"))  # what the failures left


def test_what_cannot_be_fetched_is_named(bucket, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gs://b/none: there is no such file or directory"):
        remote_files.fetch_local("gs://b/none")
    put("b/secret", "x")
    bucket.fails["secret"] = PermissionError("Forbidden: no storage.objects.get access")
    with pytest.raises(
        OSError, match=r"gs://b/secret cannot be reached \(PermissionError: Forbidden.*service account"
    ):
        remote_files.fetch_local("gs://b/secret")
    with pytest.raises(ValueError, match="nowhere://b/x: no such kind of address.*gs://BUCKET/NAME"):
        remote_files.fetch_local("nowhere://b/x")
    with pytest.raises(ValueError, match=r"s3://b/run: a run can be kept on a local path or under gs://"):
        run_path(with_run_dir("s3://b/run"))

    def missing(url):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    for call in (remote_files.fetch_local, remote_files.to_path):
        with pytest.raises(
            ValueError, match="gs://b/x: a package that opens it is missing.*pip install gcsfs"
        ):
            call("gs://b/x")


def with_run_dir(place: str):
    config = base.get_config()
    config.run_dir = place
    return config


def test_processes_that_fetch_at_once_share_one_copy(bucket):
    source = put("b/x", "x" * 1000)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(remote_files.fetch_local(source))) for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 and len(set(found)) == 1 and gets() == 1


def test_problems_and_triples(bucket):
    put("b/gsm.jsonl", '{"question": "1+1?", "answer": "It is 2.\\n#### 2"}\n')
    columns = dict(question_key="q", reference_key="r", solution_key="", tfds_dir="", split="train")
    (found,) = problems.load_problems("gs://b/gsm.jsonl", "auto", **columns)
    assert (found.question, found.reference, found.id) == ("1+1?", "2", "gsm:1")
    put(
        "b/t.jsonl",
        '{"question": "q", "reference_answer": "2", "completion": "c", "label": 1}\n{"question": 3}\n',
    )
    with pytest.raises(ValueError, match=r"^gs://b/t\.jsonl:2: "):  # the address, not the copy
        labelled_completions.load_labelled_completions("gs://b/t.jsonl")
    with pytest.raises(FileNotFoundError, match="gs://b/none.jsonl"):
        problems.load_problems("gs://b/none.jsonl", "auto", **columns)


def test_remote_globs_and_folders_of_problems(bucket):
    def read(source):
        columns = ("question", "answer", "")
        found = problems.load_problem_set(source, "auto", columns, tfds_dir="", split="train")
        return [p.reference for p in found.problems]

    for name in ("s/train-1.jsonl", "s/train-0.jsonl", "s/deep/train-2.jsonl", "s/test.jsonl"):
        put(f"b/{name}", f'{{"question": "{name}", "answer": "{len(name)}"}}\n')
    assert read("gs://b/s/train-*.jsonl") == ["15", "15"]
    assert read("gs://b/s/") == ["15", "15"] and read("x=gs://b/s/test.jsonl") == ["12"]
    put("b/s/train-1.jsonl", "{")
    with pytest.raises(ValueError, match=r"^gs://b/s/train-1\.jsonl:1: not JSON"):
        read("gs://b/s/train-*")
    with pytest.raises(FileNotFoundError, match="gs://b/s: .*called none-"):
        read("gs://b/s/none-*")
    with pytest.raises(ValueError, match="only be in the last part"):
        read("gs://b/*/train-1.jsonl")


def test_weights_and_tokenizers(bucket, tmp_path, smollm2_gguf):
    c = model_config()
    params = random_params(c)
    weight_export.save_pretrained(tmp_path / "w", c, params, "logits")
    for file in (tmp_path / "w").iterdir():
        put(f"b/w/{file.name}", file.read_bytes())
    put("b/w/pytorch_model.bin", "not wanted")
    jax.tree.map(
        np.testing.assert_array_equal, weights.load_weights("gs://b/w", layout=one_device()).params, params
    )
    assert weights.read_config("gs://b/w") == c and gets() == 2
    with pytest.raises(FileNotFoundError, match="gs://b/none"):
        weights.load_weights("gs://b/none", layout=one_device())
    with pytest.raises(ValueError, match="gs://b/w/config.json.*no such directory or .gguf file"):
        weights.load_weights("gs://b/w/config.json", layout=one_device())

    trained = tokenizer.train_sentencepiece(["1 2 3 4"] * 5, "gs://b/run/t.model", 300, ["\n"])
    assert tokenizer.load_tokenizer_from("gs://b/run/t.model").encode("1 2") == trained.encode("1 2")
    Bucket.disk("b/smol.gguf").symlink_to(smollm2_gguf)
    assert weights.read_config("gs://b/smol.gguf") == weights.read_config(smollm2_gguf)
    assert tokenizer.load_tokenizer_from("gs://b/smol.gguf").encode("Hello") == tokenizer.load_tokenizer_from(
        smollm2_gguf
    ).encode("Hello")


# --- uploading -------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(bucket, tmp_path):
    folder = tmp_path / "staged"
    folder.mkdir()
    out = remote_files.Uploads(folder, epath.Path("gs://b/run"))
    yield out
    bucket.fails.clear()
    if bucket.slow is not None:
        bucket.slow.set()
    out.close()


def append(folder: Path, name: str, text: str) -> None:
    with open(folder / name, "a") as file:
        file.write(text)


def test_a_slow_upload_holds_nobody_up(bucket, uploads):
    bucket.slow = threading.Event()
    began = time.monotonic()
    for i in range(50):
        append(uploads.folder, "a.jsonl", f"{i}\n")
        uploads.changed("a.jsonl")
    append(uploads.folder, "a.jsonl", "half a li")  # nobody was told of it
    assert time.monotonic() - began < 10 and not Bucket.disk("b/run/a.jsonl").exists()
    bucket.slow.set()
    uploads.flush()
    assert Bucket.disk("b/run/a.jsonl").read_text() == "".join(f"{i}\n" for i in range(50))
    assert (
        sum(what == "put" for what, _ in Bucket.done) <= 2
    )  # one under way, and one for all that came meanwhile


def test_a_failed_upload_is_raised_and_nothing_is_lost(bucket, uploads):
    for name in ("a", "b"):
        append(uploads.folder, name, name)
    bucket.fails["run/a"] = ConnectionResetError("by peer")
    uploads.changed("a")
    with pytest.raises(
        OSError, match=r"gs://b/run/a cannot be reached.*by peer.*the files to upload are in .*staged"
    ):
        uploads.flush()
    append(uploads.folder, "a", "a")
    uploads.changed("a", "b")  # heard of, so it is tried again
    with pytest.raises(OSError, match="by peer"):
        uploads.flush()
    bucket.fails.clear()
    uploads.flush()
    assert Bucket.disk("b/run/a").read_text() == "aa" and Bucket.disk("b/run/b").read_text() == "b"
    bucket.fails["run/b"] = ConnectionResetError("again")
    uploads.changed("b")
    with pytest.raises(OSError, match="again"):
        uploads.close()
    assert not uploads._thread.is_alive()


def test_what_went_wrong_is_raised_by_the_next_call(bucket, uploads):
    append(uploads.folder, "a", "a")
    bucket.fails["run/a"] = ConnectionResetError("by peer")
    uploads.changed("a")
    for _ in range(1000):
        time.sleep(0.01)
        if any(what == "put" for what, _ in Bucket.done) and uploads._error is not None:
            break
    with pytest.raises(OSError, match="by peer"):
        uploads.changed("a")


# --- a run that lives there ------------------------------------------------------------------------------


@pytest.fixture
def config():
    config = with_run_dir("gs://b/runs/x")
    config.log.to = ""
    return config


def lines(name: str) -> list[dict]:
    return m.read_lines(Bucket.disk(f"b/runs/x/{name}"))


def save(run_dir, step, tree, keep=0, **loop):
    with Checkpoints(run_dir, keep=keep) as kept:
        kept.save(step, {"policy": tree}, loop)


def test_a_run_goes_on_on_another_machine(bucket, config, tmp_path, monkeypatch):
    tree = {"w": jnp.arange(64.0)}
    path = run_path(config)
    assert isinstance(path, epath.Path) and str(path) == "gs://b/runs/x"
    lost = RunDirectory(path, config, resume=True)  # never closed: its machine is gone
    lost.truncate(None)
    with Checkpoints(path, keep=2) as kept:
        for step in (1, 2, 3):
            lost.log(step, {"a/b": step})
            lost.dump_samples(step, [{"x": step}])
            if step < 3:
                lost.flush()
                assert [r["step"] for r in lines("metrics.jsonl")] == list(range(1, step + 1))
                kept.save(step, {"policy": tree}, {"position": step})
    lost.flush()
    monkeypatch.setenv("COOPER_CACHE", str(tmp_path / "another machine"))
    with RunDirectory(path, config, resume=True) as run, Checkpoints(path, keep=2) as kept:
        step, items, loop = kept.restore_newest({"policy": abstract_like(tree)})
        assert step == 2 and loop["position"] == 2
        np.testing.assert_array_equal(items["policy"]["w"], tree["w"])
        run.truncate(step)
        run.flush()
        assert [r["a/b"] for r in lines("metrics.jsonl")] == [1, 2]
        run.log(3, {"a/b": 33})
        run.dump_samples(3, [{"x": 33}])
    assert [r["a/b"] for r in lines("metrics.jsonl")] == [1, 2, 33]
    assert [r["x"] for r in lines("samples.jsonl")] == [1, 2, 33]
    assert json.loads(Bucket.disk("b/runs/x/config.json").read_text())["seed"] == config.seed
    lost.close()


def test_the_bucket_counts_not_what_was_staged(bucket, config):
    """A directory that was emptied is a new run, though the machine is the old one."""
    with RunDirectory(run_path(config), config, resume=True) as run:
        run.truncate(None)
        run.log(1, {"a/b": 1})
        run.dump_samples(1, [{"x": 1}])
    shutil.rmtree(Bucket.root)
    Bucket.root.mkdir()
    with RunDirectory(run_path(config), config, resume=True) as run:
        run.truncate(None)
        run.log(1, {"a/b": 11})
    assert [r["a/b"] for r in lines("metrics.jsonl")] == [11]
    assert not Bucket.disk("b/runs/x/samples.jsonl").exists()


def test_a_run_whose_uploads_fail(bucket, config):
    path = run_path(config)
    with pytest.raises(OSError, match=r"gs://b/runs/x/metrics.jsonl cannot be reached.*by peer"):
        with RunDirectory(path, config, resume=True) as run:
            run.truncate(None)
            bucket.fails["metrics.jsonl"] = ConnectionResetError("by peer")
            run.log(1, {"a/b": 1})
            run.flush()
    assert m.read_lines(remote_files.staging_dir(path) / "metrics.jsonl")[0]["a/b"] == 1
    with pytest.raises(KeyError, match="what ended the run") as caught:
        with RunDirectory(path, config, resume=True) as run:  # the one before has let go of the lock
            bucket.fails.clear()
            run.truncate(None)
            bucket.fails["metrics.jsonl"] = ConnectionResetError("by peer")
            run.log(1, {"a/b": 1})
            raise KeyError("what ended the run")
    assert "cannot be reached" in caught.value.__notes__[0]


def test_checks_of_a_run_directory(bucket, config):
    path = run_path(config)
    check_shared(path)  # one process: nothing to agree on
    with RunDirectory(path, config, resume=True):
        with pytest.raises(ValueError, match="gs://b/runs/x is in use by process"):
            RunDirectory(path, config, resume=True)
    save(path, 1, {"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"gs://b/runs/x holds checkpoints \[1\] and resume is False"):
        RunDirectory(path, config, resume=False)
    config.seed = 7
    with pytest.raises(ValueError, match="gs://b/runs/x was begun with another config: seed was"):
        RunDirectory(path, config, resume=True)


def test_events_are_uploaded(bucket, config):
    config.log.to = "tensorboard"
    for first in (1, 3):
        with RunDirectory(run_path(config), config, resume=True) as run:
            run.truncate(None if first == 1 else 2)
            for step in (first, first + 1):
                run.log(step, {"policy/kl": step / 8})
    found = sorted(Bucket.disk("b/runs/x/tensorboard").iterdir())
    assert len(found) == 2 and all(p.stat().st_size > 100 for p in found)  # a file a life
    assert b"policy/kl" in found[0].read_bytes()


# --- checkpoints there -----------------------------------------------------------------------------------

RUN = "gs://b/runs/x"


def there(name: str = "checkpoints") -> list[str]:
    place = Bucket.disk(f"b/runs/x/{name}")
    return sorted(p.name for p in place.iterdir() if any(q.is_file() for q in p.rglob("*")))


def test_old_checkpoints_are_invisible_before_they_are_deleted(bucket):
    tree = {"w": jnp.arange(8.0)}
    assert list_steps(RUN) == []
    with Checkpoints(RUN, keep=1) as kept:
        assert kept.newest() is None
        kept.save_reference(tree)
        for step in (1, 2):
            kept.save(step, {"policy": tree}, {})
        kept.wait()
        assert kept.steps() == [2] and there() == ["2"]
        np.testing.assert_array_equal(kept.restore_reference(abstract_like(tree))["w"], tree["w"])
    done = [(what, path) for what, path in Bucket.done if "/checkpoints/1/" in path]
    written = max(i for i, (what, _) in enumerate(done) if what == "write")
    removed = [path for what, path in done[written + 1 :] if what == "remove"]
    assert removed[0] == "b/runs/x/checkpoints/1/commit_success.txt" and len(removed) > 5


def test_a_deletion_that_is_cut_short(bucket):
    tree = {"w": jnp.arange(8.0)}
    save(RUN, 1, tree)
    bucket.fails["checkpoints/1/loop/metadata"] = ConnectionResetError("killed here")
    with pytest.raises(ConnectionResetError), Checkpoints(RUN, keep=1) as kept:
        kept.save(2, {"policy": tree}, {})
        kept.wait()
    bucket.fails.clear()
    assert there() == ["1", "2"] and list_steps(RUN) == [2]
    with Checkpoints(RUN, keep=1) as kept:
        assert kept.newest() == 2 and there() == ["2"]


def test_a_save_that_is_cut_short(bucket):
    tree = {"w": jnp.arange(8.0)}
    save(RUN, 1, tree)
    bucket.fails["checkpoints/2/commit_success.txt"] = ConnectionResetError("by peer")
    with pytest.raises(
        OSError, match=r"checkpoint of step 2 could not be written \(by peer\); that of step 1 is"
    ):
        with Checkpoints(RUN, keep=1) as kept:
            kept.save(2, {"policy": tree}, {})
            kept.wait()
    bucket.fails.clear()
    assert there() == ["1", "2"] and list_steps(RUN) == [1]
    with pytest.raises(FileNotFoundError, match=r"checkpoints/2 is not there; the checkpoints are \[1\]"):
        with Checkpoints(RUN, keep=1, read_only=True) as kept:
            kept.loop(2)
    with Checkpoints(RUN, keep=1) as kept:
        assert kept.newest() == 1 and there() == ["1"]
        kept.save(2, {"policy": tree}, {})
    assert list_steps(RUN) == [2]


@pytest.mark.parametrize("how", ["loop", "values"])
def test_a_damaged_newest_checkpoint_gives_way(bucket, how):
    trees = {step: {"w": jnp.arange(4096.0) * step} for step in (1, 2)}
    for step, tree in trees.items():
        save(RUN, step, tree)
    place = Bucket.disk("b/runs/x/checkpoints/2")
    if how == "loop":
        (place / "loop/metadata").write_text("{")
    else:
        for file in (place / "policy/ocdbt.process_0/d").iterdir():
            file.write_bytes(b"x")
    with Checkpoints(RUN, keep=2, read_only=True) as kept, pytest.raises(checkpoint.Unreadable):
        kept.restore_newest({"policy": abstract_like(trees[1])})
    for number in ("2", "2.2"):
        with Checkpoints(RUN, keep=2) as kept:
            with pytest.warns(
                UserWarning, match=rf"checkpoints/2/.* cannot be read.*it is now unreadable/{number},"
            ):
                step, items, _ = kept.restore_newest({"policy": abstract_like(trees[1])})
            assert step == 1 and kept.steps() == [1]
            np.testing.assert_array_equal(items["policy"]["w"], trees[1]["w"])
            kept.save(2, {"policy": trees[2]}, {})  # the way is free again
        assert number in there("unreadable") and list_steps(RUN) == [1, 2]
        Bucket.disk("b/runs/x/checkpoints/2/loop/metadata").write_text("{")
    assert there("unreadable/2")  # what was moved is all there
