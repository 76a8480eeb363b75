"""A browser without a window, driven through chromedriver's W3C WebDriver protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element, as the standard says
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Browser:
    """One session of a browser."""

    def __init__(self, url: str, size: tuple[int, int]) -> None:
        self._url = url
        window = f"--window-size={size[0]},{size[1]}"
        options = {"args": [*_ARGUMENTS, window], "binary": shutil.which("chromium")}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("POST", "", {"capabilities": {"alwaysMatch": asked}})
        self._url += f"/{made['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def _element(self, css: str) -> str:
        found = self._call("POST", "/element", {"using": "css selector", "value": css})
        return f"/element/{found[_ELEMENT]}"

    def type(self, css: str, text: str) -> None:
        self._call("POST", f"{self._element(css)}/value", {"text": text})

    def click(self, css: str) -> None:
        self._call("POST", f"{self._element(css)}/click", {})

    def run(self, script: str) -> Any:
        """What a piece of JavaScript returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def errors(self) -> list[str]:
        """What the console has at the level of an error."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until `ready`, a minute at most."""
        end = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < end, "the page does not get there"
            time.sleep(0.05)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def quit(self) -> None:
        self._call("DELETE", "")


@contextmanager
def browsing(size: tuple[int, int] = (1000, 800)) -> Iterator[Browser]:
    """A browser; the test is skipped where there is none."""
    if shutil.which("chromedriver") is None or shutil.which("chromium") is None:
        pytest.skip("needs a browser: Debian's packages chromium and chromium-driver")
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        assert driver.stdout is not None
        try:
            line = next(line for line in driver.stdout if "started successfully on port" in line)
            port = int(line.rstrip(". \n").rsplit(" ", 1)[1])
            browser = Browser(f"http://127.0.0.1:{port}/session", size)
            try:
                yield browser
            finally:
                browser.quit()
        finally:
            driver.terminate()
