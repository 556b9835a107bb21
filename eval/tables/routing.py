"""Tables of routing."""

from __future__ import annotations

from eval.tables.cells import MISSING, Metrics, number, share, table

ROUTERS = {
    "chunk": "reconstruction NLL",
    "baseline.ngram": "character n-grams",
    "baseline.tfidf": "TF-IDF centroids",
    "baseline.probe": "linear probe on latents",
    "baseline.perplexity": "host's loss under each adapter",
    "baseline.arrow": "PEFT's Arrow",
}


def accuracy_table(metrics: Metrics) -> list[str]:
    """What tells domains apart, and texts of none."""
    rows = []
    for key, label in ROUTERS.items():
        if key != "chunk" and f"{key}.accuracy" not in metrics:
            continue  # not measured yet
        right = ("chunk.argmin.accuracy", "span128.argmin.accuracy") if key == "chunk" else (
            f"{key}.accuracy", f"{key}.span128.accuracy")  # fmt: skip
        ours = {"chunk": "expert.bytes", "baseline.perplexity": "expert.host.bytes"}  # of one domain
        size, per = metrics.get(ours.get(key, f"{key}.bytes")), 1 if key in ours else 8
        rule = "" if key == "chunk" else ".pattern"
        rows.append([
            label, *(share(metrics, name) for name in right),
            *(share(metrics, f"{key}{rule}.unseen.{end}.auroc") for end in ("near", "far")),
            MISSING if size is None else f"{size / per / 1e3:,.0f}",
        ])  # fmt: skip
    head = ["router", "512-token chunks right", "128-token spans right", "AUROC, near unknown", "AUROC, far unknown",
            "kB a domain"]  # fmt: skip
    lines = table(head, rows if metrics else [])
    note = "In %, with 95% intervals. Everybody always answers; AUROC by the pattern of scores (–: not measured)."
    return [*lines, "", note] if metrics else lines


def host_table(metrics: Metrics) -> list[str]:
    """The host's loss under routed adapters, and under what else one could train."""
    keys = ("host.{}.base", "host.{}.routed", "host.{}.oracle", "continual.8.{}.sequential", "continual.joint.{}")
    names = [key.split(".")[1] for key in metrics if key.startswith("host.") and key.endswith(".oracle")]
    rows = [[name, *(number(metrics.get(key.format(name)), 3) for key in keys)] for name in names]
    head = ["domain", "plain host", "routed", "its own adapter", "one adapter, trained in turn", "one, on all at once"]
    lines = table(head, rows)
    note = "Loss in nats/token of the chunk after the one that was routed, held-out documents; in order of adding."
    return [*lines, "", note] if rows else lines


def cost_table(metrics: Metrics) -> list[str]:
    """What a decision costs by number of experts."""
    rows = []
    for count in (2, 8, 32):
        for key, label in (("all", "all"), ("shortlist", "nearest 2")):
            cost = f"cost.{count}.{key}"
            if f"{cost}.ms" in metrics:
                times = number(metrics[f"{cost}.ms"]), number(metrics.get(f"{cost}.ms_batched"), 1)
                rows.append([f"{count}", label, *times, number(metrics[f"{cost}.flops"] / 1e9)])
    return table(["experts", "rebuilt under", "ms, one chunk", "ms a chunk, 32 at once", "GFLOPs a chunk"], rows)


def pair_table(metrics: Metrics) -> list[str]:
    """What two experts are worth to a host: loss plain, routed by content, under the own adapter, under the best."""
    kinds = {"code": "young Python code", "prose": "Wikipedia", "novels": "English novels, no expert's",
             "meetings": "transcripts of meetings, no expert's"}  # fmt: skip
    rows = [
        [label, *(number(metrics.get(f"{name}.{key}"), 3) for key in ("base", "routed", "own", "oracle")),
         share(metrics, f"{name}.accuracy", 0)]
        for name, label in kinds.items()
    ]  # fmt: skip
    head = ["text", "plain host", "routed", "its own adapter", "the best for each chunk", "routed as they should, %"]
    return table(head, rows if metrics else [])
