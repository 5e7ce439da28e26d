"""The report is whole and self-contained, and the tables in the documents are those of the results files."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import compare, machine, report, tables, text
from bench.plots import Axis, Series, chart

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench/results").glob("*.json"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STUDY = next(path.stem for path in RESULTS if path.stem.endswith("-study"))
VOID = {"meta", "link", "wbr"}


class Page(HTMLParser):
    """Collects ids, links and text, and checks that elements close in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        assert "src" not in found
        assert tag != "link" or found["href"] == "data:,"

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_baseline_is_of_this_machine_where_there_is_one(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    name = machine.machine()["name"]
    assert re.fullmatch(r"cpu-[a-z0-9-]+-[0-9]+-cores", name)
    other, own = (tmp_path / "results" / f"{stem}-quick.json" for stem in ("cpu-other", name))
    other.touch()
    assert machine.baseline() == other
    own.touch()
    assert machine.baseline() == own


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "bench/results/cpu-amd-epyc-family-26-model-2-2-cores.json").read_text())


def test_report_has_every_section_and_loads_nothing(results):
    page = report.render(results)
    parsed = Page(page)
    for suite in {record["suite"] for record in results["cases"]}:
        assert suite in parsed.ids
    assert {"summary", "roofline", "static", "skipped"} <= set(parsed.ids)
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "script" not in parsed.tags
    assert not re.search(r"url\(|https?://", page)
    assert parsed.tags.count("figure") >= (1 if results["quick"] else 12)
    assert "prefers-color-scheme:dark" in page


def test_report_names_every_case_and_every_candidate_left_out(results):
    page = report.render(results)
    for record in results["cases"]:
        assert f'id="{record["id"]}"' in page
    for row in results["skipped"]:
        assert row["name"] in page


def test_chart_places_points_on_logarithmic_axes():
    series = [Series("a <b>", [(10, 1), (100, 10), (1000, 100)], "ours")]
    picture = chart("title", Axis("N", text.significant), Axis("s", text.seconds_text), series)
    points = re.search(r'points="([^"]+)"', picture)[1].split()
    xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert "a &lt;b&gt;" in picture
    assert chart("empty", Axis("N", str), Axis("s", str), []) == ""


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_results_files_say_where_they_come_from(path):
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert path.stem == "counted" or re.sub("-(quick|steps|study|data)$", "", path.stem) == content["machine"]["name"]
    assert {"python", "torch"} <= set(content["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+Z", content["date"])
    for record in content["cases"]:
        for row in record["candidates"]:
            assert row["status"] == "ok" or ("median_s" not in row and row["reason"])
        assert report.ours_of(record)["status"] == "ok"


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_tables_in_documents_are_those_of_the_results(path):
    content = path.read_text(encoding="utf-8")
    assert tables.fill(content) == content, "run `make readme-tables`"


MEASURED = re.compile(
    r"(?<![\w.])(?:\d[\d.,]*|(?:two|three|four|five|ten|twenty|thirty|forty|fifty)(?: and a half)?)"
    r"\s+(?:ms|µs|s|seconds?|minutes?|hours?|[KMGT]i?B|[GT]FLOPs?|[a-z]+/s|%|times)(?!\w)"
)
NOT_OURS = {  # settings, bounds that a test or the gate holds, arithmetic, and what others say
    "method.md": {"2.56 s", "10 s"},
    "training.md": {"24 GB", "80 GB"},
    "results.md": {"256 MiB", "31 MiB", "20 ms"},
    "benchmarks.md": {"15 minutes", "3 minutes", "ten minutes", "32 MiB", "20 ms", "1 MiB"}
    | {f"{percent} %" for percent in ("0.1", "0.5", 2, 3, 5, 10, 15)},  # of bench.compare
    "scaling.md": {"ten minutes"},
    "study.md": {"95 %"},
    "data.md": {"128 KiB", "four times"},
    "curation.md": {"1 s", "10 s", "30 %", "40 %", "95 %"},
    "planning.md": {"2470 images/s", "989 TFLOP", "2.41 TB", "3.35 TB"},
}


PROSE = [path for path in DOCUMENTS if path.name not in ("config.md", "cli.md")]  # generated from the code


@pytest.mark.parametrize("path", PROSE, ids=[path.name for path in PROSE])
def test_what_prose_says_was_measured_comes_from_results(path):
    text = tables.MARK.sub("", path.read_text(encoding="utf-8"))
    text = re.sub("```.*?```|`[^`]*`", "", text, flags=re.S)
    found = {re.sub(r"\s+", " ", match) for match in MEASURED.findall(text)}
    assert found - NOT_OURS.get(path.name, set()) == set(), "put it between <!-- bench:at ... --> and <!-- /bench -->"


def test_the_gates_thresholds_are_those_of_the_documents():
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for rule in {compare.TIME, *compare.COUNTED.values()}:
        assert rule.allowed == 1.0 or f"{100 * (rule.allowed - 1):.2g} %" in text


def test_the_chart_is_that_of_the_results():
    drawn = tables.CHART.read_text(encoding="utf-8")
    assert drawn == tables.h200_chart(), "run `make readme-tables`"
    assert drawn.count("<polyline") == len(tables.CHARTED)


@pytest.mark.parametrize(("name", "make"), [("config.md", "config_page"), ("cli.md", "cli_page")])
def test_the_reference_pages_are_those_of_the_code(name, make, monkeypatch):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for variable, value in generate.PLAIN.items():
        monkeypatch.setenv(variable, value)
    made = getattr(generate, make)()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made, "run `make docs-reference`"


def test_a_changed_figure_is_noticed(results):
    machine, case = results["machine"]["name"], results["cases"][0]["id"]
    source = f"Is <!-- bench:value {machine} {case} ours.median_s -->12 parsecs<!-- /bench --> fast.\n"
    made = tables.fill(source)
    assert made != source
    assert tables.fill(made) == made
    assert text.seconds_text(report.ours_of(results["cases"][0])["median_s"]) in made


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_every_table_can_be_made(results, name):
    files = dict.fromkeys(("arms", "margins", "settings"), STUDY)
    files |= {"modes": "nvidia-h200-steps", "eager": "nvidia-h200"}
    source = files.get(name, results["machine"]["name"])
    made = tables.fill(f"<!-- bench:{name} {source} -->\n<!-- /bench -->")
    assert len(made.splitlines()) >= (1 if name == "machine" else 4)  # two marks, a header and its line


def test_an_unknown_table_or_machine_is_an_error():
    with pytest.raises(ValueError, match="unknown table 'nonsense'"):
        tables.fill("<!-- bench:nonsense x --><!-- /bench -->")
    with pytest.raises(FileNotFoundError):
        tables.fill("<!-- bench:losses no-such-machine --><!-- /bench -->")
    with pytest.raises(ValueError, match="has no <!-- /bench -->"):
        tables.fill("<!-- bench:losses nvidia-h200 -->| a wrong figure |<!-- /bench>")
    with pytest.raises(ValueError, match="no case info_nce\\[N=3\\]"):
        tables.fill("<!-- bench:losses nvidia-h200 info_nce[N=3] --><!-- /bench -->")
    for path in ("machine/name", "machine/kernels", "tests"):
        with pytest.raises(ValueError, match=f"no number at {path}"):
            tables.fill(f"<!-- bench:at nvidia-h200 {path} --><!-- /bench -->")


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("losses ", "no machine is named"),
        ("value nvidia-h200 vs.limit", "a case and a path are not both named"),
        ("value nvidia-h200 {case} vs.limit.x", "no vs.limit.x of"),
        ("value nvidia-h200 {case} vs", "no vs of"),
        ("step nvidia-h200-steps", "the results hold none of its rows"),
        ("modes nvidia-h200", "no 'steps' in the results"),
        ("step nvidia-h200 {case}", "the results hold none of its rows"),
    ],
)
def test_a_mark_that_cannot_be_filled_is_named(mark, says):
    start = f"<!-- bench:{mark.format(case=tables.load('nvidia-h200')['cases'][0]['id'])} -->"
    with pytest.raises(ValueError, match=re.escape(start)) as error:
        tables.fill(f"{start}<!-- /bench -->")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("content", "page", "says"),
    [
        ("[]", "page.html", "results.json: no results of a race: "),
        ("[" * 100_000, "page.html", "results.json: no results of a race: "),
        (None, "no/page.html", "cannot write .*page.html: No such file"),
        (None, ".", "cannot write .*: Is a directory"),
    ],
)
def test_a_report_names_the_file_of_no_use(tmp_path, results, content, page, says):
    (tmp_path / "results.json").write_text(content or json.dumps(results))
    with pytest.raises(ValueError, match=says):
        report.write(tmp_path / "results.json", tmp_path / page)


