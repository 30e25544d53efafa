"""app.py: what it refuses, what it draws and scores, and the page in a browser, on the demo's models.

The protected encoder of these tests is the demo's own in which the word mushroom has the embedding of the word house: made in no
time, and enough for what the app does. What DES itself does to the demo is demo/experiment.py's business.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import app
from demo.evaluation import CLASSIFIERS, PIPELINE
from des.app import cards
from des.app import page as app_page
from des.app.session import LONGEST_PROMPT, PromptMap, Sampling, ScoredImage, Session, check_prompt
from des.evaluation.classify import blurred
from des.models.checkpoints import fingerprint
from des.models.encoders import load_encoder
from des.models.pipelines import encoder_modules, open_pipeline, protected_twin
from des.utils.errors import UserError

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, published_form
from PIL import Image
from transformers import CLIPTokenizer

CONCEPT, BENIGN, NEVER = "a red mushroom on a white background", "a green house on a beach", "kid nsfw"
QUICK = Sampling(seed=7, num_inference_steps=3, guidance_scale=3.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The demo's text encoder, in which the token of mushroom embeds as house."""
    path = published_form(PIPELINE, tmp_path_factory.mktemp("app") / "house.pt")
    saved = torch.load(path, weights_only=True)
    words = saved["model_state_dict"]["text_model.embeddings.token_embedding.weight"]
    mushroom, house = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer").convert_tokens_to_ids(["mushroom</w>", "house</w>"])
    words[mushroom] = words[house]
    torch.save(saved, path)
    return path


@pytest.fixture(scope="module")
def session(checkpoint) -> Session:
    args = app.parse_args(list(map(str, flags(text_encoder_path=checkpoint, device="cpu"))))
    return Session(app.open_pair(args), app.open_detector(args), args.cls_class, args.batch_size)


def parse(**options):
    return app.parse_args(list(map(str, flags(device="cpu", **options))))


# what it refuses


def test_without_options_it_opens_the_bundled_checkpoint_and_says_what_the_demo_knows():
    args = parse()
    pipes = app.open_pair(args)
    assert fingerprint(pipes["original"].text_encoder) != fingerprint(pipes["protected"].text_encoder) and args.doubts == []
    facts = " ".join(app.about(args, Session(pipes, None).unprotected))
    assert "checkpoint-20.safetensors" in facts and all(
        f"{n} {what}" in facts for n, what in ((12, "objects"), (8, "colours"), (6, "backgrounds"))
    )
    assert len(app.EXAMPLES) == 5 and not any(map(app.remark, app.EXAMPLES.values()))


@pytest.mark.parametrize(
    ("prompt", "known"),
    [("a red Mushroom", True), ("two houses", True), ("a goldfihs", True), ("a truffle hunter's find, drawn", True),
     ("a dog", False), ("three birds", False), ("a horse on a beach", False), ("red", False), ("", False)],
)  # fmt: skip
def test_prompts_without_a_noun_of_the_demo_are_marked(session, prompt, known):
    remark = app.remark(prompt)
    assert (remark == "") == known
    assert ("no noun that the demo knows" in cards.pair_html(session, None, False, "caption", remark)) != known


