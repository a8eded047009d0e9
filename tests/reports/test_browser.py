"""The page in a real browser."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from reports.conftest import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Runs in the page's frame: what sticks out of the page at this width, how much of each picture was drawn.
PROBE = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(
    (one) => !one.closest("svg, thead") && one.getBoundingClientRect().right > innerWidth + 1);
  const texts = [...document.querySelectorAll("svg.chart")].flatMap((svg) => {
    const boxes = [...svg.querySelectorAll("text")].map(
      (one) => [one.textContent, one.getBoundingClientRect()]);
    const frame = svg.getBoundingClientRect();
    const hits = [];
    boxes.forEach(([a, p], i) => {
      if (p.left < frame.left - 4 || p.right > frame.right + 4) hits.push(a + " leaves its picture");
      boxes.slice(i + 1).forEach(([b, q]) => {
        const beside = p.left >= q.right - 1 || q.left >= p.right - 1;
        if (!beside && p.top < q.bottom - 3 && q.top < p.bottom - 3) hits.push(a + " over " + b);
      });
    });
    return hits;
  });
  document.body.dataset.wide = wide.length;
  document.body.dataset.texts = JSON.stringify(texts);
});
</script>"""


def dump(page, tmp_path, width):
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
        *(f"--window-size={width},1600", "--dump-dom", page.as_uri()),
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, timeout=120, check=True, env=environment)
    return done.stdout.decode("utf-8")


def probed(out, tmp_path, width):
    """Return the page as the browser has it, with what sticks out of it and what overlaps in its pictures."""
    text = (out / "report.html").read_text(encoding="utf-8")
    # The page forbids scripts; the copy under test allows the one above.
    copy = tmp_path / "probed.html"
    copy.write_text(
        text.replace("default-src 'none';", "").replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    return dump(copy, tmp_path, width)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [1200, 500])
def test_page_renders_in_chromium_with_nothing_cut_or_overlapping(make, tmp_path, width):
    make.pipeline(tmp_path / "demo")
    report([tmp_path / "demo"], out=tmp_path / "report")
    dom = probed(tmp_path / "report", tmp_path, width)
    assert dom.count("<svg") == 12
    assert '<table class="rows nets">' in dom
    assert 'data-wide="0"' in dom
    assert 'data-texts="[]"' in dom


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [1200, 920, 500])
def test_tables_of_precisions_modes_and_parity_fit_the_page(make, tmp_path, width):
    for name, reject in (("kept", False), ("rejected", True)):
        net = make.model(tmp_path / f"net-{name}", top1=77.2, draws=None)
        make.compiled(tmp_path / name, model=net, reject=reject)
    nets = [tmp_path / f"net-{name}" for name in ("kept", "rejected")]
    report([*nets, tmp_path / "kept", tmp_path / "rejected"], out=tmp_path / "report")
    dom = probed(tmp_path / "report", tmp_path, width)
    assert dom.count("<table") == 2 + 2 * 3
    assert 'data-wide="0"' in dom
    assert 'data-texts="[]"' in dom
