"""Pages of PDFs, in cells and as a corpus: what viewers show of them, made once, or why it cannot be."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from building import jsonl, picture, run_config
from matplotlib.backends.backend_pdf import PdfPages
from PIL import Image

from vlmembed import data
from vlmembed.cli import main
from vlmembed.data import EvaluationFolder, Pages, Rows
from vlmembed.data import pdf as pdfs
from vlmembed.data.cells import Folder, to_items
from vlmembed.data.checks import in_evaluation, in_rows
from vlmembed.data.datamodule import as_mixture
from vlmembed.data.pdf import PdfPage, content_digest
from vlmembed.media import image_size, load_image
from vlmembed.types import Item, LazyImage

pytest.importorskip("pypdfium2")

ORIGIN = "train.jsonl, row 17, column 'positive'"
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
#: Of 40 × 20 units: red is at the bottom left, green beside it, blue above it, yellow above green.
QUARTERS = b"1 0 0 rg 0 0 20 10 re f 0 1 0 rg 20 0 20 10 re f 0 0 1 rg 0 10 20 10 re f 1 1 0 rg 20 10 20 10 re f"
BOX = b"/MediaBox[0 0 40 20]"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "vlmembed_pages"


def document(*pages: tuple[bytes, bytes], trailer: bytes = b"", root: bytes = b"", more: Sequence[bytes] = ()) -> bytes:
    """A PDF of pages, each of attributes and of what is drawn; other objects follow theirs."""
    kids = b" ".join(b"%d 0 R" % (3 + 2 * number) for number in range(len(pages)))
    objects = [b"<</Type/Catalog/Pages 2 0 R%s>>" % root, b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(pages), kids)]
    for attributes, content in pages:
        objects.append(b"<</Type/Page/Parent 2 0 R/Contents %d 0 R%s>>" % (len(objects) + 2, attributes))
        objects.append(stream(content))
    written, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate([*objects, *more], start=1):
        offsets.append(len(written))
        written += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(offsets) + 1
    end = b"trailer\n<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF" % (size, trailer, len(written))
    return written + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + end


def stream(content: bytes, attributes: bytes = b"") -> bytes:
    return b"<</Length %d%s>>stream\n%s\nendstream" % (len(content), attributes, content)


def write_text(path: Path, *pages: str) -> Path:
    """A PDF of A6 pages that say something; letters are those of a font within."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with PdfPages(path) as pdf, plt.rc_context({"pdf.fonttype": 42}):
        for text in pages:
            figure = plt.figure(figsize=(4.13, 5.83))
            figure.text(0.1, 0.5, text, fontsize=12)
            pdf.savefig(figure)
            plt.close(figure)
    return path


def encrypted() -> bytes:
    """A PDF whose keys fit no empty password."""
    keys = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O(%s)/U(%s)>>/ID[(a)(a)]" % (b"o" * 32, b"u" * 32)
    return document((BOX, QUARTERS), trailer=keys)


def items(cell: Any, folder: Path) -> Item:
    return to_items([(cell, "document", ORIGIN)], Folder(folder))[0]


def numbers(item: Item) -> list[Any]:
    """The texts of an item, and the numbers of its pages."""
    return [part.value.number if isinstance(part.value, PdfPage) else part.value for part in item.parts]


# What a page looks like

