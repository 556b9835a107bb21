"""Ways to read a compressed past, one file each: a frozen dataclass and what it does in a call.

A new one implements `types.Mode` and calls `register_mode`; everything else (`modes=["name"]`, the command line,
`lm-eval`) finds it by its name.
"""

from .compact import Compact
from .copy import Copy
from .experts import Experts
from .registry import MODES, BoundModes, bound_modes, modes_from_options, register_mode, resolve_modes
from .retrieve import Retrieve
from .soft_prompts import SoftPrompts

for _mode in (Compact, SoftPrompts, Copy, Retrieve, Experts):
    register_mode(_mode)

__all__ = [
    "MODES",
    "BoundModes",
    "Compact",
    "Copy",
    "Experts",
    "Retrieve",
    "SoftPrompts",
    "bound_modes",
    "modes_from_options",
    "register_mode",
    "resolve_modes",
]
