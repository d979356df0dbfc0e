"""Sources of problems: files, globs, folders of shards, and data sets of the hub."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from tiny_hub import COMMIT, make_card, make_hub_cache

from cooper_jax.data import data_sources, dataset_files, hub_datasets, problems
from cooper_jax.data.hub_datasets import HubId

CARD = {"configs": [
    {"config_name": "main", "data_files": [{"split": "train", "path": "main/train-*"},
                                           {"split": "test", "path": ["main/test-*"]}]},
    {"config_name": "socratic", "data_files": [{"split": "train", "path": "socratic/train-*"}]},
]}  # fmt: skip
FILES = [
    ".gitattributes",
    "README.md",
    "main/test-00000-of-00001.parquet",
    "main/train-00000-of-00002.parquet",
    "main/train-00001-of-00002.parquet",
    "socratic/train-00000-of-00001.parquet",
]


def jsonl(*numbers):
    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in numbers]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*numbers):
    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in numbers]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(text, split="train"):
    """The references of a source's problems."""
    found = problems.load_problem_set(str(text), "auto", ("question", "answer", ""), tfds_dir="", split=split)
    return [int(p.reference) for p in found.problems]


# --- the text of a flag ----------------------------------------------------------------------------------


def test_commas_separate_sources_unless_a_file_has_one(tmp_path, monkeypatch):
    assert data_sources.split_sources("a.jsonl, openai/gsm8k:main,x=b/*.csv") == [
        "a.jsonl", "openai/gsm8k:main", "x=b/*.csv",
    ]  # fmt: skip
    assert data_sources.split_sources("") == []
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, {"a,b.jsonl": jsonl(1), "k=v.jsonl": jsonl(2)})
    assert data_sources.split_sources("a,b.jsonl") == ["a,b.jsonl"]
    assert data_sources.find_source("k=v.jsonl", "train").name == "k=v"
    with pytest.raises(ValueError, match="empty source"):
        data_sources.split_sources("a.jsonl,,b.jsonl")


def test_sources_have_names_that_differ(tmp_path):
    fill(tmp_path, {"a/test.jsonl": jsonl(1), "b/test.jsonl": jsonl(2), "shards/x-0.jsonl": jsonl(3)})
    first, second, shards, named = (
        data_sources.find_source(f"{text}", "train")
        for text in (
            tmp_path / "a/test.jsonl",
            tmp_path / "b/test.jsonl",
            tmp_path / "shards/*.jsonl",
            f"mine={tmp_path}/b/test.jsonl",
        )
    )
    assert [s.name for s in (first, second, shards, named)] == ["test", "test", "shards", "mine"]
    data_sources.check_names([first, shards, named])
    with pytest.raises(
        ValueError, match="two sources are called 'test': name them, as in first=.*a/test.jsonl"
    ):
        data_sources.check_names([first, second])


# --- files and folders -----------------------------------------------------------------------------------


def test_globs_and_folders_are_read_in_the_order_of_names(tmp_path):
    fill(tmp_path, {"s/part-1.jsonl": jsonl(3), "s/part-0.jsonl": jsonl(1, 2), "s/README.md": b"# Shards\n"})
    assert read(tmp_path / "s" / "part-*.jsonl") == read(tmp_path / "s") == [2, 3, 4]
    assert read(tmp_path / "s", split="test") == [2, 3, 4]  # a folder without splits
    with pytest.raises(FileNotFoundError, match="none-.*: no file matches"):
        read(tmp_path / "none-*.jsonl")
    with pytest.raises(ValueError, match=r"part-1.jsonl:1: not JSON"):
        (tmp_path / "s" / "part-1.jsonl").write_text("{")
        read(tmp_path / "s")


def test_a_folder_has_splits_and_configs(tmp_path):
    fill(tmp_path, {"train.jsonl": jsonl(1), "test.jsonl": jsonl(2), "notes.jsonl": jsonl(9)})
    assert read(tmp_path) == [2] and read(tmp_path, split="test") == [3]
    assert read(f"{tmp_path}:default:test") == [3]
    fill(tmp_path, {"easy/dev-0.jsonl": jsonl(5), "data/x.jsonl": jsonl(6)})
    assert read(f"{tmp_path}:easy:validation") == [6] and read(f"{tmp_path}/data") == [7]
    with pytest.raises(ValueError, match="no split 'validation'; its splits are test, train"):
        read(f"{tmp_path}:default:validation")
    with pytest.raises(ValueError, match="for the split 'test' write .*:default:test"):
        read(f"{tmp_path}:test")
    with pytest.raises(ValueError, match="only a config and a split"):
        read(f"{tmp_path}:a:b:c")


