"""Small chat templates, each with one property of a family's real template, and the facts of their tokenizers."""

from tutor.prompt.template_analysis import TokenFacts
from tutor.stages.base.tiny_templates import MODES
from tutor.stages.base.tiny_templates import SWITCHED as SWITCH

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{%- if messages[0].role != 'system' %}\n    {{- '<|im_start|>system\\nEres de fábrica.<|im_end|>\\n' }}\n"
    "{%- endif %}\n" + CHATML + "\n"
)
"""Writes a system text of its own where none is given."""
OPENS = (
    "{% set ns = namespace(system='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% set content = content.split('</think>')[-1] %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
"""Opens a thought in the prompt, has no switch, and leaves thoughts out of all answers."""
TRIMS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}{%- set date_string = '1 Jan 2000' %}{%- endif %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages if message.role != 'system' %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Trims every text, and names a date that llama.cpp passes and transformers does not."""
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = message['role'].replace('assistant', 'model') %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Refuses a system text, and ends a turn with another token than EOS."""
BLANKS = (
    "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
    "{% for message in messages[first:] %}{% if message['role'] == 'user' %}{% if loop.last and first %}"
    "{{ bos_token + '[INST] ' + messages[0]['content'] + '\n\n' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Puts blanks around an answer, BOS before every question, and the system text before the last one alone."""
ENDS_TWICE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Ends a turn with a token of its own, and a whole conversation with EOS too."""

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOKENS = (
    *(BOS, EOS, "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
    *("<|user|>", "<|assistant|>", "<|end|>"),
)
"""Added tokens of one tokenizer for all templates."""
FACTS = TokenFacts(BOS, EOS, True, {text: 1000 + place for place, text in enumerate(TOKENS)})  # noqa: FBT003

SUPPORTED = {
    ("CHATML", "none"): CHATML,
    ("DEFAULT_SYSTEM", "none"): DEFAULT_SYSTEM,
    ("SWITCH", "none"): SWITCH,
    ("SWITCH", "empty"): SWITCH,
    ("SWITCH", "rows"): SWITCH,
    ("MODES", "none"): MODES,
    ("MODES", "rows"): MODES,
    ("OPENS", "empty"): OPENS,
    ("OPENS", "rows"): OPENS,
    ("TRIMS", "none"): TRIMS,
    ("NO_SYSTEM", "none"): NO_SYSTEM,
    ("BLANKS", "none"): BLANKS,
    ("ENDS_TWICE", "none"): ENDS_TWICE,
}
"""Templates by name and by a `reasoning` that fits them."""
