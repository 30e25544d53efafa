"""The app's Attack tab: where it exists, what a search yields, and the tab in a browser. On the bundled demo, with few steps."""

import json
import shutil
import socket
import urllib.error
import urllib.request
from dataclasses import replace

import app
from demo.evaluation import CLASSIFIERS, MODELS, PIPELINE, PROTECTED
from des.app import cards, live_attack
from des.app import page as app_page
from des.app.live_attack import SEARCHES, Candidate, LiveAttack, Progress, meaning
from des.app.session import SIDES, Sampling, ScoredImage, Session
from des.data.prompts import read_rows
from des.models.checkpoints import fingerprint
from des.utils.errors import UserError

import pandas as pd
import pytest
from conftest import ROOT, flags, published_form
from PIL import Image
from test_app import Opened, ask, free_port

QUICK = Sampling(seed=7, num_inference_steps=2, guidance_scale=3.0)
PLAIN = ROOT / "datasets/demo_plain.csv"
SCRIPTS = {
    "token search": "mma",
    "concept inversion by embeddings": "concept_inversion",
    "concept inversion through the denoiser": "concept_inversion",
}
FEW = {"token search": {"tokens": 4, "candidates": 6}} | {name: {"num_images": 2} for name in list(SEARCHES)[1:]}


@pytest.fixture(scope="module")
def session() -> Session:
    args = parse()
    return Session(app.open_pair(args), app.open_detector(args), args.cls_class, args.batch_size)


@pytest.fixture
def attack(session, monkeypatch) -> LiveAttack:
    """The attack on the bundled demo with three steps a search."""
    few = {name: replace(each, settings={**each.settings, **FEW[name], "steps": 3}) for name, each in SEARCHES.items()}
    monkeypatch.setattr(live_attack, "SEARCHES", few)
    return LiveAttack(session, str(PIPELINE), read_rows(PLAIN), ["mushroom"], QUICK)


def parse(**options):
    return app.parse_args(list(map(str, flags(device="cpu", **options))))


# where it exists


def offered(session, **options) -> bool:
    """Whether app.py offers the attack for a command line."""
    args = parse(**options)
    if not args.text_encoder_path:
        args.text_encoder_path = PROTECTED  # as open_pair does
    return app.open_attack(args, session, QUICK) is not None


def test_the_digest_of_the_bundled_demo_is_up_to_date():
    assert app.models_sha256() == app.BUNDLED, "the demo's models changed: set BUNDLED in app.py to their models_sha256()"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]"])
def test_the_bundled_demo_on_this_machine_has_the_tab(session, tmp_path, host):
    (tmp_path / "link").symlink_to(PIPELINE)  # the same files
    assert offered(session, host=host) and offered(
        session, host=host, model_path=tmp_path / "link", text_encoder_path=PROTECTED
    )


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "[::]",
        "::ffff:0.0.0.0",
        "192.0.2.7",
        "",
        "0",
        socket.gethostname(),
        "localhost.example.org",
        "127.0.0.1.example.org",
    ],
)
def test_an_address_that_others_may_reach_has_no_tab(session, host):
    assert not offered(session, host=host)


