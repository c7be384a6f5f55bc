"""The page in a browser: one Chromium and one server of tiny random models for all tests of this file."""

import base64
import io
import threading

import pytest
from PIL import Image as PilImage

from isthmus.serving.limits import Limits
from tests.serving.helpers import encoded, models, on_port, picture
from tests.serving.pages import IN_A_BROWSER, Slow, answers, ask, give, lies_on_the_picture, over, pick

pytestmark = IN_A_BROWSER


def test_ask_stop_and_ask_on(opened, site):
    page = opened()
    pick(page, "llava")
    give(page)
    page.wait_for_selector("#attached img")
    site.slow["llava"].on = True
    page.evaluate(
        "window.grown = new Set(); new MutationObserver(() => document.querySelectorAll('.said').forEach("
        "e => grown.add(e.textContent))).observe(document.getElementById('log'), {subtree: true, childList: true})"
    )
    ask(page, tokens=100)
    page.wait_for_function("() => grown.size > 4")
    page.click("#stop")
    first = answers(page, 1)
    assert "stopped" in first.locator(".facts").inner_text()
    steps = site.slow["llava"].steps
    assert steps < 100
    assert page.is_disabled("#stop")
    site.slow["llava"].on = False
    kept = first.locator(".said").inner_text()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "and <b>blue</b><img src=x onerror=alert(1)>?")
    turns = sent.value.post_data_json["messages"]
    assert [t["role"] for t in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"].strip() == kept.strip()
    assert sum(p["type"] == "image_url" for t in turns for p in t["content"] if isinstance(p, dict)) == 1
    second = answers(page, 2).nth(1)
    assert "tokens/s" in second.locator(".facts").inner_text()
    assert page.locator(".turn h2").nth(1).inner_text() == "and <b>blue</b><img src=x onerror=alert(1)>?"
    assert page.locator(".turn h2 b, .turn h2 img").count() == 0
    page.click(".turn:nth-child(2) >> text=Edit and ask again")
    assert page.locator(".turn").count() == 1
    assert "<b>blue</b>" in page.input_value("#question")
    page.click("#new")
    assert page.locator(".turn").count() == 0


def test_leaving_a_conversation_is_asked_about(opened):
    """It would be lost: the browser asks, and stays where that is declined."""
    page, asked = opened(), []
    page.on("dialog", lambda dialog: asked.append(dialog.type) or dialog.dismiss())
    pick(page, "llava")
    ask(page)
    answers(page, 1)
    page.evaluate("setTimeout(() => location.reload(), 0)")
    page.wait_for_event("dialog")
    assert (asked, page.locator(".turn").count()) == (["beforeunload"], 1)
    page.click("#new")
    page.reload()  # with nothing to lose it is not asked
    page.wait_for_selector("#models input")
    assert (asked, page.locator(".turn").count()) == (["beforeunload"], 0)


def test_models_side_by_side_one_of_which_fails(opened):
    page = opened(allowed=("400",))
    offered = [box.get_attribute("value") for box in page.locator("#models input").all()]
    assert len(offered) == len(set(offered))  # so no model stands beside itself
    pick(page, "llava", "flamingo", "blip2", "broken")
    assert page.locator("#models input:not(:checked):not(:disabled)").count() == 0  # four are the most
    give(page)
    page.wait_for_selector("#attached img")
    ask(page)
    found = answers(page, 4)
    names = [card.get_attribute("data-model") for card in found.all()]
    assert sorted(names) == ["blip2", "broken", "flamingo", "llava"]
    for name, card in zip(names, found.all(), strict=True):
        problem = card.locator(".problem")
        assert problem.is_visible() == (name == "broken")
        if name == "broken":
            assert "reads only text" in problem.inner_text()
        else:
            assert "tokens/s" in card.locator(".facts").inner_text()


@pytest.mark.parametrize("turned", [False, True])
def test_the_map_lies_on_the_picture(opened, turned):
    page = opened()
    pick(page, "llava")
    exif = PilImage.Exif()
    exif[0x0112] = 6
    photo = picture(1, (160, 80)).convert("RGB")
    if turned:
        give(page, photo, name="turned.jpg", kind="image/jpeg", form="JPEG", exif=exif.tobytes())
    else:
        give(page, photo)
    page.wait_for_selector("#attached img")
    ask(page)
    answers(page, 1)
    page.click("text=Where did it look?")
    page.wait_for_selector(".word")
    assert page.locator("text=attention, not proof").is_visible()
    page.locator(".word").nth(0).hover()
    for width in (1100, 380):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(150)
        found = over(page)
        lies_on_the_picture(found)
        wide = found["image"][2] > found["image"][3]
        assert wide is not turned  # a browser turns the photograph, and so does the server
        long, short = ("down", "across") if turned else ("across", "down")
        # The model sees the square in the middle of a picture that is twice as long as it is short.
        assert 0.2 < found[long][0] < found[long][1] < 0.8
        assert found[short][1] - found[short][0] > 0.6
    page.locator("input[type=range]").fill("20")
    assert page.evaluate("document.querySelector('.turn canvas').style.opacity") == "0.2"


def test_cover_a_region_and_ask_again(opened):
    page = opened()
    pick(page, "llava")
    give(page, PilImage.new("RGB", (100, 80), "white"))
    page.wait_for_selector("#attached img")
    ask(page)
    answers(page, 1)
    page.click("text=Cover a region")
    box = page.locator(".turn canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.9)
    page.mouse.up()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click("text=Ask again with it covered")
    found = answers(page, 2)
    assert found.locator("h3").nth(1).inner_text() == "llava, covered"
    assert found.nth(1).locator("img").count() == 1
    url = sent.value.post_data_json["messages"][0]["content"][0]["image_url"]["url"]
    covered = PilImage.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    assert covered.size == (100, 80)
    assert covered.getpixel((70, 56)) == (128, 128, 128)
    assert covered.getpixel((20, 20)) == (255, 255, 255)


def test_an_answer_with_a_region_covered_stands_below_the_one_without(opened):
    page = opened()
    pick(page, "llava", "flamingo", "blip2")
    give(page)
    page.wait_for_selector("#attached img")
    ask(page, tokens=2)
    answers(page, 3)
    page.click("text=Cover a region")
    page.click("text=Ask again with it covered")
    boxes = [card.bounding_box() for card in answers(page, 6).all()]
    assert [box["x"] for box in boxes[3:]] == [box["x"] for box in boxes[:3]]
    assert len({box["x"] for box in boxes}) == 3


def test_a_question_that_goes_on_has_its_map_on_the_earlier_picture(opened):
    page = opened()
    pick(page, "llava")
    give(page)
    page.wait_for_selector("#attached img")
    ask(page)
    answers(page, 1)
    ask(page, "and what else?")
    answers(page, 2)
    page.locator(".turn:nth-child(2) >> text=Where did it look?").click()
    page.locator(".turn:nth-child(2) .word").first.hover()
    lies_on_the_picture(over(page, ".turn:nth-child(1)"))


def test_files_that_are_no_pictures_are_told_in_words(opened):
    page = opened()
    for name, kind, data, words in (
        ("torn.png", "image/png", encoded(picture(1))[:40], "torn.png is damaged or no picture"),
        (
            "huge.png",
            "image/png",
            b"\x89PNG" + bytes(2 * 2**20),
            "huge.png has 2.0 MiB; the server takes at most 1.0",
        ),
        ("notes.txt", "text/plain", b"notes", "notes.txt is no PNG"),
        (
            "strip.png",
            "image/png",
            encoded(PilImage.new("L", (17_000, 4))),
            "strip.png is 17,000 × 4; the server takes at most 50,000,000 pixels, 16,384 a side.",
        ),
    ):
        give(page, name=name, kind=kind, data=data)
        page.wait_for_function("(w) => document.getElementById('notice').textContent.includes(w)", arg=words)
        assert page.locator("#attached img").count() == 0


def test_all_that_is_wrong_with_several_files_is_told(opened):
    page = opened()
    bad = [{"name": f"{n}.txt", "mimeType": "text/plain", "buffer": b"notes"} for n in range(2)]
    good = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": encoded(picture(n))} for n in range(9)]
    page.set_input_files("#file", [*bad, *good])
    page.wait_for_function("() => document.getElementById('notice').textContent.includes('at most 8 pictures')")
    assert page.locator("#notice").inner_text().count("is no PNG") == 2
    assert page.locator("#attached img").count() == 8


def in_view(page, where):
    return page.evaluate(
        "(w) => { const r = document.querySelector(w).getBoundingClientRect();"
        " return r.height > 0 && r.top >= 0 && r.bottom <= innerHeight; }",
        where,
    )


def test_what_is_lacking_is_told_where_one_looks(opened):
    """Below a long conversation too."""
    page = opened(viewport={"width": 390, "height": 700})
    pick(page, "llava")
    for number in range(3):
        give(page, picture(number, (300, 300)))
        page.wait_for_selector("#attached img")
        ask(page, "what is it?", tokens=2)
        answers(page, number + 1)
    page.click("#send")
    assert page.locator("#notice").inner_text() == "Write a question."
    assert in_view(page, "#notice")


def test_a_question_waits_for_the_answer_before_it(opened, site):
    """Half an answer would be part of the conversation."""
    page = opened()
    pick(page, "llava")
    site.slow["llava"].on = True
    ask(page, "what is it?", tokens=100)
    page.wait_for_function("() => document.querySelector('.said')?.textContent.length > 3")
    ask(page, "and now?")
    assert page.locator("#notice").inner_text() == "llava is still answering: wait for it, or stop it."
    assert page.locator(".turn").count() == 1
    page.click("#stop")
    answers(page, 1)
    site.slow["llava"].on = False
    page.click("#send")
    answers(page, 2)
    assert page.locator(".turn h2").nth(1).inner_text() == "and now?"


def test_pictures_dropped_and_pasted_in_two_tabs_and_turns(opened):
    """Each tab has its own conversation; a map lies on the picture that it is of, also one of an earlier turn."""
    page, other = opened(), opened()
    pick(page, "llava")
    url = f"data:image/png;base64,{base64.b64encode(encoded(picture(1, (30, 30)))).decode()}"
    for kind in ("drop", "paste"):
        page.evaluate(
            """async ([url, kind]) => {
              const given = new DataTransfer();
              const dots = Uint8Array.from(atob(url.split(',')[1]), (c) => c.charCodeAt(0));
              given.items.add(new File([dots], kind + '.png', {type: 'image/png'}));
              document.dispatchEvent(kind === 'drop' ? new DragEvent('drop', {dataTransfer: given, cancelable: true})
                : new ClipboardEvent('paste', {clipboardData: given, cancelable: true}));
            }""",
            [url, kind],
        )
        page.wait_for_selector(f"#attached img[alt='{kind}.png']")
        ask(page, f"what was given by {kind}?", tokens=6)
        answers(page, 1 if kind == "drop" else 2)
    page.locator("text=Where did it look?").nth(1).click()
    page.wait_for_selector(".word")
    page.locator(".word").nth(0).hover()
    for number in (1, 2):
        found = over(page, f".turn:nth-child({number})")
        lies_on_the_picture(found)
        assert found["across"][1] - found["across"][0] > 0.9
    assert page.locator(".turn").count() == 2
    assert other.locator(".turn").count() == other.locator("#attached img").count() == 0


def test_words_to_choose_from_and_a_scene_with_its_truth(opened):
    page = opened()
    page.click("#scene")
    page.wait_for_selector("#attached img")
    page.click("#attached summary")
    assert page.locator("#attached li").count() > 0
    page.check("input[value=labels]")
    pick(page, "clip", "llava")
    page.fill("#labels", "red cube, <i>blue</i> ball, green cone, red cube")
    page.click("#send")
    found = answers(page, 2)
    for card in found.all():
        shares = [float(s.inner_text().split()[0]) for s in card.locator(".bars > :nth-child(3n)").all()]
        assert len(shares) == 3  # given twice, shown once
        assert sum(shares) == pytest.approx(100, abs=0.3)
        assert shares == sorted(shares, reverse=True)
        assert "<i>blue</i> ball" in card.inner_text()


def test_by_keyboard_alone_and_copied_requests(opened):
    page = opened()
    page.locator("#models input").first.focus()

    def until(where, most=40):
        for _ in range(most):
            if page.evaluate("(w) => document.activeElement.matches(w)", where):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {where}")

    until("#models input:checked")
    page.keyboard.press("Space")
    page.locator("#models input").first.focus()
    until("#models input[value=llava]")
    page.keyboard.press("Space")
    until("#scene")
    page.keyboard.press("Enter")
    page.wait_for_selector("#attached img")
    until("#question")
    page.keyboard.type("what is it?")
    page.keyboard.press("Enter")
    answers(page, 1)
    page.get_by_role("button", name="Copy as curl").focus()
    page.keyboard.press("Enter")
    assert page.input_value("#copied").startswith("curl http://127.0.0.1:")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Copy as Python").click()
    script = page.input_value("#copied")
    page.keyboard.press("Escape")
    said = io.StringIO()
    body = page.locator(".said").inner_text()
    exec(
        compile(script, "copied", "exec"),
        {"print": lambda value: said.write(value["choices"][0]["message"]["content"])},
    )
    assert said.getvalue().strip().split() == body.split()


def test_narrow_dark_and_labelled(opened):
    page = opened(viewport={"width": 360, "height": 700}, color_scheme="dark")
    pick(page, "llava", "flamingo")
    give(page, picture(1, (800, 300)), name=f"{'a-very-long-name' * 5}.png")
    page.wait_for_selector("#attached img")
    ask(page, "w" * 60)
    answers(page, 2)
    assert not page.locator(".problem").first.is_visible()
    page.click("#runs summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert ground == "rgb(22, 23, 26)"
    assert ink == "rgb(236, 236, 238)"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input:not([hidden]), textarea, img')].filter(e => !(e.ariaLabel ||"
        " e.alt || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert not unnamed
    assert page.locator(".said[aria-live=polite]").count() == 2


def test_a_server_that_stops_in_the_middle_shows_it(browser):
    with on_port({"llava": models()["llava"]}) as served:
        speakers = served.app.state.server.scheduler.speakers
        speakers["llava"] = slow = Slow(speakers["llava"])
        slow.on = True
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url + "/")
        page.wait_for_selector("#models input")
        ask(page, "what?", tokens=150)
        page.wait_for_function("() => document.querySelector('.said')?.textContent.length > 3")
        threading.Thread(target=served.app.state.server.scheduler.stop).start()
        answers(page, 1)
        assert page.locator(".problem").is_visible()
        assert "The server is shutting down" in page.locator(".problem").inner_text()
        context.close()


def test_a_server_with_a_key_wants_it_and_says_when_it_is_another(browser):
    with on_port({"lm": models()["lm"]}, key="secret") as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url + "/")
        page.wait_for_selector("#key:not([hidden])")
        assert page.evaluate("document.activeElement.id") == "secret"
        assert not page.is_visible("#notice")
        page.fill("#secret", "another")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('notice').textContent === 'That is not the key.'")
        page.fill("#secret", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#models input")
        assert not page.is_visible("#key")
        assert not page.is_visible("#notice")
        context.close()


def test_a_conversation_of_too_many_bytes_is_told_what_helps(browser):
    with on_port({"llava": models()["llava"]}, limits=Limits(body=60_000)) as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url + "/")
        page.wait_for_selector("#models input")
        give(page, picture(1, (200, 150)))
        page.wait_for_selector("#attached img")
        ask(page, "what?")
        answers(page, 1)
        said = page.locator(".problem").inner_text()
        assert "larger than 60,000 bytes" in said
        assert "begin a new one" in said
        context.close()


def test_a_connection_that_is_lost_in_the_middle_shows_it(browser):
    """The server is gone at once, as when it is killed: what was said stays, and what happened is told in words."""
    with on_port({"llava": models()["llava"]}) as served:
        speakers = served.app.state.server.scheduler.speakers
        speakers["llava"] = slow = Slow(speakers["llava"])
        slow.on = True
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url + "/")
        page.wait_for_selector("#models input")
        ask(page, "what?", tokens=150)
        page.wait_for_function("() => document.querySelector('.said')?.textContent.length > 3")
        for connection in list(served.server.server_state.connections):
            served.server.servers[0].get_loop().call_soon_threadsafe(connection.transport.abort)
        answers(page, 1)
        assert "The connection ended before the answer did" in page.locator(".problem").inner_text()
        assert len(page.locator(".said").inner_text()) > 3
        assert page.is_disabled("#stop")
        context.close()
