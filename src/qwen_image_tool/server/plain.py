"""Small pages that fetch nothing: what stands before the page, in its look.

PALETTE is the only place with colours; `ui/theme.py` gives them to Gradio.
"""

import html
from importlib.resources import files
from pathlib import Path
from typing import Literal

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse

Language = Literal["en", "zh"]
LANGUAGE_COOKIE = "qit_language"

# name: (light, dark). The page's own pieces of HTML use them as --qit-NAME.
PALETTE = {
    "paper": ("#f6f6f9", "#121217"),
    "card": ("#ffffff", "#1b1b22"),
    "field": ("#ffffff", "#22222b"),
    "sunk": ("#efeff4", "#16161c"),
    "line": ("#dcdce5", "#34343f"),
    "strong-line": ("#8b8b9b", "#74748a"),
    "ink": ("#1d1d26", "#ececf2"),
    "soft": ("#5a5a6a", "#a6a6b6"),
    "accent": ("#5546d6", "#a79dff"),
    "fill": ("#5546d6", "#6a5be6"),
    "fill-hover": ("#4436bd", "#5a4bd6"),
    "on-fill": ("#ffffff", "#ffffff"),
    "tint": ("#eeecfd", "#2a2745"),
    "good": ("#1a6b3c", "#7bd8a0"),
    "warn": ("#8a5200", "#f2c063"),
    "warn-tint": ("#fff4dd", "#332813"),
    "bad": ("#b3261e", "#ff9d94"),
    "bad-tint": ("#fdecea", "#3a1c1a"),
}

_CHINESE = {
    "This page opens with the address that QwenImageTool printed when it started.": (
        "请用 QwenImageTool 启动时显示的地址打开本页面。"
    ),
    "On this computer, {command} prints it again.": "在这台电脑上，{command} 会再次显示它。",
    "Log in with the password": "用密码登录",
    "Password": "密码",
    "Log in": "登录",
    "That was not it.": "密码不对。",
    "Too many wrong passwords: wait {seconds} seconds.": "密码错误次数过多：请等待 {seconds} 秒。",
    "Set by whoever runs QwenImageTool, with {command} or on its Settings tab.": (
        "由运行 QwenImageTool 的人设置：用 {command}，或在“设置”页。"
    ),
}


def language_of(headers: Headers) -> Language:
    """The one that was chosen on the page, else what the browser asks for."""
    chosen = cookie_parser(headers.get("cookie", "")).get(LANGUAGE_COOKIE, "")
    asked = chosen or headers.get("accept-language", "")
    return "zh" if asked.strip().lower().startswith("zh") else "en"


def closed(language: Language, takes_password: bool) -> HTMLResponse:
    """For a browser that has not come through the gate."""
    how = _say(
        language, "This page opens with the address that QwenImageTool printed when it started."
    )
    again = _say(language, "On this computer, {command} prints it again.", command="qit token")
    log_in = _say(language, "Log in with the password")
    link = f'<a href="/login">{log_in}</a>' if takes_password else ""
    body = f'<main><p>{how}</p><p class="soft">{again}</p></main>{link}'
    return HTMLResponse(plain_page(language, body), 401)


def login(language: Language, wrong: bool = False, seconds: float = 0.0) -> HTMLResponse:
    """The form for the password. `wrong`: the last one was; `seconds`: how long to wait with the
    next."""
    said, status = "", 200
    if seconds:
        wait = "Too many wrong passwords: wait {seconds} seconds."
        said, status = _say(language, wait, seconds=f"{seconds:.0f}"), 429
    elif wrong:
        said, status = _say(language, "That was not it."), 401
    whose = "Set by whoever runs QwenImageTool, with {command} or on its Settings tab."
    body = (
        '<form method="post" action="/login">'
        f'<label for="password">{_say(language, "Password")}</label>'
        '<input type="password" name="password" id="password" autocomplete="current-password"'
        ' aria-describedby="said whose" required autofocus>'
        f'<p class="bad" role="alert" id="said">{said}</p>'
        f"<button>{_say(language, 'Log in')}</button>"
        f'<p class="soft" id="whose">{_say(language, whose, command="qit password")}</p></form>'
    )
    headers = {"retry-after": f"{seconds:.0f}"} if seconds else None
    return HTMLResponse(plain_page(language, body), status, headers)


def _say(language: Language, text: str, command: str = "", **fields: str) -> str:
    """As HTML."""
    told = _CHINESE[text] if language == "zh" else text
    return html.escape(told).format(command=f"<code>{html.escape(command)}</code>", **fields)


def plain_page(language: Language, body: str, style: str = "") -> str:
    """A page with the logo over `body`, which is HTML."""
    colours = [
        "".join(f"--{name}:{shades[dark]};" for name, shades in PALETTE.items()) for dark in (0, 1)
    ]
    return (
        f'<!doctype html><html lang="{"zh-CN" if language == "zh" else "en"}"><head>'
        '<meta charset="utf-8"><title>QwenImageTool</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>:root {{ {colours[0]} }}"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {colours[1]} }} }}{_STYLE}{style}"
        f"</style></head><body>{logo()}<h1>QwenImageTool</h1>{body}</body></html>"
    )


def logo() -> str:
    return logo_file().read_text(encoding="utf-8").strip()


def logo_file() -> Path:
    return Path(str(files(__package__))) / "logo.svg"


_STYLE = """
body { margin: 0; min-height: 100vh; display: grid; place-content: center; justify-items: center;
  gap: 14px; padding: 24px; box-sizing: border-box; text-align: center; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
svg { width: 64px; height: 64px } p { margin: 0; max-width: 34em } main { display: grid; gap: 8px }
h1 { font-size: 20px; font-weight: 650; margin: 0 }
.soft { color: var(--soft); font-size: 14px }
.bad { color: var(--bad) } .bad:empty { display: none }
code { background: var(--sunk); border: 1px solid var(--line); border-radius: 5px; padding: 1px 5px;
  white-space: nowrap }
a { color: var(--accent) } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
form { display: grid; gap: 10px; width: min(300px, 100%); text-align: left; margin-top: 6px }
label { font-weight: 600; font-size: 14px }
input { font: inherit; padding: 9px 12px; border-radius: 8px; border: 1px solid var(--strong-line);
  background: var(--field); color: inherit; width: 100%; box-sizing: border-box }
button { font: inherit; font-weight: 600; padding: 9px 18px; border-radius: 8px; border: 0;
  background: var(--fill); color: var(--on-fill); cursor: pointer }
button:hover { background: var(--fill-hover) }
[hidden] { display: none }
"""
