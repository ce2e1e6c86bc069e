"""Base and adapter answer side by side, also in a conversation."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ft_dagster.evaluation.request import TalkRequest
from ft_dagster.evaluation.samples import continue_prompt
from ft_dagster.evaluation.talk import TalkError, chat, generate
from ft_dagster.model.adapter import load_for_use
from ft_dagster.training.request import TrainingRequest

PROMPT = "The committee met"


@pytest.fixture
def make_request(trained: Callable[..., TrainingRequest], tmp_path: Path) -> Callable[..., TalkRequest]:
    """Train an adapter and build a request to talk to it; keyword arguments change the recipe's lora part."""

    def make(**lora: Any) -> TalkRequest:
        request = trained(lora=lora)
        adapter = str(Path(request.attempt) / "adapter")
        return TalkRequest(
            request.base, request.recipe, adapter, str(tmp_path / "offload"), PROMPT, as_json=True, new_tokens=24
        )

    return make


def loaded(request: TalkRequest) -> tuple[Any, Any]:
    base, recipe = request.prepared_base(), request.resolved_recipe()
    model = load_for_use(base, recipe, Path(request.adapter), Path(request.offload))
    return model, AutoTokenizer.from_pretrained(request.adapter)


@pytest.mark.parametrize("lora", [{}, {"dora": True}], ids=["lora", "dora"])
def test_base_and_adapter_write_together_what_each_writes_alone(
    make_request: Callable[..., TalkRequest], lora: dict[str, Any]
) -> None:
    request = make_request(**lora)
    model, tokenizer = loaded(request)
    written = generate(model, tokenizer, request)
    alone = continue_prompt(model, tokenizer, PROMPT, 24)
    with model.disable_adapter():
        base_alone = continue_prompt(model, tokenizer, PROMPT, 24)
    assert written == {"base": base_alone, "adapter": alone}
    assert alone != base_alone


def test_sampled_text_is_the_same_with_the_same_seed(make_request: Callable[..., TalkRequest]) -> None:
    request = replace(make_request(), temperature=1.5)
    model, tokenizer = loaded(request)

    def written(seed: int) -> dict[str, str]:
        torch.manual_seed(seed)
        return generate(model, tokenizer, request)

    assert written(1) == written(1) != written(2)


def test_a_conversation_keeps_its_history_until_it_is_reset(
    make_request: Callable[..., TalkRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    request = replace(make_request(), prompt=None, new_tokens=4)
    model, tokenizer = loaded(request)
    lines = iter(["Who met?", "", "/help", "When?", "/reset", "/base", "Who met?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    seen: list[str] = []
    original = model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(tokenizer.decode(kwargs["input_ids"][0], skip_special_tokens=True))
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "generate", watched)
    chat(model, tokenizer, request, Console(stderr=True))
    first, second, third = seen
    assert first == third == "[user] Who met?"
    assert second.startswith("[user] Who met?[assistant]") and second.endswith("[user] When?")
    assert capsys.readouterr().out.strip()


def test_a_conversation_without_a_template_is_refused(make_request: Callable[..., TalkRequest]) -> None:
    request = make_request()
    model, tokenizer = loaded(request)
    tokenizer.chat_template = None
    with pytest.raises(TalkError, match="no chat template"):
        generate(model, tokenizer, replace(request, as_chat=True))


def test_the_process_prints_both_texts_and_refuses_a_damaged_adapter(
    make_request: Callable[..., TalkRequest], tmp_path: Path
) -> None:
    request = make_request()
    path = tmp_path / "request.json"
    path.write_text(json.dumps(asdict(request)))
    command = [sys.executable, "-m", "ft_dagster.evaluation.terminal", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout).keys() == {"base", "adapter"}
    weights = Path(request.adapter) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "is not the file that was saved" in " ".join(refused.stderr.split())
