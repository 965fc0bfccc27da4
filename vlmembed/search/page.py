"""The page of ``search``: a question or an image in, the documents of an index out; one model, or two side by side.

It is served to this machine only, and asks no other for anything. Images of the corpus go out as thumbnails within the
page: no file of it is served.
"""

from __future__ import annotations

import base64
import io
import os
import textwrap
from collections.abc import Sequence
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from vlmembed.media import load_image
from vlmembed.search.corpus import CorpusSource
from vlmembed.search.index import Documents, Index
from vlmembed.search.ranking import View, device_of, search_exact
from vlmembed.search.served import ServedModel
from vlmembed.types import Item, Part

#: The longest edge of a thumbnail, in pixels, and the most characters of a text.
EDGE, CHARACTERS = 320, 320
#: How many documents are shown at first.
SHOWN = 12
#: What a browser may load: nothing from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
STYLE = """
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; margin: 0; padding: 0;
  list-style: none }
.hits li { display: flex; flex-direction: column; margin: 0; overflow: hidden; border-radius: 8px;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
  color: var(--body-text-color) }
.hits img { width: 100%; height: 160px; margin: 0; object-fit: contain; background: var(--background-fill-secondary) }
.hits p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 8; overflow: hidden;
  margin: 8px 10px; padding: 0; font-size: 14px; line-height: 1.4; overflow-wrap: anywhere }
.hits div { display: flex; gap: 8px; margin-top: auto; padding: 6px 10px; font-size: 13px;
  border-top: 1px solid var(--border-color-primary) }
.hits div span { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  direction: rtl; text-align: left }  /* Of long ids the end tells more. */
.hits div data { font-variant-numeric: tabular-nums }
.message { margin: 0; padding: 10px 12px; border-radius: 8px; overflow-wrap: anywhere; color: var(--body-text-color);
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill) }
.message[role=alert] { border-left: 4px solid #d97706 }
.hits p.message { display: block; border: 0 }
"""


