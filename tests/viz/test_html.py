"""Pages are self-contained: no requests, no foreign scripts, every value escaped."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys

import pytest
from jinja2 import UndefinedError
from PIL import Image

from m2f_trainer.viz.charts import line_chart
from m2f_trainer.viz.html import Table, chart, photo, render_page, template_environment

EVIL = '"><script>alert(1)</script>{{ 7 * 7 }}'


def report(**changes: object) -> str:
    values = {"heading": "a", "title": "a", "dense": False, "galleries": [], "summary": Table(["run"], [["a"]])}
    values |= {
        "classes": Table(["class"], [["cat"]], sortable=True),
        "errors": Table([], []),
        "settings": Table([], []),
        "differences": Table([], []),
    }
    return render_page("report.html", **{**values, "training": [], "score_charts": [], "confusion": [], **changes})


def policy(page: str) -> str:
    (content,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    return content.replace("&#39;", "'")


def test_a_page_allows_its_own_script_alone_and_no_request() -> None:
    page = report(script="sort.js")
    (script,) = re.findall("<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy(page)
    assert policy(page).startswith("default-src 'none'; img-src data:;")
    assert page.index("Content-Security-Policy") < page.index("<style>"), "a policy counts for what follows it"


def test_a_page_without_a_script_allows_none() -> None:
    assert "script-src 'none';" in policy(report())
    assert "<script" not in report()


def test_every_value_of_a_page_is_escaped() -> None:
    drawn = chart(EVIL, line_chart({EVIL: [(0, 1)]}, "step"), EVIL)
    picture = photo(Image.new("RGB", (2, 2)), EVIL, [EVIL, "second line"])
    table = Table([EVIL], [[EVIL]])
    gallery = {"run": EVIL, "problem": EVIL, "photos": {"worst": [picture]}}
    page = report(title=EVIL, heading=EVIL, summary=table, training=[drawn], galleries=[gallery])
    assert "<script" not in page
    assert page.count("{{ 7 * 7 }}") >= 9, "a value is no template"
    assert "<br>second line</figcaption>" in page


def test_a_forgotten_value_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render_page("check.html")


def test_every_template_can_be_read() -> None:
    environment = template_environment()
    names = environment.list_templates()
    assert {"page.html", "parts.html", "report.html", "check.html", "page.css", "sort.js"} <= set(names)
    for name in names:
        environment.get_template(name)


def test_importing_is_quiet_about_jinja2_and_matplotlib() -> None:
    modules = "m2f_trainer.viz.html, m2f_trainer.evaluation.report, m2f_trainer.doctor.page, m2f_trainer.hub.model_card"
    code = f"import {modules}, sys; print(sorted({{'matplotlib', 'm2f_trainer.viz.html'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['m2f_trainer.viz.html']"
