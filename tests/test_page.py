"""The web page in headless Chromium: typing, streaming, hovering, stopping, live curves; wide and narrow.

Screenshots go to NANOGPT_SCREENSHOTS or a temporary folder. Skipped if Chromium is not installed.
"""

import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest

from nanogpt import metrics
from tests.serving import Server, eventually, serving, train_small

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not CHROMIUM or not DRIVER, reason="needs a browser: apt-get install chromium chromium-driver"
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--force-device-scale-factor=1"]
CHINESE = "春眠不觉晓,处处闻啼鸟。夜来风雨声,花落知多少?\n白日依山尽,黄河入海流。欲穷千里目,更上一层楼。\n"
WIDE, NARROW = (1360, 900), (390, 844)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    text = "".join(f"<b>{line}</b> & \"x\"='y'/(z);\n{CHINESE}" for line in ["abc def", "gh i"] * 100)
    return train_small(tmp_path_factory.mktemp("page"), text, sample_prompt="春", sample_tokens=24)


@pytest.fixture(scope="module")
def server(out):
    with serving(out) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("NANOGPT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def show(browser, server: Server, size=WIDE, scheme: str = "light") -> None:
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size is NARROW},
    )
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(server.url)
    browser.execute_script("localStorage.clear()")
    browser.get(server.url)
    eventually(lambda: "parameters" in text(browser, "#about"), 10)


def text(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def count(browser, selector: str) -> int:
    return browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def slide(browser, name: str, value: float) -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    browser.execute_script(f"{script} e.dispatchEvent(new Event('input'))", name, value)


def type_prompt(browser, prompt: str) -> None:
    from selenium.webdriver.common.by import By

    box = browser.find_element(By.ID, "prompt")
    box.clear()
    box.send_keys(prompt)


def finished(browser) -> bool:
    return not count(browser, ".sample.writing") and count(browser, ".t") > 0


def test_typed_prompt_streams_shaded_tokens(browser, server, screenshots):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, server)
    slide(browser, "samples", 3)
    slide(browser, "length", 7)
    type_prompt(browser, "春眠")
    browser.find_element(By.ID, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    eventually(lambda: finished(browser), 20)
    assert count(browser, ".sample") == 3 and count(browser, ".t") == 3 * 128
    assert text(browser, ".sample .text").startswith("春眠不觉晓")  # the model has memorized the poem
    assert "128 tokens · perplexity" in text(browser, ".sample header")
    shades = browser.execute_script(
        "return [...document.querySelectorAll('.t')].map(t => Number(t.style.getPropertyValue('--s')))"
    )
    assert all(0 <= shade <= 1 for shade in shades) and len(set(shades)) > 3
    assert browser.save_screenshot(str(screenshots / "play-wide.png"))


def test_empty_prompt_begins_with_a_newline_as_in_sampling(browser, server):
    show(browser, server)
    slide(browser, "length", 4)
    type_prompt(browser, "")
    browser.execute_script("document.getElementById('go').click()")
    eventually(lambda: finished(browser), 20)
    assert text(browser, ".sample .text").startswith("\n") and count(browser, "#error:not([hidden])") == 0


def test_streamed_page_content_equals_the_api_response(browser, server):
    """Compare the page's text, probabilities and alternatives with the response to the same request."""
    show(browser, server)
    for name, value in {"samples": 1, "length": 5, "temperature": 1}.items():
        slide(browser, name, value)
    browser.execute_script("document.getElementById('seed').value = '7'")
    type_prompt(browser, "<b>")
    browser.execute_script("document.getElementById('go').click()")
    eventually(lambda: finished(browser), 20)
    choice = server.complete(prompt="<b>", max_tokens=32, seed=7, logprobs=10)["choices"][0]
    assert text(browser, ".sample .text") == "<b>" + choice["text"]
    browser.execute_script("document.querySelectorAll('.t')[4].click()")
    cells = "return [...document.querySelectorAll('#alternatives td:last-child')].map(c => c.textContent)"
    shares = browser.execute_script(cells)
    best = max(choice["logprobs"]["top_logprobs"][4].values())
    assert len(shares) in (10, 11)
    assert float(shares[0].removesuffix("%")) == pytest.approx(100 * math.exp(best), abs=0.6)
    assert count(browser, "#alternatives tr.chosen") == 1


def test_hover_and_keys_show_ten_alternatives(browser, server, screenshots):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, server, scheme="dark")
    slide(browser, "temperature", 1.6)
    type_prompt(browser, "白日")
    browser.find_element(By.ID, "go").click()
    eventually(lambda: finished(browser), 20)

    def shown_on_hover() -> bool:
        token = browser.find_elements(By.CSS_SELECTOR, ".t")[12]
        away = browser.find_element(By.ID, "go")  # a pointer that does not move hovers over nothing
        ActionChains(browser).move_to_element(away).move_to_element(token).perform()
        return browser.find_element(By.ID, "alternatives").is_displayed()

    eventually(shown_on_hover, 10)
    assert count(browser, "#alternatives tr") in (10, 11)
    assert browser.save_screenshot(str(screenshots / "alternatives-dark.png"))
    before = text(browser, "#alternatives")
    browser.find_element(By.ID, "go").send_keys(Keys.ARROW_RIGHT)
    assert text(browser, "#alternatives") != before
    browser.find_element(By.ID, "go").send_keys(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "alternatives").is_displayed()


