"""Chat templates whose messages hold pictures and sounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A prompt that ended in a space would be other tokens than the beginning of the whole: " I" is one.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
MARK = "{#- mmtok: parts of type image and audio become placeholders -#}"
# Jinja cannot change a message in place; `messages` is replaced by copies whose content is one string.
FLATTEN = """
{%- set flat = namespace(messages=[], content='') -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is none or message['content'] is undefined -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set flat.content = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set flat.content = flat.content + part['text'] -%}
{%- elif part['type'] == 'image' -%}{%- set flat.content = flat.content + '<image>' -%}
{%- elif part['type'] == 'audio' -%}{%- set flat.content = flat.content + '<audio>' -%}
{%- else -%}{{ raise_exception("content parts: expected type text, image or audio, got " + part['type']) }}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=flat.content)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def media_template(template: str | None = None) -> str:
    """A chat template that also takes messages whose content is a list of parts, as those of vision models.

    Parts ``{"type": "image"}`` and ``{"type": "audio"}`` become the placeholders ``<image>`` and ``<audio>`` of
    `MultimodalProcessor`, in their place in the text; everything else is left to ``template``.

    Args:
        template: a text model's own (``tokenizer.chat_template``); None = `PLAIN_TEMPLATE`: the role, a colon, and on
            the next line the content.

    Use it as ``tokenizer.chat_template = media_template(tokenizer.chat_template)``; a template that is one already
    comes back unchanged.
    """
    template = PLAIN_TEMPLATE if template is None else template
    return template if template.startswith(MARK) else MARK + FLATTEN.replace("\n", "") + template


def unused(text: str) -> str:
    """A string that the text does not hold, for the places of pictures and sounds while a template is at work."""
    n = 0
    while (sentinel := f"<|mmtok{n}:") in text:
        n += 1
    return sentinel


def flat_message(
    message: Mapping[str, Any],
    sentinel: str,
    items: list[tuple[str, Any]],
    chat: int,
    asked: dict[str, list[list[int]]],
) -> dict[str, Any]:
    """A message whose content is one string, with a numbered sentinel for each picture and sound."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text += part["text"]
        elif kind in ("image", "audio"):
            x = part.get(kind, part.get("path"))
            if x is None:
                asked[kind][chat].append(len(items))
            text += f"{sentinel}{len(items)};"
            items.append((kind, x))
        else:
            raise ValueError(f"messages: expected parts of type text, image or audio, got {part!r}")
    return {**message, "content": text}
