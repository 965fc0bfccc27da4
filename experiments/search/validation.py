"""Time and memory of measuring an evaluation set of a size: ``python experiments/search/validation.py --queries 2000``.

Prints a line of JSON; what is resident besides the embeddings that came in must not grow with queries × documents.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from vlmembed.metrics import RetrievalMetrics
from vlmembed.types import EvaluationSet, Item, Part

DIMENSIONS = 1024, 768, 512, 256, 128, 64, 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=100_000)
    options = parser.parse_args()
    queries, documents = ([f"{kind}{row}" for row in range(getattr(options, kind))] for kind in vars(options))
    qrels = {name: {documents[row * 7 % len(documents)]: 1} for row, name in enumerate(queries)}
    item = Item("document", (Part("text", "x"),))
    items = [item] * len(queries), [item] * len(documents)
    metric = RetrievalMetrics(EvaluationSet("large", *items, queries, documents, qrels), DIMENSIONS[1:])
    for rows in torch.arange(len(queries) + len(documents)).split(4096):
        metric.update(rows, torch.randn(len(rows), DIMENSIONS[0]))
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    value = float(metric.compute()["ndcg@10"])
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            vars(options)
            | {
                "ndcg@10": value,
                "seconds": round(time.perf_counter() - start, 1),
                "processor seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
                "embeddings MiB": (len(queries) + len(documents)) * DIMENSIONS[0] * 4 // 2**20,
                "more MiB": (after.ru_maxrss - before.ru_maxrss) // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
