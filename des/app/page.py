"""The app's page, in Gradio. Images and scores are sent inside the page, so none is written to the server's disk."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from des.app.session import LONGEST_PROMPT, SIDES, PromptMap, Sampling, ScoredImage, Scores, Session
from des.evaluation.classify import blurred
from des.report import figures
from des.utils.choices import MOST_GUIDANCE, MOST_STEPS
from des.utils.errors import UserError

import gradio as gr
import torch
from PIL import Image

LABELS = {"original": "original", "protected": "protected by DES"}
LARGEST_UPLOAD = "5mb"
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}  # the two pipelines share their scheduler
BUTTON, BUTTON_HOVER = "#006b4f", "#00543e"
NO_COUNTS = "<p class='des-note'>Counts before and after, k/n with Wilson's 95% interval.</p>"
STYLE = """
.des-pair { display: flex; flex-wrap: wrap; gap: 16px; }
.des-card { flex: 1 1 220px; max-width: 512px; margin: 0; padding: 12px; border-radius: 10px;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill); color: var(--body-text-color); }
.des-card figcaption { margin-bottom: 8px; font-weight: 600; }
.des-card img, .des-blank { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; }
.des-blank { background: var(--background-fill-secondary); border: 1px dashed var(--border-color-primary); }
.des-verdict { display: block; width: fit-content; margin-top: 10px; padding: 3px 12px; border-radius: 999px; color: #fff;
  font-size: 14px; font-weight: 600; }
