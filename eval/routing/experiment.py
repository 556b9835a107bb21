"""Routing by reconstruction NLL among eight experts of a real host, beside what else could route.

Stages: `train` (accelerator) makes the experts and the adapters beside them; `text` (CPU) measures what needs no
model; `measure` (accelerator) computes what experts, host and baselines say of all texts; `decide` (CPU) lets the
router decide from it; `report` (CPU) turns all arrays into `routing.json` and a picture of the confusion matrix;
`ship` (CPU) makes the set that comes with the package, of `--domains`, without any text. Data are those of
`eval.routing.data`. `--shard i/k` splits training by experts and measuring by parts; a stage that was interrupted goes
on with what is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModel

from eval.arrays import about_of, save_arrays, shard_of
from eval.results import write_result
from eval.routing import cost, decide, measure
from eval.routing.reconstruction import measure_reconstruction
from eval.routing.report.metrics import metrics, table
from eval.routing.report.picture import draw_confusion
from eval.routing.setting import Setting
from eval.routing.train import merged, ship, train
from eval.routing.windows import KNOWN, TestWindows, load_mixed, load_mixed_fit, load_part
from hf_crouter.crouter import CRouterModel
from hf_crouter.crouter.loading import SHIPPED, load_crouter
from hf_crouter.data.tokens import TokenArray
from hf_crouter.errors import InputError
from hf_crouter.hosts.loading import load_host
from hf_crouter.routing.adapters import Lora
from hf_crouter.routing.experts import COMPRESSOR, HOST, SET_FILE, ExpertSet, expert_names
from hf_crouter.training.experts import ExpertModels, read_domain

PARTS = ("reconstruction", "host", "probe", "shortlist", "arrow", "latency", "compared")
DECIDED = ("routes", "borders", "changing", "shortlisted")
NOTES = (
    "Host: SmolLM2-135M-Instruct; experts: LoRA over the shipped crouter and LoRA of the host, 8 known domains; near "
    "unknown: shakespeare, speeches_en, meetings_qmsum; far: csv_tables, zh_tech. Chunks of 512 tokens of held-out "
    "documents, two of a window of 1024; spans of 128, rebuilt alone (span128) or read off the chunk's tokens "
    "(span128.within). accuracy: mean of the domains; a chunk left to the base model is wrong; .argmin: without that, "
    "as baselines answer; .mean: by the least mean reconstruction NLL, not the mean logarithm; .calibrated: by the "
    "mean less each expert's median. unseen: AUROC of the least distance from an expert's profile; "
    ".reconstruction_nll: of the least one above its expert's 99% quantile on calibration chunks, as for baselines "
    "(.calibrated: above the median; .raw: as it is); .gain: likewise, less that of the crouter alone. Rules: chosen "
    "on calibration chunks, each known domain left out in turn as the unknown one. oracle.loss_ratio: host loss of a "
    "window's second chunk under the route of its first, over that under the domain's own adapter. border: "
    "spliced chunks; docstrings, descriptions, notebooks: real ones, code against prose, with the switch chosen on "
    "spliced calibration chunks (.own: on calibration files with docstrings). lag: chunks from the one that holds the "
    "change to the first on the new route; base: share of those that hold it which the base model serves. shortlistN: "
    "asked are the N nearest by centroids; recall: the right one is among them. forgetting: change of a domain's "
    "routed host loss, nats/token, since it was added; sequential: of one adapter trained on the domains in turn. "
    "Times (.ms) of baselines, compared, switch and recompute are of a GPU that another process shared: upper bounds; "
    "those of cost.COUNT are not. Intervals: clustered by document."
)


def setting(args: argparse.Namespace, chunk: int) -> Setting:
    """What all parts share.

    Raises:
        InputError: the data are missing or were cut for another chunk length.
    """
    windows = TestWindows.load(args.data)
    if windows.ids.shape[1] != 2 * chunk:
        raise InputError(f"{args.data}: expected windows of {2 * chunk} tokens, got {windows.ids.shape[1]}")
    train_tokens, calibration = (
        [load_part(args.data, domain, part) for domain in args.domains] for part in ("train", "calibration")
    )
    return Setting(
        windows, load_mixed(args.data), train_tokens, calibration, tuple(args.domains), chunk,
        args.pieces, args.limit, args.rows, args.seed, load_mixed_fit(args.data),
    )  # fmt: skip


def beside_adapters(save: Path, domains: Sequence[str]) -> dict[str, Path]:
    """Adapters of the host beside the experts' that were trained, in the order in which their losses stand."""
    wanted = {name: save / "beside" / name for name in (*(f"sequential{i}" for i in range(len(domains))), "joint")}
    wanted |= {f"large.{name}": save / "compared" / name / HOST for name in domains}
    return {name: folder for name, folder in wanted.items() if (folder / "adapter_config.json").exists()}


