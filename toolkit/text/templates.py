"""Conversation templates: the exact strings that the published models were trained with.

Source: the conversation tables of haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT, alibaba/conv-llava,
yuecao0119/MMFuser and deepglint/unicom (mlcd_vl). Trailing and missing blanks are as in the
originals; they matter.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from edgevlm.toolkit.errors import InputError

Style = Literal["single", "two", "chatml", "llama2", "plain"]
CUT = "\x1f"  # within a template's own text: what is before and after it is tokenized separately


@dataclass(frozen=True)
class Template:
    """`roles`, `sep` and `sep2` as in the originals; `stop` is text that ends an answer.

    generate: whether the prompt ends with the assistant's role. tiles: whether images are cut
    into tiles if the model has a tiling. after_image: text after every image. strip: whether
    blanks around a turn are removed. brings_bos: whether the text begins with the BOS token.
    examples: turns that every prompt has before the user's own.
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
    strip: bool = False
    brings_bos: bool = False
    examples: tuple[str, ...] = ()

    def spans(
        self, turns: Sequence[str], *, behind_images: Collection[int] = (), ended: bool = False
    ) -> list[str]:
        """The prompt for alternating turns, user first, up to the beginning of the next answer.

        Spans at even indices are the template's own text, those at odd indices are the turns.
        behind_images: the turns at whose beginning images will stand. ended: no answer follows,
        the text ends with the last turn.
        """
        head, tail = _ENDS[self.style](self)
        for i, text in enumerate(self.examples):
            before, after = _AROUND[self.style](self, i)
            head += before + text + after
        tail = "" if ended else tail
        spans = [head]
        for i, text in enumerate(turns):
            before, after = _AROUND[self.style](self, len(self.examples) + i)
            spans[-1] += before
            if self.strip:
                text = text.rstrip() if i in behind_images else text.strip()
            spans += [text, after]
        spans[-1] += tail
        if self.style == "llama2":
            spans[0] = spans[0].lstrip(self.sep) if self.sep else spans[0]
        return spans

    def render(self, turns: Sequence[str]) -> str:
        """The spans as one text."""
        return "".join(self.spans(turns))

    @property
    def literals(self) -> str:
        """The texts that the template itself brings, joined by null characters."""
        own = (self.system, *self.roles, self.sep, self.sep2, self.stop, *self.examples)
        return "\0".join(own)


