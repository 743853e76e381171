"""The report's pages in a real browser: they stand alone, can be read on a desk, on a phone, in the dark and on paper.

`make test-browser` installs Playwright and, where there is none, Debian's Chromium; elsewhere it is skipped.
"""

import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from test_report import write_runs
from test_studies import report, study_of, write_study, write_sweep

from plm.reporting.studies import Column, Drawing, Study

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = {"runs": "Language models compared", "study": "A table of <ours>", "studies": "2 studies"}
DESK, PHONE, PAPER = 1280, 390, 720  # pixels; paper: A4 upright with usual margins
VIEWS = {"desk": (DESK, "light"), "phone": (PHONE, "light"), "dark": (DESK, "dark"), "dark phone": (PHONE, "dark")}

pytestmark = pytest.mark.skipif(
    "PLM_TEST_BROWSER" not in os.environ, reason="needs Chromium and Playwright: run `make test-browser`"
)


def study_with_drawings() -> Study:
    """All that a study's page can draw: lines, steps on a logarithmic axis beside the paper's, bars."""
    study = study_of()
    steps, layers = (15, 25, 50, 100, 200, 300, 400, 500), ("embedding", "layer 1", "layer 2")
    study.columns += [Column(f"step_{n}", f"{n:,}", "task", "sst2/accuracy", group="steps", x=float(n)) for n in steps]
    study.columns += [Column(f"bar_{name}", name, "task", "sst2/accuracy", group="mix") for name in layers]
    study.columns.append(Column("long", "pairs of texts (MNLI-m, QNLI, MRPC)", "task", "sst2/accuracy"))
    for seed in range(5):
        for row in ("new", "old"):
            study.cell(row, "long", f"{row}-seed{seed}", seed)
            for number, n in enumerate(steps):
                study.cell(row, f"step_{n}", f"{'few' if number < 3 else row}-seed{seed}", seed)
            for name, source in zip(layers, ("random", "few", row), strict=True):
                study.cell(row, f"bar_{name}", f"{source}-seed{seed}", seed)
    best = {"the new one": 85, "the old one": 83}
    paper = {label: [(n, top - 900 / n) for n in (200, 400, 1000)] for label, top in best.items()}
    study.drawings += [
        Drawing("steps", "Updates of pretraining", "updates", "%", "lines", True, paper, "thousands of updates"),
        Drawing("mix", "Shares of the layers in the learned mixes", y_label="% of the mix", kind="bars"),
    ]
    return study


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: file}: several runs; one study; the same study at two budgets."""
    folder = tmp_path_factory.mktemp("pages")
    write_runs(folder / "runs")
    workdirs = write_sweep(folder / "sweep", study_with_drawings())
    again = study_with_drawings()
    again.budget = "small"
    write_study(folder / "again", again, workdirs)
    found = {"runs": ["runs"], "study": ["sweep/root"], "studies": ["sweep/root", "again"]}
    for name, directories in found.items():
        done = report(*(folder / one for one in directories), f"--output={folder / name}.html")
        assert done.returncode == 0, done.stderr
    return {name: folder / f"{name}.html" for name in found}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"none of {', '.join(BROWSERS)} on the PATH (package chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a file. At the end: nothing but files that were visited was asked for, and nothing went wrong."""
    asked, wrong, visited, contexts = [], [], [], []

    def open_page(file: Path, width: int = DESK, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)

        def answer(route):
            asked.append(route.request.url)
            route.continue_() if route.request.url in visited else route.abort()

        context.route("**/*", answer)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        visited.append(file.as_uri())
        page.goto(visited[-1])
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked == visited
    assert wrong == []


@pytest.fixture(params=PAGES)
def name(request):
    return request.param


@pytest.fixture(params=VIEWS)
def shown(request, name, pages, visit):
    """Every page in every view."""
    return visit(pages[name], *VIEWS[request.param])


# Places of what is seen, as [text, ...] lists, so that a failure names the offenders.
LAID_OUT = """() => [...document.querySelectorAll("body *")].filter(one => !one.closest("svg")).map(one => {
  const scrolls = one.parentElement.closest(".plot, .table");
  return [one.tagName + "." + one.className + ": " + one.textContent.slice(0, 60).trim(),
    one.getBoundingClientRect().right, Boolean(scrolls)];
}).filter(([, right, scrolls]) => !scrolls && right > innerWidth + 1)"""

