"""What a row holds, and the arms: what a host reads of it, and what copying draws on.

Axes: `D` documents, `N` places (a document's `target` tokens, one after another), `V` vocabulary, `K` orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.documents import Shape


@dataclass(frozen=True)
class Layout(Shape):
    """A row, and what stands for its chunks.

    Attributes:
        latents: soft prompts of a chunk.
        retrieved: chunks that an arm with retrieval reads raw.
    """

    latents: int = 8
    retrieved: int = 2

    def extra(self, kind: str, count: int) -> int:
        """Tokens by which a raw window is longer: `""`, `soft`, `retrieve` (as many slots as those take), `full`."""
        if kind == "full":
            return count * self.chunk
        soft = count * self.latents
        return {"": 0, "soft": soft, "retrieve": soft + self.retrieved * self.chunk}[kind]

    def past(self, row: np.ndarray, count: int, extra: int = 0) -> np.ndarray:
        """What of the last `count` chunks a window that is `extra` tokens longer does not hold."""
        return row[self.old - count * self.chunk : self.old - extra]

    def raw(self, row: np.ndarray, extra: int = 0, chunks: Sequence[int] = ()) -> np.ndarray:
        """Retrieved chunks, by their number in the row, in order, then the longer window and all but the last target.

        Args:
            row: `[length]`.
            extra: tokens by which the window is longer.
            chunks: numbers of retrieved chunks, 0 the oldest of the row.
        """
        starts = [self.prefix + c * self.chunk for c in sorted(chunks)]
        retrieved = [row[s : s + self.chunk] for s in starts]
        return np.concatenate([*retrieved, row[self.old - extra : self.length - 1]])


@dataclass(frozen=True)
class Arm:
    """What a host reads.

    Attributes:
        soft: whose soft prompts: `""` nobody's, `own`, `other` another document's, `mean` as many means of the chunks'
            token embeddings.
        longer: by what the raw window is longer, as in `Layout.extra`.
        retrieve: whose choice of chunks is raw again, a name of `DocumentReader.scorers`; made once, at the window's
            end, where the product looks again every so many tokens (`Retrieve.every`).
        readings: of each variant with copying its name, what it copies from (`past` or `rebuilt`), and its gate.
    """

    soft: str = ""
    longer: str = ""
    retrieve: str = ""
    readings: tuple[tuple[str, str, str], ...] = ()

    def slots(self, layout: Layout, count: int) -> int:
        """Positions before the target."""
        retrieved = layout.retrieved * layout.chunk if self.retrieve else 0
        soft = count * layout.latents if self.soft else 0
        return layout.prefix + soft + retrieved + layout.extra(self.longer, count) + layout.window

    def exists(self, layout: Layout, count: int) -> bool:
        """Whether retrieving is less than reading everything."""
        return count > layout.retrieved or not (self.retrieve or self.longer == "retrieve")


def _fitted(key: str, archive: str = "past") -> tuple[str, str, str]:
    return f"{key}_fitted", archive, f"{key}_fitted"


ARMS = {
    "window": Arm(readings=(_fitted("copy"), ("copy", "past", "shipped"), ("copy_generic", "past", "generic"),
                            ("copy_nine_weights", "past", "nine_weights"), _fitted("copy_rebuilt", "rebuilt"),
                            ("copy_rebuilt", "rebuilt", "shipped"),
                            ("copy_rebuilt_generic", "rebuilt", "generic"))),
    "soft": Arm("own", readings=(_fitted("soft_copy"), ("soft_copy", "past", "shipped"),
                                 _fitted("soft_copy_rebuilt", "rebuilt"))),
    "shuffled": Arm("other"),
    "mean_pool": Arm("mean"),
    "longer_same_slots": Arm(longer="soft", readings=(_fitted("longer_same_slots_copy"),)),
    "longer_same_slots_retrieve2": Arm(longer="retrieve", readings=(_fitted("longer_same_slots_retrieve2_copy"),)),
    "retrieve2_last": Arm(retrieve="last", readings=(_fitted("retrieve2_last_copy"),)),
    "retrieve2_bm25": Arm(retrieve="bm25", readings=(_fitted("retrieve2_bm25_copy"),
                                                     ("retrieve2_bm25_copy", "past", "shipped"))),
    "retrieve2_random": Arm(retrieve="random", readings=(_fitted("retrieve2_random_copy"),)),
    "soft_retrieve2_bm25": Arm("own", retrieve="bm25", readings=(_fitted("soft_retrieve2_bm25_copy"),
                                                                 ("soft_retrieve2_bm25_copy", "past", "shipped"))),
    "retrieve2": Arm(retrieve="overlap", readings=(("retrieve2_copy", "past", "shipped"),)),
    "soft_retrieve2": Arm("own", retrieve="overlap", readings=(("soft_retrieve2_copy", "past", "shipped"),)),
    "full": Arm(longer="full", readings=(_fitted("full_copy"), ("full_copy", "past", "shipped"))),
}  # fmt: skip
"""By name. A variant with copying is called after what it reads; it weighs by the gate that ships, unless it says so:
`_fitted` (to what this arm reads), `_generic` (does not see the host), `_nine_weights`."""
SOURCES = {key: (name, archive) for name, arm in ARMS.items() for key, archive, gate in arm.readings if key == gate}
SHIPPED = (
    "copy_fitted",
    "copy_rebuilt_fitted",
    "soft_copy_fitted",
    "soft_copy_rebuilt_fitted",
    "retrieve2_bm25_copy_fitted",
    "soft_retrieve2_bm25_copy_fitted",
    "full_copy_fitted",
)
"""Whose places the gate that ships is fitted to."""
GATES = (*SOURCES, "shipped", "generic", "nine_weights")
GREEDY = ("window", "copy", "soft_retrieve2_copy", "full")
KVPRESS = ("snapkv", "snapkv_window", "expected_attention", "streaming", "knorm")
"""Methods of `eval.hgr.kvpress_arms`: as many slots as `longer_same_slots` (`.at8`), or `longer_same_slots_retrieve2`
(`.at8_retrieve2`)."""


def archive_of(arm: Arm, archive: str) -> str:
    """The kind of archive that `search` makes: what is rebuilt, or what the arm's raw window does not hold."""
    return "rebuilt" if archive == "rebuilt" else "" if arm.longer == "full" else arm.longer


def archives_of(layout: Layout, counts: Sequence[int], arms: Sequence[str] = tuple(ARMS)) -> list[tuple[int, str]]:
    """All archives that the arms read."""
    kinds = {
        (count, archive_of(ARMS[name], archive))
        for count in counts
        for name in arms
        if ARMS[name].exists(layout, count)
        for _, archive, _ in ARMS[name].readings
    }
    return sorted(kinds)
