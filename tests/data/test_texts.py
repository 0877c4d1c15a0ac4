"""Where text and conversations come from."""

import json
import tokenize
from pathlib import Path

import pytest
import yaml

from sparse_train.data.texts import HubText, PackagedQuestions, PackagedWikipedia, PythonStandardLibrary, TextFiles

ROOT = Path(__file__).parents[2]
TALK = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_files(tmp_path):
    plain, rows, talks = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    plain.write_text("one document\n\nof two paragraphs")
    rows.write_text(lines({"body": "one\u2028two\x85"}) + "\n" + lines({"body": "second"}), encoding="utf-8")
    source = TextFiles(train=[str(plain), str(rows)], test=[str(plain)], column="body")
    assert source.documents("train") == ["one document\n\nof two paragraphs", "one\u2028two\x85", "second"]
    assert source.documents("validation") == []
    assert source.name == "a.txt, b.jsonl"
    talks.write_text(lines({"messages": TALK, "source": "x"}, {"messages": TALK[1:]}), encoding="utf-8")
    assert TextFiles(train=[str(talks)], column="messages").documents("train") == [TALK, TALK[1:]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "a"}\n', r"a.jsonl, document 1: 'text' is to hold a text.*\{'body': 'a'\}"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"document 2: 'text' is to hold a text"),
        ("a.jsonl", b'["a"]\n', r"document 1: .*the document is \['a'\]"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": \n',
            r"a.jsonl .*has a line that is not JSON: Expecting value",
        ),
        ("a.CSV", b"id,text\n1,first", r"a.CSV: TextFiles reads plain text and .jsonl, and .csv would be read as if"),
        ("a.txt", "caf\xe9".encode("latin-1"), r"a.txt is not text in UTF-8.*position 3"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TextFiles(train=[str(tmp_path / name)]).documents("train")


def test_no_files():
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt"):
        TextFiles(train=["nowhere.txt"]).documents("train")
    with pytest.raises(ValueError, match="TextFiles has no files"):
        TextFiles().documents("train")


def test_a_data_set_of_datasets(tmp_path):
    for split, texts in {"train": ["a", "b", "c"], "test": ["d"]}.items():
        (tmp_path / f"{split}.jsonl").write_text(lines(*({"text": text, "messages": TALK} for text in texts)))
    splits = {"train": "train", "test": "test"}
    assert HubText(str(tmp_path), splits=splits).documents("train") == ["a", "b", "c"]
    assert HubText(str(tmp_path), splits=splits).documents("validation") == []
    assert HubText(str(tmp_path)).documents("validation") == []
    assert HubText(str(tmp_path), max_documents=2).documents("validation") == []
    with pytest.raises(ValueError, match="validations"):
        HubText(str(tmp_path), splits={"validation": "validations"}).documents("validation")
    assert HubText(str(tmp_path), splits=splits, max_documents=2).documents("train") == ["a", "b"]
    assert HubText(str(tmp_path), column="messages", splits=splits).documents("train") == [TALK] * 3
    assert HubText("org/name", "part").name == "org/name/part"


def test_penn_treebank_is_read_from_the_hubs_own_copy(monkeypatch):
    asked = {}

    def load_dataset(path, subset, **options):
        asked.update(path=path, subset=subset, **options)
        return [{"sentence": "no it was n't"}, {"sentence": "mr. <unk> said N"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    overlay = yaml.safe_load((ROOT / "configs/perplexity/ptb.yaml").read_text())
    source = HubText(**overlay["text"]["init_args"])
    assert source.separator.join(source.documents("test")) == "no it was n't mr. <unk> said N"
    assert asked["path"] == "ptb-text-only/ptb_text_only" and asked["subset"] is None
    assert (asked["split"], asked["revision"]) == ("test", "refs/convert/parquet")


def test_a_column_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"sentence": "a", "label": 1}])
    with pytest.raises(ValueError, match="org/data, document 1: 'sentense' is to hold.*Did you mean 'sentence'"):
        HubText("org/data", column="sentense").documents("train")


def test_packaged_wikipedia_is_split_by_article():
    source = PackagedWikipedia()
    splits = {split: source.documents(split) for split in ("train", "validation", "test")}
    sizes = {split: len(documents) for split, documents in splits.items()}
    assert sizes["train"] > 8900
    assert 400 < sizes["validation"] < 600
    assert 400 < sizes["test"] < 600
    assert not set(splits["train"]) & set(splits["test"])
    assert "\n\n" in splits["test"][0]


def test_packaged_questions_ask_about_the_articles_of_their_split():
    for split in ("train", "validation", "test"):
        found, wordings = PackagedQuestions().documents(split), set()
        for (title, text), messages in zip(PackagedWikipedia().articles(split), found, strict=True):
            assert [message["role"] for message in messages] == ["user", "assistant"]
            assert title in messages[0]["content"]
            assert messages[1]["content"] == text
            wordings.add(messages[0]["content"].replace(title, "TITLE"))
        assert len(wordings) == 4
    assert PackagedQuestions().documents("test") == found


def test_the_standard_library_is_code_split_by_file():
    source = PythonStandardLibrary()
    splits = {split: source.documents(split) for split in ("train", "validation", "test")}
    assert len(splits["train"]) > 300
    assert min(len(splits["validation"]), len(splits["test"])) > 5
    everything = [document for documents in splits.values() for document in documents]
    for module in (json, tokenize):  # each is a file that is there once
        assert everything.count(Path(module.__file__).read_text(encoding="utf-8")) == 1
    here = [Path(json.__file__).parents[1] / name for name in ("encodings/cp1252.py", "pydoc_data/topics.py")]
    assert not {path.read_text(encoding="utf-8") for path in here} & set(everything)
    assert not [document for document in everything if "build_time_vars" in document[:200]]  # paths of this machine
    assert source.name.startswith("Python 3.")
