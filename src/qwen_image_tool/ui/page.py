"""The page: the tabs in their order, the theme, and the FastAPI app that serves them."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from qwen_image_tool import __version__
from qwen_image_tool.server.plain import logo, logo_file
from qwen_image_tool.service import Service
from qwen_image_tool.ui import album, create, models, queue, settings, system
from qwen_image_tool.ui.kit import Kit
from qwen_image_tool.ui.theme import palette_css, theme
from qwen_image_tool.ui.words import Words

TICK = 0.5  # seconds
SESSIONS = 200  # tabs and reloads of them, whose state is kept
RETURNED = """document.addEventListener(
  'visibilitychange', () => { if (!document.hidden) trigger('click', {}); }
);"""


class _Page(gr.Blocks):
    """Without the connection that Gradio keeps open for each tab of a browser, to hear that it was
    closed: a browser has six of them for all its tabs, and the sixth tab would stop every one."""

    def get_config_file(self) -> Any:
        return super().get_config_file() | {"connect_heartbeat": False}


def build(service: Service, t: Words) -> FastAPI:
    """The page in one language, as an app to be served at /."""
    here = Path(str(files(__package__)))
    os.environ["GRADIO_TEMP_DIR"] = str(service.app.settings.cache / "page")  # uploads go there
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gr.mount_gradio_app(
        app,
        blocks(service, t),
        path="/",
        footer_links=[],
        run_history=False,
        theme=theme(),
        css=palette_css() + (here / "page.css").read_text(encoding="utf-8"),
        head=_head(t, (here / "page.js").read_text(encoding="utf-8")),
        favicon_path=str(logo_file()),
        allowed_paths=[],
        max_file_size="64mb",
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )
    return app


def blocks(service: Service, t: Words) -> gr.Blocks:
    """All tabs. A tab is a module whose `build` is called inside of it."""
    made = _Page(title="QwenImageTool", analytics_enabled=False, fill_width=True)
    made.state_session_capacity = SESSIONS
    with made:
        with gr.Row(elem_id="qit-top"):
            gr.HTML(_header(), elem_id="qit-header", apply_default_css=False)
            file = album.file_button(t)
        clock, wanted = gr.Timer(TICK), gr.JSON(visible="hidden")
        said = gr.HTML(elem_id="qit-said", js_on_load=RETURNED, apply_default_css=False)
        with gr.Tabs(selected="create", elem_id="qit-tabs") as tabs:
            kit = Kit(service, t, tabs, wanted, clock, made.load, said.click, said)
            with gr.Tab(t("Create"), id="create", elem_id="qit-create") as tab:
                create.build(kit, tab)
            with gr.Tab(t("Queue"), id="queue", elem_id="qit-queue") as tab:
                queue.build(kit, tab)
            with gr.Tab(t("Gallery"), id="gallery", elem_id="qit-gallery"):
                album.build(kit)
            with gr.Tab(t("Models"), id="models", elem_id="qit-models") as tab:
                models.build(kit, tab)
            with gr.Tab(t("System"), id="system", elem_id="qit-system") as tab:
                system.build(kit, tab)
            with gr.Tab(t("Settings"), id="settings", elem_id="qit-settings-tab") as tab:
                settings.build(kit, tab)
        album.listen_for_files(kit, file)
    return made


def _header() -> str:
    return f'{logo()}<h1>QwenImageTool</h1><span class="soft">{__version__}</span>'


def _head(t: Words, script: str) -> str:
    """The page's own script, with the words that it says."""
    said = {
        "language": "zh-CN" if t.language == "zh" else "en",
        "gone": t(
            "QwenImageTool has ended, or can't be reached. Start it again; the queue is kept."
        ),
        "drop": t("Drop a picture to read its settings"),
    }
    words = json.dumps(said).replace("<", "\\u003c")
    return f"<script>window.qit = {words};\n{script}</script>"