def find(name: str) -> Template:
    """The template called `name`. Raises InputError naming the nearest known ones."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name in ELSEWHERE:
        raise InputError(
            f"the template {name!r} is that of {ELSEWHERE[name]}, a language model that edgevlm "
            "does not implement",
            hint="leave --template at auto, which is the model's own",
        )
    close = difflib.get_close_matches(name, TEMPLATES, 3) or sorted(TEMPLATES)
    raise InputError(f"there is no template {name!r}", hint=f"known: {', '.join(close)}")


# What precedes the first turn and what follows the last one.
_ENDS: dict[Style, Callable[[Template], tuple[str, str]]] = {
    "single": lambda t: (t.system + t.sep, f"{t.roles[1]}:"),
    "two": lambda t: (t.system + t.sep, f"{t.roles[1]}:"),
    "chatml": lambda t: (t.system + t.sep, t.roles[1] if t.generate else ""),
    "llama2": lambda t: ("", ""),
    "plain": lambda t: (t.system, ""),
}


def _llama2(t: Template, i: int) -> tuple[str, str]:
    if i % 2:
        return " ", f" {t.sep2}"
    system = f"<<SYS>>\n{t.system}\n<</SYS>>\n\n" if i == 0 and t.system else ""
    return f"{t.sep}[INST] {system}", " [/INST]"


# What surrounds turn i.
_AROUND: dict[Style, Callable[[Template, int], tuple[str, str]]] = {
    "single": lambda t, i: (f"{t.roles[i % 2]}: ", t.sep),
    "two": lambda t, i: (f"{t.roles[i % 2]}: ", (t.sep, t.sep2)[i % 2]),
    "chatml": lambda t, i: (t.roles[i % 2], t.sep),
    "llama2": _llama2,
    "plain": lambda t, i: ("", t.sep),
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
_VISUAL = "Answer the questions about the visual content that the user provides."
_FORMAT = (
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_ORCA = (
    "You are MistralOrca, a large language model trained by Alignment Lab AI. Write out your "
    "reasoning step-by-step to be sure you get the right answers!"
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
_ENERGY = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short "
    "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
    "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, "
    "and natural gas. Here are some key differences between renewable and non-renewable energy "
    "sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
    "emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n",
)
_USER, _HUMAN = ("USER", "ASSISTANT"), ("Human", "Assistant")


def _vicuna(system: str) -> Template:
    return Template("two", system, _USER, " ", "</s>", "</s>")


def _v0(system: str, examples: tuple[str, ...] = ()) -> Template:
    return Template("single", system, _HUMAN, "###", "", "###", examples=examples)


def _inst(system: str, sep: str) -> Template:
    return Template("llama2", system, _USER, sep, "</s>", "</s>")


def _im(system: str, end: str = "<|im_end|>") -> Template:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return Template("chatml", f"<|im_start|>system\n{system}", roles, end, end, "<|im_end|>")


def _llama_3(system: str) -> Template:
    """Llama-3's chat template, which removes blanks around turns and writes the BOS token."""
    head, end = "<|start_header_id|>{}<|end_header_id|>\n\n".format, "<|eot_id|>"
    first = f"<|begin_of_text|>{head('system')}{system}"
    roles = (head("user"), head("assistant"))
    return Template("chatml", first, roles, end, end, end, strip=True, brings_bos=True)


TEMPLATES: dict[str, Template] = {
    "default": _v0(_ASSISTANT.format(who="human"), _ENERGY),
    "v0": _v0(_ASSISTANT.format(who="human"), _ENERGY),
    "vicuna_v1": _vicuna(_ASSISTANT.format(who="user")),
    "v1": _vicuna(_ASSISTANT.format(who="user")),
    "llava_v1": _vicuna(_ASSISTANT.format(who="human")),
    "llava_v0": _v0(_ASSISTANT.format(who="human")),
    "v0_mmtag": _v0(_MMTAG),
    "v1_mmtag": _vicuna(_MMTAG),
    "llava_v0_mmtag": _v0(_MMTAG),
    "llava_v1_mmtag": _vicuna(_MMTAG),
    "llama_2": _inst(_META_LLAMA_2, "<s>"),
    "llava_llama_2": _inst(_LLAVA_LLAMA_2, "<s>"),
    "llava_llama_2_simple": _inst(_VISUAL, "<s>"),
    "llava_llama_2_mmtag": _inst(_VISUAL + _FORMAT, "<s>"),
    "llava_llama_3": _llama_3(_LLAVA_LLAMA_2),
    "mistral_instruct": _inst("", ""),
    "llava_mistral_instruct": _inst("", ""),
    "mistral_orca": _im(_ORCA),
    "mistral_zephyr": Template(
        "chatml",
        "<|system|>\nYou are a helpful AI assistant.",
        ("<|user|>\n", "<|assistant|>\n"),
        "</s>",
        "</s>",
        "</s>",
    ),
    "mpt": _im(_MPT),
    "chatml_direct": _im("Answer the questions."),
    "mistral_direct": _im("Answer the questions."),
    "qwen_1_5": _im("You are a helpful assistant.", "<|im_end|>\n"),
    "qwen_2": _im("You are a helpful assistant.", "<|im_end|>\n"),
    "qwen_2_5": _im(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "<|im_end|>\n"
    ),
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
    "v0_plain": Template("plain", "", ("", ""), "\n", "", "\n"),
}
# Names that the originals have for other language models.
ELSEWHERE = {"gemma_instruct": "Gemma"}
