"""A dot in a corner lights that corner: the page over the models that came with the package, which look where it is."""

import pytest
from PIL import Image as PilImage
from PIL import ImageDraw

from isthmus.opening import load
from isthmus.pretrained import names
from tests.serving.helpers import on_port
from tests.serving.pages import IN_A_BROWSER, answers, ask, give, pick

WRITE = ("llava", "flamingo", "blip2")
pytestmark = [*IN_A_BROWSER, pytest.mark.skipif(not set(WRITE) <= set(names()), reason="came without trained models")]


def dotted(x, y):
    image = PilImage.new("RGB", (64, 64), (205, 205, 205))
    ImageDraw.Draw(image).ellipse((x - 7, y - 7, x + 7, y + 7), fill=(200, 30, 30))
    return image


def brightest(page):
    """Centre, in fractions of the picture, of the places where the map over it is strongest."""
    return page.evaluate(
        """() => {
          const canvas = document.querySelector('.turn:last-of-type .stage canvas');
          const dots = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          const alpha = Array.from({length: dots.length / 4}, (_, n) => dots[4 * n + 3]);
          const top = alpha.reduce((a, b) => Math.max(a, b), 0), found = [0, 0, 0];
          alpha.forEach((value, n) => { if (value > 0.95 * top) {
            found[0] += n % canvas.width / canvas.width; found[1] += Math.floor(n / canvas.width) / canvas.height;
            found[2] += 1; } });
          return [found[0] / found[2], found[1] / found[2]];
        }"""
    )


def test_a_dot_in_a_corner_lights_that_corner(browser):
    exif = PilImage.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    with on_port({name: load(f"isthmus:{name}", device="cpu") for name in WRITE}) as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url + "/")
        page.wait_for_selector("#models input")
        pick(page, *WRITE)
        for dot, corner, options in (
            ((53, 11), (1, 0), {"kind": "image/png", "form": "PNG"}),
            ((11, 53), (0, 0), {"kind": "image/jpeg", "form": "JPEG", "quality": 95, "exif": exif.tobytes()}),
        ):
            page.click("#new")
            give(page, dotted(*dot), **options)
            page.wait_for_selector("#attached img")
            ask(page, "what colour is the sphere?")
            for card in answers(page, 3).all():
                assert card.locator(".said").inner_text().strip() == "red"
                card.get_by_text("Where did it look?").click()
                card.locator(".word").first.click()
                x, y = brightest(page)
                assert (x > 0.5, y > 0.5) == (corner[0] > 0, corner[1] > 0), card.get_attribute("data-model")
                assert abs(x - corner[0]) < 0.35
                assert abs(y - corner[1]) < 0.35
        context.close()
