"""The page in a real browser: nothing is wrong in it, nobody is shut out, and it fits a telephone."""

import pytest

from wsi_idc.evaluate.metrics import evaluate
from wsi_idc.evaluate.report import write_report


@pytest.mark.parametrize(("models", "width", "scheme"), [(2, 400, "dark"), (3, 1280, "light")])
def test_the_page_is_sound_for_everybody_and_on_every_screen(browser, some, tmp_path, models, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    names = [f"a-model-with-a-name-that-is-long-{number}" for number in range(models)]
    write_report(tmp_path, evaluate([some(name, seed=n, patients=9) for n, name in enumerate(names)], resamples=10))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [fault["id"] for fault in Axe().run(page).response["violations"]] == []
    assert told == []
    page.close()
