"""Rendering exchanges with the base model's chat template: the exact prompt that a model reads, and the answer that it
should write before it stops.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ft_dagster.base.model_folder import chat_template, tokenizer_config
from ft_dagster.config.recipe_file import RecipeError
from ft_dagster.dataset.tokenizer import comparable, token_text

Message = Mapping[str, str]
"""A message with the keys `role` and `content`."""
CONTROL = "control token in its pair"
CHANGED = "changed by the chat template"
NOT_IN_VOCABULARY = "not in the tokenizer's vocabulary"
_TESTS_FOR_CLOCK = re.compile(r"strftime_now\s+is\s+(not\s+)?defined")
_DATE = datetime(2026, 1, 1)
"""What every template reads from the clock."""


@dataclass(frozen=True)
class EncodedExchange:
    """A request and its answer as tokens."""

    prompt: list[int]
    """The tokens that generation starts from."""
    answer: list[int]
    """The tokens that should be generated; the last one is a token that generation stops at."""
    text: str
    """The answer as text, without its stop token."""


class ChatTokenizer:
    """Renders and encodes exchanges as transformers does, without importing it.

    Only the template may write control tokens: a text that contains one is refused, and so is a text that the template
    or the vocabulary does not reproduce.
    """

    def __init__(self, folder: Path, without: str = "objectives: {rewrite: 0}") -> None:
        """Read the template, `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` of a model.

        Args:
            folder: the folder of the model.
            without: the recipe setting with which no template is needed, for error messages.

        Raises:
            RecipeError: the model has no chat template, or one that cannot be parsed.
        """
        self._folder, self._without = folder, without
        source = chat_template(folder)
        if not source:
            raise RecipeError(
                f"The base model has no chat template ({folder} has no chat_template.jinja). Use an instruct model, or "
                f"set `{without}`."
            )
        with self._template_errors():
            self._template = _environment(source).from_string(source)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = tokenizer_config(folder)
        self._variables = {name: token_text(value) for name, value in config.items() if name.endswith("_token")}
        self._ends = self._stop_tokens(config)
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        self._control = re.compile("|".join(re.escape(token) for token in special) or "(?!)")

    def encode(self, exchanges: Sequence[tuple[str | Sequence[Message], str]]) -> list[EncodedExchange | str]:
        """Encode exchanges, each of a request (or a conversation up to an answer) and the answer.

        Returns:
            For each exchange its tokens, or the reason why it cannot be taught.

        Raises:
            RecipeError: the template cannot render a request and an answer, or it starts an answer differently from how
                it ends the prompt for one.
        """
        rendered = [self._render(*exchange) for exchange in exchanges]
        good = [pair for pair in rendered if not isinstance(pair, str)]
        prompts = self._encode([prompt for prompt, _ in good])
        wholes = self._encode([prompt + answer for prompt, answer in good])
        encoded = (self._exchange(*row) for row in zip(good, prompts, wholes, strict=True))
        return [pair if isinstance(pair, str) else next(encoded) for pair in rendered]

    def _render(self, request: str | Sequence[Message], answer: str) -> tuple[str, str] | str:
        """Return the prompt and the answer with its stop token as text, or the reason why they cannot be taught."""
        asked = [{"role": "user", "content": request}] if isinstance(request, str) else list(request)
        if any(self._control.search(text) for text in (answer, *(message["content"] for message in asked))):
            return CONTROL
        with self._template_errors():
            prompt = self._template.render(**self._context(asked), add_generation_prompt=True)
            answered = [*asked, {"role": "assistant", "content": answer}]
            whole = self._template.render(**self._context(answered), add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise RecipeError(
                f"The base model's chat template ({self._folder}) starts an answer differently from how it ends the "
                f"prompt for one. Use another base model, or set `{self._without}`."
            )
        place = whole.find(answer, len(prompt))
        if place < 0:
            return CHANGED
        after = place + len(answer)
        found = [(at, end) for end in self._ends if (at := whole.find(end, after)) >= 0]
        stop, end = min(found) if found else (after, self._ends[0])
        return prompt, whole[len(prompt) : stop] + end

    def _exchange(self, rendered: tuple[str, str], prompt: list[int], whole: list[int]) -> EncodedExchange | str:
        """Return the exchange whose answer is the tokens of the full text after those of the prompt.

        If a token spans the end of the prompt, the answer is encoded separately.
        """
        prompt_text, text = rendered
        same = whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :] if same else self._encode([text])[0]
        if not (self._round_trips(prompt, prompt_text) and self._round_trips(answer, text)):
            return NOT_IN_VOCABULARY
        return EncodedExchange(prompt, answer, text.removesuffix(self._tokenizer.id_to_token(answer[-1]) or ""))

    def _round_trips(self, ids: list[int], text: str) -> bool:
        return comparable(self._tokenizer.decode(ids, skip_special_tokens=False)) == comparable(text)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _context(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {**self._variables, "messages": messages, "tools": None, "documents": None}

    def _stop_tokens(self, config: Mapping[str, Any]) -> list[str]:
        """Return the tokens that generation stops at, the tokenizer's own end-of-sequence token first."""
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


def _environment(source: str) -> ImmutableSandboxedEnvironment:
    """Return the environment that templates are written for: that of transformers' `apply_chat_template` (5.23).

    The environment of transformers also has a clock, `strftime_now`. Here the clock stands still, because a prompt that
    changes every day would result in another dataset every day. Templates that test whether there is a clock do not get
    it, and write the default date that they contain.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    if not _TESTS_FOR_CLOCK.search(source):
        environment.globals["strftime_now"] = _DATE.strftime
    return environment


class _Generation(jinja2.ext.Extension):
    """Renders the content of `{% generation %}...{% endgeneration %}`, with which some templates mark an answer."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it like this

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
    """Return JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, **{"ensure_ascii": False} | options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
