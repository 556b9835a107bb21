"""Experts: each chunk and the window are read under the adapter of the expert whose texts they look like."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from ..chunking import tokenizer_fingerprint
from ..crouter.fingerprint import crouter_fingerprint
from ..errors import InputError
from ..fitting import HostInUse, fitted
from ..routing.adapters import AdapterStack
from ..routing.experts import ExpertSet, expert_folder
from ..routing.router import Router
from ..types import Contribution, Parts, Setting

FEWEST = 64  # tokens of a text whose expert can be told


@dataclass(frozen=True)
class Experts:
    """Content chooses the PEFT adapter: of each chunk, and of the window by its last tokens. Needs a crouter.

    A chunk is served by the expert with the least log reconstruction NLL among those whose own texts look like it, or
    by the plain host where none does. Even a short prompt is read under its expert's adapter, if it has the 64 tokens
    that it takes to tell.

    Attributes:
        experts: an expert set, its folder or the name of the shipped one, which is the default.
        in_domain_quantile: share of an expert's own held-out texts that it is to know, 0 to 1; the lower it is, the
            more chunks are left to the plain host.
        top_k_experts: only so many experts rebuild a chunk, those whose texts lie nearest to its latents; 0: all.
            Faster with many of them; chunks are then known by the expert's own reconstruction NLL alone, and nearly
            every text of no domain passes for known.

    Raises:
        InputError: options that do not make a router.

    Example:
        >>> history = CompressedHistory(host, crouter, modes=[SoftPrompts(), Experts("experts-smollm2-135m")])
    """

    name: ClassVar[str] = "experts"
    gives: ClassVar[tuple[Contribution, ...]] = ("adapters",)

    experts: ExpertSet | str | os.PathLike | None = None
    in_domain_quantile: float = 0.99
    top_k_experts: int = 0

    def __post_init__(self):
        quantile = self.in_domain_quantile
        if not isinstance(quantile, int | float) or not 0 <= quantile <= 1:
            raise InputError(f"Experts(in_domain_quantile=): expected a share, 0 to 1, got {quantile!r}")
        if not isinstance(self.top_k_experts, int) or self.top_k_experts < 0:
            raise InputError(f"Experts(top_k_experts=): expected a number of experts, got {self.top_k_experts!r}")

    @property
    def needs_crouter(self) -> bool:
        """Whether it can do nothing without a crouter."""
        return True

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`.

        Raises:
            InputError: damaged files, or no experts.
            MismatchError: experts of another crouter or tokenizer, or of a host that is no twin of this one.
        """
        crouter, given = setting.crouter, self.experts
        experts = given if isinstance(given, ExpertSet) else ExpertSet.load(expert_folder(given))
        own = setting.crouter_tokenizer
        host = HostInUse.of(setting)
        experts.check(
            crouter_fingerprint(crouter, decoder=True),
            host.host_fingerprint,
            host_architecture=host.host_architecture,
            crouter_tokenizer=tokenizer_fingerprint(own) if own is not None else "",
            host_tokenizer=host.host_tokenizer,
        )
        router = Router(
            crouter,
            experts,
            in_domain_quantile=self.in_domain_quantile,
            top_k_experts=self.top_k_experts,
            fewest=min(FEWEST, crouter.config.chunk_length),
            rows=4 if crouter.device.type == "cpu" else 64,
        )
        try:
            adapters = AdapterStack(setting.host, {expert.name: expert.host for expert in experts})
        except BaseException:
            router.remove()
            raise

        def close() -> None:
            adapters.remove()
            router.remove()

        config = experts.experts[0].config
        return Parts(
            router=router,
            adapters=adapters,
            adapters_key=(*(e.digest for e in experts), f"{router.in_domain_quantile} {router.top_k_experts}"),
            tokenizers=(config.host_tokenizer, config.crouter_tokenizer),
            fitted=tuple(fitted(f"expert {expert.name}", expert.config, host) for expert in experts),
            close=close,
        )