def test_a_table_may_be_of_some_cases_and_a_figure_from_anywhere(results):
    name = results["machine"]["name"]
    losses = [record["id"] for record in results["cases"] if record["suite"] == "losses"]
    made = tables.fill(f"<!-- bench:losses {name} {losses[1]} {losses[0]} --><!-- /bench -->").split("-->")[1]
    assert 0 < made.index(losses[1]) < made.index(losses[0])
    assert len(made.strip().splitlines()) == 5
    assert tables.fill(f"<!-- bench:at {name} machine/cores -->9<!-- /bench -->").endswith("-->2<!-- /bench -->")


def test_a_ratio_to_python_beside_a_replayed_graph_is_marked(results):
    record = next(record for record in results["cases"] if "reference" in record["vs"])
    assert "†" not in tables.versus(record, "reference")
    for row in record["candidates"]:
        row["eager_s"] = 1.0
        if row["role"] == "reference":
            row["reason"] = "not captured as a graph: it synchronizes"
    assert tables.versus(record, "reference").endswith("†")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (text.seconds_text(1.234), "1.23 s"),
        (text.seconds_text(0.0123), "12.3 ms"),
        (text.seconds_text(4.2e-6), "4.2 µs"),
        (text.bytes_text(3 * 2**30), "3 GiB"),
        (text.bytes_text(0), "0 B"),
        (text.count_text(2_500_000), "2.5 M"),
        (text.significant(123456), "123000"),
        (text.significant(0), "0"),
    ],
)
def test_numbers_as_people_read_them(made, expected):
    assert made == expected


def test_eager_times_stand_beside_those_of_graphs():
    ours = {"name": "vito_kernels", "role": "ours", "median_s": 1e-5, "eager_s": 2e-4}
    slow, fast = ({"name": name, "role": "peer", "eager_s": time} for name, time in (("a", 3e-4), ("b", 1e-4)))
    case = {"id": "case[N=1]", "candidates": [ours, slow, fast, {"name": "c", "role": "limit", "eager_s": 1e-6}]}
    without = {"id": "case[N=2]", "candidates": [{"name": "vito_kernels", "role": "ours", "median_s": 1.0}]}
    shown = tables.eager({"cases": [case, without]}).splitlines()
    assert len(shown) == 3
    assert shown[2] == "| `case[N=1]` | 10 µs | 200 µs | 100 µs (b) |"