@pytest.mark.parametrize(
    "files, complaint",
    [
        (("train.jsonl", "train.parquet"), "its files end in .jsonl and .parquet"),
        (("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"), "of 3 shards train-.* number 1 is missing"),
        (("deep/train.jsonl",), "no data file in it or data/; there are files in deep: name one as .*:FOLDER"),
        (("README.txt", ".hidden.jsonl", "dataset_infos.json"), "no data file"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_clear_is_refused(files, complaint, tmp_path):
    fill(tmp_path, dict.fromkeys(files, jsonl(1)))
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path)


def test_what_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, {"file.jsonl": jsonl(1)})
    for text in ("data/train.jsonl", "gsm8k", "a/b/c", "file.jsonl:main"):
        with pytest.raises(FileNotFoundError, match=f"{text}: there is no such file"):
            read(text)


# --- cards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, split, default, chosen",
    [
        ("main", "", "train", FILES[3:5]),
        ("main", "test", "train", FILES[2:3]),
        ("main", "", "test", FILES[2:3]),
        ("socratic", "train", "test", FILES[5:]),
    ],
)
def test_a_card_lists_the_files_of_a_config(config, split, default, chosen):
    assert dataset_files.choose_files(FILES, CARD, "o/n", config, split, default) == chosen


def test_a_card_with_several_configs_needs_one_named():
    with pytest.raises(ValueError, match="o/n: it has the configs main, socratic: name one, as in o/n:main"):
        dataset_files.choose_files(FILES, CARD, "o/n", "", "", "train")
    with pytest.raises(ValueError, match="no config 'other'"):
        dataset_files.choose_files(FILES, CARD, "o/n", "other", "", "train")
    with pytest.raises(ValueError, match="no split 'test'; its splits are train: .*o/n:socratic:train"):
        dataset_files.choose_files(FILES, CARD, "o/n", "socratic", "", "test")
    card = {"configs": [{**c, "default": c["config_name"] == "socratic"} for c in CARD["configs"]]}
    assert dataset_files.choose_files(FILES, card, "o/n", "", "", "train") == FILES[5:]


@pytest.mark.parametrize(
    "data_files, chosen",
    [
        ("*.json", ["a.json"]),
        (["data/**/x.json", "a.json"], ["a.json", "data/d/x.json", "data/x.json"]),
        ({"train": "data"}, ["data/x.json"]),
        ([{"split": "train", "path": "./data/?.json"}], ["data/x.json"]),
    ],
)
def test_patterns_of_cards(data_files, chosen):
    names = ["a.json", "data/x.json", "data/d/x.json", "data/yy.json"]
    if data_files == {"train": "data"}:
        names.remove("data/yy.json")
    card = {"configs": [{"config_name": "default", "data_files": data_files}]}
    assert dataset_files.choose_files(names, card, "o/n", "", "", "train") == chosen


def test_a_card_may_name_a_folder_whose_files_state_their_splits():
    names = ["sub/a-test.json", "sub/a-train.json", "train.json"]
    card = {"configs": [{"config_name": "default", "data_dir": "sub"}]}
    for split in ("train", "test"):
        assert dataset_files.choose_files(names, card, "o/n", "", split, "") == [f"sub/a-{split}.json"]


def test_a_card_that_cannot_be_read_is_named(tmp_path):
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train"}]}]}
    with pytest.raises(ValueError, match="o/n: README.md lists data_files .* each needs a split and a path"):
        dataset_files.choose_files(["train.json"], card, "o/n", "", "", "train")
    (tmp_path / "README.md").write_text("---\nconfigs: [a, {\nb\n---\n")
    with pytest.raises(ValueError, match="README.md: its metadata cannot be read") as error:
        dataset_files.read_card(tmp_path)
    assert "\n" not in str(error.value)


