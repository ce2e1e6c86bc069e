"""Whatever an exchange contains, its only control tokens are those that the chat template writes."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ft_dagster.dataset.chat import CHANGED, CONTROL, NOT_IN_VOCABULARY, ChatTokenizer, EncodedExchange

EXAMPLES = int(os.environ.get("FT_TEST_HOSTILE", "150"))
"""How many inputs each property test of this module generates."""
SPECIAL = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s>", "</s>")
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "instruct": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
}
PIECES = (
    *SPECIAL,
    *("<|im_end", "|>", "<|im_", "end|>", "[IN", "ST]", "<", ">", "/s>", "\u200b", "\ufeff", "\u2581", " ", "\n", "a"),
    *("＜|im_end|＞", "［INST］", "<|IM_END|>", "{{ eos_token }}", "{% endfor %}", "é", "e\u0301", "🎉"),
)
TEXT = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@pytest.fixture(scope="module", params=["as it is", "compatible forms made one"])
def vocabulary(request: pytest.FixtureRequest) -> Tokenizer:
    """Return a tokenizer of bytes and control tokens; with normalization it reads a wide `＜` as `<`."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    normalized = request.param != "as it is"
    if normalized:
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=normalized) for token in SPECIAL])
    return tokenizer


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request: pytest.FixtureRequest, vocabulary: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tokenizer with a chat template."""
    made = tmp_path_factory.mktemp("chat")
    vocabulary.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))
    (made / "chat_template.jinja").write_text(TEMPLATES[request.param])
    return made


def control_tokens(vocabulary: Tokenizer, found: EncodedExchange) -> list[str]:
    special = {vocabulary.token_to_id(token): token for token in SPECIAL}
    return [special[number] for number in (*found.prompt, *found.answer) if number in special]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request_=TEXT, answer=TEXT)
def test_an_exchange_has_only_control_tokens_of_its_template_or_is_refused_alone(
    vocabulary: Tokenizer, folder: Path, request_: str, answer: str
) -> None:
    plain, found, last = ChatTokenizer(folder).encode([("a", "b"), (request_, answer), ("a", "b")])
    assert isinstance(plain, EncodedExchange) and plain == last
    if isinstance(found, str):
        assert found in (CONTROL, CHANGED, NOT_IN_VOCABULARY)
    else:
        assert control_tokens(vocabulary, found) == control_tokens(vocabulary, plain)


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("place", ["{}", "a{}b", "```\n{}\n```", "## {}"])
def test_a_request_or_an_answer_that_spells_a_control_token_is_refused(folder: Path, token: str, place: str) -> None:
    spelled = place.format(token)
    assert ChatTokenizer(folder).encode([(spelled, "b"), ("a", spelled)]) == [CONTROL, CONTROL]


@pytest.mark.parametrize("text", ["{{ eos_token }}", "{% for m in messages %}", "{{ ''.__class__ }}"])
def test_template_syntax_within_a_text_stays_text(folder: Path, text: str) -> None:
    (found,) = ChatTokenizer(folder).encode([(text, text)])
    assert isinstance(found, EncodedExchange) and text in found.text
