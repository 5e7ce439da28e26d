"""Queries against what ImageNet and WordNet say of the classes."""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vito_fast.curate.taxonomy import Resolution, normalize, taxonomy

AMBIGUOUS = (
    "sand viper", "grass snake", "partridge", "crawfish", "crayfish", "crane", "cardigan", "catamount", "panther",
    "sus scrofa", "polecat", "panda", "tub", "wagon", "gong", "horn", "harp", "maillot", "missile",
)  # fmt: skip


def names(resolution: Resolution) -> list[str]:
    return [taxonomy().classes[number].name for number in resolution.classes]


def test_every_id_is_its_class():
    classes = taxonomy().classes
    assert len(classes) == 1000
    for item in classes:
        assert taxonomy().resolve(item.wnid) == Resolution((item.number,), "exact")


def test_every_lemma_and_description_finds_its_class():
    for item in taxonomy().classes:
        for name in (*item.lemmas, ", ".join(item.lemmas), item.name.upper().replace(" ", "_")):
            found = taxonomy().resolve(name)
            assert item.number in found.classes
            assert found.kind in ("exact", "synonym", "ambiguous")


def test_the_table_is_that_of_timm():
    data = pytest.importorskip("timm.data")
    info = data.ImageNetInfo()
    assert [item.wnid for item in taxonomy().classes] == info.label_names()
    assert [", ".join(item.lemmas) for item in taxonomy().classes] == info.label_descriptions()
    detailed = [f"{', '.join(item.lemmas)}: {item.definition}" for item in taxonomy().classes]
    assert detailed == info.label_descriptions(detailed=True)


@pytest.mark.parametrize("lemma", AMBIGUOUS)
def test_lemmas_of_several_classes_give_all_of_them_and_a_flag(lemma):
    own = {item.number for item in taxonomy().classes if lemma in map(normalize, item.lemmas)}
    found = taxonomy().resolve(lemma)
    assert found.kind == "ambiguous"
    assert len(own) >= 2
    assert own <= set(found.classes)


@pytest.mark.parametrize(
    ("query", "count"),
    [("dog", 118), ("bird", 59), ("domestic cat", 5), ("cat", 13), ("Dogs", 118), ("n02084071", 118)],
)
def test_hypernyms_are_the_classes_below_them(query, count):
    found = taxonomy().resolve(query)
    assert (found.kind, len(found.classes)) == ("hypernym", count)


def test_the_dogs_are_one_block_of_numbers():
    assert taxonomy().resolve("dog").classes == tuple(range(151, 269))


@pytest.mark.parametrize(
    ("query", "kind", "expected"),
    [
        ("golden_retriever", "exact", ["golden retriever"]),
        ("tench, Tinca tinca", "exact", ["tench"]),
        ("Tinca tinca", "synonym", ["tench"]),
        ("zebras", "exact", ["zebra"]),
        ("monitor", "ambiguous", ["Komodo dragon", "monitor"]),
        ("wolves", "hypernym", ["timber wolf", "white wolf", "red wolf", "coyote"]),
    ],
)
def test_spelling_and_kind(query, kind, expected):
    found = taxonomy().resolve(query)
    assert found.kind == kind
    assert set(names(found)) >= set(expected[:1])
    assert query == "wolves" or names(found) == expected


def test_the_unknown_is_refused_with_the_nearest_names():
    found = taxonomy().resolve("zebbra")
    assert (found.kind, found.classes) == ("unknown", ())
    assert found.nearest[0] == "zebra"
    assert taxonomy().resolve("qqqqqqqq") == Resolution((), "unknown", 0)


@pytest.mark.parametrize("query", ["", "  ", "_-_"])
def test_no_query_is_none(query):
    assert taxonomy().resolve(query) == Resolution((), "none", 0)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=string.printable + "éß\x00\u202e", max_size=30))
def test_any_text_has_an_answer(query):
    found = taxonomy().resolve(query)
    assert found.kind in ("exact", "synonym", "hypernym", "ambiguous", "unknown", "none")
    assert bool(found.classes) == (found.kind not in ("unknown", "none"))
    assert all(re.fullmatch(r"[^A-Z]+", name) for name in found.nearest)
