"""What is shown while Gradio is loaded: one small page without anything else to fetch."""

import html
import json
from importlib.resources import files

from qwen_image_tool.ui.words import Words

READY_PATH = "/page/ready"


def start_page(t: Words) -> str:
    """It waits for READY_PATH, then becomes the page."""
    said = {
        "failed": t("The page can't be loaded: {error}", error="%s"),
        "gone": t("QwenImageTool has ended. Start it again with: ./qit ui"),
    }
    return _START.format(
        language="zh-CN" if t.language == "zh" else "en",
        logo=logo(),
        opening=html.escape(t("Opening the page …")),
        slow=html.escape(t("The first start after an installation takes longest.")),
        repair=html.escape(t("Run ./qit setup (Windows: qit setup), then try again.")),
        again=html.escape(t("Try again")),
        ready=READY_PATH,
        said=json.dumps(said).replace("<", "\\u003c"),
    )


def logo() -> str:
    return files(__package__).joinpath("logo.svg").read_text(encoding="utf-8").strip()


_START = """<!doctype html><html lang="{language}"><head><meta charset="utf-8">
<title>QwenImageTool</title><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><style>
:root {{ --paper: #f7f7f9; --ink: #1d1d26; --soft: #5c5c6b; --line: #dddde6; --accent: #5546d6 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #131318; --ink: #ececf2; --soft: #a2a2b2; --line: #32323d; --accent: #9a90ff }}
}}
body {{ margin: 0; min-height: 100vh; display: grid; place-content: center; justify-items: center;
  gap: 14px; padding: 24px; box-sizing: border-box; text-align: center; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }}
svg {{ width: 64px; height: 64px }} p {{ margin: 0; max-width: 34em }}
.soft {{ color: var(--soft) }}
.bar {{ width: 180px; height: 4px; border-radius: 2px; background: var(--line); overflow: hidden }}
.bar i {{ display: block; width: 40%; height: 100%; background: var(--accent);
  animation: go 1.2s infinite ease-in-out alternate }}
@keyframes go {{ from {{ transform: translateX(-60%) }} to {{ transform: translateX(210%) }} }}
@media (prefers-reduced-motion: reduce) {{ .bar i {{ animation: none }} }}
button {{ font: inherit; padding: 8px 18px; border-radius: 8px; border: 1px solid var(--line);
  background: none; color: inherit; cursor: pointer }}
[hidden] {{ display: none }}
</style></head><body>{logo}<main role="status"><p id="what">{opening}</p></main>
<div class="bar" id="bar"><i></i></div><p class="soft" id="slow">{slow}</p>
<p class="soft" id="repair" hidden>{repair}</p>
<button id="again" hidden onclick="location.reload()">{again}</button>
<script>
const said = {said}, at = id => document.getElementById(id);
function stop(text, repair) {{
  at('what').textContent = text;
  at('bar').hidden = at('slow').hidden = true;
  at('again').hidden = false;
  at('repair').hidden = !repair;
}}
async function wait() {{
  for (;;) {{
    const answer = await (await fetch('{ready}')).json();
    if (answer.ready) return location.reload();
    if (answer.failure) return stop(said.failed.replace('%s', answer.failure), true);
  }}
}}
wait().catch(() => stop(said.gone, false));
</script></body></html>"""
