"""One server for all tests of this folder that do not need one of their own, and one browser for those of the page."""

import pytest

from isthmus.serving.limits import Limits
from tests.serving.helpers import encoded, models, on_port, picture
from tests.serving.pages import CHROMIUM, Slow


@pytest.fixture(scope="session")
def album(tmp_path_factory):
    """A folder of pictures to be searched, one of them damaged, one in a folder of its own, and one beyond a link."""
    outside, folder = tmp_path_factory.mktemp("outside"), tmp_path_factory.mktemp("album")
    (folder / "more").mkdir()
    for number in range(10):
        place = folder / "more" if number == 9 else folder
        (place / f"picture{number}.png").write_bytes(encoded(picture(number, (200, 150))))
    (folder / "torn.png").write_bytes(encoded(picture(0))[:60])
    (folder / "notes.txt").write_text("no picture")
    (outside / "secret.png").write_bytes(encoded(picture(99)))
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    return folder


@pytest.fixture(scope="session")
def served(album):
    with on_port(pictures=album) as found:
        yield found


@pytest.fixture(scope="module")
def site(album):
    """A server of its own: one of its models breaks at every question, others can be slowed."""
    told = models() | {"broken": models()["lm"]}  # it reads no pictures, and says so
    with on_port(told, limits=Limits(picture=2**20), pictures=album) as served:
        speakers = served.app.state.server.scheduler.speakers
        for name in speakers:
            speakers[name] = Slow(speakers[name])
        served.slow = speakers
        yield served


@pytest.fixture(scope="module")  # Playwright keeps an event loop running, which no other file's tests must meet
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture
def opened(browser, site):
    """A function that opens the page in a context of its own; in the end nothing was asked of another host, and the
    console holds no error."""
    contexts, wrong, faults = [], [], []

    def go(allowed=(), **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on(
            "request", lambda r: wrong.append(r.url) if not r.url.startswith((site.url, "data:", "blob:")) else None
        )
        page.on("pageerror", lambda e: faults.append(str(e)))

        def said(message):
            if message.type == "error" and not any(word in message.text for word in allowed):
                faults.append(message.text)

        page.on("console", said)
        page.goto(site.url + "/")
        page.wait_for_selector("#models input")
        return page

    yield go
    for context in contexts:
        context.close()
    for speaker in site.slow.values():
        speaker.on = False
    assert not wrong
    assert not faults