def done(args: argparse.Namespace, part: str) -> bool:
    """Whether a part was measured on the same pieces."""
    path = args.save / "parts" / f"{part}.safetensors"
    return path.exists() and about_of(path) == about(args)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the arrays of a part depend on."""
    return {"domains": list(args.domains), "pieces": args.pieces, "limit": args.limit, "seed": args.seed}


def save_part(args: argparse.Namespace, part: str, compute: Callable[[], dict[str, np.ndarray]]) -> None:
    """Computes and writes a part, unless it is there."""
    if done(args, part):
        print(f"{part}: done before", flush=True)
        return
    began = time.monotonic()
    arrays = compute()
    save_arrays(args.save / "parts" / f"{part}.safetensors", arrays, about(args))
    print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)


def run_text(args: argparse.Namespace) -> None:
    """What needs no model."""
    tokenizer = Tokenizer.from_file(str(Path(args.crouter or SHIPPED) / "tokenizer.json"))
    chunk = TestWindows.load(args.data).ids.shape[1] // 2
    common = setting(args, chunk)
    save_part(args, "text", lambda: measure.measure_text(common, tokenizer))


def run_measure(args: argparse.Namespace) -> None:
    """All parts of this shard."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    shard, shards = args.shard
    if not shard:  # the others wait until it has added all experts
        merged(args.save, args.domains)
    experts = awaited(args.save, args.domains)
    if experts.names != tuple(args.domains):
        raise InputError(f"{args.save}: expected experts of {', '.join(args.domains)}, got {', '.join(experts.names)}")
    crouter, tokenizer = load_crouter(args.crouter, device)
    host, other = load_host(args.host, device, torch.bfloat16 if device == "cuda" else torch.float32)
    crouter.requires_grad_(False)
    host.requires_grad_(False)
    common = setting(args, crouter.config.chunk_length)
    computing: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "reconstruction": lambda: measure_reconstruction(
            crouter, experts, held_out(args, ExpertModels(crouter, tokenizer, host, other)), common
        ),
        "host": lambda: measure.measure_host(
            host, experts, {n: Lora.load(p) for n, p in beside_adapters(args.save, args.domains).items()}, common
        ),
        "probe": lambda: measure.measure_probe(crouter, common),
        "shortlist": lambda: measure.measure_shortlist(crouter, experts, common),
        "arrow": lambda: measure.measure_arrow(host, experts, str(args.save / "experts"), common),
        "latency": lambda: cost.measure_latency(crouter, host, experts, common),
        "compared": lambda: measure.measure_compared(
            crouter, whole_copies(args.save, device), small_adapters(args.save), common
        ),
    }  # fmt: skip
    # What takes longest stands at different shards: the experts' passes, or the host's.
    order = ("host", "reconstruction", "arrow", "probe", "shortlist", "latency", "compared")
    for part in [name for name in order if name in args.parts][shard::shards]:
        if part != "compared" or (args.save / "compared").exists():
            save_part(args, part, computing[part])


def held_out(args: argparse.Namespace, models: ExpertModels) -> dict[str, TokenArray]:
    """What each expert was calibrated on."""
    return {name: read_domain(args.data / name, models, args.seed).held_out for name in args.domains}


def run_decide(args: argparse.Namespace) -> None:
    """What the router makes of the experts' reconstruction NLL, whatever it made of it before."""
    if not done(args, "reconstruction"):
        raise InputError(f"{args.save}: expected the part `reconstruction` of these pieces; run the stage `measure`")
    measured = load_file(args.save / "parts" / "reconstruction.safetensors")
    experts = merged(args.save, args.domains)
    crouter, _ = load_crouter(args.crouter)
    common = setting(args, crouter.config.chunk_length)
    deciding: dict[str, Callable[..., dict[str, np.ndarray]]] = {
        "routes": decide.decide_routes, "borders": decide.decide_borders, "changing": decide.decide_changing
    }  # fmt: skip
    if done(args, "shortlist"):
        distance = load_file(args.save / "parts" / "shortlist.safetensors")["distance"]
        deciding["shortlisted"] = partial(decide.decide_shortlist, distance=distance)
    for part, function in deciding.items():
        found = function(crouter, experts, measured, setting=common)
        save_arrays(args.save / "parts" / f"{part}.safetensors", found, about(args))
        print(part, flush=True)


