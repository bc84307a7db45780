"""The walk-through of the first run: a picture at once, then one's own, then a real model."""

from dataclasses import dataclass

from qwen_image_tool.app import Advice
from qwen_image_tool.catalog import DEFAULT_MODEL
from qwen_image_tool.service import Service
from qwen_image_tool.types import Request
from qwen_image_tool.ui.kit import button, sentence, size_text, text, time_text
from qwen_image_tool.ui.words import Words

FIRST_PROMPT = "a red circle left of a blue square on a yellow background"


@dataclass(frozen=True)
class Steps:
    """How far a newcomer is. `advice`: the model for this computer; None where it is not known yet
    or none runs."""

    pictures: int
    advice: Advice | None
    name: str = ""
    licence: str = ""
    commercial: bool = True


def steps(service: Service) -> Steps | None:
    """None once there is a real model, or the walk-through was put away."""
    if service.remembered().get("welcomed") or service.default_model() != DEFAULT_MODEL:
        return None
    advice = _advice(service)
    if advice is None:
        return Steps(service.index.count(), None)
    model = service.app.catalog.find(advice.model)
    licence = service.app.catalog.licence_of(model)
    return Steps(service.index.count(), advice, model.name, licence.name, licence.commercial)


def first_request() -> Request:
    return Request(model=DEFAULT_MODEL, prompt=FIRST_PROMPT)


def _advice(service: Service) -> Advice | None:
    if not service.knows_device:
        return None
    best = service.app.recommend(service.device())[0]
    return best if best.runs else None


def guide(t: Words, now: Steps) -> str:
    """The walk-through as HTML; its buttons: first, get, later."""
    items = [_first(t, now), _own(t, now), _real(t, now)]
    later = button(t("Close the walk-through"), "later", "plain")
    return (
        f'<section class="qit-card qit-guide" aria-label="{text(t("Walk-through"))}">'
        f"<h3>{text(t('Three steps to your own pictures'))}</h3><ol>{''.join(items)}</ol>{later}"
        "</section>"
    )


def _first(t: Words, now: Steps) -> str:
    said = t("The practice model comes with the program and draws coloured shapes in seconds.")
    done = now.pictures > 0
    start = "" if done else button(t("Draw a first picture now"), "first", "primary")
    return _item(t("See a picture form"), said, start, done)


def _own(t: Words, now: Steps) -> str:
    said = t("Change the sentence or the shape, look at what it will need, and press Generate.")
    return _item(t("Say it yourself"), said, "", done=now.pictures > 1)


def _real(t: Words, now: Steps) -> str:
    if now.advice is None:
        return _item(
            t("Get a real model"), t("Reading what this computer can do …"), "", done=False
        )
    facts = [now.name, t("{size} to download", size=size_text(now.advice.to_fetch)), now.licence]
    if not now.commercial:
        facts.append(t("Not for commercial use"))
    if now.advice.seconds is not None:
        facts.append(t("{time} a picture", time=time_text(t, now.advice.seconds)))
    said = f"{' · '.join(facts)}. {sentence(t, now.advice.reason)}"
    get = button(t("Get {model}", model=now.name), "get", model=now.advice.model)
    return _item(t("Get the real model for this computer"), said, get, done=False)


def _item(title: str, said: str, act: str, done: bool) -> str:
    return (
        f'<li class="{"done" if done else ""}"><strong>{text(title)}</strong>'
        f'<p class="soft">{text(said)}</p>{act}</li>'
    )