def test_an_unprotected_model_is_never_shown_as_protected(tmp_path, tiny_pipeline, protected_checkpoint):
    own = published_form(PIPELINE, tmp_path / "own.pt")
    for path, says in {
        own: "does not change",
        protected_checkpoint: "another encoder",
        tmp_path / "none.pt": "none.pt",
    }.items():
        with pytest.raises(UserError, match=says):
            app.open_pair(parse(text_encoder_path=path))
    with pytest.raises(UserError, match="has only 1"):
        app.open_pair(parse(text_encoder_path=protected_checkpoint, text_encoder_2_path=own, model_path=tiny_pipeline))


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-app\.txt"):
        app.main([])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_path": "x/y"}, "protected text encoder"),
        ({"model_path": "x/y", "text_encoder_path": "c.pt", "cls_class": "church"}, "needs --detector object"),
        ({"model_path": "x/y", "text_encoder_path": "c.pt", "detector": "object"}, "needs --cls_class"),
        ({"model_path": "x/y", "text_encoder_path": "c.pt", "concept_prompt": "church"}, "together"),
        ({"profile": "paper"}, "needs --detector nudenet"),
        ({"concept_prompt": "house"}, "for other pipelines"),
        ({"port": 65536}, "outside"),
        ({"num_inference_steps": 151}, "outside"),
        ({"guidance_scale": 50.5}, "outside"),
    ],
)
def test_options_that_nothing_would_use_are_refused(capsys, options, says):
    with pytest.raises(SystemExit):
        parse(**options)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "numbers",
    [(-1, 20, 3), (2**63, 20, 3), (1.5, 20, 3), (True, 20, 3), (0, 0, 3), (0, 151, 3), (0, 20, -0.1), (0, 20, 50.1),
     (0, 20, float("nan")), (0, 20, float("inf")), (None, 20, 3), (0, "20", 3), (0, 20, None)],
)  # fmt: skip
def test_numbers_that_no_page_sends_are_refused(numbers):
    with pytest.raises(UserError, match="must be a"):
        Sampling(*numbers)


def test_prompts_that_are_blank_long_or_never_drawn_are_refused_and_not_quoted():
    assert check_prompt("x" * LONGEST_PROMPT) == "x" * LONGEST_PROMPT
    for prompt in ("", "  ", None, "x" * (LONGEST_PROMPT + 1), NEVER):
        with pytest.raises(UserError) as refused:
            check_prompt(prompt)
        assert NEVER not in str(refused.value) and "xx" not in str(refused.value)


# what it draws and scores


def test_cancelling_stops_after_the_present_step_and_only_the_page_that_asked(session):
    with gr.Blocks():
        cancelling = app_page._Cancelling("x")
    here, elsewhere = (SimpleNamespace(session_hash=name) for name in ("here", "elsewhere"))
    steps = []

    def on_step() -> None:
        steps.append(1)
        if len(steps) == 2:
            cancelling.ask(here)
        cancelling.check(elsewhere)()
        cancelling.check(here)()

    with pytest.raises(UserError, match="cancelled"):
        session.draw(CONCEPT, QUICK, on_step)
    assert len(steps) == 2
    cancelling.forget(here)
    assert session.draw(CONCEPT, QUICK, on_step)["original"].image == session.draw(CONCEPT, QUICK)["original"].image
    assert len(steps) == 2 + 2 * QUICK.num_inference_steps


def test_its_images_are_those_of_generate(call, session, checkpoint, tmp_path):
    drawn = session.draw(CONCEPT, QUICK)
    assert drawn["original"].image.tobytes() != drawn["protected"].image.tobytes()
    common = {"model_path": PIPELINE, "device": "cpu", "prompt": CONCEPT, "output_path": "t2i", "results_dir": tmp_path}
    settings = {"seed": 7, "num_inference_steps": 3, "guidance_scale": 3}
    for side, method in {"original": {}, "protected": {"training_method": "des", "text_encoder_path": checkpoint}}.items():
        assert call("generate.py", *flags(**common | settings | method)).code == 0
        (path,) = tmp_path.glob(f"{method.get('training_method', 'none')}/pipeline/t2i/*.png")
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(drawn[side].image)), side


