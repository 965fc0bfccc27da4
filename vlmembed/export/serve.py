"""Encodes probes with stock Sentence Transformers, as a user of an exported folder would.

Run by file name in a process of its own, in which vlmembed cannot be imported: what works here works without us.

    python serve.py FOLDER PROBES.json OUTPUT.npz
"""

import json
import sys
from itertools import product
from typing import Any


class _Refuse:
    """Makes importing vlmembed fail even where it is installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "vlmembed":
            raise ImportError("An exported folder must open without vlmembed.")


def main(folder: str, probes: str, output: str) -> None:
    """Encode every probe in every way, and save the embeddings by name."""
    sys.meta_path.insert(0, _Refuse())
    import numpy
    import torch
    from sentence_transformers import SentenceTransformer
    from tqdm import tqdm

    with open(probes, encoding="utf-8") as file:
        plan = json.load(file)
    inputs = [_open(probe) for probe in plan["inputs"]]
    model = SentenceTransformer(folder, device=plan["device"], trust_remote_code=plan["trust_remote_code"])
    results = {}
    ways = list(product(("query", "document"), plan["dimensions"], ("left", "right"), (1, len(inputs))))
    with torch.inference_mode():
        for role, dimension, side, size in tqdm(ways, desc="Verifying the export", file=sys.stdout):
            model.tokenizer.padding_side = side
            encode = model.encode_query if role == "query" else model.encode_document
            embeddings = encode(
                inputs, batch_size=size, truncate_dim=dimension, show_progress_bar=False, convert_to_tensor=True
            )
            embeddings = torch.nn.functional.normalize(embeddings.float(), dim=-1)
            results[f"{role}/{dimension}/batch of {size}, padded {side}"] = embeddings.cpu().numpy()
    numpy.savez(output, **results)  # type: ignore[arg-type]


def _open(probe: Any) -> Any:
    from PIL import Image

    if not isinstance(probe, dict):
        return probe
    return {
        kind: values if kind == "text" else [Image.open(value) for value in values] for kind, values in probe.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
