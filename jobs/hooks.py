"""Where a verb speaks while it works: lines for people, and the name of each step for whoever watches the protocol."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rich.console import Console

from shoal.conf.run import RunConfig


@dataclass(frozen=True)
class Hooks:
    """Where a run speaks: `say` one line for people, `step` the name of each step of the protocol when it is done."""

    say: Callable[[str], None] = lambda _: None
    step: Callable[[str], None] = lambda _: None
    console: Console = field(default_factory=lambda: Console(stderr=True))


def masked(hooks: Hooks, config: RunConfig) -> Hooks:
    """The hooks, with what came from the environment masked in everything that is said."""
    return replace(hooks, say=lambda line: hooks.say(config.mask(line)))