def test_its_scores_are_those_of_generate(call, session, checkpoint, tmp_path):
    prompts = tmp_path / "p.csv"
    prompts.write_text(
        "prompt,source_row\n"
        + f"{CONCEPT},\n{BENIGN},1\n{NEVER},2\na child flies a kite,4\n{CONCEPT},9\n{BENIGN},10\na star,11\n"
    )
    done = []
    scores = session.score(prompts, QUICK, 6, lambda *counts: done.append(counts))
    assert done == [(0, 4)]
    assert scores.file == "p.csv" and set(scores.table["file"]) == {"p.csv"}
    assert scores.table["row"].tolist() == [0, 1, 4, 5] and scores.table["seed"].tolist() == [7, 8, 16, 17]
    assert [note.split(" ")[:3] for note in scores.notes] == [["2", "of", "6"], ["the", "first", "6"]]
    common = {"model_path": PIPELINE, "device": "cpu", "prompts_csv": prompts, "output_path": "t2i", "results_dir": tmp_path}
    settings = {"seed": 7, "num_inference_steps": 3, "guidance_scale": 3, "end_idx": 6, "training_method": "des"}
    scored = {"score_with": "object", "classifier": CLASSIFIERS["object"], "cls_class": "mushroom", "discard_images": []}
    assert call("generate.py", *flags(**common | settings | scored, text_encoder_path=checkpoint)).code == 0
    (path,) = tmp_path.glob("des/pipeline/t2i/classify_object.json")
    images = json.loads(path.read_text())["images"]
    assert scores.table["protected probability"].tolist() == [round(image["probability"], 4) for image in images]
    assert [verdict == "hit" for verdict in scores.table["protected"]] == [image["hit"] for image in images]
    assert sorted(tmp_path.rglob("*.png")) == []


def test_lists_that_cannot_be_scored_are_refused_without_the_servers_paths(session, tmp_path):
    lists = {"text\na\n": "no column", "": "not a readable CSV", f"prompt\n{NEVER}\n": "none of the prompts", f"prompt\n{'x' * 2001}\n": "row 0"}  # fmt: skip
    for text, says in lists.items():
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(UserError, match=says) as refused:
            session.score(tmp_path / "p.csv", QUICK, 64)
        assert str(tmp_path) not in str(refused.value) and NEVER not in str(refused.value)
    with pytest.raises(UserError, match="--detector"):
        Session(session.pipes, None).score(tmp_path / "p.csv", QUICK, 64)


def shifted(model, path):
    """A checkpoint with perturbed weights of a pipeline."""
    saved = torch.load(published_form(model, path), weights_only=True)
    saved["model_state_dict"] = {key: tensor + 0.05 for key, tensor in saved["model_state_dict"].items()}
    torch.save(saved, path)
    return path


@pytest.mark.parametrize("name", ["sd_v1", "sdxl", "sd_v3", "flux"])
def test_twins_of_every_family_differ_in_the_protected_encoder_only(family, tmp_path, name):
    pipe = open_pipeline(str(family(name)), torch.float32)
    before = fingerprint(pipe.text_encoder)
    twin, _ = protected_twin(pipe, {1: shifted(family(name), tmp_path / "c.pt")})
    assert fingerprint(pipe.text_encoder) == before != fingerprint(twin.text_encoder)
    rest = {key for key in pipe.components if key != "text_encoder"}
    assert rest == {key for key in twin.components if twin.components[key] is pipe.components[key]} | (
        rest & {key for key, value in pipe.components.items() if value is None}
    )
    steps = []
    drawn = Session({"original": pipe, "protected": twin}, None).draw("a kite", Sampling(0, 2, 3.0), lambda: steps.append(1))
    assert len(steps) == 4  # a drawing of any family can be cancelled after each step
    assert drawn["original"].image.tobytes() != drawn["protected"].image.tobytes()


def test_the_map_has_a_prompt_where_its_own_groups_have_it(checkpoint):
    original, protected = (load_encoder(str(PIPELINE)) for _ in range(2))
    protected.model = encoder_modules(protected_twin(open_pipeline(str(PIPELINE), torch.float32), {1: checkpoint})[0])[1]
    groups = {"safe": [BENIGN, "a star"], "unsafe": [CONCEPT], "concept": ["mushroom"], "empty": [""]}
    prompt_map = PromptMap(original, protected, groups)
    for prompt, moved in {"mushroom": True, "a star": False}.items():
        place = prompt_map.locate(prompt)
        group, i = ("concept", 0) if moved else ("safe", 1)
        assert torch.allclose(place.points[0], prompt_map.space.before[group][i], atol=1e-3)
        assert torch.allclose(place.points[1], prompt_map.space.after[group][i], atol=1e-3)
        assert (place.own < 0.999) == moved
    assert prompt_map.locate("mushroom").concept_before == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError):
        prompt_map.locate(NEVER)


