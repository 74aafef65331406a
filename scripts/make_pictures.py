"""The console's pictures in the documentation, made by the browser of the tests.

    python scripts/make_pictures.py            docs/images/console-*.webp again
    python scripts/make_pictures.py DIRECTORY  all views in all shapes, to look at

Needs Chromium, as the tests of the console do.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.server.browser import Browser, Scene, browsing, scene  # noqa: E402

IMAGES: Final = ROOT / "docs" / "images"
BYTES_MAX: Final = 60_000
#: Name of the picture: view, width, height, dark.
SHOWN: Final = {
    "overview": ("overview", 1280, 900, False),
    "devices": ("devices", 1280, 520, False),
    "entity": ("entity", 1280, 900, True),
    "narrow": ("device", 360, 780, True),
}


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with scene(root) as made, browsing(root / "profile") as page:
            page.url = made.url
            views = prepare(made, page)
            if arguments:
                everything(page, views, Path(arguments[0]))
            else:
                for_the_pages(page, views)
    return 0


def prepare(made: Scene, page: Browser) -> dict[str, tuple[str, str]]:
    """Let something happen that can be seen. Address and heading of each view by name."""
    page.size(1280)
    page.sign_in(made.token)
    made.ben.notes[made.known] = {"title": "tea at four", "n": 4, "kind": "tea"}
    made.ben.engine.sync()
    page.go(f"#/entity/shop/notes/{made.known.hex}", f"notes {made.known.hex[:8]}")
    made.ada.engine.sync()
    made.ada.notes[made.known] = {"title": "tea at five", "n": 5, "kind": "tea"}
    made.fall_behind(6)
    page.until_shown("Compare two versions")
    page.go("#/database/shop", "shop")
    page.press("Back up now")
    page.go("#/backups", "Backups and tasks")
    page.until_shown("good")
    shop, ben = "#/device/shop/", made.ben.db.device_id.hex()
    return {
        "overview": ("#/overview", "Overview"),
        "databases": ("#/databases", "Databases"),
        "database": ("#/database/shop", "shop"),
        "devices": ("#/devices", "Devices"),
        "device": (shop + ben, f"Device {ben[:8]}"),
        "entities": ("#/entities", "Entities"),
        "entity": (f"#/entity/shop/notes/{made.known.hex}", f"notes {made.known.hex[:8]}"),
        "conflicts": ("#/conflicts?what=pushed", "Conflicts and rejections"),
        "backups": ("#/backups", "Backups and tasks"),
        "audit": ("#/audit", "Audit log"),
        "keys": ("#/keys", "Keys and access"),
    }


def for_the_pages(page: Browser, views: dict[str, tuple[str, str]]) -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, (view, width, height, dark) in SHOWN.items():
        page.size(width, height, dark=dark)
        page.go(*views[view])
        page.until(lambda: not page.all("#said p"), "quiet")
        write(IMAGES / f"console-{name}.webp", page.picture())


def everything(page: Browser, views: dict[str, tuple[str, str]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, view in views.items():
        for width, dark in ((1280, False), (1280, True), (360, False), (360, True)):
            page.size(width, 900, dark=dark)
            page.go(*view)
            shade = "dark" if dark else "light"
            write(folder / f"{name}-{width}-{shade}.webp", page.picture())


def write(path: Path, data: bytes) -> None:
    if len(data) > BYTES_MAX:
        raise SystemExit(f"{path.name} has {len(data)} bytes, at most {BYTES_MAX} are allowed")
    path.write_bytes(data)
    print(f"{path}: {len(data):,} bytes")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
