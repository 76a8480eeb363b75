"""A new model as the command line asks for one: a language model, and towers as KIND=FOLDER."""

from __future__ import annotations

from collections.abc import Sequence

from edgevlm.toolkit.checkpoints import hub
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.training import stages
from edgevlm.training.assemble import assemble


def of_flags(
    stage: str,
    lm: str,
    towers: Sequence[str],
    system: str | None,
    image_size: int | None,
    seed: int,
    options: Options,
) -> Source:
    """A new model from a language model and towers, each KIND=FOLDER."""
    folders = {}
    for text in towers:
        kind, equals, folder = text.partition("=")
        if not equals:
            raise ConfigError(f"--tower {text!r} is not KIND=FOLDER", hint="clip=FOLDER")
        folders[kind] = hub.locate(folder, revision=None, offline=options.offline)
    known = stages.find(stage).systems
    if system is None and not known:
        raise ConfigError(f"stage {stage} is for every system", hint="say which: --system comm")
    home = hub.locate(lm, revision=None, offline=options.offline)
    changes = {} if image_size is None else {"image_size": image_size}
    return assemble(
        system or known[0], home, folders, options=options, seed=seed, overrides=changes
    )