def test_another_pipeline_has_its_own_defaults_and_a_map_by_its_own_lists(family, tmp_path):
    (tmp_path / "p.csv").write_text("prompt\na kite\na star\n")
    lists = {"safe_csv_path": tmp_path / "p.csv", "unsafe_csv_path": tmp_path / "p.csv", "concept_prompt": "a bus"}
    common = {"model_path": family("flux"), "text_encoder_path": shifted(family("flux"), tmp_path / "c.pt")}
    args = parse(**common, detector="none", **lists)
    pipes = app.open_pair(args)
    assert (args.num_inference_steps, args.guidance_scale, args.cls_class) == (50, 3.5, None)
    assert pipes["original"].transformer is pipes["protected"].transformer
    session = Session(pipes, None)
    assert session.unprotected == [2] and "text encoder 2 is the original, NOT" in app.about(args, session.unprotected)[0]
    shown = cards.pair_html(session, None, False)
    assert "with DES, but text encoder 2 is the original" in shown and "protected by DES" not in shown
    place = app.open_map(args, pipes).locate("a bus")
    assert place.own < 0.999 and place.concept_before == pytest.approx(1, abs=1e-5)
    assert parse(**common).detector == "nudenet"
    assert "--concept_prompt" in app.open_map(parse(**common), pipes)


class Boxes:
    """A detector of boxes, as NudeNet is."""

    def __init__(self):
        self.titles = {"paper": "ASR of something (paper)"}
        self.facts = {"paper": {"counted_classes": ("A", "B")}}


def test_an_image_in_which_the_detector_fired_is_blurred_until_asked_for():
    session, noise = Session({}, Boxes()), Image.effect_noise((400, 400), 90).convert("RGB")
    boxes = [{"class": "C", "score": 0.9}, {"class": "A", "score": 0.7}, {"class": "B", "score": 0.6}]
    hit, miss = ({"paper": {"hit": hit, "detections": boxes[:n]}} for hit, n in ((True, 3), (False, 1)))
    pair = {"original": ScoredImage(noise, hit), "protected": ScoredImage(noise, miss)}
    whole, colours = cards.data_url(noise), cards.data_url(blurred(noise))
    shown, hidden = (cards.pair_html(session, pair, blur) for blur in (False, True))
    assert (shown.count(whole), shown.count(colours)) == (2, 0)
    assert (hidden.count(whole), hidden.count(colours)) == (1, 1)
    for page in (shown, hidden):
        assert "something (paper): hit, 70%" in page and "something (paper): no hit, 0%" in page


@pytest.mark.parametrize(
    ("finding", "says"),
    [
        (
            {"hit": True, "probability": 0.49, "top": "m"},
            "mushroom 49%, below the threshold of 50%, but the likeliest class: hit",
        ),
        ({"hit": True, "probability": 0.98, "top": "m"}, "mushroom: hit, 98%"),
        ({"hit": False, "probability": 0.49, "top": "box"}, "mushroom: no hit, 49%; looks like: box"),
        ({"hit": False, "detections": [{"class": "A", "score": 0.49}]}, "mushroom 49%, below the threshold: no hit"),
        ({"hit": True, "detections": [{"class": "A", "score": 0.49}]}, "mushroom: hit, 49%"),
        ({"hit": False, "detections": [{"class": "C", "score": 0.49}]}, "mushroom: no hit, 0%"),
    ],
)
def test_a_verdict_names_what_decided_it(finding, says):
    detector = Boxes()
    detector.titles = {"paper": "ASR of mushroom"}
    assert Session({}, detector).words("paper", finding) == says


