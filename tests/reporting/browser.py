"""Chromium through chromedriver's own HTTP protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = ("--headless=new", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--disable-extensions")
SANDBOX_OFF = "--no-sandbox"  # its sandbox refuses to start as root, which is who runs tests in a container
SECONDS = 60


class Browser:
    """One window, which records what it asks the network for and what its console says."""

    def __init__(self, profile: Path) -> None:
        assert CHROMEDRIVER is not None
        self._driver = subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._driver.stdout is not None
        started = next(line for line in self._driver.stdout if "started successfully on port" in line)
        port = re.findall(r"port (\d+)", started)[0]
        self._address = f"http://127.0.0.1:{port}"
        options = {
            "binary": CHROMIUM,
            "args": [*FLAGS, SANDBOX_OFF, f"--user-data-dir={profile}"],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{session['sessionId']}"
        self._post("/url", {"url": "about:blank"})  # instead of the browser's own start page, which loads a lot

    def close(self) -> None:
        """Ends the browser and its driver."""
        try:
            self._call("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait(SECONDS)

    def open(self, page: Path, width: int, height: int = 1000, colours: str = "light") -> None:
        """Loads a file in a window of a size."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])
        self._post("/url", {"url": page.as_uri()})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """One command of the devtools protocol."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def value_of(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        return self._post("/execute/sync", {"script": f"return {expression}", "args": []})

    def console(self) -> list[str]:
        """Messages since the last call."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, but for those that the page's own policy has stopped."""
        events = [json.loads(entry["message"])["message"] for entry in self._post("/se/log", {"type": "performance"})]
        stopped = {
            event["params"]["requestId"]
            for event in events
            if event["method"] == "Network.loadingFailed" and event["params"].get("blockedReason") == "csp"
        }
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in sent if event["requestId"] not in stopped]

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._call("GET", f"{self._session}/screenshot"))

    def _post(self, path: str, content: Mapping[str, Any]) -> Any:
        return self._call("POST", f"{self._session}{path}", content)

    def _call(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self._address}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.load(response)["value"]
