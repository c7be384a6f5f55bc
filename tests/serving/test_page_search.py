"""The page's search of a folder, its table of what belongs together, and what was trained, in a browser."""

from itertools import pairwise

from tests.serving.helpers import models, on_port, picture
from tests.serving.pages import IN_A_BROWSER, answers, give, pick
from tests.serving.test_run_facts import run

pytestmark = IN_A_BROWSER


def test_find_pictures_by_text_and_by_picture(opened, site):
    page = opened()
    page.check("input[value=search]")
    pick(page, "clip", "matcher")
    page.click("#send")
    assert "Write what to find" in page.inner_text("#notice")
    page.fill("#question", "a <b>red</b> cube")
    page.click("#send")
    found = answers(page, 3)
    names = [card.locator("h3").inner_text() for card in found.all()]
    assert sorted(names) == ["clip", "matcher", "matcher, reranked"]
    body = {"model": "matcher", "input": "a <b>red</b> cube", "rerank": 16}
    told = [hit["name"] for hit in site.post("/isthmus/search", body).json["data"]]
    card = found.nth(names.index("matcher, reranked"))
    assert [image.get_attribute("alt") for image in card.locator("img").all()] == told
    assert "11 pictures, 1 of which cannot be read" in card.inner_text()
    first = found.nth(names.index("clip")).locator("li").first
    name = first.locator("img").get_attribute("alt")
    first.get_by_role("button", name=f"Take {name}").click()
    page.wait_for_selector(f"#attached img[alt='{name}']")
    pick(page, "clip")
    page.click("#send")
    again = answers(page, 4).nth(3)
    assert again.locator("img").first.get_attribute("alt") == name
    assert "1.000" in again.locator("li").first.inner_text()


def test_a_table_of_pictures_and_words(opened):
    page = opened(viewport={"width": 360, "height": 700})
    page.check("input[value=match]")
    assert not page.locator("#question").is_visible()
    pick(page, "matcher", "clip")
    for number in (1, 2):
        give(page, picture(number, (40, 40)), name=f"{number}.png")
        page.wait_for_selector(f"#attached img[alt='{number}.png']")
    page.fill("#labels", "a red cube, a blue ring, two")
    page.click("#send")
    found = answers(page, 2)
    for card in found.all():
        assert card.locator("tbody tr").count() == 2
        assert card.locator("tbody td").count() == 6
        assert card.locator("td.best").count() >= 2
        assert ("%" in card.locator("td.best").first.inner_text()) == (card.get_attribute("data-model") == "matcher")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("text=Edit and ask again")
    assert page.input_value("#labels") == "a red cube, a blue ring, two"
    assert page.locator("#attached img").count() == 2


def test_without_a_folder_there_is_no_search(browser):
    with on_port({"clip": models()["clip"]}) as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url + "/")
        page.wait_for_selector("#models input")
        assert not page.locator("#finding").is_visible()
        assert page.locator("input[value=match]").is_visible()
        context.close()


def test_what_was_trained_is_shown_with_its_losses(browser, tmp_path):
    run(
        tmp_path, [{"step": n, "loss": {"contrastive": 9.0 - n}, "seconds": n} for n in range(1, 6)], "contrast", "more"
    )
    with on_port({"clip": models()["clip"]}, places={"clip": tmp_path}) as served:
        context = browser.new_context(viewport={"width": 360, "height": 700})
        page = context.new_page()
        page.goto(served.url + "/")
        page.wait_for_selector("#models input")
        assert "trained here" in page.inner_text("#models")
        with page.expect_response("**/isthmus/runs"):  # asked anew, and drawn anew
            page.click("#runs summary")
        page.wait_for_timeout(200)
        told = page.get_by_role("img", name="loss contrastive: 8.000 at step 1, 4.000 at step 5")
        told.wait_for()
        box, chart = told.bounding_box(), told.locator("polyline")
        assert box["width"] > 100
        points = [tuple(map(float, each.split(","))) for each in chart.get_attribute("points").split()]
        assert len(points) == 5
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(points))  # down the page
        assert "stage more: not begun" in page.inner_text("#runs")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        context.close()
