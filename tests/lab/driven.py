"""A written folder, served on this machine, in Chromium; every request that it makes is noted.

Pyodide is in the folder that `python tests/lab/fetch.py build/lab` makes, or in $MINILORA_LAB.
"""

import contextlib
import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
ASSETS = Path(os.environ.get("MINILORA_LAB", ROOT / "build/lab"))
CHROMIUM = shutil.which("chromium")
THERE = {"Chromium": bool(CHROMIUM), str(ASSETS): (ASSETS / "axe.min.js").exists()}
LACKS = [name for name, there in THERE.items() if not there]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and prints nothing."""

    def log_message(self, *_):
        pass


class Elsewhere(Quiet):
    """Another server, which answers anything from any page."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()

    do_POST = do_GET


@contextlib.contextmanager
def serving(handler):
    """A server on a free port; yields it, with its address as `url` and a list `asked`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url, server.asked = f"http://127.0.0.1:{server.server_port}/", []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def chromium():
    """A browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser, folder, path="", **context):
    """The site of a folder in a window: the page, with the addresses that it asked for in `page.asked`."""
    with serving(functools.partial(Quiet, directory=folder)) as server:
        window = browser.new_context(**context)
        page = window.new_page()
        page.asked, page.errors, page.home = [], [], server.url
        window.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda m: m.type == "error" and page.errors.append(m.text))
        page.goto(server.url + path)
        try:
            yield page
        finally:
            window.close()


def drop(page, path, place):
    """Drop a file or a folder onto the middle of an element."""
    page.locator(place).scroll_into_view_if_needed()
    box = page.locator(place).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})
    session.detach()


def ready(page):
    """Wait until Python runs; seconds from the start, as the page tells them."""
    page.locator("#status", has_text="Ready").wait_for(timeout=120_000)
    return float(page.inner_text("#status").split()[-2])


def trained(page):
    """Press Train and wait until before and after are compared."""
    page.click("#train")
    page.locator("#learn-says", has_text="Done").wait_for(timeout=300_000)