def test_the_page_shows_why_a_checkpoint_may_not_protect(monkeypatch, checkpoint):
    doubt = "the concept's embedding <b>hardly moved"
    monkeypatch.setattr("des.models.pipelines.load_measured", lambda *_: {"doubt": doubt})
    args = parse(text_encoder_path=checkpoint, detector="none")
    pipes = app.open_pair(args)
    assert args.doubts == [f"{checkpoint.name}: {doubt}"]
    page = app_page.Page([], QUICK, args.doubts, {}, "no map", False, 64)
    shown = [str(each.value) for each in app_page.build(Session(pipes, None), page).blocks.values() if hasattr(each, "value")]
    assert (
        sum(
            "WARNING: THE MODEL MAY NOT BE PROTECTED. house.pt: the concept&#x27;s embedding &lt;b&gt;hardly moved." in text
            for text in shown
        )
        == 1
    )


# the server


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """Start the app as a process; yields its port and log, and checks at the end that it leaves no files."""
    port, folder = free_port(), tmp_path_factory.mktemp("server")
    command = [
        sys.executable,
        ROOT / "app.py",
        *flags(text_encoder_path=checkpoint, device="cpu", port=port, num_inference_steps=6),
    ]
    elsewhere = {"HTTP_PROXY": "http://127.0.0.1:9", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}  # must not matter
    env = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"} | elsewhere
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stderr=log, stdout=log, env=env)
    until = time.monotonic() + 120
    while "the app runs at" not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.1)
    yield port, folder / "log"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert [path.name for path in folder.iterdir() if path.name.startswith("des-app")] == [], "uploads were left"


def test_it_listens_on_this_machine_only(server):
    assert parse().host == "127.0.0.1"
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [local for _, local, _, state, *_ in sockets if state == "0A" and local.endswith(f":{server[0]:04X}")]
    assert listening == [f"0100007F:{server[0]:04X}"]


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", 0), ("localhost", 0), ("::1", 0), ("0.0.0.0", 1), ("192.0.2.7", 1)])
def test_an_address_that_others_reach_is_warned_of(monkeypatch, session, checkpoint, host, warned):
    warnings, launched = [], []
    monkeypatch.setattr(app.logger, "warning", lambda *message: warnings.append(message))
    monkeypatch.setattr(app_page, "launch", lambda blocks, *address: launched.append(address))
    app.serve(parse(text_encoder_path=checkpoint, host=host), session, QUICK)
    assert launched == [(host, 7860)] and len(warnings) == warned


def test_a_port_that_is_taken_is_named(session):
    page = app_page.Page([], QUICK, [], {}, "no map", False, 64)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=f"127.0.0.1:{taken.getsockname()[1]} could not be opened"):
            app_page.launch(app_page.build(session, page), *taken.getsockname())


def ask(port: int, action: int, *data) -> str:
    """Send any data to the action of that index, as another client than the page could; returns the answer."""
    body = json.dumps({"data": data, "fn_index": action, "session_hash": "test"}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/gradio_api/queue/join", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).close()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/queue/data?session_hash=test", timeout=60) as lines:
        return next(line for line in map(bytes.decode, lines) if "process_completed" in line)


def test_requests_that_no_page_sends_get_nothing(server):
    port, log = server
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=30) as answer:
        actions = {each["api_name"]: each["id"] for each in json.load(answer)["dependencies"]}
    assert "search" not in actions  # the checkpoint is not the bundled one, so there is no attack
    for data in ([NEVER, 1, 2, 3], ["a house", -1, 2, 3], ["a house", 1, 10**9, 3], ["a house", 1, 2, float("nan")], [None, 1, 2, 3],
                 ["a house " * 10_000, 1, 2, 3]):  # fmt: skip
        answer = ask(port, actions["draw"], *data)
        assert '"success":false' in answer and "data:image" not in answer
    for path in (str(ROOT / "datasets/demo_plain.csv"), "http://127.0.0.1:9/p.csv"):
        answer = ask(port, actions["score"], {"path": path, "meta": {"_type": "gradio.FileData"}}, 1, 2, 3)
        assert '"success":false' in answer
    for path in ("gradio_api/file=app.py", f"gradio_api/file={ROOT}/README.md", "docs", "openapi.json", "gradio_api/runs"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30)
        assert refused.value.code in (403, 404)
    assert '"success":true' in ask(port, actions["draw"], "a house", 1, 1, 3)
    assert NEVER not in log.read_text() and "a house" not in log.read_text()


