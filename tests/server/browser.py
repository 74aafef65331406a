"""A real browser before a real server with real devices, for what drives the console."""

from __future__ import annotations

import base64
import contextlib
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from entidb import Database, RetryConfig, SyncConfig, SyncEngine
from entidb.server import ServerConfig, SyncServer, mint_token, serving
from entidb.sync import HttpTransport
from tests.server.support import SECRET
from tests.tools import program

#: Seconds for the page to show something: a bound for a busy machine, and no measure.
WAIT_S: Final = 60.0
_OPTIONS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
#: What must stay text wherever it is shown.
MARKUP: Final = "<img src=x onerror=document.title='broken'>"


class Device:
    """A device of ``name``, whose subject it is."""

    def __init__(self, url: str, name: str, db_id: str = "shop") -> None:
        config = SyncConfig(db_id=db_id, retry=RetryConfig.none(), client="till/2.1")
        token = mint_token(SECRET, subject=name, databases={db_id: "rw"}, expires_s=3600)
        self.db = Database.in_memory()
        self.engine = SyncEngine(config, HttpTransport(url, token=token, config=config), self.db)
        self.notes = self.db.collection("notes")

    def close(self) -> None:
        self.engine.close()
        self.db.close()


class Scene:
    """A server with two devices, ``ada`` and ``ben``, who have met."""

    def __init__(self, url: str, server: SyncServer) -> None:
        self.url, self.server = url, server
        self.ada, self.ben = Device(url, "ada"), Device(url, "ben")
        self.token = mint_token(
            SECRET, subject="root", databases={}, expires_s=3600, claims={"admin": True}
        )
        self.known = uuid.UUID(int=1)
        with self.ada.db.transaction() as tx:
            notes = tx.collection("notes")
            notes[self.known] = {"title": MARKUP, "n": 0, "kind": "tea"}
            for number in range(1, 120):
                kind = ("tea", "coffee", "cocoa")[number % 3]
                notes[uuid.UUID(int=number + 1)] = {
                    "title": f"note {number}",
                    "n": number,
                    "kind": kind,
                    "address": {"city": "Oslo", "zip": "0150"},
                }
        self.ada.engine.sync()
        self.ben.engine.sync()

    def fall_behind(self, commits: int = 5) -> None:
        """Ada commits, and Ben does not hear of it."""
        for number in range(commits):
            self.ada.notes.add({"title": f"later {number}", "n": 1000 + number, "kind": "tea"})
            self.ada.engine.sync()

    def close(self) -> None:
        self.ada.close()
        self.ben.close()


@contextlib.contextmanager
def scene(root: Path, **settings: Any) -> Iterator[Scene]:
    (root / "secret").write_bytes(SECRET)
    config = ServerConfig(
        data_dir=root / "data",
        backup_dir=root / "backups",
        jwt_secret_file=root / "secret",
        console=True,
        access_log=False,
        **settings,
    )
    with SyncServer(config) as server, serving(server) as url:
        made = Scene(url, server)
        try:
            yield made
        finally:
            made.close()


class Browser:
    """Chromium, driven; see ``browsing``."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.url = ""

    def size(self, width: int, height: int = 800, *, dark: bool = False) -> None:
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def sign_in(self, token: str) -> None:
        self.driver.get(self.url + "/console")
        self.one("#token").send_keys(token)
        self.one("form.signin button").click()
        self.until(lambda: self.heading() == "Overview")

    def go(self, address: str, heading: str) -> None:
        """Show the view at ``address`` and wait until it has been drawn."""
        self.driver.execute_script("location.hash = arguments[0]", address)
        self.until(lambda: self.heading() == heading and not self.all("[aria-busy]"))

    def heading(self) -> str:
        return str(self.driver.execute_script("return document.querySelector('h1').textContent"))

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        self.until(lambda: bool(self.all(selector)))
        return self.all(selector)[0]

    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def press(self, words: str) -> None:
        """Press the button, or follow the link, of which these are the words."""
        script = """
            const found = [...document.querySelectorAll('dialog[open] button, main button, main a')]
              .filter((each) => each.textContent.trim() === arguments[0]);
            const inside = found.filter((each) => each.closest('dialog'));
            const chosen = (inside.length ? inside : found)[0];
            if (chosen) chosen.click();
            return Boolean(chosen);
        """
        self.until(lambda: bool(self.driver.execute_script(script, words)))

    def until(self, holds: Callable[[], bool], what: str = "") -> None:
        from selenium.common.exceptions import TimeoutException, WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [WebDriverException]
        waiting = WebDriverWait(self.driver, WAIT_S, 0.05, ignored_exceptions=ignored)
        try:
            waiting.until(lambda driver: holds())
        except TimeoutException:
            raise AssertionError(
                f"the page does not show {what!r}; it shows:\n{self.text()}"
            ) from None

    def until_shown(self, words: str) -> None:
        self.until(lambda: words in self.text(), words)

    def too_wide_by(self) -> int:
        """Pixels that the page is wider than the window."""
        script = "return document.documentElement.scrollWidth - window.innerWidth"
        return int(self.driver.execute_script(script))

    def picture(self) -> bytes:
        found = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "webp", "quality": 70}
        )
        return base64.b64decode(found["data"])

    def complaints(self) -> list[str]:
        """What the browser has written to its console, also broken policies."""
        return [each["message"] for each in self.driver.get_log("browser")]

    def foreign_requests(self) -> list[str]:
        """Addresses elsewhere that the page has asked for since the last time."""
        found = []
        for each in self.driver.get_log("performance"):
            message = json.loads(each["message"])["message"]
            sent = message["params"]
            # What the browser's own pages ask for is not the console's doing.
            if message["method"] == "Network.requestWillBeSent" and self.is_mine(sent):
                found.append(sent["request"]["url"])
        assert found, "the browser says which requests it makes"
        return [each for each in found if not each.startswith(self.url + "/")]

    def is_mine(self, sent: dict[str, Any]) -> bool:
        return str(sent.get("documentURL", "")).startswith(self.url + "/")


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Leaves the test out where there is no browser."""
    chromium, driver = program("chromium"), program("chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(str(driver)))
    try:
        yield Browser(made)
    finally:
        made.quit()
