"""``python -m vito_fast.curate.build_classes WORDNET``: writes ``classes.tsv``, the shipped table of the taxonomy.

``WORDNET`` is the folder of ``data.noun`` of WordNet 3.0 (Debian: package ``wordnet-base``, ``/usr/share/wordnet``).
The ids, lemmas and definitions of the 1,000 classes are those of ``timm.data.ImageNetInfo``.
"""

import sys
from pathlib import Path

NOTICE = """\
The 1,000 classes of ImageNet-1k (ILSVRC 2012): ids, lemmas and definitions as in timm (Apache-2.0), and their hypernyms
in WordNet 3.0. Columns: kind (c = class, in the order of its number; h = hypernym), id, ids of the direct hypernyms,
lemmas, definition of a class.

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.

This software and database is being provided to you, the LICENSEE, by Princeton University under the following license.
By obtaining, using and/or copying this software and database, you agree that you have read, understood, and will comply
with these terms and conditions:

Permission to use, copy, modify and distribute this software and database and its documentation for any purpose and
without fee or royalty is hereby granted, provided that you agree to comply with the following copyright notice and
statements, including the disclaimer, and that the same appear on ALL copies of the software, database and
documentation, including modifications that you make for internal use or for distribution.

THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS
OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF
MERCHANTABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE, DATABASE OR
DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.

The name of Princeton University or Princeton may not be used in advertising or publicity pertaining to distribution of
the software and/or database. Title to copyright in this software, database and any associated documentation shall at
all times remain with Princeton University and LICENSEE agrees to preserve same.
"""

Synset = tuple[list[str], list[str]]
"""Words, and ids of the direct hypernyms."""


def read_nouns(path: Path) -> dict[str, Synset]:
    """Noun synsets of WordNet's ``data.noun`` by id, ``n`` and eight digits (format: wndb(5WN))."""
    synsets: dict[str, Synset] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields = line.partition("|")[0].split()
        words = int(fields[3], 16)
        pointers = fields[5 + 2 * words :]
        parents = [f"n{pointers[place + 1]}" for place in range(0, len(pointers), 4) if pointers[place] in ("@", "@i")]
        synsets[f"n{fields[0]}"] = [word.replace("_", " ") for word in fields[4 : 4 + 2 * words : 2]], parents
    return synsets


def build(nouns: Path) -> str:
    """The text of ``classes.tsv``."""
    from timm.data import ImageNetInfo

    synsets, info = read_nouns(nouns), ImageNetInfo()
    names = info.label_names()
    rows = ["".join(f"# {line}".rstrip() + "\n" for line in NOTICE.splitlines())]
    open_ids, closure = [parent for name in names for parent in synsets[name][1]], set()
    while open_ids:
        synset = open_ids.pop()
        if synset not in closure:
            closure.add(synset)
            open_ids += synsets[synset][1]
    for number, name in enumerate(names):
        lemmas, definition = (info.index_to_description(number, detailed=detailed) for detailed in (False, True))
        definition = definition.removeprefix(f"{lemmas}: ")
        rows.append("\t".join(["c", name, " ".join(synsets[name][1]), lemmas, definition]) + "\n")
    for name in sorted(closure - set(names)):
        words, parents = synsets[name]
        rows.append("\t".join(["h", name, " ".join(parents), ", ".join(words)]) + "\n")
    return "".join(rows)


if __name__ == "__main__":
    Path(__file__).with_name("classes.tsv").write_text(build(Path(sys.argv[1]) / "data.noun"), encoding="utf-8")