.des-hit { background: #b34700; }
.des-miss { background: #006b4f; }
.des-none { background: #5c5c5c; }
.des-card a { display: block; width: fit-content; margin-top: 8px; font-size: 14px; }
.des-caption { margin: 10px 0 0; color: var(--body-text-color); overflow-wrap: anywhere; }
.des-doubt { margin: 6px 0; padding: 8px 12px; border-left: 4px solid #b34700; color: var(--body-text-color); font-weight: 600; }
.des-stale .des-pair, .des-stale .des-doubt, .des-stale .des-caption { opacity: 0.35; }
.des-stale .des-caption::before { content: "Earlier images: "; font-weight: 600; }
#pair .error, #counts .error, #map .error, .toast-title.error { font-size: 0; }
#pair .error::after, #counts .error::after, #map .error::after, .toast-title.error::after { content: "Not done"; font-size: 14px; }
.des-maps { display: flex; flex-wrap: wrap; gap: 16px; padding-top: 8px;
  --ink: var(--body-text-color); --muted: var(--body-text-color); --paper: var(--background-fill-primary); --grid: var(--border-color-primary);
  --series-0: #0072b2; --series-1: #c25100; --series-2: #00825f; --series-3: #a3467f; }
.dark .des-maps { --series-0: #56b4e9; --series-1: #f28a3c; --series-2: #2fc498; --series-3: #dd8abf; }
.des-maps svg { flex: 1 1 280px; min-width: 0; max-width: 560px; height: auto; overflow: visible; }
@media (max-width: 480px) { .des-maps { margin: 0 -12px; } .des-maps text { font-size: 11px !important; } }
.des-note, .des-about { color: var(--body-text-color); opacity: 0.8; font-size: 14px; }
.des-counts { font-size: 16px; line-height: 1.7; font-variant-numeric: tabular-nums; }
.des-page h1 { font-size: 24px; font-weight: 700; margin-bottom: 2px; }
.des-page h1, .des-counts { color: var(--body-text-color); }
.des-page a, .des-card a { padding: 0; color: var(--link-text-color); text-decoration: underline; }
"""


@dataclass(frozen=True)
class Page:
    """Texts and initial values of the page; `prompt_map` is the map, or a sentence that says how to get one."""

    about: list[str]  # lines below the title
    defaults: Sampling
    doubts: Sequence[str]  # reasons why the checkpoint may not protect
    examples: Mapping[str, str]  # prompts by what they are an example of
    prompt_map: PromptMap | str
    blur_hits: bool  # blur images in which the detector fired until the user asks to see them
    most_rows: int  # drawn from an uploaded prompt list
    remark: Callable[[str], str] = lambda prompt: ""  # a sentence about a prompt for the caption of its images, or nothing


def show_errors(action: Callable) -> Callable:
    """Show errors that the user can fix as a message on the page, and do not log them, since they may quote a prompt."""

    @wraps(action)
    def call(*args: Any) -> Any:
        try:
            return action(*args)
        except UserError as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "memory ran out on the server; ask for a smaller --batch_size, or start the app on another --device"
        raise gr.Error(reason, title="Not done", duration=None, print_exception=False)

    return call


def build(session: Session, page: Page) -> gr.Blocks:
    """Build the page with its three tabs."""
    with gr.Blocks(title="DES, before and after", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        about = "<br>".join(page.about)
        doubts = "".join(f"<p class='des-doubt'>WHICH MAY NOT PROTECT IT: {html.escape(doubt)}.</p>" for doubt in page.doubts)
        gr.HTML(f"<div class='des-page'><h1>DES, before and after</h1><div class='des-about'>{about}</div>{doubts}</div>")
        with gr.Tab("Compare"):
            kept = _compare(session, page)
        with gr.Tab("Batch"):
            _batch(session, page)
        with gr.Tab("Map"):
            _map(page)
        restore = "(...values) => JSON.parse(sessionStorage.getItem('des-compare')) ?? values"  # after a reload
        blocks.load(None, kept, kept, js=restore, api_visibility="private")
    return blocks.queue(max_size=32, api_open=False, default_concurrency_limit=1)


def launch(blocks: gr.Blocks, host: str, port: int) -> None:
    """Serve the page in background threads, without a tunnel, API pages or a history of prompts. UserError if the port is taken."""
    try:
        blocks.launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, show_error=False,
            footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
            strict_cors=True, max_file_size=LARGEST_UPLOAD, theme=theme(), css=STYLE,
            app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        )  # fmt: skip
    except OSError:
        reason = "the port is in use, or the address is not one of this machine"
        raise UserError(f"{host}:{port} could not be opened: {reason}; choose another --port or --host") from None


def theme() -> gr.themes.Base:
    """Gradio's default theme with the system's fonts and a button of high contrast."""
    plain = gr.themes.Default(
        primary_hue="emerald", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    fills = {"button_primary_background_fill": BUTTON, "button_primary_background_fill_hover": BUTTON_HOVER}
    return plain.set(**fills, **{f"{name}_dark": fill for name, fill in fills.items()}, button_primary_text_color="white")


class _Cancelling:
    """Stops what a page draws when its user asks for it. Gradio's own `cancels` would leave the model drawing."""

    def __init__(self, name: str):
        """Add the button that asks, to the block that is being built."""
        self._sessions: set[str] = set()  # pages that asked
        button = gr.Button("Cancel", min_width=80, elem_id=f"{name}-cancel")
        button.click(self.ask, queue=False, api_visibility="private")

    def ask(self, request: gr.Request) -> None:
        self._sessions.add(request.session_hash)

    def forget(self, request: gr.Request) -> None:
        """Forget what was asked before; to be called when the user starts something."""
        self._sessions.discard(request.session_hash)

    def check(self, request: gr.Request) -> Callable[[], None]:
        """A function that raises UserError once the page of `request` has asked."""

        def check() -> None:
            if request.session_hash in self._sessions:
                raise UserError("the drawing was cancelled")

        return check


def _compare(session: Session, page: Page) -> list[gr.components.Component]:
    """Build the tab; returns the inputs that a reload keeps."""
    drawn = gr.State(None, time_to_live=3600)

    def draw(prompt: str, seed: int, steps: int, guidance: float, request: gr.Request) -> tuple[tuple, bool, str]:
        sampling = replace(page.defaults, seed=seed, num_inference_steps=steps, guidance_scale=guidance)
        pair = session.draw(prompt, sampling, cancelling.check(request))
        caption = f"“{prompt}”, seed {seed}, {steps} steps, guidance {guidance:g}"
        state = pair, caption, page.remark(prompt), seed
        return state, False, pair_html(session, pair, page.blur_hits, *state[1:])

    def show(state: tuple[dict, str, str, int] | None, unblurred: bool) -> str:
        pair, *texts = state or (None,)
        return pair_html(session, pair, page.blur_hits and not unblurred, *texts)

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            # with lines=1, Enter submits and Shift+Enter starts a new line
            prompt = gr.Textbox(label="Prompt", lines=1, max_lines=4, max_length=LONGEST_PROMPT, elem_id="prompt")
            with gr.Row():
                button = gr.Button("Draw both", variant="primary", scale=3, elem_id="draw")
                cancelling = _Cancelling("compare")
            if page.examples:
                labels = [f"{kind}: {text}" for kind, text in page.examples.items()]
                prompts = [[text] for text in page.examples.values()]
                gr.Examples(prompts, prompt, cache_examples=False, example_labels=labels, api_visibility="private")
            inputs = [prompt, *_sampling(page.defaults, "compare")]
            box = gr.Checkbox(False, label="Show images in which the detector fired", visible=page.blur_hits, elem_id="show")
        with gr.Column(scale=4, min_width=480):
            pair = gr.HTML(pair_html(session, None, False), elem_id="pair")
    for each in inputs:  # dim the images while they do not match the inputs
        each.change(None, js=_stale("add"), api_visibility="private")
    keep = "(...values) => sessionStorage.setItem('des-compare', JSON.stringify(values))"
    gr.on([prompt.change, inputs[1].change], None, inputs[:2], js=keep, api_visibility="private")
    started = gr.on([button.click, prompt.submit], cancelling.forget, queue=False, api_visibility="private")
    event = started.then(
        show_errors(draw), inputs, [drawn, box, pair], show_progress_on=pair, api_visibility="private", **ONE_AT_A_TIME
    )
    event.success(None, js=_stale("remove"), api_visibility="private")
    event.failure(None, js=_stale("add"), api_visibility="private")
    box.input(show_errors(show), [drawn, box], pair, api_visibility="private")
    return inputs[:2]


def _stale(action: str) -> str:
    return (
        f"() => {{ if (document.querySelector('#pair img')) document.getElementById('pair').classList.{action}('des-stale'); }}"
    )


def _batch(session: Session, page: Page) -> None:
    def score(
        path: str | None, seed: int, steps: int, guidance: float, request: gr.Request, progress: gr.Progress = gr.Progress()  # noqa: B008
    ) -> tuple:  # fmt: skip
        if path is None:
            raise UserError("choose a CSV first")

        def report_progress(done: int, total: int) -> None:
            progress((done, total), desc="drawing and scoring", unit="rows")

        sampling = replace(page.defaults, seed=seed, num_inference_steps=steps, guidance_scale=guidance)
        scores = session.score(Path(path), sampling, page.most_rows, report_progress, cancelling.check(request))
        return scores_html(scores), gr.update(value=scores.table, visible=True)

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            file = gr.File(label="CSV with a column prompt", file_types=[".csv"], height=140, elem_id="csv")
            rows = f"The first {page.most_rows} rows are drawn, row i from seed + i. No image is kept."
            gr.HTML(f"<p class='des-note'>{rows}</p>")
            with gr.Row():
                button = gr.Button("Draw and score", variant="primary", scale=3, elem_id="score")
                cancelling = _Cancelling("batch")
            inputs = [file, *_sampling(page.defaults, "batch")]
        with gr.Column(scale=4, min_width=480):
            counts = gr.HTML(NO_COUNTS, elem_id="counts")
            table = gr.Dataframe(label="Rows", interactive=False, visible=False, elem_id="scores")

    def clear(request: gr.Request) -> tuple:
        cancelling.forget(request)
        return NO_COUNTS, gr.update(value=None, visible=False)

    file.change(clear, None, [counts, table], api_visibility="private")
    button.click(clear, None, [counts, table], api_visibility="private").then(
        show_errors(score), inputs, [counts, table], show_progress_on=counts, api_visibility="private", **ONE_AT_A_TIME
    )


def _map(page: Page) -> None:
    if isinstance(page.prompt_map, str):
        gr.Markdown(page.prompt_map, elem_id="no-map")
        return
    prompt_map = page.prompt_map

    def locate(prompt: str) -> tuple:
        position = prompt_map.locate(prompt)
        text = (
            f"Cosine to the original model's concept: {position.concept_before:.3f} before, {position.concept_after:.3f} after. "
            f"Cosine of this prompt before and after: {position.own:.3f}."
        )
        maps = figures.maps(prompt_map.space, "map", "with this prompt", {"this prompt": position.points})
        return f"<div class='des-maps'>{''.join(maps)}</div>", f"<div class='des-counts'>{text}</div>"

    with gr.Row(equal_height=True):
        prompt = gr.Textbox(label="Prompt", max_length=LONGEST_PROMPT, scale=4, elem_id="map-prompt")
        button = gr.Button("Find on the map", variant="primary", scale=1, elem_id="locate")
    note = "Two principal components of the prompts that DES was trained on, by both encoders. The first map takes a while."
    cosines = gr.HTML(f"<p class='des-note'>{note}</p>", elem_id="cosines")
    figure = gr.HTML(elem_id="map")
    gr.on(
        [button.click, prompt.submit], show_errors(locate), prompt, [figure, cosines],
        show_progress_on=figure, api_visibility="private", **ONE_AT_A_TIME,
    )  # fmt: skip


def _sampling(defaults: Sampling, name: str) -> tuple[gr.Number, gr.Slider, gr.Slider]:
    with gr.Accordion("Sampling", open=True):
        seed = gr.Number(defaults.seed, label="Seed", precision=0, minimum=0, elem_id=f"{name}-seed")
        button = gr.Button("Random seed", size="sm", elem_id=f"{name}-random")
        button.click(None, None, seed, js="() => Math.floor(Math.random() * 2 ** 31)", api_visibility="private")
        return (
            seed,
            gr.Slider(1, MOST_STEPS, defaults.num_inference_steps, step=1, precision=0, label="Steps"),
            gr.Slider(0, MOST_GUIDANCE, defaults.guidance_scale, step=0.1, label="Guidance"),
        )


def pair_html(
    session: Session, pair: dict[str, ScoredImage] | None, blur: bool, caption: str = "", remark: str = "", seed: int = 0
) -> str:
    """The HTML of the two cards, blank if `pair` is None; with `blur`, images in which the detector fired are blurred."""
    cards = "".join(_card(session, side, pair and pair[side], blur, seed) for side in SIDES)
    lines = f"<p class='des-doubt'>{html.escape(remark)}</p>" if remark else ""
    lines += f"<p class='des-caption'>{html.escape(caption)}</p>" if caption else ""
    return f"<div class='des-pair'>{cards}</div>{lines}"


def _card(session: Session, side: str, scored: ScoredImage | None, blur: bool, seed: int) -> str:
    if scored is None:
        body = "<div class='des-blank'></div>"
    else:
        hidden = blur and scored.hit
        image = blurred(scored.image) if hidden else scored.image
        alt = f"{'blurred image' if hidden else 'image'} by the {side} model"
        chips = [
            (f"des-{'hit' if finding['hit'] else 'miss'}", session.words(verdict, finding))
            for verdict, finding in scored.findings.items()
        ] or [("des-none", "no detector")]
        body = f"<img src='{data_url(image)}' alt='{alt}'>"
        body += "".join(f"<span class='des-verdict {kind}'>{html.escape(text)}</span>" for kind, text in chips)
        save = 'this.href = this.parentElement.querySelector("img").src'  # so that the page holds the image once
        body += "" if hidden else f"<a href='#' download='{side}_seed{seed}.png' onclick='{save}'>Download the image</a>"
    return f"<figure class='des-card' data-side='{side}'><figcaption>{LABELS[side]}</figcaption>{body}</figure>"


def data_url(image: Image.Image) -> str:
    """An image as a data URL of a PNG."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def scores_html(scores: Scores) -> str:
    """The HTML of counts, notes, and a link that downloads the table as a CSV."""
    content = base64.b64encode(scores.table.to_csv(index=False).encode()).decode()
    link = f"<a download='scores.csv' href='data:text/csv;base64,{content}'>Download the scores, by row and without prompts</a>"
    notes = "".join(f"<p class='des-note'>{html.escape(note)}</p>" for note in scores.notes)
    lines = "<br>".join(map(html.escape, (f"{scores.file}, {len(scores.table)} prompts drawn by each model", *scores.lines)))
    return f"<div class='des-page'><div class='des-counts'>{lines}</div>{notes}<p>{link}</p></div>"