def awaited(save: Path, domains: Sequence[str], seconds: float = 120) -> ExpertSet:
    """The set of experts, once it holds every domain; whatever it holds after so many seconds."""
    folder, end = save / "experts", time.monotonic() + seconds
    while time.monotonic() < end:
        if (folder / SET_FILE).exists() and expert_names(folder) == list(domains):
            break
        time.sleep(1)
    return ExpertSet.load(folder)


def whole_copies(save: Path, device: str) -> dict[str, CRouterModel]:
    """Crouters that were trained whole."""
    folders = sorted(path.parent for path in (save / "full").glob("[!.]*/config.json"))
    return {folder.name: AutoModel.from_pretrained(folder).to(device).eval().requires_grad_(False)
            for folder in folders}  # fmt: skip


def small_adapters(save: Path) -> dict[str, Lora]:
    """Adapters of the shared crouter with another rank than the experts'."""
    folders = sorted(path.parent for path in (save / "compared").glob(f"[!.]*/{COMPRESSOR}/adapter_config.json"))
    return {folder.parent.name: Lora.load(folder) for folder in folders}


def run_report(args: argparse.Namespace) -> None:
    """Figures, table and picture of whatever was measured."""
    parts = {
        name: load_file(args.save / "parts" / f"{name}.safetensors")
        for name in (*PARTS, *DECIDED, "text")
        if name != "reconstruction" and done(args, name)
    }
    windows = TestWindows.load(args.data)
    beside = list(beside_adapters(args.save, args.domains))
    found = metrics(parts, windows, load_mixed(args.data), args.domains, beside, chunk=windows.ids.shape[1] // 2,
                    seed=args.seed, draws=args.draws)  # fmt: skip
    print(table(found))
    config = about(args) | {"windows": len(windows.ids), "parts": sorted(parts), "draws": args.draws}
    path = write_result(args.result, found, seed=args.seed, config=config, notes=NOTES, device=args.device)
    if "routes" in parts:
        print(draw_confusion(found, path.with_name(f"{args.result}-confusion.svg")).name)
    print(path)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    cuda = torch.cuda.device_count() > 0  # does not start the accelerator
    parser.add_argument("stage", choices=["train", "text", "measure", "decide", "report", "ship"])
    parser.add_argument("--data", required=True, type=Path, help="folder of eval.routing.data")
    parser.add_argument("--save", required=True, type=Path, help="folder of experts and arrays")
    parser.add_argument("--host", default="smollm2-135m")
    parser.add_argument("--crouter", help="the shipped one by default")
    parser.add_argument("--domains", nargs="+", default=list(KNOWN), help="known ones, in order of adding")
    parser.add_argument("--seconds", nargs=2, type=float, default=[60.0, 45.0], metavar=("COMPRESSOR", "HOST"),
                        help="training of each expert's two parts")  # fmt: skip
    parser.add_argument("--steps", nargs=2, type=int, metavar=("COMPRESSOR", "HOST"), help="instead of seconds")
    parser.add_argument("--options", help="further fields of ExpertArguments, as a JSON object")
    parser.add_argument("--continual", action="store_true", help="also one adapter in turn and one of all together")
    parser.add_argument("--compared", nargs="*", default=[], choices=KNOWN, metavar="DOMAIN",
                        help="that also get a whole copy of the crouter and adapters of other ranks")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="to measure")
    parser.add_argument("--pieces", type=int, default=400, help="spliced and changing documents, each")
    parser.add_argument("--limit", type=int, default=300, help="calibration pieces of a domain, at most")
    parser.add_argument("--rows", type=int, default=64 if cuda else 4, help="chunks at once")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), help="i/k: this process of k that run at once")
    parser.add_argument("--draws", type=int, default=400, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="routing")
    parser.add_argument("--device", help="report: where the arrays were measured; this machine by default")
    parser.add_argument("--out", type=Path, default=Path("experts"), help="where `ship` puts the set")


def run(args: argparse.Namespace) -> None:
    """Trains, measures or reports."""
    args.save.mkdir(parents=True, exist_ok=True)
    stages = {"train": train, "text": run_text, "measure": run_measure, "decide": run_decide, "report": run_report,
              "ship": ship}  # fmt: skip
    stages[args.stage](args)
