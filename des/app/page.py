"""The app's page, in Gradio. Images and scores are sent inside the page, so none is written to the server's disk."""

import html
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from des.app.cards import attack_html, pair_html, scores_html
from des.app.live_attack import LONGEST, SEARCHES, LiveAttack
from des.app.session import LONGEST_PROMPT, PromptMap, Sampling, Session
from des.report import figures
from des.utils.choices import MOST_GUIDANCE, MOST_STEPS
from des.utils.errors import UserError

import gradio as gr
import torch

LARGEST_UPLOAD = "5mb"
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}  # the two pipelines share their scheduler
PAUSE = 0.2  # seconds between two updates of a running attack, unless it has new images
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
.des-below { margin-top: 12px; }
#attack-row input { padding-right: 28px; text-overflow: ellipsis; }
.des-line { margin: 8px 0 0; font-size: 14px; overflow-wrap: anywhere; }
.des-caption { margin: 10px 0 0; color: var(--body-text-color); overflow-wrap: anywhere; }
.des-doubt { margin: 6px 0; padding: 8px 12px; border-left: 4px solid #b34700; color: var(--body-text-color); font-weight: 600; }
.des-stale .des-pair, .des-stale .des-doubt, .des-stale .des-caption { opacity: 0.35; }
.des-stale .des-caption::before { content: "Earlier images: "; font-weight: 600; }
#pair .error, #counts .error, #map .error, #attack .error, .toast-title.error { font-size: 0; }
#pair .error::after, #counts .error::after, #map .error::after, #attack .error::after, .toast-title.error::after { content: "Not done"; font-size: 14px; }
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
    attack: LiveAttack | None = None  # without one, the page has neither the tab nor its actions


@contextmanager
def show_errors() -> Iterator[None]:
    """Show errors that the user can fix as a message on the page, and do not log them, since they may quote a prompt."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError) as error:
        memory = "the server ran out of memory; start the app with a smaller --batch_size or on another --device"
        reason = str(error) if isinstance(error, UserError) else memory
        raise gr.Error(reason, title="Not done", duration=None, print_exception=False) from None


def build(session: Session, page: Page) -> gr.Blocks:
    """Build the page with its three tabs, and a fourth one if it has an attack."""
    with gr.Blocks(title="DES, before and after", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        about = "<br>".join(page.about)
        doubts = "".join(
            f"<p class='des-doubt'>WARNING: THE MODEL MAY NOT BE PROTECTED. {html.escape(doubt)}.</p>" for doubt in page.doubts
        )
        gr.HTML(f"<div class='des-page'><h1>DES, before and after</h1><div class='des-about'>{about}</div>{doubts}</div>")
        with gr.Tab("Compare"):
            kept = _compare(session, page)
        with gr.Tab("Batch"):
            _batch(session, page)
        with gr.Tab("Map"):
            _map(page)
        if page.attack:
            with gr.Tab("Attack"):
                _attack(page.attack, session, page.defaults)
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

    def __init__(self, name: str, text: str = "Cancel"):
        """Add the button that asks, to the block that is being built."""
        self._sessions: set[str] = set()  # pages that asked
        button = gr.Button(text, min_width=80, elem_id=f"{name}-cancel")
        button.click(self.ask, queue=False, api_visibility="private")

    def ask(self, request: gr.Request) -> None:
        self._sessions.add(request.session_hash)

    def forget(self, request: gr.Request) -> None:
        """Forget what was asked before; to be called when the user starts something."""
        self._sessions.discard(request.session_hash)

    def asked(self, request: gr.Request) -> bool:
        """Whether the page of `request` has asked."""
        return request.session_hash in self._sessions

    def check(self, request: gr.Request) -> Callable[[], None]:
        """A function that raises UserError once the page of `request` has asked."""

        def check() -> None:
            if self.asked(request):
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
        show_errors()(draw), inputs, [drawn, box, pair], show_progress_on=pair, api_visibility="private", **ONE_AT_A_TIME
    )
    event.success(None, js=_stale("remove"), api_visibility="private")
    event.failure(None, js=_stale("add"), api_visibility="private")
    box.input(show_errors()(show), [drawn, box], pair, api_visibility="private")
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
            file = gr.File(label="CSV with a column named prompt", file_types=[".csv"], height=140, elem_id="csv")
            rows = f"The first {page.most_rows} rows are drawn, row i from seed + i (or seed + source_row). No image is kept."
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
        show_errors()(score), inputs, [counts, table], show_progress_on=counts, api_visibility="private", **ONE_AT_A_TIME
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
        [button.click, prompt.submit], show_errors()(locate), prompt, [figure, cosines],
        show_progress_on=figure, api_visibility="private", **ONE_AT_A_TIME,
    )  # fmt: skip


def _attack(attack: LiveAttack, session: Session, defaults: Sampling) -> None:
    def search(name: str, row: int, seed: int, request: gr.Request) -> Iterator[str]:
        shown, pair = 0.0, None
        with show_errors():
            for progress in attack.run(name, row, seed, lambda: stopping.asked(request)):
                drawn = [each.image for each in progress.found.values()]
                if progress.end or drawn != pair or time.monotonic() - shown > PAUSE:
                    shown, pair = time.monotonic(), drawn
                    yield attack_html(session, progress, f"{name.capitalize()} for “{attack.targets[row]}”, seed {seed}", seed)

    about = (
        f"An opponent who has the weights of the protected text encoder can search for input that still leads to the concept. This tab runs such a search "
        f"on the protected model and, as its control, on the original model, with the same number of steps and for {LONGEST:.0f} s at most. The starting "
        f"prompt and the prompts that are found do not contain the word “{', '.join(attack.words)}”."
    )
    gr.HTML(f"<p class='des-note'>{html.escape(about)}</p>")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            names = gr.Radio(
                [(each.capitalize(), each) for each in SEARCHES],
                value=next(iter(SEARCHES)),
                label="Attack",
                elem_id="attack-name",
            )
            rows = [(attack.targets[row], row) for row in attack.rows]
            row = gr.Dropdown(rows, value=attack.rows[0], label="Prompt that the attack aims at", elem_id="attack-row")
            seed = _seed(defaults, "attack")
            with gr.Row():
                button = gr.Button("Start the attack", variant="primary", scale=3, elem_id="attack-start")
                stopping = _Cancelling("attack", "Stop")
            with gr.Accordion("What the attacks do", open=False):
                gr.HTML(
                    "".join(
                        f"<p class='des-note'><b>{name.capitalize()}.</b> {html.escape(each.explanation)}</p>"
                        for name, each in SEARCHES.items()
                    )
                )
        with gr.Column(scale=4, min_width=480):
            result = gr.HTML(pair_html(session, None, False), elem_id="attack")
    gr.on(button.click, stopping.forget, queue=False, api_visibility="private").then(
        search, [names, row, seed], result, show_progress_on=result, api_visibility="private", **ONE_AT_A_TIME
    )


def _seed(defaults: Sampling, name: str) -> gr.Number:
    seed = gr.Number(defaults.seed, label="Seed", precision=0, minimum=0, elem_id=f"{name}-seed")
    button = gr.Button("Random seed", size="sm", elem_id=f"{name}-random")
    button.click(None, None, seed, js="() => Math.floor(Math.random() * 2 ** 31)", api_visibility="private")
    return seed


def _sampling(defaults: Sampling, name: str) -> tuple[gr.Number, gr.Slider, gr.Slider]:
    with gr.Accordion("Sampling", open=True):
        return (
            _seed(defaults, name),
            gr.Slider(1, MOST_STEPS, defaults.num_inference_steps, step=1, precision=0, label="Steps"),
            gr.Slider(0, MOST_GUIDANCE, defaults.guidance_scale, step=0.1, label="Guidance"),
        )
