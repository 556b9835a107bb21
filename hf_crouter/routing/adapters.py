"""LoRA adapters of one model side by side: which one serves is told per position, per row, or not at all.

The model's own modules stay as they are: forward hooks add what the active adapter adds. Ranks of all adapters are one
product with the others' part set to zero, so that a switch costs nothing and a compiled graph stays one.
Axes: `B` rows, `T` positions, `n` adapters, `r` rank, `I` and `O` a linear layer's input and output.

Source: LoRA, arXiv 2106.09685; files as PEFT writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..errors import InputError, MismatchError
from ..types import BASE

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."  # what PEFT puts before the names of a model's modules


@dataclass(frozen=True, eq=False)
class Lora:
    """One adapter's weights.

    Attributes:
        down: `[r, I]` by module name.
        up: `[O, r]` by module name, with the adapter's scale in it.
        checksum: SHA-256 of the weights' file; empty for one that was not read from a file.
    """

    down: dict[str, torch.Tensor]
    up: dict[str, torch.Tensor]
    checksum: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(value.nbytes for part in (self.down, self.up) for value in part.values())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Lora:
        """Reads an adapter that PEFT saved; safetensors only.

        Raises:
            InputError: missing or damaged files, or an adapter that is more than plain LoRA on linear layers.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: expected an adapter saved by PEFT as safetensors, got no {name}")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS)
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise InputError(f"{folder}: not an adapter, or damaged ({type(error).__name__}: {error})") from error
        if not isinstance(config, dict):
            raise InputError(f"{folder / CONFIG}: expected a JSON object, got {type(config).__name__}")
        extras = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
                  if config.get(key)]  # fmt: skip
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or extras:
            found = ", ".join([str(config.get("peft_type")), *extras])
            raise InputError(f"{folder}: expected plain LoRA without biases, patterns or whole modules, got {found}")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise InputError(f"{folder}: expected a rank and a scale (r, lora_alpha), got {rank} and {alpha}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        down, up = {}, {}
        for key, value in tensors.items():
            module, _, kind = key.removeprefix(_ROOT).removesuffix(".weight").rpartition(".")
            if kind not in ("lora_A", "lora_B") or value.ndim != 2:
                raise InputError(f"{folder}: expected LoRA weights of linear layers, got {key} {list(value.shape)}")
            (down if kind == "lora_A" else up)[module] = value.float() * (1.0 if kind == "lora_A" else scale)
        odd = [path for path in down.keys() & up.keys() if len(down[path]) != up[path].shape[1]]
        if odd:
            raise InputError(f"{folder}: expected one rank in both weights of {odd[0]}, got two")
        if down.keys() != up.keys() or not down:
            raise InputError(f"{folder}: expected both weights of every layer, got {len(down)} and {len(up)}")
        return cls(down, up, hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())

    @classmethod
    def from_model(cls, model: nn.Module, name: str) -> Lora | None:
        """The weights of an adapter that PEFT holds in a model, natively or by `PeftModel`; None without one.

        Raises:
            InputError: more than plain LoRA on linear layers.
        """
        down, up = {}, {}
        for path, module in model.named_modules():
            sides = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
            if not all(isinstance(side, nn.ModuleDict) and name in side for side in sides):
                continue
            first, second = (side[name] for side in sides)  # pyright: ignore
            plain = isinstance(first, nn.Linear) and second.bias is None and not _has_dora(module, name)
            if not plain:
                raise InputError(f"adapter {name}: expected plain LoRA on linear layers, got more at {path}")
            down[path] = first.weight.detach().float()
            up[path] = second.weight.detach().float() * module.scaling[name]  # pyright: ignore
        return cls(down, up) if down else None


def _has_dora(module: Any, name: str) -> bool:
    return name in getattr(module, "lora_magnitude_vector", {})


class AdapterStack:
    """Adapters of one model, of which `using` says which serves where; outside it the model is its plain self.

    Where PEFT holds adapters of the same names in the model, those pause while the stack serves; others that
    are active stay so, as a part of the model. `activate` holds for the thread that calls it. Compiled graphs, and
    PEFT's paused adapters, are the same for all threads: there one call at a time.

    Args:
        model: has the modules that the adapters name; plain, or with PEFT's layers around them.
        adapters: by name; their numbers are their positions in this order.

    Raises:
        MismatchError: an adapter of another model: a module is missing or has other sizes.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Lora]):
        self.names = tuple(adapters)
        self._model = model
        self._local = threading.local()  # of each thread what `_active` gives
        self._compiled: torch.Tensor | None = None  # the same for compiled graphs: one-hot, `[B, 1 or T, n]`
        self._down: dict[str, torch.Tensor] = {}  # `[n * r, I]`
        self._up: dict[str, torch.Tensor] = {}  # `[O, n * r]`
        modules: dict[str, Any] = {path.replace(".base_layer", ""): m for path, m in _linear_layers(model)}
        for name, adapter in adapters.items():
            for path, down in adapter.down.items():
                module, up = modules.get(path), adapter.up[path]
                sizes = (module.in_features, module.out_features) if module is not None else None
                if sizes != (down.shape[1], up.shape[0]):
                    have = f"a linear layer of {sizes[0]} to {sizes[1]}" if sizes else "no such layer"
                    raise MismatchError(
                        f"adapter {name}: expected {path} of {down.shape[1]} to {up.shape[0]}, got {have}; "
                        "it belongs to another model"
                    )
        self._paused: list[tuple[Any, Any]] | None = None  # PEFT's layers and what was active there; None: not asked
        self._handles = []
        for path in sorted({path for adapter in adapters.values() for path in adapter.down}):
            module: Any = modules[path]
            parts = [(a.down.get(path), a.up.get(path)) for a in adapters.values()]
            rank = max(len(down) for down, _ in parts if down is not None)
            size, out = module.in_features, module.out_features
            down = torch.zeros(len(parts), rank, size)
            up = torch.zeros(out, len(parts), rank)
            for i, (first, second) in enumerate(parts):
                if first is not None and second is not None:
                    down[i, : len(first)], up[:, i, : len(first)] = first.cpu(), second.cpu()
            options = {"device": module.weight.device, "dtype": _float_dtype(module.weight.dtype)}
            self._down[path], self._up[path] = down.flatten(0, 1).to(**options), up.flatten(1, 2).to(**options)
            self._handles.append(module.register_forward_hook(self._hook(path)))

    def __len__(self) -> int:
        """Number of adapters n."""
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked weights."""
        return sum(value.nbytes for part in (self._down, self._up) for value in part.values())

    def _hook(self, path: str):
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            x = inputs[0]
            # a compiled graph must not depend on which adapter it is
            compiling = torch.compiler.is_compiling()
            one_hot, single = (self._compiled, None) if compiling else self._active
            if one_hot is None or single == BASE:
                return None
            down, up = self._down[path], self._up[path]
            if not compiling and down.device != x.device:  # the model was moved
                down, up = self._down[path], self._up[path] = down.to(x.device), up.to(x.device)
            if single is not None:
                rank = len(down) // len(self.names)
                part = slice(single * rank, (single + 1) * rank)
                hidden = nn.functional.linear(x.to(down.dtype), down[part])
                return output + nn.functional.linear(hidden, up[:, part]).to(output.dtype)
            hidden = nn.functional.linear(x.to(down.dtype), down).unflatten(-1, (len(self.names), -1))
            if not compiling:
                one_hot = _match_shape(one_hot.to(x.device), x)
            hidden = (hidden * one_hot[..., None].to(hidden.dtype)).flatten(-2)
            return output + nn.functional.linear(hidden, up).to(output.dtype)

        add.of_hf_crouter = True  # left out of a copied or pickled host  # pyright: ignore[reportFunctionMemberAccess]
        return add

    def activate(self, numbers: torch.Tensor | Sequence[int] | None) -> None:
        """Says which adapter serves from now on; None: the plain model.

        Args:
            numbers: `[B]` or `[B, T]`, integers, the adapters' numbers; `BASE` for none.
        """
        self._pause_peft(numbers is not None)
        if numbers is None:
            self._set(None, None)
            return
        numbers = torch.as_tensor(numbers, dtype=torch.long)
        if numbers.ndim == 1 or (numbers == numbers[:, :1]).all():
            numbers = numbers.reshape(len(numbers), -1)[:, :1]
        first = int(numbers[0, 0])
        single = first if bool((numbers == first).all()) else None
        key = (tuple(numbers.shape), numbers.cpu().numpy().tobytes())
        last = getattr(self._local, "last", ((), None))
        if key != last[0]:
            device = next(iter(self._down.values())).device if self._down else numbers.device
            hot = (numbers[..., None] == torch.arange(len(self.names), device=numbers.device)).to(device)
            last = self._local.last = key, hot.to(torch.float32)
        self._set(last[1], single)

    @property
    def _active(self) -> tuple[torch.Tensor | None, int | None]:
        """One-hot activation `[B, 1 or T, n]`, and the adapter that all positions share; None where they differ."""
        return getattr(self._local, "active", (None, None))

    def _set(self, one_hot: torch.Tensor | None, single: int | None) -> None:
        self._local.active = one_hot, single
        self._compiled = one_hot

    @contextlib.contextmanager
    def using(self, numbers: torch.Tensor | Sequence[int] | None) -> Iterator[None]:
        """`activate` for a block; what was active before returns after it."""
        before = self._active
        self.activate(numbers)
        try:
            yield
        finally:
            self._pause_peft(before[0] is not None)
            self._set(*before)

    def _pause_peft(self, pause: bool) -> None:
        """Deactivates PEFT's adapters of these names, or activates them again."""
        if pause and self._paused is None:
            self._paused = []
            for layer in self._model.modules():
                if any(name in getattr(layer, "lora_A", ()) for name in self.names):
                    wrapped: Any = layer
                    active = wrapped._active_adapter
                    self._paused.append((wrapped, active))
                    names = [active] if isinstance(active, str) else active
                    wrapped._active_adapter = [name for name in names if name not in self.names]
        elif not pause:
            for layer, active in self._paused or ():
                layer._active_adapter = active
            self._paused = None

    def remove(self) -> None:
        """Takes the hooks off."""
        self.activate(None)
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _match_shape(one_hot: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A one-hot `[B, 1 or T, n]` in the shape of a layer's input: `[B, T, I]`, or `[B * T, I]` in some models."""
    if x.ndim == 2:
        rows = len(one_hot)
        one_hot = one_hot.expand(rows, len(x) // rows, -1) if one_hot.shape[1] == 1 else one_hot
        return one_hot.flatten(0, 1)
    if one_hot.shape[1] not in (1, x.shape[1]):  # another forward of the call, guidance for example: the window's
        one_hot = one_hot[:, -1:]
    return one_hot


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by name; one that PEFT wrapped is found under its own name, inside its wrapper."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in path:
            yield path, module


def _float_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float32  # quantised weights
