"""Tables of what a host writes with a compressed past, and of the demo."""

from __future__ import annotations

from eval.tables.cells import Metrics, mebibytes, number, percent, plain, share, table, with_interval

READERS = {
    "full": "full history",
    "window": "raw window",
    "soft": "soft prompts",
    "copy": "copying",
    "copy_rebuilt": "copying from rebuilt latents",
    "soft_retrieve2_bm25_copy": "soft prompts + copying + retrieval of 2",
}
DRAFTERS = {
    "window": "raw window",
    "copy": "copying",
    "soft_retrieve2_copy": "soft prompts + copying + retrieval of 2",
}


def nextline_table(metrics: Metrics) -> list[str]:
    """The next line of code, written greedily."""
    columns = ("exact", "edit", "right_tokens", "repetition", "known_names")
    rows = []
    for arm in ("window", "copy", "soft_retrieve2_bm25_copy", "full"):
        keys = [f"nextline.{arm}.{column}" for column in columns]
        rows.append([READERS[arm], *(plain(metrics, key) if key.endswith("right_tokens") else share(metrics, key)
                                     for key in keys)])  # fmt: skip
    head = ["what the host reads", "line exact", "edit similarity", "right tokens before the first mistake",
            "repeated trigrams", "names that the file knows"]  # fmt: skip
    lines = table(head, rows if metrics else [])
    if metrics:
        gains = [
            share(metrics, f"nextline.{arm}_minus_window", sign=True) for arm in ("copy", "soft_retrieve2_bm25_copy")
        ]
        lines += ["", f"In %, but for the tokens. {number(metrics.get('nextline.lines'))} lines of "
                      f"{number(metrics.get('nextline.packages'))} packages younger than the host. Exact lines "
                      f"beyond those of the raw window: copying {gains[0]}, all three ways {gains[1]}."]  # fmt: skip
    return lines


def facts_table(metrics: Metrics) -> list[str]:
    """A fact far back, asked for in the words in which it stands."""
    rows = []
    for task, label in (("passkey", "passkey"), ("kv", "value of a key")):
        for length in ("4k", "8k", "32k", "128k"):
            keys = [f"{task}.{length}.{arm}.accuracy" for arm in READERS]
            rows.append([label, length, *(share(metrics, key, 0) for key in keys)])
    lines = table(["what is asked", "prompt", *READERS.values()], rows if metrics else [])
    if metrics:
        samples = number(metrics.get("passkey.4k.copy.samples"))
        lines += ["", f"Right answers in %, {samples} prompts a row. –: more than the host's positions hold, or not "
                      f"measured."]  # fmt: skip
    return lines


def identifiers_table(metrics: Metrics) -> list[str]:
    """Names that the raw window does not hold."""
    rows = [
        [READERS[arm], *(share(metrics, f"identifiers.{arm}.{key}") for key in ("accuracy", "whole"))]
        for arm in ("window", "soft", "copy", "soft_retrieve2_bm25_copy", "full")
    ]
    lines = table(["what the host reads", "tokens right", "whole names right"], rows if metrics else [])
    if metrics:
        auroc = [plain(metrics, f"residual.{name}predicts_errors.auroc") for name in ("", "young.", "prose.")]
        counts = [number(metrics.get(f"identifiers.{key}")) for key in ("tokens", "names")]
        lines += ["", f"In %. {counts[0]} tokens of {counts[1]} names that last stood in compressed chunks. How well "
                      f"a chunk's reconstruction NLL tells the tokens that copying from rebuilt latents loses, AUROC: "
                      f"{auroc[0]} over code and prose, {auroc[1]} within code, {auroc[2]} within prose."]  # fmt: skip
    return lines


BESIDE = {  # a reading, and the same with copying
    "window": "raw window",
    "copy": "raw window, copying",
    "retrieve2": "retrieval of 2",
    "retrieve2_copy": "retrieval of 2, copying",
    "compact32_retrieve2": "compaction to 32 and retrieval of 2, the defaults",
    "compact32_retrieve2_copy": "the defaults, copying",
    "full": "full history",
}


def near_table(*hosts: Metrics) -> list[str]:
    """Records that nearly match: the window holds the corrected value, the compressed past the old one."""
    rows = [
        [label, *(share(metrics, f"{arm}.{key}", 0) for metrics in hosts for key in ("new", "old"))]
        for arm, label in BESIDE.items()
        if any(f"{arm}.new" in metrics for metrics in hosts)
    ]
    sizes = ("135M", "0.5B", "1.5B")
    head = ["what the host reads", *(f"{size}: {value}" for size in sizes for value in ("new", "old"))]
    return table(head, rows if all(hosts) else [])


