"""Reports in a real browser, where one is installed: no complaint, and nothing sticks out of a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_cases import whole_run

from mwpb_fast import cli

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Two frames, as wide as a phone and a desk, are asked how wide their content is, and what the keyboard reaches.
ASK = """<!DOCTYPE html><body><pre></pre>
<iframe src="report.html" width="390" height="800"></iframe>
<iframe src="report.html" width="1300" height="800"></iframe>
<script>onload = () => {
  const frames = [...document.querySelectorAll("iframe")]
  document.querySelector("pre").textContent = JSON.stringify(frames.map(frame => {
    const page = frame.contentDocument, style = frame.contentWindow.getComputedStyle(page.body)
    page.querySelectorAll("details").forEach(part => part.open = true)
    const stops = [...page.querySelectorAll("a[href], summary, [tabindex]")]
    stops.forEach(stop => stop.focus())
    return {wide: page.documentElement.scrollWidth, width: frame.width, back: style.backgroundColor,
            stops: stops.length, last: page.activeElement === stops[stops.length - 1],
            small: Math.min(...[...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height))}
  }))
}</script>"""

pytestmark = [pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"), pytest.mark.slow]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(tmp_path: Path, dark: bool) -> None:
    runs = [
        str(whole_run(tmp_path / name)) for name in ("a", "a-run-with-a-name-of-some-length-that-has-no-spaces")
    ]
    assert cli.main(["report", *runs, "--no-images", "--out", str(tmp_path / "report.html")]) == 0
    (tmp_path / "ask.html").write_text(ASK)
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    words += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--blink-settings=preferredColorScheme=0"] * dark
    done = subprocess.run(
        [str(BROWSER), *words, f"file://{tmp_path}/ask.html"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.findall("<pre>(.*?)</pre>", done.stdout)[0]))
    assert [frame["wide"] <= int(frame["width"]) for frame in found] == [True, True], found
    for frame in found:
        assert frame["back"] == ("rgb(20, 23, 26)" if dark else "rgb(251, 251, 249)")
        assert frame["stops"] > 30
        assert frame["last"]
        assert frame["small"] >= 8
