"""How fast are images encoded from an exported folder, beside Sentence Transformers' ``encode_document``?

Photographs that come with scikit-learn, cut into JPEG files of many sizes, a share of which repeat an earlier one under
another name. Both sides open the same folder and get the same files. Theirs runs at the fastest of several batch sizes,
found on the first files; ours is ``python -m vlmembed encode`` at its defaults: it opens the folder, reads the corpus
and writes an index. They take turns, all files each time; vectors must agree to 1e-5.

    python experiments/encoding/speed.py [--images 2000] [--repeats 0.25] [--config tiny] [--num_workers 1]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sklearn.datasets import load_sample_images
from torch import Tensor

from vlmembed.search.encoding import encode
from vlmembed.search.index import Index

sys.path.append(str(Path(__file__).parents[1] / "step_time"))
import checkpoint
from report import machine

TOLERANCE = 1e-5
BATCH_SIZES = (1, 4, 8, 16, 32, 64)


def write_images(folder: Path, count: int, repeats: float, largest: int, seed: int = 0) -> list[Path]:
    """Write distinct cuts with sides of 48 pixels to the largest, small ones as often as large ones; and copies."""
    draw = random.Random(seed)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    paths: list[Path] = []
    for number in range(count):
        path = folder / f"{number:06}.jpg"
        if paths and draw.random() < repeats:
            shutil.copy(draw.choice(paths), path)
        else:
            sides = [round(48 * (largest / 48) ** draw.random()) for _ in range(2)]
            _cut(draw.choice(photographs), sides, draw).save(path, quality=90)
        paths.append(path)
    return paths


def _cut(photograph: Image.Image, sides: Sequence[int], draw: random.Random) -> Image.Image:
    """A random piece, enlarged where the photograph is smaller."""
    scale = draw.uniform(0.3, 0.9) * min(have / want for have, want in zip(photograph.size, sides, strict=True))
    width, height = (scale * side for side in sides)
    left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - height)
    return photograph.resize((sides[0], sides[1]), box=(left, top, left + width, top + height))


def ours(model: Path, images: Path, index: Path, num_workers: int) -> Tensor:
    encode(str(model), str(images), str(index), num_workers=num_workers, device="cpu")
    blocks = Index.open(index).blocks(1024)
    return torch.cat([vectors for _, vectors in blocks])  # type: ignore[misc]


def theirs(model: SentenceTransformer, paths: Sequence[Path], batch_size: int) -> Tensor:
    inputs = [{"image": str(path)} for path in paths]
    return model.encode_document(inputs, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)


def timed(encode: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Seconds of wall clock, and of this process on all cores."""
    start, processor = time.perf_counter(), time.process_time()
    vectors = encode()
    return time.perf_counter() - start, time.process_time() - processor, vectors


def best_batch_size(model: SentenceTransformer, paths: Sequence[Path]) -> int:
    seconds = {size: min(timed(partial(theirs, model, paths, size))[0] for _ in range(2)) for size in BATCH_SIZES}
    print("Theirs,", len(paths), "images a second:", {size: round(len(paths) / took) for size, took in seconds.items()})
    return min(seconds, key=seconds.__getitem__)


def main() -> None:
    options = _options()
    with TemporaryDirectory() as scratch:
        folder, images = Path(scratch, "export"), Path(scratch, "images")
        checkpoint.write(folder, checkpoint.configuration(options.config), 4, options.max_tokens)
        images.mkdir()
        paths = write_images(images, options.images, options.repeats, options.largest)
        served = SentenceTransformer(str(folder), device="cpu")
        size = best_batch_size(served, paths[: min(len(paths), 256)])
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(options.rounds):
            index = Path(scratch, f"index-{number}")
            our_seconds, our_cpu, our_vectors = timed(partial(ours, folder, images, index, options.num_workers))
            their_seconds, their_cpu, their_vectors = timed(partial(theirs, served, paths, size))
            seconds["ours"].append(our_seconds)
            seconds["theirs"].append(their_seconds)
            difference = float((our_vectors - their_vectors.cpu()).abs().max())
            if not difference <= TOLERANCE:
                raise RuntimeError(f"Vectors differ by {difference:.1e}.")
            print(
                f"ours {our_seconds:.1f} s ({our_cpu:.1f} of processor), theirs {their_seconds:.1f} s ({their_cpu:.1f})"
            )
            print(f"largest difference {difference:.1e}", flush=True)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    rates = {name: round(len(paths) / median(values), 1) for name, values in seconds.items()}
    print(machine())
    print(f"{' '.join(sys.argv[1:])}: images a second {rates}, theirs at batch size {size}; ratio {median(ratios):.2f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=float, default=0.25, help="share that repeats an earlier one (default: 0.25)")
    parser.add_argument("--largest", type=int, default=640, help="longest side in pixels (default: 640)")
    parser.add_argument("--max_tokens", type=int, default=64, help="the most tokens of an image (default: 64)")
    parser.add_argument("--num_workers", type=int, default=0, help="ours; theirs has none (default: 0)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--config", default="wide_tower", help=f"{', '.join(checkpoint.SIZES)}, or a folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
