"""``console``: the first view of the console in a real browser, of a server with many devices.

From the opening of the page, and again from the click that signs in, until the view is there and
loads nothing any more; the bytes of all answers; and the longest task of the page, which is how
long it did not listen. The token is set as one that is pasted: Chromium works for 0.1 to 0.3 s on
one that a driver types key by key, and that is no work of the console's. Needs Chromium and its
driver.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from msgspec.structs import replace

from benchmarks.figures import Figure, Target, figure
from benchmarks.world import World
from entidb.server.admin.opening import office_of
from entidb.server.auth import Grants
from tests.server.browser import Browser, Scene, browsing, scene
from tests.server.support import handshake
from tests.tools import missing

#: N: devices, twenty for each database.
SIZES = (2_000,)
DEVICES_PER_DATABASE = 20
#: Seconds after the view is there in which a long task would still be seen.
AFTER_S = 1.0
SHOWN_TARGET = Target("value", most=1.0)
BYTES_TARGET = Target("value", most=300.0)
TASK_TARGET = Target("value", most=50.0)

#: Runs before the page's own scripts. A browser tells of no task below 50 ms.
_WATCH = """
window.tasks = []; window.shown = null; window.clicked = null;
new PerformanceObserver(list => {
  for (const entry of list.getEntries()) window.tasks.push(entry.duration);
}).observe({type: "longtask", buffered: true});
document.addEventListener("submit", () => { window.clicked = performance.now(); }, true);
document.addEventListener("DOMContentLoaded", () => {
  window.loaded = performance.now();
  new MutationObserver(() => {
    const heading = document.querySelector("h1");
    if (window.shown === null && heading && heading.textContent === "Overview"
        && !document.querySelector("[aria-busy]")) window.shown = performance.now();
  }).observe(document.body, {subtree: true, childList: true, attributes: true});
});
"""
_READ = """
const all = performance.getEntriesByType("resource")
  .concat(performance.getEntriesByType("navigation"));
return {
  loaded: window.loaded, signed_in: window.shown - window.clicked,
  task: Math.max(0, ...window.tasks),
  bytes: all.reduce((sum, entry) => sum + entry.encodedBodySize, 0),
};
"""


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    if (lacks := missing("chromium", "chromedriver")) is not None:
        print(f"console: {lacks}", file=sys.stderr)
        return
    for count in sizes:
        root = world.path("console")
        with browsing(root / "profile") as browser, scene(root) as shown:
            _fill(shown, count)
            browser.url = shown.url
            browser.driver.execute_cdp_cmd(
                "Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH}
            )
            browser.size(1280)
            seen = [_first_view(browser, shown.token) for _ in range(rounds)]
        loaded = [(each["loaded"] + each["signed_in"]) / 1000 for each in seen]
        yield figure("console", "first view", count, "s", loaded, target=SHOWN_TARGET)
        sent = [each["bytes"] / 1000 for each in seen]
        yield figure("console", "first view, answers", count, "kB", sent, target=BYTES_TARGET)
        tasks = [each["task"] for each in seen]
        note = "nothing below 50 ms is told"
        yield figure("console", "longest task", count, "ms", tasks, target=TASK_TARGET, note=note)


def _fill(shown: Scene, count: int) -> None:
    """``count`` devices that were heard of."""
    registry = office_of(shown.server).registry
    databases = max(1, count // DEVICES_PER_DATABASE)
    for number in range(databases):
        shown.server.stores.make(f"tenant-{number:03}")
    for number in range(count):
        heard = handshake(f"tenant-{number % databases:03}")
        heard = replace(heard, device_id=number.to_bytes(16, "big"))
        registry.heard(heard, Grants(f"person-{number}", {}), code=None, client="till/2.1")
    registry.flush()


def _first_view(browser: Browser, token: str) -> dict[str, Any]:
    driver = browser.driver
    driver.get("about:blank")
    driver.get(browser.url + "/console")
    field = browser.one("#token")
    time.sleep(AFTER_S)
    driver.execute_script("arguments[0].value = arguments[1]", field, token)
    browser.one("form.signin button").click()
    browser.until(lambda: driver.execute_script("return window.shown !== null"))
    time.sleep(AFTER_S)
    seen: dict[str, Any] = driver.execute_script(_READ)
    return seen


__all__ = ["run"]
