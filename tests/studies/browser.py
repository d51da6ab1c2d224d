"""Opens a page in a headless Chromium (PySide6's) and asks it questions: run as a script, since Qt wants a process.

    python browser.py PAGE WIDTH HEIGHT [PICTURE] < QUESTIONS

QUESTIONS are JavaScript expressions, a JSON list. Prints their values and the console's complaints as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication


class Page(QWebEnginePage):
    """Keeps what the page complains about."""

    def __init__(self) -> None:
        super().__init__()
        self.complaints: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.complaints.append(f"{message} ({line})")


def main() -> None:
    path, width, height, *pictures = sys.argv[1:]
    questions: list[str] = json.load(sys.stdin)
    answers: list[Any] = []
    app = QApplication(sys.argv[:1])
    page, view = Page(), QWebEngineView()
    view.setPage(page)
    view.resize(int(width), int(height))
    view.show()

    def ask(answer: Any = None) -> None:
        if answer is not None:
            answers.append(json.loads(answer))
        if len(answers) < len(questions):
            page.runJavaScript(f"JSON.stringify({questions[len(answers)]})", 0, ask)
            return
        QTimer.singleShot(3000 if pictures else 0, end)  # what is drawn comes after what is answered

    def end() -> None:
        if pictures:
            view.grab().save(pictures[0])
        print(json.dumps({"answers": answers, "complaints": page.complaints}))
        app.quit()

    page.loadFinished.connect(lambda _: QTimer.singleShot(800, ask))
    view.load(QUrl.fromLocalFile(path))
    app.exec()


if __name__ == "__main__":
    main()
