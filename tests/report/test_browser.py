"""The page in a browser: by mouse and by keyboard, wide and narrow, and without a word to anybody."""

from contextlib import contextmanager

import pytest

from wsi_idc.report import write
from wsi_idc.status import store_state


@contextmanager
def opened(browser, page, width=1280, scheme="light"):
    """The page, held to be silent: no error, no message, nothing asked of anybody but its own files."""
    shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    heard, asked = [], []
    shown.on("console", lambda message: heard.append(message.text))
    shown.on("pageerror", lambda error: heard.append(str(error)))
    shown.on("dialog", lambda dialog: heard.append(dialog.message))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(page.as_uri())
    yield shown
    assert heard == []
    assert [url for url in asked if not url.startswith(("data:", page.parent.as_uri()))] == []
    assert shown.title() == "wsi-idc report: mean"
    shown.close()


def wait_until(shown, expression):
    """The page's policy forbids what playwright's own waiting does there."""
    for _ in range(200):
        if shown.evaluate(expression):
            return
        shown.wait_for_timeout(50)
    raise AssertionError(f"it never came true: {expression}")


def order(shown):
    return shown.locator("#slides tbody tr:visible .open").all_inner_texts()


def sort(shown, name):
    button = shown.get_by_role("button", name=name, exact=True)
    button.click()
    return shown.locator("#slides th", has=button).get_attribute("aria-sort")


def test_a_column_sorts_and_slides_without_a_number_come_last(browser, page):
    with opened(browser, page) as shown:
        assert order(shown) == ["a", "b", "broken", "c'", "glass", "new", "old"]
        assert sort(shown, "Tiles") == "descending"
        assert order(shown)[:4] == ["b", "a", "c'", "glass"]
        assert sort(shown, "Tiles") == "ascending"
        assert order(shown)[:4] == ["glass", "c'", "a", "b"]
        assert set(order(shown)[4:]) == {"broken", "new", "old"}
        assert sort(shown, "Slide") == "ascending"
        assert sort(shown, "Slide") == "descending"
        assert order(shown)[0] == "old"
        assert shown.locator("#slides [aria-sort]").count() == 1


def test_filters_and_words_limit_the_table(browser, kinds, page):
    flagged = [state.slide_id for state in store_state(kinds / "tiles.zarr").slides if state.flags]
    with opened(browser, page) as shown:
        for kind, names in {
            "done": ["a", "b", "c'"],
            "failed": ["broken"],
            "stale": ["old"],
            "empty": ["glass"],
            "suspicious": flagged,
            "not scored": ["new"],
        }.items():
            shown.get_by_role("radio", name=kind).check()
            assert order(shown) == names
            assert shown.locator("#shown").inner_text() == f"{len(names)} of 7 shown"
        shown.get_by_role("radio", name="all").check()
        shown.get_by_label("Search").fill("QUOTED label")
        assert order(shown) == ["b"]
        shown.get_by_label("Search").fill("one colour")
        assert order(shown) == ["glass"]


def test_all_of_it_can_be_done_by_keyboard(browser, page):
    with opened(browser, page) as shown:
        shown.get_by_role("radio", name="all").focus()
        shown.keyboard.press("ArrowRight")
        assert order(shown) == ["a", "b", "c'"]
        shown.keyboard.press("Tab")
        shown.keyboard.press("Tab")
        for _ in range(7):
            if shown.evaluate("document.activeElement.className") == "open":
                break
            shown.keyboard.press("Tab")
        shown.keyboard.press("Enter")
        dialog = shown.get_by_role("dialog", name="a")
        assert dialog.is_visible() and shown.evaluate("document.activeElement.textContent") == "a"
        slider = dialog.get_by_label("Opacity of the map")
        slider.focus()
        shown.keyboard.press("Home")
        assert dialog.locator(".map").get_attribute("opacity") == "0"
        shown.keyboard.press("End")
        assert dialog.locator(".map").get_attribute("opacity") == "1"
        assert dialog.locator(".slider output").inner_text() == "100 %"
        dialog.get_by_role("button", name="Close").focus()
        shown.keyboard.press("ArrowRight")
        assert shown.get_by_role("dialog", name="b").locator(".map").get_attribute("opacity") == "1"
        shown.keyboard.press("Escape")
        assert not shown.locator("dialog").is_visible()
        assert shown.evaluate("document.activeElement.textContent") == "b"


def test_a_click_shows_pictures_that_are_there(browser, page):
    with opened(browser, page) as shown:
        row = shown.locator("#slides tbody tr", has=shown.get_by_role("button", name="b", exact=True))
        row.click(position={"x": 600, "y": 10})
        dialog = shown.get_by_role("dialog")
        assert dialog.locator(".tiles img").count() == 8
        wait_until(shown, "[...document.querySelectorAll('dialog img')].every(image => image.naturalWidth)")
        drawn = dialog.locator("svg image").nth(1).bounding_box()
        slide = dialog.locator("svg image").nth(0).bounding_box()
        assert drawn["x"] == pytest.approx(slide["x"], abs=1) and drawn["width"] == pytest.approx(slide["width"], abs=1)
        shown.get_by_role("button", name="Next").click()
        assert shown.get_by_role("dialog", name="broken").is_visible()
        assert "There is no picture of this slide." in shown.get_by_role("dialog").inner_text()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_the_way_of_those_who_see_little(browser, page, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, page, width, scheme) as shown:

        def check():
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            found = Axe().run(shown)
            assert not found.response["violations"], found.generate_report()

        check()
        shown.get_by_role("button", name="b", exact=True).click()
        check()
        assert shown.evaluate("(d => d.scrollWidth <= d.clientWidth)(document.getElementById('detail'))")


def test_no_column_is_cut_off_at_any_width(browser, page):
    with opened(browser, page) as shown:
        for width in (1280, 1120, 1000, 896, 800, 640, 400, 320):
            shown.set_viewport_size({"width": width, "height": 800})
            over = "(t => t.getBoundingClientRect().right - t.parentElement.getBoundingClientRect().right)"
            assert shown.evaluate(f"{over}(document.getElementById('slides'))") <= 1, width
            assert shown.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_beside_the_page_are_found(browser, kinds, tmp_path, monkeypatch):
    monkeypatch.setattr("wsi_idc.report.pictures.PAGE_BYTES", 1000)
    out = write(kinds / "tiles.zarr", "mean", tmp_path / "a page #1.html").page
    with opened(browser, out) as shown:
        wait_until(shown, "[...document.images].every(image => image.complete && image.naturalWidth)")
        shown.get_by_role("button", name="b", exact=True).click()
        wait_until(shown, "[...document.querySelectorAll('dialog img')].every(image => image.naturalWidth)")


def test_in_print_the_tools_are_gone_and_what_it_may_be_used_for_stays(browser, page):
    with opened(browser, page) as shown:
        shown.emulate_media(media="print")
        assert not shown.get_by_label("Search").is_visible()
        assert shown.get_by_role("note").first.is_visible()
        shown.emulate_media(media="screen")
        shown.get_by_role("button", name="b", exact=True).click()
        shown.emulate_media(media="print")
        assert not shown.locator("main").is_visible()
        assert "Research use only" in shown.get_by_role("dialog").inner_text()
