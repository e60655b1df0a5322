"""Texts become tokens as transformers has it, and tokens become text piece by piece."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import (
    Tokenizer as Backend,
)
from tokenizers import (
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from bridge.errors import CheckpointError, ConfigError, UsageError
from bridge.generation.text import Tokenizer, stop_token_ids

TEXTS = [
    "The model said: it's fine , isn't it ?",
    "Größe, naïve café, 東京は夜の七時, мир, 🙂🙃 and 👩‍👩‍👧 end",
    " leading space\n\nand lines\t",
    "🙂",
]
TEMPLATE = (
    "<s>{% for one in messages %}[{{ one.role }}]{{ one.content }}{% endfor %}"
    "{% if messages[0].role == 'tool' %}{{ raise_exception('tools come later') }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


NESTED = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"


def write_tokenizer(directory: Path, *, template: str | None = TEMPLATE) -> None:
    """A byte-level BPE as Llama 3 has one: a text begins with <s>, and a token may be one byte."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "[assistant]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXTS[0]], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": True,
    }
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The one above."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer(directory)


def test_texts_begin_as_the_tokenizer_says_and_come_back(tokenizer: Tokenizer) -> None:
    """Spaces before commas stay: nothing is cleaned up, whatever the settings say."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == 0
        assert ids.count(0) == 1
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer.encode("end"), 1]) == "end"
    assert tokenizer.end_of_text == 1


def test_a_chat_is_written_by_the_template(tokenizer: Tokenizer) -> None:
    """Up to where the model answers, and without a second beginning."""
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    ids = tokenizer.encode_chat(messages)
    assert (ids[0], ids[-1], ids.count(0)) == (0, 2, 1)
    assert tokenizer.decode(ids) == "[system]be brief[user]1+1?"


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Tokenizer, text: str) -> None:
    """A character of several tokens appears with its last one."""
    ids = [*tokenizer.encode(text)[1:], 1]
    assert len(ids) > len(text.split())
    stream = tokenizer.stream()
    pieces = [stream.put(one) for one in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert stream.end() == ""
    assert stream.text == text


def test_half_a_character_appears_at_the_end(tokenizer: Tokenizer) -> None:
    """Where nothing more comes, it is what all tokens give at once."""
    ids = tokenizer.encode("so 🙂")[1:-1]
    stream = tokenizer.stream()
    shown = "".join(stream.put(one) for one in ids)
    assert shown == "so "
    assert shown + stream.end() == tokenizer.decode(ids) == stream.text
    assert stream.end().strip("\ufffd") == ""
    assert stream.end()


def test_pieces_of_bytes_are_the_text_too(tmp_path: Path) -> None:
    """As Llama 2 falls back to bytes: whatever comes after them can change what they mean."""
    words = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a", "b", "\ufffd"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab, [("\u2581", "a")], byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(words[:3])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    draw = random.Random(0)  # noqa: S311 - tests
    halves = [[vocab[f"<0x{byte:02X}>"] for byte in one.encode()] for one in ("東", "é", "🙂")]
    for _ in range(200):
        ids: list[int] = []
        for _ in range(draw.randrange(1, 12)):
            whole = draw.choice([*halves, *([one] for one in range(len(words)))])
            ids += whole[: draw.randrange(1, len(whole) + 1)]
        stream = tokenizer.stream()
        pieces = [stream.put(one) for one in ids]
        assert "".join(pieces) + stream.end() == tokenizer.decode(ids), ids
    stream = tokenizer.stream()
    ids = [vocab["\u2581a"], *halves[0], vocab["b"], vocab["a"]]
    assert [stream.put(one) for one in ids] == ["a", "", "", "", "東b", "a"]


def test_random_tokens_are_the_text_in_pieces(tokenizer: Tokenizer) -> None:
    """Those of whole bytes, half characters and special tokens among them."""
    draw = random.Random(0)  # noqa: S311 - tests
    for _ in range(100):
        ids = [draw.randrange(300) for _ in range(draw.randrange(1, 20))]
        stream = tokenizer.stream()
        pieces = [stream.put(one) for one in ids]
        assert "".join(pieces) + stream.end() == tokenizer.decode(ids), ids


def test_a_directory_without_a_tokenizer_is_said_to_have_none(tmp_path: Path) -> None:
    """With what helps; and so is a checkpoint that has no directory."""
    for directory in (tmp_path, None):
        with pytest.raises(CheckpointError, match="no tokenizer") as caught:
            Tokenizer.of(directory)
        assert "--hf-model" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "no words, only what begins and ends"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "no words, only what begins and ends"),
        (
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
            "needs Python code of the checkpoint's own",
        ),
    ],
)
def test_settings_alone_are_no_tokenizer(
    tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    """A class that transformers has, without its model file; and one that nobody runs here."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=said) as caught:
        Tokenizer(tmp_path)
    assert "trust_remote_code" not in str(caught.value)
    assert "tokenizer.json" in (caught.value.hint or "")


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]"])
def test_a_damaged_tokenizer_is_an_error_of_its_directory(tmp_path: Path, content: str) -> None:
    """No traceback: the libraries raise whatever they like."""
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer") as caught:
        Tokenizer(tmp_path)
    assert caught.value.where == (str(tmp_path),)


def test_a_chat_that_cannot_be_written_is_bad_usage(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """No template, a template that refuses, a template that is none."""
    user = [{"role": "user", "content": "hi"}]
    with pytest.raises(UsageError, match="tools come later"):
        tokenizer.encode_chat([{"role": "tool", "content": "hi"}])
    write_tokenizer(tmp_path / "without", template=None)
    with pytest.raises(UsageError, match="chat template"):
        Tokenizer(tmp_path / "without").encode_chat(user)
    write_tokenizer(tmp_path / "broken", template="{% for %}")
    with pytest.raises(UsageError, match="chat template") as caught:
        Tokenizer(tmp_path / "broken").encode_chat(user)
    assert caught.value.where == ('[{"role": "user", "content": "hi"}]',)
    for n, template in enumerate(["{{ 1 // 0 }}", "{{ 2.0 ** 9999 }}", "{{ ''.join(5) }}", NESTED]):
        write_tokenizer(tmp_path / f"{n}", template=template)
        with pytest.raises(UsageError, match="chat template"):
            Tokenizer(tmp_path / f"{n}").encode_chat(user)


def test_ends_are_those_of_the_generation_configuration(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Then of config.json, then of the tokenizer; an id or a list of them."""
    assert stop_token_ids(tmp_path, {}, None) == frozenset()
    assert stop_token_ids(None, {}, tokenizer) == {1}
    assert stop_token_ids(tmp_path, {"eos_token_id": 7}, tokenizer) == {7}
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [8, 9, 4]}')
    assert stop_token_ids(tmp_path, {"eos_token_id": 7}, tokenizer) == {4, 8, 9}
    file.write_text('{"do_sample": true}')
    assert stop_token_ids(tmp_path, {"eos_token_id": [7]}, tokenizer) == {7}


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}']
)
def test_ends_that_are_no_ids_are_refused(tmp_path: Path, content: str) -> None:
    """A text that never ends would be the other answer."""
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        stop_token_ids(tmp_path, {}, None)
    assert str(tmp_path) in caught.value.where[0]
