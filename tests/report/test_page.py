"""The report page shows what the logs hold, is one file, and says what nobody recorded."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lightning_mp.cli import main
from lightning_mp.errors import SettingValueError
from lightning_mp.report import build_report
from lightning_mp.report.events import encode_event
from lightning_mp.report.page import render_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SCALES = [{"step": s, "loss_scale": 1024.0 / 2 ** min(s, 3), "found_inf": s < 3, "skipped": s < 3} for s in range(20)]
OVERFLOW = {
    "step": 7, "batch_idx": 7, "rank": 1, "phase": "forward", "fqn": "encoder.<b>ffn</b>", "kind": "inf", "count": 3,
    "amax": {"input": 12.5, "output": float("inf")}, "loss_scale": 128.0, "calibrating": False,
}  # fmt: skip
RANGE = {
    "step": 0, "group": "all", "histogram": {"-30": 25, "0": 75}, "flushed_unscaled": 0.25, "flushed": 0.125,
    "saturated": 0.0, "suggested_scale": 16384.0,
}  # fmt: skip
FP8 = {
    "step": 100, "fqn": "mlp.0", "operand": "grad", "amax": 3.0, "scale": 8.0, "saturated": 0.5, "flushed": 0.0,
    "sqnr_db": 31.25, "demoted": True,
}  # fmt: skip
START = {
    "event": "start", "step": 0, "model": "Net", "settings": {"precision": "fp16"}, "versions": {"torch": "2.x"},
    "limits": {"is_dynamic": True, "min_scale": 128.0, "max_scale": 2.0**32},
    "totals": ["Parameters: 5 in FP32 (20 B)"], "groups": [], "manifest": [],
    "estimate": {"weights": 2048, "total": 4096},
}  # fmt: skip
END = {
    "event": "end", "step": 20, "applied_steps": 17, "skipped_steps": 3, "seconds": 1.5, "memory": {"weights": 1024},
    "message": "watch out", "error": None,
}  # fmt: skip
PINS = {
    "event": "pins", "step": 0,
    "reports": [{"step": "training_step", "modules": {"norm": "LayerNorm"}, "below_fp32": [], "fused_attention": [],
                 "calls": [{"fqn": "norm", "name": "layer_norm", "dtype": "FP32", "count": 2},
                           {"fqn": "blocks.0.norm", "name": "layer_norm", "dtype": "FP32", "count": 3}]}],
}  # fmt: skip
FULL = {
    "run": [START, PINS, END], "loss_scale": SCALES, "overflow": [OVERFLOW], "gradient_range": [RANGE], "fp8": [FP8],
}  # fmt: skip


class Page(HTMLParser):
    """Collects tags, links and visible text, and checks that every tag is closed in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.texts, self.open = [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


def test_page_is_one_well_formed_file_without_external_resources():
    html = render_page(FULL)
    page = Page(html)
    assert page.open == []
    assert page.links == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", html)
    assert 'name="viewport"' in html


def test_every_section_shows_what_was_recorded():
    text = Page(render_page(FULL)).text
    for expected in (
        "17 steps applied of 20",
        "3 steps skipped",
        "128 loss scale at the end",
        "watch out",
        "encoder.<b>ffn</b>",
        "input 12.5, output inf",
        "FP16 flushes unscaled",
        "12.5%",
        "16384",
        "Moved back to BF16: mlp.0",
        "31.2",
        "First training_step: 5 \N{MULTIPLICATION SIGN} layer_norm in FP32.",
        "Parameters: 5 in FP32 (20 B)",
        "2.0 KiB",
        "1.0 KiB",
    ):
        assert expected in text
    assert "Not recorded" not in text


MEASURE = """<iframe src="page.html" style="width:390px;height:2000px;border:0"></iframe><script>
onload = () => {
  const table = document.querySelector("iframe").contentDocument.querySelector("table");
  const box = table.parentElement;
  document.body.dataset.found = [table.rows.length, box.clientWidth, box.scrollWidth].join(" ");
};</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")
def test_overflows_fit_the_width_of_a_phone_however_long_a_name_is(tmp_path):
    long_name = ".".join(["encoder_with_a_long_name"] * 6)
    events = [{**OVERFLOW, "fqn": long_name, "calibrating": True}] * 3
    (tmp_path / "page.html").write_text(render_page({**FULL, "overflow": events}), encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--window-size=500,2000"]
    command = [CHROMIUM, *flags, "--dump-dom", (tmp_path / "measure.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    num_rows, shown, needed = map(int, re.search(r'data-found="(\d+) (\d+) (\d+)"', dom).groups())
    assert num_rows == 4
    assert 300 < needed <= shown < 390


def test_health_uses_the_limits_of_the_run():
    # At the floor of 128 without an overflow there, after three skips before the first applied step.
    assert "healthy health of the loss scale" in Page(render_page(FULL)).text
    at_cap = {**START, "limits": {"is_dynamic": True, "min_scale": 1.0, "max_scale": 128.0}}
    assert "stuck health of the loss scale" in Page(render_page({**FULL, "run": [at_cap, END]})).text


def test_empty_sections_name_the_callback_that_fills_them():
    text = Page(render_page({})).text
    for name in ("LossScaleMonitor", "OverflowMonitor", "GradientRangeMonitor", "FP32Pin", "PrecisionReport"):
        assert f"{name}()" in text


@pytest.mark.parametrize(("num_bytes", "is_said"), [(4096, True), (0, False)])
def test_masters_that_nobody_measured_are_said_beside_the_measured_column(num_bytes, is_said):
    start = {**START, "estimate": {"weights": 2048, "masters": num_bytes, "total": 2048 + num_bytes}}
    text = Page(render_page({"run": [start, END]})).text
    assert ("Masters are there, and are estimated only" in text) is is_said


def test_run_without_overflows_says_none_rather_than_not_recorded():
    clean = [{**event, "found_inf": False, "skipped": False} for event in SCALES]
    text = Page(render_page({"loss_scale": clean, "overflow": []})).text
    assert "Overflows None." in text


@pytest.mark.parametrize(
    "scales",
    [
        SCALES[:1],
        [{**event, "loss_scale": 1.0} for event in SCALES],
        [{**event, "loss_scale": 0.0} for event in SCALES],
        [{**SCALES[s % 20], "step": s} for s in range(30_000)],
    ],
)
def test_any_trajectory_can_be_drawn(scales):
    html = render_page({"loss_scale": scales})
    assert Page(html).open == []
    assert "nan" not in re.findall(r'd="([^"]*)"', html)
    assert len(html) < 400_000


def test_single_exponent_can_be_drawn():
    assert "100%" in render_page({"gradient_range": [{**RANGE, "histogram": {"-149": 4}}]})


def write_logs(directory, logs=FULL):
    for name, events in logs.items():
        (directory / f"{name}.jsonl").write_bytes(b"".join(map(encode_event, events)))


def test_page_is_built_from_the_logs_of_a_directory(tmp_path):
    write_logs(tmp_path)
    path = build_report(tmp_path)
    assert path == tmp_path / "precision_report.html"
    assert path.read_text(encoding="utf-8") == render_page(FULL)


def test_page_of_a_killed_run_says_that_it_has_not_ended(tmp_path):
    write_logs(tmp_path, {"run": [START], "loss_scale": SCALES})
    with (tmp_path / "loss_scale.jsonl").open("ab") as log:
        log.write(b'{"step": 20, "loss_sc')
    text = Page(build_report(tmp_path).read_text(encoding="utf-8")).text
    assert "has not ended, or was killed" in text
    assert "17 steps applied of 20" in text


def test_logs_set_aside_by_a_later_run_are_left_out(tmp_path):
    write_logs(tmp_path, {"loss_scale": SCALES[:4], "loss_scale-v1": SCALES})
    assert "1 steps applied of 4" in Page(build_report(tmp_path).read_text(encoding="utf-8")).text


def test_files_of_the_user_beside_the_logs_are_left_alone(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "hi"}\n# a comment\n')
    with pytest.raises(SettingValueError, match="holds no event logs"):
        build_report(tmp_path)
    write_logs(tmp_path)
    assert build_report(tmp_path).read_text(encoding="utf-8") == render_page(FULL)


def test_log_that_somebody_else_wrote_into_is_refused_by_name(tmp_path):
    write_logs(tmp_path)
    (tmp_path / "overflow.jsonl").write_text("# a comment\n")
    with pytest.raises(SettingValueError, match=r"overflow\.jsonl holds a line that is not JSON"):
        build_report(tmp_path)


def test_directory_without_logs_is_refused_with_where_some_are(tmp_path):
    run = tmp_path / "version_0"
    run.mkdir()
    write_logs(run)
    with pytest.raises(SettingValueError, match=r"holds no event logs .* Found some in: .*version_0"):
        build_report(tmp_path)
    with pytest.raises(SettingValueError, match="holds no event logs"):
        build_report(tmp_path / "nowhere")


def test_command_rebuilds_the_page_and_fails_without_logs(tmp_path, capsys):
    write_logs(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert str(tmp_path / "precision_report.html") in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "holds no event logs" in capsys.readouterr().err
