"""What a user wants continued: texts, conversations or token ids, from flags or a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError
from bridge.generation.text import Messages, Tokenizer

_FORMS: Final = (
    'a line is {"prompt": "..."}, {"messages": [{"role": "user", "content": "..."}]} or '
    '{"token_ids": [1, 2, 3]}'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One of three.

    Args:
        text: To be continued, or what a user says in a chat.
        messages: A conversation to be answered.
        token_ids: To be continued as they are; no tokenizer is needed.
        where: What to call it in an error.
    """

    text: str | None = None
    messages: Messages | None = None
    token_ids: tuple[int, ...] | None = None
    where: str

    def encode(
        self, tokenizer: Tokenizer | None, *, chat: bool, system: str | None
    ) -> tuple[int, ...]:
        """Token ids.

        Args:
            tokenizer: Needed unless these are token ids.
            chat: Take the text for what a user says.
            system: What a chat begins with.

        Raises:
            UsageError: BR001, it is empty or no Unicode, messages that have a system message
                already, token ids where a chat is wanted, or what the chat template does not take.
        """
        if self.token_ids is not None:
            if chat:
                raise UsageError(
                    "token ids are continued as they are; no chat can be made of them",
                    where=self.where,
                    hint="leave --chat away, or give prompt or messages",
                )
            return self.token_ids
        assert tokenizer is not None  # noqa: S101 - who has text has loaded one
        if self.messages is None and not self.text:
            raise UsageError("the prompt is empty", where=self.where)
        said = self._said(system)
        _refuse_surrogates(said, self.where)
        if self.text is not None and not chat:
            return tuple(tokenizer.encode(self.text))
        try:
            return tuple(tokenizer.encode_chat(said))
        except UsageError as error:
            raise UsageError(
                error.message, where=(self.where, *error.where), hint=error.hint
            ) from error

    def _said(self, system: str | None) -> list[Mapping[str, Any]]:
        """The conversation, with the system message."""
        said: list[Mapping[str, Any]] = [{"role": "user", "content": self.text}]
        if self.messages is not None:
            said = list(self.messages)
        if system is None:
            return said
        if any(one.get("role") == "system" for one in said):
            raise UsageError(
                "the conversation has a system message of its own",
                where=self.where,
                hint="leave --system away, or take the message out",
            )
        return [{"role": "system", "content": system}, *said]


def _refuse_surrogates(said: Sequence[Mapping[str, Any]], where: str) -> None:
    """Half of a UTF-16 pair: JSON can write it, and so come arguments that are not UTF-8."""
    try:
        json.dumps(said, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not Unicode text: {error.object[error.start]!a} is no character",
            where=where,
            hint="write it in UTF-8; JSON escapes a character beyond U+FFFF as a pair",
        ) from None


def given_prompts(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """Prompts of the command line, then those of a file.

    Args:
        texts: As they were given.
        file: One prompt a line; with the suffix .jsonl one JSON object a line. Empty lines are
            passed over, and so is a byte order mark.

    Raises:
        UsageError: BR001, there is none, the file cannot be read, or lines that are no prompts.
    """
    found = [
        Prompt(text=text, where=f"--prompt {number}") for number, text in enumerate(texts, start=1)
    ]
    if file is not None:
        found += _read(file)
    if not found:
        raise UsageError("there is no prompt", hint='give --prompt "..." or --prompts FILE')
    return found


def _read(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompts: {error}", where=str(file)) from None
    found, wrong = [], []
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        if file.suffix.lower() != ".jsonl":
            found.append(Prompt(text=line.removesuffix("\r"), where=where))
            continue
        try:
            found.append(_parse(json.loads(line), where))
        except (ValueError, RecursionError) as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        raise UsageError(f"{len(wrong)} lines are no prompts", where=wrong, hint=_FORMS)
    return found


def _parse(given: Any, where: str) -> Prompt:  # noqa: ANN401 - JSON
    match given:
        case {"prompt": str(text), **rest} if not rest:
            return Prompt(text=text, where=where)
        case {"messages": [_, *_] as messages, **rest} if not rest:
            if not all(isinstance(one, Mapping) for one in messages):
                raise ValueError("messages must be objects")
            return Prompt(messages=tuple(messages), where=where)
        case {"token_ids": [_, *_] as ids, **rest} if not rest:
            if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
                raise ValueError("token_ids must be integers")
            return Prompt(token_ids=tuple(ids), where=where)
    raise ValueError("neither prompt, messages nor token_ids alone")
