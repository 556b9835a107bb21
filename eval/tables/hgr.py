"""Tables of history gain recovered and exact lines."""

from __future__ import annotations

import re

from eval.tables.cells import Metrics, number, share, table

SETS = {"young": "young.n8", "repo": "repo.n40"}  # of a host with room for 20k tokens
SMALL_SETS = {"young": "young.n8", "repo": "repo.n12", "files": "files.n8", "packages": "packages.n8",
              "prose": "prose.n8"}  # fmt: skip
WAYS = {
    "window": "raw window",
    "longer_same_slots": "a raw window longer by 8 tokens a chunk",
    "longer_same_slots_at128": "a raw window longer by 128 tokens a chunk",
    "longer_same_slots_retrieve2": "a raw window longer by 1,024 tokens",
    "longer_same_slots_retrieve4": "a raw window longer by 2,048 tokens",
    "compact8": "`Compact(8)`",
    "compact32": "`Compact(32)`",
    "compact64": "`Compact(64)`",
    "compact128": "`Compact(128)`",
    "compact160": "`Compact(160)`",
    "compact8_retrieve2": "`Compact(8), Retrieve(2)`",
    "compact32_retrieve2": "`Compact(32), Retrieve(2)`, the default",
    "compact32_retrieve2_copy": "`Compact(32), Retrieve(2), Copy()`",
    "compact64_retrieve2": "`Compact(64), Retrieve(2)`",
    "compact96_retrieve1": "`Compact(96), Retrieve(1)`",
    "retrieve2": "`Retrieve(2)`",
    "retrieve4": "`Retrieve(4)`",
    "retrieve8": "`Retrieve(8)`",
    "compact32_copy": "`Compact(32), Copy()`",
    "copy": "`Copy()`",
    "copy_fitted": "`Copy()`, a gate fitted to this host alone",
    "retrieve2_copy": "`Retrieve(2), Copy()`",
    "retrieve2_copy_fitted": "`Retrieve(2), Copy()`, a gate fitted to this host alone",
    "soft": "`SoftPrompts()`, a projector fitted to this host",
    "shuffled": "the same with another file's soft prompts",
    "full": "full history",
    "full_copy": "full history and copying",
}
SMALL_WAYS = {
    "window": "raw window",
    "longer_same_slots": "a raw window longer by 8 tokens a chunk",
    "soft": "`SoftPrompts()`",
    "shuffled": "the same with another file's soft prompts",
    "copy": "`Copy()`",
    "copy_rebuilt": '`Copy(source="rebuilt")`',
    "soft_copy": "`SoftPrompts(), Copy()`",
    "compact8": "`Compact(8)`",
    "compact32": "`Compact(32)`",
    "compact128": "`Compact(128)`",
    "compact32_retrieve2": "`Compact(32), Retrieve(2)`",
    "longer_same_slots_retrieve2": "a raw window longer by 1,024 tokens",
    "retrieve2": "`Retrieve(2)`",
    "retrieve2_copy": "`Retrieve(2), Copy()`",
    "soft_retrieve2_copy": "`SoftPrompts(), Retrieve(2), Copy()`",
    "kvzip.at8": "KVzip, 8 entries a chunk",
    "kvzip.at128": "KVzip, 128 entries a chunk",
    "snapkv.at8": "SnapKV, 8 entries a chunk",
    "snapkv.at128": "SnapKV, 128 entries a chunk",
    "full": "full history",
    "full_copy": "full history and copying",
}
PEERS = {
    "compact8": "`Compact(8)`",
    "kvzip.at8": "KVzip, 8 entries a chunk",
    "snapkv.at8": "SnapKV, 8 entries a chunk",
    "longer_same_slots": "as many more raw tokens",
    "compact32": "`Compact(32)`",
    "kvzip.at32": "KVzip, 32 entries a chunk",
    "snapkv.at32": "SnapKV, 32 entries a chunk",
    "compact128": "`Compact(128)`",
    "kvzip.at128": "KVzip, 128 entries a chunk",
    "snapkv.at128": "SnapKV, 128 entries a chunk",
    "longer_same_slots_at128": "as many more raw tokens",
    "retrieve2": "`Retrieve(2)`",
    "retrieve4": "`Retrieve(4)`",
    "full_quantised4_channels": "full cache in 4 bits, keys grouped by channel",
    "full_quantised4": "full cache in 4 bits, as transformers groups it",
    "full": "full cache, bf16",
}
DIFFERENCES = {  # an arm and the other one
    "copy.window": ("copying", "raw window"),
    "copy_fitted.window": ("copying, a gate fitted to this host alone", "raw window"),
    "retrieve2_copy.retrieve2": ("retrieval of 2 and copying", "retrieval of 2"),
    "retrieve2_copy_fitted.retrieve2": (
        "retrieval of 2 and copying, a gate fitted to this host alone",
        "retrieval of 2",
    ),
    "compact32_retrieve2_copy.compact32_retrieve2": ("the defaults and copying", "the defaults"),
    "full_copy.full": ("full history and copying", "full history"),
    "retrieve2.longer_same_slots_retrieve2": ("retrieval of 2", "a window longer by as much"),
    "retrieve4.longer_same_slots_retrieve4": ("retrieval of 4", "a window longer by as much"),
    "retrieve2.retrieve2_last": ("retrieval of 2", "the last two chunks"),
    "retrieve2.retrieve2_bm25": ("retrieval of 2", "two by BM25"),
    "retrieve2.retrieve2_random": ("retrieval of 2", "two by chance"),
    "soft.shuffled": ("soft prompts", "another file's soft prompts"),
    "kvzip.at8.longer_same_slots": ("KVzip, 8 a chunk", "as many more raw tokens"),
    "kvzip.at128.longer_same_slots_at128": ("KVzip, 128 a chunk", "as many more raw tokens"),
    "snapkv.at128.longer_same_slots_at128": ("SnapKV, 128 a chunk", "as many more raw tokens"),
    "soft_retrieve2_copy.full": ("soft prompts, retrieval of 2 and copying", "full history"),
    **{
        f"compact{n}.{other}.at{n}": (f"compaction to {n}", f"{name}, {n} a chunk")
        for n in (8, 32, 128)
        for other, name in (("kvzip", "KVzip"), ("snapkv", "SnapKV"))
    },
    **{f"compact{n}.compact{n}_equal": (f"compaction to {n}", "the same with equal layers") for n in (8, 32, 128)},
    **{f"compact{n}.full": (f"compaction to {n}", "full history") for n in (64, 128, 160)},
    "compact96_retrieve1.full": ("compaction to 96 and retrieval of 1", "full history"),
    "compact32_retrieve2.full": ("compaction to 32 and retrieval of 2", "full history"),
    "compact32_retrieve2.retrieve2": ("compaction to 32 and retrieval of 2", "retrieval of 2"),
}
SIZES = {
    "copy": "copying",
    "retrieve2": "retrieval of 2",
    "retrieve2_copy": "retrieval of 2 and copying",
    "compact32": "compaction to 32",
    "compact128": "compaction to 128",
    "compact32_retrieve2": "compaction to 32 and retrieval of 2, the defaults",
    "compact32_retrieve2_copy": "the defaults and copying",
    "longer_same_slots_retrieve2": "a window longer by 1,024 tokens",
    "full": "full history",
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
    """What each way recovers of full history's worth and writes in exact lines, beside the slots that it takes."""
    return _gains(metrics, WAYS)


def peers_table(metrics: Metrics) -> list[str]:
    """Other methods at the same slots, beside ours."""
    return _gains(metrics, PEERS)


def _gains(metrics: Metrics, ways: dict[str, str]) -> list[str]:
    rows = []
    for arm, label in ways.items():
        if not any(f"{key}.{arm}.{kind}" in metrics for key in SETS.values() for kind in ("hgr", "lines")):
            continue
        cells = [label]
        for key in SETS.values():
            cells += [number(metrics.get(f"{key}.{arm}.slots")), share(metrics, f"{key}.{arm}.hgr"),
                      share(metrics, f"{key}.{arm}.lines")]  # fmt: skip
        rows.append(cells)
    head = ["what the host reads"]
    head += [f"{name}: {column}" for name in ("one file", "repository") for column in ("slots", "HGR", "lines")]
    lines = table(head, rows if metrics else [])
    return [*lines, "", _footer(metrics, SETS, ways)] if metrics else lines


def _footer(metrics: Metrics, sets: dict[str, str], arms: dict[str, str]) -> str:
    def each(figure: str, digits: int = 0) -> str:
        return ", ".join(f"{name} {number(metrics.get(f'{key}.{figure}'), digits)}" for name, key in sets.items())

    found = {f"{label} ({name})": count for name, key in sets.items()
             for label, count in _on_fewer(metrics, key, arms).items()}  # fmt: skip
    fewer = {count: [label for label, own in found.items() if own == count] for count in sorted(set(found.values()))}
    rest = "".join(f" On {number(count)} documents alone: {'; '.join(labels)}." for count, labels in fewer.items())
    return (
        f"HGR and whole lines right, in %, with 95% intervals. Documents: {each('documents')}; packages or records: "
        f"{each('clusters')}; lines: {each('lines')}. Loss in nats/token, raw window: {each('loss.window', 3)}; full "
        f"history: {each('loss.full', 3)}.{rest}"
    )


def _on_fewer(metrics: Metrics, key: str, arms: dict[str, str]) -> dict[str, float]:
    """Documents of the arms that were not measured on all of a set, by label."""
    return {label: metrics[f"{key}.{arm}.documents"] for arm, label in arms.items()
            if f"{key}.{arm}.documents" in metrics}  # fmt: skip


def small_table(metrics: Metrics) -> list[str]:
    """The same for a host of 135M parameters, on more kinds of text; lines for young code alone."""
    rows = [
        [label, number(metrics.get(f"young.n8.{arm}.slots")), share(metrics, f"young.n8.{arm}.lines"),
         *(share(metrics, f"{key}.{arm}.hgr") for key in SMALL_SETS.values())]
        for arm, label in SMALL_WAYS.items()
    ]  # fmt: skip
    head = ["what the host reads", "slots, young", "lines, young", *(f"HGR, {name}" for name in SMALL_SETS)]
    lines = table(head, rows if metrics else [])
    if metrics:
        domains = number(metrics.get("prose.n8.domains"))
        footer = _footer(metrics, SMALL_SETS, SMALL_WAYS)
        lines += ["", f"{footer} HGR of prose: mean of {domains} kinds in which full history is worth at least 0.01 "
                      "nats/token and that have 8 documents."]  # fmt: skip
    return lines


def difference_table(metrics: Metrics) -> list[str]:
    """Paired differences: what wins against what, in likelihood and in exact lines."""
    rows = []
    for key, labels in DIFFERENCES.items():
        if not any(f"{name}.{kind}.{key}.mean" in metrics for name in SETS.values() for kind in ("diff", "linesdiff")):
            continue
        cells = [*labels]
        for name in SETS.values():
            cells += [share(metrics, f"{name}.{kind}.{key}.mean", sign=True) for kind in ("diff", "linesdiff")]
        rows.append(cells)
    head = ["way", "minus"]
    head += [f"{name}: {column}" for name in ("one file", "repository") for column in ("HGR", "lines")]
    lines = table(head, rows if metrics else [])
    return [*lines, "", "In points, paired, with 95% intervals."] if metrics else lines


def sizes_table(*hosts: Metrics) -> list[str]:
    """What the host's size changes: one file, HGR and lines, from the smallest host to the largest."""
    sizes = ("135M", "0.5B", "1.5B")
    rows = [
        [label, *(share(metrics, f"young.n8.{arm}.{kind}") for metrics in hosts for kind in ("hgr", "lines"))]
        for arm, label in {"window": "raw window", **SIZES}.items()
        if any(f"young.n8.{arm}.hgr" in metrics for metrics in hosts)
    ]
    head = ["what the host reads", *(f"{size}: {kind}" for size in sizes for kind in ("HGR", "lines"))]
    fewer = [
        f"{label}, {size}: {number(own)} of {number(metrics.get('young.n8.documents'))}"
        for size, metrics in zip(sizes, hosts, strict=True)
        for label, own in _on_fewer(metrics, "young.n8", SIZES).items()
    ]
    lines = table(head, rows if all(hosts) else [])
    return [*lines, "", f"On fewer documents: {'; '.join(fewer)}."] if fewer and all(hosts) else lines


def prose_table(metrics: Metrics) -> list[str]:
    """What copying recovers by kind of text that is no Python."""
    rows = [
        [label, *(share(metrics, f"{key}.n8.{arm}.hgr") for arm in ("copy", "copy_rebuilt", "soft_retrieve2_copy")),
         *(number(metrics.get(f"{key}.n8.{arm}.loss"), 3) for arm in ("window", "full")),
         number(metrics.get(f"{key}.n8.documents"))]
        for key, label in ((f"prose.{name}", label) for name, label in PROSE.items())
        if f"{key}.n8.documents" in metrics
    ]  # fmt: skip
    unknown = {key.split(".")[1] for key in metrics if re.match(r"prose\.(?!n\d)\w+\.n8\.", key)} - set(PROSE)
    if unknown:
        raise ValueError(f"no name for the prose of {', '.join(sorted(unknown))}")
    head = ["text", "copying", "copying from rebuilt latents", "with soft prompts and retrieval of 2",
            "loss, raw window", "loss, full history", "documents"]  # fmt: skip
    return table(head, rows if metrics else [])


def unseen_table(seen: Metrics, unseen: Metrics, small: Metrics, small_unseen: Metrics) -> list[str]:
    """The general gate on hosts that it was not fitted on, beside the one that ships and one of the host alone."""
    rows = []
    for host, metrics, arm, label in (
        ("1.5B", seen, "copy", "the general gate, as it ships"),
        ("1.5B", unseen, "copy_fitted", "a general gate that never saw this host"),
        ("1.5B", seen, "copy_fitted", "a gate fitted to this host alone"),
        ("135M", small, "copy", "the general gate, as it ships"),
        ("135M", small_unseen, "copy_fitted", "a general gate that never saw this host"),
    ):
        key = f"young.n8.linesdiff.{arm}.window.mean"
        rows.append([host, label, share(metrics, f"young.n8.{arm}.hgr"), share(metrics, key, sign=True)])
    head = ["host", "gate", "HGR over the raw window", "lines, minus the raw window"]
    return table(head, rows if seen and unseen and small and small_unseen else [])
