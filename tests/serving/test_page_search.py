"""The page's search of a folder, and its table of what belongs together, in a browser."""

from tests.serving.helpers import models, on_port, picture
from tests.serving.pages import IN_A_BROWSER, answers, give, pick

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
    page = opened()
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
