"""A browser before the page: what the tests of it do there."""

import shutil
import time

import pytest

from tests.serving.helpers import encoded, picture

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
IN_A_BROWSER = [
    pytest.mark.skipif(not shutil.which("chromium"), reason="no /usr/bin/chromium: apt-get install -y chromium"),
    # Playwright's own pipes to the browser.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Slow:
    """A speaker that takes a while for every token, while ``on``."""

    def __init__(self, speaker):
        self.speaker, self.on, self.steps = speaker, False, 0

    def __getattr__(self, name):
        return getattr(self.speaker, name)

    def step(self):
        self.steps += 1
        if self.on:
            time.sleep(0.03)
        return self.speaker.step()


def give(page, image=None, *, name="one.png", kind="image/png", data=None, **options):
    """Choose a picture by the file input."""
    raw = encoded(image or picture(1, (60, 40)), **options) if data is None else data
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": raw})


def pick(page, *names):
    """Tick these models and no others; one that cannot do what is wanted cannot be ticked anyway."""
    for box in page.locator("#models input").all():
        name = box.get_attribute("value")
        if name in names or box.is_enabled():
            box.set_checked(name in names)


def ask(page, text="what is red?", *, tokens=12):
    page.fill("#tokens", str(tokens))
    page.fill("#question", text)
    page.click("#send")


def answers(page, count):
    """The cards of answers once all have ended."""
    page.wait_for_function(
        f"() => [...document.querySelectorAll('.said')].filter(e => e.ariaBusy === 'false').length === {count}"
    )
    return page.locator(".answer")


def over(page, where=".turn"):
    """Boxes of a picture and of its canvas, and the share of the canvas that is painted."""
    return page.evaluate(
        """(where) => {
          const stage = document.querySelector(where + ' .stage');
          const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
          const canvas = stage.querySelector('canvas');
          const dots = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          const painted = [];
          for (let n = 0; n < dots.length / 4; n++) if (dots[4 * n + 3]) painted.push(
            [n % canvas.width / canvas.width, Math.floor(n / canvas.width) / canvas.height]);
          const [xs, ys] = [0, 1].map((d) => painted.map((p) => p[d]));
          const ends = (v) => [v.reduce((a, b) => Math.min(a, b), 9), v.reduce((a, b) => Math.max(a, b), -9)];
          return {image: box(stage.querySelector('img')), canvas: box(canvas), dots: [canvas.width, canvas.height],
                  across: ends(xs), down: ends(ys)};
        }""",
        where,
    )


def lies_on_the_picture(found):
    assert found["canvas"] == pytest.approx(found["image"], abs=0.6)
    assert found["dots"] == pytest.approx(found["image"][2:], abs=1)
