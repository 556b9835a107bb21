"""Tables of history gain recovered."""

from __future__ import annotations

import re
from collections.abc import Callable

from eval.tables.cells import Metrics, number, percent, share, table

HGR_SETS = ("young", "files", "packages", "prose")
FITTED = " †"  # behind arms whose gate was fitted for them, where the others use the shipped one
HGR_WAYS = {
    "window": "raw window",
    "longer_same_slots": "more raw tokens in the soft prompts' slots",
    "soft": "soft prompts",
    "shuffled": "soft prompts of another file",
    "copy": "copying",
    "copy_rebuilt": "copying from rebuilt latents",
    "soft_copy": "soft prompts + copying (the defaults)",
    "longer_same_slots_copy_fitted": "more raw tokens in their slots + copying" + FITTED,
    "retrieve2_last_copy_fitted": "last 2 chunks raw + copying" + FITTED,
    "retrieve2_bm25_copy": "retrieval of 2 by BM25 + copying",
    "soft_retrieve2_bm25_copy": "soft prompts + copying + retrieval of 2 by BM25",
    "soft_retrieve2_learned_copy": "the same, retrieval by a learned scorer",
    "soft_retrieve2_copy": "the same, retrieval as it is by default §",
    "longer_same_slots_retrieve2_copy_fitted": "a window longer by their slots + copying" + FITTED,
    "retrieve2_oracle_copy_fitted": "best 2 chunks, by an oracle, + copying" + FITTED + "‡",
    "full": "full history",
    "full_copy": "full history + copying",
}
LONGER = "a longer window (1,604 slots) + copying" + FITTED
HGR_DIFFERENCES = {  # an arm and the other one
    "soft.shuffled": ("soft prompts", "soft prompts of another file"),
    "soft_copy.longer_same_slots_copy_fitted": (
        "soft prompts + copying",
        "more raw tokens in their slots + copying" + FITTED,
    ),
    "soft_copy_fitted.longer_same_slots_copy_fitted": (
        "soft prompts + copying" + FITTED,
        "more raw tokens in their slots + copying" + FITTED,
    ),
    "retrieve2_bm25_copy.longer_same_slots_retrieve2_copy_fitted": ("retrieval of 2 by BM25 + copying", LONGER),
    "soft_retrieve2_bm25_copy.longer_same_slots_retrieve2_copy_fitted": ("all three ways, retrieval by BM25", LONGER),
    "soft_retrieve2_bm25_copy_fitted.longer_same_slots_retrieve2_copy_fitted": (
        "all three ways, retrieval by BM25" + FITTED,
        LONGER,
    ),
    "soft_retrieve2_learned_copy.longer_same_slots_retrieve2_copy_fitted": (
        "all three ways, learned retrieval",
        LONGER,
    ),
    "soft_retrieve2_copy.longer_same_slots_retrieve2_copy_fitted": ("all three ways, default retrieval §", LONGER),
    "soft_retrieve2_learned_copy.soft_retrieve2_bm25_copy": (
        "all three ways, learned retrieval",
        "all three ways, retrieval by BM25",
    ),
    "soft_retrieve2_copy.soft_retrieve2_bm25_copy": (
        "all three ways, default retrieval §",
        "all three ways, retrieval by BM25 §",
    ),
}
KVPRESS_WAYS = {  # at the slots of the soft prompts, then at those of retrieved chunks as well
    "streaming.at8": "StreamingLLM",
    "snapkv.at8": "SnapKV",
    "snapkv_window.at8": "SnapKV that keeps the raw window",
    "expected_attention.at8": "ExpectedAttention",
    "knorm.at8": "Knorm",
    "longer_same_slots": "as many raw tokens, read anew",
    "soft_copy": "ours: soft prompts + copying",
    "streaming.at8_retrieve2": "StreamingLLM",
    "snapkv.at8_retrieve2": "SnapKV",
    "snapkv_window.at8_retrieve2": "SnapKV that keeps the raw window",
    "expected_attention.at8_retrieve2": "ExpectedAttention",
    "knorm.at8_retrieve2": "Knorm",
    "longer_same_slots_retrieve2": "as many raw tokens, read anew",
    "soft_retrieve2_bm25_copy": "ours: soft prompts + copying + retrieval of 2 by BM25",
}
PROSE = {
    "csv_tables": "CSV tables",
    "de_law": "German statutes",
    "dialogue_sgd": "dialogues with assistants",
    "json_config": "JSON configuration",
    "latex_math": "LaTeX, mathematics",
    "logs": "logs",
    "meetings_qmsum": "transcripts of meetings",
    "novels_en": "English novels",
    "speeches_en": "English speeches",
    "tech_peps": "Python Enhancement Proposals",
    "wiki_en": "English Wikipedia",
    "leval_financial_qa": "L-Eval: earnings calls",
    "leval_gov_report_summ": "L-Eval: government reports",
    "leval_legal_contract_qa": "L-Eval: contracts",
    "leval_news_summ": "L-Eval: news",
    "leval_paper_assistant": "L-Eval: papers",
    "leval_patent_summ": "L-Eval: patents",
    "leval_review_summ": "L-Eval: reviews",
    "leval_tv_show_summ": "L-Eval: television transcripts",
}


