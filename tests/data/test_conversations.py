"""Where conversations come from."""

import json

import pytest

from sparse_train.data.conversations import ConversationFiles, HubConversations, PackagedQuestions
from sparse_train.data.texts import PackagedWikipedia

TALK = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"messages": TALK, "source": "x"}) + "\n" + lines({"messages": TALK[1:]}), encoding="utf-8")
    source = ConversationFiles(train=[str(path)])
    assert source.conversations("train") == [TALK, TALK[1:]]
    assert source.conversations("validation") == []
    assert source.name == "a.jsonl"
    with pytest.raises(ValueError, match=r"lines without the field 'talk'; they have \['messages', 'source'\]"):
        ConversationFiles(train=[str(path)], column="talk").conversations("train")
    with pytest.raises(ValueError, match=r"There is no text file nowhere.jsonl"):
        ConversationFiles(test=["nowhere.jsonl"]).conversations("test")


def test_a_data_set_of_datasets(tmp_path):
    for split, count in {"train": 3, "test": 1}.items():
        (tmp_path / f"{split}.jsonl").write_text(lines(*[{"messages": TALK}] * count), encoding="utf-8")
    assert HubConversations(str(tmp_path)).conversations("train") == [TALK] * 3
    assert HubConversations(str(tmp_path)).conversations("validation") == [TALK]
    assert HubConversations(str(tmp_path)).conversations("test") == []
    assert HubConversations(str(tmp_path), max_conversations=2).conversations("train") == [TALK] * 2
    assert HubConversations("org/name", "part").name == "org/name/part"


def test_packaged_questions_ask_about_the_articles_of_their_split():
    articles = PackagedWikipedia()
    for split in ("train", "validation", "test"):
        found, wordings = PackagedQuestions().conversations(split), set()
        for (title, text), messages in zip(articles.articles(split), found, strict=True):
            assert [message["role"] for message in messages] == ["user", "assistant"]
            assert title in messages[0]["content"]
            assert messages[1]["content"] == text
            wordings.add(messages[0]["content"].replace(title, "TITLE"))
        assert len(wordings) == 4
    assert PackagedQuestions().conversations("test") == found
