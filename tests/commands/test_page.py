"""The page of a report in a real browser: its samples, searched, filtered and sorted; nothing asked of a network."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain import report
from posttrain.metrics.report_card import ScoredPair, report_card

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
Select = pytest.importorskip("selenium.webdriver.support.select").Select
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no browser: apt-get install chromium chromium-driver"
)
PROMPTS = 120
ATTACK = "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"
COMMENT = "<!-- <script> {{ 7 * 7 }} & 'quoted' \u2028 \U0001f600"


def manifest(stage: str) -> dict[str, Any]:
    """What the page reads of a finished stage."""
    config: dict[str, object] = {"stage": {"name": stage}, "trainer": {}, "model": {"base_model": "x"}}
    known = {"stage": stage, "metrics": {}, "config": config, "data": {"sources": {}, "counts": {"train": {}}}}
    return known | {"finished": "2026-01-01", "inputs": {}, "versions": {}, "weights": {}, "command": "posttrain run"}


def policy(name: str, better: int) -> dict[str, Any]:
    """Every tenth completion lost what was correct; every third has not ended."""
    numbers = range(PROMPTS)
    answers = [f"{name} says {number}" for number in numbers]
    answers[5] = COMMENT
    return {
        "policy": f"outputs/demo/<b>{name}</b>",
        "metrics": {},
        "prompts": [ATTACK if number == 3 else f"Question {number}?" for number in numbers],
        "answers": answers,
        "scores": {
            "reward": [number * 7 % PROMPTS + better * (1 if number % 4 else -1) for number in numbers],
            "correct": [float(not better or number % 10 > 0) for number in numbers],
        },
        "against_first": {},
        "tokens": [number + 1 for number in numbers],
        "kl": [better * 0.5] * PROMPTS,
        "ended": [number % 3 > 0 for number in numbers],
    }


def written(folder: Path) -> Path:
    """A run as its stages leave it, and the page about it."""
    for stage in ("sft", "reward", "ppo"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "posttrain.json").write_text(json.dumps(manifest(stage)))
    policies = [policy(name, better) for better, name in enumerate(("sft", "ppo", "dpo"))]
    (folder / "evaluation.json").write_text(json.dumps(policies))
    prompt = [{"role": "user", "content": ATTACK}]
    panel = {"reference": "", "before": {"text": "", "ended": True}, "after": {"text": "b " * 500, "ended": False}}
    (folder / "sft/samples.json").write_text(json.dumps([{"prompt": prompt, **panel}]))
    pairs = [ScoredPair(f"pair {number}", "yes", "no", 1.0, number / 2, 2, 3) for number in range(9)]
    (folder / "reward/report_card.json").write_text(json.dumps(report_card(pairs)))
    with (folder / "ppo/rollouts.jsonl").open("w") as lines:
        for number in range(40):
            row = {"step": number // 4, "rollout": number // 4, "prompt": prompt, "answer": f"sampled {number}"}
            trace = [[" <b>a</b>", 0.3, -0.5], ["b", -0.2, number]]
            numbers = {"reward": number / 7, "kl": 0.1, "tokens": 2, "ended": True, "trace": trace}
            lines.write(json.dumps(row | numbers) + "\n")
    return report.write_report(folder)


class Page:
    """The page in a browser, and what a reader does with it."""

    def __init__(self, driver: Any, file: Path) -> None:
        self.driver, self.url = driver, file.as_uri()

    def load(self, fragment: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.url + fragment)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def select(self, label: str, words: str) -> None:
        found = self.driver.find_element("css selector", f'#samples select[aria-label="{label}"]')
        Select(found).select_by_visible_text(words)

    def type(self, label: str, words: str) -> None:
        field = self.driver.find_element("css selector", label)
        field.clear()
        field.send_keys(words)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def until(self, condition: str) -> None:
        """Wait for what the browser does in its own time; it has five seconds."""
        end = time.monotonic() + 5
        while not self.run(f"return {condition}"):
            assert time.monotonic() < end, condition

    @property
    def count(self) -> str:
        return str(self.run("return document.querySelector('#samples p[role=status]').textContent"))

    @property
    def rows(self) -> list[list[str]]:
        """The texts of the rows that are drawn."""
        rows = "[...document.querySelectorAll('#samples tbody tr')]"
        return list(self.run(f"return {rows}.map(row => [...row.cells].map(each => each.textContent))"))

    @property
    def opened(self) -> str | None:
        """The text of the sample that is open in full."""
        found = self.run("return document.querySelector('dialog[open]')?.innerText ?? null")
        return None if found is None else str(found)

    def numbers(self) -> list[int]:
        return [int(row[0]) for row in self.rows]

    def media(self, kind: str = "", scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": features})

    def width(self, pixels: int) -> None:
        metrics = {"width": pixels, "height": 844, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scrolls_sideways(self) -> bool:
        return bool(self.run("return document.documentElement.scrollWidth > document.documentElement.clientWidth"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    file = written(tmp_path_factory.mktemp("run") / "demo")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER, env={**os.environ}))
    yield Page(driver, file)
    driver.quit()


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A page that is loaded anew; afterwards, neither console nor network have anything to tell."""
    browser.width(1280)
    browser.media()
    for kind in ("browser", "performance"):
        browser.driver.get_log(kind)
    browser.load()
    yield browser
    assert browser.driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = {each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"}
    assert asked == {browser.url}
    assert browser.run("return window.attacked") is None


def test_rows_are_drawn_as_they_come_into_view_and_each_table_is_there(page: Page) -> None:
    assert page.count == "120 of 120 samples"
    assert len(page.rows) < 120
    assert page.rows[3][1] == ATTACK
    assert page.rows[5][2].startswith(COMMENT)
    assert "reward 21" in page.rows[3][2]
    while (before := len(page.rows)) < 120:
        page.run("window.scrollTo(0, document.body.scrollHeight)")
        page.until(f"document.querySelectorAll('#samples tbody tr').length > {before}")
    page.select("samples of", "Supervised fine-tuning: before and after")
    assert [row[2] for row in page.rows] == ["(nothing)ended yes"]
    page.select("samples of", "Reward model: held-out pairs")
    assert page.rows[0][1] == "pair 8"
    assert page.rows[0][2] == "margin -3ranked wrong"


def test_search_filter_and_sort(page: Page) -> None:
    page.type("#samples-search", "says 11 DPO")
    assert page.numbers() == [12, *range(111, 121)]
    page.load()
    page.select("show", "by gold functions: regression")
    assert page.numbers() == list(range(1, 121, 10))
    page.select("show", "by reward: loss")
    assert page.numbers() == list(range(1, 121, 4))
    page.driver.find_element("css selector", "#samples .filters summary").click()
    page.type('input[aria-label="outputs/demo/<b>ppo</b>: tokens at least"]', "50")
    page.type('input[aria-label="outputs/demo/<b>ppo</b>: tokens at most"]', "70")
    assert page.numbers() == [53, 57, 61, 65, 69]
    page.select("outputs/demo/<b>dpo</b>: ended", "no")
    assert page.numbers() == [61]
    assert page.count == "1 of 120 samples"
    page.load()
    page.select("sort by", "outputs/demo/<b>sft</b>: reward")
    rewards = [(number - 1) * 7 % PROMPTS for number in page.numbers()]
    assert rewards == list(range(50))
    page.select("order", "descending")
    assert [(number - 1) * 7 % PROMPTS for number in page.numbers()] == list(range(119, 69, -1))


def test_a_link_leads_to_a_sample(page: Page) -> None:
    page.load("#sample/reward%2Freport_card/2")
    assert "sample 2" in str(page.opened)
    assert "pair 7" in str(page.opened)
    page.press(Keys.ESCAPE)
    page.until("location.hash === ''")
    assert page.opened is None
    page.driver.find_element("css selector", "#samples tbody tr:nth-child(3) a").click()
    assert page.run("return location.hash") == "#sample/reward%2Freport_card/3"
    assert page.opened is None
    page.run("location.hash = '#sample/evaluation/103'")
    page.until("document.querySelector('dialog').open")
    assert "Question 102?" in str(page.opened)
    page.press("k", "k", "k", Keys.ESCAPE)
    page.until("document.activeElement.cells?.[0].textContent === '100'")  # rows before it are drawn, too
    assert page.numbers() == list(range(51, 121))
    page.driver.find_element("xpath", "//button[.='Earlier samples']").click()
    assert page.numbers() == list(range(1, 121))
    page.load("#sample/nowhere/7")
    assert page.opened is None
    assert "nowhere" in str(page.run("return document.querySelector('.said').textContent"))


def test_keys(page: Page) -> None:
    page.press("j", "j", "j", "k")
    assert page.run("return document.querySelector('#samples tr[aria-current]').cells[0].textContent") == "2"
    page.press(Keys.ARROW_DOWN, Keys.ENTER)
    assert ATTACK not in str(page.opened)
    page.press("j")
    assert ATTACK in str(page.opened)
    page.press(Keys.ESCAPE)
    page.until("document.activeElement.cells?.[0].textContent === '4'")
    page.press("k", "/", "jk?", Keys.ESCAPE)
    assert page.count == "0 of 120 samples"
    assert page.run("return document.activeElement === document.body")
    page.press("j", "?")
    assert page.run("return document.querySelector('.keys').open")
    # beyond the rows that are drawn
    page.load()
    page.press(*"j" * 60)
    assert page.run("return document.querySelector('#samples tr[aria-current]').cells[0].textContent") == "60"


def test_a_slider_over_the_rollouts(page: Page) -> None:
    page.select("samples of", "PPO: rollouts")
    assert len(page.rows) == 40
    slider = page.driver.find_element("css selector", "input[type=range]")
    slider.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert [row[3].split("reward")[0] for row in page.rows] == [f"sampled {number}" for number in range(8, 12)]
    assert page.run("return document.querySelector('#samples output').textContent") == "3 of 10"
    slider.send_keys(Keys.HOME)
    assert len(page.rows) == 40
    # and each token of one sample
    page.load("#sample/ppo%2Frollouts/8")
    tokens = "return [...document.querySelectorAll('dialog .trace span')].map(each => each.textContent)"
    assert page.run(tokens) == [" <b>a</b>0.30", "b-0.20"]
    page.select("the first 2 tokens by", "advantage")
    assert page.run(tokens) == [" <b>a</b>-0.50", "b7.00"]


CONTRAST = """
const parse = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(value => value / 255)
  .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
const light = colour => { const [r, g, b] = parse(colour); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const page = light(getComputedStyle(document.body).backgroundColor);
return [page, ...arguments[0].map(selector => {
  const ink = light(getComputedStyle(document.querySelector(selector)).color);
  return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
})];
"""


def test_dark_and_light(page: Page) -> None:
    selectors = ["body", *(f"#samples {each}" for each in (".text", ".facts", "b.good", "b.bad", "tbody a"))]
    pages = {}
    for scheme in ("light", "dark"):
        page.media(scheme=scheme)
        pages[scheme], *contrasts = page.run(CONTRAST, selectors)
        assert min(contrasts) >= 4.5, dict(zip(selectors, contrasts, strict=True))  # WCAG 2.2, AA
    assert pages["dark"] < 0.1 < 0.9 < pages["light"]


def test_a_narrow_screen_and_paper(page: Page) -> None:
    for width in (1280, 390):
        page.width(width)
        page.load()
        page.driver.find_element("css selector", "#samples .filters summary").click()
        for table in ("Evaluation", "PPO: rollouts", "Supervised fine-tuning: before and after"):
            page.select("samples of", table)
            assert not page.scrolls_sideways(), (width, table)
    cell = "document.querySelector('#samples td[data-heading]')"
    heading = page.run(f"return getComputedStyle({cell}, '::before').content")
    assert heading == '"prompt"'
    page.driver.find_element("css selector", "#samples tbody tr .text").click()
    assert ATTACK in str(page.opened)
    assert not page.scrolls_sideways()
    page.load()
    page.media("print")
    assert page.run("return document.querySelector('#samples tbody tr').getBoundingClientRect().height") > 0
    assert page.run("return getComputedStyle(document.querySelector('#samples .tools')).display") == "none"
    assert not page.scrolls_sideways()


def test_without_scripts_the_first_rows_are_there(page: Page) -> None:
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.load()
        source = page.driver.page_source
    finally:
        page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    plain = source[: source.index("samples-data")]
    assert 'class="plain"' in plain
    assert "Question 4?" in plain
    assert "Question 5?" not in plain
    assert "120 rows, from" in plain