# --- the hub ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("openai/gsm8k", HubId("openai/gsm8k")),
        ("openai/gsm8k:main", HubId("openai/gsm8k", config="main")),
        ("openai/gsm8k@v1.0:main:train", HubId("openai/gsm8k", "v1.0", config="main", split="train")),
        ("hf://datasets/o/n/a/b-*.json", HubId("o/n", path="a/b-*.json")),
        ("hf://datasets/o/n@abc:main:test", HubId("o/n", "abc", config="main", split="test")),
        ("data/train.jsonl", None),
        ("gsm8k", None),
        ("a/b/c", None),
        ("gs://bucket/name", None),
    ],
)
def test_ids_of_the_hub(text, expected):
    assert hub_datasets.parse_id(text) == expected


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fill_gsm8k(hub, **more):
    files = {
        "README.md": make_card(("main", ("train", "test")), ("socratic", ("train",))),
        "main/train-00000-of-00002.parquet": parquet(1, 2),
        "main/train-00001-of-00002.parquet": parquet(3),
        "main/test-00000-of-00001.parquet": parquet(7),
        "socratic/train-00000-of-00001.parquet": parquet(8),
    }
    return make_hub_cache(hub, "openai/gsm8k", files | more)


def test_a_data_set_of_the_hub_is_read_from_its_cache(hub):
    snapshot = fill_gsm8k(hub)
    assert read("openai/gsm8k:main") == [2, 3, 4]
    assert read("openai/gsm8k:main", split="test") == read("openai/gsm8k@main:main:test") == [8]
    assert read("hf://datasets/openai/gsm8k/socratic/train-*.parquet") == [9]
    source = data_sources.find_source("openai/gsm8k:main:test", "train")
    assert (source.name, source.revision) == ("gsm8k", COMMIT)
    assert source.files[0].path == snapshot / "main/test-00000-of-00001.parquet"
    assert source.files[0].display_name == "openai/gsm8k@01234567/main/test-00000-of-00001.parquet"
    assert hub_datasets.find_commit(HubId("openai/gsm8k")) == COMMIT


def test_a_recorded_commit_takes_precedence(hub):
    fill_gsm8k(hub)
    later = "f" * 40
    make_hub_cache(hub, "openai/gsm8k", {"train.jsonl": jsonl(5)}, later)
    assert read("openai/gsm8k") == [6]
    source = data_sources.find_source("openai/gsm8k:main", "train", revision=COMMIT)
    assert source.revision == COMMIT and len(source.files) == 2


def test_a_local_file_or_folder_of_that_name_wins(hub, tmp_path):
    fill_gsm8k(hub)
    assert data_sources.parse_hub_source("x=openai/gsm8k") == HubId("openai/gsm8k")
    assert data_sources.may_be_hub_source("x=openai/gsm8k") and data_sources.may_be_hub_source("openai/gsm8k")
    fill(tmp_path, {"openai/gsm8k/main/train.jsonl": jsonl(40)})
    assert data_sources.parse_hub_source("openai/gsm8k:main") is None
    assert data_sources.may_be_hub_source("openai/gsm8k:main") and not data_sources.may_be_hub_source(
        "x.jsonl"
    )
    assert read("openai/gsm8k:main") == [41]


def test_without_a_network_the_message_says_what_to_do(hub):
    with pytest.raises(ValueError, match="openai/gsm8k: no such file or folder, .*hub.*give the folder"):
        read("openai/gsm8k")
    snapshot = fill_gsm8k(hub)
    (snapshot / "main/train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="of 2 shards main/train-.* number 1 is missing.*without a network"):
        read("openai/gsm8k:main")
    with pytest.raises(ValueError, match="no file other.json in it.*without a network"):
        read("hf://datasets/openai/gsm8k/other.json")


def test_with_a_network_the_hubs_list_decides(hub, monkeypatch):
    """Files that are listed and neither cached nor downloaded are an error, not a smaller data set."""
    import huggingface_hub

    snapshot = fill_gsm8k(hub)
    names = [*FILES, "main/train-extra.parquet"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **kwargs: names)
    with pytest.raises(ValueError, match="main/train-extra.parquet is not in the hub's cache"):
        read("openai/gsm8k:main")
    (snapshot / "main/train-extra.parquet").write_bytes(parquet(4))
    assert read("openai/gsm8k:main") == [2, 3, 4, 5]


def test_a_malformed_row_of_the_hub_is_named(hub):
    make_hub_cache(hub, "o/n", {"train.jsonl": jsonl(1) + b'{"question": "Q"}\n'})
    with pytest.raises(ValueError, match=r"^o/n@01234567/train.jsonl:2: field 'answer' is missing"):
        read("o/n")
