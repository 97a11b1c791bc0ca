"""Opens a page in headless Chromium and lets a script in it answer: pages are judged where people read them."""

from __future__ import annotations

import http.server
import os
import queue
import shutil
import subprocess
import threading
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """The browser's command, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def ask(page: str, script: str, profile: Path, seconds: float = 60) -> str:
    """Serve ``page`` on this machine, run the body of the async function ``script`` in it once it has loaded, and
    return what that returns. An error in the page is returned as its text. queue.Empty after ``seconds``."""
    answers: queue.Queue[str] = queue.Queue()
    ending = (
        "<script>addEventListener('load', async () => { let answer;"
        f"try {{ answer = await (async () => {{ {script} }})(); }} catch (error) {{ answer = 'error: ' + error; }}"
        "fetch('/answer', {method: 'POST', body: String(answer)}); });</script></body>"
    )
    content = page.replace("</body>", ending).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(content if self.path == "/" else b"")

        def do_POST(self) -> None:
            answers.put(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = chromium()
    assert command is not None
    flags = ["--headless=new", "--disable-gpu", "--autoplay-policy=no-user-gesture-required", "--no-first-run"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    process = subprocess.Popen(
        [command, *flags, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return answers.get(timeout=seconds)
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()
