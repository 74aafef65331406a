"""The console as a person uses it: Chromium before a real server with real devices.

Without Chromium these tests are left out, and the end of the run says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from entidb.errors import SyncError
from entidb.server.admin.opening import office_of
from entidb.server.auth import Grants
from tests.server.browser import MARKUP, Browser, Scene, browsing, scene
from tests.server.support import handshake

pytestmark = [pytest.mark.process, pytest.mark.slow]

VIEWS = {
    "#/overview": "Overview",
    "#/databases": "Databases",
    "#/database/shop": "shop",
    "#/devices": "Devices",
    "#/entities": "Entities",
    "#/conflicts": "Conflicts and rejections",
    "#/quotas": "Quotas",
    "#/images": "Images",
    "#/backups": "Backups and tasks",
    "#/audit": "Audit log",
    "#/keys": "Keys and access",
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def there(chromium: Browser, tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as made:
        yield made


@pytest.fixture
def page(there: Scene, chromium: Browser) -> Iterator[Browser]:
    chromium.url = there.url
    yield chromium
    assert chromium.complaints() == []
    assert chromium.foreign_requests() == []
    chromium.driver.get("about:blank")


@pytest.mark.parametrize("width", [360, 1280])
def test_an_administrator_finds_who_is_behind_locks_him_out_and_backs_up(
    there: Scene, page: Browser, width: int
):
    page.size(width, dark=width < 600)
    page.sign_in(there.token)

    # Ben falls behind, and catches up, before our eyes.
    page.go("#/devices?search=ben", "Devices")
    page.until_shown("up to date")
    there.fall_behind(3)
    page.until(lambda: [e.text for e in page.all("main td .chip")] == ["behind"], "behind")
    there.ben.engine.sync()
    page.until(lambda: [e.text for e in page.all("main td .chip")] == ["up to date"], "up to date")

    # He is locked out, asked twice, and hears of it.
    page.one("main tbody a").click()
    page.until(lambda: page.heading().startswith("Device "))
    page.press("Revoke subject")
    page.press("Revoke…")
    page.until_shown("Asked once more")
    assert not office_of(there.server).control.decided.revoked
    page.press("Revoke")
    page.until_shown("Let in again")
    with pytest.raises(SyncError) as refused:
        there.ben.engine.sync()
    assert refused.value.code == "revoked"
    page.go("#/keys", "Keys and access")
    page.until_shown("ben")

    # A backup is made, verified, and put back.
    page.go("#/database/shop", "shop")
    page.press("Back up now")
    page.go("#/backups", "Backups and tasks")
    page.until_shown("good")
    page.press("Restore")
    page.press("Restore")
    page.until_shown("Type shop to go on.")
    page.one("dialog input").send_keys("shop")
    page.press("Restore")
    tasks = office_of(there.server).tasks
    page.until(lambda: ("restore", "done") in {(t.kind, t.state) for t in tasks.all()}, "restore")
    page.go("#/audit", "Audit log")
    page.until_shown("restored")
    assert "done" in [each.text for each in page.all("main td .chip")]


@pytest.mark.parametrize("width", [360, 1280])
def test_an_entity_is_found_and_what_is_in_it_stays_text(there: Scene, page: Browser, width: int):
    page.size(width)
    page.sign_in(there.token)
    page.go("#/entities?database=shop&collection=notes", "Entities")
    page.until_shown(MARKUP)
    page.one("form [name=field]").send_keys("n")
    page.one("form [name=text]").send_keys("117")
    page.press("Find")
    page.until(lambda: len(page.all("main tbody tr")) == 1, "one row")
    page.until_shown("note 117")
    page.one("main tbody a").click()
    page.until_shown('"city": "Oslo"')
    page.go(f"#/entity/shop/notes/{there.known.hex}", f"notes {there.known.hex[:8]}")
    page.until_shown(MARKUP[1:-1])
    # Another version of it can be compared with the one that was seen.
    there.ada.notes[there.known] = {"title": "plain", "n": 0, "kind": "tea"}
    there.ada.engine.sync()
    page.until_shown("1 of 3 fields differ.")
    assert "broken" not in page.driver.title


@pytest.mark.parametrize("width", [360, 1280])
def test_every_view_fits_the_screen_and_has_one_heading_and_named_fields(
    there: Scene, page: Browser, width: int
):
    page.size(width)
    page.sign_in(there.token)
    unnamed = """
        return [...document.querySelectorAll('input, select, button, a')].filter((each) =>
          !(each.labels && each.labels.length) && !each.getAttribute('aria-label')
          && !each.textContent.trim()).map((each) => each.outerHTML);
    """
    for address, heading in VIEWS.items():
        page.go(address, heading)
        assert page.too_wide_by() <= 0, address
        assert len(page.all("h1")) == 1
        assert page.driver.execute_script(unnamed) == []
        assert page.driver.title.startswith(heading)


def test_the_page_forgets_its_token_and_says_why_one_is_refused(there: Scene, page: Browser):
    page.size(1280)
    page.driver.get(there.url + "/console")
    page.one("#token").send_keys("rubbish")
    page.one("form.signin button").click()
    page.until(lambda: bool(page.one(".wrong").text), "a refusal")
    assert "rubbish" not in page.text()
    page.complaints()  # the refused request is one to the browser
    page.sign_in(there.token)
    page.driver.refresh()
    page.until(lambda: page.heading() == "Sign in", "Sign in")
    stored = "return [localStorage.length, sessionStorage.length, document.cookie]"
    assert page.driver.execute_script(stored) == [0, 0, ""]


def test_the_keyboard_is_enough(there: Scene, page: Browser):
    from selenium.webdriver import ActionChains, Keys

    def keys(*pressed: str) -> None:
        ActionChains(page.driver).send_keys(*pressed).perform()

    page.size(360)
    page.driver.get(there.url + "/console")
    page.until(lambda: page.driver.switch_to.active_element.get_attribute("id") == "token")
    keys(there.token, Keys.ENTER)
    page.until(lambda: page.heading() == "Overview", "Overview")
    menu = page.one("#menu")
    assert not page.one("#nav").is_displayed()
    menu.send_keys(Keys.ENTER)
    assert page.one("#nav").is_displayed()
    page.one("#nav a[href='#/databases']").send_keys(Keys.ENTER)
    page.until(lambda: page.heading() == "Databases", "Databases")
    assert page.driver.switch_to.active_element.tag_name == "h1"
    keys(Keys.TAB, Keys.TAB, Keys.ENTER)
    page.until(lambda: bool(page.all("dialog[open]")), "a question")
    keys(Keys.ESCAPE)
    page.until(lambda: not page.all("dialog[open]"), "no question any more")
    assert page.driver.switch_to.active_element.text == "New database"


def test_the_first_view_is_small(there: Scene, page: Browser):
    page.size(1280)
    page.sign_in(there.token)
    page.until_shown("Most behind")
    sizes = "return performance.getEntriesByType('resource').map((each) => each.decodedBodySize)"
    assert sum(page.driver.execute_script(sizes)) < 300_000


def test_many_databases_and_devices_make_no_view_large(there: Scene, page: Browser):
    """What a view draws, and fetches, is bounded: so is each task of the page that draws it."""
    registry = office_of(there.server).registry
    for number in range(150):
        there.server.stores.make(f"tenant-{number:03}")
    for number in range(2000):
        db_id = f"tenant-{number % 100:03}"
        known = handshake(db_id)
        device = structs.replace(known, device_id=number.to_bytes(16, "big"))
        registry.heard(device, Grants(f"person-{number}", {}), code=None, client="till/2.1")
    page.size(1280)
    page.sign_in(there.token)
    page.until_shown("2,002")
    count = "return document.querySelectorAll('*').length"
    drawn = {"overview": page.driver.execute_script(count)}
    page.go("#/databases", "Databases")
    page.until_shown("1 to 100 of 151")
    drawn["databases"] = page.driver.execute_script(count)
    page.press("After →")
    page.until_shown("101 to 151 of 151")
    assert "tenant-149" in page.text() and "tenant-000" not in page.text()
    page.go("#/devices", "Devices")
    page.until_shown("1 to 50 of 2,002")
    drawn["devices"] = page.driver.execute_script(count)
    assert drawn["overview"] <= 400 and max(drawn.values()) <= 2_500, drawn
    sizes = "return performance.getEntriesByType('resource').map((each) => each.decodedBodySize)"
    assert sum(page.driver.execute_script(sizes)) < 300_000
