"""Prompts of flags and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from bridge.errors import UsageError
from bridge.generation.prompts import Prompt, given_prompts
from bridge.generation.text import Tokenizer


def test_flags_come_before_lines(tmp_path: Path) -> None:
    """Empty lines are passed over; other white space is the user's."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b'one \r\n\n  \n{"prompt": 2}\n\xe6\x9d\xb1\xe2\x80\xa8\xe4\xba\xac')
    assert given_prompts(["zero"], file) == [
        Prompt(text="zero", where="--prompt 1"),
        Prompt(text="one ", where=f"{file}:1"),
        Prompt(text='{"prompt": 2}', where=f"{file}:4"),
        Prompt(text="東\u2028京", where=f"{file}:5"),
    ]


def test_lines_of_json_are_of_three_kinds(tmp_path: Path) -> None:
    """A text, a conversation, token ids."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a\\nb"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n'
        '{"token_ids": [1, 2]}\n'
    )
    assert given_prompts([], file) == [
        Prompt(text="a\nb", where=f"{file}:1"),
        Prompt(messages=({"role": "user", "content": "hi"},), where=f"{file}:3"),
        Prompt(token_ids=(1, 2), where=f"{file}:4"),
    ]


def test_all_wrong_lines_are_named_at_once(tmp_path: Path) -> None:
    """By file and number."""
    file = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "fine"}',
        "plain text",
        '{"prompt": 3}',
        '{"prompt": "a", "token_ids": [1]}',
        '{"token_ids": []}',
        '{"token_ids": [1.5]}',
        '{"token_ids": [true]}',
        '{"messages": ["hi"]}',
        '{"messages": []}',
        "[" * 100_000,
        "7",
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(UsageError, match="10 lines are no prompts") as caught:
        given_prompts([], file)
    assert [one.split(": ")[0] for one in caught.value.where] == [
        f"{file}:{number}" for number in range(2, 12)
    ]
    assert "token_ids" in (caught.value.hint or "")


def test_no_prompt_and_no_file_are_refused(tmp_path: Path) -> None:
    """There is nothing to do, and that is said."""
    (tmp_path / "empty.txt").write_text("\n \n")
    for texts, file in (([], None), ([], tmp_path / "empty.txt")):
        with pytest.raises(UsageError, match="there is no prompt"):
            given_prompts(texts, file)
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name in ("latin", "nowhere", "."):
        with pytest.raises(UsageError, match="cannot read the prompts") as caught:
            given_prompts([], tmp_path / name)
        assert caught.value.where == (str(tmp_path / name),)


def test_an_empty_prompt_is_refused_where_it_stands() -> None:
    """A variable that is not set looks like that; the model would make something up."""
    with pytest.raises(UsageError, match="the prompt is empty") as caught:
        given_prompts([""], None)[0].encode(object(), chat=False, system=None)  # type: ignore[arg-type]  # not asked
    assert caught.value.where == ("--prompt 1",)


class Parrot:
    """A tokenizer that keeps what it is given."""

    said: object = None

    def encode(self, text: str) -> list[int]:
        """A text."""
        self.said = text
        return [1]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation."""
        self.said = messages
        if not messages[-1]["content"]:
            raise UsageError("says nothing", where="there", hint="say something")
        return [2]


def encoded(prompt: Prompt, *, chat: bool = True, system: str | None = None) -> object:
    """What the tokenizer is given."""
    tokenizer = Parrot()
    prompt.encode(cast("Tokenizer", tokenizer), chat=chat, system=system)
    return tokenizer.said


def test_a_system_message_begins_each_conversation_that_has_none() -> None:
    """Of texts and of messages; two of them are refused, and so is a chat of token ids."""
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
    assert encoded(Prompt(text="hi", where=""), system="be brief") == [system, user]
    given = Prompt(messages=(user,), where="here")
    assert encoded(given) == [user]
    assert encoded(given, system="be brief") == [system, user]
    with pytest.raises(UsageError, match="of its own") as caught:
        encoded(Prompt(messages=(system, user), where="here"), system="be long")
    assert caught.value.where == ("here",)
    with pytest.raises(UsageError, match="no chat can be made of them"):
        encoded(Prompt(token_ids=(1,), where="here"))
    with pytest.raises(UsageError, match="says nothing") as caught:
        encoded(Prompt(messages=({"role": "user", "content": ""},), where="here"))
    assert caught.value.where == ("here", "there")


def test_text_that_is_no_unicode_is_refused_where_it_stands(tmp_path: Path) -> None:
    """Half of a surrogate pair, alone or in a message; a whole pair is a character."""
    file = tmp_path / "prompts.JSONL"
    file.write_text(
        '\ufeff{"prompt": "\\ud83d\\ude42"}\n{"prompt": "a\\ud83d"}\n'
        '{"messages": [{"role": "user", "content": [{"text": "\\udc80"}]}]}',
        encoding="utf-8",
    )
    whole, *halves = given_prompts([], file)
    assert encoded(whole, chat=False) == "🙂"
    for number, half in enumerate(halves, start=2):
        with pytest.raises(UsageError, match="not Unicode text") as caught:
            encoded(half, chat=False)
        assert caught.value.where == (f"{file}:{number}",)
