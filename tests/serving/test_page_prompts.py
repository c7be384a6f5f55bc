"""Examples before a question, and clips frame by frame, in a browser."""

import base64
import io
from fractions import Fraction

import av
from PIL import Image as PilImage

from isthmus.data.images import MadeImage
from isthmus.data.record import Image, Record, Text
from isthmus.evaluation.few_shot import with_shots
from isthmus.serving.schema import Message
from tests.data.helpers import pixel
from tests.serving.helpers import models, picture
from tests.serving.pages import IN_A_BROWSER, answers, ask, give, lies_on_the_picture, over, pick

pytestmark = IN_A_BROWSER


def test_examples_stand_before_the_question_as_in_evaluation(opened, site):
    page = opened()
    pick(page, "flamingo")
    page.click("#examples summary")
    page.click("#shot")
    assert "An example has one picture" in page.inner_text("#notice")
    for number, answer in ((1, "red <b>cube</b>"), (2, "blue ring")):
        give(page, picture(number, (32, 32)), name=f"{number}.png")
        page.wait_for_selector(f"#attached img[alt='{number}.png']")
        page.fill("#question", "what is it?")
        page.fill("#shown", answer)
        page.click("#shot")
    page.click("#drawn")
    page.wait_for_selector("#shots figure:nth-child(3)")
    page.click("text=Remove >> nth=2")
    assert page.locator("#shots figure").count() == 2
    give(page, picture(3, (32, 32)))
    page.wait_for_selector("#attached img")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "what is it?")
    answers(page, 1)
    reader = site.app.state.server.reader
    told = reader.conversation([Message(**each) for each in sent.value.post_data_json["messages"]])
    shots = [
        Record(id=f"{n}", parts=(part(n), Text("what is it?", "user"), Text(answer, "assistant")))
        for n, answer in ((1, "red <b>cube</b>"), (2, "blue ring"))
    ]
    wanted = with_shots(Record(id="question", parts=(part(3), Text("what is it?", "user"))), shots)
    process = models()["flamingo"].processor
    assert process.prompt(told).streams == process.prompt(wanted).streams
    for mine, theirs in zip(told.images, wanted.images, strict=True):
        assert mine.content_key() != theirs.content_key()  # encoded, and not
        assert PilImage.open(io.BytesIO(mine.source.read())).convert("RGB") == theirs.source.read()
    page.click("text=Where did it look?")
    page.wait_for_selector(".word")
    page.click("text=after 2 examples")
    page.locator(".word").first.hover()
    lies_on_the_picture(over(page, ".turn details figure:nth-child(2)"))
    # The next question stands behind the same examples, and behind nothing else; the one after "new" behind none.
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "and?")
    assert len(sent.value.post_data_json["messages"]) == 5
    answers(page, 2)
    page.click("#new")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "and?")
    assert len(sent.value.post_data_json["messages"]) == 1
    answers(page, 1)


def part(number):
    return Image(MadeImage(picture(number, (32, 32))))


def test_a_generated_clip_is_asked_about_as_one(opened):
    page = opened(allowed=("400",))
    pick(page, "flamingo", "llava")
    page.click("#film")
    page.wait_for_selector("#attached figure:nth-child(4) img")
    assert page.is_checked("#joined")
    with page.expect_request(lambda r: r.url.endswith("completions") and "flamingo" in r.post_data) as sent:
        ask(page, "what happens?")
    (clip, _) = sent.value.post_data_json["messages"][0]["content"]
    assert clip["video_url"]["url"].count(",") == 4
    found = answers(page, 2)
    cards = {card.get_attribute("data-model"): card for card in found.all()}
    assert "reads single pictures" in cards["llava"].locator(".problem").inner_text()
    cards["flamingo"].get_by_text("Where did it look?").click()
    page.wait_for_selector(".word")
    page.locator(".word").first.hover()
    for number in (1, 4):
        lies_on_the_picture(over(page, f".turn figure:nth-child({number})"))
    page.click("text=Edit and ask again")
    assert page.is_checked("#joined")
    page.uncheck("#joined")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "what is there?")
    kinds = [each["type"] for each in sent.value.post_data_json["messages"][0]["content"]]
    assert kinds == ["image_url"] * 4 + ["text"]


def filmed():
    """A second of video: dark to bright."""
    out = io.BytesIO()
    with av.open(out, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=Fraction(10))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(10):
            frame = av.VideoFrame.from_image(PilImage.new("RGB", (64, 64), (25 * number,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def test_a_video_file_becomes_frames_in_order(opened):
    page = opened()
    pick(page, "flamingo")
    give(page, name="torn.webm", kind="video/webm", data=filmed()[:200])
    page.wait_for_function("() => document.getElementById('notice').textContent.includes('torn.webm is damaged')")
    give(page, name="film.webm", kind="video/webm", data=filmed())
    page.wait_for_selector("#attached figure:nth-child(8) img")
    assert page.is_checked("#joined")
    urls = [image.get_attribute("src") for image in page.locator("#attached img").all()]
    shown = [PilImage.open(io.BytesIO(base64.b64decode(u.partition(",")[2]))) for u in urls]
    levels = [pixel(image, (30, 30))[0] for image in shown]
    assert levels == sorted(levels)
    assert levels[-1] - levels[0] > 120


def test_an_address_says_what_is_ready_to_be_asked(opened, site):
    page = opened()
    page.goto("about:blank")
    page.goto(f"{site.url}/#models=flamingo,blip2,nothing&scene=7&question=%3Cb%3Ewhat%3F")
    page.wait_for_selector("#attached img[alt='scene 7']")
    ticked = page.evaluate("[...document.querySelectorAll('#models input:checked')].map((box) => box.value)")
    assert sorted(ticked) == ["blip2", "flamingo"]
    assert page.input_value("#question") == "<b>what?"
    assert page.locator(".turn").count() == 0  # nothing is asked before somebody asks it
