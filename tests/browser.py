"""Pages in a real browser, Debian's Chromium, which `bash tests/run.sh --all` installs where it may."""

import html
import re
import shutil
import subprocess

import pytest


def evaluate(page: str, script: str, folder, *, width: int) -> str:
  """The text that a script's expression has once a page of this width is laid out; skips the test without a browser.

  Args:
    page: HTML that ends in </body>.
    script: JavaScript; the value of its last statement is taken.
    folder: for the page and the browser's profile.
    width: of the window, at least 500, in pixels.
  """
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if browser is None:
    pytest.skip('no chromium')
  assert '`' not in script and page.count('</body>') == 1
  file = folder / 'page.html'
  file.write_text(page.replace('</body>', f'<script>document.title = eval(`{script}`)</script></body>'), 'utf-8')
  flags = (
      '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
      '--disable-background-networking', '--disable-component-update', f'--user-data-dir={folder / "profile"}',
      f'--window-size={width},900',
  )
  command = [browser, *flags, '--dump-dom', f'file://{file}']
  text = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
  return html.unescape(re.search(r'<title>(.*?)</title>', text, re.DOTALL)[1])
