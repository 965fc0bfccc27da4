"""The quick start's data: nothing that the test measures is ever trained on."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vlmembed.data import digits
from vlmembed.data.digits import HandwrittenNumbers, HandwrittenNumbersEvaluation

SPLITS = ("train", "val", "test")


def words_of(item) -> str:
    return item.parts[0].value


def pixels(example) -> bytes:
    return example.positives[0].parts[0].value.tobytes()


@pytest.fixture
def pasted(monkeypatch) -> list[list[int]]:
    """Every scan that is drawn, picture by picture."""
    record = []
    paste = digits.paste
    monkeypatch.setattr(digits, "paste", lambda chosen, draw: record.append([*map(int, chosen)]) or paste(chosen, draw))
    return record


def test_every_number_and_every_scan_belongs_to_one_split():
    assert sorted(number for split in SPLITS for number in digits.numbers(split)) == list(range(1000))
    assert sorted(scan for split in SPLITS for group in digits.scans_of(split) for scan in group) == list(range(1797))
    assert [len(digits.numbers(split)) for split in SPLITS] == [700, 100, 200]


def test_a_scan_is_dark_ink_on_white():
    """Pixel for pixel: the bundled scans hold ink from 0 to 16."""
    for image, ink in zip(digits.scans()[0][::97], load_digits().images[::97], strict=True):
        np.testing.assert_array_equal(np.asarray(image), [[int(255 - dot / 16 * 255) for dot in line] for line in ink])


@pytest.mark.parametrize("seed", [0, 7])
def test_training_never_meets_what_is_held_out(pasted, seed):
    rows = HandwrittenNumbers(size=1500, seed=seed)
    asked = {words_of(rows[index].query) for index in range(len(rows))}
    # Rows take the training numbers in turn, so 1500 rows meet all of them, and no longer source can meet another.
    assert asked == {digits.in_words(number) for number in digits.numbers("train")}
    held_scans = np.concatenate(digits.scans_of("val") + digits.scans_of("test"))
    assert len(pasted) == len(rows)
    assert not set(held_scans) & {scan for chosen in pasted for scan in chosen}


def test_pictures_show_the_number(pasted):
    target = load_digits().target
    rows = HandwrittenNumbers(size=40, seed=3)
    for index in range(len(rows)):
        shown = " ".join(digits.WORDS[target[scan]] for scan in (rows[index], pasted[-1])[1])
        assert words_of(rows[index].query) == shown
    for number, words in {407: "four zero seven", 47: "zero four seven", 0: "zero zero zero"}.items():
        assert digits.in_words(number) == words


def test_rows_depend_on_seed_and_index_only():
    rows, again = HandwrittenNumbers(900, seed=5), pickle.loads(pickle.dumps(HandwrittenNumbers(900, seed=5)))
    order = np.random.default_rng(0).permutation(900)[:50]
    assert {int(index): pixels(rows[int(index)]) for index in sorted(order)} == {
        int(index): pixels(again[int(index)]) for index in order
    }
    image = rows[4].positives[0].parts[0].value
    assert (image.mode, image.size) == ("RGB", (96, 32))
    assert pixels(rows[4]) != pixels(HandwrittenNumbers(900, seed=6)[4])
    assert pixels(rows[4]) != pixels(rows[704])  # The same number, written again.
    assert words_of(rows[4].query) == words_of(rows[704].query)


def test_query_ids_are_those_of_the_rows_and_rows_end():
    rows = HandwrittenNumbers(30)
    assert rows.query_ids(range(30)) == [rows[index].query.id for index in range(30)]
    for index in (-1, 30):
        with pytest.raises(IndexError, match=f"row {index} of 30"):
            rows[index]


@pytest.mark.parametrize(("split", "queries", "copies", "corpus"), [("test", 200, 5, 2000), ("val", 100, 2, 500)])
def test_evaluation_shows_its_numbers_by_its_own_scans(pasted, split, queries, copies, corpus):
    evaluation, target = HandwrittenNumbersEvaluation(split).load(), load_digits().target
    assert len(evaluation.queries) == len(set(evaluation.query_names)) == queries
    assert len(evaluation.corpus) == len(set(evaluation.document_names)) == len(pasted) == corpus
    assert len({item.id for item in evaluation.corpus}) == corpus
    assert {scan for chosen in pasted for scan in chosen} <= set(np.concatenate(digits.scans_of(split)))
    for name, chosen in zip(evaluation.document_names, pasted, strict=True):
        assert name[:3] == "".join(str(target[scan]) for scan in chosen)
    for query, name in zip(evaluation.queries, evaluation.query_names, strict=True):
        assert words_of(query) == digits.in_words(int(name))
        showing = {document for document in evaluation.document_names if document.startswith(f"{name}-")}
        assert evaluation.qrels[name] == dict.fromkeys(showing, 1)
        assert len(showing) == copies


def test_evaluation_is_the_same_each_time_and_validation_shows_no_number_of_the_test():
    first, second = (HandwrittenNumbersEvaluation("val", seed=2).load() for _ in range(2))
    other = HandwrittenNumbersEvaluation("val", seed=3).load()
    assert [item.id for item in first.corpus] == [item.id for item in second.corpus]
    assert [item.id for item in first.corpus] != [item.id for item in other.corpus]
    assert first.qrels.keys() == other.qrels.keys()
    assert not {name[:3] for name in first.document_names} & {*HandwrittenNumbersEvaluation("test").load().query_names}
