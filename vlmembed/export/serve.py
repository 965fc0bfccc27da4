"""Embeds items, or scores pairs, with stock Sentence Transformers, as a user of an exported folder would.

Run by file name in a process of its own, in which vlmembed cannot be imported: what works here works without us.

    python serve.py FOLDER PLAN.json OUTPUT.npz
"""

import json
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any


class _Refuse:
    """Makes importing vlmembed fail even where it is installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "vlmembed":
            raise ImportError("An exported folder must open without vlmembed.")


def main(folder: str, plan: str, output: str) -> None:
    """Embed or score in every way, and save the results by name."""
    sys.meta_path.insert(0, _Refuse())
    import numpy
    import torch
    from tqdm import tqdm

    with open(plan, encoding="utf-8") as file:
        planned = json.load(file)
    results = (_embeddings if "items" in planned else _scores)(folder, planned)
    with torch.inference_mode():
        saved = {name: values.float().cpu().numpy() for name, values in tqdm(results, "Verifying", file=sys.stdout)}
    numpy.savez(output, **saved)


def _embeddings(folder: str, plan: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield unit vectors: in each role, at each dimension, padded on each side, alone and in one batch."""
    import torch
    from sentence_transformers import SentenceTransformer

    inputs = [_open(item) for item in plan["items"]]
    model = SentenceTransformer(folder, device=plan["device"], trust_remote_code=plan["trust_remote_code"])
    options: dict[str, Any] = {"show_progress_bar": False, "convert_to_tensor": True}
    for role, dimension, side, size in product(
        ("query", "document"), plan["dimensions"], ("left", "right"), (1, len(inputs))
    ):
        model.tokenizer.padding_side = side
        encode = model.encode_query if role == "query" else model.encode_document
        embeddings = encode(inputs, batch_size=size, truncate_dim=dimension, **options)
        unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
        yield f"{role}/{dimension}/batch of {size}, padded {side}", unit


def _scores(folder: str, plan: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield logits: padded on each side, alone and in one batch; and ranked, query by query."""
    import torch
    from sentence_transformers import CrossEncoder

    pairs = [(_open(query), _open(document)) for query, document in plan["pairs"]]
    model = CrossEncoder(folder, device=plan["device"], trust_remote_code=plan["trust_remote_code"])
    logits: dict[str, Any] = {"show_progress_bar": False, "activation_fn": torch.nn.Identity()}
    for side, size in product(plan["sides"], (1, len(pairs))):
        model.tokenizer.padding_side = side
        scores = model.predict(pairs, batch_size=size, convert_to_tensor=True, **logits)
        yield f"batch of {size}, padded {side}", scores
    ranked = torch.full((len(pairs),), torch.nan)
    queries = [json.dumps(query) for query, _ in plan["pairs"]]
    for query in dict.fromkeys(queries):
        places = [place for place, each in enumerate(queries) if each == query]
        documents = [pairs[place][1] for place in places]
        for found in model.rank(pairs[places[0]][0], documents, **logits):
            ranked[places[found["corpus_id"]]] = found["score"]
    yield "ranked", ranked


def _open(item: Any) -> Any:
    from PIL import Image

    if not isinstance(item, dict):
        return item
    return {
        kind: values if kind == "text" else [Image.open(value) for value in values] for kind, values in item.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