VIEWED = np.array([[BLUE, YELLOW], [RED, GREEN]])
#: What is added to the page, and what is seen in each quarter of it.
LOOKS: dict[str, tuple[bytes, np.ndarray]] = {
    "plain": (b"", VIEWED),
    "turned by 90": (b"/Rotate 90", np.rot90(VIEWED, -1)),
    "turned by 180": (b"/Rotate 180", np.rot90(VIEWED, 2)),
    "turned by 270": (b"/Rotate 270", np.rot90(VIEWED)),
    "turned by -90": (b"/Rotate -90", np.rot90(VIEWED)),
    "cropped": (b"/CropBox[0 0 20 20]", VIEWED[:, [0, 0]]),
    "cropped and turned": (b"/CropBox[20 0 40 20]/Rotate 90", np.rot90(VIEWED[:, [1, 1]], -1)),
    "a box that begins elsewhere": (b"/MediaBox[20 10 40 20]", np.full((2, 2, 3), YELLOW)),
    "cropped beyond the page": (b"/CropBox[-40 -40 80 80]", VIEWED),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_is_what_viewers_show(look: str) -> None:
    attributes, expected = LOOKS[look]
    box = b"" if b"MediaBox" in attributes else BOX
    page = PdfPage(document((box + attributes, QUARTERS)), 1, 4000)
    image = load_image(page)
    assert image.size == page.size == image_size(page)
    places = [(image.width * x // 4, image.height * y // 4) for y in (1, 3) for x in (1, 3)]
    np.testing.assert_array_equal([image.getpixel(place) for place in places], expected.reshape(4, 3))


HALF = b"<</ExtGState<</half<</ca 0.5>>>>>>"
BLUE_FORM = stream(b"0 0 1 rg 0 0 40 20 re f", b"/Type/XObject/Subtype/Form/BBox[0 0 40 20]")
SHOWN: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "nothing": (document((BOX, b"")), (255, 255, 255)),
    "half transparent": (document((BOX + b"/Resources" + HALF, b"/half gs 1 0 0 rg 0 0 40 20 re f")), (255, 127, 127)),
    "a note": (
        document(
            (BOX + b"/Annots[5 0 R]", b""),
            more=[b"<</Type/Annot/Subtype/Stamp/F 4/Rect[0 0 40 20]/AP<</N 6 0 R>>>>", BLUE_FORM],
        ),
        BLUE,
    ),
    "a filled form": (
        document(
            (BOX + b"/Annots[5 0 R]", b""),
            root=b"/AcroForm<</Fields[5 0 R]>>",
            more=[
                b"<</Type/Annot/Subtype/Widget/FT/Tx/T(name)/V(value)/F 4/Rect[0 0 40 20]/AP<</N 6 0 R>>>>",
                BLUE_FORM,
            ],
        ),
        BLUE,
    ),
}


@pytest.mark.parametrize("what", SHOWN)
def test_what_lies_on_a_page_is_shown_on_white(what: str) -> None:
    content, expected = SHOWN[what]
    image = load_image(PdfPage(content, 1, 4000))
    assert np.abs(np.subtract(image.getpixel((image.width // 2, image.height // 2)), expected)).max() <= 1


def test_a_scan_is_the_image(tmp_path: Path) -> None:
    """As far as JPEG and resizing keep it, which is what Pillow writes."""
    smooth = picture(4, 3).resize((200, 150), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "scan.pdf", quality=95)
    image = load_image(PdfPage(tmp_path / "scan.pdf", 1, 120_000))
    difference = np.asarray(image.resize(smooth.size), dtype=float) - np.asarray(smooth)
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize(
    ("width", "height"), [(595, 842), (28346, 28346), (1, 1), (0.01, 14400), (14400, 0.01), (1000, 999.999), (3, 200)]
)
@pytest.mark.parametrize("limit", [1024, 30_011, 250_000])
def test_no_page_has_more_pixels_than_the_limit(width: float, height: float, limit: int) -> None:
    """Be it 10 m wide; and nearly as many, in the shape that it has."""
    page = PdfPage(document((b"/MediaBox[0 0 %f %f]" % (width, height), b"")), 1, limit)
    columns, rows = page.size
    assert image_size(page) == load_image(page).size == (columns, rows)
    # Rounding up adds less than one pixel to each side.
    assert limit - 1 - columns - rows <= columns * rows <= limit
    assert abs(columns * height - rows * width) <= max(width, height) * 1.001


# Cells

PDF = {"pdf": "three.pdf"}
CELLS: dict[str, tuple[Any, list[Any]]] = {
    "a page": (PDF | {"page": 3}, [3]),
    "as CSV has it": (PDF | {"page": "3"}, [3]),
    "as pandas has it": (PDF | {"page": 3.0}, [3]),
    "by its id": ({"pdf": "three.pdf#page=3"}, [3]),
    "several": (PDF | {"page": [3, 1]}, [3, 1]),
    "several by id": ({"pdf": ["three.pdf#page=3", "one.pdf", "three.pdf#page=2"]}, [3, 1, 2]),
    "all": (PDF, [1, 2, 3]),
    "all of two": ({"pdf": ["one.pdf", "three.pdf"]}, [1, 1, 2, 3]),
    "as Arrow fills it": ({"text": None, "pdf": "three.pdf", "page": None, "image": None}, [1, 2, 3]),
    "no PDF": ({"text": "a text", "pdf": None, "page": None}, ["a text"]),
    "before a text": (PDF | {"page": 2, "text": "a text"}, [2, "a text"]),
    "after a text": ({"page": 2, "text": "a text", "pdf": "three.pdf"}, ["a text", 2]),
    "in a chat": (
        [{"type": "text", "text": "a text"}, {"type": "pdf", "pdf": "three.pdf", "page": 2}, {"type": "pdf", **PDF}],
        ["a text", 2, 1, 2, 3],
    ),
    "in a message": ([{"role": "user", "content": [{"type": "pdf", "pdf": "one.pdf", "page": None}]}], [1]),
    "as datasets has it": ({"pdf": {"bytes": document((BOX, b""), (BOX, b"")), "path": "other.pdf"}}, [1, 2]),
    "a column of datasets": ({"bytes": document((BOX, b""), (BOX, b"")), "path": None}, [1, 2]),
    "a column of files": ({"bytes": None, "path": "three.pdf"}, [1, 2, 3]),
    "as datasets has a file": ({"pdf": {"bytes": None, "path": "three.pdf"}, "page": 2}, [2]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one.pdf").write_bytes(document((BOX, QUARTERS)))
    (tmp_path / "three.pdf").write_bytes(document(*[(BOX + b"/Rotate %d" % turn, QUARTERS) for turn in (0, 90, 180)]))
    return tmp_path


@pytest.mark.parametrize("form", CELLS)
def test_pages_are_parts_of_a_cell_in_order(folder: Path, form: str) -> None:
    cell, expected = CELLS[form]
    item = items(cell, folder)
    assert numbers(item) == expected
    for part in item.parts:
        assert part.kind == ("text" if isinstance(part.value, str) else "image")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (PDF | {"page": 0}, "a page is a whole number, and the first one is 1; got 0"),
        (PDF | {"page": -1}, "the first one is 1; got -1"),
        (PDF | {"page": 1.5}, "the first one is 1; got 1.5"),
        (PDF | {"page": True}, "the first one is 1; got True"),
        (PDF | {"page": "iii"}, "the first one is 1; got 'iii'"),
        (PDF | {"page": [1, None]}, "the first one is 1; got None"),
        ({"pdf": "three.pdf#page=0"}, "the first one is 1; got '0'"),
        (PDF | {"page": []}, r"'page' names pages of one PDF; got page \[\] of 'three.pdf'"),
        ({"pdf": ["one.pdf", "three.pdf"], "page": 1}, "'page' names pages of one PDF; got page 1 of .*three.pdf"),
        ({"pdf": "three.pdf#page=2", "page": 3}, "'page' names pages of one PDF; got page 3 of 'three.pdf#page=2'"),
        ({"image": "three.pdf", "page": 1}, "page 1 of which PDF. The key 'page' stands beside the key 'pdf'"),
        ({"pdf": "four.pdf"}, "the PDF file .*four.pdf does not exist"),
        ({"pdf": "https://example.com/a.pdf"}, "the PDF 'https://example.com/a.pdf' is a URL"),
        ({"pdf": "../a.pdf", "page": 1}, "the PDF file '../a.pdf' leads out of the data set's folder"),
        ({"pdf": "/etc/a.pdf#page=1"}, "the PDF file '/etc/a.pdf' leads out of the data set's folder"),
        ({"pdf": 3}, "expected the path of a PDF file, got int 3"),
        ({"pdf": {"bytes": "text", "path": "x.pdf"}}, "the bytes of PDF 'x.pdf' are str 'text'"),
        ([{"type": "image", "image": "one.png", "page": 1}], "a content part is .*'page': 1"),
    ],
)
def test_a_cell_that_names_no_page_is_refused(folder: Path, cell: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{ORIGIN}: .*{message}"):
        items(cell, folder)


def test_an_item_of_too_many_pages_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdfs, "MAX_VIDEO_PIXELS", 2 * pdfs.PAGE_PIXELS)
    with pytest.raises(
        ValueError, match=r"three.pdf: it has 3 pages, too many for one item. Name some: page: \[1, 2\]"
    ):
        items(PDF, folder)
    assert numbers(items(PDF | {"page": [1, 2, 3]}, folder)) == [1, 2, 3]


def test_equal_pages_are_equal_items(folder: Path) -> None:
    same = [PDF | {"page": 2}, {"pdf": "three.pdf#page=2"}, [{"type": "pdf", **PDF, "page": "2"}]]
    other = [
        PDF | {"page": 3},
        PDF | {"page": [2, 2]},
        {"pdf": "one.pdf"},
        {"image": PdfPage(folder / "three.pdf", 2, 9)},
    ]
    content = (folder / "three.pdf").read_bytes()
    encoded = [{"pdf": {"bytes": data, "path": None}, "page": 2} for data in (content, content + b" ")]
    assert len({items(cell, folder).id for cell in same}) == 1
    assert len({items(cell, folder).id for cell in [same[0], *other, *encoded]}) == 7


BAD_PDFS: dict[str, tuple[bytes, str]] = {
    "encrypted": (encrypted(), "it is encrypted, and opens with a password only. Save it without one"),
    "damaged": (b"%PDF-1.7\n" + bytes(2000), "it is damaged or cut. Save it again"),
    "cut": (document((BOX, QUARTERS))[:150], "it is damaged or cut"),
    "empty": (b"", "it is no PDF: it is empty"),
    "without pages": (document(), "it has no pages. Save it again"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(2000), r"it is no PDF: it begins with b'\\x89PNG.*under the key 'image'"),
    "larger than the limit": (
        document((BOX, QUARTERS)) + bytes(2**16),
        "more than the limit of 65,536; VLMEMBED_MAX_PDF",
    ),
}


@pytest.mark.parametrize("kind", BAD_PDFS)
def test_a_pdf_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(pdfs, "MAX_PDF_BYTES", 2**16)
    content, message = BAD_PDFS[kind]
    (tmp_path / "bad.pdf").write_bytes(content)
    for file, name in (("bad.pdf", r"bad\.pdf"), ({"bytes": content, "path": None}, "given as bytes")):
        with pytest.raises(ValueError, match=f"{ORIGIN}: cannot read the PDF .*{name}.*: .*{message}.*remove the row"):
            items({"pdf": file}, tmp_path)
        item = items({"pdf": file, "page": 1}, tmp_path)
        for use in (load_image, image_size):
            with pytest.raises(ValueError, match=f"{ORIGIN}: cannot read the image .*{name}#page=1.*{message}"):
                use(item.parts[0].frames[0], ORIGIN)
    with pytest.raises(ValueError, match=rf"cannot read the PDF .*bad\.pdf: .*{message}.*remove the file"):
        len(Pages(str(tmp_path)))


def test_a_page_that_is_not_there_says_how_many_are(folder: Path) -> None:
    message = (
        r"three\.pdf#page=4: it has 3 pages, counted from 1, and no page 4. Name one that it has, or remove the row"
    )
    for use in (load_image, image_size):
        with pytest.raises(ValueError, match=f"{ORIGIN}: cannot read the image .*{message}"):
            use(items(PDF | {"page": 4}, folder).parts[0].frames[0], ORIGIN)


def test_a_damaged_page_leaves_the_others_readable(tmp_path: Path) -> None:
    content = document((BOX, QUARTERS), (BOX, QUARTERS)).replace(b"5 0 obj\n<</Type/Page", b"5 0 obj\n<</Nope/Page")
    (tmp_path / "half.pdf").write_bytes(content.replace(b"5 0 R]", b"9 0 R]"))
    good, bad = items({"pdf": "half.pdf"}, tmp_path).parts
    assert load_image(good.frames[0]).getpixel((9, 9)) == BLUE
    for use in (load_image, image_size):
        with pytest.raises(ValueError, match=r"half\.pdf#page=2: .*damaged.* Save"):
            use(bad.frames[0], ORIGIN)


@pytest.mark.parametrize(("seconds", "memory"), [(1, 2**32), (60, 2**27)])
@pytest.mark.skipif(sys.platform != "linux", reason="there are no such limits")
def test_a_page_that_asks_for_everything_is_refused(monkeypatch: pytest.MonkeyPatch, seconds: int, memory: int) -> None:
    """A form that shows itself twice."""
    monkeypatch.setattr(pdfs, "MAX_PDF_SECONDS", seconds)
    monkeypatch.setattr(pdfs, "MAX_PDF_MEMORY", memory)
    resources = b"/Resources<</XObject<</X 5 0 R>>>>"
    form = stream(b"/X Do /X Do", b"/Type/XObject/Subtype/Form/BBox[0 0 40 20]" + resources)
    page = PdfPage(document((BOX + resources, b"/X Do"), more=[form]), 1, 4000)
    with pytest.raises(ValueError, match=rf"{ORIGIN}: .*more than {seconds} seconds or {memory:,} bytes of memory"):
        load_image(page, ORIGIN)
    assert load_image(PdfPage(document((BOX, QUARTERS)), 1, 4000)).getpixel((9, 9)) == BLUE


def test_without_pypdfium2_it_is_said_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = items(PDF | {"page": 1}, folder).parts[0].frames[0]
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    install = r'pypdfium2, which reads it, is not installed. Install it \(pip install "vlmembed\[pdf\]"\)'
    for use in (
        lambda: load_image(page, ORIGIN),
        lambda: items({"pdf": "one.pdf"}, folder),
        lambda: len(Pages(str(folder))),
    ):
        with pytest.raises(ValueError, match=install):
            use()


def test_a_pdf_under_another_key_is_refused_and_the_key_is_named(folder: Path) -> None:
    (frame,) = items({"image": "three.pdf"}, folder).parts[0].frames
    with pytest.raises(ValueError, match=r"it is a PDF document. Give it under the key 'pdf': {pdf: FILE, page: 1}"):
        load_image(frame, ORIGIN)


def test_columns_name_pages(folder: Path) -> None:
    (folder / "rows.csv").write_text("q,file,number,ids\na,three.pdf,2,one.pdf#page=1\n")
    cells: dict[str, Any] = {
        "query": {"text": "q", "pdf": "{file}#page=3"},
        "positive": {"pdf": "file", "page": "number"},
        "negative": {"pdf": "ids"},
    }
    example = Rows(str(folder / "rows.csv"), cells=cells)[0]
    assert [numbers(item) for item in (example.query, *example.documents)] == [["a", 3], [2], [1]]
    (folder / "marks.jsonl").write_text('{"q": "see <page>", "file": "three.pdf", "number": 2}\n')
    marked: dict[str, Any] = {"text": "q", "marks": {"<page>": {"pdf": "{file}#page={number}"}}}
    rows = Rows(str(folder / "marks.jsonl"), cells={"query": marked, "positive": {"pdf": "file"}})
    assert numbers(rows[0].query) == ["see ", 2]
    marked["marks"] = {"<page>": {"pdf": "file", "page": "number"}}
    with pytest.raises(ValueError, match=r"of a mark, a page is written {pdf: '{file}#page={page}'}"):
        len(Rows(str(folder / "marks.jsonl"), cells={"query": marked, "positive": {"pdf": "file"}}))
    with pytest.raises(ValueError, match="unknown key 'page'"):
        len(Rows(str(folder / "rows.csv"), cells={"query": {"text": "q", "page": "number"}, "positive": "q"}))


def test_columns_of_the_pdf_type_are_read(folder: Path, tmp_path: Path) -> None:
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = datasets.Features({"query": text, "pdf": datasets.Pdf(), "page": number})
    files = [str(folder / "three.pdf"), {"bytes": (folder / "one.pdf").read_bytes(), "path": None}]
    table = datasets.Dataset.from_dict({"query": ["a", "b"], "pdf": files, "page": [2, None]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    cells: dict[str, Any] = {"query": "query", "positive": {"pdf": "pdf", "page": "page"}, "negative": "pdf"}
    rows = Rows(str(tmp_path / "saved"), cells=cells, allow_outside=[str(folder)])
    assert [[numbers(item) for item in rows[row].documents] for row in (0, 1)] == [[[2], [1, 2, 3]], [[1], [1]]]


def test_a_folder_of_pdfs_with_metadata_is_read(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,query\none.pdf,first\nthree.pdf,second\n")
    rows = Rows(str(folder), columns={"pdf": "positive"})
    assert [(rows[row].query.parts[0].value, numbers(rows[row].positives[0])) for row in (0, 1)] == [
        ("first", [1]),
        ("second", [1, 2, 3]),
    ]


# Making pages once


def test_a_page_is_rendered_when_it_is_needed_and_once(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_evaluation(folder / "set", {"one.pdf#page=1": {"pdf": "one.pdf"}, "x": {"pdf": "three.pdf", "page": 2}})
    for file in ("one.pdf", "three.pdf"):
        (folder / "set" / file).write_bytes((folder / file).read_bytes())
    frames = [item.parts[0].frames[0] for item in EvaluationFolder(str(folder / "set")).load().corpus]
    sizes = [image_size(frame) for frame in frames]
    assert not cache.exists()
    first = [load_image(frame) for frame in frames]
    assert [image.size for image in first] == sizes
    monkeypatch.setattr(pdfs, "opened", None)  # Not even opened again.
    again = [load_image(PdfPage(folder / name, page)) for name, page in (("one.pdf", 1), ("three.pdf", 2))]
    assert first == again
    assert len([*cache.rglob("*.png")]) == len([path for path in cache.rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("name", ["three.pdf", "three.pdf#page=2"])
def test_names_of_pdfs_that_are_read_as_texts_are_found(folder: Path, name: str) -> None:
    row = {"query": "a question", "positive": name}
    (problem,) = in_rows(as_mixture(jsonl(folder / "rows.jsonl", [row] * 4)))
    assert problem.endswith("To have the files read, write cells: {query: query, positive: {pdf: positive}}.")


def test_copies_of_a_pdf_are_duplicates_and_its_pages_are_not(folder: Path, cache: Path) -> None:
    (folder / "copy.pdf").write_bytes((folder / "three.pdf").read_bytes())
    pages = {f"{file} {page}": {"pdf": f"{file}.pdf#page={page}"} for file in ("three", "copy") for page in (1, 3)}
    write_evaluation(folder, pages, q="three 1")
    (problem,) = in_evaluation(EvaluationFolder(str(folder)).load())
    assert "2 of the 4 documents of the corpus have the content of an earlier one" in problem
    assert not cache.exists()


def test_what_changes_a_page_renders_it_anew(folder: Path, cache: Path) -> None:
    def colour(limit: int = 4000) -> Any:
        return load_image(PdfPage(folder / "one.pdf", 1, limit)).getpixel((9, 9))

    assert colour() == BLUE
    assert load_image(PdfPage(folder / "one.pdf", 1, 2000)).size[0] < load_image(PdfPage(folder / "one.pdf", 1)).size[0]
    (folder / "one.pdf").write_bytes(document((BOX + b"/Rotate 90", QUARTERS)))
    assert colour() == RED
    assert len([*cache.rglob("*.png")]) == 4


def test_a_folder_that_cannot_be_written_is_no_fault_of_a_row(folder: Path) -> None:
    (folder / "file").write_text("no folder")
    with pytest.raises(pdfs.CacheError, match=r"cannot be written there.*Make room, or choose another folder: 'cache'"):
        load_image(PdfPage(folder / "one.pdf", 1, cache=folder / "file"))


def render(barrier: Any, file: Path, folder: Path) -> None:
    barrier.wait()
    for number in range(1, 9):
        load_image(PdfPage(file, number, cache=folder))


def test_processes_render_the_same_pages_at_once(tmp_path: Path) -> None:
    file, context = write_text(tmp_path / "long.pdf", *map(str, range(8))), multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    running = [context.Process(target=render, args=(barrier, file, tmp_path / "shared")) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0, 0]
    files = sorted((tmp_path / "shared" / content_digest(file)).iterdir())
    alone = [load_image(PdfPage(file, number, cache=tmp_path / "alone")).tobytes() for number in range(1, 9)]
    assert [load_image(path).tobytes() for path in files] == alone


# A folder of PDFs


def write_evaluation(folder: Path, corpus: dict[str, Any] | None = None, **queries: str) -> None:
    """Write the corpus, and one query for each document that answers it."""
    answers = queries or {"q": "x"}
    jsonl(folder / "queries.jsonl", [{"id": query, "text": f"where is {query}"} for query in answers])
    (folder / "qrels.tsv").write_text("".join(f"{query}\t{document}\t1\n" for query, document in answers.items()))
    if corpus is not None:
        jsonl(folder / "corpus.jsonl", [{"id": name, **cell} for name, cell in corpus.items()])


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    folder = tmp_path / "reports"
    write_text(folder / "b.pdf", "annual report", "Übersicht\nof the year")
    write_text(folder / "a" / "Größe 数.PDF", "size")
    (folder / "a" / "empty.pdf").write_bytes(document((BOX, QUARTERS)))
    write_text(folder / ".hidden" / "x.pdf", "hidden")
    (folder / "._b.pdf").write_bytes(b"what macOS leaves")
    (folder / "notes.txt").write_text("no PDF")
    return folder


IDS = ["a/Größe 数.PDF#page=1", "a/empty.pdf#page=1", "b.pdf#page=1", "b.pdf#page=2"]


def test_a_folder_is_a_table_of_pages(reports: Path) -> None:
    pages = Pages(str(reports), text=True, max_pixels=50_000)
    rows = pages.read(range(len(pages)))
    assert [row["id"] for row in rows] == IDS
    assert [row["text"] for row in rows] == ["size", None, "annual report", "Übersicht\nof the year"]
    assert pages.column_names == ["id", "image", "text"] == [*rows[0]]
    assert (pages.name, pages.origins([3])) == ("reports", [f"{reports}, b.pdf#page=2"])
    assert pages.read([2], ["id"]) == [{"id": "b.pdf#page=1"}]
    for row in rows:
        assert isinstance(row["image"], LazyImage)
        assert 48_000 < np.prod(load_image(row["image"]).size) <= 50_000
        item = to_items([({key: row[key] for key in ("image", "text")}, "document", "")], pages.folder)[0]
        assert [part.value for part in item.parts] == [value for value in (row["image"], row["text"]) if value]
    assert [*Pages(str(reports)).read([0])[0]] == ["id", "image"]
    assert [row["id"] for row in Pages(str(reports / "b.pdf")).read([0, 1])] == ["b.pdf#page=1", "b.pdf#page=2"]


def test_a_cut_word_of_a_text_is_joined(tmp_path: Path) -> None:
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"
    shown = b"BT /F 20 Tf 20 150 Td (docu-) Tj 0 -24 Td (ments) Tj 0 -24 Td (of 2-3) Tj 0 -60 Td (cut off) Tj ET"
    page = b"/MediaBox[0 0 300 200]/CropBox[0 90 300 200]/Resources<</Font<</F 5 0 R>>>>"
    assert PdfPage(document((page, shown), more=[font]), 1).text() == "documents\nof 2-3"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"path": "nothing"}, "nothing: no such folder"), ({"path": "."}, "there is no PDF in this folder, or below it")],
)
def test_a_folder_without_pdfs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        len(Pages(**options))


@pytest.mark.parametrize("pixels", [0, -1, 100, 10**9])
def test_a_limit_that_no_page_could_have_is_refused(pixels: int) -> None:
    with pytest.raises(ValueError, match=r"max_pixels is 1,024 to 100,000,000, got"):
        Pages("x", max_pixels=pixels)


def test_links_lead_nowhere_unless_allowed(reports: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.pdf").write_bytes(document((BOX, QUARTERS)))
    (reports / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(Pages(str(reports))) == len(IDS)
    (reports / "c.pdf").symlink_to(tmp_path / "elsewhere" / "secret.pdf")
    with pytest.raises(ValueError, match=r"the PDF file .*c\.pdf' leads out of the data set's folder"):
        len(Pages(str(reports)))
    pages = Pages(str(reports), allow_outside=[str(tmp_path / "elsewhere")])
    assert pages.read([4], ["id"]) == [{"id": "c.pdf#page=1"}]
    (reports / "d.pdf").symlink_to(reports / "gone.pdf")
    with pytest.raises(ValueError, match=r"d\.pdf does not exist"):
        len(Pages(str(reports), allow_outside=[str(tmp_path / "elsewhere")]))


# Whole runs


def test_fit_reads_pages_in_workers(
    folder: Path, checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    rows = [{"query": f"question {number}", "positive": PDF | {"page": number}} for number in (1, 2, 3)]
    rows += [{"query": "question 4", "positive": {"pdf": "one.pdf", "text": "a text"}}]
    jsonl("train.jsonl", rows)
    config = run_config(checkpoint, train="train.jsonl", batch_size=2, val="train.jsonl", num_workers=1)
    config["trainer"] |= {"max_epochs": 1, "default_root_dir": "run", "exporter": None}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml"])
    assert len([*cache.rglob("*.png")]) == 4


def test_the_cookbook_shows_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(data.__file__).parent / "README.md").read_text()
    blocks = dict(re.findall(r"<!-- (pdf cells|pages) -->\n```\w+\n(.*?)```", page, re.DOTALL))
    write_text(tmp_path / "reports" / "report.pdf", *map(str, range(5)))
    for name, pages in (("report", 5), ("appendix", 2)):
        Path(f"{name}.pdf").write_bytes(document(*[(BOX, QUARTERS)] * pages))
    Path("rows.jsonl").write_text(blocks["pdf cells"])
    rows = Rows("rows.jsonl")
    shown = [numbers(rows[row].positives[0]) for row in range(len(rows))]
    assert shown == [[3], [3], [3, 4, "Two pages and a text."], [3, 1, 2]]
    evaluation = yaml.safe_load(blocks["pages"])["test"]["init_args"]
    write_evaluation(tmp_path, q="report.pdf#page=3")
    corpus = Pages(**evaluation.pop("corpus")["init_args"])
    assert data.EvaluationTables(corpus=corpus, **evaluation).load().document_names[2] == "report.pdf#page=3"


def test_a_measurement_over_pages_equals_that_over_their_images(
    reports: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pages in a folder of PNG files, as they are rendered."""
    monkeypatch.chdir(tmp_path)
    judged = {"q1": "b.pdf#page=2", "q2": "a/empty.pdf#page=1"}
    pages: dict[str, Any] = {"path": str(reports), "text": True, "max_pixels": 20_000}
    corpus = {}
    for number, row in enumerate(Pages(**pages).read(range(len(IDS)))):
        load_image(row["image"]).save(tmp_path / f"{number}.png")
        corpus[row["id"]] = {"image": f"{number}.png"} | ({"text": row["text"]} if row["text"] else {})
    write_evaluation(tmp_path, corpus, **judged)
    tables = {"queries": "queries.jsonl", "qrels": "qrels.tsv"}
    sets = {
        "pages": {**tables, "corpus": {"class_path": "vlmembed.data.Pages", "init_args": pages}},
        "images": {**tables, "corpus": "corpus.jsonl"},
    }
    test = [
        {"class_path": "vlmembed.data.EvaluationTables", "init_args": {**tables, "name": name}}
        for name, tables in sets.items()
    ]
    config = run_config(checkpoint, test=test, num_workers=1)
    config["trainer"] |= {
        "default_root_dir": "run",
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", "run.yaml"])
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, values = (line.split(",") for line in metrics.read_text().splitlines())
    measured = dict(zip(header, values, strict=True))
    names = [name.removeprefix("test/images/") for name in measured if name.startswith("test/images/")]
    assert "ndcg@10" in names
    assert [measured[f"test/pages/{name}"] for name in names] == [measured[f"test/images/{name}"] for name in names]
