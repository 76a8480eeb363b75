"""Conversation templates: the exact strings that the published models were trained with.

Source: the conversation tables of haotian-liu/LLaVA, alibaba/conv-llava, yuecao0119/MMFuser and
deepglint/unicom (mlcd_vl). Trailing and missing blanks are as in the originals; they matter.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgevlm.toolkit.errors import InputError

Style = Literal["single", "two", "chatml", "llama2", "plain"]
CUT = "\x1f"  # in a rendered prompt: the texts before and after it are tokenized separately


@dataclass(frozen=True)
class Template:
    """`roles`, `sep` and `sep2` as in the originals; `stop` is text that ends an answer.

    generate: whether the prompt ends with the assistant's role. tiles: whether images are cut
    into tiles if the model has a tiling. after_image: text after every image.
    """

    style: Style
    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str
    stop: str
    generate: bool = True
    tiles: bool = True
    after_image: str = ""

    def render(self, turns: Sequence[str]) -> str:
        """The prompt for alternating turns, user first, up to the beginning of the next answer."""
        return _STYLES[self.style](self, turns)


def find(name: str) -> Template:
    """The template called `name`. Raises InputError naming the nearest known ones."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    close = difflib.get_close_matches(name, TEMPLATES, 3) or sorted(TEMPLATES)
    raise InputError(f"there is no template {name!r}", hint=f"known: {', '.join(close)}")


def _single(t: Template, turns: Sequence[str]) -> str:
    rendered = "".join(f"{t.roles[i % 2]}: {text}{t.sep}" for i, text in enumerate(turns))
    return f"{t.system}{t.sep}{rendered}{t.roles[1]}:"


def _two(t: Template, turns: Sequence[str]) -> str:
    ends = (t.sep, t.sep2)
    rendered = "".join(f"{t.roles[i % 2]}: {text}{ends[i % 2]}" for i, text in enumerate(turns))
    return f"{t.system}{t.sep}{rendered}{t.roles[1]}:"


def _chatml(t: Template, turns: Sequence[str]) -> str:
    rendered = "".join(f"{t.roles[i % 2]}{text}{t.sep}" for i, text in enumerate(turns))
    return f"{t.system}{t.sep}{rendered}{t.roles[1] if t.generate else ''}"


def _llama2(t: Template, turns: Sequence[str]) -> str:
    rendered = ""
    for i, text in enumerate(turns):
        if i % 2:
            rendered += f" {text} {t.sep2}"
            continue
        system = f"<<SYS>>\n{t.system}\n<</SYS>>\n\n" if i == 0 and t.system else ""
        rendered += f"{t.sep}[INST] {system}{text} [/INST]"
    return rendered.lstrip(t.sep) if t.sep else rendered


def _plain(t: Template, turns: Sequence[str]) -> str:
    ends = (t.sep, t.sep2)
    return t.system + "".join(f"{text}{ends[i % 2]}" for i, text in enumerate(turns))


_STYLES: dict[Style, Callable[[Template, Sequence[str]], str]] = {
    "single": _single,
    "two": _two,
    "chatml": _chatml,
    "llama2": _llama2,
    "plain": _plain,
}

_ASSISTANT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_META_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)
_MPT = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_USER, _HUMAN = ("USER", "ASSISTANT"), ("Human", "Assistant")


def _vicuna(system: str) -> Template:
    return Template("two", system, _USER, " ", "</s>", "</s>")


def _v0(system: str) -> Template:
    return Template("single", system, _HUMAN, "###", "", "###")


def _inst(system: str, sep: str) -> Template:
    return Template("llama2", system, _USER, sep, "</s>", "</s>")


def _im(system: str, end: str = "<|im_end|>") -> Template:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return Template("chatml", f"<|im_start|>system\n{system}", roles, end, end, "<|im_end|>")


TEMPLATES: dict[str, Template] = {
    "vicuna_v1": _vicuna(_ASSISTANT.format(who="user")),
    "v1": _vicuna(_ASSISTANT.format(who="user")),
    "llava_v1": _vicuna(_ASSISTANT.format(who="human")),
    "llava_v0": _v0(_ASSISTANT.format(who="human")),
    "v0_mmtag": _v0(_MMTAG),
    "v1_mmtag": _vicuna(_MMTAG),
    "llama_2": _inst(_META_LLAMA_2, "<s>"),
    "llava_llama_2": _inst(_LLAVA_LLAMA_2, "<s>"),
    "mistral_instruct": _inst("", ""),
    "mpt": _im(_MPT),
    "chatml_direct": _im("Answer the questions."),
    "mistral_direct": _im("Answer the questions."),
    "qwen_1_5": _im("You are a helpful assistant.", "<|im_end|>\n"),
    "qwen_2": _im("You are a helpful assistant.", "<|im_end|>\n"),
    # The embodied model's chat script: token lists joined without a newline after "system", a
    # newline token after every image, one view per image, and no generation prompt.
    "mlcd_chat": Template(
        "chatml",
        f"<|im_start|>system{CUT}You are a helpful assistant.",
        (f"<|im_start|>user{CUT}\n{CUT}", f"<|im_start|>assistant{CUT}\n{CUT}"),
        f"<|im_end|>{CUT}\n{CUT}",
        f"<|im_end|>{CUT}\n{CUT}",
        "<|im_end|>",
        generate=False,
        tiles=False,
        after_image=f"{CUT}\n{CUT}",
    ),
    "plain": Template("plain", "", ("", ""), "\n", "", "\n"),
}
