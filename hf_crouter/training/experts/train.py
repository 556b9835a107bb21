"""Stage 3: trains an expert for a domain: an adapter of the shared crouter, one of the host, and their calibration.

Both adapters are PEFT's LoRA, trained by the loop of the other stages; the models that they are trained on come back
as they were, to the bit. What is measured on documents kept out of fitting is measured with the adapters as written.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..chunking import tokenizer_fingerprint
from ..crouter import CRouterModel
from ..crouter.fingerprint import crouter_fingerprint
from ..crouter.loading import load_crouter
from ..data.documents import Document
from ..data.tokens import TokenArray, encode_documents
from ..errors import InputError
from ..hosts.fingerprint import host_fingerprint
from ..hosts.loading import load_host
from ..hosts.positions import max_positions
from ..hosts.unwrap import display_name
from ..routing.adapters import CONFIG, WEIGHTS, AdapterStack, Lora
from ..routing.calibration import LengthCalibration
from ..routing.experts import (
    COMPRESSOR,
    EXPERT_FILE,
    HOST,
    NAME,
    SET_FILE,
    Centroid,
    Expert,
    ExpertConfig,
    ExpertSet,
    Texts,
    add_expert,
    mounted_names,
)
from ..routing.measure import measure_evidence
from ..routing.router import Router, token_reconstruction_nll
from ..types import BASE
from ..utils.batching import padded
from .evaluate import reconstruction_score
from .flops import matrix_flops_per_token, measured_matrix_rate
from .loop import Batch, LoopArguments, compiled_layers, device_name, make_accelerator, progress_bar, run_loop
from .reconstruct import ReconstructArguments, ReconstructionLoss, reconstruction_batch

SECONDS = 300.0  # of each part, where no box is given
_LEAST = 8  # documents that a calibration needs
_SHARE = 0.1  # of the training documents, where the data keeps fewer out
_PARTS = (COMPRESSOR, HOST)


@dataclass
class ExpertArguments:
    """Arguments of `hf-crouter expert add`."""

    crouter: str = field(default="", metadata={"help": "folder or hub name of the shared crouter; by default the one "
                                               "that comes with the package"})  # fmt: skip
    host: str = field(default="", metadata={"help": "known name, folder or hub name of the host"})
    data: str = field(default="", metadata={"help": "folder prepared with the crouter's tokenizer"})
    experts: str = field(default="experts", metadata={"help": "folder of the expert set; made if missing"})
    compressor_steps: int | None = field(default=None, metadata={"help": "steps of the crouter's adapter"})
    compressor_seconds: float | None = field(
        default=None, metadata={"help": f"seconds instead of steps; {SECONDS:g} where neither is given"}
    )
    compressor_rank: int = field(default=16, metadata={"help": "rank of the crouter's adapter"})
    compressor_alpha: float = field(default=32.0, metadata={"help": "its scale, over the rank"})
    compressor_targets: list[str] = field(
        default_factory=lambda: ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        metadata={"help": "linear layers of the crouter that it changes"},
    )
    compressor_batch_size: int = field(default=32, metadata={"help": "chunks a step on each process"})
    compressor_learning_rate: float = field(default=2e-3, metadata={"help": "its peak learning rate"})
    ragged_share: float = field(default=0.3, metadata={"help": "share of chunks with a random length"})
    host_steps: int | None = field(default=None, metadata={"help": "steps of the host's adapter"})
    host_seconds: float | None = field(
        default=None, metadata={"help": f"seconds instead of steps; {SECONDS:g} where neither is given"}
    )
    host_rank: int = field(default=8, metadata={"help": "rank of the host's adapter"})
    host_alpha: float = field(default=16.0, metadata={"help": "its scale, over the rank"})
    host_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "linear layers of the host that it changes"},
    )
    host_batch_size: int = field(default=8, metadata={"help": "windows a step on each process"})
    host_learning_rate: float = field(default=5e-4, metadata={"help": "its peak learning rate"})
    window: int = field(default=1024, metadata={"help": "tokens that the host reads at once"})
    calibration_chunks: int = field(default=256, metadata={"help": "held-out chunks measured at each length, at most"})
    keep_texts: bool = field(default=True, metadata={"help": "keep these in the expert's folder, so that experts that "
                                                     "are mounted later can be told from it"})  # fmt: skip
    warmup_steps: int = field(default=20, metadata={"help": "linear warm-up of both parts"})
    log_every: int = field(default=20, metadata={"help": "steps between lines of progress"})
    seed: int = field(default=0, metadata={"help": "of weights, batches and held-out documents"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast"})
    compile: bool = field(default=False, metadata={"help": "torch.compile each layer"})

    def check(self) -> None:
        """Refuses what would only be noticed later.

        Raises:
            InputError: a number out of its range, no layers, or two boxes for one part.
        """
        parts = ("steps", "seconds", "rank", "alpha", "batch_size", "learning_rate")
        for name in (*(f"{part}_{name}" for part in _PARTS for name in parts), "calibration_chunks", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{_option(name)}: expected more than 0, got {value}")
        if self.window < 2:
            raise InputError(f"--window: expected at least 2, got {self.window}")
        for name in ("compressor_targets", "host_targets"):
            if not getattr(self, name):
                raise InputError(f"{_option(name)}: expected names of layers, got none")
        for part in _PARTS:
            steps, seconds = getattr(self, f"{part}_steps"), getattr(self, f"{part}_seconds")
            if steps is not None and seconds is not None:
                raise InputError(f"--{part}-steps, --{part}-seconds: expected one of them, got {steps} and {seconds}")
            self.settings(part, "").box(1)
        self.settings(COMPRESSOR, "").check()

    def settings(self, part: str, output: str | Path) -> ReconstructArguments:
        """What the loop needs to train `compressor` or `host`, with its checkpoints in `output`."""
        steps, seconds = getattr(self, f"{part}_steps"), getattr(self, f"{part}_seconds")
        shared = (
            "warmup_steps",
            "log_every",
            "seed",
            "bf16",
            "ragged_share",
        )  # layers are compiled here, not the whole
        return ReconstructArguments(
            output=str(output),
            steps=steps,
            seconds=SECONDS if steps is None and seconds is None else seconds,
            batch_size=getattr(self, f"{part}_batch_size"),
            learning_rate=getattr(self, f"{part}_learning_rate"),
            save_minutes=1e9,  # a part is trained in one go
            **{name: getattr(self, name) for name in shared},
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, eq=False)
class ExpertModels:
    """The shared crouter and the host with their tokenizers; several experts may be trained on them in turn."""

    crouter: CRouterModel
    crouter_tokenizer: Any
    host: PreTrainedModel
    host_tokenizer: Any


def load_models(arguments: ExpertArguments) -> ExpertModels:
    """Crouter and host that the arguments name.

    Raises:
        InputError: one of them is missing or damaged.
    """
    if not arguments.host:
        raise InputError("--host: expected a folder or a hub name, got none")
    crouter, crouter_tokenizer = load_crouter(arguments.crouter or None)
    host, host_tokenizer = load_host(arguments.host, dtype=torch.bfloat16 if arguments.bf16 else torch.float32)
    return ExpertModels(crouter, crouter_tokenizer, host, host_tokenizer)


@dataclass(frozen=True, eq=False)
class Domain:
    """Documents of a domain: what is fitted and what is kept out, in the crouter's and in the host's tokens."""

    train: TokenArray
    held_out: TokenArray
    host_train: TokenArray
    host_held_out: TokenArray


def read_domain(folder: str | Path, models: ExpertModels, seed: int = 0) -> Domain:
    """Documents of a prepared folder; kept out are those of its calibration part.

    Where that part holds fewer than 8 documents, a tenth of the training documents (at least as many as are missing,
    at most half) is kept out as well, drawn by the seed. The parts for tests are not read.

    Args:
        folder: prepared with the crouter's tokenizer.
        models: whose tokenizers; where they differ, the text is encoded again for the host.
        seed: of the draw.

    Raises:
        InputError: no such data, data of another vocabulary, or fewer than two documents.
    """
    train = load_tokens(Path(folder) / "train.safetensors", models.crouter_tokenizer)
    path = Path(folder) / "calibration.safetensors"
    held_out = [load_tokens(path, models.crouter_tokenizer)] if path.exists() else []
    kept, count = sum(len(tokens.names) for tokens in held_out), len(train.names)
    if kept < _LEAST:
        drawn = min(max(_LEAST - kept, round(_SHARE * count)), count // 2)
        if not drawn:
            raise InputError(f"{folder}: expected at least 2 documents to train on, got {count}")
        order = np.random.default_rng(seed).permutation(count)
        held_out.append(select(train, np.sort(order[:drawn])))
        train = select(train, np.sort(order[drawn:]))
    kept_out = join(held_out)
    return Domain(train, kept_out, host_tokens(train, models), host_tokens(kept_out, models))


def load_tokens(path: str | Path, tokenizer: Any) -> TokenArray:
    """Token file in the crouter's ids.

    Raises:
        InputError: missing, damaged or of another vocabulary.
    """
    tokens = TokenArray.load(path)
    if tokens.vocab_size != len(tokenizer):
        raise InputError(
            f"{path}: expected data of the crouter's tokenizer with {len(tokenizer)} entries, "
            f"got one of {tokens.vocab_size}"
        )
    return tokens


def select(tokens: TokenArray, documents: np.ndarray) -> TokenArray:
    """The documents of these numbers `[D]`, in this order."""
    pieces = [tokens.ids[tokens.starts[d] : tokens.starts[d + 1]] for d in documents]
    starts = np.cumsum([0, *map(len, pieces)]).astype(np.int64)
    ids = np.concatenate(pieces) if pieces else tokens.ids[:0]
    names, groups = (tuple(values[d] for d in documents) for values in (tokens.names, tokens.groups))
    return TokenArray(ids, starts, names, groups, tokens.separator_id, tokens.vocab_size)


def join(arrays: Sequence[TokenArray]) -> TokenArray:
    """The documents of several arrays of one tokenizer, one after another."""
    first = arrays[0]
    ends = np.cumsum([0, *map(len, arrays)])
    starts = [a.starts[:-1] + end for a, end in zip(arrays, ends[:-1], strict=True)]
    names, groups = (tuple(v for a in arrays for v in getattr(a, key)) for key in ("names", "groups"))
    ids = np.concatenate([a.ids for a in arrays])
    return TokenArray(ids, np.concatenate([*starts, ends[-1:]]), names, groups, first.separator_id, first.vocab_size)


def host_tokens(tokens: TokenArray, models: ExpertModels) -> TokenArray:
    """The same documents in the host's ids; the same array where both share a tokenizer."""
    if tokenizer_fingerprint(models.crouter_tokenizer) == tokenizer_fingerprint(models.host_tokenizer):
        return tokens
    decode = models.crouter_tokenizer.decode
    documents = [
        Document(name, group, decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for name, group, ids in tokens.documents()
    ]
    separator = models.host_tokenizer.eos_token_id
    return encode_documents(documents, models.host_tokenizer, separator_id=separator or 0)


class HostLoss(nn.Module):
    """Next-token loss of a host, in evaluation mode throughout: dropout would draw random numbers."""

    def __init__(self, host: PreTrainedModel):
        super().__init__()
        self.host = host

    def train(self, mode: bool = True) -> HostLoss:
        """Stays in evaluation mode."""
        super().train(mode)
        self.host.eval()
        return self

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[B, T]` ids to `loss`, nats/token."""
        targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)  # the logits, which are large, are not cut and copied
        logits: Any = self.host(input_ids=input_ids, use_cache=False).logits
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)}


class _Factor(nn.Module):
    """One of LoRA's two matrices, which is no `nn.Linear`: the loop gives it to AdamW.

    Muon, which it gives linear layers to, would take longer over hundreds of thin matrices than the step itself.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


@contextlib.contextmanager
def lora(model: PreTrainedModel, rank: int, alpha: float, targets: list[str]) -> Iterator[Any]:
    """PEFT's model with a new LoRA around `model`, which gets its own layers, modes and flags back at the end.

    Args:
        model: crouter or host, changed in place meanwhile.
        rank: of the adapter.
        alpha: its scale, over the rank.
        targets: ends of names of linear layers.

    Raises:
        InputError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:  # only training needs it
        raise InputError('expert: training needs peft: pip install "hf_crouter[train]"') from error
    odd = [f"a {type(layer).__name__} at {path}" for path, layer in model.named_modules()
           if f".{path}".endswith(tuple(f".{t}" for t in targets)) and not isinstance(layer, nn.Linear)]  # fmt: skip
    if odd:  # before peft has touched anything
        raise InputError(f"{type(model).__name__}: expected linear layers {', '.join(targets)}, got {odd[0]}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), bias="none")  # type: ignore[arg-type]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    parameters, training = list(model.parameters()), model.training
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"{type(model).__name__}: expected linear layers {', '.join(targets)}, got none") from error
    try:
        for layer in list(model.modules()):
            if not hasattr(layer, "lora_A"):
                continue
            for side in (layer.lora_A, layer.lora_B):
                side["default"] = _Factor(side["default"].weight)  # type: ignore[index, union-attr]
        yield adapted
    finally:
        adapted.unload()
        vars(model).pop("peft_config", None)
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(training)


def save_adapter(adapted: Any, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (bfloat16) as PEFT does, naming no local path."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file({key: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in tensors.items()},
              folder / WEIGHTS, {"format": "pt"})  # fmt: skip
    config = adapted.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": None, "auto_mapping": None,
               "target_modules": sorted(config["target_modules"])}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=1, default=_plain, sort_keys=True) + "\n")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def train_expert(name: str, arguments: ExpertArguments, models: ExpertModels | None = None) -> dict[str, Any]:
    """Trains both adapters of a domain, calibrates them, mounts the expert in the set and returns the record.

    The set is touched only at the end. By the first of several processes alone: calibration, set and the record's
    `held_out`.

    Args:
        name: the expert's, new in the set.
        arguments: the data is prepared.
        models: where several experts are trained in turn; loaded by default. On return they are as they were, but on
            the training's device.

    Raises:
        InputError: a name that is taken or none, no data, or data and models that do not fit each other.
        MismatchError: the set's experts were made for another crouter, host or tokenizer.
    """
    arguments.check()
    check_name(name, arguments.experts)
    models = models or load_models(arguments)
    config = expert_config(models)
    mounted(arguments.experts, config)
    domain = read_domain(arguments.data, models, arguments.seed)
    length = models.crouter.config.chunk_length
    positions = max_positions(models.host)
    if positions and arguments.window > positions:
        raise InputError(f"--window: expected at most the host's {positions} positions, got {arguments.window}")
    texts = cut_by_length(domain.held_out, length, arguments.calibration_chunks)  # too short is said now
    if len(cut(domain.train, length, 2, 1)[0]) < 2:
        raise InputError(f"{arguments.data}: expected at least 2 chunks of {length} tokens to train on, got fewer")
    accelerator = make_accelerator(arguments.settings(HOST, ""))
    record: dict[str, Any] = {
        "stage": "expert",
        "arguments": {k: v for k, v in asdict(arguments).items() if k not in ("data", "crouter", "host", "experts")},
        "documents": len(domain.train.names),
        "torch": torch.__version__,
        "device": device_name(accelerator.device),
    }
    with tempfile.TemporaryDirectory(prefix="expert-") as temporary:
        folder = Path(temporary) / name
        compressor, host = (arguments.settings(part, Path(temporary) / "runs" / part) for part in _PARTS)
        record[COMPRESSOR] = fit_adapter(
            ReconstructionLoss(models.crouter),
            models.crouter,
            lambda index: reconstruction_batch(domain.train, compressor, length, index),
            (arguments, compressor, length),
            accelerator,
            folder / COMPRESSOR,
        )
        if accelerator.device.type == "cuda":
            rate = record[COMPRESSOR]["tokens_per_second"] / accelerator.num_processes
            # backward makes no gradients of the frozen matrices
            flops = matrix_flops_per_token(models.crouter.config) * 2 / 3 * rate
            record[COMPRESSOR]["mfu"] = flops / measured_matrix_rate(accelerator.device)
        record[HOST] = fit_adapter(
            HostLoss(models.host),
            models.host,
            lambda index: host_batch(domain.host_train, arguments, index),
            (arguments, host, arguments.window),
            accelerator,
            folder / HOST,
        )
        if accelerator.is_main_process:
            expert = measured_expert(folder, config, domain, texts, models, arguments, record)
            expert.save_description(folder, texts if arguments.keep_texts else None)
            add_expert(arguments.experts, folder)
            measure_cross_scores(arguments.experts, models.crouter, name)
    accelerator.wait_for_everyone()  # and no more: the next expert is trained by the same processes
    return {"path": str(Path(arguments.experts) / name), **record}


def fit_adapter(
    loss: nn.Module,
    model: PreTrainedModel,
    batch: Callable[[int], Batch],
    how: tuple[ExpertArguments, LoopArguments, int],
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, Any]:
    """Trains one adapter, writes it to `folder`, named for the part in the expert's, and returns its record."""
    arguments, settings, positions = how
    name, part = folder.parent.name, folder.name
    rank, alpha, targets = (getattr(arguments, f"{part}_{key}") for key in ("rank", "alpha", "targets"))
    with lora(model, rank, alpha, targets) as adapted:
        with compiled_layers(model, arguments.compile):
            result = run_loop(
                loss, batch, settings, accelerator, positions_per_sequence=positions, title=f"{name}: {part}"
            )
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if accelerator.is_main_process:
            save_adapter(adapted, folder)
    accelerator.free_memory()
    return {
        "parameters": parameters,
        **result.record(),
    }


def check_name(name: str, experts: str | Path) -> None:
    """Refuses a name that could not be mounted.

    Raises:
        InputError: no name of a folder, taken in the set, or its place there holds something else.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"expert: expected a name of letters, digits, '.', '_' and '-', not hidden, got {name!r}")
    place = Path(experts) / name
    if (Path(experts) / SET_FILE).exists() and name in mounted_names(experts):
        raise InputError(f"{place}: expected nothing there, got an expert of this name already")
    if place.exists() and not (place / EXPERT_FILE).exists():  # an expert that is not mounted was left half-way
        raise InputError(f"{place}: expected nothing there, got something else")


def expert_config(models: ExpertModels) -> ExpertConfig:
    """What experts of these models fit."""
    return ExpertConfig(
        crouter_fingerprint(models.crouter, decoder=True),
        tokenizer_fingerprint(models.crouter_tokenizer),
        display_name(models.host),
        host_fingerprint(models.host),
        tokenizer_fingerprint(models.host_tokenizer),
    )


def mounted(folder: str | Path, config: ExpertConfig) -> ExpertSet:
    """The experts of a set, empty where there is none yet.

    Raises:
        InputError: damaged files.
        MismatchError: experts of another crouter, host or tokenizer.
    """
    experts = ExpertSet.load(folder) if (Path(folder) / SET_FILE).exists() else ExpertSet(())
    experts.check(
        config.crouter_fingerprint,
        config.host_fingerprint,
        crouter_tokenizer=config.crouter_tokenizer,
        host_tokenizer=config.host_tokenizer,
    )
    return experts


def host_batch(tokens: TokenArray, arguments: ExpertArguments, index: int) -> Batch:
    """Batch number `index`: random windows of the documents, one after another with separators between them."""
    ids = tokens.windows(min(arguments.window, len(tokens)), arguments.seed, index, arguments.host_batch_size)
    return Batch((torch.from_numpy(ids),), ids.size)


def cut(tokens: TokenArray, length: int, limit: int, least: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """Consecutive pieces of the documents, each of at most `length` tokens and at least `least`, evenly spread.

    Returns:
        At most `limit` tensors `[T]`, int64, and the document's number of each, `[N]`.
    """
    ids, mask = tokens.chunks(length)
    sizes = mask.sum(1)
    documents = np.repeat(np.arange(len(tokens.names)), -(-(np.diff(tokens.starts) - 1) // length))
    fitting = np.flatnonzero(sizes >= least)
    chosen = fitting[np.arange(min(limit, len(fitting))) * len(fitting) // max(1, min(limit, len(fitting)))]
    return [torch.from_numpy(ids[i, : sizes[i]].copy()) for i in chosen], documents[chosen]


def cut_by_length(tokens: TokenArray, length: int, limit: int) -> Texts:
    """Pieces of an eighth, a quarter, a half of a chunk's length and of the whole, where documents are so long.

    Raises:
        InputError: no document is long enough for any.
    """
    lengths = sorted({max(1, length >> shift) for shift in range(4)})
    ids, documents = {}, {}
    for size in lengths:
        pieces, groups = cut(tokens, size, limit, size)
        if pieces:
            ids[size], documents[size] = torch.stack(pieces).numpy(), groups
    if lengths[0] not in ids:
        raise InputError(f"expected documents of at least {lengths[0]} tokens to calibrate on, got none")
    return Texts(ids, documents)


def measure_cross_scores(folder: str | Path, crouter: CRouterModel, title: str = "experts") -> None:
    """Measures how the texts of a set's experts look to all of them, with progress.

    Args:
        folder: of the set.
        crouter: the shared one, on the device to compute on.
        title: shown at the progress bar.
    """
    began, read = time.monotonic(), 0
    with progress_bar(f"{title}: among the set's experts", True, 0.0) as show:

        def advance(done: int, passes: int, tokens: int) -> None:
            nonlocal read
            read += tokens
            show(done / passes, {}, read / max(time.monotonic() - began, 1e-9))

        measure_evidence(folder, crouter.eval(), rows=_rows(crouter.device), advance=advance)


def measured_expert(
    folder: Path,
    config: ExpertConfig,
    domain: Domain,
    texts: Texts,
    models: ExpertModels,
    arguments: ExpertArguments,
    record: dict[str, Any],
) -> Expert:
    """The expert whose adapters lie in `folder`, calibrated on the documents kept out of fitting.

    Args:
        folder: named as the expert; holds `compressor/` and `host/`.
        config: what it fits.
        domain: its documents.
        texts: held out, to calibrate on.
        models: on the device to compute on, plain.
        arguments: how many pieces are measured.
        record: gets `held_out`: residuals (nats/token), TRA and host losses (nats/token) without and with adapter.
    """
    name, crouter, host = folder.name, models.crouter.eval(), models.host.eval()
    compressor, served = Lora.load(folder / COMPRESSOR), Lora.load(folder / HOST)
    length, limit, rows = crouter.config.chunk_length, arguments.calibration_chunks, _rows(crouter.device)
    windows, _ = cut(domain.host_held_out, arguments.window, max(4, limit // 8), 2)
    began, steps = time.monotonic(), len(texts.ids) + 4
    with progress_bar(f"{name}: calibration", True, 0.0) as show:
        done = read = 0

        def advance(tokens: int) -> None:
            nonlocal done, read
            done, read = done + 1, read + tokens
            show(done / steps, {}, read / max(time.monotonic() - began, 1e-9))

        stack = AdapterStack(crouter, {name: compressor})
        try:
            reconstruction_nlls = {}
            for size, ids in texts.ids.items():
                nats = token_reconstruction_nll(crouter, list(torch.from_numpy(ids)), stack, rows=rows)
                reconstruction_nlls[size] = [float(row.mean()) for row in nats]
                advance(size * len(ids))
            ids, mask = map(torch.from_numpy, domain.held_out.chunks(length, limit))
            base = reconstruction_score(crouter, ids, mask, batch_size=rows)
            advance(int(mask.sum()))
            with stack.using([0]):
                own = reconstruction_score(crouter, ids, mask, batch_size=rows)
            advance(int(mask.sum()))
        finally:
            stack.remove()
        stack = AdapterStack(host, {name: served})
        try:
            losses = []
            for number in (BASE, 0):
                nats, counts = host_nats(host, windows, stack, [number] * len(windows), rows=arguments.host_batch_size)
                losses.append(float(nats.sum() / counts.sum()))
                advance(int(counts.sum()))
        finally:
            stack.remove()
        centroid = Centroid.fit(_latents(crouter, domain.train, limit, rows))
        documents = len(domain.held_out.names)
        calibration = LengthCalibration.fit(
            reconstruction_nlls, documents, config.crouter_fingerprint, compressor.checksum
        )
    record["held_out"] = {
        "documents": documents,
        "chunks": base.chunks,
        "residual": {"base": base.nats, "adapter": own.nats},
        "tra": {"base": base.accuracy, "adapter": own.accuracy},
        "host_tokens": int(counts.sum()),
        "host_loss": {"base": losses[0], "adapter": losses[1]},
    }
    described = ExpertConfig(**{**vars(config), "training": record})
    return Expert(name, compressor, served, calibration, described, centroid)


@torch.no_grad()
def _latents(crouter: CRouterModel, tokens: TokenArray, limit: int, rows: int) -> torch.Tensor:
    """Latents of training chunks without any adapter, `[N, M, latent_size]`.

    Whole chunks, as a router is asked of; those of short documents lie elsewhere. Shorter ones where there are no two.
    """
    length = crouter.config.chunk_length
    pieces, _ = cut(tokens, length, limit, length)
    if len(pieces) < 2:
        pieces, _ = cut(tokens, length, limit, 1)
    ids, mask = padded(pieces)
    batches = zip(ids.split(rows), mask.split(rows), strict=True)
    return torch.cat([crouter.encode(i.to(crouter.device), m.to(crouter.device)).cpu() for i, m in batches])


def _rows(device: torch.device) -> int:
    return 4 if device.type == "cpu" else 64


@torch.no_grad()
def host_nats(
    host: PreTrainedModel,
    pieces: Sequence[torch.Tensor],
    stack: AdapterStack | None = None,
    numbers: Sequence[int] | None = None,
    *,
    rows: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a host's next-token prediction costs on texts that it reads from their start.

    Args:
        host: on any device.
        pieces: host token ids, 1-D; the first token of each is not predicted.
        stack: adapters of the host.
        numbers: which of them serves each text; `BASE` for none.
        rows: texts at once.

    Returns:
        Nats of each text and its number of predicted tokens, float64 `[N]` each.
    """
    embedding: Any = host.get_input_embeddings()
    device, totals = embedding.weight.device, []
    for start in range(0, len(pieces), rows):
        batch = list(pieces[start : start + rows])
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)  # behind the text: nothing sees it
        sizes = torch.tensor([len(piece) for piece in batch], device=device)
        chosen = contextlib.nullcontext()
        if stack is not None and numbers is not None:
            chosen = stack.using(numbers[start : start + rows])
        with chosen:
            logits: Any = host(input_ids=ids, use_cache=False).logits[:, :-1]
        nats = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        real = torch.arange(1, ids.shape[1], device=device) < sizes[:, None]
        totals.append((nats.view(real.shape) * real).sum(1).double().cpu())
    counts = torch.tensor([max(0, len(piece) - 1) for piece in pieces], dtype=torch.float64)
    return torch.cat(totals) if totals else counts, counts


@dataclass(frozen=True, eq=False)
class RoutedDomain:
    """How the texts of one domain were routed.

    Attributes:
        pieces: texts, each of at most a chunk.
        routes: how many of them went to which expert, by name; "" is the base model.
        accuracy: share that went where it should: to the expert of the domain's name, else to the base model.
        loss: the host's nats/token on them, `base`, `routed` and, where there is an expert of the name, `own`; empty
            without a host.
    """

    pieces: int
    routes: dict[str, int]
    accuracy: float
    loss: dict[str, float]


def route_domains(
    models: ExpertModels | None,
    router: Router,
    domains: Mapping[str, TokenArray],
    *,
    limit: int = 64,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, RoutedDomain]:
    """Routes texts of known origin, each on its own, and reads them with the host under the adapter that was chosen.

    Args:
        models: their host reads; None: nothing is read.
        router: over the experts.
        domains: documents in the crouter's tokens, by the name of their expert or any other name.
        limit: texts of each domain, evenly spread over its documents.
        advance: called with texts done and their number.

    Raises:
        InputError: documents that are all too short to judge.
    """
    length, found = router.crouter.config.chunk_length, {}
    for number, (name, tokens) in enumerate(domains.items()):
        pieces, _ = cut(tokens, length, limit, router.fewest)
        if not pieces:
            raise InputError(f"{name}: expected documents of at least {router.fewest} tokens, got none")
        routes = []
        for start in range(0, len(pieces), router.rows):
            block = pieces[start : start + router.rows]
            found_here = router.reconstruction_nlls(block)  # each text on its own: nothing came before it
            routes += [router.decide(row, len(piece)) for row, piece in zip(found_here, block, strict=True)]
            if advance is not None:
                advance(number * limit + min(limit, len(routes)), len(domains) * limit)
        known = name if name in router.names else None
        chosen = [route.number for route in routes]
        losses: dict[str, float] = {}
        if models is not None:
            losses = _losses(models, router, tokens, pieces, {
                "base": [BASE] * len(pieces), "routed": chosen,
                **({"own": [router.names.index(known)] * len(pieces)} if known else {}),
            })  # fmt: skip
        counts = Counter(route.expert or "" for route in routes)
        right = sum(route.expert == known for route in routes) / len(routes)
        found[name] = RoutedDomain(len(pieces), dict(counts), right, losses)
    return found


def _losses(
    models: ExpertModels,
    router: Router,
    tokens: TokenArray,
    pieces: Sequence[torch.Tensor],
    choices: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Nats/token of a host on crouter pieces under each choice of adapters."""
    ends = np.cumsum([0, *(len(piece) + 1 for piece in pieces)])
    ids = np.concatenate([np.append(piece.numpy(), tokens.separator_id) for piece in pieces])
    names = tuple(str(i) for i in range(len(pieces)))
    array = TokenArray(ids.astype(tokens.ids.dtype), ends, names, names, tokens.separator_id, tokens.vocab_size)
    texts = [torch.from_numpy(text.astype(np.int64)) for _, _, text in host_tokens(array, models).documents()]
    stack = AdapterStack(models.host, {expert.name: expert.host for expert in router.experts})
    try:
        found = {}
        for name, numbers in choices.items():
            nats, counts = host_nats(models.host, texts, stack, numbers)
            found[name] = float(nats.sum() / counts.sum())
        return found
    finally:
        stack.remove()
