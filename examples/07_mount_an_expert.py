"""Mounts an expert live and shows the route of a mixed document, chunk by chunk, as a coloured strip.

    python examples/07_mount_an_expert.py [FILE]

What comes out: the strip before and after the expert for encyclopaedic prose joins the one for code: four characters a
chunk, a colour an expert, dots where the plain host serves. What the first expert says does not change by a bit. Then
the borders that the reconstruction NLL of single tokens shows, and the route of every stretch. The document is code,
an article and a reference manual by turns.
"""

import argparse
import graphlib
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.text import Text

from hf_crouter import load_crouter
from hf_crouter.routing.experts import ExpertSet, expert_folder
from hf_crouter.routing.profile import Evidence
from hf_crouter.routing.router import Router
from hf_crouter.routing.spans import route_spans, split_document
from hf_crouter.types import Route

COLOURS = ("black on green", "black on cyan", "black on yellow", "black on magenta")


def document() -> str:
    """Code, prose, a manual, code: some 3,500 tokens."""
    code = Path(graphlib.__file__).read_text(encoding="utf-8")
    prose = Path(__file__).with_name("pendulum_clock.txt").read_text(encoding="utf-8")
    return code[:4100] + prose + topics["exceptions"] + topics["objects"][:2000] + code[-4100:]


def strip(routes: list[Route], lengths: list[int]) -> Text:
    """Four characters a chunk of 512 tokens, in the colour of its expert."""
    line = Text("  ")
    for route, length in zip(routes, lengths, strict=True):
        width = max(1, round(length / 128))
        letter = "." if route.expert is None else route.expert[0]
        line.append(letter * width, "dim" if route.expert is None else COLOURS[route.number % len(COLOURS)])
    return line


def main() -> None:
    """Routes the document with one expert, then with all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", type=Path, help="UTF-8 text to route instead")
    file = parser.parse_args().file
    crouter, tokenizer = load_crouter()
    ids = torch.tensor(tokenizer(file.read_text("utf-8") if file else document(), verbose=False).input_ids[:8192])
    chunks = list(ids.split(crouter.config.chunk_length))
    experts, evidence = ExpertSet.load(expert_folder()), Evidence.load(expert_folder())
    console, before = Console(highlight=False), None
    for count in range(1, len(experts) + 1):
        router = Router(crouter, experts.first(count, evidence))
        routes = router(chunks)
        console.print(f"{', '.join(router.names)}:", strip(routes, [len(chunk) for chunk in chunks]), sep="\n")
        first = [route.reconstruction_nll.get(router.names[0]) for route in routes]
        assert before in (None, first), "mounting another expert changed what the first one says"
        before = first
        if count == len(experts):
            spans = split_document(router, ids, switch=8.0, smooth=32)
            found = route_spans(router, ids, spans)
            console.print("the same, by borders inside chunks:", strip(found, [len(span) for span in spans]), sep="\n")
            for span, route in zip(spans, found, strict=True):
                console.print(f"  tokens {span.start}-{span.end}: {route.expert or 'plain host'} ({route.status})")
        router.remove()


if __name__ == "__main__":
    main()
