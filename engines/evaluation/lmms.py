"""An engine as a model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), found by its entry
point `lmms_eval.models`: `--model edgevlm --model_args engine=FOLDER`.

Only lmms-eval imports this file; it imports torch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from edgevlm.engines.evaluation.other import log_probabilities
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import ConfigError, UnsupportedError

MAX_TOKENS = 128  # where a task does not say
# What tasks ask for that has no meaning here, and what it must be.
_ONLY = {"num_beams": 1, "num_return_sequences": 1}
_KNOWN = {"until", "max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "use_cache"}


def manifest() -> ModelManifest:
    """What lmms-eval asks the entry point for."""
    return ModelManifest("edgevlm", simple_class_path=f"{__name__}.EdgeVLM")


class EdgeVLM(lmms):  # type: ignore[misc]
    """engine: its folder; template: as in `run`; threads: 0 for all processors."""

    is_simple = True

    def __init__(
        self,
        engine: str,
        template: str = "auto",
        threads: int | str = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """batch_size and device come from lmms-eval: questions are asked one at a time, on the
        device that the engine was built for.
        """
        super().__init__()
        if unknown:
            raise ConfigError(
                f"--model_args {', '.join(sorted(unknown))} is unknown",
                hint="known: engine, template, threads",
            )
        if int(batch_size) != 1:
            raise ConfigError(f"--batch_size {batch_size}: questions are asked one at a time")
        self._template = template
        self._session = Session.open(engine, threads=int(threads))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request."""
        answers = []
        for request in requests:
            context, given, to_images, doc_id, task, split = request.args
            images = self._images(to_images, doc_id, task, split)
            answer = self._session.answer(self._question(context, images, given)).text
            self.cache_hook.add_partial("generate_until", (context, given), answer)
            answers.append(answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each request the log probability of its continuation, and whether it is greedy."""
        found = []
        for request in requests:
            context, target, to_images, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            continuation = target(doc) if callable(target) else target
            images = self._images(to_images, doc_id, task, split)
            question = Question(context, images, template=self._template)
            found.append(self._likelihood(question, continuation))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises UnsupportedError: tasks of several rounds bring code of their own."""
        raise UnsupportedError("tasks of several rounds are not implemented")

    def _images(
        self, to_images: Callable[[Any], Sequence[Any]], doc_id: int, task: str, split: str
    ) -> list[Any]:
        images = to_images(self.task_dict[task][split][doc_id]) or []
        return [image.convert("RGB") for image in images]

    def _question(self, context: str, images: list[Any], given: Mapping[str, Any]) -> Question:
        for name, only in _ONLY.items():
            if given.get(name, only) not in (only, None):
                raise ConfigError(f"{name} = {given[name]!r} is not implemented", hint=f"{only}")
        unknown = sorted(set(given) - _KNOWN - set(_ONLY))
        if unknown:
            raise ConfigError(f"the task asks for {', '.join(unknown)}, which is not implemented")
        until = given.get("until") or ()
        sampled = given.get("do_sample", True) and (given.get("temperature") or 0) > 0
        sampling = Sampling(
            float(given["temperature"]) if sampled else 0.0,
            int(given.get("top_k") or 0) if sampled else 0,
            float(given.get("top_p") or 1.0) if sampled else 1.0,
            seed=0 if sampled else None,
        )
        return Question(
            context,
            images,
            int(given.get("max_new_tokens") or MAX_TOKENS),
            sampling,
            self._template,
            [until] if isinstance(until, str) else list(until),
        )

    def _likelihood(self, question: Question, continuation: str) -> tuple[float, bool]:
        session = self._session
        sequence, features = session.ask(question).read()
        ids = session.tokenizer.encode(continuation, special=False)
        state, total, greedy = session.new_state(), 0.0, True
        logits = session.prefill(sequence, features, state)
        for number, token in enumerate(ids):
            said = log_probabilities(np.asarray(logits, np.float32))
            total += float(said[token])
            greedy = greedy and int(said.argmax()) == token
            if number + 1 < len(ids):
                logits = session.decode(token, sequence.length + number, state)
        return total, greedy
