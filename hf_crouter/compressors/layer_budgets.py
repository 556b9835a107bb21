"""How many key-value pairs each layer keeps: what a host loses where one layer alone keeps few, measured once.

Layers differ: on Qwen2.5-Coder-1.5B four of 28 layers make half of what compaction costs. `LayerBudgets` hands out
slots so that the sum of all layers' losses is least, by the losses of each layer alone.

Source: unequal budgets over layers and heads are Attention Matching's (arXiv 2602.16284) and PyramidKV's (arXiv
2406.02069); measuring them by the divergence of the host's own predictions is ours.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..fitting import best_fit, check_fit, fitted, in_use
from ..types import Fitted
from ..utils.io import replaced_file

FILE = "layer_budgets.json"
SHIPPED = Path(__file__).parent.parent / "checkpoints" / "layer-budgets"
LEAST, MOST = 4, 8  # a layer keeps a quarter of the mean at least, and eight times as much at most
GRAIN = 16  # steps from one number of slots to its double


@dataclass(frozen=True)
class LayerBudgets:
    """What a host loses where one layer keeps few pairs and all others keep everything.

    Attributes:
        slots: pairs a chunk and head at which it was measured, ascending.
        losses: of each layer at each of them, nats/token (KL divergence of the host's predictions); empty for a layer
            that keeps nothing old.
        chunk: tokens of a chunk.
        host_name: of the host that was measured.
        host_fingerprint: of its weights.
        host_architecture: see `hosts.fingerprint.host_architecture`.
        host_tokenizer: fingerprint; empty where none was known.
        training: record of the measurement.
    """

    slots: tuple[int, ...]
    losses: tuple[tuple[float, ...], ...]
    chunk: int = 512
    host_name: str = ""
    host_fingerprint: str = ""
    host_architecture: str = ""
    host_tokenizer: str = ""
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        ascending = len(self.slots) > 1 and all(0 < a < b for a, b in zip(self.slots, self.slots[1:], strict=False))
        if not ascending or any(len(one) not in (0, len(self.slots)) for one in self.losses):
            raise InputError("layer budgets: expected losses of each layer at ascending numbers of slots, got others")
        if not all(math.isfinite(loss) for one in self.losses for loss in one):
            raise InputError("layer budgets: expected finite losses, got others")

    def counts(self, mean: int) -> tuple[int, ...]:
        """Pairs a chunk and head of each layer, `mean` on average over the layers that keep some; 0 in the others.

        Slot after slot goes where the next few lower the expected loss most.
        """
        layers = [n for n, one in enumerate(self.losses) if one]
        most = min(self.chunk, MOST * mean)
        steps = sorted({max(1, mean // LEAST), most} | {round(2 ** (n / GRAIN)) for n in range(16 * GRAIN)})
        steps = [count for count in steps if max(1, mean // LEAST) <= count <= most]
        costs = {n: [self._loss(n, count) for count in steps] for n in layers}
        at, left = dict.fromkeys(layers, 0), (mean - steps[0]) * len(layers)
        while True:
            best: tuple[float, int, int] | None = None
            for n in layers:
                for to in range(at[n] + 1, min(at[n] + GRAIN + 1, len(steps))):
                    price = steps[to] - steps[at[n]]
                    if price > left:
                        break
                    gain = (costs[n][at[n]] - costs[n][to]) / price
                    if best is None or gain > best[0]:
                        best = gain, n, to
            if best is None:
                break
            left -= steps[best[2]] - steps[at[best[1]]]
            at[best[1]] = best[2]
        return tuple(steps[at[n]] if n in at else 0 for n in range(len(self.losses)))

    def _loss(self, layer: int, count: int) -> float:
        """Expected loss at a number of slots: lines between logarithms; next to none of a whole chunk."""
        least = 1e-7
        points = [(math.log(n), max(loss, least)) for n, loss in zip(self.slots, self.losses[layer], strict=True)]
        points.append((math.log(self.chunk), max(least, min(loss for _, loss in points) / 50)))
        for i in range(1, len(points)):  # noise aside, more slots never cost
            points[i] = points[i][0], min(points[i][1], points[i - 1][1])
        x = min(max(math.log(count), points[0][0]), points[-1][0])
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            if x <= x1:
                share = (x - x0) / (x1 - x0)
                return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
        return points[-1][1]

    def save(self, folder: str | Path) -> Path:
        """Writes `layer_budgets.json` into a folder, whole or not at all."""
        path = Path(folder) / FILE
        with replaced_file(path) as part:
            part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> LayerBudgets:
        """Reads what `save` wrote.

        Args:
            path: the file, or its folder.

        Raises:
            InputError: missing, or no layer budgets.
        """
        path = Path(path).expanduser()
        path = path / FILE if path.is_dir() else path
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**record, "slots": tuple(record["slots"]), "losses": tuple(map(tuple, record["losses"]))})
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: expected layer budgets (hf-crouter budgets), got {error!r}") from error

    def fitted(self, host: Any, tokenizer: Any = None) -> Fitted:
        """Which host was measured, seen from another."""
        return fitted("layer budgets", self, in_use(host, tokenizer))


def find_layer_budgets(host: Any, path: str | os.PathLike | None = None, tokenizer: Any = None) -> LayerBudgets | None:
    """The budgets that were measured on a host or a twin of it: those of a file, or else shipped ones; None: neither.

    Args:
        host: the decoder, or its identity (`fitting.HostInUse`).
        path: a file or its folder.
        tokenizer: of the host; looked for beside it where it is needed.

    Raises:
        InputError: a damaged file.
        MismatchError: the named file is of another host, which is no twin of this one.
    """
    known = in_use(host, tokenizer)
    if path is not None:
        budgets = LayerBudgets.load(path)
        advice = f"hf-crouter budgets --host {known.host.name_or_path or 'HOST'}"
        check_fit(os.fspath(path), budgets, known, advice=advice)
        return budgets
    shipped: Sequence[LayerBudgets] = [LayerBudgets.load(file) for file in sorted(SHIPPED.glob(f"*/{FILE}"))]
    best = best_fit(shipped, known) if shipped else None
    return shipped[best] if best is not None else None
