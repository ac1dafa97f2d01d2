"""Chat templates: the text that transformers makes of them, a sandbox around them, refusals in a sentence."""

import json

import pytest

from palimpsest.text import ChatTemplate, chat_template_of

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Yes?"},
]
KIMI_LIKE = """
{%- macro head(m) -%}<|im_{{ m.get('name', m['role']) }}|>{{ m['role'] }}<|im_middle|>{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{% for m in messages -%}
  {%- if loop.first and m['role'] != 'system' -%}<|im_system|>system<|im_middle|>You help.<|im_end|>{%- endif -%}
  {{ head(m) }}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>
  {%- if m['role'] == 'nobody' %}{% break %}{% endif %}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""


def test_a_template_renders_as_transformers_renders_it():
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    for messages, reply, tools in ((MESSAGES, False, None), (MESSAGES[1:2], True, [{"type": "é"}])):
        theirs, _ = render([messages], tools=tools, chat_template=KIMI_LIKE, add_generation_prompt=reply)
        more = {} if tools is None else {"tools": tools}
        assert ChatTemplate(KIMI_LIKE).render(messages, reply=reply, **more) == theirs[0]
    assert (
        ChatTemplate(KIMI_LIKE)
        .render(MESSAGES[1:2], reply=True)
        .endswith("Hello.<|im_end|><|im_assistant|>assistant<|im_middle|>")
    )


def test_where_a_folder_keeps_it(tmp_path):
    assert chat_template_of(tmp_path) is None
    config = {"eos_token": {"content": "</s>"}, "chat_template": "config {{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_template_of(tmp_path).render([]) == "config </s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert chat_template_of(tmp_path).render([]) == "file </s>"
    (tmp_path / "chat_template.jinja").unlink()
    several = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_template_of(tmp_path).render([]) == "D"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for %}", "is no chat template: .* in line 1"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported; it may know no system role"),
        ("{{ ''.__class__.__mro__ }}", "refuses messages of system, user, assistant: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses messages"),
        ("{{ messages[9]['content'] + 1 }}", "refuses messages"),
        ("{{ 1 // 0 }}", "refuses messages"),
    ],
)
def test_what_a_template_may_not_is_a_sentence(source, said):
    with pytest.raises(ValueError, match=said):
        ChatTemplate(source).render(MESSAGES)