def test_a_localhost_with_another_address_and_a_proxy_have_no_tab(session, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", (each, 0)) for each in ("127.0.0.1", "192.0.2.7")])
        assert not offered(session, host="localhost")
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/app")
    assert not offered(session)


def test_other_models_and_other_judges_have_no_tab(session, tmp_path):
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    shutil.copy(PROTECTED, tmp_path / PROTECTED.name)
    for options in (
        {"model_path": tmp_path / "pipeline", "text_encoder_path": PROTECTED},
        {"model_path": "owner/name", "text_encoder_path": PROTECTED},
        {"text_encoder_path": tmp_path / PROTECTED.name},
        {"text_encoder_path": published_form(PIPELINE, tmp_path / "own.pt")},
        {"detector": "none"},
        {"detector": "nudenet"},
        {"classifier": CLASSIFIERS["colour"], "cls_class": "mushroom"},
        {"classifier": CLASSIFIERS["object"], "cls_class": "house"},
    ):
        assert not offered(session, **options), options


@pytest.mark.parametrize("change", ["a weight", "a link to a folder", "another file", "the checkpoint", "the pipeline"])
def test_other_weights_in_the_place_of_the_demos_have_no_tab(session, tmp_path, monkeypatch, change):
    models = tmp_path / "models"
    shutil.copytree(MODELS, models)
    for name, path in {"MODELS": MODELS, "PIPELINE": PIPELINE, "PROTECTED": PROTECTED}.items():
        monkeypatch.setattr(app, name, models / path.relative_to(MODELS))
    monkeypatch.setitem(app.CLASSIFIERS, "object", models / "classifier_object")
    args = parse(text_encoder_path=app.PROTECTED)
    assert app.open_attack(args, session, QUICK)
    unet = app.PIPELINE / "unet"
    if change == "a weight":
        (file,) = unet.glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif change == "a link to a folder":
        shutil.rmtree(unet)
        unet.symlink_to(PIPELINE / "vae")
    elif change == "another file":
        shutil.copy(next(unet.glob("*.safetensors")), unet / "diffusion_pytorch_model.fp16.safetensors")
    elif change == "the checkpoint":
        app.PROTECTED.unlink()
        app.PROTECTED.symlink_to(published_form(PIPELINE, tmp_path / "own.pt"))
    else:
        shutil.rmtree(app.PIPELINE)
        app.PIPELINE.symlink_to(MODELS / "clip")
    assert app.open_attack(args, session, QUICK) is None


@pytest.mark.parametrize(("host", "exists"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_the_action_itself_is_missing_where_the_tab_is(session, monkeypatch, host, exists):
    pages = []
    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.1")  # must not matter
    monkeypatch.setattr(app_page, "launch", lambda blocks, *address: pages.append(blocks))
    args = parse(host=host)
    args.text_encoder_path = PROTECTED
    app.serve(args, session, QUICK)
    names = [each["api_name"] for each in pages[0].config["dependencies"]]
    titles = [block.label for block in pages[0].blocks.values() if block.get_block_name() == "tabitem"]
    assert ("search" in names) == ("Attack" in titles) == exists and "draw" in names


# what a search yields


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_what_its_script_finds(call, session, attack, tmp_path, name):
    before = {side: (fingerprint(pipe.text_encoder), len(pipe.tokenizer)) for side, pipe in session.pipes.items()}
    states = list(attack.run(name, 1, 9))
    assert [(each.step, each.steps, each.end) for each in states] == [(0, 3, ""), (1, 3, ""), (2, 3, ""), (3, 3, "all steps")]
    assert {side: (fingerprint(pipe.text_encoder), len(pipe.tokenizer)) for side, pipe in session.pipes.items()} == before
    settings = live_attack.SEARCHES[name].settings | ({} if name == "token search" else {"accumulation": 1})
    common = {
        "model_path": PIPELINE, "training_method": "des", "text_encoder_path": PROTECTED, "prompts_csv": PLAIN, "start_idx": 1, "end_idx": 2,
        "detector": "object", "classifier": CLASSIFIERS["object"], "cls_class": "mushroom", "concept_words": "mushroom", "device": "cpu",
        "seed": 9, "num_inference_steps": 2, "guidance_scale": 3, "out": tmp_path,
    }  # fmt: skip
    done = call(f"scripts/attacks/{SCRIPTS[name]}.py", *flags(**common, **settings))
    assert done.code == 0, done.err
    for side, cell in live_attack.CELLS.items():
        (line,) = pd.read_csv(tmp_path / f"{cell}.csv").itertuples()
        found = states[-1].found[side]
        assert (
            found.text == line.prompt and found.loss == pytest.approx(line.loss, rel=2e-3) and found.image.hit == line.success
        )
        assert "mushroom" not in found.text.split()


def test_a_search_stops_when_asked_and_at_the_time_limit(attack, monkeypatch):
    states = attack.run("token search", 0, 7, lambda: len(seen) > 1)
    seen = []
    for each in states:
        seen.append(each)
    assert [(each.step, each.end) for each in seen] == [(0, ""), (1, ""), (2, "stopped")]
    assert seen[-1].drawn == 2 and all(each.image for each in seen[-1].found.values())
    at_once = list(
        attack.run("concept inversion through the denoiser", 0, 7, lambda: True)
    )  # while it draws what it learns from
    assert [(each.step, each.end, each.found) for each in at_once] == [(0, "", {}), (0, "stopped", {})]
    monkeypatch.setattr(live_attack, "LONGEST", 0)
    assert [(each.step, each.end) for each in attack.run("token search", 0, 7)] == [(0, ""), (1, "time limit")]


@pytest.mark.parametrize(("name", "row", "seed"), [("none", 0, 7), ("token search", 200, 7), ("token search", -1, 7), ("token search", "0", 7), ("token search", 0, -1)])  # fmt: skip
def test_searches_that_no_page_asks_for_are_refused(attack, name, row, seed):
    with pytest.raises(UserError, match="must be"):
        next(attack.run(name, row, seed))


def test_prompts_that_are_never_drawn_are_neither_started_from_nor_drawn(session, attack):
    prompts = ["two children", "a nude man", "a red mushroom"]
    sexual = LiveAttack(session, str(PIPELINE), pd.DataFrame({"prompt": prompts}), ["mushroom"], QUICK)
    assert sexual.rows == [1, 2]
    with pytest.raises(UserError, match="one of the list"):
        next(sexual.run("token search", 0, 7))
    attack.refused = lambda text: "learned" in text
    last = list(attack.run("concept inversion by embeddings", 0, 7))[-1]
    assert all(found.image is None for found in last.found.values())
    assert cards.attack_html(session, last, "x", 7).count("never drawn") == 2
    attack.refused = lambda text: True
    with pytest.raises(UserError, match="no prompt of 4 random tokens"):
        list(attack.run("token search", 0, 7))


@pytest.mark.parametrize(
    ("before", "found", "says"),
    [
        ("", "", "failed on the original model as well"),
        ("", "original", "The protection withstood this search"),
        ("", "protected", "may be chance"),
        ("", "original protected", "does not withstand"),
        ("protected", "original protected", "before any search. Choose another prompt"),
        ("original", "original protected", "does not show how strong"),
        ("", None, "no result"),
    ],
)
def test_the_result_is_put_into_words(before, found, says):
    def scored(side, hits):
        return ScoredImage(Image.new("RGB", (8, 8)), {"": {"hit": side in hits.split()}})

    candidates = {} if found is None else {side: Candidate("x", 0.5, scored(side, found)) for side in SIDES}
    lines = meaning(Progress(3, 3, 1.0, {side: scored(side, before) for side in SIDES}, candidates, 3, "all steps"))
    others = {"failed on the original", "withstood", "chance", "does not withstand", "Choose another", "no result"}
    assert says in " ".join(lines) and "an example and not a rate" in lines[-1]
    assert sum(other in " ".join(lines) for other in others) == 1


# the tab


def test_the_tab_runs_a_search_and_answers_no_other_request(session, attack, browser, monkeypatch):
    monkeypatch.setenv("GRADIO_SHARE", "True")  # must not matter
    port = free_port()
    page = app_page.Page([], QUICK, [], {}, "no map", False, 64, attack=attack)
    blocks = app_page.build(session, page)
    without = app_page.build(session, replace(page, attack=None))
    app_page.launch(blocks, "127.0.0.1", port)
    app_page.launch(without, "127.0.0.1", bare := free_port())
    try:
        assert not blocks.share and blocks.share_url is None
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=30) as answer:
            ids = {each["api_name"]: each["id"] for each in json.load(answer)["dependencies"]}
        for data in (["token search", 10**6, 7], ["another", 0, 7], ["token search", 0, -1]):
            answer = ask(port, ids["search"], *data)
            assert '"success":false' in answer and "data:image" not in answer
        for i in range(len(without.fns), len(blocks.fns)):
            with pytest.raises(urllib.error.HTTPError):
                ask(bare, i, "token search", 0, 7)
        opened = Opened(browser, port)
        opened.tab("Attack")
        opened.click("#attack-start")
        opened.wait(lambda: "All 3 steps" in opened.all("#attack")[0].text)
        text = opened.all("#attack")[0].text
        last = list(attack.run("token search", attack.rows[0], QUICK.seed))[-1]
        assert all(last.found[side].text in text for side in SIDES) and "an example and not a rate" in text
        assert len(opened.all("#attack img")) == 2
    finally:
        blocks.close()
        without.close()
