"""Between words and tokens: the tokenizer of the Hugging Face model, its chat template, its ends.

Text appears piece by piece as tokens come. A token may hold half a character; it waits for the
other half, so the pieces together are the text that all tokens give at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from bridge.errors import CheckpointError, ConfigError, UsageError
from bridge.storage.input_files import refuse_link_out
from bridge.storage.remote import Location
from bridge.storage.target import read_small_file
from bridge.strict_json import parse_json

_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_REMEDY: Final = (
    "pass --hf-model with a directory that has tokenizer.json; or give token ids in a .jsonl file "
    'for --prompts: {"token_ids": [...]}'
)
_OWN_CODE: Final = "trust_remote_code"
"""What transformers asks for where a tokenizer is code of the checkpoint's."""
_END: Final = "eos_token_id"
_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token of one byte, as tokenizers have them that fall back to bytes for unknown characters."""
_BROKEN: Final = "\ufffd"
"""What stands for bytes that are no character."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation, as chat templates take it: `[{"role": "user", "content": "..."}]`."""


class Tokenizer:
    """A model's tokenizer, loaded by transformers.

    Args:
        directory: Of the model: a Hugging Face checkpoint, or what an import kept of one.

    Raises:
        CheckpointError: BR300, none is there, transformers cannot load it, it needs code of its
            own, or it has no words.
        UnsafeFileError: BR307, a file there is a link to somewhere else.
    """

    def __init__(self, directory: Path) -> None:
        if not any((directory / name).is_file() for name in _FILES):
            raise CheckpointError(
                "there is no tokenizer, and a model knows tokens, not words",
                where=str(directory),
                hint=_REMEDY,
            )
        for path in directory.iterdir():  # transformers opens them by itself
            refuse_link_out(path)
        from transformers import AutoTokenizer

        import bridge.decilm  # noqa: F401 - some tokenizers ask for the model's configuration

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the errors of tokenizers are bare Exceptions
            if _OWN_CODE in str(error):
                raise CheckpointError(
                    "the tokenizer needs Python code of the checkpoint's own, which is never run",
                    where=str(directory),
                    hint=_REMEDY,
                ) from error
            raise CheckpointError(
                f"transformers cannot load the tokenizer: {type(error).__name__}: {error}",
                where=str(directory),
                hint="the tokenizer's files must be those of the model; copy them again",
            ) from error
        # transformers makes one of a class's name alone, which takes no text for anything.
        if len(self._tokenizer) <= len(self._tokenizer.all_special_tokens):
            raise CheckpointError(
                "the tokenizer has no words, only what begins and ends a text",
                where=str(directory),
                hint="its model file is missing: copy tokenizer.json or tokenizer.model there",
            )

    @classmethod
    def of(cls, directory: Path | None) -> Tokenizer:
        """That of a directory, if it is known.

        Raises:
            CheckpointError: BR300, as above.
        """
        if directory is None:
            raise CheckpointError(
                "the checkpoint has kept no tokenizer: nobody imported it from Hugging Face",
                hint=_REMEDY,
            )
        return cls(directory)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with what this tokenizer puts before each."""
        found: list[int] = self._tokenizer(text)["input_ids"]
        return found

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation by the model's chat template, up to where it answers.

        Raises:
            UsageError: BR001, there is no template, or it does not take these messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise UsageError(
                f"the chat template cannot write these messages: {error}",
                where=json.dumps(list(messages), ensure_ascii=False)[:200],
                hint="messages are role and content, as the model's card describes them; a model "
                "without a template takes plain prompts, without --chat",
            ) from error
        # The template has written what begins a text.
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, those that only steer a conversation left out."""
        found: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return found

    def stream(self) -> TextStream:
        """A text that is to grow token by token."""
        return TextStream(self)

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a text, if there is one."""
        found: int | None = self._tokenizer.eos_token_id
        return found


class TextStream:
    """A text that grows token by token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        backend = getattr(tokenizer._tokenizer, "backend_tokenizer", None)  # noqa: SLF001 - its other half
        self._tokenizer, self._backend = tokenizer, backend
        self._token_ids: list[int] = []
        self._shown = ""
        self._stream: Any = None
        if backend is not None:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=True)

    def put(self, token_id: int) -> str:
        """Add a token; what can be shown since. Nothing before the end without a fast tokenizer."""
        self._token_ids.append(token_id)
        if self._backend is None:
            return ""
        is_byte = _BYTE.fullmatch(self._backend.id_to_token(token_id) or "") is not None
        piece = self._step(token_id, is_byte=is_byte)
        self._shown += piece
        return piece

    def _step(self, token_id: int, *, is_byte: bool) -> str:
        if is_byte:
            # A run of bytes is text only as a whole: one wrong byte at its end makes each of them
            # U+FFFD, so what its first bytes give is not to be shown, and DecodeStream shows it.
            self._stream = None
            return ""
        if self._stream is not None:
            try:
                piece: str | None = self._stream.step(self._backend, token_id)
            except Exception:  # noqa: BLE001 - a bare one, where the text does not only grow
                self._stream = None
            else:
                return piece or ""
        if not self._tokenizer.decode([token_id]):
            return ""  # it is left out, and bytes on either side of it are one run
        settled = self.text.rstrip(_BROKEN)
        return settled.removeprefix(self._shown) if settled.startswith(self._shown) else ""

    def end(self) -> str:
        """What is left to show: half a character that never became whole.

        Where what has been shown is not how the text begins, all from where they part.
        """
        text = self.text
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, self._shown)))  # noqa: B905 - one is longer
        return text[same:]

    @property
    def text(self) -> str:
        """All of it."""
        return self._tokenizer.decode(self._token_ids)


def stop_token_ids(
    directory: Location | None, config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> frozenset[int]:
    """The tokens that end a text: by generation_config.json, or config.json, or the tokenizer.

    Args:
        directory: Where generation_config.json may be.
        config: The model's config.json.
        tokenizer: If there is one.

    Raises:
        ConfigError: BR100, a file that says something else than ids.
    """
    found: object = None
    if directory is not None and (path := directory / "generation_config.json").is_file():
        try:
            found = parse_json(read_small_file(path)).get(_END)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"not a generation configuration: {error}", where=str(path)) from None
    if found is None:
        found = config.get(_END)
    if found is None and tokenizer is not None:
        found = tokenizer.end_of_text
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
        raise ConfigError(
            f"{_END} is {found!r}", where=str(directory), hint="it is an id or a list of ids"
        )
    return frozenset(ids)
