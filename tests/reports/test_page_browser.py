"""The report page in a real browser: no error, what is seen, what clicks and keys do."""

import json

import pytest
from made_run import rollout, write_run

from mtp.reports.page import write_page
from mtp.reports.page.browser import missing, open_page

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("one") / "run")
    write_page([folder], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    for seed in (2, 10, 1):
        write_run(folder / f"seed={seed}", name=f"s/{seed}", seed=seed)
    write_page([folder], folder / "report.html")
    return folder / "report.html"


def test_a_wrong_answer_its_pass_and_who_wrote_it_are_on_the_first_screen(one):
    """The page opens at the wrong answers of the last checkpoint, with the mistake in words."""
    with open_page(one) as page:
        assert "1 of 4 kept rollouts are wrong" in page.inner_text("#callout")
        page.click("text=Show the first wrong answer")
        assert page.inner_text("#count") == "1 of 4 kept rollouts"
        said = page.inner_text(".wrong-at")
        assert "pass 3 of 4" in said and "main wrote 5 in the answer 5; correct is 4" in said
        page.select_option("#checkpoint", index=1)
        said = page.inner_text(".wrong-at")
        assert "Went wrong in pass 2 of 4: head, slot 1 wrote 3 in the step 1+1=3" in said
        assert page.locator("#panes .t.mistake").inner_text() == "3"
        assert page.locator("#panes .t.false").count() == 6
        assert (
            page.locator("#panes .t.head").count() == 5
            and page.locator("#panes .pass").count() == 4
        )


def is_on_screen(part):
    """Whether the middle of an element is within the window and nothing covers it."""
    return part.evaluate(
        """(part) => {
          const { left, right, top, bottom } = part.getBoundingClientRect();
          return part.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2));
        }"""
    )


@pytest.mark.parametrize(
    "options",
    [{"width": 1280}, {"width": 390, "height": 844, "has_touch": True}],
    ids=["wide", "narrow"],
)
def test_from_the_top_of_the_page_to_the_mistake_without_scrolling(one, options):
    """Two clicks: the first wrong answer, with the pass and the emitter, then the token."""
    with open_page(one, **options) as page:
        button = page.locator("text=Show the first wrong answer")
        assert is_on_screen(button)
        button.click()
        mistake = page.locator(".wrong-at")
        assert is_on_screen(mistake)
        assert "Went wrong in pass 3 of 4: main wrote 5 in the answer 5" in mistake.inner_text()
        button = mistake.locator("button")
        assert is_on_screen(button)
        button.click()
        token = page.locator("#panes .t.current")
        assert token.inner_text() == "5" and is_on_screen(token)
        details = page.locator("#details")
        assert is_on_screen(details.locator("text=written by"))
        assert "written by main" in details.inner_text() and "3 of 4" in details.inner_text()


def test_the_text_shows_what_each_segment_changed_in_the_memory_file(tmp_path):
    """Three segments: the first writes a line, the second replaces one and adds one, the third
    deletes one."""
    folder = write_run(tmp_path / "run")
    memories = ["sum: 3", "sum: 7\nnext: 5", "next: 5"]
    row = rollout(
        9, "1+2+4+5=", [["a", "b"], ["c"], ["d"]], "12", stage="rl", right=True, steps=[],
        mistake=None, correct="12",
    )  # fmt: skip
    row["segments"] = [
        {"start": start, "context": f"context {start}", "ended_by": ended, "memory": memory}
        for start, ended, memory in zip((0, 2, 3), ("limit", "limit", "end"), memories, strict=True)
    ]
    row["phases"] = [[0, "thought", "fast"], [2, "thought", "fast"], [3, "answer", "slow"]]
    with (folder / "thoughts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    write_page([folder], folder / "report.html")
    with open_page(folder / "report.html") as page:
        page.select_option("#show", "all")
        page.fill("#query", "1+2+4+5=")
        boxes = page.locator("#panes .memory").filter(has_text="memory after segment")
        heads = [box.inner_text().splitlines()[0] for box in boxes.all()]
        assert heads == [
            "memory after segment 1 (ended by limit)",
            "memory after segment 2 (ended by limit)",
            "memory after segment 3 (ended by end)",
        ]
        edits = [
            [(line.get_attribute("class"), line.inner_text()) for line in box.locator("div").all()]
            for box in boxes.all()
        ]
        assert edits == [
            [("added", "sum: 3")],
            [("removed", "sum: 3"), ("added", "sum: 7"), ("added", "next: 5")],
            [("removed", "sum: 7"), ("", "next: 5")],
        ]
        sign = "(line) => getComputedStyle(line, '::before').content"
        assert [
            boxes.nth(1).locator(f".{kind}").first.evaluate(sign) for kind in ("added", "removed")
        ] == ['"+ "', '"− "']
        assert page.locator("#panes b", has_text="segment").all_inner_texts() == [
            "segment 1", "segment 2", "segment 3",
        ]  # fmt: skip
        page.locator("summary", has_text="context that it continues").nth(1).click()
        assert page.locator("text=context 2").is_visible()


def test_a_token_says_who_wrote_it_and_what_others_prefer(one):
    with open_page(one) as page:
        page.select_option("#checkpoint", index=1)
        page.click("text=Show the token")
        said = page.inner_text("#details")
        for part in ("head, slot 1", "2 of 4", "thought, fast", "77.9 % (-0.25 nats)", "0.25 nats",
                     "main would write 5", "-1.50 nats", "the reference would write 8",
                     "false, correct: 1+1=2", "13.5 %"):  # fmt: skip
            assert part in said, part
        page.keyboard.press("ArrowUp")
        assert "pass 1 of 4" in page.inner_text("#details")
        page.keyboard.press("End")
        assert "<eos>" in page.inner_text("#details")
        page.keyboard.press("m")
        assert page.locator("#panes .t.current").inner_text() == "3"
        page.hover("#panes .t >> nth=0")
        assert "written by main" in page.inner_text("#details")


def test_filters_and_two_checkpoints_side_by_side(one):
    with open_page(one) as page:
        page.select_option("#show", "all")
        assert page.locator("#list .row").count() == 4
        page.fill("#query", "1+1")
        assert page.locator("#list .row b").all_inner_texts() == ["1+1="]
        page.select_option("#beside", index=1)
        assert page.locator("#panes .verdict").all_inner_texts() == ["right", "wrong"]
        page.select_option("#show", "wrong")
        assert "No rollout fits" in page.inner_text("#panes")
        page.fill("#query", "")
        page.select_option("#checkpoint", "")
        page.focus("#list")
        first = page.inner_text("#panes .rollout >> nth=0")
        page.keyboard.press("ArrowDown")
        assert page.inner_text("#panes .rollout >> nth=0") != first
        page.select_option("#colour", "entropy")
        assert page.locator(".tokens.by-value").count() == 2
        assert (
            page.locator("#panes .t").first.evaluate("(t) => t.style.getPropertyValue('--v')") != ""
        )


def test_html_in_a_models_text_is_shown_and_never_run(one):
    with open_page(one) as page:
        page.select_option("#show", "all")
        page.fill("#query", "script")
        shown = page.inner_text(".tokens")
        assert "<script>window.planted = 1</script><img src=x" in shown
        assert page.inner_text("#list b") == "</script>3"
        assert page.evaluate("window.planted") is None
        assert page.locator("main img, main script").count() == 0


def test_plots_have_axes_with_units_and_their_numbers_as_tables(one):
    with open_page(one) as page:
        for box in page.locator(".plot").all():
            box.scroll_into_view_if_needed()
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 2")
        titles = page.locator("figcaption").all_inner_texts()
        for title in ("Accuracy against passes", "KL to the reference", "Entropy by slot",
                      "Use of the channel by slot", "Where a step's time goes"):  # fmt: skip
            assert title in titles
        frontier = page.locator("#figure-frontier")
        assert "passes per problem (log scale)" in frontier.inner_text()
        frontier.locator("summary").click()
        frontier.locator("td").first.wait_for()  # the event `toggle` comes after the click
        assert frontier.locator("td").all_inner_texts()[:3] == ["joint", "8", "100"]


def test_runs_side_by_side_sort_by_a_column(sweep):
    with open_page(sweep) as page:
        table = page.locator("#tables table").first
        table.locator("th button", has_text="seed").click()
        seeds = [row.split("\t")[1] for row in table.locator("tbody tr").all_inner_texts()]
        assert seeds == ["10", "2", "1"], "as numbers"
        assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
        table.locator("th button", has_text="seed").press("Enter")
        seeds = [row.split("\t")[1] for row in table.locator("tbody tr").all_inner_texts()]
        assert seeds == ["1", "2", "10"]
        assert "75.0 %" in page.locator("#tables table").nth(1).inner_text()
        assert page.locator("#compared tbody tr").count() == 9


@pytest.mark.parametrize(
    "options",
    [
        {"width": 1280},
        {"width": 1280, "color_scheme": "dark"},
        {"width": 390, "height": 844, "has_touch": True},
    ],
    ids=["light", "dark", "narrow"],
)
def test_screens(one, options, tmp_path):
    """Nothing is wider than the screen, text is readable on its ground, a picture can be taken."""
    with open_page(one, **options) as page:
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= options["width"]
        assert page.screenshot(path=tmp_path / "page.png")
        back, ink = (
            page.evaluate(f"getComputedStyle(document.body).{name}")
            for name in ("backgroundColor", "color")
        )
        assert contrast(back, ink) > 7
        for kind in ("main", "head"):
            token = page.locator(f".tokens .t.{kind}").first
            colours = [
                token.evaluate(f"(t) => getComputedStyle(t).{name}")
                for name in ("backgroundColor", "color")
            ]
            assert contrast(*colours) > 4.5, kind
        page.select_option("#theme", "light")
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )


def test_printing_shows_the_text_and_no_controls(one):
    with open_page(one) as page:
        page.emulate_media(media="print")
        assert not page.is_visible(".filters") and not page.is_visible("#list")
        assert page.is_visible(".tokens") and page.is_visible("#tables table")


def test_a_dark_page_is_printed_in_light_with_all_its_plots(one):
    with open_page(one) as page:
        page.select_option("#theme", "dark")
        theme = "document.documentElement.dataset.theme"
        pale = page.evaluate("getComputedStyle(document.body).color")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate(theme) == "light"
        assert page.evaluate("getComputedStyle(document.body).color") != pale
        number = page.locator(".plot").count()
        assert page.locator(".plot .main-svg .xtick").first.evaluate("(t) => t !== null")
        assert page.locator(".plot:has(.main-svg)").count() == number > 4
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(theme) == "dark"


def test_a_watched_page_reads_itself_again_until_its_run_has_ended(tmp_path):
    folder = write_run(tmp_path / "run", has_ended=False)
    page_file = folder / "report.html"
    write_page([folder], page_file, watch=True)
    with open_page(page_file) as page:
        page.clock.install()
        page.reload()
        assert "unfinished" in page.inner_text("#about") and page.is_visible("#refresh")
        (folder / "summary.json").write_text('{"stages": [], "seed": 1}')
        write_page([folder], page_file, watch=True)
        page.uncheck("#refreshing")
        page.clock.fast_forward(60_000)
        assert "unfinished" in page.inner_text("#about")
        page.check("#refreshing")
        with page.expect_navigation():
            page.clock.fast_forward(60_000)
        assert "ended, seed 1" in page.inner_text("#about") and not page.is_visible("#refresh")


def test_a_page_that_is_read_again_keeps_what_was_chosen(one):
    with open_page(one) as page:
        page.select_option("#show", "all")
        page.fill("#query", "2+2")
        page.select_option("#theme", "dark")
        page.reload()
        assert page.input_value("#query") == "2+2" and page.input_value("#show") == "all"
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.locator("#list .row").count() == 1


def contrast(first: str, second: str) -> float:
    """Ratio of two CSS colours by WCAG, 1 to 21."""

    def luminance(colour: str) -> float:
        shares = [int(v) / 255 for v in colour[4:-1].split(",")]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in shares]
        return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
