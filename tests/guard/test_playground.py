"""The browser page, in headless Chromium: scores, marks, the key, texts that try to be HTML, nothing from outside."""

import itertools
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from conftest import free_port
from guard_app import Inner, one
from test_dialects import Vllm
from test_long_documents import Fake
from test_middleware import served  # noqa: F401 (a fixture)

from rerank_kit.guard.middleware import Guard

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_the_page_is_closed_unless_it_is_opened(monkeypatch):
    assert one(Guard(Inner()), "/playground", method="GET").status == 404
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert one(Guard(Inner()), "/playground", method="GET").status == 401  # which paths exist is not told
    monkeypatch.setenv("GUARD_ALLOW_PATHS", "/playground")
    inner = Inner()
    answer = one(Guard(inner), "/playground", method="GET")
    assert answer.status == 200 and b"<title>Rerank playground" in answer.body and not inner.calls
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert b"//" not in answer.body.replace(b"// ", b"") and b"localStorage" not in answer.body
    assert one(Guard(Inner()), "/v1/rerank", {"query": "q", "documents": ["a"]}).status == 401


class Page:
    """A page of Chromium, by its DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.numbers = socket, itertools.count(1)

    def __call__(self, code):
        number = next(self.numbers)
        params = {"expression": code, "awaitPromise": True, "returnByValue": True}
        self.socket.send(json.dumps({"id": number, "method": "Runtime.evaluate", "params": params}))
        while True:
            said = json.loads(self.socket.recv(timeout=20))
            if said.get("id") == number:
                assert "exceptionDetails" not in said["result"], said
                return said["result"]["result"].get("value")

    def until(self, code):
        end = time.monotonic() + 20
        while not (found := self(code)):
            assert time.monotonic() < end, f"{code}: {self('document.body.innerText')}"
            time.sleep(0.05)
        return found


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    connect = pytest.importorskip("websockets.sync.client").connect
    port, page = free_port(), None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path}", f"--remote-debugging-port={port}"]
    process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while page is None:
            assert process.poll() is None and time.monotonic() < end
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                    page = next((one for one in json.load(answer) if one["type"] == "page"), None)
            except OSError:
                time.sleep(0.1)
        with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(10)


def test_the_page_in_a_browser(browser, served, monkeypatch):  # noqa: F811
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    guard, port = served(Vllm(), ALLOW_PATHS="/playground", LONG_DOCUMENTS="chunk")
    guard.long.fitter = Fake()
    url = f"http://127.0.0.1:{port}/playground"
    browser(f"location.href = {url!r}")
    browser.until("document.readyState == 'complete' && !!document.getElementById('curl')")

    def fill(**fields):
        for name, value in fields.items():
            browser(f"document.getElementById('{name}').value = {json.dumps(value)}")
        browser("document.getElementById('form').dispatchEvent(new Event('input'))")

    html = "<img src=x onerror=document.title='hacked'>b"
    fill(query="it's <b>q</b>", documents=f"c\n\nxxxaxxxb\n\n{html}", instruction="Judge.")
    browser("document.querySelector('button').click()")
    assert "401: wrong or missing API key" in browser.until("document.getElementById('said').textContent")
    fill(key="sesame")
    browser("document.querySelector('button').click()")
    assert browser.until("document.querySelectorAll('li').length") == 3
    rows = browser("[...document.querySelectorAll('li')].map(li => [...li.children].map(x => x.textContent))")
    assert [row[-1] for row in rows] == ["xxxaxxxb", html, "c"]
    assert [row[0] for row in rows] == ["0.7500", "0.7500", "0.5000"] and rows[0][1] == "2 windows"
    assert browser("[...document.querySelectorAll('.bar')].map(x => x.style.width)") == ["75%", "75%", "50%"]
    assert browser("document.title") == "Rerank playground" and browser("document.images.length") == 0
    call = browser("document.getElementById('curl').textContent")
    assert call.startswith(f"curl http://127.0.0.1:{port}/v1/rerank -H ") and "sesame" not in call
    sent = guard.app.calls[-1][2]
    assert sent["query"] == "it's <b>q</b>" and sent["instruction"] == "Judge."
    shown = call.split(" -d ")[1].strip("'").replace("'\\''", "'")
    assert json.loads(shown)["query"] == sent["query"]
    assert browser("location.href") == url and browser("localStorage.length + sessionStorage.length") == 0
    origins = browser("performance.getEntriesByType('resource').map(x => new URL(x.name).origin)")
    assert set(origins) == {f"http://127.0.0.1:{port}"}
    browser(f"location.href = {url + '/'!r}")
    browser.until(
        "location.pathname.endsWith('/') && document.readyState == 'complete' && !!document.getElementById('curl')"
    )
    fill(key="sesame", query="q", documents="a\n\nb")
    assert browser("document.getElementById('curl').textContent").startswith(
        f"curl http://127.0.0.1:{port}/v1/rerank -H "
    )
    browser("document.querySelector('button').click()")
    assert browser.until("document.querySelectorAll('li').length") == 2, "the page finds the service from there too"
