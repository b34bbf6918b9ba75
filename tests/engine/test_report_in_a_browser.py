"""The report as a browser shows it: nothing sticks out, pictures and sounds are there, on a desk and on a phone."""
import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch

from icf.engine.pictures import Sample
from icf.engine.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>addEventListener('load', () => {
  const images = [...document.images];
  document.querySelectorAll('details').forEach(d => d.open = true);
  const root = document.documentElement, right = e => e.getBoundingClientRect().right;
  const seen = {width: innerWidth, sticks_out: root.scrollWidth - root.clientWidth,
    pictures: images.map(i => i.complete && i.naturalWidth > 0), sounds: document.querySelectorAll('audio').length,
    ink: getComputedStyle(document.body).color,
    values: [...document.querySelectorAll('.scores tbody tr')].map(row => right(row.children[2]))};
  parent.postMessage(JSON.stringify(seen), '*');
})</script>"""
FRAME = """<iframe src="copy.html" width={width} height=900 style="border:0"></iframe>
<script>addEventListener('message', event => document.title = 'seen ' + event.data)</script>"""
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium")


@pytest.fixture
def page(make_results, tmp_path):
    """A report of two clips, one without sound."""
    def clip(name, sound):
        masks = torch.zeros(5, 64, 64, dtype=torch.uint8)
        return Sample(name, torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8), torch.zeros(5, 1, 96, 64), masks,
                      torch.ones(5, dtype=torch.bool), masks, 0.5, 0.25, "worst", ["conflicting"], sound)
    tone = torch.from_numpy(0.3 * np.sin(np.arange(5 * 16000) / 20)).float()
    history = {"steps": [{"step": i, "loss": 1 / i, "lr": 1e-3, "bce": 1 / i, "va": 2.0} for i in range(1, 30)],
               "evaluations": [{"step": 9, "J": 0.4, "F": 0.5, "J other sound": 0.3}]}
    clips = [clip("a clip with quite a long name " * 3, tone), clip("mute", None)]
    write_report(tmp_path, make_results(), clips, (), history)
    return tmp_path / "report.html"


def look(page, width, dark=False):
    copy = page.with_name("copy.html")
    copy.write_text(page.read_text().replace(" loading=lazy", "").replace("</body>", LOOK + "</body>"))
    frame = page.with_name("frame.html")  # a window is never narrower than 500 pixels
    frame.write_text(FRAME.format(width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--virtual-time-budget=90000",
               "--blink-settings=preferredColorScheme=" + ("0" if dark else "1"), "--dump-dom"]
    out = subprocess.run([BROWSER, *options, f"file://{frame}"], capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search(r"<title>seen (.*?)</title>", out, re.S)[1]))


@pytest.mark.parametrize("width", [1300, 390])
def test_nothing_sticks_out_and_everything_is_there(page, width):
    seen = look(page, width)
    assert seen["width"] == width and seen["sticks_out"] <= 0
    assert max(seen["values"]) <= width, "the values are on the screen"
    assert len(seen["pictures"]) == 9 and all(seen["pictures"])
    assert seen["sounds"] == 1
    assert page.stat().st_size < 3e6


def test_the_sound_of_a_clip_is_in_the_page(page):
    (sound,) = re.findall(r'<audio[^>]* src="data:audio/mpeg;base64,([^"]*)"', page.read_text())
    assert soundfile.info(io.BytesIO(base64.b64decode(sound))).duration == pytest.approx(5, abs=0.1)


def test_the_page_is_dark_where_the_reader_wants_it(page):
    light, dark = (re.findall(r"\d+", look(page, 390, dark)["ink"]) for dark in (False, True))
    assert sum(map(int, light)) < 200 < 500 < sum(map(int, dark))
