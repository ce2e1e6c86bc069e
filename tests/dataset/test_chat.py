"""The tokens of an exchange, compared with what generation sees and what transformers renders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe_file import RecipeError, load_recipe
from ft_dagster.config.settings import Settings
from ft_dagster.dataset.chat import CHANGED, CONTROL, NOT_IN_VOCABULARY, ChatTokenizer, EncodedExchange

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
PROMPTED = """\
{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>
{{ m['content'] }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<assistant>
{% endif %}"""
THINKING = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<assistant>\\n(thinks)\\n\\n' + m.content + eos_token + '\\n' }}
    {%- else %}
        {{- '<' + m.role + '>\\n' + m.content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>\\n' }}
{%- endif %}"""
ELABORATE = """\
{% set found = namespace(system='') %}
{% for m in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}
    {% if tools is none %}{% set found.system = {'é': '<b>'} | tojson %}{% endif %}
    {% if m.role == 'user' %}
{{ bos_token }}{{ found.system }} [INST] {{ m.content | trim }} [/INST]
    {%- else %}
{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""
ENDLESS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
TEMPLATES = {"plain": PLAIN, "prompted": PROMPTED, "thinking": THINKING, "elaborate": ELABORATE}


@pytest.fixture(scope="session")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the tiny base's tokenizer with each template."""
    made = {}
    for name, template in TEMPLATES.items():
        made[name] = tmp_path_factory.mktemp(name)
        copy_tokenizer(tiny_base, made[name], template)
    return made


def copy_tokenizer(base: Path, folder: Path, template: str | None) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(base / name, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")


def encode(folder: Path, request: str, answer: str) -> EncodedExchange:
    (found,) = ChatTokenizer(folder).encode([(request, answer)])
    assert isinstance(found, EncodedExchange), found
    return found


def ids_of(tokenizer: Any, request: str, answer: str | None = None) -> list[int]:
    """Return the tokens that transformers makes of a conversation, with its answer or with a prompt for one."""
    messages = [{"role": "user", "content": request}]
    messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, return_dict=False)
    return list(found)


TEXT = st.lists(st.sampled_from(["## Costs", "\n\n", "They fell. ", "é🎉", "- x\n", "  ", "<b>&amp;</b>", "{{ x }}"]))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request_=TEXT.map("".join), answer=TEXT.map("".join).map(str.strip).filter(bool))
def test_the_prompt_is_what_generation_sees_and_the_answer_what_the_template_adds(
    folders: dict[str, Path], name: str, request_: str, answer: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    found = encode(folders[name], request_, answer)
    assert found.prompt == ids_of(tokenizer, request_)
    whole = ids_of(tokenizer, request_, answer)
    end = whole.index(tokenizer.eos_token_id, len(found.prompt)) + 1
    assert [*found.prompt, *found.answer] == whole[:end]
    assert tokenizer.decode(found.answer[:-1]) == found.text
    assert found.text.endswith(answer)


def test_on_the_embedded_base_prompt_and_answer_end_as_in_generation() -> None:
    folder = Path(prepare_base(load_recipe("smollm2-135m").base, Settings().cache).folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    request, answer = "Rewrite this.\n\n- shorter\n\n## Costs\n\nThey féll 🎉.", "## Costs\n\nThey fell."
    found = encode(folder, request, answer)
    assert found.prompt == ids_of(tokenizer, request)
    assert tokenizer.decode(found.prompt).endswith("They féll 🎉.<|im_end|>\n<|im_start|>assistant\n")
    assert [*found.prompt, *found.answer] == ids_of(tokenizer, request, answer)[:-1]  # a line end follows
    assert (found.text, found.answer[-1]) == (answer, tokenizer.eos_token_id)


@pytest.mark.parametrize("answer", ["\n\ntext", "  text"])
def test_if_prompt_and_answer_share_a_token_the_prompt_is_still_what_generation_sees(
    folders: dict[str, Path], answer: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["prompted"])
    found = encode(folders["prompted"], "Say.", answer)
    assert found.prompt == ids_of(tokenizer, "Say.")
    assert tokenizer.decode(found.answer) == f"{answer}</s>"


def test_an_answer_has_the_tokens_that_it_has_after_its_prompt(tmp_path: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "a", "b", "▁", "▁a", "▁b"])}
    model = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    answered = "{{ m.content if loop.first else ' ' + m.content + eos_token }}"
    template = "{{ bos_token }}{% for m in messages %}" + answered + "{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    found = encode(tmp_path, "a", "b")  # alone, the answer would start with one more blank
    assert (found.prompt, found.answer) == ([1, 6], [7, 2])


def test_without_an_end_in_the_template_answers_end_with_the_tokenizers_end_token(
    tiny_base: Path, tmp_path: Path
) -> None:
    copy_tokenizer(tiny_base, tmp_path, ENDLESS)
    found = encode(tmp_path, "Say.", "Yes.")
    assert (found.text, found.answer[-1]) == ("[assistant] Yes.", 2)


def test_an_answer_ends_with_the_token_that_generation_stops_at(tiny_base: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_base, tmp_path, PROMPTED.replace("{{ eos_token }}", "<s>"))
    assert encode(tmp_path, "Say.", "Yes.").answer[-1] == 2  # what the template writes there does not end the answer
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    found = encode(tmp_path, "Say.", "Yes.")
    assert (found.text, found.answer[-1]) == ("Yes.", 1)


@pytest.mark.parametrize(("request_", "answer"), [("a </s> b", "c"), ("a", "b <s>"), ("<unk>", "c")])
def test_a_text_that_spells_a_control_token_is_refused_and_the_others_are_not(
    folders: dict[str, Path], request_: str, answer: str
) -> None:
    exchanges = [("a", "b"), (request_, answer), ("c", "d")]
    first, refused, last = ChatTokenizer(folders["prompted"]).encode(exchanges)
    assert refused == CONTROL
    assert (first, last) == (encode(folders["prompted"], "a", "b"), encode(folders["prompted"], "c", "d"))


def test_an_answer_that_the_template_changes_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_base, tmp_path, PROMPTED.replace("m['content']", "m['content'] | trim"))
    assert ChatTokenizer(tmp_path).encode([("a", " b")]) == [CHANGED]
    assert encode(tmp_path, " a", "b").text == "b"


