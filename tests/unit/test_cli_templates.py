# SPDX-License-Identifier: Apache-2.0
"""Which chat template a prompt gets, and what it makes of a conversation."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tandem_cli import templates
from tandem_cli.templates import ChatMLTemplate, Message, RawTemplate, TokenizerTemplate, choose_template
from tandem_protocol.errors import ConfigError, RequestError

TURNS = [Message("system", "Be brief."), Message("user", "Hi")]


@dataclass
class FakeTokenizer:
    """A tokenizer whose template puts BOS in front; `adds_bos` tells whether tokenizing does so too."""

    chat_template: str | None = "own"
    bos_token: str | None = "<s>"
    bos_token_id: int = 1
    adds_bos: bool = True

    def apply_chat_template(
        self, turns: Sequence[dict[str, str]], *, chat_template: str | None, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Renders; refuses what real templates refuse."""
        assert not tokenize
        assert add_generation_prompt
        if turns[0]["role"] == "system":
            raise ValueError("system role not supported")
        return f"{self.bos_token or ''}[{chat_template or self.chat_template}]" + "".join(turn["content"] for turn in turns)

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Token 1 for each BOS, 2 for the rest."""
        own = [1] if self.bos_token and text.startswith(self.bos_token) else []
        return {"input_ids": ([1] if self.adds_bos else []) + own + [2]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with a tokenizer, which loads as a FakeTokenizer."""
    (tmp_path / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr(templates, "load_tokenizer", lambda _: FakeTokenizer())
    return tmp_path


def test_tokenizer_of_the_user_wins_over_the_servers_model(folder: Path) -> None:
    """What was asked for on the command line is used, and its path is the name that --json shows."""
    chosen = choose_template({"model": "Qwen/Qwen3-8B"}, tokenizer=str(folder))
    assert chosen is not None
    assert chosen.name == str(folder)


def test_model_folder_of_the_server_is_used_when_it_is_here(folder: Path) -> None:
    """On the server's own host its model folder has the right template."""
    assert isinstance(choose_template({"model": str(folder)}), TokenizerTemplate)


def test_template_file_is_rendered_with_the_models_tokenizer(folder: Path) -> None:
    """`chat_template_path` overrides the tokenizer's own template."""
    path = folder / "custom.jinja"
    path.write_text("custom")
    chosen = choose_template({"model": str(folder), "chat_template_path": str(path)})
    assert chosen is not None
    assert chosen.render(TURNS[1:]) == "[custom]Hi"


def test_template_file_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    """Without special tokens a template would render wrong text in silence."""
    path = tmp_path / "custom.jinja"
    path.write_text("custom")
    with pytest.raises(ConfigError, match="special tokens"):
        choose_template({"chat_template_path": str(path)})


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M-Instruct", "/models/Qwen3-8B", "Hermes-3-Llama-3.1-8B"])
def test_families_trained_on_chatml_get_chatml(model: str) -> None:
    """A model of another host is told by its name."""
    assert choose_template({"model": model}) == ChatMLTemplate()


@pytest.mark.parametrize("parameters", [{}, {"model": ""}, {"model": "meta-llama/Llama-3.1-8B-Instruct"}, {"model": "/qwen/gemma"}])
def test_nothing_is_guessed_for_other_models(parameters: dict[str, str]) -> None:
    """A wrong template is worse than none; a parent folder's name is no evidence."""
    assert choose_template(parameters) is None


def test_tokenizer_without_a_template_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model has no chat template, so that none is used, unless the user named that folder."""
    monkeypatch.setattr(templates, "load_tokenizer", lambda _: FakeTokenizer(chat_template=None))
    assert choose_template({"model": str(folder)}) is None
    with pytest.raises(ConfigError, match="--tokenizer"):
        choose_template({}, tokenizer=str(folder))


def test_tokenizer_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A misspelt path doesn't fall through to another template."""
    with pytest.raises(ConfigError, match="no tokenizer"):
        choose_template({"model": "qwen"}, tokenizer=str(tmp_path / "nope"))


def test_broken_tokenizer_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own exceptions never reach the user. A fake one, since importing it costs seconds."""

    def refuse(path: str, *, local_files_only: bool) -> None:
        assert local_files_only
        raise OSError(f"{path} is not a tokenizer")

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=refuse)))
    (tmp_path / "tokenizer_config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="does not load"):
        choose_template({"model": str(tmp_path)})


def test_flags_win_over_everything(folder: Path) -> None:
    """--raw and --chatml look at nothing else."""
    assert choose_template({"model": str(folder)}, raw=True) == RawTemplate()
    assert choose_template({"model": str(folder)}, chatml=True) == ChatMLTemplate()


def test_chatml_ends_where_the_assistant_begins() -> None:
    """Every turn is closed, the assistant's is open."""
    assert ChatMLTemplate().render(TURNS) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("adds_bos", "text"), [(True, "[own]Hi"), (False, "<s>[own]Hi")])
def test_bos_is_never_doubled_and_never_lost(adds_bos: bool, text: str) -> None:
    """The server tokenizes the text again, so BOS stays exactly where tokenizing doesn't add it."""
    assert TokenizerTemplate("x", FakeTokenizer(adds_bos=adds_bos)).render(TURNS[1:]) == text


def test_tokenizer_without_bos_changes_nothing() -> None:
    """Many models have no BOS at all."""
    assert TokenizerTemplate("x", FakeTokenizer(bos_token=None)).render(TURNS[1:]) == "[own]Hi"


def test_conversation_that_the_template_refuses_is_a_request_error() -> None:
    """Some templates take no system message; the sentence says so."""
    with pytest.raises(RequestError, match="system role not supported"):
        TokenizerTemplate("x", FakeTokenizer()).render(TURNS)
