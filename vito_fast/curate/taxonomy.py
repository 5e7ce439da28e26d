"""Queries to sets of ImageNet classes: class ids, synonyms, hypernyms; ambiguity is flagged, the unknown refused.

The shipped table ``classes.tsv`` holds the 1,000 classes and every hypernym of theirs in WordNet 3.0.
"""

import difflib
import functools
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("classes.tsv")

PLURALS = (
    ("ies", "y"), ("men", "man"), ("ches", "ch"), ("shes", "sh"), ("ses", "s"), ("xes", "x"), ("ves", "f"),
    ("ves", "fe"), ("s", ""),
)  # fmt: skip
"""WordNet's rules of detachment for nouns (morphy(7WN)), and ``ves``."""


@dataclass(frozen=True)
class Resolution:
    """The classes that a query stands for.

    ``kind`` is ``exact`` (a class's id, first lemma or whole description), ``synonym`` (another lemma), ``hypernym``
    (all classes below it), ``ambiguous`` (a lemma of several senses: their union), ``unknown`` (``nearest`` has names
    that exist) or ``none`` (no query). ``senses`` counts the senses of different classes.
    """

    classes: tuple[int, ...]
    kind: str
    senses: int = 1
    nearest: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageNetClass:
    number: int
    wnid: str
    lemmas: tuple[str, ...]
    definition: str

    @property
    def name(self) -> str:
        """The first lemma."""
        return self.lemmas[0]


def normalize(query: str) -> str:
    """Case, underscores, hyphens and runs of spaces do not tell names apart."""
    return re.sub(r"[\s_\-]+", " ", query).strip().casefold()


class Taxonomy:
    """The classes and their names; ``resolve`` is a pure function of its query."""

    def __init__(self, table: Path = TABLE):
        classes: list[ImageNetClass] = []
        parents: dict[str, list[str]] = {}
        words: dict[str, list[str]] = {}
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                continue
            kind, wnid, above, lemmas, *definition = line.split("\t")
            parents[wnid], words[wnid] = above.split(), lemmas.split(", ")
            if kind == "c":
                classes.append(ImageNetClass(len(classes), wnid, tuple(words[wnid]), definition[0]))
        self.classes = tuple(classes)
        self._leaves = _leaves(self.classes, parents)
        self._exact: dict[str, list[int]] = defaultdict(list)
        self._senses: dict[str, list[str]] = defaultdict(list)
        for item in classes:
            for name in (item.wnid, item.name, ", ".join(item.lemmas)):
                self._exact[normalize(name)].append(item.number)
        for wnid, names in words.items():
            for name in {wnid, *map(normalize, names)}:
                self._senses[name].append(wnid)
        self._leaf_ids = {item.wnid for item in classes}
        self._names = sorted(name for name in self._senses if not re.fullmatch(r"n\d{8}", name))

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - one taxonomy lives as long as the process
    def resolve(self, query: str) -> Resolution:
        """The classes of ``query``: an id (``n02084071``), a lemma or a hypernym, in singular or plural.

        A lemma of several senses, none of which contains all others, is ambiguous: the union, flagged. So is the union
        of a hypernym's senses taken (``cat``: domestic and wild), but it stays a hypernym.
        """
        name = normalize(query)
        if not name:
            return Resolution((), "none", 0)
        for candidate in (name, *_singulars(name)):
            if candidate in self._exact or candidate in self._senses:
                return self._known(candidate)
        return Resolution((), "unknown", 0, tuple(difflib.get_close_matches(name, self._names, n=3, cutoff=0.6)))

    def _known(self, name: str) -> Resolution:
        senses = self._senses.get(name, [])
        sets = {self._leaves[wnid] for wnid in senses} or {frozenset(self._exact[name])}
        union = frozenset().union(*sets)
        lemma = any(wnid in self._leaf_ids for wnid in senses)
        if lemma and union not in sets:
            kind = "ambiguous"
        elif name in self._exact and len(union) == 1:
            kind = "exact"
        else:
            kind = "synonym" if lemma else "hypernym"
        return Resolution(tuple(sorted(union)), kind, len(sets))

    def below(self, number: int, ancestor: str) -> bool:
        """Whether class ``number`` is below the synset ``ancestor`` (its id)."""
        return number in self._leaves.get(ancestor, ())


def _leaves(classes: tuple[ImageNetClass, ...], parents: dict[str, list[str]]) -> dict[str, frozenset[int]]:
    """Classes at or below each synset."""
    leaves: dict[str, set[int]] = defaultdict(set)
    for item in classes:
        open_ids = [item.wnid]
        while open_ids:
            wnid = open_ids.pop()
            if item.number not in leaves[wnid]:
                leaves[wnid].add(item.number)
                open_ids += parents[wnid]
    return {wnid: frozenset(numbers) for wnid, numbers in leaves.items()}


def _singulars(name: str) -> list[str]:
    return [name[: -len(end)] + single for end, single in PLURALS if name.endswith(end) and len(name) > len(end) + 1]


@functools.cache
def taxonomy() -> Taxonomy:
    """The shipped one, read once a process."""
    return Taxonomy()