@pytest.mark.parametrize(("request_", "answer"), [("aé", "b"), ("a", "bé")])
def test_a_text_that_the_vocabulary_lacks_is_refused(letters: Path, request_: str, answer: str) -> None:
    template = "{% for m in messages %}{{ bos_token }}a {{ m.content }}{{ eos_token }}{% endfor %}"
    (letters / "chat_template.jinja").write_text(template)
    assert ChatTokenizer(letters).encode([(request_, answer)]) == [NOT_IN_VOCABULARY]
    assert encode(letters, "a", "b").answer == [1, 3, 5, 4, 2]


def test_of_several_named_templates_the_one_that_transformers_uses_is_used(tiny_base: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_base, tmp_path, None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {
        "chat_template": [{"name": "tool_use", "template": PLAIN}, {"name": "default", "template": PROMPTED}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert encode(tmp_path, "a", "b").prompt == ids_of(AutoTokenizer.from_pretrained(tmp_path), "a")


@pytest.mark.parametrize(
    ("clock", "date"),
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2026-01-01"),
        ("{{ 'a clock' if strftime_now is defined else 'none' }}", "none"),
    ],
)
def test_a_template_reads_the_same_date_every_day_and_none_if_it_tests_for_a_clock(
    tiny_base: Path, tmp_path: Path, clock: str, date: str
) -> None:
    copy_tokenizer(tiny_base, tmp_path, clock + PROMPTED)
    prompt = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(encode(tmp_path, "a", "b").prompt)
    assert prompt.replace(" ", "").startswith(date)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "The base model has no chat template .*objectives: {rewrite: 0}"),
        ("{% if %}", "chat template .* fails"),
        ("{{ raise_exception('no users') }}", r"fails \(no users\)"),
        ("{{ messages[0].nothing.more }}", "fails .*has no attribute 'nothing'"),
        ("{{ messages | length }}{{ messages[-1].content }}", "starts an answer differently"),
    ],
)
def test_a_base_with_an_unusable_template_is_refused_with_the_field_of_the_recipe(
    tiny_base: Path, tmp_path: Path, template: str | None, message: str
) -> None:
    copy_tokenizer(tiny_base, tmp_path, template)
    with pytest.raises(RecipeError, match=message) as caught:
        ChatTokenizer(tmp_path).encode([("a", "b")])
    assert "objectives" in str(caught.value) and "{rewrite: 0}" in str(caught.value)
