"""A browser without a window, in which a test reads a page as its users see it."""

import base64
import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.helpers_tracking import wait_for

SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1600,1200"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no page is read from anywhere else
)
SECONDS = 300
"""A busy machine is slow to show a page, and the browser slow to answer."""


def missing() -> str:
    """What this machine lacks for it; "" where it lacks nothing."""
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            return f"{program} (Debian's chromium-driver, which brings chromium)"
    try:
        __import__("selenium")
    except ImportError:
        return "selenium"
    return ""


class Page:
    """The one tab of a browser."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, address: str) -> None:
        if self._driver.current_url.startswith("http"):  # get() would end for ever what an MLflow page still loads
            self._driver.execute_script("location.assign(arguments[0])", address)
        else:
            self._driver.get(address)

    def click(self, text: str) -> None:
        """On the innermost element that says this and nothing else."""
        self.read(text)
        self._driver.find_element("xpath", f"(//*[normalize-space()='{text}'])[last()]").click()

    def read(self, *words: str) -> None:
        """Until all words are in the page's text."""

        def there() -> bool:
            text = self._driver.execute_script("return document.body ? document.body.innerText : ''")
            return all(word in text for word in words)

        self._wait(there, f"not all of {words}")

    def find(self, selector: str, count: int) -> None:
        """Until a CSS selector finds at least so many elements of the page."""
        script = "return document.querySelectorAll(arguments[0]).length"
        self._wait(lambda: self._driver.execute_script(script, selector) >= count, f"not {count} of {selector}")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        try:
            wait_for(condition, SECONDS, every=0.25)
        except AssertionError:
            text = self._driver.execute_script("return document.body.innerText")
            raise AssertionError(f"{self._driver.current_url}: {what} in:\n{text}") from None


@contextlib.contextmanager
def browser(folder: Path, user: str, password: str) -> Iterator[Page]:
    """Chromium with a profile in `folder`, which gives the name and password to whatever asks."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.page_load_strategy = "none"  # a page is looked at while it loads
    for switch in (*SWITCHES, f"--user-data-dir={folder}"):
        options.add_argument(switch)
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        driver.command_executor.client_config.timeout = SECONDS
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Basic {basic}"}})
        yield Page(driver)
    finally:
        driver.quit()