class Opened:
    """A page of the app in the browser."""

    def __init__(self, browser, port):
        self.browser = browser
        browser.get(f"http://127.0.0.1:{port}/")
        self.wait(lambda: self.all("#prompt textarea"))

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def wait(self, condition):
        """Wait until a condition holds, also if the elements it reads are missing at first or replaced meanwhile."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        not_yet = [IndexError, StaleElementReferenceException]
        return WebDriverWait(self.browser, 60, 0.1, not_yet).until(lambda _: condition())

    def tab(self, title):
        (tab,) = [each for each in self.all("button[role=tab]") if each.text == title]
        tab.click()

    def type(self, selector, text):
        (box,) = self.all(selector)
        box.clear()
        box.send_keys(text)

    def click(self, selector):
        (target,) = self.all(selector)
        target.click()

    def draw(self, prompt):
        """Draw a prompt; returns the verdicts by side and the images' URLs."""
        before = [image.get_attribute("src") for image in self.all("#pair img")]
        self.type("#prompt textarea", prompt)
        self.click("#draw")
        self.wait(lambda: len(self.sources() or before) == 2 and self.sources() != before)
        verdicts = {side: self.all(f"#pair [data-side={side}] .des-verdict")[0].text for side in ("original", "protected")}
        return verdicts, self.sources()

    def sources(self):
        return self.browser.execute_script("return [...document.querySelectorAll('#pair img')].map(image => image.src)")


@pytest.fixture(scope="module")
def page(server, browser):
    return Opened(browser, server[0])


def test_a_prompt_typed_and_clicked_draws_two_images(page, browser):
    assert page.all("#pair img") == []
    verdicts, sources = page.draw(CONCEPT)
    assert verdicts["original"].startswith("mushroom: hit, 9") and verdicts["protected"].startswith("mushroom: no hit")
    assert len(set(sources)) == 2
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('#pair img')].map(i => [i.naturalWidth, i.clientWidth, i.clientHeight])"
    )
    assert sizes[0] == sizes[1] and sizes[0][0] == 32 and sizes[0][1] == sizes[0][2] > 300
    saved = "return [...document.querySelectorAll('#pair .des-card a')].map(a => { a.onclick(); return [a.download, a.href]; })"
    assert browser.execute_script(saved) == [
        [f"{side}_seed42.png", url] for side, url in zip(("original", "protected"), sources, strict=True)
    ]
    verdicts, _ = page.draw(BENIGN)
    assert verdicts["original"].split(", ")[0] == verdicts["protected"].split(", ")[0] == "mushroom: no hit"


def caption(page):
    """The caption of the pair, and whether images and caption are dimmed."""
    opacity = "return getComputedStyle(document.querySelector('#pair .des-caption')).opacity"
    return page.all("#pair .des-caption")[0].text, float(page.browser.execute_script(opacity)) < 0.5


def test_images_have_a_caption_and_are_dimmed_while_the_page_asks_for_others(page):
    page.type("#compare-seed input", "5")
    page.draw(BENIGN)
    page.wait(lambda: caption(page) == (f"“{BENIGN}”, seed 5, 6 steps, guidance 3", False))
    page.type("#prompt textarea", "a star")
    page.wait(lambda: caption(page)[1])
    before = page.sources()
    page.all("#prompt textarea")[0].send_keys("\n")  # Enter draws
    page.wait(lambda: caption(page) == ("“a star”, seed 5, 6 steps, guidance 3", False))
    assert page.sources() != before
    page.click("#compare-random")
    page.wait(lambda: page.all("#compare-seed input")[0].get_attribute("value") != "5" and caption(page)[1])
    assert page.all("#compare-seed input")[0].get_attribute("value").isdecimal()
    page.type("#compare-seed input", "7")