class Side:
    """An index with its model and its corpus, for one question after the other; options as those of ``search``."""

    def __init__(
        self,
        index: str,
        model: str,
        corpus: CorpusSource | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.name, self.index = model, Index.open(index)
        self.documents = Documents(self.index, corpus)
        self.engine = ServedModel.open(model, device=device, trust_remote_code=trust_remote_code)
        self.index.refuse_other(self.engine.digest, model)
        self._view = lru_cache(None)(partial(View, self.index, device=device_of(device), in_memory=True))
        self._content = lru_cache(512)(self._read)

    @property
    def dimensions(self) -> list[int]:
        """What vectors may be cut to, the whole ones first."""
        return sorted({self.index.dimension, *self.index.dimensions}, reverse=True)

    def find(self, item: Item, dimension: int, count: int) -> list[tuple[int, str, float]]:
        """Return row, id and score of the documents that are nearest to a query."""
        lacking = {part.kind for part in item.parts}.difference(self.engine.served.modalities)
        if lacking and self.engine.encoder is None:  # Ours all read images.
            raise ValueError(f"The model {self.name} reads no {' and no '.join(lacking)}.")
        ranking = search_exact(self._view(dimension), self.engine.encode([item], "query"), count)
        named = next(ranking.named(self.index))
        return [(row, *pair) for row, pair in zip(ranking.rows[0].tolist(), named, strict=False)]

    def answer(self, text: str | None, image: str | None, dimension: int, count: int) -> str:
        """Return the documents found as HTML, or why there are none."""
        try:
            hits = self.find(question(text, image), int(dimension), int(count))
        except (ValueError, OSError) as error:
            return _message(str(error), "alert")
        cards = [self._card(rank, *hit) for rank, hit in enumerate(hits, start=1)]
        return f'<ol class="hits">{"".join(cards)}</ol>'

    def _card(self, rank: int, row: int, name: str, score: float) -> str:
        label = (
            f'<b>{rank}</b><span title="{_escaped(name)}"><bdi>{_escaped(name)}</bdi></span><data>{score:.4f}</data>'
        )
        return f"<li>{self._content(row)}<div>{label}</div></li>"

    def _read(self, row: int) -> str:
        """Return what a document shows as HTML; of a video without frames, and of a recording, its kind."""
        try:
            item = self.documents[row]
            return "".join(_shown(part, item.origin) for part in item.parts)
        except (ValueError, OSError) as error:
            return _message(str(error), "note")


def question(text: str | None, image: str | Path | None) -> Item:
    """Return the query of a text, an image, or an image with a text."""
    parts = [Part("image", Path(image).read_bytes())] if image else []
    if text and text.strip():
        parts.append(Part("text", text.strip()))
    if not parts:
        raise ValueError("Type a question, or drop an image.")
    return Item("query", tuple(parts), "The query")


def _shown(part: Part, origin: str) -> str:
    if part.frames:
        return _thumbnail(load_image(part.frames[0], origin))
    text = str(part.value) if part.kind == "text" else f"({part.kind})"
    return f"<p>{_escaped(textwrap.shorten(text, CHARACTERS, placeholder=' …'))}</p>"


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((EDGE, EDGE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _message(text: str, role: str) -> str:
    return f'<p class="message" role="{role}">{_escaped(text)}</p>'


def _escaped(text: str) -> str:
    """Return a text as HTML that no template of gradio takes for its own."""
    return escape(text).replace("{", "&#123;").replace("$", "&#36;")


def make_page(sides: Sequence[Side], top_k: int) -> Any:
    """Lay the page out, a column for each model."""
    gradio = _gradio()
    most = min(top_k, *(side.index.count for side in sides))
    with gradio.Blocks(title="Search", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        with gradio.Row():
            with gradio.Column(scale=3):
                text = gradio.Textbox(label="Question", placeholder="Type a question, then Enter", autofocus=True)
                with gradio.Row(equal_height=True):
                    count = gradio.Slider(1, most, min(SHOWN, most), step=1, label="Documents", visible=most > 1)
                    button = gradio.Button("Search", variant="primary", min_width=120)
            with gradio.Column(min_width=240):
                sources = ["upload", "clipboard"]
                image = gradio.Image(label="Or an image", type="filepath", sources=sources, buttons=[], height=190)
            # Gradio would open it, and say no more than "Error" where that fails; the engine names what is wrong.
            image.preprocess = lambda uploaded: uploaded and uploaded.path
        with gradio.Row():
            for side in sides:
                with gradio.Column(min_width=320):
                    _lay_out(gradio, side, text, image, count, button)
    return page


def _lay_out(gradio: Any, side: Side, text: Any, image: Any, count: Any, button: Any) -> None:
    """Lay a model's column out: what it is, its dimensions, and what it finds."""
    index = side.index
    gradio.Markdown(f"**{_escaped(side.name)}** · {index.count:,} documents · {index.precision}")
    sizes = side.dimensions
    dimension = gradio.Radio(sizes, value=sizes[0], label="Dimension", visible=len(sizes) > 1)
    hits = gradio.HTML(_message("What is found appears here.", "status"))
    triggers = [text.submit, button.click, image.upload, dimension.input, count.release]
    # One question after the other: the model is one.
    gradio.on(
        triggers, side.answer, [text, image, dimension, count], hits, concurrency_limit=1, api_visibility="private"
    )


def serve(pairs: Sequence[tuple[str | None, str | None]], top_k: int, *options: Any) -> None:
    """Serve the page of an index and its model, or of two, to this machine until it is stopped."""
    _gradio()
    if any((index is None) != (model is None) for index, model in pairs):
        raise ValueError("other_index and other_model go together: an index, and the model that it was encoded with.")
    launch(make_page([Side(index, model, *options) for index, model in pairs if index and model], top_k))


def launch(page: Any, **options: Any) -> Any:
    """Show a page on this machine only; see gradio's ``launch``."""
    theme = _gradio().themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    shown = {"theme": theme, "css": STYLE, "head": HEAD, "footer_links": []}
    return page.launch(server_name="127.0.0.1", share=False, ssr_mode=False, allowed_paths=[], **shown, **options)


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # It is read when gradio is imported, and later.
    try:
        import gradio
    except ImportError as error:
        raise ValueError('The page needs gradio: pip install "vlmembed[page]"') from error
    return gradio
