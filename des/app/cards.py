"""The HTML of the app's results: images with their verdicts, counts, and the state of an attack. Images are data URLs."""

import base64
import html
import io
from collections.abc import Sequence

from des.app.live_attack import LONGEST, Progress, meaning
from des.app.session import SIDES, ScoredImage, Scores, Session
from des.evaluation.classify import blurred

from PIL import Image


def _label(session: Session, side: str) -> str:
    """The title of a model's card; it names the text encoders that are the originals."""
    if side == "original":
        return "original"
    rest = " and ".join(map(str, session.unprotected))
    return f"with DES, but text encoder {rest} is the original" if rest else "protected by DES"


def pair_html(
    session: Session, pair: dict[str, ScoredImage] | None, blur: bool, caption: str = "", remark: str = "", seed: int = 0
) -> str:
    """The HTML of the two cards, blank if `pair` is None; with `blur`, images in which the detector fired are blurred."""
    cards = "".join(_card(session, side, pair and pair[side], blur, seed) for side in SIDES)
    lines = f"<p class='des-doubt'>{html.escape(remark)}</p>" if remark else ""
    lines += f"<p class='des-caption'>{html.escape(caption)}</p>" if caption else ""
    return f"<div class='des-pair'>{cards}</div>{lines}"


def _card(session: Session, side: str, scored: ScoredImage | None, blur: bool, seed: int, lines: Sequence[str] = ()) -> str:
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
    body += "".join(f"<p class='des-line'>{html.escape(line)}</p>" for line in lines)
    return f"<figure class='des-card' data-side='{side}'><figcaption>{_label(session, side)}</figcaption>{body}</figure>"


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


def attack_html(session: Session, progress: Progress, title: str, seed: int) -> str:
    """The HTML of a search's state: its `title` and number of steps, a card for each model and, at the end, what the result means."""
    cards = []
    for side in SIDES:
        before, found = progress.before[side], progress.found.get(side)
        lines = [f"Best prompt: “{found.text}”", f"Loss: {found.loss:.4f}"] if found else []
        lines += [f"Before the search: “{words}”" for words in session.all_words(before)] if before else []
        lines += ["This prompt is never drawn."] if progress.drawn and not found.image else []
        cards.append(_card(session, side, found.image if progress.drawn else before, False, seed, lines))
    steps = f"{progress.step} of {progress.steps} steps on both models"
    images = f"of step {progress.drawn}" if progress.drawn else "of the starting prompt"
    states = {
        "": f"Step {progress.step} of {progress.steps} on both models, {progress.seconds:.0f} s. The images are {images}.",
        "all steps": f"All {progress.steps} steps on both models took {progress.seconds:.0f} s.",
        "time limit": f"The limit of {LONGEST:.0f} s ended the search after {steps}.",
        "stopped": f"The search was stopped after {steps}, {progress.seconds:.0f} s.",
    }
    top, below = [title, states[progress.end]], meaning(progress) if progress.end else []
    above, under = ("".join(f"<p class='des-caption'>{html.escape(line)}</p>" for line in lines) for lines in (top, below))
    return f"{above}<div class='des-pair des-below'>{''.join(cards)}</div>{under}"