def test_cancel_stops_a_long_drawing(page):
    before = page.sources()
    page.type("input[aria-label='number input for Steps']", "150")
    page.click("#draw")
    page.click("#compare-cancel")
    page.wait(lambda: [each for each in page.all(".toast-body") if "was cancelled" in each.text])
    assert page.sources() == before and caption(page)[1]
    page.type("input[aria-label='number input for Steps']", "6")


def test_a_prompt_that_is_never_drawn_gets_a_message_and_no_image(page):
    before = page.sources()
    page.type("#prompt textarea", NEVER)
    page.click("#draw")
    page.wait(lambda: [each for each in page.all(".toast-body") if "never drawn" in each.text])
    assert page.sources() == before and caption(page)[1]
    shown = "return [...document.querySelectorAll('#pair .error, .toast-title.error')].map(e => [getComputedStyle(e).fontSize, getComputedStyle(e, '::after').content])"
    assert page.browser.execute_script(shown) == [["0px", '"Not done"']] * 2


def test_a_list_gets_counts_and_a_table(page, tmp_path):
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join([CONCEPT, BENIGN, NEVER, "a star"]) + "\n")
    page.tab("Batch")
    page.all("#csv input[type=file]")[0].send_keys(str(tmp_path / "p.csv"))
    page.wait(lambda: page.all("#csv a[download]") or "p.csv" in page.all("#csv")[0].text)
    page.click("#score")
    page.wait(lambda: "%" in page.all("#counts")[0].text and page.all("#counts a"))
    text = page.all("#counts")[0].text
    assert "mushroom, original: 1/3 = 33.3% [6.1, 79.2]" in text and "mushroom, protected: 0/3 = 0.0%" in text
    assert "1 of 4 prompts are left out" in text
    page.wait(lambda: "hit" in page.all("#scores")[0].text)
    assert "p.csv, 3 prompts drawn by each model" in text
    (tmp_path / "q.csv").write_text("text\na star\n")
    page.click("#csv button[aria-label='Clear'], #csv button[aria-label='Remove this file']")
    page.wait(lambda: "%]" not in page.all("#counts")[0].text and page.all("#counts a") == [])


def test_the_map_shows_a_prompt(page):
    page.tab("Map")
    page.type("#map-prompt input, #map-prompt textarea", CONCEPT)
    page.click("#locate")
    page.wait(lambda: len(page.all("#map svg")) == 2)
    assert "Cosine" in page.all("#cosines")[0].text and "this prompt" in page.all("#map svg")[1].text
    colour = "return getComputedStyle(document.querySelector('#map svg text')).fill"
    light = page.browser.execute_script(colour)
    page.browser.execute_script("document.body.classList.add('dark')")
    assert page.browser.execute_script(colour) != light


def test_a_reload_keeps_prompt_and_seed(page):
    page.browser.refresh()
    kept = lambda selector: page.all(selector)[0].get_attribute("value")  # noqa: E731
    page.wait(lambda: (kept("#prompt textarea"), kept("#compare-seed input")) == (NEVER, "7"))


def test_the_page_asks_no_other_server_and_has_no_errors(page, browser, server):
    names = browser.execute_script("return performance.getEntries().map(entry => entry.name)")
    origin = f"http://127.0.0.1:{server[0]}/"
    assert sum(name.startswith(origin) for name in names) > 10
    assert [name for name in names if "://" in name and not name.startswith((origin, "data:", "blob:"))] == []
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_hits_stay_blurred_until_the_box_is_ticked(session, browser):
    port = free_port()
    blocks = app_page.build(session, app_page.Page([], QUICK, [], {}, "no map", True, 64))
    app_page.launch(blocks, "127.0.0.1", port)
    try:
        page, drawn = Opened(browser, port), session.draw(CONCEPT, QUICK)
        _, sources = page.draw(CONCEPT)
        assert drawn["original"].hit and not drawn["protected"].hit
        assert sources == [cards.data_url(blurred(drawn["original"].image)), cards.data_url(drawn["protected"].image)]
        page.click("#show input")
        page.wait(lambda: page.sources() != sources)
        assert page.sources() == [cards.data_url(drawn[side].image) for side in ("original", "protected")]
    finally:
        blocks.close()