def gain_table(metrics: Metrics) -> list[str]:
    """What each way recovers of history's worth at 8 chunks, by set, beside the slots that it takes."""
    rows = [
        [label, number(metrics.get(f"young.n8.{arm}.slots")),
         *(share(metrics, f"{name}.n8.{arm}.hgr") for name in HGR_SETS)]
        for arm, label in HGR_WAYS.items()
    ]  # fmt: skip
    lines = table(["way", "KV slots", *HGR_SETS], rows if metrics else [])
    if metrics:
        worth = [_per_set(metrics, f"loss.{arm}", lambda value: number(value, 3)) for arm in ("window", "full")]
        oracle = {metrics.get(f"{name}.n8.retrieve2_oracle.documents") for name in HGR_SETS}
        few = ", ".join(sorted(number(value) for value in oracle))
        lines += ["", f"HGR in %, with 95% intervals. † A gate fitted for this way; else the shipped one. "
                      f"‡ The pair of least loss on the very tokens that are scored; {few} documents each. "
                      f"{_partly(metrics)}Prose: mean of {number(metrics.get('prose.n8.domains'))} kinds in which "
                      f"full history is worth at least 0.01 nats/token and that have 8 documents. "
                      f"Documents: {_per_set(metrics, 'documents', number)}. Tokens rebuilt, which copying from "
                      f"latents draws on: {_per_set(metrics, 'tra', lambda value: percent(value, 1))}. Loss in "
                      f"nats/token: raw window {worth[0]}; full history {worth[1]}."]  # fmt: skip
    return lines


def _partly(metrics: Metrics) -> str:
    """What is to be known of the arm that was read on fewer documents; nothing where it was read on all."""
    key = "soft_retrieve2_copy"
    counts = {name: metrics.get(f"{name}.n8.{key}.documents") for name in HGR_SETS}
    if not any(counts.values()):
        return ""
    shown = ", ".join(f"{name} {number(count)}" for name, count in counts.items() if count)
    kinds = number(metrics.get(f"prose.n8.{key}.domains"))
    return (f"§ The default scorer, read on a CPU on fewer documents ({shown}; of prose {kinds} kinds are left): "
            "only the next table compares it. ")  # fmt: skip


def _per_set(metrics: Metrics, key: str, text: Callable[[float | None], str]) -> str:
    return ", ".join(f"{name} {text(metrics.get(f'{name}.n8.{key}'))}" for name in HGR_SETS)


def kvpress_table(metrics: Metrics) -> list[str]:
    """Methods of kvpress beside ours, on the same documents and slots."""
    rows = [
        [label, number(metrics.get(f"young.n8.{arm}.slots")),
         *(share(metrics, f"{name}.n8.{arm}.hgr") for name in HGR_SETS)]
        for arm, label in KVPRESS_WAYS.items()
    ]  # fmt: skip
    lines = table(["way", "KV slots", *HGR_SETS], rows if metrics else [])
    return [*lines, "", "HGR in %, with 95% intervals, on the same documents."] if metrics else lines


def difference_table(metrics: Metrics) -> list[str]:
    """Paired differences of HGR at 8 chunks: what wins against what."""
    rows = [
        [*labels, *(share(metrics, f"{name}.n8.diff.{key}.mean", sign=True) for name in HGR_SETS)]
        for key, labels in HGR_DIFFERENCES.items()
    ]
    lines = table(["way", "minus", *HGR_SETS], rows if metrics else [])
    return [*lines, "", "HGR in points, paired, with 95% intervals."] if metrics else lines


def prose_table(metrics: Metrics) -> list[str]:
    """What copying recovers by kind of text that is no Python."""
    rows = [
        [label, *(share(metrics, f"prose.{key}.n8.{arm}.hgr") for arm in ("copy", "copy_rebuilt_fitted")),
         *(number(metrics.get(f"prose.{key}.n8.loss.{arm}"), 3) for arm in ("window", "full")),
         number(metrics.get(f"prose.{key}.n8.documents"))]
        for key, label in PROSE.items()
    ]  # fmt: skip
    unknown = {key.split(".")[1] for key in metrics if re.match(r"prose\.(?!n\d)\w+\.n8\.", key)} - set(PROSE)
    if unknown:
        raise ValueError(f"no name for the prose of {', '.join(sorted(unknown))}")
    head = ["text", "copying", "copying from rebuilt latents" + FITTED, "loss, raw window", "loss, full history",
            "documents"]  # fmt: skip
    return table(head, rows if metrics else [])
