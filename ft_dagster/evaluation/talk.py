"""Let base and adapter continue a text or answer a message side by side, or hold a conversation with one of them."""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ft_dagster.errors import UserError
from ft_dagster.evaluation.request import TalkRequest
from ft_dagster.model.adapter import load_for_use

NAMES = ("base", "adapter")
_ADAPTERS = ["__base__", "default"]
"""Names of the base and the adapter in peft."""
_HELP = "/reset starts a new conversation, /base and /adapter switch between the two models, /exit or Ctrl-D quits."


def talk(request: TalkRequest, console: Console) -> None:
    """Load the models and let them write what the request asks for.

    Raises:
        TalkError: the base model has no chat template, but the request needs one.
        AdapterError, BaseModelError: the adapter or its base cannot be loaded.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with console.status("Loading ..."):
        base, recipe = request.prepared_base(), request.resolved_recipe()
        model = load_for_use(base, recipe, Path(request.adapter), Path(request.offload))
        tokenizer = AutoTokenizer.from_pretrained(request.adapter, trust_remote_code=False)
    if request.seed is not None:
        set_seed(request.seed)
    if request.prompt is None:
        chat(model, tokenizer, request, console)
        return
    answers = generate(model, tokenizer, request)
    if request.as_json:
        print(json.dumps(answers, ensure_ascii=False, indent=1))  # noqa: T201


class TalkError(UserError):
    """The model cannot be used in this way; the message gives the reason."""


def generate(model: PeftModel, tokenizer: PreTrainedTokenizerBase, request: TalkRequest) -> dict[str, str]:
    """Return what base and adapter write after a prompt, and show it side by side while they write.

    Both are in one batch, in which the base's row has the adapter switched off (peft's `adapter_names`), so that the
    weights are read only once per token for both.

    Returns:
        The texts, by name.
    """
    assert request.prompt is not None
    ids = _encode(tokenizer, request.prompt, request.as_chat)
    writing = _SideBySide(tokenizer)
    console = Console()
    if request.as_json or not console.is_terminal:
        _write_both(model, tokenizer, ids, request, writing)
        if not request.as_json:
            for name, text in writing.texts.items():
                console.print(Text(f"{name}: {text.strip()}"), soft_wrap=True)
        return writing.texts
    with Live(console=console, refresh_per_second=8, vertical_overflow="visible") as live:
        writing.show = lambda texts: live.update(_panels(texts, console.width))
        _write_both(model, tokenizer, ids, request, writing)
        live.update(_panels(writing.texts, console.width))
    return writing.texts


def _write_both(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    request: TalkRequest,
    writing: "_SideBySide",
) -> None:
    if request.resolved_recipe().lora.dora:  # peft does not support batches of several adapters for it
        for row, name in enumerate(_ADAPTERS):
            writing.begin([row])
            with model.disable_adapter() if name == _ADAPTERS[0] else nullcontext():
                _write(model, tokenizer, ids, request, writing)
    else:
        writing.begin([0, 1])
        _write(model, tokenizer, ids.repeat(2, 1), request, writing, adapter_names=_ADAPTERS)


def chat(model: PeftModel, tokenizer: PreTrainedTokenizerBase, request: TalkRequest, console: Console) -> None:
    """Hold a conversation with the adapter or the base on standard input and output, until the user ends it."""
    if not tokenizer.chat_template:
        raise TalkError("The base model has no chat template. `ft-dagster generate` continues a text with it.")
    console.print(_HELP, style="dim")
    messages: list[dict[str, str]] = []
    with_adapter = True
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        if said in ("/exit", "/quit"):
            return
        if said == "/reset":
            messages = []
        elif said in ("/base", "/adapter"):
            with_adapter = said == "/adapter"
        elif said.startswith("/"):
            console.print(_HELP, style="dim")
        elif said:
            messages.append({"role": "user", "content": said})
            messages.append(
                {"role": "assistant", "content": _answer(model, tokenizer, messages, request, with_adapter)}
            )


def _answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Iterable[dict[str, str]],
    request: TalkRequest,
    with_adapter: bool,
) -> str:
    ids = _template(tokenizer, messages)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with nullcontext() if with_adapter else model.disable_adapter():
        written = _write(model, tokenizer, ids, request, streamer)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@torch.inference_mode()
def _write(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    request: TalkRequest,
    streamer: BaseStreamer,
    **more: Any,
) -> torch.Tensor:
    sampled = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
    ids = ids.to(model.device)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.new_tokens,
        repetition_penalty=request.repetition_penalty,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=True,
        streamer=streamer,
        **(sampled if request.temperature else {"do_sample": False}),
        **more,
    )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, as_chat: bool) -> torch.Tensor:
    """Return the tokens of a prompt, (1, T). Special tokens that are spelled out in the prompt stay text."""
    if as_chat:
        if not tokenizer.chat_template:
            raise TalkError("The base model has no chat template; leave out --chat.")
        return _template(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer(prompt, return_tensors="pt", split_special_tokens=True)["input_ids"]


def _template(tokenizer: PreTrainedTokenizerBase, messages: Iterable[dict[str, str]]) -> torch.Tensor:
    found = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return found["input_ids"]


class _SideBySide(BaseStreamer):
    """Collect the texts of several rows while they grow, each up to its end-of-sequence token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[list[int]] = [[] for _ in NAMES]
        self.show: Any = None

    def begin(self, rows: list[int]) -> None:
        """Assign the rows of the next batch to texts. The first tokens of a batch are its prompt."""
        self.rows, self.prompt_is_next = rows, True

    @property
    def texts(self) -> dict[str, str]:
        return {
            name: str(self.tokenizer.decode(ids, skip_special_tokens=True))
            for name, ids in zip(NAMES, self.ids, strict=True)
        }

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        for row, token in zip(self.rows, value.tolist(), strict=True):
            ids = self.ids[row]
            if not ids or ids[-1] != self.tokenizer.eos_token_id:
                ids.append(token)
        if self.show is not None:
            self.show(self.texts)

    def end(self) -> None:
        """Do nothing, because no text is held back."""


def _panels(texts: dict[str, str], width: int) -> Columns:
    each = max(20, width // 2 - 1)
    return Columns([Panel(Text(text.strip()), title=name, width=each) for name, text in texts.items()])