FIGURES = """() => [...document.querySelectorAll("svg")].map(svg => {
  const own = svg.getBoundingClientRect(), frame = svg.closest(".plot");
  const outer = frame.getBoundingClientRect(), style = getComputedStyle(frame);
  return {name: svg.closest("figure").querySelector("b").textContent, width: own.width, height: own.height,
    right: own.right, frame: [outer.left, outer.right], inner: innerWidth, scrolls: style.overflowX == "auto"};
})"""

TEXTS = """() => [...document.querySelectorAll("svg")].map(svg => [...svg.querySelectorAll("text")].map(text => {
  const box = text.getBoundingClientRect(), own = svg.getBoundingClientRect(), to = text.getScreenCTM();
  return {text: text.textContent, left: box.left - own.left, top: box.top - own.top, right: box.right - own.left,
    bottom: box.bottom - own.top, width: own.width, height: own.height,
    size: parseFloat(getComputedStyle(text).fontSize) * Math.hypot(to.a, to.b),
    angle: Math.abs(Math.atan2(to.b, to.a)) * 180 / Math.PI};
}))"""

CONTRASTS = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if ((numbers(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode, one = text.parentElement;
    if (!text.data.trim() || one.closest("script, style, defs")) continue;
    const style = getComputedStyle(one), ink = one.closest("svg") ? style.fill : style.color;
    const pair = [light(ink), light(behind(one))].sort((a, b) => b - a);
    found.push([text.data.trim().slice(0, 40), (pair[0] + 0.05) / (pair[1] + 0.05)]);
  }
  return found;
}"""

HEADERS = """() => [...document.querySelectorAll("table")].filter(table =>
  ![...table.querySelectorAll("thead th")].every(th => th.scope == "col") || !table.querySelector("thead th") ||
  ![...table.querySelectorAll("tbody tr")].every(row => row.cells[0].tagName == "TH" && row.cells[0].scope == "row")
).map(table => table.ariaLabel)"""


def test_only_tables_and_figures_scroll_sideways(shown):
    assert shown.evaluate("document.documentElement.scrollWidth") <= shown.viewport_size["width"]
    assert shown.evaluate(LAID_OUT) == []


def test_every_figure_is_seen(shown):
    figures = shown.evaluate(FIGURES)
    assert figures
    for figure in figures:
        assert min(figure["width"], figure["height"]) > 100, figure
        assert figure["frame"][0] >= 0, figure
        assert figure["frame"][1] <= figure["inner"], figure
        assert figure["scrolls"] or figure["right"] <= figure["inner"], figure


def overlaps(texts: list[dict]) -> list[tuple]:
    """Pairs of upright or lying texts whose letters touch; tilted ones have boxes larger than themselves."""
    straight = [text for text in texts if min(text["angle"] % 90, 90 - text["angle"] % 90) < 2]
    found = []
    for number, one in enumerate(straight):
        for other in straight[:number]:
            wide = min(one["right"], other["right"]) - max(one["left"], other["left"])
            high = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
            least = min((t["right"] - t["left"]) * (t["bottom"] - t["top"]) for t in (one, other))
            # A box has room above and below the letters.
            if wide > 1 and high > 0 and wide * high > 0.2 * least:
                found.append((one["text"], other["text"], round(wide), round(high)))
    return found


def test_text_in_figures_can_be_read(shown):
    for texts in shown.evaluate(TEXTS):
        assert texts
        assert overlaps(texts) == []
        assert [(text["text"], text["size"]) for text in texts if text["size"] < 8.9] == []
        cut = [
            text["text"]
            for text in texts
            if min(text["left"], text["top"]) < -2
            or text["right"] > text["width"] + 2
            or text["bottom"] > text["height"] + 2
        ]
        assert cut == []


def test_ink_stands_out_from_paper(shown):
    contrasts = shown.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [one for one in contrasts if one[1] < 4.5] == []


def test_titles_links_and_tables(name, pages, visit):
    page = visit(pages[name])
    assert page.title() == page.locator("h1").first.inner_text() == PAGES[name]
    broken = """() => [...document.querySelectorAll("a")].map(a => a.getAttribute("href"))
      .filter(href => !href.startsWith("#") || !document.getElementById(href.slice(1)))"""
    assert page.evaluate(broken) == []
    ids = page.evaluate("() => [...document.querySelectorAll('[id]:not(svg *)')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    last = page.locator("nav a").last
    last.click()
    assert page.url.endswith(last.get_attribute("href"))
    assert page.evaluate("scrollY") > 0
    assert page.locator("table").count() > 5
    assert page.evaluate(HEADERS) == []


def test_every_saved_figure_stands_alone(name, pages, visit, tmp_path):
    page = visit(pages[name])
    buttons = page.locator("button.save")
    assert buttons.count() == page.locator("figure svg").count() > 2
    files = set()
    for number in range(buttons.count()):
        with page.expect_download() as download:
            buttons.nth(number).click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        files.add(file)
        text = file.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text
        assert "class=" not in text
        named = {one.get("id") for one in root.iter()}
        wanted = set(re.findall(r'url\((?:&quot;)?#([^)&]+)|href="#([^"]+)"', text))
        assert {one or other for one, other in wanted} <= named
        assert not re.search(r'(?:href|src)="(?!#)|url\((?!(?:&quot;)?#)|@import', text)
        letters = list(root.iter("{http://www.w3.org/2000/svg}text"))
        assert letters
        assert all("font" in one.get("style", "") for one in letters if len(one) == 0)
        if number == 0:
            alone = visit(file)
            assert alone.evaluate("document.documentElement.getBoundingClientRect().width") > 300
            assert alone.locator("text").count() == len(letters)
    assert len(files) == buttons.count(), "each figure has a name of its own"


def test_seeds_are_seen_where_the_pointer_rests_or_a_finger_taps(pages, visit):
    page = visit(pages["study"], PHONE)
    means = page.locator("table.compact td span[title]")
    assert means.count() > 10
    for title in means.evaluate_all("all => all.map(one => one.title)"):
        assert re.match(r"n = 5: [^,]+(, [^,]+){4}|all 5 equal", title), title
    values = page.locator("table.compact td span[title] + .values").first
    assert not values.is_visible()
    means.first.click()
    assert values.is_visible()
    assert values.inner_text() == means.first.get_attribute("title")


def test_verdicts_are_seen_without_scrolling_on_a_desk(pages, visit):
    page = visit(pages["study"])
    verdicts = page.get_by_role("table", name="what it claims").locator("tbody tr td:last-child")
    assert verdicts.all_inner_texts() == ["reproduced"] * 4
    right = page.evaluate("document.querySelector('main').getBoundingClientRect().right")
    assert all(
        box <= right for box in verdicts.evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
    )


def test_what_is_folded_opens(pages, visit):
    page = visit(pages["study"], PHONE)
    folded = page.locator("details")
    assert folded.count() > 2
    for number in range(folded.count()):
        table = folded.nth(number).locator("table")
        assert not table.is_visible()
        folded.nth(number).locator("summary").click()
        assert table.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


def test_on_paper_everything_is_shown(name, pages, visit):
    page = visit(pages[name], PAPER, "dark")
    on_screen = page.evaluate("document.documentElement.scrollHeight")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.locator("button.save").first.is_hidden()
    folded = page.locator("details table").all()
    assert folded
    assert all(one.is_visible() for one in folded)
    assert all(one.is_visible() for one in page.locator(".values").all())
    assert page.evaluate("document.documentElement.scrollHeight") > on_screen / 2, "nothing large is left out"
    wide = """() => [...document.querySelectorAll("svg, table")].map(one => [one.ariaLabel ??
      one.closest("figure").textContent.slice(0, 60), one.getBoundingClientRect().right])
      .filter(([, right]) => right > innerWidth + 1)"""
    assert page.evaluate(wide) == [], "paper does not scroll"
    assert page.pdf(format="A4").startswith(b"%PDF")
