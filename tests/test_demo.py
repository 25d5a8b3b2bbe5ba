"""examples/demo.py: what the page answers, and the page itself in a headless browser."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from task_files import save_tiny_model
from transformers import AutoTokenizer

from examples import demo
from modeling_convt5 import ConvT5ForQuestionAnswering, ConvT5ForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
TEXT = "the filter reads its past and nothing else"
WORDS = {"id2label": {0: "past", 1: "nothing"}, "label2id": {"past": 0, "nothing": 1}}


@pytest.fixture
def folder(tmp_path):
    mixers = ["lightweight", "dynamic"]
    return save_tiny_model(tmp_path / "model", [TEXT], encoder_mixers=mixers, **WORDS)


def with_head(folder, head):
    model = head.from_pretrained(folder)
    model.save_pretrained(folder.parent / "head")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder.parent / "head")
    return folder.parent / "head"


def test_probabilities_text_and_filters(folder):
    probabilities, written, figure = demo.respond(str(folder), demo.AS_IT_IS, TEXT)
    assert list(probabilities) == ["past", "nothing"]
    assert sum(probabilities.values()) == pytest.approx(1)
    assert isinstance(written, str)
    assert [axis.get_title() for axis in figure.axes] == [
        "layer 1: lightweight",
        "layer 2: dynamic",
    ]


def test_labels_of_ones_own_and_a_tasks_template(folder):
    answer = demo.respond(str(folder), "sst2", TEXT, "reads , filter,else")
    assert list(answer[0]) == ["reads", "filter", "else"]
    assert demo.template("sst2", "good") == "sst2 sentence: good"


def test_a_head_answers_with_its_labels(folder):
    head = with_head(folder, ConvT5ForSequenceClassification)
    probabilities, written, _ = demo.respond(str(head), demo.AS_IT_IS, TEXT)
    model, tokenizer, _ = demo.load(str(head))
    with torch.no_grad():
        expected = model(**tokenizer(TEXT, return_tensors="pt")).logits.softmax(-1)[0]
    assert written == ""
    assert list(probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_errors_are_sentences(folder, tmp_path):
    with pytest.raises(ValueError, match="The text is empty"):
        demo.respond(str(folder), demo.AS_IT_IS, "  ")
    with pytest.raises(ValueError, match="No checkpoint is chosen"):
        demo.respond(None, demo.AS_IT_IS, TEXT)
    with pytest.raises(ValueError, match="answers in a second text"):
        demo.respond(str(with_head(folder, ConvT5ForQuestionAnswering)), demo.AS_IT_IS, TEXT)
    with pytest.raises(OSError, match="none"):
        demo.respond(str(tmp_path / "none"), demo.AS_IT_IS, TEXT)


def test_a_wrong_checkpoint_stops_the_command(tmp_path, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    assert demo.main(["--models", str(tmp_path / "none")]) == 2
    assert "--models" in capsys.readouterr().err


def test_the_page_in_a_browser(folder, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    pytest.importorskip("selenium", reason="Selenium is not installed")
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "demo.py", "--models", folder]
    server = subprocess.Popen([*map(str, command), "--port", str(port), "--threads", "1"])
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1200,1400"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser = None
    try:
        deadline, listening = time.monotonic() + 120, False
        while not listening:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
            with socket.socket() as probe:
                listening = probe.connect_ex(("127.0.0.1", port)) == 0
        browser = webdriver.Chrome(options=options, service=service)
        browser.get(f"http://127.0.0.1:{port}")
        wait = WebDriverWait(browser, 60)

        def shown(text):
            return lambda _: text in browser.find_element(By.TAG_NAME, "body").text

        wait.until(shown("nothing"))  # the example is answered when the page opens
        box = browser.find_element(By.XPATH, "//label[contains(., 'Labels, between')]//textarea")
        box.send_keys("filter, reads")
        browser.find_element(By.XPATH, "//button[normalize-space()='Answer']").click()
        wait.until(shown("reads"))

        def drawn(_):
            images = browser.find_elements(By.TAG_NAME, "img")
            return any(int(image.get_property("naturalWidth")) > 300 for image in images)

        wait.until(drawn)  # the filters
        browser.save_screenshot(str(tmp_path / "demo.png"))
        assert (tmp_path / "demo.png").stat().st_size > 10_000
    finally:
        if browser is not None:
            browser.quit()
        server.send_signal(signal.SIGTERM)
        server.wait(30)
