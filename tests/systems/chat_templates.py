"""Chat templates as published checkpoints have them, and other ways to write one."""

from __future__ import annotations

_PARTS = (
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>\n"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
)
# name -> (chat template, whether it takes contents as lists)
CHAT: dict[str, tuple[str, bool]] = {
    "llava-hf, vicuna": (
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'].upper() + ': '}}{% endif %}"
        "{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
        "{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' '}}{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        True,
    ),
    "the 34b's ChatML": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + _PARTS
        + "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        True,
    ),
    "Llama-3 with parts": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
        "<|end_header_id|>\n\n" + _PARTS + "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        True,
    ),
    "Llama-3's own": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        False,
    ),
    "Mistral's own": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
        False,
    ),
    "Mistral with parts": (
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
        + _PARTS
        + " [/INST]{% else %}{{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}",
        True,
    ),
    "Zephyr's, printed": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
        False,
    ),
    "Qwen's own, contents printed": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' }}{{ message['content'] }}"
        "{{ '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        False,
    ),
    "OneVision's": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        True,
    ),
    "LLaVA-NeXT's with Mistral": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        r"{{ ' ' + message['content'][0]['text'] + '<\s> '}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}{% endfor %}",
        True,
    ),
    "contents as JSON, and a word of lists": (
        "Answer like {'type': 'text'}.\n{% for message in messages %}{{ message['role'] }}: "
        "{{ message['content'] | tojson }}\n{% endfor %}",
        False,
    ),
    "lists in questions, texts in answers": (
        "{% for message in messages %}{% if message['role'] == 'user' %}<|user|>"
        + _PARTS
        + "{% else %}{{ '<|assistant|>' + message['content'] }}{% endif %}{% endfor %}"
        "<|assistant|>",
        True,
    ),
    "loops that break, JSON, a namespace": (
        "{%- set ns = namespace(found=false) -%}\n{%- for message in messages %}\n"
        "    {%- if loop.index0 > 8 %}{% break %}{% endif %}\n"
        "    {{- message.role ~ {'k': '<é>'} | tojson ~ ': ' }}\n    " + _PARTS + "\n"
        "{%- endfor %}\n{{- ns.found }} {{ tools is none }} {{ pad_token }}|",
        True,
    ),
}