def updates_table(metrics: Metrics) -> list[str]:
    """Keys that are set anew again and again: the latest value, or an older one."""
    times = [n for n in (1, 3, 10, 32, 100) if f"u{n}.full.new" in metrics] or [32]
    rows = [
        [label, *(share(metrics, f"u{n}.{arm}.{key}", 0) for n in times for key in ("new", "old"))]
        for arm, label in BESIDE.items()
        if any(f"u{n}.{arm}.new" in metrics for n in times)
    ]
    head = [f"set {n} times: {value}" for n in times for value in ("latest", "older")]
    return table(["what the host reads", *head], rows)


def free_table(metrics: Metrics) -> list[str]:
    """Free generation: repetition and names, each with the difference to the same reading without copying."""
    columns = [(name, what) for name in ("young", "prose") for what in ("repetition", "exact")]
    rows = []
    for arm, label in BESIDE.items():
        if f"young.{arm}.repetition" in metrics:
            keys = [f"{name}.{arm}.{what}" for name, what in columns]
            plain_ones = [share(metrics, key, 0) for key in keys]
            more = [share(metrics, f"{key}.minus_plain", 0, sign=True) for key in keys]
            rows.append([label, *plain_ones])
            if any(f"{key}.minus_plain" in metrics for key in keys):
                rows.append(["– the difference", *more])
    words = {"repetition": "repeated trigrams", "exact": "names that stand in the prompt"}
    head = [f"{'code' if name == 'young' else 'prose'}: {words[what]}" for name, what in columns]
    return table(["what the host reads", *head], rows)


def drafts_table(*measured: Metrics) -> list[str]:
    """Tokens a step of the host with drafts from the history, on each device."""
    rows = [
        [place, DRAFTERS[arm], with_interval(metrics, f"drafts.{arm}.tokens_a_step", 1, 2, ""),
         with_interval(metrics, f"drafts.{arm}.speedup", 1, 2, ""), share(metrics, f"drafts.{arm}.same", 0)]
        for place, metrics in zip(("135M, float32 on a CPU", "1.5B, bfloat16 on a GPU"), measured, strict=False)
        for arm in DRAFTERS
        if f"drafts.{arm}.tokens_a_step" in metrics
    ]  # fmt: skip
    head = ["host", "what it reads", "tokens a step", "seconds without drafts over with", "prompts with the same, %"]
    lines = table(head, rows)
    if all(measured):
        ahead = number(measured[0].get("drafts.ahead"))
        prompts = " and ".join(number(metrics.get("drafts.prompts")) for metrics in measured)
        lines += ["", f"Up to {ahead} tokens drafted; {prompts} prompts of young code; without drafts 1 token a step."]
    return lines


def demo_table(metrics: Metrics) -> list[str]:
    """One file, read eight ways: loss, KV slots and KV bytes."""
    labels = {
        "window": "raw window only",
        "soft": "raw window + soft prompts of the compressed past",
        "copy": "raw window + copying",
        "compact": "raw window + compacted KV, 32 pairs of each 512 tokens",
        "all": "raw window + soft prompts + copying",
        "experts": "the same under the shipped experts' adapters",
        "more_raw": "raw window + as many more raw tokens",
        "full": "full history",
    }
    rows = [
        [label, number(metrics.get(f"{arm}.loss"), 4), number(metrics.get(f"{arm}.slots")),
         mebibytes(metrics.get(f"{arm}.kv_bytes")), percent(metrics.get(f"{arm}.recovered"), 1)]
        for arm, label in labels.items()
    ]  # fmt: skip
    head = ["what the host sees", "loss, nats/token", "KV slots", "KV, MiB", "recovered of full history's worth"]
    lines = table(head, rows if metrics else [])
    if metrics:
        worth = f"Full history is worth {number(metrics.get('worth'), 3)} nats/token on this file"
        lines += ["", f"{worth}: one file, no interval. Tokens of the continuation that were copied: "
                      f"{number(metrics.get('copied'))}. The chunks' mean TRA is "
                      f"{percent(metrics.get('tra.mean'), 1)}."]  # fmt: skip
    return lines