def test_stop_by_button_and_key(browser, server):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, server)
    slide(browser, "length", 12)
    type_prompt(browser, "白")
    for stop in ("button", "key"):
        browser.find_element(By.ID, "go").click()
        eventually(lambda: 0 < count(browser, ".t") < 3000 and server.meter("active") == 1, 20)
        if stop == "button":
            browser.find_element(By.ID, "stop").click()
        else:
            browser.find_element(By.ID, "prompt").send_keys(Keys.ESCAPE)
        eventually(lambda: server.meter("active") == 0, 2)
        eventually(lambda: "stopped" in text(browser, "#status"), 5)
        assert count(browser, ".t") < 4096


def test_curves_are_live_and_samples_are_shown(browser, server, out, screenshots):
    show(browser, server)
    browser.execute_script("document.getElementById('tab-run').click()")
    eventually(lambda: count(browser, "svg path.val") == 1, 10)
    eventually(lambda: count(browser, "#run-samples pre") > 3, 10)
    assert "春" in text(browser, "#run-samples pre")
    points = "return document.querySelector('path.val').getAttribute('d').split('L').length"
    before = browser.execute_script(points)
    rows = metrics.read(out)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:  # as train.py does
        last = rows[-1]["iter"]
        for i in range(1, 20):
            row = {
                "event": "step",
                "iter": last + i,
                "loss": 0.5 - i / 100,
                "tokens": 10**5,
                "elapsed_s": 9.0,
            }
            log.write(json.dumps(row) + "\n")
        log.write(json.dumps({"event": "eval", "iter": last + 20, "tokens": 10**5, "val_loss": 0.4}) + "\n")
    eventually(lambda: browser.execute_script(points) == before + 1, 5)
    assert not browser.execute_script("return document.getElementById('live').hidden")
    assert f"{last + 19:,}" in text(browser, "#numbers")
    # A resumed run truncates its log: a new file with fewer rows.
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "metrics.jsonl.new").write_text(content, encoding="utf-8")
    os.replace(out / "metrics.jsonl.new", out / "metrics.jsonl")
    eventually(lambda: browser.execute_script(points) == before, 5)
    assert browser.save_screenshot(str(screenshots / "run-wide.png"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_layout_does_not_overflow(browser, server, screenshots, scheme):
    from selenium.webdriver.common.by import By

    show(browser, server, NARROW, scheme)
    slide(browser, "samples", 2)
    slide(browser, "length", 6)
    type_prompt(browser, "黄河")
    browser.find_element(By.ID, "go").click()
    eventually(lambda: finished(browser), 20)
    fits = "return document.documentElement.scrollWidth <= innerWidth"
    assert browser.execute_script(fits)
    assert browser.save_screenshot(str(screenshots / f"play-narrow-{scheme}.png"))
    browser.execute_script("document.querySelectorAll('.t')[60].scrollIntoView({block: 'center'})")
    time.sleep(0.2)
    browser.execute_script("document.querySelectorAll('.t')[60].click()")  # a tap
    box = browser.find_element(By.ID, "alternatives")
    eventually(box.is_displayed, 5)
    assert box.rect["x"] >= 0 and box.rect["x"] + box.rect["width"] <= NARROW[0]
    assert browser.save_screenshot(str(screenshots / f"alternatives-narrow-{scheme}.png"))
    browser.execute_script("document.getElementById('tab-run').click(); scrollTo(0, 0)")
    eventually(lambda: count(browser, "svg path.train") == 1, 10)
    assert browser.execute_script(fits)
    assert browser.save_screenshot(str(screenshots / f"run-narrow-{scheme}.png"))


def test_errors_are_shown_on_the_page(browser, server):
    from selenium.webdriver.common.by import By

    show(browser, server)
    type_prompt(browser, "é")
    browser.find_element(By.ID, "go").click()
    eventually(lambda: "'é'" in text(browser, "#error"), 5)


PAYLOADS = [
    opening + body + closing
    for opening, closing in (("", ""), ("</span>", ""), ("-->", ""), ('">', ""), ("</pre>", "<!--"))
    for body in (
        "<script>window.hit=1</script>",
        "<img src=x onerror=window.hit=1>",
        "<svg onload=window.hit=1>",
        "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
        "<a href=javascript:window.hit=1 autofocus onfocus=window.hit=1>x</a>",
        "<style>*{display:none}</style>",
        "<form action=/health><input autofocus onfocus=window.hit=1></form>",
        "javascript:window.hit=1",
        "{{constructor.constructor('window.hit=1')()}}",
        "&lt;script&gt;window.hit=1&lt;/script&gt;\u2028<details open ontoggle=window.hit=1>",
    )
]


def test_50_xss_payloads_are_inert(browser, out, tmp_path):
    """Payloads as generated text, alternatives, samples of the run, error messages and prompt."""
    assert len(PAYLOADS) == 50
    from tests.page_echo import echoing  # a server whose model echoes the prompt

    with echoing(PAYLOADS, out, tmp_path) as url:
        browser.get(url)
        eventually(lambda: "parameters" in text(browser, "#about"), 10)
        before = count(browser, "script, img, svg, iframe, style, form, details, a")
        slide(browser, "samples", 1)
        for payload in PAYLOADS:
            browser.execute_script("document.getElementById('prompt').value = arguments[0]", payload)
            browser.execute_script("document.getElementById('go').click()")
            eventually(lambda p=payload: text(browser, ".sample .text") == p + p and finished(browser), 10)
            browser.execute_script("document.querySelector('.t').click()")
            eventually(lambda: count(browser, "#alternatives tr") > 0, 5)
        browser.execute_script("document.getElementById('tab-run').click()")
        eventually(lambda: count(browser, "#run-samples pre") == len(PAYLOADS), 15)
        time.sleep(0.3)
        assert not browser.execute_script("return window.hit === 1")
        charts = 1 if count(browser, "#chart svg") else 0
        assert count(browser, "script, img, svg, iframe, style, form, details, a") == before + charts
        assert browser.execute_script("return getComputedStyle(document.body).display") == "block"


def test_no_external_requests_and_no_console_errors(browser, server):
    browser.get("about:blank")  # aborts requests of an earlier page, and their console errors
    time.sleep(1)
    browser.get_log("performance"), browser.get_log("browser")
    show(browser, server)
    requests = [
        json.loads(entry["message"])["message"]["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    assert requests and all(url.startswith((server.url, "data:")) for url in requests), requests
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_token_in_the_link_is_used_and_hidden(browser, out):
    with serving(out, NANOGPT_TOKEN="open-sesame") as guarded:
        browser.get("about:blank")
        browser.get(guarded.line.split()[2])
        eventually(lambda: "parameters" in text(browser, "#about"), 10)
        assert "open-sesame" not in browser.current_url
        browser.execute_script("sessionStorage.clear()")
        browser.get("about:blank")
        browser.get(guarded.url)
        eventually(lambda: browser.execute_script("return document.getElementById('ask-token').open"), 10)


def test_prompt_longer_than_the_context_slides(browser, server):
    from selenium.webdriver.common.by import By

    show(browser, server)
    slide(browser, "length", 5)
    type_prompt(browser, CHINESE.replace("\n", "") * 3)  # 144 characters, the context is 64
    browser.find_element(By.ID, "go").click()
    eventually(lambda: finished(browser), 20)
    assert count(browser, ".t") == 32


def test_curve_has_titles_and_is_linked_to_the_samples(browser, server, screenshots):
    show(browser, server)
    browser.execute_script("document.getElementById('tab-run').click()")
    eventually(
        lambda: count(browser, "#run-samples article") > 1 and count(browser, "circle.sampled") > 1, 10
    )
    titles = "return [...document.querySelectorAll('#chart .title')].map(e => e.textContent)"
    assert browser.execute_script(titles) == ["iterations", "loss (nats/token)"]
    pick = "const axis = document.getElementById('x-axis'); axis.value = 'tokens';"
    browser.execute_script(f"{pick} axis.dispatchEvent(new Event('change'))")
    assert browser.execute_script(titles)[0] == "tokens trained on"
    browser.execute_script("document.querySelector('#run-samples article:last-child .place').click()")
    assert count(browser, "#run-samples article.marked") == 1
    assert (
        browser.execute_script(
            "return [...document.querySelectorAll('circle')].map(c => c.getAttribute('r'))"
        ).count("6")
        == 1
    )
    browser.execute_script(
        "document.querySelector('circle.sampled:last-of-type').dispatchEvent(new Event('click'))"
    )
    marked = "return document.querySelector('#run-samples article.marked').dataset.iter"
    newest = browser.execute_script("return document.querySelector('#run-samples article').dataset.iter")
    assert browser.execute_script(marked) == newest
    assert browser.save_screenshot(str(screenshots / "run-marked.png"))


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "dark"), (NARROW, "light")])
def test_page_is_chinese_where_the_browser_is(browser, server, screenshots, size, scheme):
    from selenium.webdriver.common.by import By

    source = "Object.defineProperty(navigator, 'language', {get: () => 'zh-CN'})"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        width, height = size
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size is NARROW}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(server.url)
        eventually(lambda: "个参数" in text(browser, "#about"), 10)
        assert [text(browser, f"#{name}").split()[0] for name in ("tab-play", "tab-run", "go")] == [
            "试用",
            "训练过程",
            "生成",
        ]
        type_prompt(browser, "春")
        browser.find_element(By.ID, "go").click()
        eventually(lambda: finished(browser), 20)
        assert "个词元 · 困惑度" in text(browser, ".sample header")
        assert count(browser, "#legend .scale") == 1
        assert "颜色越浅" in text(browser, "#legend")
        assert browser.save_screenshot(str(screenshots / f"chinese-play-{scheme}.png"))
        browser.execute_script("document.getElementById('tab-run').click()")
        eventually(lambda: count(browser, "#chart .title") == 2, 10)
        assert text(browser, "#chart .title") == "迭代次数" and "验证" in text(browser, ".keys")
        left = browser.execute_script("return document.body.innerText")
        for english in ("Temperature", "training", "Samples", "loss", "Copy", "tokens"):
            assert english not in left, english
        assert browser.save_screenshot(str(screenshots / f"chinese-run-{scheme}.png"))
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_run_without_a_checkpoint_shows_its_curve_and_then_the_model(browser, out, tmp_path, screenshots):
    waiting = tmp_path / "waiting"
    checkpoints = sorted(out.glob("step-*"))
    shutil.copytree(out, waiting, ignore=shutil.ignore_patterns("step-*"))
    with serving(waiting) as early:
        browser.get(early.url)
        eventually(lambda: count(browser, "svg path.train") == 1, 10)
        assert text(browser, "#about").startswith("no checkpoint yet")
        assert browser.execute_script("return document.getElementById('tab-play').disabled")
        status, answer = early.ask("/v1/completions", {"prompt": "a"})
        assert status == 503 and b"no checkpoint yet" in answer
        assert early.ask("/health") == (503, b'{"status":"waiting"}')
        assert browser.save_screenshot(str(screenshots / "run-waiting.png"))
        shutil.copytree(checkpoints[-1], waiting / ".tmp-copy")
        os.replace(waiting / ".tmp-copy", waiting / checkpoints[-1].name)
        eventually(lambda: "parameters" in text(browser, "#about"), 30)
        assert not browser.execute_script("return document.getElementById('tab-play').disabled")
        status, answer = early.ask("/v1/completions", {"prompt": "春", "max_tokens": 4})
        assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 4
