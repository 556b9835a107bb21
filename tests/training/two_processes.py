"""Run by torchrun in test_loop.py: trains in two processes and writes down what each of them saw."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed

from hf_crouter.errors import InputError
from hf_crouter.training.loop import Batch, LoopArguments, make_accelerator, run_loop
from tests.training.test_loop import ROWS, WIDTH, batch, toy


def run(output, batches=batch, **options):
    asked = []

    def numbered(index):
        asked.append(index)
        return batches(index)

    arguments = LoopArguments(**{"output": str(output), "batch_size": ROWS, "warmup_steps": 3, **options})
    accelerator = make_accelerator(arguments)
    module, record = toy(), {"world": accelerator.num_processes, "rank": accelerator.process_index}
    if record["rank"]:  # the first process decides with which weights all start
        torch.nn.init.zeros_(module.matrix.weight)
    try:
        result = run_loop(module, numbered, arguments, accelerator, positions_per_sequence=WIDTH, title="toy")
        record |= {"steps": result.steps, "tokens": result.tokens, "seconds": result.seconds}
    except (InputError, KeyboardInterrupt) as error:
        record |= {"steps": -1, "error": str(error)}
    weights = [parameter.tolist() for parameter in module.parameters()]
    return {**record, "asked": asked, "weights": weights, "backend": torch.distributed.get_backend()}


def interrupted(index):
    if index >= 8:
        raise KeyboardInterrupt
    return batch(index)


def nan_on_one(index):
    data = batch(index)
    return Batch((data.arguments[0] * float("nan"),), 1) if index == 5 else data


def main(folder):
    runs = {"steps": run(folder / "steps", steps=6, save_minutes=0)}
    run(folder / "parts", interrupted, steps=6, save_minutes=0)
    runs["resumed"] = run(folder / "parts", steps=6, resume=True)
    runs["seconds"] = run(folder / "seconds", seconds=0.3)
    runs["seconds again"] = run(folder / "seconds", seconds=0.3, resume=True)
    runs["nan"] = run(folder / "nan", nan_on_one, steps=9, log_every=2, save_minutes=0)
    (folder / f"rank-{runs['steps']['rank']}.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # else a thread of it can abort a process that exits
