"""The base's chat template: exactly what a model reads when it is asked, and what it should write before it stops."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ft_dagster.base.prepare import chat_template, tokenizer_config
from ft_dagster.config.recipe import RecipeError
from ft_dagster.dataset.tokenizer import comparable, token_text

Message = Mapping[str, str]
"""`role` and `content`."""
CONTROL = "control token in its pair"
CHANGED = "changed by the chat template"
NOT_IN_VOCABULARY = "not in the tokenizer's vocabulary"


@dataclass(frozen=True)
class EncodedExchange:
    """A request and its answer as tokens."""

    prompt: list[int]
    """What generation begins with."""
    answer: list[int]
    """What it should go on with; the last token is one that generation stops at."""
    text: str
    """The answer as text, without the token that ends it."""


class ChatTokenizer:
    """Renders and encodes exchanges as transformers does, without importing it.

    Control tokens are those that the template writes: a text that spells one is refused, as is one that the template
    or the vocabulary does not give back.
    """

    def __init__(self, folder: Path, without: str = "objectives: {rewrite: 0}") -> None:
        """Read the template, `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` of a model.

        Args:
            folder: the model's.
            without: what to write in a recipe to do without the template, for errors.

        Raises:
            RecipeError: it has no chat template, or one that cannot be read.
        """
        self._folder, self._without = folder, without
        source = chat_template(folder)
        if not source:
            raise RecipeError(
                f"The base model has no chat template ({folder} has no chat_template.jinja). Use an instruct model, or "
                f"set `{without}`."
            )
        with self._template_errors():
            self._template = _environment().from_string(source)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = tokenizer_config(folder)
        self._variables = {name: token_text(value) for name, value in config.items() if name.endswith("_token")}
        self._ends = self._stop_tokens(config)
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        self._control = re.compile("|".join(re.escape(token) for token in special) or "(?!)")

    def encode(self, exchanges: Sequence[tuple[str | Sequence[Message], str]]) -> list[EncodedExchange | str]:
        """Tokens of (request, or a conversation up to an answer; the answer), or the reason why it cannot be taught.

        Raises:
            RecipeError: the template cannot render a request and an answer, or does not begin an answer as it begins
                one that is to be generated.
        """
        rendered = [self._render(*exchange) for exchange in exchanges]
        good = [pair for pair in rendered if not isinstance(pair, str)]
        prompts = self._encode([prompt for prompt, _ in good])
        wholes = self._encode([prompt + answer for prompt, answer in good])
        encoded = (self._exchange(*row) for row in zip(good, prompts, wholes, strict=True))
        return [pair if isinstance(pair, str) else next(encoded) for pair in rendered]

    def _render(self, request: str | Sequence[Message], answer: str) -> tuple[str, str] | str:
        """The prompt and what follows it up to the token that ends it, as text."""
        asked = [{"role": "user", "content": request}] if isinstance(request, str) else list(request)
        if any(self._control.search(text) for text in (answer, *(message["content"] for message in asked))):
            return CONTROL
        with self._template_errors():
            prompt = self._template.render(**self._given(asked), add_generation_prompt=True)
            answered = [*asked, {"role": "assistant", "content": answer}]
            whole = self._template.render(**self._given(answered), add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise RecipeError(
                f"The base model's chat template ({self._folder}) begins an answer otherwise than a prompt for one "
                f"ends. Use another base model, or set `{self._without}`."
            )
        place = whole.find(answer, len(prompt))
        if place < 0:
            return CHANGED
        after = place + len(answer)
        found = [(at, end) for end in self._ends if (at := whole.find(end, after)) >= 0]
        stop, end = min(found) if found else (after, self._ends[0])
        return prompt, whole[len(prompt) : stop] + end

    def _exchange(self, rendered: tuple[str, str], prompt: list[int], whole: list[int]) -> EncodedExchange | str:
        """Of tokens of the whole, those after the prompt; where text of both is one token, the answer's own tokens."""
        prompt_text, text = rendered
        same = whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :] if same else self._encode([text])[0]
        if not (self._gives_back(prompt, prompt_text) and self._gives_back(answer, text)):
            return NOT_IN_VOCABULARY
        return EncodedExchange(prompt, answer, text.removesuffix(self._tokenizer.id_to_token(answer[-1]) or ""))

    def _gives_back(self, ids: list[int], text: str) -> bool:
        return comparable(self._tokenizer.decode(ids, skip_special_tokens=False)) == comparable(text)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _given(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {**self._variables, "messages": messages, "tools": None, "documents": None}

    def _stop_tokens(self, config: Mapping[str, Any]) -> list[str]:
        """The tokens that generation stops at, the tokenizer's own end first."""
        file = self._folder / "generation_config.json"
        stops = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else None
        ids = stops if isinstance(stops, list) else [stops]
        named = [self._tokenizer.id_to_token(number) for number in ids if number is not None]
        own = token_text(config.get("eos_token"))
        known = [token for token in named if token] or [own]
        return sorted(known, key=lambda token: token != own)

    @contextmanager
    def _template_errors(self) -> Iterator[None]:
        try:
            yield
        except jinja2.TemplateError as error:
            raise RecipeError(
                f"The base model's chat template ({self._folder}) fails ({error}). Use another base model, or set "
                f"`{self._without}`."
            ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: the environment of transformers' `apply_chat_template` (5.23).

    It has a clock there, too. A prompt that changes every day would be another dataset every day, so here it has
    none, and templates that ask whether there is one write the date that they have for that.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, with which some templates mark an answer: its content as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
    """Without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(value, **{"ensure_ascii": False} | options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
