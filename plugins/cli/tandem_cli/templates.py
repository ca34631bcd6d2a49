# SPDX-License-Identifier: Apache-2.0
"""From a conversation to the text of a prompt, by the chat template of the model that the server runs.

No hub is asked. The template comes from the first of: what the user named, what the model's config names and exists on
this host, ChatML if the model's name belongs to a family that was trained on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tandem_protocol.errors import ConfigError, RequestError

CHATML_FAMILIES = ("qwen", "smollm", "hermes", "chatml")
"""Parts of model names that mean ChatML; a wrong template makes any other model talk nonsense, so nothing is guessed."""

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


class Template(Protocol):
    """Turns a conversation into a prompt that ends where the assistant begins to speak."""

    @property
    def name(self) -> str:
        """What `--json` reports: raw, chatml, or the path of the tokenizer or template."""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt. Raises RequestError if the template refuses the conversation."""


@dataclass(frozen=True)
class RawTemplate:
    """The last message as it is: for base models, and for prompts that are rendered already."""

    name: str = "raw"

    def render(self, messages: Sequence[Message]) -> str:
        """The last message."""
        return messages[-1].content


@dataclass(frozen=True)
class ChatMLTemplate:
    """https://github.com/openai/openai-python/blob/v0.28.1/chatml.md"""

    name: str = "chatml"

    def render(self, messages: Sequence[Message]) -> str:
        """Every turn between `<|im_start|>` and `<|im_end|>`."""
        turns = (f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n" for message in messages)
        return "".join(turns) + "<|im_start|>assistant\n"


@dataclass(frozen=True)
class TokenizerTemplate:
    """The template of a Hugging Face tokenizer, or `source` (Jinja) rendered with that tokenizer's special tokens."""

    name: str
    tokenizer: Any
    source: str | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """Leaves out a leading BOS that the server's tokenizer adds anyway: twice, it would change the answer."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = str(self.tokenizer.apply_chat_template(turns, chat_template=self.source, tokenize=False, add_generation_prompt=True))
        except Exception as exc:  # Jinja's own errors and whatever a template raises, all about the conversation
            raise RequestError(f"the chat template {self.name} refuses this conversation: {exc}") from exc
        bos = self.tokenizer.bos_token
        doubled = bool(bos) and text.startswith(bos) and list(self.tokenizer(text)["input_ids"][:2]) == [self.tokenizer.bos_token_id] * 2
        return text.removeprefix(bos) if doubled else text


def choose_template(
    parameters: Mapping[str, str], *, raw: bool = False, chatml: bool = False, tokenizer: str | None = None
) -> Template | None:
    """The template for a model whose config has these parameters; None when nothing tells which one is right."""
    if raw or chatml:
        return RawTemplate() if raw else ChatMLTemplate()
    if tokenizer is not None:
        return _required(Path(tokenizer))
    model = parameters.get("model", "")
    named = Path(parameters["chat_template_path"]) if parameters.get("chat_template_path") else None
    if named is not None and named.is_file():
        return _from_file(named, Path(model))
    for folder in (named, Path(model) if model else None):
        if folder is not None and (template := _from_folder(folder)) is not None:
            return template
    return ChatMLTemplate() if any(family in Path(model).name.lower() for family in CHATML_FAMILIES) else None


def _required(folder: Path) -> Template:
    template = _from_folder(folder)
    if template is None:
        raise ConfigError(f"--tokenizer {folder}: no tokenizer with a chat template there, give another model folder or --chatml")
    return template


def _from_folder(folder: Path) -> Template | None:
    """The folder's own template, or None if it has no tokenizer or its tokenizer has no template."""
    if not has_tokenizer(folder):
        return None
    loaded = load_tokenizer(folder)
    return TokenizerTemplate(str(folder), loaded) if loaded.chat_template else None


def _from_file(path: Path, model: Path) -> Template:
    folder = next((folder for folder in (path.parent, model) if has_tokenizer(folder)), None)
    if folder is None:
        raise ConfigError(f"chat template {path} needs the tokenizer's special tokens: put it into the model folder, or give --tokenizer")
    return TokenizerTemplate(str(path), load_tokenizer(folder), path.read_text(encoding="utf-8"))


def has_tokenizer(folder: Path) -> bool:
    """Whether a local folder holds a Hugging Face tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any:
    """Loads it from the folder alone. AutoTokenizer imports torch (4 s of CPU), the fast class does not; folders without
    tokenizer.json need the former."""
    try:
        if (folder / "tokenizer.json").exists():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as exc:  # transformers raises OSError, ValueError, KeyError ... for a broken folder
        raise ConfigError(f"the tokenizer in {folder} does not load ({exc}): mend the folder, or give another with --tokenizer") from exc
